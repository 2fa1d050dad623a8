"""A self-tuned model against plain ones: without any augmentation, and at the best of random settings of equal cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import hypergrad as hg
from experiments import _search

PyTree = Any


class Task(NamedTuple):
    """What is trained, and what is tuned.

    Attributes:
        model: `(rngs, responding) -> nnx.Module`: of plain layers, or of layers that respond.
        predict: `(model, inputs, offset, hparams, key) -> outputs`; `offset` is `()` or `(offset,)`, to be handed to
            every layer, and `hparams` None where augmentation is off.
        loss: `(outputs, targets) -> scalar`.
        ranges: hyperparameters by name, for search and domain.
        start: where self-tuning begins.
        train, valid, test: `(inputs, targets)`.
        batch: rows of a training batch.
        rate: learning rate of Adam.
        calls: outer steps.
        steps: training steps in each.
    """

    model: Callable[[nnx.Rngs, bool], nnx.Module]
    predict: Callable[..., jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    ranges: _search.Ranges
    start: dict[str, float]
    train: PyTree
    valid: PyTree
    test: PyTree
    batch: int
    rate: float
    calls: int
    steps: int = 5


def compare(task: Task, seed: int, numbers: dict[str, Any]) -> hg.Result:
    """Fill in test losses and costs; returns the self-tuned run."""
    domain = {
        name: hg.domains.integer(low, high) if kind == "integer" else hg.domains.interval(low, high)
        for name, (low, high, kind) in task.ranges.items()
    }
    graph, state = nnx.split(task.model(nnx.Rngs(seed), True))

    def outputs(pair: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        params, offset = pair
        return task.predict(nnx.merge(graph, params), batch[0], (offset,), hparams, key)

    def outer_loss(pair: PyTree, hparams: PyTree, batch: PyTree) -> jax.Array:
        params, offset = pair
        return task.loss(task.predict(nnx.merge(graph, params), batch[0], (offset,), None, None), batch[1])

    problem = hg.Problem(hg.compose(outputs, lambda out, pair, hparams, batch: task.loss(out, batch[1])), outer_loss)
    solver = hg.self_tuning(
        problem, response=hg.responses.gated(), optimizer=optax.adam(task.rate), steps=task.steps, domain=domain,
        perturb="example", scale_optimizer=optax.adam(1e-2),
    )  # fmt: skip
    clock = _search.Clock()
    result = hg.tune(
        solver, nnx.to_pure_dict(state), task.start, hg.minibatches(task.train, task.batch), task.valid,
        outer=optax.adam(3e-2), steps=task.calls, domain=domain, key=jax.random.key(seed), callbacks=clock,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    numbers["validation_loss_stn"] = result.best.value
    numbers["test_loss_stn"] = outer_loss(result.best.params, None, task.test)
    numbers["test_loss_stn_last"] = outer_loss(result.params, None, task.test)
    numbers["tuned"] = {name: result.best.hparams[name] for name in task.ranges}
    numbers["seconds_stn"] = clock.seconds

    evaluate, test_loss = fixed(task, seed)
    off = evaluate(dict.fromkeys(task.ranges, 0.0))
    numbers["validation_loss_plain"], numbers["test_loss_plain"] = off.value, test_loss(off)
    retrained = evaluate({name: float(result.best.hparams[name]) for name in task.ranges})
    numbers["validation_loss_retrained"], numbers["test_loss_retrained"] = retrained.value, test_loss(retrained)
    runs: list[_search.Run] = []
    for setting in _search.random(task.ranges, 1000, seed):
        runs.append(evaluate(setting))
        if sum(run.seconds for run in runs) >= clock.seconds:
            break
    chosen = _search.best(runs)
    numbers["validation_loss_random"], numbers["test_loss_random"] = chosen.value, test_loss(chosen)
    numbers["random_runs"], numbers["random_setting"] = len(runs), chosen.setting
    numbers["better_than_plain"] = bool(numbers["test_loss_stn"] < numbers["test_loss_plain"])
    numbers["better_than_random"] = bool(numbers["test_loss_stn"] < numbers["test_loss_random"])
    return result


def fixed(task: Task, seed: int) -> tuple[Callable[[dict[str, float]], _search.Run], Callable[[_search.Run], float]]:
    """A function that trains the plain model at a setting, and one that tests the run."""
    graph, state = nnx.split(task.model(nnx.Rngs(seed), False))
    params, key = nnx.to_pure_dict(state), jax.random.key(seed)
    x, y = map(jnp.asarray, task.train)

    def training_loss(params: PyTree, setting: PyTree, key: jax.Array) -> jax.Array:
        rows_key, key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (task.batch,), 0, len(y))
        return task.loss(task.predict(nnx.merge(graph, params), x[rows], (), setting, key), y[rows])

    def loss(params: PyTree, data: PyTree) -> jax.Array:
        return task.loss(task.predict(nnx.merge(graph, params), jnp.asarray(data[0]), (), None, None), data[1])

    run = _search.trainer(
        training_loss, lambda params: loss(params, task.valid), optax.adam(task.rate),
        steps=task.steps * task.calls, every=task.steps,
    )  # fmt: skip
    return lambda setting: run(params, setting, key), lambda run: float(loss(run.params, task.test))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over everything, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def draw_schedules(result: hg.Result, ranges: _search.Ranges, title: str, path: Any) -> None:
    """Each hyperparameter, as a share of its range, over the run; below, the validation loss."""
    from matplotlib.figure import Figure

    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    figure = Figure(figsize=(7.2, 5.2), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    steps = np.arange(len(result.history.value))
    for (name, (low, high, _)), color in zip(ranges.items(), colors, strict=False):
        label = f"{name}, of {high:g}"
        top.plot(steps, (result.history.hparams[name] - low) / (high - low), color=color, label=label, linewidth=1.6)
    top.set(ylabel="share of its range", ylim=(-0.02, 1.02))
    top.set_title(title, loc="left", fontsize=11, fontweight="bold")
    top.legend(frameon=False, fontsize=9, ncols=2)
    bottom.plot(steps, result.history.value, color="#222222", linewidth=1.2)
    bottom.plot([result.best.step], [result.best.value], "o", color=colors[1], label=f"best: {result.best.value:.3f}")
    bottom.set(xlabel="outer step", ylabel="validation loss", yscale="log")
    bottom.legend(frameon=False, fontsize=9)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    top.axvline(result.best.step, color=colors[1], linewidth=0.8, linestyle=(0, (4, 3)))
    figure.savefig(path, dpi=110)

"""A self-tuned model against plain ones: without any augmentation, and at the best of random settings of equal cost.

The search may be one that a person would set up who knows the task: over a box of mild settings, with no augmentation
at all and the setting where self-tuning starts thrown in free of charge.
"""

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
from experiments import _figures as style
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
        mild: ranges of a search by a person who knows the task; None leaves it out.
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
    mild: _search.Ranges | None = None


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
    if task.mild:
        known_best(task, seed, numbers, evaluate, test_loss, free=[off, evaluate(task.start)])
    every = max(task.calls // 50, 1)
    numbers["curves"] = {name: result.history.hparams[name][::every] for name in task.ranges}
    numbers["curves"]["validation loss"] = result.history.value[::every]
    numbers["better_than_plain"] = bool(numbers["test_loss_stn"] < numbers["test_loss_plain"])
    numbers["better_than_random"] = bool(numbers["test_loss_stn"] < numbers["test_loss_random"])
    return result


def known_best(
    task: Task, seed: int, numbers: dict[str, Any], evaluate: Any, test_loss: Any, free: list[_search.Run]
) -> None:
    """What a search over mild settings finds at the cost of the self-tuned run, and at four times that cost.

    Means over all subsets of sixteen settings, in each of which the runs that are `free` may win as well.
    """
    assert task.mild is not None
    runs = [evaluate(setting) for setting in _search.random(task.mild, 16 if task.calls > 10 else 2, seed)]
    base = _search.best(free)
    numbers["test_loss_start"] = test_loss(free[1])
    pairs = [min((run.value, test_loss(run)), (base.value, test_loss(base))) for run in runs]
    cost = numbers["seconds_stn"] / np.mean([run.seconds for run in runs])
    once = min(max(round(float(cost)), 1), len(runs))
    numbers["cost"], numbers["mild_runs"] = cost, once
    numbers["test_loss_mild"] = _search.expected_best(pairs, once)
    numbers["test_loss_mild_4"] = _search.expected_best(pairs, min(4 * once, len(runs)))
    numbers["gain_over_mild"] = numbers["test_loss_mild"] - numbers["test_loss_stn"]
    numbers["gain_over_mild_4"] = numbers["test_loss_mild_4"] - numbers["test_loss_stn"]


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


def drawing(results: dict[str, Any], ranges: _search.Ranges, title: str) -> Any:
    """Test losses of the arms by seed; and each hyperparameter as a share of its range, where its curve was kept."""
    arms = {
        "plain, nothing": ("test_loss_plain", style.ORANGE),
        "random search": ("test_loss_random", style.PINK),
        "search of mild settings": ("test_loss_mild", style.PINK),
        "… at 4 times the cost": ("test_loss_mild_4", style.PINK),
        "self-tuned": ("test_loss_stn", style.BLUE),
        "plain, retrained there": ("test_loss_retrained", style.SKY),
    }
    rows = {text: (style.each(results, path), color) for text, (path, color) in arms.items()}
    rows = {text: row for text, row in rows.items() if None not in row[0]}
    if "search of mild settings" in rows:  # no rival over the whole ranges, and off the scale of the others
        del rows["random search"]
    canvas = style.figure(12, 4.6)
    left, right = canvas.subplots(1, 2, width_ratios=(1, 1.15))
    style.over_seeds(left, rows, "Test loss, nats (mean, standard error)", xlabel="test loss, nats")
    colors = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.YELLOW)
    if all("curves" in numbers for numbers in results.values()):
        for (name, (low, high, _)), color in zip(ranges.items(), colors, strict=False):
            shares = (np.array([run["curves"][name] for run in results.values()]) - low) / (high - low)
            at = np.linspace(0, 1, shares.shape[1])
            style.curves(right, at, shares, color, f"{name}, of {high:g}")
        style.titled(right, title, xlabel="share of the run", ylabel="share of its range")
        style.legend(canvas, right, columns=5)
    else:
        rows = {}
        for (name, (low, high, _)), color in zip(ranges.items(), colors, strict=False):
            rows[f"{name}, of {high:g}"] = (
                [(v - low) / (high - low) for v in style.each(results, f"tuned.{name}")],
                color,
            )
        style.over_seeds(
            right, rows, "What was learned, at the best step", xlabel="share of its range", xlim=(-0.03, 1.03)
        )
    return canvas

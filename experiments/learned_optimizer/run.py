"""A small learned optimizer, meta-trained on digits by evolution, beside Adam with a tuned rate and schedule.

    Δp = −η_t ρ(p) · d / rms(d),     d = m₂ / √v + MLP(features of g, p, momenta and time)

The network sees each parameter alone; one and the same 4-unit network moves all of them. Its weights, a log rate and
the log decay rates of its momenta are hyperparameters of `hg.evolution`, on networks of width 16 for 200 steps. Held
out: digits at width 128, breast_cancer, and a character transformer.

    python experiments/learned_optimizer/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import digits, stratified, stretches  # noqa: E402
from experiments.networks.models import LENGTH as CHARACTERS  # noqa: E402
from experiments.networks.models import network  # noqa: E402

PyTree = Any
STEPS, TRUNCATE, BATCH, HIDDEN = 200, 50, 32, 4
TIMES = (0.03, 0.1, 0.3, 1.0)  # of the whole run, where the features of time bend
FEATURES = 6 + len(TIMES)
MULTIPLES = np.geomspace(0.1, 10, 7)  # of a rate, among which every optimizer's is tuned
RATE = 2e-2  # the middle of Adam's grid, and the learned rule's rate before meta-training
SCHEDULES = ("constant", "cosine", "warm")
OUTER = 1e-2  # rate of the rule's weights
TALL = 3 * np.log(10.0)  # losses of meta-training are cut off here


# The optimizer.


class Moments(NamedTuple):
    """Three momenta and a mean square of each parameter's gradient, and the step."""

    momenta: PyTree
    square: PyTree
    count: Any


def rule(key: Any) -> PyTree:
    """Where meta-training starts: without the network's word, Adam's direction, of a size of its own, at one rate."""
    first, second = jax.random.split(key)
    return {
        "in": 0.3 * jax.random.normal(first, (FEATURES, HIDDEN)),
        "hidden": 0.5 * jax.random.normal(second, (HIDDEN, HIDDEN)),
        "out": jnp.zeros((HIDDEN, 1)),
        "rate": jnp.log(jnp.asarray(RATE)),
        "decay": jnp.log(jnp.asarray([0.5, 0.1, 0.01, 0.01])),  # one less the decay of the momenta and of the square
    }


def learned(h: PyTree) -> optax.GradientTransformation:
    """The optimizer of these weights, for a run of `STEPS` steps."""
    lag = jnp.minimum(jnp.exp(h["decay"]), 1)

    def init(params: PyTree) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments((zeros,) * 3, zeros, jnp.zeros((), jnp.float32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        follow = lambda old, new, lag: jax.tree.map(lambda m, g: m + lag * (g - m), old, new)
        momenta = tuple(follow(m, updates, lag[i]) for i, m in enumerate(state.momenta))
        square = follow(state.square, jax.tree.map(jnp.square, updates), lag[3])
        count = state.count + 1
        left = 1 - (1 - lag) ** count  # what makes up for the zeros at the start, as in Adam
        time = count / STEPS
        clock = jnp.tanh(jnp.log(time / jnp.asarray(TIMES)))
        rate = jnp.exp(h["rate"]) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(time, 1)))

        def move(p: Any, g: Any, v: Any, *m: Any) -> Any:
            root = jnp.sqrt(v / left[3]) + 1e-8
            inputs = [x / left[i] / root for i, x in enumerate(m)]
            inputs += [g / root, p / (rms(p) + 1e-3), jnp.log(root / (rms(root) + 1e-8))]
            inputs = jnp.stack([jnp.clip(x, -5, 5) for x in inputs], -1)
            hidden = jnp.tanh(inputs @ h["in"][: inputs.shape[-1]] + clock @ h["in"][inputs.shape[-1] :])
            direction = inputs[..., 1] + (jnp.tanh(hidden @ h["hidden"]) @ h["out"])[..., 0]
            return -rate * jnp.maximum(rms(p), 0.1) / 0.1 * direction / (rms(direction) + 1e-3)

        return jax.tree.map(move, params, updates, square, *momenta), Moments(momenta, square, count)

    return optax.GradientTransformation(init, update)


def rms(x: Any) -> Any:
    return jnp.sqrt(jnp.mean(x**2) + 1e-12)


# What it trains.


class Task(NamedTuple):
    """Parameters drawn from a key, the loss of a batch, and rows for training, validation and testing."""

    start: Callable[[Any], PyTree]
    loss: Callable[[PyTree, Any], Any]
    train: Any
    valid: Any
    test: Any


def cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def perceptron(parts: Any, width: int, classes: int) -> Task:
    features = parts[0][0].shape[1]

    def start(key: Any) -> PyTree:
        first, second = jax.random.split(key)
        draw = lambda key, a, b: jax.random.normal(key, (a, b)) / jnp.sqrt(a)
        return {"in": draw(first, features, width), "bias": jnp.zeros(width), "out": draw(second, width, classes)}

    def loss(w: PyTree, batch: Any) -> Any:
        return cross_entropy(jax.nn.relu(batch[0] @ w["in"] + w["bias"]) @ w["out"], batch[1])

    return Task(start, loss, *(jax.tree.map(jnp.asarray, part) for part in parts))


def breast_cancer(seed: int) -> Task:
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer()
    x, y = bunch.data, bunch.target
    rows = stratified(y, (250, 150), seed)
    x = ((x - x[rows[0]].mean(0)) / x[rows[0]].std(0)).astype(np.float32)
    return perceptron([(x[part], y[part].astype(np.int32)) for part in rows], 32, 2)


def transformer(seed: int) -> Task:
    """One block of width 8 on sixteen characters of Python's language reference."""
    parts, _ = stretches(seed, (4000, 200, 400), CHARACTERS)
    made = network("char transformer", seed)
    assert made.outputs is not None
    outputs, params = made.outputs, made.params

    def start(key: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        shuffled = [jax.random.permutation(k, x.ravel()).reshape(x.shape) for k, x in zip(keys, leaves, strict=True)]
        return treedef.unflatten(shuffled)

    loss = lambda w, batch: cross_entropy(outputs(w, batch[0]), batch[1])
    return Task(start, loss, *(jax.tree.map(jnp.asarray, part) for part in parts))


def drawn(data: Any, count: int, key: Any) -> Any:
    rows = jax.random.randint(key, (count,), 0, len(data[1]))
    return jax.tree.map(lambda x: x[rows], data)


# Meta-training.


def meta_train(task: Task, seed: int, *, starts: int, pairs: int, calls: int) -> Any:
    """Weights of the rule from PES on several networks at once, by `hg.tasks`: a result of `hg.tune`."""
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (starts, *x.shape)), (task.train, task.valid))
    problem = hg.Problem(
        lambda w, h, data, key: task.loss(w, drawn(data, BATCH, key)),
        lambda w, h, data, key: jnp.minimum(task.loss(w, drawn(data, 2 * BATCH, key)), TALL),
    )
    inner = hg.inner.gradient(learned, steps=STEPS)
    one = hg.evolution(problem, inner=inner, method="pes", scale=0.03, pairs=pairs, truncate=TRUNCATE)
    keys = jax.random.split(jax.random.key(seed), starts)
    # Initial weights of several sizes stand for other tasks.
    sizes = jnp.exp(jnp.linspace(-0.7, 0.7, starts))
    params = jax.vmap(lambda key, size: jax.tree.map(lambda x: size * x, task.start(key)))(keys, sizes)
    # A few of evolution's draws are far too large.
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(OUTER, calls)))
    return hg.tune(
        hg.tasks(one, count=starts, params_axis=0), params, rule(jax.random.key(seed)), *rows,
        outer=outer, steps=calls, steps_per_call=min(50, calls), key=jax.random.key(seed + 1), progress=False,
    )  # fmt: skip


# Judging.


class Lane(NamedTuple):
    """A run: what its optimizer is made of, and the keys of its parameters and of its batches."""

    setting: Any
    begin: Any
    key: Any


def trained(task: Task, make: Callable[[Any], optax.GradientTransformation]) -> Callable[[Lane], Any]:
    """`lanes -> (validation losses, test losses)` after `STEPS` steps, compiled once for all lanes."""

    def run(lane: Lane) -> Any:
        params, optimizer = task.start(lane.begin), make(lane.setting)

        def step(carry: Any, key: Any) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(task.loss)(params, drawn(task.train, BATCH, key))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, jax.random.split(lane.key, STEPS))
        return task.loss(params, task.valid), task.loss(params, task.test)

    return jax.jit(jax.vmap(run))


def adam_rates(schedule: str) -> np.ndarray:
    """Adam's rate at every step, over the peak."""
    t = np.arange(STEPS) / STEPS
    return {
        "constant": np.ones(STEPS), "cosine": 0.5 * (1 + np.cos(np.pi * t)), "warm": np.minimum(10 * t + 0.02, 1.1 - t),
    }[schedule]  # fmt: skip


def judged(task: Task, rules: dict[str, PyTree], seed: int, tuning: int) -> dict[str, dict[str, Any]]:
    """Of every optimizer: losses at each rate, and test losses of fresh networks at the best one."""
    at_rate = lambda h, m: h | {"rate": h["rate"] + jnp.log(m)}
    stack = lambda settings: jax.tree.map(lambda *x: jnp.stack(x), *settings)
    rates = {name: jnp.asarray(RATE * adam_rates(name)) for name in SCHEDULES}
    families: Any = (
        (lambda rates: optax.adam(lambda t: rates[t]), rates, lambda rates, m: rates * m),
        (learned, rules, at_rate),
    )
    many, found = len(MULTIPLES), {}
    keys = jax.random.split(jax.random.key(seed), (2, tuning + many))
    for make, members, scaled in families:
        run = trained(task, make)
        count = len(members) * many
        lanes = stack([scaled(h, m) for h in members.values() for m in MULTIPLES])
        same = lambda key, count=count: jnp.broadcast_to(key, (count,))
        tuned = [run(Lane(lanes, same(keys[0, i]), same(keys[1, i])))[0] for i in range(tuning)]
        curves = np.nan_to_num(np.mean(np.asarray(tuned), 0), nan=99.0).reshape(len(members), many)
        chosen = np.argmin(curves, 1)
        lanes = stack(
            [scaled(h, MULTIPLES[i]) for h, i in zip(members.values(), chosen, strict=True) for _ in range(many)]
        )
        fresh = [jnp.tile(part[tuning:], len(members)) for part in keys]
        tests = np.asarray(run(Lane(lanes, *fresh))[1]).reshape(len(members), many)
        for i, name in enumerate(members):
            found[name] = {"curve": curves[i], "test": tests[i], "multiple": float(MULTIPLES[chosen[i]])}
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    seed, smoke = options.seed, options.smoke
    width, starts, pairs, calls, tuning = (4, 2, 2, 4, 1) if smoke else (16, 4, 4, 300, 2)
    parts = digits(seed, (900, 300))
    tasks = {"digits": perceptron(parts, width, 10)}
    if not smoke:
        tasks |= {"wide": perceptron(parts, 128, 10), "cancer": breast_cancer(seed), "transformer": transformer(seed)}
    result = meta_train(tasks["digits"], seed, starts=starts, pairs=pairs, calls=calls)
    episodes = result.history.value.reshape(-1, STEPS // TRUNCATE).mean(1)
    tenth = max(len(episodes) // 10, 1)
    numbers["meta"] = {
        "first": float(episodes[:tenth].mean()),
        "last": float(episodes[-tenth:].mean()),
        "usable": float(np.mean(result.history.usable)),
    }
    rules = {"start": rule(jax.random.key(seed)), "learned": jax.tree.map(jnp.asarray, result.hparams)}
    judging = {name: judged(task, rules, seed, tuning) for name, task in progress(tasks.items(), "tasks")}
    for name, rows in judging.items():
        rival = min(SCHEDULES, key=lambda schedule, rows=rows: rows[schedule]["curve"].min())
        here: dict[str, Any] = {"adam": float(rows[rival]["test"].mean()), "schedule": rival}
        here |= {"learned_multiple": rows["learned"]["multiple"], "adam_multiple": rows[rival]["multiple"]}
        for key in rules:
            off = rows[key]["test"] - rows[rival]["test"]  # of the same initial parameters and batches
            here |= {
                key: float(rows[key]["test"].mean()), f"{key}_over_adam": float(off.mean()),
                f"{key}_error": float(np.std(off, ddof=1) / len(off) ** 0.5),
            }  # fmt: skip
        numbers[name] = here
    if options.out and not smoke:
        draw(options.out, episodes, judging)


def draw(folder: Path, episodes: np.ndarray, judging: dict[str, dict[str, dict[str, Any]]]) -> None:
    from experiments import _figures as style

    names = {"constant": "Adam, constant", "cosine": "Adam, cosine", "warm": "Adam, warm-up and decay",
             "start": "the rule before", "learned": "the learned rule"}  # fmt: skip
    colors = dict(zip(names, (style.SKY, style.BLUE, style.PINK, style.INK, style.ORANGE), strict=True))
    figure = style.figure(13.5, 5.2)
    axes = figure.subplots(1, 1 + len(judging))
    axes[0].plot(episodes, color=style.ORANGE, linewidth=1.4)
    style.titled(axes[0], "meta-training", xlabel="episode", ylabel="loss, mean over an episode")
    for place, (name, rows) in zip(axes[1:], judging.items(), strict=True):
        for key, row in rows.items():
            place.loglog(MULTIPLES, row["curve"], color=colors[key], label=names[key], linewidth=1.5)
        style.titled(place, name, xlabel="multiple of the rate", ylabel="validation loss after 200 steps")
        lowest = min(row["curve"].min() for row in rows.values())
        place.set_ylim(0.9 * lowest, 12 * lowest)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    style.save(figure, folder, "course.png", colours=64)


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Learned rule less tuned Adam",
            "difference in test loss",
            {
                "digits, width 16": ("digits.learned_over_adam", style.BLUE),
                "digits, width 128": ("wide.learned_over_adam", style.BLUE),
                "breast cancer": ("cancer.learned_over_adam", style.BLUE),
                "transformer": ("transformer.learned_over_adam", style.BLUE),
            },
        ),
        (
            "Before meta-training, less Adam",
            "difference in test loss",
            {
                "digits, width 16": ("digits.start_over_adam", style.ORANGE),
                "digits, width 128": ("wide.start_over_adam", style.ORANGE),
                "breast cancer": ("cancer.start_over_adam", style.ORANGE),
                "transformer": ("transformer.start_over_adam", style.ORANGE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

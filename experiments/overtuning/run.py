"""How much of a tuned validation loss is luck, predicted without test data, and held against the truth.

    python experiments/overtuning/run.py --seed 0 --json

Penalties, length scales and decays are tuned on few validation rows, for 20 splits side by side. The validation loss,
the same corrected by `hg.diagnostics.overtuning`, split-half and nested cross-validation are compared with the loss on
many test rows.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment, measured_before
from experiments._figures import BLUE, GREEN, ORANGE, PINK, figure, titled

SPLITS, TEST, FOLDS = 20, 2000, 5
FEATURES, TRAIN = 60, 80


class Task(NamedTuple):
    """A problem whose validation loss is a weighted mean over rows `(x, y, weight)`, its solver and its data."""

    solver: hg.Solver
    start: Any  # parameters
    hparams: Any  # where tuning starts, `[k]`
    draw: Callable[[np.random.Generator, int], tuple[Any, Any, Any]]  # training, validation, test
    steps: int  # of tuning


def weighted(errors: Any, weight: Any) -> Any:
    return jnp.sum(weight * errors) / jnp.sum(weight)


class State(NamedTuple):
    params: Any


def exact(problem: hg.Problem, steps: int) -> hg.Solver:
    """Newton steps and one dense solve: a solver written outside of the library, for small convex problems."""

    def solve(state: State, hparams: Any, train: Any) -> Any:
        start, unravel = ravel_pytree(state.params)
        loss = lambda w: problem.inner_loss(unravel(w), hparams, train)
        slope, curve = jax.grad(loss), jax.hessian(loss)
        w = jax.lax.fori_loop(0, steps, lambda _, w: w - jnp.linalg.solve(curve(w), slope(w)), 0 * start)
        return w, unravel, curve(w), slope(w)

    def info(value: Any, slope: Any) -> hg.Info:
        bad = ~jnp.isfinite(value) | ~(jnp.max(jnp.abs(slope)) < 1e-6)
        status = jnp.where(bad, hg.Status.INNER_MAX_STEPS, hg.Status.OK).astype(jnp.int32)
        zero, none = jnp.zeros(()), jnp.int32(0)
        return hg.Info(status, zero, zero, none, none, zero + 1e-8, {})

    def hypergrad(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        w, unravel, curve, slope = solve(state, hparams, train)
        outer = lambda w, h: problem.outer_loss(unravel(w), h, valid)
        value, (rhs, direct) = jax.value_and_grad(outer, (0, 1))(w, hparams)
        adjoint = jnp.linalg.solve(curve, rhs)
        inner = lambda h, w: problem.inner_loss(unravel(w), h, train)
        cross = jax.jvp(lambda w: jax.grad(inner)(hparams, w), (w,), (adjoint,))[1]
        return hg.Hypergradient(value, direct - cross, info(value, slope), {}), State(unravel(w))

    def evaluate(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        w, unravel, _, slope = solve(state, hparams, train)
        value = problem.outer_loss(unravel(w), hparams, valid)
        return value, info(value, slope), State(unravel(w))

    init = lambda params, hparams, *, key=None, model_state=None: State(params)
    return hg.Solver(init, hypergrad, lambda state, hparams: state.params, evaluate, hg.About("exact", "optimum"))


def groups(k: int, count: int = FEATURES) -> np.ndarray:
    return np.arange(count) * k // count


def linear_data(rng: np.random.Generator, rows: int, kind: str) -> tuple[Any, Any, Any]:
    """Features of which some matter; the same truth for training, validation and test rows."""
    w = rng.normal(size=FEATURES) * (rng.random(FEATURES) < 0.3) * (0.6 if kind == "ridge" else 0.8)

    def some(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = rng.normal(size=(n, FEATURES))
        z = x @ w
        y = z + rng.normal(size=n) if kind == "ridge" else (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
        return x, y, np.ones(n)

    return some(TRAIN)[:2], some(rows), some(TEST)


def ridge(k: int) -> Task:
    error = lambda w, x, y: (x @ w - y) ** 2
    problem = hg.Problem(
        lambda w, h, b: jnp.mean(error(w, *b)) + jnp.sum(jnp.exp(h)[groups(k)] * w**2),
        lambda w, h, v: weighted(error(w, v[0], v[1]), v[2]),
    )
    return Task(
        exact(problem, 1), jnp.zeros(FEATURES), jnp.full(k, -1.0), functools.partial(linear_data, kind="ridge"), 200
    )


def logistic(k: int) -> Task:
    error = lambda w, x, y: jnp.logaddexp(0, x @ w) - y * (x @ w)
    problem = hg.Problem(
        lambda w, h, b: jnp.mean(error(w, *b)) + jnp.sum(jnp.exp(h)[groups(k)] * w**2),
        lambda w, h, v: weighted(error(w, v[0], v[1]), v[2]),
    )
    draw = functools.partial(linear_data, kind="logistic")
    return Task(exact(problem, 8), jnp.zeros(FEATURES), jnp.full(k, -2.0), draw, 150)


def kernel_ridge(k: int) -> Task:
    """A Gaussian kernel with length scales for groups of features; with one hyperparameter, the ridge alone."""
    features = 30

    def gram(h: Any, a: Any, b: Any) -> Any:
        scale = jnp.exp(h[1:])[groups(k - 1, features)] if k > 1 else jnp.ones(features)
        a, b = a * scale / np.sqrt(features), b * scale / np.sqrt(features)
        return jnp.exp(-jnp.sum((a[:, None] - b[None]) ** 2, axis=-1) / 2)

    def inner(alpha: Any, h: Any, batch: Any) -> Any:
        x, y = batch
        kernel = gram(h, x, x)
        system = kernel @ alpha + jnp.exp(h[0]) * alpha - y
        return alpha @ (kernel @ alpha) / 2 + jnp.exp(h[0]) * jnp.sum(alpha**2) / 2 - alpha @ y + 0 * jnp.sum(system)

    def outer(alpha: Any, h: Any, valid: Any) -> Any:
        x, y, weight, anchors = valid
        return weighted((gram(h, x, anchors[0]) @ alpha - y) ** 2, weight)

    def draw(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
        a, b = rng.normal(size=(2, features)) * (rng.random((2, features)) < 0.2)

        def some(n: int) -> Any:
            x = rng.normal(size=(n, features))
            return x, np.sin(x @ a) + np.tanh(x @ b) + 0.3 * rng.normal(size=n), np.ones(n)

        train = some(TRAIN)[:2]
        seen = lambda part: (*part, np.broadcast_to(train[0], (len(part[0]), *train[0].shape)))
        return train, seen(some(rows)), seen(some(TEST // 4))

    return Task(exact(hg.Problem(inner, outer), 1), jnp.zeros(TRAIN), jnp.zeros(k), draw, 200)


def five_folds(k: int) -> Task:
    """Five-fold cross-validation of ridge penalties: each row is validated by the model that has not seen it."""
    error = lambda w, x, y: (x @ w - y) ** 2

    def inner(w: Any, h: Any, batch: Any) -> Any:
        x, y, fold = batch
        each = jax.vmap(lambda w, f: weighted(error(w, x, y), (fold != f).astype(y.dtype)))(w, jnp.arange(FOLDS))
        return jnp.sum(each) + jnp.sum(jnp.exp(h)[groups(k)][None] * w**2)

    def outer(w: Any, h: Any, valid: Any) -> Any:
        x, y, weight, fold = valid
        return weighted((jnp.sum(x * w[fold], axis=1) - y) ** 2, weight)

    def draw(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
        _, (x, y, one), test = linear_data(rng, rows, "ridge")
        fold = np.arange(rows) % FOLDS
        return (x, y, fold), (x, y, one, fold), (*test, np.arange(TEST) % FOLDS)

    return Task(exact(hg.Problem(inner, outer), 1), jnp.zeros((FOLDS, FEATURES)), jnp.full(k, -1.0), draw, 150)


def network_decays(k: int, steps: int = 60) -> Task:
    """A network of two layers on noisy data, a decay for each group of its features and one for its last layer."""
    width, features = 8, 20
    predict = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]

    def inner(w: Any, h: Any, batch: Any) -> Any:
        decay = jnp.exp(h[groups(max(k - 1, 1), features)])[:, None]
        penalty = jnp.sum(decay * w["in"] ** 2) + jnp.exp(h[-1]) * jnp.sum(w["out"] ** 2)
        return jnp.mean((predict(w, batch[0]) - batch[1]) ** 2) + penalty

    def draw(rng: np.random.Generator, rows: int) -> tuple[Any, Any, Any]:
        a = rng.normal(size=features) * (rng.random(features) < 0.3)

        def some(n: int) -> Any:
            x = rng.normal(size=(n, features))
            return x, np.tanh(x @ a) + 0.5 * rng.normal(size=n), np.ones(n)

        return some(TRAIN)[:2], some(rows), some(TEST)

    keys = jax.random.split(jax.random.key(0))
    start = {
        "in": jax.random.normal(keys[0], (features, width)) / np.sqrt(features),
        "out": jax.random.normal(keys[1], (width,)) / np.sqrt(width),
    }
    problem = hg.Problem(inner, lambda w, h, v: weighted((predict(w, v[0]) - v[1]) ** 2, v[2]))
    method = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.2, momentum=0.8), steps=steps), mode="reverse")
    return Task(method, start, jnp.full(k, -4.0), draw, 40)


TASKS: dict[str, Callable[[int], Task]] = {
    "ridge": ridge,
    "logistic": logistic,
    "kernel_ridge": kernel_ridge,
    "five_folds": five_folds,
    "network": network_decays,
}


@functools.partial(jax.jit, static_argnames=("solver", "steps"))
def tuned(solver: Any, steps: int, start: Any, hparams: Any, train: Any, valid: Any, weights: Any) -> tuple[Any, Any]:
    """Hyperparameters and states after tuning on each of the weightings of the validation rows, `[weightings, ...]`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, steps))

    def one(weight: Any) -> tuple[Any, Any]:
        data = (*valid[:2], weight, *valid[3:])

        def step(carry: Any, _: Any) -> Any:
            h, adam, state = carry
            out, state = solver.hypergrad(state, h, train, data)
            updates, adam = optimizer.update(out.grad, adam)
            return (jnp.clip(h + updates, -7, 5), adam, state), None

        state = solver.init(start, hparams)
        (h, _, state), _ = jax.lax.scan(step, (hparams, optimizer.init(hparams), state), None, length=steps)
        return h, state

    return jax.lax.map(one, weights)


def weightings(rng: np.random.Generator, n: int) -> np.ndarray:
    """All rows; half of them; all but each fifth."""
    order = rng.permutation(n)
    masks = [np.ones(n), (order < n // 2).astype(float)]
    masks += [(order % FOLDS != f).astype(float) for f in range(FOLDS)]
    return np.stack(masks)


@functools.partial(jax.jit, static_argnames=("solver",))
def losses(solver: Any, state: Any, hparams: Any, train: Any, data: Any, weights: Any) -> Any:
    """The outer loss at each of the hyperparameters on the rows of `weights`, `[weightings]`."""
    one = lambda h, state, w: solver.evaluate(state, h, train, (*data[:2], w, *data[3:]))[0]
    return jax.lax.map(lambda at: one(*at), (hparams, state, weights))


def cell(task: Task, rows: int, splits: int, seed: int) -> dict[str, Any]:
    """Estimates of the test loss and the test loss itself, over the splits."""
    found: dict[str, list[float]] = {}
    spent = dict.fromkeys(("tuning", "correction", "split_half", "nested"), 0.0)
    for split in range(splits):
        rng = np.random.default_rng([seed, split, rows])
        train, valid, test = jax.tree.map(jnp.asarray, task.draw(rng, rows))
        masks = jnp.asarray(weightings(rng, rows))
        began = time.process_time()
        h, states = jax.block_until_ready(tuned(task.solver, task.steps, task.start, task.hparams, train, valid, masks))
        took = (time.process_time() - began) / len(masks)
        spent["tuning"], spent["split_half"] = spent["tuning"] + took, spent["split_half"] + took
        spent["nested"] += FOLDS * took
        state = jax.tree.map(lambda x: x[0], states)
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # each says what the table says
            guess = hg.diagnostics.overtuning(task.solver, state, h[0], train, valid)
        spent["correction"] += time.process_time() - began
        held = losses(task.solver, states, h, train, valid, jnp.maximum(1 - masks, 1e-9 * (masks.min(1) > 0)[:, None]))
        true = losses(
            task.solver, jax.tree.map(lambda x: x[:1], states), h[:1], train, test, jnp.ones((1, len(test[1])))
        )
        values = {
            "raw": guess.raw,
            "corrected": guess.corrected,
            "trace": guess.raw + guess.trace,
            "split_half": float(held[1]),
            "nested": float(jnp.mean(held[2:])),
            "test": float(true[0]),
            "effective": guess.effective,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    kept = {name: np.asarray(values) for name, values in found.items()}
    good, test = np.isfinite(kept["corrected"]), kept["test"]
    mean = lambda x: float(np.mean(x[good])) if good.any() else np.nan
    numbers: dict[str, Any] = {"test": mean(test), "effective": mean(kept["effective"]), "usable": float(good.mean())}
    for kind in ("raw", "corrected", "trace", "split_half", "nested"):
        gap = (kept[kind] - test)[good]
        numbers[f"{kind}_bias"] = float(np.mean(gap)) / mean(test) if good.any() else np.nan
        numbers[f"{kind}_rms"] = float(np.sqrt(np.mean(gap**2))) / mean(test) if good.any() else np.nan
    numbers["bias_standard_error"] = float(
        np.std((kept["corrected"] - test)[good]) / np.sqrt(max(good.sum(), 1))
    ) / mean(test)
    numbers |= {f"cost_{k}": v / spent["tuning"] for k, v in spent.items() if k != "tuning"}
    return numbers


def cells(smoke: bool) -> list[tuple[str, int, int]]:
    if smoke:
        return [("ridge", 4, 30), ("network", 4, 30)]
    chosen = {
        "ridge": [(1, 30), (4, 30), (12, 30), (30, 30), (12, 100), (30, 100), (12, 300)],
        "logistic": [(4, 30), (12, 30), (12, 100)],
        "kernel_ridge": [(4, 30), (12, 30), (12, 100)],
        "five_folds": [(4, 30), (12, 30), (12, 100)],
        "network": [(4, 30), (4, 100)],
    }
    return [(name, k, n) for name, pairs in chosen.items() for k, n in pairs]


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    splits = 2 if options.smoke else SPLITS
    if options.settings:
        numbers |= measured_before(__file__, options)
    for name, k, n in cells(options.smoke):
        if options.settings and f"{name}.{k}x{n}" not in options.settings:
            continue
        began = time.process_time()
        task = TASKS[name](k)
        task = task._replace(steps=5) if options.smoke else task
        found = cell(task, n, splits, options.seed)
        numbers.setdefault(name, {})[f"{k}x{n}"] = found
        took = time.process_time() - began
        shown = {kind: f"{found[f'{kind}_bias']:+.3f}" for kind in ("raw", "corrected", "split_half", "nested")}
        print(f"{name}, {k} hyperparameters, {n} rows: {shown} ({took:.0f} s)", flush=True)
    for name in [name for name in TASKS if name in numbers]:
        many = [v for key, v in numbers[name].items() if "x" in key and int(key.split("x")[0]) >= 4]
        size = lambda kind, many=many: float(np.mean([abs(v[f"{kind}_bias"]) for v in many]))
        numbers[name]["ratio"] = size("corrected") / size("raw")
    numbers["tasks_within_a_third"] = int(sum(numbers[name]["ratio"] <= 1 / 3 for name in TASKS if name in numbers))


def arguments(parser: argparse.ArgumentParser) -> None:
    every = [f"{name}.{k}x{n}" for name, k, n in cells(False)]

    def settings(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := set(wanted) - set(every) - set(TASKS):
            raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join([*TASKS, *every])}")
        return [known for known in every if known in wanted or known.split(".")[0] in wanted]

    parser.add_argument(
        "--settings", type=settings, metavar="A,B", help="as ridge, or ridge.12x30; the others stay as kept"
    )


def drawing(results: dict[str, Any]) -> Any:
    names = [name for name in TASKS if all(name in run for run in results.values())]
    fig = figure(2.8 * len(names), 4.8)
    kinds = {"raw": ORANGE, "corrected": BLUE, "split_half": GREEN, "nested": PINK}
    labels = {"raw": "validation", "corrected": "corrected", "split_half": "split half", "nested": "nested"}
    for axes, name in zip(np.atleast_1d(fig.subplots(1, len(names))), names, strict=True):
        rows = [key for key in next(iter(results.values()))[name] if "x" in key]
        for i, (kind, colour) in enumerate(kinds.items()):
            for seed, values in enumerate(
                zip(*[style.each(results, f"{name}.{key}.{kind}_bias") for key in rows], strict=True)
            ):
                at = np.arange(len(rows)) + 0.16 * (i - 1.5)
                percent = [np.nan if value is None else 100 * value for value in values]
                axes.plot(percent, at, "o", color=colour, label=labels[kind] if seed == 0 else None, ms=4, alpha=0.7)
        axes.axvline(0, color="black", lw=0.8)
        titled(axes, name.replace("_", " "), xlabel="estimate − test, %")
        axes.set_yticks(range(len(rows)), [key.replace("x", " on ") for key in rows])
        axes.invert_yaxis()
    style.legend(fig, *fig.axes)
    return fig


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, draw=drawing)

"""Data attribution held against training again: metagradients, influence, and what is said to be cheaper.

    python experiments/attribution/run.py --seed 0 --json

Which training examples matter for the loss of a query is predicted by differentiating the training run
(`hg.attribute` with `hg.unrolled`), by implicit differentiation at an optimum, by damped Gauss-Newton influence, TracIn
and gradient products, and compared with training again without 1, 5 and 20 % of the examples.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
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
from experiments._common import experiment, measured_before
from experiments._data import digits, stretches
from experiments._figures import BLUE, GREEN, ORANGE, PINK, SKY, figure, save, titled

DROPS = (0.01, 0.05, 0.2)
QUERIES = 20
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of influence, relative to the size of the curvature; the best one is shown
POINTS = 10  # of the run, at which TracIn looks
PARTS = {
    "sgd": "a network, gradient descent",
    "softmax": "softmax regression at its optimum",
    "adam": "a network, Adam",
    "text": "a character transformer",
    "wrong": "mislabelled examples",
    "short": "a network, far from trained",
    "cost": "the cost of a query",
}


class Task(NamedTuple):
    """A model with its data, and the optimizer of its training run."""

    problem: hg.Problem
    start: Any
    decay: float
    train: Any
    queries: Any
    optimizer: optax.GradientTransformation
    steps: int


def nll(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def squares(w: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w)) / 2


def problem_of(logits: Callable[[Any, Any], Any]) -> hg.Problem:
    """Cross-entropy with a penalty; the model and the loss are kept apart for Gauss-Newton products."""
    inner = hg.compose(
        lambda w, decay, batch: logits(w, batch[0]),
        lambda out, w, decay, batch: nll(out, batch[1]) + decay * squares(w),
    )
    return hg.Problem(inner, lambda w, decay, batch: nll(logits(w, batch[0]), batch[1]))


def network(options: argparse.Namespace, optimizer: str, steps: int) -> Task:
    rows, width = (60, 8) if options.smoke else (500, 32)
    train, queries, _ = digits(options.seed, [rows, QUERIES])
    keys = jax.random.split(jax.random.key(options.seed), 2)
    start = {
        "in": jax.random.normal(keys[0], (64, width)) / 8,
        "bias": jnp.zeros(width),
        "out": jax.random.normal(keys[1], (width, 10)) / np.sqrt(width),
    }
    made = {
        "sgd": lambda: optax.sgd(optax.cosine_decay_schedule(0.5, steps), momentum=0.9),
        "adam": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, steps), eps=1e-3),
    }[optimizer]()
    problem = problem_of(lambda w, x: jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"])
    return Task(problem, start, 1e-3, train, queries, made, steps)


def softmax(options: argparse.Namespace) -> Task:
    train, queries, _ = digits(options.seed, [60 if options.smoke else 500, QUERIES])
    problem = problem_of(lambda w, x: x @ w["out"] + w["bias"])
    start = {"out": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return Task(problem, start, 1e-2, train, queries, optax.sgd(0.5), 0)


def transformer(options: argparse.Namespace) -> Task:
    """One block with one head, on stretches of text; a row is a stretch, whose every character is predicted."""
    rows, length, width = (24, 8, 8) if options.smoke else (128, 16, 16)
    (train, queries), letters = stretches(options.seed, [rows, QUERIES], length)
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    weight = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    start = {
        "embed": weight(letters, width) * 2,
        "place": weight(length, width),
        "qkv": weight(width, 3 * width),
        "mix": weight(width, width),
        "up": weight(width, 2 * width),
        "down": weight(2 * width, width),
        "out": weight(width, letters),
    }
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def logits(w: Any, codes: Any) -> Any:
        x = w["embed"][codes] + w["place"][None]
        q, k, v = jnp.split(norm(x) @ w["qkv"], 3, axis=-1)
        attention = jnp.einsum("bid,bjd->bij", q, k) / np.sqrt(width)
        seen = jnp.tril(jnp.ones((length, length), bool))
        x = x + jax.nn.softmax(jnp.where(seen[None], attention, -1e9)) @ v @ w["mix"]
        x = x + jnp.tanh(norm(x) @ w["up"]) @ w["down"]
        return norm(x) @ w["out"]

    steps = 10 if options.smoke else 60
    made = optax.adam(optax.cosine_decay_schedule(1e-2, steps), eps=1e-3)
    return Task(problem_of(logits), start, 1e-4, train, queries, made, steps)


def run(task: Task) -> Callable[[hg.Problem], hg.Solver]:
    return lambda p: hg.unrolled(p, inner=hg.inner.gradient(task.optimizer, steps=task.steps), mode="reverse")


@functools.partial(jax.jit, static_argnames=("task",))
def _gauss_newton(task: Any, w: Any, train: Any) -> Any:
    """The Gauss-Newton matrix of the mean loss, `[parameters, parameters]`, row by row of the data."""
    flat, unravel = ravel_pytree(w)

    def add(total: Any, x: Any) -> Any:
        logits = lambda v: task.value.problem.inner_loss.outputs(unravel(v), 0.0, (x[None],))[0]
        jacobian, p = jax.jacrev(logits)(flat), jax.nn.softmax(logits(flat))
        scaled = jnp.sqrt(p)[:, None] * (jacobian - (p @ jacobian)[None])
        return total + scaled.T @ scaled, None

    total = jax.lax.scan(add, jnp.zeros((len(flat), len(flat))), train[0])[0]
    return total / len(train[1])


def influence(task: Task, w: Any, queries: Any) -> dict[float, np.ndarray]:
    """Koh & Liang's rival at the end of training: a damped Gauss-Newton matrix, solved densely, for each damping."""
    held = Held(task)
    matrix = np.asarray(_gauss_newton(held, w, task.train), np.float64)
    matrix[np.diag_indices_from(matrix)] += task.decay
    q = np.asarray(_gradients(held, w, queries), np.float64)
    g = np.asarray(_gradients(held, w, task.train), np.float64)
    size = np.sqrt(np.mean(np.sum(matrix**2, axis=0)))  # the root mean square of its eigenvalues
    found = {}
    for damping in DAMPINGS:
        damped = matrix + damping * size * np.eye(len(matrix))
        found[damping] = np.linalg.solve(damped, q.T).T @ g.T / (len(g) - 1)
    return found


@functools.partial(jax.jit, static_argnames=("task",))
def _path(task: Any, start: Any, train: Any) -> Any:
    """Parameters after every step of the training run, `[steps + 1, ...]`."""
    task = task.value
    loss = lambda w: task.problem.inner_loss(w, task.decay, train)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = task.optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), w

    (end, _), path = jax.lax.scan(step, (start, task.optimizer.init(start)), None, length=task.steps)
    return jax.tree.map(lambda p, e: jnp.concatenate([p, e[None]]), path, end)


class Held:
    """Hashed by identity, for an argument of a compiled function that does not change."""

    def __init__(self, value: Any) -> None:
        self.value = value


@functools.partial(jax.jit, static_argnames=("task",))
def _gradients(task: Any, w: Any, rows: Any) -> Any:
    """Gradient of each row's loss, `[rows, parameters]`."""
    one = lambda row: jax.grad(lambda w: task.value.problem.outer_loss(w, 0.0, jax.tree.map(lambda x: x[None], row)))(w)
    return jax.vmap(lambda row: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(one(row))]))(rows)


def products(task: Task, path: Any) -> dict[str, Any]:
    """Gradient products at the end, the same with unit norms, and their sum over the run (TracIn)."""
    held, scores = Held(task), []
    at = np.unique(np.linspace(0, task.steps, POINTS).astype(int))
    for t in at:
        w = jax.tree.map(lambda x, t=t: x[t], path)
        scores.append(np.asarray(_gradients(held, w, task.queries) @ _gradients(held, w, task.train).T))
    end = jax.tree.map(lambda x: x[-1], path)
    q, g = _gradients(held, end, task.queries), _gradients(held, end, task.train)
    unit = lambda x: x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
    return {"tracin": sum(scores), "products": np.asarray(q @ g.T), "cosines": np.asarray(unit(q) @ unit(g).T)}


def subsets(rows: int, share: float, count: int, seed: int) -> np.ndarray:
    rng, masks = np.random.default_rng(seed), np.zeros((count, rows), bool)
    for mask in masks:
        mask[rng.choice(rows, max(1, round(share * rows)), replace=False)] = True
    return masks


def given(task: Task) -> tuple[hg.Problem, Any, Any, Any, Any]:
    return task.problem, task.start, task.decay, task.train, task.queries


def judged(
    task: Task, drops: tuple[float, ...], count: int, seed: int, numbers: dict[str, Any], *, text: bool = False
) -> Any:
    """Linear datamodeling scores of every method, for each drop; what was found, for the picture."""
    rows = len(task.train[1])
    began = time.process_time()
    path = _path(Held(task), task.start, task.train)
    jax.block_until_ready(path)
    method = run(task)
    found = {}
    meta = hg.attribute(*given(task), method=method)
    usable = np.asarray([hg.Status(int(code)).usable for code in meta.status])
    numbers["usable"], numbers["estimated_error"] = float(usable.mean()), float(np.max(meta.error_estimate))
    found["metagradient"] = meta.scores
    found |= products(task, path)
    end = jax.tree.map(lambda x: x[-1], path)
    held = {} if text else influence(task, end, task.queries)
    numbers["truth"] = {}
    for share in drops:
        masks = subsets(rows, share, count, seed)
        again = hg.diagnostics.retrain(*given(task), masks, method=method)
        name = f"{share:.0%}".replace("%", "")
        for kind, scores in found.items():
            numbers.setdefault(kind, {})[name] = float(np.nanmean(hg.diagnostics.lds(scores, masks, again.changes)))
        best = {d: float(np.nanmean(hg.diagnostics.lds(s, masks, again.changes))) for d, s in held.items()}
        if best:
            damping = max(best, key=lambda d: best[d])
            numbers.setdefault("influence", {})[name] = best[damping]
            numbers.setdefault("damping", {})[name] = damping
        numbers["truth"][name] = float(np.nanmean(np.abs(again.changes)))
    numbers["seconds"] = time.process_time() - began
    return meta


def cost(task: Task, numbers: dict[str, Any]) -> None:
    """Processor time of the metagradients of 20 queries and of one, in trainings of the same rows and steps."""
    start = jax.jit(lambda w, train: _path(Held(task), w, train))
    jax.block_until_ready(start(task.start, task.train))
    trained = _time(lambda: jax.block_until_ready(start(task.start, task.train)))
    zero = jnp.zeros(len(task.train[1]))
    from hypergrad.diagnostics._left_out import Numbered, leave_out

    problem = leave_out(task.problem, task.decay, len(zero), lambda at: at, len(zero))
    solver = run(task)(problem)
    train = Numbered(jax.tree.map(jnp.asarray, task.train), jnp.arange(len(zero)))
    state = solver.init(task.start, zero)
    one = lambda s, q: solver.hypergrad(s, zero, train, jax.tree.map(lambda x: x[None], q))
    first = jax.jit(jax.vmap(one, in_axes=(None, 0)))
    queries = jax.tree.map(jnp.asarray, task.queries)
    jax.block_until_ready(first(state, queries))
    numbers["trainings_for_all_queries"] = _time(lambda: jax.block_until_ready(first(state, queries))) / trained
    numbers["trainings_per_query"] = numbers["trainings_for_all_queries"] / QUERIES


def _time(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return float(np.median(times))


def convex(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Softmax regression at its optimum: single examples left out."""
    task = softmax(options)
    rows, count = len(task.train[1]), 6 if options.smoke else 96
    found = hg.attribute(*given(task))
    chosen = np.random.default_rng(options.seed).permutation(rows)[:count]
    again = hg.diagnostics.retrain(*given(task), chosen[:, None])
    correlation = hg.diagnostics.loo_correlation(found.scores[:, chosen], again.changes)
    numbers["loo_mean"], numbers["loo_least"] = float(correlation.mean()), float(correlation.min())
    numbers["usable"] = float(np.mean([hg.Status(int(code)).usable for code in found.status]))


def mislabelled(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """A tenth of the labels is wrong; a wrong example is one whose removal lowers the loss of clean rows."""
    from sklearn.metrics import roc_auc_score

    task = network(options, "sgd", 10 if options.smoke else 100)
    x, y = task.train
    rng = np.random.default_rng(options.seed)
    wrong = rng.random(len(y)) < 0.1
    wrong[:2] = [True, False]
    noisy = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y).astype(np.int32)
    _, clean, _ = digits(options.seed, [len(y), 100])
    task = task._replace(train=(x, noisy), queries=clean)
    numbers["metagradient"] = roc_auc_score(wrong, -hg.attribute(*given(task), method=run(task)).scores.mean(0))
    path = _path(Held(task), task.start, task.train)
    end = jax.tree.map(lambda p: p[-1], path)
    itself = influence(task, end, task.train)
    numbers["self_influence"] = max(roc_auc_score(wrong, np.diag(scores)) for scores in itself.values())
    each = jax.vmap(lambda row: task.problem.outer_loss(end, 0.0, jax.tree.map(lambda a: a[None], row)))
    numbers["loss"] = roc_auc_score(wrong, np.asarray(each(jax.tree.map(jnp.asarray, task.train))))
    numbers["tracin"] = roc_auc_score(wrong, -products(task, path)["tracin"].mean(0))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    smoke, seed = options.smoke, options.seed
    count, steps = (4, 10) if smoke else (96, 100)
    drops = DROPS[-1:] if smoke else DROPS
    if options.parts:
        numbers |= measured_before(__file__, options)
    sgd, shown = network(options, "sgd", steps), None
    for part in options.parts or (["sgd"] if smoke else PARTS):
        print(PARTS[part], flush=True)
        found = numbers.setdefault(part, {})
        if part == "sgd":
            shown = judged(sgd, drops, count, seed, found)
        elif part == "softmax":
            convex(options, found)
        elif part == "adam":
            judged(network(options, "adam", steps), drops, count, seed, found)
        elif part == "text" and (seed == 0 or options.parts):  # one drop, half the trainings
            share, half = (DROPS[-1], 4) if smoke else (0.05, 48)
            judged(transformer(options), (share,), half, 0, found, text=True)
        elif part == "wrong":
            mislabelled(options, found)
        elif part == "short":
            judged(network(options, "sgd", 5 if smoke else 20), drops[:1], count, seed, found)
        elif part == "cost":
            cost(sgd, found)
    picture(options, numbers, sgd, shown)


def arguments(parser: argparse.ArgumentParser) -> None:
    def parts(text: str) -> dict[str, str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in PARTS]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
        return {name: PARTS[name] for name in names}

    parser.add_argument("--parts", type=parts, metavar="A,B", help=f"of {', '.join(PARTS)}; the others stay as kept")


def picture(
    options: argparse.Namespace, numbers: dict[str, Any], task: Task, found: hg.diagnostics.Attribution | None
) -> None:
    """The scores, means over all seeds kept, and the examples of one query of this seed, where they were measured."""
    kept = Path(__file__).with_name("results.json")
    runs = json.loads(kept.read_text()) if kept.exists() and not options.smoke else {}
    runs = [*(runs | {str(options.seed): numbers}).values()]
    fig = figure(12.5 if found else 8.0, 4.6)
    left, *rest = fig.subplots(1, 1 + bool(found), squeeze=False)[0]
    kinds = {
        "metagradient": ("metagradient", BLUE),
        "influence": ("influence, best damping", ORANGE),
        "tracin": ("TracIn", GREEN),
        "products": ("gradient products", PINK),
        "cosines": ("gradient cosines", SKY),
    }
    shown = [kind for kind in ("sgd", "adam", "short", "text") if "metagradient" in numbers.get(kind, {})]
    settings = [(kind, d) for kind in shown for d in numbers[kind]["metagradient"]]
    for j, (kind, (label, colour)) in enumerate(kinds.items()):
        every = [[run[k][kind][d] for run in runs if d in run.get(k, {}).get(kind, {})] for k, d in settings]
        values = [np.mean(scores) if scores else np.nan for scores in every]
        error = [np.std(scores, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0 for scores in every]
        left.bar(np.arange(len(settings)) + (j - 2) * 0.16, values, 0.15, yerr=error, label=label, color=colour)
    names = {"sgd": "SGD", "adam": "Adam", "short": "SGD, 20 steps", "text": "text"}
    left.set_xticks(range(len(settings)), [f"{names[k]}\n{d} %" for k, d in settings], fontsize=8)
    titled(left, "Scores against training again", ylabel="linear datamodeling score")
    left.set_ylim(0, 1.25)  # above the bars there is room for the legend
    left.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
    images, labels = np.asarray(task.train[0]).reshape(-1, 8, 8), [str(y) for y in task.train[1]]
    for ax in rest:
        query = np.asarray(task.queries[0][0]).reshape(8, 8)
        hg.diagnostics.plots.attribution(found, 0, images, query, labels=labels, ax=ax)
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlim(right=1.7 * ax.get_xlim()[1])  # beside the bars there is room for the query
    save(fig, options.out, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Gradient descent, 1 % left out",
            "linear datamodeling score",
            {
                "metagradient": ("sgd.metagradient.1", style.BLUE),
                "influence, best damping": ("sgd.influence.1", style.ORANGE),
                "TracIn": ("sgd.tracin.1", style.GREEN),
                "gradient products": ("sgd.products.1", style.PINK),
                "gradient cosines": ("sgd.cosines.1", style.SKY),
            },
        ),
        (
            "Adam, 1 % left out",
            "linear datamodeling score",
            {
                "metagradient": ("adam.metagradient.1", style.BLUE),
                "influence, best damping": ("adam.influence.1", style.ORANGE),
                "TracIn": ("adam.tracin.1", style.GREEN),
                "gradient products": ("adam.products.1", style.PINK),
                "gradient cosines": ("adam.cosines.1", style.SKY),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, draw=drawing)

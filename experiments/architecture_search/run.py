"""Which architecture? Operations mixed by weights that are hyperparameters, and the table of all architectures beside.

    python experiments/architecture_search/run.py --seed 0 --json

A toy whose fixed point is known; then a cell of three edges and five operations on digits, searched by DARTS of first
and second order, sharpDARTS and DASS, and a grid of widths and activations (HyperCuboid). Every architecture of both
spaces is trained too, all at once by vmap, so that what was found has a rank.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment, progress
from experiments._data import digits

RATES = (0.0, 0.1, 0.25, 0.5)  # ξ of the toy
HIDDEN, WIDTHS = 16, (4, 8, 16)
OPERATIONS = ("zero", "skip", "linear", "relu", "tanh")
EDGES = ("0 → 1", "0 → 2", "1 → 2")
KEEP = 0.1  # share of the weights of a sparse operation that are used
BATCH, DECAY = 50, 1e-3
LOW, HIGH, MOMENTUM = 1e-3, 0.05, 0.9  # learning rate of the weights during search
POWER = 10.0  # n of cosine power annealing
INITS = 2  # trainings of each architecture
PAID = 8  # trainings that cost as many gradients as a search


class Space(NamedTuple):
    """Networks whose mixture `p`, a pytree of arrays that sum to one, says which operation is where."""

    start: Callable[[Any], Any]  # key -> params
    logits: Callable[[Any, Any, Any], Any]  # (params, p, x) -> [n, 2]
    table: Any  # every architecture as one-hot p, [n, ...]
    allowed: Any  # whether a search may return it, [n]


def onehot(indices: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.eye(int(np.prod(shape)), dtype=np.float32)[np.ravel_multi_index(indices, shape)].reshape(-1, *shape)


def start(key: Any, *several: int) -> Any:
    """A stem, so many square layers and a head."""
    a, b, c = jax.random.split(key, 3)
    return {
        "stem": jax.random.normal(a, (64, HIDDEN)) / 8,
        "layers": jax.random.normal(b, (*several, HIDDEN, HIDDEN)) * np.sqrt(2 / HIDDEN),
        "bias": jnp.zeros((*several, HIDDEN)),
        "head": jax.random.normal(c, (HIDDEN, 2)) / np.sqrt(HIDDEN),
    }


def cell(sparse: bool = False) -> Space:
    """Nodes 0 (a linear stem), 1 and 2; an edge from each to each later one; the head sees node 2."""

    def edge(params: Any, p: Any, i: int, h: Any) -> Any:
        weights = pruned(params["layers"][i]) if sparse else params["layers"][i]
        linear, relu, tanh = jnp.einsum("bh,khj->kbj", h, weights) + params["bias"][i][:, None]
        return p[i, 1] * h + p[i, 2] * linear + p[i, 3] * jax.nn.relu(relu) + p[i, 4] * jnp.tanh(tanh)

    def logits(params: Any, p: Any, x: Any) -> Any:
        h = x @ params["stem"]
        middle = edge(params, p, 0, h)
        return (edge(params, p, 1, h) + edge(params, p, 2, middle)) @ params["head"]

    chosen = np.array(list(itertools.product(range(len(OPERATIONS)), repeat=len(EDGES))))
    table = np.eye(len(OPERATIONS), dtype=np.float32)[chosen]
    return Space(lambda key: start(key, 3, 3), logits, jnp.asarray(table), (chosen != OPERATIONS.index("zero")).all(1))


def pruned(weights: Any) -> Any:
    """The largest KEEP of each matrix [..., h, j]; the derivative is that of all, so that a weight may come back."""
    size = jnp.abs(weights).reshape(*weights.shape[:-2], -1)
    least = jnp.sort(size, -1)[..., -int(KEEP * size.shape[-1])]
    return weights - jax.lax.stop_gradient(weights * (jnp.abs(weights) < least[..., None, None]))


def cuboid() -> Space:
    """Two layers; each mixes all (width in, width out, activation), of which the best path is extracted."""
    masks = jnp.asarray(np.arange(HIDDEN)[None] < np.array(WIDTHS)[:, None], jnp.float32)
    shape = (len(WIDTHS), len(WIDTHS), 2)

    def logits(params: Any, p: Any, x: Any) -> Any:
        h = x @ params["stem"]
        for i in range(2):
            inputs = masks[:, None] * h
            relu, tanh = jnp.einsum("ibh,khj->kibj", inputs, params["layers"][i]) + params["bias"][i][:, None, None]
            values = jnp.stack([jax.nn.relu(relu), jnp.tanh(tanh)])
            h = jnp.einsum("iok,oj,kibj->bj", p[i], masks, values)
        return h @ params["head"]

    first, middle, last, one, two = np.indices((3, 3, 3, 2, 2)).reshape(5, -1)
    table = np.stack([onehot((first, middle, one), shape), onehot((middle, last, two), shape)], 1)
    return Space(lambda key: start(key, 2, 2), logits, jnp.asarray(table), np.ones(len(table), bool))


def softmax(alpha: Any) -> Any:
    return jax.nn.softmax(alpha.reshape(len(alpha), -1)).reshape(alpha.shape)


def max_w(alpha: Any) -> Any:
    """sharpDARTS: an operation's weight grows by what it lacks to the largest, so that the largest counts in full."""
    p = softmax(alpha)
    return 1 - jnp.max(p, tuple(range(1, p.ndim)), keepdims=True) + p


def cross_entropy(space: Space, params: Any, p: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(space.logits(params, p, x), y))


def objective(space: Space, params: Any, p: Any, batch: Any) -> Any:
    return cross_entropy(space, params, p, batch) + DECAY / 2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))


def make_problem(space: Space, mixture: Callable[[Any], Any]) -> hg.Problem:
    return hg.Problem(
        lambda params, alpha, batch: objective(space, params, mixture(alpha), batch),
        lambda params, alpha, batch: cross_entropy(space, params, mixture(alpha), batch),
    )


def by_difference(problem: hg.Problem, inner: Any, rate: Callable[[Any], Any]) -> hg.Solver:
    """Second-order DARTS as published: the product with ∂²/∂α∂w from a central difference in the weights."""
    first_order, inner_loss = hg.direct(problem, inner=inner), cast(Any, problem.inner_loss)

    def hypergrad(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        out, after = first_order.hypergrad(state, hparams, train, valid, key=key)
        v = jax.grad(problem.outer_loss)(after.params, hparams, valid)
        width = 0.01 / optax.global_norm(v)
        moved = lambda side: jax.tree.map(lambda w, d: w + side * width * d, state.params, v)
        slope = lambda params: jax.grad(lambda alpha: inner_loss(params, alpha, train))(hparams)
        product = jax.tree.map(lambda up, down: (up - down) / (2 * width), slope(moved(1)), slope(moved(-1)))
        return out._replace(grad=jax.tree.map(lambda g, c: g - rate(state) * c, out.grad, product)), after

    return hg.Solver(first_order.init, hypergrad, first_order.response)


def cosine(step: Any, steps: int) -> Any:
    return LOW + (HIGH - LOW) * (1 + jnp.cos(jnp.pi * step / steps)) / 2


def cosine_power(step: Any, steps: int) -> Any:
    """sharpDARTS' annealing: POWER to the power of a cosine, brought to the same ends."""
    power = POWER ** ((1 + jnp.cos(jnp.pi * step / steps)) / 2)
    return LOW + (HIGH - LOW) * (power - 1) / (POWER - 1)


class Arm(NamedTuple):
    """A way to search."""

    order: str  # "first", "second" or "difference"
    mixture: Callable[[Any], Any] = softmax
    schedule: Callable[[Any, int], Any] = cosine
    scale: float = 1.0  # of the learning rate of the weights


CELL_ARMS = {
    "first": Arm("first"),
    "second": Arm("second"),
    "difference": Arm("difference"),
    "power": Arm("first", softmax, cosine_power),
    "max_w": Arm("first", max_w, cosine_power),
}
# Max-W counts each of the 18 parallel paths of a layer in full at the start; the rate must be that much lower.
GRID_ARMS = {"max_w": Arm("first", max_w, cosine_power, scale=1 / 30), "softmax": Arm("first")}


def make_solver(order: str, problem: hg.Problem, inner: Any, rate: Callable[[Any], Any]) -> hg.Solver:
    if order == "first":
        return hg.direct(problem, inner=inner)
    if order == "second":  # the derivative of one step of training, exactly
        return hg.unrolled(problem, inner=inner, warm_start=True)
    return by_difference(problem, inner, rate)


def search(space: Space, arm: Arm, train: Any, valid: Any, steps: int, seed: int) -> hg.Result:
    schedule = lambda step: arm.scale * arm.schedule(step, steps)
    inner = hg.inner.gradient(optax.sgd(schedule, momentum=MOMENTUM), steps=1)
    rate = lambda state: schedule(optax.tree_utils.tree_get(state.inner_state, "count"))
    solver = make_solver(arm.order, make_problem(space, arm.mixture), inner, rate)
    params, alpha = space.start(jax.random.key(seed)), jnp.zeros_like(space.table[0])
    return hg.tune(solver, params, alpha, train, valid, outer=optax.adam(0.02, b1=0.5), steps=steps)


def found(space: Space, alpha: Any) -> int:
    """Row of the best path in the table: the allowed architecture of the highest product of weights."""
    p = np.log(np.asarray(softmax(jnp.asarray(alpha)), float)).ravel()
    scores = np.asarray(space.table).reshape(len(space.table), -1) @ p
    return int(np.argmax(np.where(space.allowed, scores, -np.inf)))


def train_all(space: Space, data: tuple[Any, Any, Any], steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation losses and test accuracies [n, INITS] of every architecture, trained from scratch."""
    train, valid, test = data
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def one(p: Any, key: Any, batches: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            batch = jax.tree.map(lambda a: a[rows], train)
            updates, state = optimizer.update(jax.grad(functools.partial(objective, space))(params, p, batch), state)
            return (optax.apply_updates(params, updates), state), None

        params = space.start(key)
        params, _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)[0]
        return cross_entropy(space, params, p, valid), accuracy(space, params, p, test)

    key = jax.random.key(seed + 1)  # starts that no search has seen
    batches = jax.random.randint(key, (steps, BATCH), 0, len(train[1]))
    every = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None)), (0, None, None)))
    parts = np.array_split(np.arange(len(space.table)), max(1, len(space.table) // 27))
    size = max(map(len, parts))
    out = [every(space.table[np.resize(rows, size)], jax.random.split(key, INITS), batches) for rows in parts]
    kept = lambda k: np.concatenate([np.asarray(o[k])[: len(rows)] for o, rows in zip(out, parts, strict=True)])
    return kept(0), kept(1)


def accuracy(space: Space, params: Any, p: Any, batch: Any) -> Any:
    return jnp.mean(jnp.argmax(space.logits(params, p, batch[0]), 1) == batch[1])


def toy(rates: tuple[float, ...], steps: int) -> dict[str, Any]:
    """L_valid = αw − 2α + 1, L_train = (w − α)²: where each order ends, and how far that is from its fixed point."""
    problem = hg.Problem(
        lambda w, alpha, _: (w - alpha) ** 2,
        lambda w, alpha, _: alpha * w - 2 * alpha + 1,
    )
    ends: dict[str, dict[str, float]] = {"first": {}, "second": {}, "difference": {}}
    for rate in rates:
        inner = hg.inner.gradient(optax.sgd(rate or 0.1), steps=1)  # first order leaves ξ out of the hypergradient
        for order in ("second", "difference") if rate else ("first",):
            solver = make_solver(order, problem, inner, lambda _, rate=rate: rate)
            with warnings.catch_warnings():  # at the fixed point of first order the hypergradient is exactly zero
                warnings.filterwarnings("ignore", message=".*hypergradient is exactly zero")
                result = hg.tune(solver, jnp.float32(-2), 2.0, outer=optax.sgd(0.1), steps=steps)
            ends[order][f"{rate:g}"] = float(result.hparams)
    errors = {
        f"{order}_error": max(abs(end - 2 / (1 + 2 * float(rate))) for rate, end in by_rate.items())
        for order, by_rate in ends.items()
    }
    implicit = hg.tune(hg.implicit(problem), jnp.float32(-2), 2.0, outer=optax.sgd(0.1), steps=steps)
    return {"ends": ends["second"], "implicit": implicit.hparams, **errors}


def measure(options: Any, numbers: dict[str, Any]) -> None:
    steps, training = (2, 4) if options.smoke else (400, 200)
    numbers["toy"] = toy((0.0, 0.5) if options.smoke else RATES, 200 if options.smoke else 400)
    train, valid, test = data = jax.tree.map(
        jnp.asarray, tuple((x, y % 2) for x, y in digits(options.seed, (300, 300)))
    )
    studies = {
        "cell": (cell(), CELL_ARMS),
        "sparse": (cell(sparse=True), {"dass": Arm("second")}),
        "cuboid": (cuboid(), GRID_ARMS),
    }
    if options.smoke:
        studies = {"cell": (cell(), {"second": CELL_ARMS["second"]})}
    for name, (space, arms) in studies.items():
        values, accuracies = train_all(space, data, training, options.seed)
        table = accuracies.mean(1)
        about = numbers[name] = in_general(space, values, accuracies, np.random.default_rng(options.seed))
        for arm_name, arm in progress(arms.items(), f"search, {name}"):
            result = search(space, arm, train, valid, steps, options.seed)
            row = found(space, result.hparams)
            online = accuracy(space, result.params, arm.mixture(result.hparams), test)
            about[arm_name] = standing(table, row) | {"online": online, "skipped": int(np.sum(~result.history.usable))}
            if arm_name in ("second", "dass"):
                about[arm_name]["architecture"] = described(space, row)
            if (name, arm_name) == ("cell", "second"):
                dense = row
        if name == "cell":
            all_relu = onehot((np.full(3, 3),), (len(OPERATIONS),))
            about["plain"] = standing(table, int(np.argmax((np.asarray(space.table) == all_relu).all((1, 2)))))
        if name == "sparse":
            about["dense_found"] = standing(table, dense)


def described(space: Space, row: int) -> str:
    return " ".join(OPERATIONS[i] for i in np.argmax(np.asarray(space.table[row]), -1))


def standing(table: np.ndarray, row: int) -> dict[str, Any]:
    """Test accuracy after fresh trainings, and rank (1 is best) among all architectures."""
    return {"test": table[row], "rank": int(np.sum(table > table[row])) + 1}


def in_general(space: Space, values: np.ndarray, accuracies: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """The table's size, its best by validation and by test, and what random search of equal cost expects of it."""
    table, allowed = accuracies.mean(1), np.flatnonzero(space.allowed)
    draws = rng.permuted(np.tile(allowed, (1000, 1)), axis=1)[:, :PAID]
    chosen = draws[np.arange(len(draws)), np.argmin(values[draws, 0], 1)]  # by one training each
    ranks = [standing(table, row)["rank"] for row in chosen]
    return {
        "architectures": len(table),
        "exhaustive": standing(table, int(np.argmin(values.mean(1)))),
        "best_test": table.max(),
        "median_test": np.median(table),
        "random": {"test": table[chosen].mean(), "rank": np.median(ranks)},
    }


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(13, 5.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(0.8, 1, 1))
    at = np.linspace(0, 0.55, 50)
    left.plot(
        at, 2 / (1 + 2 * at), color=style.INK, linewidth=1.2, linestyle=style.DASHED, label="theory: 2 / (1 + 2ξ)"
    )
    for numbers in results.values():
        ends = {float(rate): end for rate, end in numbers["toy"]["ends"].items()}
        left.plot(list(ends), list(ends.values()), "o", color=style.BLUE, markersize=8)
    left.legend(frameon=False, fontsize=11)
    style.titled(left, "Toy: where α ends", xlabel="ξ, rate of the inner step", ylabel="α")
    left.set_ylim(0.8, 2.2)
    rows = lambda arms: {text: (style.each(results, f"{path}.test"), color) for text, path, color in arms}
    cell = (
        ("first order", "cell.first", style.BLUE),
        ("second order", "cell.second", style.BLUE),
        ("difference", "cell.difference", style.BLUE),
        ("power annealing", "cell.power", style.BLUE),
        ("Max-W", "cell.max_w", style.BLUE),
        ("random search", "cell.random", style.ORANGE),
        ("ReLU everywhere", "cell.plain", style.GREEN),
        ("best of all, by validation", "cell.exhaustive", style.INK),
    )
    others = (
        ("sparse: DASS", "sparse.dass", style.BLUE),
        ("dense second order's", "sparse.dense_found", style.SKY),
        ("sparse: random search", "sparse.random", style.ORANGE),
        ("sparse: best of all", "sparse.exhaustive", style.INK),
        ("grid: softmax", "cuboid.softmax", style.BLUE),
        ("grid: Max-W", "cuboid.max_w", style.BLUE),
        ("grid: random search", "cuboid.random", style.ORANGE),
        ("grid: best of all", "cuboid.exhaustive", style.INK),
    )
    for axes, arms, title in ((middle, cell, "Cell of 125 architectures"), (right, others, "Sparse cell, and grid")):
        style.over_seeds(axes, rows(arms), title, xlabel="test accuracy, fresh training")
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""One scalar tuned over a distribution of tasks: the shape of an activation, and the kernel of a graph.

The learned value is judged on tasks that were not tuned on, against the best point of a grid there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._data import digits

HIDDEN, NOISE = 16, 0.5
DECAY = 1e-2
LABELLED, NODES = 20, 100


class Family(NamedTuple):
    """Tasks `[n, ...]` of one kind, the solver of a batch of them, and where the scalar lies."""

    solver: hg.Solver
    params: Any
    tuned_on: tuple[Any, Any]  # what one trains on, and is judged on
    fresh: tuple[Any, Any]
    box: tuple[float, float]
    start: float


def interpolation(seed: int, tasks: int, steps: int) -> Family:
    """Two digits to tell apart from 30 noisy examples; the activation is θ tanh(h) + (1 − θ) h²."""
    data = pairs(seed, 2 * tasks)

    def loss(params: Any, theta: Any, batch: Any) -> Any:
        def one(params: Any, x: Any, y: Any) -> Any:
            h = x @ params["w"]
            out = (theta * jnp.tanh(h) + (1 - theta) * h**2) @ params["v"]
            return jnp.mean(jax.nn.softplus(-y * out))

        return jnp.mean(jax.vmap(one)(params, *batch))

    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "w": jax.random.normal(keys[0], (tasks, 64, HIDDEN)) / 8,
        "v": jax.random.normal(keys[1], (tasks, HIDDEN)) / np.sqrt(HIDDEN),
    }
    # The mean over tasks divides each task's gradient by their number.
    inner = hg.inner.gradient(optax.sgd(0.5 * tasks), steps=steps)
    solver = hg.unrolled(hg.Problem(loss, loss), inner=inner)
    return Family(solver, params, *halves(data, tasks), (0.0, 1.0), 0.5)


def graph(seed: int, tasks: int) -> Family:
    """100 noisy digits of which 20 have a label; a graph network of one layer, edges exp(−‖x_i − x_j‖² / 2θ²)."""
    data = nodes(seed, 2 * tasks)

    def smoothed(theta: Any, x: Any) -> Any:
        edges = jnp.exp((x @ x.T - 1) / theta**2)  # x are of norm 1
        return edges @ x / jnp.sum(edges, 1, keepdims=True)

    def loss(params: Any, theta: Any, batch: Any) -> Any:
        def one(w: Any, x: Any, rows: Any, y: Any) -> Any:
            logits = (8 * smoothed(theta, x) @ w)[rows]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        return jnp.mean(jax.vmap(one)(params, *batch))

    decayed = lambda params, theta, batch: loss(params, theta, batch) + DECAY / 2 * jnp.mean(jnp.sum(params**2, (1, 2)))
    solver = hg.implicit(hg.Problem(decayed, loss), inner=hg.inner.lbfgs(tol=1e-4), polish=0)
    return Family(solver, jnp.zeros((tasks, 64, 10)), *halves(data, tasks), (0.1, 1.0), 0.8)


def pairs(seed: int, count: int) -> tuple[Any, Any]:
    (x, y), _ = digits(seed, (1000,))
    rng = np.random.default_rng(seed)

    def draw() -> Any:
        one, other = rng.choice(10, 2, replace=False)
        rows = np.concatenate([rng.choice(np.flatnonzero(y == c), 45, replace=False) for c in (one, other)])
        rng.shuffle(rows)
        noisy = x[rows] + NOISE * rng.standard_normal((90, 64), np.float32)
        sign = np.where(y[rows] == one, 1.0, -1.0).astype(np.float32)
        return (noisy[:30], sign[:30]), (noisy[30:], sign[30:])

    return stacked([draw() for _ in range(count)])


def nodes(seed: int, count: int) -> tuple[Any, Any]:
    (x, y), _ = digits(seed, (1000,), centred=False)
    rng = np.random.default_rng(seed)
    x = x + 0.4 * NOISE * rng.standard_normal(x.shape, np.float32)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)

    def draw() -> Any:
        rows = rng.choice(len(y), NODES, replace=False)
        known, asked = np.arange(LABELLED), np.arange(LABELLED, NODES)
        return (x[rows], known, y[rows][known]), (x[rows], asked, y[rows][asked])

    return stacked([draw() for _ in range(count)])


def stacked(drawn: list[Any]) -> tuple[Any, Any]:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *drawn)


def halves(data: tuple[Any, Any], tasks: int) -> tuple[Any, Any]:
    return tuple(jax.tree.map(lambda a, part=part: a[part], data) for part in (slice(tasks), slice(tasks, None)))


def study(family: Family, outer_steps: int, points: int) -> tuple[dict[str, Any], Any, Any]:
    """Numbers; the grid; the mean validation losses of the fresh tasks there."""
    result = hg.tune(
        family.solver,
        family.params,
        jnp.float32(family.start),
        *family.tuned_on,
        outer=optax.adam(optax.cosine_decay_schedule(0.4, outer_steps)),
        steps=outer_steps,
        domain=hg.domains.interval(*family.box),
        progress=False,
    )

    @jax.jit
    def judged(theta: Any) -> Any:
        state = family.solver.init(family.params, theta)
        return family.solver.hypergrad(state, theta, *family.fresh)[0].value

    low, high = family.box
    # The ends belong to the grid only nearly, as they belong to the domain.
    grid = np.linspace(low, high, points + 2, dtype=np.float32)[1:-1]
    curve = np.asarray([judged(jnp.asarray(theta)) for theta in grid])
    learned = judged(jnp.asarray(result.hparams))
    numbers = {
        "theta": result.hparams,
        "loss": learned,
        "excess": learned - curve.min(),
        "best_of_grid": curve.min(),
        "best_theta": grid[curve.argmin()],
        "at_start": judged(jnp.float32(family.start)),
        "skipped": int(np.sum(~result.history.usable)),
    }
    return numbers, grid, curve

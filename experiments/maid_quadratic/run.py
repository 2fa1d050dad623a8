"""A quadratic bilevel problem from accuracies of 1e-1, 1e-3 and 1e-5: adapted by MAID, and held where they are.

    w*(u) = argmin ½ wᵀA w − wᵀB u   (w ∈ R¹⁰⁰⁰, condition number 20),     F(u) = ½ ‖C w*(u) − y‖²   (u ∈ R¹⁰)

The optimum is known in closed form. Cost is counted in products with A. A second part draws 10,000 points and
tolerances of small problems, and compares the proved bound on the error of the hypergradient with the true error.

    python experiments/maid_quadratic/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402
from experiments._lanes import held, side_by_side  # noqa: E402

ACCURACIES = (1e-1, 1e-3, 1e-5)
FIXED = (*ACCURACIES, 1e-8)
PARAMETERS, HYPERPARAMETERS = 1000, 10


class Quadratic(NamedTuple):
    """A = (I − 2 e eᵀ) diag(d) (I − 2 e eᵀ), whose products cost little, and B, C and y as above."""

    d: Any
    e: Any
    b: Any
    c: Any
    y: Any


def turned(w: Any, q: Quadratic) -> Any:
    return w - 2 * q.e * (q.e @ w)


PROBLEM = hg.Problem(
    lambda w, u, q: 0.5 * jnp.sum(q.d * turned(w, q) ** 2) - w @ (q.b @ u),
    lambda w, u, q: 0.5 * jnp.sum((q.c @ w - q.y) ** 2),
)


def draw(rng: np.random.Generator, n: int, m: int, condition: float = 20.0) -> Quadratic:
    e = rng.normal(size=n)
    return Quadratic(
        np.linspace(1, condition, n), e / np.linalg.norm(e), rng.normal(size=(n, m)),
        rng.normal(size=(n, n)) / n**0.5, 3 * rng.normal(size=n),
    )  # fmt: skip


def solution(q: Quadratic) -> Any:
    """C A⁻¹ B, by which F(u) = ½ ‖C A⁻¹ B u − y‖²."""
    back = q.b - 2 * q.e[:, None] * (q.e @ q.b)
    back = back / q.d[:, None]
    return q.c @ (back - 2 * q.e[:, None] * (q.e @ back))


def best(q: Quadratic) -> float:
    through = solution(q)
    return float(0.5 * np.linalg.norm(through @ np.linalg.lstsq(through, q.y, rcond=None)[0] - q.y) ** 2)


def bounds(seed: int, count: int) -> tuple[int, float]:
    """In how many of `count` draws the bound is at least the true error; and by how much it is too large (median)."""
    rng, n, m = np.random.default_rng(seed), 12, 3
    problems = [draw(rng, n, m, 10 ** rng.uniform(0, 3)) for _ in range(20)]
    points = rng.normal(size=(count, m))
    tols = 10 ** rng.uniform(-8, -0.5, (count, 2))
    which = rng.integers(0, len(problems), count)
    stacked = Quadratic(*(jnp.asarray(np.stack(x)) for x in zip(*problems, strict=True)))
    slope = np.asarray([np.linalg.norm(q.c, 2) ** 2 for q in problems])
    # The weakest curvature is 1, C bounds the slope of the outer gradient, and A and B do not move.
    solver = lambda slope: hg.implicit(
        PROBLEM, inner=hg.inner.lbfgs(), linear=hg.linear.cg(), polish=0, regularity=hg.Regularity(1.0, slope, 0.0)
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
    def run(i: Any, u: Any, tols: Any, stacked: Quadratic, slope: Any) -> Any:
        q = jax.tree.map(lambda x: x[i], stacked)
        made = solver(slope[i])
        state = hg.outer.set_options(made.init(jnp.zeros(n), u), {"inner.tol": tols[0], "linear.tol": tols[1]})
        out = made.hypergrad(state, u, q, q)[0]
        through = solution(q)
        truth = through.T @ (through @ u - q.y)
        return jnp.linalg.norm(out.grad - truth), out.info.extra["error_bound"]

    error, bound = map(np.asarray, run(*map(jnp.asarray, (which, points, tols)), stacked, jnp.asarray(slope)))
    return int(np.sum(bound >= error)), float(np.median(bound / np.maximum(error, 1e-300)))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    n, m, steps, count = (40, 3, 20, 100) if options.smoke else (PARAMETERS, HYPERPARAMETERS, 200, 10_000)
    q = draw(np.random.default_rng(29 + options.seed), n, m)
    lowest = best(q)
    names = [f"adapted_{tol:.0e}" for tol in ACCURACIES] + [f"held_{tol:.0e}" for tol in FIXED]
    controllers = [hg.outer.maid(tol=tol) for tol in ACCURACIES] + [held(tol) for tol in FIXED]
    outer, starts = side_by_side(controllers, np.ones((len(names), m)))
    solver = hg.implicit(PROBLEM, inner=hg.inner.lbfgs(), linear=hg.linear.cg(), polish=0)
    shared = jax.tree.map(jnp.asarray, q)
    found = hg.multistart(
        solver, jnp.zeros(n), jnp.asarray(starts), shared, shared, outer=outer, steps=steps, steps_per_call=steps
    )
    through = solution(q)
    exact = lambda u: 0.5 * np.sum((np.atleast_2d(u) @ through.T - q.y) ** 2, -1)
    numbers |= {"best": lowest, "start": float(exact(np.ones(m))[0])}
    paths, ends = {}, {}
    for name, result in zip(names, found.results, strict=True):
        history = result.history
        spent = np.cumsum(history.inner_steps + np.nan_to_num(history.linear_steps))
        values = exact(history.hparams)
        taken = np.flatnonzero(history.accepted)
        ends[name] = float(values[taken[-1]])
        paths[name] = (spent[taken], values[taken] / lowest - 1)
        moved = np.concatenate([[True], np.any(np.diff(history.hparams[taken], axis=0) != 0, 1)])
        numbers[name] = {
            "excess": ends[name] / lowest - 1,
            "steps": int(np.sum(moved)),
            "products": products(paths[name]),
            "path": thinned(*paths[name]),
        }
    adapted = [ends[name] for name in names[:3]]
    numbers["spread"] = float(max(adapted) / min(adapted) - 1)
    numbers["over_best_held"] = float(max(adapted) / min(ends[name] for name in names[3:]) - 1)
    numbers["loose_over_adapted"] = float(ends[names[3]] / max(adapted))
    numbers["bound_held"], numbers["bound_factor"] = bounds(options.seed, count)


def thinned(spent: np.ndarray, excess: np.ndarray, most: int = 40) -> list[np.ndarray]:
    """A curve of at most so many points, evenly in the logarithm of the cost, with its ends."""
    if len(spent) > most:
        wanted = np.geomspace(max(spent[0], 1), spent[-1], most)
        at = np.unique(np.r_[0, np.searchsorted(spent, wanted).clip(max=len(spent) - 1)])
        spent, excess = spent[at], excess[at]
    return [spent, excess]


def products(path: tuple[np.ndarray, np.ndarray], near: float = 1e-6) -> float:
    """What it cost to come so near to the best value; NaN where a run never did."""
    reached = np.flatnonzero(path[1] <= near)
    return float(path[0][reached[0]]) if len(reached) else np.nan


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    figure = style.figure(9.5, 5.4)
    axes = figure.subplots()
    colors = {"1e-01": style.ORANGE, "1e-03": style.BLUE, "1e-05": style.GREEN, "1e-08": style.PINK}
    for name in (key for key in next(iter(results.values())) if key.startswith(("adapted_", "held_"))):
        kind, tol = name.split("_")
        label = f"{kind}, from {tol}" if kind == "adapted" else f"{kind} at {tol}"
        for spent, excess in style.each(results, f"{name}.path"):
            axes.loglog(
                spent,
                np.maximum(excess, 1e-12),
                color=colors[tol],
                linestyle="-" if kind == "adapted" else style.DASHED,
                marker="o" if len(spent) < 12 else None,
                markersize=4,
                linewidth=1.2,
                label=label,
            )
    style.titled(
        axes,
        "Distance from the best outer loss, a line for each seed",
        xlabel="evaluations of the inner gradient and products with A",
        ylabel="F / best − 1",
    )
    style.legend(figure, axes)
    return figure


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""Probes for faults that no finite difference shows: outer loss and hypergradient agree, but belong to another problem.

- The solver never trains, or ends at a saddle: solve again from parameters moved slightly off the solution.
- It does not read the data that it is given: solve again with half of their rows replaced by the other half.
- It works with the hyperparameters, the data or the hypergradient of an earlier call: call it once more, at a
  neighbouring point and with a few rows replaced.

Cost: one to three solutions of the problem each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._solver import Hypergradient, usable
from hypergrad._tree import PyTree, is_float
from hypergrad.diagnostics._differences import Setting, Solution

_MOVE = 1e-3  # distance of the move off the solution, relative to the size of the parameters
_LEFT = 10  # times the move: parameters that go further were not at a minimum
_STALE = 0.1  # share of the change between two points, for the value and for the hypergradient
_BEHIND = 0.5  # share of the way between the hypergradients of two calls
_ESTIMATED = 10  # times the error that the solver itself expects


class Again(NamedTuple):
    """The solution found again from parameters moved slightly off it.

    Attributes:
        outcome: `"back"`; `"left"` for another solution far away; `"untrained"` where the parameters stay where they
            are put, both times; and `"unknown"`.
        start: the moved parameters.
        solution: solution found from there.
    """

    outcome: Literal["back", "left", "untrained", "unknown"]
    start: PyTree
    solution: Solution | None


def solve_again(
    solve: Callable[..., tuple[Solution, Any]],
    problem: Setting,
    hparams: PyTree,
    at: np.ndarray,
    center: Solution,
    state: Any,
    rng: np.random.Generator,
) -> Again:
    """Train again from parameters that are moved by a thousandth off the solution at λ, and report where that leads.

    Args:
        solve: `(vector, params=...) -> (Solution, state)`.
        problem: the problem, with the parameters of the first start.
        hparams: λ.
        at: λ as a vector.
        center: the solution from the first start.
        state: state of the solver at that solution.
        rng: random generator for the move.
    """
    solver = problem.solver
    with contextlib.suppress(Exception):  # a `response` that cannot be called in this way is not checked here
        found = solver.response(state, hparams)
        if jax.tree.structure(found) != jax.tree.structure(problem.params) or not np.isfinite(center.settled):
            return Again("unknown", problem.params, None)
        start = _moved(found, problem.params, rng)
        solution, state = solve(at, params=start)
        again = solver.response(state, hparams)
        change = abs(solution.settled - center.settled)
        noise = 1e3 * center.eps * abs(center.settled) + 10 * (center.drift + solution.drift)
        if _same(found, problem.params) and _same(again, start) and change > noise:
            return Again("untrained", start, solution)
        far = _distance(again, found) > _LEFT * _distance(start, found)
        # The parameters also leave a minimum with a flat direction, but without changing the values measured there.
        significant = change > noise + 1e-6 * (abs(center.settled) + abs(solution.settled))
        if not (far and significant):
            return Again("back", start, solution)
        # A solver that takes a number of training steps leaves the solution from the solution itself.
        unmoved = jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)) if is_float(x) else y, found, start)
        onward = solver.response(solve(at, params=unmoved)[1], hparams)
        trains_on = _distance(onward, found) > _distance(again, found) / 2
        return Again("back" if trains_on else "left", start, solution)
    return Again("unknown", problem.params, None)


def unused_data(
    solve: Callable[..., tuple[Solution, Any]], problem: Setting, at: np.ndarray, center: Solution
) -> list[str]:
    """Return the data on which the outer loss does not depend: `"train"`, `"half of the rows of valid"`.

    Rows are replaced by other rows of the same data, so that labels, tokens and counts remain valid.
    """
    found, read = [], []
    for name in ("train", "valid"):
        reads = [_reads(solve, name, getattr(problem, name), half, at, center) for half in (0, 1)]
        read += [x for x in reads if x]
        if False in reads:
            found.append(name if reads == [False, False] else f"half of the rows of {name}")
    # An outer loss that no data change at all is constant, or closes over its data.
    return found if read else []


def is_stale(
    compiled: Callable[..., tuple[Hypergradient, Any]],
    problem: Setting,
    hparams: tuple[PyTree, PyTree],
    used: tuple[Any, Hypergradient],
    noise: float,
    tol: float,
) -> bool:
    """Whether a used state gives a result that differs from that of a fresh one, at other hyperparameters or data.

    Args:
        compiled: the solver's `hypergrad`.
        problem: the data and the first parameters.
        hparams: the point that `used` belongs to, and one near it.
        used: the state after a call, and the result of that call.
        noise: change of the outer loss in a second call at the same point.
        tol: relative error allowed.
    """
    here, near = hparams
    tries = [(near, problem.train, problem.valid)]
    for name in ("train", "valid"):
        changed = _a_few_rows(getattr(problem, name))
        if changed is not None:
            data = {"train": problem.train, "valid": problem.valid} | {name: changed}
            tries.append((here, data["train"], data["valid"]))
    return any(_differs(compiled, problem, *given, used, noise, tol) for given in tries)


def _differs(
    compiled: Callable[..., tuple[Hypergradient, Any]],
    problem: Setting,
    hparams: PyTree,
    train: PyTree,
    valid: PyTree,
    used: tuple[Any, Hypergradient],
    noise: float,
    tol: float,
) -> bool:
    """Whether a used state gives another result than a fresh one for these hyperparameters and data."""
    init_key, call_key = (None, None) if problem.key is None else jax.random.split(problem.key)
    state, before = used
    fresh = problem.solver.init(problem.params, hparams, key=init_key, model_state=problem.model_state)
    right, _ = compiled(fresh, hparams, train, valid, key=call_key)
    here, _ = compiled(state, hparams, train, valid, key=call_key)
    if not (bool(usable(right.info.status)) and bool(usable(here.info.status))):
        return False
    change = abs(float(right.value) - float(before.value))
    gap = abs(float(here.value) - float(right.value))
    eps = float(jnp.finfo(right.value.dtype).eps)
    if not change > 30 * noise + 100 * eps * abs(float(right.value)):
        return False
    size, distance = _distance(right.grad, None), _distance(here.grad, right.grad)
    # A budget may leave the two as far apart as their estimates say. What belongs to the earlier call stays behind by
    # most of the way between the calls, however short.
    estimated = max(float(out.info.error_estimate) for out in (right, here, before))
    left_behind = distance > max(tol, _ESTIMATED * estimated) * size
    left_behind &= distance > _BEHIND * _distance(right.grad, before.grad)
    return bool(gap > _STALE * change or distance > max(_STALE, 10 * tol) * size or left_behind)


def _a_few_rows(data: PyTree) -> PyTree | None:
    """The data with a sixteenth of the rows, at least one, replaced by the last ones; None where nothing changes."""

    def replace(x: Any) -> Any:
        rows = np.shape(x)[0] if np.ndim(x) else 0
        count = max(rows // 16, 1)
        return jnp.asarray(x).at[:count].set(x[rows - count :]) if rows > count else x

    with contextlib.suppress(Exception):  # data of an unknown kind
        changed = jax.tree.map(replace, data)
        return None if _same(changed, data) else changed
    return None


def _moved(found: PyTree, like: PyTree, rng: np.random.Generator) -> PyTree:
    """Move every floating leaf by a thousandth of its size, or, where it is zero, of the size of all leaves."""
    floats = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(found) if is_float(x)]
    overall = float(np.sqrt(np.mean(np.concatenate(floats) ** 2))) if floats else 0.0

    def move(x: Any, y: Any) -> Any:
        if not is_float(x):
            return y
        values = np.asarray(x, np.float64)
        size = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
        step = _MOVE * (size or overall or 1.0) * rng.normal(size=values.shape)
        return jnp.asarray(values + step, jnp.result_type(y))

    return jax.tree.map(move, found, like)


def _distance(a: PyTree, b: PyTree | None) -> float:
    """Euclidean distance; the norm of `a` without `b`."""
    left = [np.asarray(x, np.float64) for x in jax.tree.leaves(a) if is_float(x)]
    right = [0.0] * len(left) if b is None else [np.asarray(x, np.float64) for x in jax.tree.leaves(b) if is_float(x)]
    with np.errstate(all="ignore"):
        return float(np.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in zip(left, right, strict=True))))


def _same(a: PyTree, b: PyTree) -> bool:
    """The same numbers, to the bit, in the dtype of the second argument."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.shape(x) == np.shape(y) and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _reads(
    solve: Callable[..., tuple[Solution, Any]], name: str, data: PyTree, half: int, at: np.ndarray, center: Solution
) -> bool | None:
    """Whether the outer loss changes when one half of the rows replaces the other; None where that shows nothing."""

    def replace(x: Any) -> Any:
        rows = np.shape(x)[0] if np.ndim(x) else 0
        middle = (rows + half) // 2
        count = min(middle, rows - middle)
        if not count:
            return x
        first, second = x[:count], x[rows - count :]
        return jnp.asarray(x).at[:count].set(second) if half == 0 else jnp.asarray(x).at[rows - count :].set(first)

    try:
        changed = jax.tree.map(replace, data)
        if _same(changed, data) or not np.isfinite(center.settled):
            return None
        return solve(at, center.calls, **{name: changed})[0].settled != center.settled
    except Exception:  # data of an unknown kind
        return None

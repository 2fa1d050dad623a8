r"""Finite differences of the problem solved again at other hyperparameters, with an estimate of their own error.

    D(h) = (F(λ + h v) − F(λ − h v)) / 2h,    D = (4 D(h/2) − D(h)) / 3,    |D − dF(v)| ≲ |D − D(h/2)|

and the same again with h/4 where that is not accurate enough.

Source: Richardson 1911, "The approximate arithmetical solution by finite differences". Differs: the step size is
changed by factors of ten until the step sizes agree; if the slopes on the two sides differ by as much at h/2 as at h,
there is a kink. F is a solver's own outer loss, from a fresh start, after as many calls as it takes until F stops
changing.
Cost: four to six evaluations of F for each direction and step size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._solver import About, Solver, about_of
from hypergrad._tree import PyTree, is_float
from hypergrad.outer.controllers import set_options

_CALLS = 50
_TIGHT = 1e-12
_MAX_STEPS = 20_000
_TRAIN = 1000  # steps per call, for a learned response
_LARGEST = 0.5
_FINE = 1e-7  # rounding over a step size at which a slope is still visible


class Solution(NamedTuple):
    """The outer loss at one point.

    Attributes:
        settled: value after as many calls as it took; NaN where it is not finite.
        first: value after one call.
        calls: how many calls it took.
        drift: absolute change in the last of these calls.
        calm: whether it stopped changing.
        eps: rounding level of its type (dimensionless).
    """

    settled: float
    first: float
    calls: int
    drift: float
    calm: bool
    eps: float


class Slope(NamedTuple):
    """A directional derivative.

    Attributes:
        value: the derivative, by extrapolated central differences.
        error: estimate of its absolute error.
        jump: slope on one side minus slope on the other, where they differ by a kink; else 0.
    """

    value: float
    error: float
    jump: float


class Setting(NamedTuple):
    """Everything that a call of the solver needs, in one precision."""

    solver: Solver
    params: PyTree
    hparams: PyTree
    train: PyTree
    valid: PyTree
    key: Array | None
    model_state: PyTree


def in_float64(problem: Setting) -> Setting:
    """Return the same problem with floating leaves in float64; call and use it under `jax.enable_x64(True)`."""

    def cast(x: Any) -> Any:
        return jnp.asarray(np.asarray(x, np.float64)) if is_float(x) else x

    data = jax.tree.map(cast, (problem.params, problem.hparams, problem.train, problem.valid, problem.model_state))
    params, hparams, train, valid, model_state = data
    return problem._replace(params=params, hparams=hparams, train=train, valid=valid, model_state=model_state)


def flatten(hparams: PyTree) -> tuple[np.ndarray, Callable[[np.ndarray], PyTree]]:
    """Return hyperparameters as one float64 vector, and a function back to the tree, in the dtypes of the leaves."""
    leaves, treedef = jax.tree.flatten(hparams)
    ends = np.cumsum([np.size(x) for x in leaves])[:-1]

    def unflatten(vector: np.ndarray) -> PyTree:
        parts = np.split(vector, ends)
        return treedef.unflatten(
            [jnp.asarray(part.reshape(np.shape(x)), jnp.result_type(x)) for part, x in zip(parts, leaves, strict=True)]
        )

    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves]), unflatten


def make_resolve(problem: Setting, compiled: Callable[..., Any] | None = None) -> Callable[..., Solution]:
    """Return `(vector, calls=None, tight=True, **changed) -> Solution`: like `make_solve`, but without the state."""
    solve = make_solve(problem, compiled)

    def resolve(vector: np.ndarray, calls: int | None = None, tight: bool = True, **changed: Any) -> Solution:
        return solve(vector, calls, tight, **changed)[0]

    return resolve


def make_solve(problem: Setting, compiled: Callable[..., Any] | None = None) -> Callable[..., tuple[Solution, Any]]:
    """Return `(vector, calls=None, tight=True, **changed) -> (Solution, state)`; the solver's calls are compiled once.

    If `calls` is given, exactly as many calls are made. With `tight`, the inner tolerance is lowered to rounding level
    where the solver declares that this is possible, see `tighten`. `changed` replaces fields of the problem: `params`,
    `train` or `valid` of the same shapes. The outer loss is that of the solver's `evaluate`, so that it does not come
    from the code under test. For a solver without `evaluate`, it is the value that `hypergrad` reports: from
    `compiled`, the compiled `solver.hypergrad`, or else from a function that leaves out the derivative where the next
    call does not need it.
    """
    solver, key = problem.solver, problem.key
    init_key, call_key = (None, None) if key is None else jax.random.split(key)
    _, unflatten = flatten(problem.hparams)
    own = getattr(solver, "evaluate", None)

    @jax.jit
    def value_only(*args: Any, key: Array | None) -> tuple[Array, Any]:
        out, state = solver.hypergrad(*args, key=key)
        return out.value, state

    evaluate = None if own is None else jax.jit(own)

    def call(*args: Any) -> tuple[Array, Any]:
        if evaluate is not None:
            value, _, state = evaluate(*args, key=call_key)
            return value, state
        if compiled is not None:
            out, state = compiled(*args, key=call_key)
            return out.value, state
        return value_only(*args, key=call_key)

    def solve(vector: np.ndarray, calls: int | None = None, tight: bool = True, **changed: Any) -> tuple[Solution, Any]:
        hparams, given = unflatten(vector), problem._replace(**changed)
        state = solver.init(given.params, hparams, key=init_key, model_state=given.model_state)
        state, values, eps = tighten(state, about_of(solver)) if tight else state, [], 0.0
        for _ in range(calls or _CALLS):
            value, state = call(state, hparams, given.train, given.valid)
            values.append(float(value))
            eps = float(jnp.finfo(value.dtype).eps)
            if not np.isfinite(values[-1]) or (calls is None and settled(values, eps)):
                break
        drift = abs(values[-1] - values[-2]) if len(values) > 1 else 0.0
        last = values[-1] if np.isfinite(values[-1]) else np.nan
        return Solution(last, values[0], len(values), drift, settled(values, eps), eps), state

    return solve


def settled(values: list[float], eps: float) -> bool:
    """Whether a sequence has stopped changing: it is at rounding level, or close to it and no longer approaching it."""
    if len(values) < 2:
        return False
    change, size = abs(values[-1] - values[-2]), abs(values[-1])
    if change <= 4 * eps * size:
        return True
    return len(values) > 3 and change <= eps**0.6 * size and change >= 0.5 * abs(values[-2] - values[-3])


def tighten(state: Any, about: About, linear: bool = False) -> Any:
    """Return a solver's state with an inner tolerance near rounding level, where it has one; for a learned response,
    with no spread and more steps, so that it is trained at the hyperparameters alone; otherwise the state unchanged.

    Only options that `about.options` names are replaced. A fixed budget stays unchanged. With `linear`, the tolerance
    of the adjoint system is lowered as well.
    """
    table = getattr(state, "options", None)
    found = {name: functools.reduce(_entry, name.split("."), table) for name in about.options}
    given = {name: jnp.asarray(value) for name, value in found.items() if value is not None}
    new: dict[str, Array] = {}
    if about.differentiates == "response" and {"scale", "inner.max_steps"} <= given.keys():
        new = {"scale": jnp.zeros(()), "inner.max_steps": jnp.maximum(given["inner.max_steps"], _TRAIN)}
    for part in ("inner", "linear")[: 1 + linear]:
        tol, steps = given.get(f"{part}.tol"), given.get(f"{part}.max_steps")
        if tol is not None:
            least = jnp.maximum(_TIGHT, 8 * jnp.finfo(tol.dtype).eps)
            new[f"{part}.tol"] = jnp.where(tol > 0, jnp.minimum(tol, least), tol)
            if steps is not None:
                new[f"{part}.max_steps"] = jnp.where(tol > 0, jnp.maximum(steps, _MAX_STEPS), steps)
    return set_options(state, new) if new else state


def _entry(table: Any, name: str) -> Any:
    return table.get(name) if isinstance(table, Mapping) else None


def slopes(
    resolve: Callable[[np.ndarray], Solution], at: np.ndarray, direction: np.ndarray, center: Solution, tol: float
) -> tuple[Slope, Slope]:
    """Directional derivatives of the settled value and of the first value.

    Args:
        resolve: `vector -> Solution`.
        at: λ, `[n]`.
        direction: v, `[n]`, scaled such that a step of size 1 is a large one.
        center: the solution at λ.
        tol: relative accuracy at which the search for a better step size stops.
    """
    eps = center.eps
    h = eps**0.2
    found: list[tuple[float, Slope, Slope]] = []
    pair: list[Slope] = []
    smaller = [s for s in (0.01 * h, 0.001 * h) if eps <= _FINE * s]
    for size in (h, 0.1 * h, *smaller, *(s for s in (10 * h, 100 * h) if s < _LARGEST)):
        if size in smaller and pair[0].error <= tol * abs(pair[0].value):
            continue  # these steps are for an F that bends within a thousandth; elsewhere they show rounding
        sides: list[tuple[Solution, Solution]] = []
        for step in (size, size / 2, size / 4):
            sides.append((resolve(at + step * direction), resolve(at - step * direction)))
            if len(sides) == 1:
                continue
            settled_slope = _slope(size, [(a.settled, b.settled) for a, b in sides], center.settled, eps)
            if settled_slope.error <= 0.1 * tol * abs(settled_slope.value):
                break
        found.append((size, settled_slope, _slope(size, [(a.first, b.first) for a, b in sides], center.first, eps)))
        pair = min(
            (_with_noise(entry, found) for entry in found),
            key=lambda pair: np.nan_to_num(pair[0].error, nan=np.inf, posinf=np.inf),
        )
        if pair[0].error <= 0.1 * tol * abs(pair[0].value):
            break
    return pair[0], pair[1]


def _with_noise(entry: tuple[float, Slope, Slope], found: list[tuple[float, Slope, Slope]]) -> list[Slope]:
    """Return the slopes at one step size, with errors that include the noise seen at smaller step sizes.

    Noise in F is equally large at every step size. Choosing the smallest error without counting the noise would select
    the step size at which noise happened to cancel.
    """
    size = entry[0]
    smaller = [other for other in found if other[0] < size]

    def with_noise(slope: Slope, others: list[tuple[float, Slope]]) -> Slope:
        return slope._replace(error=max([slope.error, *(2 * s.error * step / size for step, s in others)]))

    return [
        with_noise(entry[1], [(step, s) for step, s, _ in smaller]),
        with_noise(entry[2], [(step, s) for step, _, s in smaller]),
    ]


def _slope(size: float, sides: list[tuple[float, float]], center: float, eps: float) -> Slope:
    """Compute it from values on both sides at two or three step sizes, each half of the one before."""
    steps = size / 2 ** np.arange(len(sides))
    right, left = np.asarray(sides).T
    with np.errstate(all="ignore"):
        rounding = 2 * eps * np.max(np.abs(sides)) / steps[-1]
        table = [(right - left) / (2 * steps)]
        for order in range(1, len(sides)):
            table.append((4**order * table[-1][1:] - table[-1][:-1]) / (4**order - 1))
        error = abs(table[-1][-1] - table[-2][-1]) + rounding
        bend = (right - 2 * center + left) / steps
        alike = bool(np.all(np.abs(bend / bend[-1] - 1) < 0.3))  # the bend of a smooth F halves, noise doubles
        kinked = len(sides) > 2 and alike and abs(bend[-1]) > 10 * error + 100 * rounding
        if not kinked:  # zero for a smooth F; else noise that happened to cancel in the differences
            error = max(
                error,
                abs(bend[0] - 2 * bend[1]) / 4,
                abs(bend[0] - 10 * bend[1] + 16 * bend[-1]) / 30 if len(sides) > 2 else 0,
            )
    return Slope(float(table[-1][-1]), float(error), float(bend[-1]) if kinked else 0.0)

r"""Finite differences of the problem solved again at other hyperparameters, with their own error.

    D(h) = (F(λ + h v) − F(λ − h v)) / 2h,    D = (4 D(h/2) − D(h)) / 3,    |D − dF(v)| ≲ |D(h/2) − D(h)| / 3

Source: Richardson 1911, "The approximate arithmetical solution by finite differences". Differs: the step size is
changed by factors of ten until both step sizes agree; slopes that differ on the two sides by as much at h/2 as at h are
a kink. F is a solver's own outer loss, from a fresh start, after as many calls as it takes until it stops changing.
Cost: four evaluations of F a direction and step size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._solver import Solver
from hypergrad._tree import PyTree, is_float

_CALLS = 50
_TIGHT = 1e-12
_MAX_STEPS = 20_000
_LARGEST = 0.5


class Solution(NamedTuple):
    """The outer loss at one point.

    Attributes:
        settled: after the calls it took; NaN where it is not finite.
        first: after one call.
        calls: how many calls it took.
        drift: |change| in the last of them.
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
        value: by extrapolated central differences.
        error: estimate of its absolute error.
        jump: slope on one side minus slope on the other, where that is a kink; else 0.
    """

    value: float
    error: float
    jump: float


class Problem(NamedTuple):
    """Everything that a call of the solver needs, in one precision."""

    solver: Solver
    params: PyTree
    hparams: PyTree
    train: PyTree
    valid: PyTree
    key: Array | None
    model_state: PyTree


def in_float64(problem: Problem) -> Problem:
    """The same problem with floating leaves in float64; call it, and use it, under `jax.enable_x64(True)`."""
    def cast(x: Any) -> Any:
        return jnp.asarray(np.asarray(x, np.float64)) if is_float(x) else x

    data = jax.tree.map(cast, (problem.params, problem.hparams, problem.train, problem.valid, problem.model_state))
    params, hparams, train, valid, model_state = data
    return problem._replace(params=params, hparams=hparams, train=train, valid=valid, model_state=model_state)


def flatten(hparams: PyTree) -> tuple[np.ndarray, Callable[[np.ndarray], PyTree]]:
    """Hyperparameters as one float64 vector, and back, in the dtypes of the leaves."""
    leaves, treedef = jax.tree.flatten(hparams)
    ends = np.cumsum([np.size(x) for x in leaves])[:-1]

    def unflatten(vector: np.ndarray) -> PyTree:
        parts = np.split(vector, ends)
        return treedef.unflatten([jnp.asarray(part.reshape(np.shape(x)), jnp.result_type(x))
                                  for part, x in zip(parts, leaves, strict=True)])

    return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves]), unflatten


def make_resolve(problem: Problem, compiled: Callable[..., Any] | None = None) -> Callable[..., Solution]:
    """`(vector, calls=None, tight=True) -> Solution`, with the solver's calls compiled once.

    With `calls`, exactly as many are made. With `tight`, the inner tolerance is lowered to rounding level where the
    solver's state has it among its options. `compiled` is the compiled `solver.hypergrad`; without it a function is
    compiled that leaves out the derivative, where the next call does not need it.
    """
    solver, key = problem.solver, problem.key
    init_key, call_key = (None, None) if key is None else jax.random.split(key)
    _, unflatten = flatten(problem.hparams)

    @jax.jit
    def value_only(*args: Any, key: Array | None) -> tuple[Array, Any]:
        out, state = solver.hypergrad(*args, key=key)
        return out.value, state

    call = value_only if compiled is None else compiled

    def resolve(vector: np.ndarray, calls: int | None = None, tight: bool = True) -> Solution:
        hparams = unflatten(vector)
        state = solver.init(problem.params, hparams, key=init_key, model_state=problem.model_state)
        state, values, eps = tighten(state) if tight else state, [], 0.0
        for _ in range(calls or _CALLS):
            out, state = call(state, hparams, problem.train, problem.valid, key=call_key)
            value = out if compiled is None else out.value
            values.append(float(value))
            eps = float(jnp.finfo(value.dtype).eps)
            if not np.isfinite(values[-1]) or (calls is None and settled(values, eps)):
                break
        drift = abs(values[-1] - values[-2]) if len(values) > 1 else 0.0
        last = values[-1] if np.isfinite(values[-1]) else np.nan
        return Solution(last, values[0], len(values), drift, settled(values, eps), eps)

    return resolve


def settled(values: list[float], eps: float) -> bool:
    """Whether a sequence has stopped changing: at rounding level, or close to it and no longer approaching."""
    if len(values) < 2:
        return False
    change, size = abs(values[-1] - values[-2]), abs(values[-1])
    if change <= 4 * eps * size:
        return True
    return len(values) > 3 and change <= eps**0.6 * size and change >= 0.5 * abs(values[-2] - values[-3])


def tighten(state: Any) -> Any:
    """A solver's state with an inner tolerance near rounding level, where it has one; else the state itself."""
    options = getattr(state, "options", None)
    if not isinstance(options, dict) or not hasattr(state, "_replace"):
        return state
    inner = options.get("inner")
    if not isinstance(inner, dict) or "tol" not in inner:
        return state
    tol = jnp.asarray(inner["tol"])
    new = {"tol": jnp.where(tol > 0, jnp.minimum(tol, jnp.maximum(_TIGHT, 8 * jnp.finfo(tol.dtype).eps)), tol)}
    new["tol"] = new["tol"].astype(tol.dtype)
    if "max_steps" in inner:
        steps = jnp.asarray(inner["max_steps"])
        new["max_steps"] = jnp.where(tol > 0, jnp.maximum(steps, _MAX_STEPS), steps).astype(steps.dtype)
    return state._replace(options={**options, "inner": {**inner, **new}})


def slopes(resolve: Callable[[np.ndarray], Solution], at: np.ndarray, direction: np.ndarray, center: Solution,
           tol: float) -> tuple[Slope, Slope]:
    """Directional derivatives of the settled and of the first value.

    Args:
        resolve: `vector -> Solution`.
        at: λ, `[n]`.
        direction: v, `[n]`, so scaled that a step of size 1 is a large one.
        center: the solution at λ.
        tol: relative accuracy at which to stop looking for a better step size.
    """
    eps = center.eps
    h = eps**0.2
    found: list[tuple[float, Slope, Slope]] = []
    pair: list[Slope] = []
    for size in (h, 0.1 * h, *(s for s in (10 * h, 100 * h) if s < _LARGEST)):
        wide, near = [[resolve(at + sign * step * direction) for sign in (1, -1)] for step in (size, size / 2)]
        found.append((size, _slope([s.settled for s in wide], [s.settled for s in near], center.settled, size, eps),
                      _slope([s.first for s in wide], [s.first for s in near], center.first, size, eps)))
        # What the smallest steps show is noise, and no smaller at the others. To choose the smallest error without it
        # would be to choose the step size where noise happened to cancel.
        smallest, *_ = sorted(found)
        noise = 2 * smallest[1].error * smallest[0] if len(found) > 1 else 0.0
        best = min(found, key=lambda f: np.nan_to_num(f[1].error + noise / f[0], nan=np.inf, posinf=np.inf))
        pair = [slope._replace(error=slope.error + noise / best[0]) for slope in best[1:]]
        if pair[0].error <= 0.1 * tol * abs(pair[0].value):
            break
    return pair[0], pair[1]


def _slope(wide: list[float], near: list[float], center: float, size: float, eps: float) -> Slope:
    with np.errstate(all="ignore"):
        outer, inner = (wide[0] - wide[1]) / (2 * size), (near[0] - near[1]) / size
        rounding = 2 * eps * max(map(abs, (*wide, *near))) / size
        error = abs(inner - outer) / 3 + rounding
        bend_wide = (wide[0] - 2 * center + wide[1]) / size
        bend_near = (near[0] - 2 * center + near[1]) / (size / 2)
        kinked = abs(bend_near) > 0.75 * abs(bend_wide) and abs(bend_near) > 10 * error + 100 * rounding
        if not kinked:  # zero for a smooth F; shows noise that happened to cancel in the differences
            error = max(error, abs(bend_wide - 2 * bend_near) / 4)
    return Slope((4 * inner - outer) / 3, error, bend_near if kinked else 0.0)

r"""L-BFGS with a weak-Wolfe line search: the default inner solver for smooth losses.

    w ← w − t B F,     B ≈ H⁻¹ from the last few pairs s = Δw, y = ΔF,     F = ∂_w h

Source: Liu & Nocedal 1989, "On the limited memory BFGS method"; Nocedal & Wright 2006, algorithms 7.4 and 3.5; Hager
& Zhang 2005 for the decrease test near the solution, where the loss no longer resolves a step. Differs from
`optax.lbfgs`:
1. it is one loop with one evaluation of the loss per turn, traced once: it compiles in three quarters of the time, and
   under vmap no problem waits for another's line search;
2. everything is relative to the natural size of F, so that a loss scaled by 1e±20 takes the same steps;
3. the pairs are kept for the next call: after a small change of the hyperparameters they save 15 to 50 % of the
   evaluations, measured on logistic regression over 40 outer steps;
4. it stops, with a status, at rounding level, at a kink, and on a loss without a minimum.
Cost: one evaluation of loss and gradient per step, and 1.05 for each accepted point. Memory: 2 `history` + 4 vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, default_tol, options
from hypergrad._packing import packing
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, InnerResult, gradient_residual

_MAX_STEPS = 500
_DECREASE, _CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
_TRIALS = 30  # evaluations on one line
_PATIENCE = 40  # turns without progress above rounding
_NOISE = 100  # units of rounding in which a loss is uncertain


class LbfgsState(NamedTuple):
    """The curvature learned so far, kept for the next call.

    Attributes:
        s, y: differences of parameters and of gradients, newest at `(count - 1) % history`. Pytrees with leaves
            `[history, ...]`.
        rho: `[history]`, 1 / ⟨s, y⟩, or 0 where there is no pair.
        curvature: ⟨s, y⟩ / ⟨y, y⟩ of the newest pair.
        count: pairs so far, int32.
        unit: the size of F in which `y` is measured.
        step: step to try first: 1, or where to continue a line search that the last call left unfinished.
    """

    s: PyTree
    y: PyTree
    rho: Array
    curvature: Array
    count: Array
    unit: Array
    step: Array


class _Line(NamedTuple):
    """A search along one direction: [low, high] brackets an acceptable step."""

    low: Array
    low_slope: Array
    high: Array
    high_slope: Array  # inf where the loss is not finite, NaN where its gradient is not
    step: Array  # to be tried next
    trials: Array


class _Carry(NamedTuple):
    params: PyTree
    value: Array
    grads: PyTree
    residual: Array
    direction: PyTree
    slope: Array
    line: _Line
    memory: LbfgsState
    best: Array  # smallest residual
    idle: Array  # turns without progress
    steps: Array
    status: Array


@options(
    tol=Number(above=0), max_steps=Number(least=1, integer=True), history=Number(least=1, integer=True, static=True)
)
def lbfgs(tol: ArrayLike | None = None, max_steps: ArrayLike | None = None, *, history: int = 10) -> Inner:
    """Minimise the inner loss by L-BFGS with a line search.

    Args:
        tol: tolerance on the gradient norm, relative to its natural scale (dimensionless). Default: what the
            precision supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of evaluations of loss and gradient. Default 500.
        history: number of pairs that approximate the inverse Hessian.

    Returns:
        An `Inner` whose status is INNER_MAX_STEPS where the tolerance was missed, PRECISION_LIMITED where the loss
        and its gradient stopped falling at rounding level, INNER_STALLED where they stopped above it, INNER_DIVERGED
        where the loss has no minimum, and NONFINITE_LOSS or NONFINITE_GRAD where it is not finite at the start or
        wherever the search leads.

    Raises:
        InputError: for a negative tolerance or step count, or a history below 1.

    >>> import hypergrad as hg
    >>> inner = hg.inner.lbfgs(tol=1e-8)
    """
    options = {"tol": tol, "max_steps": _MAX_STEPS if max_steps is None else max_steps}
    return Inner(
        init=lambda params, hparams: _empty(params, history),
        solve=_solve,
        options=options,
        claims=True,
        symmetric=True,
        residual=gradient_residual,
    )


def _empty(params: PyTree, history: int) -> LbfgsState:
    # Everything is made from the parameters rather than from shapes: if they are sharded, so are the rows, and the
    # scalars are on the same devices, as they will be after the first call, so that the second call compiles nothing.
    still = _tree.zeros_like(params)
    rows = jax.tree.map(lambda x: jnp.stack([x] * history), still)
    none = _tree.vdot(still, still).astype(_tree.dtype(params))
    one = none + 1
    return LbfgsState(rows, rows, jnp.stack([none] * history), one, none.astype(jnp.int32), one, one)


def _solve(
    objective: Objective,
    params: PyTree,
    state: LbfgsState,
    hparams: PyTree,
    model_state: PyTree,
    *,
    scale: Array,
    options: Mapping[str, ArrayLike],
) -> InnerResult:
    dtype = _tree.dtype(params)
    scale = jnp.asarray(scale).astype(dtype)
    pack, unpack = packing(params)
    loss = lambda x: objective.fixed(unpack(x), hparams) / scale
    c = _minimise(
        jax.value_and_grad(loss),
        pack(params),
        _over_rows(pack, _rescaled(state, scale)),
        default_tol(options["tol"], params),
        jnp.asarray(options["max_steps"], jnp.int32),
    )
    found = _tree.where(c.status == int(Status.INNER_DIVERGED), params, unpack(c.params))
    # The pairs of a failed solve do not help the next.
    memory = _forget(c.memory, (c.status != int(Status.OK)) & (c.status != int(Status.INNER_MAX_STEPS)))
    memory = _over_rows(unpack, memory)
    return InnerResult(found, memory, model_state, c.residual * scale, c.steps, c.status)


def _minimise(
    evaluate: Callable[[PyTree], tuple[Array, PyTree]], params: PyTree, memory: LbfgsState, tol: Array, max_steps: Array
) -> _Carry:
    dtype, eps = _tree.dtype(params), _tree.eps(params)
    zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)

    def proceed(c: _Carry) -> Array:
        return (c.residual > tol) & (c.steps < max_steps) & (c.status == int(Status.OK))

    def body(c: _Carry) -> _Carry:
        # The last evaluation goes to the best point of the line so far, if there is one, so that no call ends in vain.
        last = c.steps + 1 >= max_steps
        step = jnp.where(last & (c.line.low > 0), c.line.low, c.line.step)
        trial = _tree.axpy(step, c.direction, c.params)
        value, grads = evaluate(trial)
        value, slope = value.astype(dtype), _tree.vdot(grads, c.direction).astype(dtype)
        residual = jnp.sqrt(_tree.vdot(grads, grads)).astype(dtype)  # of order 1 or less, in units of the scale
        first = c.steps == 0  # evaluates the starting point
        finite = jnp.isfinite(value) & jnp.isfinite(residual)
        noise = eps * jnp.abs(c.value)
        lower = value <= c.value + _DECREASE * step * c.slope
        # Values that come out of cancelling terms lose more than their own rounding: where the decrease to expect is
        # this faint, the slopes decide.
        doubtful = max(eps**0.75, _NOISE * eps) * jnp.abs(c.value)
        room = jnp.where(-step * c.slope <= doubtful, doubtful, _NOISE * noise)
        level = (value <= c.value + room) & (slope <= (2 * _DECREASE - 1) * c.slope)
        down = finite & (lower | level)
        accept = finite & (first | (down & ((slope >= _CURVATURE * c.slope) | last)))

        missing = jnp.where(jnp.isfinite(value), jnp.nan, jnp.inf)  # which of the two is not finite
        seen = jnp.where(finite, slope, missing.astype(dtype))
        line = _bracket(c.line._replace(step=step), c.slope, seen, down)
        lost = ~accept & (line.trials >= _TRIALS)
        retry = lost & (c.memory.count > 0)
        curved = step * (slope - c.slope)  # ⟨s, y⟩
        memory = _learn(c.memory, _tree.scale(step, c.direction), _tree.sub(grads, c.grads), curved, accept)
        memory = _forget(memory, retry)
        params, value_now, grads_now, residual_now = _tree.where(
            accept, (trial, value, grads, residual), (c.params, c.value, c.grads, c.residual)
        )
        direction, downhill = _aim(memory, grads_now, residual_now)
        direction, slope_now = _tree.where(accept | retry, (direction, downhill), (c.direction, c.slope))
        line = _tree.where(accept | retry, _fresh(slope_now, jnp.where(first, c.memory.step, 1)), line)

        best = jnp.fmin(c.best, residual)
        falling = finite & ((value < c.value - 4 * noise) | (residual < 0.99 * c.best))
        idle = jnp.where(falling, 0, c.idle + 1).astype(jnp.int32)
        lost = lost & ~retry
        ended = lost | (idle >= _PATIENCE)
        far = (lost & jnp.isinf(line.high)) | (c.residual * jnp.sqrt(eps) > 1)
        wall = jnp.where(first, seen, line.high_slope)
        stuck = jnp.where(best <= jnp.sqrt(eps), int(Status.PRECISION_LIMITED), int(Status.INNER_STALLED))
        status = jnp.where(ended, stuck, int(Status.OK))
        status = jnp.where((value == -jnp.inf) | (ended & far), int(Status.INNER_DIVERGED), status)
        broken = jnp.where(jnp.isnan(wall), int(Status.NONFINITE_GRAD), int(Status.NONFINITE_LOSS))
        status = jnp.where(~jnp.isfinite(wall) & (first | (lost & ~far)), broken, status).astype(jnp.int32)
        here = params, value_now, grads_now, residual_now
        return _Carry(*here, direction, slope_now, line, memory, best, idle, c.steps + 1, status)

    still = _tree.zeros_like(params)
    line, none = _fresh(zero, zero), jnp.int32(0)
    start = _Carry(params, zero, still, inf, still, zero, line, memory, inf, none, none, jnp.int32(Status.OK))
    c = jax.lax.while_loop(proceed, body, start)
    missed = (c.status == int(Status.OK)) & (c.residual > tol)
    status = jnp.where(missed, int(Status.INNER_MAX_STEPS), c.status).astype(jnp.int32)
    return c._replace(status=status, memory=c.memory._replace(step=jnp.where(missed, c.line.step, 1)))


def _fresh(slope: Array, step: Array) -> _Line:
    zero = jnp.zeros_like(slope)
    return _Line(zero, slope, zero + jnp.inf, zero, step.astype(zero.dtype), jnp.int32(0))


def _aim(memory: LbfgsState, grads: PyTree, residual: Array) -> tuple[PyTree, Array]:
    """The direction −B F and the slope along it; −F with unit length where there is no usable pair."""
    newton = _tree.scale(-1, _precondition(memory, grads))
    slope = _tree.vdot(newton, grads).astype(residual.dtype)
    usable = (memory.count > 0) & (slope < 0)
    downhill = _tree.scale(_tree.safe_divide(-1, residual), grads)
    return _tree.where(usable, newton, downhill), jnp.where(usable, slope, -residual)


def _bracket(line: _Line, start: Array, slope: Array, down: Array) -> _Line:
    """Narrow the bracket by a step that was too short (it went down, but still falls) or too long; choose the next.

    The next step is the zero of the secant through the slopes, kept away from the ends; every third trial takes the
    middle, so that the bracket shrinks for any loss.
    """
    low, low_slope = jnp.where(down, line.step, line.low), jnp.where(down, slope, line.low_slope)
    high, high_slope = jnp.where(down, line.high, line.step), jnp.where(down, line.high_slope, slope)
    rising = high_slope > 0
    share = _tree.safe_divide(-low_slope, high_slope - low_slope, where=rising, otherwise=0.5)
    share = jnp.where(lax.rem(line.trials, jnp.int32(3)) == 2, 0.5, jnp.clip(share, 0.1, 0.9))
    bent = slope > start
    factor = _tree.safe_divide(start, start - slope, where=bent, otherwise=10)
    further = line.step * jnp.clip(factor, 2, 10)
    step = jnp.where(jnp.isinf(high), further, low + share * jnp.where(jnp.isinf(high), 0, high - low))
    return _Line(low, low_slope, high, high_slope, step, line.trials + 1)


def _learn(memory: LbfgsState, s: PyTree, y: PyTree, sy: Array, accept: Array) -> LbfgsState:
    """Store an accepted pair if it has positive curvature, whose inverse the precision can hold."""
    yy = _tree.vdot(y, y).astype(sy.dtype)
    good = accept & (sy > 0) & (yy > 0)
    rho, curvature = _tree.safe_divide(1, sy, where=good), _tree.safe_divide(sy, yy, where=good)
    good = good & jnp.isfinite(rho) & jnp.isfinite(curvature)
    row = lax.rem(memory.count, jnp.int32(memory.rho.shape[0]))
    put = lambda rows, x: lax.dynamic_update_index_in_dim(rows, jnp.where(good, x, _row(rows, row)), row, 0)
    return LbfgsState(
        jax.tree.map(put, memory.s, s),
        jax.tree.map(put, memory.y, y),
        put(memory.rho, rho),
        jnp.where(good, curvature, memory.curvature),
        memory.count + good,
        memory.unit,
        memory.step,
    )


def _precondition(memory: LbfgsState, grads: PyTree) -> PyTree:
    """B F by the two-loop recursion."""
    history = jnp.int32(memory.rho.shape[0])
    order = lax.rem(memory.count + lax.iota(jnp.int32, memory.rho.shape[0]), history)  # oldest first

    def pair(row: Array) -> tuple[PyTree, PyTree, Array]:
        return jax.tree.map(lambda rows: _row(rows, row), (memory.s, memory.y, memory.rho))

    def back(v: PyTree, row: Array) -> tuple[PyTree, Array]:
        s, y, rho = pair(row)
        share = rho * _tree.vdot(s, v)
        return _tree.axpy(-share, y, v), share

    def forth(v: PyTree, row_share: tuple[Array, Array]) -> tuple[PyTree, None]:
        row, share = row_share
        s, y, rho = pair(row)
        return _tree.axpy(share - rho * _tree.vdot(y, v), s, v), None

    v, shares = jax.lax.scan(back, grads, order, reverse=True)
    return jax.lax.scan(forth, _tree.scale(memory.curvature, v), (order, shares))[0]


def _row(rows: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(rows, i, 0, keepdims=False)


def _over_rows(change: Callable[[PyTree], PyTree], memory: LbfgsState) -> LbfgsState:
    """The same pairs in another form."""
    return memory._replace(s=jax.vmap(change)(memory.s), y=jax.vmap(change)(memory.y))


def _rescaled(memory: LbfgsState, unit: Array) -> LbfgsState:
    """The same pairs, with gradients measured in another unit; none where the units differ beyond the precision."""
    ratio = memory.unit / unit
    near = (ratio > 0) & jnp.isfinite(ratio)
    ratio = jnp.where(near, ratio, 1)
    memory = memory._replace(
        y=_tree.scale(ratio, memory.y), rho=memory.rho / ratio, curvature=memory.curvature / ratio, unit=unit
    )
    return _forget(memory, ~near)


def _forget(memory: LbfgsState, condition: Array) -> LbfgsState:
    """The memory, emptied where the condition holds: with rho = 0 the vectors that remain have no effect."""
    return memory._replace(rho=jnp.where(condition, 0, memory.rho), count=jnp.where(condition, 0, memory.count))

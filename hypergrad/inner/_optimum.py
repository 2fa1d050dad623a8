r"""Solve the inner problem and measure how well it was solved; shared by every solver that works at the optimum.

    repeat   inner solve to √tol, later to tol   →   Newton steps to tol   →   measure F
    until    ‖F‖ ≤ tol · size, or neither gets any further

A Newton step squares the residual, so the inner solver hands over early. Where Newton's method stalls (negative
curvature, a singular Hessian, a network), the inner solver takes over again and goes on to the full tolerance itself.

Residuals are measured relative to the size of F = ∂_w h. The size is ‖∂_w F · u‖ where the solve ended, with u = w, or
with u the way from the start if w is negligible next to it. This is how much F changes when the parameters go from zero
to their values. Rescaling the loss or the parameters does not change the relative residual, and on a quadratic the size
equals ‖∂_w h(0)‖. The gradient at the start would not do, since after a steep start any point would seem solved. If
both the optimum and the start are near zero, the size vanishes; the largest recent size takes its place, and its floor
follows from the rounding error of F,

    eps · √(2 |h| ‖∂_w F u‖ / ‖u‖),

since F is a sum of terms that cancel: in least squares, h = ½‖r‖² and F = Xᵀr, this is eps ‖X‖ ‖r‖.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._curvature import System, loss_system, map_system
from hypergrad._loops import once
from hypergrad._options import default_tol
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, InnerResult
from hypergrad.inner.newton import polish
from hypergrad.linear._linear import Matvec, Preconditioner

POLISH_STEPS = 8  # at most; they end when the tolerance is met, usually after one or two, or when they no longer help
_FORGET = 0.1  # a scale that is not seen again loses a digit per call
_NEAR = 1e-3  # the residual below which Newton's method is usually fast
_ROUNDING = 64  # residuals within this many units of rounding cannot be told from zero
_TURNS = 10  # of inner solver and Newton steps; a solve that ends well takes one turn, a steep start a few
_PROGRESS = 0.5  # factor by which Newton steps must reduce F for an inner solver that had stalled to be tried again


class Optimum(NamedTuple):
    """Where an inner solve ended.

    Attributes:
        params, inner_state, model_state: for the next call.
        system: F linearized at `params`.
        precondition: `v -> M⁻¹ v` for the system, or None.
        residual: ‖F‖ / scale (dimensionless).
        scale: natural size of F, for the next call.
        steps: int32.
        status: int32.
    """

    params: PyTree
    inner_state: PyTree
    model_state: PyTree
    system: System
    precondition: Matvec | None
    residual: Array
    scale: Array
    steps: Array
    status: Array


class _Progress(NamedTuple):
    params: PyTree
    inner_state: PyTree
    model_state: PyTree
    inverse: list[Array]  # the arrays of the preconditioner
    norm: Array  # ‖F‖; within a turn, before its Newton steps
    size: Array  # natural size of F, as far as it is known
    noise: Array  # rounding error of F
    aim: Array  # tolerance of the inner solver's next turn
    spent: Array  # steps of the inner solver
    polished: Array  # Newton steps
    turns: Array  # -1 where the size of F is not known at all
    status: Array  # of the inner solver's last turn
    more: Array


def linearize(inner: Inner, objective: Objective, params: PyTree, hparams: PyTree) -> System:
    """The inner solver's optimality condition at one point."""
    if inner.symmetric:
        return loss_system(objective.fixed, params, hparams)
    return map_system(lambda w, h: inner.residual(objective, w, h), params, hparams)


def find_optimum(
    inner: Inner,
    objective: Objective,
    params: PyTree,
    inner_state: PyTree,
    model_state: PyTree,
    hparams: PyTree,
    *,
    scale: Array,
    options: Mapping[str, ArrayLike],
    polish_steps: int,
    preconditioner: Preconditioner | None,
    key: Array,
) -> Optimum:
    """Solve the inner problem from `params`, polish, and linearize where it ended.

    `scale` is 0 at the very first call. An inner solver that claims no tolerance is run once.
    """

    def solve(params: PyTree, state: PyTree, model_state: PyTree, size: Array, **changed: Array) -> InnerResult:
        size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        return inner.solve(objective, params, state, hparams, model_state, scale=size, options=dict(options) | changed)

    def condition(w: PyTree) -> Matvec:
        if preconditioner is None:
            return lambda v: v
        return preconditioner(linearize(inner, objective, w, hparams).matvec, w, hparams, key)

    if not inner.claims:
        found = solve(params, inner_state, model_state, scale)
        system = linearize(inner, objective, found.params, hparams)
        precondition = None if preconditioner is None else preconditioner(system.matvec, found.params, hparams, key)
        size = jnp.maximum(scale, found.residual.astype(scale.dtype))
        residual = found.residual / jnp.where(size > 0, size, 1)
        return Optimum(
            found.params,
            found.state,
            found.model_state,
            system,
            precondition,
            residual,
            size,
            found.steps,
            found.status,
        )

    dtype = scale.dtype
    tol = default_tol(options.get("tol"), params).astype(dtype)
    handover = jnp.maximum(tol, jnp.minimum(jnp.sqrt(tol), _NEAR)) if polish_steps else tol
    most = jnp.asarray(options["max_steps"], jnp.int32) if "max_steps" in options else None
    build, rebuild, empty = _as_arrays(condition, params)

    def measure(w: PyTree) -> tuple[Array, Array, Array]:
        norm, size, noise = (x.astype(dtype) for x in _measure(inner, objective, w, hparams, params))
        return norm, jnp.maximum(size, noise / jnp.sqrt(tol)), noise

    def advance(c: _Progress) -> _Progress:
        size = jnp.maximum(c.size, scale)
        left = {} if most is None else {"max_steps": most - c.spent}
        found = solve(c.params, c.inner_state, c.model_state, size, tol=c.aim, **left)
        params, before, inverse = found.params, found.residual.astype(dtype), build(found.params)
        polished = jnp.int32(0)
        if polish_steps:
            # Newton's method finishes a solve that is close; it does not replace an inner solver that ran out of steps.
            few = jnp.where(found.status == int(Status.OK), polish_steps, min(polish_steps, 2)).astype(jnp.int32)
            precondition = None if preconditioner is None else rebuild(inverse)
            params, polished = polish(
                objective.fixed, params, hparams, precondition, residual=before, target=tol * size, max_steps=few
            )
        return c._replace(
            params=params,
            inner_state=found.state,
            model_state=found.model_state,
            inverse=inverse,
            norm=before,
            aim=tol,
            spent=c.spent + found.steps,
            polished=c.polished + polished,
            status=found.status,
        )

    def turn(c: _Progress) -> _Progress:
        looks = c.turns < 0  # a state's first call measures F at its start
        c = once(~looks, advance, c)
        norm, natural, noise = measure(c.params)
        able = looks | (c.status == int(Status.OK))
        if polish_steps:
            able = able | (~_hard(c.status) & (norm < _PROGRESS * c.norm))
        short = looks | (norm > jnp.maximum(tol * jnp.maximum(natural, scale), noise))
        more = short & able & (c.turns + 1 < _TURNS) & (looks if most is None else c.spent < most)
        return c._replace(norm=norm, size=natural, noise=noise, turns=c.turns + 1, more=more)

    none, zero = jnp.int32(0), jnp.zeros((), dtype)
    turns = jnp.where(scale > 0, 0, -1).astype(jnp.int32)
    start = _Progress(
        params, inner_state, model_state, empty, zero, zero, zero, handover, none, none, turns, none, jnp.asarray(True)
    )
    c = jax.lax.while_loop(lambda c: c.more, turn, start)
    size = jnp.maximum(c.size, scale)
    residual = c.norm / jnp.where(size > 0, size, 1)  # F may vanish at the start, with w = 0
    return Optimum(
        c.params,
        c.inner_state,
        c.model_state,
        linearize(inner, objective, c.params, hparams),
        None if preconditioner is None else rebuild(c.inverse),
        residual,
        jnp.maximum(c.size, _FORGET * scale),
        c.spent + c.polished,
        _verdict(c, residual, tol, _tree.eps(params), polished=polish_steps > 0),
    )


def _measure(
    inner: Inner, objective: Objective, params: PyTree, hparams: PyTree, start: PyTree
) -> tuple[Array, Array, Array]:
    """‖F‖, its natural size and its rounding error; a start at the solution need not be better than rounding."""
    eps, moved = _tree.eps(params), _tree.sub(params, start)
    far, long = _tree.max_abs(moved), _tree.max_abs(params)
    still = jnp.maximum(far, long) == 0
    ones = jax.tree.map(jnp.ones_like, params)
    along = _tree.where(still, ones, _tree.where(long < eps**0.5 * far, moved, params))
    if inner.symmetric:
        evaluate = jax.value_and_grad(lambda w: objective.fixed(w, hparams))
        (value, residual), (_, change) = jax.jvp(evaluate, (params,), (along,))
    else:
        residual, change = jax.jvp(lambda w: inner.residual(objective, w, hparams), (params,), (along,))
        value = jnp.zeros(())
    norm, stretch = _tree.norm(residual), _tree.norm(change)
    noise = eps * jnp.sqrt(2 * jnp.abs(value)) * jnp.sqrt(stretch / _tree.norm(along))
    return norm, jnp.maximum(norm, jnp.where(still, 0, stretch)), noise


def _as_arrays(
    condition: Callable[[PyTree], Matvec], params: PyTree
) -> tuple[Callable[[PyTree], list[Array]], Callable[[list[Array]], Matvec], list[Array]]:
    """Split a preconditioner, a function that closes over arrays, into parts that a loop can carry.

    Returns:
        `params -> arrays`; `arrays -> (v -> M⁻¹ v)`; and arrays to begin with, all zero. Arrays that do not depend on
        the parameters, such as data, are not among them.
    """
    treedef, inner = jax.tree.structure(params), []

    def closure(w: PyTree) -> list[Array]:
        inner.append(jax.make_jaxpr(condition(w))(w))
        return list(inner[-1].consts)

    outer = jax.make_jaxpr(closure)(params)
    known = dict(zip(outer.jaxpr.constvars, outer.consts, strict=True))
    outvars = outer.jaxpr.outvars
    carried = [i for i, v in enumerate(outvars) if not isinstance(v, Literal) and v not in known]

    def build(w: PyTree) -> list[Array]:
        arrays = jaxpr_as_fun(outer)(*jax.tree.leaves(w))
        return [arrays[i] for i in carried]

    def rebuild(arrays: list[Array]) -> Matvec:
        fixed = [v.val if isinstance(v, Literal) else known.get(v) for v in outvars]
        for i, array in zip(carried, arrays, strict=True):
            fixed[i] = array
        apply = jaxpr_as_fun(ClosedJaxpr(inner[-1].jaxpr, fixed))
        return lambda v: treedef.unflatten(apply(*jax.tree.leaves(v)))

    return build, rebuild, [jnp.zeros(outvars[i].aval.shape, outvars[i].aval.dtype) for i in carried]


def _hard(status: Array) -> Array:
    """Whether the solver met numbers that are not finite, or a loss without a minimum."""
    return (
        (status == int(Status.NONFINITE_LOSS))
        | (status == int(Status.NONFINITE_GRAD))
        | (status == int(Status.INNER_DIVERGED))
    )


def _verdict(c: _Progress, residual: Array, tol: Array, eps: float, *, polished: bool) -> Array:
    """The status at the end: OK if the tolerance is met, whatever the solver reported, unless it failed hard."""
    # If the inner solver met its own goal, both together took too few steps for the tolerance.
    short = Status.INNER_MAX_STEPS if polished else Status.INNER_STALLED
    rounding = (residual <= _ROUNDING * eps) | (c.norm <= _ROUNDING * c.noise)
    missed = jnp.where(c.status == int(Status.OK), int(short), c.status)
    missed = jnp.where(rounding, int(Status.PRECISION_LIMITED), missed)
    soft = jnp.where(residual <= tol, int(Status.OK), missed)
    return jnp.where(_hard(c.status), c.status, soft).astype(jnp.int32)

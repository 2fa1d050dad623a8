"""Solving the inner problem, and saying how well it was solved; shared by every solver that works at the optimum.

The natural size of F = ∂_w h, against which its residual is measured, is ‖∂_w F · w‖: how much F changes when the
parameters are scaled from nothing to what they are. It does not change when the loss or the parameters are rescaled,
and on a quadratic it equals ‖∂_w h(0)‖. Where the optimum is near zero it vanishes; the largest size seen lately takes
its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._curvature import System, loss_system, map_system
from hypergrad._options import default_tol
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner
from hypergrad.inner.newton import polish
from hypergrad.linear._linear import Matvec, Preconditioner

POLISH_STEPS = 8  # at most: they end where the tolerance is met, as a rule after one or two, or no longer help
_FORGET = 0.1  # a scale that is no longer seen loses a digit a call
_NEAR = 1e-3  # the residual from which Newton's method is fast, as a rule
_ROUNDING = 64  # residuals within this many units of rounding cannot be told from zero


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

    With polish steps to come the inner solver only has to reach the square root of its tolerance, since a Newton step
    squares the residual, but come near enough for that. `scale` is 0 at the very first call.
    """
    if inner.claims:
        natural = lambda: _natural_size(inner, objective, params, hparams).astype(scale.dtype)
        scale = jax.lax.cond(scale > 0, lambda: scale, natural)
    tol = default_tol(options.get("tol"), params)
    handover = jnp.maximum(tol, jnp.minimum(jnp.sqrt(tol), _NEAR)) if polish_steps else tol
    solve_options: dict[str, Any] = dict(options) | ({"tol": handover} if inner.claims else {})
    result = inner.solve(
        objective,
        params,
        inner_state,
        hparams,
        model_state,
        scale=jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1),
        options=solve_options,
    )
    solution, steps = result.params, result.steps
    system = linearize(inner, objective, solution, hparams)
    precondition = None if preconditioner is None else preconditioner(system.matvec, solution, hparams, key)
    if polish_steps:
        # Newton's method finishes what the inner solver has brought near; it does not do the work of one that ran out.
        most = jnp.where(result.status == int(Status.OK), jnp.int32(polish_steps), jnp.int32(min(polish_steps, 2)))
        solution, polished = polish(
            objective.fixed, solution, hparams, system, precondition, target=tol * scale, max_steps=most
        )
        steps = steps + polished
        system = linearize(inner, objective, solution, hparams)
    if not inner.claims:
        size = jnp.maximum(scale, result.residual.astype(scale.dtype))
        residual = result.residual / jnp.where(size > 0, size, 1)
        return Optimum(
            solution, result.state, result.model_state, system, precondition, residual, size, steps, result.status
        )
    norm = _tree.norm(system.residual)
    size = jnp.maximum(_tree.norm(system.matvec(solution)), norm).astype(scale.dtype)
    largest = jnp.maximum(size, scale)
    residual = norm / jnp.where(largest > 0, largest, 1)  # F may vanish at the start, with w = 0
    status = _verdict(result.status, residual, tol, _tree.eps(params), polished=polish_steps > 0)
    return Optimum(
        solution,
        result.state,
        result.model_state,
        system,
        precondition,
        residual,
        jnp.maximum(size, _FORGET * scale),
        steps,
        status,
    )


def _natural_size(inner: Inner, objective: Objective, params: PyTree, hparams: PyTree) -> Array:
    """max(‖F‖, ‖∂_w F · w‖): a start at the solution is not asked for digits that nobody has."""
    residual, change = jax.jvp(lambda w: inner.residual(objective, w, hparams), (params,), (params,))
    return jnp.maximum(_tree.norm(residual), _tree.norm(change))


def _verdict(status: Array, residual: Array, tol: Array, eps: float, *, polished: bool) -> Array:
    """What the residual at the end says: meeting the tolerance settles it, whatever the solver thought on the way."""
    # A solver that handed over as agreed did its part: too few polish steps are too few steps.
    short = Status.INNER_MAX_STEPS if polished else Status.INNER_STALLED
    met = residual <= tol
    hard = (
        (status == int(Status.NONFINITE_LOSS))
        | (status == int(Status.NONFINITE_GRAD))
        | (status == int(Status.INNER_DIVERGED))
    )
    missed = jnp.where(
        residual <= _ROUNDING * eps,
        int(Status.PRECISION_LIMITED),
        jnp.where(status == int(Status.OK), int(short), status),
    )
    return jnp.where(hard, status, jnp.where(met, int(Status.OK), missed)).astype(jnp.int32)

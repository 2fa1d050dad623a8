r"""Newton's method with conjugate-gradient steps, and the polish step of `hg.implicit`.

    d ≈ H⁻¹ F   by preconditioned CG to the accuracy that this step can use,   w ← w − t d

Source: Dembo, Eisenstat & Steihaug 1982, "Inexact Newton methods"; Eisenstat & Walker 1996 for the accuracy. Differs:
at negative curvature the iterate that CG has reached so far is the direction (or the gradient, where CG has not
moved), and near the solution, where the loss no longer resolves the step, the gradient norm decides.
Cost: a gradient, the probes of the preconditioner and a few Hessian products a step. It pays where L-BFGS crawls: badly
scaled problems, and tolerances below 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._curvature import loss_system
from hypergrad._options import Number, options
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, gradient_residual, iterative
from hypergrad.linear._linear import Matvec
from hypergrad.linear._linear import solve as solve_linear
from hypergrad.linear.cg import cg
from hypergrad.linear.precondition import jacobi

_MAX_STEPS = 50
_CG_STEPS = 200
_HALVINGS = 25
_SMALLEST = 1 / 64  # smallest share of a step that `polish` takes
_NOISE = 100  # units of rounding in which a loss is uncertain
_PROGRESS = 0.98  # factor by which a step of `polish` has to reduce the gradient for another to follow

Loss = Callable[[PyTree, PyTree], Array]


class _Carry(NamedTuple):
    params: PyTree
    value: Array
    residual: Array
    steps: Array
    status: Array


@options(tol=Number(above=0), max_steps=Number(least=1, integer=True))
def newton(tol: ArrayLike | None = None, max_steps: ArrayLike | None = None) -> Inner:
    """Minimise the inner loss by Newton-CG with a backtracking line search.

    Args:
        tol: tolerance on the gradient norm, relative to its natural scale (dimensionless). Default: what the precision
            supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of Newton steps. Default 50.

    Raises:
        InputError: for a negative tolerance or step count.

    >>> import hypergrad as hg
    >>> inner = hg.inner.newton(tol=1e-8)
    """
    most = _MAX_STEPS if max_steps is None else max_steps
    return iterative(_iterate, residual=gradient_residual, tol=tol, max_steps=most, symmetric=True)


def _iterate(
    objective: Objective, params: PyTree, hparams: PyTree, target: Array, max_steps: Array
) -> tuple[PyTree, Array, Array, Array]:
    loss = objective.fixed
    value, grad = jax.value_and_grad(loss)(params, hparams)
    first = _tree.norm(grad)

    def proceed(c: _Carry) -> Array:
        return (c.steps < max_steps) & (c.residual > target) & (c.status == int(Status.OK))

    def step(c: _Carry) -> _Carry:
        system = loss_system(loss, c.params, hparams)
        precondition = jacobi()(system.matvec, c.params, hparams, jax.random.key(0))
        forcing = jnp.minimum(0.1, jnp.sqrt(c.residual / first))
        direction = newton_direction(system.matvec, system.residual, precondition, forcing)
        params, value, residual, moved = _backtrack(loss, c, direction, system.residual, hparams)
        status = jnp.where(
            ~jnp.isfinite(value),
            int(Status.NONFINITE_LOSS),
            jnp.where(moved, int(Status.OK), int(Status.INNER_STALLED)),
        ).astype(jnp.int32)
        return _Carry(params, value, residual, c.steps + 1, status)

    broken = jnp.where(
        ~jnp.isfinite(value),
        int(Status.NONFINITE_LOSS),
        jnp.where(~jnp.isfinite(first), int(Status.NONFINITE_GRAD), int(Status.OK)),
    ).astype(jnp.int32)
    c = jax.lax.while_loop(proceed, step, _Carry(params, value, first, jnp.int32(0), broken))
    missed = (c.status == int(Status.OK)) & (c.residual > target)
    return c.params, c.residual, c.steps, jnp.where(missed, int(Status.INNER_MAX_STEPS), c.status).astype(jnp.int32)


def newton_direction(matvec: Matvec, grads: PyTree, precondition: Matvec | None, forcing: ArrayLike) -> PyTree:
    """`d ≈ H⁻¹ F` to a relative residual of `forcing`; a scaled F where CG finds no positive curvature at all."""
    result = solve_linear(
        cg(tol=1.0),
        matvec,
        grads,
        precondition=precondition,
        options={"tol": forcing, "max_steps": _CG_STEPS},
    )
    stuck = _tree.max_abs(result.solution) == 0
    return _tree.where(stuck, grads, result.solution)


def polish(
    loss: Loss,
    params: PyTree,
    hparams: PyTree,
    precondition: Matvec | None,
    *,
    residual: Array,
    target: Array,
    max_steps: ArrayLike,
) -> tuple[PyTree, Array]:
    """Take up to `max_steps` Newton-CG steps, halved until they reduce ‖F‖: one, and more while ‖F‖ > target.

    A step that makes the loss larger, beyond rounding, leads to a saddle or a maximum and is not taken.

    Args:
        loss: `(params, hparams) -> scalar`.
        params: starting point.
        hparams: the hyperparameters.
        precondition: `v -> M⁻¹ v`, used for every step.
        residual: ‖F‖ at `params`.
        target: norm of F to reach, in the units of F.
        max_steps: at least 1.

    Returns:
        The parameters and the number of steps taken (int32).
    """

    def improve(carry: tuple[PyTree, Array, Array, Array]) -> tuple[PyTree, Array, Array, Array]:
        params, before, _, steps = carry
        forcing = jnp.clip(0.3 * target / before, 1e-8, 0.1)
        (value, grads), push = jax.linearize(lambda w: jax.value_and_grad(loss)(w, hparams), params)
        direction = newton_direction(lambda v: push(v)[1], grads, precondition, forcing)
        highest = value + _NOISE * _tree.eps(params) * jnp.abs(value)

        def halve(attempt: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
            size = attempt[2] / 2
            trial = _tree.axpy(-size, direction, params)
            value, grads = jax.value_and_grad(loss)(trial, hparams)
            after = jnp.where(value <= highest, _tree.norm(grads), jnp.inf)
            return trial, after.astype(before.dtype), size

        trial, after, _ = jax.lax.while_loop(
            lambda attempt: ~(attempt[1] < before) & (attempt[2] > jnp.where(before > target, _SMALLEST, 1)),
            halve,
            (params, before, jnp.asarray(2, before.dtype)),  # the first attempt is the whole step
        )
        better = after < before
        return _tree.where(better, trial, params), jnp.where(better, after, before), before, steps + 1

    def proceed(carry: tuple[PyTree, Array, Array, Array]) -> Array:
        _, residual, before, steps = carry
        return (steps < max_steps) & ((steps == 0) | (residual > target)) & (residual < _PROGRESS * before)

    start = params, residual, jnp.full_like(residual, jnp.inf), jnp.int32(0)
    params, _, _, steps = jax.lax.while_loop(proceed, improve, start)
    return params, steps


def _backtrack(
    loss: Loss, c: _Carry, direction: PyTree, grad: PyTree, hparams: PyTree
) -> tuple[PyTree, Array, Array, Array]:
    slope = _tree.vdot(grad, direction)
    direction = _tree.where(slope > 0, direction, grad)  # not a descent direction: fall back to the gradient
    slope = jnp.abs(jnp.where(slope > 0, slope, c.residual**2))
    eps, size = _tree.eps(c.params), jnp.abs(c.value)
    # Values that come out of cancelling terms lose more than their own rounding: where the decrease to expect is this
    # faint, the gradient decides.
    noise = jnp.where(slope <= eps**0.75 * size, eps**0.75, 16 * eps) * size
    evaluate = jax.value_and_grad(loss)

    def attempt(size: Array) -> tuple[PyTree, Array, Array, Array]:
        trial = _tree.axpy(-size, direction, c.params)
        value, trial_grad = evaluate(trial, hparams)
        residual = _tree.norm(trial_grad)
        armijo = value <= c.value - 1e-4 * size * slope
        unresolved = (jnp.abs(value - c.value) <= noise) & (residual < c.residual)
        return trial, value, residual, (armijo | unresolved) & jnp.isfinite(residual)

    def halve(carry):
        size, count, _ = carry
        return size / 2, count + 1, attempt(size / 2)

    size = jnp.ones((), _tree.dtype(c.params))
    _, _, (trial, value, residual, accepted) = jax.lax.while_loop(
        lambda carry: ~carry[2][3] & (carry[1] < _HALVINGS), halve, (size, jnp.int32(0), attempt(size))
    )
    value = jnp.where(accepted, value.astype(c.value.dtype), c.value)
    return _tree.where(accepted, trial, c.params), value, jnp.where(accepted, residual, c.residual), accepted

r"""Smooth losses with a nonsmooth penalty or constraint: accelerated proximal gradient steps.

    min_w  h(w, λ) + r(w, λ)
    z = prox_{η r}(y − η ∂_w h(y, λ)),   y⁺ = z + (t − 1)/t⁺ · (z − z⁻),   t⁺ = (1 + √(1 + 4t²))/2
    F(w, λ) = w − prox_{η r}(w − η ∂_w h(w, λ)) = 0 at the solution, for every η > 0

Source: Beck & Teboulle 2009 (FISTA with backtracking); O'Donoghue & Candès 2015, arXiv:1204.3982 (restart wherever the
momentum points uphill); Becker, Candès & Grant 2011, arXiv:1009.2065 (gradients test the step where values cannot);
Bertrand et al. 2020, arXiv:2002.08943 (the derivative of F knows the zeros). Differs: η starts at the inverse of the
largest eigenvalue of ∂²h, from a power iteration, is halved where the quadratic bound fails, and grows again at
restarts while the loss resolves the bound; where the expected decrease is too small a part of the loss for that, the
change of the last two gradients decides. F uses the η of the power iteration, so that it is a function of (w, λ) alone.
Cost: one gradient and one value of h per step, and ten products with ∂²h per call. Memory: five points.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._jaxpr.semigradient import check_gradient, released
from hypergrad._options import Number, options
from hypergrad._problem import Objective
from hypergrad._solver import InputError, InputTypeError, Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, check_like_params, iterative
from hypergrad.linear.neumann import largest_growth

_MAX_STEPS = 10_000
_POWER_STEPS = 10
_SHARE = 0.9  # of the inverse of the largest growth seen, which is a little less than the largest eigenvalue
_SLACK = 8  # units of rounding of the loss below which it cannot test the quadratic bound
_ROUNDS = 6  # rounds in which the goal is lowered until F meets the tolerance
_PATIENCE = 1000  # steps without a new smallest residual
_ROUNDING = 8  # units of rounding of w in F below which nothing can be told from zero

Prox = Callable[[PyTree, PyTree, Any], PyTree]


class _Carry(NamedTuple):
    point: PyTree  # z, the last proximal point
    ahead: PyTree  # y, where the next gradient is taken
    value: Array  # h(y)
    grad: PyTree  # ∂_w h(y)
    momentum: Array  # t
    step_size: Array
    curvature: Array  # ‖Δg‖/‖Δy‖ between the last two points y
    residual: Array  # ‖z − y‖, in units of the step size of F
    best: Array
    since: Array  # steps since the residual was smallest
    steps: Array


@options(
    tol=Number(above=0),
    max_steps=Number(least=1, integer=True),
    steps=Number(least=0, integer=True, static=True),
    step_size=Number(above=0),
)
def proximal(
    prox: Prox,
    *,
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    steps: int | None = None,
    step_size: ArrayLike | None = None,
) -> Inner:
    """Minimise `inner_loss + r` for a penalty or constraint r that is known by its proximal operator.

    Args:
        prox: `(params, hparams, step_size) -> params`, the proximal operator of `step_size · r(·, hparams)`, such as
            `lambda w, h, s: hg.prox.l1(w, s * h["l1"])`. It keeps the structure, shapes and dtypes of `params`.
        tol: tolerance on ‖w − prox(w − η ∂_w h)‖, relative to its natural scale (dimensionless). Default: what the
            precision supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of steps. Default 10,000.
        steps: number of plain proximal gradient steps that `hg.unrolled` takes and differentiates, a Python integer; it
            is required there. Other solvers ignore it.
        step_size: η of the unrolled steps, in units of an inverse eigenvalue of ∂²h; stable below 2 / largest
            eigenvalue. Needed only with `steps`: a solve to a tolerance finds its own step size.

    Returns:
        An `Inner` for `hg.implicit`, `hg.best_response` and `hg.direct`, and with `steps` for `hg.unrolled`. The status
        is INNER_MAX_STEPS where the tolerance was missed, INNER_STALLED where the residual had not fallen for 1000
        steps, PRECISION_LIMITED where it fell to rounding level, NONFINITE_LOSS or NONFINITE_GRAD where it started from
        NaN.

    Raises:
        InputError: for an option out of range, `steps` without `step_size`, or a result of another structure or shape
            than the parameters, naming the path.
        InputTypeError: for a `prox` that is not a function of three arguments; for a result of another dtype.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l1, batch: 0.5 * jnp.sum((w - jnp.array([3.0, 0.1]))**2),
    ...                      lambda w, l1, batch: jnp.sum(w))
    >>> solver = hg.implicit(problem, inner=hg.inner.proximal(lambda w, l1, s: hg.prox.l1(w, s * l1)))
    >>> out, state = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(2), 1.0), 1.0)
    >>> print(f"{out.value:.3f} {out.grad:.3f}")  # w = (3 − l1, 0)
    2.000 -1.000
    """
    _check_prox(prox)
    if (steps is None) != (step_size is None):
        missing, given = ("step_size", "steps") if step_size is None else ("steps", "step_size")
        raise InputError(
            f"proximal: {given} is given without {missing}: unrolled steps need both, a solve to a tolerance neither."
        )

    def apply(params: PyTree, hparams: PyTree, step: Any) -> PyTree:
        result = prox(params, hparams, step)
        check_like_params("proximal: the result of prox", result, params)
        return result

    def forward(params: PyTree, grad: PyTree, hparams: PyTree, step: Array) -> PyTree:
        return apply(_tree.axpy(-step, grad, params), hparams, step)

    def residual(objective: Objective, params: PyTree, hparams: PyTree) -> PyTree:
        step = natural_step(objective, params, hparams)
        return _tree.sub(params, forward(params, jax.grad(objective.fixed)(params, hparams), hparams, step))

    def iterate(
        objective: Objective, params: PyTree, hparams: PyTree, target: Array, most: Array
    ) -> tuple[PyTree, Array, Array, Array]:
        check_gradient(lambda w: objective.fixed(w, hparams), params, "hg.inner.proximal")
        measure = lambda w: _tree.norm(residual(objective, w, hparams)).astype(target.dtype)
        return _accelerate(objective, forward, measure, params, hparams, target, most)

    def move(objective: Objective, params: PyTree, state: PyTree, hparams: PyTree, step: Any) -> tuple[PyTree, PyTree]:
        grad = released(jax.grad(lambda w, h: objective.stochastic(w, h, None, step)[0]))(params, hparams)
        return forward(params, grad, hparams, jnp.asarray(step_size, _tree.dtype(params))), state

    most = _MAX_STEPS if max_steps is None else max_steps
    return iterative(iterate, residual=residual, tol=tol, max_steps=most, steps=steps, move=move)


def natural_step(objective: Objective, params: PyTree, hparams: PyTree) -> Array:
    """The inverse of about the largest eigenvalue of ∂²h; a constant to every derivative."""
    params, hparams = jax.lax.stop_gradient((params, hparams))
    _, product = jax.linearize(lambda w: jax.grad(objective.fixed)(w, hparams), params)
    growth = largest_growth(product, params, jax.random.key(0), _POWER_STEPS)
    return jax.lax.stop_gradient(_SHARE / growth)


def _accelerate(
    objective: Objective,
    forward: Callable[[PyTree, PyTree, PyTree, Array], PyTree],
    measure: Callable[[PyTree], Array],
    params: PyTree,
    hparams: PyTree,
    target: Array,
    max_steps: Array,
) -> tuple[PyTree, Array, Array, Array]:
    """`(solution, ‖F‖ there, steps, status)`."""
    dtype, eps = _tree.dtype(params), _tree.eps(params)
    loss = lambda w: objective.fixed(w, hparams)
    natural = natural_step(objective, params, hparams).astype(dtype)

    def look(w: PyTree) -> tuple[Array, PyTree]:
        value, grad = jax.value_and_grad(loss)(w)
        return value.astype(dtype), grad

    def turn(c: _Carry) -> _Carry:
        point = forward(c.ahead, c.grad, hparams, c.step_size)
        step = _tree.sub(point, c.ahead)
        square = _tree.vdot(step, step).astype(dtype)
        value = loss(point).astype(dtype)
        slack = _SLACK * eps * (jnp.abs(value) + jnp.abs(c.value))
        room = c.value + _tree.vdot(c.grad, step).astype(dtype) + square / (2 * c.step_size) - value
        decrease = square / (2 * c.step_size)
        # Values that come out of cancelling terms lose more than their own rounding, which gradients do not.
        faint = (decrease <= eps**0.5 * jnp.abs(value)) & (c.step_size * c.curvature <= 1)
        accepted = (room >= -slack) | faint  # false for NaN
        uphill = _tree.vdot(step, _tree.sub(point, c.point)) < 0
        momentum = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * c.momentum**2)) / 2)
        push = jnp.where(uphill, 0, (c.momentum - 1) / momentum)
        ahead = _tree.axpy(push, _tree.sub(point, c.point), point)
        resolved = decrease > 100 * slack
        grown = jnp.where(uphill & resolved, 1.5, 1) * c.step_size
        residual = jnp.sqrt(square) * jnp.maximum(1, natural / c.step_size)
        smaller = residual < c.best
        ahead = _tree.where(accepted, ahead, c.ahead)
        after, grad = look(ahead)
        moved = _tree.norm(_tree.sub(ahead, c.ahead)).astype(dtype)
        turned = _tree.norm(_tree.sub(grad, c.grad)).astype(dtype)
        return _Carry(
            point=_tree.where(accepted, point, c.point),
            ahead=ahead,
            value=after,
            grad=grad,
            momentum=jnp.where(accepted, momentum, 1).astype(dtype),
            step_size=jnp.where(accepted, grown, c.step_size / 2).astype(dtype),
            curvature=jnp.where(moved > 0, _tree.safe_divide(turned, moved), c.curvature).astype(dtype),
            residual=jnp.where(accepted, residual, c.residual).astype(dtype),
            best=jnp.where(accepted & smaller, residual, c.best).astype(dtype),
            since=jnp.where(accepted & smaller, 0, c.since + 1).astype(jnp.int32),
            steps=c.steps + 1,
        )

    def proceed(c: _Carry, goal: Array) -> Array:
        going = (c.steps < max_steps) & (c.since < _PATIENCE) & (c.step_size > 0) & jnp.isfinite(c.value)
        return (c.residual > goal) & going & ~_rests(c, eps)

    def lower_goal(carry: tuple[_Carry, Array, Array, Array]) -> tuple[_Carry, Array, Array, Array]:
        c, goal, _, rounds = carry
        c = jax.lax.while_loop(lambda c: proceed(c, goal), turn, c)
        found = measure(c.point)
        # F is measured with its own step size, at another point: if more is left there, the goal is lowered.
        lower = goal * jnp.clip(_tree.safe_divide(0.5 * target, found), 0.01, 0.5)
        return c, lower, found, rounds + 1

    def again(carry: tuple[_Carry, Array, Array, Array]) -> Array:
        c, goal, found, rounds = carry
        return (rounds < _ROUNDS) & (found > target) & proceed(c._replace(residual=jnp.full_like(goal, jnp.inf)), goal)

    value, grad = look(params)
    inf = jnp.full((), jnp.inf, dtype)
    one, zero, count = jnp.ones((), dtype), jnp.zeros((), dtype), jnp.int32(0)
    first = _Carry(params, params, value, grad, one, natural, zero, inf, inf, count, count)
    c, _, found, _ = jax.lax.while_loop(again, lower_goal, (first, 0.5 * target, inf, jnp.int32(0)))
    status = jnp.where(
        found <= target,
        int(Status.OK),
        jnp.where(
            _rests(c, eps) | (found <= _ROUNDING * eps * _tree.norm(c.point)),
            int(Status.PRECISION_LIMITED),
            jnp.where(c.steps >= max_steps, int(Status.INNER_MAX_STEPS), int(Status.INNER_STALLED)),
        ),
    )
    status = jnp.where(_tree.all_finite(grad), status, int(Status.NONFINITE_GRAD))
    status = jnp.where(jnp.isfinite(value), status, int(Status.NONFINITE_LOSS)).astype(jnp.int32)
    return c.point, found, c.steps, status


def _rests(c: _Carry, eps: float) -> Array:
    """Whether steps have been at rounding level for a while."""
    return (c.residual <= _ROUNDING * eps * _tree.norm(c.point)) & (c.since >= 10)


def _check_prox(prox: Any) -> None:
    if not callable(prox):
        raise InputTypeError(
            f"proximal: prox must be a function (params, hparams, step_size) -> params, found {type(prox).__name__}."
        )
    try:
        parameters = inspect.signature(prox).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or required <= 3 <= len(positional):
        return
    names = ", ".join(p.name for p in positional)
    raise InputTypeError(
        f"proximal: prox must take (params, hparams, step_size), found ({names}): write, for example, "
        "lambda w, h, s: hg.prox.l1(w, s * h['l1'])."
    )

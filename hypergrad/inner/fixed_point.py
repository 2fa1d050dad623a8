r"""Any map iterated to its fixed point: proximal steps, equilibria, solvers of the caller's own.

    wₜ₊₁ = Φ(wₜ, λ),     F(w, λ) = w − Φ(w, λ) = 0 at the solution

Differentiating F rather than the steps makes L1 penalties exact: the derivative of a proximal step knows which
coordinates are zero, where that of a subgradient step does not.
Source: Bertrand et al. 2020, arXiv:2002.08943 (the lasso); Bai et al. 2019, arXiv:1909.01377 (equilibria). Differs:
Φ need be neither symmetric nor a contraction as long as the iteration converges; the adjoint system is solved, not
iterated.
Cost: an evaluation of Φ a step. Memory: two points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, iterative, map_of

_MAX_STEPS = 10_000
_PATIENCE = 1000  # steps without a new smallest residual; accelerated maps may go up for long before they come down
_GROWTH = 100  # a residual that grew by more than this has diverged
_REST = 10  # such steps that show that rounding level is reached
_ROUNDING = 4  # units of rounding of w in F, below which nothing can be told from zero

Map = Callable[..., PyTree]


class _Carry(NamedTuple):
    params: PyTree
    residual: Array
    first: Array
    best: Array
    since: Array  # steps since the residual was smallest
    steps: Array
    met: Array
    status: Array


@options(tol=Number(above=0), max_steps=Number(least=1, integer=True), steps=Number(least=0, integer=True, static=True))
def fixed_point(
    map: Map, *, tol: ArrayLike | None = None, max_steps: ArrayLike | None = None, steps: int | None = None
) -> Inner:
    """Iterate a map until it leaves the parameters where they are.

    Args:
        map: `(params, hparams, batch) -> params` or `(params, hparams, batch, key) -> params`, the same structure,
            shapes and dtypes as it is given. To a tolerance, every step sees the same batch and key; an unrolled
            step its own.
        tol: tolerance on ‖w − Φ(w)‖, relative to its natural scale (dimensionless). Default: what the precision
            supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: most steps. Default 10,000, or `steps`.
        steps: makes `hg.unrolled` possible, which takes and differentiates this many steps, a Python integer.
            Without `tol`, other solvers take as many and claim nothing.

    Returns:
        An `Inner` whose status is INNER_MAX_STEPS where the tolerance was missed, INNER_DIVERGED where the residual
        grew instead, INNER_STALLED where it had not fallen for 1000 steps, PRECISION_LIMITED where it fell to
        rounding level, and NONFINITE_GRAD where the map gave NaN at once. Where it diverged or is not finite, the
        parameters are those the call started from.

    Raises:
        InputError: for a result of another structure or shape than the parameters, naming the path; for a negative
            tolerance or step count.
        InputTypeError: for a map with another number of arguments; for a result of another dtype.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> def proximal_step(w, l1, batch):  # minimises ½(w − 1)² + l1 |w|
    ...     z = w - 0.5 * (w - 1.0)
    ...     return jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.5 * l1, 0.0)
    >>> inner = hg.inner.fixed_point(proximal_step, tol=1e-6)
    """
    apply = map_of("fixed_point: map", map, "params")

    def residual(objective: Objective, params: PyTree, hparams: PyTree) -> PyTree:
        return _tree.sub(params, apply(params, hparams, *objective.fixed_batch))

    def move(objective: Objective, params: PyTree, state: PyTree, hparams: PyTree, step: Any) -> tuple[PyTree, PyTree]:
        return apply(params, hparams, *objective.batch(step)), state

    def iterate(
        objective: Objective, params: PyTree, hparams: PyTree, target: Array | None, most: Array
    ) -> tuple[PyTree, Array, Array, Array]:
        return _iterate(lambda w: apply(w, hparams, *objective.fixed_batch), params, target, most)

    claims = tol is not None or steps is None
    most = max_steps if max_steps is not None else _MAX_STEPS if steps is None else int(steps)
    return iterative(iterate, residual=residual, tol=tol, max_steps=most, claims=claims, steps=steps, move=move)


def _iterate(
    step: Callable[[PyTree], PyTree], params: PyTree, target: Array | None, max_steps: Array
) -> tuple[PyTree, Array, Array, Array]:
    dtype, eps = _tree.dtype(params), _tree.eps(params)

    def proceed(c: _Carry) -> Array:
        # With a tolerance, the point that the last step reached is looked at as well.
        more = c.steps < max_steps if target is None else (c.steps <= max_steps) & ~c.met
        return more & (c.status == int(Status.OK))

    def body(c: _Carry) -> _Carry:
        moved = step(c.params)
        residual = _tree.norm(_tree.sub(c.params, moved)).astype(dtype)
        first = jnp.where(c.steps == 0, residual, c.first)
        since = jnp.where(residual < c.best, 0, c.since + 1).astype(jnp.int32)
        met, status = jnp.asarray(False), _broken(residual, c.residual, first, eps)
        if target is not None:
            met = residual <= target
            rounding = (residual <= _ROUNDING * eps * _tree.norm(c.params)) & (since >= _REST)
            stalled = jnp.where(since >= _PATIENCE, int(Status.INNER_STALLED), int(Status.OK))
            ended = jnp.where(rounding, int(Status.PRECISION_LIMITED), stalled).astype(jnp.int32)
            status = jnp.where((status == int(Status.OK)) & ~met, ended, status)
            moved = _tree.where(met | (ended != int(Status.OK)) | (c.steps >= max_steps), c.params, moved)
        return _Carry(moved, residual, first, jnp.fmin(c.best, residual), since, c.steps + 1, met, status)

    zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    start = _Carry(params, zero, zero, inf, jnp.int32(0), jnp.int32(0), jnp.asarray(False), jnp.int32(Status.OK))
    c = jax.lax.while_loop(proceed, body, start)
    grown = c.residual > _GROWTH * c.first
    missed = jnp.where(grown, int(Status.INNER_DIVERGED), int(Status.OK if target is None else Status.INNER_MAX_STEPS))
    missed = jnp.where(_tree.all_finite(c.params), missed, int(Status.NONFINITE_GRAD))
    status = jnp.where((c.status == int(Status.OK)) & ~c.met, missed, c.status).astype(jnp.int32)
    failed = (status == int(Status.INNER_DIVERGED)) | (status == int(Status.NONFINITE_GRAD))
    steps = c.steps if target is None else c.steps - 1  # the last look is not a step
    return _tree.where(failed, params, c.params), c.residual, steps, status


def _broken(residual: Array, last: Array, first: Array, eps: float) -> Array:
    """Overflow after growth, or growth beyond what the precision can bring back, is divergence; sudden NaN is not."""
    finite = jnp.isfinite(residual)
    growing = (last > _GROWTH * first) | ((residual == jnp.inf) & jnp.isfinite(first))
    kind = jnp.where(growing, int(Status.INNER_DIVERGED), int(Status.NONFINITE_GRAD))
    lost = jnp.where(residual * eps > first, int(Status.INNER_DIVERGED), int(Status.OK))
    return jnp.where(finite, lost, kind).astype(jnp.int32)

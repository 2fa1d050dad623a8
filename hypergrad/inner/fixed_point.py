r"""Any map iterated to its fixed point: proximal steps, equilibria, or a caller's own solver.

    wₜ₊₁ = Φ(wₜ, λ),     F(w, λ) = w − Φ(w, λ) = 0 at the solution

Differentiating F rather than the steps makes L1 penalties exact: the derivative of a proximal step knows which
coordinates are zero; that of a subgradient step does not. With `history=m`, the iteration uses Anderson acceleration.
Let f = Φ(w) − w, and let Q and P hold the changes of f and Φ(w) over the last m steps, with Q made orthonormal and P
combined in the same way:

    wₜ₊₁ = Φ(wₜ) − P Qᵀ fₜ,   if ‖fₜ₊₁‖ is then the smallest so far; else wₜ₊₁ = Φ(wₜ), and P and Q are emptied

Source: Bertrand et al. 2020, arXiv:2002.08943 (the lasso); Bai et al. 2019, arXiv:1909.01377 (equilibria); Anderson
1965, and Walker & Ni 2011 (acceleration). Differs: Φ need be neither symmetric nor a contraction as long as the
iteration converges; the adjoint system is solved, not iterated; the changes of f are orthogonalised as they arrive, so
that no least-squares system is solved; and accelerated points are only intermediate: the solution is a value of Φ, with
its zeros and within its bounds.
Cost: one evaluation of Φ per step, including refused steps. Memory: two points, and 2 m + 2 more with acceleration.
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
from hypergrad._solver import InputError, Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, iterative, map_of

_MAX_STEPS = 10_000
_PATIENCE = 1000  # steps without a new smallest residual; accelerated maps may go up for long before they come down
_GROWTH = 100  # a residual that grew by more than this has diverged
_REST = 10  # steps without a new smallest residual that show that rounding level is reached
_DEPENDENT = 100  # units of rounding below which a change lies in the span of those before it
_ROUNDING = 4  # units of rounding of w in F, below which nothing can be told from zero

Map = Callable[..., PyTree]


class _Secants(NamedTuple):
    """The memory of Anderson acceleration.

    Attributes:
        changes: Q, changes of the residual made orthonormal, a pytree of rows; empty rows are zero.
        moves: P, the changes of Φ, combined in the same way.
        count: number of pairs entered since they were last emptied, int32.
        image: Φ at the last point that was kept.
        left: f at that point.
        ahead: whether the present point is an accelerated one.
    """

    changes: PyTree
    moves: PyTree
    count: Array
    image: PyTree
    left: PyTree
    ahead: Array


class _Carry(NamedTuple):
    params: PyTree
    residual: Array
    first: Array
    best: Array
    since: Array  # steps since the residual was smallest
    steps: Array
    met: Array
    status: Array
    secants: _Secants | None


@options(
    tol=Number(above=0),
    max_steps=Number(least=1, integer=True),
    steps=Number(least=0, integer=True, static=True),
    history=Number(least=0, integer=True, static=True),
)
def fixed_point(
    map: Map,
    *,
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    steps: int | None = None,
    history: int = 0,
) -> Inner:
    """Iterate a map until it leaves the parameters where they are.

    Args:
        map: `(params, hparams, batch) -> params` or `(params, hparams, batch, key) -> params`, with the structure,
            shapes and dtypes of its argument. In a solve to a tolerance every step sees the same batch and key; an
            unrolled step sees its own.
        tol: tolerance on ‖w − Φ(w)‖, relative to its natural scale (dimensionless). Default: what the precision
            supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of steps. Default 10,000, or `steps`.
        steps: number of steps that `hg.unrolled` takes and differentiates, a Python integer; it is required there.
            Without `tol`, other solvers take as many and claim nothing.
        history: number of past steps that Anderson acceleration uses; 5 is usual. It saves most where the map contracts
            slowly, and may reach a point that the map by itself moves away from. The map is then also evaluated at
            points outside its range (negative ones, for example), and steps that do not help or are not finite are
            taken back. The solution and its derivatives are those of the map either way. Default 0: no acceleration.

    Returns:
        An `Inner` whose status is INNER_MAX_STEPS where the tolerance was missed, INNER_DIVERGED where the residual
        grew instead, INNER_STALLED where it had not fallen for 1000 steps, PRECISION_LIMITED where it fell to
        rounding level, and NONFINITE_GRAD where the map gave NaN at once. Where it diverged or is not finite, the
        parameters are those the call started from.

    Raises:
        InputError: for a result of another structure or shape than the parameters, naming the path; for a negative
            tolerance, step count or history; for a history together with `steps`.
        InputTypeError: for a map with another number of arguments; for a result of another dtype.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> def proximal_step(w, l1, batch):  # minimises ½(w − 1)² + l1 |w|
    ...     z = w - 0.5 * (w - 1.0)
    ...     return jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.5 * l1, 0.0)
    >>> inner = hg.inner.fixed_point(proximal_step, tol=1e-6)
    """
    apply = map_of("fixed_point: map", map, "params")
    if history and steps is not None:
        raise InputError(
            f"fixed_point: history must be 0 where steps is given, found history={history} and steps={steps}: steps "
            "of the map itself are differentiated; leave steps out to accelerate a solve to a tolerance."
        )

    def residual(objective: Objective, params: PyTree, hparams: PyTree) -> PyTree:
        return _tree.sub(params, apply(params, hparams, *objective.fixed_batch))

    def move(objective: Objective, params: PyTree, state: PyTree, hparams: PyTree, step: Any) -> tuple[PyTree, PyTree]:
        return apply(params, hparams, *objective.batch(step)), state

    def iterate(
        objective: Objective, params: PyTree, hparams: PyTree, target: Array | None, most: Array
    ) -> tuple[PyTree, Array, Array, Array]:
        return _iterate(lambda w: apply(w, hparams, *objective.fixed_batch), params, target, most, history)

    claims = tol is not None or steps is None
    most = max_steps if max_steps is not None else _MAX_STEPS if steps is None else int(steps)
    return iterative(iterate, residual=residual, tol=tol, max_steps=most, claims=claims, steps=steps, move=move)


def _iterate(
    step: Callable[[PyTree], PyTree], params: PyTree, target: Array | None, max_steps: Array, history: int
) -> tuple[PyTree, Array, Array, Array]:
    dtype, eps = _tree.dtype(params), _tree.eps(params)

    def proceed(c: _Carry) -> Array:
        # With a tolerance, the point that the last step reached is checked as well.
        more = c.steps < max_steps if target is None else (c.steps <= max_steps) & ~c.met
        return more & (c.status == int(Status.OK))

    def body(c: _Carry) -> _Carry:
        moved = step(c.params)
        residual = _tree.norm(_tree.sub(c.params, moved)).astype(dtype)
        first = jnp.where(c.steps == 0, residual, c.first)
        since = jnp.where(residual < c.best, 0, c.since + 1).astype(jnp.int32)
        met, status = jnp.asarray(False), _broken(residual, c.residual, first, eps)
        close = jnp.asarray(False) if target is None else residual <= target
        following, here, secants = moved, c.params, None
        if c.secants is not None:
            secants = _learn(c.secants, moved, _tree.sub(moved, c.params), c.steps > 0)
            secants = secants._replace(ahead=(secants.count > 0) & ~close)
            following = _tree.where(secants.ahead, _accelerated(secants), moved)
            here = _tree.where(c.secants.ahead, moved, c.params)
        if target is not None:
            met = close if c.secants is None else close & ~c.secants.ahead
            rounding = (residual <= _ROUNDING * eps * _tree.norm(c.params)) & (since >= _REST)
            stalled = jnp.where(since >= _PATIENCE, int(Status.INNER_STALLED), int(Status.OK))
            ended = jnp.where(rounding, int(Status.PRECISION_LIMITED), stalled).astype(jnp.int32)
            status = jnp.where((status == int(Status.OK)) & ~met, ended, status)
            following = _tree.where(met | (ended != int(Status.OK)) | (c.steps >= max_steps), here, following)
        found = _Carry(following, residual, first, jnp.fmin(c.best, residual), since, c.steps + 1, met, status, secants)
        if c.secants is None:
            return found
        refused = c.secants.ahead & ~(residual < c.best)
        back = c._replace(
            params=c.secants.image, since=c.since + 1, steps=c.steps + 1, secants=_emptied(c.secants, history)
        )
        return _tree.where(refused, back, found)

    zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    no, ok = jnp.asarray(False), jnp.int32(Status.OK)
    still = _tree.zeros_like(params)
    blank = _Secants(None, None, jnp.int32(0), still, still, no)
    secants = _emptied(blank, history) if history else None
    start = _Carry(params, zero, zero, inf, jnp.int32(0), jnp.int32(0), no, ok, secants)
    c = jax.lax.while_loop(proceed, body, start)
    grown = c.residual > _GROWTH * c.first
    missed = jnp.where(grown, int(Status.INNER_DIVERGED), int(Status.OK if target is None else Status.INNER_MAX_STEPS))
    missed = jnp.where(_tree.all_finite(c.params), missed, int(Status.NONFINITE_GRAD))
    status = jnp.where((c.status == int(Status.OK)) & ~c.met, missed, c.status).astype(jnp.int32)
    failed = (status == int(Status.INNER_DIVERGED)) | (status == int(Status.NONFINITE_GRAD))
    steps = c.steps if target is None else c.steps - 1  # the last check is not a step
    return _tree.where(failed, params, c.params), c.residual, steps, status


def _broken(residual: Array, last: Array, first: Array, eps: float) -> Array:
    """Overflow after growth, or growth beyond what the precision can bring back, is divergence; sudden NaN is not."""
    finite = jnp.isfinite(residual)
    growing = (last > _GROWTH * first) | ((residual == jnp.inf) & jnp.isfinite(first))
    kind = jnp.where(growing, int(Status.INNER_DIVERGED), int(Status.NONFINITE_GRAD))
    lost = jnp.where(residual * eps > first, int(Status.INNER_DIVERGED), int(Status.OK))
    return jnp.where(finite, lost, kind).astype(jnp.int32)


def _emptied(secants: _Secants, history: int) -> _Secants:
    rows = jax.tree.map(lambda x: jnp.zeros((history, *x.shape), x.dtype), secants.image)
    return secants._replace(changes=rows, moves=rows, count=jnp.int32(0), ahead=jnp.asarray(False))


def _learn(secants: _Secants, image: PyTree, left: PyTree, known: Array) -> _Secants:
    """Enter the change since the last point that was kept; a linearly dependent change is left out."""
    change, move = _tree.sub(left, secants.left), _tree.sub(image, secants.image)
    whole = _tree.norm(change)
    for _ in range(2):  # the second pass removes the rounding error of the first
        along = _along(secants.changes, change)
        change = _tree.sub(change, _combined(along, secants.changes))
        move = _tree.sub(move, _combined(along, secants.moves))
    length = _tree.norm(change)
    noise = _tree.eps(change) * (_DEPENDENT * whole + _ROUNDING * _tree.norm(image))
    new = known & (length > noise) & jnp.isfinite(length)
    slot = secants.count % jax.tree.leaves(secants.changes)[0].shape[0]
    share = jnp.where(new, 1 / _tree.positive(length), 0)
    put = lambda rows, row: jax.tree.map(lambda x, y: x.at[slot].set(jnp.where(new, y, x[slot])), rows, row)
    changes = put(secants.changes, _tree.scale(share, change))
    moves = put(secants.moves, _tree.scale(share, move))
    return secants._replace(changes=changes, moves=moves, count=secants.count + new, image=image, left=left)


def _accelerated(secants: _Secants) -> PyTree:
    """Φ(w) minus the combination of moves that would leave the smallest residual if Φ were affine."""
    return _tree.sub(secants.image, _combined(_along(secants.changes, secants.left), secants.moves))


def _along(rows: PyTree, x: PyTree) -> Array:
    return jax.vmap(lambda row: _tree.vdot(row, x))(rows)


def _combined(shares: Array, rows: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.tensordot(shares.astype(x.dtype), x, 1), rows)

r"""How wrong a hypergradient at an optimum may be, judged by the residuals of the two solves.

    δ = H⁻¹F,   w⁺ = ŵ − 4δ,   r = ∂_w f(w⁺) − H(w⁺)v̂ + 3(∂_w f(ŵ) − Hv̂),   ε = H⁻¹r

    a = ‖ĝ(ŵ, v̂) − ĝ(w⁺, v̂) + (∂²_{λw} h)ᵀε‖ / 4s + (‖δ‖/‖w‖ + ‖ε‖/40‖v̂‖ + ρ) ‖(∂²_{λw} h)ᵀv̂‖ / s

    error_estimate = 4a / (1 − a) + eps

    s = max(‖ĝ‖, 10⁻³ (‖∂_λ f‖ + ‖(∂²_{λw} h)ᵀv̂‖)),     20ρ = max(min(k, 10⁻³), min(k, 8k²)),     k = eps·κ

A step of four times the distance to the optimum replaces a derivative, because it detects what a derivative misses:
kinks, and folds, at which the Hessian changes by as much as its own size. H is the true Hessian even where the adjoint
system used another operator, so that ∂_w f − Hv̂ contains the bias of damping and of Gauss-Newton products as well. The
rounding errors of F and Hv̂ are in δ and ε; ρ stands for those that both points share. They count in full from k = 1/8
on; below that they are seldom as large as κ allows, and ρ is at most 5e-5 as long as k < .01.

H⁻¹ is first approximated by M⁻¹/μ, where M is the preconditioner and μ the smallest eigenvalue of M⁻¹H: this is never
too small, but κ times too large along stiff directions. Where the resulting estimate is not small, a few steps of
conjugate gradients replace it (x + M⁻¹(b − Hx)/μ, where x is their result), and four times as many where that is still
not small. μ is the smallest Ritz value of the adjoint's own conjugate gradients and of Lanczos's process from a random
start that contains F as well. The process, and the longest solves, run at the first call and at every 32nd call; μ is
carried in the state, and may rise by a quarter per call.

Nothing is known, and the estimate is infinite, where H has negative curvature, where the process has not settled and
the adjoint system was not solved, and where the Hessian changes by its own size within four times the distance to the
optimum. Directions in which H is flat to rounding are tested: along one of them ŵ is moved by a small share of its
length, and v̂ by its full length. If the hypergradient does not change, as is the case where a symmetry makes them
flat, they are left out of μ; if it changes, nothing is known. Along a circle of radius ‖w‖ a straight step of t‖w‖
leaves the optimum by t²‖w‖/2, so that the share t is eps^⅖: 5e-7 in float64, .002 in float32.

Source: the first-order analysis is that of Pedregosa 2016, arXiv:1602.02355. Cost: at a warm call two products with H,
one with ∂²_{λw} h, and a gradient of the outer loss, and where the estimate is not small those again with 24 products
more; at a first call at most 24 products, and where the estimate is not small 96. A warm call that knows no eigenvalue
makes none of these. Memory O(|w|).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._curvature import System
from hypergrad._loops import once
from hypergrad._solver import Status, code, first_failure, usable
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner
from hypergrad.inner._optimum import Optimum, linearize
from hypergrad.linear._linear import Linear, LinearResult, Matvec
from hypergrad.solvers._call import Call, Outer

_SAFETY = 4.0  # calibrated: tests/solvers/test_error_estimate.py, experiments/reliability/families.py
_STEPS = 24  # steps of Lanczos's process
_REFINE = 12, 48  # steps of conjugate gradients that replace M⁻¹/μ, and those that replace them in turn
_COARSE = 2.5e-4  # the largest a that is not refined
_INSIDE = 0.25  # share of μ below which a direction's curvature is not that of the rest of the spectrum
_FLAT = 32  # units of rounding of the largest eigenvalue, below which one cannot be told from zero
_SETTLED = 0.5  # the largest relative error at which the smallest Ritz value counts as settled
_RISE = 1.25  # how much μ may grow from one call to the next
_AGE = 32  # calls after which Lanczos's process runs again
_ASIDE = 0.4  # w is moved along a flat direction by this power of eps, as a share of its length
_STILL = 1e-3  # the largest estimate at which the hypergradient counts as unchanged along it
_SHARED, _COMMON = 8.0, 1e-3  # inverse of the k from which shared rounding counts in full; and its usual limit
_LOST = 0.05  # condition number times rounding; the Ritz values from which it comes are too far inside by up to three
_HIDDEN, _SMALL = 1e3, 1e-6  # a symmetry leaves eigenvalues of the size of F instead of zeros; and a limit on that size
_NEAR = 1e-2  # relative inner residual above which no estimate would be finite


class Spectrum(NamedTuple):
    """What is known of the eigenvalues of M⁻¹H.

    Attributes:
        low: the smallest eigenvalue, or an estimate a little below it; 0 if nothing is known; negative if an eigenvalue
            is negative.
        high: the largest eigenvalue; 0 if nothing is known.
        age: int32, calls since Lanczos's process ran, counted from 1; 0 before it has.
    """

    low: Array
    high: Array
    age: Array


def unknown_spectrum(like: PyTree) -> Spectrum:
    """Before the first call."""
    zero = jnp.zeros((), _tree.dtype(like))
    return Spectrum(zero, jnp.zeros_like(zero), jnp.int32(0))


def lost_to_rounding(adjoint: LinearResult, like: PyTree) -> Array:
    """Whether the condition number leaves less than a digit of a solution, a boolean scalar."""
    return _tree.eps(like) * jnp.asarray(adjoint.high) > _LOST * jnp.asarray(adjoint.low)


def hidden_curvature(optimum: Optimum) -> Array:
    """Share of the largest curvature that a flat direction may show away from the optimum, where F is not zero: along a
    symmetry, Hu = TᵀF, where the matrix T generates it (dimensionless).
    """
    return jnp.minimum(_HIDDEN * optimum.residual, _SMALL)


class Point(NamedTuple):
    """Where the hypergradient was taken, and what its parts are."""

    params: PyTree
    hparams: PyTree
    rhs: PyTree  # ∂_w f
    direct: PyTree  # ∂_λ f
    adjoint: PyTree  # v̂
    product: PyTree | None  # H v̂; None to have it computed where it is needed
    indirect: PyTree  # (∂²_{λw} h)ᵀ v̂
    grad: PyTree


def estimate(
    carried: Spectrum,
    inner: Inner,
    linear: Linear,
    call: Call,
    outer: Outer,
    optimum: Optimum,
    adjoint: LinearResult,
    point: Point,
    *,
    exact: bool,
) -> tuple[Array, Array, Spectrum]:
    """The relative error to expect, and whether the hypergradient can be trusted with it.

    Args:
        carried: what the last call knew; `unknown_spectrum` before the first.
        inner: how the parameters were found.
        linear: how the adjoint system was solved.
        call: the inner problem, and the key for the random start of Lanczos's process.
        outer: `(params, hparams) -> (loss, metrics)`.
        optimum: where the inner solve ended.
        adjoint: what the linear solve returned.
        point: the hypergradient and its parts.
        exact: whether the adjoint system is that of the Hessian, without damping or another approximation.

    Returns:
        The estimate of ‖ĝ − g‖ / ‖g‖ (dimensionless; inf where nothing is known); NEG_CURVATURE or INACCURATE where a
        tolerance was claimed and the estimate says that it is worth nothing, else OK; the spectrum for the next call.
    """
    inf = jnp.full((), jnp.inf, carried.low.dtype)
    if not linear.looks:
        return inf, jnp.int32(Status.OK), carried
    solved = usable(adjoint.status) & (linear.claims and exact)
    low, high = (adjoint.low, adjoint.high) if exact else (jnp.inf, 0.0)
    plausible = optimum.residual <= _NEAR
    if inner.symmetric:
        spectrum, flat, vague = _look(
            carried,
            optimum.system.matvec,
            optimum.precondition,
            optimum.system.residual,
            call.probe_key,
            plausible=plausible,
            noise=_FLAT * _tree.eps(point.params) + hidden_curvature(optimum),
            solved=solved,
            low=low,
            high=high,
        )
    else:
        spectrum, flat, vague = _seen(carried, low, high, solved), _tree.zeros_like(point.params), jnp.asarray(False)
    error = _relative_error(
        point,
        optimum.system,
        outer,
        lambda w, v: linearize(inner, call.objective, w, point.hparams).both(v),
        spectrum._replace(low=jnp.where(plausible, spectrum.low, 0)),
        flat,
        optimum.precondition,
        adjoint.inverse if linear.exact and exact and inner.symmetric else None,
        symmetric=inner.symmetric,
        refine=jnp.where(spectrum.age == 1, len(_REFINE), int(linear.claims)),
    )
    # Nothing is known if the hypergradient changes along a flat direction, or if the test of that direction was too
    # coarse.
    undecided = (_tree.max_abs(flat) > 0) & ~(error <= _STILL)
    error = jnp.where(undecided, inf, error)
    spectrum = spectrum._replace(low=jnp.where(undecided & (spectrum.low > 0), 0, spectrum.low))
    large = jnp.isfinite(error) & (error > 1)
    # A curvature that has not settled may be that of a symmetry: an error that follows from it is no reason to refuse.
    lost = large & vague
    error, large = jnp.where(lost, inf, error), large & ~lost
    spectrum = spectrum._replace(low=jnp.where(lost, 0, spectrum.low))
    if not (inner.claims and linear.claims):  # a direction may be good where a length is not
        return jnp.where(large, inf, error), jnp.int32(Status.OK), spectrum
    falling = (spectrum.low < 0) & (linear.symmetric and exact)
    return error, first_failure(code(falling, Status.NEG_CURVATURE), code(large, Status.INACCURATE)), spectrum


def _look(
    carried: Spectrum,
    matvec: Matvec,
    precondition: Matvec | None,
    residual: PyTree,
    key: Array,
    *,
    plausible: Array,
    noise: Array,
    solved: Array | bool,
    low: ArrayLike,
    high: ArrayLike,
) -> tuple[Spectrum, PyTree, Array]:
    """Update what is known: by Lanczos's process if it is due, otherwise by the Ritz values of this call.

    Args:
        carried: the spectrum that the last call returned.
        matvec: `v -> H v`.
        precondition: `v -> M⁻¹ v`, or None.
        residual: F.
        key: key for the start of Lanczos's process.
        plausible: whether a finite estimate is possible at all, so that the products are worthwhile.
        noise: eigenvalues of this size cannot be told from zero, in units of the largest.
        solved: whether the adjoint system was solved to a tolerance, so that its Ritz values can be believed.
        low: the smallest Ritz value of this call; infinite if there is none.
        high: the largest Ritz value; 0 if there is none.

    Returns:
        The spectrum; a vector along which H is flat to rounding, of unit length in the geometry of M, or zero if there
        is none, or if none was looked for; whether the spectrum comes from a Ritz value that has not settled.
    """
    dtype, eps = carried.low.dtype, _tree.eps(residual)
    low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    apply = precondition or (lambda v: v)
    due = plausible & ((carried.age == 0) | (carried.age >= _AGE))

    def begin() -> PyTree:
        root = _root(precondition, residual)
        signs = _tree.rademacher_like(key, residual)
        random = signs if root is None else jax.tree.map(lambda s, r: (s * r).astype(s.dtype), signs, root)
        return _tree.add(_unit(random, apply), _unit(residual, apply))

    none = _tree.zeros_like(residual)
    size = min(_STEPS, max(_tree.size(residual), 1) + 1)
    zero = jnp.zeros((), dtype)
    nothing = _Found(zero, zero, jnp.asarray(False), jnp.asarray(False))
    start = jax.lax.cond(due, begin, lambda: none)
    first = _Process(start, none, jnp.zeros(size, dtype), nothing, jnp.int32(0), due)

    def run(c: _Process) -> _Process:
        """Turns 0 and 2 look for flat directions, turns 1 and 3 add them up; 2 and 3 start from what was found."""
        alpha, beta, count, here, flat = _lanczos(matvec, apply, c.start, c.weights, size, eps)
        values, vectors = _tridiagonal(alpha, beta, count)
        real = jnp.arange(size) < count
        found = _tree.where(c.turn == 0, _read(values, vectors, beta, count, noise), c.found)
        null = real & (jnp.abs(values) <= noise * found.high)
        adding = c.turn % 2 == 1
        weights = jnp.where(adding, 0, jnp.sum(vectors * (null * vectors[0])[None, :], axis=1)).astype(dtype)
        return _Process(
            start=_tree.where(adding, here, c.start),
            flat=_tree.where(adding, flat, c.flat),
            weights=weights,
            found=found,
            turn=c.turn + 1,
            more=(c.turn < 3) & (adding | jnp.any(null)),
        )

    c = jax.lax.while_loop(lambda c: c.more, run, first)
    found = c.found
    # Conjugate gradients that met their tolerance have resolved all that their right-hand side contains. Half of their
    # Ritz value is taken, because a Ritz value is never too small.
    solved = jnp.asarray(solved) & jnp.isfinite(low)
    fresh = jnp.minimum(found.low, jnp.where(found.settled, low, low / 2))
    fresh = jnp.where(found.settled | solved, fresh, 0)
    fresh = jnp.where(found.negative, -jnp.ones_like(fresh), fresh)
    rise = jnp.where(jnp.isfinite(low), _RISE, 1)
    kept = jnp.where(carried.low > 0, jnp.minimum(low, rise * carried.low), carried.low)
    age = jnp.where(due, 1, jnp.where(carried.age > 0, carried.age + 1, 0)).astype(jnp.int32)
    spectrum = Spectrum(
        jnp.where(due, fresh, kept).astype(dtype),
        jnp.maximum(jnp.where(due, found.high, carried.high), high).astype(dtype),
        age,
    )
    return spectrum, c.flat, due & ~found.settled & (found.low < low)


def _seen(carried: Spectrum, low: ArrayLike, high: ArrayLike, solved: Array | bool) -> Spectrum:
    """Return what this call's solve alone shows for an operator that is not symmetric: its smallest singular value."""
    dtype = carried.low.dtype
    low = jnp.asarray(low, dtype)
    known = jnp.asarray(solved) & jnp.isfinite(low)
    return Spectrum(jnp.where(known, low, 0).astype(dtype), jnp.asarray(high, dtype), jnp.int32(1))


class _Found(NamedTuple):
    low: Array
    high: Array
    settled: Array
    negative: Array


class _Process(NamedTuple):
    start: PyTree
    flat: PyTree
    weights: Array  # weights with which the next run adds up its vectors
    found: _Found  # what the first run found
    turn: Array
    more: Array


def _lanczos(
    matvec: Matvec, apply: Matvec, start: PyTree, weights: Array, size: int, eps: float
) -> tuple[Array, Array, Array, PyTree, PyTree]:
    """Run Lanczos's process for M⁻¹H in the inner product of M; only products with M⁻¹ are needed. Return the diagonal,
    the off-diagonal, the number of steps, and the sum of the process's vectors by `weights`, with a factor of M and
    without.
    """
    dtype = weights.dtype

    def step(c: Any) -> Any:
        j, old, p, alpha, beta, here, flat, _ = c
        q = apply(p)
        length = jnp.sqrt(jnp.maximum(_tree.vdot(p, q).astype(dtype), 0))
        safe = jnp.where(length > 0, length, 1)
        p, q = _tree.scale(1 / safe, p), _tree.scale(1 / safe, q)
        side = jnp.where(j > 0, length, 0)
        product = matvec(q)
        middle = _tree.vdot(q, product).astype(dtype)
        closed = ~(length > _FLAT * eps * jnp.max(jnp.abs(alpha))) | ~jnp.isfinite(middle)
        following = jax.tree.map(
            lambda y, a, b: y - middle.astype(y.dtype) * a - side.astype(y.dtype) * b, product, p, old
        )
        put = lambda rows, i, x: jnp.where(closed, rows, rows.at[i].set(x))
        share = jnp.where(closed, 0, weights[j])
        here, flat = _tree.axpy(share, p, here), _tree.axpy(share, q, flat)
        return (
            jnp.where(closed, j, j + 1),
            p,
            following,
            put(alpha, j, middle),
            put(beta, j, side),
            here,
            flat,
            closed,
        )

    zero = _tree.zeros_like(start)
    first = (
        jnp.int32(0),
        zero,
        start,
        jnp.zeros(size, dtype),
        jnp.zeros(size + 1, dtype),
        zero,
        zero,
        jnp.asarray(False),
    )
    j, _, p, alpha, beta, here, flat, closed = jax.lax.while_loop(lambda c: (c[0] < size) & ~c[7], step, first)
    after = jnp.sqrt(jnp.maximum(_tree.vdot(p, apply(p)).astype(dtype), 0))
    beta = beta.at[j].set(jnp.where(closed, 0, after))
    return alpha, beta, j, here, flat


def _tridiagonal(alpha: Array, beta: Array, count: Array) -> tuple[Array, Array]:
    """Return the eigenvalues and eigenvectors of the part that was filled; those of the rest lie beyond every other."""
    size = alpha.shape[0]
    used = jnp.arange(size) < count
    scale = jnp.max(jnp.abs(alpha)) + jnp.max(beta)
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    side = jnp.where(used[1:], beta[1:size], 0) / scale
    matrix = jnp.diag(jnp.where(used, alpha / scale, 4)) + jnp.diag(side, 1) + jnp.diag(side, -1)
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.isfinite(matrix), matrix, 0))
    return values * scale, vectors


def _read(values: Array, vectors: Array, beta: Array, count: Array, noise: Array) -> _Found:
    """Return the smallest eigenvalue that is not flat, and how far it can be trusted."""
    real = jnp.arange(len(values)) < count
    high = jnp.max(jnp.where(real, jnp.abs(values), 0))
    off = beta[count] * jnp.abs(vectors[jnp.maximum(count - 1, 0)])  # the residual of each Ritz pair
    noise = noise * high
    above = real & (values > noise)
    which = jnp.argmax(above)  # they are sorted
    low = jnp.where(jnp.any(above), values[which], jnp.inf)
    settled = jnp.any(above) & (off[which] <= _SETTLED * low)
    return _Found(low, high, settled, jnp.any(real & (values < -noise)))


class _Sizes(NamedTuple):
    """Scalars at the point; `unit`, `long` and `tall` are largest entries, in whose units norms are taken."""

    unit: Array  # of ĝ and of the part that acts through w
    long: Array  # of w
    tall: Array  # of v̂
    whole: Array  # s
    through: Array  # ‖(∂²_{λw} h)ᵀv̂‖
    length: Array  # ‖w‖
    reach: Array  # ‖v̂‖
    crosswise: Array  # norm of the flat direction; 0 if there is none
    drift: Array  # how far the rounding error of F shifts ŵ along v̂, in units of v̂


def _sizes(point: Point, flat: PyTree, dtype: Any) -> _Sizes:
    eps = max(_tree.eps(point.params), _tree.eps(point.hparams))
    unit = _tree.max_abs((point.grad, point.indirect))
    long, tall = _tree.max_abs(point.params), _tree.max_abs(point.adjoint)
    norm = lambda x, unit: _tree.norm(x, unit).astype(dtype)
    through = norm(point.indirect, unit)
    # F is a sum, so it is known no better than its terms are, here those along v̂.
    parts = _total(point.indirect, point.hparams) + _total(point.rhs, point.params)
    slope = jnp.abs(_tree.vdot(point.rhs, point.adjoint))
    sizes = _Sizes(
        unit=unit,
        long=long,
        tall=tall,
        whole=jnp.maximum(norm(point.grad, unit), 1e-3 * (norm(point.direct, unit) + through)),
        through=through,
        length=norm(point.params, long),
        reach=norm(point.adjoint, tall),
        crosswise=norm(flat, None),
        drift=jnp.where(slope > 0, eps * parts / _tree.positive(slope), 0),
    )
    return jax.tree.map(lambda x: x.astype(dtype), sizes)


class _Stage(NamedTuple):
    rhs: PyTree  # what is solved next, F and then r
    change: PyTree  # of the hypergradient
    loose: Array  # ‖δ‖/‖w‖, and then ‖ε‖/40‖v̂‖ as well
    bent: Array


def _relative_error(
    point: Point,
    system: System,
    outer: Outer,
    pull: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    spectrum: Spectrum,
    flat: PyTree,
    precondition: Matvec | None,
    inverse: Matvec | None,
    *,
    symmetric: bool,
    refine: ArrayLike,
) -> Array:
    """Estimate of ‖ĝ − g‖ / max(‖g‖, 10⁻³ (‖direct‖ + ‖indirect‖)) (dimensionless); inf where nothing is known.

    Args:
        point: the hypergradient and its parts.
        system: F linearized where it was taken.
        outer: `(params, hparams) -> (loss, metrics)`.
        pull: `(params, v) -> (H(params) v, (∂²_{λw} h)ᵀ v)` at any parameters.
        spectrum: see `_look`.
        flat: see `_look`.
        precondition: `v -> M⁻¹ v`, or None.
        inverse: `v -> H⁻¹ v` to working precision, or None.
        symmetric: whether conjugate gradients may be used on H.
        refine: how often they may be used, with more steps each time.
    """
    params, hparams, v = point.params, point.hparams, point.adjoint
    dtype, eps = spectrum.low.dtype, max(_tree.eps(params), _tree.eps(hparams))
    short = _tree.eps(params) ** _ASIDE
    apply = precondition or (lambda v: v)
    # Where nothing is known, neither these passes nor the product with H are made.
    known = spectrum.low > 0
    nothing = _Sizes(*[jnp.zeros((), dtype)] * len(_Sizes._fields))
    sizes = jax.lax.cond(known, lambda: _sizes(point, flat, dtype), lambda: nothing)
    here = once(known, lambda _: system.matvec(v), v) if point.product is None else point.product
    known = known & jnp.isfinite(sizes.unit)
    low = jnp.where(known, spectrum.low, 1)
    wide = spectrum.high / low * _tree.eps(params)
    shared = jnp.maximum(jnp.minimum(wide, _COMMON), jnp.minimum(1, _SHARED * wide) * wide) / 20
    aside = sizes.crosswise > 0
    across = 1 / _tree.positive(sizes.crosswise)
    sidestep = jnp.where(aside, short * sizes.length * across, 0)
    norm = lambda x, unit: _tree.norm(x, unit).astype(dtype)

    def solve(b: PyTree, steps: Array) -> PyTree:
        if inverse is not None:
            return inverse(b)
        return _inverse(system.matvec, apply, b, low, steps)

    def attempt(c: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, _ = c
        steps = jnp.asarray((0, *_REFINE), jnp.int32)[turn]

        def compare(c: _Stage, x: PyTree) -> _Stage:
            """δ, and r from the second point."""
            shift = _tree.axpy(sizes.drift, v, _tree.scale(sidestep, flat))
            moved = _tree.axpy(-_SAFETY, _tree.add(x, shift), params)
            product, indirect = pull(moved, v)
            rhs, direct = jax.grad(outer, argnums=(0, 1), has_aux=True)(moved, hparams)[0]
            gap = _tree.sub(point.rhs, here)
            r = _tree.axpy(_SAFETY - 1, gap, _tree.sub(rhs, product))
            change = jax.tree.map(lambda g, d, i: g - (d - i.astype(d.dtype)), point.grad, direct, indirect)
            bend = jnp.abs(_tree.vdot(v, _tree.sub(product, here)))
            loose = norm(x, sizes.long) / _tree.positive(sizes.length)
            return _Stage(r, change, loose, bend > 0.5 * jnp.abs(_tree.vdot(v, here)))

        def conclude(c: _Stage, x: PyTree) -> _Stage:
            """ε, and the change of the hypergradient that it causes."""
            turned = _tree.axpy(jnp.where(aside, sizes.reach * across, 0), flat, x)
            change = jax.tree.map(lambda c, j: c + j.astype(c.dtype), c.change, system.cross(turned))
            loose = c.loose + norm(x, sizes.tall) / (10 * _SAFETY * _tree.positive(sizes.reach))
            return c._replace(change=change, loose=loose)

        def stage(i: Array, c: _Stage) -> _Stage:
            return jax.lax.cond(i == 0, compare, conclude, c, solve(c.rhs, steps))

        start = _Stage(system.residual, _tree.zeros_like(point.grad), jnp.zeros((), dtype), jnp.asarray(False))
        end: _Stage = jax.lax.fori_loop(0, 2, stage, start)
        first = norm(end.change, sizes.unit) / (_SAFETY * _tree.positive(sizes.whole))
        first = jnp.where(aside, first / short, first)
        a = first + (end.loose + shared) * sizes.through / _tree.positive(sizes.whole)
        return turn + 1, jnp.where(end.bent | jnp.isnan(a), jnp.inf, a)

    def proceed(c: tuple[Array, Array]) -> Array:
        turn, a = c
        more = (turn <= refine) & ~(a <= _COARSE) if symmetric and inverse is None else False
        return known & ((turn == 0) | more)

    _, a = jax.lax.while_loop(proceed, attempt, (jnp.int32(0), jnp.asarray(jnp.inf, dtype)))
    found = jnp.where(a < 0.8, _SAFETY * a / (1 - jnp.minimum(a, 0.8)), 5 * _SAFETY * a) + eps
    return jnp.where((sizes.whole > 0) | (a == 0), found, jnp.inf)


def _inverse(matvec: Matvec, apply: Matvec, b: PyTree, low: Array, steps: Array) -> PyTree:
    """A rough H⁻¹b: x + M⁻¹(b − Hx) / μ, where x is the result of some steps of conjugate gradients; M⁻¹b / μ without
    any.
    """
    dtype = low.dtype

    def step(c: Any) -> Any:
        j, x, r, p, rz, pmp = c
        product = matvec(p)
        curvature = _tree.vdot(p, product).astype(dtype)
        ok = (curvature > _INSIDE * low * pmp) & (rz > 0)  # else p is close to a flat direction
        alpha = jnp.where(ok, rz / jnp.where(ok, curvature, 1), 0)
        x, r = _tree.axpy(alpha, p, x), _tree.axpy(-alpha, product, r)
        z = apply(r)
        fresh = _tree.vdot(r, z).astype(dtype)
        beta = fresh / jnp.where(ok, rz, 1)
        return jnp.where(ok, j + 1, steps), x, r, _tree.axpy(beta, p, z), fresh, fresh + beta**2 * pmp

    z = apply(b)
    square = _tree.vdot(b, z).astype(dtype)
    first = (jnp.int32(0), _tree.zeros_like(b), b, z, square, square)
    _, x, r, *_ = jax.lax.while_loop(lambda c: c[0] < steps, step, first)
    return _tree.axpy(1 / low, apply(r), x)


def _total(x: PyTree, y: PyTree) -> Array:
    """Σ |xᵢ| |yᵢ|."""
    return _tree.vdot(jax.tree.map(jnp.abs, x), jax.tree.map(jnp.abs, y))


def _root(precondition: Matvec | None, like: PyTree) -> PyTree | None:
    """The square root of the diagonal of M, if M is diagonal, as in most cases; otherwise a measure of its scale."""
    if precondition is None:
        return None
    ones = precondition(jax.tree.map(jnp.ones_like, like))
    return jax.tree.map(lambda x: jnp.where(x != 0, jax.lax.rsqrt(jnp.where(x != 0, jnp.abs(x), 1)), 1), ones)


def _unit(p: PyTree, apply: Matvec) -> PyTree:
    length = jnp.sqrt(jnp.maximum(_tree.vdot(p, apply(p)), 0))
    good = (length > 0) & jnp.isfinite(length)
    return _tree.where(good, _tree.scale(1 / jnp.where(good, length, 1), p), _tree.zeros_like(p))

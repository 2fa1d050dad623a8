r"""Preconditioned conjugate gradients for the adjoint system.

    A v = b,   A symmetric positive definite:   vₖ minimises ‖v − A⁻¹b‖_A over the Krylov space of M⁻¹A

Source: Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems" (2003), algorithm 9.1. Differs from
`jax.scipy.sparse.linalg.cg` in:
1. it stops, with a status, at negative curvature (pᵀAp < 0) and in a null space, where JAX's returns a number;
2. every test is relative, so that scaling (A, b) changes nothing, in float32 and at any size;
3. the starting point is first scaled to the length that fits best, so that a warm start is never worse than zero;
4. its own scalars give the smallest Ritz value, the curvature that turns a residual into an error: T = RᵀR with R
   bidiagonal, and ‖R⁻¹‖ is updated at each step by incremental condition estimation (Bischof 1990; Meurant & Tichý
   2019);
5. on a fixed budget it can keep the current iterate where it meets negative curvature, as trust-region methods do
   (Steihaug 1983), and take |A| for A along the very first direction: x = ‖b‖ b / ‖A b‖.
Cost: one product a step, one for the starting point. Memory: four vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._loops import once
from hypergrad._options import Choice, Number, options
from hypergrad._solver import InputError, Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import PRECONDITIONER, Linear, LinearResult, Matvec, Preconditioner, fit
from hypergrad.linear.identity import unknown_inverse
from hypergrad.linear.precondition import jacobi

_MAX_STEPS = 1000
_ROUNDING = 4  # units of rounding below which a residual by recursion means nothing
_FLAT = 8  # a Rayleigh quotient this many units of rounding below the largest cannot be told from zero
_ALMOST, _DRIFT = 32, 4  # a direction is nearly flat up to this many times that; and the growth of a residual there


class _Ritz(NamedTuple):
    """A unit vector z for which zᵀR⁻¹ is long, R being the bidiagonal factor of the tridiagonal matrix of CG so far."""

    square: Array  # ‖zᵀR⁻¹‖², whose inverse is close to the smallest Ritz value, and never below it
    last: Array  # last entry of zᵀR⁻¹
    edge: Array  # β / α of the last step


class _Carry(NamedTuple):
    x: PyTree
    r: PyTree  # b − A x; A p once the loop has stopped for another reason than the residual
    p: PyTree
    rz: Array  # rᵀ M⁻¹ r
    pmp: Array  # pᵀ M p, by recursion, since only M⁻¹ is known
    low: Array  # smallest pᵀAp / pᵀMp
    ritz: _Ritz
    high: Array  # largest absolute value of the same
    residual: Array
    least: Array  # smallest residual so far
    steps: Array
    status: Array


@options(
    tol=Number(above=0),
    max_steps=Number(least=1, integer=True),
    preconditioner=PRECONDITIONER,
    indefinite=Choice(("refuse", "truncate")),
)
def cg(
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    *,
    preconditioner: Preconditioner | Any | None = "default",
    indefinite: str = "refuse",
) -> Linear:
    """Conjugate gradients, for symmetric positive definite systems: the default.

    Args:
        tol: relative tolerance on the residual (dimensionless). With it, or with neither argument, the solver claims
            convergence and a miss is a status; None then means 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of products with A; without `tol`, a fixed budget that claims nothing. Default 1000.
        preconditioner: `hg.linear.jacobi()`, `hg.linear.precondition(fn)` or None. The default is Jacobi from 8
            Hutchinson probes when convergence is claimed, and none on a fixed budget.
        indefinite: what to do where A has negative curvature. `"refuse"`: the status is NEG_CURVATURE. `"truncate"`,
            only on a fixed budget: stop with the iterate that the previous directions gave. It is a direction to step
            along rather than a solution, so `error_estimate` is `inf`.

    Raises:
        InputError: for a negative tolerance or step count; for `indefinite="truncate"` where convergence is claimed.

    >>> import hypergrad as hg
    >>> linear = hg.linear.cg(tol=1e-8)
    """
    claims = tol is not None or max_steps is None
    if claims and indefinite == "truncate":
        raise InputError(
            "cg: indefinite='truncate' may stop short of a solution, and a tolerance claims one: give max_steps= "
            "without tol=, as in hg.linear.cg(max_steps=5, indefinite='truncate')."
        )
    chosen = not (preconditioner is None or isinstance(preconditioner, str))
    if isinstance(preconditioner, str):
        preconditioner = jacobi() if claims else None
    options = {"tol": tol if claims else 0.0, "max_steps": _MAX_STEPS if max_steps is None else max_steps}
    solve = partial(_solve, truncate=indefinite == "truncate")
    return Linear(solve, options, claims, symmetric=True, preconditioner=preconditioner, entrywise=not chosen)


def _solve(
    matvec: Matvec,
    rhs: PyTree,
    *,
    start: PyTree,
    precondition: Matvec | None,
    options: Mapping[str, Array],
    key: Array,
    truncate: bool,
) -> LinearResult:
    del key
    apply = precondition or (lambda v: v)
    dtype, eps = _tree.dtype(rhs), _tree.eps(rhs)
    asked, known = options["tol"], _FLAT * eps
    if "noise" in options:
        known = jnp.maximum(known, options["noise"])
    tol = jnp.maximum(asked, _ROUNDING * eps)  # below rounding level the recursion would become 0/0
    max_steps = options["max_steps"]

    def warm(_: tuple[PyTree, PyTree, Array, Array]) -> tuple[PyTree, PyTree, Array, Array]:
        x, r, product = fit(matvec, rhs, start)
        # (A x)ᵀ M⁻¹ (A x) / xᵀ A x lies within the spectrum of M⁻¹A; it is the only estimate where no step is needed.
        curvature = _tree.vdot(product, apply(product)) / _tree.vdot(x, product)
        if truncate:  # along negative curvature the best length points backwards
            x, r = _tree.where(curvature > 0, (x, r), (_tree.zeros_like(rhs), rhs))
        return x, r, _tree.positive(curvature).astype(dtype), jnp.int32(1)

    def squares(r: PyTree, z: PyTree) -> tuple[Array, Array]:
        rz = _tree.vdot(r, z).astype(dtype)
        return rz, jnp.sqrt(rz if precondition is None else _tree.vdot(r, r).astype(dtype))

    cold = _tree.zeros_like(rhs), rhs, jnp.ones((), dtype), jnp.int32(0)
    x, r, fallback, used = once(_tree.max_abs(start) > 0, warm, cold)
    z = apply(r)
    rz, residual = squares(r, z)
    inf = jnp.asarray(jnp.inf, dtype)
    zero = jnp.zeros((), dtype)
    first = _Carry(x, r, z, rz, rz, inf, _Ritz(zero, zero, zero), zero, residual, residual, used, jnp.int32(Status.OK))

    def proceed(c: _Carry) -> Array:
        return (c.steps < max_steps) & (c.residual > tol) & (c.status == int(Status.OK))

    def step(c: _Carry) -> _Carry:
        ap = matvec(c.p)
        pap = _tree.vdot(c.p, ap).astype(dtype)
        rayleigh = pap / c.pmp
        high = jnp.maximum(c.high, jnp.abs(rayleigh))
        ok = (rayleigh > known * high) & (c.rz > 0)
        status = jnp.where(
            ok,
            int(Status.OK),
            jnp.where(
                ~jnp.isfinite(pap),
                int(Status.NONFINITE_GRAD),
                jnp.where(c.rz > 0, int(Status.NEG_CURVATURE), int(Status.LINEAR_BREAKDOWN)),
            ),
        )
        alpha = _tree.safe_divide(c.rz, pap, where=ok)
        x, r = _tree.axpy(alpha, c.p, c.x), _tree.axpy(-alpha, ap, c.r)
        z = apply(r)
        rz, residual = squares(r, z)
        # A small residual that a nearly flat direction makes larger again was all that there is to solve.
        drift = (c.least <= eps**0.5) & (residual > _DRIFT * c.least) & (rayleigh <= _ALMOST * known * high)
        status = jnp.where(ok & drift, int(Status.PRECISION_LIMITED), status)
        ok = ok & ~drift
        beta = _tree.safe_divide(rz, c.rz, where=ok)
        p = _tree.axpy(beta, c.p, z)
        return _Carry(
            _tree.where(ok, x, c.x),
            _tree.where(ok, r, ap),
            _tree.where(ok, p, c.p),
            jnp.where(ok, rz, c.rz),
            jnp.where(ok, rz + beta**2 * c.pmp, c.pmp),
            jnp.where(ok, jnp.minimum(c.low, rayleigh), c.low),
            _tree.where(ok, _extended(c.ritz, alpha, beta), c.ritz),
            jnp.where(jnp.isfinite(high), high, c.high),
            jnp.where(ok, residual, c.residual),
            jnp.where(ok, jnp.minimum(c.least, residual), c.least),
            c.steps + 1,
            status.astype(jnp.int32),
        )

    c = jax.lax.while_loop(proceed, step, first)
    stepped = jnp.isfinite(c.low)
    low = jnp.where(stepped, jnp.maximum(1 / c.ritz.square, eps * c.high), fallback)
    status = _verdict(c, apply, asked, eps, known)
    result = LinearResult(
        c.x,
        c.residual,
        c.steps,
        status,
        lambda v: _tree.scale(1 / low, apply(v)),
        low=jnp.where(stepped, low, jnp.where(used > 0, fallback, jnp.inf)),
        high=jnp.where(stepped, c.high, jnp.where(used > 0, fallback, 0)),
    )
    return _truncated(result, c, apply) if truncate else result


def _truncated(result: LinearResult, c: _Carry, apply: Matvec) -> LinearResult:
    """A step along p with the curvature of |A|, where CG stopped before its first step; its error is not known."""
    indefinite = result.status == int(Status.NEG_CURVATURE)
    image = jnp.sqrt(jnp.abs(_tree.vdot(c.r, apply(c.r))) * c.pmp)  # ‖A p‖ ‖p‖ ≥ |pᵀAp|, so the step is not too long
    first = indefinite & (_tree.max_abs(c.x) == 0)
    x = _tree.where(first, _tree.scale(_tree.safe_divide(c.rz, image, where=first), c.p), result.solution)

    def inverse(v: PyTree) -> PyTree:
        return _tree.where(indefinite, unknown_inverse(v), result.inverse(v))

    return LinearResult(
        x,
        jnp.where(indefinite, jnp.nan, result.residual),
        result.steps,
        jnp.where(indefinite, int(Status.OK), result.status).astype(jnp.int32),
        inverse,
        low=jnp.where(indefinite, 0, result.low),
        high=result.high,
    )


def _extended(ritz: _Ritz, alpha: Array, beta: Array) -> _Ritz:
    """Extend by a row and a column: the unit vector (s z, c) whose product with the new R⁻¹ is longest."""
    corner = ritz.square + ritz.edge * ritz.last * (ritz.last * alpha)
    side = -jnp.sqrt(ritz.edge) * ritz.last * alpha
    size = jnp.maximum(corner, alpha)  # the squares of these may leave the range of the dtype
    half, off = (corner - alpha) / (2 * size), side / size
    root = jnp.sqrt(half**2 + off**2)
    square = size * ((corner + alpha) / (2 * size) + root)
    # The eigenvector of [[corner, side], [side, alpha]], from the row in which nothing cancels.
    s, c = jnp.where(half >= 0, half + root, off), jnp.where(half >= 0, off, root - half)
    length = jnp.hypot(s, c)
    s, c = _tree.safe_divide(s, length), _tree.safe_divide(c, length, otherwise=1)
    return _Ritz(square, (c - s * jnp.sqrt(ritz.edge) * ritz.last) * jnp.sqrt(alpha), beta / alpha)


def _verdict(c: _Carry, apply: Matvec, asked: Array, eps: float, known: ArrayLike) -> Array:
    """Why the loop stopped: a direction that A maps to zero spans a null space, and pᵀAp ≈ 0 alone is a saddle.
    Curvature below the share `known` of the largest cannot be told from zero.
    """
    image = c.r  # A p, where the loop stopped for p
    gain = jnp.sqrt(jnp.abs(_tree.vdot(image, apply(image))) / c.pmp)  # ‖A p‖ / ‖p‖ in the geometry of M
    curvature = _tree.vdot(c.p, image) / c.pmp
    noise = c.low <= known * c.high  # a step was taken along what later turned out to be rounding
    null = (jnp.abs(curvature) <= known * c.high) & (gain <= 3 * jnp.sqrt(known) * c.high)
    null = null | (noise & (curvature > -(eps**0.5) * c.high))
    # The part of b in the null space may be rounding, or a property of the problem.
    flat = jnp.where(c.least <= eps**0.5, int(Status.PRECISION_LIMITED), int(Status.SINGULAR))
    stopped = jnp.where((c.status == int(Status.NEG_CURVATURE)) & null, flat, c.status)

    met = jnp.where(noise & (asked > 0), int(Status.PRECISION_LIMITED), int(Status.OK))
    missed = jnp.where(noise, int(Status.SINGULAR), int(Status.LINEAR_MAX_STEPS))
    missed = jnp.where(c.residual <= _ROUNDING * eps, int(Status.PRECISION_LIMITED), missed)
    ended = jnp.where((c.residual <= asked) | (asked == 0), met, missed)
    return jnp.where(c.status == int(Status.OK), ended, stopped).astype(jnp.int32)

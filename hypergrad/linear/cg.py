r"""Preconditioned conjugate gradients for the adjoint system.

    A v = b,   A symmetric positive definite:   vₖ minimises ‖v − A⁻¹b‖_A over the Krylov space of M⁻¹A

Source: Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse Linear Systems" (2003), algorithm 9.1. Differs from
`jax.scipy.sparse.linalg.cg` in:
1. it stops, with a status, at negative curvature (pᵀAp < 0) and in a null space, where that one returns a number;
2. every test is relative, so that scaling (A, b) changes nothing, in float32 and at any size;
3. the starting point is first scaled to the length that fits best, so that a warm start is never worse than zero;
4. the Rayleigh quotients it sees anyway give the curvature with which a residual becomes an error estimate.
Cost: one product a step, one for the starting point. Memory: four vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_options, suggest_names
from hypergrad._options import default_tol
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Linear, LinearResult, Matvec, Preconditioner
from hypergrad.linear.precondition import jacobi

_MAX_STEPS = 1000


class _Carry(NamedTuple):
    x: PyTree
    r: PyTree
    p: PyTree
    rz: Array  # rᵀ M⁻¹ r
    pmp: Array  # pᵀ M p, by recursion, since only M⁻¹ is known
    curvature: tuple[Array, Array, Array]  # smallest and largest pᵀAp / pᵀMp, largest ‖Ap‖/‖p‖
    residual: Array
    steps: Array
    status: Array


@suggest_names
def cg(tol: ArrayLike | None = None, max_steps: ArrayLike | None = None, *,
       preconditioner: Preconditioner | None | Any = "default") -> Linear:
    """Conjugate gradients, for symmetric positive definite systems: the default.

    Args:
        tol: relative tolerance on the residual (dimensionless). With it, or with neither argument, the solver claims
            convergence and a miss is a status; None then means 1e-6 in float32 and 1e-10 in float64.
        max_steps: most products with A; alone, without `tol`, a fixed budget that claims nothing. Default 1000.
        preconditioner: `hg.linear.jacobi()`, `hg.linear.precondition(fn)` or None. The default is Jacobi from 8
            Hutchinson probes when convergence is claimed, and none on a fixed budget.

    Raises:
        InputError: for a negative tolerance or step count.

    >>> import hypergrad as hg
    >>> linear = hg.linear.cg(tol=1e-8)
    """
    check_options("cg", tol=tol, max_steps=max_steps)
    claims = tol is not None or max_steps is None
    if isinstance(preconditioner, str):
        preconditioner = jacobi() if claims else None
    options = {"tol": tol if claims else 0.0, "max_steps": _MAX_STEPS if max_steps is None else max_steps}
    return Linear(_solve, options, claims, symmetric=True, preconditioner=preconditioner)


def _solve(matvec: Matvec, rhs: PyTree, *, start: PyTree, precondition: Matvec | None,
           options: Mapping[str, ArrayLike], key: Array) -> LinearResult:
    del key
    apply = precondition or (lambda v: v)
    dtype, eps = _tree.dtype(rhs), _tree.eps(rhs)
    tol = jnp.maximum(default_tol(options["tol"], rhs), 4 * eps)  # a recursion below rounding level is 0/0 next
    max_steps = jnp.asarray(options["max_steps"], jnp.int32)

    def first(_: None) -> tuple[PyTree, PyTree, Array]:
        product = matvec(start)
        fit = _tree.vdot(product, rhs) / jnp.maximum(_tree.vdot(product, product), jnp.finfo(dtype).tiny)
        fit = jnp.where(jnp.isfinite(fit), fit, 0).astype(dtype)
        return _tree.scale(fit, start), _tree.axpy(-fit, product, rhs), jnp.int32(1)

    def cold(_: None) -> tuple[PyTree, PyTree, Array]:
        return _tree.zeros_like(rhs), rhs, jnp.int32(0)

    x, r, steps = jax.lax.cond(_tree.max_abs(start) > 0, first, cold, None)
    z = apply(r)
    rz = _tree.vdot(r, z).astype(dtype)
    inf = jnp.asarray(jnp.inf, dtype)
    carry = _Carry(x, r, z, rz, rz, (inf, -inf, jnp.zeros((), dtype)), _tree.norm(r).astype(dtype), jnp.int32(0),
                   jnp.int32(Status.OK))

    def proceed(c: _Carry) -> Array:
        return (steps + c.steps < max_steps) & (c.residual > tol) & (c.status == int(Status.OK))

    def step(c: _Carry) -> _Carry:
        ap = matvec(c.p)
        pap = _tree.vdot(c.p, ap).astype(dtype)
        low, high, norm = c.curvature
        rayleigh = pap / c.pmp
        gain = (_tree.norm(ap) / _tree.norm(c.p)).astype(dtype)
        high, norm = jnp.maximum(high, jnp.abs(rayleigh)), jnp.maximum(norm, gain)
        flat = rayleigh <= 8 * eps * high
        null = flat & (gain <= jnp.sqrt(eps) * norm)
        status = jnp.where(~jnp.isfinite(pap), int(Status.NONFINITE_GRAD),
                           jnp.where(c.rz <= 0, int(Status.LINEAR_BREAKDOWN),
                                     jnp.where(null, int(Status.SINGULAR),
                                               jnp.where(flat, int(Status.NEG_CURVATURE), int(Status.OK))))).astype(jnp.int32)
        ok = status == int(Status.OK)
        alpha = jnp.where(ok, c.rz / jnp.where(ok, pap, 1), 0)
        x, r = _tree.axpy(alpha, c.p, c.x), _tree.axpy(-alpha, ap, c.r)
        z = apply(r)
        rz = _tree.vdot(r, z).astype(dtype)
        beta = rz / jnp.where(c.rz > 0, c.rz, 1)
        x, p = _tree.where(ok, x, c.x), _tree.axpy(beta, c.p, z)
        low = jnp.where(ok, jnp.minimum(low, rayleigh), low)
        return _Carry(x, _tree.where(ok, r, c.r), _tree.where(ok, p, c.p), jnp.where(ok, rz, c.rz), rz + beta**2 * c.pmp,
                      (low, high, norm), jnp.where(ok, _tree.norm(r).astype(dtype), c.residual), c.steps + 1, status)

    c = jax.lax.while_loop(proceed, step, carry)
    low = jnp.where(jnp.isfinite(c.curvature[0]), jnp.maximum(c.curvature[0], eps), 1)
    missed = (c.status == int(Status.OK)) & (c.residual > tol) & (options["tol"] is None or jnp.asarray(options["tol"]) > 0)
    status = jnp.where(missed, int(Status.LINEAR_MAX_STEPS), c.status).astype(jnp.int32)
    return LinearResult(c.x, c.residual, steps + c.steps, status, lambda v: _tree.scale(1 / low, apply(v)))

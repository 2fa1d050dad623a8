r"""Restarted GMRES for adjoint systems that are not symmetric.

    v = M⁻¹ u,   u minimises ‖b − A M⁻¹ u‖ over the Krylov space of A M⁻¹, from which it restarts every m products

Source: Saad & Schultz 1986; Saad, "Iterative Methods for Sparse Linear Systems" (2003), algorithm 9.5. Differs from
`jax.scipy.sparse.linalg.gmres` in:
1. the preconditioner acts on the right, so that the residual is that of the system asked for;
2. a space that closes without a solution, and cycles that make no progress, give a status, where JAX's returns a
   number;
3. it stops within a cycle, each vector is orthogonalised twice, and pytrees are not flattened;
4. the starting point is first scaled to the length that fits best.
Cost: one product a step, and one for each restart and for the starting point; O(m) vector operations a step, where CG
needs five. Memory: m + 5 vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._loops import once
from hypergrad._options import Number, options
from hypergrad._solver import InputTypeError, Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import PRECONDITIONER, Linear, LinearResult, Matvec, Preconditioner, against, fit, weigh

_MAX_STEPS = 1000
_ROUNDING = 4  # units of rounding below which a residual by recursion means nothing
_FLAT = 8  # a pivot this many units of rounding below the largest cannot be told from zero
_PROGRESS = 1e-3  # a cycle that reduces the residual by less than this makes no progress


class _Cycle(NamedTuple):
    basis: PyTree  # orthonormal, stacked on a leading axis of m + 1
    q: Array  # [m+1, m+1], orthogonal: q @ (Hessenberg matrix) = r
    r: Array  # [m+1, m], upper triangular
    high: Array  # largest column
    residual: Array
    count: Array
    closed: Array  # whether A maps the space into itself
    singular: Array  # whether it did so without a solution; the last column is then of no use


class _Carry(NamedTuple):
    x: PyTree
    residual: Array  # after the last cycle, by recursion
    before: Array  # at the start of the last cycle, as measured
    low: Array  # smallest singular value of A M⁻¹ on the spaces seen
    last: Array  # the same on the last space
    high: Array  # largest column
    products: Array
    stuck: Array
    singular: Array


@options(
    tol=Number(above=0),
    max_steps=Number(least=1, integer=True),
    restart=Number(least=1, integer=True, static=True),
    preconditioner=PRECONDITIONER,
)
def gmres(
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    *,
    restart: int = 20,
    preconditioner: Preconditioner | None = None,
) -> Linear:
    """Generalised minimal residuals, for systems that are not symmetric: fixed points, and Hessians of saddles.

    Args:
        tol: relative tolerance on the residual (dimensionless). With it, or with neither argument, the solver claims
            convergence and a miss is a status; None then means 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of products with A; without `tol`, a fixed budget that claims nothing. Default 1000.
        restart: products after which the basis is thrown away, a Python integer. Larger is more robust and takes more
            memory.
        preconditioner: `hg.linear.jacobi()`, `hg.linear.precondition(fn)` or None.

    Raises:
        InputError: for a negative tolerance or step count.

    >>> import hypergrad as hg
    >>> linear = hg.linear.gmres(tol=1e-8, restart=30)
    """
    if isinstance(restart, Tracer):
        raise InputTypeError(
            "gmres: restart must be a Python integer, since it sets the memory, found a traced value: "
            "make the solver outside jit."
        )
    claims = tol is not None or max_steps is None
    options = {"tol": tol if claims else 0.0, "max_steps": _MAX_STEPS if max_steps is None else max_steps}
    return Linear(
        partial(_solve, restart=int(restart)),
        options,
        claims,
        symmetric=False,
        preconditioner=preconditioner,
        entrywise=preconditioner is None,
    )


def _solve(
    matvec: Matvec,
    rhs: PyTree,
    *,
    start: PyTree,
    precondition: Matvec | None,
    options: Mapping[str, Array],
    key: Array,
    restart: int,
) -> LinearResult:
    del key
    apply = precondition or (lambda v: v)
    dtype, eps = _tree.dtype(rhs), _tree.eps(rhs)
    asked = options["tol"]
    tol = jnp.maximum(asked, _ROUNDING * eps)
    max_steps = options["max_steps"]
    size = min(restart, max(_tree.size(rhs), 1))

    def warm(point: tuple[PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, Array]:
        x, r, _ = fit(matvec, rhs, point[0])
        return x, r, jnp.int32(1)

    def proceed(c: _Carry) -> Array:
        return (c.products < max_steps) & (c.residual > tol) & ~(c.stuck | c.singular)

    def cycle(c: _Carry) -> _Carry:
        x, residual, used = once(_tree.max_abs(c.x) > 0, warm, (c.x, rhs, jnp.int32(0)))
        before = _tree.norm(residual).astype(dtype)
        stuck = before > (1 - _PROGRESS) * c.before
        k = _arnoldi(
            lambda v: matvec(apply(v)),
            residual,
            before,
            tol,
            jnp.where(stuck, 0, jnp.minimum(size, max_steps - c.products - used)),
            c.high,
            size,
            eps,
        )
        y, low = _least_squares(k, before)
        trial = _tree.add(x, apply(weigh(k.basis, y)))
        good = _tree.all_finite(trial)
        return _Carry(
            _tree.where(good, trial, x),
            jnp.where(good, k.residual, jnp.nan),
            before,
            jnp.minimum(c.low, low),
            jnp.where(stuck, c.last, low),
            k.high,
            c.products + used + k.count,
            stuck,
            k.singular,
        )

    inf = jnp.asarray(jnp.inf, dtype)
    x = _tree.where(max_steps > 0, start, _tree.zeros_like(rhs))
    first = _Carry(x, inf, inf, inf, inf, jnp.zeros((), dtype), jnp.int32(0), jnp.asarray(False), jnp.asarray(False))
    c = jax.lax.while_loop(proceed, cycle, first)
    low = jnp.where(jnp.isfinite(c.low), jnp.maximum(c.low, eps * c.high), 1)
    return LinearResult(
        c.x,
        c.residual,
        c.products,
        _verdict(c, asked, eps),
        lambda v: _tree.scale(1 / low, apply(v)),
        low=jnp.where(jnp.isfinite(c.low), low, jnp.inf),
        high=c.high,
    )


def _verdict(c: _Carry, asked: Array, eps: float) -> Array:
    """The reason why the loop stopped: the tolerance, rounding, a null space, or the number of products."""
    rounding = (c.residual <= _ROUNDING * eps) | ((c.stuck | c.singular) & (c.residual <= eps**0.5))
    flat = c.singular | (c.stuck & (c.last <= eps**0.5 * c.high))  # the rest of b is close to a null vector
    missed = jnp.where(
        rounding, int(Status.PRECISION_LIMITED), jnp.where(flat, int(Status.SINGULAR), int(Status.LINEAR_MAX_STEPS))
    )
    unclaimed = (asked == 0) & ~flat
    status = jnp.where((c.residual <= asked) | unclaimed, int(Status.OK), missed)
    return jnp.where(jnp.isnan(c.residual), int(Status.NONFINITE_GRAD), status).astype(jnp.int32)


def _arnoldi(
    operator: Matvec, residual: PyTree, norm: Array, tol: Array, budget: Array, high: Array, size: int, eps: float
) -> _Cycle:
    """At most `budget` products, each of which adds a vector to an orthonormal basis of the Krylov space."""
    dtype = norm.dtype

    def empty(leaf: Array) -> Array:
        row = leaf.astype(jnp.promote_types(leaf.dtype, dtype)) / _tree.positive(norm)
        return jnp.zeros((size + 1, *leaf.shape), leaf.dtype).at[0].set(row.astype(leaf.dtype))

    def proceed(k: _Cycle) -> Array:
        return (k.count < budget) & (k.residual > tol) & ~k.closed

    def step(k: _Cycle) -> _Cycle:
        j = k.count
        w = operator(jax.tree.map(lambda leaf: leaf[j], k.basis))
        before = _tree.norm(w).astype(dtype)
        h = jnp.zeros((size + 1,), dtype)
        for _ in range(2):  # one pass leaves a part of the order of the rounding times the growth of the basis
            part = against(k.basis, w).astype(dtype)
            w, h = _tree.sub(w, weigh(k.basis, part)), h + part
        after = _tree.norm(w).astype(dtype)
        closed = ~(after > 8 * eps * before)
        safe = jnp.where(closed, 1, after)
        fresh = _tree.where(closed, _tree.zeros_like(w), _tree.scale(1 / safe, w))
        basis = jax.tree.map(lambda leaf, new: leaf.at[j + 1].set(new), k.basis, fresh)

        column = jnp.sum(k.q * h[None, :], axis=1).at[j + 1].set(after)
        pivot = jnp.hypot(column[j], after)
        high = jnp.maximum(k.high, jnp.maximum(before, pivot))
        singular = ~(pivot > _FLAT * eps * high)
        cos, sin = _tree.safe_divide(column[j], pivot, otherwise=1), _tree.safe_divide(after, pivot)
        upper, lower = k.q[j], k.q[j + 1]
        q = k.q.at[j].set(cos * upper + sin * lower).at[j + 1].set(cos * lower - sin * upper)
        r = k.r.at[:, j].set(column.at[j].set(pivot).at[j + 1].set(0))
        residual = jnp.where(singular & jnp.isfinite(pivot), k.residual, norm * jnp.abs(q[j + 1, 0]))
        return _Cycle(basis, q, r, high, residual, j + 1, closed | singular, singular)

    first = _Cycle(
        jax.tree.map(empty, residual),
        jnp.eye(size + 1, dtype=dtype),
        jnp.zeros((size + 1, size), dtype),
        high,
        norm,
        jnp.int32(0),
        jnp.asarray(False),
        jnp.asarray(False),
    )
    return jax.lax.while_loop(proceed, step, first)


def _least_squares(k: _Cycle, norm: Array) -> tuple[Array, Array]:
    """Coefficients of least residual, and a lower bound on the smallest singular value of the Hessenberg matrix."""
    size = k.r.shape[1]
    used = jnp.arange(size) < k.count - k.singular
    both = used[:, None] & used[None, :]
    scale = _tree.positive(k.high)
    triangle = jnp.where(both, k.r[:size], 0) / scale + jnp.diag(jnp.where(used, 0, 1).astype(k.r.dtype))
    sides = jnp.concatenate([jnp.where(used, norm * k.q[:size, 0], 0)[:, None], jnp.eye(size, dtype=k.r.dtype)], axis=1)
    solved = solve_triangular(triangle, sides, lower=False)
    inverse = jnp.where(both, solved[:, 1:], 0)
    low = scale / jnp.maximum(jnp.sqrt(jnp.sum(inverse**2)), jnp.finfo(k.r.dtype).tiny)
    y = jnp.where(used, solved[:, 0] / scale, 0)
    return jnp.concatenate([y, jnp.zeros((1,), y.dtype)]), jnp.where(jnp.any(used), low, jnp.inf)

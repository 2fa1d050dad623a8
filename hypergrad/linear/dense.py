r"""The adjoint system as a matrix: exact, for small problems.

    A = [A e_1, ..., A e_n],   D_r⁻¹ A D_c⁻¹ = P L U,   v = A⁻¹ b,   or A⁺ b where A is singular to working precision

Source: Golub & Van Loan, "Matrix Computations" (2013), sections 3.4 (LU), 3.5 (scaling, refinement) and 5.5
(pseudo-inverse). Differs from `jnp.linalg.solve` in that its condition check tolerates badly scaled rows and columns,
and that a singular matrix gives the shortest solution, or a status if there is none.
Cost: n products that run at once, O(n³). Memory: n², and that of n products at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import lu_factor, lu_solve
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Linear, LinearResult, Matvec

_FLAT = 8  # a singular value this many units of rounding below the largest cannot be told from zero
_BATCH = 512  # columns computed at once


@options(tol=Number(above=0))
def dense(tol: ArrayLike | None = None) -> Linear:
    """Form the matrix A and factorise it: for up to a few thousand parameters, symmetric or not.

    Args:
        tol: relative tolerance on the residual (dimensionless). It decides whether a system that is singular to working
            precision still has a solution. None means 1e-6 in float32 and 1e-10 in float64.

    A starting point and a preconditioner are not used. `inverse` is exact, and reuses the factors.

    Raises:
        InputError: for a negative tolerance.

    >>> import hypergrad as hg
    >>> linear = hg.linear.dense()
    """
    return Linear(_solve, {"tol": tol}, claims=True, symmetric=False, exact=True, entrywise=True)


def _solve(
    matvec: Matvec, rhs: PyTree, *, start: PyTree, precondition: Matvec | None, options: Mapping[str, Array], key: Array
) -> LinearResult:
    del start, precondition
    ravel, unravel, n = _flattener(rhs)
    eps, dtype = _tree.eps(rhs), _tree.dtype(rhs)
    tol = options["tol"]
    columns = jax.lax.map(lambda e: ravel(matvec(unravel(e))), jnp.eye(n, dtype=dtype), batch_size=min(n, _BATCH))
    finite = jnp.all(jnp.isfinite(columns))
    # A non-finite matrix becomes the identity: factorisations may not return on NaN.
    matrix = jnp.where(finite, columns.T, jnp.eye(n, dtype=dtype))
    size = jnp.max(jnp.abs(matrix))
    scale = _tree.positive(size)
    matrix = matrix / scale
    apply_lu, singular = _factorise(matrix, key, eps)
    b = ravel(rhs)

    pseudo = jax.lax.cond(singular, lambda a: _pseudo_inverse(a, eps), jnp.zeros_like, matrix)

    def apply(v: Array) -> Array:
        return jnp.where(singular, _dot(pseudo, v), apply_lu(v))

    x = apply(b)
    x = x + apply(b - _dot(matrix, x))
    residual = jnp.sqrt(jnp.sum((b - _dot(matrix, x)) ** 2))
    # The residual of the best solution of a nearly singular system is rounding, or a part of b outside the range of A.
    rounding = n**0.5 * eps * jnp.sqrt(jnp.sum(x**2))  # the largest entry of the matrix is 1
    missed = jnp.where(singular & (residual > rounding), int(Status.SINGULAR), int(Status.PRECISION_LIMITED))
    status = jnp.where(residual <= tol, int(Status.OK), missed)
    status = jnp.where(finite, status, int(Status.NONFINITE_GRAD)).astype(jnp.int32)
    growth = _growth(apply, jax.random.normal(key, (n,), dtype))
    return LinearResult(
        unravel(x / scale),
        jnp.where(finite, residual, jnp.nan),
        jnp.int32(n),
        status,
        lambda r: unravel(apply(ravel(r)) / scale),
        low=_tree.safe_divide(scale, growth, otherwise=jnp.inf),
        high=_growth(lambda z: _dot(matrix, z), jax.random.normal(key, (n,), dtype)) * scale,
    )


def _growth(apply: Callable[[Array], Array], z: Array) -> Array:
    """The largest growth of a vector over three steps of the power iteration."""

    def step(_: Array, c: tuple[Array, Array]) -> tuple[Array, Array]:
        product = apply(c[0])
        size = jnp.sqrt(jnp.sum(product**2))
        return _tree.safe_divide(product, size), size

    return jax.lax.fori_loop(0, 3, step, (z / jnp.sqrt(jnp.sum(z**2)), jnp.zeros((), z.dtype)))[1]


def _factorise(matrix: Array, key: Array, eps: float) -> tuple[Callable[[Array], Array], Array]:
    """`b -> A⁻¹ b` by LU after scaling rows and columns, and whether A is singular to working precision."""
    rows = jnp.max(jnp.abs(matrix), axis=1)
    rows = _tree.positive(rows)
    columns = jnp.max(jnp.abs(matrix) / rows[:, None], axis=0)
    columns = _tree.positive(columns)
    scaled = matrix / rows[:, None] / columns[None, :]
    factors = lu_factor(scaled)

    def grow(forward: Callable[[Array], Array], back: Callable[[Array], Array], z: Array) -> Array:
        """Largest growth of a vector under a matrix, by a power iteration with the matrix and its transpose."""
        growth = jnp.zeros((), matrix.dtype)
        for _ in range(3):
            for product in (forward, back):
                z = product(z / jnp.sqrt(jnp.sum(z**2)))
                growth = jnp.sqrt(jnp.sum(z**2))
        return growth

    z = jax.random.normal(key, (matrix.shape[0],), matrix.dtype)
    high = grow(lambda v: _dot(scaled, v), lambda v: _dot(scaled.T, v), z)
    inverse = grow(lambda v: lu_solve(factors, v), lambda v: lu_solve(factors, v, trans=1), z)
    singular = ~(high * inverse * _FLAT * eps < 1)  # NaN counts: a pivot was zero
    return lambda b: lu_solve(factors, b / rows) / columns, singular


def _pseudo_inverse(matrix: Array, eps: float) -> Array:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    kept = s > _FLAT * eps * jnp.max(s)
    inverse = _tree.safe_divide(1, s, where=kept, otherwise=0)
    return jnp.matmul(vt.T * inverse[None, :], u.T, precision=jax.lax.Precision.HIGHEST)


def _dot(matrix: Array, v: Array) -> Array:
    return jnp.matmul(matrix, v, precision=jax.lax.Precision.HIGHEST)


def _flattener(like: PyTree) -> tuple[Callable[[PyTree], Array], Callable[[Array], PyTree], int]:
    """`ravel` and `unravel` between pytrees like `like` and vectors of their widest dtype, and the length."""
    leaves, treedef = jax.tree.flatten(like)
    dtype = _tree.dtype(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)

    def ravel(tree: PyTree) -> Array:
        return jnp.concatenate([leaf.astype(dtype).ravel() for leaf in jax.tree.leaves(tree)])

    def unravel(v: Array) -> PyTree:
        return treedef.unflatten(
            [
                v[i:j].reshape(leaf.shape).astype(leaf.dtype)
                for i, j, leaf in zip(ends[:-1], ends[1:], leaves, strict=True)
            ]
        )

    return ravel, unravel, ends[-1]

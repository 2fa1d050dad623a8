r"""The linearized model's kernel, and log-determinants of it and of its parametric twins.

    A = Λ^½ᵀ J P^−½  [m, d]:    kernel  log det(I + A Aᵀ)   =   full  log det(I + AᵀA)
    block      Σ over leaves of log det(I + A_lᵀA_l)        ≥  full  (Fischer)
    diagonal   Σ over parameters of log(1 + (AᵀA)_ii)       ≥  block (Hadamard)
    kronecker  per leaf AᵀA ≈ (Σ A_r A_rᵀ) ⊗ (Σ A_rᵀA_r) / tr, over its rows r as matrices

The Kronecker factors are those of a leaf's own Jacobian, of any shape, so that no layer has to be declared. For a dense
layer they are those of KFAC (Martens & Grosse 2015, arXiv:1503.05671) with examples weighted by the norm of the other
factor; they make the product the nearest after one step of power iteration (Morwani et al. 2024, arXiv:2406.17748).
Cost: m gradients of the model, m²d or md² products. Memory m d numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._options import options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.objectives._likelihoods import HIGHEST

FORMS = ("kernel", "full", "block", "kronecker", "diagonal")
_SYMMETRIC = 1e3  # units of rounding by which a kernel and its transpose may differ


def weighted_rows(
    model: Callable[[PyTree, PyTree], Array], params: PyTree, x: PyTree, cotangents: Array, variances: PyTree
) -> PyTree:
    """Rows of A: gradients of `cotangentsᵀ model`, one for each example and cotangent, in units of the prior.

    Args:
        model: `(params, one example) -> [c]`.
        params: where it is linearized.
        x: the examples, leaves `[n, ...]`.
        cotangents: `[n, r, c]`.
        variances: 1/P, a pytree like the parameters.

    Returns:
        A pytree like the parameters with leaves `[n, r, *shape]`.
    """

    def of_one(example: PyTree, weights: Array) -> PyTree:
        _, back = jax.vjp(lambda w: model(w, example), params)
        return jax.vmap(lambda weight: back(weight)[0])(weights)

    gradients = jax.vmap(of_one)(x, cotangents)
    return jax.tree.map(lambda g, v: g * jnp.sqrt(v)[None, None], gradients, variances)


def form_log_determinant(form: str, rows: PyTree) -> Array:
    """Return the log-determinant in one of `FORMS`, of rows `[m, *shape]`.

    Args:
        form: the name of the form.
        rows: A, a pytree like the parameters with a leading axis of rows.
    """
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(rows)]
    if form == "kernel":
        return _above_identity(jnp.sum(jnp.stack([_gram(leaf) for leaf in flat]), axis=0))
    if form == "full":
        return _above_identity(_gram(jnp.concatenate(flat, axis=1).T))
    if form == "diagonal":
        return _total(jnp.sum(jnp.log1p(jnp.sum(leaf**2, axis=0))) for leaf in flat)
    if form == "block":  # on its smaller side, which gives the same
        smaller = [leaf if leaf.shape[0] <= leaf.shape[1] else leaf.T for leaf in flat]
        return _total(_above_identity(_gram(leaf)) for leaf in smaller)
    return _total(_kronecker(leaf) for leaf in jax.tree.leaves(rows))


@options()
def log_determinant(kernel: ArrayLike, blocks: ArrayLike | None = None) -> Array:
    r"""`log det(I + K)` of a symmetric positive semi-definite kernel, or its bound by diagonal blocks.

        log det(I + K)  ≤  Σ_b log det(I + K_bb)          (Fischer's inequality)

    The kernel of a linearized model must be the symmetric Λ^½ J P⁻¹ Jᵀ Λ^½. Λ J P⁻¹ Jᵀ has the same determinant, but
    its blocks are no bound.

    Args:
        kernel: `[m, m]`.
        blocks: `[m]`, the number of the block that each row belongs to; None for a single one.

    Returns:
        A scalar. NaN for a traced kernel that is not symmetric, or not positive definite with the identity added.

    Raises:
        InputError: for a concrete kernel that is not square, symmetric, or positive definite with the identity added;
            for blocks that are not one concrete integer for each row.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> kernel = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> print(f"{hg.objectives.log_determinant(kernel):.4f} {hg.objectives.log_determinant(kernel, [0, 1]):.4f}")
    2.0794 2.1972
    """
    k = jnp.asarray(kernel)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not k.size:
        raise InputError(f"log_determinant: kernel must be a square matrix, found shape {k.shape}.")
    k = k.astype(jnp.promote_types(k.dtype, jnp.float32))
    gap = jnp.max(jnp.abs(k - k.T)) / jnp.maximum(jnp.max(jnp.abs(k)), jnp.finfo(k.dtype).tiny)
    symmetric = gap <= _SYMMETRIC * jnp.finfo(k.dtype).eps
    if not isinstance(symmetric, Tracer) and not symmetric:
        raise InputError(
            f"log_determinant: kernel must be symmetric, but it differs from its transpose by {float(gap):.2g} of its "
            "largest entry: weigh the Jacobian on both sides, Λ^½ J P⁻¹ Jᵀ Λ^½, and not Λ J P⁻¹ Jᵀ, whose blocks are "
            "no bound."
        )
    total = _total(_above_identity(k[np.ix_(index, index)]) for index in _indices(blocks, k.shape[0]))
    if not isinstance(total, Tracer) and not jnp.isfinite(total):
        raise InputError(
            "log_determinant: kernel must be positive semi-definite, but I + kernel has no Cholesky factor: compute it "
            "as A @ A.T."
        )
    return jnp.where(symmetric, total, jnp.nan)


def _indices(blocks: ArrayLike | None, m: int) -> list[np.ndarray]:
    if blocks is None:
        return [np.arange(m)]
    if isinstance(blocks, Tracer) or np.shape(blocks) != (m,) or np.asarray(blocks).dtype.kind not in "iu":
        raise InputError(
            f"log_determinant: blocks must be concrete integers, one for each of the {m} rows of the kernel, found "
            f"{'a traced array' if isinstance(blocks, Tracer) else f'shape {np.shape(blocks)}'}: write jnp.arange(m) "
            "// size, outside of jit."
        )
    return [np.flatnonzero(np.asarray(blocks) == block) for block in np.unique(np.asarray(blocks))]


def _total(terms: Iterable[Array]) -> Array:
    return jnp.sum(jnp.stack(list(terms)))


def _gram(rows: Array) -> Array:
    return jnp.matmul(rows, rows.T, precision=HIGHEST)


def _above_identity(gram: Any) -> Array:
    """Return log det(I + G) by Cholesky's factorization; NaN where that does not exist."""
    factor = jnp.linalg.cholesky(gram + jnp.eye(gram.shape[0], dtype=gram.dtype))
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))


def _kronecker(rows: Array) -> Array:
    if rows.ndim < 3 or 1 in (rows[0].size // rows.shape[-1], rows.shape[-1]):  # a vector is a block of its own
        flat = rows.reshape(rows.shape[0], -1)
        return _above_identity(_gram(flat if flat.shape[0] <= flat.shape[1] else flat.T))
    matrices = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    left = jnp.einsum("mij,mkj->ik", matrices, matrices, precision=HIGHEST)
    right = jnp.einsum("mij,mik->jk", matrices, matrices, precision=HIGHEST)
    trace = jnp.sum(matrices**2)
    scale = jnp.where(trace > 0, trace, 1)
    product = _eigenvalues(left)[:, None] * _eigenvalues(right)[None, :] / scale
    return jnp.sum(jnp.log1p(jnp.maximum(product, 0)))


@jax.custom_jvp
def _eigenvalues(matrix: Array) -> Array:
    """Return the eigenvalues of a symmetric matrix, with a derivative also where they coincide.

    Only symmetric functions of them are used, and those are smooth there.
    """
    return jnp.linalg.eigvalsh(matrix)


@_eigenvalues.defjvp
def _eigenvalues_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(primals[0])
    turned = jnp.matmul(tangents[0], vectors, precision=HIGHEST)
    return values, jnp.sum(vectors * turned, axis=0)

r"""The Nyström approximation of the inverse: a few products at once, and no iteration.

    A ≈ Y W⁺ Yᵀ,   Y = A Ω,   W = Ωᵀ Y,        v = (Y W⁺ Yᵀ + ρ I)⁻¹ b   by Woodbury's identity

Source: Hataya & Yamada 2023, arXiv:2302.09726. Differs:
1. Ω is Gaussian unless columns of A are asked for, since single coordinates miss most of the range of a Hessian that is
   not sparse;
2. W is inverted on its positive eigenspace (as in Frangella, Tropp & Udell 2021, arXiv:2110.02820), and a negative
   eigenvalue that ρ does not lift above zero is a status;
3. ρ is relative to the size of A, which Y gives at no extra product.
Cost: `rank` products that run at once (`jax.vmap`; one after the other where that many vectors would not fit), and one
that measures the residual. Memory: 2 × rank vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Choice, Number, options
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Linear, LinearResult, Matvec, against, weigh

_BATCHED_ENTRIES = 4_000_000  # 16 MB in float32; above it, the products run one by one
_SHIFT = 16  # units of rounding of the largest eigenvalue


@options(
    rank=Number(least=1, integer=True, static=True),
    damping=Number(
        above=0, advice="the part of the operator outside the sketch would be divided by it; write damping=1e-3"
    ),
    sketch=Choice(("gaussian", "columns")),
)
def nystrom(rank: int, *, damping: ArrayLike, sketch: str = "gaussian") -> Linear:
    """A damped low-rank inverse: a fixed budget of `rank` + 1 products, without iteration, that claims nothing.

    The solution is that of the damped system; the residual is that of `A v = b` itself, measured by a product, so it
    also shows the bias from damping. A starting point is not used.

    Args:
        rank: number of test vectors, a Python integer; the part of A beyond its `rank` largest eigenvalues counts as
            zero.
        damping: ρ, relative to the root mean square of the eigenvalues of A (dimensionless), positive.
        sketch: `"gaussian"`, or `"columns"` for random columns of A, as in the paper.

    Raises:
        InputError: for a rank or damping that is not positive, or an unknown sketch.

    >>> import hypergrad as hg
    >>> linear = hg.linear.nystrom(rank=20, damping=0.01)
    """
    return Linear(
        partial(_solve, rank=int(rank), sketch=sketch),
        {"damping": damping},
        claims=False,
        symmetric=True,
        random=("the sketch of the operator",),
        entrywise=True,
    )


def _solve(
    matvec: Matvec,
    rhs: PyTree,
    *,
    start: PyTree,
    precondition: Matvec | None,
    options: Mapping[str, Array],
    key: Array,
    rank: int,
    sketch: str,
) -> LinearResult:
    del start, precondition
    dtype, eps = _tree.dtype(rhs), _tree.eps(rhs)
    n = _tree.size(rhs)
    rank = min(rank, n)
    # As many test vectors as coordinates span the whole space, whichever they are.
    tests = _columns(key, rhs, rank) if sketch == "columns" or rank == n else _gaussian(key, rhs, rank)
    images = jax.vmap(matvec)(tests) if rank * n <= _BATCHED_ENTRIES else jax.lax.map(matvec, tests)

    # Everything below is in units of the operator's size, so that no square of it can leave the range of the dtype.
    size = _tree.norm(images).astype(dtype) / rank**0.5
    size = _tree.positive(size)
    images = _tree.scale(1 / size, images)
    rho = options["damping"]
    core = _gram(tests, images)
    core = (core + core.T) / 2
    bad = ~jnp.all(jnp.isfinite(core))
    values, vectors = jnp.linalg.eigh(jnp.where(bad, jnp.eye(rank, dtype=dtype), core))
    # A + shift · I is approximated: rounding leaves its W positive definite, and no direction has to be dropped.
    shift = jnp.minimum(_SHIFT * eps * jnp.max(jnp.abs(values)), rho / 2)
    images = _tree.axpy(shift, tests, images)
    kept = values + shift > 0
    roots = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values + shift, 1)), 0)
    factor = _mix(vectors * roots[None, :], images)  # B with B Bᵀ = Y W⁺ Yᵀ
    rho = rho - shift
    small = cho_factor(_gram(factor, factor) + rho * jnp.eye(rank, dtype=dtype))

    def woodbury(v: PyTree) -> PyTree:
        inner = cho_solve(small, against(factor, v).astype(dtype)[:, None])[:, 0]
        return _tree.scale(1 / rho, _tree.sub(v, weigh(factor, inner)))

    def inverse(v: PyTree) -> PyTree:
        u = woodbury(v)
        # The identity cancels digits where ρ is small: a step of refinement, which needs no product, brings them back.
        gap = _tree.sub(v, _tree.axpy(rho, u, weigh(factor, against(factor, u).astype(dtype))))
        return _tree.scale(1 / size, _tree.add(u, woodbury(gap)))

    solution = inverse(rhs)
    residual = _tree.norm(_tree.sub(rhs, matvec(solution))).astype(dtype)
    status = jnp.where(values[0] + rho > 0, int(Status.OK), int(Status.NEG_CURVATURE))
    status = jnp.where(jnp.max(jnp.abs(values)) > 0, status, int(Status.SINGULAR))
    status = jnp.where(bad | ~jnp.isfinite(residual), int(Status.NONFINITE_GRAD), status).astype(jnp.int32)
    return LinearResult(solution, residual, jnp.int32(rank + 1), status, inverse)


def _gaussian(key: Array, like: PyTree, rank: int) -> PyTree:
    """An orthonormal basis of a random space with the structure of `like`, stacked on a leading axis of `rank`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = treedef.unflatten(
        [
            jax.random.normal(k, (rank, *leaf.shape), jnp.promote_types(leaf.dtype, jnp.float32))
            for k, leaf in zip(keys, leaves, strict=False)
        ]
    )
    for _ in range(2):  # twice, since the first pass loses digits where the vectors are nearly dependent
        values, vectors = jnp.linalg.eigh(_gram(draws, draws))
        draws = _mix((vectors / jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))[None, :]) @ vectors.T, draws)
    return jax.tree.map(lambda draw, leaf: draw.astype(leaf.dtype), draws, like)


def _columns(key: Array, like: PyTree, rank: int) -> PyTree:
    """Unit vectors of `rank` different random coordinates, stacked."""
    leaves, treedef = jax.tree.flatten(like)
    chosen = jax.random.permutation(key, _tree.size(like))[:rank]
    vectors, first = [], 0
    for leaf in leaves:
        hits = chosen[:, None] == (first + jnp.arange(leaf.size))[None, :]
        vectors.append(hits.astype(leaf.dtype).reshape(rank, *leaf.shape))
        first += leaf.size
    return treedef.unflatten(vectors)


def _gram(x: PyTree, y: PyTree) -> Array:
    """Inner products of two stacks, `[rank, rank]`."""
    return jax.vmap(lambda u: against(y, u))(x).astype(_tree.dtype(x))


def _mix(matrix: Array, stack: PyTree) -> PyTree:
    """The stack whose vector i is the sum over j of `matrix[j, i]` times vector j."""
    return jax.vmap(lambda weights: weigh(stack, weights))(matrix.T)

r"""Preconditioners: cheap approximations of A⁻¹ that conjugate gradients and GMRES start every step from.

    diag(A) ≈ (1/m) Σⱼ zⱼ ⊙ A zⱼ,   zⱼ random signs

Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix". Differs: entries are made positive,
and those below a thousandth of the mean are raised to it, since a sampled diagonal can be zero or negative where the
true one is not. Cost: m products with A at once (`jax.vmap`), one after the other where m vectors would not fit.
Memory: m vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_options, suggest_names
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Matvec, Preconditioner

_BATCHED_ENTRIES = 4_000_000  # 16 MB in float32: above, the probes run one by one


@suggest_names
def jacobi(probes: int = 8) -> Preconditioner:
    """Divide by the diagonal of A, estimated from `probes` products with random signs (Hutchinson).

    Args:
        probes: number of random vectors; the error of the diagonal falls with its square root.

    Raises:
        InputError: if `probes` is not positive.

    >>> import hypergrad as hg
    >>> linear = hg.linear.cg(tol=1e-8, preconditioner=hg.linear.jacobi(probes=16))
    """
    check_options("jacobi", probes=probes)

    def build(matvec: Matvec, params: PyTree, hparams: PyTree, key: Array) -> Matvec:
        del hparams
        diagonal = hutchinson_diagonal(matvec, params, key, probes)
        mean = _total_mean(diagonal)
        inverse = jax.tree.map(lambda d: 1 / jnp.maximum(jnp.abs(d), jnp.where(mean > 0, 1e-3 * mean, 1).astype(d.dtype)), diagonal)
        return lambda v: jax.tree.map(lambda i, x: i * x, inverse, v)

    return build


def precondition(fn: Callable[[PyTree, PyTree, PyTree], PyTree]) -> Preconditioner:
    """Use your own approximate inverse.

    Args:
        fn: `(v, params, hparams) -> M⁻¹ v`, linear in v, symmetric and positive definite.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> linear = hg.linear.cg(tol=1e-8, preconditioner=hg.linear.precondition(lambda v, params, hparams: v / jnp.exp(hparams)))
    """
    return lambda matvec, params, hparams, key: lambda v: fn(v, params, hparams)


def hutchinson_diagonal(matvec: Matvec, like: PyTree, key: Array, probes: int) -> PyTree:
    """Unbiased estimate of the diagonal of A, a pytree like `like`."""
    def one(index: Array) -> PyTree:
        z = _tree.rademacher_like(key, like, index)
        return jax.tree.map(jnp.multiply, z, matvec(z))

    draws = jnp.arange(probes)
    batched = probes * _tree.size(like) <= _BATCHED_ENTRIES
    samples = jax.vmap(one)(draws) if batched else jax.lax.map(one, draws)
    return jax.tree.map(lambda s: jnp.mean(s, axis=0), samples)


def _total_mean(diagonal: PyTree) -> Array:
    ones = jax.tree.map(jnp.ones_like, diagonal)
    return _tree.vdot(jax.tree.map(jnp.abs, diagonal), ones) / max(_tree.size(diagonal), 1)

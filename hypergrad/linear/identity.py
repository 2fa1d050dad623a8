r"""No linear solve at all: the inverse is taken to be a multiple of the identity (T1-T2).

    v = α b   in place of   A v = b

Source: Luketina, Berglund, Greff & Raiko 2016, arXiv:1511.06727; the term K = 0 of Lorraine, Vicol & Duvenaud 2020,
arXiv:1911.02590. Differs: α is an argument; the first paper drops it.
Cost: nothing. The direction is right where A is close to a multiple of the identity; the length is right where α is its
inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Linear, LinearResult, Matvec


@options(step_size=Number(above=0))
def identity(step_size: ArrayLike = 1.0) -> Linear:
    """Use `step_size` times the right-hand side for the solution: the cheapest hypergradient there is.

    It makes no product and claims nothing: the residual is NaN, since it is never computed, and `inverse` is infinite,
    so `error_estimate` is infinite too.

    Args:
        step_size: α, in units of an inverse eigenvalue of A; usually the learning rate of the inner problem.

    Raises:
        InputError: if the step size is not positive.

    >>> import hypergrad as hg
    >>> linear = hg.linear.identity(step_size=0.1)
    """
    return Linear(_solve, {"step_size": step_size}, claims=False, symmetric=False, looks=False, entrywise=True)


def _solve(
    matvec: Matvec, rhs: PyTree, *, start: PyTree, precondition: Matvec | None, options: Mapping[str, Array], key: Array
) -> LinearResult:
    del matvec, start, precondition, key
    never = jnp.asarray(jnp.nan, _tree.dtype(rhs))
    solution = _tree.scale(options["step_size"], rhs)
    return LinearResult(solution, never, jnp.int32(0), jnp.int32(Status.OK), unknown_inverse)


def unknown_inverse(residual: PyTree) -> PyTree:
    """A⁻¹ r where nothing is known about A: infinite in every entry."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), residual)

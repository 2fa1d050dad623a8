"""Numbers that may change from call to call without recompiling: they travel in a solver's state as arrays."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._tree import PyTree


def default_tol(tol: ArrayLike | None, like: PyTree) -> Array:
    """A traced tolerance; None stands for what the precision supports: 1e-6 in float32, 1e-10 in float64."""
    if tol is None:
        eps = _tree.eps(like)
        tol = 1e-10 if eps < 1e-12 else 1e-6 if eps < 1e-5 else 1e-2
    return jnp.asarray(tol).astype(_tree.dtype(like))


def as_options(options: Mapping[str, ArrayLike | None], like: PyTree) -> dict[str, Array]:
    """Options as scalar arrays of one dtype each, whatever type they were given in, so that a new value fits the old
    trace.

    A tolerance of None becomes the default for the dtype of `like`.
    """

    def convert(name: str, value: ArrayLike | None) -> Array:
        if value is None or name == "tol":
            return default_tol(value, like)
        integer = jnp.issubdtype(jnp.result_type(value), jnp.integer)
        return jnp.asarray(value).astype(jnp.int32 if integer else _tree.dtype(like))

    return {name: convert(name, value) for name, value in options.items()}

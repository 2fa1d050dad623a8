r"""Mixture weights through softmax: λ = softmax(u) over the last axis."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad.domains._domain import Domain
from hypergrad.domains._maps import compiled, creep, huge, reach


def simplex() -> Domain:
    r"""λ ≥ 0 with sum 1 over the last axis, through softmax(u): mixture weights.

    Corners and edges belong to the domain, since rounding reaches them, but the derivative vanishes there: start
    inside.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.simplex().to_constrained(jnp.zeros(4))[0])
    0.25
    """

    def settle(u: Array, before: Array) -> Array:
        u = jnp.clip(u, -huge(u), huge(u))
        u = u - jnp.max(u, axis=-1, keepdims=True)
        u = jnp.maximum(u, creep(before - jnp.max(before, axis=-1, keepdims=True)))
        return u - jnp.mean(u, axis=-1, keepdims=True)

    def contains(x: np.ndarray) -> np.ndarray:
        if x.ndim == 0:
            return np.zeros((), bool)
        off = np.abs(np.sum(x, axis=-1, keepdims=True, dtype=np.float64) - 1)
        return (x >= 0) & (off <= math.sqrt(float(jnp.finfo(x.dtype).eps)))

    return Domain(
        "simplex()",
        _softmax,
        _softmax_inverse,
        settle,
        contains,
        "at least 0 with sum 1 over the last axis",
        "divide an array of positive numbers by its sum",
    )


@compiled
def _softmax(u: Array) -> Array:
    return jax.nn.softmax(jnp.clip(u, -huge(u), huge(u)), axis=-1)


@compiled
def _softmax_inverse(x: Array) -> Array:
    peak = jnp.log(jnp.max(x, axis=-1, keepdims=True))
    u = jnp.where(x > 0, jnp.log(_tree.positive(x)), peak - reach(x))
    return u - jnp.mean(u, axis=-1, keepdims=True)

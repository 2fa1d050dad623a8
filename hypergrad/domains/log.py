r"""Positive numbers through the exponential: λ = exp(u)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad.domains._domain import Domain
from hypergrad.domains._maps import compiled, exponents, reach


def log() -> Domain:
    r"""λ > 0 through exp(u): a step of the outer optimizer multiplies λ by a factor at any magnitude.

    u is clipped where exp(u) would leave the normal range of the dtype (1e-38 to 1e38 in float32).

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> bool(jnp.isfinite(hg.domains.log().to_constrained(jnp.float32(1e30))))
    True
    """
    return Domain(
        "log()",
        _exp,
        _log,
        lambda u, before: jnp.clip(jnp.clip(u, before - reach(u), before + reach(u)), *exponents(u, 0.99)),
        lambda x: np.isfinite(x) & (x > 0),
        "greater than 0",
        "start from a small positive number such as 1e-6",
    )


@compiled
def _exp(u: Array) -> Array:
    return jnp.exp(jnp.clip(u, *exponents(u, 0.999)))


@compiled
def _log(x: Array) -> Array:
    return jnp.clip(jnp.log(x), *exponents(x, 0.99))

r"""Positive numbers through softplus: λ = log(1 + exp(u)) + tiny."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad.domains._domain import Domain
from hypergrad.domains._maps import compiled, creep, huge, tiny


def positive() -> Domain:
    r"""λ > 0 through softplus, `log(1 + exp(u)) + tiny`: steps are additive where λ is large, multiplicative near zero.

    For a hyperparameter whose order of magnitude is unknown (a regularization strength), use `log()`.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.positive().to_constrained(jnp.float32(-1e30))) > 0
    True
    """
    return Domain(
        "positive()",
        _softplus,
        _softplus_inverse,
        lambda u, before: jnp.clip(u, creep(before), huge(u)),
        lambda x: np.isfinite(x) & (x > 0),
        "greater than 0",
        "start from a small positive number such as 1e-6",
    )


@compiled
def _softplus(u: Array) -> Array:
    return jax.nn.softplus(jnp.clip(u, -huge(u), huge(u))) + tiny(u)


@compiled
def _softplus_inverse(x: Array) -> Array:
    y = x - tiny(x)
    return jnp.where(y > 0, y + jnp.log(-jnp.expm1(-_tree.positive(y))), math.log(tiny(x))).astype(x.dtype)

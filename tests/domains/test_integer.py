"""Whole numbers: rounded where the losses look, smooth where they are tuned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import domains
from tests._helpers import tol


def test_the_integer_derivative_is_that_of_the_unrounded():
    u = jnp.asarray(np.random.default_rng(0).standard_normal(20))
    slope = jax.jit(jax.vmap(jax.grad(domains.integer(-2, 7).to_constrained)))(u)
    sigmoid = 1 / (1 + np.exp(-np.asarray(u)))
    np.testing.assert_allclose(slope, 10 * sigmoid * (1 - sigmoid), rtol=tol(1e-12, 1e-5))


def test_the_integers_have_equal_shares():
    """Half a step beyond each end, so that the outermost numbers are as easy to reach as the others."""
    share = np.linspace(0.0005, 0.9995, 1000)
    x = domains.integer(-2, 7).to_constrained(jnp.asarray(np.log(share) - np.log1p(-share)))
    np.testing.assert_array_equal(np.unique(x, return_counts=True)[1], 100)

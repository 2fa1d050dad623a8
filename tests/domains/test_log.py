"""Magnitudes: λ = exp(u), over the whole normal range of the dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import domains
from tests._helpers import tol


def test_the_map_is_the_exponential_and_its_inverse_the_logarithm():
    u = jnp.asarray(np.random.default_rng(0).normal(size=9))
    np.testing.assert_allclose(domains.log().to_constrained(u), np.exp(u), rtol=tol(1e-14, 1e-6))
    x = jnp.asarray(np.logspace(-30, 30, 13))
    np.testing.assert_allclose(domains.log().to_unconstrained(x), np.log(np.asarray(x)), rtol=tol(1e-14, 1e-6))


def test_beyond_the_normal_range_the_map_is_clipped_and_has_no_derivative():
    value, slope = jax.vmap(jax.value_and_grad(domains.log().to_constrained))(jnp.asarray([-1e5, 1e5], jnp.float32))
    info = jnp.finfo(jnp.float32)
    assert info.tiny <= value[0] < 2 * info.tiny and info.max / 2 < value[1] <= info.max
    np.testing.assert_array_equal(slope, 0)


def test_one_step_moves_by_no_more_than_the_rounding_of_one():
    """By −log ε in u, a factor of 1/ε in λ, whatever the step that was proposed; smaller steps are left alone."""
    before = jnp.asarray([0.3, -2.0], jnp.float32)
    limit = -np.log(np.finfo(np.float32).eps)
    settle = domains.log().settle
    np.testing.assert_allclose(
        settle(before + jnp.asarray([1e9, -1e9], jnp.float32), before), before + np.asarray([limit, -limit], np.float32)
    )
    np.testing.assert_array_equal(settle(before + 3, before), before + 3)

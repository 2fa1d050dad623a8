"""Positive numbers: λ = softplus(u) + tiny, additive where λ is large and multiplicative near zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import domains
from tests._helpers import tol


def test_the_map_is_softplus_and_its_derivative_a_sigmoid():
    u = np.random.default_rng(0).normal(size=9)
    value, slope = jax.vmap(jax.value_and_grad(domains.positive().to_constrained))(jnp.asarray(u))
    np.testing.assert_allclose(value, np.log1p(np.exp(u)), rtol=tol(1e-14, 1e-6))
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-u)), rtol=tol(1e-14, 1e-6))


def test_small_numbers_move_by_a_factor_and_large_ones_by_a_difference():
    domain = domains.positive()
    u = domain.to_unconstrained(jnp.asarray([1e-9, 1e4]))
    np.testing.assert_allclose(u, [np.log(1e-9), 1e4], rtol=tol(1e-8, 1e-5))
    np.testing.assert_allclose(domain.to_constrained(u + 1), [np.e * 1e-9, 1e4 + 1], rtol=tol(1e-8, 1e-5))


def test_the_smallest_normal_number_has_a_finite_coordinate_and_comes_back():
    tiny = jnp.finfo(jnp.float32).tiny
    u = domains.positive().to_unconstrained(jnp.asarray(tiny, jnp.float32))
    assert np.isfinite(u)
    np.testing.assert_allclose(domains.positive().to_constrained(u), tiny, rtol=1.01)

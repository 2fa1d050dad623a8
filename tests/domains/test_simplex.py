"""Mixture weights: λ = softmax(u) over the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad import domains
from tests._helpers import tol


def test_the_map_is_softmax_and_its_inverse_the_centred_logarithm():
    u = np.random.default_rng(0).normal(size=(4, 3))
    expected = np.exp(u) / np.exp(u).sum(-1, keepdims=True)
    found = domains.simplex().to_constrained(jnp.asarray(u))
    np.testing.assert_allclose(found, expected, rtol=tol(1e-14, 1e-6))
    back = domains.simplex().to_unconstrained(found)
    np.testing.assert_allclose(back, u - u.mean(-1, keepdims=True), atol=tol(1e-14, 1e-6))


def test_the_derivative_is_that_of_softmax_and_keeps_the_sum():
    """dλ/du = diag(λ) − λλᵀ."""
    u = jnp.asarray(np.random.default_rng(1).normal(size=3))
    x = np.asarray(domains.simplex().to_constrained(u))
    slope = jax.jacobian(domains.simplex().to_constrained)(u)
    np.testing.assert_allclose(slope, np.diag(x) - np.outer(x, x), atol=tol(1e-15, 1e-7))


def test_settling_changes_coordinates_and_no_weight():
    u = jnp.asarray([3.0, 5.0, 4.0])
    settled = domains.simplex().settle(u, u)
    np.testing.assert_allclose(settled, [-1, 1, 0], atol=tol(1e-14, 1e-6))
    np.testing.assert_allclose(*map(domains.simplex().to_constrained, (settled, u)), rtol=tol(1e-14, 1e-6))

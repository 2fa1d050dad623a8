"""An interval: a sigmoid between its ends, accurate to the distance from either of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import domains
from tests._helpers import tol


@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (-3.3, 0.7), (5, 5.01)])
def test_the_map_is_a_sigmoid_and_its_inverse_a_logit(lo, hi):
    u = np.random.default_rng(0).normal(size=9)
    share = 1 / (1 + np.exp(-u))
    found = domains.interval(lo, hi).to_constrained(jnp.asarray(u))
    np.testing.assert_allclose(found, lo + (hi - lo) * share, rtol=tol(1e-14, 1e-6), atol=tol(1e-14, 1e-6))
    x = jnp.asarray(lo + (hi - lo) * np.asarray([0.25, 0.5]))
    np.testing.assert_allclose(domains.interval(lo, hi).to_unconstrained(x), [-np.log(3), 0], atol=tol(1e-12, 1e-3))


def test_both_ends_of_an_interval_round_trip_to_their_distance():
    unit = domains.interval(0, 1)
    x = jnp.asarray([1e-30, 1e-12, 1e-3])
    np.testing.assert_allclose(unit.to_constrained(unit.to_unconstrained(x)), x, rtol=tol(1e-13, 1e-5))
    # The distance to the far end, which the rounded value itself cannot show, is in the derivative.
    slope = jax.jit(jax.vmap(jax.grad(unit.to_constrained)))(jnp.asarray([30.0, -30.0]))
    np.testing.assert_allclose(slope, np.exp(-30.0), rtol=tol(1e-12, 1e-5))

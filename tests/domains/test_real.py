"""Every finite number: no transform, and no limit to a step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from hypergrad import domains


def test_coordinates_are_the_numbers_themselves_and_a_step_is_taken_whole():
    x = jnp.asarray([-1e30, 0.3, 7.0])
    domain = domains.real()
    assert domain.to_constrained(x) is x and domain.to_unconstrained(x) is x
    assert domain.settle(x + 1e20, x) is not x
    np.testing.assert_array_equal(domain.settle(x + 1e20, x), x + 1e20)
    np.testing.assert_array_equal(domain.contains(np.asarray([1.0, np.inf, np.nan])), [True, False, False])

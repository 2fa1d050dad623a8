"""`hg.inner.projected` is `hg.inner.proximal` of a constraint; its problems are in `test_proximal.py`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import tol
from tests.inner._solve import solve, status

C = jnp.asarray([1.4, -0.3, 0.2, 2.0])


@pytest.mark.parametrize(
    "projection",
    [
        optax.projections.projection_simplex,
        optax.projections.projection_non_negative,
        optax.projections.projection_l2_ball,
        optax.projections.projection_l1_ball,
        lambda w: optax.projections.projection_box(w, -0.5, 1.0),
        lambda w: optax.projections.projection_hypercube(w),
    ],
    ids=["simplex", "non-negative", "l2 ball", "l1 ball", "box", "hypercube"],
)
def test_the_nearest_point_of_a_set_is_its_projection(projection):
    result = solve(hg.inner.projected(projection), lambda w, h, b: 0.5 * jnp.sum((w - C) ** 2), jnp.zeros(4) + 0.1)
    assert status(result) == "OK"
    np.testing.assert_allclose(result.params, projection(C), atol=tol(1e-9, 1e-5))

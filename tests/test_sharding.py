"""On a mesh of the type that `jax.make_mesh` makes by default, everything is as on one where XLA chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import hypergrad as hg
from hypergrad._sharding import COPIED, spread_by_xla
from tests._helpers import assert_trees_close, shard_rows, tol


@pytest.fixture
def spread(devices):
    return shard_rows(jnp.arange(8.0), devices[:2], AxisType.Explicit)


def test_xla_chooses_inside_and_the_results_are_spread_as_asked(spread):
    seen = []

    def relative(x, scale=1.0):
        seen.append(jax.typeof(x).sharding.spec[0])
        return scale * (x - x[1]), jnp.sum(x)

    jax.eval_shape(lambda: (seen.append(jax.typeof(spread).sharding.spec[0]), jnp.zeros(()))[1])
    found, total = jax.jit(spread_by_xla(relative, lambda x: (x, COPIED)))(spread, scale=2.0)
    assert seen == ["data", None]  # what the array's type says, outside and inside
    np.testing.assert_array_equal(np.asarray(found), 2 * np.arange(8) - 2)
    assert found.sharding.spec == spread.sharding.spec
    assert float(total) == 28


def test_other_arguments_are_left_to_the_function(devices):
    copied = shard_rows(jnp.arange(7.0), devices, AxisType.Explicit)
    seen = []
    spread_by_xla(lambda x: seen.append(jax.typeof(x)), lambda x: x)(copied)
    assert seen[0].sharding.mesh.axis_types == (AxisType.Explicit,)


def test_best_response_on_an_explicit_mesh(spread, devices):
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - b) ** 2) + jnp.sum(jnp.exp(h) * w**2), lambda w, h, b: jnp.sum(w))
    slope = jax.grad(lambda h, b: jnp.sum(hg.best_response(problem)(h, jnp.zeros(8), b) ** 2))
    given = jax.block_until_ready((spread / 8, shard_rows(jnp.ones(8), devices[:2], AxisType.Explicit)))
    found = jax.jit(slope)(*given)
    penalty = np.exp(np.arange(8) / 8)  # w = 1 / (1 + eʰ)
    assert_trees_close(np.asarray(found), -2 * penalty / (1 + penalty) ** 3, tol(1e-8, 1e-3))

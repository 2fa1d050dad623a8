"""Hyperparameters are drawn around the current ones with the spread asked for, each leaf and draw independently."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.responses._draws import draw_around, draw_between
from tests._helpers import assert_trees_equal

KEY = jax.random.key(3)
U = {"a": jnp.asarray([0.3, -1.2, 2.0]), "b": (jnp.asarray(0.7), None)}
SIGMA = {"a": jnp.asarray([0.1, 0.5, 2.0]), "b": (jnp.asarray(0.3), None)}


def test_draws_have_the_mean_and_the_spread_asked_for_and_are_independent():
    draws = 20_000
    found = draw_around(KEY, U, SIGMA, draws)
    table = np.concatenate([found["a"], found["b"][0][:, None]], axis=1)
    mean, sigma = np.asarray([0.3, -1.2, 2.0, 0.7]), np.asarray([0.1, 0.5, 2.0, 0.3])
    z = (table - mean) / sigma
    np.testing.assert_allclose(np.mean(z, axis=0), 0, atol=4 / np.sqrt(draws))
    np.testing.assert_allclose(np.cov(z.T), np.eye(4), atol=6 / np.sqrt(draws))


def test_shared_leaves_repeat_and_others_do_not():
    found = draw_around(KEY, U, SIGMA, 5, {"a": True, "b": (False, None)})
    assert found["a"].shape == (5, 3) and found["b"][0].shape == (5,)
    np.testing.assert_array_equal(found["a"], np.repeat(found["a"][:1], 5, axis=0))
    assert len(np.unique(found["b"][0])) == 5


def test_one_draw_has_no_axis_and_a_spread_of_zero_stays():
    found = draw_around(KEY, U, jax.tree.map(jnp.zeros_like, SIGMA))
    assert_trees_equal(found, U)
    assert draw_around(KEY, U, SIGMA)["b"][0].shape == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_draws_keep_the_dtype_of_the_leaves(dtype):
    u = jnp.zeros(4, dtype)
    assert draw_around(KEY, u, jnp.asarray(0.1), 3).dtype == dtype and draw_between(KEY, u, u + 1).dtype == dtype


def test_uniform_draws_fill_their_box():
    lo = {"a": jnp.asarray([-1.0, 2.0]), "b": jnp.asarray(5.0)}
    hi = {"a": jnp.asarray([1.0, 3.0]), "b": jnp.asarray(5.5)}
    found = jax.vmap(lambda key: draw_between(key, lo, hi))(jax.random.split(KEY, 4000))
    for name in lo:
        share = (np.asarray(found[name]) - np.asarray(lo[name])) / np.asarray(hi[name] - lo[name])
        assert np.min(share) >= 0 and np.max(share) <= 1
        np.testing.assert_allclose(np.mean(share, axis=0), 0.5, atol=4 / np.sqrt(12 * 4000))
        np.testing.assert_allclose(np.var(share, axis=0), 1 / 12, rtol=0.05)

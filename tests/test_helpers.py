"""The instruments are calibrated before anything is measured with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests._helpers import (
    assert_trees_close,
    assert_trees_equal,
    central_difference,
    random_like,
    relative_error,
    shard_rows,
    tol,
)


def test_tol_follows_the_precision_of_the_run(x64):
    assert tol(1e-9, 1e-3) == (1e-9 if x64 else 1e-3)
    assert jnp.asarray(1.0).dtype == (jnp.float64 if x64 else jnp.float32)


def test_central_difference_matches_autodiff_on_an_odd_tree():
    tree = {"a": None, "b": (random_like(0, jnp.zeros((2, 3))), [jnp.asarray(0.7)])}

    @jax.jit
    def f(t):
        matrix, (scalar,) = t["b"]
        return jnp.sum(jnp.sin(matrix * scalar)) + scalar**3

    eps = tol(1e-3, 2e-2)
    assert_trees_close(central_difference(f, tree, eps), jax.jit(jax.grad(f))(tree), tol(1e-9, 1e-3))


def test_central_difference_sees_a_wrong_gradient():
    x = random_like(0, jnp.zeros(4))
    found = central_difference(jax.jit(lambda v: jnp.sum(v**3)), x, tol(1e-3, 2e-2))
    x = np.asarray(x)
    assert relative_error(found, 3 * x**2) < tol(1e-9, 1e-3)
    assert relative_error(found, 2.97 * x**2) > 5e-3


def test_relative_error_is_relative_and_nan_is_never_close():
    assert relative_error(1e-20 * np.ones(3), 2e-20 * np.ones(3)) == pytest.approx(0.5)
    assert relative_error(np.array([np.nan]), np.ones(1)) == np.inf
    with pytest.raises(AssertionError, match="against"):
        relative_error(np.ones(2), np.ones(3))


def test_comparisons_fail_on_structure_shape_dtype_and_value():
    tree = {"w": jnp.ones(3)}
    assert_trees_close(tree, tree, 0.0)
    for other in ({"v": jnp.ones(3)}, {"w": jnp.ones((3, 1))}, {"w": 1.1 * jnp.ones(3)}):
        with pytest.raises(AssertionError):
            assert_trees_close(tree, other, 1e-3)
    with pytest.raises(AssertionError):
        assert_trees_equal(tree, {"w": jnp.ones(3, jnp.float16)})


def test_rows_are_spread_over_eight_devices(devices):
    sharded = shard_rows({"x": jnp.ones((16, 2)), "s": jnp.asarray(1.0)}, devices)
    assert len(devices) == 8
    assert len(sharded["x"].sharding.device_set) == 8
    assert sharded["x"].addressable_shards[0].data.shape == (2, 2)
    assert sharded["s"].is_fully_replicated

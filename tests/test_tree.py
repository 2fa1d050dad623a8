"""Arithmetic on pytrees where precision could be lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import _tree


def test_inner_products_of_half_precision_are_accumulated_in_single():
    """4096 · (1 + 2⁻⁸)² needs 17 bits more than half precision has, and 300² more than its range."""
    ones = jnp.full(4096, 1 + 2.0**-8, jnp.float16)
    assert _tree.vdot({"a": ones}, {"a": ones}).dtype == jnp.float32
    assert float(_tree.vdot({"a": ones}, {"a": ones})) == 4096 * (1 + 2.0**-8) ** 2
    large = jnp.full(3, 300.0, jnp.float16)
    assert float(_tree.vdot(large, large)) == 3 * 300.0**2
    np.testing.assert_allclose(float(_tree.norm(large)), 300 * 3**0.5, rtol=1e-6)


def test_norms_neither_underflow_nor_overflow():
    for size in (1e-30, 1e30):
        x = {"a": jnp.full(2, size, jnp.float32), "b": [jnp.full(2, -size, jnp.float32)]}
        np.testing.assert_allclose(float(_tree.norm(x)), 2 * size, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-110, -60, -45, -30, 20, 45, 60, 110])
def test_scaling_by_a_power_of_two_changes_no_bit_of_a_norm(exponent):
    x = {"a": jnp.asarray([3.0, -0.1, 0.7], jnp.float32), "b": jnp.asarray(1.3e-3, jnp.float32)}
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(2.0**exponent), x)
    assert float(_tree.norm(scaled)) == float(_tree.norm(x)) * 2.0**exponent


def test_the_norm_of_entries_next_to_the_largest_number_is_finite():
    x = jnp.full(2, 0.6 * jnp.finfo(jnp.float32).max, jnp.float32)
    np.testing.assert_allclose(float(_tree.norm(x)), 2**0.5 * float(x[0]), rtol=1e-6)
    assert np.isnan(float(_tree.norm(x.at[0].set(jnp.nan)))) and not np.isfinite(
        float(_tree.norm(x.at[0].set(jnp.inf)))
    )


def test_each_leaf_keeps_its_dtype():
    x = {"half": jnp.ones(2, jnp.float16), "single": jnp.ones(2, jnp.float32)}
    for y in (_tree.scale(2.0, x), _tree.axpy(2.0, x, x), _tree.where(True, x, x), _tree.zeros_like(x)):
        assert [leaf.dtype for leaf in y.values()] == [jnp.float16, jnp.float32]


def test_what_can_be_divided_by_is_positive_and_has_finite_derivatives():
    sizes = jnp.asarray([2.0, 0.0, -3.0, jnp.nan])
    np.testing.assert_array_equal(_tree.positive(sizes), [2.0, 1.0, 1.0, 1.0])
    assert _tree.positive(0.0) == 1 and _tree.positive(jnp.float32(5)).dtype == jnp.float32
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(1 / _tree.positive(x)))(sizes), [-0.25, 0.0, 0.0, 0.0])


def test_every_number_has_a_name_that_trackers_take():
    tree = {"layer": {"rate": jnp.ones((1, 2))}, "l2": 3.0, "pair": (jnp.zeros(()), np.arange(3.0))}
    assert _tree.numbers(tree) == {
        "l2": 3.0, "layer.rate.0.0": 1.0, "layer.rate.0.1": 1.0, "pair.0": 0.0, "pair.1.0": 0.0, "pair.1.1": 1.0,
        "pair.1.2": 2.0,
    }  # fmt: skip
    assert _tree.numbers(2.0) == {"hparams": 2.0} and _tree.numbers(jnp.ones(1)) == {"hparams.0": 1.0}
    assert _tree.numbers(tree["pair"], most=2) == {"0": 0.0, "1.min": 0.0, "1.mean": 1.0, "1.max": 2.0}
    assert _tree.numbers({"a.b": 1.0, "a": {"b": 2.0}}) == {"['a.b']": 1.0, "['a']['b']": 2.0}, "no number is lost"
    assert _tree.numbers({}) == {}

"""A model that holds its own response: what responds is told apart by its path, and each example has its row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_equal

PARAMS = {"plain": jnp.ones(3), "deep": [{"response": {"gate": jnp.full((3, 2), 0.1)}, "bias": jnp.zeros(2)}]}
CENTRE = {"a": jnp.asarray([0.5, -1.0]), "b": jnp.asarray(2.0)}


def test_base_and_slope_part_the_parameters_and_make_them_again():
    response = hg.responses.gated()
    weights = response.init(None, PARAMS, CENTRE)
    assert [jnp.shape(x) for x in jax.tree.leaves(weights.slope)] == [(3, 2)]
    assert len(jax.tree.leaves(weights.base)) == 2
    params, offset = response.apply(weights, CENTRE, CENTRE)
    assert_trees_equal(params, PARAMS)
    np.testing.assert_array_equal(offset, np.zeros(3))


def test_offsets_are_rows_in_the_order_of_the_leaves():
    response = hg.responses.gated()
    rows = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.arange(4.0)}
    _, offset = response.apply(response.init(None, PARAMS, CENTRE), rows, CENTRE)
    expected = np.column_stack([np.arange(0, 8, 2) - 0.5, np.arange(1, 8, 2) + 1.0, np.arange(4) - 2.0])
    np.testing.assert_array_equal(offset, expected)


def test_another_name_may_be_given_and_a_model_without_it_is_refused():
    assert hg.responses.gated(name="deep").init(None, PARAMS, CENTRE).base["deep"][0]["bias"] is None
    with pytest.raises(hg.InputError, match=r"gated: no leaf of params lies below 'gate_'"):
        hg.responses.gated(name="gate_").init(None, PARAMS, CENTRE)

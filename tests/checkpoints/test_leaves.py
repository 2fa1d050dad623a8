"""Leaves of a pytree as arrays on disk, and back in their place, with their types and devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import outer
from hypergrad.checkpoints._leaves import as_arrays, check_like, restore
from tests._helpers import assert_trees_equal, shard_rows


def test_keys_and_half_precision_become_plain_arrays_and_come_back():
    tree = {"half": jnp.arange(3, dtype=jnp.bfloat16), "key": jax.random.key(7), "n": 3, "none": None}
    arrays, entries = as_arrays(tree)
    assert [entry["path"] for entry in entries] == ["['half']", "['key']", "['n']"]
    found = restore(arrays, tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert found["half"].dtype == jnp.bfloat16 and found["n"] == 3 and isinstance(found["n"], int)
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(tree["key"])).all()
    check_like(entries, tree, "the checkpoint")
    with pytest.raises(ValueError, match=r"\['half'\]"):
        check_like(entries, tree | {"half": jnp.zeros(4, jnp.bfloat16)}, "the checkpoint")


def test_arrays_go_back_to_the_devices_of_the_like_tree(tmp_path, devices):
    tree = {"x": jnp.arange(32.0).reshape(16, 2)}
    outer.save(tmp_path, tree, step=1)
    placed = shard_rows(tree, devices)
    found = outer.load(tmp_path, placed).tree
    assert found["x"].sharding == placed["x"].sharding
    assert_trees_equal(found, tree)
    assert not outer.load(tmp_path, tree).tree["x"].committed


def test_a_leaf_that_is_no_array_is_refused_by_its_path(tmp_path):
    for leaf in (print, "text", np.asarray(["a"]), object()):
        with pytest.raises(TypeError, match=r"checkpoint: \['a'\]\[0\] is a .*nothing is pickled"):
            outer.save(tmp_path, {"a": [leaf]}, step=0)

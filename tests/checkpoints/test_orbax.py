"""Sharded arrays through Orbax, behind the same two functions."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import outer
from tests._helpers import shard_rows
from tests.reliability._runs import assert_same, at, interrupt, run

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:orbax", "ignore::ResourceWarning"
)

TREE = {
    "x": jnp.arange(32.0).reshape(16, 2),
    "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
    "key": jax.random.key(5),
    "n": 3,
    "host": np.arange(4.0),
}


def test_shards_go_back_to_their_devices(tmp_path, devices):
    store = outer.orbax(tmp_path)
    placed = TREE | {"x": shard_rows(TREE["x"], devices)}
    outer.save(store, placed, step=3)
    for like in (placed, TREE, TREE | {"x": shard_rows(TREE["x"], devices[:2])}):
        step, found = outer.load(store, like)
        assert step == 3 and found["x"].sharding.device_set == like["x"].sharding.device_set
        for name in ("x", "half", "host"):
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(TREE[name]))
            assert type(found[name]) is type(TREE[name]) and found[name].dtype == TREE[name].dtype
        assert found["n"] == 3 and type(found["n"]) is int
        np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(TREE["key"]))


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    store = outer.orbax(tmp_path)
    outer.save(store, TREE, step=1)
    path = outer.save(store, TREE, step=2)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    assert len(files) > 3
    for file in files:
        kept = file.read_bytes()
        data = bytearray(kept)
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert outer.load(store, TREE).step == 1
        assert any(str(file) in str(w.message) for w in caught)
        file.write_bytes(kept)


def test_npz_and_orbax_do_not_take_each_other_for_granted(tmp_path):
    outer.save(outer.orbax(tmp_path), {"a": jnp.ones(2)}, step=1)
    with pytest.raises(ValueError, match=r"was written with 'orbax', not 'npz': pass hg.outer.orbax\(folder\)"):
        outer.load(tmp_path, {"a": jnp.ones(2)})


def test_a_run_goes_on_from_orbax_to_the_bit(tmp_path):
    run(outer.orbax(tmp_path), callbacks=at(5, interrupt), every=100)
    assert_same(run(outer.orbax(tmp_path), every=100), run())

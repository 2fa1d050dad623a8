"""The state of a run as one vector per dtype: the same numbers, in few arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.outer._carry import AS_IT_IS, carry
from hypergrad.outer._loop import Driver
from tests._helpers import shard_rows
from tests.outer._ridge import START, TRAIN, VALID, ridge

STATE = {
    "scalar": jnp.float32(1.5),
    "matrix": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
    "nan": jnp.full(3, jnp.nan, jnp.float32),
    "step": jnp.int32(-3),
    "count": jnp.int32(9),
    "flag": jnp.bool_(True),
    "key": jax.random.key(3),
    "large": jnp.linspace(0, 1, 300, dtype=jnp.float32),
    "empty": jnp.zeros((0, 2), jnp.float32),
    "none": None,
}


def bits(tree):
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, x.committed, x.devices(), np.asarray(x).tobytes()) for x in leaves]


@pytest.mark.parametrize("committed", [False, True])
def test_small_leaves_of_a_dtype_are_one_vector_and_come_back_to_the_bit(committed):
    state = jax.device_put(STATE, jax.devices()[1]) if committed else STATE
    form = carry(state, None)
    held = form.seal(state)
    vectors, alone = held
    assert sorted((str(vector.dtype), vector.shape) for vector in vectors) == [("float32", (10,)), ("int32", (2,))]
    assert len(alone) == 4, "the only boolean, the key, the empty and the large leaf"
    assert jax.tree.structure(form.open(held)) == jax.tree.structure(state)
    assert bits(form.open(held)) == bits(state)
    assert bits(jax.jit(form.unpack)(held)) == bits(state)
    assert bits(form.open(jax.jit(form.pack)(state))) == bits(state)


def test_what_is_spread_over_devices_stays_as_it_is(devices):
    spread = shard_rows(jnp.arange(16.0).reshape(8, 2), devices)
    assert carry(STATE, spread) is AS_IT_IS and carry(STATE | {"large": spread}) is AS_IT_IS
    assert carry({"one": jnp.ones(2)}) is AS_IT_IS, "there is nothing to put together"


@pytest.mark.parametrize("several", [1, 5])
def test_a_call_takes_and_returns_one_vector_for_each_dtype(several, monkeypatch):
    seen, advance = [], Driver.advance

    def look(self):
        seen.append((jax.tree.leaves(self.run.held), self.run.loop))
        return advance(self)

    monkeypatch.setattr(Driver, "advance", look)
    hg.tune(
        ridge(),
        START,
        {"l2": 0.1},
        TRAIN,
        VALID,
        outer=optax.adam(0.1),
        steps=10,
        steps_per_call=several,
        progress=False,
    )
    assert len(seen) == 10 // several
    for held, loop in seen:
        leaves = jax.tree.leaves(loop)
        assert len(leaves) > 8 and sum(x.size for x in leaves) == sum(x.size for x in held)
        assert len(held) == len({x.dtype for x in leaves})

"""Batches: drawn from the rows, uniformly, paired, and the same inside and outside jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad._data import Minibatches, Stacked, draw, is_random, kind, minibatches, prepare, stream
from hypergrad._solver import InputError, InputTypeError

ROWS = {"x": jnp.arange(40.0).reshape(20, 2), "y": (jnp.arange(20), None)}


def test_rows_stay_paired(key):
    batch = draw(minibatches(ROWS, 8), key, 0)
    assert batch["x"].shape == (8, 2) and batch["y"][1] is None
    np.testing.assert_array_equal(batch["x"][:, 0], 2 * batch["y"][0])


def test_rows_are_drawn_uniformly(key):
    """Each of 20 rows in 20 000 draws: mean 1000, within five standard errors."""
    data = minibatches(ROWS, 10)
    drawn = jax.vmap(lambda k: draw(data, k, 0)["y"][0])(jax.random.split(key, 2000))
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=20)
    assert counts.sum() == 20_000 and np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000 * 0.95))


def test_drawing_works_inside_jit_and_does_not_retrace(key):
    traces = []

    @jax.jit
    def step(data, key):
        traces.append(1)
        return draw(data, key, 0)

    data = minibatches(ROWS, 3)
    for k in jax.random.split(key, 3):
        np.testing.assert_array_equal(step(data, k)["x"], draw(data, k, 0)["x"])
    assert len(traces) == 1
    step(minibatches(ROWS, 4), key)
    assert len(traces) == 2, "another size is another program"


def test_a_full_batch_is_drawn_as_it_is():
    assert draw(ROWS, None, 3) is ROWS
    assert draw(None, None, 3) is None


def test_stacked_batches_are_cycled_through():
    data = Stacked(jnp.arange(6.0).reshape(3, 2))
    steps = [jax.jit(draw)(data, None, jnp.int32(t))[0] for t in range(5)]
    np.testing.assert_array_equal(steps, [0, 2, 4, 0, 2])


def test_only_batches_are_random():
    assert is_random(minibatches(ROWS, 3)) and is_random(Stacked(jnp.ones(3)))
    assert not is_random(ROWS) and not is_random(None)


def test_minibatches_need_a_key():
    with pytest.raises(InputError, match=r"key=jax\.random\.key\(0\)"):
        draw(minibatches(ROWS, 3), None, 0)


def test_a_stream_is_not_for_jit():
    with pytest.raises(InputTypeError, match=r"hg\.tune"):
        draw(stream([ROWS], 1), None, 0)


def test_a_stream_starts_anew_what_can_be_started_anew():
    batches = [np.full(2, i) for i in range(3)]
    pulled = stream(batches, 2)
    np.testing.assert_array_equal([pulled.next().batches[:, 0] for _ in range(3)], [[0, 1], [2, 0], [1, 2]])
    once = stream(iter(batches), 3)
    once.next()
    with pytest.raises(InputError, match="ended after 0 of the 3"):
        once.next()


def test_host_batches_are_stacked_on_the_host():
    assert isinstance(stream([np.ones(2)], 2).next().batches, np.ndarray)
    mixed = stream([{"x": jnp.ones(2), "y": np.zeros(2, np.float32)}], 2).next().batches
    assert isinstance(mixed["x"], jax.Array) and isinstance(mixed["y"], np.ndarray)
    assert stream([3.0], 2).next().batches.shape == (2,)


class Tensor:
    """What a tensor of another library looks like."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


def test_foreign_arrays_are_taken_as_arrays():
    batch = prepare("train", {"x": Tensor([[1.0, 2.0]]), "flag": True})
    assert isinstance(batch["x"], np.ndarray) and batch["x"].shape == (1, 2)
    assert isinstance(minibatches((Tensor(np.ones((4, 2))), Tensor(np.ones(4))), 2), Minibatches)


def test_pairs_of_other_kinds_are_left_alone():
    for batch in (
        (np.ones((3, 2)), 1.0),
        {"a": np.ones(3), "b": np.ones(4)},
        (np.ones(3), np.ones(4), np.ones(5)),
        (np.ones(3), {"b": np.ones(4)}),
        (jax.random.key(0), jnp.ones(3)),
    ):
        found = prepare("train", batch)
        assert jax.tree.structure(found) == jax.tree.structure(batch)
        assert [np.shape(x) for x in jax.tree.leaves(found)] == [np.shape(x) for x in jax.tree.leaves(batch)]


def test_kinds_print_shapes_and_dtypes():
    batch = {"x": np.ones((2, 3), np.float32), "y": jnp.ones(2, jnp.int32)}
    assert kind(batch) == {"x": "float32[2, 3]", "y": "int32[2]"}


def test_either_precision_draws_the_same_rows(key):
    data = minibatches(jnp.arange(1000), 50)
    rows = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            rows.append(np.asarray(draw(data, key, 0)))
    np.testing.assert_array_equal(*rows)

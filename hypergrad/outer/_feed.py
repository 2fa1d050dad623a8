"""Data as `hg.tune` feeds them to a step: arrays once, minibatches with the key, streams batch by batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._data import Minibatches, Stream, kind, prepare
from hypergrad._jaxpr.labels import check_concrete_data
from hypergrad._solver import InputError
from hypergrad._tree import PyTree


def source(name: str, data: PyTree, key: Array | None) -> Callable[[], PyTree]:
    """A function that gives the data of the next outer step, on the device."""
    if isinstance(data, Minibatches) and key is None:
        raise InputError(
            f"tune: {name} is hg.minibatches, which draws rows at random, but key is None: pass key=jax.random.key(0)."
        )
    if isinstance(data, Stream):
        return functools.partial(_pull, name, data, [])
    data = prepare(name, data)
    check_concrete_data(name, data)
    data = jax.tree.map(jnp.asarray, data)
    return lambda: data


def pull(
    streams: Mapping[str, Stream], train: Callable[[], PyTree], valid: Callable[[], PyTree]
) -> tuple[PyTree, PyTree]:
    """The data of the next outer step. What the streams gave for the step before has been used."""
    for stream in streams.values():
        stream.forget()
    return train(), valid()


def give_back(streams: Mapping[str, Stream], positions: Callable[[], Mapping[str, int]]) -> None:
    """Put what was pulled for a step that was not taken back into the streams, for the next run in this process."""
    for name, position in positions().items():
        with contextlib.suppress(InputError):
            streams[name].seek(position)


def _pull(name: str, data: Stream, first: list[Any]) -> PyTree:
    batches = data.next()
    found = kind(batches.batches)
    if not first:
        first.append(found)
    if found != first[0]:
        raise InputError(
            f"tune: the batches of {name} changed from {first[0]} to {found} (first axis: their number): "
            "every shape needs a compilation of its own: drop or pad the odd batch."
        )
    return batches

"""How `hg.tune` feeds data to a step: arrays once, minibatches with the key, streams batch by batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._data import Minibatches, Stream, kind, prepare, stack
from hypergrad._jaxpr.labels import check_concrete_data
from hypergrad._solver import InputError
from hypergrad._tree import PyTree


def source(name: str, data: PyTree, key: Array | None, most: int) -> Callable[[int], PyTree]:
    """Make a function that returns the data of the next outer steps, on the device.

    Args:
        name: name of the argument.
        data: arrays, minibatches, a stream or None.
        key: key of the run.
        most: steps that one call takes. Above 1, a stream yields one batch for each step, on a new leading axis of this
            length, whose last entries are copies where fewer steps are asked for.
    """
    if isinstance(data, Minibatches) and key is None:
        raise InputError(
            f"tune: {name} is hg.minibatches, which draws rows at random, but key is None: pass key=jax.random.key(0)."
        )
    if isinstance(data, Stream):
        return functools.partial(_pull, name, data, [], most)
    data = prepare(name, data)
    check_concrete_data(name, data)
    data = jax.tree.map(jnp.asarray, data)
    return lambda steps: data


def pull(
    streams: Mapping[str, Stream], train: Callable[[int], PyTree], valid: Callable[[int], PyTree], steps: int
) -> tuple[PyTree, PyTree]:
    """Return the data of the next outer steps. Batches that the streams returned for earlier steps have been used."""
    for stream in streams.values():
        stream.forget()
    return train(steps), valid(steps)


def of_one_step(streams: Collection[str], train: PyTree, valid: PyTree, most: int) -> tuple[PyTree, PyTree]:
    """Return the data of the first of several steps."""
    first = lambda name, data: jax.tree.map(lambda x: x[0], data) if most > 1 and name in streams else data
    return first("train", train), first("valid", valid)


def give_back(streams: Mapping[str, Stream], cursors: Callable[[], Mapping[str, Any]]) -> None:
    """Put the batches pulled for a step that was not taken back into the streams, for the next run in this process."""
    for name, cursor in cursors().items():
        with contextlib.suppress(InputError):
            streams[name].seek(cursor.position)


def _pull(name: str, data: Stream, first: list[Any], most: int, steps: int) -> PyTree:
    pulled = []
    for _ in range(steps):
        pulled.append(data.next())
        found = kind(pulled[-1].batches)
        if not first:
            first.append(found)
        if found != first[0]:
            raise InputError(
                f"tune: the batches of {name} changed from {first[0]} to {found} (first axis: their number): "
                "every shape needs a compilation of its own: drop or pad the odd batch."
            )
    if most == 1:
        return pulled[0]
    return jax.tree.map(stack, *pulled, *[pulled[-1]] * (most - steps))

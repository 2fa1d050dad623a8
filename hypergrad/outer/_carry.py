"""The state of a run as few vectors, from one call of several short steps to the next.

Every array that a compiled program takes and returns costs 1 to 3 µs, and a loop within it copies each by itself: the
dozen numbers of a small problem cost more than its step. So the small leaves of one dtype become one vector, inside the
program and between two calls; large leaves stay as they are, and so does everything that is spread over devices.
Cost: a copy of the small leaves in each step. Nothing is compiled for it; the first call packs them on the host, where
they are also taken apart when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad import _tree
from hypergrad._tree import PyTree

_ENTRIES = 256  # a larger leaf stays as it is


class Carry(NamedTuple):
    """A bijection between the state and a short list of arrays, to be used inside a compiled program.

    Attributes:
        pack: state -> arrays.
        unpack: the inverse.
        seal: `pack` on the host.
        open: `unpack` on the host.
    """

    pack: Callable[[PyTree], Any]
    unpack: Callable[[Any], PyTree]
    seal: Callable[[PyTree], Any]
    open: Callable[[Any], PyTree]


def _same(state: PyTree) -> PyTree:  # with a name, so that a result that holds it can be pickled
    return state


AS_IT_IS = Carry(_same, _same, _same, _same)


def carry(state: PyTree, *data: PyTree) -> Carry:
    """One vector for the small leaves of each dtype, if the state and the data lie on one device.

    Args:
        state: state before the first step; later ones have the same shapes and dtypes.
        data: whatever else the program is called with.
    """
    leaves, treedef = jax.tree.flatten(state)
    places = {leaf.sharding for leaf in jax.tree.leaves((state, data)) if isinstance(leaf, jax.Array)}
    groups: dict[np.dtype, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if not _tree.is_key(leaf) and 0 < leaf.size <= _ENTRIES:
            groups.setdefault(leaf.dtype, []).append(i)
    together = [group for group in groups.values() if len(group) > 1]
    if not together or len({device for place in places for device in place.device_set}) > 1:
        return AS_IT_IS
    alone = sorted(set(range(len(leaves))) - {i for group in together for i in group})
    shapes, ends = [leaf.shape for leaf in leaves], [np.cumsum([leaves[i].size for i in group]) for group in together]

    def pack(tree: PyTree) -> tuple[list[Any], list[Any]]:
        parts = jax.tree.leaves(tree)
        vectors = [jnp.concatenate([parts[i].ravel() for i in group]) for group in together]
        return vectors, [parts[i] for i in alone]

    def unpack(arrays: tuple[list[Any], list[Any]]) -> PyTree:
        parts: list[Any] = [None] * len(leaves)
        for vector, group, last in zip(arrays[0], together, ends, strict=True):
            for i, first, end in zip(group, [0, *last], last, strict=False):
                parts[i] = lax.slice(vector, (first,), (end,)).reshape(shapes[i])
        return treedef.unflatten(_filled(parts, alone, arrays[1]))

    def seal(tree: PyTree) -> tuple[list[Any], list[Any]]:
        parts = jax.tree.leaves(tree)
        bound = [leaf for leaf in parts if isinstance(leaf, jax.Array) and leaf.committed]
        vectors = [np.concatenate([np.asarray(parts[i]).ravel() for i in group]) for group in together]
        return [_put(vector, bound) for vector in vectors], [parts[i] for i in alone]

    def opened(arrays: tuple[list[Any], list[Any]]) -> PyTree:
        parts: list[Any] = [None] * len(leaves)
        for vector, group, last in zip(arrays[0], together, ends, strict=True):
            bound = [vector] if vector.committed else []
            for i, part in zip(group, np.split(np.asarray(vector), last[:-1]), strict=True):
                parts[i] = _put(part.reshape(shapes[i]), bound)
        return treedef.unflatten(_filled(parts, alone, arrays[1]))

    return Carry(pack, unpack, seal, opened)


def _put(part: np.ndarray, bound: list[jax.Array]) -> jax.Array:
    """On the device to which other arrays are bound; where none is, an array that is free to follow the data."""
    return jax.device_put(part, bound[0].sharding) if bound else jnp.array(part)


def _filled(parts: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    for i, value in zip(places, values, strict=True):
        parts[i] = value
    return parts

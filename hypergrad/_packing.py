"""Parameters of many small leaves as one vector, within one call.

A program of a solver holds some thirty copies of the loss's gradient and as many sums, differences and norms of
parameters between them. XLA on CPU compiles each kernel by itself, and each sum over a tree is a kernel a leaf: a
network of 20 leaves takes nine times as long to trace and three times as long to compile as the same network in one
vector. One more copy of the parameters an evaluation is the price, which is why large leaves stay as they are; and so
do leaves that may lie on several devices, where a vector would have to be gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._loops import isolated
from hypergrad._tree import PyTree

_LEAVES = 8  # at most so many leaves are left as they are
_ENTRIES = 2**18  # above it, a copy costs more than it saves


class Packing(NamedTuple):
    """A bijection between pytrees like the parameters and what a solver computes with.

    Attributes:
        pack: pytree like the parameters -> one vector, or the pytree itself.
        unpack: the inverse, linear.
    """

    pack: Callable[[PyTree], PyTree]
    unpack: Callable[[PyTree], PyTree]


AS_IT_IS = Packing(lambda x: x, lambda x: x)


def packing(like: PyTree) -> Packing:
    """One vector for parameters of many small leaves of one dtype on one device; everything else stays as it is."""
    leaves, treedef = jax.tree.flatten(like)
    small = len(leaves) > _LEAVES and 0 < _tree.size(like) <= _ENTRIES
    if not small or len({jnp.result_type(leaf) for leaf in leaves}) > 1 or jax.device_count() > 1:
        return AS_IT_IS
    shapes, dtype = [jnp.shape(leaf) for leaf in leaves], jnp.result_type(leaves[0])
    full = [i for i, shape in enumerate(shapes) if 0 not in shape]
    sizes = [int(np.prod(shapes[i])) for i in full]

    def pack(tree: PyTree) -> Array:
        parts = jax.tree.leaves(tree)
        return jnp.concatenate([parts[i].ravel() for i in full])

    # Where XLA fuses the slice of a leaf with what uses it, a kernel works for one leaf alone, since the offset is part
    # of it. Of leaves that are split off apart, those of one shape share their kernels, and compilation takes a third
    # less time.
    split = lambda vector: jax.lax.split(vector, sizes)

    def unpack(vector: Array) -> PyTree:
        # Empty leaves are made anew. Where one is split off, jaxlib 0.10 and 0.12 cannot compile a call of LAPACK on a
        # machine with one processor.
        parts = [jnp.zeros(shape, dtype) for shape in shapes]
        for i, part in zip(full, isolated(split, vector), strict=True):
            parts[i] = part.reshape(shapes[i])
        return treedef.unflatten(parts)

    return Packing(pack, unpack)

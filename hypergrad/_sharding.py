"""Support for arguments sharded over an Explicit mesh, the default of `jax.make_mesh`.

On an Explicit mesh the type of every array says how it is sharded, every operation has a rule for its result, and a
loop, a select or a linear map whose two sides are sharded differently is an error. On an Auto mesh XLA chooses. The
methods are written for an Auto mesh; this module alone makes them work on both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

COPIED: Any = PartitionSpec()  # to every device


def spread_by_xla(function: Callable[..., Any], results: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function, inside which XLA chooses how arrays are sharded.

    Args:
        function: a function of pytrees of arrays.
        results: function from the partition specs of the first arguments, as many as it takes, to those of the results,
            as a pytree prefix of the results.

    >>> import jax.numpy as jnp
    >>> from hypergrad._sharding import spread_by_xla
    >>> double = spread_by_xla(lambda x, times: times * x, lambda x: x)
    >>> float(double(jnp.ones(()), 2))
    2.0
    """
    leading = len(inspect.signature(results).parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        types = jax.tree.map(lambda x: jax.typeof(x).sharding, args[:leading])
        meshes = {of.mesh for of in jax.tree.leaves(types) if any(axis is not None for axis in of.spec)}
        if not meshes:
            return function(*args, **kwargs)
        specs = jax.tree.map(lambda of: of.spec, types)
        with jax.sharding.use_abstract_mesh(meshes.pop()):
            return jax.sharding.auto_axes(function, out_sharding=results(*specs))(*args, **kwargs)

    return call

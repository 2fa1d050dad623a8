"""Arguments that are spread over an Explicit mesh, which is what `jax.make_mesh` makes by default.

There the type of every array says how it is spread, every operation has a rule for its result, and a loop, a select or
a linear map whose two sides are spread differently is an error. On an Auto mesh XLA chooses. The methods here are
written for the second, and are made to serve both in this one place.
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
    """The same function, inside which XLA chooses how arrays are spread.

    Args:
        function: of pytrees of arrays.
        results: from how the first arguments are spread, as many as it takes, to how the results are: a pytree prefix
            of them, in the same partition specs.

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

"""Control flow that stays cheap under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")


def once(condition: Array, fn: Callable[[T], T], value: T) -> T:
    """`fn(value)` where the scalar condition holds, else `value`: a loop of at most one turn.

    Under `vmap`, `jax.lax.cond` with a batched predicate runs both branches on operands that are broadcast over the
    batch, including everything that the branches close over: sixteen problems copy their shared data sixteen times. The
    body of a loop closes over the data without copying them. Without `vmap` the two cost the same.

    Args:
        condition: boolean scalar.
        fn: function from a pytree to one of the same structure, shapes and dtypes.
        value: pytree of arrays.
    """
    turn = lambda carry: (jnp.zeros_like(carry[0]), fn(carry[1]))
    return jax.lax.while_loop(lambda carry: carry[0], turn, (condition, value))[1]

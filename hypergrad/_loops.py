"""Control flow that is cheap to run under `jax.vmap`, and cheap to compile."""

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


def isolated(fn: Callable[[Array], T], x: Array) -> T:
    """`fn(x)`, which XLA on CPU neither fuses with what uses the result nor, in reverse mode, with what yields the
    cotangent.

    XLA compiles each distinct kernel once per program, so parts that are fused with their surroundings are compiled
    again and again. This is a conditional whose predicate is always true; a barrier hides that from XLA until its
    simplifications are done. Other platforms, where a predicate would have to reach the host, compute `fn(x)` itself.

    Args:
        fn: function from an array to a pytree of arrays, without side effects.
        x: array.
    """

    def walled(x: Array) -> T:
        always = jax.lax.optimization_barrier(jnp.asarray(True))
        return jax.lax.cond(always, fn, lambda x: fn(jnp.zeros_like(x)), x)

    return jax.lax.platform_dependent(x, cpu=walled, default=fn)

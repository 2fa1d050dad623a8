"""Signs that rounding could turn: found in a program, and taken the other way.

An optimizer such as Lion moves each parameter by the sign of a number. Where that number is smaller than its own
rounding error its sign is arbitrary, and with it every later step.

Method: the function is traced to a jaxpr, and the jaxpr is evaluated with

    sign(x) → −sign(x) where |x| ≤ doubt · max |x|

Cost: one more trace, and an absolute value and a maximum for each sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from hypergrad._jaxpr.walk import inner_jaxpr, parts, rewritten
from hypergrad._tree import PyTree


def takes_signs(function: Callable[..., PyTree], *args: PyTree) -> bool:
    """Whether a function takes the sign of any number, in code of its own or nested.

    >>> import jax.numpy as jnp
    >>> from hypergrad._jaxpr.signs import takes_signs
    >>> takes_signs(lambda x: jnp.sign(x) + x, 1.0), takes_signs(jnp.sin, 1.0)
    (True, False)
    """
    return _holds(jax.make_jaxpr(function)(*args))


def _holds(program: Any) -> bool:
    eqns = inner_jaxpr(program).eqns
    return any(eqn.primitive.name == "sign" or any(_holds(part) for part in parts(eqn)) for eqn in eqns)


def doubted(function: Callable[..., PyTree], doubt: ArrayLike) -> Callable[..., PyTree]:
    """Return the same function, with the signs of small numbers taken the other way; zeros stay zeros.

    Args:
        function: a function of any pytrees of arrays.
        doubt: share of the largest number of an array up to which a number is small (dimensionless); 0 changes
            nothing.
    """

    def replace(eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
        if eqn.primitive.name != "sign" or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return None
        return [_other(inputs[0], doubt)]

    return rewritten(function, replace)


def _other(x: Array, doubt: ArrayLike) -> Array:
    size = jnp.abs(lax.stop_gradient(x))
    return jnp.where(size <= doubt * jnp.max(size, initial=0), -jnp.sign(x), jnp.sign(x))

"""Convolutions in the order of dimensions for which XLA has a fast routine on a CPU, inside loops as well.

On a CPU, XLA hands a convolution to a library if its input is ordered (batch, space, features), its kernel (space,
features in, features out) and its output like its input. It transposes other convolutions to that order, but only in
the outermost computation: inside a loop or a branch it leaves them as they are and computes them 6 to 47 times slower.
The derivatives of every convolution are in another order, however the model is written. Here the transpositions are
written out, so that a loop costs as much as its turns cost one by one, and gives the same bits. On other platforms the
program is not changed.

Method: the function is traced to a jaxpr, which is evaluated with its convolutions transposed; parts without
convolutions are left as they are. Nothing is rewritten outside a trace.
Cost: one walk over the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from hypergrad._jaxpr.walk import bind, called, evaluate, inner_jaxpr, parts

_CONVOLUTION = "conv_general_dilated"
_MOST_DIMENSIONS = 3  # spatial dimensions that the library supports

F = TypeVar("F", bound=Callable[..., Any])


def fast_convolutions(function: F) -> F:
    """Return the same function with convolutions that are as fast on a CPU inside loops as outside.

    Args:
        function: function from pytrees to a pytree of arrays, called in a trace, for example under `jax.jit`.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad._jaxpr.convolutions import fast_convolutions
    >>> float(jax.jit(fast_convolutions(lambda x: jnp.convolve(x, x)[1]))(jnp.arange(3.0)))
    0.0
    """

    @functools.wraps(function)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tracer)]
        if not traced:
            return function(*args, **kwargs)

        def run(*given: Any) -> Any:
            filled = list(leaves)
            for i, leaf in zip(traced, given, strict=True):
                filled[i] = leaf
            args, kwargs = jax.tree.unflatten(structure, filled)
            return function(*args, **kwargs)

        given = [leaves[i] for i in traced]
        program, shapes = jax.make_jaxpr(run, return_shape=True)(*given)
        results = evaluate(program, given, _replace)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten  # pyright: ignore[reportReturnType]


def _convolves(eqn: Any) -> bool:
    """Whether it is a convolution, or holds one."""
    inside = (operation for part in parts(eqn) for operation in inner_jaxpr(part).eqns)
    return eqn.primitive.name == _CONVOLUTION or any(map(_convolves, inside))


def _replace(eqn: Any, inputs: list[Any]) -> Any:
    if not _convolves(eqn) or eqn.params.get("branches_platforms"):
        return bind(eqn, inputs)
    if eqn.primitive.name != _CONVOLUTION:
        return _with_its_rule(eqn, inputs) if "call_jaxpr" in eqn.params and called(eqn) else None
    x, kernel = inputs
    dims = len(x.shape)
    first, last, space = 0, dims - 1, tuple(range(1, dims - 1))
    library = lax.ConvDimensionNumbers((first, last, *space), (last, last - 1, *range(dims - 2)), (first, last, *space))
    given = eqn.params["dimension_numbers"]
    served = 1 <= len(space) <= _MOST_DIMENSIONS and x.size and kernel.size and jnp.issubdtype(x.dtype, jnp.floating)
    if given == library or not served:
        return None

    def transposed(x: Array, kernel: Array) -> Array:
        (batch, features, *space), (outs, ins, *window), _ = given
        x = lax.transpose(x, (batch, *space, features))
        kernel = lax.transpose(kernel, (*window, ins, outs))
        out = lax.conv_general_dilated(x, kernel, **eqn.params | {"dimension_numbers": library})
        batch, features, *space = given.out_spec
        order = (batch, *space, features)
        return lax.transpose(out, [order.index(i) for i in range(dims)])

    as_it_is = lambda x, kernel: bind(eqn, [x, kernel])[0]
    return [lax.platform_dependent(x, kernel, cpu=transposed, default=as_it_is)]


def _with_its_rule(eqn: Any, inputs: list[Any]) -> Any:
    """A function with a derivative rule of its own keeps the rule; its values are computed by the new program."""
    fresh = jax.make_jaxpr(lambda *xs: evaluate(called(eqn), xs, _replace))(*inputs)
    return bind(eqn.replace(params=eqn.params | {"call_jaxpr": fresh}), inputs)

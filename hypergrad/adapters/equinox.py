r"""An equinox module as parameters, model state and two functions.

    model = hypergrad.adapters.equinox.split(net)                       # net(x) or net(x, key=key), one example
    model = hypergrad.adapters.equinox.split(*eqx.nn.make_with_state(Net)(key))         # with batch normalization

Equinox modules take a single example: both functions map them over the leading axis of x, which is named `"batch"` for
layers that look across it.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree
from hypergrad.adapters._model import Model, missing, narrowed, need_key


def split(module: Any, state: Any = None, *, batched: bool = False, axis_name: str = "batch") -> Model:
    """Split a module into what `hg.Problem` and a solver take.

    The parameters are a copy of the module in which everything but floating arrays is None, so that layers that share
    weights through `eqx.nn.Shared` continue to share them.

    Args:
        module: an `equinox.Module`, called as `module(x)`, with `key=` where it takes one, and with the state as its
            second argument where `state` is given.
        state: the state that `eqx.nn.make_with_state` returned with the module; None for a module without state.
        batched: whether the module takes a whole batch; if False, it is mapped over the leading axis of x.
        axis_name: name of that axis, for `eqx.nn.BatchNorm`.

    Returns:
        See `Model`.

    Raises:
        InputTypeError: for something that is not a module, or a module class that was not called.
        HypergradError: if equinox is not installed.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> from hypergrad.adapters.equinox import split
    >>> model = split(eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0)))
    >>> model.evaluate(model.params, model.model_state, jnp.ones((4, 3))).shape
    (4, 2)
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise missing("equinox", "equinox", error) from error
    if not isinstance(module, eqx.Module):
        hint = "call it first, as in split(Net(key=key))" if isinstance(module, type) else "pass an equinox.Module"
        found = module.__name__ if isinstance(module, type) else type(module).__name__
        raise InputTypeError(f"adapters.equinox: module must be an equinox.Module, found {found}: {hint}.")
    params, static = eqx.partition(module, eqx.is_inexact_array)
    fixed = eqx.nn.inference_mode(static)
    leaves, treedef = jax.tree.flatten(state)  # an eqx.nn.State may be used only once; its leaves any number of times
    noisy = "key" in inspect.signature(type(module).__call__).parameters

    def call(net: Any, x: Any, state: Any, key: Array | None) -> tuple[Any, Any]:
        options = {} if key is None else {"key": key}
        return (net(x, **options), None) if state is None else net(x, state, **options)

    def run(net: Any, x: Any, leaves: PyTree, key: Array | None) -> tuple[Any, PyTree]:
        state = jax.tree.unflatten(treedef, leaves)
        if batched:
            out, state = call(net, x, state, key)
        else:
            keys = None if key is None else jax.random.split(key, jnp.shape(jax.tree.leaves(x)[0])[0])
            out, state = jax.vmap(call, (None, 0, None, 0), (0, None), axis_name=axis_name)(net, x, state, keys)
        return out, jax.tree.leaves(state)

    draws = noisy and _draws(module)

    def train(params: PyTree, model_state: PyTree, x: Any, key: Array | None) -> tuple[Any, PyTree]:
        key = need_key("adapters.equinox", key) if draws else key
        return run(eqx.combine(params, static), narrowed(x, params), model_state, key if noisy else None)

    def evaluate(params: PyTree, model_state: PyTree, x: Any) -> Any:
        return run(eqx.combine(params, fixed), narrowed(x, params), model_state, None)[0]

    def merge(params: PyTree, model_state: PyTree) -> Any:
        net = eqx.combine(params, fixed)
        return net if state is None else (net, jax.tree.unflatten(treedef, model_state))

    return Model(params, leaves, train, evaluate, merge)


def _draws(module: Any) -> bool:
    """Whether a layer of the module is dropout that is switched on."""
    import equinox as eqx

    is_dropout = lambda x: isinstance(x, eqx.nn.Dropout)
    layers = jax.tree.leaves(module, is_leaf=is_dropout)
    return any(is_dropout(x) and not x.inference and not (isinstance(x.p, (int, float)) and x.p == 0) for x in layers)

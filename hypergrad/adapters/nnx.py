r"""A flax nnx module as parameters, model state and two functions.

    model = hypergrad.adapters.nnx.split(net)
    out, model_state = model.train(params, model_state, x, key)
    net = model.merge(params, model_state)

It differs from using `nnx.split` by hand: parameters and state are plain nested dicts; a fresh stream of random numbers
comes from the key of each step, whereas a frozen state would repeat one dropout mask; modes are set on a copy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree
from hypergrad.adapters._model import Model, missing, narrowed, need_key


def split(model: Any) -> Model:
    """Split a module into what `hg.Problem` and a solver take. The module itself is not changed.

    Everything that is neither an `nnx.Param` nor random state (`nnx.BatchStat`, for example) is model state. For
    dropout whose rate is a hyperparameter, use `hg.augment.dropout` in the loss or in the module: flax's own dropout
    needs a number.

    Args:
        model: a `flax.nnx.Module` that is called with one argument, `model(x)`.

    Returns:
        See `Model`.

    Raises:
        InputTypeError: for something that is not a module, or a module class that was not called.
        HypergradError: if flax is not installed.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from hypergrad.adapters.nnx import split
    >>> net = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    >>> model = split(net)
    >>> out, state = model.train(model.params, model.model_state, jnp.ones((4, 3)), None)
    >>> out.shape, model.evaluate(model.params, state, jnp.ones((4, 3))).shape
    ((4, 8), (4, 8))
    >>> model.merge(model.params, state)(jnp.ones((4, 3))).shape
    (4, 8)
    """
    try:
        from flax import nnx
    except ImportError as error:
        raise missing("nnx", "flax", error) from error
    if not isinstance(model, nnx.Module):
        hint = "call it first, as in split(Net(rngs=nnx.Rngs(0)))" if isinstance(model, type) else "pass an nnx.Module"
        found = model.__name__ if isinstance(model, type) else type(model).__name__
        raise InputTypeError(f"adapters.nnx: model must be a flax.nnx.Module, found {found}: {hint}.")
    library: Any = nnx  # whose types say that a split may return anything
    graph, params, random, rest = library.split(model, nnx.Param, nnx.RngState, ...)
    # Make copies, since the module belongs to the caller: a donated state must not delete its arrays.
    params, random, rest = (_copied(library.to_pure_dict(part)) for part in (params, random, rest))

    def merged(params: PyTree, model_state: PyTree, random: PyTree) -> Any:
        return library.merge(graph, params, random, model_state)

    def train(params: PyTree, model_state: PyTree, x: Any, key: Array | None) -> tuple[Any, PyTree]:
        fresh = _reseeded(random, need_key("adapters.nnx", key)) if jax.tree.leaves(random) else random
        module = merged(params, model_state, fresh)
        module.train()
        out = module(narrowed(x, params))
        after = library.to_pure_dict(library.split(module, nnx.Param, nnx.RngState, ...)[3])
        return out, after

    def evaluate(params: PyTree, model_state: PyTree, x: Any) -> Any:
        return merge(params, model_state)(narrowed(x, params))

    def merge(params: PyTree, model_state: PyTree) -> Any:
        module = merged(params, model_state, random)
        module.eval()
        return module

    return Model(params, rest, train, evaluate, merge)


def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if _tree.is_key(x) else jnp.array(x), tree)


def _reseeded(random: PyTree, key: Array) -> PyTree:
    """Streams of keys that start again from `key`, each from a different key."""
    leaves, treedef = jax.tree.flatten(random)
    fresh = [
        jax.random.fold_in(key, i) if _tree.is_key(leaf) and leaf.shape == () else _spread(leaf, key, i)
        for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(fresh)


def _spread(leaf: Array, key: Array, i: int) -> Array:
    """Many keys for a stacked layer; counts of draws start at zero."""
    if not _tree.is_key(leaf):
        return jnp.zeros_like(leaf)
    return jax.random.split(jax.random.fold_in(key, i), leaf.shape)

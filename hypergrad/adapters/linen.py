r"""A flax linen module as parameters, model state and two functions.

model = hypergrad.adapters.linen.split(Net(), x, key=jax.random.key(0))
out, model_state = model.train(params, model_state, x, key)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.adapters._model import Model, missing, narrowed, need_key

# Arguments that tell modules whether they are in training, with the value that means training.
_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}


def split(
    module: Any,
    sample: Any,
    *,
    key: Array,
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    streams: tuple[str, ...] = ("dropout",),
) -> Model:
    """Initialise a module and split it into what `hg.Problem` and a solver take.

    Args:
        module: a `flax.linen.Module` that is called with one argument, `module(x)`, and possibly a flag for its mode.
        sample: an input, from which the shapes are taken.
        key: PRNG key for the initialisation.
        train: keyword arguments of the call in training. By default they are found from the signature of `__call__`,
            for flags named `train`, `training`, `is_training`, `deterministic` or `use_running_average`.
        evaluate: keyword arguments of the call in evaluation, found likewise.
        streams: names of the random streams that the module draws from in training.

    Returns:
        See `Model`. Every collection other than `"params"` is model state.

    Raises:
        InputTypeError: for something that is not a module, or a module class that was not called.
        InputError: for a module without parameters, and where only one of `train` and `evaluate` is given.
        HypergradError: if flax is not installed.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen
    >>> from hypergrad.adapters.linen import split
    >>> model = split(linen.Dense(2), jnp.ones((4, 3)), key=jax.random.key(0))
    >>> model.evaluate(model.params, model.model_state, jnp.ones((4, 3))).shape
    (4, 2)
    """
    try:
        from flax import linen
    except ImportError as error:
        raise missing("linen", "flax", error) from error
    if not isinstance(module, linen.Module):
        hint = "call it first, as in split(Net(), ...)" if isinstance(module, type) else "pass a linen.Module"
        found = module.__name__ if isinstance(module, type) else type(module).__name__
        raise InputTypeError(f"adapters.linen: module must be a flax.linen.Module, found {found}: {hint}.")
    if (train is None) != (evaluate is None):
        raise InputError("adapters.linen: give both train= and evaluate=, the arguments of the call in each mode.")
    names = [name for name in inspect.signature(type(module).__call__).parameters if name in _MODES]
    training: dict[str, Any] = {name: _MODES[name] for name in names} if train is None else dict(train)
    evaluating: dict[str, Any] = {name: not _MODES[name] for name in names} if evaluate is None else dict(evaluate)
    keys = jax.random.split(key, 1 + len(streams))
    rngs = {"params": keys[0], **dict(zip(streams, keys[1:], strict=True))}
    variables = dict(module.init(rngs, sample, **evaluating))
    params = variables.pop("params", None)
    if not jax.tree.leaves(params):
        raise InputError("adapters.linen: the module has no parameters, so there is nothing to train.")
    random = _draws(module, {"params": params, **variables}, sample, training, list(variables), streams)

    def apply_train(params: PyTree, model_state: PyTree, x: Any, key: Array | None) -> tuple[Any, PyTree]:
        rngs = {}
        if random:
            parts = jax.random.split(need_key("adapters.linen", key), len(streams))
            rngs = dict(zip(streams, parts, strict=True))
        mutable = list(model_state)
        return module.apply(
            {"params": params, **model_state}, narrowed(x, params), rngs=rngs, mutable=mutable, **training
        )

    def apply_evaluate(params: PyTree, model_state: PyTree, x: Any) -> Any:
        return module.apply({"params": params, **model_state}, narrowed(x, params), **evaluating)

    return Model(params, variables, apply_train, apply_evaluate, lambda params, state: {"params": params, **state})


def _draws(
    module: Any,
    variables: PyTree,
    sample: Any,
    training: Mapping[str, Any],
    mutable: list[str],
    streams: tuple[str, ...],
) -> bool:
    """Whether the module asks for one of the streams in training."""
    from flax import errors

    try:
        jax.eval_shape(lambda v: module.apply(v, sample, mutable=mutable, **training), variables)
    except errors.InvalidRngError:
        return bool(streams)
    return False

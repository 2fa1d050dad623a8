"""A model in the form that two losses need, plain functions of pytrees, and the way back to its library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._checks import install
from hypergrad._solver import HypergradError, InputError
from hypergrad._tree import PyTree, dtype


class Model(NamedTuple):
    """A model as its parameters, its state, two pure functions, and the way back.

    Attributes:
        params: pytree of the floating arrays that training moves; weights that layers share are one leaf.
        model_state: pytree of what the model keeps besides its parameters (running statistics of batch normalization).
            It is empty for a model without such state: leave out `hg.Problem(..., model_state=True)` then.
        train: `(params, model_state, x, key) -> (out, model_state)`: in training mode, with fresh noise from the key
            and moved statistics. The key may be None for a model without noise.
        evaluate: `(params, model_state, x) -> out`: in evaluation mode, without noise, the statistics frozen.
        merge: `(params, model_state) -> model`: the model in its library's own form, in evaluation mode, to save or to
            hand on: an nnx module; an equinox module, or `(module, state)` where it has a state; linen's variables.
            After a run of `hg.tune`, `merge(result.params, result.state.model_state)` is the tuned model.
    """

    params: PyTree
    model_state: PyTree
    train: Callable[[PyTree, PyTree, Any, Array | None], tuple[Any, PyTree]]
    evaluate: Callable[[PyTree, PyTree, Any], Any]
    merge: Callable[[PyTree, PyTree], Any]


def need_key(adapter: str, key: Array | None) -> Array:
    """Return the key, which is required for a model that draws random numbers in training.

    Raises:
        InputError: if there is no key.
    """
    if key is None:
        raise InputError(
            f"{adapter}: the model draws random numbers in training, but key is None: let inner_loss take a key, "
            "f(params, hparams, batch, key, model_state), and pass it to train."
        )
    return key


def missing(library: str, extra: str, error: ImportError) -> HypergradError:
    """Return the error to raise where an adapter's library is not installed."""
    found = HypergradError(f"adapters.{library} needs {library}: {install(extra)}.")
    found.__cause__ = error
    return found


def narrowed(x: Any, params: PyTree) -> Any:
    """Convert inputs to a floating type no wider than that of the parameters: with x64 switched on, float64 data would
    otherwise convert the activations, but not the running statistics, of a float32 model to float64.
    """
    widest = dtype(params)

    def cast(leaf: Any) -> Any:
        wide = jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jnp.promote_types(leaf.dtype, widest) != widest
        return leaf.astype(widest) if wide else leaf

    return jax.tree.map(cast, jax.tree.map(jnp.asarray, x))

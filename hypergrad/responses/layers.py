r"""Flax layers that respond to a separate vector of hyperparameters for each example: self-tuning layers.

    y = W₀ x + b₀ + (Q_w h) ⊙ (W₁ x) + (Q_b h) ⊙ b₁

which is the plain layer with weights W₀ + diag(Q_w h) W₁ and biases b₀ + (Q_b h) ⊙ b₁, computed by gating the units of
a second layer: no weight matrix per example is ever made. h is the offset of the hyperparameters, in unconstrained
coordinates, from their current values; the losses get it from `hg.responses.gated()`.

Source: MacKay et al. 2019 (self-tuning networks), arXiv:1903.03088; Bae & Grosse 2020 (Δ-STN), arXiv:2010.13514.
Differs: every parameter of the response lies below `response` in the tree of parameters, by which `gated()` tells it
from those of the plain layer; Q starts at 0 and b₁ at 1, so that a new layer is the plain one and yet both can learn.
Cost: two plain layers and two products with `[hparams, out]` matrices, in time and in parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._checks import install
from hypergrad._solver import HypergradError, InputError

try:
    from flax import nnx
except ImportError as error:
    raise HypergradError(f"hg.responses.layers needs flax: {install('flax')}.") from error


class _Response(nnx.Module):
    """W₁ as a plain layer without bias, the gates Q_w and Q_b, and b₁; `layer` maps inputs to `[..., out]`."""

    def __init__(self, layer: Callable[[Array], Array], out: int, hparams: int, dtype: Any, *, bias: bool) -> None:
        self.layer = layer
        self.gate = nnx.Param(jnp.zeros((hparams, out), dtype))
        self.bias_gate = nnx.Param(jnp.zeros((hparams, out), dtype)) if bias else nnx.data(None)
        self.bias = nnx.Param(jnp.ones((out,), dtype)) if bias else nnx.data(None)

    def __call__(self, inputs: Array, offset: Array) -> Array:
        """(Q_w h) ⊙ (W₁ x) + (Q_b h) ⊙ b₁."""
        added = self.layer(inputs)
        offset = _checked(offset, self.gate.shape[0], added)
        lead, out = offset.shape[:-1], added.shape[-1]

        def opened(kernel: Array) -> Array:
            """The opening of each unit's gate, with an axis of 1 for each axis of the output beyond the examples."""
            return (offset @ kernel.astype(added.dtype)).reshape(*lead, *(1,) * (added.ndim - 1 - len(lead)), out)

        added = opened(self.gate[...]) * added
        if self.bias_gate is None or self.bias is None:
            return added
        return added + opened(self.bias_gate[...] * self.bias[...][None])


def _checked(offset: Array, hparams: int, added: Array) -> Array:
    offset = jnp.asarray(offset, added.dtype)
    if offset.ndim == 0 or offset.shape[-1] != hparams:
        raise InputError(
            f"offset has shape {offset.shape}, but the layer was made for {hparams} hyperparameters: pass one vector "
            f"[{hparams}], or one for each example, as hg.responses.gated() gives it to the losses."
        )
    if offset.shape[:-1] != added.shape[: offset.ndim - 1]:
        raise InputError(
            f"offset has shape {offset.shape}, but the layer's output has shape {added.shape}: all axes of offset but "
            "its last must be the leading axes of the input, one row for each example."
        )
    return offset


def _without_bias(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "use_bias": False}


class HyperDense(nnx.Module):
    """A dense layer whose weights and biases respond to hyperparameters.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        hparams: number of hyperparameters, H: all entries of all leaves.
        rngs: random streams for the starting weights.
        **options: options of `nnx.Linear`.

    The layer is called as `layer(inputs, offset)` with `offset` `[H]`, or one row for each example, `[n, H]`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> layer = hg.responses.layers.HyperDense(5, 3, hparams=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((7, 5)), jnp.zeros((7, 2))).shape
    (7, 3)
    """

    def __init__(self, in_features: int, out_features: int, hparams: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.plain = nnx.Linear(in_features, out_features, rngs=rngs, **options)
        layer = nnx.Linear(in_features, out_features, rngs=rngs, **_without_bias(options))
        self.response = _Response(layer, out_features, hparams, self.plain.param_dtype, bias=self.plain.use_bias)

    def __call__(self, inputs: Array, offset: Array) -> Array:
        """The layer's output for each example's own hyperparameters."""
        return self.plain(inputs) + self.response(inputs, offset)


class HyperConv(nnx.Module):
    """A convolution whose kernels and biases respond to hyperparameters.

    Args:
        in_features: channels of the input, its last axis.
        out_features: channels of the output.
        kernel_size: size of the window along each spatial axis.
        hparams: number of hyperparameters, H: all entries of all leaves.
        rngs: random streams for the starting weights.
        **options: options of `nnx.Conv`.

    The layer is called as `layer(inputs, offset)` with `offset` `[H]`, or one row for each example, `[n, H]`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> layer = hg.responses.layers.HyperConv(1, 4, (3, 3), hparams=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((7, 8, 8, 1)), jnp.zeros((7, 2))).shape
    (7, 8, 8, 4)
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Any, hparams: int, *, rngs: nnx.Rngs, **options: Any
    ) -> None:
        self.plain = nnx.Conv(in_features, out_features, kernel_size, rngs=rngs, **options)
        layer = nnx.Conv(in_features, out_features, kernel_size, rngs=rngs, **_without_bias(options))
        self.response = _Response(layer, out_features, hparams, self.plain.param_dtype, bias=self.plain.use_bias)

    def __call__(self, inputs: Array, offset: Array) -> Array:
        """The layer's output for each example's own hyperparameters."""
        return self.plain(inputs) + self.response(inputs, offset)


class HyperEmbed(nnx.Module):
    """An embedding whose vectors respond to hyperparameters.

    Args:
        num_embeddings: size of the vocabulary.
        features: size of each vector.
        hparams: number of hyperparameters, H: all entries of all leaves.
        rngs: random streams for the starting vectors.
        **options: options of `nnx.Embed`.

    The layer is called as `layer(inputs, offset)` with integers `[n, ...]` and `offset` `[H]` or `[n, H]`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> layer = hg.responses.layers.HyperEmbed(10, 3, hparams=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.zeros((7, 5), int), jnp.zeros((7, 2))).shape
    (7, 5, 3)
    """

    def __init__(self, num_embeddings: int, features: int, hparams: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.plain = nnx.Embed(num_embeddings, features, rngs=rngs, **options)
        layer = nnx.Embed(num_embeddings, features, rngs=rngs, **options)
        self.response = _Response(layer, features, hparams, self.plain.param_dtype, bias=False)

    def __call__(self, inputs: Array, offset: Array) -> Array:
        """The vectors of these integers for each example's own hyperparameters."""
        return self.plain(inputs) + self.response(inputs, offset)


class HyperLSTMCell(nnx.Module):
    """A long short-term memory cell whose weights and biases respond to hyperparameters.

    The four gates are computed together, as in `nnx.OptimizedLSTMCell`.

    Args:
        in_features: size of the input.
        hidden_features: size of the hidden state.
        hparams: number of hyperparameters, H: all entries of all leaves.
        rngs: random streams for the starting weights.
        **options: options of both `nnx.Linear` layers (from the input, without bias, and from the hidden state).

    The cell is called as `cell((memory, hidden), inputs, offset) -> ((memory, hidden), hidden)`, for `jax.lax.scan`
    over time.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import hypergrad as hg
    >>> cell = hg.responses.layers.HyperLSTMCell(5, 4, hparams=2, rngs=nnx.Rngs(0))
    >>> carry, hidden = cell(cell.initialize_carry((7,)), jnp.ones((7, 5)), jnp.zeros((7, 2)))
    >>> hidden.shape
    (7, 4)
    """

    def __init__(self, in_features: int, hidden_features: int, hparams: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.hidden_features = hidden_features
        self.from_input = HyperDense(in_features, 4 * hidden_features, hparams, rngs=rngs, **_without_bias(options))
        recurrent: dict[str, Any] = {"kernel_init": nnx.initializers.orthogonal(), **options}
        self.from_hidden = HyperDense(hidden_features, 4 * hidden_features, hparams, rngs=rngs, **recurrent)

    def __call__(self, carry: tuple[Array, Array], inputs: Array, offset: Array) -> tuple[tuple[Array, Array], Array]:
        """One step in time."""
        memory, hidden = carry
        gates = self.from_input(inputs, offset) + self.from_hidden(hidden, offset)
        write, keep, content, read = jnp.split(gates, 4, axis=-1)
        memory = jax.nn.sigmoid(keep) * memory + jax.nn.sigmoid(write) * jnp.tanh(content)
        hidden = jax.nn.sigmoid(read) * jnp.tanh(memory)
        return (memory, hidden), hidden

    def initialize_carry(self, lead: tuple[int, ...]) -> tuple[Array, Array]:
        """Zeros for leading axes `lead`, `(n,)` for n examples."""
        zeros = jnp.zeros((*lead, self.hidden_features), self.from_hidden.plain.param_dtype)
        return zeros, zeros

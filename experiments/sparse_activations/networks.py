"""Two small networks of which each weight matrix keeps its largest twentieth, and activations that are mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

KEEP = 0.05  # share of each weight matrix that pruning leaves

# Of the unary functions that SAFS searches, one of each kind; ReLU first, which is the default.
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "srs": lambda h: h / (h / 5 + jnp.exp(-jnp.clip(h, -6, None) / 2)),
    "symlog": lambda h: jnp.sign(h) * jnp.log1p(jnp.abs(h)),
}


class Network(NamedTuple):
    """`shapes` of the weight matrices, and `logits(weights, activate, x)`, where `activate(layer, h)` is nonlinear."""

    shapes: tuple[tuple[int, int], ...]
    logits: Callable[[Any, Callable[[int, Any], Any], Any], Any]

    @property
    def hidden(self) -> int:
        """How many layers have an activation."""
        return len(self.shapes) - 1


def perceptron(params: Any, activate: Callable[[int, Any], Any], x: Any) -> Any:
    *below, last = params
    for i, layer in enumerate(below):
        x = activate(i, x @ layer["w"] + layer["b"][None])
    return x @ last["w"] + last["b"][None]


def lenet(params: Any, activate: Callable[[int, Any], Any], x: Any) -> Any:
    """Two convolutions of 3 × 3, means of 2 × 2 pixels, two dense layers; `x [n, 64]` are pictures of 8 × 8."""
    images = x.reshape(-1, 8, 8, 1)
    for i in range(2):
        images = activate(i, patches(images) @ params[i]["w"] + params[i]["b"][None, None, None])
    n, side, _, channels = images.shape
    pooled = images.reshape(n, side // 2, 2, side // 2, 2, channels).mean((2, 4)).reshape(n, -1)
    return perceptron(params[2:], lambda i, h: activate(i + 2, h), pooled)


def patches(images: Any) -> Any:
    """Every 3 × 3 patch of `[n, side, side, channels]` as `[n, side − 2, side − 2, 9 · channels]`."""
    side = images.shape[1] - 2
    return jnp.concatenate([images[:, i : i + side, j : j + side] for i in range(3) for j in range(3)], -1)


NETWORKS = {
    "mlp": Network(((64, 64), (64, 64), (64, 10)), perceptron),
    "lenet": Network(((9, 8), (72, 16), (64, 64), (64, 10)), lenet),
}


def start(network: Network, key: Any) -> list[dict[str, Any]]:
    keys = jax.random.split(key, len(network.shapes))
    scale = lambda shape: np.sqrt(2 / shape[0])
    return [
        {"w": scale(shape) * jax.random.normal(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, network.shapes, strict=True)
    ]


def masks(params: list[dict[str, Any]]) -> list[Any]:
    """1 for the weights of largest magnitude, a share KEEP of each matrix, else 0."""

    def largest(w: Any) -> Any:
        count = int(np.ceil(KEEP * w.size))
        return (jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[-count]).astype(w.dtype)

    return [largest(layer["w"]) for layer in params]


def masked(params: list[dict[str, Any]], mask: list[Any]) -> list[dict[str, Any]]:
    return [layer | {"w": layer["w"] * kept} for layer, kept in zip(params, mask, strict=True)]


def mixture(activation: dict[str, Any]) -> Callable[[int, Any], Any]:
    """f_i(h) = α_i Σ_k mix_ik op_k(β_i h); `activation` holds `mix [layers, operations]`, `output` α, `input` β."""
    operations = list(OPERATIONS.values())[: activation["mix"].shape[-1]]

    def activate(i: int, h: Any) -> Any:
        h = activation["input"][i] * h
        return activation["output"][i] * sum(activation["mix"][i, k] * op(h) for k, op in enumerate(operations))

    return activate


def plain(network: Network, index: Any = 0, *, operations: int) -> dict[str, Any]:
    """One operation a layer, by position, without scales."""
    index = np.broadcast_to(index, network.hidden)
    ones = jnp.ones(network.hidden)
    return {"mix": jnp.eye(operations)[index], "output": ones, "input": ones}


def cross_entropy(logits: Any, labels: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

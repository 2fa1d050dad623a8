"""What layers that respond to hyperparameters of each example cost, against the plain layers that they extend.

Ratios of a training gradient (with respect to parameters and inputs), samples interleaved, and of parameter counts. For
the dense layer also what it would cost to make a weight matrix for each example from the same parameters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import timing
from flax import nnx

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment

HPARAMS = 5
BAR = 2.2


def pairs(size: int) -> dict[str, tuple[Any, Any, tuple[int, ...]]]:
    """Plain layer, responding layer, and the shape of an input."""
    layers, rngs = hg.responses.layers, nnx.Rngs(0)
    more: Any = {"hparams": HPARAMS, "rngs": rngs}
    return {
        "dense": (nnx.Linear(size, size, rngs=rngs), layers.HyperDense(size, size, **more), (128, size)),
        "conv": (
            nnx.Conv(size // 8, size // 8, (3, 3), rngs=rngs),
            layers.HyperConv(size // 8, size // 8, (3, 3), **more),
            (32, 16, 16, size // 8),
        ),
        "lstm": (
            nnx.OptimizedLSTMCell(size // 2, size // 2, rngs=rngs),
            layers.HyperLSTMCell(size // 2, size // 2, **more),
            (16, 32, size // 2),
        ),
    }


def gradient(layer: Any, inputs: jax.Array, *offset: jax.Array) -> tuple[Any, int]:
    """The compiled gradient bound to its arguments, and the number of parameters."""
    graph, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)

    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        layer = nnx.merge(graph, params)
        if not hasattr(layer, "hidden_features"):
            return jnp.sum(jnp.tanh(layer(inputs, *offset)))
        zeros = jnp.zeros((inputs.shape[1], layer.hidden_features))
        step = lambda carry, x: layer(carry, x, *offset)
        return jnp.sum(jax.lax.scan(step, (zeros, zeros), inputs)[1])

    call, _ = timing.compiled(jax.grad(loss, argnums=(0, 1)), params, inputs)
    return call, sum(x.size for x in jax.tree.leaves(params))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    timing.CLOCK[0] = "cpu"
    size, samples = (16, 3) if options.smoke else (256, 31)
    for name, (plain, responding, shape) in pairs(size).items():
        inputs = jax.random.normal(jax.random.key(options.seed), shape)
        rows = shape[1] if name == "lstm" else shape[0]
        offset = jax.random.normal(jax.random.key(1), (rows, HPARAMS))
        (fast, few), (slow, many) = gradient(plain, inputs), gradient(responding, inputs, offset)
        times = timing.interleaved({"plain": fast, "responding": slow}, samples=samples)
        numbers[f"time_{name}"] = times.ratio("responding", "plain")
        numbers[f"parameters_{name}"] = many / few
        if name == "dense":
            each, _ = timing.compiled(matrix_for_each(size, offset), inputs)
            times = timing.interleaved({"plain": fast, "each": each}, samples=samples)
            numbers["time_matrix_for_each"] = times.ratio("each", "plain")


def matrix_for_each(size: int, offset: jax.Array) -> Any:
    """The gradient of a dense layer whose weights W₀ + W₁ diag(Q u) are materialised, example by example."""
    keys = jax.random.split(jax.random.key(2), 3)
    params = [
        jax.random.normal(k, shape)
        for k, shape in zip(keys, ((size, size), (size, size), (HPARAMS, size)), strict=True)
    ]

    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        base, response, gates = params
        weights = base[None] + response[None] * (offset @ gates)[:, None, :]
        return jnp.sum(jnp.tanh(jnp.einsum("ni,nio->no", inputs, weights)))

    return lambda inputs: jax.grad(loss, argnums=(0, 1))(params, inputs)


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(9, 3.8)
    axes = canvas.subplots()
    rows = {}
    for name, text in (("dense", "dense"), ("conv", "convolution"), ("lstm", "LSTM")):
        rows[f"{text}: time"] = style.each(results, f"time_{name}"), style.BLUE
        rows[f"{text}: parameters"] = style.each(results, f"parameters_{name}"), style.SKY
    rows["a matrix for each example: time"] = style.each(results, "time_matrix_for_each"), style.ORANGE
    style.over_seeds(axes, rows, "Responding over plain layers", digits=2, xlabel="ratio (log scale)", xscale="log")
    axes.axvline(BAR, color=style.INK, linewidth=1, linestyle=style.DASHED, label=f"bar: {BAR}")
    axes.set_xlim(1, 300)
    axes.xaxis.set_major_formatter("{x:g}")
    style.legend(canvas, axes)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""What layers that respond to hyperparameters of each example cost, against the plain layers that they extend.

Ratios of a training gradient (with respect to parameters and inputs), samples interleaved, and of parameter counts.
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
from experiments._common import experiment

HPARAMS = 5


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
    numbers["met"] = bool(max(numbers.values()) <= 2.2)


if __name__ == "__main__":
    experiment(__file__, __doc__, measure)

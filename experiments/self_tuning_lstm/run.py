"""Dropout of a character-level LSTM tuned while it trains, on the text of Python's own language reference.

Dropout of the embedded characters, of the hidden state that is fed back (one mask for a whole sequence), and of the
output; the cell, embedding and output layer are those of `hg.responses.layers`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from flax import nnx

import hypergrad as hg
from experiments import _self_tuning
from experiments._common import experiment
from experiments._data import stretches
from experiments._self_tuning import Task, compare, cross_entropy

RANGES = dict.fromkeys(("input", "hidden", "output"), (0.0, 0.9, "real"))
START = dict.fromkeys(RANGES, 0.05)
LENGTH = 32


class Net(nnx.Module):
    """Embedding, LSTM, output layer, plain or responding."""

    def __init__(self, alphabet: int, width: int, rngs: nnx.Rngs, responding: bool) -> None:
        layers = hg.responses.layers
        if responding:
            more: Any = {"hparams": len(RANGES), "rngs": rngs}
            self.embed = layers.HyperEmbed(alphabet, width // 2, **more)
            self.cell = layers.HyperLSTMCell(width // 2, width, **more)
            self.last = layers.HyperDense(width, alphabet, **more)
        else:
            self.embed = nnx.Embed(alphabet, width // 2, rngs=rngs)
            self.cell = nnx.OptimizedLSTMCell(width // 2, width, rngs=rngs)
            self.last = nnx.Linear(width, alphabet, rngs=rngs)
        self.width = width

    def __call__(self, codes: jax.Array, *offset: jax.Array, rates: Any = None, key: Any = None) -> jax.Array:
        kept = jnp.ones((len(codes), self.width))
        x = self.embed(codes, *offset)
        if rates is not None:
            keys = jax.random.split(key, 3)
            x = hg.augment.dropout(x, rates["input"], key=keys[0])
            kept = hg.augment.dropout(kept, rates["hidden"], key=keys[1])

        def step(carry: Any, x: jax.Array) -> Any:
            memory, hidden = carry
            return self.cell((memory, hidden * kept), x, *offset)

        start = (jnp.zeros_like(kept), jnp.zeros_like(kept))
        hidden = jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)
        if rates is not None:
            hidden = hg.augment.dropout(hidden, rates["output"], key=keys[2])
        return self.last(hidden, *offset)


def predict(net: Any, codes: jax.Array, offset: Any, hparams: Any, key: Any) -> jax.Array:
    return net(codes, *offset, rates=hparams, key=key)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    width, calls, rows = (4, 3, (8, 8, 8)) if options.smoke else (64, 300, (400, 200, 400))
    parts, alphabet = stretches(options.seed, rows, LENGTH)
    model = lambda rngs, responding: Net(alphabet, width, rngs, responding)
    task = Task(model, predict, cross_entropy, RANGES, START, *parts, batch=rows[0] // 8, rate=3e-3, calls=calls)
    compare(task, options.seed, numbers)


def drawing(results: dict[str, Any]) -> Any:
    return _self_tuning.drawing(results, RANGES, "Dropout learned while training")


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

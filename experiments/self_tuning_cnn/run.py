"""Five augmentations of a small convolutional network tuned while it trains: dropout, translation, noise, and cutout.

Cutout's length and number of holes are whole numbers: the losses see them rounded. The network is made of
`hg.responses.layers`, so that every example of a batch has augmentation of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from flax import nnx

import hypergrad as hg
from experiments import _self_tuning
from experiments._common import experiment
from experiments._data import digits
from experiments._self_tuning import Task, compare, cross_entropy

RANGES = {
    "dropout": (0.0, 0.9, "real"),
    "translation": (0.0, 3.0, "real"),
    "noise": (0.0, 1.0, "real"),
    "cutout length": (0.0, 6.0, "integer"),
    "cutout holes": (0.0, 3.0, "integer"),
}
MILD = {  # what a person would search who knows digits of 8 × 8 pixels
    "dropout": (0.0, 0.5, "real"),
    "translation": (0.0, 1.0, "real"),
    "noise": (0.0, 0.2, "real"),
    "cutout length": (0.0, 3.0, "integer"),
    "cutout holes": (0.0, 2.0, "integer"),
}
START = {"dropout": 0.05, "translation": 0.2, "noise": 0.05, "cutout length": 1.0, "cutout holes": 1.0}


class Net(nnx.Module):
    """Two convolutions and a dense layer, plain or responding."""

    def __init__(self, channels: int, rngs: nnx.Rngs, responding: bool) -> None:
        layers: Any = hg.responses.layers if responding else nnx
        conv, dense = (layers.HyperConv, layers.HyperDense) if responding else (nnx.Conv, nnx.Linear)
        more: Any = {"hparams": len(RANGES)} if responding else {}
        self.first = conv(1, channels, (3, 3), rngs=rngs, **more)
        self.second = conv(channels, channels, (3, 3), strides=2, rngs=rngs, **more)
        self.last = dense(16 * channels, 10, rngs=rngs, **more)

    def __call__(self, x: jax.Array, *offset: jax.Array, rate: Any = None, key: Any = None) -> jax.Array:
        x = jax.nn.relu(self.first(x[..., None], *offset))
        x = jax.nn.relu(self.second(x, *offset)).reshape(len(x), -1)
        x = x if rate is None else hg.augment.dropout(x, rate, key=key)
        return self.last(x, *offset)


def predict(net: Any, images: jax.Array, offset: Any, hparams: Any, key: Any) -> jax.Array:
    if hparams is None:
        return net(images, *offset)
    keys = jax.random.split(key, 4)
    images = hg.augment.translate(images, hparams["translation"], key=keys[0])
    images = hg.augment.gaussian_noise(images, hparams["noise"], key=keys[1])
    images = hg.augment.cutout(images, hparams["cutout length"], hparams["cutout holes"], max_holes=3, key=keys[2])
    return net(images, *offset, rate=hparams["dropout"], key=keys[3])


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    channels, calls, batch = (2, 3, 8) if options.smoke else (8, 400, 50)
    parts = [(x.reshape(-1, 8, 8), y) for x, y in digits(options.seed, [300, 200])]
    model = lambda rngs, responding: Net(channels, rngs, responding)
    task = Task(model, predict, cross_entropy, RANGES, START, *parts, batch=batch, rate=1e-3, calls=calls, mild=MILD)
    compare(task, options.seed, numbers)


def drawing(results: dict[str, Any]) -> Any:
    return _self_tuning.drawing(results, RANGES, "Augmentation learned while training")


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

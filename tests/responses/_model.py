"""A model of odd shapes, and the weights of a response to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

PyTree = Any
KEY = jax.random.key(3)
HPARAMS = {"a": jnp.asarray([0.3, -1.2]), "b": (jnp.asarray(0.7), None)}
CENTRE = {"a": jnp.asarray([0.1, -0.9]), "b": (jnp.asarray(0.2), None)}


def random(tree: PyTree, seed: int) -> PyTree:
    """Normal numbers in the shapes and dtypes of `tree`, without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), tree)


PARAMS = random(
    {"conv": np.zeros((2, 3, 4)), "dense": (np.zeros((3, 5)), None), "bias": np.zeros(5), "gain": np.zeros(())}, 1
)


def trained(response: hg.responses.Response) -> hg.responses.Weights:
    """Weights as if after training: none of them zero."""
    made = jax.eval_shape(lambda: response.init(KEY, PARAMS, HPARAMS))
    return hg.responses.Weights(PARAMS, random(made.slope, 2))

"""A small regression problem of two features, and its covariance matrix in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from hypergrad.objectives import squared_exponential

RNG = np.random.default_rng(0)
N, D = 40, 2
X = jnp.asarray(RNG.normal(size=(N, D)))
Y = jnp.asarray(np.sin(2 * np.asarray(X)[:, 0]) + 0.4 * RNG.normal(size=N))
H = {"length": jnp.array([-0.3, 0.8]), "noise": jnp.asarray(-1.4), "variance": jnp.asarray(0.2)}


def kernel(h, x, z):
    return squared_exponential(x, z, jnp.exp(h["length"]), jnp.exp(h["variance"]))


def noise_variance(h):
    return jnp.exp(h["noise"])


def covariance(h, x=X, z=X):
    x, z = np.asarray(x, float), np.asarray(z, float)
    gaps = (x[:, None] - z[None]) / np.exp(np.asarray(h["length"], float))
    return np.exp(float(h["variance"])) * np.exp(-0.5 * np.sum(gaps**2, axis=2))

"""The magnitude-invariant network: its layers, its start, and what it does not depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.responses._response import coordinates
from tests._helpers import assert_trees_close, tol
from tests.responses._model import HPARAMS, KEY, trained


def test_mlp_is_its_layers_after_an_encoding_of_constant_norm():
    response = hg.responses.mlp(hidden=(5, 4), within=(-2.0, 2.0))
    weights = trained(response)
    angles = 0.5 * np.pi * (np.asarray(coordinates(HPARAMS)) + 2) / 4
    z = np.concatenate([np.cos(angles), np.sin(angles)])
    assert np.linalg.norm(z) == pytest.approx(np.sqrt(3))
    for kernel, bias in weights.slope.hidden:
        z = z @ np.asarray(kernel) + np.asarray(bias)
        z = np.where(z > 0, z, 0.01 * z)
    expected = jax.tree.map(
        lambda b, k: np.asarray(b) + np.tensordot(z, np.asarray(k), 1), weights.base, weights.slope.outputs
    )
    assert_trees_close(jax.jit(response.apply)(weights, HPARAMS), expected, tol(1e-13, 1e-5))


def test_mlp_starts_with_variances_of_one_over_fan_out():
    params = {"small": jnp.zeros((3, 4)), "large": jnp.zeros((50, 40))}
    slope = jax.jit(lambda: hg.responses.mlp(hidden=(300, 200)).init(KEY, params, HPARAMS).slope)()
    # Each is a mean of n squares of normal numbers, which has a relative standard deviation of sqrt(2 / n).
    sizes = [(slope.hidden[0][0], 2 / 300), (slope.hidden[1][0], 2 / 200)]
    sizes += [(slope.outputs["small"], 1 / 12), (slope.outputs["large"], 1 / 2000)]
    for kernel, variance in sizes:
        assert np.mean(np.asarray(kernel) ** 2) == pytest.approx(variance, rel=4 * np.sqrt(2 / kernel.size) + 2e-4)


def test_magnitudes_of_a_new_mlp_do_not_follow_its_input():
    """Where a network without the encoding gives zero at γ = 0, and twice as much at 1 as at a half."""
    response = hg.responses.mlp(hidden=(64,), within=(0.0, 1.0))
    made = jax.jit(lambda gamma: response.apply(response.init(KEY, jnp.zeros((40, 40)), gamma), gamma))
    sizes = [float(np.std(made(gamma))) for gamma in (0.0, 0.5, 1.0)]
    assert max(sizes) / min(sizes) < 1.6

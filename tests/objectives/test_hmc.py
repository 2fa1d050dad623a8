"""Sampling against quadrature in one dimension."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.objectives import gp_evidence, hmc
from tests.objectives._points import H, X, Y, kernel, noise_variance


@pytest.mark.experiment
def test_hmc_draws_the_posterior_of_a_length_scale_that_quadrature_gives():
    x, y = X[:12], Y[:12]
    fixed = {"noise": H["noise"], "variance": H["variance"]}
    density = lambda t: (
        -12 * gp_evidence(kernel, noise_variance)(None, {**fixed, "length": jnp.full(2, t)}, (x, y))
        - 0.5 * jnp.sum(t**2)
    )
    grid = jnp.linspace(-4, 4, 400)
    logs = np.asarray(jax.jit(jax.vmap(density))(grid), float)
    weight = np.exp(logs - logs.max()) / np.sum(np.exp(logs - logs.max()))
    mean = weight @ np.asarray(grid)
    spread = (weight @ (np.asarray(grid) - mean) ** 2) ** 0.5
    found = hmc(density, jnp.asarray(0.0), key=jax.random.key(0), samples=1500, warmup=200, steps=5)
    drawn = np.asarray(found.hparams)
    parts = drawn.reshape(15, 100)
    for statistic, expected in ((np.mean, mean), (np.std, spread)):
        blocks = np.array([statistic(part) for part in parts])
        assert abs(statistic(drawn) - expected) < 3.5 * blocks.std(ddof=1) / 15**0.5
    assert 0.5 < float(found.acceptance) <= 1 and int(found.divergent) < 15


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(hg.HypergradError, match=r"hmc needs blackjax: pip install -e '\.\[gp\]'"):
        hmc(lambda h: -(h**2), 0.0, key=jax.random.key(0), samples=10)

"""The schedule of training and tuning in turns: who steps when, and where it ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg


def test_the_schedule_trains_between_rounds_and_finds_the_precision_that_maximises_the_evidence():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((7, 3)))
    y = x @ jnp.array([1.0, -2.0, 0.3]) + 0.5 * jnp.asarray(rng.standard_normal(7))
    losses = hg.objectives.evidence(
        lambda w, h, x: x @ w, likelihood="gaussian", noise=0.5, precision=lambda h: jnp.exp(h), rows=7
    )
    solver = hg.objectives.interleaved(hg.Problem(*losses), optax.adam(0.1), burn_in=200, steps=50, hyper_steps=20)
    result = hg.tune(
        solver, jnp.zeros(3), 3.0, (x, y), (x, y), outer=optax.adam(0.1), steps=140, steps_per_call=20, progress=False
    )
    trained = result.history.inner_steps
    assert trained[0] == 200 and list(np.flatnonzero(trained)) == list(range(0, 140, 20))
    assert np.all(trained[20::20] == 50)

    def closed(log_precision):  # -log N(y; 0, s^2 I + x x'/p) / n
        covariance = 0.25 * jnp.eye(7) + x @ x.T / jnp.exp(log_precision)
        return 0.5 * (y @ jnp.linalg.solve(covariance, y) + jnp.linalg.slogdet(2 * jnp.pi * covariance)[1]) / 7

    grid = np.linspace(-3, 3, 601)
    values = np.asarray(jax.jit(jax.vmap(closed))(grid))
    assert abs(float(result.hparams) - grid[values.argmin()]) < 0.1
    assert result.best.value == pytest.approx(values.min(), rel=1e-3)
    assert solver.about.differentiates == "direct" and solver.about.trains_on

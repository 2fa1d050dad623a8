"""The outer loss on a grid of hyperparameters, with the inner problem solved at each point."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import landscape, plots
from tests._helpers import tol
from tests.diagnostics import _ridge as ridge

TRAIN, VALID = ridge.data(), ridge.data(seed=1)
H = ridge.hparams()
W = jnp.zeros(4)


def test_a_landscape_is_the_problem_solved_at_each_point():
    along: dict[str, Any] = {"['l2'][1]": [-1.0, 0.5], "shift": jnp.asarray([0.2, 0.7, 0.9])}
    grid = landscape(ridge.solver(), W, H, along, TRAIN, VALID)
    assert grid.names == ("['l2'][1]", "shift") and grid.index == (1, 4) and grid.values.shape == (2, 3)
    for i, a in enumerate(grid.axes[0]):
        for j, b in enumerate(grid.axes[1]):
            h = {**H, "l2": H["l2"].at[1].set(a), "shift": jnp.asarray(b, H["shift"].dtype)}
            assert grid.values[i, j] == pytest.approx(float(ridge.outer_of(h, TRAIN, VALID)), rel=tol(1e-12, 1e-5))


def test_a_landscape_solves_until_nothing_moves():
    def inner(w, h, batch):
        return jnp.sum((w - h) ** 2)

    problem = hg.Problem(inner, lambda w, h, batch: jnp.sum((w - 1.0) ** 2))
    slow = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.2), steps=1), warm_start=True)
    grid = landscape(slow, jnp.zeros(1), 0.3, {"hparams": [0.5, 2.0]})
    np.testing.assert_allclose(grid.values, [0.25, 1.0], rtol=tol(1e-6, 1e-3))


def test_where_the_loss_is_not_finite_the_landscape_is_nan():
    bad = ridge.solver(value=lambda value, hparams, key: value / (hparams["shift"] > 0))
    grid = landscape(bad, W, H, {"shift": [-1.0, 1.0], "l2[0]": [0.1, 0.2]}, TRAIN, VALID)
    np.testing.assert_array_equal(np.isnan(grid.values), [[True, True], [False, False]])
    plots.landscape(grid).figure.canvas.draw()
    plt.close("all")


def test_mistakes_are_named():
    solver = ridge.solver()
    with pytest.raises(hg.InputError, match=r"landscape: along names 'shfit', .* did you mean 'shift'"):
        landscape(solver, W, H, {"shfit": [1.0]})
    with pytest.raises(hg.InputError, match=r"landscape: along must name one or two hyperparameters, found \[\]"):
        landscape(solver, W, H, {})
    with pytest.raises(hg.InputError, match=r"along\['shift'\] must be a vector of values, found shape \(\)"):
        landscape(solver, W, H, {"shift": 1.0})
    with pytest.raises(hg.InputError, match=r"landscape: valid must be arrays, found hg.stream"):
        landscape(solver, W, H, {"shift": [1.0]}, TRAIN, hg.stream(iter([]), 1))

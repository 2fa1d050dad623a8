"""The Jacobi preconditioner: an unbiased diagonal with honest standard errors, and fewer steps where it matters."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear._linear import solve
from hypergrad.linear.precondition import hutchinson_diagonal, positive_diagonal
from tests._helpers import tol
from tests.linear._systems import EPS, N, spd, vector


def test_hutchinson_has_the_diagonal_for_its_mean_and_the_off_diagonal_for_its_variance():
    matrix, draws, probes = spd(30.0), 2000, 4
    a = jnp.asarray(matrix, float)
    keys = jax.random.split(jax.random.key(3), draws)
    estimate = jax.jit(jax.vmap(lambda k: hutchinson_diagonal(lambda v: a @ v, jnp.zeros(N), k, probes)))
    means, errors = estimate(keys)
    means, errors = np.asarray(means, np.float64), np.asarray(errors, np.float64)
    variance = ((matrix**2).sum(axis=1) - np.diag(matrix) ** 2) / probes
    standard_error = np.sqrt(variance / draws)
    assert np.abs((means.mean(axis=0) - np.diag(matrix)) / standard_error).max() < 4
    spread = means.var(axis=0)
    # The variance of a sample variance is (kurtosis − 1) σ⁴ / draws, with a kurtosis below 3 for sums of signs.
    assert np.abs(spread / variance - 1).max() < 4 * np.sqrt(2 / draws)
    assert np.abs((errors**2).mean(axis=0) / variance - 1).max() < 4 * np.sqrt(2 / draws)


@functools.partial(jax.jit, static_argnums=(1, 2))
def hutchinson(matrix, probes, first=0):
    return hutchinson_diagonal(lambda v: matrix @ v, jnp.zeros(N), jax.random.key(0), probes, first)[0]


@functools.partial(jax.jit, static_argnums=1)
def positive(matrix, probes=8):
    return positive_diagonal(lambda v: matrix @ v, jnp.zeros(len(matrix)), jax.random.key(0), probes)


def test_probes_of_two_rounds_differ():
    matrix = jnp.asarray(spd(30.0), float)
    first, second, both = hutchinson(matrix, 4), hutchinson(matrix, 4, 4), hutchinson(matrix, 8)
    assert np.abs(np.asarray(first - second)).max() > 0.01
    np.testing.assert_allclose((first + second) / 2, both, rtol=0, atol=20 * EPS)


@pytest.mark.parametrize("probes", [1, 2, 3, 4, 9])
def test_diagonal_operators_are_inverted_exactly(probes):
    scales = np.geomspace(1, tol(1e8, 1e4) if probes >= 4 else 1e2, N)
    np.testing.assert_allclose(positive(jnp.asarray(np.diag(scales), float), probes), scales, rtol=100 * EPS)


@functools.partial(jax.jit, static_argnums=2)
def solve_with(matrix, rhs, preconditioned):
    linear = hg.linear.cg(tol=1e-5, max_steps=3000, **({} if preconditioned else {"preconditioner": None}))
    build = linear.preconditioner
    apply = None if build is None else build(lambda v: matrix @ v, rhs, None, jax.random.key(1))
    result = solve(linear, lambda v: matrix @ v, rhs, precondition=apply)
    return result.steps, result.status


def steps(matrix, preconditioned=True):
    count, status = solve_with(jnp.asarray(matrix, float), jnp.asarray(vector(1, len(matrix)), float), preconditioned)
    assert hg.Status(int(status)).usable
    return int(count)


def test_badly_scaled_least_squares_take_a_tenth_of_the_steps():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 60)) * np.exp(1.5 * rng.normal(size=60))
    matrix = x.T @ x / 400
    exact = steps(matrix / np.sqrt(np.outer(np.diag(matrix), np.diag(matrix))), preconditioned=False)
    assert steps(matrix) <= 2 * exact
    assert steps(matrix) <= steps(matrix, preconditioned=False) / 10


def test_noise_of_the_diagonal_does_little_harm_where_there_is_nothing_to_gain():
    """Equal diagonal, one large eigenvalue: the noise of each entry exceeds the entry."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 60)) + 3 * rng.normal(size=(400, 1))
    matrix = x.T @ x / 400
    assert steps(matrix) <= 1.5 * steps(matrix, preconditioned=False)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scaling_the_operator_scales_the_diagonal(scale):
    matrix = jnp.asarray(spd(30.0), float)
    np.testing.assert_allclose(positive(scale * matrix) / scale, positive(matrix), rtol=1e-4)


def test_the_diagonal_is_positive_whatever_the_operator():
    for matrix in (-spd(10.0), spd(10.0) - 0.3 * np.eye(N), np.zeros((N, N))):
        diagonal = np.asarray(positive(jnp.asarray(matrix, float)))
        assert (diagonal > 0).all() and np.isfinite(diagonal).all()


def test_probes_that_would_not_fit_run_one_by_one(monkeypatch):
    matrix = jnp.asarray(spd(30.0), float)
    batched = positive(matrix)
    module = sys.modules["hypergrad.linear.precondition"]  # `hg.linear.precondition` is the function
    monkeypatch.setattr(module, "_BATCHED_ENTRIES", 0)
    alone = jax.jit(lambda m: positive_diagonal(lambda v: m @ v, jnp.zeros(N), jax.random.key(0), 8))(matrix)
    np.testing.assert_allclose(alone, batched, rtol=100 * EPS)


def test_a_preconditioner_of_ones_own_sees_parameters_and_hyperparameters():
    build = hg.linear.precondition(lambda v, params, hparams: v * params / hparams)
    apply = build(lambda v: v, jnp.asarray([1.0, 2.0]), jnp.asarray(4.0), jax.random.key(0))
    np.testing.assert_array_equal(apply(jnp.asarray([8.0, 8.0])), [2.0, 4.0])
    assert hg.linear.cg(preconditioner=build).preconditioner is build
    assert hg.linear.gmres(preconditioner=build).preconditioner is build
    assert hg.linear.cg().preconditioner is not None  # Jacobi, where convergence is claimed
    assert hg.linear.cg(max_steps=5).preconditioner is None

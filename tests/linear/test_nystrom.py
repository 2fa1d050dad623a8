"""The Nyström inverse: exact where the rank suffices, and otherwise the formula of its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear._linear import solve
from hypergrad.linear.nystrom import _columns, _gaussian
from tests._helpers import tol
from tests.linear._systems import EPS, N, error, run, singular, spd, vector


def rms(matrix):
    """Root mean square of the eigenvalues, which damping is relative to."""
    return np.linalg.norm(matrix) / N**0.5


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_full_rank_is_the_damped_inverse(size):
    matrix, rhs = size * spd(100.0), vector()
    for damping in (1e-3, 0.1, 10.0):
        out = run("nystrom", matrix, rhs, damping=damping)
        assert out.status == hg.Status.OK and out.steps == N + 1
        assert error(out.x, np.linalg.solve(matrix + damping * rms(matrix) * np.eye(N), rhs)) <= tol(1e-9, 1e-3)


@pytest.mark.parametrize("name", ["nystrom low", "nystrom columns"])
def test_a_rank_that_covers_the_range_is_the_damped_inverse(name):
    matrix, rhs = singular(4), vector()
    out = run(name, matrix, rhs, damping=0.1)
    # What the sketch takes for the root mean square is an estimate: read it off the null space, where v = b / ρ.
    null = np.linalg.svd(matrix)[2][4:]
    rho = np.linalg.norm(null @ rhs) / np.linalg.norm(null @ out.x)
    assert 0.3 < rho / (0.1 * rms(matrix)) < 3
    assert error(out.x, np.linalg.solve(matrix + rho * np.eye(N), rhs)) <= tol(1e-9, 1e-3)


def test_columns_are_the_formula_of_the_paper():
    matrix, rhs = spd(100.0), vector()
    tests = np.asarray(_columns(jax.random.key(7), jnp.zeros(N), 8))
    assert (np.sort(tests.sum(axis=1)) == 1).all() and tests.sum(axis=0).max() == 1
    c, w = matrix @ tests.T, tests @ matrix @ tests.T
    rho = 0.1 * np.linalg.norm(c) / 8**0.5
    expected = rhs / rho - c @ np.linalg.solve(w + c.T @ c / rho, c.T @ rhs) / rho**2
    assert error(run("nystrom columns", matrix, rhs, damping=0.1).x, expected) <= tol(1e-10, 1e-3)


def test_the_residual_is_that_of_the_undamped_system():
    for name in ("nystrom", "nystrom low"):
        out = run(name, spd(100.0), vector(), damping=0.1)
        np.testing.assert_allclose(out.residual, out.true_residual, rtol=tol(1e-9, 1e-3))
        assert out.residual > 1e-3


def test_negative_curvature_that_damping_does_not_lift_is_named():
    matrix = spd(20.0) - 0.3 * np.eye(N)
    lowest = -np.linalg.eigvalsh(matrix)[0] / rms(matrix)
    assert run("nystrom", matrix, vector(), damping=0.9 * lowest).status == hg.Status.NEG_CURVATURE
    assert run("nystrom", matrix, vector(), damping=1.1 * lowest).status == hg.Status.OK


def test_the_zero_operator_is_singular():
    out = run("nystrom low", np.zeros((N, N)), vector())
    assert out.status == hg.Status.SINGULAR and np.isfinite(out.x).all()


def test_gaussian_test_vectors_are_orthonormal_in_any_tree():
    like = {"a": jnp.zeros((3, 4)), "b": (jnp.zeros(()), None, jnp.zeros(7))}
    for rank in (5, 19):
        tests = jax.jit(lambda key: _gaussian(key, like, rank))(jax.random.key(0))
        rows = np.concatenate([np.asarray(x, np.float64).reshape(rank, -1) for x in jax.tree.leaves(tests)], axis=1)
        np.testing.assert_allclose(rows @ rows.T, np.eye(rank), atol=100 * EPS)


def test_the_size_of_the_operator_is_estimated_without_bias():
    matrix, rhs = jnp.asarray(spd(10.0), float), jnp.asarray(vector(), float)

    def squared_rho(key):
        result = solve(hg.linear.nystrom(1, damping=1.0), lambda v: matrix @ v, rhs, key=key)
        probe = _gaussian(key, rhs, 1)[0]
        image = matrix @ probe
        rest = rhs - image * (image @ rhs) / (image @ image)  # what the sketch does not see is divided by ρ
        return ((rest @ rest) / (rest @ result.solution)) ** 2

    samples = np.asarray(jax.jit(jax.vmap(squared_rho))(jax.random.split(jax.random.key(0), 400)), np.float64)
    assert abs(samples.mean() - rms(np.asarray(matrix)) ** 2) < 4 * samples.std() / 400**0.5


def test_a_rank_beyond_the_size_is_cut():
    f = jax.jit(lambda b: solve(hg.linear.nystrom(100, damping=0.1), lambda v: 2 * v, b)[:3])
    solution, _, steps = f(jnp.ones(3))
    assert int(steps) == 4
    np.testing.assert_allclose(solution, 1 / 2.2, rtol=100 * EPS)

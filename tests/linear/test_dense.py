"""The dense solve: exact where there is a solution, the shortest where there are many, a status where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear._linear import solve
from tests._helpers import tol
from tests.linear._systems import EPS, N, error, general, rotation, run, singular, spd, vector


@pytest.mark.parametrize("seed", range(5))
def test_singular_and_consistent_gives_the_shortest_solution(seed):
    x = np.random.default_rng(seed).normal(size=(N, N // 3))
    for matrix in (singular(seed=seed), x @ x.T @ rotation(seed)):
        rhs = matrix @ vector(seed)
        out = run("dense", matrix, rhs)
        assert out.status == hg.Status.OK and out.steps == N
        assert error(out.x, np.linalg.pinv(matrix, rcond=1e-5) @ rhs) <= tol(1e-10, 1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_singular_and_inconsistent_is_named_and_gives_least_squares(seed):
    matrix, rhs = singular(seed=seed), vector(seed)
    out = run("dense", matrix, rhs)
    assert out.status == hg.Status.SINGULAR
    assert error(out.x, np.linalg.pinv(matrix, rcond=1e-5) @ rhs) <= tol(1e-10, 1e-3)


def test_the_zero_operator_is_singular():
    out = run("dense", np.zeros((N, N)), vector())
    assert out.status == hg.Status.SINGULAR
    np.testing.assert_array_equal(out.x, 0)


@pytest.mark.parametrize("spread", [1e4, 1e8, 1e16])
def test_badly_scaled_rows_and_columns_are_not_singular(spread):
    scales = np.geomspace(1, spread, N)
    for matrix in (np.diag(scales), (np.eye(N) + 0.3 * general(3.0)) * scales, scales[:, None] * spd(10.0)):
        solution = vector() / np.linalg.norm(matrix, axis=0)
        out = run("dense", matrix, matrix @ solution)
        assert out.status.usable
        np.testing.assert_allclose(out.x, solution, rtol=tol(1e-8, 2e-2))


def test_inverse_is_exact():
    matrix = jnp.asarray(general(100.0), float)
    result = solve(hg.linear.dense(), lambda v: matrix @ v, jnp.asarray(vector(), float))
    other = vector(9)
    found = np.asarray(result.inverse(jnp.asarray(other, float)))
    assert error(found, np.linalg.solve(matrix, other)) <= tol(1e-11, 1e-3)


def test_rounding_is_not_mistaken_for_a_null_space():
    """In float32 no residual below κ·eps is to be had, and the status says that rather than singular."""
    for seed in range(5):
        out = run("dense", spd(tol(1e12, 1e4), seed), vector(seed))
        assert out.status == hg.Status.PRECISION_LIMITED
        assert out.true_residual <= tol(1e-2, 1e-2)


def test_null_spaces_of_products_in_low_precision_are_found():
    """XᵀX v computed, not given: its rounding is that of the products."""
    f = jax.jit(lambda x, b: solve(hg.linear.dense(tol=1e-4), lambda v: x.T @ (x @ v), b)[:4])
    for seed in range(5):
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(40, 60)), jnp.float32)
        rhs = x.T @ (x @ jnp.asarray(vector(seed, 60), jnp.float32))
        solution, _, _, status = f(x, rhs)
        exact = np.linalg.lstsq(np.asarray(x.T @ x, np.float64), np.asarray(rhs, np.float64), rcond=1e-4)[0]
        assert hg.Status(int(status)) == hg.Status.OK
        assert error(np.asarray(solution), exact) <= 1e-2


def test_more_columns_than_one_batch():
    n = 600
    scales = jnp.linspace(1.0, 3.0, n)
    result = jax.jit(lambda b: solve(hg.linear.dense(), lambda v: scales * v + 0.01 * jnp.sum(v), b)[:4])(jnp.ones(n))
    matrix = np.diag(np.asarray(scales)) + 0.01
    assert int(result[2]) == n
    assert error(np.asarray(result[0]), np.linalg.solve(matrix, np.ones(n))) <= 1e3 * EPS

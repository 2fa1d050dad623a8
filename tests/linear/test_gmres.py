"""GMRES: optimal on the Krylov space, with breakdowns and stagnation told apart."""

from __future__ import annotations

import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import tol
from tests.linear._systems import EPS, N, error, general, rotation, run, singular, spd, vector
from tests.linear.test_cg import krylov


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iterate_has_the_least_residual_on_the_krylov_space(steps):
    matrix, rhs = np.eye(N) + 0.5 * general(3.0), vector()
    v = krylov(matrix, rhs, steps)
    best = v @ np.linalg.lstsq(matrix @ v, rhs, rcond=None)[0]
    out = run("gmres budget", matrix, rhs, max_steps=steps)
    assert out.steps == steps
    assert error(out.x, best) <= tol(1e-11, 1e-3)
    np.testing.assert_allclose(out.residual, out.true_residual, rtol=tol(1e-9, 1e-3))


def test_n_products_solve_any_regular_system():
    for seed in range(5):
        out = run("gmres", general(100.0, seed), vector(seed))
        assert out.status == hg.Status.OK and out.steps <= N
        assert out.true_residual <= 1e4 * EPS


@pytest.mark.parametrize("seed", range(5))
def test_saddles_are_solved(seed):
    matrix = spd(20.0, seed) - 0.3 * np.eye(N)
    out = run("gmres", matrix, vector(seed))
    assert out.status == hg.Status.OK
    assert error(out.x, np.linalg.solve(matrix, vector(seed))) <= tol(1e-9, 1e-3)


def test_a_space_that_closes_with_the_solution_is_a_happy_end():
    q = rotation(0)
    for count in (1, 3):
        rhs = q[:, :count].sum(axis=1)
        out = run("gmres", spd(30.0), rhs)
        assert (out.status, out.steps) == (hg.Status.OK, count)
        assert out.true_residual <= 100 * EPS


def test_restarts_reach_the_same_solution():
    matrix, rhs = np.eye(N) + 0.5 * general(3.0), vector()
    out = run("gmres restarted", matrix, rhs)
    assert out.status == hg.Status.OK and out.steps > 6
    assert error(out.x, np.linalg.solve(matrix, rhs)) <= tol(1e-9, 1e-4)


def test_a_cycle_that_gets_nowhere_ends_the_solve():
    """A cyclic shift maps a unit vector to the next: no Krylov space but the whole one helps."""
    shift = np.roll(np.eye(N), 1, axis=0)
    out = run("gmres restarted", shift, np.eye(N)[0])
    assert out.status == hg.Status.LINEAR_MAX_STEPS
    assert out.steps < 30 and out.true_residual == 1
    full = run("gmres", shift, np.eye(N)[0])
    assert (full.status, full.steps) == (hg.Status.OK, N)


def test_a_space_that_closes_without_a_solution_is_singular():
    nilpotent = np.zeros((N, N))
    nilpotent[0, 1] = 1.0
    out = run("gmres", nilpotent, np.eye(N)[0])
    assert out.status == hg.Status.SINGULAR
    assert np.isfinite(out.x).all() and out.residual == 1


def test_the_zero_operator_is_singular():
    out = run("gmres restarted", np.zeros((N, N)), vector())
    assert out.status == hg.Status.SINGULAR and out.steps == 1
    np.testing.assert_array_equal(out.x, 0)


@pytest.mark.parametrize("name", ["gmres", "gmres restarted"])
@pytest.mark.parametrize("seed", range(3))
def test_singular_systems_are_solved_or_named(name, seed):
    matrix = singular(4, seed)
    rhs = matrix @ vector(seed)
    out = run(name, matrix, rhs)
    assert out.status == hg.Status.OK
    assert error(out.x, np.linalg.pinv(matrix, rcond=1e-6) @ rhs) <= tol(1e-8, 1e-3)
    assert run(name, matrix, vector(seed)).status == hg.Status.SINGULAR


def test_the_residual_is_that_of_the_system_whatever_the_preconditioner():
    scales = np.geomspace(1, 1e4, N)
    matrix = (np.eye(N) + 0.3 * general(3.0)) * scales[None, :]
    out = run("gmres", matrix, vector(), scales=1 / scales, tol=1e-3)
    assert out.status == hg.Status.OK
    np.testing.assert_allclose(out.residual, out.true_residual, rtol=tol(1e-9, 1e-2))
    assert out.steps < run("gmres", matrix, vector(), tol=1e-3).steps / 2

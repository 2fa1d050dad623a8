"""Conjugate gradients: optimal on the Krylov space, and named outcomes where A is not positive definite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear._linear import solve
from tests._helpers import tol
from tests.linear._systems import EPS, SOLVERS, N, error, rotation, run, singular, spd, vector


def krylov(matrix, rhs, count):
    basis = [rhs]
    for _ in range(count - 1):
        w = matrix @ basis[-1]
        basis.append(w / np.linalg.norm(w))
    return np.linalg.qr(np.stack(basis, axis=1))[0]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iterate_has_the_least_energy_error_on_the_krylov_space(steps):
    matrix, rhs = spd(30.0), vector()
    v = krylov(matrix, rhs, steps)
    best = v @ np.linalg.solve(v.T @ matrix @ v, v.T @ rhs)
    assert error(run("cg budget", matrix, rhs, max_steps=steps).x, best) <= tol(1e-12, 1e-4)


def test_an_eigenvector_takes_one_step():
    q = rotation(0)
    out = run("cg", spd(30.0), q[:, 3])
    assert (out.status, out.steps) == (hg.Status.OK, 1)
    assert out.true_residual <= 100 * EPS


def test_a_miss_is_a_status_only_where_convergence_is_claimed():
    matrix, rhs = spd(1e3), vector()
    assert run("cg", matrix, rhs, max_steps=5).status == hg.Status.LINEAR_MAX_STEPS
    assert run("cg budget", matrix, rhs, max_steps=5).status == hg.Status.OK
    assert run("cg budget", matrix, rhs, max_steps=5).residual > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_negative_curvature_is_named_and_leaves_a_finite_iterate(seed):
    for shift in (0.9, 0.3, 0.1):
        out = run("cg", spd(20.0, seed) - shift * np.eye(N), vector(seed), max_steps=10_000)
        assert out.status == hg.Status.NEG_CURVATURE
        assert np.isfinite(out.x).all()


def test_a_direction_without_curvature_but_with_a_product_is_a_saddle():
    signs = np.where(np.arange(N) % 2, 1.0, -1.0)
    out = run("cg", np.diag(signs), np.ones(N))
    assert (out.status, out.steps) == (hg.Status.NEG_CURVATURE, 1)
    np.testing.assert_array_equal(out.x, 0)


def test_truncated_it_keeps_the_last_iterate_before_negative_curvature_and_claims_nothing():
    values = np.linspace(1, 2, N)
    values[0] = -1.0
    q = rotation(0)
    matrix, rhs = (q * values) @ q.T, q @ np.where(np.arange(N) == 0, 0.3, 1.0)
    steps = next(k for k in range(1, 6) if run("cg budget", matrix, rhs, max_steps=k).status != hg.Status.OK)
    assert steps > 1, "the first direction has positive curvature"
    before, out = run("cg budget", matrix, rhs, max_steps=steps - 1), run("cg truncated", matrix, rhs)
    assert (out.status, out.steps) == (hg.Status.OK, steps)
    assert error(out.x, before.x) <= 100 * EPS
    assert np.isnan(out.residual)
    assert np.isinf(out.inverse_of_gap).all()


@pytest.mark.parametrize("start", [False, True])
def test_truncated_at_the_first_direction_it_takes_a_step_of_the_size_of_the_operator(start):
    """Never the other way, even from a start along which A curves down."""
    matrix, rhs = -spd(20.0), vector()
    out = run("cg truncated", matrix, rhs, start=rhs if start else None)
    assert (out.status, out.steps) == (hg.Status.OK, 1 + start)
    assert error(out.x, np.linalg.norm(rhs) * rhs / np.linalg.norm(matrix @ rhs)) <= 100 * EPS
    saddle = np.diag(np.where(np.arange(N) % 2, 1.0, -1.0))  # pᵀAp = 0: a step for its size would have no end
    assert error(run("cg truncated", saddle, np.ones(N)).x, np.ones(N)) <= 100 * EPS


def test_truncated_it_changes_nothing_on_a_definite_system_and_still_refuses_a_null_space():
    matrix, rhs = spd(30.0), vector()
    plain, out = (run(name, matrix, rhs, start=vector(5)) for name in ("cg budget", "cg truncated"))
    np.testing.assert_allclose(out.x, plain.x, rtol=1e3 * EPS, atol=1e2 * EPS)
    assert (out.residual, out.steps) == (pytest.approx(plain.residual, rel=1e4 * EPS), plain.steps)
    assert run("cg truncated", np.zeros((N, N)), rhs).status == hg.Status.SINGULAR


def test_truncating_contradicts_a_tolerance():
    for options in ({}, {"tol": 1e-3}, {"tol": 1e-3, "max_steps": 5}):
        with pytest.raises(hg.InputError, match="give max_steps= without tol="):
            hg.linear.cg(**options, indefinite="truncate")
    with pytest.raises(hg.InputError, match="indefinite"):
        hg.linear.cg(max_steps=5, indefinite="trunkate")


def test_small_negative_eigenvalues_are_no_null_space():
    values = np.ones(N)
    values[0] = -tol(1e-6, 1e-3)
    q = rotation(2)
    assert run("cg", (q * values) @ q.T, vector()).status == hg.Status.NEG_CURVATURE


@pytest.mark.parametrize("seed", range(5))
def test_singular_and_consistent_gives_the_shortest_solution(seed):
    matrix = singular(seed=seed)
    rhs = matrix @ vector(seed)
    out = run("cg", matrix, rhs)
    assert out.status == hg.Status.OK
    assert error(out.x, np.linalg.pinv(matrix, rcond=1e-6) @ rhs) <= tol(1e-8, 1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_curvature_below_the_noise_of_the_operator_is_no_saddle(seed):
    """Away from its optimum a loss has a little curvature of either sign along its symmetries."""
    rng = np.random.default_rng(seed)
    small, q = tol(1e-10, 1e-7), rotation(seed)
    values = 10 ** rng.uniform(-2, 0, N)
    values[:4] = small * rng.uniform(-1, 1, 4)
    values[0] = -small
    rhs = q @ np.concatenate([tol(1e-9, 1e-5) * rng.normal(size=4), rng.normal(size=N - 4)])
    matrix = jnp.asarray((q * values) @ q.T)
    out = solve(SOLVERS["cg"], lambda v: matrix @ v, jnp.asarray(rhs), options={"noise": jnp.asarray(tol(1e-8, 1e-6))})
    assert hg.Status(int(out.status)).usable
    exact = q[:, 4:] @ ((q[:, 4:].T @ rhs) / values[4:])
    assert error(q[:, 4:].T @ np.asarray(out.solution), q[:, 4:].T @ exact) <= tol(1e-6, 1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_singular_and_inconsistent_is_named(seed):
    matrix, rhs = singular(seed=seed), vector(seed)
    assert run("cg", matrix, rhs).status == hg.Status.SINGULAR
    assert run("cg", matrix, rhs, scales=1 / np.diag(matrix)).status == hg.Status.SINGULAR


def test_the_zero_operator_is_singular():
    out = run("cg", np.zeros((N, N)), vector())
    assert out.status == hg.Status.SINGULAR
    np.testing.assert_array_equal(out.x, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_rayleigh_quotients_are_no_breakdown_in_low_precision(dtype):
    """An absolute floor on curvature, 200·eps·n, would be 0.24 here in float32 and 15,600 in bfloat16."""
    n = 10_000
    linear = hg.linear.cg(tol=1e-2, preconditioner=None)
    f = jax.jit(lambda scales, rhs: solve(linear, lambda v: scales * v, rhs)[:4])
    rhs = jax.random.normal(jax.random.key(0), (n,)).astype(dtype)
    for size in (1e-6, 1e-3, 1.0, 1e6):
        scales = (size * (1 + jnp.arange(n) / n)).astype(dtype)
        solution, _, _, status = f(scales, rhs)
        assert hg.Status(int(status)).usable
        exact = np.asarray(rhs, np.float64) / np.asarray(scales, np.float64)
        assert error(np.asarray(solution, np.float64), exact) <= (0.02 if dtype == "float32" else 0.05)


def test_scaling_a_large_system_in_float32_changes_nothing():
    n = 100_000
    rng = np.random.default_rng(0)
    scales, rhs = (jnp.asarray(x, jnp.float32) for x in (np.geomspace(1e-2, 1, n), rng.normal(size=n)))
    f = jax.jit(lambda s, b: solve(hg.linear.cg(tol=1e-5, preconditioner=None), lambda v: s * v, b)[:4])
    plain = f(scales, rhs)
    for size in (1e-6, 1e6):
        scaled = f(jnp.float32(size) * scales, jnp.float32(size) * rhs)
        assert int(plain[3]) == int(scaled[3]) == hg.Status.OK
        assert error(np.asarray(scaled[0]), np.asarray(plain[0])) <= 1e-3


def test_the_diagonal_as_a_preconditioner_saves_half_of_the_steps():
    scales = np.geomspace(1, 1e4, N)
    matrix = np.sqrt(scales)[:, None] * (np.eye(N) + 0.3 * spd(10.0)) * np.sqrt(scales)[None, :]
    out, plain = run("cg", matrix, vector(), scales=1 / np.diag(matrix)), run("cg", matrix, vector())
    assert out.status.usable
    assert out.steps < plain.steps / 2
    assert error(out.x, np.linalg.solve(matrix, vector())) <= tol(1e-9, 1e-3)


def test_a_preconditioner_that_is_not_positive_definite_is_a_breakdown():
    out = run("cg", spd(10.0), vector(), scales=-np.ones(N))
    assert out.status == hg.Status.LINEAR_BREAKDOWN
    assert np.isfinite(out.x).all()


def test_an_operator_that_is_not_symmetric_never_counts_as_solved_when_it_is_not():
    skew = np.triu(np.random.default_rng(0).normal(size=(N, N)), 1)
    for size in (0.01, 0.3, 3.0):
        out = run("cg", np.eye(N) + size * (skew - skew.T), vector())
        assert not out.status.usable or out.true_residual <= tol(1e-8, 1e-4)


def test_curvature_is_known_even_where_the_start_needed_no_step():
    matrix, rhs = 1e-4 * spd(10.0), vector()
    out = run("cg", matrix, rhs, start=np.linalg.solve(matrix, rhs) + vector(3), tol=1e-1)
    assert out.steps == 1
    ratio = np.linalg.norm(out.inverse_of_gap) / np.linalg.norm(out.x - np.linalg.solve(matrix, rhs))
    assert 0.1 < ratio < 10

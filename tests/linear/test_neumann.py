"""The Neumann series is its polynomial, and says when it has no limit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear.neumann import largest_growth
from tests._helpers import tol
from tests.linear._systems import EPS, N, contraction, error, general, run, singular, spd, vector


def polynomial(matrix, rhs, terms, step_size):
    total, term = np.zeros_like(rhs), rhs.copy()
    for _ in range(terms + 1):
        total, term = total + term, term - step_size * matrix @ term
    return step_size * total


@pytest.mark.parametrize("matrix", [spd(30.0), contraction(0.8), general(5.0)], ids=["spd", "contraction", "general"])
@pytest.mark.parametrize("terms", [0, 1, 5, 12])
def test_k_terms_are_the_polynomial_at_k_products(matrix, terms):
    for step_size in (0.3, 0.77):
        out = run("neumann budget", matrix, vector(), max_steps=terms, step_size=step_size)
        assert out.steps == terms
        assert error(out.x, polynomial(matrix, vector(), terms, step_size)) <= 20 * EPS


def test_a_start_stands_for_the_last_term():
    matrix, rhs, start = spd(30.0), vector(), vector(3)
    product = matrix @ start
    fitted = start * (product @ rhs) / (product @ product)
    expected = fitted + polynomial(matrix, rhs - matrix @ fitted, 4, 0.6)
    out = run("neumann budget", matrix, rhs, start, max_steps=5, step_size=0.6)
    assert out.steps == 5
    assert error(out.x, expected) <= 50 * EPS


def test_no_term_beyond_the_first_is_the_identity_and_knows_nothing():
    out = run("neumann budget", spd(10.0), vector(), vector(3), max_steps=0, step_size=0.3)
    np.testing.assert_allclose(out.x, np.float32(0.3) * vector() if tol(0, 1) else 0.3 * vector(), rtol=4 * EPS)
    assert out.steps == 0 and out.status == hg.Status.OK
    assert np.isnan(out.residual) and np.isinf(out.inverse_of_gap).all()


def test_residual_is_foretold_between_its_bounds():
    matrix, rhs = spd(30.0), vector()
    for terms in (1, 3, 10, 40):
        out = run("neumann budget", matrix, rhs, max_steps=terms, step_size=0.9)
        # Norms of the terms are log-convex for symmetric A: the ratio can only rise, up to 1.
        last = np.linalg.norm(rhs - matrix @ polynomial(matrix, rhs, terms - 1, 0.9)) / np.linalg.norm(rhs)
        assert out.residual * (1 - 1e-4) <= out.true_residual <= last
        assert out.residual >= 0.7 * out.true_residual


@pytest.mark.parametrize("seed", range(10))
def test_growth_is_named_above_the_limit_and_only_there(seed):
    matrix = spd(20.0, seed)  # largest eigenvalue 1
    for step_size, diverges in [(1.0, False), (1.9, False), (1.99, False), (2.1, True), (3.0, True)]:
        for terms in (5, 20, 60):
            status = run("neumann budget", matrix, vector(seed), max_steps=terms, step_size=step_size).status
            if not diverges:
                assert status == hg.Status.OK
            elif terms >= 20 or step_size == 3.0:
                assert status == hg.Status.NEUMANN_DIVERGING, (step_size, terms)


def test_indefinite_operators_are_named():
    for shift in (0.3, 0.05):
        matrix = spd(20.0) - (1 / 20 + shift) * np.eye(N)
        assert run("neumann", matrix, vector()).status == hg.Status.NEUMANN_DIVERGING
        out = run("neumann budget", matrix, vector(), max_steps=2000, step_size=0.5)
        assert out.status == hg.Status.NEUMANN_DIVERGING


def test_a_diverging_sum_stays_finite():
    out = run("neumann budget", spd(10.0), vector(), max_steps=10_000, step_size=10.0)
    assert out.status == hg.Status.NEUMANN_DIVERGING
    assert np.isfinite(out.x).all() and out.steps < 100


@pytest.mark.parametrize("seed", range(5))
def test_step_size_of_the_power_iteration_always_converges(seed):
    growth = jax.jit(lambda a, key: largest_growth(lambda v: a @ v, jnp.zeros(N), key, 10))
    for matrix in (spd(1.01, seed), spd(100.0, seed), spd(1e6, seed), singular(1, seed)):
        largest = np.linalg.eigvalsh(matrix)[-1]
        found = [float(growth(jnp.asarray(matrix, float), jax.random.key(k))) for k in range(5)]
        assert np.all(np.array(found) > 0.7 * largest) and np.all(np.array(found) <= largest * (1 + 50 * EPS))
    assert run("neumann", contraction(0.9, seed), vector(seed)).status == hg.Status.OK


def test_contractions_are_not_called_diverging():
    """Where A is not normal, terms grow for a while now and then although the series converges."""
    for seed in range(40):
        out = run("neumann budget", contraction(0.8, seed), vector(seed), max_steps=30, step_size=1.0)
        assert out.status == hg.Status.OK, seed
        out = run("neumann budget", contraction(1.1, seed), vector(seed), max_steps=60, step_size=1.0)
        assert out.status == hg.Status.NEUMANN_DIVERGING, seed


def test_too_few_terms_for_the_tolerance_is_a_status():
    assert run("neumann", spd(1e3), vector(), max_steps=50).status == hg.Status.LINEAR_MAX_STEPS


def test_curvature_is_the_smallest_eigenvalue_in_the_long_run():
    for size in (1.0, 1e-3):
        matrix = size * spd(20.0)
        out = run("neumann budget", matrix, vector(), max_steps=60, step_size=0.9 / size)
        gap = vector() - matrix @ out.x
        np.testing.assert_allclose(out.inverse_of_gap * size, 20 * gap, rtol=0.1, atol=0.1 * np.abs(gap).max())


def test_singular_and_consistent_gives_the_shortest_solution():
    matrix = singular()
    rhs = matrix @ vector()
    out = run("neumann", matrix, rhs)
    assert out.status == hg.Status.OK
    assert error(out.x, np.linalg.pinv(matrix, rcond=1e-6) @ rhs) <= 1e-4

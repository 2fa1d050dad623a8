"""Newton's method: one step on a quadratic, and named outcomes where there is no minimum to find."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import relative_error, tol
from tests.inner._solve import solve, status, told_apart

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(5, 5))
A, B = ROOT @ ROOT.T + np.eye(5), RNG.normal(size=5)


def quadratic(w, h, batch):
    return 0.5 * w @ jnp.asarray(A) @ w - jnp.asarray(B) @ w


def valley(w, h, batch):
    """Rosenbrock's: curved, with its minimum at (1, 1)."""
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def test_a_quadratic_is_solved_to_rounding_in_a_few_steps():
    result = solve(hg.inner.newton(), quadratic, jnp.zeros(5))
    assert status(result) == "OK" and int(result.steps) <= 6
    assert relative_error(result.params, np.linalg.solve(A, B)) <= tol(1e-9, 1e-4)


def test_the_bottom_of_a_curved_valley_and_the_residual_that_is_reported():
    result = solve(hg.inner.newton(), valley, jnp.asarray([-1.2, 1.0]))
    assert status(result) == "OK"
    np.testing.assert_allclose(result.params, 1, rtol=tol(1e-8, 1e-3))
    gradient = jax.grad(valley)(result.params, None, None)
    np.testing.assert_allclose(result.residual, jnp.linalg.norm(gradient), rtol=tol(1e-6, 1e-2), atol=tol(1e-14, 1e-6))


def test_badly_scaled_problems_take_no_more_steps():
    """Newton's method does not see a change of units, where descent takes a step for each factor in the condition."""
    scales = jnp.asarray([0.1, 0.3, 1.0, 3.0, 10.0])
    result = solve(hg.inner.newton(), lambda w, h, b: quadratic(scales * w, h, b), jnp.zeros(5))
    assert status(result) == "OK" and int(result.steps) <= 12
    assert relative_error(scales * result.params, np.linalg.solve(A, B)) <= tol(1e-5, 1e-2)


def test_a_saddle_is_left_behind():
    """From beside a saddle, where the Hessian is indefinite, to a minimum at w₁ = 0, w₂ = ±1."""
    loss = lambda w, h, b: 0.5 * w[0] ** 2 - 0.5 * w[1] ** 2 + 0.25 * w[1] ** 4
    result = solve(hg.inner.newton(), loss, jnp.asarray([0.5, 0.05]))
    assert status(result) == "OK"
    np.testing.assert_allclose(result.params, [0, 1], atol=tol(1e-7, 1e-3))


def test_a_missed_tolerance_is_inner_max_steps_and_keeps_the_progress():
    start = jnp.asarray([-1.2, 1.0])
    result = solve(hg.inner.newton(max_steps=2), valley, start)
    assert status(result) == "INNER_MAX_STEPS" and int(result.steps) == 2
    assert valley(result.params, None, None) < valley(start, None, None)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda w, h, b: jnp.sum(w) + jnp.nan, "NONFINITE_LOSS"),
        (lambda w, h, b: jnp.sum(jnp.sqrt(w * w)), "NONFINITE_GRAD"),
        (lambda w, h, b: jnp.sum(jnp.abs(w - 0.3)), "INNER_STALLED"),
    ],
)
def test_what_cannot_be_solved_is_named_and_the_parameters_stay_finite(loss, expected):
    result = solve(hg.inner.newton(), loss, jnp.zeros(2) if expected != "INNER_STALLED" else jnp.ones(2))
    assert status(result) == expected
    assert np.all(np.isfinite(result.params))


def test_mistakes_name_the_option():
    with pytest.raises(ValueError, match="newton: tol"):
        hg.inner.newton(tol=-1.0)
    with pytest.raises(TypeError, match=r"newton: unknown option 'max_step', did you mean 'max_steps'"):
        hg.inner.newton(max_step=3)


def test_gradients_decide_where_values_lose_digits():
    loss, start, data = told_apart(16, rows=200, features=20, classes=2, size=30)
    decay = tol(1e-5, 1e-2)  # smaller ones, float32's gradients do not resolve
    result = jax.jit(jax.vmap(lambda batch: solve(hg.inner.newton(), loss, start, decay, batch)))(data)
    assert max(result.status) <= tol(hg.Status.OK, hg.Status.PRECISION_LIMITED)
    assert max(result.steps) < 30  # in float64 one of them once took fifty

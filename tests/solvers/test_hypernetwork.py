"""Hypernetworks where the best response is known: linear in λ, or ridge in closed form; and their mistakes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import relative_error, tol

PyTree = Any
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(20, 3)), RNG.normal(size=(20, 2))
Y = X @ np.asarray([1.0, -2.0, 0.5])[:, None] + 0.3 * RNG.normal(size=(20, 2))
VALID = RNG.normal(size=(15, 3)), RNG.normal(size=(15, 2))
A = X.T @ X / 20
LOG_L2 = -0.4


def _ridge_loss(params: PyTree, log_l2: Any, batch: PyTree) -> jax.Array:
    return 0.5 * jnp.sum((X @ params["w"] - Y) ** 2) / 20 + 0.5 * jnp.exp(log_l2) * jnp.sum(params["w"] ** 2)


def _outer_loss(params: PyTree, hparams: Any, batch: PyTree) -> jax.Array:
    return jnp.mean((VALID[0] @ params["w"] - VALID[1]) ** 2)


RIDGE = hg.Problem(_ridge_loss, _outer_loss)
START = {"w": jnp.zeros((3, 2))}


def _solution(log_l2: float) -> np.ndarray:
    return np.linalg.solve(A + np.exp(log_l2) * np.eye(3), X.T @ Y / 20)


def _outer_gradient(w: np.ndarray) -> np.ndarray:
    return 2 * VALID[0].T @ (VALID[0] @ w - VALID[1]) / VALID[1].size


def _two_points(spread: float) -> Any:
    """λ ± spread, each half of the time: what is drawn can be met exactly, so that the noise of the draws dies out."""
    return lambda key: LOG_L2 + spread * jax.random.rademacher(key, (), jnp.result_type(float))


def test_a_linear_response_to_linear_hyperparameters_is_exact_at_any_scale():
    """w*(λ) = A⁻¹Xᵀ(y + Zλ)/n: no draw is too far away."""
    inner_loss = lambda w, h, batch: 0.5 * jnp.mean((X @ w - Y[:, 0] - Z @ h["shift"]) ** 2)
    outer_loss = lambda w, h, batch: jnp.sum((w - 0.3) ** 2) + 0.1 * jnp.sum(h["shift"] ** 2)
    solver = hg.hypernetwork(
        hg.Problem(inner_loss, outer_loss), optimizer=optax.sgd(0.1), steps=10, scale=1.0, warmup=4000
    )
    hparams = {"shift": jnp.asarray([0.7, -0.3])}
    out, state = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(3), hparams), hparams, key=KEY)
    response = np.linalg.solve(A, X.T @ Z / 20)
    w = np.linalg.solve(A, X.T @ (Y[:, 0] + Z @ np.asarray(hparams["shift"])) / 20)
    expected = {"shift": 2 * response.T @ (w - 0.3) + 0.2 * np.asarray(hparams["shift"])}
    assert relative_error(out.grad, expected) < tol(1e-9, 1e-4)
    assert out.info.linear_residual < tol(1e-8, 1e-4) and out.info.inner_residual < tol(1e-8, 1e-4)
    assert out.info.error_estimate < tol(1e-7, 1e-3)
    assert relative_error(solver.response(state, {"shift": hparams["shift"] + 1}), w + response @ np.ones(2)) < tol(
        1e-9, 1e-4
    )


@pytest.fixture(scope="module", params=["linear", "linear, not centred", "structured"])
def ridge(request):
    """A solver of the two-point problem, compiled once, with the spread in its options."""
    response = {
        "linear": hg.responses.linear(),
        "linear, not centred": hg.responses.linear(centred=False),
        "structured": hg.responses.structured(),
    }[request.param]
    solver = hg.hypernetwork(
        RIDGE, response=response, optimizer=optax.sgd(0.3), steps=10, distribution=_two_points(1.0), warmup=60_000
    )
    return solver, jax.jit(solver.hypergrad)


def _with_scale(state: Any, scale: float) -> Any:
    return state._replace(options={**state.options, "scale": jnp.full_like(state.options["scale"], scale)})


def test_slope_of_a_trained_response_is_the_chord_of_the_best_response_and_tends_to_its_tangent(ridge):
    """dw*/dlog λ = −λ A⁻¹ w* as the spread of the draws goes to zero, and the hypergradient with it."""
    solver, hypergrad = ridge
    tangent = -np.exp(LOG_L2) * np.linalg.solve(A + np.exp(LOG_L2) * np.eye(3), _solution(LOG_L2))
    errors = []
    for spread in (0.8, 0.4):
        state = _with_scale(solver.init(START, LOG_L2, key=KEY), spread)
        out, state = hypergrad(state, LOG_L2, key=KEY)
        ends = [solver.response(state, LOG_L2 + s)["w"] for s in (spread, -spread)]
        solutions = [_solution(LOG_L2 + s) for s in (spread, -spread)]
        chord = (solutions[0] - solutions[1]) / (2 * spread)
        assert relative_error(ends, solutions) < tol(1e-9, 1e-4)
        assert relative_error(out.grad, np.sum(_outer_gradient(sum(solutions) / 2) * chord)) < tol(1e-8, 2e-3)
        errors.append(relative_error((np.asarray(ends[0]) - np.asarray(ends[1])) / (2 * spread), tangent))
    # The chord's error is spread² w*‴/6, and 3 % of that is of higher order at these spreads.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.06)
    assert errors[1] < 0.02

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


def test_a_thousand_steps_with_new_values_and_options_trace_once():
    traces = []

    def inner_loss(params, log_l2, batch):
        traces.append(1)
        return _ridge_loss(params, log_l2, batch)

    solver = hg.hypernetwork(hg.Problem(inner_loss, _outer_loss), optimizer=optax.sgd(0.1), steps=1, scale=0.1)
    step = jax.jit(solver.hypergrad)
    state = solver.init(START, LOG_L2)
    _, state = step(state, LOG_L2, key=KEY)
    traced = len(traces)
    for i in range(1000):
        _, state = step(_with_scale(state, 0.1 + 1e-3 * i), LOG_L2 + 1e-3 * i, key=KEY)
    assert len(traces) == traced and step._cache_size() == 1


def test_check_says_how_far_the_best_response_is_off():
    inner_loss = lambda w, h, batch: 0.5 * jnp.sum((w - h) ** 2)  # w*(λ) = λ
    problem = hg.Problem(inner_loss, lambda w, h, batch: jnp.sum(w**3))
    make = functools.partial(hg.hypernetwork, problem, optimizer=optax.sgd(0.3), steps=5, scale=0.5)
    hparams = jnp.asarray([0.7, -0.4])
    good = hg.check(make(warmup=2000), jnp.zeros(2), hparams, key=KEY)
    assert good.ok and good.relative_error < tol(1e-6, 1e-2)
    early = hg.check(make(), jnp.zeros(2), hparams, key=KEY)
    assert not early.ok
    (cause,) = [cause for cause in early.causes if cause.startswith("learned:")]
    assert "training there alone 0.279" in cause  # 0.7³ − 0.4³


def test_a_discrete_hyperparameter_is_tuned_to_where_the_answer_is():
    """The training loss sees λ rounded, so that no derivative of it says anything of λ."""
    inner_loss = lambda w, h, batch: 0.5 * (w - jnp.round(h)) ** 2
    problem = hg.Problem(inner_loss, lambda w, h, batch: (w - 5.0) ** 2)
    domain = hg.domains.interval(0, 9)
    solver = hg.hypernetwork(problem, optimizer=optax.sgd(0.1), steps=5, scale=0.5, domain=domain)
    result = hg.tune(solver, 0.0, 2.0, outer=optax.adam(0.1), steps=150, domain=domain, key=KEY, progress=False)
    assert float(result.hparams) == pytest.approx(5, abs=0.6)


def test_model_state_is_trained_along_and_averaged_over_draws():
    def inner_loss(w, h, batch, state):
        return 0.5 * jnp.sum((w - h) ** 2), {"mean": 0.9 * state["mean"] + 0.1 * w[0], "count": state["count"] + 1}

    problem = hg.Problem(inner_loss, lambda w, h, batch, state: jnp.sum(w) + state["mean"], model_state=True)
    solver = hg.hypernetwork(problem, optimizer=optax.sgd(0.5), steps=7, scale=0.1, draws=4)
    state = solver.init(jnp.zeros(2), 0.5, model_state={"mean": jnp.zeros(()), "count": jnp.int32(0)})
    out, state = jax.jit(solver.hypergrad)(state, 0.5, key=KEY)
    assert int(state.model_state["count"]) == 7 and int(out.info.inner_steps) == 7
    assert 0.05 < float(state.model_state["mean"]) < 0.5


def test_a_diverging_response_is_a_status_and_the_state_stays():
    solver = hg.hypernetwork(RIDGE, optimizer=optax.sgd(50.0), steps=200, scale=0.1)
    state = solver.init(START, LOG_L2)
    out, after = jax.jit(solver.hypergrad)(state, LOG_L2, key=KEY)
    assert int(out.info.status) == hg.Status.INNER_DIVERGED
    assert_trees_equal(after.weights, state.weights)


def test_a_slope_that_explains_nothing_has_an_infinite_error_estimate():
    """σ = 0 leaves a centred slope at zero: biased without limit, and said so at construction and in every call."""
    with pytest.warns(UserWarning, match=r"hypernetwork: with scale=0 .* not determined"):
        solver = hg.hypernetwork(RIDGE, optimizer=optax.sgd(0.3), steps=3, scale=0.0)
    out, _ = jax.jit(solver.hypergrad)(solver.init(START, LOG_L2), LOG_L2, key=KEY)
    assert int(out.info.status) == hg.Status.INSENSITIVE
    assert float(out.info.linear_residual) == pytest.approx(1) and np.isinf(out.info.error_estimate)


def _solver(**options: Any) -> hg.Solver:
    return hg.hypernetwork(RIDGE, **({"optimizer": optax.sgd(0.1), "steps": 2, "scale": 0.1} | options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _solver(scale=None), ValueError, r"give scale= .* or distribution= .* found neither"),
        (lambda: _solver(distribution=(0.0, 1.0)), ValueError, r"give scale= .* or distribution= .* found both"),
        (lambda: _solver(scale=None, distribution=3), TypeError, r"distribution must be a function key -> hparams"),
        (lambda: _solver(scale=-1.0), ValueError, r"hypernetwork: scale must be at least 0, found -1.0"),
        (lambda: _solver(draws=0), ValueError, r"hypernetwork: draws must be at least 1, found 0"),
        (lambda: _solver(warmup=1.5), TypeError, r"hypernetwork: warmup must be an integer, found 1.5"),
        (lambda: _solver(steps=2.0), TypeError, r"hypernetwork: steps must be an integer, found 2.0"),
        (lambda: _solver(stesp=2), TypeError, r"unknown option 'stesp', did you mean 'steps'"),
        (lambda: _solver(optimizer=lambda h: optax.sgd(h)), TypeError, r"optimizer must be an optax optimizer.*adam"),
        (lambda: _solver(response=hg.responses.linear), TypeError, r"response must be an hg.responses.Response, found"),
    ],
)
def test_options_that_cannot_work_are_named_with_a_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ((jnp.zeros(2), 1.0), r"distribution\[0\] has shape \(2,\), expected \(\)"),
        (lambda key: {"l2": 1.0}, r"what distribution\(key\) returns\['l2'\] of shape \(\) is not expected|is missing"),
    ],
)
def test_a_distribution_over_other_hyperparameters_is_refused_by_path(distribution, message):
    solver = _solver(scale=None, distribution=distribution)
    with pytest.raises(ValueError, match=message):
        solver.hypergrad(solver.init(START, LOG_L2), LOG_L2, key=KEY)


def test_a_missing_key_and_other_hyperparameters_are_named():
    solver = _solver()
    state = solver.init(START, LOG_L2)
    with pytest.raises(ValueError, match=r"hypernetwork draws hyperparameters.*key is None: pass key=jax.random.key"):
        solver.hypergrad(state, LOG_L2)
    with pytest.raises(ValueError, match=r"hparams has shape \(2,\), expected \(\): .*like those given to init"):
        solver.hypergrad(state, jnp.zeros(2), key=KEY)


def test_a_hyperparameter_that_nothing_uses_warns_and_a_rounded_one_does_not():
    hparams = {"used": 0.3, "rounded": 0.4, "misspelt": 0.5}
    inner_loss = lambda w, h, batch: jnp.sum((w - h["used"] - jnp.round(h["rounded"])) ** 2)
    problem = hg.Problem(inner_loss, lambda w, h, batch: jnp.sum(w**2))
    solver = hg.hypernetwork(problem, optimizer=optax.sgd(0.1), steps=1, scale=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jax.eval_shape(functools.partial(solver.hypergrad, key=KEY), solver.init(jnp.zeros(2), hparams), hparams)
    (message,) = [str(w.message) for w in seen]
    assert "hparams['misspelt'] is used neither by inner_loss" in message

"""First order only: ∂_λ f at the solution, and an honest word on what is left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_equal, relative_error, tol

A = np.diag([0.6, 1.5, 2.2])
B = np.array([0.75, -0.5, 1.25])
L2 = np.array([-1.3, 0.4, -0.7])


def ridge(w, h, batch):
    return 0.5 * w @ jnp.asarray(A) @ w - jnp.asarray(B) @ w + 0.5 * jnp.sum(jnp.exp(h["l2"]) * w**2)


def solution(l2: np.ndarray) -> np.ndarray:
    return B / (np.diag(A) + np.exp(l2))


def call(problem: hg.Problem, inner: hg.inner.Inner, hparams, calls: int = 1):
    solver = hg.direct(problem, inner=inner)
    state, step = solver.init(jnp.zeros(3), hparams), jax.jit(solver.hypergrad)
    out = None
    for _ in range(calls):
        out, state = step(state, hparams)
    return solver, out, state


def test_the_direct_term_at_the_solution_and_nothing_else():
    """f = Σ sin(l2) w + ½ Σ w²: ∂_λ f = cos(l2) w*, though w* moves as well."""
    outer = lambda w, h, batch: (jnp.sum(jnp.sin(h["l2"]) * w) + 0.5 * jnp.sum(w**2), {"size": jnp.sum(w)})
    solver, out, state = call(hg.Problem(ridge, outer), hg.inner.lbfgs(), {"l2": jnp.asarray(L2)})
    w = solution(L2)
    assert relative_error(out.grad["l2"], np.cos(L2) * w) <= tol(1e-8, 1e-5)
    assert relative_error(out.value, np.sum(np.sin(L2) * w) + 0.5 * w @ w) <= tol(1e-8, 1e-5)
    assert relative_error(solver.response(state, None), w) <= tol(1e-8, 1e-5)
    np.testing.assert_allclose(out.metrics["size"], np.sum(w), rtol=tol(1e-8, 1e-5))
    assert int(out.info.status) == hg.Status.OK
    assert np.isposinf(out.info.error_estimate) and np.isnan(out.info.linear_residual)
    np.testing.assert_allclose(out.info.extra["outer_grad_norm"], np.linalg.norm(np.sin(L2) + w), rtol=tol(1e-8, 1e-5))


def test_where_the_outer_loss_is_the_inner_one_it_is_the_whole_hypergradient():
    """The envelope theorem: d/dλ min_w h(w, λ) = ∂_λ h = ½ exp(l2) w*²."""
    _, out, _ = call(hg.Problem(ridge, ridge), hg.inner.newton(), {"l2": jnp.asarray(L2)})
    assert relative_error(out.grad["l2"], 0.5 * np.exp(L2) * solution(L2) ** 2) <= tol(1e-8, 1e-5)
    assert int(out.info.status) == hg.Status.OK


def test_first_order_architecture_search_settles_where_its_bias_puts_it():
    """DARTS: f = αw − 2α + 1, h = (w − α)². The optimum is α = 1; first order ends at α = 2, where w = 2."""
    problem = hg.Problem(lambda w, a, b: jnp.sum((w - a) ** 2), lambda w, a, b: a * w[0] - 2 * a + 1)
    solver = hg.direct(problem, inner=hg.inner.gradient(optax.sgd(0.25), steps=1))
    alpha = jnp.asarray(1.3)
    state, step = solver.init(jnp.full(1, -1.0), alpha), jax.jit(solver.hypergrad)
    for _ in range(200):
        out, state = step(state, alpha)
        assert int(out.info.status) == hg.Status.OK
        alpha = alpha - 0.1 * out.grad
    np.testing.assert_allclose(float(alpha), 2.0, atol=1e-4)


def test_calls_go_on_from_each_other():
    inner = hg.inner.gradient(optax.sgd(0.3), steps=4)
    _, _, once = call(hg.Problem(ridge, ridge), inner, {"l2": jnp.asarray(L2)})
    _, out, often = call(hg.Problem(ridge, ridge), inner, {"l2": jnp.asarray(L2)}, calls=40)
    assert relative_error(once.params, solution(L2)) > 1e-2
    assert relative_error(often.params, solution(L2)) <= tol(1e-8, 1e-5)
    assert int(out.info.inner_steps) == 4


def test_model_state_is_carried_and_the_outer_loss_sees_it_frozen():
    def inner_loss(w, h, batch, model_state):
        return ridge(w, h, batch), {"mean": 0.5 * model_state["mean"] + w}

    def outer_loss(w, h, batch, model_state):
        return jnp.sum(h["l2"] * model_state["mean"])

    problem = hg.Problem(inner_loss, outer_loss, model_state=True)
    solver = hg.direct(problem, inner=hg.inner.gradient(optax.sgd(0.3), steps=2))
    hparams = {"l2": jnp.asarray(L2)}
    state = solver.init(jnp.ones(3), hparams, model_state={"mean": jnp.zeros(3)})
    out, state = jax.jit(solver.hypergrad)(state, hparams)
    second = 1 - 0.3 * (np.diag(A) - B + np.exp(L2))
    assert relative_error(state.model_state["mean"], 0.5 + second) <= tol(1e-12, 1e-5)
    assert_trees_equal(out.grad["l2"], state.model_state["mean"])


@pytest.mark.parametrize(
    ("outer", "inner", "status"),
    [
        (lambda w, h, b: jnp.log(-jnp.sum(w**2)) + jnp.sum(h["l2"]), hg.inner.newton(), hg.Status.NONFINITE_LOSS),
        (
            lambda w, h, b: jnp.sum(w) + jnp.sum(jnp.sqrt(h["l2"] - h["l2"])),
            hg.inner.newton(),
            hg.Status.NONFINITE_GRAD,
        ),
        (lambda w, h, b: jnp.sum(w) + 0.0 * jnp.sum(h["l2"]), hg.inner.newton(), hg.Status.INSENSITIVE),
        (ridge, hg.inner.gradient(optax.sgd(0.01), steps=3, tol=1e-6), hg.Status.INNER_MAX_STEPS),
        (ridge, hg.inner.gradient(optax.sgd(7.0), steps=30), hg.Status.INNER_DIVERGED),
    ],
    ids=["loss", "gradient", "insensitive", "budget", "diverged"],
)
def test_what_went_wrong_is_named_and_the_state_stays_finite(outer, inner, status):
    _, out, state = call(hg.Problem(ridge, outer), inner, {"l2": jnp.asarray(L2)})
    assert hg.Status(int(out.info.status)) == status
    assert np.all(np.isfinite(state.params))


def test_an_outer_loss_that_is_wrong_is_named_before_the_inner_problem_is_solved():
    inner = hg.inner.lbfgs()._replace(solve=lambda *args, **kwargs: pytest.fail("solved first"))
    solver = hg.direct(hg.Problem(lambda w, h, b: jnp.sum(w**2) * h, lambda w, h, b: w * h), inner=inner)
    with pytest.raises(hg.HypergradError, match=r"outer_loss.*scalar"):
        solver.hypergrad(solver.init(jnp.zeros(3), 1.0), 1.0)

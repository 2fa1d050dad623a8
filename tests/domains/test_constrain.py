"""A problem in unconstrained coordinates: same losses, same calls, and derivatives by the chain rule."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import Problem, compose, domains
from hypergrad._problem import bind_inner, bind_outer, key_use
from hypergrad._solver import InputTypeError
from hypergrad.domains.constrain import constrain
from tests._helpers import relative_error, tol


def losses():
    def inner_loss(w, h, batch):
        return jnp.sum((w - batch) ** 2) + h["l2"] * jnp.sum(w**2) + h["rate"] * jnp.sum(jnp.cos(w))

    def outer_loss(w, h, batch, key):
        return jnp.sum((w - batch) ** 2) + 0.1 * h["rate"] * jax.random.normal(key), {"norm": jnp.sum(w**2)}

    return inner_loss, outer_loss


def test_constrain_keeps_how_the_losses_are_called(key):
    problem = Problem(*losses())
    domain = {"l2": domains.log(), "rate": domains.interval(0, 2)}
    free = constrain(problem, domain)
    assert key_use(free.inner_loss, "inner_loss", False) == "none"
    assert key_use(free.outer_loss, "outer_loss", False) == "required"
    assert free.needs_key
    hparams = {"l2": jnp.asarray(0.3), "rate": jnp.asarray(0.7)}
    u = domains.to_unconstrained(domain, hparams)
    w, data = jnp.asarray([0.2, -0.4]), jnp.asarray([1.0, 2.0])
    for p, h in ((problem, hparams), (free, u)):
        value, metrics = jax.jit(bind_outer(p, data, key, None))(w, h)
        if p is problem:
            expected = value, metrics["norm"]
        else:
            np.testing.assert_allclose(value, expected[0], rtol=1e-6)
            np.testing.assert_allclose(metrics["norm"], expected[1], rtol=1e-6)


def test_constrained_gradients_follow_the_chain_rule(key):
    problem = Problem(*losses())
    domain = {"l2": domains.log(), "rate": domains.interval(0, 2)}
    hparams = {"l2": jnp.asarray(0.3), "rate": jnp.asarray(0.7)}
    u = domains.to_unconstrained(domain, hparams)
    w, data = jnp.asarray([0.2, -0.4]), jnp.asarray([1.0, 2.0])
    found = jax.jit(jax.grad(bind_inner(constrain(problem, domain), data, None, None).fixed, argnums=1))(w, u)
    inner = jax.jit(jax.grad(bind_inner(problem, data, None, None).fixed, argnums=1))(w, hparams)
    expected = {"l2": 0.3 * inner["l2"], "rate": 0.7 * (2 - 0.7) / 2 * inner["rate"]}
    assert relative_error(found, expected) <= tol(1e-12, 1e-5)


def test_constrain_keeps_model_state_and_partial_functions():
    def inner_loss(w, h, batch, state, scale=1.0):
        return h * jnp.sum(w**2), {"seen": state["seen"] + 1}

    def outer_loss(w, h, batch, state):
        return h + state["seen"]

    free = constrain(Problem(functools.partial(inner_loss, scale=2.0), outer_loss, model_state=True), domains.log())
    loss, state = free.inner_loss(jnp.ones(2), jnp.log(3.0), None, {"seen": 1})
    assert state == {"seen": 2}
    np.testing.assert_allclose(loss, 6.0, rtol=1e-6)
    np.testing.assert_allclose(free.outer_loss(jnp.ones(2), jnp.log(3.0), None, {"seen": 1}), 4.0, rtol=1e-6)


def test_constrain_keeps_what_compose_made():
    inner = compose(lambda w, h, x: jnp.tanh(h * x @ w), lambda out, w, h, x: jnp.mean(out**2) + h * jnp.sum(w**2))
    free = constrain(Problem(inner, lambda w, h, x: jnp.sum(w**2)), domains.log())
    w, x, u = jnp.asarray([0.3, 0.4]), jnp.ones((3, 2)), jnp.log(jnp.asarray(0.7))
    objective = bind_inner(free, x, None, None)
    assert objective.outputs is not None and objective.loss_of_outputs is not None
    found = objective.loss_of_outputs(objective.outputs(w, u), w, u)
    np.testing.assert_allclose(found, inner(w, jnp.exp(u), x), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: constrain(Problem(*losses()), {"l2": "log"}), ["domain['l2']", "'log'"]),
        (lambda: constrain(lambda w: w, domains.log()), ["problem must be an hg.Problem", "function"]),
    ],
)
def test_what_is_no_problem_or_no_domain_is_named(make, words):
    with pytest.raises(InputTypeError) as error:
        make()
    for word in words:
        assert word in str(error.value)

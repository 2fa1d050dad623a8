"""One training step, pulled back and pushed forward, against JAX's own derivatives of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import hypergrad as hg
from hypergrad._problem import bind_inner
from hypergrad.unrolling.step import Point, make_step, moving
from tests._helpers import assert_trees_close, assert_trees_equal, random_like, tol
from tests.unrolling._training import INNER, H, start, training


def test_a_step_pulled_back_is_the_transpose_of_its_derivative():
    step, point = training()
    cotangent = random_like(1, moving(point))

    @jax.jit
    def both(cotangent):
        here = moving(point)
        expected = jax.vjp(lambda m, h: step.through(m, h, point, 1)[0], here, H)[1](cotangent)
        return step.pull(point, step.take(point, 1).grads, 1, cotangent), expected

    found, expected = both(cotangent)
    assert_trees_close(found, expected, tol(1e-12, 1e-5))


def test_a_step_is_that_of_the_inner_optimizer_and_counts_on():
    step, point = training()
    assert int(point.model_state["seen"]) == 1 and int(jax.tree.leaves(point.state)[0]) == 1
    again = step.take(start(), 0)
    assert_trees_equal(again.point, point)
    loss = lambda w: jnp.sum(jnp.cos(w) * jnp.exp(H["l2"])) + jnp.sum(start().model_state["mean"] * w**2)
    grads = jax.grad(loss)(start().params)
    assert INNER.update is not None
    assert_trees_close(point.params, INNER.update(grads, start().params, start().state, H)[0], tol(1e-14, 1e-6))
    assert_trees_close(again.height, loss(start().params), tol(1e-14, 1e-6))


def test_a_step_of_a_map_is_pulled_back_in_one_piece():
    inner = hg.inner.fixed_point(lambda w, h, batch: jnp.tanh(h * jnp.roll(w, 1)), steps=3)
    objective = bind_inner(hg.Problem(None, lambda w, h, batch: jnp.sum(w)), None, None, None)
    w, h = jnp.asarray([0.4, -0.9, 1.3]), jnp.asarray(0.8)
    step = make_step(inner, objective, h, Point(w, inner.init(w, h), None))
    point = Point(w, inner.init(w, h), None)
    cotangent = random_like(2, moving(point))
    (pulled, contribution) = jax.jit(lambda c: step.pull(point, None, 0, c))(cotangent)
    slope = 1 - jnp.tanh(h * jnp.roll(w, 1)) ** 2
    assert_trees_close(pulled.params, jnp.roll(h * slope * cotangent.params, -1), tol(1e-13, 1e-5))
    assert_trees_close(contribution, jnp.sum(slope * jnp.roll(w, 1) * cotangent.params), tol(1e-13, 1e-5))

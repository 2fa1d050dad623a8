"""Losses and how they are called: keys, batches, metrics and model state, each where it belongs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._problem import bind_inner, bind_outer, key_use

W, H = jnp.asarray([0.3, -0.4]), jnp.asarray(0.7)


def test_whether_a_loss_takes_a_key_is_read_from_its_arguments():
    three, four = lambda w, h, b: w, lambda w, h, b, key: w
    assert key_use(three, "loss", False) == "none" and key_use(four, "loss", False) == "required"
    assert key_use(lambda w, h, b, key=None: w, "loss", False) == "optional"
    assert key_use(lambda *args: args, "loss", False) == "unknown"
    assert key_use(lambda w, h, b, state: w, "loss", True) == "none"
    assert key_use(lambda w, h, b, key, state: w, "loss", True) == "required"
    assert key_use(functools.partial(four, key=jax.random.key(0)), "loss", False) == "none"
    assert hg.Problem(three, four).needs_key and not hg.Problem(three, three).needs_key


def test_a_loss_behind_a_decorator_gets_a_key_if_it_takes_one(key):
    def decorated(loss):
        return lambda *args: loss(*args)

    three = decorated(lambda w, h, b: jnp.sum(w) * h)
    four = decorated(lambda w, h, b, key: jnp.sum(w) * h + 0 * jax.random.normal(key))
    for inner_loss, keys in ((three, (None, key)), (four, (key,))):
        for used in keys:
            value = bind_inner(hg.Problem(inner_loss, three), None, used, None).fixed(W, H)
            np.testing.assert_allclose(value, jnp.sum(W) * H, rtol=1e-6)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        bind_inner(hg.Problem(four, three), None, None, None).fixed(W, H)
    with pytest.raises(TypeError, match="unexpected"):
        bind_inner(hg.Problem(decorated(lambda w, h, b, key: jnp.sum(w, unexpected=1)), three), None, key, None).fixed(
            W, H
        )


def test_a_traced_rate_in_a_python_condition_is_named_with_the_layer_that_takes_it(key):
    def dropout(x, rate):  # as flax's: `if rate == 0: return x`
        return x if rate == 0 else x * rate

    problem = hg.Problem(lambda w, h, b: jnp.sum(dropout(w, h)), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(problem)
    with pytest.raises(hg.InputTypeError, match=r"inner_loss: .*traced.*hg\.augment\.dropout"):
        jax.eval_shape(solver.hypergrad, solver.init(W, H), H)


def test_the_fixed_loss_sees_one_draw_and_each_stochastic_step_its_own(key):
    problem = hg.Problem(lambda w, h, batch, key: jnp.sum(batch) + jax.random.normal(key), lambda w, h, batch: 0.0)
    objective = bind_inner(problem, hg.minibatches(jnp.arange(100.0), 5), key, None)
    assert objective.fixed(W, H) == objective.fixed(W, H)
    steps = [float(objective.stochastic(W, H, None, i)[0]) for i in (0, 1, 2, 0)]
    assert steps[0] == steps[3] and len(set(steps)) == 3
    batch, loss_key = objective.batch(1)
    np.testing.assert_allclose(steps[1], jnp.sum(batch) + jax.random.normal(loss_key), rtol=1e-6)


def test_the_model_state_moves_in_training_and_is_frozen_in_validation():
    problem = hg.Problem(
        lambda w, h, batch, state: (jnp.sum(w), {"mean": state["mean"] + h, "count": state["count"] + 1}),
        lambda w, h, batch, state: (state["mean"], {"count": state["count"]}),
        model_state=True,
    )
    state = {"mean": jnp.zeros(()), "count": jnp.int32(3)}
    loss, after = bind_inner(problem, None, None, None).stochastic(W, H, state, 0)
    assert loss == jnp.sum(W) and after["mean"] == H and after["count"] == 4 and after["count"].dtype == jnp.int32
    value, metrics = bind_outer(problem, None, None, after)(W, H)
    assert value == H and metrics == {"count": 4}


def test_a_composed_loss_is_its_two_parts_and_keeps_them_apart():
    model, loss = lambda w, h, x: jnp.tanh(x @ w), lambda out, w, h, x: jnp.mean(out**2) + h * jnp.sum(w**2)
    problem = hg.Problem(hg.compose(model, loss), lambda w, h, x: jnp.sum(w))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    objective = bind_inner(problem, x, None, None)
    assert objective.outputs is not None and objective.loss_of_outputs is not None
    np.testing.assert_array_equal(objective.outputs(W, H), model(W, H, x))
    assert objective.loss_of_outputs(model(W, H, x), W, H) == objective.fixed(W, H) == loss(model(W, H, x), W, H, x)


def test_an_error_inside_a_loss_keeps_its_type_and_says_once_what_the_loss_was_given():
    def broken(w, h, batch):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as error:
        bind_outer(hg.Problem(broken, broken), jnp.ones((5, 2)), None, None)(W, H)
    assert error.value.__notes__ == [
        "hypergrad: raised while tracing outer_loss, which was given params (2,), hparams (), batch (5, 2)."
    ]

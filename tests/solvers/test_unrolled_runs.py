"""What a run of training carries along: batches, keys, the model's state, counters, and the state of the solver."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._problem import bind_inner, bind_outer
from tests._helpers import assert_trees_close, assert_trees_equal, relative_error, tol

MODES = {
    "forward": {"mode": "forward"},
    "none": {"mode": "reverse", "remat": "none"},
    "step": {"mode": "reverse", "remat": "step"},
    "sqrt": {"mode": "reverse", "remat": "sqrt"},
}
RNG = np.random.default_rng(5)
X, W = RNG.normal(size=(40, 3)), RNG.normal(size=3)
TRAIN = (jnp.asarray(X), jnp.asarray(X @ W + 0.3 * RNG.normal(size=40)))
VALID = (jnp.asarray(X[::-1].copy()), jnp.asarray(X[::-1] @ W))
HPARAMS = {"l2": jnp.asarray(np.array([-1.3, 0.4, -0.7])), "noise": jnp.asarray(0.31)}


def noisy(w, h, batch, key):
    """Ridge on jittered inputs: the key matters, and so does every hyperparameter."""
    x, y = batch
    x = x + h["noise"] * jax.random.normal(key, x.shape, x.dtype)
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(h["l2"]) * w**2)


def fit(w, h, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 0.1 * jnp.sum(h["l2"])


def by_hand(problem, optimizer, params, hparams, train, valid, key, steps):
    """Outer loss and gradient through a Python loop over the same batches and keys."""
    inner_key, outer_key, _ = jax.random.split(key, 3)
    objective, outer = bind_inner(problem, train, inner_key, None), bind_outer(problem, valid, outer_key, None)

    def value(hparams):
        w, state = params, optimizer.init(params)
        for t in range(steps):
            updates, state = optimizer.update(
                jax.grad(lambda w: objective.stochastic(w, hparams, None, t)[0])(w), state, w
            )
            w = optax.apply_updates(w, updates)
        return outer(w, hparams)[0], w

    return jax.value_and_grad(value, has_aux=True)(hparams)


@pytest.mark.parametrize("mode", MODES)
def test_a_key_determines_the_run_which_is_that_of_a_loop_over_its_batches(mode):
    problem = hg.Problem(noisy, fit)
    optimizer, steps = optax.sgd(0.1, momentum=0.6), 6
    train, valid, key = hg.minibatches(TRAIN, 8), hg.minibatches(VALID, 8), jax.random.key(7)
    (value, end), grad = by_hand(problem, optimizer, jnp.zeros(3), HPARAMS, train, valid, key, steps)
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optimizer, steps=steps), **MODES[mode])
    state, step = solver.init(jnp.zeros(3), HPARAMS), jax.jit(solver.hypergrad)
    out, after = step(state, HPARAMS, train, valid, key=key)
    assert_trees_close(out.grad, grad, tol(1e-12, 1e-4))
    np.testing.assert_allclose(out.value, value, rtol=tol(1e-12, 1e-5))
    assert_trees_close(after.params, end, tol(1e-12, 1e-5))
    again, _ = step(state, HPARAMS, train, valid, key=key)
    assert_trees_equal(again, out)
    other, _ = step(state, HPARAMS, train, valid, key=jax.random.key(8))
    assert relative_error(other.grad, out.grad) > 1e-3


def with_state(w, h, batch, model_state):
    """The model's state enters the loss and moves with the parameters; there is a counter in it, too."""
    loss = 0.5 * jnp.sum((w - jnp.exp(h)) ** 2) + jnp.sum(model_state["mean"] * w**2)
    return loss, {"mean": 0.5 * model_state["mean"] + 0.1 * w, "count": model_state["count"] + 1}


def through_state(w, h, batch, model_state):
    return jnp.sum(w**2) + jnp.sum(model_state["mean"] * w)


@pytest.mark.parametrize("mode", MODES)
def test_the_derivative_goes_through_the_state_of_the_model(mode):
    """w ← w − η (w − eʰ + 2 μ w), μ ← μ/2 + w/10: dw ← (1 − η − 2ημ) dw − 2ηw dμ + η eʰ, dμ ← dμ/2 + dw/10."""
    rate, steps, h = 0.2, 5, 0.3
    w, tangent, mean, drift = np.array([0.4, -0.2]), np.zeros(2), np.array([0.1, 0.3]), np.zeros(2)
    for _ in range(steps):
        new = w - rate * (w - np.exp(h) + 2 * mean * w)
        turned = (1 - rate - 2 * rate * mean) * tangent - 2 * rate * w * drift + rate * np.exp(h)
        mean, drift = 0.5 * mean + 0.1 * w, 0.5 * drift + 0.1 * tangent
        w, tangent = new, turned
    solver = hg.unrolled(
        hg.Problem(with_state, through_state, model_state=True),
        inner=hg.inner.gradient(optax.sgd(rate), steps=steps),
        **MODES[mode],
    )
    begin = {"mean": jnp.asarray(np.array([0.1, 0.3])), "count": jnp.int32(0)}
    state = solver.init(jnp.asarray(np.array([0.4, -0.2])), h, model_state=begin)
    out, after = jax.jit(solver.hypergrad)(state, h)
    assert relative_error(out.grad, np.sum((2 * w + mean) * tangent + w * drift)) <= tol(1e-12, 1e-5)
    assert relative_error(after.model_state["mean"], mean) <= tol(1e-12, 1e-5)
    assert relative_error(after.params, w) <= tol(1e-12, 1e-5)
    assert int(after.model_state["count"]) == steps and after.model_state["count"].dtype == jnp.int32


def quadratic(w, h, batch):
    return 0.5 * jnp.sum(jnp.asarray([0.5, 1.0, 2.0]) * w**2) - jnp.sum(h["b"] * w)


def final(w, h, batch):
    return jnp.sum(w**3)


START = np.array([0.5, -0.25, 1.0])
B = {"b": np.array([0.3, -0.7, 0.45])}


def adam(steps: int, **options: Any):
    inner = hg.inner.gradient(optax.adam(0.1), steps=steps)
    solver = hg.unrolled(hg.Problem(quadratic, final), inner=inner, **options)
    return solver, solver.init(jnp.asarray(START), jax.tree.map(jnp.asarray, B)), jax.tree.map(jnp.asarray, B)


def test_cold_calls_repeat_themselves_to_the_bit():
    solver, state, hparams = adam(6)
    step = jax.jit(solver.hypergrad)
    first, after = step(state, hparams)
    second, later = step(after, hparams)
    assert_trees_equal(first, second)
    assert_trees_equal(after, later)
    assert_trees_equal(after.start[0], jnp.asarray(START))
    assert relative_error(solver.response(after, hparams), START) > 0.1


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_warm_calls_go_on_and_differentiate_their_own_steps(mode):
    """Two warm calls of 6 steps are one run of 12, of which the second differentiates the last 6."""
    solver, state, hparams = adam(6, warm_start=True, **MODES[mode])
    step = jax.jit(solver.hypergrad)
    _, state = step(state, hparams)
    out, state = step(state, hparams)
    long, begin, _ = adam(12, truncate=6, **MODES[mode])
    expected, end = jax.jit(long.hypergrad)(begin, hparams)
    assert_trees_close(out.grad, expected.grad, tol(1e-12, 1e-4))
    assert_trees_close(state.params, end.params, tol(1e-12, 1e-5))
    assert_trees_close(state.inner_state, end.inner_state, tol(1e-12, 1e-5))
    assert state.start is None
    assert float(out.info.error_estimate) < tol(1e-12, 1e-4)  # against its own steps, not against all twelve


def with_coordinates(optimizer: Any, size: int, *modes: str) -> list[hg.Hypergradient]:
    """Of a run with one coordinate that matters, one that does not, and perhaps one whose gradient is always zero."""

    def loss(w, h, batch):
        return 0.5 * jnp.sum((jnp.asarray([1.0, 2.0, 0.0][: w.size]) * w) ** 2) - h["b"] * w[0]

    inner = hg.inner.gradient(lambda h: optimizer(h["lr"]), steps=4)
    problem = hg.Problem(loss, lambda w, h, b: jnp.sum(w[:2] ** 2))
    solvers = [hg.unrolled(problem, inner=inner, **MODES[mode]) for mode in modes]
    start = jnp.asarray(START[:size])
    hparams = {"lr": jnp.asarray(0.1), "b": jnp.asarray(0.45)}
    return jax.jit(lambda h: [solver.hypergrad(solver.init(start, h), h)[0] for solver in solvers])(hparams)


@pytest.mark.parametrize("optimizer", [optax.adam, optax.adamw, optax.amsgrad, optax.rmsprop])
def test_a_coordinate_whose_gradient_is_always_zero_gives_no_nan(optimizer):
    """And the other coordinates get what they would get without it."""
    (expected,) = with_coordinates(optimizer, 2, "step")
    for mode, out in zip(MODES, with_coordinates(optimizer, 3, *MODES), strict=True):
        assert int(out.info.status) == hg.Status.OK, mode
        assert np.all(np.isfinite([out.grad["lr"], out.grad["b"]])), mode
        assert_trees_close(out.grad, expected.grad, tol(1e-12, 1e-3))


@pytest.mark.parametrize("mode", MODES)
def test_keys_and_counters_in_the_optimizers_state_are_carried_and_not_differentiated(mode):
    inner = hg.inner.gradient(
        lambda h: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(h["lr"])), steps=5
    )
    problem = hg.Problem(lambda w, h, b: quadratic(w, {"b": jnp.asarray(B["b"])}, b), final)
    solver = hg.unrolled(problem, inner=inner, **MODES[mode])
    hparams = {"lr": jnp.asarray(0.2)}
    state, step = solver.init(jnp.asarray(START), hparams), jax.jit(solver.hypergrad)
    out, after = step(state, hparams)
    size = 1e-4
    near = [float(step(state, {"lr": jnp.asarray(0.2 + s * size)})[0].value) for s in (1, -1)]
    assert relative_error(out.grad["lr"], (near[0] - near[1]) / (2 * size)) <= tol(1e-6, 1e-1)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(
        jnp.result_type(a) == jnp.result_type(b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True)
    )


def test_each_leaf_keeps_its_dtype_whatever_the_others_are():
    """Half-precision weights beside single ones, under a loss in their common precision."""

    def loss(w, h, batch):
        z = w["half"].astype(jnp.float32) + w["single"]
        return jnp.mean((z - h["target"]) ** 2)

    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(3, jnp.float32)}
    hparams = {"target": jnp.asarray(0.3), "lr": jnp.asarray(0.1, jnp.float32)}
    inner = hg.inner.gradient(lambda h: optax.adam(h["lr"]), steps=4)
    solvers = [hg.unrolled(hg.Problem(loss, loss), inner=inner, **mode) for mode in MODES.values()]
    state = solvers[0].init(params, hparams)
    for out, after in jax.jit(lambda state, h: [solver.hypergrad(state, h) for solver in solvers])(state, hparams):
        assert int(out.info.status) == hg.Status.OK
        for found, given in ((after.params, params), (out.grad, hparams), (after.inner_state, state.inner_state)):
            assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(given)]


@pytest.mark.parametrize("mode", MODES)
def test_a_derivative_without_a_correct_digit_is_not_called_one(mode):
    """The logistic map w ← λ w (1 − w): at 2.8 it ends in 1 − 1/λ, whose slope is 1/λ²; at 3.9 it is chaotic."""
    inner = hg.inner.fixed_point(lambda w, h, batch: h * w * (1 - w), steps=150)
    solver = hg.unrolled(hg.Problem(quadratic, lambda w, h, batch: w[0]), inner=inner, **MODES[mode])
    state, step = solver.init(jnp.asarray([0.3]), jnp.asarray(2.8)), jax.jit(solver.hypergrad)
    tame, _ = step(state, jnp.asarray(2.8))
    assert int(tame.info.status) == hg.Status.OK
    assert relative_error(tame.grad, 1 / 2.8**2) <= tol(1e-12, 1e-5)
    wild, _ = step(state, jnp.asarray(3.9))
    assert int(wild.info.status) == hg.Status.UNROLL_EXPLODED
    assert float(wild.info.error_estimate) > 0.1

"""Each mistake that the two losses, the trees and the options can hold: raised before anything compiles, with argument,
path, what was found and what to write instead."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

W = jnp.zeros(3)


def _quadratic(w: Any, l2: Any, batch: Any) -> jax.Array:
    return jnp.sum((w - 1.0) ** 2) + l2 * jnp.sum(w**2)


def _call(
    inner_loss: Any,
    outer_loss: Any,
    params: Any = W,
    hparams: Any = 0.5,
    train: Any = None,
    valid: Any = None,
    **options: Any,
) -> Any:
    solver = hg.implicit(hg.Problem(inner_loss, outer_loss, **options))
    state = solver.init(params, hparams)
    return solver.hypergrad(state, hparams, train, valid)


@pytest.mark.parametrize(
    ("inner_loss", "outer_loss", "error", "message"),
    [
        (
            lambda w: 0.0,
            _quadratic,
            TypeError,
            r"inner_loss must take \(params, hparams, batch\).*found \(w\).*functools.partial",
        ),
        (
            _quadratic,
            lambda w, h, b, k, s: 0.0,
            TypeError,
            r"outer_loss must take.*found \(w, h, b, k, s\).*model_state=True",
        ),
        (3.0, _quadratic, TypeError, r"inner_loss must be a function.*found float"),
        (_quadratic, None, TypeError, r"outer_loss must be a function.*found NoneType"),
    ],
)
def test_a_loss_of_the_wrong_arguments(inner_loss, outer_loss, error, message):
    with pytest.raises(error, match=message):
        hg.Problem(inner_loss, outer_loss)


@pytest.mark.parametrize(
    ("outer_loss", "error", "message"),
    [
        (lambda w, h, b: w, ValueError, r"outer_loss must return a scalar, found shape \(3,\): return its mean or sum"),
        (lambda w, h, b: jnp.sum(w)[None], ValueError, r"outer_loss must return a scalar, found shape \(1,\).*squeeze"),
        (lambda w, h, b: None, TypeError, r"outer_loss must return a scalar, found NoneType"),
        (lambda w, h, b: jnp.sum(w) > 0, TypeError, r"outer_loss must return a real floating-point scalar, found bool"),
        (
            lambda w, h, b: (jnp.sum(w), 3),
            TypeError,
            r"outer_loss must return a scalar or \(scalar, dict of metrics\), found",
        ),
        (lambda w, h, b: (jnp.sum(w), {"each": w}), ValueError, r"metric 'each' of shape \(3,\).*take its mean"),
    ],
)
def test_an_outer_loss_of_the_wrong_result(outer_loss, error, message):
    with pytest.raises(error, match=message):
        _call(_quadratic, outer_loss)


def test_an_inner_loss_that_is_a_vector():
    with pytest.raises(ValueError, match=r"inner_loss must return a scalar, found shape \(3,\)"):
        _call(lambda w, h, b: h * w**2, _quadratic)


def test_a_stateful_inner_loss_that_returns_no_state():
    inner_loss = lambda w, h, b, state: _quadratic(w, h, b)
    outer_loss = lambda w, h, b, state: jnp.sum(w)
    with pytest.raises(
        TypeError, match=r"inner_loss must return \(loss, model_state\) when hg.Problem\(..., model_state=True\)"
    ):
        _call(inner_loss, outer_loss, model_state=True)


def test_a_missing_key():
    with pytest.raises(ValueError, match=r"inner_loss takes a key, but none was given: pass key=jax.random.key\(0\)"):
        _call(lambda w, h, b, key: _quadratic(w, h, b), _quadratic)


def test_a_missing_inner_loss():
    with pytest.raises(ValueError, match=r"inner_loss is None, which only hg.inner.fixed_point and hg.inner.root"):
        _call(None, _quadratic)


@pytest.mark.parametrize(
    ("hparams", "error", "message"),
    [
        ({"l2": jnp.asarray(1, jnp.int32)}, TypeError, r"hparams\['l2'\] has dtype int32.*write it as a float"),
        ({"l2": np.int64(1)}, TypeError, r"hparams\['l2'\] has dtype int(32|64).*write it as a float"),
        ({"l2": True}, TypeError, r"hparams\['l2'\] has dtype bool"),
        ({"l2": jnp.asarray(1j)}, TypeError, r"hparams\['l2'\] has dtype complex"),
        ({"l2": 1j}, TypeError, r"hparams\['l2'\] has dtype complex"),
        ({"l2": "big"}, TypeError, r"hparams\['l2'\] is a str.*functools.partial"),
        ({"key": jax.random.key(0)}, TypeError, r"hparams\['key'\] is a PRNG key.*pass keys as key="),
        ({}, ValueError, r"hparams has no leaves, so there is nothing to tune"),
        ({"a": {"b": [1.0, jnp.zeros(2, jnp.int32)]}}, TypeError, r"hparams\['a'\]\['b'\]\[1\] has dtype int32"),
    ],
)
def test_hyperparameters_that_cannot_be_differentiated(hparams, error, message):
    solver = hg.implicit(hg.Problem(_quadratic, _quadratic))
    with pytest.raises(error, match=message):
        solver.init(W, hparams)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"w": jnp.zeros(3, jnp.int32)}, TypeError, r"params\['w'\] has dtype int32"),
        ({"w": jnp.asarray([0.0, jnp.nan, jnp.inf])}, ValueError, r"params\['w'\] holds 2 NaN or infinite of 3 values"),
        ((), ValueError, r"params has no leaves, so there is nothing to train"),
        ({"key": jax.random.key(0)}, TypeError, r"params\['key'\] is a PRNG key"),
    ],
)
def test_parameters_that_cannot_be_trained(params, error, message):
    solver = hg.implicit(hg.Problem(_quadratic, _quadratic))
    with pytest.raises(error, match=message):
        solver.init(params, 0.5)


def test_parameters_on_different_devices_are_looked_through(devices):
    solver = hg.implicit(hg.Problem(_quadratic, _quadratic))
    params = {"a": np.zeros(3), "b": np.asarray([0.0, np.nan])}
    placed = {name: jax.device_put(x, device) for (name, x), device in zip(params.items(), devices, strict=False)}
    with pytest.raises(hg.InputError, match=r"params\['b'\] holds 1 NaN or infinite of 2 values"):
        solver.init(placed, 0.5)


@pytest.mark.parametrize(
    "solver", [hg.implicit, functools.partial(hg.unrolled, inner=hg.inner.gradient(optax.sgd(0.1), steps=2))]
)
def test_python_numbers_are_hyperparameters(solver):
    made = solver(hg.Problem(_quadratic, _quadratic))
    for number in (1, 0.5, np.float32(0.5), jnp.asarray(0.5)):
        state = made.init(W, number)
        assert jnp.issubdtype(jax.eval_shape(made.hypergrad, state, number)[0].grad.dtype, jnp.floating)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: hg.implicit(p, damping=-0.1), r"implicit: damping must be at least 0, found -0.1"),
        (lambda p: hg.implicit(p, polish=-1), r"implicit: polish must be at least 0, found -1"),
        (
            lambda p: hg.implicit(p, curvature="gauss-newton"),
            r"implicit: curvature must be one of.*did you mean 'gauss_newton'",
        ),
        (lambda p: hg.implicit(p, linaer=hg.linear.cg()), r"implicit: unknown option 'linaer', did you mean 'linear'"),
        (
            lambda p: hg.implicit(p, inner=hg.inner.fixed_point(lambda w, h, b: w), linear=hg.linear.cg()),
            r"hg.linear.cg needs a symmetric operator.*hg.linear.gmres",
        ),
        (lambda p: hg.implicit(p, inner=hg.inner.fixed_point(lambda w, h, b: w), polish=1), r"need an inner loss"),
        (
            lambda p: hg.implicit(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2), polish=1),
            r"polish works towards the tolerance of the inner solver, which has none",
        ),
        (lambda p: hg.unrolled(p, inner=hg.inner.lbfgs()), r"unrolled: inner must be a number of differentiable steps"),
        (
            lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2), mode="revrse"),
            r"did you mean 'reverse'",
        ),
        (
            lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2), truncate=0),
            r"truncate must be at least 1",
        ),
        (
            lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2), memory=-1.0),
            r"memory must be greater than 0",
        ),
        (
            lambda p: hg.best_response(p, inner=hg.inner.gradient(optax.sgd(0.1), steps=2)),
            r"inner must solve to a tolerance",
        ),
        (lambda p: hg.best_response(p, linear=hg.linear.neumann(3)), r"linear must solve to a tolerance"),
        (lambda p: hg.inner.gradient(optax.sgd(0.1), steps=-1), r"steps must be at least 0, found -1"),
        (lambda p: hg.inner.lbfgs(tol=-1e-3), r"lbfgs: tol must be greater than 0, found -0.001"),
        (lambda p: hg.inner.newton(max_steps=0), r"newton: max_steps must be at least 1, found 0"),
        (lambda p: hg.inner.newton(max_steps=1.5), r"newton: max_steps must be an integer, found 1.5"),
        (lambda p: hg.linear.cg(tol="small"), r"cg: tol must be a number, found 'small'"),
        (lambda p: hg.linear.cg(maxsteps=3), r"cg: unknown option 'maxsteps', did you mean 'max_steps'"),
    ],
)
def test_options(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(hg.Problem(_quadratic, _quadratic))


def test_gauss_newton_needs_a_composed_loss():
    solver = hg.implicit(hg.Problem(_quadratic, _quadratic), curvature="gauss_newton")
    with pytest.raises(ValueError, match=r"write inner_loss as hg.compose\(outputs, loss\)"):
        solver.hypergrad(solver.init(W, 0.5), 0.5)


def test_a_learning_rate_under_implicit_differentiation_names_the_solver_that_sees_it():
    problem = hg.Problem(lambda w, h, b: _quadratic(w, h["l2"], b), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(problem, inner=hg.inner.gradient(lambda h: optax.sgd(h["lr"]), steps=5, tol=1e-3))
    hparams = {"l2": 0.3, "lr": 0.1}
    with pytest.raises(ValueError, match=r"hparams\['lr'\] does not move the inner optimum.*hg.unrolled"):
        solver.hypergrad(solver.init(W, hparams), hparams)


@pytest.mark.parametrize(
    "solver", [hg.implicit, functools.partial(hg.unrolled, inner=hg.inner.gradient(optax.sgd(0.1), steps=2))]
)
def test_a_misspelt_key_is_named(solver):
    made = solver(hg.Problem(lambda w, h, b: _quadratic(w, h["l2"], b), lambda w, h, b: jnp.sum(w)))
    hparams = {"l2": 0.3, "weigth_decay": 0.1}
    with pytest.warns(UserWarning, match=r"hparams\['weigth_decay'\]"):
        jax.eval_shape(made.hypergrad, made.init(W, hparams), hparams)


def test_a_stream_inside_jit():
    with pytest.raises(
        TypeError, match=r"hg.stream is read by hg.tune on the host; inside jit pass arrays or hg.minibatches"
    ):
        _call(_quadratic, _quadratic, train=hg.stream(iter([W]), per_step=1))


def test_raise_if_failed_inside_jit():
    solver = hg.implicit(hg.Problem(_quadratic, _quadratic))
    state = solver.init(W, 0.5)
    with pytest.raises(TypeError, match="raise_if_failed works on the host"):
        jax.eval_shape(lambda s: hg.raise_if_failed(solver.hypergrad(s, 0.5)[0]), state)


def test_the_error_inside_a_loss_says_what_it_was_given():
    batch = (jnp.ones((5, 3)), jnp.ones(4))
    loss = lambda w, h, b: jnp.mean((b[0] @ w - b[1]) ** 2) + h * jnp.sum(w**2)
    with pytest.raises(TypeError) as caught:
        _call(loss, _quadratic, train=batch)
    notes = " ".join(caught.value.__notes__)
    assert "inner_loss" in notes and "batch" in notes and "(5, 3)" in notes and "(4,)" in notes

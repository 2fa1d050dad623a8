from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad._problem import bind_inner
from tests._helpers import assert_trees_close, assert_trees_equal, central_difference, relative_error, tol
from tests.inner._solve import problem, solve, status

CURVATURE = np.array([0.7, 1.9, 3.1])
AIM = np.array([0.4, -1.2, 0.8])
START = np.array([1.5, 0.3, -0.6])
TRANSFORMATION: Any = optax.GradientTransformation


def quadratic(w, hparams, batch):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, w.dtype) * (w - jnp.asarray(AIM, w.dtype)) ** 2)


def start():
    return jnp.asarray(START)


# Closed forms on quadratics.


def test_gradient_descent_is_the_power_of_its_contraction():
    result = solve(hg.inner.gradient(optax.sgd(0.13), steps=17), quadratic, start())
    assert relative_error(result.params, AIM + (1 - 0.13 * CURVATURE) ** 17 * (START - AIM)) < tol(1e-13, 1e-5)
    last = CURVATURE * (1 - 0.13 * CURVATURE) ** 16 * (START - AIM)
    assert relative_error(result.residual, np.linalg.norm(last)) < 1e-5
    assert int(result.steps) == 17 and status(result) == "OK"


def test_momentum_is_the_power_of_its_two_by_two_matrix():
    inner = hg.inner.gradient(lambda h: optax.sgd(h["lr"], momentum=h["b"]), steps=9)
    result = solve(inner, quadratic, start(), {"lr": 0.11, "b": 0.63})
    for i, c in enumerate(CURVATURE):  # v ← b v + c (w − a),  w ← w − lr v
        matrix = np.array([[1 - 0.11 * c, -0.11 * 0.63], [c, 0.63]])
        expected = AIM[i] + (np.linalg.matrix_power(matrix, 9) @ [START[i] - AIM[i], 0.0])[0]
        assert abs(result.params[i] - expected) < tol(1e-13, 1e-5)


def test_a_schedule_of_one_rate_per_step_is_a_product_of_contractions():
    rates = np.linspace(0.05, 0.3, 6)
    result = solve(
        hg.inner.gradient(lambda h: optax.sgd(lambda t: h["lr"][t]), steps=6),
        quadratic,
        start(),
        {"lr": jnp.asarray(rates)},
    )
    expected = AIM + np.prod(1 - rates[:, None] * CURVATURE, axis=0) * (START - AIM)
    assert relative_error(result.params, expected) < tol(1e-13, 1e-5)


def unrolled(inner, hparams, steps):
    """The update that unrolling differentiates, repeated."""
    params, state = start(), inner.init(start(), hparams)
    for _ in range(steps):
        params, state = inner.update(jax.grad(quadratic)(params, hparams, None), params, state, hparams)
    return params


def test_derivatives_in_learning_rate_and_schedule_are_those_of_the_products():
    per_step = hg.inner.gradient(lambda h: optax.sgd(lambda t: h[t]), steps=4)
    rates = np.array([0.11, 0.07, 0.23, 0.16])
    found = jax.jit(jax.jacobian(lambda h: unrolled(per_step, h, 4)))(jnp.asarray(rates))
    contraction = 1 - rates[:, None] * CURVATURE
    expected = np.stack([-CURVATURE * np.prod(np.delete(contraction, t, 0), 0) * (START - AIM) for t in range(4)], 1)
    assert relative_error(found, expected) < tol(1e-12, 1e-5)


def test_a_rate_per_layer_moves_its_own_layer(x64):
    labels = {"a": "a", "b": "b"}
    inner = hg.inner.gradient(lambda h: optax.partition({name: optax.sgd(h[name]) for name in labels}, labels), steps=3)
    params = {"a": start(), "b": 2.0 * start()}
    loss = lambda w, h, batch: quadratic(w["a"], h, batch) + quadratic(w["b"], h, batch)
    result = solve(inner, loss, params, {"a": 0.1, "b": 0.25})
    assert relative_error(result.params["a"], AIM + (1 - 0.1 * CURVATURE) ** 3 * (START - AIM)) < tol(1e-13, 1e-5)
    assert relative_error(result.params["b"], AIM + (1 - 0.25 * CURVATURE) ** 3 * (2 * START - AIM)) < tol(1e-13, 1e-5)


def test_a_hyperparameter_of_the_initial_state_counts(x64):
    if not x64:
        pytest.skip("central differences need float64")
    inner = hg.inner.gradient(lambda h: optax.adagrad(0.3, initial_accumulator_value=h), steps=2)
    f = jax.jit(lambda h: jnp.sum(unrolled(inner, h, 2)))
    assert relative_error(jax.jit(jax.grad(f))(0.37), central_difference(f, jnp.asarray(0.37))) < 1e-8


# Carrying on.


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.8), optax.adam(lambda t: 0.1 / (1 + t))], ids=["momentum", "schedule"]
)
def test_two_calls_of_five_steps_are_one_of_ten(optimizer):
    half, whole = hg.inner.gradient(optimizer, steps=5), hg.inner.gradient(optimizer, steps=10)
    first = solve(half, quadratic, start())
    second = solve(half, quadratic, first.params, state=first.state)
    expected = solve(whole, quadratic, start())
    assert_trees_close((second.params, second.state), (expected.params, expected.state), tol(1e-14, 1e-5))


def test_every_step_sees_its_own_batch_and_the_model_state_passes_through(key):
    x = jax.random.normal(key, (40, 3))

    def loss(w, hparams, batch, key, seen):
        return jnp.mean((batch @ w - 1.0) ** 2) + 0.1 * jax.random.normal(key) * w[0], seen + jnp.sum(batch)

    data, begin = hg.minibatches(x, 4), jnp.asarray(0.5)
    result = solve(hg.inner.gradient(optax.sgd(0.05), steps=6), loss, start(), data=data, key=key, model_state=begin)

    objective, w, seen = bind_inner(problem(loss, True), data, key, begin), start(), begin
    batches = [objective.batch(t)[0] for t in range(6)]
    for t in range(6):
        grads, seen = jax.grad(objective.stochastic, has_aux=True)(w, 0.0, seen, t)
        w = w - 0.05 * grads
    assert len({np.asarray(b).tobytes() for b in batches}) == 6
    assert_trees_close((result.params, result.model_state), (w, seen), tol(1e-13, 1e-5))


def test_no_steps_change_nothing():
    result = solve(hg.inner.gradient(optax.adam(0.1), steps=0), quadratic, start())
    assert_trees_equal(result.params, start())
    assert int(result.steps) == 0 and status(result) == "OK" and np.isfinite(result.residual)


# To a tolerance.


def test_a_solve_to_a_tolerance_stops_there_and_reports_the_residual_of_what_it_returns():
    inner = hg.inner.gradient(optax.sgd(0.4), steps=10_000, tol=1e-4)
    result = solve(inner, quadratic, start(), scale=2.0)
    residual = jnp.linalg.norm(jax.grad(quadratic)(result.params, 0.0, None))
    before = AIM + (1 - 0.4 * CURVATURE) ** (int(result.steps) - 1) * (START - AIM)
    assert status(result) == "OK" and inner.claims
    assert relative_error(result.residual, residual) < 1e-5 and residual <= 2e-4
    assert np.linalg.norm(CURVATURE * (before - AIM)) > 2e-4


def test_a_missed_tolerance_is_inner_max_steps_and_keeps_the_progress():
    result = solve(hg.inner.gradient(optax.sgd(0.1), steps=3, tol=1e-6), quadratic, start())
    assert status(result) == "INNER_MAX_STEPS" and int(result.steps) == 3
    assert relative_error(result.params, AIM + (1 - 0.1 * CURVATURE) ** 3 * (START - AIM)) < tol(1e-13, 1e-5)
    assert relative_error(result.residual, jnp.linalg.norm(jax.grad(quadratic)(result.params, 0.0, None))) < 1e-5


def test_a_start_at_the_optimum_takes_no_step():
    result = solve(hg.inner.gradient(optax.sgd(0.1), steps=3, tol=1e-6), quadratic, jnp.asarray(AIM))
    assert status(result) == "OK" and int(result.steps) == 0


# Outcomes.


@pytest.mark.parametrize("steps", [20, 2000])
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_a_learning_rate_beyond_two_over_the_largest_eigenvalue_is_inner_diverged(steps, tolerance):
    inner = hg.inner.gradient(optax.sgd(2.5 / CURVATURE.max(), momentum=0.0), steps=steps, tol=tolerance)
    result = solve(inner, quadratic, start())
    assert status(result) == "INNER_DIVERGED"
    assert_trees_equal(result.params, start())
    assert_trees_equal(result.state, inner.init(start(), 0.0))


@pytest.mark.parametrize("steps", [3, 20])
def test_losses_that_jump_from_batch_to_batch_have_not_diverged(steps, key):
    x = jnp.exp(3.0 * jax.random.normal(key, (200,)))  # over five decades
    loss = lambda w, hparams, batch: jnp.mean(batch) * jnp.sum(w**2) / 1e6
    inner = hg.inner.gradient(optax.sgd(0.1), steps=steps)

    def run(key):
        objective = bind_inner(problem(loss), hg.minibatches(x, 1), key, None)
        state = inner.init(start(), 0.0)
        return inner.solve(objective, start(), state, 0.0, None, scale=jnp.ones(()), options=inner.options)

    assert np.all(jax.jit(jax.vmap(run))(jax.random.split(key, 50)).status == 0)


def test_a_loss_that_overflows_at_once_has_diverged():
    result = solve(hg.inner.gradient(optax.sgd(40.0), steps=3), lambda w, h, batch: jnp.sum(jnp.exp(w**2)), start())
    assert status(result) == "INNER_DIVERGED" and int(result.steps) == 2


@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_a_loss_that_turns_nan_is_nonfinite_loss_and_a_gradient_alone_nonfinite_grad(tolerance):
    inner = hg.inner.gradient(optax.sgd(0.1), steps=10, tol=tolerance)
    nan_loss = lambda w, h, batch: quadratic(w, h, batch) + jnp.where(w[0] < 1.2, jnp.nan, 0.0)
    nan_grad = lambda w, h, batch: quadratic(w, h, batch) - jnp.sqrt(jnp.where(w[0] < 1.2, 0.0, 1.0) + 0 * w[1])
    for loss, expected in ((nan_loss, "NONFINITE_LOSS"), (nan_grad, "NONFINITE_GRAD")):
        result = solve(inner, loss, start())
        assert status(result) == expected
        assert 2 <= int(result.steps) < 10
        assert_trees_equal(result.params, start())


def test_an_optimizer_that_makes_parameters_nan_has_diverged():
    nan = TRANSFORMATION(lambda p: (), lambda g, s, p=None: (jax.tree.map(lambda x: x * jnp.nan, g), s))
    result = solve(hg.inner.gradient(nan, steps=1), quadratic, start())
    assert status(result) == "INNER_DIVERGED"
    assert_trees_equal(result.params, start())


@pytest.mark.parametrize(("held", "added", "steps"), [(jnp.inf, 0.0, 3), (1.0, jnp.inf, 0)])
def test_a_state_that_overflows_is_given_back_and_one_that_starts_from_infinity_is_carried(held, added, steps):
    init = lambda p: {"held": jnp.asarray(held), "count": jnp.int32(0)}
    update = lambda g, s, p=None: (g, {"held": s["held"] + added, "count": s["count"] + 1})
    state = solve(hg.inner.gradient(TRANSFORMATION(init, update), steps=3), quadratic, start()).state
    assert (float(state["held"]), int(state["count"])) == (held, steps)


# Under the transformations.


def test_traced_tolerance_and_step_count_never_recompile():
    inner = hg.inner.gradient(optax.sgd(0.3), steps=50, tol=1e-4)
    objective = bind_inner(problem(quadratic), None, None, None)
    run: Any = jax.jit(
        lambda options: inner.solve(
            objective, start(), inner.init(start(), 0.0), 0.0, None, scale=jnp.ones(()), options=options
        )
    )
    steps = [
        int(run({"tol": jnp.asarray(t), "max_steps": jnp.asarray(m)}).steps)
        for t, m in ((1e-2, 50), (1e-4, 50), (1e-4, 3))
    ]
    assert run._cache_size() == 1 and steps[0] < steps[1] and steps[2] == 3


@pytest.mark.parametrize("tolerance", [None, 1e-5])
def test_lanes_of_a_vmap_are_independent(tolerance):
    inner = hg.inner.gradient(lambda lr: optax.adam(lr) if tolerance else optax.sgd(lr), steps=40, tol=tolerance)
    objective = bind_inner(problem(quadratic), None, None, None)
    run = lambda lr: inner.solve(
        objective, start(), inner.init(start(), lr), lr, None, scale=jnp.ones(()), options=inner.options
    )
    rates = jnp.asarray([0.3, 3.0, 0.5])  # the second one diverges
    batched = jax.jit(jax.vmap(run))(rates)
    for i, lr in enumerate(rates):
        single = jax.jit(run)(lr)
        assert int(batched.status[i]) == int(single.status) and int(batched.steps[i]) == int(single.steps)
        assert relative_error(batched.params[i], single.params) < tol(1e-10, 1e-4)


def test_odd_pytrees_and_their_dtypes_are_kept():
    params = {
        "a": jnp.ones((), jnp.float32),
        "b": [None, (jnp.ones(2, jnp.bfloat16),)],
        "c": jnp.ones((1, 2), jnp.float16),
    }
    loss = lambda w, h, batch: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(w))
    inner = hg.inner.gradient(optax.adam(0.1), steps=3)
    result = solve(inner, loss, params)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert [x.dtype for x in jax.tree.leaves(result.params)] == [x.dtype for x in jax.tree.leaves(params)]
    before, after = inner.init(params, 0.0), result.state
    assert [(x.dtype, x.weak_type) for x in jax.tree.leaves(before)] == [
        (x.dtype, x.weak_type) for x in jax.tree.leaves(after)
    ]


# Optimizers that need more than the gradient.


def test_polyak_steps_see_the_loss_in_a_solve_and_are_refused_in_an_unroll():
    inner = hg.inner.gradient(optax.polyak_sgd(1.0), steps=1)
    result = solve(inner, quadratic, start())
    value, grads = jax.value_and_grad(quadratic)(start(), 0.0, None)
    assert relative_error(result.params, start() - grads * value / jnp.sum(grads**2)) < tol(1e-12, 1e-5)
    with pytest.raises(hg.InputError, match=r"needs the value of the loss at each step.*unrolled step does not carry"):
        unrolled(inner, 0.0, 1)


@pytest.mark.parametrize(
    ("optimizer", "need"), [(optax.lbfgs(), "value_fn"), (optax.contrib.sophia(0.1), "obj_fn")], ids=["lbfgs", "sophia"]
)
def test_line_searches_and_hessian_probes_are_refused_by_name(optimizer, need):
    with pytest.raises(hg.InputError, match=rf"needs the loss function itself \({need}\).*hg.inner.lbfgs\(\)"):
        hg.inner.gradient(optimizer, steps=1).init(start(), 0.0)


# Mistakes.


@pytest.mark.parametrize(
    ("optimizer", "where", "culprit"),
    [
        (lambda h: optax.sgd(optax.exponential_decay(h["lr"], 10, h["rate"])), "optax's exponential_decay", "rate"),
        (
            lambda h: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, h["lr"], 5, 10)),
            "optax's warmup_cosine_decay_schedule",
            "lr",
        ),
        (lambda h: optax.sgd(float(h["lr"])), "the function optimizer\\(hparams\\)", "lr"),
        (lambda h: optax.adam(0.1, b1=np.asarray(h["rate"])), "the function optimizer\\(hparams\\)", "rate"),
    ],
    ids=["exponential_decay", "warmup_cosine", "float", "numpy"],
)
def test_a_setting_that_cannot_be_traced_is_named_with_its_hyperparameter(optimizer, where, culprit):
    hparams = {"lr": jnp.asarray(0.1), "rate": jnp.asarray(0.9)}
    inner = hg.inner.gradient(optimizer, steps=1)
    message = (
        rf"gradient: {where} needs the value of a hyperparameter.*\(it depends on hparams\['{culprit}'\]\).*lambda step"
    )
    with pytest.raises(hg.InputError, match=message):
        inner.init(start(), hparams)
    with pytest.raises(hg.InputError, match=rf"gradient: {where}.*one of hparams\['lr'\], hparams\['rate'\]"):
        jax.jit(inner.init)(start(), hparams)


def broken(update=lambda g, s, p=None: (g, s), init=lambda p: ()):
    return TRANSFORMATION(init, update)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            broken(lambda g, s, p=None: ({"w": g["w"][:1]}, s)),
            r"the optimizer's update\['w'\] has shape \(1,\), expected \(3,\)",
        ),
        (broken(lambda g, s, p=None: ({"v": g["w"]}, s)), r"the optimizer's update\['w'\] is missing"),
        (
            broken(lambda g, s, p=None: (g, {"m": jnp.zeros(2)}), lambda p: {"m": jnp.zeros(3)}),
            r"the optimizer's state after an update\['m'\] has shape \(2,\), expected \(3,\)",
        ),
    ],
)
def test_an_update_that_changes_a_structure_is_named_by_its_path(optimizer, message):
    with pytest.raises(hg.InputError, match=f"gradient: {message}"):
        hg.inner.gradient(optimizer, steps=1).init({"w": start()}, 0.0)


wrong: Any = hg.inner  # to be called as its types forbid


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: wrong.gradient(0.1, steps=3),
            hg.InputTypeError,
            "optimizer must be an optax optimizer.*found float",
        ),
        (lambda: wrong.gradient(jnp.ones(2), steps=3), hg.InputTypeError, r"found an array of shape \(2,\)"),
        (
            lambda: wrong.gradient(optax.sgd(0.1), steps=1.5),
            hg.InputTypeError,
            "steps must be an integer, found 1.5",
        ),
        (
            lambda: wrong.gradient(optax.sgd(0.1), steps=True),
            hg.InputTypeError,
            "steps must be an integer, found True",
        ),
        (lambda: wrong.gradient(optax.sgd(0.1), steps=-1), hg.InputError, "steps must be at least 0, found -1"),
        (
            lambda: wrong.gradient(optax.sgd(0.1), steps=3, tol=0.0),
            hg.InputError,
            "tol must be greater than 0, found 0.0",
        ),
        (
            lambda: wrong.gradient(optax.sgd(0.1), stps=3),
            hg.InputTypeError,
            "unknown option 'stps', did you mean 'steps'",
        ),
        (
            lambda: wrong.gradient(lambda h: 0.1, steps=3).init(start(), 0.0),
            hg.InputTypeError,
            r"optimizer\(hparams\) must return an optax optimizer, found float: write lambda hparams",
        ),
        (
            lambda: wrong.gradient(optax.adam, steps=3).init(start(), {"lr": 0.1}),
            hg.InputTypeError,
            r"optimizer is the function optax.adam itself.*lambda hparams: optax.adam\(hparams\['lr'\]\)",
        ),
    ],
)
def test_mistakes_name_the_argument_and_the_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_errors_that_are_not_about_hypergrad_pass_through():
    def optimizer(hparams):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        wrong.gradient(optimizer, steps=1).init(start(), 0.0)

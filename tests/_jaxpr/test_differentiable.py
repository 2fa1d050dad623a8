"""Hypergradients through optax's optimizers are finite and right where a gradient is exactly zero.

Every run has one coordinate whose gradient is exactly zero at each step, and is repeated with all gradients zero. The
reference is central differences of the values of the same program, all in one compiled batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import hypergrad as hg
from hypergrad._jaxpr.differentiable import differentiable
from tests._helpers import assert_trees_close, tol

STEPS = 4
VALUES = {"lr": 0.021, "b1": 0.83, "b2": 0.97, "eps": 1e-3, "wd": 0.013, "c": 0.3}


class Case(NamedTuple):
    optimizer: Callable[[Any], Any]
    names: str
    tol: float = 1e-7
    unit: float = 1.0  # size of the movement, where it is tiny


BETAS = "lr b1 b2 eps"
DECAYED = "lr b1 b2 eps wd"
OPTIMIZERS = {
    "sgd": Case(lambda h: optax.sgd(h["lr"]), "lr"),
    "nesterov": Case(lambda h: optax.sgd(h["lr"], momentum=h["b1"], nesterov=True), "lr b1"),
    "adam": Case(lambda h: optax.adam(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "adamw": Case(lambda h: optax.adamw(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]), DECAYED),
    "nadamw": Case(lambda h: optax.nadamw(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]), DECAYED),
    "amsgrad": Case(lambda h: optax.amsgrad(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "lamb": Case(lambda h: optax.lamb(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]), DECAYED),
    "adabelief": Case(lambda h: optax.adabelief(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "adamaxw": Case(lambda h: optax.adamaxw(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]), DECAYED),
    "yogi": Case(lambda h: optax.yogi(h["lr"], h["b1"], h["b2"]), "lr b1 b2"),
    "radam": Case(lambda h: optax.radam(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "adan": Case(lambda h: optax.adan(h["lr"], h["b1"], h["b2"], eps=h["eps"], weight_decay=h["wd"]), DECAYED),
    "rmsprop": Case(lambda h: optax.rmsprop(h["lr"], h["b2"], h["eps"], centered=True, momentum=h["b1"]), BETAS),
    "rmsprop_eps_outside": Case(lambda h: optax.rmsprop(h["lr"], h["b2"], h["eps"], eps_in_sqrt=False), "lr b2 eps"),
    "adagrad": Case(lambda h: optax.adagrad(h["lr"], initial_accumulator_value=0.0), "lr"),
    "adadelta": Case(lambda h: optax.adadelta(h["lr"], h["b1"], h["eps"]), "lr b1 eps"),
    "adafactor": Case(lambda h: optax.adafactor(h["lr"], weight_decay_rate=h["wd"]), "lr wd"),
    "novograd": Case(lambda h: optax.novograd(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]), DECAYED),
    "sm3": Case(lambda h: optax.sm3(h["lr"], h["b1"]), "lr b1"),
    "lion": Case(lambda h: optax.lion(h["lr"], h["b1"], h["b2"], weight_decay=h["wd"]), "lr b1 b2 wd"),
    "sign_sgd": Case(lambda h: optax.sign_sgd(h["lr"]), "lr"),
    "lars": Case(lambda h: optax.lars(h["lr"], h["wd"], trust_coefficient=1.0, momentum=h["b1"]), "lr wd b1"),
    "fromage": Case(lambda h: optax.fromage(h["lr"]), "lr"),
    "optimistic_adam": Case(
        lambda h: optax.optimistic_adam_v2(h["lr"], alpha=h["b1"], b1=h["b1"], b2=h["b2"], eps=h["eps"]), BETAS
    ),
    "lbfgs": Case(lambda h: optax.lbfgs(h["lr"], memory_size=2, linesearch=None), "lr"),
    "clip": Case(lambda h: optax.chain(optax.clip(h["c"]), optax.sgd(h["lr"])), "lr c"),
    "clip_by_global_norm": Case(
        lambda h: optax.chain(optax.clip_by_global_norm(h["c"]), optax.sgd(h["lr"], h["b1"])), "lr b1 c"
    ),
    "clip_by_block_rms": Case(lambda h: optax.chain(optax.clip_by_block_rms(h["c"]), optax.sgd(h["lr"])), "lr c"),
    "adaptive_grad_clip": Case(lambda h: optax.chain(optax.adaptive_grad_clip(h["c"]), optax.sgd(h["lr"])), "lr c"),
    "normalize": Case(
        lambda h: optax.chain(optax.normalize_by_update_norm(eps=h["eps"]), optax.sgd(h["lr"])), "lr eps"
    ),
    "ema_and_noise": Case(
        lambda h: optax.chain(
            optax.ema(h["b1"]), optax.add_noise(h["eps"], 0.5, jax.random.key(3)), optax.sgd(h["lr"])
        ),
        "lr b1 eps",
    ),
    "masked": Case(
        lambda h: optax.chain(
            optax.masked(optax.add_decayed_weights(h["wd"]), {"w": True, "none": None}), optax.adam(h["lr"])
        ),
        "lr wd",
    ),
    "apply_if_finite": Case(lambda h: optax.apply_if_finite(optax.adam(h["lr"], h["b1"]), 3), "lr b1"),
    "partition": Case(lambda h: optax.partition({"a": optax.adam(h["lr"])}, {"w": "a", "none": None}), "lr"),
    "multi_steps": Case(lambda h: optax.MultiSteps(optax.sgd(h["lr"], h["b1"]), 2), "lr b1", tol=1e-3),
    "inject_hyperparams": Case(lambda h: optax.inject_hyperparams(optax.adam)(h["lr"], b1=h["b1"]), "lr b1"),
    "schedule": Case(lambda h: optax.adam(lambda step: h["lr"] * h["c"] ** (step / 2)), "lr c"),
    "cosine_schedule": Case(lambda h: optax.sgd(optax.cosine_decay_schedule(h["lr"], 6, alpha=h["c"])), "lr c"),
    "linear_schedule": Case(lambda h: optax.sgd(optax.linear_schedule(h["lr"], h["c"], 6)), "lr c", tol=1e-5),
    "ademamix": Case(
        lambda h: contrib.ademamix(h["lr"], h["b1"], h["b2"], eps=h["eps"], weight_decay=h["wd"]), DECAYED
    ),
    "simplified_ademamix": Case(lambda h: contrib.simplified_ademamix(h["lr"], h["b1"], h["b2"], eps=h["eps"]), BETAS),
    "adopt": Case(lambda h: contrib.adopt(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "prodigy": Case(lambda h: contrib.prodigy(h["lr"], (h["b1"], h["b2"]), eps=h["eps"]), BETAS, tol=1e-4, unit=1e-6),
    "dadapt_adamw": Case(
        lambda h: contrib.dadapt_adamw(h["lr"], (h["b1"], h["b2"]), eps=h["eps"]), BETAS, tol=1e-4, unit=1e-6
    ),
    "schedule_free_adamw": Case(
        lambda h: contrib.schedule_free_adamw(h["lr"], b1=h["b1"], b2=h["b2"], eps=h["eps"], weight_decay=h["wd"]),
        DECAYED,
    ),
    "muon": Case(lambda h: contrib.muon(h["lr"], beta=h["b1"], weight_decay=h["wd"]), "lr b1 wd"),
    "acprop": Case(lambda h: contrib.acprop(h["lr"], h["b1"], h["b2"], h["eps"]), BETAS),
    "cocob": Case(lambda h: contrib.cocob(weight_decay=h["wd"]), "wd"),
    "mechanize": Case(lambda h: contrib.mechanize(optax.sgd(h["lr"])), "lr", tol=1e-4, unit=1e-6),
}
# Where all gradients are zero, these divide 0 by 0 in the value itself.
UNDEFINED_AT_ZERO = {"prodigy", "dadapt_adamw"}

START = {"w": np.array([[0.9, -0.4, 0.3], [0.5, 1.2, -0.7]]), "none": None}
AIM = np.array([[0.2, 0.5, -0.3], [1.1, 0.4, 0.1]])
ALIVE = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def inner_loss(params, alive):
    z = (params["w"] - AIM) * alive
    return jnp.sum(jnp.cosh(z)) + 0.3 * jnp.sum(z) ** 2


def train(case, hparams, alive):
    """Outer loss after a few steps of the differentiable update."""
    inner = hg.inner.gradient(case.optimizer, steps=STEPS)
    update = inner.update
    assert update is not None
    start = jax.tree.map(jnp.asarray, START)

    def step(carry, _):
        params, state = carry
        return update(jax.grad(inner_loss)(params, alive), params, state, hparams), None

    (params, _), _ = jax.lax.scan(step, (start, inner.init(start, hparams)), None, length=STEPS)
    moved = (params["w"] - start["w"]) / case.unit
    return jnp.sum(jnp.arange(1.0, 7.0).reshape(2, 3) * moved) + jnp.sum(moved**2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_hypergradient_equals_central_differences_at_a_dead_coordinate_and_at_zero_gradients(name, x64):
    if not x64:
        pytest.skip("central differences need float64")
    case = OPTIMIZERS[name]
    names = case.names.split()
    center = jnp.asarray([VALUES[n] for n in names])
    size = 1e-4 * center
    shifts = jnp.concatenate([jnp.zeros((1, len(names)))] + [k * jnp.diag(size) for k in (1, -1, 2, -2)])
    alive = jnp.stack([jnp.asarray(ALIVE), jnp.zeros((2, 3))])
    run = jax.value_and_grad(lambda point, alive: train(case, dict(zip(names, point, strict=True)), alive))
    batch = jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0))
    values, grads = jax.jit(batch)(center[None] + shifts, alive)

    for i, situation in enumerate(("one dead coordinate", "all gradients zero")):
        if i == 1 and name in UNDEFINED_AT_ZERO:
            continue
        near, near_back, far, far_back = values[i, 1:].reshape(4, len(names))
        expected = (8 * (near - near_back) - (far - far_back)) / (12 * size)
        error = (
            jnp.abs(grads[i, 0] - expected) * center / jnp.max(jnp.abs(expected * center))
            if i == 0
            else (jnp.abs(grads[i, 0] - expected) * center)
        )
        assert np.all(error <= case.tol), f"{situation}: {names} {grads[i, 0]}, expected {expected}"


@pytest.mark.parametrize("name", ["adam", "lamb", "radam", "clip_by_global_norm", "amsgrad"])
def test_the_hypergradient_is_finite_where_optax_alone_gives_nan(name):
    case = OPTIMIZERS[name]
    hparams = {n: jnp.asarray(VALUES[n]) for n in case.names.split()}
    params, alive = jax.tree.map(jnp.asarray, START), jnp.asarray(ALIVE) * (name != "clip_by_global_norm")
    inner = hg.inner.gradient(case.optimizer, steps=1)
    update = inner.update
    assert update is not None

    def ours(h):
        return jnp.sum(update(jax.grad(inner_loss)(params, alive), params, inner.init(params, h), h)[0]["w"])

    def optax_alone(h, w):
        optimizer = case.optimizer(h)
        moved = {"w": w, "none": None}
        return jnp.sum(optimizer.update(jax.grad(inner_loss)(moved, alive), optimizer.init(moved), moved)[0]["w"])

    both = jax.jit(lambda h: (jax.grad(optax_alone, argnums=(0, 1))(h, params["w"]), jax.grad(ours)(h)))
    raw, grad = both(hparams)
    assert not all(np.all(np.isfinite(g)) for g in jax.tree.leaves(raw))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grad))


def test_an_update_is_the_one_of_optax(key):
    params = {"w": jax.random.normal(key, (3, 2)), "none": None}
    grads = jax.tree.map(lambda x: x.at[0, 0].set(0.0), params)
    optimizer = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(0.1))
    inner = hg.inner.gradient(optimizer, steps=1)
    update = inner.update
    assert update is not None
    found = jax.jit(lambda: update(grads, params, inner.init(params, 0.0), 0.0))()

    def alone():
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    assert_trees_close(found, jax.jit(alone)(), tol(1e-15, 1e-6))
    dtypes = lambda tree: [jnp.result_type(x) for x in jax.tree.leaves(tree)]
    assert dtypes(found) == dtypes(alone())


def test_the_second_derivative_through_adam_equals_central_differences(x64):
    if not x64:
        pytest.skip("central differences need float64")
    grad = jax.grad(lambda lr: train(OPTIMIZERS["adam"], {**VALUES, "lr": lr}, jnp.asarray(ALIVE)))
    both = jax.jit(jax.vmap(jax.value_and_grad(grad)))(jnp.asarray([0.021, 0.02101, 0.02099]))
    np.testing.assert_allclose(both[1][0], (both[0][1] - both[0][2]) / 2e-5, rtol=1e-6)


# The evaluation itself.


def norm(x):
    return jnp.sqrt(jnp.sum(x**2))


CONTROL_FLOW = {
    "jit": lambda x: jax.jit(norm)(x),
    "remat": lambda x: jax.checkpoint(norm)(x),
    "cond": lambda x: jax.lax.cond(x[0] >= 0, norm, lambda y: jnp.sum(y), x),
    "scan": lambda x: norm(
        jnp.append(*jax.lax.scan(lambda c, y: (0.5 * c + jnp.sqrt(y), y / c), 1.0 + 0 * x[0], x, reverse=True))
    ),
    "fori": lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c + jnp.sqrt(x[0]), 0 * x[0]),
    "vmap": lambda x: jnp.sum(jax.vmap(jnp.sqrt)(x)),
    "where": lambda x: jnp.sum(jnp.where(x > 0, jnp.sqrt(x - 1), x)),
}


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_derivatives_are_finite_at_zero_inside(name):
    f = CONTROL_FLOW[name]
    zero = jnp.zeros(3)
    value, expected, grad = jax.jit(lambda x: (differentiable(f)(x), f(x), jax.grad(differentiable(f))(x)))(zero)
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_nothing_changes_where_derivatives_are_finite(name):
    orders = lambda f: lambda x: (f(x), jax.grad(f)(x), jax.jacrev(jax.grad(f))(x))
    f, x = CONTROL_FLOW[name], jnp.asarray([1.3, 2.1, 1.7])
    for found, expected in zip(*jax.jit(lambda x: (orders(differentiable(f))(x), orders(f)(x)))(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tol(1e-12, 1e-5), atol=tol(1e-12, 1e-6))


def test_a_while_loop_keeps_forward_mode():
    f = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sqrt(c[1])), (0, x))[1]
    np.testing.assert_allclose(jax.jvp(differentiable(f), (1.7,), (1.0,))[1], jax.jvp(f, (1.7,), (1.0,))[1], rtol=1e-6)
    assert jax.jvp(differentiable(f), (0.0,), (1.0,))[1] == 0


FUNCTIONS = {
    "div": lambda x, y: x / y,
    "rsqrt": lambda x, y: jax.lax.rsqrt(x) * y,
    "cbrt": lambda x, y: jnp.cbrt(x) * y,
    "log": lambda x, y: jnp.log(x) * y,
    "log1p": lambda x, y: jnp.log1p(x) * y,
    "exp": lambda x, y: jnp.exp(x * y),
    "negative_power": lambda x, y: x**-3 * y,
    "power": lambda x, y: x**y,
    "integer_exponent": lambda x, y: y * x ** jnp.int32(2),
    "square": lambda x, y: jnp.square(x) * y,
    "abs": lambda x, y: jnp.abs(x) * y,
    "tanh": lambda x, y: jnp.tanh(x * y),
    "logistic": lambda x, y: jax.nn.sigmoid(x) * y,
    "reciprocal_root": lambda x, y: y / jnp.sqrt(x),
    "max": lambda x, y: jnp.maximum(x * y, 0.5 * y) + jnp.maximum(x, 1.0),
    "min": lambda x, y: jnp.minimum(x * y, 0.5 * y) + jnp.minimum(x, 1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_of_each_primitive_are_unchanged(name):
    f = FUNCTIONS[name]
    orders = lambda f: lambda x, y: (f(x, y), jax.grad(f, (0, 1))(x, y), jax.hessian(f, (0, 1))(x, y))
    found, expected = jax.jit(lambda x, y: (orders(differentiable(f))(x, y), orders(f)(x, y)))(1.37, 0.61)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol(1e-12, 1e-5))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_primitive_keeps_its_values_and_is_harmless_in_a_branch_that_was_not_chosen(name):
    special = jnp.asarray([0.0, -0.0, 1.0, -1.5, 1e-30, 1e30, jnp.inf, -jnp.inf, jnp.nan])
    x, y = (a.ravel() for a in jnp.meshgrid(special, special))
    f = differentiable(FUNCTIONS[name])
    np.testing.assert_array_equal(f(x, y), FUNCTIONS[name](x, y))
    dropped = jax.jit(jax.grad(lambda x, y, chosen: jnp.sum(jnp.where(chosen, f(x, y), 0.0)), (0, 1)))
    np.testing.assert_array_equal(dropped(x, y, False), np.zeros((2, x.size)))


@pytest.mark.parametrize("f", [jnp.maximum, jnp.minimum])
def test_the_derivative_of_a_tie_is_shared(f):
    found = jax.grad(differentiable(lambda x, y: jnp.sum(f(x, y) * jnp.asarray([1.0, 3.0]))), (0, 1))
    x, y = found(jnp.asarray([0.7, 0.2]), jnp.asarray(0.7))
    np.testing.assert_allclose(x, [0.5, 3.0 * (f is jnp.minimum)])
    np.testing.assert_allclose(y, 0.5 + 3.0 * (f is jnp.maximum))


def test_custom_rules_are_kept():
    @jax.custom_jvp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defjvps(lambda t, out, x: t)

    @jax.custom_vjp
    def scaled(x):
        return x

    scaled.defvjp(lambda x: (x, None), lambda _, ct: (7.0 * ct,))
    assert jax.grad(differentiable(lambda x: scaled(straight_through(x))))(1.3) == 7


def test_integers_keys_and_closed_over_tracers_pass_through(key):
    def f(scale):
        def inside(x, count, key):
            noise = jax.random.normal(jax.random.fold_in(key, count))
            return scale * jnp.sqrt(x) + noise, count + 1, key

        value, count, _ = differentiable(inside)(2.0 * scale, jnp.int32(3), key)
        return value * count

    # d/ds s·√(2s) = 1.5·√(2s)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(f)))(jnp.asarray([1.5, 2.5])), 4 * 1.5 * np.sqrt([3.0, 5.0]), rtol=tol(1e-10, 1e-5)
    )

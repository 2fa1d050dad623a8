"""A hyperparameter that cannot move what is differentiated is found from the program, and named."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad._jaxpr.sensitivity import (
    Influence,
    check_implicit_sensitivity,
    check_unrolled_sensitivity,
    influence,
    influences,
)
from hypergrad._solver import InputError

W = jnp.asarray([0.3, -0.7, 1.1])
H = {"a": jnp.asarray(0.4), "b": jnp.asarray(0.9)}


def grad_of(loss):
    return lambda h: jax.grad(loss)(W, h)


def both(a: bool, b: bool) -> dict[str, bool]:
    return {"['a']": a, "['b']": b}


def scanned(w, h):
    """`b` reaches the carry only in the second turn."""

    def turn(carry, row):
        x, y = carry
        return (x + y * row, y + h["b"]), x

    return jax.lax.scan(turn, (jnp.sum(w), jnp.zeros(())), w)[0][0] * jnp.sum(w**2)


def looped(w, h):
    """`a` decides how long, `b` how far."""
    out = jax.lax.while_loop(lambda c: c[0] < h["a"], lambda c: (c[0] + 0.1, c[1] * h["b"]), (0.0, 1.0))
    return jnp.sum(w * jax.lax.stop_gradient(out[1]) + w * out[1])


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@jax.custom_vjp
def reversed_rule(x, y):
    return x * 1.0, y * 1.0


reversed_rule.defvjp(lambda x, y: (reversed_rule(x, y), None), lambda _, g: (g[0] + g[1], g[1]))

CASES = {
    "weight decay": (lambda w, h: h["a"] * jnp.sum(w**2), both(True, False)),
    "added to the loss": (lambda w, h: jnp.sum(w**2) * h["a"] + jnp.exp(h["b"]), both(True, False)),
    "added inside a log": (lambda w, h: jnp.log(jnp.sum(w**2) + h["b"]), both(False, True)),
    "stop_gradient": (lambda w, h: jnp.sum(w**2) * jax.lax.stop_gradient(h["a"]) * h["b"], both(False, True)),
    "rounded": (lambda w, h: jnp.sum(w**2) * jnp.floor(h["a"]) * jnp.round(h["b"]), both(False, False)),
    "as an integer": (lambda w, h: jnp.sum(w**2) * (1 + h["a"].astype(jnp.int32)) * h["b"], both(False, True)),
    "compared": (lambda w, h: jnp.sum(jnp.where(h["a"] > 1, w, h["b"] * w)), both(False, True)),
    "jit": (lambda w, h: jax.jit(lambda w, a, b: (w**2 * a, b))(w, h["a"], h["b"])[0].sum(), both(True, False)),
    "checkpoint": (lambda w, h: jax.checkpoint(lambda w, h: jnp.sum(w**3 * h["a"]))(w, h), both(True, False)),
    "scan, second turn": (scanned, both(False, True)),
    "scan over rows": (lambda w, h: jax.lax.scan(lambda c, x: (c + x * h["a"], None), 0.0, w)[0], both(True, False)),
    "cond": (lambda w, h: jax.lax.cond(h["a"] > 0, lambda: h["b"] * w, lambda: w).sum(), both(False, True)),
    "custom_jvp": (lambda w, h: jnp.sum(w * straight_through(h["a"])), both(True, False)),
    "custom_vjp": (lambda w, h: jnp.sum(w) * reversed_rule(h["a"], h["b"])[1], both(True, True)),
    "linear solve": (lambda w, h: w @ jnp.linalg.solve(jnp.eye(3) * h["a"], w), both(True, False)),
    "nested grad": (lambda w, h: jax.grad(lambda a: a**2 * h["b"])(h["a"]) * jnp.sum(w), both(True, True)),
    "vmap": (lambda w, h: jnp.sum(jax.vmap(lambda x: x**2 * h["a"])(w)), both(True, False)),
    "softplus": (lambda w, h: jnp.sum(jax.nn.relu(w) * jax.nn.softplus(h["a"])), both(True, False)),
    "nothing": (lambda w, h: jnp.sum(w**2), both(False, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_influence_on_the_gradient_is_read_from_the_program(name):
    loss, expected = CASES[name]
    assert influences(grad_of(loss), H) == expected


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("custom_jvp", "custom_vjp")])
def test_what_is_found_silent_has_a_zero_derivative(name):
    jacobian = jax.jacfwd(grad_of(CASES[name][0]))(H)
    for leaf, moves in CASES[name][1].items():
        assert moves == bool(jnp.any(jacobian[leaf[2]] != 0)), leaf


def test_a_while_loop_carries_a_value_but_no_derivative_of_its_length():
    found = influence(lambda h: looped(W, h), H)
    assert found == {"['a']": Influence(True, False), "['b']": Influence(True, True)}


def test_a_condition_carries_a_value_but_no_derivative():
    chosen = lambda h: jax.lax.cond(h["a"] > 0, lambda: h["b"], lambda: 2 * h["b"])
    assert influence(chosen, H) == {"['a']": Influence(True, False), "['b']": Influence(True, True)}


def test_references_carry_influence():
    if not hasattr(jax, "new_ref"):
        pytest.skip("this JAX has no references")

    def fn(h):
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] += h["a"] ** 2
        return ref[...]

    assert influences(fn, H) == both(True, False)


def test_any_pytree_has_paths():
    assert influences(lambda h: h**2, jnp.ones(2)) == {"": True}
    assert influences(lambda h: h[0] * h[2]["x"], (1.0, None, {"x": 2.0, "y": 3.0})) == {
        "[0]": True,
        "[2]['x']": True,
        "[2]['y']": False,
    }


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_it_works_on_traced_arguments_and_closures(transform):
    found = []

    def fn(a, scale):
        found.append(influences(lambda h: scale * h["a"] * jnp.sum(W), {"a": a, "b": a}))
        return a * scale

    if transform == "jit":
        jax.jit(fn)(1.0, 2.0)
    elif transform == "vmap":
        jax.vmap(fn)(jnp.ones(3), jnp.ones(3))
    else:
        jax.grad(fn, argnums=(0, 1))(1.0, 2.0)
    assert found == [both(True, False)]


def solve_like(loss, outer, optimizer=None):
    """The check as an implicit solver calls it."""

    def update(grads, params, state, h):
        assert optimizer is not None
        steps, state = optimizer(h).update(grads, state, params)
        return optax.apply_updates(params, steps), state

    def run(h):
        state = optimizer(h).init(W) if optimizer is not None else None
        check_implicit_sensitivity(
            lambda w, h: jax.grad(loss)(w, h), outer, None if optimizer is None else update, W, state, h, "hg.implicit"
        )

    return run


def outer_loss(w: Any, h: Any) -> tuple[Any, dict]:
    return jnp.sum((w - 1) ** 2), {"strength": h["b"]}


def test_a_learning_rate_under_implicit_is_an_error_that_names_the_solver_that_sees_it():
    run = solve_like(lambda w, h: h["l2"] * jnp.sum(w**2), lambda w, h: jnp.sum(w), lambda h: optax.adam(h["lr"]))
    with pytest.raises(InputError, match=r"hg.implicit: hparams\['lr'\] does not move the inner optimum.*hg.unrolled"):
        run({"l2": jnp.asarray(0.3), "lr": jnp.asarray(0.1)})


def test_a_learning_rate_that_the_outer_loss_uses_is_no_error():
    run = solve_like(
        lambda w, h: h["l2"] * jnp.sum(w**2), lambda w, h: jnp.sum(w) + h["lr"], lambda h: optax.adam(h["lr"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run({"l2": jnp.asarray(0.3), "lr": jnp.asarray(0.1)})


def test_an_unused_key_is_a_warning_that_lists_the_keys():
    run = solve_like(lambda w, h: h["a"] * jnp.sum(w**2), outer_loss)
    pattern = r"hparams\['b'\] is used neither.*misspelt.*holds \['a'\], \['b'\]"
    with pytest.warns(UserWarning, match=pattern) as caught:
        run(H)
    assert caught[0].filename == __file__


def test_a_metric_does_not_make_a_hyperparameter_used():
    with pytest.warns(UserWarning, match=r"hparams\['b'\]"):
        solve_like(lambda w, h: h["a"] * jnp.sum(w**2), outer_loss)(H)


def test_a_rounded_hyperparameter_is_a_warning_of_its_own():
    run = solve_like(lambda w, h: jnp.round(h["a"]) * jnp.sum(w**2) * h["b"], outer_loss)
    with pytest.warns(UserWarning, match=r"hparams\['a'\] is used only through rounding"):
        run(H)


def test_used_hyperparameters_and_empty_leaves_are_silent():
    run = solve_like(lambda w, h: h["a"] * jnp.sum(w**2), lambda w, h: jnp.sum(w) * h["b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run({**H, "none": None, "empty": jnp.zeros((0,))})
        solve_like(lambda w, h: h * jnp.sum(w**2), None)(jnp.asarray(0.3))


def test_unrolled_sees_the_learning_rate_and_names_a_stray_key():
    def step(w, state, h):
        return w - h["lr"] * jax.grad(lambda w: jnp.sum(w**2))(w), state

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_unrolled_sensitivity(step, outer_loss, W, (), {"lr": jnp.asarray(0.1), "b": None})
    with pytest.warns(UserWarning, match=r"hg.unrolled: hparams\['b'\]"):
        check_unrolled_sensitivity(step, outer_loss, W, (), {"lr": jnp.asarray(0.1), "b": jnp.asarray(1.0)})


def test_the_walk_finds_everything_that_a_random_program_uses():
    """Programs of random operations: whatever has a non-zero derivative is found (no false `False`)."""
    rng = np.random.default_rng(0)
    unary = [jnp.sin, jnp.exp, jnp.floor, jax.lax.stop_gradient, jax.jit(jnp.tanh), jax.nn.softplus, lambda x: x + 1]
    binary = [
        jnp.add,
        jnp.multiply,
        lambda x, y: jnp.where(x > y, x, 2 * y),
        lambda x, y: jax.lax.fori_loop(0, 2, lambda i, c: (c[1], c[0] * 0.5), (x, y))[0],
    ]
    for _ in range(8):
        plan = rng.integers(0, [len(unary), len(binary), 4], size=(6, 3))

        def program(h, plan=plan):
            values = [h[k] for k in sorted(h)]
            for u, b, i in plan:
                values.append(binary[b](unary[u](values[i]), values[-1]))
                values = values[-4:]
            return values[-1]

        h = {k: jnp.asarray(rng.normal()) for k in "pqrs"}
        found, gradient = influences(program, h), jax.jacfwd(program)(h)
        for leaf, slope in gradient.items():
            assert found[f"['{leaf}']"] or slope == 0

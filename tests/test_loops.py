from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import hypergrad as hg
from hypergrad._loops import isolated, once
from hypergrad.linear._linear import solve as solve_linear
from tests._helpers import assert_trees_equal

ROWS, COLUMNS, BATCH = 2000, 64, 16


def temporary(function: Any, *arguments: Any) -> int:
    """Bytes of temporary memory of the compiled program."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("holds", [True, False])
def test_the_function_is_applied_once_where_the_condition_holds_and_else_not_at_all(holds):
    apply = lambda x: jax.tree.map(lambda leaf: 2 * leaf + 1, x)
    value = {"a": jnp.arange(3.0), "b": (jnp.int32(4), None)}
    expected = apply(value) if holds else value
    assert_trees_equal(jax.jit(lambda c, x: once(c, apply, x))(jnp.asarray(holds), value), expected)


def test_each_member_of_a_batch_has_a_condition_of_its_own():
    result = jax.vmap(lambda c, x: once(c, lambda x: x + 1, x))(jnp.asarray([True, False]), jnp.asarray([1.0, 1.0]))
    assert result.tolist() == [2.0, 1.0]


def test_a_batch_does_not_copy_the_data_that_its_members_share():
    data = jnp.ones((ROWS, COLUMNS))
    conditions, values = jnp.arange(BATCH) % 2 == 0, jnp.ones((BATCH, COLUMNS))

    def both(data: Any, conditions: Any, values: Any) -> Any:
        return jax.vmap(lambda c, x: once(c, lambda x: (data @ x) @ data, x))(conditions, values)

    assert temporary(both, data, conditions, values) < data.nbytes


# What uses it: sixteen problems that share their data need a small part of sixteen copies.


@pytest.mark.parametrize(
    "linear", [hg.linear.cg(), hg.linear.gmres(restart=3), hg.linear.neumann(5)], ids=["cg", "gmres", "neumann"]
)
def test_a_batch_of_linear_solves_does_not_copy_the_operator(linear):
    data = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, COLUMNS)))

    def solve(data: Any, shift: Any, rhs: Any, start: Any) -> Any:
        matvec = lambda v: (data @ v) @ data / ROWS + shift * v
        return solve_linear(linear, matvec, rhs, start=start).solution

    batched = jax.vmap(solve, in_axes=(None, 0, 0, 0))
    ones = jnp.ones((BATCH, COLUMNS))
    assert temporary(batched, data, jnp.arange(1.0, 1 + BATCH), ones, ones) < 4 * data.nbytes


def test_a_batch_of_hypergradients_does_not_copy_the_data():
    outer = lambda w, h, batch: jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))
    problem = hg.Problem(lambda w, h, batch: outer(w, h, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2), outer)
    solver = hg.implicit(problem)
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(ROWS, COLUMNS))), jnp.asarray(np.sign(rng.normal(size=ROWS)))
    h = jnp.zeros((BATCH, COLUMNS))
    state = jax.vmap(solver.init)(jnp.zeros((BATCH, COLUMNS)), h)
    batched = jax.vmap(solver.hypergrad, in_axes=(0, 0, None, None))
    assert temporary(batched, state, h, data, data) < 5 * data[0].nbytes


def halves(x: Any) -> Any:
    return {"first": x[:4], "rest": (x[4:],)}


def through(x: Any, split: Any = lambda x: isolated(halves, x)) -> Any:
    parts = split(x)
    return jnp.sum(jnp.sin(parts["first"]) * jnp.cos(parts["rest"][0]))


def test_a_function_that_is_isolated_has_the_same_values_and_derivatives():
    x, v = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)))
    plain = lambda x: through(x, halves)
    assert_trees_equal(jax.jit(lambda x: isolated(halves, x))(x), halves(x))
    product = lambda f: jax.jit(lambda x, v: jax.jvp(jax.grad(f), (x,), (v,)))(x, v)
    for got, expected in zip(product(through), product(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    batched = lambda f: jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([x, v]))
    np.testing.assert_allclose(batched(through), batched(plain), rtol=1e-6)


def test_what_is_isolated_stays_apart_in_the_program_for_cpu_and_is_nothing_of_its_own_elsewhere():
    x = jnp.ones(8)
    gradient = jax.jit(jax.grad(through))
    assert gradient.lower(x).compile().as_text().count(" conditional(") == 2  # the parts, and their cotangents
    assert jax.jit(jax.vmap(through)).lower(jnp.ones((3, 8))).compile().as_text().count(" conditional(") == 1
    for platform in ("cpu", "cuda", "tpu"):  # elsewhere XLA knows each branch that is taken
        program = export.export(gradient, platforms=[platform])(x).mlir_module()
        assert ("optimization_barrier" in program) == (platform == "cpu")

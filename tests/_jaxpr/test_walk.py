"""The anatomy of traced programs: what evaluates them again gives the same values, and a walk meets every part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._jaxpr.walk import called, constants, evaluate, forward, parts

TABLE = np.arange(3.0)


def program(x):
    """Loops, branches, calls, remat and a rule of its own, one in the other."""
    rows = jax.lax.scan(lambda c, row: (c + jnp.sum(row), c * row), jnp.zeros((), x.dtype), jnp.outer(x, TABLE))
    turned = jax.lax.while_loop(lambda v: jnp.sum(v) < 20, lambda v: 2 * v + 1, jax.checkpoint(jnp.sin)(x))
    chosen = jax.lax.cond(x[0] > 0, lambda v: jax.jit(jnp.cos)(v), lambda v: v, x)
    return rows[0] + jnp.sum(rows[1]) + jnp.sum(turned) + jnp.sum(jax.nn.relu(chosen))


def test_a_program_evaluated_again_has_the_same_value_and_derivative():
    x = jnp.asarray([0.3, -0.2, 0.5])
    closed = jax.make_jaxpr(lambda x: jnp.sum(jax.nn.relu(jax.jit(jnp.cos)(x))) + jnp.sum(jnp.outer(x, TABLE)))(x)
    again = lambda x: evaluate(closed, [x], lambda eqn, inputs: None)[0]
    np.testing.assert_allclose(again(x), jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0])
    whole = jax.make_jaxpr(program)(x)
    np.testing.assert_allclose(evaluate(whole, [x], lambda eqn, inputs: None)[0], program(x), rtol=1e-6)


def test_an_operation_is_replaced_wherever_it_is_nested():
    x = jnp.asarray([0.3, -0.2, 0.5])
    met = []

    def spy(eqn, inputs):
        met.append(eqn.primitive.name)
        return [-inputs[0]] if eqn.primitive.name == "cos" else None

    function = lambda x: jax.lax.cond(x[0] > 0, lambda v: jax.jit(jnp.cos)(v), lambda v: v, x)
    found = evaluate(jax.make_jaxpr(function)(x), [x], spy)[0]
    np.testing.assert_allclose(found, -x)
    assert "cos" in met


def test_every_constant_is_met_and_calls_are_told_from_control_flow():
    closed = jax.make_jaxpr(program)(jnp.ones(3))
    assert any(np.array_equal(np.ravel(value), TABLE) for value in constants(closed))
    inside = {eqn.primitive.name: called(eqn) is not None for eqn in closed.jaxpr.eqns if parts(eqn)}
    assert inside["scan"] is inside["while"] is inside["cond"] is False
    assert all(inside[name] for name in inside if name in ("custom_jvp_call", "checkpoint", "remat2", "jit", "pjit"))


def test_what_is_known_is_carried_forward():
    """Depth: the longest chain of operations from the input."""
    closed = jax.make_jaxpr(lambda x: (jnp.sin(jnp.cos(x)) + 1.0, x))(0.5)
    depth = forward(closed, [0], lambda eqn, ins: [max(ins) + 1] * len(eqn.outvars), lambda value: 0)
    assert depth == [3, 0]

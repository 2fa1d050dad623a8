"""Forward mode: tangents carried through the steps are those of a Python loop over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.unrolling import step as steps
from hypergrad.unrolling.forward import basis, pull_out, push
from hypergrad.unrolling.step import moving, new_record
from tests._helpers import assert_trees_close, tol
from tests.unrolling._training import H, training


def test_the_basis_is_a_unit_vector_for_each_scalar_in_the_order_of_the_leaves():
    units = basis({"a": jnp.zeros((1, 2)), "b": jnp.zeros(())})
    np.testing.assert_array_equal(units["a"], [[[1, 0]], [[0, 1]], [[0, 0]]])
    np.testing.assert_array_equal(units["b"], [0, 0, 1])


def test_tangents_of_a_run_are_the_jacobian_of_a_loop():
    step, point = training()
    size = sum(x.size for x in jax.tree.leaves(H))

    def loop(h):
        here, at = moving(point), point
        for t in range(1, 4):
            here, taken = step.through(here, h, at, t)
            at = taken.point
        return here.params

    @jax.jit
    def both():
        zero = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), moving(point))
        found, _ = push(step, H, point, zero, 1, 3, new_record(point.params), False)
        return found.tangent.params, found.point, jax.jacobian(loop)(H)

    tangent, end, jacobian = both()
    expected = jnp.concatenate([x.reshape(3, -1).T for x in jax.tree.leaves(jacobian)])
    assert_trees_close(tangent, expected, tol(1e-12, 1e-5))
    assert_trees_close(end.params, loop(H), tol(1e-12, 1e-5))


def test_pulling_out_is_the_transposed_product_in_the_shape_of_the_hyperparameters():
    z, v = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3))), jnp.asarray([0.3, -0.1, 2.0])
    found = pull_out({"w": z}, {"w": v}, H)
    flat = np.asarray(z) @ np.asarray(v)
    assert_trees_close(found, {"l2": flat[:3], "rate": flat[3]}, tol(1e-13, 1e-5))
    assert_trees_close(pull_out({"w": z}, {"w": 0 * v}, H), {"l2": np.zeros(3), "rate": np.zeros(())}, 0)


def test_forward_mode_does_not_trace_what_pulling_back_a_step_needs(monkeypatch):
    def refused(*_):
        raise AssertionError("a pullback was traced")

    monkeypatch.setattr(steps, "influence", refused)
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    for mode in ("forward", "reverse"):
        solver = hg.unrolled(hg.Problem(loss, loss), inner=hg.inner.gradient(optax.adam(0.1), steps=2), mode=mode)
        state = solver.init(jnp.zeros(2), 0.5)
        if mode == "forward":
            jax.eval_shape(solver.hypergrad, state, 0.5)
        else:
            with pytest.raises(AssertionError, match="pullback"):
                jax.eval_shape(solver.hypergrad, state, 0.5)

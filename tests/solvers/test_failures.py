"""Failures of single parts (learning rate, series, preconditioner, loss), and options that change between calls."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import Status
from tests._helpers import assert_trees_close, relative_error, tol
from tests.solvers._faulty import GOOD, NAN, PROBLEM, SOLVER, Member, batch, inner_loss, outer_loss, pick, start


def failure(solver: hg.Solver, good: Member, bad: Member, rtol: float = 1e-6) -> tuple[Status, Any]:
    """Status of the bad member of a batch of two; the good one must be OK, and both OK on the next, good call."""
    step = jax.jit(jax.vmap(solver.hypergrad))
    arguments = batch(solver, [good, bad])
    out, state = step(*arguments)
    assert int(out.info.status[0]) == Status.OK, Status(int(out.info.status[0])).name
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(state))
    clean = batch(solver, [good, good])
    after, _ = step(state._replace(options=clean[0].options), *clean[1:])
    assert np.all(np.asarray(after.info.status) == Status.OK)
    assert_trees_close(after.grad[1], after.grad[0], tol(rtol, 1e-3))
    return Status(int(out.info.status[1])), pick(out, 1)


STEEP = Member(a=40.0 * GOOD)


@pytest.mark.parametrize("to_tolerance", [True, False])
def test_a_learning_rate_above_the_limit_is_named(to_tolerance):
    inner = hg.inner.gradient(optax.sgd(0.2), steps=400, **({"tol": tol(1e-8, 1e-5)} if to_tolerance else {}))
    status, _ = failure(hg.implicit(PROBLEM, inner=inner), Member(), STEEP)
    assert status == Status.INNER_DIVERGED


def test_a_neumann_step_above_the_limit_is_named():
    status, _ = failure(hg.implicit(PROBLEM, linear=hg.linear.neumann(200, step_size=0.4)), Member(), STEEP)
    assert status == Status.NEUMANN_DIVERGING


def test_a_neumann_series_that_is_too_short_for_its_tolerance_is_named():
    solver = hg.implicit(PROBLEM, linear=hg.linear.neumann(100, tol=1e-4))
    status, out = failure(solver, Member(), Member(linear={"max_steps": 3}), rtol=1e-4)
    assert status == Status.LINEAR_MAX_STEPS
    assert out.info.linear_residual > 1e-4


def test_a_preconditioner_that_is_not_positive_is_named():
    flip = hg.linear.precondition(lambda v, w, h: jnp.where(h > 0.375, -1.0, 1.0) * v)
    solver = hg.implicit(PROBLEM, linear=hg.linear.cg(preconditioner=flip), polish=0)
    out, _ = jax.jit(jax.vmap(solver.hypergrad))(*batch(solver, [Member(), Member()]))
    assert [Status(int(code)) for code in out.info.status] == [Status.OK, Status.LINEAR_BREAKDOWN]


def test_an_unbounded_inner_problem_is_not_usable():
    status, _ = failure(SOLVER, Member(), Member(a=np.diag([1.0, -1.0, 2.0])))
    assert not status.usable


def test_float32_cannot_solve_a_condition_number_of_ten_billion():
    """Whatever the precision of the run: parameters decide."""
    scales = jnp.asarray(np.logspace(0, -10, 6), jnp.float32)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0], jnp.float32)
    problem = hg.Problem(lambda w, h, b: 0.5 * jnp.sum(scales * (turn @ w) ** 2) - h * jnp.sum(w), lambda w, h, b: w[0])
    solver = hg.implicit(problem)
    h = jnp.float32(0.37)
    out, state = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(6, jnp.float32), h), h)
    assert Status(int(out.info.status)) != Status.OK
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(state))


def test_a_gradient_that_is_nan_where_the_loss_is_not_is_named():
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - h) ** 2) + jnp.sqrt(jnp.sum(w**2)), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(problem)
    step, h = jax.jit(solver.hypergrad), jnp.asarray(0.37)
    out, state = step(solver.init(jnp.zeros(3), h), h)
    assert Status(int(out.info.status)) == Status.NONFINITE_GRAD
    assert np.isfinite(out.value)
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(state))
    out, _ = step(state._replace(params=jnp.ones(3)), h + 2)
    assert Status(int(out.info.status)) == Status.OK


def test_an_outer_gradient_that_is_nan_where_the_loss_is_not_is_named():
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - b * h) ** 2), lambda w, h, b: jnp.sqrt(jnp.sum(w**2)))
    solver = hg.implicit(problem)
    step, h = jax.jit(solver.hypergrad), jnp.asarray(0.37)
    out, state = step(solver.init(jnp.zeros(3), h), h, jnp.asarray(0.0))
    assert Status(int(out.info.status)) == Status.NONFINITE_GRAD
    out, _ = step(state, h, jnp.asarray(1.0))
    assert Status(int(out.info.status)) == Status.OK


def test_a_start_that_is_nan_raises():
    with pytest.raises(hg.InputError, match=r"params holds 1 NaN or infinite of 3 values; start from finite ones"):
        SOLVER.init(jnp.asarray([1.0, NAN, 2.0]), 0.37)


def test_a_learning_rate_under_implicit_raises_and_names_the_solver_that_sees_it():
    inner = hg.inner.gradient(lambda h: optax.sgd(h["rate"]), steps=5)
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - h["at"]) ** 2), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(problem, inner=inner)
    h = {"at": 0.37, "rate": 0.1}
    with pytest.raises(hg.InputError, match=r"hparams\['rate'\] does not move the inner optimum.*hg\.unrolled"):
        solver.hypergrad(solver.init(jnp.zeros(3), h), h)


def test_a_hyperparameter_that_nothing_uses_warns_and_has_gradient_zero():
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - h["at"]) ** 2), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(problem)
    h = {"at": jnp.asarray(0.37), "att": jnp.asarray(0.1)}
    with pytest.warns(UserWarning, match=r"hparams\['att'\] is used neither.*misspelt"):
        out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(3), h), h)
    assert float(out.grad["att"]) == 0
    np.testing.assert_allclose(float(out.grad["at"]), 3.0, rtol=tol(1e-9, 1e-5))


def test_on_a_kink_of_the_lasso_and_of_relu_the_hypergradient_is_finite():
    """|z| = λ exactly, and ReLU at exactly zero: a one-sided derivative, not NaN."""

    def step(w, h, b):
        z = 0.5 * (w + jnp.asarray([0.5, 2.0]))  # minimises ½ (w − t)² + h |w|, t = (0.5, 2)
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.5 * h, 0)

    solver = hg.implicit(hg.Problem(None, lambda w, h, b: jnp.sum(w)), inner=hg.inner.fixed_point(step))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(2), 0.5), jnp.asarray(0.5))
    assert Status(int(out.info.status)).usable
    assert -2 - 1e-6 <= float(out.grad) <= -1 + 1e-6

    relu = hg.Problem(lambda w, h, b: jnp.sum((w - h) ** 2) + jnp.sum(jax.nn.relu(w) ** 2), lambda w, h, b: jnp.sum(w))
    solver = hg.implicit(relu)
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(2), 0.0), jnp.asarray(0.0))
    assert np.isfinite(out.grad)


def test_a_hundred_values_of_the_hyperparameter_and_of_every_option_trace_once():
    traces = []

    def counted(w, h, b):
        traces.append(1)
        return inner_loss(w, h, b)

    solver = hg.implicit(hg.Problem(counted, outer_loss), damping=0.1)
    step = jax.jit(solver.hypergrad)
    train, valid = Member().data()
    h = jnp.asarray(0.3)
    state = solver.init(jnp.zeros(3), h)
    _, state = step(state, h, train, valid)
    first = len(traces)
    for i in range(100):
        option = {
            "inner": {"tol": 1e-6 / (i + 1), "max_steps": 20 + i},
            "linear": {"tol": 1e-5 / (i + 1), "max_steps": 30 + i},
        }
        for name, values in option.items():
            for key, value in values.items():
                state.options[name][key] = jnp.asarray(value, state.options[name][key].dtype)
        state.options["damping"] = jnp.asarray(0.01 * i, state.options["damping"].dtype)
        out, state = step(state, h + 0.01 * i, train, valid)
        assert Status(int(out.info.status)).usable
    assert len(traces) == first
    assert step._cache_size() == 1


def test_tighter_tolerances_in_the_state_are_obeyed():
    solver = hg.implicit(
        PROBLEM, inner=hg.inner.lbfgs(tol=1e-2), linear=hg.linear.cg(tol=1e-1, preconditioner=None), polish=0
    )
    step = jax.jit(solver.hypergrad)
    h = jnp.asarray(0.37)
    loose, _ = step(start(solver, Member(quartic=1.0), h), h, *Member(quartic=1.0).data())
    tight = Member(quartic=1.0, inner={"tol": tol(1e-9, 1e-6)}, linear={"tol": tol(1e-9, 1e-6)})
    out, _ = step(start(solver, tight, h), h, *tight.data())
    assert out.info.inner_residual < loose.info.inner_residual and out.info.linear_residual < loose.info.linear_residual
    assert out.info.inner_steps > loose.info.inner_steps and out.info.linear_steps >= loose.info.linear_steps
    assert out.info.error_estimate < loose.info.error_estimate


def test_a_converged_hypergradient_is_that_of_central_differences_on_the_quartic_problem():
    member, h = Member(quartic=3.0), jnp.asarray(0.37)
    out, _ = jax.jit(SOLVER.hypergrad)(start(SOLVER, member, h), h, *member.data())

    def value(x: float) -> float:
        w = np.zeros(3)
        for _ in range(50):
            gradient = member.a @ w - x * np.asarray(member.b) + 3.0 * w**3
            w = w - np.linalg.solve(member.a + np.diag(9.0 * w**2), gradient)
        return float(np.asarray(member.c) @ w)

    eps = 1e-4
    slope = (8 * (value(0.37 + eps) - value(0.37 - eps)) - (value(0.37 + 2 * eps) - value(0.37 - 2 * eps))) / (12 * eps)
    assert relative_error(out.grad, np.asarray(slope)) <= tol(1e-8, 1e-4)

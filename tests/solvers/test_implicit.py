"""Implicit hypergradients equal their closed forms: raw gradients, at random hyperparameters, to what the mathematics
allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, assert_trees_equal, central_difference, relative_error, tol
from tests.solvers import _curved_problems as curved
from tests.solvers import _problems as problems
from tests.solvers._problems import Case, flatten

SMOOTH: dict[str, Callable[[], Case]] = {
    "ridge, scalar": lambda: problems.ridge("scalar"),
    "ridge, log": lambda: problems.ridge("log"),
    "ridge, per coordinate": lambda: problems.ridge("per coordinate"),
    "tikhonov, full matrix": problems.tikhonov,
    "example weights": problems.example_weights,
    "labels": lambda: problems.data_as_hparams("labels"),
    "inputs": lambda: problems.data_as_hparams("inputs"),
    "direct terms": problems.direct_terms,
    "odd pytree": problems.odd_pytree,
    "kernel ridge": problems.kernel_ridge,
    "logistic, per coordinate": curved.logistic,
    "softmax, decay per class": curved.softmax,
    "poisson": curved.poisson,
    "huber": curved.huber,
    "badly scaled, unit forces": lambda: curved.diagonal("unit"),
    "badly scaled, large forces": lambda: curved.diagonal("large"),
}
L1 = {"lasso": False, "elastic net": True}
EXACT = tol(1e-7, 1e-4)


def hypergradient(solver: hg.Solver, case: Case) -> tuple[hg.Hypergradient, Any]:
    params, hparams, train, valid = case.arrays()
    return jax.jit(solver.hypergrad)(solver.init(params, hparams), hparams, train, valid)


def check(case: Case, out: hg.Hypergradient, name: str = "") -> None:
    """Gradient and value are the closed form's, in the structure of the hyperparameters."""
    # A condition number of 1e8 is beyond float32, and the status may say so; the number is right all the same.
    allowed = [hg.Status.OK, hg.Status.PRECISION_LIMITED][: 2 if name.startswith("badly scaled") and tol(0, 1) else 1]
    assert int(out.info.status) in allowed
    assert jax.tree.structure(out.grad) == jax.tree.structure(case.hparams)
    expected = problems.hypergradient(case)
    assert relative_error(flatten(out.grad), expected) <= EXACT
    value = problems.outer_value(case, flatten(case.hparams))
    np.testing.assert_allclose(float(out.value), value, rtol=tol(1e-8, 1e-4))


@pytest.mark.parametrize("name", [*SMOOTH, *L1])
def test_closed_form_equals_central_differences_of_the_re_solved_problem(name):
    """The references agree with each other: no JAX here."""
    case = SMOOTH[name]() if name in SMOOTH else curved.l1(L1[name])[0]
    hparams = flatten(case.hparams)
    assert not np.any(np.isin(hparams, [0.0, 1.0]))
    found = central_difference(
        lambda h: problems.outer_value(case, np.asarray(h, np.float64)), hparams, eps=tol(1e-4, 3e-3)
    )
    assert relative_error(found, problems.hypergradient(case)) <= tol(1e-8, 1e-3)


@pytest.mark.parametrize("name", SMOOTH)
def test_hypergradient_equals_closed_form(name):
    case = SMOOTH[name]()
    out, state = hypergradient(hg.implicit(case.problem), case)
    check(case, out, name)
    assert jax.tree.structure(state.params) == jax.tree.structure(case.params)


@pytest.mark.parametrize("name", ["ridge, per coordinate", "direct terms", "odd pytree", "logistic, per coordinate"])
def test_hypergradient_is_the_same_through_newton_and_a_dense_solve(name):
    case = SMOOTH[name]()
    check(case, hypergradient(hg.implicit(case.problem, inner=hg.inner.newton(), linear=hg.linear.dense()), case)[0])


@pytest.mark.parametrize("name", L1)
def test_hypergradient_through_a_proximal_fixed_point_equals_closed_form_on_the_active_set(name):
    case, step = curved.l1(L1[name])
    active = problems.solution(case, flatten(case.hparams)) != 0
    assert 0 < active.sum() < active.size  # else it is not a lasso
    out, state = hypergradient(hg.implicit(case.problem, inner=hg.inner.fixed_point(step)), case)
    check(case, out)
    np.testing.assert_array_equal(np.asarray(state.params) != 0, active)


def scaled(case: Case) -> Callable[..., hg.Hypergradient]:
    """Hypergradients of a case whose losses are multiplied by numbers that are data: one program for all of them."""
    inner, outer = case.problem.inner_loss, case.problem.outer_loss
    assert inner is not None
    solver = hg.implicit(hg.Problem(lambda w, h, b: b[1] * inner(w, h, b[0]), lambda w, h, b: b[1] * outer(w, h, b[0])))
    params, hparams, train, valid = case.arrays()
    step, state = jax.jit(solver.hypergrad), solver.init(params, hparams)
    number = lambda x: jnp.asarray(x, jnp.result_type(float))
    return lambda inside=1.0, outside=1.0: step(state, hparams, (train, number(inside)), (valid, number(outside)))[0]


@pytest.mark.parametrize("make", [lambda: problems.ridge("log"), curved.logistic], ids=["ridge", "logistic"])
def test_scaling_the_outer_loss_scales_the_hypergradient(make):
    case = make()
    run = scaled(case)
    plain = run()
    for scale in (1e-30, 1e30):
        out = run(outside=scale)
        assert int(out.info.status) == hg.Status.OK
        assert relative_error(flatten(out.grad) / scale, problems.hypergradient(case)) <= EXACT
        assert relative_error(flatten(out.grad) / scale, flatten(plain.grad)) <= tol(1e-12, 1e-5)


def test_scaling_the_outer_loss_by_a_power_of_two_changes_no_bit():
    run = scaled(problems.ridge("per coordinate"))
    plain = run()
    for power in (-60, 60):
        out = run(outside=2.0**power)
        np.testing.assert_array_equal(
            np.asarray(out.grad), np.asarray(plain.grad) * np.asarray(2.0**power, plain.grad.dtype)
        )
        for field in ("error_estimate", "inner_residual", "linear_residual", "inner_steps", "linear_steps", "status"):
            assert float(getattr(out.info, field)) == float(getattr(plain.info, field)), field


@pytest.mark.parametrize("make", [lambda: problems.ridge("log"), curved.logistic], ids=["ridge", "logistic"])
def test_scaling_the_inner_loss_changes_nothing(make):
    case = make()
    run = scaled(case)
    for scale in (1e-6, 1e6):
        check(case, run(inside=scale))


def test_a_term_of_the_hyperparameters_alone_changes_nothing_in_the_inner_loss_and_adds_in_the_outer():
    case = problems.ridge("per coordinate")
    inner, outer = case.problem.inner_loss, case.problem.outer_loss
    assert inner is not None
    moved = hg.Problem(
        lambda w, h, b: inner(w, h, b) + jnp.sum(jnp.sin(h)), lambda w, h, b: outer(w, h, b) + jnp.sum(jnp.cos(h))
    )
    out, _ = hypergradient(hg.implicit(moved), case)
    expected = problems.hypergradient(case) - np.sin(flatten(case.hparams))
    assert relative_error(flatten(out.grad), expected) <= EXACT


def test_with_the_inner_loss_outside_only_the_direct_term_is_left():
    """The envelope theorem: at f = h, g = ∂_λ h, whatever the adjoint."""
    case = problems.ridge("per coordinate")
    inner = case.problem.inner_loss
    assert inner is not None
    out, _ = hypergradient(hg.implicit(hg.Problem(inner, inner)), case._replace(valid=case.train))
    w = problems.solution(case, flatten(case.hparams))
    assert relative_error(flatten(out.grad), 0.5 * np.exp(flatten(case.hparams)) * w**2) <= EXACT


def test_the_second_call_starts_from_the_first_and_gives_the_same_hypergradient():
    case = curved.logistic()
    params, hparams, train, valid = case.arrays()
    solver = hg.implicit(case.problem)
    step = jax.jit(solver.hypergrad)
    first, state = step(solver.init(params, hparams), hparams, train, valid)
    second, state = step(state, hparams, train, valid)
    assert_trees_close(second.grad, first.grad, tol(1e-8, 1e-4))
    assert int(second.info.inner_steps) < int(first.info.inner_steps)
    assert int(second.info.linear_steps) < int(first.info.linear_steps)
    moved = jax.tree.map(lambda h: h + 0.01, hparams)
    warm, _ = step(state, moved, train, valid)
    cold, _ = step(solver.init(params, hparams), moved, train, valid)
    assert int(warm.info.inner_steps) < int(cold.info.inner_steps)
    assert_trees_close(warm.grad, cold.grad, tol(1e-7, 1e-4))


def test_without_warm_start_every_call_is_the_first():
    case = curved.logistic()
    params, hparams, train, valid = case.arrays()
    solver = hg.implicit(case.problem, warm_start=False)
    step = jax.jit(solver.hypergrad)
    first, state = step(solver.init(params, hparams), hparams, train, valid)
    _, state = step(state, jax.tree.map(lambda h: h + 1, hparams), train, valid)
    second, _ = step(state, hparams, train, valid)
    assert_trees_equal(second, first)


def test_a_start_at_the_solution_is_not_asked_for_digits_that_nobody_has():
    """The natural size of F is ‖H w‖ there, not the rounding error that is left of F: a first look or two, and done."""
    case = curved.logistic()
    params, hparams, train, valid = case.arrays()
    solver = hg.implicit(case.problem)
    step = jax.jit(solver.hypergrad)
    out, state = step(solver.init(params, hparams), hparams, train, valid)
    again, _ = step(solver.init(solver.response(state, hparams), hparams), hparams, train, valid)
    assert int(again.info.inner_steps) <= 4 < int(out.info.inner_steps)
    assert_trees_close(again.grad, out.grad, tol(1e-8, 1e-4))

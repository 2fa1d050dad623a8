"""What can go wrong does, with the status that names it: eager, jitted, and in a batch whose other members stay as they
are. Then failures of single parts (learning rate, series, preconditioner, loss), and options that change between calls.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import Status
from tests._helpers import assert_trees_close, assert_trees_equal, relative_error, tol
from tests.solvers._faulty import (
    FAULTS,
    GOOD,
    NAN,
    PROBLEM,
    SOLVER,
    Member,
    batch,
    inner_loss,
    outer_loss,
    pick,
    stack,
    start,
)


@pytest.fixture(scope="module")
def together() -> dict[str, Any]:
    """All faults in one batch, each between two good members; then the same without the faults; then a good call after
    each."""
    members = [m for fault in FAULTS.values() for m in (Member(), fault)] + [Member()]
    good = [Member()] * len(members)
    step = jax.jit(jax.vmap(SOLVER.hypergrad))
    arguments = batch(SOLVER, members)
    out, state = step(*arguments)
    clean_arguments = batch(SOLVER, good)
    clean, clean_state = step(*clean_arguments)
    after, recovered = step(state._replace(options=clean_arguments[0].options), *clean_arguments[1:])
    return {
        "out": out,
        "state": state,
        "clean": clean,
        "clean_state": clean_state,
        "after": after,
        "recovered": recovered,
        "hparams": arguments[1],
        "step": step,
    }


def as_expected(name: str, status: Any) -> bool:
    """In float32, a null direction on an axis may look like negative curvature: also a failure, named less well."""
    single = name == "a parameter that the inner loss ignores" and bool(tol(0, 1))
    return Status(int(status)) in [FAULTS[name].expected, Status.NEG_CURVATURE][: 2 if single else 1]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_status(together, name):
    index = 1 + 2 * list(FAULTS).index(name)
    info = pick(together["out"].info, index)
    assert as_expected(name, info.status), Status(int(info.status)).name


def test_a_bad_member_of_a_batch_changes_no_bit_of_the_others(together):
    others = np.arange(0, 2 * len(FAULTS) + 1, 2)
    assert np.all(np.asarray(together["out"].info.status)[others] == Status.OK)
    assert_trees_equal(pick(together["out"], others), pick(together["clean"], others))
    left, right = (pick(together[k]._replace(options={}), others) for k in ("state", "clean_state"))
    assert_trees_equal(left, right)


def test_the_state_is_finite_after_every_fault(together):
    for leaf in jax.tree.leaves(together["state"]._replace(options={})):
        assert np.all(np.isfinite(np.asarray(leaf)))


def test_the_next_good_call_recovers(together):
    """Whatever was wrong before, the status is OK and the hypergradient that of w = λ A⁻¹ b: g = cᵀ A⁻¹ b."""
    assert np.all(np.asarray(together["after"].info.status) == Status.OK)
    expected = np.asarray(Member().c) @ np.linalg.solve(GOOD, np.asarray(Member().b))
    np.testing.assert_allclose(np.asarray(together["after"].grad), expected, rtol=tol(1e-7, 1e-4))


def test_what_can_be_used_is_finite_and_right(together):
    status = np.asarray(together["out"].info.status)
    usable = status <= Status.INSENSITIVE
    assert np.all(np.isfinite(np.asarray(together["out"].grad)[usable]))
    # Where nothing is known of the error, near a singular Hessian in float32, the estimate is inf; it is never NaN.
    assert not np.any(np.isnan(np.asarray(together["out"].info.error_estimate)[usable]))
    for i, name in enumerate(FAULTS):
        m = FAULTS[name]
        if m.expected <= Status.INSENSITIVE and not m.quartic:  # the closed form is that of a quadratic
            inverse = np.linalg.pinv(m.a)
            found = float(together["out"].grad[1 + 2 * i])
            np.testing.assert_allclose(
                found, np.asarray(m.c) @ inverse @ np.asarray(m.b), rtol=tol(1e-7, 1e-4), atol=1e-12
            )


def test_each_fault_has_its_status_alone_under_jit():
    step = jax.jit(SOLVER.hypergrad)
    for name in FAULTS:
        member, h = FAULTS[name], jnp.asarray(0.37)
        train, valid = member.data()
        out, state = step(start(SOLVER, member, h), h, train, valid)
        assert as_expected(name, out.info.status), (name, Status(int(out.info.status)).name)
        assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(state._replace(options={})))
    assert step._cache_size() == 1  # faults, options and data are all values


@pytest.mark.parametrize("name", ["inner steps", "saddle"])
def test_each_fault_has_its_status_without_jit(name):
    member, h = FAULTS[name], jnp.asarray(0.37)
    train, valid = member.data()
    out, state = SOLVER.hypergrad(start(SOLVER, member, h), h, train, valid)
    assert Status(int(out.info.status)) == member.expected
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(state._replace(options={})))


def test_best_response_gives_nan_derivatives_exactly_where_the_status_is_not_usable(together):
    """The same problems, where there is nowhere to put a status."""
    names = [n for n in FAULTS if not FAULTS[n].inner and not FAULTS[n].linear and not n.startswith("outer loss")]
    w_star = hg.best_response(PROBLEM)
    loss = lambda h, train, valid: outer_loss(w_star(h, jnp.zeros(3), train), h, valid)
    data = [FAULTS[n].data() for n in names]
    train, valid = stack([d[0] for d in data]), stack([d[1] for d in data])
    both = lambda h, t, v: (jax.grad(loss)(h, t, v), jax.jvp(lambda h: loss(h, t, v), (h,), (jnp.ones_like(h),))[1])
    reverse, forward = jax.jit(jax.vmap(both))(jnp.full(len(names), 0.37), train, valid)
    for i, name in enumerate(names):
        usable = FAULTS[name].expected.usable
        assert np.isfinite(float(reverse[i])) == usable, name
        a, b = np.asarray(FAULTS[name].a), np.asarray(FAULTS[name].b)
        solvable = np.all(np.isfinite(b)) and np.allclose(a @ np.linalg.pinv(a) @ b, b)
        if (
            usable or not solvable
        ):  # the forward system A x = b may have a solution where the reverse, A v = c, has none
            assert np.isfinite(float(forward[i])) == usable, name


def test_raise_if_failed_names_each_cause_with_its_advice_and_residuals(together):
    with pytest.raises(hg.FailedHypergradientError) as error:
        hg.raise_if_failed(together["out"])
    message = str(error.value)
    failed = {m.expected for m in FAULTS.values() if not m.expected.usable}
    count = sum(not m.expected.usable for m in FAULTS.values())
    assert f"in {count} of {2 * len(FAULTS) + 1} problems" in message
    for status in failed:
        assert f"{status.name}: {status.advice}" in message
    assert message.count("inner_residual=") == 1 and "error_estimate=" in message
    hg.raise_if_failed(together["clean"])
    hg.raise_if_failed(together["clean"].info)
    with pytest.raises(hg.InputTypeError, match="works on the host"):
        jax.jit(lambda out: hg.raise_if_failed(out))(together["clean"])


def test_the_first_call_reaches_its_tolerance_on_classes_that_are_separable():
    """Newton steps from where L-BFGS hands over overshoot there: the loss is close to exponential."""
    cross_entropy = lambda w, h, batch: -jnp.mean(jnp.sum(batch[1] * jax.nn.log_softmax(batch[0] @ w), 1))
    problem = hg.Problem(lambda w, h, batch: cross_entropy(w, h, batch) + h * jnp.sum(w**2), cross_entropy)
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.normal(size=(10, 40, 6)))
    y = jax.nn.one_hot(jnp.argmax(x @ rng.normal(size=(10, 6, 3)), 2), 3)
    solver = hg.implicit(problem, inner=hg.inner.lbfgs(tol=tol(1e-10, 1e-4)))
    one = lambda h, data: solver.hypergrad(solver.init(jnp.zeros((6, 3)), h), h, data, data)[0].info
    every = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    info = jax.jit(every)(jnp.asarray([1e-3, 1e-4, 1e-5]), (x, y))
    assert np.all(info.inner_residual <= tol(1e-10, 1e-4))
    assert np.all(info.status <= int(Status.PRECISION_LIMITED))


# Failures of single parts, and options that change between calls.


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

    solver = hg.implicit(hg.Problem(counted, outer_loss), damping=0.001)
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
        state.options["damping"] = jnp.asarray(1e-4 * i, state.options["damping"].dtype)
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

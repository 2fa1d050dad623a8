"""The contract between `hg.tune` and who moves the hyperparameters, rule by rule."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import domains
from hypergrad._data import minibatches, stream
from hypergrad._solver import About, InputError, InputTypeError, Solver, Status
from hypergrad.domains import to_unconstrained
from hypergrad.outer import Controller, TuneStatus, set_options
from hypergrad.outer._step import make_advance, start
from tests._helpers import assert_trees_equal, count, tol
from tests.outer._controllers import backtracking, every_second, failing, recording
from tests.outer._ridge import START, TRAIN, VALID, counted, info, optimum, ridge, run
from tests.outer.test_tune import nan_at


def values_of(*values, nan_at=()):
    """A solver whose outer loss is what the list says, call by call; its state counts calls, and evaluations."""
    table = jnp.asarray(values)

    def init(params, hparams, *, key=None, model_state=None):
        return {"calls": jnp.int32(0), "evaluations": jnp.int32(0), "step": jnp.int32(0)}

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        value = table[jnp.round(hparams["l2"]).astype(int)]
        grad = {"l2": jnp.ones_like(hparams["l2"])}
        return hg.Hypergradient(value, grad, info(error=jnp.uint32(7)), {"count": jnp.int32(3)}), state | {
            "calls": state["calls"] + 1
        }

    def evaluate(state, hparams, train=None, valid=None, *, key=None):
        out, _ = hypergrad(state, hparams)
        return out.value, out.info, state | {"evaluations": state["evaluations"] + 1}

    return Solver(init, hypergrad, lambda state, hparams: {"at": hparams["l2"]}, evaluate)


def walk(accepts, *, judged=False, compares=False):
    """Goes up by one a step; accepts where it is told to."""
    accepts = jnp.asarray(accepts)

    def update(grad, n, free, out):
        return {"l2": free["l2"] + 1}, n + 1, accepts[n]

    def judge(value, n, free, info):
        return {"l2": free["l2"] + 1}, jnp.where(accepts[n], n, n + 1), accepts[n]

    return Controller(lambda free: jnp.int32(0), update, judge=judge if judged else None, compares=compares)


def walked(values, accepts, **options):
    outer = walk(accepts, **{name: options.pop(name) for name in ("judged", "compares") if name in options})
    solver = options.pop("solver", None) or values_of(*values)
    return run(solver, {"l2": 0.0}, outer=outer, domain=None, **{"steps": len(accepts)} | options)


def test_a_controller_that_backtracks_finds_the_optimum():
    l2, value = optimum(TRAIN, VALID)
    for judged in (False, True):
        result = run(outer=backtracking(30.0, judged=judged), steps=60)
        np.testing.assert_allclose(result.hparams["l2"], l2, rtol=tol(1e-4, 5e-2))
        np.testing.assert_allclose(result.best.value, value, rtol=tol(1e-8, 1e-5))
        assert 0 < np.sum(~result.history.accepted) < 50
        accepted = result.history.value[result.history.accepted]
        assert np.all(np.diff(accepted) < 0)


# 1. What the loop carries.


def test_the_first_usable_point_is_always_accepted():
    for judged in (False, True):
        result = walked([5.0, 4.0, 3.0], [False, False, False], judged=judged)
        assert list(result.history.accepted) == [True, False, False]
        assert result.hparams["l2"] == 0 and result.best.value == 5
    result = walked([np.nan, 4.0, 3.0], [True, False, False])
    assert list(result.history.accepted) == [False, True, False] and result.best.step == 1


# 2. Accepted or taken back, bit for bit.


def test_a_rejected_trial_leaves_the_solver_and_the_point_as_they_were():
    result = run(ridge(), outer=every_second(), steps=9)
    accepted = result.history.accepted
    assert list(accepted) == [True, False] * 4 + [True]
    assert int(result.state["calls"]) == accepted.sum(), "calls at rejected trials never were"
    # The same as a run that never saw the rejected ones, to the bit.
    alone = run(ridge(), outer=optax.sgd(0.15), steps=5)
    np.testing.assert_array_equal(result.history.hparams["l2"][accepted], alone.history.hparams["l2"])
    np.testing.assert_array_equal(result.history.value[accepted], alone.history.value)
    assert_trees_equal(result.state, alone.state)
    assert result.hparams["l2"] == alone.history.hparams["l2"][-1]


# 3. Settling.


def test_a_trial_is_settled_from_the_accepted_point_and_the_controller_is_given_what_was_settled():
    result = run(ridge(), {"l2": 0.5}, outer=recording(4, length=1e4), domain=domains.interval(0.1, 0.9), steps=4)
    path = result.history.hparams["l2"]
    assert path[0] == pytest.approx(0.5) and np.all((path[1:] > 0.8) & (path[1:] < 0.9))
    assert len(set(path[1:])) == 1, "each settles from the accepted point, not from the trial before"
    told = result.outer_state["free"]
    np.testing.assert_allclose(
        told, to_unconstrained(domains.interval(0.1, 0.9), jnp.asarray(path, told.dtype)), rtol=tol(3e-2, 2e-1)
    )
    assert np.all(told < 100), "not the 1e4 that was proposed"


# 4. Judging by the loss alone.


def test_a_hypergradient_is_computed_only_where_the_judge_accepts():
    result = walked([5.0, 4.0, 3.0, 2.0], [True, False, False, True], judged=True)
    history = result.history
    assert list(history.accepted) == [True, False, False, True]
    assert list(history.value) == [5, 4, 3, 2]
    np.testing.assert_array_equal(np.isnan(history.grad_norm), ~history.accepted)
    np.testing.assert_array_equal(np.isnan(history.error_estimate), True)
    np.testing.assert_array_equal(history.metrics["count"], [3, np.nan, np.nan, 3])
    assert list(history.status) == [0] * 4
    # Each accepted point: one evaluation, and one hypergradient warm from it.
    assert int(result.state["calls"]) == int(result.state["evaluations"]) == 2


def test_the_steps_of_an_accepted_trial_count_those_of_its_evaluation():
    solver = values_of(5.0, 4.0, 3.0)

    def with_steps(out, inner, linear):
        return out._replace(inner_steps=jnp.int32(inner), linear_steps=jnp.int32(linear))

    def hypergrad(state, hparams, *data, key=None):
        out, state = solver.hypergrad(state, hparams)
        return out._replace(info=with_steps(out.info, 7, 3)), state

    def evaluate(state, hparams, *data, key=None):
        value, told, state = solver.evaluate(state, hparams)
        return value, with_steps(told, 20, 0), state

    counting = solver._replace(hypergrad=hypergrad, evaluate=evaluate)
    history = walked([5.0, 4.0, 3.0], [True, False, True], judged=True, solver=counting).history
    assert list(history.inner_steps) == [27, 20, 27]
    assert list(history.linear_steps) == [3, 0, 3]


def test_a_judge_without_an_evaluation_of_the_solvers_own_gets_that_of_its_hypergradient():
    own, fallback = (
        walked([5.0, 4.0, 3.0], [True, False, True], judged=True, solver=solver)
        for solver in (values_of(5.0, 4.0, 3.0), values_of(5.0, 4.0, 3.0)._replace(evaluate=None))
    )
    np.testing.assert_array_equal(own.history.value, fallback.history.value)
    np.testing.assert_array_equal(own.history.accepted, fallback.history.accepted)


# 5. Options.


class Optioned(NamedTuple):
    inner: dict
    options: dict


def ridge_with_options(tol: float = 1e-3) -> Solver:
    """Reports the tolerance that it is given."""
    solver = ridge()

    def init(params, hparams, *, key=None, model_state=None):
        table = {"inner": {"tol": jnp.asarray(tol), "max_steps": jnp.int32(5)}, "damping": jnp.float32(0)}
        return Optioned(solver.init(params, hparams), table)

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        out, inner = solver.hypergrad(state.inner, hparams, train, valid, key=key)
        out.info.extra["tol"] = state.options["inner"]["tol"]
        return out, state._replace(inner=inner)

    return Solver(
        init,
        hypergrad,
        lambda state, hparams: state.inner["params"],
        about=About(name="hg.mine", options=("inner.tol", "linear.tol")),
    )


def test_a_controller_sets_tolerances_and_they_reach_the_solver():
    result = run(ridge_with_options(), outer=backtracking(100.0, tol=0.1), steps=12)
    history = result.history
    lengths = history.extra["tol"] / 0.1
    assert len(set(lengths)) > 1
    shortened = np.flatnonzero(~history.accepted[:-1])
    np.testing.assert_allclose(lengths[shortened + 1], lengths[shortened] / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear.tol": 0.1}, ["maker: hg.mine has no linear.tol", "inner.tol"]),
        ({"inner.rank": 3}, ["maker: hg.mine has no inner.rank"]),
        ({"inner": 3}, ["maker: hg.mine has no inner"]),
        ({"damping": 0.1}, ["maker: hg.mine has no damping", "those that may be set are inner.tol"]),
        ({"inner.max_steps": 7}, ["maker: hg.mine has no inner.max_steps"]),
    ],
)
def test_an_option_that_the_solver_does_not_name_is_refused_before_anything_compiles(options, words):
    solver, traces = counted(ridge_with_options())

    def maker():
        def prepare(s, state):
            return set_options(state, options)

        return backtracking()._replace(prepare=prepare)

    with pytest.raises(InputError) as error:
        run(solver, outer=maker())
    for word in words:
        assert word in str(error.value)
    assert not traces


@pytest.mark.parametrize(
    ("prepare", "kind", "words"),
    [
        (lambda s, state: state._replace(inner=state.inner | {"calls": s["n"]}), InputError, ["not an option"]),
        (lambda s, state: state.inner, InputError, ["not an option"]),
        (
            lambda s, state: state._replace(options=state.options | {"new": s["n"]}),
            InputError,
            ["has no new", "inner.tol"],
        ),
        (
            lambda s, state: state._replace(
                options=state.options | {"inner": state.options["inner"] | {"tol": jnp.ones(2)}}
            ),
            InputTypeError,
            ["['inner']['tol']", "[2]"],
        ),
    ],
)
def test_prepare_changes_options_alone(prepare, kind, words):
    with pytest.raises(kind) as error:
        run(ridge_with_options(), outer=every_second()._replace(prepare=prepare))
    for word in words:
        assert word in str(error.value)


def test_options_are_absolute_values_of_the_dtype_that_they_have():
    state = ridge_with_options().init(START, {"l2": 0.1})
    new = set_options(state, {"inner.tol": 3, "inner.max_steps": 2.0})
    assert new.options["inner"]["tol"] == 3 and new.options["inner"]["max_steps"] == 2
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
    with pytest.raises(InputError, match=r"set_options: the solver has no option inner\.rank"):
        set_options(state, {"inner.rank": 1})
    with pytest.raises(InputError, match="no option tol"):
        set_options(START, {"tol": 1})


# 6. Failures.


def test_a_failed_trial_reaches_the_controller_as_inf_and_zero_and_the_solver_goes_back():
    with pytest.warns(UserWarning, match="No step before it was usable"):
        result = run(ridge(nan_at(0)), {"l2": 0.5}, outer=recording(9), steps=9, domain=None)
    # The solver goes back to its first state each time, so that it is always the first call, which fails.
    assert result.status is TuneStatus.FAILED and int(result.state["calls"]) == 0


def test_a_failure_is_told_counted_and_never_accepted():
    result = walked([5.0, np.nan, np.inf, 4.0, 3.0], [True] * 5)
    history = result.history
    assert list(history.accepted) == [True, False, False, True, True]
    assert [Status(code).name for code in history.status[1:3]] == ["NONFINITE_LOSS"] * 2
    assert int(result.state["calls"]) == 3, "the failed calls were taken back"
    told = run(values_of(5.0, np.nan), {"l2": 0.0}, outer=recording(2, length=1.0), steps=2, domain=None).outer_state
    assert list(told["value"]) == [5, np.inf] and list(told["grad"]) == [1, 0]


def test_the_status_of_the_solver_makes_a_failure():
    solver = ridge(lambda call, loss, grad, status: (loss, grad, jnp.where(call > 0, Status.INNER_MAX_STEPS, 0)))
    result = run(solver, {"l2": 0.5}, outer=recording(4), steps=4, domain=None, max_failures=9)
    assert list(result.history.accepted) == [True, False, False, False]
    assert np.all(np.isinf(result.outer_state["value"][1:])) and np.all(result.outer_state["grad"][1:] == 0)
    assert np.all(np.isfinite(result.history.value)), "the history says what was found"
    assert list(result.outer_state["status"][1:]) == [Status.INNER_MAX_STEPS] * 3


def test_a_controller_that_proposes_what_is_not_a_number_stops_as_failed_with_what_it_had():
    result = run(outer=failing(2), steps=6)
    # The controller goes back as well, so that it proposes the same again.
    assert list(result.history.status) == [0, 0] + [Status.NONFINITE_GRAD] * 4
    assert result.status is TuneStatus.FINISHED and result.best.step == 1
    with pytest.warns(UserWarning, match="5 unusable"):
        ended = run(outer=failing(*range(2, 9)), steps=50)
    assert ended.status is TuneStatus.FAILED and len(ended.history.value) == 7
    assert np.isfinite(ended.hparams["l2"]) and ended.best.step == 1


def test_five_failures_in_a_row_stop_a_controller():
    with pytest.warns(UserWarning, match="5 unusable"):
        result = walked([5.0] + [np.nan] * 9, [True] * 10)
    assert result.status is TuneStatus.FAILED and len(result.history.value) == 6


# 7. Rejections.


def test_rejected_trials_are_no_failures_and_end_the_run_as_converged():
    result = walked([5.0] * 20, [True] + [False] * 19, max_rejections=7)
    assert result.status is TuneStatus.CONVERGED and len(result.history.value) == 8
    assert list(result.history.accepted) == [True] + [False] * 7
    assert np.all(result.history.usable)
    values = [5.0, np.nan, 5.0, np.nan, 5.0, np.nan, 5.0]
    result = walked(values, [True] + [False] * 6, max_failures=2)
    assert result.status is TuneStatus.FINISHED, "a rejection resets the failures in a row"
    assert len(walked([5.0] * 60, [True] + [False] * 59).history.value) == 51


def test_with_optax_a_step_is_accepted_where_it_is_usable():
    history = run(ridge(nan_at(3, 4)), steps=10).history
    np.testing.assert_array_equal(history.accepted, history.usable)


# 8. The best, patience, and where the run stands.


def test_the_best_is_the_lowest_among_accepted_rows():
    values, accepts = [5.0, 1.0, 4.0, 2.0, 3.0], [True, False, True, False, True]
    result = walked(values, accepts)
    assert (result.best.step, result.best.value, result.best.hparams["l2"]) == (4, 3, 4)
    assert result.best.params == {"at": 4}
    result = walked([5.0, 1.0, 4.0, 2.0, 3.0], [True, True, True, False, True])
    assert (result.best.step, result.best.value, result.best.params) == (1, 1, {"at": 1})
    last = walked([5.0, 1.0, 4.0, 2.0, 3.0], [True, True, True, False, False], compares=True)
    assert (last.best.step, last.best.value, last.best.params) == (2, 4, {"at": 2})


def test_patience_counts_accepted_rows():
    values = [5.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    result = walked(values, [True, False, False, True, False, True, True, True], patience=3)
    assert result.status is TuneStatus.CONVERGED and len(result.history.value) == 7


def test_an_improvement_smaller_than_min_delta_does_not_count_for_patience():
    values = [5.0, 4.95, 4.9, 4.85, 4.8, 4.0, 4.0, 4.0, 4.0]
    short = walked(values, [True] * 9, patience=2, min_delta=0.1)
    assert short.status is TuneStatus.CONVERGED and len(short.history.value) == 3
    assert short.best.value == pytest.approx(4.9), "the best is the lowest all the same"
    long = walked(values, [True] * 9, patience=2, min_delta=0.07)
    assert len(long.history.value) == 8


def test_a_result_holds_the_last_accepted_point_and_never_an_untested_trial():
    result = walked([5.0, 4.0, 3.0, 2.0], [True, True, False, False])
    assert result.hparams["l2"] == 1 and result.params == {"at": 1} and int(result.state["calls"]) == 2


# 9. Controllers that compare.


def test_a_controller_that_compares_has_one_key_for_the_whole_run():
    def keyed(compares):
        solver = ridge(None)

        def hypergrad(state, hparams, train=None, valid=None, *, key=None):
            out, state = solver.hypergrad(state, hparams, train, valid)
            return out._replace(metrics={"draw": jax.random.uniform(key)}), state

        outer = backtracking(judged=True)._replace(compares=compares)
        result = run(solver._replace(hypergrad=hypergrad), outer=outer, steps=6, key=jax.random.key(0))
        draws = result.history.metrics["draw"]
        return set(draws[np.isfinite(draws)])

    assert len(keyed(True)) == 1 and len(keyed(False)) > 1


@pytest.mark.parametrize("wrap", [lambda pair: minibatches(pair, 4), lambda pair: stream([pair], 1)])
@pytest.mark.parametrize("name", ["train", "valid"])
def test_a_controller_that_compares_refuses_data_that_change(wrap, name):
    solver, traces = counted(ridge())
    data = {"train": TRAIN, "valid": VALID} | {name: wrap(TRAIN)}
    with pytest.raises(InputError, match=rf"compares the losses of different steps, but {name} is hg\.(minib|stream)"):
        run(solver, outer=backtracking(compares=True), key=jax.random.key(0), **data)
    assert not traces
    run(outer=backtracking(), key=jax.random.key(0), steps=2, **data)


# 10. Several steps in a call: see `test_steps_per_call.py`.

# With optax nothing of this is compiled.


def test_with_optax_there_is_nothing_to_accept_or_take_back():
    solver, free = ridge(), {"l2": jnp.asarray(0.5)}
    state = solver.init(START, free)
    selects = {}
    for outer in (optax.sgd(0.1), every_second()):
        loop = start(solver.response, outer, state, free, free)
        selects[type(outer)] = count(
            jax.make_jaxpr(make_advance(solver, outer, None))(loop, TRAIN, VALID, None), "select_n"
        )
        assert (loop.accepted is None) == (not isinstance(outer, Controller))
    plain, controlled = selects.values()
    # Two for the status, one for the point (sgd has no state), four for the best, and one in a norm.
    assert plain == 8 < controlled


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"update": lambda g, s, u, out: (u, s)}, InputTypeError, ["outer.update", "(next, outer, accepted)"]),
        ({"update": lambda g, s, u, out: ({}, s, True)}, InputError, ["outer.update proposes['l2'] is missing"]),
        ({"update": lambda g, s, u, out: (u, {}, True)}, InputError, ["state of outer"]),
        ({"update": lambda g, s, u, out: (u, s, jnp.ones(2, bool))}, InputError, ["one boolean", "(2,)"]),
        ({"judge": lambda v, s, u, i: (u, s)}, InputTypeError, ["outer.judge", "(next, outer, accepted)"]),
    ],
)
def test_a_controller_that_breaks_the_contract_is_named(change, kind, words):
    with pytest.raises(kind) as error:
        run(outer=backtracking()._replace(**change))
    for word in words:
        assert word in str(error.value)

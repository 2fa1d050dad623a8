"""The loop: it finds the optimum, keeps the best apart from the last, and no failure on the way is lost or hidden."""

from __future__ import annotations

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import hypergrad as hg
from hypergrad import domains
from hypergrad._data import minibatches, stream
from hypergrad._solver import Status
from hypergrad.outer import TuneStatus
from tests._helpers import assert_trees_close, assert_trees_equal, relative_error, shard_rows, tol
from tests.outer import _ridge
from tests.outer._ridge import START, TRAIN, VALID, counted, optimum, outer_loss, ridge, run, weights


def test_the_tuned_strength_is_the_closed_form_optimum():
    l2, value = optimum(TRAIN, VALID)
    result = run(outer=optax.adam(0.1), steps=400)
    assert result.status is TuneStatus.FINISHED
    np.testing.assert_allclose(result.hparams["l2"], l2, rtol=tol(1e-7, 2e-2))
    np.testing.assert_allclose(result.best.value, value, rtol=tol(1e-12, 1e-5))
    np.testing.assert_allclose(result.params, weights(result.best.hparams, TRAIN), rtol=tol(1e-6, 1e-2))


def test_the_best_step_is_kept_apart_from_the_last():
    result = run(outer=optax.sign_sgd(1.0), steps=17)  # jumps back and forth over the optimum
    history = result.history
    assert result.best.step == np.argmin(history.value) != 16
    assert result.best.value == np.min(history.value)
    np.testing.assert_array_equal(result.best.hparams["l2"], history.hparams["l2"][result.best.step])
    assert_trees_close(result.best.params, weights(result.best.hparams, TRAIN), tol(1e-12, 1e-4))
    assert relative_error(result.params, result.best.params) > 0.05
    np.testing.assert_allclose(outer_loss(result.best.params, VALID), result.best.value, rtol=tol(1e-12, 1e-5))
    # The last parameters belong to the last hyperparameters that were evaluated.
    assert_trees_close(result.params, weights({"l2": history.hparams["l2"][-1]}, TRAIN), tol(1e-12, 1e-4))


def test_a_step_in_a_domain_follows_the_chain_rule():
    """One step of gradient descent on log(l2) multiplies l2 by exp(−lr · l2 · g)."""
    l2, lr = 0.7, 0.01
    gradient = jax.grad(lambda h: outer_loss(weights(h, TRAIN), VALID))({"l2": jnp.asarray(l2)})["l2"]
    result = run(hparams={"l2": l2}, outer=optax.sgd(lr), steps=1)
    np.testing.assert_allclose(result.hparams["l2"], l2 * np.exp(-lr * l2 * gradient), rtol=tol(1e-12, 1e-5))
    np.testing.assert_allclose(result.history.grad_norm[0], abs(gradient), rtol=tol(1e-12, 1e-5))
    free = run(hparams={"l2": l2}, outer=optax.sgd(lr), steps=1, domain=None)
    np.testing.assert_allclose(free.hparams["l2"], l2 - lr * gradient, rtol=tol(1e-12, 1e-5))


def test_a_thousand_steps_trace_once():
    solver, traces = counted(ridge())
    result = run(
        solver,
        steps=1000,
        outer=optax.adam(0.05),
        key=jax.random.key(3),
        callbacks=lambda step, metrics: None,
        train=minibatches(TRAIN, 20),
    )
    assert len(result.history.value) == 1000
    assert len(traces) == 1


def test_weak_types_of_a_solver_do_not_trace_again():
    solver, traces = counted(ridge())

    def init(params, hparams, *, key=None, model_state=None):
        return {"params": params, "calls": 0.0}

    def hypergrad(state, *args, **kwargs):
        out, new = solver.hypergrad(state, *args, **kwargs)
        return out, new | {"calls": jnp.asarray(1.0)}

    run(solver._replace(init=init, hypergrad=hypergrad), steps=4)
    assert len(traces) == 1


def nan_at(*calls):
    def spoil(call, loss, grad, status):
        bad = jnp.isin(call, jnp.asarray(calls))
        return jnp.where(bad, jnp.nan, loss), jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grad), status

    return spoil


def test_a_failed_step_is_skipped_and_counted():
    result = run(ridge(nan_at(3, 4)), steps=10)
    history = result.history
    assert result.status is TuneStatus.FINISHED
    assert [Status(code).name for code in history.status] == ["OK"] * 3 + ["NONFINITE_LOSS"] * 2 + ["OK"] * 5
    np.testing.assert_array_equal(history.usable, history.status == Status.OK)
    path = history.hparams["l2"]
    assert path[3] == path[4] == path[5] and len(set(path)) == 8
    assert int(result.state["calls"]) == 10, "the solver's state went on"
    # As if the failed steps had never been: the outer optimizer kept its state as well.
    clean = run(ridge(), steps=8)
    assert_trees_close(result.hparams, clean.hparams, tol(1e-14, 1e-6))
    assert_trees_close(result.outer_state, clean.outer_state, tol(1e-14, 1e-6))
    assert "2 updates skipped" in str(result) and "NONFINITE_LOSS 2" in str(result)


def test_the_status_of_the_solver_decides():
    """Step t reports status t: exactly the usable ones move the hyperparameters, or can be best."""
    result = run(ridge(lambda call, loss, grad, status: (loss, grad, call)), steps=len(Status), max_failures=100)
    np.testing.assert_array_equal(result.history.status, range(len(Status)))
    path = [*result.history.hparams["l2"], float(result.hparams["l2"])]
    assert [a != b for a, b in itertools.pairwise(path)] == [code.usable for code in Status]
    assert Status(result.best.step).usable


def test_a_gradient_that_is_not_finite_is_found_whatever_the_status():
    def spoil(call, loss, grad, status):
        return loss, jax.tree.map(lambda g: jnp.where(call == 1, jnp.inf, g), grad), status

    for outer in (optax.adam(0.3), optax.sign_sgd(0.3)):  # the second would make a finite step of it
        result = run(ridge(spoil), steps=3, outer=outer)
        assert list(result.history.status) == [Status.OK, Status.NONFINITE_GRAD, Status.OK]


def test_a_hypergradient_is_clipped_by_optax_and_reported_as_it_was():
    """One step in ten is a thousand times too large, as where training was nearly unstable."""

    def spoil(calls, value, grad, status):
        return value, jax.tree.map(lambda g: jnp.where(calls == 3, 1000.0, 1.0) * g, grad), status

    longest = 0.05
    outer = optax.chain(optax.clip_by_global_norm(longest), optax.sgd(1.0))
    run = lambda outer: hg.tune(
        ridge(spoil), START, {"l2": 0.5}, TRAIN, VALID, outer=outer, steps=6, domain=domains.log(), progress=False
    )
    clipped, plain = run(outer), run(optax.sgd(1.0))
    moves = lambda result: np.abs(np.diff(np.log(result.history.hparams["l2"])))
    assert np.all(moves(clipped) <= longest * (1 + 1e-5)) and moves(clipped)[3] > 0.99 * longest
    assert moves(plain)[3] > 10 * longest
    np.testing.assert_allclose(clipped.history.grad_norm[0], plain.history.grad_norm[0])  # before it was clipped


def test_an_optimizer_that_overflows_is_not_left_silent(x64):
    """The second moment of 1e30 is infinite in float32, and Adam would never move again."""
    huge = 1e30 if not x64 else 1e200

    def spoil(call, loss, grad, status):
        return loss, jax.tree.map(lambda g: jnp.where(call == 2, huge, g), grad), status

    result = run(ridge(spoil), steps=6, domain=None)
    assert list(np.flatnonzero(result.history.status)) == [2]
    assert len(set(result.history.hparams["l2"][3:])) == 3, "it still moves"


def test_a_huge_gradient_leaves_no_domain(x64):
    def spoil(call, loss, grad, status):
        return loss, jax.tree.map(lambda g: jnp.where(call % 2 == 0, 1e30, -1e30) + 0 * g, grad), status

    hparams = {"l2": jnp.float32(0.5)}
    for domain, low, high in ((domains.interval(0.1, 0.9), 0.1, 0.9), (domains.log(), 0, np.inf)):
        result = run(ridge(spoil), hparams, steps=30, domain=domain, outer=optax.sgd(1.0))
        path = result.history.hparams["l2"]
        assert np.all((path >= low) & (path <= high) & np.isfinite(path)) and path.dtype == np.float32
    # Nor does it end where no later step could lead away from.
    result = run(ridge(spoil), hparams, steps=2, domain=domains.interval(0, 1), outer=optax.sgd(1.0))
    assert result.history.hparams["l2"][1] > 0


def test_five_failures_in_a_row_stop_with_the_best_so_far():
    with pytest.warns(UserWarning, match=r"5 unusable .* in a row.*best step before, 5 .*NONFINITE_LOSS") as caught:
        result = run(ridge(nan_at(2, 3, 4, 6, 7, 8, 9, 10, 11)), steps=50)
    assert result.status is TuneStatus.FAILED
    assert len(result.history.value) == 11, "three in a row did not count towards five"
    assert result.best.step == 5
    assert caught[0].filename == _ridge.__file__
    with pytest.warns(UserWarning, match="in a row"):
        assert len(run(ridge(nan_at(2, 3)), steps=50, max_failures=2).history.value) == 4


@pytest.mark.parametrize(
    ("share", "error", "expected"),
    [(1e-6, 2.0, TuneStatus.CONVERGED), (1.0, 2.0, TuneStatus.FAILED), (1e-6, 1e5, TuneStatus.FAILED)],
)
def test_a_hypergradient_that_vanishes_below_its_own_error_has_converged(share, error, expected):
    """At the optimum nothing is accurate relative to zero; what counts is the error beside what there was before."""
    inner = ridge(
        lambda call, loss, grad, status: (
            loss,
            jax.tree.map(lambda g: jnp.where(call >= 3, share, 1.0) * g, grad),
            jnp.where(call >= 3, int(Status.INACCURATE), status),
        )
    )

    def hypergrad(*args, **kwargs):
        out, state = inner.hypergrad(*args, **kwargs)
        return out._replace(info=out.info._replace(error_estimate=jnp.asarray(error))), state

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(inner._replace(hypergrad=hypergrad), steps=50)
    assert result.status is expected and len(result.history.value) == 8
    assert bool(caught) == (expected is TuneStatus.FAILED)


def test_a_run_without_a_usable_step_returns_the_start():
    with pytest.warns(UserWarning, match="result.best is the start"):
        result = run(ridge(nan_at(0, 1)), steps=2)
    assert result.status is TuneStatus.FAILED
    assert result.best.step == -1 and np.isnan(result.best.value)
    assert result.best.hparams == {"l2": 0.01} and result.best.params is START
    assert_trees_close(result.hparams, {"l2": 0.01}, 1e-6)


def test_hyperparameters_that_move_nothing_are_reported():
    def spoil(call, loss, grad, status):
        return loss, jax.tree.map(jnp.zeros_like, grad), jnp.int32(Status.INSENSITIVE)

    with pytest.warns(UserWarning, match="misspelt"):
        run(ridge(spoil), steps=3)


def test_patience_stops_a_run_that_no_longer_improves():
    result = run(outer=optax.sign_sgd(1.0), steps=500, patience=4)
    assert result.status is TuneStatus.CONVERGED
    assert len(result.history.value) == result.best.step + 5


def test_a_callback_sees_python_numbers_and_stops_the_run():
    seen = []

    def stop(step, metrics):
        seen.append((step, metrics))
        return metrics["value"] < 5 and step >= 3

    others = []
    result = run(callbacks=[stop, lambda step, metrics: others.append(step)], steps=100)
    assert result.status is TuneStatus.STOPPED
    assert [step for step, _ in seen] == others == list(range(len(result.history.value)))
    last = seen[-1][1]
    floats = {"value", "grad_norm", "inner_residual", "linear_residual", "error_estimate", "seconds", "rmse", "norm"}
    assert set(last) == floats | {"status", "inner_steps", "linear_steps", "hparams"}
    assert all(type(last[name]) is float for name in floats)
    assert all(type(last[name]) is int for name in ("status", "inner_steps", "linear_steps"))
    assert last["value"] == result.history.value[-1]
    np.testing.assert_allclose(last["rmse"] ** 2, last["value"], rtol=1e-5)
    np.testing.assert_array_equal(last["hparams"]["l2"], result.history.hparams["l2"][-1])


def test_an_exception_of_a_callback_keeps_its_type_and_brings_the_result():
    class MineError(Exception):
        pass

    def fail(step, metrics):
        if step == 7:
            raise MineError("disk full")

    with pytest.raises(MineError, match="disk full") as error:
        run(callbacks=fail)
    result = vars(error.value)["result"]
    assert result.status is TuneStatus.RAISED
    assert len(result.history.value) == 8 and result.best.step >= 0
    assert "attribute `result`" in error.value.__notes__[0]


def test_a_mistake_before_the_first_step_brings_no_result():
    with pytest.raises(ValueError) as error:
        run(ridge(lambda call, loss, grad, status: (jnp.stack([loss, loss]), grad, status)))
    assert not hasattr(error.value, "result")


def test_the_same_key_gives_the_same_bits_and_another_key_does_not():
    batches = minibatches(TRAIN, 10)
    first, second = (run(train=batches, key=jax.random.key(1)) for _ in range(2))
    assert_trees_equal(first.hparams, second.hparams)
    np.testing.assert_array_equal(first.history.value, second.history.value)
    other = run(train=batches, key=jax.random.key(2))
    assert np.all(first.history.value != other.history.value)
    # Each step draws anew: without moving, the loss still changes.
    still = run(train=batches, key=jax.random.key(1), outer=optax.sgd(0.0))
    assert len(set(still.history.value)) == 20
    old = run(train=batches, key=jax.random.PRNGKey(1), steps=2)
    np.testing.assert_array_equal(old.history.value, first.history.value[:2])


def test_a_stream_gives_each_step_its_own_batches():
    x, y = TRAIN
    order = [(x[i::3], y[i::3]) for i in range(3)]
    result = run(train=stream(order, per_step=1), outer=optax.sgd(0.0), steps=6)
    expected = [float(outer_loss(weights({"l2": 0.01}, order[t % 3]), VALID)) for t in range(6)]
    np.testing.assert_allclose(result.history.value, expected, rtol=tol(1e-10, 1e-3))
    pulled = []

    def loader():
        while True:
            pulled.append(1)
            yield x[:10], y[:10]

    solver, traces = counted(ridge())
    run(solver, train=stream(loader(), per_step=2), valid=stream(order, per_step=1), steps=7)
    assert len(pulled) == 14 and len(traces) == 1


def test_a_stream_that_ends_or_changes_shape_stops_with_the_result():
    x, y = TRAIN
    with pytest.raises(ValueError, match=r"ended after 0 of the 1 batches.*while True") as error:
        run(train=stream(((x, y) for _ in range(4)), per_step=1))
    assert len(vars(error.value)["result"].history.value) == 4
    ragged = [(x[:10], y[:10]), (x[:10], y[:10]), (x[:9], y[:9])]
    with pytest.raises(ValueError, match=r"batches of train changed from .*10.* to .*9.*drop or pad") as error:
        run(train=stream(ragged, per_step=1))
    assert len(vars(error.value)["result"].history.value) == 2


def test_odd_hyperparameters_keep_structure_and_dtypes():
    def fold(solver):
        """The same solver over (l2, (bfloat16 vector, None)): only l2 matters."""

        def hypergrad(state, h, train=None, valid=None, *, key=None):
            out, state = solver.hypergrad(state, {"l2": h[0]}, train, valid, key=key)
            return out._replace(grad=(out.grad["l2"], [jnp.ones_like(h[1][0]), None])), state

        return solver._replace(hypergrad=hypergrad)

    hparams = (0.01, [np.full((2, 3), 0.5, jnp.bfloat16), None])
    result = run(fold(ridge()), hparams, domain=(domains.log(), domains.interval(0, 1)), steps=5)
    assert jax.tree.structure(result.hparams) == jax.tree.structure(hparams)
    assert result.hparams[1][0].dtype == jnp.bfloat16 and np.all(result.hparams[1][0] < 0.5)
    assert result.hparams[0].dtype == jnp.result_type(float)
    assert result.history.hparams[1][0].shape == (5, 2, 3)
    assert jax.tree.structure(result.best.hparams) == jax.tree.structure(hparams)


def test_model_state_and_key_reach_the_solver():
    seen = {}
    solver = ridge()

    def init(params, hparams, *, key=None, model_state=None):
        seen.update(params=params, hparams=hparams, key=key, model_state=model_state)
        return solver.init(params, hparams)

    run(solver._replace(init=init), key=jax.random.key(0), model_state={"mean": 1.0}, steps=1)
    assert seen["model_state"] == {"mean": 1.0} and seen["params"] is START
    assert float(seen["hparams"]["l2"]) == pytest.approx(0.01), "hyperparameters as the losses see them"
    assert seen["key"] is not None


def test_an_optimizer_that_wants_the_loss_gets_it():
    l2, _ = optimum(TRAIN, VALID)
    result = run(outer=optax.polyak_sgd(max_learning_rate=1.0, f_min=optimum(TRAIN, VALID)[1]), steps=60)
    np.testing.assert_allclose(result.best.hparams["l2"], l2, rtol=0.05)


def test_ridge_losses_alone_lead_to_the_closed_form_optimum():
    """The whole way: two losses, the implicit solver, the loop."""

    def inner_loss(w, h, batch):
        x, y = batch
        return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * h["l2"] * jnp.sum(w**2)

    problem = hg.Problem(inner_loss, lambda w, h, batch: outer_loss(w, batch))
    result = run(hg.implicit(problem), outer=optax.adam(0.1), steps=300)
    l2, value = optimum(TRAIN, VALID)
    np.testing.assert_allclose(result.hparams["l2"], l2, rtol=tol(1e-6, 3e-2))
    np.testing.assert_allclose(result.best.value, value, rtol=tol(1e-10, 1e-5))
    # The same in unconstrained coordinates, by hand.
    free = hg.constrain(problem, domains.log())
    start = domains.to_unconstrained(domains.log(), {"l2": 0.01})
    other = run(hg.implicit(free), start, outer=optax.adam(0.1), steps=10, domain=None)
    found = domains.to_constrained(domains.log(), other.hparams)["l2"]
    np.testing.assert_allclose(found, result.history.hparams["l2"][10], rtol=tol(1e-6, 1e-3))


def test_to_check_labels_the_losses_are_not_traced_once_more():
    calls = []

    def traces(dtype):
        def loss(w, l2, y):
            calls.append(1)
            return jnp.sum((w - y) ** 2) + l2 * jnp.sum(w**2)

        del calls[:]
        problem, y = hg.Problem(loss, lambda w, l2, y: jnp.sum((w - y) ** 2)), jnp.arange(3).astype(dtype)
        hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, y, y, outer=optax.sgd(0.1), steps=1, progress=False)
        return len(calls)

    assert traces(jnp.int32) == traces(jnp.float32)


def test_steps_of_which_nothing_is_known_are_counted_and_said_once(caplog):
    def unknown(differentiates):
        solver = ridge()

        def hypergrad(*args, **kwargs):
            out, state = solver.hypergrad(*args, **kwargs)
            estimate = jnp.where(state["calls"] % 3 == 0, jnp.inf, 0.1)
            return out._replace(info=out.info._replace(error_estimate=estimate)), state

        caplog.clear()
        run(solver._replace(hypergrad=hypergrad, about=hg.About(differentiates=differentiates)), steps=9)
        return [record.getMessage() for record in caplog.records if record.name == "hypergrad"]

    (said,) = unknown("optimum")
    assert "3 of the 9 steps" in said and "error_estimate of inf" in said and "hg.check" in said
    assert unknown("direct") == unknown("response") == unknown("unknown") == []


def test_whole_numbers_keep_all_their_digits(x64):
    large = 2**31 - 5
    solver = ridge()

    def hypergrad(*args, **kwargs):
        out, state = solver.hypergrad(*args, **kwargs)
        seen = {"count": jnp.int32(large), "word": jnp.uint32(2**32 - 3), "byte": jnp.int8(-7), "flag": jnp.bool_(True)}
        if x64:
            seen |= {"long": jnp.int64(2**62 + 1), "longest": jnp.uint64(2**64 - 1)}
        info = out.info._replace(
            inner_steps=jnp.int32(2**24 + 1), extra=out.info.extra | {"rows": jnp.int32(2**24 + 3)}
        )
        return out._replace(metrics=seen, info=info), state

    for several in (1, 2):
        shown = []
        history = run(
            solver._replace(hypergrad=hypergrad), steps=3, steps_per_call=several,
            callbacks=lambda step, metrics: shown.append(metrics),
        ).history  # fmt: skip
        expected = {"count": large, "word": 2**32 - 3, "byte": -7, "flag": True}
        expected |= {"long": 2**62 + 1, "longest": 2**64 - 1} if x64 else {}
        for name, value in expected.items():
            assert list(history.metrics[name]) == [value] * 3 and history.metrics[name].dtype.kind in "iub"
            assert all(metrics[name] == value and type(metrics[name]) is type(value) for metrics in shown)
        assert list(history.inner_steps) == [2**24 + 1] * 3 and list(history.extra["rows"]) == [2**24 + 3] * 3


def test_after_failures_at_the_start_the_warning_names_what_was_trained():
    with pytest.warns(UserWarning, match=r"result.best is the start.*trained since is in result\.params"):
        run(ridge(nan_at(0, 1)), steps=2)


def test_parameters_and_hyperparameters_may_both_be_sharded(devices):
    """Two programs in flight, each with collectives of its own, can wait for each other for ever: a step is one."""
    x, y = TRAIN
    wide = np.tile(x, (1, 4))[:, :16]

    def inner(w, h, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.sum(jnp.exp(h) * w**2)

    problem = hg.Problem(inner, lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2))
    solver = hg.implicit(problem, inner=hg.inner.gradient(optax.sgd(0.01), steps=3), linear=hg.linear.neumann(3))
    start = {"params": jnp.zeros(16), "hparams": jnp.full(16, -2.0)}
    found = []
    kinds = (AxisType.Auto, AxisType.Explicit)
    for place in (lambda tree: tree, *(functools.partial(shard_rows, devices=devices, kind=kind) for kind in kinds)):
        placed = {name: place(leaf) for name, leaf in start.items()}
        result = hg.tune(
            solver, **placed, train=(wide, y), valid=(wide[::2], y[::2]), outer=optax.adam(0.1), steps=12,
            progress=False, callbacks=lambda step, metrics: None,
        )  # fmt: skip
        found.append(result)
    plain, *spread = found
    for sharded in spread:
        assert sharded.best.params.sharding.device_set == set(devices)
        np.testing.assert_allclose(sharded.history.value, plain.history.value, rtol=tol(1e-10, 1e-4))
        assert_trees_close(np.asarray(sharded.hparams), np.asarray(plain.hparams), tol(1e-10, 1e-3))


def test_a_weakly_typed_start_compiles_once():
    problem = hg.Problem(lambda w, h, b: (w - h) ** 2, lambda w, h, b: (w - 1.0) ** 2)
    solver, traces = counted(hg.implicit(problem))
    hg.tune(solver, jnp.array(0.0), jnp.array(0.3), outer=optax.adam(0.1), steps=4, progress=False)
    assert len(traces) == 1

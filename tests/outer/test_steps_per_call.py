"""Several steps in one call are the same steps, to the bit; what the host does, it does after each call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import hypergrad as hg
from hypergrad._data import stream
from hypergrad.outer import TuneStatus
from hypergrad.outer._loop import Limits, next_steps
from hypergrad.outer._step import make_advance, make_block, start
from tests.outer._controllers import backtracking, every_second
from tests.outer._ridge import START, TRAIN, VALID, counted, ridge
from tests.outer.test_tune import nan_at
from tests.reliability import _runs
from tests.reliability._runs import SOLVERS, assert_same, at, interrupt


def run(folder=None, **options):
    return _runs.run(folder, **{"every": None} | options)


OUTER = {
    "optax": lambda: optax.adam(0.3),
    "every second": every_second,
    "judge": lambda: backtracking(100.0, judged=True),
}


@pytest.mark.parametrize("outer", OUTER)
def test_several_steps_in_a_call_give_the_same_bits(outer):
    expected = run(outer=OUTER[outer]())
    assert (outer == "optax") == bool(np.all(expected.history.accepted))
    for several in (5, 12, 100):
        assert_same(run(outer=OUTER[outer](), steps_per_call=several), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_goes_on_with_another_number_of_steps_in_a_call(name, tmp_path):
    """Interrupted twice, with three different numbers; whatever the solver, the same bits."""
    expected = run(solver=SOLVERS[name](), steps=17)
    pieces = (
        ({"steps_per_call": 1}, at(3, interrupt)),
        ({"steps_per_call": 5}, at(9, interrupt)),
        ({"steps_per_call": 4}, None),
    )
    for options, callback in pieces:
        found = run(tmp_path, solver=SOLVERS[name](), steps=17, callbacks=[callback] if callback else [], **options)
    assert_same(found, expected)


def test_the_resume_in_the_middle_of_a_backtrack_gives_the_same_bits(tmp_path):
    expected = run(outer=backtracking(100.0, judged=True), steps=16)
    rejected = np.flatnonzero(~expected.history.accepted)
    middle = int(rejected[np.flatnonzero(np.diff(rejected) == 1)[0]])  # another rejection follows
    for several in (1, 3):
        folder = tmp_path / str(several)
        run(folder, outer=backtracking(100.0, judged=True), steps=16, callbacks=at(middle, interrupt))
        found = run(folder, outer=backtracking(100.0, judged=True), steps=16, steps_per_call=several)
        assert_same(found, expected)
        with pytest.raises(ValueError, match="made with another outer"):
            run(folder, outer=backtracking(10.0, judged=True), steps=16)
        with pytest.raises(ValueError, match="made with another outer"):
            run(folder, outer=backtracking(100.0), steps=16)


def test_a_call_is_compiled_once_whatever_is_left_of_the_steps():
    solver, traces = counted(ridge())
    run(solver=solver, steps=17, steps_per_call=5, callbacks=lambda step, metrics: None)
    assert len(traces) == 1


def test_callbacks_see_every_step_of_a_call_in_turn_and_stop_after_it():
    seen: list = []
    expected: list = []
    look = lambda into: lambda step, metrics: into.append((step, metrics["value"], float(metrics["hparams"]["l2"])))
    run(callbacks=look(expected))
    run(callbacks=look(seen), steps_per_call=5)
    assert seen == expected and len(seen) == 12
    stopped = run(callbacks=at(6, lambda: True), steps_per_call=5)
    assert stopped.status is TuneStatus.STOPPED and len(stopped.history.value) == 10


def test_a_callback_that_stopped_a_call_in_the_middle_is_asked_again_from_there(tmp_path):
    for _ in range(2):
        seen = []
        log = lambda step, metrics: seen.append(float(metrics["hparams"]["l2"]))
        first = run(tmp_path, callbacks=[log, at(6, lambda: True)], steps_per_call=5, every=5)
        assert first.status is TuneStatus.STOPPED and len(first.history.value) == 10
    assert seen == [pytest.approx(float(first.history.hparams["l2"][6]), rel=1e-12)]
    assert_same(run(tmp_path, every=5), run())


def test_failures_and_patience_act_after_each_call():
    failed = pytest.warns(UserWarning, match="unusable")
    with failed:
        result = run(solver=ridge(nan_at(*range(3, 12))), steps=30, steps_per_call=4)
    assert result.status is TuneStatus.FAILED and len(result.history.value) == 8
    still = run(outer=optax.sgd(0.0), train=TRAIN, steps=50, patience=3, steps_per_call=4)
    assert still.status is TuneStatus.CONVERGED and len(still.history.value) == 4


def test_streams_give_each_step_of_a_call_its_own_batches():
    x, y = TRAIN
    order = [(x[i::5], y[i::5]) for i in range(5)]
    expected = run(train=stream(order, per_step=2), valid=stream([VALID], per_step=1))
    train = stream(order, per_step=2)
    found = run(train=train, valid=stream([VALID], per_step=1), steps_per_call=5)
    assert_same(found, expected)
    assert train.position == 24, "the last call takes two steps"


def test_checkpoints_are_whole_calls_apart(tmp_path):
    with pytest.raises(ValueError, match=r"every must be a multiple of steps_per_call, found 10 and 4: write every=12"):
        run(steps_per_call=4, every=10)
    run(tmp_path, steps=40, steps_per_call=4)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [24, 36, 40]


def test_a_call_ends_at_a_multiple_of_its_length():
    limits = Limits(23, 5, 5, 50, None, 0.0, None, 5)
    assert [next_steps(count, limits) for count in (0, 3, 5, 19, 20, 22)] == [5, 2, 5, 1, 3, 1]


def test_a_convolution_has_the_same_bits_in_a_call_of_several_steps():
    """XLA on CPU convolves by another routine inside a loop."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(8, 9, 9, 3)), jnp.float32), jnp.asarray(rng.normal(size=8), jnp.float32)

    def loss(w, h, batch):
        made = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean((jnp.tanh(made).mean((1, 2, 3)) - y) ** 2)

    problem = hg.Problem(lambda w, h, b: loss(w, h, b) + jnp.exp(h["l2"]) * jnp.sum(w**2), loss)
    solver = hg.implicit(
        problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=1), linear=hg.linear.identity(step_size=0.1)
    )
    start = jnp.asarray(rng.normal(size=(3, 3, 3, 4)) / 5, jnp.float32)
    one, several = (
        hg.tune(
            solver, start, {"l2": -2.0}, outer=optax.adam(0.1), steps=4, steps_per_call=k, progress=False,
            callbacks=lambda step, metrics: None,
        )
        for k in (1, 3)
    )  # fmt: skip
    assert_same(several, one)


OUTERS = {
    "optax": optax.adam(0.3),
    "lbfgs": hg.outer.lbfgs(),
    "judged": backtracking(judged=True),
}


@pytest.mark.parametrize(("name", "dtype"), [*[(name, float) for name in OUTERS], ("optax", jnp.bfloat16)])
def test_the_compiled_steps_are_made_for_other_platforms_too(name, dtype):
    """Nothing that only a CPU can do, on which alone the suite runs: one step, and several in a call."""
    small = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    solver, outer = ridge(), OUTERS[name]
    hparams, data = {"l2": jnp.asarray(0.1, dtype)}, small((TRAIN, VALID))
    loop = start(jax.jit(solver.response), outer, solver.init(small(START), hparams), hparams, hparams)
    unit = make_advance(solver, outer, hg.domains.real())
    block = make_block(unit, 3, (), show=True)
    for step, count in ((unit, ()), (block, (np.int32(3),))):
        made = export.export(jax.jit(step), platforms=["cuda", "tpu"])(loop, *count, *data, None)
        assert made.platforms == ("cuda", "tpu") and ("bf16" in made.mlir_module()) == (dtype is jnp.bfloat16)


def test_a_run_out_of_time_stops_after_a_call(monkeypatch):
    import time

    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    result = run(steps=1000, max_seconds=50.0)
    assert result.status is TuneStatus.OUT_OF_TIME and 5 < len(result.history.value) < 50
    with pytest.raises(ValueError, match="max_seconds must be greater than 0"):
        run(max_seconds=0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="clock of each process, and this program has 2"):
        run(max_seconds=50.0)


def test_a_million_steps_of_one_hyperparameter_fit_into_a_gigabyte():
    """In rows while the run goes on, which double in number, and in columns at its end."""
    steps = 300
    history = run(train=TRAIN, steps=steps, steps_per_call=100).history
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(tuple(history))) * 4 / steps < 1000

"""What a run leaves behind: arrays of one length, a DataFrame, a summary; and what it shows while it runs."""

from __future__ import annotations

import io
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad import domains
from hypergrad._solver import HypergradError, Hypergradient, Solver, Status
from hypergrad.outer import TuneStatus, callbacks, tune
from tests.outer._ridge import data, info, ridge

TRAIN, VALID = data()


def run(steps=12, **options):
    return tune(
        ridge(),
        jnp.zeros(6),
        {"l2": 0.01},
        TRAIN,
        VALID,
        outer=optax.adam(0.3),
        steps=steps,
        **{"domain": domains.log(), "progress": False} | options,
    )


def quadratic():
    """Outer loss |h|², so that any number of hyperparameters is cheap."""

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        value, grad = jax.value_and_grad(lambda h: sum(jnp.sum(x**2) for x in jax.tree.leaves(h)))(hparams)
        return Hypergradient(value, grad, info(), {}), state

    def init(params, hparams, *, key=None, model_state=None):
        return params

    return Solver(init, hypergrad, lambda state, hparams: state)


def test_every_column_has_one_entry_a_step():
    history = run().history
    columns = [
        *history[:9],
        history.hparams["l2"],
        *history.metrics.values(),
        *history.extra.values(),
        *(tree["l2"] for tree in history.summary.values()),
    ]
    assert [column.shape for column in columns] == [(12,)] * len(columns)
    assert set(history.metrics) == {"rmse"} and set(history.extra) == {"norm"}
    assert history.status.dtype == history.inner_steps.dtype == np.int64
    np.testing.assert_allclose(history.metrics["rmse"] ** 2, history.value, rtol=1e-5)
    assert np.all(np.diff(history.seconds) >= 0)
    assert np.all(history.linear_steps == 1) and np.all(np.isnan(history.inner_residual))
    np.testing.assert_array_equal(history.summary["mean"]["l2"], history.hparams["l2"])


@pytest.mark.parametrize("size", [990, 1010])
def test_long_trajectories_are_summarised(size):
    hparams = {"w": jnp.linspace(1.0, 2.0, size), "s": jnp.asarray(3.0), "nothing": jnp.zeros((0, 2))}
    history = tune(quadratic(), jnp.zeros(1), hparams, outer=optax.sgd(0.1), steps=4, progress=False).history
    assert (history.hparams is None) == (size > 1000)
    shrink = 0.8 ** np.arange(4)
    for kind, expected in (("min", 1.0), ("mean", 1.5), ("max", 2.0)):
        np.testing.assert_allclose(history.summary[kind]["w"], expected * shrink, rtol=1e-5)
        np.testing.assert_allclose(history.summary[kind]["s"], 3 * shrink, rtol=1e-5)
        assert np.all(np.isnan(history.summary[kind]["nothing"]))
    if history.hparams is not None:
        assert history.hparams["w"].shape == (4, size)
        np.testing.assert_allclose(history.hparams["w"][3], hparams["w"] * 0.8**3, rtol=1e-5)


def test_the_history_exports_to_a_data_frame():
    pytest.importorskip("pandas")
    frame = run().history.to_pandas()
    assert frame.index.name == "step" and len(frame) == 12
    assert list(frame["status"].unique()) == ["OK"]
    assert {"value", "grad_norm", "seconds", "rmse", "norm", "hparams['l2']"} <= set(frame.columns)
    hparams = {"few": jnp.ones((2, 2)), "many": jnp.arange(1.0, 12.0), "none": None}
    frame = tune(quadratic(), jnp.zeros(1), hparams, outer=optax.sgd(0.1), steps=3, progress=False).history.to_pandas()
    assert {"hparams['few'][0, 1]", "hparams['few'][1, 1]", "hparams['many'].min"} <= set(frame.columns)
    np.testing.assert_allclose(frame["hparams['many'].mean"], 6 * 0.8 ** np.arange(3), rtol=1e-5)


def test_without_pandas_the_extra_is_named(monkeypatch):
    history = run(steps=1).history
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HypergradError, match=r"pip install -e '\.\[pandas\]"):
        history.to_pandas()


def test_a_result_prints_as_a_summary():
    result = run()
    lines = str(result).splitlines()
    assert lines[0].startswith("tune: finished after 12 steps in ")
    assert f"outer loss {result.best.value:.6g} at step {result.best.step} with ['l2'] = " in lines[1]
    assert lines[-1].startswith("  final  ['l2'] = ")
    assert any("status OK 12" in line for line in lines)
    assert repr(result) == str(result) and len(lines) == 5
    assert repr(result.history) == "History(12 steps; rmse, norm)"
    hparams = {"w": jnp.linspace(1, 2, 50), "b": jnp.ones(2)}
    many = tune(quadratic(), jnp.zeros(1), hparams, outer=optax.sgd(0.0), steps=1, progress=False)
    assert "['w']: 50 from 1 to 2" in str(many) and "['b'] = [1, 1]" in str(many) and "after 1 step in" in str(many)


def test_reasons_to_stop_read_as_english():
    assert TuneStatus.FINISHED == "finished"
    assert "tune: stopped by a callback after 1 step" in str(run(callbacks=lambda step, metrics: True))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_loss_norm_and_status(monkeypatch):
    pytest.importorskip("tqdm")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    result = run(progress=True)
    text = shown.getvalue()
    assert "12/12" in text and "outer loss " in text and "hypergradient " in text and ", OK" in text
    assert f"{result.history.value[-1]:.5g}" in text


def test_progress_goes_to_the_log_alone_without_a_terminal_or_tqdm(monkeypatch):
    """Where logging is set up, as pytest does."""
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    run(progress=True, steps=2)
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    run(progress=False, steps=2)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    run(progress=True, steps=2)
    assert quiet.getvalue() == shown.getvalue() == ""


def test_a_program_without_logging_gets_the_lines_on_stderr_with_the_time_left(monkeypatch):
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda logger: False)
    monkeypatch.setattr(callbacks, "_EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    run(progress=True, steps=4)
    lines = [line for line in shown.getvalue().splitlines() if not re.match(r"tune: compiling \(\d+ s\)", line)]
    assert lines[0] == "tune: compiling" and lines[1].startswith("tune: compiled, and took the first step, in ")
    assert lines[2].startswith("tune: step 1 of 4, outer loss ") and lines[2].endswith(", OK"), "nothing is known yet"
    assert re.search(r", OK, \d+ s left$", lines[3]) and re.search(r", OK, \d+ s left$", lines[4])
    assert lines[5].startswith("tune: step 4 of 4") and len(lines) == 6
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    run(progress=False, steps=2)
    assert shown.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "9 s"), (61.0, "1 min 1 s"), (7260.0, "2 h 1 min")])
def test_durations_read_as_a_person_writes_them(seconds, text):
    assert callbacks._duration(seconds) == text


def test_an_unknown_status_is_shown_by_number():
    solver = ridge(lambda call, loss, grad, status: (loss, grad, jnp.int32(99)))
    with pytest.warns(UserWarning, match="code 99"):
        result = tune(solver, jnp.zeros(6), {"l2": 0.1}, TRAIN, VALID, outer=optax.sgd(0.1), steps=9, progress=False)
    assert "code 99 5" in str(result) and 99 not in set(Status)

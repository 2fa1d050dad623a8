"""What callbacks see, what they may want beside, and that they are told of the end."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._solver import InputError
from hypergrad.outer import TuneStatus
from hypergrad.outer.callbacks import progress_bar
from tests._helpers import assert_trees_close, tol
from tests.outer._controllers import every_second
from tests.outer._ridge import TRAIN, ridge, run, weights
from tests.reliability._runs import at, interrupt


class Tracker:
    """Keeps everything; an object, as a tracker's adapter is."""

    def __init__(self, *wants):
        self.wants, self.seen, self.ends = wants, [], []

    def __call__(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def on_end(self, result):
        self.ends.append(result)


@pytest.mark.parametrize("several", [1, 4])
def test_a_callback_gets_the_parameters_and_the_state_that_it_wants(several):
    tracker, plain = Tracker("params", "state"), Tracker()
    result = run(callbacks=[tracker, plain], steps=10, steps_per_call=several)
    assert [step for step, _ in tracker.seen] == list(range(10))
    for step, metrics in tracker.seen:
        assert_trees_close(metrics["params"], weights(metrics["hparams"], TRAIN), tol(1e-12, 1e-4))
        assert metrics["state"]["calls"] == step + 1
    np.testing.assert_array_equal(tracker.seen[-1][1]["params"], result.params)


def test_what_nobody_wants_is_not_there():
    plain = Tracker()
    run(callbacks=plain, steps=2)
    assert not {"params", "state", "accepted", "computed"} & set(plain.seen[0][1])


def test_a_rejected_trial_is_shown_with_its_own_parameters():
    tracker = Tracker("params", "state")
    run(callbacks=tracker, steps=4, outer=every_second())
    assert [metrics["accepted"] for _, metrics in tracker.seen] == [True, False, True, False]
    for _, metrics in tracker.seen:
        assert_trees_close(metrics["params"], weights(metrics["hparams"], TRAIN), tol(1e-12, 1e-4))
    assert [int(metrics["state"]["calls"]) for _, metrics in tracker.seen] == [1, 2, 2, 3]


@pytest.mark.parametrize("several", [1, 3])
def test_typed_keys_in_a_state_arrive_as_keys(several):
    solver = ridge()

    def init(params, hparams, *, key=None, model_state=None):
        return solver.init(params, hparams) | {"key": key}

    def hypergrad(state, *args, key=None, **kwargs):
        out, new = solver.hypergrad(state, *args, **kwargs)
        return out, new | {"key": jax.random.split(state["key"])[0]}

    tracker = Tracker("state")
    result = run(solver._replace(init=init, hypergrad=hypergrad), callbacks=tracker, steps=3, steps_per_call=several,
                 key=jax.random.key(0))  # fmt: skip
    shown = tracker.seen[-1][1]["state"]["key"]
    assert jnp.array_equal(jax.random.key_data(shown), jax.random.key_data(result.state["key"]))
    jax.random.normal(shown)


def test_the_end_is_told_once_however_a_run_ends():
    def ended(**options):
        tracker = Tracker()
        try:
            result = run(callbacks=[tracker, options.pop("callback", tracker)], **options)
        except RuntimeError as error:
            result = vars(error)["result"]
        ends = {id(found) for found in tracker.ends}
        assert ends == {id(result)}
        return result.status

    def fail():
        raise RuntimeError("mine")

    assert ended(callback=lambda *_: None) is TuneStatus.FINISHED
    assert ended(callback=at(3, lambda: True)) is TuneStatus.STOPPED
    assert ended(callback=at(3, interrupt)) is TuneStatus.INTERRUPTED
    assert ended(callback=at(3, fail)) is TuneStatus.RAISED


def test_an_exception_at_the_end_brings_the_result():
    class Failing(Tracker):
        def on_end(self, result):
            raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network") as error:
        run(callbacks=Failing(), steps=3)
    assert vars(error.value)["result"].status is TuneStatus.FINISHED


def test_a_wish_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="a callback wants 'grads'; it may want 'params' and 'state'"):
        run(callbacks=Tracker("grads"))


def test_a_resumed_run_shows_what_the_one_before_had_not_kept(tmp_path):
    def halt(step, metrics):
        if step == 3:
            raise RuntimeError

    for several in (1, 3):
        folder = tmp_path / str(several)
        with pytest.raises(RuntimeError):
            run(ridge(), callbacks=halt, checkpoint=folder, steps=9, steps_per_call=several)
        tracker = Tracker("params", "state")
        run(ridge(), callbacks=tracker, checkpoint=folder, steps=9, steps_per_call=several)
        assert [step for step, _ in tracker.seen] == list(range(3, 9))
        assert all(set(metrics) >= {"params", "state", "hparams"} for _, metrics in tracker.seen)


def test_callbacks_with_wishes_change_nothing_that_a_resume_would_refuse(tmp_path):
    first = run(callbacks=Tracker("state"), checkpoint=tmp_path, steps=4)
    assert run(checkpoint=tmp_path, steps=4).status is first.status is hg.TuneStatus.FINISHED


def test_json_lines_keep_every_step_and_number(tmp_path):
    path = tmp_path / "run.jsonl"
    result = run(callbacks=hg.outer.json_lines(path), steps=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["status"] for line in lines] == ["OK"] * 3
    np.testing.assert_allclose([line["value"] for line in lines], np.asarray(result.history.value), rtol=1e-6)
    run(callbacks=hg.outer.json_lines(str(path)), steps=2)
    assert len(path.read_text().splitlines()) == 5, "a second run appends"


def test_json_lines_write_what_json_has(tmp_path):
    path = tmp_path / "run.jsonl"
    hparams = {"many": jnp.arange(33.0), "few": jnp.ones((2, 1)), "whole": np.int32(3)}
    metrics = {
        "value": float("nan"),
        "error_estimate": float("inf"),
        "status": 0,
        "hparams": hparams,
        "seen": np.float32(2),
    }
    hg.outer.json_lines(path)(7, metrics)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 7,
        "value": None,
        "error_estimate": None,
        "status": "OK",
        "hparams": {"['few']": [[1.0], [1.0]], "['many']": {"min": 0.0, "mean": 16.0, "max": 32.0}, "['whole']": 3},
        "seen": 2.0,
    }


def test_json_lines_in_no_folder_are_refused(tmp_path):
    for path in (tmp_path / "none" / "run.jsonl", tmp_path):
        with pytest.raises(InputError, match="json_lines: path"):
            hg.outer.json_lines(path)


def test_of_several_processes_the_first_alone_speaks(monkeypatch, tmp_path, caplog):
    log = hg.outer.json_lines(tmp_path / "run.jsonl")
    for index in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        log(3, {"value": 1.0})
        with progress_bar(5, show=True) as line:
            assert (line is None) == (index == 1)
    assert (tmp_path / "run.jsonl").read_text().count("\n") == 1


def test_the_words_beside_the_progress_are_made_only_when_they_are_shown(monkeypatch):
    """They cost as much as a short step, and a line is written every ten seconds at most."""
    asked = []
    monkeypatch.setattr(time, "perf_counter", lambda: 3.0)
    with progress_bar(50, show=True) as line:
        for step in range(50):
            metrics = lambda step=step: asked.append(step) or {"value": 1.0, "grad_norm": 1.0, "status": 0}
            line(metrics, 0, 1)
    assert asked == [0, 49]

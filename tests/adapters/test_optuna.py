"""Trials are runs of `hg.tune`: reported, pruned, interrupted and read back; and a run's history is a study."""

# pyright: reportArgumentType=false

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optuna")

import optax
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import hypergrad as hg
from hypergrad._solver import Status
from hypergrad.adapters.optuna import _keep, objective, polish, polished, report
from tests.outer._controllers import every_second
from tests.outer._ridge import START, TRAIN, VALID, ridge, run
from tests.reliability._runs import at, interrupt

optuna.logging.set_verbosity(optuna.logging.CRITICAL)
SAME = {"params": START, "train": TRAIN, "valid": VALID, "domain": hg.domains.log(), "progress": False}
SAME |= {"outer": optax.adam(0.3), "steps": 8}


def study(**options):
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **options)


def arguments(trial):
    """A penalty to polish, and how many features there are to choose from."""
    kept = trial.suggest_int("features", 2, 6)
    train, valid = ((x * (np.arange(6) < kept), y) for x, y in (TRAIN, VALID))
    l2 = trial.suggest_float("l2", 1e-2, 1.0, log=True)
    return {"solver": ridge(), "hparams": {"l2": l2}, "train": train, "valid": valid}


def test_a_trial_is_a_run_of_tune_from_what_it_suggests():
    found = study()
    found.optimize(objective(arguments, **SAME), n_trials=3)
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 3
    assert len({trial.params["features"] for trial in found.trials}) > 1
    for trial in found.trials:
        given = SAME | arguments(optuna.trial.FixedTrial(trial.params))
        own = hg.tune(**given)
        assert trial.value == own.best.value < own.history.value[0]
        np.testing.assert_array_equal(list(trial.intermediate_values.values()), own.history.value)
        assert polished(trial, {"l2": jnp.zeros(())})["l2"] == own.best.hparams["l2"] != trial.params["l2"]
        assert trial.user_attrs["best_step"] == own.best.step and trial.user_attrs["status"] == "finished"


def test_the_pruner_ends_a_trial_which_keeps_what_it_found():
    last = run(steps=8).history.value[4]
    found = study(pruner=optuna.pruners.ThresholdPruner(lower=last + 1e-12))
    found.optimize(objective(lambda trial: {"solver": ridge()}, hparams={"l2": 0.01}, **SAME), n_trials=1)
    (trial,) = found.trials
    assert trial.state.name == "PRUNED"
    assert list(trial.intermediate_values) == [0, 1, 2, 3, 4] and trial.user_attrs["best_step"] == 4
    assert trial.user_attrs["status"] == hg.TuneStatus.RAISED
    assert polished(trial, {"l2": 0.0})["l2"] > 0.01


def test_without_pruning_every_step_is_reported():
    found = study(pruner=optuna.pruners.ThresholdPruner(upper=0.0))
    result = polish(found.ask(), ridge(), hparams={"l2": 0.01}, prune=False, **SAME)
    assert len(found.trials[0].intermediate_values) == len(result.history.value) == 8


def test_neither_unusable_nor_rejected_steps_are_reported():
    def spoil(calls, value, grad, status):
        return value, grad, jnp.where(calls == 2, int(Status.INNER_MAX_STEPS), status)

    found = study()
    polish(found.ask(), ridge(spoil), hparams={"l2": 0.01}, **SAME)
    polish(found.ask(), ridge(), hparams={"l2": 0.01}, **SAME | {"outer": every_second(), "steps": 4})
    assert list(found.trials[0].intermediate_values) == [0, 1, 3, 4, 5, 6, 7]
    assert list(found.trials[1].intermediate_values) == [0, 2]


@pytest.mark.filterwarnings("ignore:tune")
def test_a_trial_without_a_usable_step_has_failed_and_the_study_goes_on():
    def spoil(calls, value, grad, status):
        return jnp.nan * value, grad, jnp.int32(Status.NONFINITE_LOSS)

    found = study()
    arguments = lambda trial: {"solver": ridge(spoil if trial.number == 0 else None), "hparams": {"l2": 0.01}}
    found.optimize(objective(arguments, **SAME), n_trials=2)
    assert [trial.state.name for trial in found.trials] == ["FAIL", "COMPLETE"]
    assert "hparams" not in found.trials[0].user_attrs and found.trials[0].user_attrs["status"] == "failed"


def test_an_interrupt_ends_the_study_and_keeps_the_trial():
    found = study()
    callback = at(3, interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        found.optimize(
            objective(lambda trial: {"solver": ridge(), "hparams": {"l2": 0.01}}, callbacks=callback, **SAME), 3
        )
    assert vars(error.value)["result"].status is hg.TuneStatus.INTERRUPTED
    assert len(found.trials) == 1 and found.trials[0].user_attrs["status"] == "interrupted"


def test_many_hyperparameters_are_kept_in_summary():
    class Kept:
        def __init__(self):
            self.user_attrs = {}

        def set_user_attr(self, name, value):
            self.user_attrs[name] = value

    def many(n):
        trial, result = Kept(), run(steps=1)
        _keep(trial, result._replace(best=result.best._replace(hparams={"l2": jnp.full(n, 0.01), "b": 1.0})))
        return trial

    assert set(many(1000 - 1).user_attrs["hparams"]) == {"b", *(f"l2.{i}" for i in range(999))}
    trial = many(1000)
    assert set(trial.user_attrs["hparams"]) == {"b", "l2.min", "l2.mean", "l2.max"}
    with pytest.raises(
        hg.InputError, match=r"but the trial has b, l2.max, l2.mean, l2.min: .* Above 1000 hyperparameters"
    ):
        polished(trial, {"l2": jnp.zeros(1000), "b": 0.0})


def test_mistakes_are_named():
    with pytest.raises(hg.InputError, match="maximizes") as error:
        study(direction="maximize").optimize(objective(arguments, **SAME), n_trials=1)
    assert 'direction="minimize"' in str(error.value)
    with pytest.raises(hg.InputError, match="has 2 objectives"):
        report(study(directions=["minimize", "minimize"]).ask())
    with pytest.raises(hg.InputTypeError, match=r"trial must be an optuna.Trial"):
        report(study())
    with pytest.raises(hg.InputTypeError, match="arguments must be a function"):
        objective({"solver": ridge()})
    with pytest.raises(hg.InputError, match="checkpoint is the same folder"):
        objective(arguments, checkpoint="runs")
    with pytest.raises(hg.InputTypeError, match=r"must return a dict .* found Solver"):
        objective(lambda trial: ridge(), **SAME)(study().ask())
    with pytest.raises(hg.InputError, match="hparams, steps missing"):
        objective(lambda trial: {"solver": ridge()}, params=START, outer=optax.adam(0.1))(study().ask())
    with pytest.raises(hg.InputTypeError, match="callbacks must be functions"):
        polish(study().ask(), ridge(), hparams={"l2": 0.01}, callbacks=3, **SAME)
    with pytest.raises(hg.InputTypeError, match="unknown option 'key_', did you mean 'key'"):
        polish(study().ask(), ridge(), hparams={"l2": 0.01}, key_=3, **SAME)
    trial = optuna.trial.create_trial(value=0.0, user_attrs={"hparams": {"rate": 0.1}})
    with pytest.raises(hg.InputError, match=r"like has the hyperparameters rates, but the trial has rate:"):
        polished(trial, {"rates": 0.0})
    with pytest.raises(hg.InputError, match="no polished hyperparameters"):
        polished(optuna.trial.create_trial(value=0.0), {"rate": 0.0})


def journal(path):
    return JournalStorage(JournalFileBackend(str(path)))


@pytest.mark.parametrize("kind", ["memory", "journal"])
def test_a_runs_history_is_a_study(kind, tmp_path):
    def spoil(calls, value, grad, status):
        return value, grad, jnp.where(calls == 2, int(Status.INNER_MAX_STEPS), status)

    result = run(ridge(spoil), {"l2": jnp.array([0.01, 0.1, 0.2, 0.3, 0.4, 0.5])}, steps=5)
    storage = None if kind == "memory" else journal(tmp_path / "runs.log")
    found = result.to_optuna(storage, "mine")
    if storage is not None:
        found = optuna.load_study(study_name="mine", storage=journal(tmp_path / "runs.log"))
    history = result.history
    assert [trial.state.name for trial in found.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    for t, trial in enumerate(found.trials):
        assert trial.params == {f"l2.{i}": float(history.hparams["l2"][t, i]) for i in range(6)}
        assert trial.value == (None if t == 2 else history.value[t])
        assert trial.user_attrs["status"] == ("INNER_MAX_STEPS" if t == 2 else "OK") and trial.user_attrs["step"] == t
        assert trial.user_attrs["rmse"] == history.metrics["rmse"][t]
        assert trial.user_attrs["grad_norm"] == history.grad_norm[t]
        assert "error_estimate" not in trial.user_attrs, "NaN is no JSON"
    assert found.best_trial.number == result.best.step == found.user_attrs["best_step"]
    assert found.direction.name == "MINIMIZE" and found.user_attrs["status"] == "finished"


def test_a_sampler_goes_on_where_a_run_ended():
    result = run(steps=6)
    wide = FloatDistribution(1e-4, 10.0, log=True)
    found = result.to_optuna(distributions={"l2": wide})
    found.sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=0)
    found.optimize(lambda trial: float(run(hparams={"l2": trial.suggest_float("l2", 1e-4, 10.0, log=True)}, steps=1)
                                       .best.value), n_trials=2)  # fmt: skip
    assert len(found.trials) == 8 and all(trial.distributions == {"l2": wide} for trial in found.trials)


def test_more_scalars_than_a_trajectory_holds_leave_a_summary():
    result = run(steps=3)
    history = result.history._replace(hparams=None)
    found = result._replace(history=history).to_optuna()
    for t, trial in enumerate(found.trials):
        assert trial.params == {} and trial.user_attrs["l2.max"] == history.summary["max"]["l2"][t]


def test_what_a_study_cannot_hold_is_named_before_anything_is_written(tmp_path):
    result, storage = run(steps=3), optuna.storages.InMemoryStorage()
    for distributions, named in (
        ({"l1": FloatDistribution(0, 1)}, "'l1', did you mean 'l2'"),
        ({"l2": FloatDistribution(0.1, 1)}, r"goes from 0.1 to 1, but the run went from 0.01"),
    ):
        with pytest.raises(hg.InputError, match=named):
            result.to_optuna(storage, distributions=distributions)
    with pytest.raises(hg.InputTypeError, match=r"must be an optuna.distributions.FloatDistribution"):
        result.to_optuna(storage, distributions={"l2": (0, 1)})
    with pytest.raises(hg.InputError, match=r"write 'sqlite:///runs.db'"):
        result.to_optuna("runs.db")
    with pytest.raises(hg.InputTypeError, match="storage must be a URL"):
        result.to_optuna(tmp_path)
    assert storage.get_all_studies() == []
    result.to_optuna(storage, "mine")
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        result.to_optuna(storage, "mine")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = run(steps=1)
    for call in (result.to_optuna, lambda: objective(arguments), lambda: report(None)):
        with pytest.raises(hg.HypergradError, match=r"pip install -e '.\[optuna\]'"):
            call()


WORKER = """
    import sys
    import optax, optuna
    import hypergrad as hg
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from hypergrad.adapters.optuna import objective
    from tests.adapters.test_optuna import SAME, arguments

    storage = JournalStorage(JournalFileBackend(sys.argv[1]))
    study = optuna.create_study(storage=storage, study_name="shared", load_if_exists=True,
                                pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    study.set_user_attr("worker " + sys.argv[2], 1)
    stop = optuna.study.MaxTrialsCallback(12, states=None)
    study.optimize(objective(arguments, **SAME), callbacks=[stop])
"""


@pytest.mark.experiment
def test_workers_share_a_study_in_a_journal(tmp_path):
    path = tmp_path / "study.log"
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(path), name],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": "."},
        )
        for name in "ab"
    ]
    assert [worker.wait(timeout=300) for worker in started] == [0, 0]
    found = optuna.load_study(study_name="shared", storage=journal(path))
    assert set(found.user_attrs) == {"worker a", "worker b"}
    states = [trial.state.name for trial in found.trials]
    assert 12 <= len(states) <= 13 and set(states) <= {"COMPLETE", "PRUNED"} and "COMPLETE" in states
    assert [trial.number for trial in found.trials] == list(range(len(states)))
    for trial in found.trials:
        assert set(trial.user_attrs) >= {"hparams", "status", "best_step"}
        own = hg.tune(**SAME | arguments(optuna.trial.FixedTrial(trial.params)))
        # A pruned run has the first steps of a whole one.
        reported = list(trial.intermediate_values.values())
        np.testing.assert_allclose(reported, own.history.value[: len(reported)], rtol=1e-4)

"""Every number of every step arrives in the trackers' own files, and a run's outcome after it."""

# pyright: reportArgumentType=false

from __future__ import annotations

import struct
import sys
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adapters import trackers
from tests.outer._ridge import VALID, run

MANY = {"l2": jnp.full(6, 0.01), "unused": jnp.linspace(0.5, 1.5, 33)}


def names(prefix, hparams=("l2",)):
    """What a step of the ridge problem reports, without what is NaN there."""
    found = ["value", "grad_norm", "status", "inner_steps", "linear_steps", "seconds", "rmse", "norm"]
    return {f"{prefix}{name}" for name in [*found, *(f"hparams/{name}" for name in hparams)]}


def events(folder):
    """Scalars of the event files, `{tag: {step: value}}`, and the texts: records as TensorFlow frames them."""
    from tensorboardX.proto import event_pb2

    scalars, texts = {}, {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts[value.tag] = value.tensor.string_val[0].decode()
                else:
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars, texts


def test_tensorboard_has_every_step_and_the_outcome(tmp_path):
    pytest.importorskip("tensorboardX")
    callback, seen = trackers.tensorboard(tmp_path / "run"), []

    def look(step, metrics):  # before the run is over
        seen.append(events(tmp_path / "run")[0]["value"])

    result = run(hparams=MANY, steps=4, callbacks=[callback, look], test=VALID)
    assert [len(values) for values in seen] == [1, 2, 3, 4], "a step that is done is on the disk"
    scalars, texts = events(tmp_path / "run")
    each = {f"l2.{i}" for i in range(6)}
    expected = names("", [*each, "unused.min", "unused.mean", "unused.max"])
    assert {tag for tag in scalars if not tag.startswith("best")} == expected
    np.testing.assert_allclose([scalars["value"][t] for t in range(4)], result.history.value, rtol=1e-6)
    np.testing.assert_allclose(scalars["hparams/l2.2"][3], result.history.hparams["l2"][3, 2], rtol=1e-6)
    np.testing.assert_allclose(scalars["best/value"][result.best.step], result.best.value, rtol=1e-6)
    np.testing.assert_allclose(scalars["best/test"][result.best.step], result.test, rtol=1e-6)
    assert "finished after 4 steps" in texts["result/text_summary"]


@pytest.mark.experiment
def test_weights_and_biases_offline_has_every_step_and_the_outcome(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    with wandb.init(mode="offline", dir=str(tmp_path), project="hypergrad") as opened:
        opened.log({"mine": 1.0})
        result = run(steps=4, callbacks=trackers.wandb(opened))
        opened.log({"mine": 2.0})
        run(steps=2, callbacks=trackers.wandb(opened, prefix="again"))
        summary = dict(opened.summary)
    assert names("tune/") | {"tune/step", "again/step"} <= set(summary)
    assert summary["tune/step"] == 3 and summary["again/step"] == 1 and summary["mine"] == 2.0
    np.testing.assert_allclose(summary["tune/value"], result.history.value[-1], rtol=1e-6)
    np.testing.assert_allclose(summary["tune/best/value"], result.best.value, rtol=1e-6)
    assert summary["tune/status"] == "finished"
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # its service writes the file, at times after the run has finished
        if file.read_bytes().count(b"grad_norm") >= 6:
            break
        time.sleep(0.1)
    assert file.read_bytes().count(b"grad_norm") >= 6, "one record a step"


@pytest.mark.experiment
def test_mlflow_on_sqlite_has_every_step_and_the_outcome(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        mlflow = pytest.importorskip("mlflow")
        uri = f"sqlite:///{tmp_path}/runs.db"
        mlflow.set_tracking_uri(uri)
        try:
            with pytest.raises(hg.InputError, match="no run is active"):
                trackers.mlflow()
            with mlflow.start_run() as opened:
                result = run(steps=4, callbacks=trackers.mlflow(), test=VALID)
        finally:
            mlflow.set_tracking_uri(None)
        identifier = opened.info.run_id
        client = mlflow.MlflowClient(uri)
        kept = client.get_run(identifier).data
        assert names("") == {name for name in kept.metrics if not name.startswith("best")}
        history = {entry.step: entry.value for entry in client.get_metric_history(identifier, "value")}
        np.testing.assert_allclose([history[t] for t in range(4)], result.history.value, rtol=1e-12)
        np.testing.assert_allclose(kept.metrics["best/test"], result.test, rtol=1e-12)
        assert kept.tags["hypergrad.status"] == "finished"
        callback = trackers.mlflow(identifier, tracking_uri=uri)
        many = {f"rate {i} (%)": 1.0 * i for i in range(1200)}  # more than one batch, and names that MLflow refuses
        callback(9, {"value": float("inf"), "hparams": many})
        kept = client.get_run(identifier).data
        assert kept.metrics["hparams/rate 1199 ___"] == 1199.0
        assert [entry.step for entry in client.get_metric_history(identifier, "value")] == [0, 1, 2, 3]


def test_mistakes_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(hg.InputError, match=r"found the file .*: name one beside it"):
        trackers.tensorboard(tmp_path / "file")
    with pytest.raises(hg.InputTypeError, match=r"pass what mlflow.start_run\(\) returns"):
        trackers.mlflow(tmp_path)


@pytest.mark.experiment
def test_what_is_no_run_of_wandb_is_named():
    wandb = pytest.importorskip("wandb")
    for wrong in (None, "run", wandb):
        with pytest.raises(hg.InputTypeError, match=r"pass wandb.init\(...\)"):
            trackers.wandb(wrong)


@pytest.mark.parametrize(
    ("library", "extra", "call"),
    [
        ("tensorboardX", "tensorboard", trackers.tensorboard),
        ("wandb", "wandb", lambda folder: trackers.wandb(None)),
        ("mlflow", "mlflow", lambda folder: trackers.mlflow("1")),
    ],
)
def test_a_tracker_that_is_not_installed_names_its_extra(library, extra, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(hg.HypergradError, match=rf"pip install -e '.\[{extra}\]'"):
        call(tmp_path)

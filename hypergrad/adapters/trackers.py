"""Callbacks of `hg.tune` that write a run to the trackers that people have.

    hg.tune(..., callbacks=hypergrad.adapters.trackers.tensorboard("runs/first"))

Each step writes every number by its name: the outer loss as `value`, the norm of the hypergradient, residuals, metrics,
and each hyperparameter by its path (`hparams/l2`, `hparams/layer.rate.3`). A leaf of more than 32 entries gives its
`.min`, `.mean` and `.max`. Numbers that are not finite are left out: no chart shows them, and MLflow would store the
largest float in place of an infinity. When a run is over, its outcome follows: status, best step, loss on test data.

A step that a resumed run takes again is written again, under the same number. What each callback writes to is the
caller's: a run of W&B or MLflow is neither begun nor finished here. For a plain file see `hg.outer.json_lines`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import numbers
from hypergrad.adapters._model import missing
from hypergrad.outer import Callback, Result

_WHOLE = 32  # entries of a leaf that are written out
_BATCH = 1000  # metrics that MLflow takes at once


def tensorboard(folder: str | Path) -> Callback:
    """A callback that writes event files for TensorBoard, by `tensorboardX`.

    Every step is on the disk when it is done. `tensorboard --logdir folder` shows it, in TensorBoard's own package.

    Args:
        folder: where the event files go, made if it is not there. One for each run, below a common one.

    Returns:
        A callback for `hg.tune(callbacks=...)`, which closes the files when the run is over.

    Raises:
        InputError: where the folder is a file.
        HypergradError: if tensorboardX is not installed.

    >>> import pathlib, tempfile
    >>> from hypergrad.adapters.trackers import tensorboard
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "run"
    >>> callback = tensorboard(folder)
    >>> callback(0, {"value": 0.5, "hparams": {"l2": 0.1}})
    >>> len(list(folder.glob("events.out.tfevents.*")))
    1
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise missing("trackers.tensorboard", "tensorboard", error) from error
    if Path(folder).is_file():
        raise InputError(f"tensorboard: folder must be a folder, found the file {str(folder)!r}: name one beside it.")
    writer = tensorboardX.SummaryWriter(str(folder))

    def step(t: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, t)
        writer.flush()

    def end(result: Result) -> None:
        for name, value in _outcome(result)[1].items():
            writer.add_scalar(name, value, max(result.best.step, 0))
        writer.add_text("result", f"```\n{result}\n```", len(result.history.value))
        writer.close()

    return _Tracker(step, end)


def wandb(run: Any, *, prefix: str = "tune") -> Callback:
    """A callback that logs to a run of Weights & Biases, online or offline.

    The charts have a step of their own, `tune/step`, so that other logging to the run, and another call of `hg.tune`
    with another prefix, go on beside it. The outcome is in the run's summary.

    Args:
        run: what `wandb.init(...)` returned, for instance with `mode="offline"`.
        prefix: what stands before each name, `"tune/value"`.

    Returns:
        A callback for `hg.tune(callbacks=...)`.

    Raises:
        InputTypeError: for what is no run.
        HypergradError: if wandb is not installed.

    >>> import wandb as library  # doctest: +SKIP
    >>> from hypergrad.adapters.trackers import wandb
    >>> with library.init(mode="disabled") as run:  # doctest: +SKIP
    ...     wandb(run)(0, {"value": 0.5, "hparams": {"l2": 0.1}})
    """
    try:
        import wandb as _  # noqa: F401
    except ImportError as error:
        raise missing("trackers.wandb", "wandb", error) from error
    if isinstance(run, ModuleType) or not all(callable(getattr(run, name, None)) for name in ("log", "define_metric")):
        raise InputTypeError(f"wandb: run must be a run of Weights & Biases, found {run!r}: pass wandb.init(...).")
    run.define_metric(f"{prefix}/step")
    run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def step(t: int, row: dict[str, float]) -> None:
        run.log({f"{prefix}/step": t} | {f"{prefix}/{name}": value for name, value in row.items()})

    def end(result: Result) -> None:
        status, row = _outcome(result)
        run.summary.update({f"{prefix}/{name}": value for name, value in {"status": status, **row}.items()})

    return _Tracker(step, end)


def mlflow(run: Any = None, *, tracking_uri: str | None = None) -> Callback:
    """A callback that logs to a run of MLflow, in a database (`sqlite:///runs.db`) or on a server.

    The outcome follows as metrics under `best`, and as the tag `hypergrad.status`. A character that MLflow allows in no
    name becomes `_`.

    Args:
        run: what `mlflow.start_run()` returned, or the identifier of a run; None for the one that is active.
        tracking_uri: where the run is; by default where `mlflow.set_tracking_uri` says.

    Returns:
        A callback for `hg.tune(callbacks=...)`.

    Raises:
        InputError: where no run is active.
        InputTypeError: for what is no run.
        HypergradError: if mlflow is not installed.

    >>> from hypergrad.adapters.trackers import mlflow
    >>> mlflow(3)
    Traceback (most recent call last):
    hypergrad._solver.InputTypeError: mlflow: run must be a run of MLflow or its identifier, found 3: ...
    """
    found: Any = run if isinstance(run, str) else getattr(getattr(run, "info", None), "run_id", None)
    if run is not None and not isinstance(found, str):
        raise InputTypeError(
            f"mlflow: run must be a run of MLflow or its identifier, found {run!r}: pass what mlflow.start_run() "
            "returns."
        )
    try:
        import mlflow as library
        from mlflow.entities import Metric
    except ImportError as error:
        raise missing("trackers.mlflow", "mlflow", error) from error
    if run is None:
        active = library.active_run()
        if active is None:
            raise InputError("mlflow: no run is active: write with mlflow.start_run(): around hg.tune, or pass a run.")
        found = active.info.run_id
    client, identifier = library.MlflowClient(tracking_uri), found

    def step(t: int, row: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        batch = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, t) for name, value in row.items()]
        for first in range(0, len(batch), _BATCH):
            client.log_batch(identifier, metrics=batch[first : first + _BATCH])

    def end(result: Result) -> None:
        status, row = _outcome(result)
        step(max(result.best.step, 0), row)
        client.set_tag(identifier, "hypergrad.status", status)

    return _Tracker(step, end)


class _Tracker:
    """A callback made of two functions: what is done with the numbers of a step, and with a result."""

    def __init__(self, step: Callable[[int, dict[str, float]], None], end: Callable[[Result], None]):
        self._step, self.on_end = step, end

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        row = {name: value for name, value in metrics.items() if isinstance(value, (bool, int, float, np.generic))}
        self._step(step, _finite({name: float(value) for name, value in row.items()} | _hparams(metrics["hparams"])))


def _hparams(tree: Any) -> dict[str, float]:
    """`hparams/l2`; a bare scalar is `hparams`."""
    found = numbers(tree, _WHOLE)
    return {name if name.startswith("hparams") else f"hparams/{name}": value for name, value in found.items()}


def _finite(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}


def _outcome(result: Result) -> tuple[str, dict[str, float]]:
    """The status in words, and the numbers of the best step; those of a run without one are left out."""
    row = {"best/step": float(result.best.step), "best/value": result.best.value}
    row |= {f"best/{name}": value for name, value in _hparams(result.best.hparams).items()}
    row = _finite(row) if result.best.step >= 0 else {}
    return str(result.status), row | ({} if result.test is None else _finite({"best/test": result.test}))

"""Where a run stands, and what it wrote down: all that `hg.tune` has to keep, in memory and in a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hypergrad._solver import InputError, Status
from hypergrad._tree import PyTree
from hypergrad.outer._config import fingerprint
from hypergrad.outer._result import SCALARS, Best, Row
from hypergrad.outer._step import Loop, Report


class Cursor(NamedTuple):
    """How far a stream was read.

    Attributes:
        position: batches handed out.
        last: the last of them.
        digest: its fingerprint, where that alone is known.
    """

    position: int
    last: PyTree
    digest: str | None = None


class Run(NamedTuple):
    """Where a run stands after a whole number of steps. It is replaced in one piece, since Ctrl-C may come any time.

    Attributes:
        loop: what the next step starts from.
        count: steps taken.
        best: see `Best`.
        used: the hyperparameters of the last step, constrained; those of the start before the first.
        skipped: unusable steps.
        in_a_row: unusable steps since the last usable one.
        answered: steps after which the callbacks let the run go on.
        cursors: where the streams stand, by the name of the argument.
    """

    loop: Loop
    count: int
    best: Best
    used: PyTree
    skipped: int
    in_a_row: int
    answered: int
    cursors: Mapping[str, Cursor]


@dataclasses.dataclass
class Notes:
    """The host's notes.

    Attributes:
        rows: one a step; those beyond `Run.count` belong to a step that was cut off.
        names: of the loss's metrics and of the solver's extras.
        started: the clock when the run began, less the time that a resumed run was away.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    started: float = dataclasses.field(default_factory=time.perf_counter)


def usable(metrics: Mapping[str, Any]) -> bool:
    """Whether a step may move the hyperparameters, and be the best."""
    return metrics["status"] <= Status.INSENSITIVE


def note(notes: Notes, count: int, report: Report) -> dict[str, Any]:
    """Wait for a step and write down what it reports as row `count`; returns it as Python numbers."""
    vector = np.asarray(report.vector)
    names = (*SCALARS, *report.metrics, *report.extra)
    metrics = _numbers(dict(zip(names, vector.tolist(), strict=False)))
    metrics["seconds"] = time.perf_counter() - notes.started
    notes.names = report.metrics, report.extra
    notes.rows[count:] = [Row(metrics, vector[len(names) :])]
    return metrics


def pack(run: Run, notes: Notes) -> tuple[PyTree, dict[str, Any]]:
    """A run as a pytree of arrays, and the rest as JSON. No PRNG key: step t folds t into the key that is passed."""
    columns = _columns(*notes.names)
    rows = notes.rows[: run.count]
    tree = {
        "loop": run.loop,
        "used": run.used,
        "best": None if run.best.step < 0 else {"hparams": run.best.hparams, "params": run.best.params},
        "rows": {
            "scalars": np.asarray([[row.scalars[name] for name in columns] for row in rows], np.float64),
            "hparams": np.stack([row.hparams for row in rows]),
        },
    }
    cursors = {name: [c.position, c.digest or fingerprint(c.last)] for name, c in run.cursors.items()}
    names = [list(part) for part in notes.names]
    return tree, {"best": run.best.step, "answered": run.answered, "names": names, "cursors": cursors}


def like(manifest: Mapping[str, Any], start: Run, params: PyTree) -> PyTree:
    """The pytree that a manifest's arrays fill: that of the run's start, with tables as long as it says.

    Args:
        manifest: see `hypergrad.checkpoints.checkpoint`.
        start: the run before its first step.
        params: shapes of what the solver's response returns.
    """
    tables = {
        name: np.broadcast_to(np.zeros((), entry["dtype"]), entry["shape"])
        for name in ("scalars", "hparams")
        for entry in manifest["leaves"]
        if entry["path"] == f"['rows']['{name}']"
    }
    best = None if manifest["notes"]["best"] < 0 else {"hparams": start.used, "params": params}
    return {"loop": start.loop, "used": start.used, "best": best, "rows": tables}


def unpack(tree: PyTree, manifest: Mapping[str, Any], start: Run, notes: Notes) -> Run:
    """The run that `pack` was given; fills in the notes."""
    saved = manifest["notes"]
    notes.names = tuple(saved["names"][0]), tuple(saved["names"][1])
    scalars = [
        _numbers(dict(zip(_columns(*notes.names), row, strict=True))) for row in tree["rows"]["scalars"].tolist()
    ]
    notes.rows[:] = [Row(row, hparams) for row, hparams in zip(scalars, tree["rows"]["hparams"], strict=True)]
    notes.started = time.perf_counter() - scalars[-1]["seconds"]
    best = start.best
    if saved["best"] >= 0:
        best = Best(saved["best"], scalars[saved["best"]]["value"], tree["best"]["hparams"], tree["best"]["params"])
    good = [usable(row) for row in scalars]
    return Run(
        loop=tree["loop"],
        count=len(scalars),
        best=best,
        used=tree["used"],
        skipped=good.count(False),
        in_a_row=[*reversed(good), True].index(True),
        answered=saved["answered"],
        cursors={name: Cursor(position, None, digest) for name, (position, digest) in saved["cursors"].items()},
    )


def rewind(streams: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Bring the streams to where the run stands.

    Raises:
        InputError: if a stream is beyond it, ends before it, or yields other batches than it did.
    """
    for name, stream in streams.items():
        position, digest = manifest["notes"]["cursors"][name]
        forward = stream.position < position
        stream.seek(position)
        if forward and fingerprint(stream.recent[-1]) != digest:
            raise InputError(
                f"tune: batch {position} of {name} is not the one that the run had seen, so it cannot go on as if it "
                "had never stopped: let the loader yield the same order each time (a fixed seed), or name another "
                "folder."
            )


def _columns(metrics: tuple[str, ...], extra: tuple[str, ...]) -> tuple[str, ...]:
    return (*SCALARS, "seconds", *metrics, *extra)


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics | {name: int(metrics[name]) for name in ("status", "inner_steps", "linear_steps")}

"""The checkpoints of one run of `hg.tune`: found when the same call is made again, and written as the run proceeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypergrad._checks import caller_level
from hypergrad._data import Stream
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.checkpoints import _durable, _together
from hypergrad.checkpoints._log import Segment
from hypergrad.checkpoints.checkpoint import Store, as_store, check_store, newest, write
from hypergrad.outer._config import check_allowed, check_config
from hypergrad.outer._run import Notes, Run, like, pack, rewind, unpack


@dataclasses.dataclass
class Keeper:
    """The checkpoints of a run.

    Attributes:
        store: where the checkpoints are stored.
        allowed: what may differ from the run that wrote them.
        config: configuration of this call; see `hypergrad.outer._config`.
        damaged: checkpoints that cannot be used, to be deleted once a new one is safe.
        saved: `(steps taken, steps answered)` of the checkpoint that was last saved or read.
        sealed: parts of the history that need not be written again.
        failing: whether the last attempt to save failed.
    """

    store: Store
    allowed: tuple[str, ...]
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    damaged: list[Path] = dataclasses.field(default_factory=list)
    saved: tuple[int, int] = (0, 0)
    sealed: dict[tuple[int, int], Segment] = dataclasses.field(default_factory=dict)
    failing: bool = False


def open_keeper(stack: contextlib.ExitStack, checkpoint: Any, allow_changed: Any) -> Keeper | None:
    """Hold the folder until the stack is closed; return None for a run without checkpoints.

    Raises:
        InputError: if the folder cannot be written to, if it is not for Orbax and the program has several processes, or
            if `allow_changed` holds an unknown name.
        CheckpointError: if another run writes to it.
    """
    allowed = check_allowed(allow_changed)
    if checkpoint is None:
        return None
    check_store("tune: checkpoint", store := as_store("tune: checkpoint", checkpoint))

    def hold() -> None:
        _durable.prepare_folder("tune: checkpoint", store.folder)
        stack.enter_context(_durable.locked(store.folder))
        _durable.clear_leftovers(store.folder)

    _together.by_first(hold)
    return Keeper(store, allowed)


def reopen(
    keeper: Keeper,
    config: dict[str, str],
    start: Run,
    notes: Notes,
    templates: Mapping[str, PyTree],
    streams: Mapping[str, Stream],
    steps: int,
    min_delta: float,
) -> Run:
    """Return the run as its newest intact checkpoint left it, or `start` if there is no checkpoint.

    Args:
        keeper: checkpoints of the run.
        config: configuration of this call.
        start: the run before its first step.
        notes: the host's notes, which are filled in.
        templates: examples of what callbacks may see, by name.
        streams: the streams, which are advanced to the position of the run.
        steps: number of steps that the call asks for.
        min_delta: `min_delta` of the call.

    Raises:
        InputError: if the checkpoint was made with another configuration or is beyond `steps`, or if a stream cannot be
            brought to its position.
        CheckpointError: if there are checkpoints but all of them are damaged.
    """
    if streams and _together.several():
        raise InputError(
            f"tune: checkpoint with {' and '.join(streams)} from hg.stream is for one process, and this program has "
            "several, each with its own part of the batches: pass arrays or hg.minibatches."
        )
    keeper.config = config = _together.of_all(config)

    def check(manifest: dict[str, Any]) -> None:
        what = f"the checkpoint of step {manifest['step']} in {str(keeper.store.folder)!r}"
        check_config(manifest["config"], config, keeper.allowed, what)
        if manifest["step"] > steps:
            raise InputError(
                f"tune: {what} is beyond steps={steps}: ask for at least as many, or start a new run in another folder."
            )

    found = newest(keeper.store, functools.partial(like, start=start, templates=templates), check)
    if found is None:
        return start
    run = unpack(found.tree, found.log, found.manifest, start, notes, min_delta)
    rewind(streams, found.manifest["notes"]["cursors"])
    keeper.damaged, keeper.sealed, keeper.saved = found.damaged, found.sealed, (run.count, run.answered)
    return run


def save(keeper: Keeper | None, run: Run, notes: Notes, *, expected: bool = True) -> None:
    """Write a checkpoint, if there is anything new. A failure to write only warns, because the run is worth more.

    Args:
        keeper: checkpoints of the run, if there are any.
        run: the run.
        notes: what its steps reported.
        expected: whether every process of the program is here. After a signal or an error they are not: one that waited
            for the others, who may be in a later step, would wait for ever.

    Warns:
        UserWarning: at the first of several failures in a row.
    """
    if keeper is None or keeper.saved == (run.count, run.answered) or (_together.several() and not expected):
        return
    tree, rows, rest = pack(run, notes)
    try:
        write(
            keeper.store, run.count, tree, config=keeper.config, notes=rest, damaged=keeper.damaged, log=rows,
            sealed=keeper.sealed,
        )  # fmt: skip
    except OSError as error:
        if not keeper.failing:
            last = f"that of step {keeper.saved[0]} stays the last" if keeper.saved[0] else "there is none before it"
            warnings.warn(
                f"tune: the checkpoint of step {run.count} could not be written to {str(keeper.store.folder)!r} "
                f"({error.strerror or error}); {last}. The run goes on, and tries again at the next one.",
                UserWarning,
                stacklevel=caller_level(),
            )
        keeper.failing = True
        return
    keeper.damaged, keeper.saved, keeper.failing = [], (run.count, run.answered), False

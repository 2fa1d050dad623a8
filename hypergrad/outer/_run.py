"""The state of a run and its records: all that `hg.tune` has to keep, in memory and in a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._solver import InputError, usable
from hypergrad._tree import PyTree, is_key
from hypergrad.checkpoints._durable import Damaged
from hypergrad.checkpoints._log import parse
from hypergrad.outer._carry import AS_IT_IS, Carry
from hypergrad.outer._config import fingerprint
from hypergrad.outer._result import Layout, Rows
from hypergrad.outer._step import Loop, Packet, words


class Cursor(NamedTuple):
    """How far a stream has been read.

    Attributes:
        position: number of batches handed out.
        last: the last of these batches.
        digest: fingerprint of that batch, where only the fingerprint is known.
    """

    position: int
    last: PyTree
    digest: str | None = None


class Tally(NamedTuple):
    """Counts over the steps, which decide when to stop and what to say at the end.

    Attributes:
        skipped: steps that were not usable.
        in_a_row: unusable steps since the last usable one.
        accepted: steps that were accepted.
        rejected: usable steps that were rejected since the last accepted one.
        waited: accepted steps since the last improvement.
        reference: outer loss of the last improvement; NaN before the first.
        unknown: accepted steps whose error estimate was inf.
    """

    skipped: int = 0
    in_a_row: int = 0
    accepted: int = 0
    rejected: int = 0
    waited: int = 0
    reference: float = math.nan
    unknown: int = 0


class Run(NamedTuple):
    """The state of a run after a whole number of calls. It is replaced in one piece, since Ctrl-C may come at any time.

    Attributes:
        held: what the next step starts from, in the form in which the program takes it.
        count: steps taken.
        tally: see `Tally`.
        answered: number of steps after which the callbacks let the run go on.
        shown: what callbacks see of the steps since `first`, one row for each step.
        first: see `shown`.
        cursors: how far each stream has been read, by the name of the argument.
        carry: that form.
    """

    held: Any
    count: int
    tally: Tally
    answered: int
    shown: tuple[Mapping[str, PyTree], ...]
    first: int
    cursors: Mapping[str, Cursor]
    carry: Carry = AS_IT_IS

    @property
    def loop(self) -> Loop:
        """What the next step starts from."""
        return self.carry.open(self.held)


@dataclasses.dataclass
class Notes:
    """The host's notes: tables that double in size when they are full.

    Attributes:
        rows: see `Rows`; those beyond `Run.count` are empty, or belong to a call that was cut off.
        layout: layout of the scalars in a row.
        columns: names of the scalars, by kind, in the order of the columns.
        places: the column of each scalar in its table.
        started: time on the clock when the run began, as if a resumed run had never been stopped.
    """

    rows: Rows | None = None
    layout: Layout | None = None
    columns: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    places: dict[str, int] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def arrange(self, layout: Layout) -> None:
        """Set the columns that rows have from now on."""
        self.layout = layout
        self.columns = {
            "floats": layout.names("float"),
            "integers": layout.names("int", "bool"),
            "naturals": layout.names("uint"),
            "booleans": layout.names("bool"),
        }
        tables = (self.columns[kind] for kind in ("floats", "integers", "naturals"))
        self.places = {name: i for names in tables for i, name in enumerate(names)}

    def taken(self, first: int, last: int) -> Rows:
        """Return the rows of these steps, without a copy."""
        assert self.rows is not None
        return Rows(*[table[first:last] for table in self.rows])


def note(notes: Notes, count: int, steps: int, report: Packet) -> None:
    """Wait for a call, and write what it reports about its steps into rows `count` and following."""
    floats, integers = np.asarray(report.floats), np.asarray(report.integers)
    if notes.layout is not report.layout and notes.layout != report.layout:
        if notes.layout is not None:
            notes.rows = _rearranged(notes.taken(0, count), notes.layout, report.layout)
        notes.arrange(report.layout)
    if floats.ndim == 1:
        floats, integers = floats[None], integers[None]
    naturals = _NONE if report.naturals is None else np.atleast_2d(np.asarray(report.naturals))
    width, end = len(notes.columns["floats"]), count + steps
    if notes.rows is None:
        notes.rows = Rows(floats[:0, : width + 1], integers[:0], naturals[:0], floats[:0, width:])
        if floats.shape[1] == width:  # the hyperparameters have no entries
            notes.rows = notes.rows._replace(scalars=np.zeros((0, width + 1)))
    if len(notes.rows.scalars) < end:
        scalars, whole, natural, hparams = notes.taken(0, count)
        most = max(64, 2 * count, end)
        notes.rows = Rows(
            _grown(scalars, most, np.float64),
            _grown(whole, most, np.int64),
            _grown(natural, most, np.uint64),
            _grown(hparams, most, hparams.dtype),
        )
    rows = notes.rows
    rows.scalars[count:end, :width] = floats[:steps, :width]
    rows.scalars[count:end, width] = time.perf_counter() - notes.started
    rows.hparams[count:end] = floats[:steps, width:]
    rows.integers[count:end] = integers[:steps]
    if report.naturals is not None:
        rows.naturals[count:end] = naturals[:steps]


_NONE = np.zeros((0, 0))
_DTYPES = {"scalars": np.float64, "integers": np.int64, "naturals": np.uint64}


def _grown(old: np.ndarray, rows: int, dtype: Any) -> np.ndarray:
    new = np.empty((rows, *old.shape[1:]), dtype)
    new[: len(old)] = old
    return new


def _rearranged(rows: Rows, old: Layout, new: Layout) -> Rows:
    """Convert rows to the columns of the program that the run continues with: NaN and 0 in columns that are new."""

    def columns(table: np.ndarray, nothing: float, last: list[str], *kinds: str) -> np.ndarray:
        had, wanted = [*old.names(*kinds), *last], [*new.names(*kinds), *last]
        empty = np.full(len(table), nothing, table.dtype)
        found = [table[:, had.index(name)] if name in had else empty for name in wanted]
        return np.stack(found, axis=1) if found else table[:, :0]

    scalars = columns(rows.scalars, np.nan, ["seconds"], "float")
    integers = columns(rows.integers, 0, [], "int", "bool")
    return Rows(scalars, integers, columns(rows.naturals, 0, [], "uint"), rows.hparams)


def metrics_of(notes: Notes, step: int) -> dict[str, Any]:
    """Return the report of one step, as Python numbers by name."""
    rows, columns = notes.rows, notes.columns
    assert rows is not None and notes.layout is not None
    found: dict[str, Any] = dict(zip([*columns["floats"], "seconds"], rows.scalars[step].tolist(), strict=True))
    found.update(zip(columns["integers"], rows.integers[step].tolist(), strict=True))
    found.update(zip(columns["naturals"], rows.naturals[step].tolist(), strict=True))
    for name in columns["booleans"]:
        found[name] = bool(found[name])
    if not found.pop("computed"):
        for name in (*notes.layout.metrics, *notes.layout.extra):
            found[name] = float(found[name]) if isinstance(found[name], float) else math.nan
    return found


def counted(tally: Tally, notes: Notes, first: int, last: int, min_delta: float) -> Tally:
    """Return the tally after these steps."""
    assert notes.rows is not None
    scalars, integers = notes.rows.scalars[first:last].tolist(), notes.rows.integers[first:last].tolist()
    value_at, estimate_at = notes.places["value"], notes.places["error_estimate"]
    status_at, accepted_at = notes.places["status"], notes.places["accepted"]
    skipped, in_a_row, accepted, rejected, waited, reference, unknown = tally
    # A loop over Python's numbers: for the few steps of a call, each operation of NumPy takes longer.
    for floats, whole in zip(scalars, integers, strict=True):
        if whole[accepted_at]:  # only usable steps are
            accepted += 1
            in_a_row = rejected = 0
            unknown += floats[estimate_at] == math.inf
            value = floats[value_at]
            if value >= reference - min_delta:  # false at the first step, whose reference is NaN
                waited += 1
            else:
                waited, reference = 0, value
        elif usable(np.asarray(whole[status_at])):
            in_a_row, rejected = 0, rejected + 1
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
    return Tally(skipped, in_a_row, accepted, rejected, waited, reference, unknown)


def recounted(notes: Notes, count: int, min_delta: float) -> Tally:
    """Return the tally after the first `count` steps, piece by piece: Python's numbers take four times the memory."""
    tally = Tally()
    for first in range(0, count, 1000):
        tally = counted(tally, notes, first, min(first + 1000, count), min_delta)
    return tally


def shown_rows(shown: Mapping[str, PyTree], steps: int) -> tuple[Mapping[str, PyTree], ...]:
    """Return the trees that callbacks receive, step by step, from arrays with a leading axis; on the host."""
    if not shown:
        return ()
    found = jax.tree.map(np.asarray, shown)
    return tuple(jax.tree.map(lambda x, i=i: x[i], found) for i in range(steps))


def with_keys(shown: Mapping[str, PyTree], templates: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return one step's row, with typed keys where `templates` have them."""

    def wrap(found: Any, like: Any) -> Any:
        if not is_key(like) or is_key(found):
            return found
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(like))

    return {name: jax.tree.map(wrap, tree, templates[name]) for name, tree in shown.items()}


def pack(run: Run, notes: Notes) -> tuple[PyTree, dict[str, np.ndarray], dict[str, Any]]:
    """Return a run as a pytree of arrays, its rows, and the rest as JSON.

    No PRNG key is stored: step t folds t into the key that is passed.
    """
    pending = run.shown[run.answered - run.first :]
    stack = lambda *rows: np.stack([np.asarray(row) for row in rows])
    shown = jax.tree.map(stack, *map(words, pending)) if pending else {}
    cursors = {name: [c.position, c.digest or fingerprint(c.last)] for name, c in run.cursors.items()}
    assert notes.layout is not None
    layout = [[list(part) for part in notes.layout.kinds], list(notes.layout.metrics), list(notes.layout.extra)]
    rest = {"answered": run.answered, "count": run.count, "layout": layout, "cursors": cursors, "shown": sorted(shown)}
    rows = {name: table for name, table in notes.taken(0, run.count)._asdict().items() if table.size}
    return {"loop": run.loop, "shown": shown}, rows, rest


def like(manifest: Mapping[str, Any], start: Run, templates: Mapping[str, PyTree]) -> PyTree:
    """Return the pytree that a manifest's arrays fill: that of the run's start, with tables of the length that it
    states.

    Args:
        manifest: see `hypergrad.checkpoints.checkpoint`.
        start: the run before its first step.
        templates: examples of what callbacks may see, by name.

    Raises:
        Damaged: for notes of a form that `pack` does not write.
    """
    saved = _checked(manifest["notes"])
    layout, tables = _layout(saved), {}
    for entry in manifest["leaves"]:
        for name in Rows._fields:
            if entry["path"] == f"['rows']['{name}']":
                try:
                    tables[name] = np.broadcast_to(np.zeros((), entry["dtype"]), entry["shape"])
                except (TypeError, ValueError) as error:
                    raise Damaged(f"the table {name} is described as {entry!r}") from error
    sealed = max((segment.end for segment in parse(manifest.get("log", []))), default=0)
    widths = {"scalars": len(layout.names("float")) + 1, "integers": len(layout.names("int", "bool"))}
    widths["naturals"] = len(layout.names("uint"))
    for name in Rows._fields:
        shape = tables[name].shape if name in tables else (saved["count"] - sealed, 0)
        if name in tables and tables[name].dtype != _DTYPES.get(name, tables[name].dtype):
            raise Damaged(f"the table {name} holds {tables[name].dtype}")
        if len(shape) != 2 or shape[0] + sealed != saved["count"] or shape[1] != widths.get(name, shape[1]):
            raise Damaged(f"the table {name} does not hold {saved['count']} rows of what the run reports")
    pending = saved["count"] - saved["answered"]
    empty = lambda x: np.broadcast_to(np.zeros((), x.dtype), (pending, *x.shape))
    shown = {name: jax.tree.map(empty, jax.eval_shape(words, templates[name])) for name in saved["shown"]}
    return {"loop": start.loop, "shown": shown, "rows": tables}


def unpack(
    tree: PyTree, tables: Mapping[str, np.ndarray], manifest: Mapping[str, Any], start: Run, notes: Notes, delta: float
) -> Run:
    """Restore the run that `pack` was given, and fill in the notes."""
    saved = manifest["notes"]
    notes.arrange(_layout(saved))
    count = saved["count"]
    notes.rows = Rows(*(np.asarray(tables.get(name, np.zeros((count, 0)))) for name in Rows._fields))
    notes.started = time.perf_counter() - float(notes.rows.scalars[count - 1, -1])
    return Run(
        held=tree["loop"],
        count=count,
        tally=recounted(notes, count, delta),
        answered=saved["answered"],
        shown=shown_rows(tree["shown"], count - saved["answered"]),
        first=saved["answered"],
        cursors={name: Cursor(position, None, digest) for name, (position, digest) in saved["cursors"].items()},
    )


def rewind(streams: Mapping[str, Any], cursors: Mapping[str, Sequence[Any]]) -> None:
    """Bring the streams to the position of the run.

    Args:
        streams: the streams by name.
        cursors: how far each had been read, and the fingerprint of the last batch, by name.

    Raises:
        InputError: if a stream is beyond this position, ends before it, or yields batches other than those of the run.
    """
    for name, stream in streams.items():
        if name not in cursors:
            raise InputError(f"tune: {name} is hg.stream, but was not when the run began: pass what it began with.")
        position, digest = cursors[name]
        forward = stream.position < position
        stream.seek(position)
        if forward and fingerprint(stream.recent[-1]) != digest:
            raise InputError(
                f"tune: batch {position} of {name} is not the one that the run had seen, so it cannot continue as if "
                "it had never stopped: let the loader yield the same order each time (a fixed seed), or begin anew."
            )


def _layout(saved: Mapping[str, Any]) -> Layout:
    kinds, metrics, extra = saved["layout"]
    return Layout(tuple((name, kind) for name, kind in kinds), tuple(metrics), tuple(extra))


def _checked(saved: Any) -> dict[str, Any]:
    """Return the notes of a manifest, if they have the form that `pack` writes."""
    number = lambda x: type(x) is int and x >= 0
    texts = lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x)
    pair = lambda x: texts(x) and len(x) == 2 and x[1] in ("float", "int", "bool", "uint")
    cursor = lambda x: isinstance(x, list) and len(x) == 2 and number(x[0]) and isinstance(x[1], str)
    sound = (
        isinstance(saved, dict)
        and saved.keys() >= {"answered", "count", "layout", "cursors", "shown"}
        and number(saved["count"])
        and number(saved["answered"])
        and 0 < saved["count"] >= saved["answered"]
        and isinstance(saved["layout"], list)
        and len(saved["layout"]) == 3
        and isinstance(saved["layout"][0], list)
        and all(map(pair, saved["layout"][0]))
        and texts(saved["layout"][1])
        and texts(saved["layout"][2])
        and {*saved["layout"][1], *saved["layout"][2]} <= {name for name, _ in saved["layout"][0]}
        and isinstance(saved["cursors"], dict)
        and all(map(cursor, saved["cursors"].values()))
        and texts(saved["shown"])
        and set(saved["shown"]) <= {"hparams", "params", "state"}
        and {"value", "status", "accepted", "computed", "error_estimate"} <= {name for name, _ in saved["layout"][0]}
    )
    if not sound:
        raise Damaged("the notes of the run are not of the form that hg.tune writes")
    return saved

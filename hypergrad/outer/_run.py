"""Where a run stands, and what it wrote down: all that `hg.tune` has to keep, in memory and in a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._solver import InputError, Status
from hypergrad._tree import PyTree, is_key
from hypergrad.checkpoints._durable import Damaged
from hypergrad.checkpoints._log import parse
from hypergrad.outer._config import fingerprint
from hypergrad.outer._result import Layout, Rows
from hypergrad.outer._step import Loop, Report, words


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


class Tally(NamedTuple):
    """What is counted of the steps, to know when to stop and what to say.

    Attributes:
        skipped: steps that were not usable.
        in_a_row: those since the last usable one.
        accepted: steps that were accepted.
        rejected: usable ones that were not, since the last that was.
        waited: accepted ones since the last improvement.
        reference: outer loss of that improvement; NaN before the first.
        unknown: accepted ones whose error estimate was inf.
    """

    skipped: int = 0
    in_a_row: int = 0
    accepted: int = 0
    rejected: int = 0
    waited: int = 0
    reference: float = math.nan
    unknown: int = 0


class Run(NamedTuple):
    """Where a run stands after a whole number of calls. It is replaced in one piece, since Ctrl-C may come any time.

    Attributes:
        loop: what the next step starts from.
        count: steps taken.
        tally: see `Tally`.
        answered: steps after which the callbacks let the run go on.
        shown: what callbacks see of the steps since `first`, a row each.
        first: see `shown`.
        cursors: where the streams stand, by the name of the argument.
    """

    loop: Loop
    count: int
    tally: Tally
    answered: int
    shown: tuple[Mapping[str, PyTree], ...]
    first: int
    cursors: Mapping[str, Cursor]


@dataclasses.dataclass
class Notes:
    """The host's notes: tables that double when they are full.

    Attributes:
        rows: see `Rows`; those beyond `Run.count` are empty, or belong to a call that was cut off.
        layout: of the scalars in a row.
        started: the clock when the run began, less the time that a resumed run was away.
    """

    rows: Rows | None = None
    layout: Layout | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def names(self, *kinds: str) -> list[str]:
        """Of the scalars in a row; see `Layout`."""
        assert self.layout is not None
        return self.layout.names(*kinds)

    def taken(self, first: int, last: int) -> Rows:
        """Rows of these steps, without a copy."""
        assert self.rows is not None
        return Rows(*(table[first:last] for table in self.rows))


def note(notes: Notes, count: int, steps: int, report: Report) -> None:
    """Wait for a call and write down what it reports of its steps, as rows `count` and on."""
    floats, integers, naturals = (
        np.atleast_2d(np.asarray(part))[:steps] for part in (report.floats, report.integers, report.naturals)
    )
    width = len(report.layout.names("float"))
    seconds = np.full((steps, 1), time.perf_counter() - notes.started)
    new = Rows(np.concatenate([floats[:, :width], seconds], axis=1), integers, naturals, floats[:, width:])
    if notes.layout != report.layout:
        if notes.layout is not None:
            notes.rows = _rearranged(notes.taken(0, count), notes.layout, report.layout)
        notes.layout = report.layout
    if notes.rows is None or len(notes.rows.scalars) < count + steps:
        old = Rows(*(part[:0] for part in new)) if notes.rows is None else notes.taken(0, count)
        most = max(64, 2 * count, count + steps)
        scalars, integers, naturals, hparams = old
        notes.rows = Rows(
            _grown(scalars, most, np.float64),
            _grown(integers, most, np.int64),
            _grown(naturals, most, np.uint64),
            _grown(hparams, most, hparams.dtype),
        )
    for table, part in zip(notes.rows, new, strict=True):
        table[count : count + steps] = part


def _grown(old: np.ndarray, rows: int, dtype: Any) -> np.ndarray:
    new = np.empty((rows, *old.shape[1:]), dtype)
    new[: len(old)] = old
    return new


def _rearranged(rows: Rows, old: Layout, new: Layout) -> Rows:
    """Rows in the columns of another program, which a run was allowed to go on with: NaN and 0 where it has more."""

    def columns(table: np.ndarray, nothing: float, last: list[str], *kinds: str) -> np.ndarray:
        had, wanted = [*old.names(*kinds), *last], [*new.names(*kinds), *last]
        empty = np.full(len(table), nothing, table.dtype)
        found = [table[:, had.index(name)] if name in had else empty for name in wanted]
        return np.stack(found, axis=1) if found else table[:, :0]

    scalars = columns(rows.scalars, np.nan, ["seconds"], "float")
    integers = columns(rows.integers, 0, [], "int", "bool")
    return Rows(scalars, integers, columns(rows.naturals, 0, [], "uint"), rows.hparams)


def metrics_of(notes: Notes, step: int) -> dict[str, Any]:
    """What one step reported, as Python numbers by name."""
    rows = notes.taken(step, step + 1)
    assert notes.layout is not None
    names = notes.layout.names
    found: dict[str, Any] = dict(zip([*names("float"), "seconds"], rows.scalars[0].tolist(), strict=True))
    found |= dict(zip(names("int", "bool"), rows.integers[0].tolist(), strict=True))
    found |= dict(zip(names("uint"), rows.naturals[0].tolist(), strict=True))
    found |= {name: bool(found[name]) for name in names("bool")}
    if not found.pop("computed"):
        for name in (*notes.layout.metrics, *notes.layout.extra):
            found[name] = float(found[name]) if isinstance(found[name], float) else math.nan
    return found


def counted(tally: Tally, notes: Notes, first: int, last: int, min_delta: float) -> Tally:
    """The tally after these steps."""
    rows, integers, floats = notes.taken(first, last), notes.names("int", "bool"), notes.names("float")
    good = rows.integers[:, integers.index("status")] <= int(Status.INSENSITIVE)
    taken = rows.integers[:, integers.index("accepted")].astype(bool)
    values = rows.scalars[:, floats.index("value")][taken]
    estimates = rows.scalars[:, floats.index("error_estimate")][taken]
    since = _after_last(taken)
    waited, reference = tally.waited, tally.reference
    for value in values.tolist():
        if value >= reference - min_delta if reference == reference else False:
            waited += 1
        else:
            waited, reference = 0, value
    return Tally(
        skipped=tally.skipped + int(np.sum(~good)),
        in_a_row=_after_last(good) + (0 if good.any() else tally.in_a_row),
        accepted=tally.accepted + len(values),
        rejected=int(np.sum(good[len(good) - since :])) + (0 if taken.any() else tally.rejected),
        waited=waited,
        reference=reference,
        unknown=tally.unknown + int(np.sum(np.isposinf(estimates))),
    )


def _after_last(flags: np.ndarray) -> int:
    """How many entries there are after the last that holds."""
    return int(np.argmax(flags[::-1])) if flags.any() else len(flags)


def shown_rows(shown: Mapping[str, PyTree], steps: int) -> tuple[Mapping[str, PyTree], ...]:
    """What callbacks see, step by step, from arrays with a leading axis; on the host."""
    found = jax.tree.map(np.asarray, shown)
    return tuple(jax.tree.map(lambda x, i=i: x[i], found) for i in range(steps)) if found else ()


def with_keys(shown: Mapping[str, PyTree], templates: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """One step's row, with typed keys where `templates` have them."""

    def wrap(found: Any, like: Any) -> Any:
        if not is_key(like) or is_key(found):
            return found
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(like))

    return {name: jax.tree.map(wrap, tree, templates[name]) for name, tree in shown.items()}


def pack(run: Run, notes: Notes) -> tuple[PyTree, dict[str, np.ndarray], dict[str, Any]]:
    """A run as a pytree of arrays, its rows, and the rest as JSON.

    No PRNG key: step t folds t into the key that is passed.
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
    """The pytree that a manifest's arrays fill: that of the run's start, with tables as long as it says.

    Args:
        manifest: see `hypergrad.checkpoints.checkpoint`.
        start: the run before its first step.
        templates: what callbacks may see, by name.

    Raises:
        Damaged: for notes that `pack` does not write.
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
        if len(shape) != 2 or shape[0] + sealed != saved["count"] or shape[1] != widths.get(name, shape[1]):
            raise Damaged(f"the table {name} does not hold {saved['count']} rows of what the run reports")
    pending = saved["count"] - saved["answered"]
    empty = lambda x: np.broadcast_to(np.zeros((), x.dtype), (pending, *x.shape))
    shown = {name: jax.tree.map(empty, jax.eval_shape(words, templates[name])) for name in saved["shown"]}
    return {"loop": start.loop, "shown": shown, "rows": tables}


def unpack(
    tree: PyTree, tables: Mapping[str, np.ndarray], manifest: Mapping[str, Any], start: Run, notes: Notes, delta: float
) -> Run:
    """The run that `pack` was given; fills in the notes."""
    saved = manifest["notes"]
    notes.layout = _layout(saved)
    count = saved["count"]
    notes.rows = Rows(*(np.asarray(tables.get(name, np.zeros((count, 0)))) for name in Rows._fields))
    notes.started = time.perf_counter() - float(notes.rows.scalars[count - 1, -1])
    return Run(
        loop=tree["loop"],
        count=count,
        tally=counted(Tally(), notes, 0, count, delta),
        answered=saved["answered"],
        shown=shown_rows(tree["shown"], count - saved["answered"]),
        first=saved["answered"],
        cursors={name: Cursor(position, None, digest) for name, (position, digest) in saved["cursors"].items()},
    )


def rewind(streams: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Bring the streams to where the run stands.

    Raises:
        InputError: if a stream is beyond it, ends before it, or yields other batches than it did.
    """
    for name, stream in streams.items():
        if name not in manifest["notes"]["cursors"]:
            raise InputError(f"tune: {name} is hg.stream, and was none when the run began: pass what it began with.")
        position, digest = manifest["notes"]["cursors"][name]
        forward = stream.position < position
        stream.seek(position)
        if forward and fingerprint(stream.recent[-1]) != digest:
            raise InputError(
                f"tune: batch {position} of {name} is not the one that the run had seen, so it cannot go on as if it "
                "had never stopped: let the loader yield the same order each time (a fixed seed), or name another "
                "folder."
            )


def _layout(saved: Mapping[str, Any]) -> Layout:
    kinds, metrics, extra = saved["layout"]
    return Layout(tuple((name, kind) for name, kind in kinds), tuple(metrics), tuple(extra))


def _checked(saved: Any) -> dict[str, Any]:
    """The notes of a manifest, if they are of the form that `pack` writes."""
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

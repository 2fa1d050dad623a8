r"""Tables that only grow, next to the checkpoints that need them: a row is written a few times, not every time.

    folder/rows/rows-000000000000-000000004096-<SHA-256>.npz       rows 0 to 4,095, for `numpy.load`
    folder/rows-copy/                                               each of those files once more

The last few rows are leaves of the checkpoint itself; earlier rows are in segments, which its manifest names together
with their SHA-256. The number of sealed units is split as in binary (13 = 8 + 4 + 1), so that n rows are in log n files
and each row is written log n times. Files are never changed, and they are deleted when no checkpoint names them any
more. All checkpoints of a folder share these files, so each file is kept twice: damage to one copy costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hypergrad.checkpoints import _durable
from hypergrad.checkpoints._durable import Damaged

FOLDERS = ("rows", "rows-copy")
_UNIT = 256  # rows of the smallest segment, unless they are wide
_BYTES = 1 << 16  # bytes of the smallest segment, where rows are wide
_NAME = re.compile(r"rows-(\d{12,})-(\d{12,})-[0-9a-f]{64}\.npz")
_TEMPORARY = re.compile(r"tmp-\d+")

Tables = Mapping[str, np.ndarray]


class Segment(NamedTuple):
    """One file of rows.

    Attributes:
        start: its first row.
        end: the row after its last.
        sha256: SHA-256 of the file, which is part of its name.
        size: number of bytes.
    """

    start: int
    end: int
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"rows-{self.start:012d}-{self.end:012d}-{self.sha256}.npz"


def length(tables: Tables) -> int:
    """The number of rows that all tables have."""
    return min((len(table) for table in tables.values()), default=0)


def spans(tables: Tables) -> list[tuple[int, int]]:
    """`(start, end)` of the segments; the rows after the last of them, at least one, stay in the checkpoint."""
    width = sum(table[:0].dtype.itemsize * int(np.prod(table.shape[1:])) for table in tables.values())
    unit = _UNIT
    while unit > 16 and unit * width > _BYTES:
        unit //= 2
    start, found, units = 0, [], max(length(tables) - 1, 0) // unit
    for bit in reversed(range(units.bit_length())):
        if units >> bit & 1:
            found.append((start, start + (unit << bit)))
            start = found[-1][1]
    return found


def seal(folder: Path, tables: Tables, sealed: dict[tuple[int, int], Segment]) -> list[Segment]:
    """Write the segments that do not exist yet; return all segments.

    Args:
        folder: folder of the checkpoints.
        tables: arrays of one length.
        sealed: the segments that exist, by `(start, end)`; updated.

    Raises:
        OSError: if one cannot be written.
    """
    wanted = spans(tables)
    for start, end in wanted:
        if (start, end) not in sealed:
            sealed[start, end] = _write(folder, {name: table[start:end] for name, table in tables.items()}, start, end)
    for span in sealed.keys() - set(wanted):
        del sealed[span]
    return [sealed[span] for span in wanted]


def tail(tables: Tables) -> dict[str, np.ndarray]:
    """The rows after the last segment, which are part of the checkpoint."""
    wanted = spans(tables)
    rest = wanted[-1][1] if wanted else 0
    return {name: np.array(table[rest:]) for name, table in tables.items()}


def _write(folder: Path, tables: Tables, start: int, end: int) -> Segment:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, table in sorted(tables.items()):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(table), allow_pickle=False)
    data = file.getvalue()
    segment = Segment(start, end, hashlib.sha256(data).hexdigest(), len(data))
    for name in FOLDERS:
        here = folder / name
        here.mkdir(exist_ok=True)
        new = here / f"tmp-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        with _durable.Sink(new) as sink:
            sink.write(data)
        os.rename(new, here / segment.name)
        _durable.sync_folder(here)
    _durable.sync_folder(folder)
    return segment


def read(
    folder: Path, segments: Collection[Segment], tail: Tables
) -> tuple[dict[str, np.ndarray], dict[tuple[int, int], Segment], list[str]]:
    """All rows, the segments of which both copies are whole, and what is wrong with the other copies.

    Args:
        folder: folder of the checkpoints.
        segments: the segments that the manifest names.
        tail: the rows after them, whose dtypes and shapes the others must have.

    Raises:
        Damaged: if neither copy of a segment is what was written.
    """
    parts, sealed, damaged, row = [], {}, [], 0
    for segment in segments:
        if segment.start != row:
            raise Damaged(f"{folder}: row {row} is in no segment")
        row, found, bad = segment.end, [], []
        for name in FOLDERS:
            try:
                found.append(_read(folder / name / segment.name, segment, tail))
            except Damaged as error:
                bad.append(str(error))
        if not found:
            raise Damaged(" and ".join(bad))
        if not bad:
            sealed[segment.start, segment.end] = segment
        parts.append(found[0])
        damaged += bad
    parts.append(tail)
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in tail}, sealed, damaged


def _read(path: Path, segment: Segment, tail: Tables) -> dict[str, np.ndarray]:
    with _durable.open_regular(path) as file:
        try:
            data = file.read(segment.size + 1)
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if len(data) != segment.size or hashlib.sha256(data).hexdigest() != segment.sha256:
        raise Damaged(f"{path} is not what was written")
    tables = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name, like in tail.items():
                info = archive.getinfo(f"{name}.npy")
                if info.compress_type != zipfile.ZIP_STORED:  # nothing larger than its file
                    raise ValueError("it is compressed")
                with archive.open(info) as member:
                    table = np.lib.format.read_array(member, allow_pickle=False)
                shape = (segment.end - segment.start, *like.shape[1:])
                if (table.shape, table.dtype) != (shape, like.dtype):
                    raise ValueError(f"{name} is another table")
                tables[name] = table
    except Exception as error:  # zipfile raises many kinds for files that are not zip archives
        raise Damaged(f"{path} cannot be read: {error or type(error).__name__}") from error
    return tables


def parse(log: Any) -> list[Segment]:
    """The segments that a manifest names.

    Raises:
        Damaged: for anything else.
    """
    number = lambda x: type(x) is int and 0 <= x < 1 << 62
    segments = []
    for entry in log if isinstance(log, list) else [log]:
        if not isinstance(entry, list) or len(entry) != 4:
            raise Damaged(f"a segment of rows is named as {entry!r}")
        start, end, sha256, size = entry
        if not (number(start) and number(end) and number(size) and start < end and isinstance(sha256, str)):
            raise Damaged(f"a segment of rows is named as {entry!r}")
        segments.append(Segment(start, end, sha256, size))
        if not _NAME.fullmatch(segments[-1].name):
            raise Damaged(f"a segment of rows is named as {entry!r}")
    return segments


def clear(folder: Path, needed: Collection[str]) -> None:
    """Delete segments that no checkpoint names, and the half-written files of dead writers."""
    for name in FOLDERS:
        with contextlib.suppress(OSError), os.scandir(folder / name) as entries:
            for entry in entries:
                ours = _NAME.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)
                if ours and entry.name not in needed:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

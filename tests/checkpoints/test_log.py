"""A table that only grows is written a few times, and damage to any one of its files costs nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings

import numpy as np
import pytest

from hypergrad.checkpoints import _log
from hypergrad.checkpoints._durable import Damaged
from hypergrad.checkpoints.checkpoint import as_store, newest, write
from hypergrad.outer import CheckpointError


def tables(rows):
    return {"a": np.arange(3.0 * rows).reshape(rows, 3), "n": np.arange(rows)[:, None]}


def grow(folder, counts):
    sealed = {}
    folder.mkdir(exist_ok=True)
    for rows in counts:
        write(as_store("test", folder), rows, {"w": np.float64(rows)}, log=tables(rows), sealed=sealed)


def read(folder):
    like = lambda manifest: {
        "w": np.float64(0),
        "rows": {
            entry["path"][10:-2]: np.zeros(entry["shape"], entry["dtype"])
            for entry in manifest["leaves"]
            if entry["path"].startswith("['rows']")
        },
    }
    found = newest(as_store("test", folder), like)
    assert found is not None
    return found


def assert_holds(found, rows):
    assert found.manifest["step"] == rows
    for name, table in tables(rows).items():
        np.testing.assert_array_equal(found.log[name], table)
        assert found.log[name].dtype == table.dtype


def files(folder):
    return sorted((folder / "rows").glob("*.npz")), sorted((folder / "rows-copy").glob("*.npz"))


def test_rows_are_split_as_in_binary_and_the_last_stay_in_the_checkpoint():
    wide = {"a": np.zeros((1000, 2000))}
    assert _log.spans(tables(256)) == [] and _log.spans(tables(257)) == [(0, 256)]
    assert _log.spans(tables(13 * 256 + 5)) == [(0, 2048), (2048, 3072), (3072, 3328)]
    assert _log.spans(wide)[0] == (0, 512) and _log.spans(wide)[-1][1] == 992, "wide rows are sealed sooner"


@pytest.mark.parametrize(
    "counts", [(10,), (10, 300, 301, 600), (256, 257, 512, 513, 768, 1024, 1025), range(50, 1500, 50)]
)
def test_what_is_read_is_what_was_grown(tmp_path, counts):
    grow(tmp_path, counts)
    found = read(tmp_path)
    assert_holds(found, counts[-1])
    needed = {name for path in tmp_path.glob("step-*") for name in named(path)}
    for copies in files(tmp_path):
        assert {file.name for file in copies} == needed, "nothing is left that no checkpoint names"


def named(path):
    manifest = json.loads((path / "manifest.json").read_text())["manifest"]
    return [_log.Segment(*entry).name for entry in manifest.get("log", [])]


def test_a_long_run_writes_a_few_bytes_a_row(tmp_path, monkeypatch):
    """Written whole each time, 4,000 rows of 32 bytes in 100 checkpoints are 6.4 MB."""
    written, real = [0], os.write

    def count(fd, data):
        written[0] += len(data)
        return real(fd, data)

    monkeypatch.setattr(os, "write", count)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    grow(tmp_path, range(40, 4001, 40))
    assert written[0] < 2e6
    before = written[0]
    grow(tmp_path, range(40, 8001, 40))
    assert written[0] - before < 2.6 * before, "log-linear"


def damages(path):
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    yield lambda: path.write_bytes(flipped)
    yield lambda: path.write_bytes(data[:-1])
    yield lambda: path.write_bytes(data + b"x")
    yield lambda: path.write_bytes(b"")
    yield path.unlink
    yield lambda: path.symlink_to("/etc/passwd")
    yield path.mkdir


def test_damage_to_one_file_of_rows_costs_nothing_and_is_repaired(tmp_path):
    grow(tmp_path / "good", [300, 600, 900])
    names = [file.relative_to(tmp_path / "good") for copies in files(tmp_path / "good") for file in copies]
    assert len(names) == 6
    for i, name in enumerate(names):
        for k in range(7):
            folder = tmp_path / f"{i}-{k}"
            shutil.copytree(tmp_path / "good", folder)
            damage = list(damages(folder / name))[k]
            if k >= 5:
                (folder / name).unlink()
            damage()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = read(folder)
            assert_holds(found, 900)
            needed = str(name.name) in named(folder / f"step-{900:012d}")
            assert any(str(name) in str(w.message) for w in caught) == needed
            if needed and k < 6:
                write(as_store("test", folder), 901, {"w": 1.0}, log=tables(901), sealed=found.sealed)
                assert (folder / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_where_both_copies_are_damaged_an_older_checkpoint_is_used(tmp_path):
    grow(tmp_path, [300, 400, 900])
    for folder in ("rows", "rows-copy"):
        (newest_segment := tmp_path / folder / named(tmp_path / f"step-{900:012d}")[0]).write_bytes(b"")
    with pytest.warns(UserWarning, match="rows.*rows-copy.*step 400 is used"):
        assert_holds(read(tmp_path), 400)
    for file in (*files(tmp_path)[0], *files(tmp_path)[1]):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3"):
        read(tmp_path)
    assert newest_segment.exists()


@pytest.mark.parametrize("name", ["write", "fsync", "rename", "mkdir", "open"])
def test_whichever_call_fails_the_rows_of_the_last_good_checkpoint_survive(tmp_path, monkeypatch, name):
    grow(tmp_path / "good", [250, 500, 770])
    real, calls = getattr(os, name), 0

    def attempt(folder, fail):
        nonlocal calls
        calls = 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        sealed = read(folder).sealed
        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            with contextlib.suppress(OSError):
                write(as_store("test", folder), 1100, {"w": 1.0}, log=tables(1100), sealed=sealed)
        return sealed

    for fail in range(1, 99):
        folder = tmp_path / str(fail)
        shutil.copytree(tmp_path / "good", folder)
        sealed = attempt(folder, fail)
        found = read(folder)
        assert found.manifest["step"] in (770, 1100)
        assert_holds(found, found.manifest["step"])
        write(as_store("test", folder), 1101, {"w": 1.0}, log=tables(1101), sealed=sealed)
        assert_holds(read(folder), 1101)
        if calls < fail:
            break
    else:
        pytest.fail("more calls than expected")


@pytest.mark.parametrize(
    "log",
    [
        None, 3, "x", {}, [3], [[]], [[0, 1]], [[0, 256, "x", 3]], [[0, 256, "../../" + "a" * 58, 3]],
        [[0.0, 256, "a" * 64, 3]], [[-1, 256, "a" * 64, 3]], [[256, 0, "a" * 64, 3]], [[0, 256, "a" * 64, True]],
        [[0, 256, "A" * 64, 3]], [[0, 10**30, "a" * 64, 3]], [[0, 256, 7, 3]],
    ],
)  # fmt: skip
def test_names_of_rows_that_are_none_are_damage(log):
    with pytest.raises(Damaged):
        _log.parse(log)

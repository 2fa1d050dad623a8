"""Folders and files that are whole or absent: one writer at a time, and what is refused before it begins."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import outer
from hypergrad.checkpoints import _durable
from hypergrad.outer import CheckpointError

TREE = {"w": np.linspace(-1, 1, 7, dtype=np.float32)}


def test_where_there_are_no_file_locks_checkpoints_are_refused_in_so_many_words(tmp_path, monkeypatch):
    """Windows, as far as it can be had here: no `fcntl`. What was saved elsewhere is not read there, either."""
    outer.save(tmp_path, TREE, step=0)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    problem = hg.Problem(lambda w, h, b: (w - h) ** 2, lambda w, h, b: w**2)
    calls = {
        "save": lambda: outer.save(tmp_path / "new", TREE, step=0),
        "load": lambda: outer.load(tmp_path, TREE),
        "tune: checkpoint": lambda: hg.tune(
            hg.implicit(problem), 0.0, 1.0, outer=optax.sgd(0.1), steps=1, checkpoint=tmp_path / "new"
        ),
    }
    for where, call in calls.items():
        with pytest.raises(hg.InputError, match=f"^{where}: checkpoints need the file locks of a POSIX system"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError):
        outer.save(file, TREE, step=0)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 1 on the moon"); file.flush()
print("held", flush=True); time.sleep(60)
"""


@contextlib.contextmanager
def other_writer(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path):
    with other_writer(tmp_path) as process:
        with pytest.raises(CheckpointError, match="process 1 on the moon is writing to the checkpoint folder"):
            outer.save(tmp_path, TREE, step=0)
        process.kill()  # its lock file stays behind
        process.wait()
        assert (tmp_path / "lock").exists()
        outer.save(tmp_path, TREE, step=0)
    assert outer.load(tmp_path, TREE).step == 0


def test_what_stands_in_the_place_of_a_finished_folder_is_moved_aside_and_deleted(tmp_path):
    for name, text in (("new", "whole"), ("target", "damaged")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    _durable.replace(tmp_path / "new", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "whole"


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with _durable.open_regular(tmp_path / "file") as file:
        assert file.read() == b"bytes"
    for name, words in (("link", "cannot be read"), ("pipe", "not a regular file"), ("none", "is missing")):
        with pytest.raises(_durable.Damaged, match=words):
            _durable.open_regular(tmp_path / name)

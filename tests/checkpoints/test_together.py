"""Checkpoints of a program with several processes: written by all, killed, and gone on with to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hypergrad._solver import InputError
from hypergrad.checkpoints import _together

SCRIPT = Path(__file__).with_name("_process.py")


def two(folder: Path, die_at: int) -> list[list[str]]:
    """The lines that each of two processes of four devices prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = str(SCRIPT.parents[2])
    environment = os.environ | {"PYTHONPATH": root, "JAX_ENABLE_X64": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(index), str(folder), str(die_at)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for index in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(error[-3000:] for _, error in said)
    return [out.splitlines() for out, _ in said]


@pytest.mark.experiment
def test_a_run_of_two_processes_that_was_killed_goes_on_to_the_bit(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    two(tmp_path, die_at=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "step-000000000002", "step-000000000004"]
    ended = two(tmp_path, die_at=-1)
    assert (tmp_path / "step-000000000006").is_dir()
    prints = []
    for lines in ended:
        assert any("made with another outer" in line for line in lines), "the first process's error reaches both"
        kept, plain = lines[-1].split()
        assert kept == plain
        prints.append(kept)
    assert len(prints) == 2


def test_one_process_does_the_work_of_the_first_and_keeps_what_it_raises():
    assert _together.by_first(lambda: [1, 2]) == [1, 2] and _together.of_all({"a": "b"}) == {"a": "b"}
    with pytest.raises(ZeroDivisionError):
        _together.by_first(lambda: 1 // 0)


@pytest.mark.parametrize("index", [0, 1])
def test_what_the_first_process_raises_is_raised_in_all(index, monkeypatch):
    """The second receives what the first has sent."""
    sent: list[bytes] = []

    def from_first(data: bytes) -> bytes:
        sent.append(data)
        return sent[0]

    def fail() -> None:
        raise InputError("tune: the folder is full.")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(_together, "_from_first", from_first)
    for here in range(index + 1):
        monkeypatch.setattr(jax, "process_index", lambda here=here: here)
        with pytest.raises(InputError, match="the folder is full"):
            _together.by_first(fail)
    assert [data == b"{}" for data in sent] == [False, True][: index + 1], "the second does nothing of its own"

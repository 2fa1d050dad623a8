"""SIGTERM and Ctrl-C end a run with what it has, and a process that is killed goes on where it was."""

from __future__ import annotations

import dis
import json
import linecache
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hypergrad.checkpoints._leaves import read_npz, write_npz
from hypergrad.checkpoints.checkpoint import Store
from hypergrad.outer import TuneStatus
from tests.reliability._runs import assert_same, at, run

SCRIPT = Path(__file__).parents[2] / "experiments" / "reliability" / "durability.py"


@pytest.fixture
def term_handler():
    """A handler of the program's own, and the list of what it heard."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def send(number):
    return at(5, lambda: os.kill(os.getpid(), number))


def test_sigterm_ends_the_run_within_a_step_and_all_of_it_is_saved(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    result = run(tmp_path, callbacks=send(signal.SIGTERM), steps=10**6)
    assert result.status is TuneStatus.INTERRUPTED
    assert len(result.history.value) == 6
    assert result.best.value == np.min(result.history.value)
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(run(tmp_path), run())


def test_a_sigterm_handler_of_the_programs_own_is_called_and_put_back(term_handler):
    own = signal.getsignal(signal.SIGTERM)
    assert run(callbacks=send(signal.SIGTERM)).status is TuneStatus.INTERRUPTED
    assert term_handler == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is own


def test_a_handler_that_exits_exits_and_the_run_is_saved(tmp_path):
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
    try:
        with pytest.raises(SystemExit):
            run(tmp_path, callbacks=send(signal.SIGTERM), every=100)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000006"]


def test_a_program_that_ignores_sigterm_goes_on_ignoring_it():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run(callbacks=send(signal.SIGTERM)).status is TuneStatus.FINISHED
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signals", [1, 2])
def test_an_interrupt_that_comes_while_saving_waits_for_the_end_of_it_and_a_second_does_not(tmp_path, signals):
    """`zipfile`, stopped in the middle, may raise a ValueError in place of what stopped it."""
    saves = []

    def write(folder, arrays):
        saves.append("begun")
        if len(saves) == 1:
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
        done = write_npz(folder, arrays)
        saves.append("done")
        return done

    result = run(Store(tmp_path, "npz", write, read_npz), steps=1000)
    assert result.status is TuneStatus.INTERRUPTED and len(result.history.value) == 4
    assert saves == ["begun", "done"] if signals == 1 else saves == ["begun", "begun", "done"]
    assert_same(run(tmp_path), run())


def test_an_interrupt_that_a_callback_swallows_still_ends_the_run(term_handler):
    """So does one that Python drops because an object is being deleted."""

    def swallow(step, metrics):
        try:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pthread_sigmask(signal.SIG_BLOCK, [])  # a call in which it arrives
        except KeyboardInterrupt:
            pass

    result = run(callbacks=swallow, steps=1000)
    assert result.status is TuneStatus.INTERRUPTED and len(result.history.value) == 7


def test_an_interrupt_on_the_jump_back_to_the_head_of_the_loop_is_not_lost():
    """Python runs signal handlers there as well, and leaves that jump out of a `try` around the loop."""
    jumps = []

    def trace(frame, event, arg):
        if Path(frame.f_code.co_filename).parts[-2:] != ("outer", "_loop.py"):
            return None
        frame.f_trace_opcodes = True
        code = frame.f_code.co_code[frame.f_lasti :: 2]
        name = next(name for name in map(dis.opname.__getitem__, code) if name != "EXTENDED_ARG")
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()
        if armed and event == "opcode" and "JUMP_BACKWARD" in name and line.startswith("while "):
            jumps.append(name)
            armed.clear()
            raise KeyboardInterrupt
        return trace

    armed = set()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = run(callbacks=lambda step, metrics: armed.add(step) if step == 5 else None, steps=1000)
    except KeyboardInterrupt:
        pytest.fail("the interrupt went past hg.tune")
    finally:
        sys.settrace(before)
    assert len(jumps) == 1
    assert result.status is TuneStatus.INTERRUPTED and len(result.history.value) == 6


def test_outside_the_main_thread_no_handler_is_touched():
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(run(callbacks=lambda *_: results.append(signal.getsignal(signal.SIGTERM))))
    )
    thread.start()
    thread.join()
    assert results[-1].status is TuneStatus.FINISHED
    assert all(handler is before for handler in results[:-1])


@pytest.mark.experiment
def test_real_kills_and_real_signals_lose_nothing():
    """The experiment in small: real processes, SIGKILL at random instants, SIGINT, SIGTERM."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--json", "--only", "P9,P10,P15"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["P9", "P10", "P15"]
    assert all(met for _, _, met in found.values()), found

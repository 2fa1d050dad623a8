"""Ctrl-C, at any instant, returns the best so far."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from hypergrad.outer import TuneStatus
from tests._helpers import assert_trees_close, tol
from tests.outer._ridge import ridge, run


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background has them ignore SIGINT, and then nothing would end a run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(step, metrics):
    if step == 6:
        raise KeyboardInterrupt


def send_signal(step, metrics):
    if step == 6:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("callback", [interrupt, send_signal])
def test_ctrl_c_returns_the_best_so_far(callback):
    result = run(callbacks=callback, steps=10_000)
    assert result.status is TuneStatus.INTERRUPTED
    assert 7 <= len(result.history.value) <= 8
    assert result.best.value == np.min(result.history.value)
    assert_trees_close(result.hparams, run(steps=len(result.history.value)).hparams, tol(1e-14, 1e-6))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_any_instant_returns_a_consistent_result():
    started = threading.Event()

    def send():
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    for after in range(3):
        started.clear()
        thread = threading.Thread(target=send)
        thread.start()
        result = run(callbacks=lambda step, metrics: started.set() if step == 5 + after else None, steps=10**5)
        thread.join()
        assert result.status is TuneStatus.INTERRUPTED
        history = result.history
        lengths = {len(column) for column in (*history[:9], history.hparams["l2"], history.metrics["rmse"])}
        assert len(lengths) == 1 and lengths.pop() >= 6 + after
        assert np.isfinite(result.hparams["l2"])


def test_ctrl_c_before_the_first_step_is_not_swallowed():
    solver = ridge()

    def hypergrad(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(solver._replace(hypergrad=hypergrad))

"""Ctrl-C and SIGTERM during a run: both end it as `KeyboardInterrupt` does, immediately and at any point.

While a checkpoint is written, they take effect when it is complete.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """The signal that was sent, and whether it has to wait."""

    def __init__(self) -> None:
        self.armed, self.waits, self.sent = True, False, False
        self.pending: int | None = None

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if a signal was sent but its exception got lost: Python discards what is raised
        while an object is being deleted, and a library may catch it.
        """
        if self.sent:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay a signal until the block is done; a second signal takes effect at once.

        This protects libraries with open files: `zipfile`, stopped at the wrong moment, raises a `ValueError`.
        """
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.pending is not None:
            signal.raise_signal(self.pending)


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Turn SIGTERM into a `KeyboardInterrupt` inside the block, and restore its handler afterwards.

    A handler that the program has installed is called first. Nothing is changed outside the main thread, which is the
    only one to receive signals, or in a program that ignores SIGTERM.
    """
    interrupts = Interrupts()
    before: dict[signal.Signals, Any] = {}

    def handler(number: int, frame: Any) -> None:
        if interrupts.waits and interrupts.pending is None:
            interrupts.pending = number
            return
        interrupts.sent = True
        own = before[signal.Signals(number)]
        if callable(own) and own is not signal.default_int_handler:
            own(number, frame)
        if interrupts.armed:
            raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        term, ctrl_c = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        if term is signal.SIG_DFL or callable(term):
            before[signal.SIGTERM] = term
        if ctrl_c is signal.default_int_handler:  # a handler that the program has installed has the last word
            before[signal.SIGINT] = ctrl_c
    try:
        for number in before:
            signal.signal(number, handler)
        yield interrupts
    finally:
        interrupts.armed = False  # nothing may prevent the handlers from being restored
        for number, own in before.items():
            signal.signal(number, own)

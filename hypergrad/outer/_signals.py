"""Ctrl-C and SIGTERM, while a run goes on: both end it as `KeyboardInterrupt` does, at once and at any instant."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM into a `KeyboardInterrupt` inside the block, and put its handler back afterwards.

    A handler of the program's own is called first. Outside the main thread, which alone hears signals, and for a
    program that ignores SIGTERM, nothing is changed.

    Yields:
        `check()`, which raises `KeyboardInterrupt` if one was sent and never arrived: Python drops what is raised while
        an object is being deleted, and a library may catch it.
    """
    sent, armed = threading.Event(), True
    before: dict[signal.Signals, Any] = {}

    def handler(number: int, frame: Any) -> None:
        sent.set()
        own = before[signal.Signals(number)]
        if callable(own) and own is not signal.default_int_handler:
            own(number, frame)
        if armed:
            raise KeyboardInterrupt(signal.Signals(number).name)

    def check() -> None:
        if sent.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        term, ctrl_c = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        if term is signal.SIG_DFL or callable(term):
            before[signal.SIGTERM] = term
        if ctrl_c is signal.default_int_handler:  # a handler of the program's own keeps the last word
            before[signal.SIGINT] = ctrl_c
    try:
        for number in before:
            signal.signal(number, handler)
        yield check
    finally:
        armed = False  # nothing may keep the handlers from being put back
        for number, own in before.items():
            signal.signal(number, own)

r"""Timing that survives a shared machine: ratios of interleaved samples.

    sample k of every candidate runs right after sample k of the others;   ratio = medianₖ (aₖ / bₖ)

so that a slow spell of the machine hits numerator and denominator alike. Every sample waits for its results
(`block_until_ready`), with the garbage collector off, and repeats a short call until it lasts some milliseconds. One
call before it is not counted, unless calls are long: what another framework left in the caches, and its threads, made
the first call after it take up to three times as long. `CLOCK` is the wall clock unless `--clock cpu` asks for the time
this process was given, all its threads together: with one thread the two agree on an idle machine, and only the second
means much on a busy one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

_LEAST = 4e-3  # seconds a sample should last
_LONG = 0.2  # seconds from which on a call needs none before it
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = ["wall"]


def now() -> float:
    """Seconds on the chosen clock."""
    return CLOCKS[CLOCK[0]]()


class Times(NamedTuple):
    """Seconds per call, `[samples]` for each candidate, samples in the order they were taken."""

    seconds: dict[str, np.ndarray]

    def ms(self, name: str) -> float:
        """Median, in milliseconds."""
        return float(1e3 * np.median(self.seconds[name]))

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of `slow / fast` (dimensionless)."""
        return float(np.median(self.seconds[slow] / self.seconds[fast]))


def interleaved(candidates: Mapping[str, Callable[[], Any]], *, samples: int, seconds: float = 60.0) -> Times:
    """Time functions of no argument side by side.

    Args:
        candidates: by name; each returns what has to be waited for.
        samples: rounds, at least 1.
        seconds: stop early, after three rounds at least, when this much time is spent.

    Returns:
        See `Times`.
    """
    repeats, short = {}, {}
    for name, call in candidates.items():
        jax.block_until_ready(call())
        start = now()
        jax.block_until_ready(call())
        seconds_each = now() - start
        repeats[name] = max(1, min(50, round(_LEAST / max(seconds_each, 1e-6))))
        short[name] = seconds_each < _LONG
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    begin = time.perf_counter()
    try:
        for done in range(samples):
            if done >= 3 and time.perf_counter() - begin > seconds:
                break
            for name, call in candidates.items():
                if short[name]:
                    jax.block_until_ready(call())
                start = now()
                for _ in range(repeats[name]):
                    jax.block_until_ready(call())
                taken[name].append((now() - start) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return Times({name: np.asarray(values) for name, values in taken.items()})


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The function compiled for its arguments, which it takes unless it is given others, and what it allocates beside
    inputs and outputs, in MB (10⁶ bytes)."""
    program = jax.jit(function).lower(*args).compile()
    analysis = program.memory_analysis()
    megabytes = float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6
    return lambda *others: program(*(others or args)), megabytes

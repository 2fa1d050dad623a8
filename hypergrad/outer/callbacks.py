"""What `hg.tune` shows while it runs, to the caller's functions and on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import keystr
from hypergrad.outer._result import status_name

_LOG = logging.getLogger("hypergrad")
_EVERY = 10.0  # seconds between two lines of the log
_WHOLE = 32  # largest number of entries of an array that are written out; `_plain` summarises longer ones


class Callback(Protocol):
    """`fn(step, metrics)`, called after every step; a true return value stops the run.

    `step` counts from 0. `metrics` holds Python numbers under `value`, `grad_norm`, `status`, `inner_residual`,
    `linear_residual`, `error_estimate`, `inner_steps`, `linear_steps` and `seconds`, under the names of the loss's
    metrics and of the solver's extras and, with an `hg.outer.Controller`, under `accepted`. Under `hparams` it holds
    the (constrained) hyperparameters that they belong to, as arrays. With `steps_per_call=K`, the callbacks see the K
    steps of a call one after the other when the call is done.

    The callback may also be an object with two attributes:

    - `wants = ("params", "state")`, or one of them: `metrics` then also holds the parameters of the step (what the
      solver's response returns), and the solver's state after it. With `steps_per_call=K`, K of each are kept for this.
    - `on_end(result)`, called once when the run is over, however it ended, with the result that `hg.tune` returns (or
      attaches to an exception). Close files here.
    """

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Any:
        """Inspect, record, print or plot the step; return a true value to stop."""


def json_lines(path: str | Path) -> Callback:
    """A callback that appends one JSON object per step to a file, for any program that reads logs.

    An object holds `step`, every metric by its name, the status as a word, and the hyperparameters under `hparams` by
    their paths. An array of more than 32 entries is replaced by its `min`, `mean` and `max`; NaN and infinities become
    null. A line is complete once the step is, so that a run that dies loses none. A resumed run appends. Of several
    processes, only the first writes.

    Args:
        path: the file; its folder must exist.

    Returns:
        A callback for `hg.tune(callbacks=...)`.

    Raises:
        InputError: where the folder does not exist, or the path is a folder.

    >>> import hypergrad as hg, json, jax.numpy as jnp, optax, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> problem = hg.Problem(inner_loss=lambda w, h, batch: jnp.sum((w - 2.0)**2) + jnp.sum(h["l2"] * w**2),
    ...                      outer_loss=lambda w, h, batch: jnp.sum((w - jnp.array([1.0, 0.5]))**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(2), {"l2": jnp.full(2, 0.1)}, outer=optax.adam(0.1), steps=3,
    ...                  progress=False, callbacks=hg.outer.json_lines(path))
    >>> lines = [json.loads(line) for line in path.read_text().splitlines()]
    >>> [line["step"] for line in lines], lines[0]["status"], len(lines[0]["hparams"]["['l2']"])
    ([0, 1, 2], 'OK', 2)
    """
    file = Path(path)
    if not file.parent.is_dir() or file.is_dir():
        raise InputError(f"json_lines: path must be a file in a folder that exists, found {str(path)!r}.")

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        if jax.process_index():
            return
        line: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            if name == "status":
                line[name] = status_name(value)
            elif name == "hparams":
                line[name] = {keystr(at): _plain(leaf) for at, leaf in jax.tree_util.tree_leaves_with_path(value)}
            else:
                line[name] = _plain(value)
        with file.open("a") as log:
            log.write(json.dumps(line, allow_nan=False) + "\n")

    return write


def _plain(value: Any) -> Any:
    """Convert to numbers and lists that JSON has."""
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    found = np.asarray(value)
    if found.size > _WHOLE:
        return {name: _plain(getattr(np, name)(found)) for name in ("min", "mean", "max")}
    if found.ndim:
        return [_plain(entry) for entry in found]
    number = found.item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


WANTS = ("params", "state")


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple.

    Raises:
        InputTypeError: for callbacks that cannot be called.
        InputError: for `wants` with unknown names.
    """
    functions = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(functions, Iterable) or not all(map(callable, functions := tuple(functions))):
        raise InputTypeError(
            f"tune: callbacks must be functions fn(step, metrics), found {callbacks!r}: write a function, "
            "or a list of them."
        )
    for function in functions:
        wants = getattr(function, "wants", ())
        for name in (wants,) if isinstance(wants, str) or not isinstance(wants, Iterable) else wants:
            if name not in WANTS:
                raise InputError(f"tune: a callback wants {name!r}; it may want {' and '.join(map(repr, WANTS))}.")
    return functions


def shows(callbacks: tuple[Callback, ...]) -> tuple[str, ...]:
    """The parts of a step that the callbacks ask for in addition to the hyperparameters."""
    wanted: set[str] = set()
    for function in callbacks:
        wants = getattr(function, "wants", ())
        wanted |= {wants} if isinstance(wants, str) else set(wants)
    return tuple(sorted(wanted))


def end(callbacks: tuple[Callback, ...], result: Any) -> None:
    """Tell the callbacks that have `on_end` that the run is over."""
    for function in callbacks:
        if callable(on_end := getattr(function, "on_end", None)):
            on_end(result)


class Progress(Protocol):
    """The line that shows how far a run has come."""

    def compiling(self) -> contextlib.AbstractContextManager[Any]:
        """Wrap the first call, which compiles; say that it does, and for how long it has."""
        ...

    def __call__(self, metrics: Callable[[], Mapping[str, Any]], skipped: int, steps: int) -> None:
        """Report a call: the metrics of its last step, the unusable steps so far, and the steps of the call.

        The metrics are asked for only when they will be seen, since some calls take 20 µs.
        """


@contextlib.contextmanager
def progress_bar(total: int, done: int = 0, *, show: bool) -> Iterator[Progress | None]:
    """Show a live line on the terminal or in the notebook: outer loss, hypergradient norm, status, time left.

    Where tqdm is not installed, or stderr is not a terminal, lines of the logger `hypergrad` replace it, at most one in
    ten seconds; a program that has not set up logging gets them on stderr. The time left does not count the
    compilation. Of several processes, only the first shows it.

    Args:
        total: number of steps of the run.
        done: steps that a resumed run has already taken.
        show: whether to show it; None is yielded otherwise.
    """
    show = show and jax.process_index() == 0
    bar = _tqdm(total, done) if show else None
    if bar is None or bar.disable:
        yield _Lines(total, done) if show else None
        return
    line = _Bar(bar)
    try:
        yield line
    finally:
        line.say()
        bar.close()


def _words(metrics: Mapping[str, Any], skipped: int) -> str:
    text = f"outer loss {metrics['value']:.5g}, hypergradient {metrics['grad_norm']:.3g}, "
    return text + status_name(metrics["status"]) + (f", {skipped} skipped" if skipped else "")


class _Bar:
    def __init__(self, bar: Any):
        self.bar, self.compiled, self.said = bar, False, -math.inf
        self.latest: tuple[Callable[[], Mapping[str, Any]], int] | None = None

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        began, done = time.perf_counter(), threading.Event()

        def tick() -> None:
            while not done.wait(1.0):
                self.bar.set_postfix_str(f"compiling ({time.perf_counter() - began:.0f} s)", refresh=True)

        ticker = threading.Thread(target=tick, name="hypergrad-compiling", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()

    def say(self) -> None:
        """Write what the last call found, if there was one, beside the bar when it is next drawn."""
        if self.latest is not None:
            metrics, skipped = self.latest
            self.bar.set_postfix_str(_words(metrics(), skipped), refresh=False)

    def __call__(self, metrics: Callable[[], Mapping[str, Any]], skipped: int, steps: int) -> None:
        self.latest = metrics, skipped
        if (now := time.perf_counter()) - self.said >= self.bar.mininterval:  # it is not drawn more often
            self.said = now
            self.say()
        self.bar.update(steps)
        if not self.compiled:  # the time left is that of the steps to come, which do not compile
            self.compiled = True
            self.bar.initial, self.bar.start_t = self.bar.n, time.time()
            self.bar.last_print_t = self.bar.start_t


class _Lines:
    def __init__(self, total: int, done: int):
        self.total, self.done, self.last = total, done, -math.inf
        self.compiled: tuple[float, int] | None = None  # when the first call was over, and the steps until then

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        _say("tune: compiling")
        began, over = time.perf_counter(), threading.Event()

        def tick() -> None:
            while not over.wait(_EVERY):
                _say("tune: compiling (%.0f s)", time.perf_counter() - began)

        ticker = threading.Thread(target=tick, name="hypergrad-compiling", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()
        _say("tune: compiled, and took the first step, in %.1f s", time.perf_counter() - began)

    def __call__(self, metrics: Callable[[], Mapping[str, Any]], skipped: int, steps: int) -> None:
        self.done += steps
        now = time.perf_counter()
        if self.compiled is None:
            self.compiled = now, self.done
        if now - self.last >= _EVERY or self.done >= self.total:
            self.last = now
            since, first = self.compiled
            rest = (self.total - self.done) * (now - since) / (self.done - first) if self.done > first else 0.0
            left = f", {_duration(rest)} left" if rest else ""
            _say("tune: step %d of %d, %s%s", self.done, self.total, _words(metrics(), skipped), left)


def _say(message: str, *values: Any) -> None:
    """Log a line, or write it to stderr for a program that has not set up logging, in which nobody would see it."""
    if _LOG.hasHandlers():
        _LOG.info(message, *values)
    else:
        sys.stderr.write(message % values + "\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _tqdm(steps: int, done: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without ipywidgets, tqdm warns and falls back to text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=done, desc="tune", disable=None, dynamic_ncols=True)

"""The loop on the host: it calls the compiled step again and again, and does what has to happen between two calls.

Everything that a run has to keep is in `Run` and `Notes`; the code here advances it, asks the callbacks, stops and
saves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from hypergrad._checks import caller_level
from hypergrad._data import Stream
from hypergrad._jaxpr.convolutions import fast_convolutions
from hypergrad._solver import Status, usable
from hypergrad._tree import PyTree
from hypergrad.domains._domain import to_constrained
from hypergrad.outer._carry import AS_IT_IS
from hypergrad.outer._ended import Ended
from hypergrad.outer._feed import pull
from hypergrad.outer._keeper import Keeper, save
from hypergrad.outer._result import Best, Result, TuneStatus, make_history, status_name
from hypergrad.outer._run import Cursor, Notes, Run, counted, metrics_of, note, shown_rows, with_keys
from hypergrad.outer._signals import Interrupts
from hypergrad.outer._step import make_block
from hypergrad.outer.callbacks import Callback, Progress, end, shows

_LOG = logging.getLogger("hypergrad")
_VANISHED = 1e-3  # share of a run's largest hypergradient below which a hypergradient has vanished


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a run ends, and how often this is tested; see `hg.tune`."""

    steps: int
    per_call: int
    max_failures: int
    max_rejections: int
    patience: int | None
    min_delta: float
    max_seconds: float | None
    every: int


@dataclasses.dataclass
class Driver:
    """One run of `hg.tune`, from its first step to its result.

    Attributes:
        call: `(held, count, train, valid, key) -> (held, shown, report)`, compiled; see `Run`.
        respond: the solver's response, compiled.
        domain: pytree of domains.
        key: key of the steps.
        sources: functions that return the training and the validation data of the next steps.
        streams: those data that are read on the host.
        batches: data that were already pulled for the next call.
        callbacks: the caller's functions.
        templates: examples of what callbacks may see, by name.
        always: whether every proposed point is accepted at once, as with optax.
        estimates: whether the solver's method has an error that can be estimated.
        limits: see `Limits`.
        keeper: the checkpoints; None for a run without any.
        notes: what the steps reported.
        run: where the run stands.
        start: hyperparameters and parameters as the caller gave them.
        began: time on the clock at the beginning of this call of `tune`.
        held_out: `(evaluate, train, test)`, which give the loss on unseen data at the end; None without such data.
        validated: number of rows of the validation data, or None.
    """

    call: Callable[..., Any]
    respond: Callable[[Any, PyTree], PyTree]
    domain: PyTree
    key: Array | None
    sources: tuple[Callable[[int], PyTree], Callable[[int], PyTree]]
    streams: Mapping[str, Stream]
    batches: tuple[PyTree, PyTree] | None
    callbacks: tuple[Callback, ...]
    templates: Mapping[str, PyTree]
    always: bool
    estimates: bool
    limits: Limits
    keeper: Keeper | None
    notes: Notes
    run: Run
    start: tuple[PyTree, PyTree]
    began: float
    held_out: tuple[Callable[..., Any], PyTree, PyTree] | None = None
    validated: int | None = None

    def follow(self, interrupts: Interrupts, show: Progress | None) -> TuneStatus:
        """Make calls until the run is over. There is no `try` around the loop itself: see `hg.tune`."""
        status = self.ask() if self.run.count else None  # a resumed run may have ended, or been stopped by a callback
        started = False
        while status is None:
            with contextlib.nullcontext() if started or show is None else show.compiling():
                steps = self.advance()
            started = True
            interrupts.check()
            if show is not None:
                show(functools.partial(metrics_of, self.notes, self.run.count - 1), self.run.tally.skipped, steps)
            status = self.ask()
            if self.keeper is not None and self.run.count % self.limits.every == 0:
                with interrupts.held():
                    save(self.keeper, self.run, self.notes)
        return status

    def advance(self) -> int:
        """Make one call: as many steps as there are to the next multiple of `per_call`, or to the end."""
        run, most = self.run, self.limits.per_call
        steps = next_steps(run.count, self.limits)
        train, valid = self.batches or pull(self.streams, *self.sources, steps)
        held, shown, report = self.call(run.held, steps, train, valid, self.key)
        note(self.notes, run.count, steps, report)
        count = run.count + steps
        self.run = Run(
            held=held,
            count=count,
            tally=counted(run.tally, self.notes, run.count, count, self.limits.min_delta),
            answered=run.answered if self.callbacks else count,
            shown=(shown,) if most == 1 else shown_rows(shown, steps),
            first=run.count,
            cursors={name: Cursor(stream.position, stream.recent[-1]) for name, stream in self.streams.items()},
            carry=run.carry,
        )
        self.batches = None
        if run.count == 0 and metrics_of(self.notes, 0)["status"] == Status.INSENSITIVE:
            warn(f"tune: {Status.INSENSITIVE.advice}")
        return steps

    def ask(self) -> TuneStatus | None:
        """Ask the callbacks about every step that they have not answered for; return why the run is over, if it is."""
        for step in range(self.run.answered, self.run.count):
            metrics = self.metrics(step)
            answers = [function(step, metrics) for function in self.callbacks]
            if any(answers):
                return TuneStatus.STOPPED
            self.run = self.run._replace(answered=step + 1)
        return self.verdict()

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics of one step, as callbacks receive them."""
        found = metrics_of(self.notes, step)
        if self.always:
            del found["accepted"]
        place = step - self.run.first
        if 0 <= place < len(self.run.shown):
            found |= with_keys(self.run.shown[place], self.templates)
        if missing := [name for name in shows(self.callbacks) if name not in found]:
            # A resumed run may be asked for more than the run before it had kept.
            loop = self.run.loop
            here = {"state": lambda: loop.solver}
            here["params"] = lambda: self.respond(loop.solver, to_constrained(self.domain, loop.point))
            found |= {name: here[name]() for name in missing}
        return found

    def verdict(self) -> TuneStatus | None:
        """Return the reason why the run ends here, or None if it goes on."""
        tally, limits = self.run.tally, self.limits
        if tally.in_a_row >= limits.max_failures:
            return TuneStatus.CONVERGED if vanished(self.notes, self.run) else TuneStatus.FAILED
        if tally.rejected >= limits.max_rejections:
            return TuneStatus.CONVERGED
        if limits.patience is not None and tally.accepted and tally.waited >= limits.patience:
            return TuneStatus.CONVERGED
        if self.run.count >= limits.steps:
            return TuneStatus.FINISHED if tally.accepted else TuneStatus.FAILED
        if limits.max_seconds is not None and time.perf_counter() - self.began >= limits.max_seconds:
            return TuneStatus.OUT_OF_TIME
        return None

    def finish(self, status: TuneStatus) -> Result:
        """What the run has."""
        result = conclude(self.run, self.notes, self.respond, self.domain, self.start, status)
        return result._replace(validated=self.validated)

    def best(self) -> Best:
        """The best step so far; if no step was accepted, the start as the caller gave it."""
        return best_of(self.run, self.start)

    def end(self, status: TuneStatus) -> Result:
        """Return the result, once nothing more can happen, and log what there is to say about it."""
        if status is TuneStatus.FAILED:
            self.warn_failed()
        if self.run.tally.unknown and self.estimates:
            _LOG.warning(
                "tune: %d of the %d steps taken had an error_estimate of inf: nothing is known about the error of "
                "those hypergradients, whose direction may be good where their size is not; hg.check measures it.",
                self.run.tally.unknown,
                self.run.tally.accepted,
            )
        result = self.finish(status)
        if status is not TuneStatus.INTERRUPTED:
            result = result._replace(test=self.test())
        try:
            end(self.callbacks, result)
        except BaseException as error:
            attach(error, lambda: result)
            raise
        return result

    def test(self) -> float | None:
        """The outer loss on unseen data at the best step; None without such data, or if there is no best step."""
        if self.held_out is None or not self.run.tally.accepted:
            return None
        evaluate, train, data = self.held_out
        best = self.run.loop.best
        value, info, _ = evaluate(best.state, best.hparams, train, data, key=self.key)
        if not usable(info.status):
            _LOG.warning("tune: the loss on the test data has status %s.", status_name(info.status))
        return float(value)

    def raised(self, error: BaseException) -> None:
        """Save, and attach the result to an exception that is on its way to the caller."""
        save(self.keeper, self.run, self.notes, expected=False)
        attach(error, functools.partial(self.finish, TuneStatus.RAISED))
        if (result := getattr(error, "result", None)) is not None:
            with contextlib.suppress(Exception):  # the first error matters more
                end(self.callbacks, result)

    def warn_failed(self) -> None:
        """Say why the run failed, and where the results that it has can be found."""
        last, tally, best = metrics_of(self.notes, self.run.count - 1)["status"], self.run.tally, self.best()
        advice = f"{status_name(last)}: {Status(last).advice}" if last in set(Status) else status_name(last)
        where = (
            f"result.best holds the best step before, {best.step} with outer loss {best.value:.6g}."
            if tally.accepted
            else "No step before it was usable: result.best is the start. What was trained since is in result.params."
        )
        warn(f"tune: stopped after {tally.in_a_row} unusable hypergradients in a row. {where} The last was {advice}")


def vanished(notes: Notes, run: Run) -> bool:
    """Whether the hypergradient vanished, which explains why the steps since the last usable one failed: at an optimum
    of the outer loss the hypergradient is smaller than its error, even if that error is small relative to earlier
    hypergradients.
    """
    rows, place = notes.taken(0, run.count), notes.places
    norms, errors = (rows.scalars[:, place[name]] for name in ("grad_norm", "error_estimate"))
    status = rows.integers[:, place["status"]]
    before, since = np.split(np.arange(run.count), [run.count - run.tally.in_a_row])
    largest = np.max(norms[before], where=usable(status[before]), initial=0)
    small = norms[since] * np.maximum(errors[since], 1) <= _VANISHED * largest
    return bool(np.all(small & (status[since] == int(Status.INACCURATE))))


def best_of(run: Run, start: tuple[PyTree, PyTree]) -> Best:
    """The best step so far; if no step was accepted, the hyperparameters and parameters at the start."""
    if not run.tally.accepted:
        return Best(-1, float("nan"), *start)
    kept = run.loop.best
    return Best(int(kept.step), float(kept.value), kept.hparams, kept.params)


def conclude(
    run: Run,
    notes: Notes,
    respond: Callable[[Any, PyTree], PyTree],
    domain: PyTree,
    start: tuple[PyTree, PyTree],
    status: TuneStatus,
) -> Result:
    """Return what a run has, wherever it stands."""
    run = run._replace(held=(loop := run.loop), carry=AS_IT_IS)
    final = to_constrained(domain, loop.point)
    assert notes.layout is not None
    return Result(
        hparams=final,
        params=respond(loop.solver, final),
        best=best_of(run, start),
        history=make_history(notes.taken(0, run.count), notes.layout, final),
        status=status,
        state=loop.solver,
        outer_state=loop.outer,
        run=Ended(run, notes.taken(0, run.count), notes.layout),
    )


def next_steps(count: int, limits: Limits) -> int:
    """Return the number of steps of the next call."""
    return min(limits.per_call - count % limits.per_call, limits.steps - count)


def several(unit: Any, streams: Mapping[str, Stream], most: int, *, show: bool) -> Callable[..., Any]:
    """Return the compiled step in the form of `Driver.call`: at most `most` steps per call.

    Args:
        unit: one step under `jax.jit`.
        streams: the streams, by the name of the argument that they feed.
        most: the largest number of steps in one call.
        show: whether there are callbacks.
    """
    if most == 1:
        return lambda loop, steps, train, valid, key: unit(loop, train, valid, key)
    # This gives convolutions the same speed and the same last digits as in a single step.
    block = jax.jit(fast_convolutions(make_block(unit, most, tuple(streams), show=show)))
    return lambda loop, steps, train, valid, key: block(loop, np.int32(steps), train, valid, key)


def attach(error: BaseException, finish: Callable[[], Result]) -> None:
    """Attach the result to an exception, if there is a result."""
    with contextlib.suppress(Exception):  # the caller's own error matters more
        setattr(error, "result", finish())  # noqa: B010, exceptions declare no such attribute
        error.add_note("hypergrad: the run up to here is in this exception's attribute `result`.")


def warn(message: str) -> None:
    """Issue a warning that points to the caller of `hg.tune`."""
    warnings.warn(message, UserWarning, stacklevel=caller_level())

r"""The outer loop, in which hyperparameters follow their hypergradients.

    u ← u + optimizer(∂F/∂u),   F(u) = f(w*(T(u)), T(u)),   ∂F/∂u = (∂T/∂u)ᵀ g

where T is the map onto the hyperparameters' domain (`hg.domains`) and g comes from any solver.

It differs from a hand-written loop in three ways:
1. a hypergradient that cannot be trusted moves nothing: hyperparameters and outer optimizer stay, the solver continues;
2. the best step is kept separately from the last;
3. nothing that happens on the host can lose the run, be it a callback that raises, Ctrl-C or an iterator that ends.
Cost: one compiled step, traced once; one transfer to the host per step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._checks import check_finite, check_hparams
from hypergrad._data import Minibatches, Stream, prepare
from hypergrad._jaxpr.labels import check_concrete_data, check_solver_labels
from hypergrad._options import SOLVER, Number, options
from hypergrad._solver import InputError, InputTypeError, Solver, evaluation
from hypergrad._tree import PyTree
from hypergrad.checkpoints.checkpoint import Store
from hypergrad.domains._domain import to_unconstrained
from hypergrad.folds import Fold
from hypergrad.outer._carry import carry
from hypergrad.outer._config import config
from hypergrad.outer._ended import revive
from hypergrad.outer._feed import give_back, of_one_step, pull, source
from hypergrad.outer._keeper import open_keeper, reopen, save
from hypergrad.outer._loop import Driver, Limits, next_steps, several
from hypergrad.outer._result import Result, TuneStatus
from hypergrad.outer._run import Cursor, Notes, Run, Tally
from hypergrad.outer._signals import interruptible
from hypergrad.outer._step import make_advance, start
from hypergrad.outer.callbacks import Callback, check_callbacks, progress_bar, shows
from hypergrad.outer.controllers import Controller, check_controller


@options(
    solver=SOLVER,
    steps=Number(least=1, integer=True, static=True, advice="write how many outer steps to take"),
    max_failures=Number(least=1, integer=True, static=True),
    max_rejections=Number(least=1, integer=True, static=True),
    patience=Number(least=1, integer=True, static=True),
    min_delta=Number(least=0, static=True),
    max_seconds=Number(above=0, static=True),
    steps_per_call=Number(least=1, integer=True, static=True),
    every=Number(least=1, integer=True, static=True),
)
def tune(
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    train: PyTree = None,
    valid: PyTree = None,
    *,
    outer: optax.GradientTransformation | Controller | Any,
    steps: int,
    key: Array | None = None,
    domain: PyTree = None,
    model_state: PyTree = None,
    callbacks: Callback | Iterable[Callback] = (),
    max_failures: int = 5,
    max_rejections: int = 50,
    patience: int | None = None,
    min_delta: float = 0.0,
    max_seconds: float | None = None,
    steps_per_call: int = 1,
    test: PyTree = None,
    progress: bool = True,
    resume: Result | None = None,
    checkpoint: str | os.PathLike[str] | Store | None = None,
    every: int | None = None,
    allow_changed: str | Collection[str] = (),
) -> Result:
    """Tune hyperparameters by gradient descent on the outer loss.

    A step whose status is not usable (see `hg.Status`), or whose hypergradient or update is not finite, changes neither
    the hyperparameters nor the outer optimizer; the solver's state advances, so that an unconverged solve continues
    where it stopped. Ctrl-C and SIGTERM end the run within one step and return the result so far, with the status
    INTERRUPTED (a SIGTERM handler that the program has installed is called first). An exception raised by a callback or
    by the data propagates with its type; its attribute `result` holds the result so far.

    A step whose `error_estimate` is inf is taken; the logger `hypergrad` reports once, at the end, how many there were.

    With `checkpoint`, making the same call again continues the run where it stopped, however it ended, and the result
    is equal to the bit (except for wall times) to that of a run that was never stopped; a finished run returns its
    result. Steps since the last checkpoint are repeated, including their callbacks; a callback that stopped the run or
    raised is asked again. A warning names a damaged checkpoint, and the one before it is used. If a save fails (a full
    disk), a warning is issued and the run goes on. Three checkpoints are kept, each with the whole history. On a small
    problem a step takes 50 ms more with a checkpoint at every step, and 3 ms more with one at every tenth (two cores
    under a load of 18; `experiments/reliability/durability.py --overhead`).

    Args:
        solver: the method, `hg.implicit(problem)` or any other `hg.Solver`.
        params: the model's parameters at the start.
        hparams: hyperparameters at the start: a pytree of floats or floating arrays, each inside its domain.
        train: training data: a pytree of arrays, `hg.minibatches(...)`, `hg.stream(...)`, or None.
        valid: validation data, in the same forms.
        outer: optax optimizer of the hyperparameters, such as `optax.adam(3e-2)`, or an `hg.outer.Controller`, which
            may reject steps and set the solver's accuracies.
        steps: number of outer steps; with a controller every trial counts, whether accepted or not.
        key: PRNG key. Step t uses `fold_in` of it with t, so that a run is repeatable; needed by minibatches and by
            losses that take a key.
        domain: pytree prefix of `hparams` with `hg.domains` as leaves. `hparams` is given and returned in its domain;
            the optimizer moves unconstrained coordinates.
        model_state: state of the model besides its parameters, for `hg.Problem(..., model_state=True)`.
        callbacks: one function or several, `fn(step, metrics)`, called after each step; a true return value stops the
            run. See `hg.outer.Callback`.
        max_failures: stop after this many unusable steps in a row; see also `TuneStatus.CONVERGED`.
        max_rejections: number of usable trials that a controller rejects in a row after which the run counts as
            converged.
        patience: stop after this many accepted steps without a new best; None for no such limit.
        min_delta: how much the outer loss must fall to count as a new best for `patience`, in the unit of the outer
            loss.
        max_seconds: stop when this call has taken this many seconds, compilation included, with the status OUT_OF_TIME.
            Making the same call again with a checkpoint continues for as long.
        steps_per_call: number of steps in one call of the compiled program, for steps that take less than a
            millisecond. Callbacks see all of them afterwards; stopping, patience, failures, interrupts and checkpoints
            act after each call. The steps are the same to the bit, and a run may continue with another number. What the
            loop itself takes for a step falls from 40 µs to 6.5 µs with 10 and 1.7 µs with 100 (process time on a
            shared core).
        test: data that do not influence any choice, a pytree of arrays. After the last step the outer loss on them is
            computed once, at the best step's hyperparameters and from the solver's state there, and stored in
            `result.test`.
        progress: whether to show a live progress line (where tqdm is installed and stderr is a terminal or a notebook).
            Elsewhere the logger `hypergrad` writes a line at level INFO, at most every ten seconds; a program that has
            not set up logging gets it on stderr.
        resume: the result of a run that goes on here, in memory and without a folder: make the call of that run again,
            with a larger number of `steps`, which counts those taken. The result is equal to the bit to that of a
            single call; a count that ended the run (`patience`, `max_failures`, `max_rejections`) begins anew. Data,
            losses and step sizes are those of this call.
        checkpoint: folder for this run's checkpoints, which is created if it does not exist; None to keep none. For
            state that is sharded over devices, pass `hg.outer.orbax(folder)`; so must the processes of a program that
            has several, with the same call and a folder that all of them see. The last step writes one there, but not
            an interrupt or an exception, for which one process alone would wait for the others.
        every: number of steps between checkpoints, a multiple of `steps_per_call`; by default 10, or the next multiple.
            The last step, an interrupt and an exception also write one.
        allow_changed: names of what may differ from the call with which the run began: arguments of `tune`, `"x64"`,
            `"device"`, `"jax"`, `"jaxlib"`, `"hypergrad"`. `"solver"` stands for the whole compiled step (losses,
            method, options), which depends on the others, and is compared where none of them differs. `steps`,
            `steps_per_call`, `max_seconds`, `every` and `callbacks` may always differ.

    Returns:
        See `hg.outer.Result`: `hparams`, `params`, `best`, `history`, `status`, `state`. Print it for a summary.

    Raises:
        InputError: for hyperparameters outside their domain; for data that are empty, unpaired or labelled outside
            their classes; for a missing key or options out of range; for a checkpoint folder that cannot be written to,
            or that holds a run with a different configuration, naming the difference.
        InputTypeError: for a solver, optimizer, callback, key or leaf of the wrong type.
        CheckpointError: if another run writes to the checkpoint folder, or if all its checkpoints are damaged.

    Warns:
        UserWarning: if the run stops because of unusable steps, if no hyperparameter moves the outer loss, for NaN in
            the data, and for a checkpoint that is damaged or could not be written.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=optax.adam(0.1), steps=200,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 2)
    1.0
    """
    began, notes = time.perf_counter(), Notes()
    limits = _limits(
        steps, steps_per_call, every, max_failures=max_failures, max_rejections=max_rejections, patience=patience,
        min_delta=float(min_delta), max_seconds=max_seconds,
    )  # fmt: skip
    functions = _check_arguments(params, outer, callbacks, key)
    _check_resume(resume, checkpoint)
    hparams = check_hparams(hparams)
    check_finite("hparams", hparams)
    free = to_unconstrained(domain, hparams)
    _check_test(test, train)
    sources = source("train", train, key, limits.per_call), source("valid", valid, key, limits.per_call)
    streams = {name: data for name, data in (("train", train), ("valid", valid)) if isinstance(data, Stream)}
    with contextlib.ExitStack() as stack:
        keeper = open_keeper(stack, checkpoint, allow_changed)
        init_key, step_key = (None, None) if key is None else jax.random.split(key)
        state = solver.init(params, hparams, key=init_key, model_state=model_state)
        if isinstance(outer, Controller):
            check_controller(outer, solver, state, outer.init(free), {"train": train, "valid": valid})
        respond, seen, driver = jax.jit(solver.response), {}, None
        loop = start(respond, outer, state, hparams, free, keep_state=test is not None)
        cursors = {name: Cursor(stream.position, None) for name, stream in streams.items()}
        run = Run(loop, 0, Tally(), 0, (), 0, cursors)
        stack.callback(give_back, streams, lambda: (driver.run if driver else run).cursors)
        batches = pull(streams, *sources, next_steps(0, limits))
        first = of_one_step(tuple(streams), *batches, limits.per_call)
        form = carry(loop, first, step_key)
        held = form.seal(loop)
        unit = jax.jit(make_advance(solver, outer, domain, shows(functions), seen, form))
        trace = functools.partial(unit.trace, held, *first, step_key)  # kept by JAX for the first step
        check_solver_labels(solver, state, hparams, *first, step_key, traced=lambda: trace().jaxpr)
        held_out = None if test is None else (jax.jit(evaluation(solver)), first[0], test)
        _check_held_out(held_out, loop, step_key)
        templates = {"hparams": loop.best.hparams, "params": loop.best.params, "state": loop.solver}
        if keeper is not None:
            # The `wants` of callbacks are not part of the run: they may differ when it continues.
            plain = jax.jit(make_advance(solver, outer, domain, (), seen := {}, form)) if shows(functions) else unit
            made = config(
                plain.trace(held, *first, step_key), state, seen, loop.outer, domain, key=key, params=params,
                hparams=hparams, model_state=model_state, train=train, valid=valid, max_failures=max_failures,
                max_rejections=max_rejections, patience=patience, min_delta=float(min_delta),
                test=test is not None,
            )  # fmt: skip
            run = reopen(keeper, made, run, notes, templates, streams, limits.steps, limits.min_delta)
        elif resume is not None:
            run = revive(resume.run, run, notes, streams, limits.steps, dataclasses.asdict(limits))
        driver = Driver(
            call=several(unit, streams, limits.per_call, show=bool(functions)),
            respond=respond,
            domain=domain,
            key=step_key,
            sources=sources,
            streams=streams,
            batches=batches if run.count == 0 else None,
            callbacks=functions,
            templates=templates,
            always=not isinstance(outer, Controller),
            estimates=solver.about.differentiates in ("optimum", "path"),
            limits=limits,
            keeper=keeper,
            notes=notes,
            run=run._replace(held=form.seal(run.loop), carry=form),
            start=(hparams, params),
            held_out=held_out,
            validated=_validated(solver, valid),
            began=began,
        )
        try:
            # CPython leaves the jump back to the head of a loop outside the `try` around it (seen in 3.12 and 3.13),
            # and runs signal handlers on that jump: one interrupt in about two hundred escaped `except`.
            with interruptible() as interrupts, progress_bar(limits.steps, run.count, show=progress) as show:
                status = driver.follow(interrupts, show)
        except KeyboardInterrupt:
            if not driver.run.count:
                raise
            status = TuneStatus.INTERRUPTED
        except BaseException as error:
            if driver.run.count:
                driver.raised(error)
            raise
        save(keeper, driver.run, notes, expected=status is not TuneStatus.INTERRUPTED)
        return driver.end(status)


def _validated(solver: Solver, valid: PyTree) -> int | None:
    """The number of validation rows, if each is an example: not for a stream or for a leading axis of tasks."""
    if isinstance(valid, Fold):
        valid = valid.arrays
    elif isinstance(valid, Stream) or solver.about.name.startswith("hg.tasks"):
        return None
    arrays = jax.tree.leaves(valid.arrays if isinstance(valid, Minibatches) else valid)
    lengths = {jnp.shape(leaf)[:1] for leaf in arrays}
    return int(lengths.pop()[0]) if len(lengths) == 1 and () not in lengths else None


def _check_test(test: PyTree, train: PyTree) -> None:
    if isinstance(test, (Stream, Minibatches)):
        raise InputTypeError(
            f"tune: test is hg.{type(test).__name__.lower()}, but the loss on unseen data is computed once: pass the "
            "arrays themselves."
        )
    if test is not None and isinstance(train, Stream):
        raise InputError(
            "tune: test= trains at the best hyperparameters where a solver needs that, but train is hg.stream, which "
            "is read once: pass arrays, or call solver.evaluate on result.state."
        )
    check_concrete_data("test", prepare("test", test))


def _check_resume(resume: Any, checkpoint: Any) -> None:
    if resume is None:
        return
    if not isinstance(resume, Result):
        raise InputTypeError(
            f"tune: resume must be the result of hg.tune, found {type(resume).__name__}: write resume=result."
        )
    if checkpoint is not None:
        raise InputError(
            "tune: resume and checkpoint both say where the run goes on. A run with a folder goes on when the same "
            "call is made again, without resume."
        )


def _check_held_out(held_out: Any, loop: Any, key: Array | None) -> None:
    """Trace the loss on unseen data, which is computed at the end: a mistake there would cost the run."""
    if held_out is None:
        return
    evaluate, train, test = held_out
    try:
        evaluate.trace(loop.best.state, loop.best.hparams, train, test, key=key)  # kept by JAX for the end
    except Exception as error:
        error.add_note(
            "hypergrad: this is about test=, which takes the place of valid where the loss on unseen data is computed. "
            "With hg.tasks it has an axis of tasks, too; for one model on other data, use result.retrain."
        )
        raise


def _limits(steps: int, steps_per_call: int, every: int | None, **others: Any) -> Limits:
    if others["max_seconds"] is not None and (count := jax.process_count()) > 1:
        raise InputError(
            f"tune: max_seconds is measured by the clock of each process, and this program has {count}: one would stop "
            "before a step for which the others then wait for ever. End the run by steps= or a callback that answers "
            "alike in all."
        )
    if every is None:
        every = -(-10 // steps_per_call) * steps_per_call
    if every % steps_per_call:
        raise InputError(
            f"tune: every must be a multiple of steps_per_call, found {every} and {steps_per_call}: "
            f"write every={-(-every // steps_per_call) * steps_per_call}."
        )
    return Limits(steps=int(steps), per_call=int(steps_per_call), every=int(every), **others)


def _check_arguments(params: PyTree, outer: Any, callbacks: Any, key: Any) -> tuple[Callback, ...]:
    if not (callable(getattr(outer, "init", None)) and callable(getattr(outer, "update", None))):
        found = getattr(outer, "__name__", type(outer).__name__)
        raise InputTypeError(
            f"tune: outer must be an optax GradientTransformation or an hg.outer.Controller, found {found}: "
            "write optax.adam(3e-2), for example."
        )
    old_key = getattr(key, "dtype", None) == jnp.uint32 and key.shape == (2,)
    if key is not None and not old_key and not (_tree.is_key(key) and key.shape == ()):
        raise InputTypeError(f"tune: key must be one PRNG key, found {key!r}: write jax.random.key(0).")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise InputTypeError(
            "tune: params is traced, but tune is a loop on the host: call it outside jit, grad and vmap."
        )
    return check_callbacks(callbacks)

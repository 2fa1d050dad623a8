r"""The outer loop: hyperparameters follow their hypergradients.

    u ← u + optimizer(∂F/∂u),   F(u) = f(w*(T(u)), T(u)),   ∂F/∂u = (∂T/∂u)ᵀ g

with T the map onto the hyperparameters' domain (`hg.domains`) and g from any solver.

Differs from a hand-written loop in that
1. a hypergradient that cannot be trusted moves nothing: hyperparameters and outer optimizer stay, the solver goes on;
2. the best step is kept apart from the last;
3. nothing that happens on the host can lose the run: a callback that raises, Ctrl-C, an iterator that ends.
Cost: one compiled step, traced once; one transfer to the host a step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._checks import caller_level, check_finite, check_hparams
from hypergrad._data import Stream
from hypergrad._jaxpr.labels import check_solver_labels
from hypergrad._options import SOLVER, Number, options
from hypergrad._solver import InputTypeError, Solver, Status
from hypergrad._tree import PyTree
from hypergrad.checkpoints.checkpoint import Store
from hypergrad.domains._domain import to_constrained, to_unconstrained
from hypergrad.outer._config import config
from hypergrad.outer._feed import give_back, pull, source
from hypergrad.outer._keeper import open_keeper, resume, save
from hypergrad.outer._progress import Callback, progress_bar
from hypergrad.outer._result import Best, Result, TuneStatus, make_history, status_name
from hypergrad.outer._run import Cursor, Notes, Run, note, usable
from hypergrad.outer._signals import Interrupts, interruptible
from hypergrad.outer._step import Loop, make_step, strong


@options(
    solver=SOLVER,
    steps=Number(least=1, integer=True, static=True, advice="write how many outer steps to take"),
    max_failures=Number(least=1, integer=True, static=True),
    patience=Number(least=1, integer=True, static=True),
    every=Number(least=1, integer=True, static=True),
)
def tune(
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    train: PyTree = None,
    valid: PyTree = None,
    *,
    outer: optax.GradientTransformation | Any,
    steps: int,
    key: Array | None = None,
    domain: PyTree = None,
    model_state: PyTree = None,
    callbacks: Callback | Iterable[Callback] = (),
    max_failures: int = 5,
    patience: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | Store | None = None,
    every: int = 10,
    allow_changed: str | Collection[str] = (),
) -> Result:
    """Tune hyperparameters by gradient descent on the outer loss.

    A step whose status is not usable (see `hg.Status`), or whose hypergradient or update is not finite, changes neither
    the hyperparameters nor the outer optimizer; the solver's state advances, so that an unconverged solve goes on where
    it stopped. Ctrl-C and SIGTERM end the run within one step and return what there is, with the status INTERRUPTED (a
    SIGTERM handler of the program's own is called first). An exception raised by a callback or by the data propagates
    with its type; its attribute `result` holds what there is.

    With `checkpoint`, the same call made again goes on where the run was, however it ended, and its result is the same
    to the bit (wall times aside) as that of a run that was never stopped; a finished run returns its result. What was
    done since the last checkpoint is done again, callbacks included; one that stopped the run or raised is asked again.
    A checkpoint that is damaged is named in a warning, and the one before it taken. A save that fails (a full disk) is
    a warning, and the run goes on. Three checkpoints are kept, each with the whole history. On a small problem a step
    takes 50 ms more with one at every step, and 3 ms more with one at every tenth (two cores under a load of 18;
    `experiments/reliability/durability.py --overhead`).

    Args:
        solver: the method, `hg.implicit(problem)` or any other `hg.Solver`.
        params: the model's parameters at the start.
        hparams: hyperparameters at the start: a pytree of floats or floating arrays, each inside its domain.
        train: training data: a pytree of arrays, `hg.minibatches(...)`, `hg.stream(...)`, or None.
        valid: validation data, in the same forms.
        outer: optax optimizer of the hyperparameters, such as `optax.adam(3e-2)`.
        steps: number of outer steps.
        key: PRNG key. Step t uses `fold_in` of it with t, so that a run is repeatable; needed by minibatches and by
            losses that take a key.
        domain: pytree prefix of `hparams` with `hg.domains` as leaves. `hparams` is given and returned in its domain;
            the optimizer moves unconstrained coordinates.
        model_state: state of the model beside its parameters, for `hg.Problem(..., model_state=True)`.
        callbacks: one function or several, `fn(step, metrics)`, called after each step; a true return value stops the
            run. See `hg.outer.Callback`.
        max_failures: unusable steps in a row after which to stop.
        patience: steps without a new best after which to stop; None for no such limit.
        progress: whether to show a live progress line (where tqdm is installed and stderr is a terminal or a notebook).
        checkpoint: folder of this run's checkpoints, made if it is not there; None to keep none. Or
            `hg.outer.orbax(folder)`, for state that is sharded over devices.
        every: steps between checkpoints. The last step, an interrupt and an exception make one as well.
        allow_changed: names of what may differ from the call that the run was begun with: arguments of `tune`, `"x64"`,
            `"device"`, `"jax"`, `"jaxlib"`, `"hypergrad"`. `"solver"` stands for the whole compiled step (losses,
            method, options), which depends on the others, and is compared where none of them differs. `steps`, `every`
            and `callbacks` may always differ.

    Returns:
        See `hg.outer.Result`: `hparams`, `params`, `best`, `history`, `status`, `state`. Print it for a summary.

    Raises:
        InputError: for hyperparameters outside their domain, data that are empty, unpaired or labelled outside their
            classes, a missing key, options out of range; a checkpoint folder that cannot be written to, or that holds
            a run that was begun with something else, naming what.
        InputTypeError: for a solver, optimizer, callback, key or leaf of the wrong type.
        CheckpointError: if another run writes to the checkpoint folder, or if all that is in it is damaged.

    Warns:
        UserWarning: if the run stops because of unusable steps, if no hyperparameter moves the outer loss, for NaN
            in the data, for a checkpoint that is damaged, or could not be written.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=optax.adam(0.1), steps=200,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 2)
    1.0
    """
    notes = Notes()
    functions = _check_arguments(solver, params, outer, steps, max_failures, patience, callbacks, key)
    hparams = check_hparams(hparams)
    check_finite("hparams", hparams)
    free = to_unconstrained(domain, hparams)
    next_train, next_valid = source("train", train, key), source("valid", valid, key)
    streams = {name: data for name, data in (("train", train), ("valid", valid)) if isinstance(data, Stream)}
    with contextlib.ExitStack() as stack:
        keeper = open_keeper(stack, checkpoint, allow_changed)
        init_key, step_key = (None, None) if key is None else jax.random.split(key)
        state = solver.init(params, hparams, key=init_key, model_state=model_state)
        loop = Loop(*(strong(part) for part in (jnp.int32(0), state, free, outer.init(free))))
        cursors = {name: Cursor(stream.position, None) for name, stream in streams.items()}
        run = Run(loop, 0, Best(-1, float("nan"), hparams, params), hparams, 0, 0, 0, cursors)
        stack.callback(give_back, streams, lambda: {name: cursor.position for name, cursor in run.cursors.items()})
        batches = pull(streams, next_train, next_valid)
        advance, respond = jax.jit(make_step(solver, outer, domain)), jax.jit(solver.response)
        trace = functools.partial(advance.trace, loop, *batches, step_key)  # kept by JAX for the first step
        check_solver_labels(solver, state, hparams, *batches, step_key, traced=lambda: trace().jaxpr)
        if keeper is not None:
            made = config(
                trace(), state, outer, free, domain, key=key, params=params,
                hparams=hparams, model_state=model_state, train=train, valid=valid, max_failures=max_failures,
                patience=patience,
            )  # fmt: skip
            run = resume(keeper, made, run, notes, jax.eval_shape(respond, loop.solver, hparams), streams, steps)
            batches = batches if run.count == 0 else None

        def finish(status: TuneStatus) -> Result:
            final = to_constrained(domain, run.loop.free)
            history = make_history(notes.rows[: run.count], final, *notes.names)
            response = respond(run.loop.solver, final)
            return Result(final, response, run.best, history, status, run.loop.solver, run.loop.outer)

        def ask() -> TuneStatus | None:
            """Whether the run is over, and why."""
            nonlocal run
            if run.answered < run.count:
                metrics = notes.rows[run.count - 1].scalars | {"hparams": run.used}
                answers = [function(run.count - 1, metrics) for function in functions]
                if any(answers):
                    return TuneStatus.STOPPED
                run = run._replace(answered=run.count)
            return _verdict(run, steps, max_failures, patience)

        def follow(interrupts: Interrupts, show: Callable[[dict[str, Any], int], None]) -> TuneStatus:
            """Step after step until the run is over. No `try` around the loop itself: see below."""
            nonlocal run, batches
            status = ask() if run.count else None  # a resumed run may have ended, or been stopped by a callback
            while status is None:
                batches = batches or pull(streams, next_train, next_valid)
                loop, used, report = advance(run.loop, *batches, step_key)
                metrics = note(notes, run.count, report)
                run, batches = _next_run(run, loop, used, metrics, respond, streams), None
                interrupts.check()
                show(metrics, run.skipped)
                if run.count == 1 and metrics["status"] == Status.INSENSITIVE:
                    _warn(f"tune: {Status.INSENSITIVE.advice}")
                status = ask()
                if run.count % every == 0:
                    with interrupts.held():
                        save(keeper, run, notes)
            return status

        try:
            # CPython leaves the jump back to a loop's head out of the `try` around it (seen in 3.12 and 3.13), and runs
            # signal handlers on that jump: one interrupt in some two hundred went past `except`.
            with interruptible() as interrupts, progress_bar(steps, run.count, show=progress) as show:
                status = follow(interrupts, show)
        except KeyboardInterrupt:
            if not run.count:
                raise
            status = TuneStatus.INTERRUPTED
        except BaseException as error:
            if run.count:
                save(keeper, run, notes)
                _attach(error, functools.partial(finish, TuneStatus.RAISED))
            raise
        save(keeper, run, notes)
        if status is TuneStatus.FAILED:
            _warn_failed(run, notes)
        return finish(status)


def _next_run(
    run: Run,
    loop: Loop,
    used: PyTree,
    metrics: dict[str, Any],
    respond: Callable[[Any, PyTree], PyTree],
    streams: Mapping[str, Stream],
) -> Run:
    good = usable(metrics)
    best = run.best
    if good and not metrics["value"] >= best.value:  # the first best value is NaN
        best = Best(run.count, metrics["value"], used, respond(loop.solver, used))
    return Run(
        loop=loop,
        count=run.count + 1,
        best=best,
        used=used,
        skipped=run.skipped + (not good),
        in_a_row=0 if good else run.in_a_row + 1,
        answered=run.answered,
        cursors={name: Cursor(stream.position, stream.recent[-1]) for name, stream in streams.items()},
    )


def _verdict(run: Run, steps: int, max_failures: int, patience: int | None) -> TuneStatus | None:
    """Why the run ends here; None if it goes on."""
    if run.in_a_row >= max_failures:
        return TuneStatus.FAILED
    if patience is not None and run.best.step >= 0 and run.count - 1 - run.best.step >= patience:
        return TuneStatus.CONVERGED
    if run.count >= steps:
        return TuneStatus.FINISHED if run.best.step >= 0 else TuneStatus.FAILED
    return None


def _check_arguments(
    solver: Any, params: PyTree, outer: Any, steps: Any, max_failures: Any, patience: Any, callbacks: Any, key: Any
) -> tuple[Callback, ...]:
    if not (callable(getattr(outer, "init", None)) and callable(getattr(outer, "update", None))):
        found = getattr(outer, "__name__", type(outer).__name__)
        raise InputTypeError(
            f"tune: outer must be an optax GradientTransformation, found {found}: write optax.adam(3e-2), for example."
        )
    old_key = getattr(key, "dtype", None) == jnp.uint32 and key.shape == (2,)
    if key is not None and not old_key and not (_tree.is_key(key) and key.shape == ()):
        raise InputTypeError(f"tune: key must be one PRNG key, found {key!r}: write jax.random.key(0).")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise InputTypeError(
            "tune: params is traced, but tune is a loop on the host: call it outside jit, grad and vmap."
        )
    functions = (callbacks,) if callable(callbacks) else callbacks
    if isinstance(functions, Iterable) and all(map(callable, functions := tuple(functions))):
        return functions
    raise InputTypeError(
        f"tune: callbacks must be functions fn(step, metrics), found {callbacks!r}: write a function, "
        "or a list of them."
    )


def _attach(error: BaseException, finish: Callable[[], Result]) -> None:
    with contextlib.suppress(Exception):  # the caller's own error matters more
        setattr(error, "result", finish())  # noqa: B010, exceptions declare no such attribute
        error.add_note("hypergrad: the run up to here is in this exception's attribute `result`.")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=caller_level())


def _warn_failed(run: Run, notes: Notes) -> None:
    last = notes.rows[run.count - 1].scalars["status"]
    advice = f"{status_name(last)}: {Status(last).advice}" if last in set(Status) else status_name(last)
    best = (
        f"result.best holds the best step before, {run.best.step} with outer loss {run.best.value:.6g}."
        if run.best.step >= 0
        else "No step before it was usable: result.best is the start."
    )
    _warn(f"tune: stopped after {run.in_a_row} unusable hypergradients in a row. {best} The last was {advice}")

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
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._checks import check_finite, check_hparams, check_options, check_same_structure, suggest_names
from hypergrad._data import Minibatches, Stream, kind, prepare
from hypergrad._domain import settle, to_constrained, to_unconstrained
from hypergrad._labels import check_concrete_data, check_solver_labels
from hypergrad._sensitivity import caller_level
from hypergrad._solver import Hypergradient, InputError, InputTypeError, Solver, Status
from hypergrad._tree import PyTree, keystr
from hypergrad.outer._progress import Callback, progress_bar
from hypergrad.outer._result import SCALARS, TRAJECTORY, Best, Result, Row, TuneStatus, make_history, status_name


class _Loop(NamedTuple):
    """Everything that the next step needs beside data and key: what a checkpoint has to hold."""

    step: Array
    solver: Any
    free: PyTree  # unconstrained hyperparameters
    outer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Report:
    """What one step sends to the host: one vector, so that one transfer brings it."""

    vector: Array  # SCALARS, metrics, extra, then hyperparameters or their summary
    metrics: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    extra: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class _Record:
    """The host's notes."""

    best: Best
    rows: list[Row] = dataclasses.field(default_factory=list)
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    skipped: int = 0
    in_a_row: int = 0


@suggest_names
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
) -> Result:
    """Tune hyperparameters by gradient descent on the outer loss.

    A step whose status is not usable (see `hg.Status`), or whose hypergradient or update is not finite, changes neither
    the hyperparameters nor the outer optimizer; the solver's state advances, so that an unconverged solve goes on where
    it stopped. Ctrl-C returns what there is. An exception raised by a callback or by the data propagates with its type;
    its attribute `result` holds what there is.

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

    Returns:
        See `hg.outer.Result`: `hparams`, `params`, `best`, `history`, `status`, `state`. Print it for a summary.

    Raises:
        InputError: for hyperparameters outside their domain, data that are empty, unpaired or labelled outside their
            classes, a missing key, options out of range.
        InputTypeError: for a solver, optimizer, callback, key or leaf of the wrong type.

    Warns:
        UserWarning: if the run stops because of unusable steps, if no hyperparameter moves the outer loss, or for NaN
            in the data.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=optax.adam(0.1), steps=200,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 2)
    1.0
    """
    started = time.perf_counter()
    functions = _check_arguments(solver, params, outer, steps, max_failures, patience, callbacks, key)
    hparams = check_hparams(hparams)
    check_finite("hparams", hparams)
    free = to_unconstrained(domain, hparams)
    next_train, next_valid = _source("train", train, key), _source("valid", valid, key)
    init_key, step_key = (None, None) if key is None else jax.random.split(key)
    state = solver.init(params, hparams, key=init_key, model_state=model_state)
    batches = next_train(), next_valid()
    check_solver_labels(solver, state, hparams, *batches, step_key)
    loop = _Loop(*(_strong(part) for part in (jnp.int32(0), state, free, outer.init(free))))
    advance, respond = jax.jit(_make_step(solver, outer, domain)), jax.jit(solver.response)
    record = _Record(Best(-1, float("nan"), hparams, params))

    def finish(status: TuneStatus) -> Result:
        final = to_constrained(domain, loop.free)
        history = make_history(record.rows, final, *record.names)
        return Result(final, respond(loop.solver, final), record.best, history, status, loop.solver, loop.outer)

    status = TuneStatus.FINISHED
    try:
        with progress_bar(steps, show=progress) as show:
            for step in range(steps):
                batches = batches if step == 0 else (next_train(), next_valid())
                loop, used, report = advance(loop, *batches, step_key)
                metrics = _note(record, report, started) | {"hparams": used}
                if _usable(metrics) and not metrics["value"] >= record.best.value:  # the first best value is NaN
                    record.best = Best(step, metrics["value"], used, respond(loop.solver, used))
                show(metrics, record.skipped)
                if step == 0 and metrics["status"] == Status.INSENSITIVE:
                    _warn(f"tune: {Status.INSENSITIVE.advice}")
                answers = [function(step, metrics) for function in functions]
                if any(answers):
                    status = TuneStatus.STOPPED
                    break
                if record.in_a_row >= max_failures:
                    status = TuneStatus.FAILED
                    break
                if patience is not None and record.best.step >= 0 and step - record.best.step >= patience:
                    status = TuneStatus.CONVERGED
                    break
    except KeyboardInterrupt:
        if not record.rows:
            raise
        status = TuneStatus.INTERRUPTED
    except Exception as error:
        if record.rows:
            _attach(error, functools.partial(finish, TuneStatus.RAISED))
        raise
    if status is TuneStatus.FINISHED and record.best.step < 0:
        status = TuneStatus.FAILED
    if status is TuneStatus.FAILED:
        _warn_failed(record)
    return finish(status)


def _make_step(solver: Solver, outer: Any, domain: PyTree) -> Callable[..., tuple[_Loop, PyTree, _Report]]:
    """`(loop, train, valid, key) -> (loop, hparams used, report)`, to be compiled once."""
    update = optax.with_extra_args_support(outer).update

    def advance(loop: _Loop, train: PyTree, valid: PyTree, key: Array | None) -> tuple[_Loop, PyTree, _Report]:
        hparams, pull = jax.vjp(functools.partial(to_constrained, domain), loop.free)
        key = None if key is None else jax.random.fold_in(key, loop.step)
        out, state = solver.hypergrad(loop.solver, hparams, train, valid, key=key)
        _check_output(out, hparams)
        (grad,) = pull(jax.tree.map(lambda g, h: jnp.asarray(g).astype(h.dtype), out.grad, hparams))
        try:
            updates, outer_state = update(grad, loop.outer, loop.free, value=out.value, grad=grad)
        except TypeError as error:
            raise InputTypeError(
                f"tune: outer cannot take a step from a gradient and a value alone ({error}): use "
                "optax.adam or optax.sgd, and optax.lbfgs with linesearch=None."
            ) from error
        free = settle(domain, optax.apply_updates(loop.free, updates), loop.free)
        # An optimizer's state that overflows (a second moment of 1e60) would silently stop all later steps.
        sound = _tree.all_finite((out.grad, grad, free)) & (
            _tree.all_finite(outer_state) | ~_tree.all_finite(loop.outer)
        )
        status = jnp.asarray(out.info.status, jnp.int32)
        bad = jnp.where(jnp.isfinite(out.value), int(Status.NONFINITE_GRAD), int(Status.NONFINITE_LOSS))
        status = jnp.where((status <= int(Status.INSENSITIVE)) & ~(sound & jnp.isfinite(out.value)), bad, status)
        usable = status <= int(Status.INSENSITIVE)
        new = _strong(_Loop(loop.step + 1, state, *_tree.where(usable, (free, outer_state), (loop.free, loop.outer))))
        _check_stable(new, loop)
        return new, hparams, _make_report(out, status, hparams)

    return advance


def _make_report(out: Hypergradient, status: Array, hparams: PyTree) -> _Report:
    info = out.info
    scalars = {"value": out.value, "grad_norm": _tree.norm(jax.tree.map(jnp.asarray, out.grad)), "status": status}
    scalars |= {name: getattr(info, name) for name in SCALARS if name not in scalars}
    scalars |= {name: jnp.asarray(scalars[name]).astype(jnp.int32) for name in ("inner_steps", "linear_steps")}
    values = [*scalars.values(), *out.metrics.values(), *info.extra.values()]
    leaves = jax.tree.leaves(hparams)
    if _tree.size(hparams) <= TRAJECTORY:
        parts = [leaf.ravel() for leaf in leaves]
    else:
        parts = [
            jnp.stack([leaf.min(), leaf.mean(), leaf.max()]) if leaf.size else jnp.full(3, jnp.nan, leaf.dtype)
            for leaf in leaves
        ]
    dtype = _tree.dtype([jnp.asarray(value) for value in (*values, *leaves)])
    vector = jnp.concatenate(
        [jnp.stack([jnp.asarray(value).astype(dtype) for value in values]), *(part.astype(dtype) for part in parts)]
    )
    return _Report(vector, tuple(out.metrics), tuple(info.extra))


def _note(record: _Record, report: _Report, started: float) -> dict[str, Any]:
    """Wait for a step and write down what it reports; returns it as Python numbers."""
    vector = np.asarray(report.vector)
    names = (*SCALARS, *report.metrics, *report.extra)
    metrics: dict[str, Any] = dict(zip(names, vector.tolist(), strict=False))
    metrics |= {name: int(metrics[name]) for name in ("status", "inner_steps", "linear_steps")}
    metrics["seconds"] = time.perf_counter() - started
    usable = _usable(metrics)
    record.names = report.metrics, report.extra
    record.skipped += not usable
    record.in_a_row = 0 if usable else record.in_a_row + 1
    record.rows.append(Row(metrics, vector[len(names) :]))  # in one piece, since Ctrl-C may come at any instant
    return metrics


def _usable(metrics: dict[str, Any]) -> bool:
    return metrics["status"] <= Status.INSENSITIVE


def _source(name: str, data: PyTree, key: Array | None) -> Callable[[], PyTree]:
    """A function that gives the data of the next outer step, on the device."""
    if isinstance(data, Minibatches) and key is None:
        raise InputError(
            f"tune: {name} is hg.minibatches, which draws rows at random, but key is None: pass key=jax.random.key(0)."
        )
    if isinstance(data, Stream):
        return functools.partial(_pull, name, data, [])
    data = prepare(name, data)
    check_concrete_data(name, data)
    data = jax.tree.map(jnp.asarray, data)
    return lambda: data


def _pull(name: str, data: Stream, first: list[Any]) -> PyTree:
    batches = data.next()
    found = kind(batches.batches)
    if not first:
        first.append(found)
    if found != first[0]:
        raise InputError(
            f"tune: the batches of {name} changed from {first[0]} to {found} (first axis: their number): "
            "every shape needs a compilation of its own: drop or pad the odd batch."
        )
    return batches


def _strong(tree: PyTree) -> PyTree:
    """Arrays without weak types, so that the second call has the types of the first."""
    return jax.tree.map(lambda x: x if _tree.is_key(x) else jnp.asarray(x, jnp.result_type(x)), tree)


def _check_output(out: Any, hparams: PyTree) -> None:
    if not isinstance(out, Hypergradient):
        raise InputTypeError(
            f"tune: solver.hypergrad must return (hg.Hypergradient, state), found {type(out).__name__} first."
        )
    if jnp.shape(out.value) != ():
        raise InputError(f"tune: the outer loss must be a scalar, found shape {jnp.shape(out.value)}: take its mean.")
    check_same_structure("the hypergradient", out.grad, hparams, "it must be a pytree like hparams.")
    reported = out.info._asdict() | out.info.extra | out.metrics
    reported.pop("extra")
    for name, value in reported.items():
        if jnp.shape(value) != ():
            raise InputError(f"tune: the solver reports {name} of shape {jnp.shape(value)}, not a scalar: reduce it.")
    taken = [name for name in out.metrics if name in (*SCALARS, "seconds", "hparams", *out.info.extra)]
    if taken:
        raise InputError(f"tune: outer_loss returned a metric named {taken[0]!r}, a name that is taken: rename it.")


def _check_stable(new: _Loop, old: _Loop) -> None:
    remedy = "a step must return the state with which it can be called again."
    for part, found, expected in (
        ("state of the solver", new.solver, old.solver),
        ("state of outer", new.outer, old.outer),
    ):
        check_same_structure(part, found, expected, remedy)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            if x.dtype != y.dtype:
                raise InputTypeError(f"tune: {part}{keystr(path)} changed from {y.dtype} to {x.dtype}: {remedy}")


def _check_arguments(
    solver: Any, params: PyTree, outer: Any, steps: Any, max_failures: Any, patience: Any, callbacks: Any, key: Any
) -> tuple[Callback, ...]:
    if not all(callable(getattr(solver, name, None)) for name in ("init", "hypergrad", "response")):
        raise InputTypeError(
            f"tune: solver must be an hg.Solver, found {type(solver).__name__}: "
            "write hg.implicit(problem), or another method."
        )
    if not (callable(getattr(outer, "init", None)) and callable(getattr(outer, "update", None))):
        found = getattr(outer, "__name__", type(outer).__name__)
        raise InputTypeError(
            f"tune: outer must be an optax GradientTransformation, found {found}: write optax.adam(3e-2), for example."
        )
    check_options("tune", steps=steps, max_failures=max_failures, patience=patience)
    if steps is None or steps < 1:
        raise InputError(f"tune: steps must be at least 1, found {steps!r}: write how many outer steps to take.")
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


def _attach(error: Exception, finish: Callable[[], Result]) -> None:
    with contextlib.suppress(Exception):  # the caller's own error matters more
        setattr(error, "result", finish())  # noqa: B010, exceptions declare no such attribute
        error.add_note("hypergrad: the run up to here is in this exception's attribute `result`.")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=caller_level())


def _warn_failed(record: _Record) -> None:
    last = record.rows[-1].scalars["status"]
    advice = f"{status_name(last)}: {Status(last).advice}" if last in set(Status) else status_name(last)
    best = (
        f"result.best holds the best step before, {record.best.step} with outer loss {record.best.value:.6g}."
        if record.best.step >= 0
        else "No step before it was usable: result.best is the start."
    )
    _warn(f"tune: stopped after {record.in_a_row} unusable hypergradients in a row. {best} The last was {advice}")

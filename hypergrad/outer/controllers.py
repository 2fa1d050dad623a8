r"""What moves the hyperparameters: the contract for outer methods that set accuracies, or reject a step.

    s = prepare(outer, solver);   out, s' = hypergrad(s, T(trial));   next, outer, ok = update(grad, outer, trial, out)
    ok:  solver, free ← s', trial        else:  both stay, bit for bit        then  trial ← next

An optax transformation is the controller that always accepts, and needs none of this: pass it to `hg.tune` as it is. A
controller is what diffrax calls a step size controller and optimistix a search: it sees a trial point, and decides
whether the run moves there. `hg.tune` takes care of the loop, the counting, the failures and the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._data import Minibatches, Stream
from hypergrad._solver import Hypergradient, Info, InputError, InputTypeError, Solver
from hypergrad._tree import PyTree, keystr


class ControllerInitFn(Protocol):
    """`init(free) -> outer`: the controller's state, a pytree of arrays. `free` are the unconstrained hyperparameters
    at the start, which are also the first trial.
    """

    def __call__(self, free: PyTree, /) -> Any:
        """Return the state before any decision."""


class ControllerUpdateFn(Protocol):
    """`update(grad, outer, free, out) -> (next, outer, accepted)`; pure, traced once.

    `grad` is the derivative of the outer loss with respect to `free`, the trial that was just evaluated, and `out` is
    what the solver returned there: `out.value`, `out.info`. A trial that is not usable, or not finite, arrives with
    value inf and gradient 0 and with its `info`; it is never accepted, even if `accepted` is true, and the next trial
    should be at least ten times closer to the last accepted point. `next` is the next trial, a pytree like `free`; it
    may be moved slightly to stay inside its domain, so measure lengths from the `free` that is given, never from the
    point that was proposed. The first usable point of a run is always accepted.
    """

    def __call__(self, grad: PyTree, outer: Any, free: PyTree, out: Hypergradient, /) -> tuple[PyTree, Any, Array]:
        """Return the next trial, the new state, and whether this trial is accepted."""
        ...


class PrepareFn(Protocol):
    """`prepare(outer, solver) -> solver`: returns the solver's state with other options, before it is used.

    Set options to absolute values, by `hg.outer.set_options`, and only those that `solver.about.options` names.
    """

    def __call__(self, outer: Any, solver: Any, /) -> Any:
        """Return the solver's state with the options to use."""


class JudgeFn(Protocol):
    """`judge(value, outer, free, info) -> (next, outer, accepted)`: a decision on the outer loss alone.

    Where `judge` is given, `solver.evaluate` runs first. Only if the trial `free` is accepted do `hypergrad`, which
    starts from the result of `evaluate`, and `update` run; otherwise `next` is the next trial. `value` is inf where the
    trial is not usable, or not finite.
    """

    def __call__(self, value: Array, outer: Any, free: PyTree, info: Info, /) -> tuple[PyTree, Any, Array]:
        """Return the trial after a rejection, the new state, and whether this trial is accepted."""
        ...


def identity(outer: Any, solver: Any) -> Any:
    """The `prepare` of a controller that sets no options."""
    return solver


class Controller(NamedTuple):
    """An outer method that may reject a trial point or set the solver's accuracies: four pure functions and a flag.

    Attributes:
        init: see `ControllerInitFn`.
        update: see `ControllerUpdateFn`.
        prepare: see `PrepareFn`; by default no options are set.
        judge: see `JudgeFn`; None to decide in `update` alone.
        compares: whether values of different steps are compared. If True, one key serves the whole run,
            `hg.minibatches` and `hg.stream` are refused, and `result.best` is the last accepted point instead of the
            one with the lowest value, because values were computed to different accuracies.

    This example is gradient descent that halves its step until the outer loss falls:

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> def init(u):
    ...     return {"u": u, "g": jnp.zeros_like(u), "value": jnp.inf, "step": 1.0}
    >>> def update(grad, s, u, out):
    ...     ok = out.value < s["value"]
    ...     shorter = s | {"step": jnp.where(jnp.isfinite(out.value), s["step"] / 2, s["step"] / 10)}
    ...     taken = {"u": u, "g": grad, "value": out.value, "step": s["step"]}
    ...     s = {name: jnp.where(ok, taken[name], shorter[name]) for name in s}
    ...     return s["u"] - s["step"] * s["g"], s, ok
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=hg.outer.Controller(init, update), steps=100,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 2), all(result.history.accepted)
    (1.0, False)
    """

    init: ControllerInitFn
    update: ControllerUpdateFn
    prepare: PrepareFn = identity
    judge: JudgeFn | None = None
    compares: bool = False


def set_options(solver: Any, options: Mapping[str, ArrayLike]) -> Any:
    """Return a solver's state with other values of its traced options, for a controller's `prepare` or your own loop.

    Args:
        solver: the state of a solver whose options are a nested dict `solver.options`.
        options: new values by name, as in `solver.about.options`.

    Returns:
        The state with the new values; the dtypes of the options do not change.

    Raises:
        InputError: for an option that the state does not have.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> solver = hg.implicit(hg.Problem(lambda w, l, b: jnp.sum(w**2 - w * l), lambda w, l, b: jnp.sum(w)))
    >>> state = hg.outer.set_options(solver.init(jnp.ones(3), 0.5), {"inner.tol": 1e-3})
    >>> round(1 / float(state.options["inner"]["tol"]))
    1000
    """
    table = getattr(solver, "options", None)
    for name, value in options.items():
        table = _replaced(table, name.split("."), value, name)
    return solver._replace(options=table) if options else solver


def _replaced(table: Any, path: list[str], value: ArrayLike, name: str) -> dict[str, Any]:
    if not isinstance(table, Mapping) or path[0] not in table:
        raise _NoOptionError(name)
    old = table[path[0]]
    if len(path) > 1:
        return dict(table) | {path[0]: _replaced(old, path[1:], value, name)}
    if isinstance(old, Mapping):
        raise _NoOptionError(name)
    return dict(table) | {path[0]: jnp.broadcast_to(jnp.asarray(value), jnp.shape(old)).astype(jnp.result_type(old))}


class _NoOptionError(InputError):
    def __init__(self, name: str):
        super().__init__(f"set_options: the solver has no option {name}: the `options` of its state holds all of them.")
        self.name = name


def check_controller(controller: Controller, solver: Solver, state: Any, outer: Any, data: Mapping[str, Any]) -> None:
    """Raise for a controller that cannot work with this solver, or with these data.

    Args:
        controller: controller of the run.
        solver: solver of the run.
        state: the solver's state at the start.
        outer: the controller's state at the start.
        data: `train` and `valid`, by name.

    Raises:
        InputError: for options that the solver does not have, and for data that differ from step to step where values
            of different steps are compared.
    """
    for name, found in data.items():
        if controller.compares and isinstance(found, (Minibatches, Stream)):
            kind = "hg.minibatches" if isinstance(found, Minibatches) else "hg.stream"
            raise InputError(
                f"tune: outer compares the losses of different steps, but {name} is {kind}, so that the loss differs "
                "from step to step: pass the arrays themselves, or an optax optimizer as outer."
            )
    if controller.prepare is not identity:
        _check_prepare(controller, solver, state, outer)


def _check_prepare(controller: Controller, solver: Solver, state: Any, outer: Any) -> None:
    names = [part for part in getattr(controller.prepare, "__qualname__", "outer").split(".") if part != "<locals>"]
    name = names[-2] if len(names) > 1 else names[0]  # the name of the function that made it: `hoag` for `hoag.prepare`
    method = solver.about.name or "this solver"
    try:
        traced, shapes = jax.make_jaxpr(controller.prepare, return_shape=True)(outer, state)
    except _NoOptionError as error:
        raise InputError(_no_option(name, method, error.name, solver)) from None
    before = {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    given = dict(zip(before, traced.jaxpr.invars[len(jax.tree.leaves(outer)) :], strict=True))
    found = dict(zip(_paths(shapes), traced.jaxpr.outvars, strict=True))
    for path, entries in _paths(shapes).items():
        if path in given and found[path] is given[path]:
            continue
        option = _option(entries)
        if option is None:
            raise InputError(
                f"{name}: prepare changes {path or 'the whole state'} of {method}, which is not an option: set options "
                "alone, by hg.outer.set_options."
            )
        if option not in solver.about.options or path not in given:
            raise InputError(_no_option(name, method, option, solver))
    shapes_before = jax.eval_shape(lambda tree: tree, state)
    if jax.tree.structure(shapes) != jax.tree.structure(shapes_before):
        raise InputError(f"{name}: prepare changes the structure of the state of {method}: set options alone.")
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shapes_before), strict=True
    ):
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise InputTypeError(
                f"{name}: prepare sets {keystr(path)} to {new.dtype}{list(new.shape)}, expected "
                f"{old.dtype}{list(old.shape)}: hg.outer.set_options keeps the dtype."
            )


def _paths(tree: PyTree) -> dict[str, tuple[Any, ...]]:
    return {keystr(path): path for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _option(path: tuple[Any, ...]) -> str | None:
    """`inner.tol` for `.options['inner']['tol']`; None for a leaf that is not an option."""
    names = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path]
    return ".".join(names[1:]) if names[:1] == ["options"] and len(names) > 1 else None


def _no_option(controller: str, method: str, option: str, solver: Solver) -> str:
    known = ", ".join(solver.about.options)
    hint = f"those that may be set are {known}" if known else "its about.options names no option that may be set"
    return f"{controller}: {method} has no {option}: {hint}."

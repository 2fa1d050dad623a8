r"""One solver for many tasks that share hyperparameters: folds, few-shot episodes, seeds.

    F(λ) = (1/k) Σᵢ fᵢ(wᵢ*(λ), λ),    g = (1/k) Σᵢ gᵢ

Each task has its own parameters, data, key and status; they are solved side by side by `vmap`.
Source: the bilevel form of meta-learning in Franceschi et al. 2018, arXiv:1806.04910; cross-validation as a bilevel
problem in Bennett et al. 2006, "Model selection via bilevel optimization".
Differs: a task that fails is left out of the mean and counted, because one diverged episode of forty is no reason to
discard the step.
Cost: that of the solver on k problems at once. Memory: k states; data that the tasks share (`hg.folds`) are not copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_finite, check_hparams, check_params
from hypergrad._data import Minibatches, Stacked
from hypergrad._options import SOLVER, Choice, Number, options
from hypergrad._solver import (
    Hypergradient,
    Info,
    InputError,
    Solver,
    Status,
    evaluation,
    usable,
)
from hypergrad._tree import PyTree, keystr
from hypergrad.folds import Fold
from hypergrad.solvers._call import owned


class TasksState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        states: the solver's states, stacked: every leaf has a leading axis of tasks.
        options: the solver's options, shared by all tasks; None for a solver without options.
    """

    states: Any
    options: Any


@options(solver=SOLVER, count=Number(least=1, integer=True, static=True), failed=Choice(("skip", "fail")))
def tasks(solver: Solver, *, count: int | None = None, failed: str = "skip", params_axis: int | None = None) -> Solver:
    """Apply a solver to many tasks that share hyperparameters, along a leading axis of tasks.

    `init` takes the parameters of one task (or of all, see `params_axis`); `hypergrad` takes data whose leaves carry a
    leading axis of tasks, `[k, ...]`. What `hg.folds` returns is recognised, and its arrays are shared. One key is
    split into one for each task; keys `[k]` are used as they are. `response` returns the parameters of all tasks.

    Args:
        solver: any `hg.Solver`.
        count: k, the number of tasks. Needed where neither the parameters nor the key given to `init` carry the axis.
        failed: `"skip"`: tasks whose status is not usable are left out of the mean, and the status is OK as long as one
            task is usable. `"fail"`: one such task makes the call fail; the mean is over all tasks, with whatever the
            failed ones returned.
        params_axis: None if `init` is given the parameters (and model state) of one task, from which all tasks start; 0
            if their leaves carry the leading axis.

    Returns:
        A `Solver`. `value`, `grad` and `metrics` are means over the tasks that are not left out; a residual is the
        largest over these tasks, and a number of steps is the sum over all tasks. `info.error_estimate` is a bound that
        follows from those of the tasks by the triangle inequality, relative to the mean. `info.extra["failed_tasks"]`
        counts the tasks whose status is not usable.

    Raises:
        InputError: for a number of tasks that is unknown, less than one, or different from that of the data, naming the
            path; for `hg.minibatches`, which draw rows rather than tasks.
        InputTypeError: for something that is not a solver.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l2, batch: jnp.sum((w - batch)**2) + l2 * jnp.sum(w**2),
    ...                      lambda w, l2, batch: jnp.sum((w - batch)**2))
    >>> solver = hg.tasks(hg.implicit(problem), count=3)
    >>> state = solver.init(jnp.zeros(()), 0.5)
    >>> out, state = solver.hypergrad(state, 0.5, jnp.array([1.0, 2.0, 3.0]), jnp.ones(3))
    >>> solver.response(state, 0.5).shape, int(out.info.extra["failed_tasks"])
    ((3,), 0)
    """
    if params_axis not in (None, 0) or isinstance(params_axis, bool):
        raise InputError(f"tasks: params_axis must be None or 0, found {params_axis!r}: move the axis of tasks first.")

    def init(params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None) -> TasksState:
        params, hparams = check_params(params), check_hparams(hparams)
        check_finite("model_state", model_state)
        given = (params, model_state) if params_axis == 0 else (None, None)
        k = _length({"params": given[0], "model_state": given[1]}, count if count is not None else _many(key))
        each = lambda w, m, key: solver.init(w, hparams, key=key, model_state=m)
        states = jax.vmap(each, in_axes=(params_axis, params_axis, 0), axis_size=k)(params, model_state, _keys(key, k))
        return _shelve(states)

    def hypergrad(
        state: TasksState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, TasksState]:
        hparams = check_hparams(hparams)
        out, states = _each(solver.hypergrad, state, hparams, train, valid, key)
        ok = usable(out.info.status)
        kept = ok if failed == "skip" else jnp.ones_like(ok)
        mean = lambda x: _mean(kept, x)
        grad = jax.tree.map(mean, out.grad)
        info = _combine(out.info, ok, kept, error=_error(out, kept, grad))
        return Hypergradient(mean(out.value), grad, info, jax.tree.map(mean, out.metrics)), _shelve(states)

    def evaluate(
        state: TasksState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, TasksState]:
        hparams = check_hparams(hparams)
        value, info, states = _each(evaluation(solver), state, hparams, train, valid, key)
        ok = usable(info.status)
        kept = ok if failed == "skip" else jnp.ones_like(ok)
        return _mean(kept, value), _combine(info, ok, kept, jnp.max(info.error_estimate)), _shelve(states)

    def response(state: TasksState, hparams: PyTree) -> PyTree:
        return jax.vmap(lambda s: solver.response(_unshelve(s, state.options), hparams))(state.states)

    about = solver.about._replace(name=f"hg.tasks({solver.about.name})") if solver.about.name else solver.about
    return Solver(owned(init), hypergrad, response, evaluate, about)


def _each(method: Any, state: TasksState, hparams: PyTree, train: PyTree, valid: PyTree, key: Array | None) -> Any:
    """Apply one of the solver's functions to every task."""
    k = jax.tree.leaves(state.states)[0].shape[0]
    axes = tuple(_data_axes(name, data, k) for name, data in (("train", train), ("valid", valid)))

    def one(states: Any, train: PyTree, valid: PyTree, key: Array | None) -> Any:
        return method(_unshelve(states, state.options), hparams, train, valid, key=key)

    return jax.vmap(one, in_axes=(0, *axes, 0), axis_size=k)(state.states, train, valid, _keys(key, k))


def _mean(ok: Array, x: Array) -> Array:
    """Mean over the tasks that count; NaN if there are none. The other tasks may hold any values."""
    share = ok.reshape(-1, *(1,) * (jnp.ndim(x) - 1))
    number = jnp.sum(ok).astype(x.dtype)
    return jnp.sum(jnp.where(share, x, 0), axis=0) / jnp.where(number > 0, number, jnp.nan)


def _combine(info: Info, ok: Array, kept: Array, error: Array) -> Info:
    codes = jnp.asarray(info.status, jnp.int32)
    first = codes[jnp.argmax(~ok)]
    limited = jnp.any(ok & (codes == int(Status.PRECISION_LIMITED)))
    settled = jnp.any(codes == int(Status.OK))
    good = jnp.where(
        limited, int(Status.PRECISION_LIMITED), jnp.where(settled, int(Status.OK), int(Status.INSENSITIVE))
    )
    enough = jnp.any(ok) & jnp.all(ok | ~kept)
    largest = lambda x: jnp.max(jnp.where(kept | ~jnp.any(kept), x, -jnp.inf))
    left = jnp.sum(~ok).astype(jnp.int32)
    return Info(
        status=jnp.where(enough, good, first).astype(jnp.int32),
        inner_residual=largest(info.inner_residual),
        linear_residual=largest(info.linear_residual),
        inner_steps=jnp.sum(info.inner_steps).astype(jnp.int32),
        linear_steps=jnp.sum(info.linear_steps).astype(jnp.int32),
        error_estimate=error,
        extra={name: _mean(kept, jnp.asarray(x)) for name, x in info.extra.items()} | {"failed_tasks": left},
    )


def _error(out: Hypergradient, ok: Array, grad: PyTree) -> Array:
    """‖Σ errorᵢ‖ ≤ Σ ‖errorᵢ‖, relative to the mean; inf where nothing is known."""
    norms = jax.vmap(_tree.norm)(out.grad)
    total = _mean(ok, jnp.where(norms > 0, out.info.error_estimate * norms, 0))
    size = _tree.norm(grad)
    error = _tree.safe_divide(total, size, otherwise=jnp.where(total > 0, jnp.inf, 0))
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def _shelve(states: Any) -> TasksState:
    """Options are stored once, so that they can be replaced in the same way as those of a single solver."""
    options = getattr(states, "options", None)
    if options is None:
        return TasksState(states, None)
    return TasksState(states._replace(options=None), jax.tree.map(lambda x: x[0], options))


def _unshelve(state: Any, options: Any) -> Any:
    return state if options is None else state._replace(options=options)


def _many(key: Array | None) -> int | None:
    """The number of keys that are given; None for a single key, or without a key."""
    if key is None or not jnp.shape(key):
        return None
    return key.shape[0] if _tree.is_key(key) or len(key.shape) == 2 else None


def _keys(key: Array | None, k: int) -> Array | None:
    if key is None:
        return None
    found = _many(key)
    if found not in (None, k):
        raise InputError(f"tasks: key holds {found} keys for {k} tasks: pass one key, or one for each task.")
    return jax.random.split(key, k) if found is None else key


def _length(trees: dict[str, PyTree], count: int | None) -> int:
    k = None if count is None else int(count)
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.shape(leaf):
                raise InputError(f"tasks: {name}{keystr(path)} is a scalar, without the axis of tasks: stack it.")
            k = leaf.shape[0] if k is None else k
            if leaf.shape[0] != k:
                raise InputError(
                    f"tasks: {name}{keystr(path)} has a leading axis of {leaf.shape[0]} for {k} tasks: the tasks must "
                    "be its first axis, as jnp.stack and hg.folds make it."
                )
    if k is None:
        raise InputError(
            "tasks: the number of tasks is unknown: pass count=5, or parameters with a leading axis of tasks and "
            "params_axis=0."
        )
    return k


def _data_axes(name: str, data: PyTree, k: int) -> Any:
    if isinstance(data, Minibatches):
        raise InputError(
            f"tasks: {name} is hg.minibatches, which draw rows and not tasks: pass arrays with a leading axis of "
            f"{k} tasks, or hg.stream of such batches."
        )
    if isinstance(data, Fold):
        _length({f"{name}.weight": data.weight}, k)
        return Fold(None, 0)  # pyright: ignore[reportArgumentType]
    if isinstance(data, Stacked):  # the batches of several inner steps come first
        return 1
    _length({name: data}, k)
    return 0

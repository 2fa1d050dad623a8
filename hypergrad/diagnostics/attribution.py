r"""Data attribution: how much each training example mattered for the loss of each query.

    a_qi = d/ds f_q(w*(h + s (h₋ᵢ − h))) at s = 0,   h₋ᵢ = (n h(B) − h({i})) / (n − 1)

This is the hypergradient of the query's loss with one hyperparameter for each example, times the whole step from the
batch B to the batch without i. The method determines what w* is: the optimum (influence functions), or the end of a
training run (the metagradient).

A group G of k examples is left out along the same line. Its score is the sum of the scores of its examples. Where w* is
an optimum with Hessian H, and with ẇ = −H⁻¹∂_wΔ and Δ = h₋G − h, the second-order term adds what the sum leaves out,

    (k − 1)/(n − k) a_qG + ½ ∂²f_q[ẇ, ẇ] − ⟨H⁻¹∂_w f_q, ∂²Δ ẇ + ½ ∂³h[ẇ, ẇ]⟩.

Source: Koh & Liang 2017, arXiv:1703.04730; Basu, You & Feizi 2020, arXiv:1911.00418 (groups); Engstrom et al. 2025,
arXiv:2503.13751 (metagradients). Differs: any solver can be used; the loss without the example is exact instead of
reweighted; the third derivative is kept; each query has the status and the estimated error of its hypergradient.
Cost: the method's training once per chunk of queries, and one derivative of it for each query; with groups and an
optimum, one more solve for each group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._checks import install
from hypergrad._data import Minibatches
from hypergrad._options import Number, options
from hypergrad._problem import PROBLEM, Composed, Problem
from hypergrad._solver import HypergradError, InputError, InputTypeError, Solver, Status, about_of, evaluation, usable
from hypergrad._tree import PyTree
from hypergrad.diagnostics._left_out import Columns, Setting, bytes_of_a_row, columns_of, leave_out, setting
from hypergrad.solvers.implicit import implicit

_ROWS = 64  # rows in a piece above which smaller pieces save memory at hardly any cost in time


class Top(NamedTuple):
    """The examples, or groups, that mattered most for one query; see `Attribution.top`.

    Attributes:
        helpful: columns of `scores` whose removal raises the query's loss most, the largest increase first, `[count]`.
        helpful_scores: their scores, positive unless fewer than `count` help, `[count]`.
        harmful: columns whose removal lowers it most, `[count]`.
        harmful_scores: their scores, `[count]`.
    """

    helpful: np.ndarray
    helpful_scores: np.ndarray
    harmful: np.ndarray
    harmful_scores: np.ndarray


class Attribution(NamedTuple):
    """Predicted effects of leaving out each example, or group; made by `hg.attribute`.

    Attributes:
        scores: predicted change of each query's loss when the example is left out, to first order and in the units of
            the loss, `[queries, examples]` or `[queries, groups]`; NaN in the row of a query whose status is not
            usable.
        status: int code of each query's hypergradient, see `hg.Status`, `[queries]`.
        error_estimate: estimate of the error of a query's scores, relative to their norm, `[queries]`; `inf` where
            nothing is known.
        second_order: term to add to the scores of groups for their removal to second order, `[queries, groups]`. None
            without groups, with minibatches, and where the method does not differentiate an optimum (training without
            the group then costs less than this term).
        names: names of the columns: the labels of groups in sorted order, or row numbers.

    >>> import hypergrad as hg, numpy as np
    >>> scores = np.array([[0.2, -0.1, 0.0]])
    >>> found = hg.diagnostics.Attribution(scores, np.array([0]), np.array([1e-6]), None, (0, 1, 2))
    >>> int(found.top(0, 1).helpful[0]), int(found.top(0, 1).harmful[0])
    (0, 1)
    """

    scores: np.ndarray
    status: np.ndarray
    error_estimate: np.ndarray
    second_order: np.ndarray | None
    names: tuple[Any, ...]

    @property
    def removal(self) -> np.ndarray:
        """The predicted changes, with the second-order term where there is one; otherwise `scores`."""
        return self.scores if self.second_order is None else self.scores + self.second_order

    def top(self, query: int, count: int = 5) -> Top:
        """The columns that mattered most for one query.

        Args:
            query: row of the query.
            count: number of columns of each kind; at most as many as there are columns.

        Raises:
            InputError: for a query that does not exist, or whose status is not usable.
        """
        queries, columns = self.scores.shape
        if not -queries <= query < queries:
            raise InputError(f"top: query must be a row of the {queries} queries, found {query}.")
        status = Status(int(self.status[query]))
        if not status.usable:
            raise InputError(f"top: query {query} has no scores, since its status is {status}: {status.advice}")
        scores = self.removal[query]
        order, count = np.argsort(scores, kind="stable"), max(1, min(int(count), columns))
        helpful, harmful = order[::-1][:count], order[:count]
        return Top(helpful, scores[helpful], harmful, scores[harmful])

    def to_pandas(self) -> Any:
        """Return the scores as a DataFrame: one row per query, one column per example or group, by name.

        Raises:
            HypergradError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise HypergradError(f"to_pandas needs pandas: {install('pandas')}.") from error
        index = pd.RangeIndex(len(self.scores), name="query")
        return pd.DataFrame(self.scores, index=index, columns=pd.Index(list(self.names), name="left out"))

    def __str__(self) -> str:
        """How many scores there are, and which queries have none."""
        queries, columns = self.scores.shape
        lines = [f"Attribution of {queries} queries to {columns} examples or groups, in the units of the outer loss."]
        for code in np.unique(self.status):
            status = Status(int(code))
            found = np.flatnonzero(self.status == code)
            shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
            which = f"{len(found)} of {queries} queries" if status.usable else f"queries {shown} have no scores"
            lines.append(f"{status}: {which}. {'' if status.usable else status.advice}".rstrip())
        finite = self.error_estimate[np.isfinite(self.error_estimate)]
        if finite.size:
            lines.append(f"Estimated relative error of the scores: {finite.max():.1e} at most.")
        return "\n".join(lines)


@options(problem=PROBLEM, memory=Number(above=0, static=True, advice="write a number of bytes"))
def attribute(
    problem: Problem,
    params: PyTree,
    hparams: PyTree,
    train: PyTree,
    queries: PyTree,
    *,
    method: Callable[[Problem], Solver] = implicit,
    groups: Any = None,
    memory: float = 2**30,
    key: Array | None = None,
) -> Attribution:
    """Predict how each query's loss would change if a training example, or a group of them, were left out.

    Args:
        problem: the two losses. The inner loss must be a mean over rows plus a penalty that does not depend on the
            number of rows, which is checked on two halves of the data and on single rows. The outer loss is that of a
            query.
        params: parameters from which the method starts: trained ones for `hg.implicit`, initial ones for `hg.unrolled`.
        hparams: the hyperparameters, any pytree; they stay fixed.
        train: pytree of arrays `[n, ...]`, or `hg.minibatches(arrays, size)` for a training run that draws its batches.
        queries: pytree of arrays `[queries, ...]` in the form that `outer_loss` takes.
        method: a function from a problem to a solver. `hg.implicit` follows the optimum. A training run is followed by
            `lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optax.adam(1e-2), steps=200))`. For influence
            with a damped Gauss-Newton matrix, at parameters that do not move, write `lambda problem:
            hg.implicit(problem, inner=hg.inner.gradient(optax.set_to_zero(), steps=1), curvature="gauss_newton",
            damping=0.1)` with an inner loss made by `hg.compose`. An optimizer that was a function of the
            hyperparameters is given at their values, `optax.sgd(hparams["rate"])`.
        groups: labels `[n]`, or for each group the numbers of its rows; together the groups must cover all rows. None
            for single examples.
        memory: about how many bytes the computation may take in addition to the data, the parameters and what the
            method itself stores of a training run. Queries and rows are computed in chunks that fit.
        key: for losses, minibatches and methods that draw; every query sees the same draws.

    Returns:
        See `Attribution`. A query whose status is not usable has NaN instead of scores.

    Raises:
        InputError: for an inner loss that is not a mean over rows or has a model state, queries that the outer loss
            cannot take, groups that do not cover the rows, or a memory in which a single row does not fit.
        InputTypeError: for a method that is not a function from a problem to a solver, and inside `jit`.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> squares = lambda w, l2, batch: jnp.mean((batch - w)**2)  # w* is the mean of the batch
    >>> train, query = jnp.array([0.0, 1.0, 5.0]), jnp.array([2.5])
    >>> found = hg.attribute(hg.Problem(squares, squares), jnp.zeros(()), None, train, query)
    >>> found.scores.round(3).tolist()  # without the 5 the mean falls by 3/2, and (2.5 - w)² rises
    [[-1.0, -0.5, 1.5]]
    """
    at = setting("attribute", problem, params, hparams, train, queries, key)
    columns = columns_of("attribute", groups, at.rows)
    check_method("attribute", method)
    width, piece = _fit("attribute", problem, at, len(columns.names), memory, key)
    run = _Run(problem, method, at, columns, piece, key)
    second = groups is not None and not isinstance(train, Minibatches) and _follows_an_optimum(run)

    ways = run.second_order(memory) if second else None
    found = [run.scores(chunk, ways) for chunk in chunks(at.queries, at.queried, width)]
    scores, extra, status, error = (np.concatenate(x)[: at.queried] for x in zip(*found, strict=True))
    bad = ~np.asarray(usable(status))[:, None]
    scores, extra = np.where(bad, np.nan, scores), np.where(bad, np.nan, extra)
    return Attribution(scores, status, error, extra if second else None, columns.names)


def check_method(name: str, method: Any) -> None:
    """Raise unless the method can be called with a problem alone.

    Raises:
        InputTypeError: naming what was found and what to write.
    """
    write = "write hg.implicit, or lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optimizer, steps=100))"
    if not callable(method):
        kind = "an hg.Solver, made for one problem" if hasattr(method, "hypergrad") else repr(method)
        raise InputTypeError(
            f"{name}: method must be a function from an hg.Problem to an hg.Solver, found {kind}: {write}."
        )
    try:
        inspect.signature(method).bind(None)
    except TypeError as error:
        raise InputTypeError(
            f"{name}: method must be a function of an hg.Problem alone, and calling it so says: {error}: {write}."
        ) from None
    except ValueError:  # no signature can be read
        pass


def solver_of(name: str, method: Callable[[Problem], Solver], problem: Problem) -> Solver:
    """Return the solver that the method makes for the problem.

    Raises:
        InputTypeError: if the result is not a solver.
    """
    solver = method(problem)
    if not all(callable(getattr(solver, part, None)) for part in ("init", "hypergrad", "response")):
        raise InputTypeError(f"{name}: method must return an hg.Solver, found {type(solver).__name__}.")
    return solver


def chunks(data: PyTree, count: int, width: int) -> list[PyTree]:
    """Return pieces of `width` rows; the last one is filled up with rows from the beginning."""
    index = np.arange(-(-count // width) * width) % count
    return [jax.tree.map(lambda x, j=j: x[index[j : j + width]], data) for j in range(0, len(index), width)]


def batch_rows(at: Setting) -> int:
    """Number of rows of one training batch."""
    return at.train.size if isinstance(at.train, Minibatches) else at.rows


def _fit(
    name: str, problem: Problem, at: Setting, columns: int, memory: float, key: Array | None, copies: int = 12
) -> tuple[int, int]:
    """Number of queries in a chunk, and of rows in a piece, that take about `memory` bytes.

    Each query needs a dozen vectors like the parameters (adjoint, optimizer state, probes), a gradient with one entry
    for each column, and the intermediates of its derivative at each row of a piece.
    """
    row = 2 * max(1, bytes_of_a_row(at, problem, key))
    query = copies * _tree.nbytes(at.params) + 4 * columns * _tree.dtype(at.params).itemsize
    count = batch_rows(at)
    least = count if isinstance(problem.inner_loss, Composed) else 1
    if query + least * row > memory:
        what = "the whole batch of a loss made by hg.compose" if least > 1 else "a single row"
        raise InputError(
            f"{name}: memory must hold one query with {what}, about {query + least * row:.2g} bytes, found "
            f"{memory:g}: give more, or a smaller batch."
        )
    for piece in (count, max(least, min(count, _ROWS)), least):
        width = int(memory // (query + piece * row))
        if width >= at.queried or (width >= 1 and piece <= max(least, _ROWS)):
            if piece < count and least == 1 and width >= at.queried:
                piece = int(min(count, max(1, (memory / at.queried - query) // row)))
            return min(width, at.queried), piece
    return 1, least


def _follows_an_optimum(run: _Run) -> bool:
    made = solver_of("attribute", run.method, run.problem_at(run.at.hparams))
    return about_of(made).differentiates == "optimum"


class _Ways(NamedTuple):
    """How the optimum moves without each group, and the second-order terms; the last chunk of groups is filled up."""

    params: PyTree  # the optimum
    velocity: list[PyTree]  # ẇ of each group
    bend: list[PyTree]  # ∂²Δ ẇ + ½ ∂³h[ẇ, ẇ]
    bad: np.ndarray


class _Run:
    """One call of `attribute`; its compiled functions share what they close over."""

    def __init__(
        self, problem: Problem, method: Any, at: Setting, columns: Columns, piece: int, key: Array | None
    ) -> None:
        self.problem, self.method, self.at, self.columns, self.piece = problem, method, at, columns, piece
        self.init_key, self.call_key = (None, None) if key is None else jax.random.split(key)
        self.single = np.array_equal(columns.row, columns.column) and len(columns.row) == at.rows
        self.zero = jnp.zeros(len(columns.names), _tree.dtype(at.params))
        self.step = (at.rows - 1) / (at.rows - columns.sizes)  # from all rows to the rows without a group
        self.gradient = jax.jit(self._gradient, static_argnames=("forced",))
        self.curved = jax.jit(self._curved)
        self.moved = jax.jit(self._moved)
        self.solved = jax.jit(self._solved)

    def removed(self, s: Array) -> Array:
        """r, the share of each row that is left out."""
        if self.single:
            return s
        return jnp.zeros(self.at.rows, s.dtype).at[self.columns.row].add(s[self.columns.column])

    def problem_at(self, hparams: PyTree, *, forced: bool = False) -> Problem:
        removed = (lambda at: self.removed(at["removed"])) if forced else self.removed
        force = (lambda at: at["force"]) if forced else None
        return leave_out(self.problem, hparams, self.at.rows, removed, self.piece, force)

    def start(self, forced: bool) -> Any:
        return {"removed": self.zero, "force": _tree.zeros_like(self.at.params)} if forced else self.zero

    def _gradient(self, params: PyTree, hparams: PyTree, train: PyTree, chunk: PyTree, *, forced: bool) -> Any:
        solver, here = solver_of("attribute", self.method, self.problem_at(hparams, forced=forced)), self.start(forced)
        state = solver.init(params, here, key=self.init_key)

        def one(query: PyTree) -> Any:
            batch = jax.tree.map(lambda x: x[None], query)
            out = solver.hypergrad(state, here, train, batch, key=self.call_key)[0]
            return out.grad, out.info.status, out.info.error_estimate

        return jax.vmap(one)(chunk)

    def scores(self, chunk: PyTree, ways: _Ways | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Scores, second-order terms (zeros without `ways`), status and error estimate of a chunk of queries."""
        at, forced = self.at, ways is not None
        grad, status, error = self.gradient(
            ways.params if ways else at.params, at.hparams, at.train, chunk, forced=forced
        )
        scores = np.asarray(grad["removed"] if forced else grad)
        extra = np.zeros_like(scores)
        if ways is not None:
            found = [
                np.asarray(self.curved(ways.params, at.hparams, chunk, grad["force"], velocity, bend))
                for velocity, bend in zip(ways.velocity, ways.bend, strict=True)
            ]
            extra = np.concatenate(found, axis=1)[:, : scores.shape[1]] + (self.step - 1) * scores
            extra = np.where(ways.bad, np.nan, extra).astype(scores.dtype)
        return scores, extra, np.asarray(status), np.asarray(error)

    def second_order(self, memory: float) -> _Ways:
        """Solve for how the optimum moves without each group."""
        at, count = self.at, len(self.columns.names)
        params = self.solved(at.params, at.hparams, at.train, jax.tree.map(lambda x: x[:1], at.queries))
        width = int(min(count, max(1, memory // (8 * _tree.nbytes(params)))))
        data = {"group": np.arange(count), "step": np.asarray(self.step, self.zero.dtype)}
        found = [self.moved(params, at.hparams, at.train, chunk) for chunk in chunks(data, count, width)]
        velocity, bend, status = zip(*found, strict=True)
        return _Ways(params, list(velocity), list(bend), ~np.asarray(usable(np.concatenate(status)[:count])))

    def _solved(self, params: PyTree, hparams: PyTree, train: PyTree, query: PyTree) -> PyTree:
        solver, here = solver_of("attribute", self.method, self.problem_at(hparams, forced=True)), self.start(True)
        state = solver.init(params, here, key=self.init_key)
        return solver.response(evaluation(solver)(state, here, train, query, key=self.call_key)[2], here)

    def _moved(self, params: PyTree, hparams: PyTree, train: PyTree, chunk: PyTree) -> tuple[PyTree, PyTree, Array]:
        """ẇ and the second-order term of each group, one after the other."""
        problem = self.problem_at(hparams, forced=True)
        along = Problem(problem.inner_loss, lambda w, at, batch: _tree.vdot(batch["along"], w))
        solver, here = solver_of("attribute", self.method, along), self.start(True)
        state = solver.init(params, here, key=self.init_key)
        inner: Any = problem.inner_loss
        keys = () if self.call_key is None else (self.call_key,)

        def loss(w: PyTree, s: Array) -> Array:
            return inner(w, here | {"removed": s}, train, *keys)

        def one(part: PyTree) -> tuple[PyTree, PyTree, Array]:
            away = part["step"] * jax.nn.one_hot(part["group"], len(self.columns.names), dtype=self.zero.dtype)
            slope = jax.grad(lambda w: jax.jvp(lambda s: loss(w, s), (self.zero,), (away,))[1])  # ∂_wΔ
            out = solver.hypergrad(state, here, train, {"along": slope(params)}, key=self.call_key)[0]
            velocity = out.grad["force"]
            push = lambda f: jax.jvp(f, (params,), (velocity,))[1]
            third = push(lambda w: jax.jvp(jax.grad(lambda w: loss(w, self.zero)), (w,), (velocity,))[1])
            return velocity, _tree.axpy(0.5, third, push(slope)), out.info.status

        return jax.lax.map(one, chunk)

    def _curved(
        self, params: PyTree, hparams: PyTree, chunk: PyTree, force: PyTree, velocity: PyTree, bend: PyTree
    ) -> Array:
        """½ F'' of each query along the removal of each group, `[queries, groups]`."""
        outer = self.problem_at(hparams, forced=True).outer_loss
        keys = () if self.call_key is None else (self.call_key,)

        def one(way: tuple[PyTree, PyTree]) -> Array:
            velocity, bend = way

            def second(query: PyTree, force: PyTree) -> Array:
                loss = lambda w: outer(w, None, jax.tree.map(lambda x: x[None], query), *keys)
                push = lambda f: lambda w: jax.jvp(f, (w,), (velocity,))[1]
                return push(push(loss))(params) / 2 + _tree.vdot(force, bend)

            return jax.vmap(second)(chunk, force)

        return jnp.swapaxes(jax.lax.map(one, (velocity, bend)), 0, 1)

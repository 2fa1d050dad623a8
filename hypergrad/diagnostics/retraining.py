r"""The true effect of leaving out rows: many trainings without them, side by side, and how well scores agree with it.

    LDS_q = Spearman correlation over subsets S of  Σ_{i ∈ S} a_qi  and  f_q(w without S) − f_q(w)

Source: Ilyas et al. 2022, arXiv:2202.00622 (datamodels); Park et al. 2023, arXiv:2303.14186 (the score). Differs: the
subsets are the rows that are left out, so that both changes have the sign of `hg.attribute`.
Cost: one training for each subset, with as many at a time as fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._problem import PROBLEM, Composed, Problem
from hypergrad._solver import InputError, Solver, evaluation, usable
from hypergrad._tree import PyTree
from hypergrad.diagnostics._left_out import bytes_of_a_row, leave_out, setting
from hypergrad.diagnostics.attribution import batch_rows, check_method, chunks, solver_of
from hypergrad.solvers.implicit import implicit


class Retrained(NamedTuple):
    """The losses of queries after training without each subset; made by `hg.diagnostics.retrain`.

    Attributes:
        losses: loss of each query after each training, `[subsets, queries]`; NaN where a training's status is not
            usable.
        whole: loss of each query after training on all rows, `[queries]`.
        status: int code of each training, see `hg.Status`, `[subsets]`.
    """

    losses: np.ndarray
    whole: np.ndarray
    status: np.ndarray

    @property
    def changes(self) -> np.ndarray:
        """The true change from leaving out each subset, `[subsets, queries]`, which `hg.attribute` predicts."""
        return self.losses - self.whole


@options(problem=PROBLEM, memory=Number(above=0, static=True, advice="write a number of bytes"))
def retrain(
    problem: Problem,
    params: PyTree,
    hparams: PyTree,
    train: PyTree,
    queries: PyTree,
    left_out: Any,
    *,
    method: Callable[[Problem], Solver] = implicit,
    memory: float = 2**30,
    key: Array | None = None,
) -> Retrained:
    """Train again without each subset of rows, and evaluate the queries.

    Args:
        problem: the two losses; as for `hg.attribute`, like `params`, `hparams`, `train`, `queries` and `method`.
        params: parameters from which the method starts.
        hparams: hyperparameters, which stay fixed.
        train: pytree of arrays `[n, ...]`, or `hg.minibatches(arrays, size)`; then every training draws the same
            batches, in which rows that are left out count for nothing.
        queries: pytree of arrays `[queries, ...]`.
        left_out: the rows that each training leaves out: a mask `[subsets, n]`, or a list of row numbers for each.
        method: a function from a problem to a solver, which trains.
        memory: about how many bytes the trainings that run side by side may take.
        key: for losses, minibatches and methods that draw; the same key is used for every training.

    Returns:
        See `Retrained`.

    Raises:
        InputError: for subsets with rows that do not exist or with all rows, and wherever `hg.attribute` raises it.
        InputTypeError: wherever `hg.attribute` raises it.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> squares = lambda w, l2, batch: jnp.mean((batch - w)**2)  # w* is the mean of the batch
    >>> train, query = jnp.array([0.0, 1.0, 5.0]), jnp.array([2.5])
    >>> problem = hg.Problem(squares, squares)
    >>> found = hg.diagnostics.retrain(problem, jnp.zeros(()), None, train, query, [[2], [0, 1]])
    >>> found.changes.round(3).tolist()  # the mean moves from 2 to 0.5, and to 5
    [[3.75], [6.0]]
    """
    at = setting("retrain", problem, params, hparams, train, queries, key)
    masks = masks_of("retrain", left_out, at.rows)
    check_method("retrain", method)
    init_key, call_key = (None, None) if key is None else jax.random.split(key)
    count = batch_rows(at)
    each = 8 * _tree.nbytes(at.params) + 2 * count * max(1, bytes_of_a_row(at, problem, key))
    piece = count if isinstance(problem.inner_loss, Composed) or each <= memory else max(1, count // 16)
    width = int(min(len(masks) + 1, max(1, memory // (each * piece // count))))
    dtype = _tree.dtype(at.params)

    @jax.jit
    def after(params: PyTree, hparams: PyTree, train: PyTree, queries: PyTree, masks: Array) -> tuple[Array, Array]:
        solver = solver_of("retrain", method, leave_out(problem, hparams, at.rows, lambda removed: removed, piece))
        evaluate = evaluation(solver)
        state = solver.init(params, jnp.zeros(at.rows, dtype), key=init_key)

        def run(mask: Array) -> tuple[Array, Array]:
            removed = mask * ((at.rows - 1) / (at.rows - jnp.sum(mask)))  # without the whole subset

            def one(query: PyTree) -> tuple[Array, Array]:
                value, info, _ = evaluate(state, removed, train, jax.tree.map(lambda x: x[None], query), key=call_key)
                return value, info.status

            values, codes = jax.vmap(one)(queries)
            return values, jnp.max(codes)

        return jax.vmap(run)(masks)

    runs = np.concatenate([np.zeros((1, at.rows), bool), masks]).astype(dtype)
    found = [after(at.params, at.hparams, at.train, at.queries, part) for part in chunks(runs, len(runs), width)]
    values, status = (np.concatenate(x)[: len(runs)] for x in zip(*found, strict=True))
    values = np.where(np.asarray(usable(status))[:, None], values, np.nan)
    return Retrained(values[1:], values[0], status[1:])


def lds(scores: Any, left_out: Any, changes: Any) -> np.ndarray:
    """The linear datamodeling score: rank correlation of predicted and true changes over subsets, for each query.

    Args:
        scores: scores of single examples, `[queries, n]`, as in `hg.attribute(...).scores`.
        left_out: the rows that each subset leaves out, as for `hg.diagnostics.retrain`.
        changes: true changes of the losses, `[subsets, queries]`, as in `hg.diagnostics.retrain(...).changes`.

    Returns:
        A correlation between -1 and 1 for each query, `[queries]`; NaN where a score or a change is NaN.

    Raises:
        InputError: for shapes that do not fit together, and fewer than three subsets.

    >>> import hypergrad as hg
    >>> hg.diagnostics.lds([[3.0, 2.0, 1.0]], [[0], [1], [2]], [[0.9], [0.5], [0.4]]).tolist()
    [1.0]
    """
    scores, changes = _matrix("lds", "scores", scores), _matrix("lds", "changes", changes)
    masks = masks_of("lds", left_out, scores.shape[1])
    if changes.shape != (len(masks), len(scores)):
        raise InputError(
            f"lds: changes must have shape [subsets, queries] = [{len(masks)}, {len(scores)}], found "
            f"{list(changes.shape)}: pass hg.diagnostics.retrain(...).changes of the same subsets and queries."
        )
    predicted = scores @ masks.T.astype(float)
    return _correlations("lds", _ranks(predicted), _ranks(changes.T))


def loo_correlation(scores: Any, changes: Any) -> np.ndarray:
    """Pearson correlation of scores with the true changes when single examples are left out, for each query.

    Args:
        scores: scores of the examples that were left out, `[queries, examples]`.
        changes: true changes when each of them was left out, `[examples, queries]`, as
            `hg.diagnostics.retrain(...).changes`.

    Returns:
        A correlation between -1 and 1 for each query, `[queries]`; NaN where a score or a change is NaN.

    Raises:
        InputError: for shapes that do not fit together, and fewer than three examples.

    >>> import hypergrad as hg
    >>> hg.diagnostics.loo_correlation([[3.0, 2.0, 1.0]], [[0.6], [0.4], [0.2]]).round(6).tolist()
    [1.0]
    """
    scores, changes = _matrix("loo_correlation", "scores", scores), _matrix("loo_correlation", "changes", changes)
    if changes.shape != scores.shape[::-1]:
        raise InputError(
            f"loo_correlation: changes must have shape [examples, queries] = {list(scores.shape[::-1])}, found "
            f"{list(changes.shape)}: pass the scores of the examples that were left out, and their changes."
        )
    return _correlations("loo_correlation", scores, changes.T)


def masks_of(name: str, left_out: Any, n: int) -> np.ndarray:
    """The rows that each subset leaves out, as a boolean mask `[subsets, n]`.

    Raises:
        InputError: for any other form.
    """
    write = f"write a boolean mask of shape [subsets, {n}], or a list of row numbers for each subset"
    parts = [np.asarray(part) for part in left_out] if isinstance(left_out, (Sequence, np.ndarray, Array)) else []
    if not parts or any(part.ndim != 1 for part in parts):
        raise InputError(f"{name}: left_out must be subsets of the rows, found {left_out!r}: {write}.")
    masks = np.zeros((len(parts), n), bool)
    for mask, part in zip(masks, parts, strict=True):
        if part.dtype == bool and part.shape == (n,):
            mask[:] = part
        elif part.dtype.kind in "iu" and (not part.size or (part.min() >= 0 and part.max() < n)):
            mask[part] = True
        else:
            raise InputError(f"{name}: left_out must name rows from 0 to {n - 1}, found {part!r}: {write}.")
    if masks.all(axis=1).any():
        raise InputError(
            f"{name}: left_out[{int(masks.all(axis=1).argmax())}] holds all {n} rows, and nothing is left to train on."
        )
    return masks


def _matrix(name: str, what: str, value: Any) -> np.ndarray:
    found = np.asarray(value, float)
    if found.ndim != 2:
        raise InputError(f"{name}: {what} must have two axes, found shape {found.shape}: keep an axis for the queries.")
    return found


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, with the mean rank for ties; NaN throughout a row that contains one."""
    ranks = np.empty_like(x)
    for row, out in zip(x, ranks, strict=True):
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        out[:] = (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]
        out[:] = np.nan if np.isnan(row).any() else out
    return ranks


def _correlations(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.shape[1] < 3:
        raise InputError(
            f"{name}: a correlation needs at least three subsets, found {x.shape[1]}: leave out more of them."
        )
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt(np.sum(x**2, axis=1) * np.sum(y**2, axis=1))
    return np.where(
        size > 0, np.sum(x * y, axis=1) / np.where(size > 0, size, 1), np.where(np.isnan(size), np.nan, 0.0)
    )

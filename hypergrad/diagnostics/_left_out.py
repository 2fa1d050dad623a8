r"""The problem in which training rows can be left out by degrees; each row, or group of rows, has a hyperparameter.

    h_s(w) = (1/n) Σ_j p_j h({j}),   p_j = 1 − r_j n/(n − 1) + Σ_i r_i/(n − 1),   r_i = Σ s_g over the columns g ∋ i

For an inner loss that is a mean over rows, s = 0 gives back h(B), and r = e_i gives (n h(B) − h({i}))/(n − 1), which is
the loss without row i. The loss without a group of k rows has s = (n − 1)/(n − k) e_g. p is linear in s, so that
derivatives add up over columns.

A row that is drawn into a minibatch is weighted with its p. A loss that draws gets its own key for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params
from hypergrad._data import Minibatches, Stacked, Stream, prepare, rows
from hypergrad._problem import Composed, Problem, compose, inner_value, key_use, outer_value
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree

TRIALS = 32  # keys over which the loss of a row is averaged before the comparison, if the loss draws


class Numbered(NamedTuple):
    """A batch whose rows know their numbers among the training rows."""

    arrays: PyTree
    number: Array


class Columns(NamedTuple):
    """Which rows each hyperparameter leaves out: entry j says that column `column[j]` holds row `row[j]`."""

    column: np.ndarray
    row: np.ndarray
    names: tuple[Any, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each column, `[columns]`."""
        return np.bincount(self.column, minlength=len(self.names))


class Setting(NamedTuple):
    """The arguments that are shared by all functions that leave out rows, after their checks."""

    params: PyTree
    hparams: PyTree
    train: PyTree  # `Numbered`, or minibatches of one
    queries: PyTree
    rows: int
    queried: int


def setting(
    name: str, problem: Problem, params: PyTree, hparams: PyTree, train: PyTree, queries: PyTree, key: Array | None
) -> Setting:
    """Check what does not depend on the method, before anything large is compiled.

    Raises:
        InputError: for data that cannot be left out row by row, or losses that are not means over rows.
        InputTypeError: for arguments of another type, and for calls inside `jit`.
    """
    for what, tree in (("params", params), ("hparams", hparams), ("train", train), ("queries", queries)):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise InputTypeError(
                f"{name}: {what} is traced, but chunks are made on the host: call {name} outside of jit."
            )
    if problem.inner_loss is None:
        raise InputError(
            f"{name}: inner_loss is None, so that there is no loss from which a row could be left out: give hg.Problem "
            "an inner_loss."
        )
    if problem.model_state:
        raise InputError(
            f"{name}: the problem has model_state=True, as batch norm does, which mixes the rows of a batch, so that "
            "no row can be left out by itself: use layer norm, or freeze the statistics and bind them to the losses."
        )
    params = check_params(params)
    hparams = check_hparams(hparams) if jax.tree.leaves(hparams) else hparams
    if isinstance(train, (Stream, Stacked)):
        raise InputTypeError(
            f"{name}: train is hg.stream, whose rows have no numbers: pass the arrays, or hg.minibatches(arrays, size)."
        )
    if key is None and (problem.needs_key or isinstance(train, Minibatches)):
        raise InputError(f"{name}: the losses or minibatches draw at random: pass key=jax.random.key(0).")
    if train is None or queries is None:
        what, write = ("train", "training rows") if train is None else ("queries", "rows for outer_loss")
        raise InputError(f"{name}: {what} must be arrays with one row an example, found None: pass the {write}.")
    if isinstance(queries, (Stream, Stacked, Minibatches)):
        raise InputTypeError(f"{name}: queries must be arrays with one row a query, found {type(queries).__name__}.")
    arrays = train.arrays if isinstance(train, Minibatches) else prepare(f"{name}: train", train)
    queries = prepare(f"{name}: queries", queries)
    n, queried = rows(arrays, f"{name}: train"), rows(queries, f"{name}: queries")
    if n < 2:
        raise InputError(f"{name}: train must have at least 2 rows, so that one can be left out, found {n}.")
    arrays, queries = jax.tree.map(jnp.asarray, (arrays, queries))
    _check_query(name, problem, params, hparams, arrays, queries, key)
    _check_mean(name, problem, params, hparams, arrays, key)
    numbered = Numbered(arrays, jnp.arange(n))
    whole = Minibatches(numbered, train.size) if isinstance(train, Minibatches) else numbered
    return Setting(params, hparams, whole, queries, n, queried)


def every_row(n: int) -> Columns:
    """One column for each row."""
    return Columns(np.arange(n), np.arange(n), tuple(range(n)))


def columns_of(name: str, groups: Any, n: int) -> Columns:
    """Return the columns that `groups` describes: labels `[n]`, or for each group the numbers of its rows.

    Raises:
        InputError: for groups that do not cover the rows, or hold all of them.
    """
    write = f"write one label for each of the {n} training rows, or a list with the row numbers of each group"
    if groups is None:
        return every_row(n)
    try:
        parts = list(groups)
    except TypeError:
        raise InputTypeError(
            f"{name}: groups must be labels or lists, found {type(groups).__name__}: {write}."
        ) from None
    if parts and all(np.ndim(part) == 0 for part in parts):
        columns = _labelled(name, np.asarray(groups), n, write)
    elif parts and all(np.ndim(part) == 1 for part in parts):
        columns = _listed(name, [np.asarray(part) for part in parts], n, write)
    else:
        raise InputError(f"{name}: groups must be labels or lists of row numbers, found {groups!r}: {write}.")
    if columns.sizes.max() >= n:
        raise InputError(f"{name}: a group of groups holds all {n} rows, and without it nothing is left to train on.")
    return columns


def _labelled(name: str, labels: np.ndarray, n: int, write: str) -> Columns:
    if labels.shape != (n,):
        raise InputError(f"{name}: groups has {len(labels)} labels and train has {n} rows: {write}.")
    if labels.dtype == object and any(label is None for label in labels):
        raise InputError(f"{name}: groups leaves out row {[x is None for x in labels].index(True)} (None): {write}.")
    if labels.dtype.kind in "if":
        outside = ~(labels >= 0)  # True for NaN as well
        if outside.any():
            first = int(np.argmax(outside))
            raise InputError(
                f"{name}: groups[{first}] is {labels[first]}, which is no group, so that the groups do not cover the "
                f"rows: {write}."
            )
    names, column = np.unique(labels, return_inverse=True)
    return Columns(column.reshape(-1), np.arange(n), tuple(names.tolist()))


def _listed(name: str, parts: list[np.ndarray], n: int, write: str) -> Columns:
    if all(part.dtype == bool for part in parts):
        if any(len(part) != n for part in parts):
            raise InputError(f"{name}: a mask of groups must have {n} entries, one a row of train: {write}.")
        parts = [np.flatnonzero(part) for part in parts]
    for g, part in enumerate(parts):
        if not part.size:
            raise InputError(f"{name}: groups[{g}] is empty: {write}.")
        if part.dtype.kind not in "iu" or part.min() < 0 or part.max() >= n or len(np.unique(part)) < len(part):
            raise InputError(f"{name}: groups[{g}] must hold different row numbers from 0 to {n - 1}: {write}.")
    row = np.concatenate(parts)
    missing = np.setdiff1d(np.arange(n), row)
    if missing.size:
        raise InputError(
            f"{name}: groups do not cover the rows of train: {missing.size} of {n} are in no group, such as row "
            f"{missing[0]}: put them in a group of their own."
        )
    column = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Columns(column, row, tuple(range(len(parts))))


def leave_out(
    problem: Problem,
    hparams: PyTree,
    n: int,
    removed: Callable[[Any], Array],
    piece: int,
    force: Callable[[Any], PyTree] | None = None,
) -> Problem:
    """Return the problem whose hyperparameters leave out rows; its batches are `Numbered`, and rows of queries.

    Args:
        problem: the two losses.
        hparams: hyperparameters of the problem, which stay fixed.
        n: number of training rows.
        removed: function from the new hyperparameters to r, `[n]`.
        piece: number of rows that are computed at a time.
        force: function from the new hyperparameters to a pytree δ like the parameters; ⟨δ, w⟩ is added to the loss.
    """

    def outer(params: PyTree, at: Any, batch: PyTree, key: Array | None = None) -> Array:
        return outer_value(problem, params, hparams, batch, key, None)[0]

    def weights(at: Any, number: Array) -> Array:
        r = removed(at)
        return (1 + (jnp.sum(r) - n * r) / (n - 1))[number]

    inner = problem.inner_loss
    if isinstance(inner, Composed):
        takes_key = key_use(inner, "inner_loss", False) != "none"

        def outputs(params: PyTree, at: Any, batch: Numbered, key: Array | None = None) -> PyTree:
            one = lambda row, j: inner.outputs(
                params, hparams, _single(row), *((jax.random.fold_in(key, j),) if takes_key and key is not None else ())
            )
            return jax.vmap(one)(batch.arrays, jnp.arange(batch.number.shape[0]))

        def loss(out: PyTree, params: PyTree, at: Any, batch: Numbered) -> Array:
            each = jax.vmap(lambda o, row: inner.loss(o, params, hparams, _single(row)))(out, batch.arrays)
            value = jnp.mean(weights(at, batch.number).astype(each.dtype) * each)
            return value if force is None else value + _tree.vdot(force(at), params)

        return Problem(compose(outputs, loss), outer)

    def weighted(params: PyTree, at: Any, batch: Numbered, key: Array | None = None) -> Array:
        p, count = weights(at, batch.number), batch.number.shape[0]

        def one(row: PyTree, j: Array) -> Array:
            return inner_value(
                problem, params, hparams, _single(row), None if key is None else jax.random.fold_in(key, j), None
            )[0]

        def some(arrays: PyTree, j: Array, p: Array) -> Array:
            each = jax.vmap(one)(arrays, j)
            return jnp.sum(p.astype(each.dtype) * each)

        j = jnp.arange(count)
        if piece >= count:
            value = some(batch.arrays, j, p) / count
        else:  # the last piece is filled up with rows of weight 0
            pieces = -(-count // piece)
            fill = lambda x: jnp.reshape(x[jnp.arange(pieces * piece) % count], (pieces, piece, *x.shape[1:]))
            real = jnp.reshape(jnp.arange(pieces * piece) < count, (pieces, piece))
            parts = jax.tree.map(fill, batch.arrays), fill(j), jnp.where(real, fill(p), 0)
            value = jnp.sum(jax.lax.map(jax.checkpoint(lambda part: some(*part)), parts)) / count
        return value if force is None else value + _tree.vdot(force(at), params).astype(value.dtype)

    return Problem(weighted, outer)


def bytes_of_a_row(setting: Setting, problem: Problem, key: Array | None) -> int:
    """Estimate the memory of one row while the inner loss is differentiated: all intermediates of its forward pass."""
    arrays = setting.train.arrays.arrays if isinstance(setting.train, Minibatches) else setting.train.arrays
    row = jax.tree.map(lambda x: x[:1], arrays)
    loss = lambda row: inner_value(problem, setting.params, setting.hparams, row, key, None)[0]
    return _bytes(jax.make_jaxpr(loss)(row).jaxpr)


def _bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inside = [x for value in equation.params.values() for x in jax.tree.leaves(value, is_leaf=_is_jaxpr)]
        inside = [getattr(x, "jaxpr", x) for x in inside if _is_jaxpr(x)]
        turns = int(equation.params.get("length", 1)) if equation.primitive.name == "scan" else 1
        total += turns * sum(map(_bytes, inside))
        total += sum(_tree.nbytes(v.aval) for v in equation.outvars) if not inside else 0
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _single(row: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], row)


def _structure(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x)[1:])}", tree))


def _check_query(
    name: str, problem: Problem, params: PyTree, hparams: PyTree, train: PyTree, queries: PyTree, key: Array | None
) -> None:
    one = jax.tree.map(lambda x: x[:1], queries)
    try:
        jax.eval_shape(lambda batch: outer_value(problem, params, hparams, batch, key, None)[0], one)
    except Exception as error:
        raise InputError(
            f"{name}: outer_loss cannot be evaluated on a row of queries, whose rows are {_structure(queries)}; those "
            f"of train are {_structure(train)}: pass queries as outer_loss takes its batch. It raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_mean(name: str, problem: Problem, params: PyTree, hparams: PyTree, train: PyTree, key: Array | None) -> None:
    """Compare the loss of the batch with the mean over its halves and over its rows, at the start and near it."""
    n = jax.tree.leaves(train)[0].shape[0]
    near = jax.tree.map(lambda w, z: w + 0.1 * z, params, _tree.rademacher_like(jax.random.key(0), params))

    def mean(w: PyTree, hparams: PyTree, train: PyTree, key: Array | None) -> Array:
        fold = lambda j: None if key is None else jax.random.fold_in(key, j)
        value = lambda batch, j: inner_value(problem, w, hparams, batch, fold(j), None)[0]
        whole = value(train, 0)
        halves = value(jax.tree.map(lambda x: x[: n // 2], train), 1) * (n // 2)
        halves += value(jax.tree.map(lambda x: x[n // 2 :], train), 2) * (n - n // 2)
        one = lambda part: value(_single(part[0]), part[1] + 3)
        alone = jax.lax.map(one, (train, jnp.arange(n)), batch_size=min(n, 64))
        return jnp.stack([whole, halves / n, jnp.mean(alone)])

    @jax.jit
    def at_points(points: list[PyTree], hparams: PyTree, train: PyTree, key: Array | None) -> list[Array]:
        if key is None:
            return [mean(w, hparams, train, None)[None] for w in points]
        keys = jax.random.split(key, TRIALS)
        return [jax.lax.map(lambda k, w=w: mean(w, hparams, train, k), keys) for w in points]

    try:
        found = [np.asarray(x, np.float64) for x in at_points([params, near], hparams, train, key)]  # [keys, ways]
    except (TypeError, ValueError) as error:
        error.add_note(f"hypergrad: raised while {name} tried inner_loss on halves and single rows of train.")
        raise
    rounding = 100 * _tree.eps(params)
    for point in found:
        for way, what in ((1, "two halves"), (2, "single rows")):
            whole, other = point[:, 0], point[:, way]
            gap = np.mean(whole - other)
            scale = np.mean(np.abs(whole)) + np.mean(np.abs(other))
            spread = np.std(whole - other) / np.sqrt(len(whole))
            if np.isfinite(gap) and abs(gap) > 6 * spread + rounding * scale:
                raise InputError(
                    f"{name}: inner_loss must be a mean over rows, and on the batch of {n} rows it is "
                    f"{whole.mean():.6g}, where the mean over {what} is {other.mean():.6g}: write jnp.mean in place of "
                    "jnp.sum, scale a penalty without the number of rows, and use nothing that mixes rows (batch norm, "
                    "contrastive losses)."
                )

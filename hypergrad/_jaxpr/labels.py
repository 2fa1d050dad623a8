r"""Labels outside their classes and NaN in the data, found in concrete arrays before anything is compiled.

    log_probs[i, y_i]   and   one_hot(y_i, K) = (y_i == 0, …, y_i == K − 1)    need    0 ≤ y_i < K

JAX takes label −1 for the last class. It clips label K to K − 1 or returns NaN, and gives it an all-zero one-hot row.
The losses look plausible, but they are wrong. Only the loss knows the number of classes, so its jaxpr is walked
(`dataflow`), and each label is checked as the loss uses it, after any masking, clipping or shifting that comes first.
Labels that the loss masks out afterwards, by weights or by a comparison that tells them from all good labels, may hold
anything: before the error is raised, the loss is evaluated with two other labels in their place to see whether they
matter.
Cost: a trace of the loss, only for data with integer leaves; two evaluations if something is found.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._checks import caller_level
from hypergrad._data import Minibatches, Stacked, Stream
from hypergrad._jaxpr.dataflow import Finding, Found, Known, evaluate, walk
from hypergrad._solver import InputError, Solver
from hypergrad._tree import PyTree, is_float, is_key, keystr

Value = Callable[[dict[str, PyTree]], PyTree]


@dataclasses.dataclass
class _Data:
    """One data argument.

    Attributes:
        name: name of the argument.
        tree: its arrays.
        chunks: number of batches that hold them all; None for a full batch.
        batch: `(tree, number) -> that batch`.
        chunk_of: `row -> number of the batch that holds it`.
    """

    name: str
    tree: PyTree
    chunks: int | None
    batch: Callable[[PyTree, int], PyTree]
    chunk_of: Callable[[int], int]


@dataclasses.dataclass
class _Leaf:
    """One array of the data; its entries are numbered from `offset`."""

    data: _Data
    path: Any
    array: Any
    offset: int


def check_labels(
    loss: Callable[[PyTree, PyTree, PyTree], Any], params: PyTree, hparams: PyTree, batch: PyTree, name: str
) -> None:
    """Raise for an integer label that lies outside the classes that a loss distinguishes.

    Args:
        loss: `(params, hparams, batch) -> scalar` or `(scalar, anything)`.
        params: pytree of arrays.
        hparams: pytree of arrays.
        batch: concrete data: pytree of arrays, `hg.minibatches(...)`, or host batches stacked.
        name: name of the data in the message, such as `"train"`.

    Raises:
        InputError: naming path, value, row and the classes there are.
    """
    rng = np.random.default_rng(0)  # away from zero, where all classes look alike

    def moved(x: Any) -> Any:
        return x + 0.1 * rng.standard_normal(jnp.shape(x)).astype(jnp.result_type(x)) if is_float(x) else x

    params = jax.tree.map(moved, params)

    def value(batches: dict[str, PyTree]) -> PyTree:
        out = loss(params, hparams, batches[name])
        return out[0] if isinstance(out, tuple) else out

    _check(value, {name: batch})


def check_solver_labels(
    solver: Solver,
    state: Any,
    hparams: PyTree,
    train: PyTree,
    valid: PyTree,
    key: Array | None,
    *,
    traced: Callable[[], Any] | None = None,
) -> None:
    """Raise for an integer label outside its classes, in the losses that a solver holds.

    Args:
        solver: any solver.
        state: its state.
        hparams: pytree of arrays.
        train: concrete data, see `check_labels`; None is passed on.
        valid: like `train`.
        key: as for `solver.hypergrad`.
        traced: returns the jaxpr of a function of `(anything, train, valid, key)` that calls `solver.hypergrad`. It is
            walked instead of a new trace where the data are full batches, because tracing is the cost of the check.

    Raises:
        InputError: naming path, value, row and the classes there are.
    """

    def value(batches: dict[str, PyTree]) -> PyTree:
        return solver.hypergrad(state, hparams, batches["train"], batches["valid"], key=key)[0].value

    _check(value, {"train": train, "valid": valid}, traced, behind=len(jax.tree.leaves(key)))


def check_concrete_data(name: str, data: PyTree) -> None:
    """Warn about NaN in floating-point leaves.

    Args:
        name: name of the data in the message.
        data: pytree of arrays, `hg.minibatches(...)`, or host batches stacked; traced leaves pass.

    Warns:
        UserWarning: naming path, count and the first row.
    """
    if isinstance(data, Stream):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(_arrays(data)):
        if not _is_here(leaf) or not is_float(leaf):
            continue
        bad = np.asarray(jnp.isnan(leaf)) if isinstance(leaf, jax.Array) else np.isnan(leaf)
        if bad.any():
            warnings.warn(
                f"{name}{keystr(path)} holds {int(bad.sum())} NaN of {bad.size} values, the first at "
                f"{_where(np.argwhere(bad)[0])}: unless the loss masks them, the loss is NaN; drop or impute them.",
                UserWarning,
                stacklevel=caller_level(),
            )


def _arrays(data: PyTree) -> PyTree:
    return data.arrays if isinstance(data, Minibatches) else data.batches if isinstance(data, Stacked) else data


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def _is_here(leaf: Any) -> bool:
    """Whether this process can read every entry."""
    return not _is_traced(leaf) and getattr(leaf, "is_fully_addressable", True)


def _is_integer(leaf: Any) -> bool:
    return not is_key(leaf) and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.integer))


def _cut(name: str, data: PyTree) -> _Data:
    """The recipe by which a batch is cut out of the data."""
    tree = jax.tree.map(lambda x: np.asarray(x) if _is_integer(x) else x, _arrays(data))
    if isinstance(data, Stacked):
        chunks = jax.tree.leaves(tree)[0].shape[0]
        return _Data(name, tree, chunks, lambda t, c: jax.tree.map(lambda x: x[c], t), lambda row: row)
    if isinstance(data, Minibatches):
        rows, size = jax.tree.leaves(tree)[0].shape[0], data.size

        def batch(tree: PyTree, chunk: int) -> PyTree:
            index = np.arange(chunk * size, (chunk + 1) * size) % rows
            return jax.tree.map(lambda x: x[index], tree)

        return _Data(name, tree, -(-rows // size), batch, lambda row: row // size)
    return _Data(name, tree, None, lambda t, c: t, lambda row: 0)


def _check(value: Value, data: dict[str, PyTree], traced: Callable[[], Any] | None = None, *, behind: int = 0) -> None:
    """Check every label; `behind` inputs of the jaxpr from `traced` come after the data."""
    if any(isinstance(d, Stream) for d in data.values()):
        return
    everything = [x for d in data.values() for x in jax.tree.leaves(_arrays(d))]
    if not all(map(_is_here, everything)) or not any(_is_integer(x) and jnp.size(x) for x in everything):
        return
    sets = {name: _cut(name, d) for name, d in data.items()}
    if traced is not None and all(d.chunks is None for d in sets.values()):
        closed = traced()
    else:
        behind = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                closed = jax.make_jaxpr(value)({name: d.batch(d.tree, 0) for name, d in sets.items()})
        except Exception:  # an error in the loss is reported better where the loss is really called
            return
    leaves: list[_Leaf] = []
    for name in sorted(sets):  # as JAX flattens dictionaries
        for path, array in jax.tree_util.tree_leaves_with_path(sets[name].tree):
            start = leaves[-1].offset + np.size(leaves[-1].array) if leaves else 0
            leaves.append(_Leaf(sets[name], path, array, start))
    found = Found()
    known = [_known(leaf, -1 - sorted(sets).index(leaf.data.name)) for leaf in leaves]
    before = len(closed.in_avals) - len(known) - behind
    walk(closed, [None] * before + known + [None] * behind, found)
    for finding in found.findings:
        bad = ~_masked(finding, found.masks)
        if bad.any():
            finding = dataclasses.replace(finding, places=finding.places[bad], values=finding.values[bad])
            _raise_if_it_matters(finding, leaves, sets, value)


def _known(leaf: _Leaf, axis: int) -> Known | None:
    """A leaf of integers, cut into batches on a leading axis of that name."""
    if not _is_integer(leaf.array):
        return None
    places, data = np.arange(leaf.offset, leaf.offset + leaf.array.size).reshape(leaf.array.shape), leaf.data
    if data.chunks is None:
        return Known(lambda: leaf.array, lambda: places)
    chunks = range(data.chunks)

    def cut(x: np.ndarray) -> np.ndarray:
        return np.stack([data.batch(x, c) for c in chunks])

    return Known(functools.cache(lambda: cut(leaf.array)), functools.cache(lambda: cut(places)), axes=(axis,))


def _masked(finding: Finding, masks: Sequence[Known]) -> np.ndarray:
    """The entries that a comparison in the loss tells from every good label."""
    told = np.zeros(finding.places.size, bool)
    for mask in masks:
        places, values = evaluate(mask)
        known = dict(zip(places.tolist(), values.tolist(), strict=True))
        good = {known[p] for p in finding.good.tolist() if p in known}
        told |= [bool(good) and p in known and known[p] not in good for p in finding.places.tolist()]
    return told


def _raise_if_it_matters(finding: Finding, leaves: Sequence[_Leaf], sets: dict[str, _Data], value: Value) -> None:
    """Raise unless the loss is the same whichever valid label stands in for the invalid ones."""
    leaf = next(x for x in reversed(leaves) if x.offset <= finding.places[0])
    inside = finding.places < leaf.offset + leaf.array.size
    places, used = finding.places[inside] - leaf.offset, finding.values[inside]
    index = np.unravel_index(places[0], leaf.array.shape)

    compiled = jax.jit(value)

    def with_label(label: int) -> list[np.ndarray]:
        fixed = leaf.array.copy()
        fixed.reshape(-1)[places] += (label - used).astype(fixed.dtype)
        tree = jax.tree_util.tree_map_with_path(lambda path, x: fixed if path == leaf.path else x, leaf.data.tree)
        batches = {name: d.batch(d.tree, 0) for name, d in sets.items()}
        batches[leaf.data.name] = leaf.data.batch(tree, leaf.data.chunk_of(int(index[0]) if index else 0))
        return [np.asarray(x) for x in jax.tree.leaves(compiled(batches))]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, last = with_label(0), with_label(finding.classes - 1)
    except Exception:  # see `_check`
        return
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, last, strict=True)):
        return
    found = leaf.array[index]
    becomes = "" if found == used[0] else f" (which the loss turns into {used[0]})"
    others = f" and {places.size - 1} more" if places.size > 1 else ""
    raise InputError(
        f"{leaf.data.name}{keystr(leaf.path)}: labels run from 0 to {finding.classes - 1}, found {found}{becomes} at "
        f"{_where(index)}{others}. JAX would silently take it for another class, or for none: correct the labels, "
        "give the model more classes, or mask such rows in the loss."
    )


def _where(index: Any) -> str:
    index = tuple(int(i) for i in index)
    return f"row {index[0]}" if len(index) == 1 else f"index {index}" if index else "its only entry"

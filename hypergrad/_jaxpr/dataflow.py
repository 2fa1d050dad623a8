"""What a traced function does with integer data: which entries it uses as labels, and what it masks.

A forward walk over a jaxpr. Values that depend on integer data and on constants only are kept as recipes, computed
when one of them indexes an axis or is compared with 0, …, K − 1; all others are unknown. Each value carries its place,
the entry of the data that it came from. All turns of a loop are computed at once, on leading axes.

It would be shorter to follow labels only as long as the loss leaves them unchanged. That check would refuse correct
losses that mask padding (a label of −100) after the cross-entropy, because it does not see the comparison; and it
would miss fancy indices `log_probs[rows, labels]`, labels that the loss shifts, and labels in a column of a table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._jaxpr.walk import called, forward, scan_counts, while_counts
from hypergrad._tree import is_key

Recipe = Callable[[], np.ndarray]

_COMPARES = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
# Entry by entry.
_MAPS = _COMPARES | {
    "convert_element_type",
    "stop_gradient",
    "add",
    "sub",
    "mul",
    "neg",
    "abs",
    "max",
    "min",
    "clamp",
    "rem",
    "select_n",
    "and",
    "or",
    "xor",
    "not",
}
# Entries move, values stay.
_MOVES = frozenset(
    {
        "reshape",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "transpose",
        "slice",
        "rev",
        "copy",
        "copy_p",
        "concatenate",
        "split",
    }
)
_LARGEST_TABLE = 10**6  # most entries of a constant that is checked for being 0, …, K − 1


@dataclasses.dataclass(eq=False)
class Known:
    """A value that depends on data and constants only.

    Attributes:
        values: `() -> array [*axes, *shape]`.
        places: `() -> int array [*axes, *shape]`, the entry of the data that each value came from, or −1; None for
            constants.
        axes: names of the leading axes on which turns of loops and minibatches are stacked.
        name: the operation it came from.
        parents: its inputs.
        wrapped: whether negative values were turned into K − 1, K − 2, …, as numpy does; `values` holds them unchanged.
        mask: whether it says how labels compare with one number.
    """

    values: Recipe
    places: Recipe | None
    axes: tuple[int, ...] = ()
    name: str = ""
    parents: tuple[Known, ...] = ()
    wrapped: bool = False
    mask: bool = False


@dataclasses.dataclass
class Finding:
    """Entries of the data used as labels outside [0, K).

    Attributes:
        places: their places, ascending.
        values: their values when the function uses them.
        good: places of the labels inside [0, K).
        classes: K.
    """

    places: np.ndarray
    values: np.ndarray
    good: np.ndarray
    classes: int


@dataclasses.dataclass
class Found:
    """The findings of the walk.

    Attributes:
        findings: labels out of range.
        masks: comparisons of labels that select among unknown values.
        loops: names for the axes of loops.
    """

    findings: list[Finding] = dataclasses.field(default_factory=list)
    masks: list[Known] = dataclasses.field(default_factory=list)
    loops: Iterator[int] = dataclasses.field(default_factory=itertools.count)


def walk(closed: Any, ins: Sequence[Known | None], found: Found) -> list[Known | None]:
    """Follow integer data through a jaxpr.

    Args:
        closed: the jaxpr.
        ins: what is known of each input.
        found: the findings, to which new ones are added.

    Returns:
        What is known of each output.
    """
    return forward(closed, ins, lambda eqn, ins: _equation(eqn, ins, found), _constant)


def evaluate(node: Known) -> tuple[np.ndarray, np.ndarray]:
    """Places and values, flat; empty for an operation that cannot be repeated outside the function."""
    try:
        return (node.places or node.values)().ravel(), node.values().ravel()
    except Exception:
        return np.zeros(0, int), np.zeros(0, int)


def _constant(value: Any) -> Known | None:
    if is_key(value) or not (hasattr(value, "dtype") or isinstance(value, (bool, int, float))):
        return None
    return Known(lambda: np.asarray(value), None)


def _equation(eqn: Any, ins: list[Known | None], found: Found) -> Sequence[Known | None]:
    name, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
    if name in ("scan", "while", "cond"):
        _enter(eqn, ins, found)
        return unknown
    if called(eqn) is not None:
        return walk(called(eqn), ins, found)
    if name == "gather":
        _check_gather(eqn, ins[1], found)
    elif name == "dynamic_slice":
        _check_slice(eqn, ins[1:], found)
    elif name == "eq":
        _check_one_hot(ins, found)
    known = [x for x in ins if x is not None]
    labels = [x for x in known if x.places is not None]
    computable = len(known) == len(ins) and len({x.axes for x in known if x.axes}) <= 1
    if not computable or (labels and name not in _MOVES | _MAPS):
        found.masks += [x for x in known if x.mask]
        return unknown
    if name == "select_n" and (value := _before_wrapping(known)) is not None:
        return [dataclasses.replace(value, wrapped=True)]
    return _later(eqn, tuple(known), labels[0] if labels else None)


def _enter(eqn: Any, ins: list[Known | None], found: Found) -> None:
    """Enter control flow: carried values are unknown, constants and rows are known."""
    if eqn.primitive.name == "scan":
        consts, carries = scan_counts(eqn)
        axis = next(found.loops)
        rows = [x and dataclasses.replace(x, axes=(*x.axes, axis)) for x in ins[consts + carries :]]
        walk(eqn.params["jaxpr"], [*ins[:consts], *[None] * carries, *rows], found)
    elif eqn.primitive.name == "while":
        n_cond, n_body = while_counts(eqn)
        carry = [None] * (len(ins) - n_cond - n_body)
        walk(eqn.params["body_jaxpr"], [*ins[n_cond : n_cond + n_body], *carry], found)
    else:
        for branch in eqn.params["branches"]:
            walk(branch, ins[1:], found)


def _later(eqn: Any, ins: tuple[Known, ...], label: Known | None) -> list[Known | None]:
    """The recipe of an operation whose inputs are known."""
    name = eqn.primitive.name
    axes = next((x.axes for x in ins if x.axes), ())

    def bind(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        def run(*values: Any) -> list[Any]:
            out = eqn.primitive.bind(*values, **eqn.params)
            return list(out) if eqn.primitive.multiple_results else [out]

        for _ in axes:
            run = jax.vmap(run, in_axes=tuple(0 if x.axes else None for x in ins))
        return [np.asarray(x) for x in run(*map(jnp.asarray, arrays))]

    def moved() -> list[np.ndarray]:
        return bind([np.full(np.shape(x.values()), -1) if x.places is None else x.places() for x in ins])

    values = functools.cache(lambda: bind([x.values() for x in ins]))
    places: Callable[[], list[np.ndarray]] | None = None
    if label is not None and label.places is not None:
        first = label.places
        places = functools.cache(moved) if name in _MOVES else lambda: [first()]
    wrapped = name in _MOVES and any(x.wrapped for x in ins)
    # `where(mask, label, 0)` is a label; what else is made from a mask is a mask.
    mask = any(x.mask for x in (ins[1:] if name == "select_n" else ins))
    mask |= (
        name in _COMPARES
        and label is not None
        and any(x.places is None and np.size(_before_broadcast(x).values()) == 1 for x in ins)
    )
    return [
        Known(
            functools.partial(_item, values, i),
            places and functools.partial(_item, places, i),
            axes,
            name,
            ins,
            wrapped,
            mask,
        )
        for i in range(len(eqn.outvars))
    ]


def _item(arrays: Callable[[], list[np.ndarray]], i: int) -> np.ndarray:
    return arrays()[i]


def _before_wrapping(ins: Sequence[Known]) -> Known | None:
    """`x`, if this is `select_n(x < 0, x, x + K)`: how JAX reads negative indices."""
    if len(ins) != 3:
        return None
    predicate, value, shifted = ins
    wraps = predicate.name == "lt" and predicate.parents[0] is value
    wraps &= shifted.name == "add" and value in shifted.parents
    return value if wraps and value.places is not None else None


def _before_broadcast(node: Known) -> Known:
    while node.name in ("broadcast_in_dim", "reshape", "expand_dims", "convert_element_type"):
        node = node.parents[0]
    return node


def _check_gather(eqn: Any, index: Known | None, found: Found) -> None:
    if index is None or index.places is None:
        return
    mode, fill = str(eqn.params["mode"]), eqn.params["fill_value"]
    if ("CLIP" in mode and not index.wrapped) or (fill is not None and not np.isnan(fill)):
        return  # take(..., mode="clip") and take(..., fill_value=0) define what out of range means
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    places, values, axes = index.places, index.values, eqn.params["dimension_numbers"].start_index_map
    for column, axis in enumerate(axes):
        if sizes[axis] == 1 < shape[axis]:
            _record(lambda c=column: places()[..., c], lambda c=column: values()[..., c], shape[axis], found)


def _check_slice(eqn: Any, starts: Sequence[Known | None], found: Found) -> None:
    for start, size, width in zip(starts, eqn.invars[0].aval.shape, eqn.params["slice_sizes"], strict=True):
        if start is not None and start.places is not None and width == 1 < size:
            _record(start.places, start.values, size, found)


def _check_one_hot(ins: Sequence[Known | None], found: Found) -> None:
    for label, classes in (ins, ins[::-1]):
        if label is None or label.places is None or classes is None or classes.places is not None:
            continue
        label, table = _before_broadcast(label), _before_broadcast(classes).values()
        is_range = 1 < table.size <= _LARGEST_TABLE and np.array_equal(table.ravel(), np.arange(table.size))
        if is_range and label.places is not None:
            _record(label.places, label.values, table.size, found)


def _record(places: Recipe, values: Recipe, classes: int, found: Found) -> None:
    where, used = evaluate(Known(values, places))
    bad = (where >= 0) & ((used < 0) | (used >= classes))
    if bad.any():
        outside, first = np.unique(where[bad], return_index=True)
        found.findings.append(Finding(outside, used[bad][first], np.unique(where[~bad]), int(classes)))

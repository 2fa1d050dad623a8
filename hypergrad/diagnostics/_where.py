"""Sentences that say which leaf or entry of a hypergradient is off, and how.

Method: small leaves whose own direction is off are examined entry by entry. In a larger leaf, the half that is off is
halved again as long as the other half is right.
Cost: four solutions of the problem for each entry of a small leaf, eight for each halving; at most four leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hypergrad.diagnostics._directions import Part, along_entry, level

_ENTRIES = 12  # entries up to which a leaf is examined entry by entry
_LEAVES = 4
_MEMBERS = 100  # leaves of one group
_LIKE = 0.02  # relative difference below which two numbers are called the same


def locate(
    leaf_rows: Sequence[tuple[list[Part], Any]],
    scales: np.ndarray,
    grad: np.ndarray,
    compare: Callable[[str, np.ndarray], Any],
    is_off: Callable[[Any], bool],
    rng: np.random.Generator,
) -> Iterator[str]:
    """Yield one sentence for each leaf that is off.

    Args:
        leaf_rows: leaves, and the slope along a direction within them.
        scales: size of each entry's leaf, `[n]`.
        grad: the hypergradient, `[n]`.
        compare: function `(name, direction) -> row`.
        is_off: function that says whether a row contradicts the hypergradient.
        rng: random generator for the directions.
    """
    off: list[Part] = []
    for members, row in leaf_rows:
        if len(members) > 1 and is_off(row):
            off += [p for p in members[:_MEMBERS] if is_off(compare(p.path, level([p], scales, grad, rng)))]
        elif is_off(row):
            off.append(members[0])
    truths: dict[str, np.ndarray] = {}
    found: list[tuple[Part, str]] = []
    for part in off[:_LEAVES]:
        if part.size <= _ENTRIES:
            rows = [compare(part.entry(i), along_entry(part, i, scales)) for i in range(part.size)]
            truths[part.path] = np.asarray([row.settled.value for row in rows]) / scales[part.where]
            found.append((part, _entries(part, grad[part.where], truths[part.path], [is_off(row) for row in rows])))
        else:
            found.append((part, _block(part, scales, grad, compare, is_off, rng)))
    for part, sentence in found:
        other = [p for p, truth in truths.items() if p != part.path and _alike(grad[part.where], truth)]
        yield (
            f"off: hparams{part.path} has the hypergradient of hparams{other[0]}: leaves were exchanged."
            if other
            else sentence
        )
    if len(off) > _LEAVES:
        yield f"off: so are {len(off) - _LEAVES} more leaves."


def nonfinite_entries(parts: Sequence[Part], grad: np.ndarray) -> Iterator[str]:
    """Yield one sentence for each leaf whose hypergradient holds NaN or infinities."""
    for part in parts:
        bad = np.flatnonzero(~np.isfinite(grad[part.where]))
        if bad.size:
            yield (
                f"non-finite: the hypergradient of hparams{part.path} holds {bad.size} of {part.size} NaN or infinite, "
                f"first at hparams{part.entry(int(bad[0]))}."
            )


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two vectors agree up to a small part of their size."""
    return a.shape == b.shape and bool(np.linalg.norm(a - b) <= _LIKE * np.linalg.norm(b))


def _entries(part: Part, ours: np.ndarray, theirs: np.ndarray, wrong: list[bool]) -> str:
    """Describe the entries that are off, in a leaf of which every entry is known."""
    which = np.flatnonzero(wrong)
    if not which.size:
        return f"off: hparams{part.path}, in a sum of its entries more than in any of them."
    a, b = ours[which], theirs[which]
    if which.size > 1:
        names = f"{', '.join('hparams' + part.entry(int(i)) for i in which[:3])}{', ...' if which.size > 3 else ''}"
        if _alike(np.sort(a), np.sort(b)):
            how = "are exchanged" if which.size == 2 else "hold the right numbers in another order"
            return f"off: {names} {how}: an index, a transposition or an order of leaves."
        factor = float(a @ b / (b @ b)) if np.any(b) else np.nan
        if _alike(a, factor * b) and factor:
            where = f"all entries of hparams{part.path}" if which.size == part.size else names
            return f"off: {where} have {factor:.4g} times the hypergradient that the differences give."
    worst = int(which[np.argmax(np.abs(a - b))])
    count = f"{which.size} of {part.size} entries of hparams{part.path}, the worst of them " if which.size > 1 else ""
    return (
        f"off: {count}hparams{part.entry(worst)} has a hypergradient of {ours[worst]:.4g}, where the differences give "
        f"{theirs[worst]:.4g}{_relation(ours[worst], theirs[worst])}."
    )


def _relation(ours: float, theirs: float) -> str:
    """Say in words how a wrong number relates to the right one, where the relation is simple."""
    if ours == 0:
        return ": exactly zero"
    if not theirs:
        return ""
    ratio = ours / theirs
    if abs(ratio + 1) < _LIKE:
        return ": the sign is wrong"
    return f": {ratio:.3g} times as much" if 0 < ratio < 1e3 else ""


def _block(
    part: Part,
    scales: np.ndarray,
    grad: np.ndarray,
    compare: Callable[[str, np.ndarray], Any],
    is_off: Callable[[Any], bool],
    rng: np.random.Generator,
) -> str:
    """Halve a large leaf as long as only one half is off."""
    begin, end = part.where.start, part.where.stop
    while end - begin > 1:
        middle = (begin + end) // 2
        halves = [(begin, middle), (middle, end)]
        wrong = [
            half
            for half in halves
            if is_off(compare(part.path, level([part._replace(where=slice(*half))], scales, grad, rng)))
        ]
        if len(wrong) != 1:
            break
        begin, end = wrong[0]
    first = part.where.start
    if end - begin == 1:
        row = compare(part.entry(begin - first), along_entry(part, begin - first, scales))
        theirs = row.settled.value / scales[begin]
        return (
            f"off: hparams{part.entry(begin - first)} alone in its leaf, with a hypergradient of {grad[begin]:.4g}, "
            f"where the differences give {theirs:.4g}{_relation(float(grad[begin]), theirs)}."
        )
    if end - begin == part.size:
        return f"off: hparams{part.path}, in entries all over its {part.size}."
    return f"off: hparams{part.path}, from {part.entry(begin - first)} to {part.entry(end - first - 1)} of it."

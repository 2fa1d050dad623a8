r"""Directions in the space of all hyperparameters, along which a hypergradient is compared with differences.

    v = s z:  every entry in units s of its leaf's own size, times a normal number z
    v = s z w,  w = min(1, max(10⁻³, smallest / |s ĝ|)):  so weighted that each entry of a leaf counts alike

The numbers are normal rather than signs: along signs, the errors of two exchanged entries of the hypergradient cancel
in every second direction. The second kind differs from a random projection of the error: along it, an entry whose
hypergradient is a thousand times smaller than its neighbour's shows as much as the neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from hypergrad._tree import PyTree, keystr

_WEIGHTS = 1e3  # largest ratio of steps within one direction; beyond it differences drown in rounding


class Part(NamedTuple):
    """The position of a leaf of the hyperparameters in the vector of all entries."""

    path: str
    shape: tuple[int, ...]
    where: slice

    @property
    def size(self) -> int:
        return self.where.stop - self.where.start

    def entry(self, i: int) -> str:
        """The path of its i-th entry."""
        index = np.unravel_index(i, self.shape)
        return self.path + (str([int(k) for k in index]) if index else "")


def parts_of(hparams: PyTree) -> list[Part]:
    """The leaves that have entries, in the order of the vector."""
    parts, begin = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(hparams):
        parts.append(Part(keystr(path), np.shape(leaf), slice(begin, begin + np.size(leaf))))
        begin += np.size(leaf)
    return [part for part in parts if part.size]


def scales_of(at: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """The size of a relative change of 1, for each entry: the root mean square of its leaf; 1 for a leaf of zeros."""
    scales = np.ones_like(at)
    for part in parts:
        scales[part.where] = rms(at[part.where]) or 1.0
    return scales


def directions_along(
    parts: Sequence[Part], scales: np.ndarray, count: int, limit: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Steps along each entry of these leaves if there are at most `limit`, else along `count` random sums of them."""
    if sum(part.size for part in parts) > limit:
        for i in range(count):
            yield f"random {i + 1}", random(parts, scales, rng)
        return
    for part in parts:
        for i in range(part.size):
            yield part.entry(i) or "hparams", along_entry(part, i, scales)


def along_entry(part: Part, i: int, scales: np.ndarray) -> np.ndarray:
    """A step in one entry, of the size of its leaf."""
    direction = np.zeros_like(scales)
    direction[part.where.start + i] = scales[part.where.start + i]
    return direction


def random(parts: Sequence[Part], scales: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal numbers in the entries of these leaves."""
    direction = np.zeros_like(scales)
    for part in parts:
        direction[part.where] = rng.normal(size=part.size) * scales[part.where]
    return direction


def level(
    parts: Sequence[Part], scales: np.ndarray, grad: np.ndarray, rng: np.random.Generator, weights: float = _WEIGHTS
) -> np.ndarray:
    """Like `random`, weighted such that each entry of these leaves contributes equally to the product with `grad`."""
    direction = random(parts, scales, rng)
    inside = np.concatenate([np.arange(part.where.start, part.where.stop) for part in parts])
    size = np.abs((scales * grad)[inside])
    largest = np.max(size[np.isfinite(size)], initial=0.0)
    if largest > 0:
        size = np.where(np.isfinite(size), np.maximum(size, largest / weights), largest)
        direction[inside] *= np.min(size) / size
    return direction


def groups(parts: Sequence[Part], scales: np.ndarray, grad: np.ndarray, most: int) -> list[list[Part]]:
    """The leaves one by one, or, if there are more than `most`, as many groups of similar hypergradients."""
    if len(parts) <= most:
        return [[part] for part in parts]
    sizes = [np.nan_to_num(rms((scales * grad)[part.where]), nan=np.inf) for part in parts]
    chunks = np.array_split(np.argsort(sizes, kind="stable"), most)
    return [[parts[i] for i in chunk] for chunk in chunks]


def rms(x: np.ndarray) -> float:
    """Root mean square; 0 for an empty array."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(x**2))) if x.size else 0.0

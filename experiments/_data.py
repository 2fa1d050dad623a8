"""Data that come inside installed packages, split by seed; every number is float32, every label int32."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Split = tuple[np.ndarray, np.ndarray]


def digits(seed: int, sizes: Sequence[int], *, centred: bool = True) -> list[Split]:
    """scikit-learn's 1797 handwritten digits as `(x [n, 64], y [n])`, the same share of each class in every part.

    Args:
        seed: of the split.
        sizes: rows of each part but the last, which holds the rest.
        centred: subtract the mean of the first part from each pixel. Pixels are divided by 16: at most 1.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x, y = (bunch.data / 16).astype(np.float32), bunch.target.astype(np.int32)
    rows = stratified(y, sizes, seed)
    if centred:
        x = x - x[rows[0]].mean(0)
    return [(x[part], y[part]) for part in rows]


def shipped(module: str) -> Any:
    """A module of a package that brings data along and that few experiments need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SystemExit(f"{package} is not installed; this run reads from it: pip install -e '.[data]'") from error


def faces(seed: int, sizes: Sequence[int]) -> list[Split]:
    """scikit-image's 200 crops, 100 faces (1) and 100 others (0), as `(x [n, 25, 25] in [0, 1], y [n])`."""
    x = np.asarray(shipped("skimage.data").lfw_subset(), np.float32)
    y = np.repeat(np.asarray([1, 0], np.int32), 100)
    return [(x[part], y[part]) for part in stratified(y, sizes, seed)]


def documentation(characters: int | None = None) -> tuple[np.ndarray, str]:
    """The text of Python's own language reference, which every Python ships, as `(codes [n] int32, alphabet)`.

    Characters that are seen less than 50 times are left out.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    counts = {c: text.count(c) for c in set(text)}
    alphabet = "".join(sorted(c for c, n in counts.items() if n >= 50))
    index = {c: i for i, c in enumerate(alphabet)}
    codes = np.asarray([index[c] for c in text if c in index], np.int32)
    return codes[:characters], alphabet


def stretches(seed: int, rows: Sequence[int], length: int) -> tuple[list[Split], int]:
    """Text of `documentation` as `(codes [n, length], the characters that follow)`, and the size of the alphabet.

    Args:
        seed: of the place where the first part begins.
        rows: stretches of each part; the parts lie one after the other and do not overlap.
        length: characters of a stretch.
    """
    codes, alphabet = documentation()
    count = (len(codes) - 1) // length
    x, y = (codes[i : i + count * length].reshape(count, length) for i in (0, 1))
    begin = np.random.default_rng(seed).integers(0, count - sum(rows))
    ends = begin + np.cumsum((0, *rows))
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)], len(alphabet)


def stratified(labels: np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Rows of each part, shuffled; the last part holds what the others leave."""
    from sklearn.model_selection import train_test_split

    rest, parts = np.arange(len(labels)), []
    for size in sizes:
        part, rest = train_test_split(rest, train_size=size, random_state=seed, stratify=labels[rest])
        parts.append(np.asarray(part))
    return [*parts, np.asarray(rest)]

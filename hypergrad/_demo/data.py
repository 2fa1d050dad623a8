"""Small data sets from scikit-learn, split into training, validation and test rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

WRONG = 0.5  # share of the training labels that are replaced by another class


class Digits(NamedTuple):
    """Handwritten digits of 8×8 pixels, centred per pixel; half of the training labels are wrong.

    Attributes:
        train: `(x, y)`, `[600, 64]` and `[600]`, with the labels as given.
        valid: `(x, y)` of 600 others, with correct labels.
        test: `(x, y)` of the remaining 597.
        images: the training images as scanned, `[600, 8, 8]`, 0 to 16.
        true: correct labels of the training images, `[600]`.
        wrong: whether the given label is wrong, boolean `[600]`.
    """

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    images: np.ndarray
    true: np.ndarray
    wrong: np.ndarray


class ManyDigits(NamedTuple):
    """Handwritten digits of 8×8 pixels, centred per pixel; every label is correct.

    Attributes:
        real: `(x, y)`, `[1300, 64]` and `[1300]`.
        test: `(x, y)` of the remaining 497.
    """

    real: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Tumours(NamedTuple):
    """Breast cancer (Wisconsin, diagnostic): 30 measurements of a cell nucleus, standardised on the training rows.

    Attributes:
        train: `(x, y)`, `[190, 30]` and `[190]` of 0 (malignant) and 1 (benign).
        valid: `(x, y)`, 190 rows.
        test: `(x, y)`, the remaining 189.
        names: names of the measurements.
    """

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    names: list[str]


def digits(seed: int) -> Digits:
    """Load the digits, split them by class and corrupt the labels. The same seed gives the same data."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    train, valid, test = _split(labels, (600, 600), seed)
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(train)) < WRONG * len(train)
    given = np.where(wrong, labels[train] + rng.integers(1, 10, len(train)), labels[train]) % 10
    x = ((pixels - pixels[train].mean(0)) / 16).astype(np.float32)
    return Digits(
        (x[train], given),
        (x[valid], labels[valid]),
        (x[test], labels[test]),
        pixels[train].reshape(-1, 8, 8),
        labels[train],
        wrong,
    )


def many_digits(seed: int) -> ManyDigits:
    """Load the digits and split them by class. The same seed gives the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    pixels, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    real, test = train_test_split(np.arange(len(labels)), train_size=1300, random_state=seed, stratify=labels)
    x = ((pixels - pixels[real].mean(0)) / 16).astype(np.float32)
    return ManyDigits((x[real], labels[real]), (x[test], labels[test]))


def tumours(seed: int) -> Tumours:
    """Load the data, split them by class and standardise them. The same seed gives the same split."""
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer()
    values, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    train, valid, test = _split(labels, (190, 190), seed)
    x = ((values - values[train].mean(0)) / values[train].std(0)).astype(np.float32)
    parts = ((x[rows], labels[rows]) for rows in (train, valid, test))
    return Tumours(*parts, names=[str(name) for name in bunch.feature_names])


def _split(labels: np.ndarray, sizes: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Row numbers of the training, validation and test set, each with the same share of every class."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    rest, test = train_test_split(rows, train_size=sum(sizes), random_state=seed, stratify=labels)
    train, valid = train_test_split(rest, train_size=sizes[0], random_state=seed, stratify=labels[rest])
    return [np.asarray(part) for part in (train, valid, test)]

r"""Cross-validation as an axis: k pairs of weights over one set of rows, for `hg.tasks`.

    row i counts in the validation loss of one fold and in the training losses of the other k − 1

The rows themselves are shared by all folds, so that k folds take the memory of one data set; each loss is a mean
weighted by zeros and ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad._checks import install
from hypergrad._data import prepare, rows
from hypergrad._options import Number, options
from hypergrad._solver import HypergradError, InputError, InputTypeError
from hypergrad._tree import PyTree


class Fold(NamedTuple):
    """Rows that all folds share, and their weights; made by `hg.folds`, unpacked by a loss.

    Attributes:
        arrays: pytree of arrays `[n, ...]`.
        weight: zeros and ones, `[k, n]`; `[n]` inside the losses of one fold.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> train, valid = hg.folds(jnp.arange(4.0), 2)
    >>> train.weight.tolist()
    [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """

    arrays: PyTree
    weight: Array


@options(k=Number(least=2, integer=True, static=True, advice="write the number of folds"))
def folds(
    arrays: PyTree, k: int, *, key: Array | None = None, stratify: Any = None, groups: Any = None
) -> tuple[Fold, Fold]:
    """Split rows into k folds, each of which serves as validation data once.

    Inside the losses a batch is `(arrays, weight)`, and a loss is a mean weighted by `weight`:
    `jnp.sum(weight * errors) / jnp.sum(weight)`.

    Args:
        arrays: pytree of arrays whose leading axes have the same length, `[n, ...]`.
        k: number of folds, from 2 to n.
        key: PRNG key that shuffles the rows first; None keeps their order (contiguous folds).
        stratify: labels `[n]`: every fold gets about the same share of each (scikit-learn's `StratifiedKFold`).
        groups: labels `[n]`: rows of one group are never in both training and validation data (`GroupKFold`, or
            `StratifiedGroupKFold` with both).

    Returns:
        `(train, valid)`, two `Fold`s with the same arrays and complementary weights, for `hg.tasks`.

    Raises:
        InputError: for fewer than two folds or more folds than rows; for labels of another length; for fewer groups (or
            rows of a label) than folds.
        InputTypeError: for a k that is not an integer.
        HypergradError: if `stratify` or `groups` is given and scikit-learn is not installed.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> train, valid = hg.folds((jnp.zeros((6, 2)), jnp.zeros(6)), 3, key=jax.random.key(0))
    >>> valid.weight.sum(axis=0).tolist()  # every row is validated once
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    arrays = prepare("folds: arrays", arrays)
    n = rows(arrays, "folds: arrays")
    if int(k) > n:
        raise InputError(f"folds: k must be between 2 and the {n} rows of the data, found {int(k)}.")
    fold = _assign(n, int(k), _seed(key), _labels("stratify", stratify, n), _labels("groups", groups, n))
    valid = jnp.asarray(fold[None, :] == np.arange(int(k))[:, None], jnp.result_type(float))
    return Fold(arrays, 1 - valid), Fold(arrays, valid)


def _assign(n: int, k: int, seed: int | None, stratify: Any, groups: Any) -> np.ndarray:
    """The fold in which each row is validated, `[n]`."""
    if stratify is None and groups is None:
        order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
        fold = np.empty(n, int)
        for i, part in enumerate(np.array_split(order, k)):
            fold[part] = i
        return fold
    try:
        from sklearn import model_selection
    except ImportError as error:
        raise HypergradError(f"folds: stratify= and groups= need scikit-learn: {install('demo')}.") from error
    if groups is not None and len(np.unique(groups)) < k:
        raise InputError(f"folds: groups holds {len(np.unique(groups))} groups, fewer than the k={k} folds.")
    if stratify is not None and (least := int(np.unique(stratify, return_counts=True)[1].min())) < k:
        raise InputError(f"folds: a label of stratify has {least} rows, fewer than the k={k} folds: use fewer folds.")
    shuffle: dict[str, Any] = {"shuffle": True, "random_state": seed} if seed is not None else {}
    if groups is None:
        splitter = model_selection.StratifiedKFold(k, **shuffle)
    elif stratify is None:
        splitter = model_selection.GroupKFold(k)
        if seed is not None:  # renaming the groups draws which of them go together, and in which fold
            names, inverse = np.unique(groups, return_inverse=True)
            groups = np.random.default_rng(seed).permutation(len(names))[inverse]
    else:
        splitter = model_selection.StratifiedGroupKFold(k, **shuffle)
    fold = np.full(n, -1)
    for i, (_, part) in enumerate(splitter.split(np.zeros(n), stratify, groups)):
        fold[part] = i
    return fold


def _labels(name: str, labels: Any, n: int) -> np.ndarray | None:
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.shape != (n,):
        raise InputError(f"folds: {name} must be one label a row, shape ({n},), found shape {found.shape}.")
    return found


def _seed(key: Array | None) -> int | None:
    if key is None:
        return None
    if isinstance(key, Tracer):
        raise InputTypeError("folds: key is traced, but folds are made on the host: call it outside jit.")
    return int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max, jnp.int32))

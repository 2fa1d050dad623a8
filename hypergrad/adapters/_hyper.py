"""What the estimators of `adapters.sklearn` share: their settings, folds, sample weights and buckets of shapes."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from hypergrad._checks import check_choice
from hypergrad._solver import HypergradError, InputError, InputTypeError
from hypergrad.adapters._model import missing

try:
    from sklearn.base import BaseEstimator
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit, check_cv
    from sklearn.utils import column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, validate_data
except ImportError as error:
    raise missing("sklearn", "sklearn", error) from error


class Hyper(BaseEstimator):
    """Settings, groups, folds and rows; what the search is, and for which models, is a subclass's."""

    _pers: tuple[str, ...] = ("all", "feature", "group")

    per: str
    groups: Any
    cv: Any
    refit: bool
    max_iter: int
    tol: float
    random_state: Any

    def _settings(self) -> None:
        """Raise for settings that cannot work, before anything compiles."""
        name = type(self).__name__
        check_choice(name, "per", self.per, self._pers)
        if (self.groups is None) == (self.per == "group"):
            hint = "give groups=, one label a feature" if self.groups is None else "write per='group', or drop groups="
            raise InputError(f"{name}: per={self.per!r} and groups={self.groups!r} do not go together: {hint}.")
        if not isinstance(self.max_iter, numbers.Integral) or isinstance(self.max_iter, bool) or self.max_iter < 1:
            raise InputError(f"{name}: max_iter must be a positive integer, found {self.max_iter!r}.")
        if not isinstance(self.tol, numbers.Real) or not 0 <= float(self.tol) < 1:
            raise InputError(f"{name}: tol must be a number from 0 to 1, found {self.tol!r}.")
        for option in ("refit", "fit_intercept"):
            if not isinstance(getattr(self, option, True), (bool, np.bool_)):
                raise InputTypeError(f"{name}: {option} must be True or False, found {getattr(self, option)!r}.")

    def _assign(self, features: int, classes: int) -> tuple[np.ndarray, int]:
        """Which hyperparameter each coefficient has, `[d, c]`, and how many there are."""
        ones = np.ones((features, classes), int)
        if self.per == "feature":
            return np.arange(features)[:, None] * ones, features
        if self.per == "class":
            return np.arange(classes)[None, :] * ones, classes
        if self.per == "group":
            labels = np.asarray(self.groups)
            if labels.shape != (features,):
                raise InputError(
                    f"{type(self).__name__}: groups must hold one label for each of the {features} features, "
                    f"found shape {labels.shape}."
                )
            self.groups_, inverse = np.unique(labels, return_inverse=True)
            return inverse[:, None] * ones, len(self.groups_)
        return 0 * ones, 1

    def _folds(self, X: np.ndarray, y: np.ndarray, classify: bool) -> np.ndarray:
        """The rows that train `[k, n]` (True), and those that validate (False)."""
        name = type(self).__name__
        cv: Any = self.cv
        if isinstance(cv, numbers.Real) and not isinstance(cv, numbers.Integral):
            if not 0 < float(cv) < 1:
                raise InputError(f"{name}: cv={cv!r} as a share of the rows to validate on must be between 0 and 1.")
            split = StratifiedShuffleSplit if classify else ShuffleSplit
            cv = split(1, test_size=float(cv), random_state=self.random_state)
        splitter: Any = cv
        try:
            folds: Any = check_cv(splitter, y, classifier=classify)
        except ValueError as error:
            raise InputError(f"{name}: cv must be a number of folds, a share, a splitter or splits: {error}") from error
        parts = list(folds.split(X, y))
        if not parts:
            raise InputError(f"{name}: cv has no splits.")
        masks = np.zeros((2, len(parts), len(X)))
        for i, part in enumerate(parts):
            for mask, rows in zip(masks, part, strict=True):
                np.add.at(mask[i], np.arange(len(X))[rows], 1.0)
        return masks

    def _shares(self, masks: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the rows that train, `[k + 1, n]`, the last of all rows, and of those that validate, `[k, n]`."""
        train, valid = masks * weight
        for what, part in (("trains", train), ("validates", valid)):
            if not np.all(part.sum(axis=1) > 0):
                raise InputError(f"{type(self).__name__}: a fold of cv {what} on no row with a positive sample_weight.")
        return np.concatenate([train, weight[None]]), valid

    def _found(self, value: Any, steps: Any, converged: Any) -> None:
        """Keep how the search ended."""
        if not np.isfinite(value):
            raise HypergradError(
                f"{type(self).__name__}: the validation loss is not finite at any hyperparameter: standardise X and y."
            )
        self.n_iter_, self.converged_ = int(steps), bool(converged)
        self.validation_loss_ = float(value)

    def _weights(self, sample_weight: Any, X: np.ndarray) -> np.ndarray:
        return _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)

    def _read(self, X: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._settings()
        read: Any = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        X, y = read
        return X, np.asarray(y, np.float64), self._weights(sample_weight, X)

    def _read_classes(self, X: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray]:
        """Rows, labels, their weights, and the labels as zeros and ones `[n, classes]`; sets `classes_`."""
        self._settings()
        read: Any = validate_data(self, X, y, dtype=np.float64)
        X, y = read
        check_classification_targets(y)
        weight = self._weights(sample_weight, X)
        self.classes_, codes = np.unique(column_or_1d(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"{type(self).__name__}: y must hold two classes at least, found one class, {y[0]!r}.")
        return X, y, weight, np.eye(len(self.classes_))[codes]


def bucket(size: int, least: int = 16) -> int:
    """The next power of two; beyond 128, the next eighth of one."""
    power = max(least, 1 << max(size - 1, 0).bit_length())
    eighth = power // 16
    return power if power <= 128 else -(-size // eighth) * eighth


def pad(a: np.ndarray, axis: int, size: int) -> Any:
    """Zeros at the end of an axis, up to a size."""
    return np.pad(a, [(0, size - a.shape[i] if i == axis else 0) for i in range(a.ndim)])

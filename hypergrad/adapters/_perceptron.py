"""The perceptrons of `adapters.sklearn`, whose weight decays are tuned by hypergradients while they train.

`adapters._mlp` has the equations, and the costs.
"""

from __future__ import annotations

import itertools
import numbers
from typing import Any

import jax
import numpy as np

from hypergrad._checks import check_choice
from hypergrad._solver import InputError
from hypergrad.adapters import _mlp
from hypergrad.adapters._hyper import Hyper, bucket, pad
from hypergrad.adapters._model import missing

try:
    from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise missing("sklearn", "sklearn", error) from error

_GRID = np.log([1e-4, 1e-3, 1e-2, 1e-1])
_ROWS = 256  # at least, padded: compiling takes longer than what rows of no weight cost
_ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "logistic": lambda z: 0.5 * (1 + np.tanh(0.5 * z)),
    "identity": lambda z: z,
}


class _Perceptron(Hyper):
    """Settings, the call of the compiled search, and outputs of the networks that it found."""

    _kind: str
    _pers = ("layer", "all", "feature", "group")
    coefs_: Any
    intercepts_: Any

    def __init__(
        self,
        hidden_layer_sizes: Any = (32,),
        *,
        activation: str = "tanh",
        per: str = "layer",
        groups: Any = None,
        cv: Any = 5,
        refit: bool = True,
        max_iter: int = 200,
        tol: float = 1e-5,
        random_state: Any = None,
    ):
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.per = per
        self.groups = groups
        self.cv = cv
        self.refit = refit
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _hidden(self) -> tuple[int, ...]:
        """The widths of the hidden layers; raises for what are none, before anything compiles."""
        sizes = self.hidden_layer_sizes
        sizes = (sizes,) if isinstance(sizes, numbers.Integral) else sizes
        whole = isinstance(sizes, (tuple, list, np.ndarray)) and all(
            isinstance(size, numbers.Integral) and not isinstance(size, bool) and int(size) > 0 for size in sizes
        )
        if not whole or not len(sizes):
            raise InputError(
                f"{type(self).__name__}: hidden_layer_sizes must hold a positive integer a hidden layer, found "
                f"{self.hidden_layer_sizes!r}: write (32,), or (64, 32) for two."
            )
        check_choice(type(self).__name__, "activation", self.activation, tuple(_ACTIVATIONS))
        return tuple(int(size) for size in sizes)

    def _search(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray, masks: np.ndarray) -> None:
        """Standardise X, pad everything to its bucket, search, and keep networks that take X as it is."""
        hidden = self._hidden()
        train, valid = self._shares(masks, weight)
        middle = np.average(X, axis=0, weights=weight)
        spread = np.sqrt(np.average((X - middle) ** 2, axis=0, weights=weight))
        spread = np.where(spread > 1e-12 * np.abs(X).max(initial=1e-300), spread, 1.0)
        rows, columns = bucket(max(len(X), _ROWS)), bucket(X.shape[1])
        width = y.shape[1] if y.shape[1] == 1 else bucket(y.shape[1], 4)
        if self.per == "layer":
            first, count = np.zeros(X.shape[1], int), 1
        else:
            assign, count = self._assign(X.shape[1], 1)
            first = assign[:, 0]
        rest: Any = np.arange(count, count + len(hidden)) if self.per != "all" else np.zeros(len(hidden), int)
        total = count if self.per == "all" else count + len(hidden)
        data = _mlp.Data(
            pad(pad((X - middle) / spread, 0, rows), 1, columns),
            pad(pad(y, 0, rows), 1, width),
            pad(np.ones(y.shape[1]), 0, width),
            pad(train, 1, rows),
            pad(valid, 1, rows),
            pad(first, 0, columns),
            rest,
        )
        start = self._start((X.shape[1], *hidden, y.shape[1]), columns, width)
        grid = np.tile(_GRID[:, None], (1, bucket(total, 4)))
        with jax.enable_x64(True):
            search: Any = _mlp.program(self._kind, self.activation)
            found = jax.device_get(search(data, start, grid, np.int32(self.max_iter), np.float64(self.tol)))
        self._found(found.best.value, found.steps, found.converged)
        decays = np.exp(found.best.log[:total])
        self.alpha_ = float(decays[0]) if self.per == "all" else decays
        nets = [(w, b) for w, b in found.best.nets]
        nets[0] = (nets[0][0][:, : X.shape[1]], nets[0][1])
        nets[-1] = (nets[-1][0][:, :, : y.shape[1]], nets[-1][1][:, : y.shape[1]])
        w, b = nets[0]
        w = w / spread[None, :, None]
        nets[0] = (w, b - np.einsum("d,kdh->kh", middle, w))
        kept = -1 if self.refit else slice(None, -1)
        self.coefs_, self.intercepts_ = [w[kept] for w, _ in nets], [b[kept] for _, b in nets]

    def _start(self, sizes: tuple[int, ...], columns: int, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weights of variance 1/inputs, from what there is of columns and outputs, so that padding changes nothing."""
        draw = check_random_state(self.random_state)
        net = [
            (draw.normal(size=(fan, units)) / np.sqrt(fan), np.zeros(units)) for fan, units in itertools.pairwise(sizes)
        ]
        net[0] = (pad(net[0][0], 0, columns), net[0][1])
        net[-1] = (pad(net[-1][0], 1, width), pad(net[-1][1], 0, width))
        return net

    def _networks(self, X: Any) -> list[np.ndarray]:
        """The outputs `[n, c]` of each network: one, or without `refit` one a fold."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        parts = range(1) if self.refit else range(len(self.coefs_[0]))
        found = []
        for part in parts:
            z = X
            for i, (w, b) in enumerate(zip(self.coefs_, self.intercepts_, strict=True)):
                z = z if i == 0 else _ACTIVATIONS[self.activation](z)
                z = z @ (w if self.refit else w[part]) + (b if self.refit else b[part])
            found.append(z)
        return found


class HyperMLPRegressor(MultiOutputMixin, RegressorMixin, _Perceptron):
    r"""A perceptron for regression with a weight decay for each layer or feature, tuned by hypergradients.

        min over w, b of  Σ s_i (y_i − f(x_i))² / (2 Σ s_i) + ½ Σ α_j w_j²,   f a network of tanh units

    X and y are standardised inside, by the moments of all rows that are fitted, and the decays are relative to that. A
    feature that does not matter gets a large decay with `per="feature"`. Training is by full batches of Adam; among
    all calls the one with the lowest validation loss counts, so that training may stop early.

    Args:
        hidden_layer_sizes: units of the hidden layers.
        activation: `"tanh"`, `"relu"`, `"logistic"` or `"identity"`.
        per: who has a decay of its own: `"layer"`; `"feature"` or `"group"`, in the first layer, and each further
            layer; or `"all"`, one for all.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable of splits.
        refit: take the network that was trained on all rows along the same path; False averages those of the folds.
        max_iter: most hypergradients, after a grid of shared decays.
        tol: relative gain of the validation loss below which sixty steps in a row end the search.
        random_state: of the weights at the start, and of the split, where `cv` is a share.

    Attributes:
        alpha_: the decays: a number for `per="all"`, else those of the first layer (one, `[n_features]`, or one a group
            in the order of `groups_`) and then one for each further layer.
        coefs_: weights `[inputs, units]` of each layer, for X as it is; without `refit` `[folds, inputs, units]`.
        intercepts_: biases `[units]` of each layer; without `refit` `[folds, units]`.
        validation_loss_: mean over the folds of half the squared error, in units of the variance of y.
        n_iter_: hypergradients.
        converged_: whether it ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work.
        HypergradError: on import, if scikit-learn is not installed.

    >>> import numpy as np
    >>> from hypergrad.adapters.sklearn import HyperMLPRegressor
    >>> X = np.random.default_rng(0).uniform(-2, 2, (60, 4))
    >>> model = HyperMLPRegressor((8,), per="feature", cv=0.25, max_iter=30, random_state=0)
    >>> int(np.argmin(model.fit(X, np.sin(2 * X[:, 0])).alpha_[:4]))  # three features of four are noise
    0
    """

    _kind = "squared"

    def fit(self, X, y, sample_weight=None):
        """Tune the decays over the folds while networks train, one of them on all rows.

        Args:
            X: features `[n, n_features]`.
            y: targets `[n]` or `[n, n_targets]`.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        X, y, weight = self._read(X, y, sample_weight)
        self._hidden()
        targets = y.reshape(len(y), -1)
        middle = np.average(targets, axis=0, weights=weight)
        spread = np.sqrt(np.average((targets - middle) ** 2, axis=0, weights=weight))
        spread = np.where(spread > 0, spread, 1.0)
        self._search(X, (targets - middle) / spread, weight, self._folds(X, y, False))
        self.coefs_[-1] = self.coefs_[-1] * spread
        self.intercepts_[-1] = self.intercepts_[-1] * spread + middle
        self._flat = y.ndim == 1
        return self

    def predict(self, X):
        """Predicted targets, `[n]` or `[n, n_targets]`, as `y` was."""
        found = np.mean(self._networks(X), axis=0)
        return found[:, 0] if self._flat else found


class HyperMLPClassifier(ClassifierMixin, _Perceptron):
    r"""A perceptron for classification with a weight decay for each layer or feature, tuned by hypergradients.

        min over w, b of  Σ s_i nll_i(f(x_i)) / Σ s_i + ½ Σ α_j w_j²,   f a network of tanh units, softmax outputs

    In the names of `MLPClassifier`, `alpha` is α times the number of rows. X is standardised inside, by the moments of
    all rows that are fitted. Training is by full batches of Adam; among all calls the one with the lowest validation
    loss counts, so that training may stop early.

    Args:
        hidden_layer_sizes: units of the hidden layers.
        activation: `"tanh"`, `"relu"`, `"logistic"` or `"identity"`.
        per: who has a decay of its own: `"layer"`; `"feature"` or `"group"`, in the first layer, and each further
            layer; or `"all"`, one for all.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of stratified folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable
            of splits.
        refit: take the network that was trained on all rows along the same path; False averages the probabilities of
            those of the folds.
        max_iter: most hypergradients, after a grid of shared decays.
        tol: relative gain of the validation loss below which sixty steps in a row end the search.
        random_state: of the weights at the start, and of the split, where `cv` is a share.

    Attributes:
        classes_: the labels, sorted.
        alpha_: the decays: a number for `per="all"`, else those of the first layer (one, `[n_features]`, or one a group
            in the order of `groups_`) and then one for each further layer.
        coefs_: weights `[inputs, units]` of each layer, for X as it is; without `refit` `[folds, inputs, units]`.
        intercepts_: biases `[units]` of each layer; without `refit` `[folds, units]`.
        validation_loss_: mean over the folds of the log-loss, in nats.
        n_iter_: hypergradients.
        converged_: whether it ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work, and for a single class.
        HypergradError: on import, if scikit-learn is not installed.

    >>> from sklearn.datasets import load_iris
    >>> from hypergrad.adapters.sklearn import HyperMLPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = HyperMLPClassifier((8,), cv=0.25, max_iter=20, random_state=0).fit(X, y)
    >>> model.alpha_.shape, bool(model.score(X, y) > 0.95)
    ((2,), True)
    """

    _kind = "log_loss"

    def fit(self, X, y, sample_weight=None):
        """Tune the decays over the folds while networks train, one of them on all rows.

        Args:
            X: features `[n, n_features]`.
            y: labels `[n]`, of any type.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        X, y, weight, one_hot = self._read_classes(X, y, sample_weight)
        self._hidden()
        self._search(X, one_hot, weight, self._folds(X, y, True))
        return self

    def predict_log_proba(self, X):
        """Logarithms of the probabilities, `[n, n_classes]`."""
        parts = []
        for z in self._networks(X):
            z = z - z.max(axis=1, keepdims=True)
            parts.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
        return parts[0] if len(parts) == 1 else np.logaddexp.reduce(parts, axis=0) - np.log(len(parts))

    def predict_proba(self, X):
        """Probabilities of the classes, `[n, n_classes]`, in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X):
        """The most probable labels, `[n]`."""
        most = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[most]

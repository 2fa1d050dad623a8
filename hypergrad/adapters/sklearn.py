r"""Estimators for scikit-learn whose penalties and length scales are tuned by hypergradients while they fit.

    model = make_pipeline(StandardScaler(), hypergrad.adapters.sklearn.HyperRidge(per="feature")).fit(X, y)

Each minimises its validation loss over a split or K folds, first over a grid of shared strengths and then by L-BFGS
over one for each feature, group of features or class; then it fits all rows (`adapters._dense` has the equations and
the costs). Differs from scikit-learn's own *CV estimators in:
1. there may be hundreds of hyperparameters, and the grid is where the search starts, not where it ends;
2. a hyperparameter is judged by the mean over folds of the squared error, or of the log-loss, weighted by
   `sample_weight`; there is no `scoring`;
3. everything is computed in float64, as scikit-learn does, whatever precision JAX is set to;
4. the first fit in a process compiles, for a few seconds; the next one of about the same shape (rows, features and
   hyperparameters up to the next power of two, beyond 128 up to the next eighth of one) does not.

`HyperMLPClassifier` and `HyperMLPRegressor` are networks: their decays move while they train (`adapters._mlp`).

Matrices are dense: for up to a few thousand features times classes, and a few thousand rows in `HyperKernelRidge`.
With many hyperparameters for few rows a low validation loss may be luck: compare `per="all"` on data of your own.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from hypergrad.adapters import _dense
from hypergrad.adapters._model import missing

try:
    from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise missing("sklearn", "sklearn", error) from error

from hypergrad.adapters._hyper import Hyper, bucket, pad
from hypergrad.adapters._perceptron import HyperMLPClassifier as HyperMLPClassifier
from hypergrad.adapters._perceptron import HyperMLPRegressor as HyperMLPRegressor

_GRID = np.log(10.0) * np.linspace(-6, 3, 10)  # strengths, beside the mean curvature of a feature
_TOGETHER = 0.5  # τ of `HyperKernelRidge`, chosen on two problems, tried on seven others


class _Dense(Hyper):
    """Models of `adapters._dense`: the call of its compiled search."""

    _kind: str

    def __init__(
        self,
        *,
        per: str = "feature",
        groups: Any = None,
        cv: Any = 5,
        fit_intercept: bool = True,
        refit: bool = True,
        max_iter: int = 100,
        tol: float = 1e-5,
        random_state: Any = None,
    ):
        self.per = per
        self.groups = groups
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.refit = refit
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _tune(
        self,
        X: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        masks: np.ndarray,
        assign: np.ndarray,
        grid: np.ndarray,
        prior: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Any:
        """Pad to the bucket and search: a `_dense.Tuned` of NumPy arrays, padded rows and columns at their ends.

        `prior` holds the unit and the precision of each logarithm: they are drawn together. What validates is to the
        squared error as data are to a Gaussian likelihood of unknown variance, n / 2 log loss, so that the logarithm of
        the loss gains 2 / n of what the prior says.
        """
        train, valid = self._shares(masks, weight)
        none = np.zeros(grid.shape[1])
        unit, precision = prior or (none, none)
        count = valid.sum() ** 2 / (valid**2).sum()  # rows that validate, by Kish's count where weights differ
        rows, columns = bucket(len(X)), bucket(X.shape[1])
        data = _dense.Data(
            pad(pad(X, 0, rows), 1, columns),
            pad(y, 0, rows),
            pad(train, 1, rows),
            pad(valid, 1, rows),
            pad(assign, 0, columns),
            pad(unit, 0, len(unit)),
            precision / count,
        )
        with jax.enable_x64(True):
            search: Any = _dense.program(self._kind, bool(self.fit_intercept))
            # In one transfer each way: at this size they are most of the time.
            tuned = jax.device_get(search(data, grid, np.int32(self.max_iter), np.float64(self.tol)))
        self._found(tuned.value, tuned.steps, tuned.converged)
        return tuned

    def _chosen(self, parts: np.ndarray) -> np.ndarray:
        """The model of all rows; without `refit`, the mean of the folds' models."""
        return parts[-1] if self.refit else parts[:-1].mean(axis=0)

    def _shaped(self, log: np.ndarray, count: int) -> Any:
        """Strengths as a number where all share one, else as an array."""
        found = np.exp(np.clip(log[:count], -46, 46))
        return float(found[0]) if self.per == "all" else found


class _HyperRegressor(MultiOutputMixin, RegressorMixin, _Dense):
    """Of one target or several."""


class _HyperShared(_Dense):
    """The same, with one strength for all coefficients unless another `per` is asked for."""

    def __init__(
        self,
        *,
        per="all",
        groups=None,
        cv=5,
        fit_intercept=True,
        refit=True,
        max_iter=100,
        tol=1e-5,
        random_state=None,
    ):
        super().__init__(
            per=per,
            groups=groups,
            cv=cv,
            fit_intercept=fit_intercept,
            refit=refit,
            max_iter=max_iter,
            tol=tol,
            random_state=random_state,
        )


class _Predictions:
    """A linear model's outputs."""

    coef_: Any
    intercept_: Any

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_.T + self.intercept_


class HyperRidge(_Predictions, _HyperRegressor):
    r"""Ridge regression with a penalty for each feature, tuned by hypergradients.

        min over w, b of  Σ s_i (y_i − x_i·w − b)² + Σ α_j w_j²

    The α of most noise features goes to where their coefficients are zero. Standardise the features first: the grid of
    shared strengths, where the search starts, is relative to their mean variance.

    Args:
        per: `"feature"`, `"group"` or `"all"` (one α, as in `RidgeCV`): who has a penalty of its own.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable of splits.
        fit_intercept: whether to fit b, which is not penalised.
        refit: whether to fit all rows at the end; False averages the models of the folds.
        max_iter: largest number of evaluations of the hypergradient.
        tol: relative gain of the validation loss below which six steps in a row end the search.
        random_state: seed of the split, where `cv` is a share.

    Attributes:
        alpha_: the penalties: a number for `per="all"`, else `[n_features]`, or one a group in the order of `groups_`.
        coef_: `[n_features]`, or `[n_targets, n_features]`.
        intercept_: a number, or `[n_targets]`.
        validation_loss_: mean over the folds of the squared error, at `alpha_`.
        n_iter_: evaluations of the hypergradient.
        converged_: whether the search ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work.
        HypergradError: on import, if scikit-learn is not installed.

    >>> import numpy as np
    >>> from sklearn.datasets import make_regression
    >>> from hypergrad.adapters.sklearn import HyperRidge
    >>> X, y, w = make_regression(60, 12, n_informative=3, noise=20.0, coef=True, random_state=0)
    >>> model = HyperRidge().fit(X, y)
    >>> bool(np.median(model.alpha_[w == 0]) > 100 * model.alpha_[w != 0].max())  # noise is switched off
    True
    """

    _kind = "ridge"

    def fit(self, X, y, sample_weight=None):
        """Tune the penalties over the folds, and fit all rows with them.

        Args:
            X: features `[n, n_features]`.
            y: targets `[n]` or `[n, n_targets]`.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        X, y, weight = self._read(X, y, sample_weight)
        targets = y.reshape(len(y), -1)
        assign, count = self._assign(X.shape[1], targets.shape[1])
        log = np.full(bucket(count, 1), np.log(_curvature(X, weight, bool(self.fit_intercept))))
        tuned = self._tune(X, targets, weight, self._folds(X, y, False), assign, log[None, :] + _GRID[:, None])
        self.alpha_ = self._shaped(tuned.log, count)
        coef, intercept = self._chosen(tuned.fits.coef)[: X.shape[1]].T, self._chosen(tuned.fits.intercept)
        self.coef_, self.intercept_ = (coef[0], float(intercept[0])) if y.ndim == 1 else (coef, intercept)
        return self

    def predict(self, X):
        """Predicted targets, `[n]` or `[n, n_targets]`, as `y` was."""
        return self._outputs(X)


class HyperElasticNet(_Predictions, RegressorMixin, _HyperShared):
    r"""Elastic net with an L1 and an L2 strength for each feature, tuned by hypergradients.

        min over w, b of  Σ s_i (y_i − x_i·w − b)² / (2 Σ s_i) + Σ a_j |w_j| + ½ Σ b_j w_j²

    In the names of `ElasticNet`, a = alpha · l1_ratio and b = alpha · (1 − l1_ratio). A feature that an L1 strength has
    switched off in every fold has no hypergradient, and stays off: the grid decides which ones come to the search.

    Args:
        per: `"all"` (one pair, as in `ElasticNetCV`), `"feature"` or `"group"`: who has strengths of its own.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable of splits.
        fit_intercept: whether to fit b, which is not penalised.
        refit: whether to fit all rows at the end; False averages the models of the folds.
        max_iter: largest number of evaluations of the hypergradient.
        tol: relative gain of the validation loss below which six steps in a row end the search.
        random_state: seed of the split, where `cv` is a share.

    Attributes:
        l1_: the a: a number for `per="all"`, else `[n_features]`, or one a group in the order of `groups_`.
        l2_: the b, likewise.
        alpha_: a + b.
        l1_ratio_: a / (a + b).
        coef_: `[n_features]`.
        intercept_: a number.
        validation_loss_: mean over the folds of the squared error.
        n_iter_: evaluations of the hypergradient.
        converged_: whether the search ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work.
        HypergradError: on import, if scikit-learn is not installed.

    >>> from sklearn.datasets import make_regression
    >>> from hypergrad.adapters.sklearn import HyperElasticNet
    >>> X, y, w = make_regression(60, 12, n_informative=3, noise=20.0, coef=True, random_state=0)
    >>> model = HyperElasticNet().fit(X, y)
    >>> bool((model.coef_[w != 0] != 0).all())
    True
    """

    _kind = "elastic_net"

    def fit(self, X, y, sample_weight=None):
        """Tune the strengths over the folds, and fit all rows with them.

        Args:
            X: features `[n, n_features]`.
            y: targets `[n]`.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        self._settings()
        read: Any = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        X, y = read
        y, weight = np.asarray(y, np.float64), self._weights(sample_weight, X)
        assign, count = self._assign(X.shape[1], 1)
        total = weight.sum()
        centred = (y - weight @ y / total) if self.fit_intercept else y
        middle = weight @ X / total if self.fit_intercept else np.zeros(X.shape[1])
        largest = np.abs((X - middle).T @ (weight * centred)).max() / total or 1.0  # above it every coefficient is 0
        size = _curvature(X, weight, bool(self.fit_intercept)) / total
        half = np.ones(bucket(count, 1))
        starts = [(largest * f, size * f * ratio) for f in np.geomspace(0.5, 5e-4, 7) for ratio in (1e-3, 1.0)]
        grid = np.log([np.concatenate([a * half, b * half]) for a, b in starts])
        tuned = self._tune(X, y[:, None], weight, self._folds(X, y, False), assign, grid)
        first, second = np.split(tuned.log, 2)
        self.l1_, self.l2_ = self._shaped(first, count), self._shaped(second, count)
        self.alpha_ = self.l1_ + self.l2_
        self.l1_ratio_ = self.l1_ / self.alpha_
        self.coef_ = self._chosen(tuned.fits.coef)[: X.shape[1], 0]
        self.intercept_ = float(self._chosen(tuned.fits.intercept)[0])
        return self

    def predict(self, X):
        """Predicted targets, `[n]`."""
        return self._outputs(X)


class HyperLogisticRegression(_Predictions, ClassifierMixin, _HyperShared):
    r"""Logistic regression with a penalty for each feature or class, tuned by hypergradients of the log-loss.

        min over w, b of  Σ s_i nll_i(w, b) + ½ Σ α_jc w_jc²

    One logit for two classes, softmax for more. In the names of `LogisticRegression`, C = 1/α.

    Args:
        per: `"all"` (one α, as in `LogisticRegressionCV`), `"feature"`, `"group"` or `"class"`: who has a penalty of
            its own. With few rows for each, `"all"` is the safe choice.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of stratified folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable
            of splits.
        fit_intercept: whether to fit b, which is not penalised.
        refit: whether to fit all rows at the end; False averages the models of the folds.
        max_iter: largest number of evaluations of the hypergradient.
        tol: relative gain of the validation loss below which six steps in a row end the search.
        random_state: seed of the split, where `cv` is a share.

    Attributes:
        classes_: the labels, sorted.
        alpha_: the penalties: a number for `per="all"`, else `[n_features]`, one a group in the order of `groups_`, or
            one a row of `coef_` for `per="class"`.
        C_: 1/α.
        coef_: `[1, n_features]` for two classes, else `[n_classes, n_features]`.
        intercept_: `[1]` or `[n_classes]`.
        validation_loss_: mean over the folds of the log-loss, in nats.
        n_iter_: evaluations of the hypergradient, `[1]`.
        converged_: whether the search ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work, and for a single class.
        HypergradError: on import, if scikit-learn is not installed.

    >>> from sklearn.datasets import load_iris
    >>> from hypergrad.adapters.sklearn import HyperLogisticRegression
    >>> X, y = load_iris(return_X_y=True)
    >>> model = HyperLogisticRegression(per="class").fit(X, y)
    >>> model.alpha_.shape, bool(model.score(X, y) > 0.95)
    ((3,), True)
    """

    _kind = "logistic"
    _pers = ("all", "feature", "group", "class")

    def fit(self, X, y, sample_weight=None):
        """Tune the penalties over the folds, and fit all rows with them.

        Args:
            X: features `[n, n_features]`.
            y: labels `[n]`, of any type.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        X, y, weight, one_hot = self._read_classes(X, y, sample_weight)
        targets = one_hot[:, 1:] if len(self.classes_) == 2 else one_hot
        assign, count = self._assign(X.shape[1], targets.shape[1])
        log = np.full(bucket(count, 1), np.log(_curvature(X, weight, bool(self.fit_intercept)) / 4))
        grid = log[None, :] + _GRID[:, None]
        tuned = self._tune(X, targets, weight, self._folds(X, y, True), assign, grid)
        self.n_iter_ = np.array([self.n_iter_])
        self.alpha_ = self._shaped(tuned.log, count)
        self.C_ = 1 / self.alpha_
        self.coef_ = self._chosen(tuned.fits.coef)[: X.shape[1]].T
        self.intercept_ = self._chosen(tuned.fits.intercept)
        return self

    def decision_function(self, X):
        """Logits, `[n]` for two classes, else `[n, n_classes]`."""
        z = self._outputs(X)
        return z[:, 0] if z.shape[1] == 1 else z

    def predict_log_proba(self, X):
        """Logarithms of the probabilities, `[n, n_classes]`."""
        z = self._outputs(X)
        z = np.hstack([np.zeros_like(z), z]) if z.shape[1] == 1 else z
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def predict_proba(self, X):
        """Probabilities of the classes, `[n, n_classes]`, in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X):
        """The most probable labels, `[n]`."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(axis=1)]


class HyperKernelRidge(_HyperRegressor):
    r"""Kernel ridge regression with a length scale for each feature, tuned by hypergradients.

        f(x) = b + Σ a_i exp(−½ Σ_j (x_j − x_ij)² / ℓ_j²),   min Σ s_i (y_i − f(x_i))² + α |f|²

    A feature that does not matter gets a length scale much longer than its spread. The intercept b is the mean of y.
    As many length scales as features fit the folds better than new rows, so a prior draws them together: of n rows that
    validate, log (validation loss) + Σ (z_j − mean z)² / (n τ²) is minimised over z_j = log(ℓ_j / spread of x_j), with
    τ = ½, the standard deviation of a log-normal. A feature that matters outweighs it; `per="all"` has no prior.

    Args:
        per: `"feature"`, `"group"` or `"all"`: who has a length scale of its own. There is one α.
        groups: labels `[n_features]`, for `per="group"`.
        cv: number of folds, share of the rows to validate on (0.25), splitter of scikit-learn, or iterable of splits.
        fit_intercept: whether to subtract the mean of y first.
        refit: whether to fit all rows at the end; False averages the models of the folds.
        max_iter: largest number of evaluations of the hypergradient.
        tol: relative gain of the validation loss below which six steps in a row end the search.
        random_state: seed of the split, where `cv` is a share.

    Attributes:
        length_scale_: the ℓ, in units of the features: a number for `per="all"`, else `[n_features]`, or one a group
            in the order of `groups_`.
        alpha_: the ridge strength.
        dual_coef_: the a, `[n]` or `[n, n_targets]`.
        intercept_: a number, or `[n_targets]`.
        X_fit_: the training rows.
        validation_loss_: mean over the folds of the squared error.
        n_iter_: evaluations of the hypergradient.
        converged_: whether the search ended by `tol`.
        groups_: distinct labels of `groups`, sorted.
        n_features_in_: number of features.

    Raises:
        InputError: by `fit`, for settings that cannot work.
        HypergradError: on import, if scikit-learn is not installed.

    >>> import numpy as np
    >>> from hypergrad.adapters.sklearn import HyperKernelRidge
    >>> X = np.random.default_rng(0).uniform(-2, 2, (60, 4))
    >>> model = HyperKernelRidge(cv=3).fit(X, np.sin(2 * X[:, 0]))  # three features of four are noise
    >>> int(np.argmin(model.length_scale_))
    0
    """

    _kind = "kernel_ridge"

    def fit(self, X, y, sample_weight=None):
        """Tune length scales and strength over the folds, and fit all rows with them.

        Args:
            X: features `[n, n_features]`.
            y: targets `[n]` or `[n, n_targets]`.
            sample_weight: weights of the rows `[n]`, in training and in validation.
        """
        X, y, weight = self._read(X, y, sample_weight)
        targets = y.reshape(len(y), -1)
        assign, count = self._assign(X.shape[1], targets.shape[1])
        spread = np.sqrt(np.average((X - np.average(X, axis=0, weights=weight)) ** 2, axis=0, weights=weight))
        # Where features share a length, one that suits the widest of them leaves no distance underflowing.
        spread = np.where(spread > 0, spread, spread.max() or 1.0) * np.sqrt(X.shape[1])
        lengths = np.ones(bucket(count, 1))
        for j in range(count):
            lengths[j] = spread[assign[:, 0] == j].max()
        starts = [(f * lengths, a) for f in (0.5, 1.0, 2.0) for a in np.geomspace(1e-4, 10, 6)]
        grid = np.log([np.append(length, a) for length, a in starts])
        prior = np.append(np.log(lengths), 0.0), np.append(np.arange(len(lengths)) < count, 0) / _TOGETHER**2
        tuned = self._tune(X, targets, weight, self._folds(X, y, False), assign, grid, prior)
        self.length_scale_, self.alpha_ = self._shaped(tuned.log, count), float(np.exp(tuned.log[-1]))
        dual, intercept = self._chosen(tuned.fits.coef)[: len(X)], self._chosen(tuned.fits.intercept)
        self.X_fit_ = X
        self._lengths = np.ravel(self.length_scale_)[assign[:, 0]]
        self.dual_coef_, self.intercept_ = (dual[:, 0], float(intercept[0])) if y.ndim == 1 else (dual, intercept)
        return self

    def predict(self, X):
        """Predicted targets, `[n]` or `[n, n_targets]`, as `y` was."""
        from sklearn.metrics.pairwise import rbf_kernel

        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        kernel = rbf_kernel(X / self._lengths, self.X_fit_ / self._lengths, gamma=0.5)
        return kernel @ self.dual_coef_ + self.intercept_


def _curvature(X: np.ndarray, weight: np.ndarray, centre: bool) -> float:
    """Mean over the features of Σ s (x − mean)², by which a strength is large or small."""
    middle = weight @ X / weight.sum() if centre else np.zeros(X.shape[1])
    return float(np.mean(weight @ (X - middle) ** 2)) or 1.0

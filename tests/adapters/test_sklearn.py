"""The estimators keep scikit-learn's contract, find its optimum where that is theirs, and beat it where it is not."""

from __future__ import annotations

import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, make_regression
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import hypergrad as hg
from hypergrad.adapters import _dense
from hypergrad.adapters.sklearn import HyperElasticNet, HyperKernelRidge, HyperLogisticRegression, HyperRidge

ESTIMATORS = (HyperRidge, HyperElasticNet, HyperLogisticRegression, HyperKernelRidge)
# Few folds and steps, as scikit-learn checks its own.
small = lambda estimator: estimator(cv=3, max_iter=5)


@pytest.mark.usefixtures("once")
@parametrize_with_checks([small(HyperRidge)])
def test_scikit_learns_checks_pass_for_ridge(estimator, check):
    check(estimator)


@pytest.mark.experiment
@pytest.mark.usefixtures("once")
@parametrize_with_checks([small(estimator) for estimator in ESTIMATORS[1:]])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


def regression(seed: int, n: int = 60, d: int = 12, informative: int = 3, noise: float = 20.0):
    return make_regression(n, d, n_informative=informative, noise=noise, coef=True, random_state=seed)


def test_one_shared_strength_is_that_of_a_dense_grid():
    """RidgeCV over 2,001 strengths and the same folds."""
    X, y = load_diabetes(return_X_y=True)
    X, y = 20 * X[:60], y[:60]
    folds = list(KFold(4, shuffle=True, random_state=0).split(X))
    found = HyperRidge(per="all", cv=folds, tol=1e-12).fit(X, y)

    def loss(log):
        a, total = np.exp(log), 0.0
        for train, valid in folds:
            x_mean, y_mean = X[train].mean(0), y[train].mean()
            x = X[train] - x_mean
            w = np.linalg.solve(x.T @ x + a * np.eye(10), x.T @ (y[train] - y_mean))
            total += np.mean((X[valid] @ w - x_mean @ w + y_mean - y[valid]) ** 2) / len(folds)
        return total

    low, high = np.log(1e-4), np.log(1e4)
    grid = np.linspace(low, high, 2001)
    best = grid[np.argmin([loss(log) for log in grid])]
    for width in (1e-2, 1e-4, 1e-6):
        around = best + width * np.linspace(-1, 1, 41)
        best = around[np.argmin([loss(log) for log in around])]
    np.testing.assert_allclose(found.validation_loss_, loss(best), rtol=1e-9)
    np.testing.assert_allclose(np.log(found.alpha_), best, atol=1e-3)
    theirs = RidgeCV(np.exp(best + np.linspace(-1, 1, 41)), cv=folds, scoring="neg_mean_squared_error").fit(X, y)
    np.testing.assert_allclose(found.alpha_, theirs.alpha_, rtol=0.06)
    np.testing.assert_allclose(found.coef_, RidgeCV([found.alpha_], cv=folds).fit(X, y).coef_, rtol=1e-9)
    np.testing.assert_allclose(found.intercept_, RidgeCV([found.alpha_], cv=folds).fit(X, y).intercept_, rtol=1e-9)


def test_a_penalty_for_each_feature_switches_noise_off_and_beats_ridge_cv():
    for seed in range(5):
        X, y, w = regression(seed, n=400, d=60, informative=5, noise=50.0)
        train, test = slice(0, 100), slice(100, None)
        found = HyperRidge(per="feature").fit(X[train], y[train])
        plain = RidgeCV(np.logspace(-3, 4, 20), cv=5).fit(X[train], y[train])
        assert np.median(found.alpha_[w == 0]) > 100 * np.median(found.alpha_[w != 0])
        assert found.score(X[test], y[test]) > plain.score(X[test], y[test])


def test_the_fit_is_scikit_learns_at_the_penalty_that_was_found():
    X, y = load_iris(return_X_y=True)
    for labels in (y, np.array(["a", "b", "b"])[y]):
        found = HyperLogisticRegression(max_iter=3).fit(X, labels)
        theirs = LogisticRegression(C=found.C_, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(X, labels)
        np.testing.assert_allclose(found.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
        assert (found.predict(X) == theirs.predict(X)).all()


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_each_regression_is_scikit_learns_own_at_the_hyperparameters_that_were_found(fit_intercept):
    X, y, _ = regression(5, n=30, d=3, informative=2, noise=3.0)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, len(y))
    options = {"cv": 3, "max_iter": 4, "fit_intercept": fit_intercept}
    ridge = HyperRidge(per="all", **options).fit(X, y, weight)
    own = Ridge(alpha=ridge.alpha_, fit_intercept=fit_intercept).fit(X, y, weight)
    np.testing.assert_allclose([*ridge.coef_, ridge.intercept_], [*own.coef_, own.intercept_], rtol=1e-8, atol=1e-10)
    net = HyperElasticNet(**options).fit(X, y, weight)
    own = ElasticNet(alpha=net.alpha_, l1_ratio=net.l1_ratio_, fit_intercept=fit_intercept, tol=1e-12, max_iter=10**5)
    own.fit(X, y, weight)
    np.testing.assert_allclose([*net.coef_, net.intercept_], [*own.coef_, own.intercept_], rtol=1e-5, atol=1e-7)
    kernel = HyperKernelRidge(**options).fit(X, y, weight)
    mean = np.average(y, weights=weight) if fit_intercept else 0.0
    own = KernelRidge(alpha=kernel.alpha_, kernel="rbf", gamma=0.5).fit(X / kernel.length_scale_, y - mean, weight)
    np.testing.assert_allclose(kernel.dual_coef_, own.dual_coef_, rtol=1e-6, atol=1e-8 * np.abs(own.dual_coef_).max())
    np.testing.assert_allclose(kernel.predict(X), own.predict(X / kernel.length_scale_) + mean, rtol=1e-6)


def test_length_scales_of_noise_stay_together_and_the_validation_loss_is_that_of_the_folds():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3)) * [1.0, 5.0, 0.2]
    y = rng.normal(size=40)
    found = HyperKernelRidge(cv=4).fit(X, y)
    ratio = found.length_scale_ / X.std(0)
    assert ratio.max() < 2.5 * ratio.min(), "3.8 without the prior"
    loss = 0.0
    for train, valid in KFold(4).split(X):
        mean = y[train].mean()
        own = KernelRidge(alpha=found.alpha_, kernel="rbf", gamma=0.5)
        own.fit(X[train] / found.length_scale_, y[train] - mean)
        loss += np.mean((own.predict(X[valid] / found.length_scale_) + mean - y[valid]) ** 2) / 4
    np.testing.assert_allclose(found.validation_loss_, loss, rtol=1e-9)


def test_groups_and_classes_have_a_penalty_each():
    X, y, w = regression(1)
    found = HyperRidge(per="group", groups=np.where(w == 0, "noise", "signal")).fit(X, y)
    assert found.groups_.tolist() == ["noise", "signal"]
    assert found.alpha_.shape == (2,) and found.alpha_[0] > 100 * found.alpha_[1]
    X, y = load_iris(return_X_y=True)
    assert HyperLogisticRegression(per="class", max_iter=3).fit(X, y).alpha_.shape == (3,)


def test_a_second_fit_of_about_the_same_shape_compiles_nothing():
    X, y, _ = regression(0)
    HyperRidge().fit(X, y)
    before = _dense.program("ridge", True)._cache_size()
    HyperRidge(per="all", max_iter=7, cv=KFold(5)).fit(X[:50], y[:50])  # one hyperparameter, not a bucket of them
    middle = _dense.program("ridge", True)._cache_size()
    model = HyperRidge(max_iter=9, tol=1e-3).fit(X[:50, :10], -y[:50])
    assert middle - before <= 1 and _dense.program("ridge", True)._cache_size() == middle
    assert model.coef_.shape == (10,)


def test_it_is_at_home_in_scikit_learn():
    X, y, _ = regression(0)
    model = make_pipeline(StandardScaler().set_output(transform="default"), HyperRidge(cv=0.25, random_state=0))
    scores = cross_val_score(model, X, y, cv=3)
    assert scores.shape == (3,) and scores.mean() > 0.5
    fitted = clone(model).fit(X, y, hyperridge__sample_weight=np.arange(len(y)) % 4 > 0)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    assert not hasattr(clone(fitted)[-1], "coef_")


def test_without_refit_the_folds_models_are_averaged():
    X, y, _ = regression(0)
    kept, mean = HyperRidge(per="all").fit(X, y), HyperRidge(per="all", refit=False).fit(X, y)
    assert kept.alpha_ == mean.alpha_
    models = [RidgeCV([kept.alpha_]).fit(X[train], y[train]).coef_ for train, _ in KFold(5).split(X)]
    np.testing.assert_allclose(mean.coef_, np.mean(models, axis=0), rtol=1e-8)


def test_the_precision_of_the_process_is_left_alone():
    X, y, _ = regression(0)
    before = jax.config.jax_enable_x64
    assert HyperRidge().fit(X, y).coef_.dtype == np.float64
    assert jax.config.jax_enable_x64 == before and _dense.jnp.ones(1).dtype == (np.float64 if before else np.float32)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"per": "features"}, "per must be one of"),
        ({"per": "group"}, "groups"),
        ({"per": "all", "groups": [0, 1]}, "groups"),
        ({"per": "group", "groups": [0, 1]}, "groups must hold one label for each of the 12 features"),
        ({"cv": 1.5}, "cv=1.5"),
        ({"cv": "five"}, "cv must be"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"refit": "yes"}, "refit"),
        ({"fit_intercept": 2}, "fit_intercept"),
    ],
)
def test_mistakes_are_named(estimator, options, named):
    X, y, _ = regression(0)
    with pytest.raises((hg.InputError, hg.InputTypeError), match=named) as error:
        estimator(**options).fit(X, y > 0)
    assert str(error.value).startswith(estimator.__name__)


def test_a_fold_or_weights_on_nothing_are_named():
    X, y, _ = regression(0)
    with pytest.raises(hg.InputError, match="fold of cv validates on no row"):
        HyperRidge().fit(X, y, sample_weight=np.arange(60) >= 12)
    with pytest.raises(ValueError, match="non-zero"):
        HyperRidge().fit(X, y, sample_weight=np.zeros(60))
    with pytest.raises(hg.InputError, match="two classes"):
        HyperLogisticRegression().fit(X, np.zeros(60, int))


def test_without_scikit_learn_the_import_names_the_extra():
    code = "import sys; sys.modules['sklearn'] = None; import hypergrad.adapters.sklearn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode and "pip install -e '.[sklearn]'" in run.stderr

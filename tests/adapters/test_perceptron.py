"""The perceptrons keep scikit-learn's contract, are scikit-learn's own networks, and beat one decay for all."""

from __future__ import annotations

import pickle

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import hypergrad as hg
from hypergrad.adapters import _mlp
from hypergrad.adapters.sklearn import HyperMLPClassifier, HyperMLPRegressor

pytestmark = pytest.mark.usefixtures("once")
ESTIMATORS = (HyperMLPClassifier, HyperMLPRegressor)
QUICK = {"cv": 3, "max_iter": 5, "random_state": 0}
X, LABELS = load_iris(return_X_y=True)
X, LABELS = X[::2], LABELS[::2]
Y = X[:, 3]


@pytest.mark.experiment
@parametrize_with_checks([estimator((8,), cv=3, max_iter=5) for estimator in ESTIMATORS])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


def test_the_classifier_is_scikit_learns_own_network_for_the_data_as_they_are():
    names = np.array(["a", "b", "c"])[LABELS]
    model = HyperMLPClassifier((8,), **QUICK).fit(100 + 10 * X, names)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        own = MLPClassifier(hidden_layer_sizes=(8,), activation="tanh", max_iter=1).fit(X, names)
    own.coefs_, own.intercepts_ = model.coefs_, model.intercepts_
    np.testing.assert_allclose(model.predict_proba(100 + 10 * X), own.predict_proba(100 + 10 * X), atol=1e-10)
    assert model.score(100 + 10 * X, names) > 0.95 and model.classes_.tolist() == ["a", "b", "c"]
    assert model.alpha_.shape == (2,) and (model.n_iter_, model.n_features_in_) == (5, 4)
    before = _mlp.program("log_loss", "tanh")._cache_size()
    binary = HyperMLPClassifier((8,), **QUICK | {"max_iter": 3, "tol": 0.1}, per="all").fit(X[:40, :3], LABELS[:40] > 0)
    assert _mlp.program("log_loss", "tanh")._cache_size() == before, "a second fit compiles nothing"
    assert isinstance(binary.alpha_, float) and binary.predict_proba(X[:, :3]).shape == (len(X), 2)


@pytest.mark.experiment
def test_the_regressor_is_scikit_learns_own_network_in_the_units_of_the_target():
    model = HyperMLPRegressor((8,), **QUICK).fit(X[:, :3], 1000 + 100 * Y)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        own = MLPRegressor(hidden_layer_sizes=(8,), activation="tanh", max_iter=1).fit(X[:, :3], Y)
    own.coefs_, own.intercepts_ = model.coefs_, model.intercepts_
    np.testing.assert_allclose(model.predict(X[:, :3]), own.predict(X[:, :3]), rtol=1e-10)
    assert model.score(X[:, :3], 1000 + 100 * Y) > 0.9
    plain = HyperMLPRegressor((8,), **QUICK).fit(X[:, :3], Y)
    np.testing.assert_allclose(model.validation_loss_, plain.validation_loss_, rtol=1e-6)
    mean = HyperMLPRegressor((8,), **QUICK, refit=False).fit(X[:, :3], Y)
    assert mean.coefs_[0].shape == (3, 3, 8) and mean.intercepts_[1].shape == (3, 1)
    parts = []
    for k in range(3):
        own.coefs_, own.intercepts_ = [w[k] for w in mean.coefs_], [b[k] for b in mean.intercepts_]
        parts.append(own.predict(X[:, :3]))
    np.testing.assert_allclose(mean.predict(X[:, :3]), np.mean(parts, axis=0), rtol=1e-10)
    assert mean.alpha_.tolist() == plain.alpha_.tolist()


@pytest.mark.experiment
def test_a_decay_for_each_feature_switches_noise_off():
    rng = np.random.default_rng(1)
    x = rng.uniform(-2, 2, (460, 12))
    y = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.1 * rng.normal(size=len(x))
    model = HyperMLPRegressor(per="feature", max_iter=150, random_state=0).fit(x[:60], y[:60])
    assert model.alpha_.shape == (13,) and model.alpha_[:2].max() < np.median(model.alpha_[2:12]) / 10
    assert model.score(x[60:], y[60:]) > 0.9, "with a decay for each layer it is 0.35"


@pytest.mark.experiment
def test_it_is_at_home_in_scikit_learn():
    before = jax.config.jax_enable_x64
    model = make_pipeline(StandardScaler(), HyperMLPRegressor((8,), per="group", groups=[0, 0, 1], **QUICK))
    fitted = clone(model).fit(X[:, :3], Y, hypermlpregressor__sample_weight=np.arange(len(Y)) % 4 > 0)
    assert fitted[-1].alpha_.shape == (3,) and fitted[-1].groups_.tolist() == [0, 1]
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X[:, :3]), fitted.predict(X[:, :3]))
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden_layer_sizes": ()}, "hidden_layer_sizes must hold a positive integer"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must hold a positive integer"),
        ({"hidden_layer_sizes": "8"}, "hidden_layer_sizes must hold a positive integer"),
        ({"activation": "tan"}, "activation must be one of .* did you mean 'tanh'"),
        ({"per": "layers"}, "per must be one of .* did you mean 'layer'"),
        ({"per": "group"}, "groups"),
        ({"per": "group", "groups": [0, 1]}, "groups must hold one label for each of the 4 features"),
        ({"cv": 1.5}, "cv=1.5"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"refit": "yes"}, "refit"),
    ],
)
def test_mistakes_are_named(estimator, options, named):
    with pytest.raises((hg.InputError, hg.InputTypeError), match=named) as error:
        estimator(**options).fit(X, LABELS)
    assert str(error.value).startswith(estimator.__name__)

"""The estimators of `hypergrad.adapters.sklearn` beside scikit-learn's own, on five problems, four splits a seed.

python experiments/estimators/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

from sklearn.datasets import load_breast_cancer, load_diabetes, make_friedman1, make_regression  # noqa: E402
from sklearn.experimental import enable_halving_search_cv  # noqa: E402, F401
from sklearn.kernel_ridge import KernelRidge  # noqa: E402
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV  # noqa: E402
from sklearn.metrics import log_loss  # noqa: E402
from sklearn.model_selection import GridSearchCV, HalvingRandomSearchCV  # noqa: E402
from sklearn.neural_network import MLPRegressor  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from experiments import _figures as style  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from hypergrad.adapters import sklearn as ours  # noqa: E402

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sparse(rng: np.random.Generator) -> Split:
    """60 features, five of which matter."""
    x, y = make_regression(600, 60, n_informative=5, noise=50.0, random_state=int(rng.integers(2**31)))
    return x[:100], y[:100], x[100:], y[100:]


def diabetes(rng: np.random.Generator) -> Split:
    x, y = load_diabetes(return_X_y=True)
    at = rng.permutation(len(y))
    return x[at[:200]], y[at[:200]], x[at[200:]], y[at[200:]]


def cancer(rng: np.random.Generator) -> Split:
    x, y = load_breast_cancer(return_X_y=True)
    at = rng.permutation(len(y))
    return x[at[:150]], y[at[:150]], x[at[150:]], y[at[150:]]


def friedman(rng: np.random.Generator) -> Split:
    """Friedman's function of five features, and 15 of noise."""
    x, y = make_friedman1(650, 20, noise=1.0, random_state=int(rng.integers(2**31)))
    return x[:150], y[:150], x[150:], y[150:]


def waves(rng: np.random.Generator) -> Split:
    """A wave along one feature, a slope along another, and ten of noise."""
    x = rng.uniform(-2, 2, (560, 12))
    y = np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.1 * rng.normal(size=len(x))
    return x[:60], y[:60], x[60:], y[60:]


def himalaya_ridge() -> Any:
    from himalaya.ridge import RidgeCV as Himalaya

    return Himalaya(alphas=np.logspace(-3, 4, 20), fit_intercept=True, cv=5)


ALPHAS = np.logspace(-3, 4, 20)
KERNEL = {"alpha": np.logspace(-4, 1, 6), "gamma": np.logspace(-3, 1, 6)}
net = lambda: MLPRegressor(hidden_layer_sizes=(32,), activation="tanh", solver="lbfgs", max_iter=200, random_state=0)
kernel = lambda: KernelRidge(kernel="rbf")
halving = lambda model, grid: HalvingRandomSearchCV(model, grid, n_candidates=24, cv=5, random_state=0)
LINEAR: dict[str, Callable[[], Any]] = {
    "HyperRidge": lambda: ours.HyperRidge(per="feature"),
    "HyperElasticNet": ours.HyperElasticNet,
    "RidgeCV": lambda: RidgeCV(ALPHAS, cv=5),
    "ElasticNetCV": lambda: ElasticNetCV(l1_ratio=[0.1, 0.5, 0.9, 1.0], cv=5),
    "himalaya": himalaya_ridge,
}
# Of each problem: its splits, then the estimators, ours first.
PROBLEMS: dict[str, tuple[Callable[[np.random.Generator], Split], dict[str, Callable[[], Any]]]] = {
    "sparse": (sparse, LINEAR),
    "diabetes": (diabetes, LINEAR),
    "cancer": (
        cancer,
        {
            "HyperLogisticRegression": ours.HyperLogisticRegression,
            "HyperMLPClassifier": lambda: ours.HyperMLPClassifier((16,), random_state=0),
            "LogisticRegressionCV": lambda: LogisticRegressionCV(
                Cs=10, cv=5, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
            ),
        },
    ),
    "friedman": (
        friedman,
        {
            "HyperKernelRidge": ours.HyperKernelRidge,
            "HyperKernelRidge_all": lambda: ours.HyperKernelRidge(per="all"),
            "GridSearchCV": lambda: GridSearchCV(kernel(), KERNEL, cv=5),
            "HalvingRandomSearchCV": lambda: halving(kernel(), KERNEL),
        },
    ),
    "waves": (
        waves,
        {
            "HyperMLPRegressor": lambda: ours.HyperMLPRegressor(per="feature", random_state=0),
            "GridSearchCV": lambda: GridSearchCV(net(), {"alpha": np.logspace(-4, 2, 5)}, cv=5),
            "HalvingRandomSearchCV": lambda: halving(net(), {"alpha": np.logspace(-4, 2, 36)}),
        },
    ),
}


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    splits = 2 if options.smoke else 4
    warnings.simplefilter("ignore")
    chosen = PROBLEMS
    if options.smoke:
        chosen = {"diabetes": (diabetes, {name: LINEAR[name] for name in ("HyperRidge", "RidgeCV")})}
    for problem, (draw_split, models) in progress(chosen.items(), "problems"):
        found: dict[str, Any] = {name: {"test": [], "seconds": []} for name in models}
        for split in range(splits):
            x, y, u, v = draw_split(np.random.default_rng([options.seed, split]))
            scaler = StandardScaler().fit(x)
            x, u = scaler.transform(x), scaler.transform(u)
            for name, make in models.items():
                began = time.process_time()
                model = make().fit(x, y)
                found[name]["seconds"].append(time.process_time() - began)
                if problem == "cancer":
                    error = log_loss(v, model.predict_proba(u))
                else:
                    error = np.mean((model.predict(u) - v) ** 2) / np.var(v)
                found[name]["test"].append(float(error))
        first, *_ = found
        numbers[problem] = {}
        for name, of in found.items():
            behind = np.array(of["test"]) - np.array(found[first]["test"])
            numbers[problem][name] = {
                "test": float(np.mean(of["test"])),
                "cold": of["seconds"][0],
                "warm": float(np.median(of["seconds"][1:])),
                "behind": float(behind.mean()),
                "behind_error": float(behind.std(ddof=1) / np.sqrt(splits)),
                "worse": int(np.sum(behind > 0)),
            }


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 7.6)
    places = canvas.subplots(3, 2).ravel()
    titles = {
        "sparse": "60 features, five matter",
        "diabetes": "Diabetes",
        "cancer": "Breast cancer",
        "friedman": "Friedman, 15 of 20 are noise",
        "waves": "A wave and a slope, 10 of 12 are noise",
    }
    short = {"LogisticRegressionCV": "LogisticCV", "HalvingRandomSearchCV": "HalvingSearchCV"}
    short |= {"HyperLogisticRegression": "HyperLogistic", "HyperKernelRidge_all": "… one scale for all"}
    for axes, (problem, title) in zip(places, titles.items(), strict=False):
        rows = {
            short.get(name, name): (
                style.each(results, f"{problem}.{name}.test"),
                style.BLUE if name.startswith("Hyper") else style.ORANGE,
            )
            for name in PROBLEMS[problem][1]
        }
        label = "test log-loss, nats" if problem == "cancer" else "test error / variance"
        style.over_seeds(axes, rows, title, xlabel=label)
    places[-1].remove()
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

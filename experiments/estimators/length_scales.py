"""What the prior of `HyperKernelRidge` does on nine problems of six splits: with it, without it, one scale for all.

python experiments/estimators/length_scales.py

Its width τ was chosen on `diabetes` and `friedman`; the other seven had no part in that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

from sklearn.datasets import make_friedman1, make_friedman2, make_friedman3  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from experiments.estimators.run import Split, diabetes, friedman, sparse, waves  # noqa: E402
from hypergrad.adapters import sklearn as ours  # noqa: E402

SPLITS = 6


def few_diabetes(rng: np.random.Generator) -> Split:
    x, y, u, v = diabetes(rng)
    return x[:100], y[:100], u, v


def beside_noise(make: Callable, noise: float) -> Callable[[np.random.Generator], Split]:
    """Friedman's second or third function of four features, and eight of noise."""

    def draw(rng: np.random.Generator) -> Split:
        x, y = make(600, noise=noise, random_state=int(rng.integers(2**31)))
        x = np.concatenate([x, rng.normal(size=(600, 8))], 1)
        return x[:100], y[:100], x[100:], y[100:]

    return draw


def friedman_50(rng: np.random.Generator) -> Split:
    x, y = make_friedman1(650, 50, noise=1.0, random_state=int(rng.integers(2**31)))
    return x[:150], y[:150], x[150:], y[150:]


def additive(rng: np.random.Generator) -> Split:
    """A sum of sines in which all of eight features matter alike."""
    x = rng.uniform(-2, 2, (560, 8))
    y = np.sin(x).sum(1) + 0.3 * rng.normal(size=560)
    return x[:80], y[:80], x[80:], y[80:]


PROBLEMS: dict[str, Callable[[np.random.Generator], Split]] = {
    "diabetes": diabetes,
    "friedman": friedman,
    "diabetes, 100 rows": few_diabetes,
    "sparse": sparse,
    "waves": waves,
    "friedman 2": beside_noise(make_friedman2, 50.0),
    "friedman 3": beside_noise(make_friedman3, 0.1),
    "friedman, 50 features": friedman_50,
    "additive": additive,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PROBLEMS, help="one problem")
    only, width = parser.parse_args().only, ours._TOGETHER
    arms = {"with the prior": ("feature", width), "without": ("feature", 1e9), "one scale": ("all", width)}
    for problem in [only] if only else PROBLEMS:
        found: dict[str, list[float]] = {name: [] for name in arms}
        for split in range(SPLITS):
            x, y, u, v = PROBLEMS[problem](np.random.default_rng([7, split]))
            scaler = StandardScaler().fit(x)
            for name, (per, tau) in arms.items():
                ours._TOGETHER = tau
                model = ours.HyperKernelRidge(per=per).fit(scaler.transform(x), y)
                found[name].append(float(np.mean((model.predict(scaler.transform(u)) - v) ** 2) / np.var(v)))
        error = np.std(np.subtract(found["with the prior"], found["without"]), ddof=1) / np.sqrt(SPLITS)
        row = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in found.items())
        print(f"{problem:22} {row}; standard error of the prior's effect {error:.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Ridge regression whose penalty is tuned without validation data: by GCV, leave-one-out and PRESS.

The diabetes data with all products of features, 65 columns, are split 30 times into 200 rows for training and 242 for
testing. The oracle chooses the penalty by the test error itself; the rival holds a fifth of the training rows out.

    python experiments/risk_estimates/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402

FEW = 200  # rows that ridge is trained on


def ridge(options: argparse.Namespace, numbers: dict[str, Any]) -> dict[str, Any]:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x = x / x.std(0)
    upper = np.triu_indices(x.shape[1])
    x = np.hstack([x, (x[:, :, None] * x[:, None])[:, upper[0], upper[1]]])
    splits = 3 if options.smoke else 30
    rng = np.random.default_rng(options.seed)
    orders = [rng.permutation(len(y)) for _ in range(splits)]
    part = lambda rows: (np.stack([x[r] for r in rows]), np.stack([y[r] for r in rows]))
    train, test = part([o[:FEW] for o in orders]), part([o[FEW:] for o in orders])
    means = [a.mean(1, keepdims=True) for a in train]
    scale = train[0].std(1, keepdims=True)
    standard = lambda data: (
        jnp.asarray((data[0] - means[0]) / scale, jnp.float32),
        jnp.asarray((data[1] - means[1]) / y.std(), jnp.float32),
    )
    train, test = standard(train), standard(test)

    def fit(log_l2: Any, data: Any) -> Any:
        x, y = data
        return jnp.linalg.solve(x.T @ x + jnp.exp(log_l2) * jnp.eye(x.shape[1]), x.T @ y)

    squared = lambda w, data: jnp.mean((data[0] @ w - data[1]) ** 2)
    inner = hg.inner.fixed_point(lambda w, h, batch: jax.vmap(fit)(h, batch), steps=1)
    smoother = hg.objectives.ridge_smoother(jnp.exp)
    start = jnp.full(splits, 3.0)
    found = {}
    for name, make in (
        ("gcv", hg.objectives.gcv),
        ("loo", hg.objectives.leave_one_out),
        ("press", hg.objectives.press),
    ):
        each = make(smoother)
        outer = lambda w, h, batch, each=each: jnp.sum(jax.vmap(lambda h, b: each(None, h, b))(h, batch))
        solver = hg.direct(hg.Problem(None, outer), inner=inner)
        tuned = hg.tune(
            solver, jnp.zeros((splits, x.shape[1])), start, train, train, outer=optax.adam(0.3),
            steps=3 if options.smoke else 60, progress=False,
        )  # fmt: skip
        found[name] = tuned.hparams
    # A fifth of the rows set aside, by grid, and fitted again to all of them.
    grid = jnp.linspace(-3, 9, 121)
    kept, aside = tuple(a[:, : FEW * 4 // 5] for a in train), tuple(a[:, FEW * 4 // 5 :] for a in train)
    curve = jax.jit(jax.vmap(lambda a, b: jax.lax.map(lambda h: squared(fit(h, a), b), grid)))
    found["holdout"] = grid[jnp.argmin(curve(kept, aside), axis=1)]
    tests = curve(train, test)
    oracle = jnp.min(tests, axis=1)
    numbers["ridge"] = {"oracle": jnp.mean(oracle)}
    scored = jax.jit(jax.vmap(lambda h, a, b: squared(fit(h, a), b)))
    ratios = {}
    for name, h in found.items():
        errors = scored(h, train, test)
        numbers["ridge"][name] = jnp.mean(errors)
        numbers["ridge"][f"{name}_ratio"] = jnp.mean(errors) / jnp.mean(oracle)
        ratios[name] = np.asarray(errors / oracle)
    return ratios


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    ratios = ridge(options, numbers)
    if options.out:
        draw(options.out, ratios)


def draw(folder: Path, ratios: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(9, 4)
    chart = figure.subplots()
    names = {"gcv": "GCV", "loo": "leave-one-out", "press": "PRESS", "holdout": "a fifth held out"}
    chart.boxplot([ratios[key] for key in names], orientation="horizontal", tick_labels=list(names.values()))
    chart.axvline(1, color=style.INK, linewidth=1, linestyle=style.DASHED)
    chart.invert_yaxis()
    style.titled(chart, "Test error of ridge over that of the best penalty", xlabel="ratio, one for each of 30 splits")
    style.save(figure, folder)


if __name__ == "__main__":
    experiment(__file__, __doc__, measure)

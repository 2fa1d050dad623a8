"""Tune a ridge strength through a hypernetwork, with the best response known in closed form.

Ten digits to train on, linear model, squared error, strength exp(λ): w*(λ) and the best λ are known exactly. Local
hypernetworks are lines fitted around the current λ with draws of standard deviation σ, five steps of training to one of
λ; with σ = 0 they see a single λ. A global one is a perceptron fitted over the whole range of λ.

    python experiments/hypernetwork_ridge/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import digits  # noqa: E402

START, RANGE = -3.5, (-6.0, 6.0)
SIGMAS = (0.0, 0.1, 0.2, 0.5)
GRID = np.linspace(*RANGE, 1201)
EVERY, BETWEEN = 15, 40  # points of the grid, and outer steps, between the values that are kept for the picture


class Data(NamedTuple):
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]


def load(seed: int) -> Data:
    """Ten digits, one of each class, and 400 others; pixels centred, a column of ones, one-hot targets."""
    parts = digits(seed, [10, 400])[:2]
    one_hot = lambda y: np.eye(10, dtype=np.float32)[y] - np.float32(0.1)
    return Data(*((np.concatenate([x, np.ones((len(x), 1), np.float32)], 1), one_hot(y)) for x, y in parts))


def train_loss(w: Any, log_l2: Any, batch: Any) -> Any:
    return valid_loss(w, log_l2, batch) + 0.5 * jnp.exp(log_l2) * jnp.sum(w**2)


def valid_loss(w: Any, log_l2: Any, batch: Any) -> Any:
    x, y = batch
    return 0.5 * jnp.mean(jnp.sum((x @ w - y) ** 2, axis=1))


PROBLEM = hg.Problem(train_loss, valid_loss)


def solution(data: Data, log_l2: float) -> np.ndarray:
    x, y = (part.astype(np.float64) for part in data.train)
    return np.linalg.solve(x.T @ x / len(x) + np.exp(log_l2) * np.eye(x.shape[1]), x.T @ y / len(x))


def curve(data: Data, params: Any) -> np.ndarray:
    """Validation loss at parameters given for each λ of the grid."""
    x, y = data.valid
    return np.asarray([0.5 * float(np.mean(np.sum((x @ w - y) ** 2, axis=1))) for w in params])


def local(data: Data, sigma: float, seed: int, steps: int, *, centred: bool) -> tuple[float, np.ndarray]:
    """λ at the end (mean over the last tenth of the run, since draws leave it moving), and on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # σ = 0 warns, which is the point
        solver = hg.hypernetwork(
            PROBLEM,
            response=hg.responses.linear(centred=centred),
            # A line through u = −3.5 that is not centred has a Hessian 1 + u² times as large: 0.1 diverges.
            optimizer=optax.sgd(0.1 if centred else 0.03),
            steps=5,
            scale=sigma,
            warmup=100 if steps < 100 else 20_000,
            measure=False,
        )
        result = hg.tune(
            solver,
            jnp.zeros((65, 10)),
            START,
            *data,
            outer=optax.adam(0.01),
            steps=steps,
            key=jax.random.key(seed),
            progress=False,
        )
    path = np.asarray(result.history.hparams)
    if result.status == hg.TuneStatus.FAILED:
        return float("nan"), path
    return float(np.mean(path[-max(steps // 10, 1) :])), path


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    data = load(options.seed)
    steps, fit = (30, 200) if options.smoke else (2000, 30_000)
    truth = curve(data, [solution(data, log_l2) for log_l2 in GRID])
    numbers["lambda_true"] = float(GRID[np.argmin(truth)])
    numbers["valid_true"] = float(np.min(truth))
    paths = {}
    for sigma in progress((0.0, 0.5) if options.smoke else SIGMAS, "local"):
        numbers[f"lambda_sigma_{sigma:g}"], paths[f"sigma_{sigma:g}"] = local(
            data, sigma, options.seed, steps, centred=False
        )
        if sigma and sigma != 0.2:
            numbers[f"lambda_centred_{sigma:g}"], path = local(data, sigma, options.seed, steps, centred=True)
            paths[f"centred_{sigma:g}"] = path

    # Global: one fit over the range, then λ follows it.
    solver = hg.hypernetwork(
        PROBLEM,
        response=hg.responses.mlp(hidden=(50,), within=RANGE),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, fit)),
        steps=0,
        distribution=RANGE,
        draws=10,
        warmup=fit,
        measure=False,
    )
    key = jax.random.key(options.seed)
    state = solver.init(jnp.zeros((65, 10)), START, key=key)
    _, state = jax.jit(solver.hypergrad)(state, START, *data, key=key)
    respond = jax.jit(jax.vmap(solver.response, (None, 0)))
    learned = curve(data, np.asarray(respond(state, GRID)))
    numbers["lambda_global"] = float(GRID[np.argmin(learned)])
    numbers["global_curve_error"] = float(np.mean(np.abs(learned - truth)))
    numbers["global_curve_correlation"] = float(np.corrcoef(learned, truth)[0, 1])
    for name in [name for name in numbers if name.startswith(("lambda_sigma", "lambda_centred"))]:
        numbers[name.replace("lambda", "off")] = abs(numbers[name] - numbers["lambda_true"])
    numbers["curve_true"], numbers["curve_learned"] = truth[::EVERY], learned[::EVERY]
    numbers["paths"] = {name: path[::BETWEEN] for name, path in paths.items()}


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    figure = style.figure(12.5, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for truth, learned in zip(style.each(results, "curve_true"), style.each(results, "curve_learned"), strict=True):
        left.plot(GRID[::EVERY], truth, color=style.INK, linewidth=4, alpha=0.25, label="closed form")
        left.plot(GRID[::EVERY], learned, color=style.BLUE, linewidth=1.4, label="global hypernetwork")
    best = style.each(results, "lambda_true")
    left.plot(best, style.each(results, "valid_true"), "o", color=style.INK, markersize=6)
    style.titled(
        left,
        "One network knows the whole curve",
        xlabel="λ, log of the ridge strength",
        ylabel="validation loss",
    )
    lines = {"sigma_0": (style.ORANGE, "σ = 0: biased"), "sigma_0.1": (style.SKY, "σ = 0.1")}
    lines |= {"sigma_0.5": (style.GREEN, "σ = 0.5"), "centred_0.1": (style.BLUE, "σ = 0.1, centred")}
    lines |= {"centred_0.5": (style.PINK, "σ = 0.5, centred")}
    for name, (color, label) in lines.items():
        runs = zip(results.values(), best, strict=True)
        paths = np.array([np.array(run["paths"][name]) - true for run, true in runs])
        style.curves(right, BETWEEN * np.arange(paths.shape[1]), paths, color, label)
    right.axhline(0, color=style.INK, linewidth=1, linestyle=style.DASHED)
    right.set_ylim(-0.5, 0.1)
    style.titled(right, "Local hypernetworks on the way", xlabel="outer step", ylabel="λ less the best λ")
    style.legend(figure, left, right)
    return figure


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

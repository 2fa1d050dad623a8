"""Hyperparameters without validation data: denoising by SURE without a clean picture, ridge by GCV, LOO and PRESS.

Crops of 64 × 64 pixels of six photographs with Gaussian noise are denoised by total variation, whose weight and
rounding SURE tunes for each on the noisy picture alone. The diabetes data with all products of features, 65 columns,
are split 30 times into 200 rows for training and 242 for testing. The oracle chooses by the error itself.

    python experiments/risk_estimates/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import shipped  # noqa: E402

SIGMA, SIDE = 0.1, 64  # of the noise, where pixels are in [0, 1]; of a crop
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
FEW = 200  # rows that ridge is trained on


def crops(seed: int, count: int) -> np.ndarray:
    """`[count, 64, 64]`, in [0, 1]: a place of each photograph, halved in size, that is drawn by seed."""
    color, data, transform = (shipped(f"skimage.{name}") for name in ("color", "data", "transform"))

    rng, found = np.random.default_rng(seed), []
    for name in PHOTOGRAPHS[:count]:
        picture = getattr(data, name)()
        picture = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255
        picture = transform.downscale_local_mean(picture, (2, 2))
        i, j = (rng.integers(0, length - SIDE + 1) for length in picture.shape)
        found.append(picture[i : i + SIDE, j : j + SIDE])
    return np.stack(found).astype(np.float32)


def variation(x: Any, h: Any, y: Any) -> Any:
    """Least squares and the total variation of each picture, rounded at its corners."""
    down, right = jnp.diff(x, axis=1)[:, :, :-1], jnp.diff(x, axis=2)[:, :-1]
    corner = h["corner"][:, None, None]
    length = jnp.sqrt(down**2 + right**2 + corner**2) - corner
    return 0.5 * jnp.sum((x - y) ** 2) + jnp.sum(h["weight"] * jnp.sum(length, axis=(1, 2)))


DENOISER = hg.best_response(
    hg.Problem(variation, variation), inner=hg.inner.newton(tol=1e-4), linear=hg.linear.cg(tol=1e-4)
)
SURE = hg.objectives.sure(DENOISER, noise=SIGMA, divergence="monte_carlo", samples=1)
DOMAIN = {"weight": hg.domains.log(), "corner": hg.domains.interval(0.01, 0.5)}
both = lambda weight, corner, count: {"weight": jnp.full(count, weight), "corner": jnp.full(count, corner)}


@jax.jit
def errors_of(h: Any, clean: Any, noisy: Any) -> tuple[Any, Any]:
    """Denoised pictures, and the mean squared error of each."""
    x = DENOISER(h, noisy, noisy)
    return x, jnp.mean((x - clean) ** 2, axis=(1, 2))


def denoise(options: argparse.Namespace, numbers: dict[str, Any]) -> dict[str, Any]:
    restoration = shipped("skimage.restoration")

    count, steps, draws = (2, 2, 3) if options.smoke else (6, 60, 400)
    clean = jnp.asarray(crops(options.seed, count))
    keys = jax.random.split(jax.random.key(options.seed), draws + 2)
    noisy = clean + SIGMA * jax.random.normal(keys[0], clean.shape)
    start = both(0.02, 0.1, count)
    # The loss solves for itself, from the noisy pictures: the solver has nothing to do.
    solver = hg.direct(hg.Problem(None, SURE), inner=hg.inner.fixed_point(lambda x, h, y: y, steps=1))
    tuned = hg.tune(
        solver, noisy, start, noisy, noisy, outer=optax.adam(0.15), steps=steps, domain=DOMAIN, progress=False,
        key=keys[1],
    )  # fmt: skip
    x, found = errors_of(tuned.hparams, clean, noisy)
    settings = list(itertools.product(np.geomspace(0.01, 1, 24), np.geomspace(0.01, 0.5, 6)))
    settings = settings[:2] if options.smoke else settings
    grid = np.stack([errors_of(both(*s, count), clean, noisy)[1] for s in progress(settings, "the oracle's grid")])
    # The rivals: Chambolle's algorithm at its best weight, and at the one that J-invariance calibrates.
    weights = np.geomspace(0.02, 0.5, 2 if options.smoke else 16)
    dual = lambda y, weight: restoration.denoise_tv_chambolle(y, weight=weight)
    each = lambda i, weight: np.mean((dual(np.asarray(noisy[i]), weight) - clean[i]) ** 2)
    chambolle = np.asarray([[each(i, weight) for i in range(count)] for weight in weights])
    # What it returns also hides each pixel from its own estimate, which costs more than it is worth: weights alone.
    calibrate = lambda y: restoration.calibrate_denoiser(y, restoration.denoise_tv_chambolle, {"weight": list(weights)})
    found_weights = [
        calibrate(np.asarray(y)).keywords["denoiser_kwargs"]["weight"]
        for y in progress(noisy, "J-invariance", total=count)
    ]
    calibrated = [each(i, weight) for i, weight in enumerate(found_weights)]

    def gap(key: Any) -> Any:  # of what SURE says from the error, for a draw of the noise, at the start
        noise, signs = jax.random.split(key)
        y = clean + SIGMA * jax.random.normal(noise, clean.shape)
        return SURE(y, start, y, signs) - jnp.mean((DENOISER(start, y, y) - clean) ** 2)

    gaps = np.asarray(jax.jit(lambda keys: jax.lax.map(gap, keys))(keys[2:]))
    oracle = grid.min(axis=0)
    numbers["tv"] = {
        "noisy": jnp.mean((noisy - clean) ** 2),
        "oracle": np.mean(oracle),
        "sure": jnp.mean(found),
        "sure_ratio": jnp.mean(found) / np.mean(oracle),
        "worst_ratio": jnp.max(found / oracle),
        "chambolle_ratio": np.mean(chambolle.min(axis=0)) / np.mean(oracle),
        "calibrated_ratio": np.mean(calibrated) / np.mean(oracle),
        "bias": np.mean(gaps),
        "off": abs(np.mean(gaps)) / (np.std(gaps, ddof=1) / draws**0.5),
    }
    return {"clean": clean, "noisy": noisy, "tuned": x}


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
    pictures = denoise(options, numbers)
    ratios = ridge(options, numbers)
    if options.out:
        draw(options.out, pictures, ratios)


def draw(folder: Path, pictures: dict[str, Any], ratios: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(13, 5.2)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    rows = {"clean": "clean", "noisy": "noisy", "tuned": "by SURE"}
    axes = left.subplots(3, len(pictures["clean"]))
    for row, (key, name) in zip(axes, rows.items(), strict=True):
        for place, picture in zip(row, pictures[key], strict=True):
            style.image(place, picture, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(name)
    chart = right.subplots()
    names = {"gcv": "GCV", "loo": "leave-one-out", "press": "PRESS", "holdout": "a fifth held out"}
    chart.boxplot([ratios[key] for key in names], orientation="horizontal", tick_labels=list(names.values()))
    chart.axvline(1, color=style.INK, linewidth=1, linestyle=style.DASHED)
    chart.invert_yaxis()
    style.titled(chart, "Test error of ridge over that of the best penalty", xlabel="ratio, one for each of 30 splits")
    style.save(figure, folder, "course.png", colours=64)


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Denoising: error over the oracle’s",
            "ratio, mean of six pictures",
            {
                "SURE": ("tv.sure_ratio", style.BLUE),
                "… the worst of six": ("tv.worst_ratio", style.SKY),
                "best weight, scikit-image": ("tv.chambolle_ratio", style.GREEN),
                "J-invariance": ("tv.calibrated_ratio", style.ORANGE),
            },
        ),
        (
            "Ridge: test error over the oracle’s",
            "ratio, mean of the splits",
            {
                "GCV": ("ridge.gcv_ratio", style.BLUE),
                "leave-one-out": ("ridge.loo_ratio", style.BLUE),
                "PRESS": ("ridge.press_ratio", style.BLUE),
                "a fifth held out": ("ridge.holdout_ratio", style.ORANGE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

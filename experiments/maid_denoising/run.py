"""Denoising whose regulariser is learned by MAID: total variation with two numbers, and a field of six filters with 55.

    x*(λ) = argmin ½ ‖x − noisy‖² + Σ_k e^{β_k} Σ_p (√((c_k * x)_p² + ν²) − ν),     F(λ) = mean (x*(λ) − clean)²

Learned on crops of pictures that come with scikit-image, from accuracies of 1e-1, 1e-3 and 1e-5, adapted by
`hg.outer.maid` and held where they are; judged on crops of other pictures, beside the best of a grid over one weight.

    python experiments/maid_denoising/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import shipped  # noqa: E402
from experiments._lanes import held, side_by_side  # noqa: E402

LEARN, JUDGE = ("camera", "coins", "chelsea", "brick"), ("astronaut", "moon", "coffee", "grass")
NOISE, NU = 0.1, 0.03
FILTERS, SIDE = 6, 3
ACCURACIES = (1e-1, 1e-3, 1e-5)
NEAR = 0.01  # a loss within this share of the lowest counts as reached


def cosines() -> np.ndarray:
    """The eight 3 × 3 discrete cosines that have no mean, of norm 1 and by frequency, `[8, 9]`."""
    rows = np.asarray([[np.cos(np.pi * k * (2 * i + 1) / 6) for i in range(SIDE)] for k in range(SIDE)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = sorted(((a, b) for a in range(SIDE) for b in range(SIDE)), key=lambda ab: (sum(ab), ab))
    return np.stack([np.outer(rows[a], rows[b]).ravel() for a, b in order])[1:]


COSINES = cosines()


class Pictures(NamedTuple):
    """Crops in [0, 1] `[n, s, s]`, and the same with noise."""

    clean: Any
    noisy: Any


def pictures(names: tuple[str, ...], rng: np.random.Generator, each: int, size: int) -> Pictures:
    """Crops of grey pictures at half their size."""
    color, data = shipped("skimage.color"), shipped("skimage.data")
    crops = []
    for name in names:
        whole = np.asarray(getattr(data, name)(), float) / 255
        grey = color.rgb2gray(whole) if whole.ndim == 3 else whole
        grey = grey[: len(grey) // 2 * 2, : grey.shape[1] // 2 * 2]
        grey = (grey[::2, ::2] + grey[1::2, ::2] + grey[::2, 1::2] + grey[1::2, 1::2]) / 4
        for _ in range(each):
            i, j = (int(rng.integers(0, n - size)) for n in grey.shape)
            crops.append(grey[i : i + size, j : j + size])
    clean = np.stack(crops)
    return Pictures(clean, clean + NOISE * rng.normal(size=clean.shape))


def variation(x: Any, h: Any) -> Any:
    """Isotropic total variation, smoothed: λ = (log weight, log ν)."""
    down = jnp.diff(x, axis=1, append=x[:, -1:])
    right = jnp.diff(x, axis=2, append=x[:, :, -1:])
    nu = jnp.exp(h[1])
    return jnp.exp(h[0]) * jnp.sum(jnp.sqrt(down**2 + right**2 + nu**2) - nu)


def experts(x: Any, h: Any) -> Any:
    """A sum over filters without mean, of norm 1: λ = (log weights, log ν, what each filter has of each cosine)."""
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    n, m = x.shape[1:]
    # A convolution with 3 × 3 is nine shifted pictures.
    shifts = jnp.stack([wide[:, i : i + n, j : j + m] for i in range(SIDE) for j in range(SIDE)])
    mixed = h[FILTERS + 1 :].reshape(FILTERS, len(COSINES))
    filters = mixed / jnp.linalg.norm(mixed, axis=1, keepdims=True) @ COSINES
    answers, nu = jnp.einsum("kf,fnij->knij", filters, shifts), jnp.exp(h[FILTERS])
    each = jnp.sum(jnp.sqrt(answers**2 + nu**2) - nu, (1, 2, 3))
    return jnp.sum(jnp.exp(h[:FILTERS]) * each)


class Learner(NamedTuple):
    """A penalty, its hyperparameters at the start, and how many trials each run takes."""

    penalty: Callable[[Any, Any], Any]
    start: np.ndarray
    steps: int


def problem(penalty: Callable[[Any, Any], Any]) -> hg.Problem:
    return hg.Problem(
        lambda x, h, seen: (0.5 * jnp.sum((x - seen.noisy) ** 2) + penalty(x, h)) / len(x),
        lambda x, h, seen: jnp.mean((x - seen.clean) ** 2),
    )


def solver(learner: Learner) -> hg.Solver:
    # Without polishing, whose products with the Hessian are not among the steps that are reported.
    return hg.implicit(problem(learner.penalty), polish=0)


def denoise(learner: Learner, points: np.ndarray, seen: Pictures) -> np.ndarray:
    """Accurate solutions at each of the points, `[k, n, s, s]`."""
    made, shared = solver(learner), jax.tree.map(jnp.asarray, seen)

    def solve(h: Any) -> Any:
        state = hg.outer.set_options(made.init(shared.noisy, h), {"inner.tol": 1e-6})
        return made.response(made.evaluate(state, h, shared, shared)[2], h)

    return np.asarray(jax.jit(lambda points: jax.lax.map(solve, points))(jnp.asarray(points)))


def psnr(x: np.ndarray, seen: Pictures) -> np.ndarray:
    """Decibels, the mean over pictures."""
    return np.mean(-10 * np.log10(np.mean((x - seen.clean) ** 2, (-2, -1))), -1)


class Run(NamedTuple):
    """Accepted points of a run, the loss there as it was seen, and what had been spent."""

    spent: np.ndarray
    values: np.ndarray
    end: np.ndarray


def runs(learner: Learner, seen: Pictures) -> dict[str, Run]:
    """MAID from each accuracy, and its line search with each accuracy held, in one compiled program."""
    names = [f"{kind}_{tol:.0e}" for kind in ("adapted", "held") for tol in ACCURACIES]
    controllers = [hg.outer.maid(tol=tol) for tol in ACCURACIES] + [held(tol) for tol in ACCURACIES]
    outer, starts = side_by_side(controllers, np.tile(learner.start, (len(names), 1)))
    shared = jax.tree.map(jnp.asarray, seen)
    found = hg.multistart(
        solver(learner), shared.noisy, jnp.asarray(starts), shared, shared,
        outer=outer, steps=learner.steps, steps_per_call=learner.steps,
    )  # fmt: skip
    made = {}
    for name, result, start in zip(names, found.results, starts, strict=True):
        history = result.history
        spent = np.cumsum(history.inner_steps + np.nan_to_num(history.linear_steps))
        taken = np.flatnonzero(history.accepted)
        end = history.hparams[taken[-1]] if len(taken) else start
        made[name] = Run(spent[taken], history.value[taken], end)
    return made


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    each, size, points, most = (1, 8, 3, 6) if options.smoke else (2, 24, 17, 80)
    rng = np.random.default_rng(options.seed)
    learn, judge = pictures(LEARN, rng, 1, size), pictures(JUDGE, rng, each, size)
    first = np.concatenate([np.full(FILTERS, -4.0), [np.log(NU)], np.eye(FILTERS, len(COSINES)).ravel()])
    learners = {"variation": Learner(variation, np.asarray([-4.0, np.log(NU)]), most)}
    if not options.smoke:
        learners["experts"] = Learner(experts, first, most)
    numbers["noisy"] = float(psnr(judge.noisy, judge))
    grid = np.stack([np.linspace(-4.5, -0.5, points), np.full(points, np.log(NU))], 1)
    both = Pictures(*(np.concatenate(pair) for pair in zip(learn, judge, strict=True)))
    half = len(learn.clean)
    single = denoise(learners["variation"], grid, both)
    best = int(np.argmin(np.mean((single[:, :half] - learn.clean) ** 2, (1, 2, 3))))
    numbers["single_weight"] = float(psnr(single[best, half:], judge))
    shown, paths = {"noisy": judge.noisy, "one weight": single[best, half:]}, {}
    for name, learner in progress(learners.items(), "regularisers"):
        paths[name] = runs(learner, learn)
        ends = np.stack([run.end for run in paths[name].values()])
        found = denoise(learner, np.concatenate([learner.start[None], ends]), both)
        losses = np.mean((found[:, :half] - learn.clean) ** 2, (1, 2, 3))
        exact = dict(zip(paths[name], losses[1:], strict=True))
        scores = dict(zip(paths[name], psnr(found[1:, half:], judge), strict=True))
        adapted = [exact[run] for run in exact if run.startswith("adapted")]
        fixed = [exact[run] for run in exact if run.startswith("held")]
        lowest = min(*adapted, *fixed)
        numbers[name] = {
            "before": float(psnr(found[0, half:], judge)),
            "tuned": float(scores["adapted_1e-01"]),
            "over_single": float(scores["adapted_1e-01"] - numbers["single_weight"]),
            "loss_before": float(losses[0]),
            "spread": float(max(adapted) / min(adapted) - 1),
            "over_best_held": float(max(adapted) / min(fixed) - 1),
            "loose_over_adapted": float(fixed[0] / max(adapted)),
        } | {
            run: {
                "loss": float(exact[run]), "psnr": float(scores[run]), "accepted": len(path.values),
                "spent": int(path.spent[-1]) if len(path.spent) else 0, "products": reached(path, lowest),
            }
            for run, path in paths[name].items()
        }  # fmt: skip
        shown[name] = found[1, half:]
    if options.out and not options.smoke:
        draw(options.out, judge, shown, paths)


def reached(path: Run, lowest: float) -> float:
    """What had been spent when the loss came near the lowest of all; NaN where it never did."""
    near = np.flatnonzero(path.values <= (1 + NEAR) * lowest)
    return float(path.spent[near[0]]) if len(near) else np.nan


def draw(folder: Path, seen: Pictures, shown: dict[str, Any], paths: dict[str, dict[str, Run]]) -> None:
    from experiments import _figures as style

    figure = style.figure(12.5, 6.6)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    places = above.subplots(1, 2 * (1 + len(shown))).ravel()
    row = 0
    for index in (0, len(seen.clean) // 2):
        for name, x in {"clean": seen.clean, **shown}.items():
            score = -10 * np.log10(max(np.mean((x[index] - seen.clean[index]) ** 2), 1e-9))
            title = name if score > 80 else f"{name}\n{score:.1f} dB"
            style.image(places[row], np.clip(x[index], 0, 1), title, cmap="gray", vmin=0, vmax=1)
            row += 1
    colors = dict(zip((f"{tol:.0e}" for tol in ACCURACIES), (style.ORANGE, style.BLUE, style.GREEN), strict=True))
    for axes, (name, group) in zip(below.subplots(1, len(paths)), paths.items(), strict=True):
        for run, path in group.items():
            kind, tol = run.split("_")
            label = f"{kind}, from {tol}" if kind == "adapted" else f"{kind} at {tol}"
            line = "-" if kind == "adapted" else style.DASHED
            axes.loglog(path.spent, path.values, line if line == "-" else "--", color=colors[tol], label=label)
        style.titled(axes, name, xlabel="inner gradients and products with the Hessian", ylabel="mean squared error")
    axes.legend(frameon=False, fontsize=9)
    style.save(figure, folder, "course.png", colours=128)


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Held-out crops",
            "peak signal to noise, dB",
            {
                "with noise": ("noisy", style.INK),
                "total variation, best weight": ("single_weight", style.ORANGE),
                "total variation: before": ("variation.before", style.SKY),
                "… tuned": ("variation.tuned", style.BLUE),
                "field of experts: before": ("experts.before", style.SKY),
                "… tuned ": ("experts.tuned", style.BLUE),
            },
        ),
        digits=2,
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""Find wrong labels by tuning one weight for each training example.

    python experiments/hyper_cleaning/run.py --seed 0 --json

Softmax regression on 600 digits of which a share has a wrong label, with 600 clean ones for validation: example weights
by implicit, unrolled, truncated and forward differentiation, against losses that are made for wrong labels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment, progress
from experiments._data import digits

SHARES = (0.3, 0.5, 0.7)
DECAY, RATE, TRAINING, RETRAINING = 3e-4, 2.0, 200, 1000
BINS = np.linspace(0, 1, 26)
THRESHOLD = 0.5  # weights below it say "this label is wrong"
GROUPS = 100  # examples that share a weight, in the study of forward mode


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    shares = (0.5,) if options.smoke else SHARES
    steps, training = (3, 5) if options.smoke else (100, TRAINING)
    problem = hg.Problem(weighted_loss, lambda w, _, batch: jnp.mean(losses(w, batch)))
    inner = hg.inner.gradient(optax.sgd(RATE), steps=training)
    methods = {"unrolled": hg.unrolled(problem, inner=inner, mode="reverse")}
    if not options.smoke:
        methods["truncated"] = hg.unrolled(problem, inner=inner, mode="reverse", truncate=training // 10)
        methods["implicit"] = hg.implicit(problem, inner=hg.inner.lbfgs(tol=1e-4), linear=hg.linear.cg(tol=1e-3))
    for share in progress(shares, "share of wrong labels"):
        train, valid, test, wrong = corrupted(options.seed, share)
        found = baselines(train, valid, test, wrong, {} if options.smoke else ROBUST)
        for name, solver in methods.items():
            began = time.perf_counter()
            start = jnp.full(len(wrong), 0.5)
            result = hg.tune(
                solver,
                zeros(),
                start,
                train,
                valid,
                outer=optax.adam(0.1),
                steps=steps,
                domain=hg.domains.interval(0, 1),
                progress=False,
            )
            weights = result.best.hparams
            found[name] = detection(weights, wrong) | {
                "retrain": accuracy(fit(weights, train), test),
                "with_valid": accuracy(beside(weights, train, valid), test),
                "hard": accuracy(beside(np.asarray(weights) >= THRESHOLD, train, valid), test),
                "online": accuracy(result.best.params, test),
                "seconds": time.perf_counter() - began,
            }
            if name == "unrolled" and share == 0.5:
                parts = {"right": np.asarray(weights)[~wrong], "wrong": np.asarray(weights)[wrong]}
                numbers["histogram"] = {kind: np.histogram(part, BINS)[0] for kind, part in parts.items()}
        numbers[f"{share:g}"] = found
        if share == 0.5:
            gains = {kind: found["unrolled"][kind] - found["plain"][kind] for kind in ("retrain", "with_valid")}
            numbers |= {"gain": gains["retrain"], "gain_with_valid": gains["with_valid"]}
            ours, rival = found["unrolled"], found["self_filter"]
            numbers["over_filter"] = {kind: ours[kind] - rival[kind] for kind in ("f1", "retrain", "with_valid")}
            numbers["over_clean"] = ours["with_valid"] - found["valid_only"]
    train, valid, _, wrong = corrupted(options.seed, 0.5)
    numbers["forward"] = forward(train, valid, wrong, 10 if options.smoke else training)


def corrupted(seed: int, share: float) -> tuple[Any, Any, Any, np.ndarray]:
    """Training, validation and test digits, and which of the training labels were replaced by another at random."""
    train, valid, test = digits(seed, [600, 600])
    rng = np.random.default_rng(seed)
    wrong = np.zeros(600, bool)
    wrong[rng.choice(600, int(share * 600), replace=False)] = True
    labels = np.where(wrong, (train[1] + rng.integers(1, 10, 600)) % 10, train[1]).astype(np.int32)
    return jax.tree.map(jnp.asarray, ((train[0], labels), valid, test)) + (wrong,)


def zeros() -> dict[str, jax.Array]:
    return {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def losses(w: dict[str, jax.Array], batch: Any) -> jax.Array:
    """Cross entropy of softmax regression, one an example."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(x @ w["w"] + w["b"][None], y)


def weighted_loss(w: dict[str, jax.Array], weights: jax.Array, batch: Any) -> jax.Array:
    return jnp.sum(weights * losses(w, batch)) / jnp.sum(weights) + DECAY / 2 * jnp.sum(w["w"] ** 2)


def robust_loss(kind: str, w: dict[str, jax.Array], weights: jax.Array, batch: Any) -> jax.Array:
    """Losses that wrong labels cannot pull without bound."""
    x, y = batch
    z = x @ w["w"] + w["b"][None]
    likely = jnp.exp(-losses(w, batch))
    if kind == "generalized":  # Zhang & Sabuncu 2018, q = 0.7
        each = (1 - likely**0.7) / 0.7
    elif kind == "mean_absolute":  # Ghosh, Kumar & Sastry 2017
        each = 2 * (1 - likely)
    else:  # label smoothing, 0.5
        smooth = 0.5 * jax.nn.one_hot(y, 10) + 0.05
        each = -jnp.sum(smooth * jax.nn.log_softmax(z), axis=1)
    return jnp.sum(weights * each) / jnp.sum(weights) + DECAY / 2 * jnp.sum(w["w"] ** 2)


@partial(jax.jit, static_argnames="loss")
def fit(weights: Any, batch: Any, loss: Callable[..., jax.Array] = weighted_loss) -> dict[str, jax.Array]:
    """Parameters after gradient descent from zero."""
    weights = jnp.asarray(weights, jnp.float32)

    def step(w: dict[str, jax.Array], _: None) -> tuple[dict[str, jax.Array], None]:
        return jax.tree.map(lambda p, g: p - RATE * g, w, jax.grad(loss)(w, weights, batch)), None

    return jax.lax.scan(step, zeros(), None, length=RETRAINING)[0]


def beside(weights: Any, train: Any, valid: Any, loss: Callable[..., jax.Array] = weighted_loss) -> Any:
    """Fresh fit to training examples of these weights and validation examples of weight 1."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), train, valid)
    return fit(jnp.concatenate([jnp.asarray(weights, jnp.float32), jnp.ones(len(valid[1]))]), both, loss)


def accuracy(w: Any, batch: Any) -> float:
    return float(jnp.mean(jnp.argmax(batch[0] @ w["w"] + w["b"][None], axis=1) == batch[1]))


def detection(weights: Any, wrong: np.ndarray) -> dict[str, float]:
    found = np.asarray(weights) < THRESHOLD
    hits = int(np.sum(found & wrong))
    return {"f1": 2 * hits / max(int(np.sum(found) + np.sum(wrong)), 1), "suspected": int(np.sum(found))}


ROBUST = {kind: partial(robust_loss, kind) for kind in ("generalized", "mean_absolute", "smoothing")}


def baselines(train: Any, valid: Any, test: Any, wrong: np.ndarray, robust: dict[str, Any]) -> dict[str, Any]:
    """Every label believed, none, the right ones alone; rivals for which the clean examples are training data too."""
    ones, right = np.ones(len(wrong)), 1.0 - wrong
    found: dict[str, Any] = {
        "plain": {
            "retrain": accuracy(fit(ones, train), test),
            "with_valid": accuracy(beside(ones, train, valid), test),
        },
        "oracle": {
            "retrain": accuracy(fit(right, train), test),
            "with_valid": accuracy(beside(right, train, valid), test),
        },
        "valid_only": accuracy(fit(np.ones(len(valid[1])), valid), test),
    }
    for kind, loss in robust.items():
        found[kind] = {
            "retrain": accuracy(fit(ones, train, loss), test),
            "with_valid": accuracy(beside(ones, train, valid, loss), test),
        }
    # The model of the clean examples says which labels it finds unlikely: threshold at one half, no tuning.
    doubts = jnp.exp(-losses(fit(np.ones(len(valid[1])), valid), train))
    found["self_filter"] = detection(doubts, wrong) | {
        "retrain": accuracy(fit(np.asarray(doubts >= THRESHOLD), train), test),
        "with_valid": accuracy(beside(np.asarray(doubts >= THRESHOLD), train, valid), test),
    }
    return found


def forward(train: Any, valid: Any, wrong: np.ndarray, training: int) -> dict[str, Any]:
    """Forward mode carries a tangent for each hyperparameter: with a weight per group it is exact, and costs more."""
    order = np.argsort(wrong, kind="stable")  # a group is all right or all wrong, as near as can be
    group = np.empty(len(wrong), int)
    group[order] = np.arange(len(wrong)) * (len(wrong) // GROUPS) // len(wrong)
    grouped = hg.Problem(
        lambda w, weights, batch: weighted_loss(w, weights[group], batch),
        lambda w, _, batch: jnp.mean(losses(w, batch)),
    )
    inner, start = hg.inner.gradient(optax.sgd(RATE), steps=training), jnp.full(len(wrong) // GROUPS, 0.5)
    grads, seconds = {}, {}
    for mode in ("reverse", "forward"):
        solver = hg.unrolled(grouped, inner=inner, mode=mode)
        call, state = jax.jit(solver.hypergrad), solver.init(zeros(), start)
        grads[mode] = np.asarray(call(state, start, train, valid)[0].grad)
        began = time.perf_counter()
        jax.block_until_ready(call(state, start, train, valid))
        seconds[mode] = time.perf_counter() - began
    gap = np.max(np.abs(grads["forward"] - grads["reverse"])) / np.max(np.abs(grads["reverse"]))
    return {"hyperparameters": len(start), "gap": gap, "time_ratio": seconds["forward"] / seconds["reverse"]}


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 4.8)
    left, middle, right = canvas.subplots(1, 3)
    middles = (BINS[1:] + BINS[:-1]) / 2
    for kind, color in (("right", style.BLUE), ("wrong", style.ORANGE)):
        counts = np.array(style.each(results, f"histogram.{kind}"))
        left.bar(middles, counts.mean(0), BINS[1], color=color, alpha=0.6, label=f"{kind} labels")
        for line in counts:
            left.plot(middles, line, color=color, linewidth=0.8, alpha=0.5)
    left.axvline(THRESHOLD, color=style.INK, lw=0.9, linestyle=style.DASHED)
    left.legend(frameon=False, loc="upper right", fontsize=11)
    style.titled(left, "Learned weights, half wrong", xlabel="weight", ylabel="training examples")
    lines = {
        "oracle": ("right labels alone (oracle)", style.GREEN),
        "self_filter": ("filter without tuning", style.PINK),
        "unrolled": ("tuned weights", style.BLUE),
        "plain": ("every label believed", style.ORANGE),
    }
    for axes, kind in ((middle, "retrain"), (right, "with_valid")):
        for name, (label, color) in lines.items():
            found = [style.each({s: run[f"{share:g}"] for s, run in results.items()}, f"{name}.{kind}")
                     for share in SHARES]  # fmt: skip
            axes.errorbar(
                SHARES,
                *style.mean_and_error(np.transpose(found)),
                marker="o",
                color=color,
                label=label,
                lw=2,
                capsize=4,
            )
        axes.set_xticks(SHARES)
    clean = np.mean([run["0.5"]["valid_only"] for run in results.values()])
    for axes in (middle, right):
        axes.axhline(clean, color=style.INK, linestyle=style.DASHED, lw=1.2, label="clean examples alone")
        axes.set_ylim(0.42, 1.0)
    right.set_ylim(0.8, 1.0)
    style.titled(middle, "Fresh training on the noisy set", xlabel="share of wrong labels", ylabel="test accuracy")
    style.titled(right, "… and the clean examples", xlabel="share of wrong labels", ylabel="test accuracy")
    style.legend(canvas, middle, right, columns=5)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

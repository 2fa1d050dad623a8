r"""Hyper-cleaning: find wrong labels by giving every training example a weight and tuning the weights.

    min over λ ∈ [0, 1]ⁿ of   mean over validation of ℓ(w(λ)),    w(λ) trained on   Σᵢ λᵢ ℓᵢ(w) / Σᵢ λᵢ + (decay/2) ‖w‖²

Source: Franceschi et al. 2017, arXiv:1703.01785, section 6.1; here with digits instead of MNIST, softmax regression,
and a sigmoid instead of a projection.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad._demo import data as datasets
from hypergrad._demo.methods import METHODS
from hypergrad._demo.outcome import Outcome, verdict

DEFAULT_METHOD = "unrolled"
STEPS = 100
DECAY = 3e-4
RATE = 2.0  # learning rate of the training
TRAINING = 200  # steps of gradient descent that are differentiated
RETRAINING = 1000  # steps of gradient descent of the final fits
THRESHOLD = 0.5  # weights below count as "this label is wrong"


def weighted_loss(params: dict[str, Any], weights: Any, batch: Any) -> jax.Array:
    """Cross entropy of softmax regression, weighted by example, with a little weight decay."""
    x, y = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"][None], y)
    return jnp.sum(weights * losses) / jnp.sum(weights) + DECAY / 2 * jnp.sum(params["w"] ** 2)


def plain_loss(params: dict[str, Any], weights: Any, batch: Any) -> jax.Array:
    """Mean cross entropy on correct labels, for which the weights are tuned."""
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"][None], y))


def start() -> dict[str, jax.Array]:
    """Softmax regression from 64 pixels to 10 classes, at zero."""
    return {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def run(method: str, seed: int, steps: int | None) -> Outcome:
    """Tune, retrain from zero with the weights found, and compare."""
    data = datasets.digits(seed)
    problem = hg.Problem(weighted_loss, plain_loss)
    solver = METHODS[method][1](problem, RATE, TRAINING)
    result = hg.tune(
        solver,
        start(),
        jnp.full(len(data.true), 0.5),
        data.train,
        data.valid,
        outer=optax.adam(0.1),
        steps=steps or STEPS,
        domain=hg.domains.interval(0, 1),
    )
    return _report(data, result)


def _report(data: datasets.Digits, result: hg.Result) -> Outcome:
    weights = np.asarray(result.best.hparams)
    right, everything, nothing = 1.0 - data.wrong, np.ones(len(weights)), np.zeros(len(weights))
    both = tuple(np.concatenate(pair) for pair in zip(data.train, data.valid, strict=True))
    whole = np.ones(len(data.valid[1]))

    def alone(example_weights: np.ndarray) -> float:
        return _accuracy(_fit(example_weights, data.train), data.test)

    def beside(example_weights: np.ndarray) -> float:
        return _accuracy(_fit(np.concatenate([example_weights, whole]), both), data.test)

    rows = {
        "plain": ("plain: every label believed", everything),
        "tuned": ("tuned weights", weights),
        "oracle": ("oracle: wrong labels left out", right),
    }
    small = {name: alone(value) for name, (_, value) in rows.items()}
    full = {name: beside(value) for name, (_, value) in rows.items()}
    valid_only = beside(nothing)

    found = weights < THRESHOLD
    hits = int(np.sum(found & data.wrong))
    precision, recall = hits / max(int(np.sum(found)), 1), hits / int(np.sum(data.wrong))
    f1 = 2 * hits / int(np.sum(found) + np.sum(data.wrong))
    table = [
        ("Test accuracy, retrained from zero", "on training set", "on training + validation"),
        *((text, f"{small[name]:.3f}", f"{full[name]:.3f}") for name, (text, _) in rows.items()),
        ("validation set alone", "", f"{valid_only:.3f}"),
    ]
    notes = [
        f"Wrong labels found (weight below {THRESHOLD:g}): {hits} of {int(np.sum(data.wrong))}, and "
        f"{int(np.sum(found)) - hits} right ones suspected: precision {precision:.3f}, recall {recall:.3f}, "
        f"F1 {f1:.3f}.",
        f"Best validation loss {result.best.value:.4f} at step {result.best.step}, where the parameters of that step "
        f"have test accuracy {_accuracy(result.best.params, data.test):.3f}.",
        verdict(result),
    ]
    numbers = {
        "plain": full["plain"],
        "tuned": full["tuned"],
        "oracle": full["oracle"],
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "validation_only": valid_only,
    }
    numbers |= {f"{name}_training_only": value for name, value in small.items()}
    return Outcome(table, notes, numbers, functools.partial(_draw, data, weights, result))


@jax.jit
def _fit(weights: Any, batch: Any) -> dict[str, jax.Array]:
    """Parameters after full-batch gradient descent from zero."""
    weights = jnp.asarray(weights, jnp.result_type(float))

    def step(params: dict[str, jax.Array], _: None) -> tuple[dict[str, jax.Array], None]:
        slope = jax.grad(weighted_loss)(params, weights, batch)
        return jax.tree.map(lambda p, g: p - RATE * g, params, slope), None

    return jax.lax.scan(step, start(), None, length=RETRAINING)[0]


def _accuracy(params: dict[str, Any], batch: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = batch
    scores = x @ np.asarray(params["w"]) + np.asarray(params["b"])[None]
    return float(np.mean(np.argmax(scores, axis=1) == y))


def _draw(data: datasets.Digits, weights: np.ndarray, result: hg.Result, path: str) -> None:
    from hypergrad._demo.figures import draw_cleaning

    draw_cleaning(data, weights, result, THRESHOLD, path)

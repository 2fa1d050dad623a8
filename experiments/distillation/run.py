"""Ten images that teach what a thousand do: training data as hyperparameters.

    python experiments/distillation/run.py --seed 0 --json

The pixels of one image a class, zero at first, are learned so that a softmax regression trained on them alone is right
on 1,000 real digits. What they are worth shows in a fresh training on the learned images.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment
from experiments._data import digits
from experiments._figures import BLUE, GREEN, INK, ORANGE, PINK, SKY, bars, figure, image, save

DECAY = 0.01
DECAYS = (0.0, 1e-4, 1e-3, DECAY)  # of the training on all real images, chosen by validation
INNER = hg.inner.gradient(optax.adam(1e-2), steps=5)  # between two hypergradients
RETRAINING = 2000  # steps of each fresh training
DRAWS = 300  # of random search: as many fits of ten images


class Arm(NamedTuple):
    """A way to distill.

    Attributes:
        terms: products with the Hessian in the Neumann series; none is the identity in place of its inverse.
        decay: of the weights.
        images: how many are learned.
    """

    terms: int
    decay: float = DECAY
    images: int = 10


ARMS = {
    "K0": Arm(0),
    "K5": Arm(5),
    "K20": Arm(20),
    "K0_without_decay": Arm(0, decay=0.0),
    "K5_without_decay": Arm(5, decay=0.0),
    "K5_of_50": Arm(5, images=50),
}


def start(key: Any = None) -> dict[str, Any]:
    w = jnp.zeros((64, 10)) if key is None else 0.1 * jax.random.normal(key, (64, 10))
    return {"w": w, "b": jnp.zeros(10)}


def cross_entropy(params: dict[str, Any], x: Any, y: Any) -> Any:
    logits = x @ params["w"] + params["b"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def classes(count: int) -> Any:
    """One image after the other, class by class and again."""
    return jnp.arange(count) % 10


def distill(arm: Arm, real: Any, steps: int) -> hg.Result:
    def training_loss(params: Any, images: Any, _: Any) -> Any:
        penalty = arm.decay / 2 * jnp.sum(params["w"] ** 2)
        return cross_entropy(params, images, classes(arm.images)) + penalty

    problem = hg.Problem(training_loss, lambda params, images, batch: cross_entropy(params, *batch))
    linear = hg.linear.neumann(arm.terms) if arm.terms else hg.linear.identity()
    solver = hg.implicit(problem, inner=INNER, linear=linear)
    images = jnp.zeros((arm.images, 64))
    return hg.tune(solver, start(), images, None, real, outer=optax.adam(0.02), steps=steps)


@partial(jax.jit, static_argnames="steps")
def fit(key: Any, x: Any, y: Any, decay: Any, *, steps: int) -> dict[str, Any]:
    """A fresh training from random weights on `(x, y)` alone."""
    optimizer = optax.adam(1e-2)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        slope = jax.grad(lambda p: cross_entropy(p, x, y) + decay / 2 * jnp.sum(p["w"] ** 2))(params)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), None

    params = start(key)
    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]


@jax.jit
def accuracy(params: dict[str, Any], batch: Any) -> Any:
    return jnp.mean(jnp.argmax(batch[0] @ params["w"] + params["b"][None], 1) == batch[1])


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    steps, retraining, draws = (20, 50, 3) if options.smoke else (1500, RETRAINING, DRAWS)
    arms = {name: ARMS[name] for name in ("K0", "K5")} if options.smoke else ARMS
    real, valid, test = jax.tree.map(jnp.asarray, digits(options.seed, (1000, 300)))
    keys = jax.random.split(jax.random.key(options.seed), 3)

    def retrained(x: Any, y: Any, decay: float = DECAY) -> Any:
        """Test accuracy, mean over three fresh trainings."""
        ends = jax.vmap(lambda key: fit(key, x, y, decay, steps=retraining))(keys)
        return jnp.mean(jax.vmap(lambda params: accuracy(params, test))(ends))

    rng = np.random.default_rng(options.seed)
    members = [np.flatnonzero(np.asarray(real[1]) == label) for label in range(10)]
    chosen = np.stack([rng.choice(rows, draws) for rows in members], 1)  # [draws, 10], one of each class
    ten = lambda rows: fit(keys[0], real[0][rows], classes(10), DECAY, steps=retraining)
    drawn = jax.vmap(ten)(jnp.asarray(chosen))
    by_valid = jax.vmap(lambda params: accuracy(params, valid))(drawn)
    best = chosen[int(jnp.argmax(by_valid))]
    numbers["real_10"] = jnp.mean(jax.vmap(lambda params: accuracy(params, test))(drawn))
    numbers["searched_10"] = retrained(real[0][best], classes(10))
    means = jnp.stack([real[0][rows].mean(0) for rows in members])
    numbers["class_means"] = retrained(means, classes(10))
    on_all = jax.vmap(lambda decay: fit(keys[0], *real, decay, steps=retraining))(jnp.asarray(DECAYS))
    numbers["decay_1000"] = DECAYS[int(jnp.argmax(jax.vmap(lambda params: accuracy(params, valid))(on_all)))]
    numbers["real_1000"] = retrained(*real, numbers["decay_1000"])
    results = {}
    for name, arm in arms.items():
        result = results[name] = distill(arm, real, steps)
        numbers[f"online_{name}"] = accuracy(result.params, test)
        numbers[f"retrain_{name}"] = retrained(result.hparams, classes(arm.images), arm.decay)
        numbers[f"skipped_{name}"] = int(np.sum(~result.history.usable))
    numbers["gain_K5"] = numbers["retrain_K5"] - numbers["real_10"]
    if not options.smoke:
        shown = {"real, best of 300": real[0][best], "class means": means}
        shown |= {f"learned, {k[1:]} products": results[k].hparams for k in ("K0", "K5")}
        picture(shown, numbers, options.out)


def picture(shown: dict[str, Any], numbers: dict[str, Any], folder: Path) -> None:
    canvas = figure(12.5, 4.0)
    left, right = canvas.subfigures(1, 2, width_ratios=(1.75, 1))
    for row, (name, images) in zip(left.subplots(len(shown), 10), shown.items(), strict=True):
        size = float(jnp.abs(images).max())
        for axes, pixels in zip(row, images, strict=True):
            image(axes, pixels.reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size)
        row[0].set_title(name, loc="left", fontsize=10, color=INK, pad=4)
    axes = right.subplots()
    rows = {
        "10 real images": ("real_10", ORANGE),
        "best of 300 draws": ("searched_10", ORANGE),
        "class means": ("class_means", PINK),
        "learned, 0 products": ("retrain_K0", SKY),
        "learned, 5 products": ("retrain_K5", BLUE),
        "learned, 20 products": ("retrain_K20", BLUE),
        "50 learned": ("retrain_K5_of_50", BLUE),
        "all 1,000 real": ("real_1000", GREEN),
    }
    shares = {name: (numbers[key], color) for name, (key, color) in rows.items()}
    bars(axes, shares, "Fresh training on them alone", xlabel="test accuracy", xlim=(0.4, 1.05))
    save(canvas, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Fresh training on them alone",
            "test accuracy",
            {
                "10 real images": ("real_10", style.ORANGE),
                "best of 300 draws": ("searched_10", style.ORANGE),
                "class means": ("class_means", style.PINK),
                "learned, 0 products": ("retrain_K0", style.SKY),
                "learned, 5 products": ("retrain_K5", style.BLUE),
                "learned, 20 products": ("retrain_K20", style.BLUE),
                "50 learned": ("retrain_K5_of_50", style.BLUE),
                "all 1,000 real": ("real_1000", style.GREEN),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

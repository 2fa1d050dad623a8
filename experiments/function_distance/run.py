"""Digits learned in two parts: distances between networks as functions, without the data, keep what was learned.

A ReLU perceptron learns the digits 0 to 4, and then 5 to 9, with penalties in the place of the data of the first part:
how far it has moved as a function, estimated from moments of inputs and gates, and rivals. The estimates are compared
with the truth on unseen digits, at all that the penalties lead to. Then a small network learns digits of which a tenth
have wrong labels, and the curvature of the same distance says how much each example holds on to it.

    python experiments/function_distance/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402
from experiments._data import digits  # noqa: E402

WIDTHS, BATCH, SAMPLES, LOOKS = (64, 100, 10), 100, 100, 3
SCALES = {
    name: tuple(10 ** (at + k / 2) for k in range(7)) for name, at in {"l2": -2.5, "ewc": 1.5, "exact": -3}.items()
}
SCALES |= {"plain": (0.0,), "bgln_d": SCALES["l2"], "bgln_s": SCALES["l2"]}
Distance = Callable[[Any, Any], Any]  # (layers, key) -> distance from the first network


def new_layers(key: Any, widths: tuple[int, ...] = WIDTHS) -> Any:
    shapes = list(itertools.pairwise(widths))
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(k, shape) * np.sqrt(2 / shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]


def network(layers: Any, x: Any) -> Any:
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b[None])
    return x @ layers[-1][0] + layers[-1][1][None]


def cross_entropy(layers: Any, data: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network(layers, data[0]), data[1]))


def accuracy(layers: Any, data: Any) -> Any:
    return jnp.mean(jnp.argmax(network(layers, data[0]), axis=1) == data[1])


def train(start: Any, data: Any, rate: Any, penalty: Distance, steps: int, looks: int, key: Any) -> Any:
    """Layers at `looks` points of a run of Adam on `data` and the penalty."""
    optimizer = optax.inject_hyperparams(optax.adam)(rate)

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        (layers, state), (draw, key) = carry, jax.random.split(key)
        index = jax.random.randint(draw, (BATCH,), 0, len(data[1]))
        loss = lambda layers: cross_entropy(layers, (data[0][index], data[1][index])) + penalty(layers, key)
        updates, state = optimizer.update(jax.grad(loss)(layers), state)
        return (optax.apply_updates(layers, updates), state), None

    def look(carry: Any, keys: Any) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, carry[0]

    keys = jax.random.split(key, (looks, steps // looks))
    return jax.lax.scan(look, (start, optimizer.init(start)), keys)[1]


def quadratic(before: Any, weights: Any) -> Distance:
    """½ Σ weight (θ − θ₀)²."""
    return lambda layers, key: (
        0.5
        * sum(
            jnp.sum(w * (a - b) ** 2) for w, a, b in zip(*map(jax.tree.leaves, (weights, layers, before)), strict=True)
        )
    )


def diagonal(before: Any, x: Any, weigh: Callable[[Any], Any]) -> Any:
    """Mean over x of Σ_c weigh(f)_c (∂ f̃_c/∂θ)², of the outputs or of their log-probabilities."""

    def of_one(row: Any) -> Any:
        outputs = lambda layers: weigh(network(layers, row[None])[0])
        weight = jax.lax.stop_gradient(outputs(before)[1])
        jacobian = jax.jacrev(lambda layers: outputs(layers)[0])(before)
        return jax.tree.map(lambda j: jnp.einsum("c,c...->...", weight, j**2), jacobian)

    add = lambda total, row: (jax.tree.map(jnp.add, total, of_one(row)), None)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, before), x)
    return jax.tree.map(lambda leaf: leaf / len(x), total)


def distances(before: Any, first: Any) -> tuple[dict[str, Distance], Any]:
    """Estimates of the distance from `before` by name, and what BGLN keeps of the data."""
    labels = jax.nn.one_hot(first[1], 5)
    kept, together = (hg.objectives.function_moments(before, first[0], each) for each in (labels, None))
    fisher = diagonal(before, first[0], lambda f: (jax.nn.log_softmax(f), jax.nn.softmax(f)))
    squares = diagonal(before, first[0], lambda f: (f, jnp.ones_like(f)))
    by_moments = hg.objectives.function_distance(kept, by="moments")
    pooled = hg.objectives.function_distance(together, by="moments")
    by_samples = hg.objectives.function_distance(kept, by="samples", samples=SAMPLES)
    linearised = hg.objectives.ntk_function_distance(network, before)
    exact = hg.objectives.exact_function_distance(network, before)
    return {
        "bgln_d": lambda layers, key: by_moments(layers, None, None),
        "bgln_d_pooled": lambda layers, key: pooled(layers, None, None),
        "bgln_s": lambda layers, key: by_samples(layers, None, None, key),
        "ntk": lambda layers, key: linearised(layers, None, first[0]),
        "ewc": quadratic(before, fisher),
        "diagonal": quadratic(before, squares),
        "l2": quadratic(before, jax.tree.map(jnp.ones_like, before)),
        "exact": lambda layers, key: exact(layers, None, first[0]),
    }, kept


def mislabelled(data: Any, seed: int, steps: int, hidden: int) -> dict[str, float]:
    """Area under the curve of finding the wrong labels, a tenth, by each score."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    wrong = rng.random(len(data[1])) < 0.1
    labels = jnp.where(wrong, (data[1] + rng.integers(1, 10, len(wrong))) % 10, data[1])
    keys = jax.random.split(jax.random.key(seed + 1), 2)

    @jax.jit
    def scores(labels: Any) -> dict[str, Any]:
        start = new_layers(keys[0], (64, hidden, 10))
        end = train(start, (data[0], labels), 3e-3, lambda layers, key: 0.0, steps, 1, keys[1])
        layers = [(w[0], b[0]) for w, b in end]
        flat, unravel = jax.flatten_util.ravel_pytree(layers)
        kept = hg.objectives.function_moments(layers, data[0], jax.nn.one_hot(labels, 10))
        distance = hg.objectives.function_distance(kept, by="moments")
        slope = jax.grad(lambda v: distance([tuple(pair) for pair in unravel(v)], None, None))
        column = lambda e: jax.jvp(slope, (flat,), (e,))[1]
        curvature = jax.lax.map(column, jnp.eye(flat.size), batch_size=32)
        one = lambda v, x, y: cross_entropy([tuple(pair) for pair in unravel(v)], (x[None], y[None]))
        losses, gradients = jax.vmap(jax.value_and_grad(one), (None, 0, 0))(flat, data[0], labels)
        mean = jnp.mean(jnp.diag(curvature))
        held = jax.scipy.linalg.cho_factor((curvature + curvature.T) / 2 + 0.01 * mean * jnp.eye(flat.size))
        whole = jnp.sum(gradients * jax.scipy.linalg.cho_solve(held, gradients.T).T, axis=1)
        by_diagonal = jnp.sum(gradients**2 / (jnp.diag(curvature) + 0.01 * mean), axis=1)
        return {"bgln_d": whole, "diagonal": by_diagonal, "gradient": jnp.sum(gradients**2, axis=1), "loss": losses}

    return {name: float(roc_auc_score(wrong, np.asarray(each))) for name, each in scores(labels).items()}


def size_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    seed, smoke = options.seed, options.smoke
    parts = digits(seed, (100, 100) if smoke else (1000, 300))
    share = lambda part, rest: (jnp.asarray(part[0][rest]), jnp.asarray(part[1][rest]))
    (first, first_valid, first_test), (second, second_valid, second_test) = (
        [share(part, (part[1] < 5) == low) for part in parts] for low in (True, False)
    )
    steps = 30 if smoke else 390
    keys = jax.random.split(jax.random.key(seed), 4)
    nothing: Distance = lambda layers, key: 0.0
    learned = jax.jit(lambda: train(new_layers(keys[0]), first, 1e-3, nothing, 20 if smoke else 600, 1, keys[1]))()
    before = jax.tree.map(lambda leaf: leaf[0], learned)
    before = [tuple(pair) for pair in before]
    numbers["first_learned"] = accuracy(before, first_test)

    # Penalties in the place of the data; all distances from `before` of what is reached on the way.
    names = ("bgln_d", "bgln_d_pooled", "bgln_s", "ntk", "ewc", "diagonal")

    def continued(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        def run(scale: Any) -> tuple[dict[str, Any], list[Any]]:
            found = {"plain": nothing} | distances(before, first)[0]
            penalty: Distance = lambda layers, key: scale * found[name](layers, key)
            points = train(before, second, 1e-3, penalty, steps, LOOKS, keys[2])
            truth = hg.objectives.exact_function_distance(network, before)
            away = lambda layers: {
                "true": truth(layers, None, first_test[0]),
                **{other: found[other](layers, keys[3]) for other in names},
            }
            last = jax.tree.map(lambda leaf: leaf[-1], points)
            scores = [accuracy(last, data) for data in (first_valid, second_valid, first_test, second_test)]
            return jax.lax.map(away, points), scores

        apart, scores = jax.jit(lambda scales: jax.lax.map(run, scales))(
            jnp.asarray(SCALES[name][-1:] if smoke else SCALES[name])
        )
        return {other: np.asarray(each).ravel() for other, each in apart.items()}, np.asarray(scores)

    curves, apart = {}, []
    for name in ("bgln_d",) if smoke else SCALES:
        found, (valid_first, valid_second, test_first, test_second) = continued(name)
        apart.append(found)
        best = int(np.argmax(valid_first + valid_second))
        curves[name] = (test_first, test_second, best)
        numbers[name] = {
            "scale": SCALES[name][best],
            "first": test_first[best],
            "second": test_second[best],
            "mean": (test_first[best] + test_second[best]) / 2,
        }
    values = {name: np.concatenate([found[name] for found in apart]) for name in ("true", *names)}
    if not smoke:
        numbers["gain"] = numbers["bgln_d"]["mean"] - numbers["ewc"]["mean"]
    numbers["points"] = len(values["true"])
    numbers["correlation"] = {name: float(np.corrcoef(values[name], values["true"])[0, 1]) for name in names}
    numbers["ratio"] = {name: float(np.median(values[name] / values["true"])) for name in names}

    # All the data at once, and examples with wrong labels.
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
    joint = jax.jit(lambda: train(before, both, 1e-3, nothing, steps, 1, keys[2]))()
    joint = [(w[0], b[0]) for w, b in joint]
    numbers["joint"] = {"mean": (accuracy(joint, first_test) + accuracy(joint, second_test)) / 2}
    few = jax.tree.map(lambda leaf: leaf[:: 1 if smoke else 2], both)
    numbers["wrong"] = mislabelled(few, seed, *((20, 2) if smoke else (600, 16)))

    # What is kept.
    kept, half = distances(before, first)[1], distances(before, jax.tree.map(lambda a: a[: len(a) // 2], first))[1]
    numbers["bytes"] = {
        "kept": size_of(kept),
        "kept_of_half": size_of(half),
        "growth": size_of(kept) - size_of(half),
        "data": size_of(first),
        "network": size_of(before),
    }
    if not smoke:
        draw(options.out, values, curves, numbers)


def draw(folder: Path, values: dict[str, Any], curves: dict[str, Any], numbers: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(13, 4.8)
    left, middle, right = figure.subplots(1, 3)
    shown = {
        "bgln_d": (style.BLUE, "BGLN-D"),
        "ntk": (style.GREEN, "linearised, with data"),
        "ewc": (style.ORANGE, "EWC"),
    }
    for name, (color, label) in shown.items():
        scale = np.sum(values[name] * values["true"]) / np.sum(values[name] ** 2)
        axes = middle if name == "ewc" else left
        axes.loglog(
            values["true"],
            values[name] * scale,
            ".",
            color=color,
            label=f"{label}: r = {numbers['correlation'][name]:.2f}",
        )
    for axes, title in ((left, "Distance as a function"), (middle, "The same by a quadratic form")):
        ends = [values["true"].min(), values["true"].max()]
        axes.plot(ends, ends, color=style.INK, linewidth=1, linestyle=style.DASHED)
        axes.legend(frameon=False, fontsize=9)
        style.titled(axes, title, xlabel="true, on unseen digits 0 to 4", ylabel="estimate, scaled to it")
    colors = {"l2": style.PINK, "ewc": style.ORANGE, "bgln_d": style.BLUE, "bgln_s": style.SKY, "exact": style.INK}
    labels = {"l2": "L2", "ewc": "EWC", "bgln_d": "BGLN-D", "bgln_s": "BGLN-S", "exact": "true, with data"}
    for name, color in colors.items():
        first, second, best = curves[name]
        right.plot(first, second, "o-", color=color, linewidth=1.3, markersize=4, label=labels[name])
        right.plot(first[best], second[best], "o", color=color, markersize=9, fillstyle="none")
    right.plot(*curves["plain"][:2], "s", color=style.INK, markersize=6, label="no penalty")
    right.legend(frameon=False, fontsize=9, loc="lower left")
    style.titled(right, "After the second part", xlabel="accuracy on 0 to 4", ylabel="accuracy on 5 to 9")
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Correlation with the true distance",
            "on unseen digits",
            {
                "BGLN-D": ("correlation.bgln_d", style.BLUE),
                "BGLN-S": ("correlation.bgln_s", style.SKY),
                "BGLN-D, classes together": ("correlation.bgln_d_pooled", style.SKY),
                "linearised, with data": ("correlation.ntk", style.GREEN),
                "EWC": ("correlation.ewc", style.ORANGE),
                "diagonal of JᵀJ": ("correlation.diagonal", style.PINK),
            },
        ),
        (
            "After the second part",
            "accuracy on both parts",
            {
                "no penalty": ("plain.mean", style.INK),
                "L2": ("l2.mean", style.PINK),
                "EWC": ("ewc.mean", style.ORANGE),
                "BGLN-D": ("bgln_d.mean", style.BLUE),
                "BGLN-S": ("bgln_s.mean", style.SKY),
                "true distance, with data": ("exact.mean", style.GREEN),
                "both parts at once": ("joint.mean", style.YELLOW),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

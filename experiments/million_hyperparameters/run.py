"""One weight decay for every parameter: a million hyperparameters, tuned on 50 validation digits.

    python experiments/million_hyperparameters/run.py --seed 0 --json

A perceptron and a convolutional network, each of a little more than a million parameters, are trained on 50 digits. The
logarithm of each parameter's decay is a hyperparameter; implicit differentiation with a short Neumann series moves all
of them at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment, progress
from experiments._data import digits
from experiments._figures import BLUE, DASHED, GREEN, INK, ORANGE, PINK, SKY, bars, figure, image, save, titled

START = -4.0  # log decay
GRID = (-12.0, -10.0, -8.0, -6.0, START, -2.0)  # log decays of the search
INNER, TERMS, STEP_SIZE = 10, 5, 0.05  # training steps an outer step; products with the Hessian, and their step size
TRAINING = optax.adam(1e-3)


class Net(NamedTuple):
    """A network as two functions: `init(key, width) -> params`, `apply(params, x [n, 64]) -> logits [n, 10]`."""

    init: Callable[[Any, int], Any]
    apply: Callable[[Any, Any], Any]


def layers(key: Any, *shapes: tuple[int, ...]) -> list[dict[str, Any]]:
    """He's initialisation."""
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) * np.sqrt(2 / np.prod(shape[:-1])), "b": jnp.zeros(shape[-1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def mlp(params: Any, x: Any) -> Any:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


def cnn(params: Any, x: Any) -> Any:
    """Two convolutions of 3 × 3, the second with stride 2, and a perceptron."""
    x = x.reshape(-1, 8, 8, 1)
    axes = ("NHWC", "HWIO", "NHWC")
    for layer, stride in zip(params[:2], (1, 2), strict=True):
        x = jax.lax.conv_general_dilated(x, layer["w"], (stride, stride), "SAME", dimension_numbers=axes)
        x = jax.nn.relu(x + layer["b"][None, None, None])
    return mlp(params[2:], x.reshape(len(x), -1))


NETS = {
    "mlp": Net(lambda key, width: layers(key, (64, width), (width, width), (width, 10)), mlp),
    "cnn": Net(lambda key, width: layers(key, (3, 3, 1, 8), (3, 3, 8, 16), (256, 4 * width), (4 * width, 10)), cnn),
}


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    width, steps, training = (100, 4, 40) if options.smoke else (1000, 20, 200)
    data = jax.tree.map(jnp.asarray, digits(options.seed, (50, 50)))
    key = jax.random.key(options.seed)
    arms = {"mlp": ("per_weight", "identity", "single"), "cnn": ("per_weight",)}
    if options.smoke:
        arms = {"mlp": ("per_weight",)}
    tuned = {}
    for name in arms:
        net = NETS[name]
        began = net.init(key, width)
        numbers[name] = {"hyperparameters": sum(p.size for p in jax.tree.leaves(began))}
        fit = jax.jit(partial(trained, net, steps=training))
        rival(net, fit, began, data, numbers[name])
        tuned[name] = {arm: tune(net, arm, began, data, steps, numbers[name]) for arm in arms[name]}
        found = (numbers[name].get(f"val_{arm}", 0) for arm in ("searched", "single"))
        numbers[name]["val_global"] = max(found)
        fresh = [net.init(jax.random.fold_in(key, i), width) for i in range(2)]
        retrain(net, fit, tuned[name]["per_weight"].hparams, began, fresh, data, numbers[name])
    if not options.smoke:
        numbers |= price(NETS["mlp"], NETS["mlp"].init(key, width), data)
        picture(tuned, numbers, options.out)


def same(log_decay: float, params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.full_like(p, log_decay), params)


def rival(net: Net, fit: Any, began: Any, data: Any, numbers: dict[str, Any]) -> None:
    """The best single decay by validation accuracy, ties by loss; then with the validation digits trained on too."""
    train, valid, test = data
    tried = {log_decay: fit(began, same(log_decay, began), train) for log_decay in progress(GRID, "search")}
    rank = lambda d: (accuracy(net.apply, tried[d], valid), -cross_entropy(net.apply, tried[d], valid))
    best = max(GRID, key=lambda d: tuple(map(float, rank(d))))
    numbers["searched"] = best
    for name, log_decay in (("plain", START), ("searched", best)):
        numbers[f"val_{name}"] = accuracy(net.apply, tried[log_decay], valid)
        numbers[f"test_{name}"] = accuracy(net.apply, tried[log_decay], test)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), train, valid)
    numbers["test_both"] = accuracy(net.apply, fit(began, same(best, began), both), test)


def tune(net: Net, arm: str, began: Any, data: Any, steps: int, numbers: dict[str, Any]) -> hg.Result:
    train, valid, test = data
    linear = hg.linear.identity(STEP_SIZE) if arm == "identity" else hg.linear.neumann(TERMS, step_size=STEP_SIZE)
    solver = hg.implicit(problem(net), inner=hg.inner.gradient(TRAINING, steps=INNER), linear=linear)
    start = jnp.float32(START) if arm == "single" else same(START, began)
    result = hg.tune(solver, began, start, train, valid, outer=optax.adam(0.1), steps=steps)
    reached = np.flatnonzero(result.history.metrics["accuracy"] >= 0.99)
    numbers[f"val_{arm}"] = accuracy(net.apply, result.params, valid)
    numbers[f"test_{arm}"] = accuracy(net.apply, result.params, test)
    numbers[f"steps_{arm}"] = int(reached[0]) if len(reached) else None
    numbers[f"skipped_{arm}"] = int(np.sum(~result.history.usable))
    return result


def retrain(net: Net, fit: Any, decays: Any, began: Any, fresh: list[Any], data: Any, numbers: dict[str, Any]) -> None:
    """At the learned decays, from the start that tuning began at, and from others."""
    train, *parts = data
    for name, starts in (("retrained", [began]), ("new_start", fresh)):
        ends = [fit(start, decays, train) for start in starts]
        for part, batch in zip(("val", "test"), parts, strict=True):
            numbers[f"{part}_{name}"] = np.mean([accuracy(net.apply, end, batch) for end in ends])


@partial(jax.jit, static_argnums=0)
def cross_entropy(apply: Any, params: Any, batch: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(params, batch[0]), batch[1]))


@partial(jax.jit, static_argnums=0)
def accuracy(apply: Any, params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.argmax(apply(params, batch[0]), 1) == batch[1])


def training_loss(apply: Any, params: Any, log_decays: Any, batch: Any) -> Any:
    """Cross entropy and weight decay; `log_decays` is a pytree like the parameters, or one number for all of them."""
    each = jax.tree.broadcast(log_decays, params)
    decay = jax.tree.map(lambda p, log_decay: jnp.sum(jnp.exp(log_decay) * p**2) / 2, params, each)
    return cross_entropy(apply, params, batch) + sum(jax.tree.leaves(decay))


def validation_loss(apply: Any, params: Any, _: Any, batch: Any) -> Any:
    return cross_entropy(apply, params, batch), {"accuracy": accuracy(apply, params, batch)}


def problem(net: Net) -> hg.Problem:
    return hg.Problem(partial(training_loss, net.apply), partial(validation_loss, net.apply))


def trained(net: Net, params: Any, log_decays: Any, batch: Any, *, steps: int) -> Any:
    """A training run from `params`, nothing tuned."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        return training_step(net, params, state, log_decays, batch), None

    return jax.lax.scan(step, (params, TRAINING.init(params)), None, length=steps)[0][0]


def training_step(net: Net, params: Any, state: Any, log_decays: Any, batch: Any) -> Any:
    updates, state = TRAINING.update(jax.grad(partial(training_loss, net.apply))(params, log_decays, batch), state)
    return optax.apply_updates(params, updates), state


def price(net: Net, params: Any, data: Any) -> dict[str, float]:
    """Time and memory of an outer step that holds one training step, over those of the training step alone."""
    train, valid, _ = data
    linear = hg.linear.neumann(TERMS, step_size=STEP_SIZE)
    solver = hg.implicit(problem(net), inner=hg.inner.gradient(TRAINING, steps=1), linear=linear)
    outer = optax.adam(0.1)

    def outer_step(state: Any, log_decays: Any, outer_state: Any) -> Any:
        out, state = solver.hypergrad(state, log_decays, train, valid)
        updates, outer_state = outer.update(out.grad, outer_state)
        return state, optax.apply_updates(log_decays, updates), outer_state

    log_decays = same(START, params)
    calls = {
        "outer": (outer_step, (solver.init(params, log_decays), log_decays, outer.init(log_decays))),
        "train": (partial(training_step, net), (params, TRAINING.init(params), log_decays, train)),
    }
    programs = {name: (jax.jit(f).lower(*inputs).compile(), inputs) for name, (f, inputs) in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(10):
        for name, (program, inputs) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[name].append(time.perf_counter() - began)
    memory = {name: footprint(program) for name, (program, _) in programs.items()}
    return {
        "cost_ratio": min(seconds["outer"]) / min(seconds["train"]),
        "memory_ratio": memory["outer"] / memory["train"],
        "milliseconds": 1e3 * min(seconds["outer"]),
    }


def footprint(program: Any) -> int:
    """Bytes of what goes in, what comes out, and what lies between."""
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def picture(tuned: dict[str, dict[str, hg.Result]], numbers: dict[str, Any], folder: Path) -> None:
    canvas = figure(12.5, 4.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1.3, 0.9, 1))
    lines = {
        ("mlp", "per_weight"): ("MLP, a decay per parameter", BLUE, "-"),
        ("cnn", "per_weight"): ("CNN, a decay per parameter", BLUE, DASHED),
        ("mlp", "identity"): ("MLP, no product with the Hessian", GREEN, "-"),
        ("mlp", "single"): ("MLP, one decay", ORANGE, "-"),
    }
    for (name, arm), (text, color, style) in lines.items():
        values = tuned[name][arm].history.metrics["accuracy"]
        left.plot(values, color=color, linestyle=style, linewidth=2, label=text)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    titled(left, "50 validation digits, all right", xlabel="outer step", ylabel="validation accuracy")
    left.set_ylim(0.66, 1.01)

    moved = np.asarray(tuned["mlp"]["per_weight"].hparams[0]["w"]).mean(1).reshape(8, 8) - START
    size = np.abs(moved).max()
    image(middle, moved, cmap="RdBu_r", vmin=-size, vmax=size)
    middle.set_title("Log decay by pixel", loc="left", color=INK, pad=9, fontsize=11.5, fontweight="bold")
    canvas.colorbar(middle.images[0], ax=middle, shrink=0.8, label="change, mean over 1,000 units")

    rows = {
        "one decay": ("test_searched", ORANGE),
        "… and 50 more digits": ("test_both", PINK),
        "one per parameter": ("test_per_weight", BLUE),
        "… retrained": ("test_retrained", SKY),
        "… from new starts": ("test_new_start", SKY),
    }
    shares = {name: (numbers["mlp"][key], color) for name, (key, color) in rows.items()}
    bars(right, shares, "Test digits, MLP", xlabel="test accuracy", xlim=(0.8, 0.95))
    save(canvas, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Perceptron",
            "accuracy on 1,697 test digits",
            {
                "no tuning": ("mlp.test_plain", style.INK),
                "one decay, searched": ("mlp.test_searched", style.ORANGE),
                "… and 50 more digits": ("mlp.test_both", style.PINK),
                "one per parameter": ("mlp.test_per_weight", style.BLUE),
                "… no products": ("mlp.test_identity", style.GREEN),
                "… retrained": ("mlp.test_retrained", style.SKY),
                "… from new starts": ("mlp.test_new_start", style.SKY),
            },
        ),
        (
            "CNN",
            "accuracy on 1,697 test digits",
            {
                "no tuning": ("cnn.test_plain", style.INK),
                "one decay, searched": ("cnn.test_searched", style.ORANGE),
                "… and 50 more digits": ("cnn.test_both", style.PINK),
                "one per parameter": ("cnn.test_per_weight", style.BLUE),
                "… retrained": ("cnn.test_retrained", style.SKY),
                "… from new starts": ("cnn.test_new_start", style.SKY),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

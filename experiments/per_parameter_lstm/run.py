"""One weight decay for every parameter of a character LSTM, on the text of Python's own language reference.

    python experiments/per_parameter_lstm/run.py --seed 0 --json

The logarithm of each parameter's decay is a hyperparameter, and all of them move at once by implicit differentiation
while the network trains. Compared with no decay, and with the best single decay of a grid, at equal early stopping.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment
from experiments._data import stretches
from experiments._figures import BLUE, GREEN, INK, ORANGE, SKY, bars, figure, save, titled

LENGTH, ROWS = 32, (100, 100, 300)  # characters of a stretch; stretches for training, validation, testing
START = -8.0  # log decay
GRID = np.linspace(-10.0, -5.0, 6)  # log decays of the search
INNER, STEP_SIZE = 5, 0.3  # training steps an outer step; what stands in for the inverse Hessian
TRAINING = optax.adam(1e-2)
GROUPS = ("embedding", "inputs", "recurrent", "output")
PyTree = Any


def start(key: jax.Array, alphabet: int, width: int) -> PyTree:
    keys = jax.random.split(key, len(GROUPS))
    shapes = ((alphabet, width), (width, 4 * width), (width, 4 * width), (width, alphabet))
    params = {
        name: jax.random.normal(k, shape) / np.sqrt(width) for name, k, shape in zip(GROUPS, keys, shapes, strict=True)
    }
    return params | {"gates": jnp.zeros(4 * width), "bias": jnp.zeros(alphabet)}


def nats(params: PyTree, batch: PyTree) -> jax.Array:
    """Cross entropy of the next character; the cell of Hochreiter & Schmidhuber with a forget gate that begins open."""
    codes, following = batch
    width = len(params["recurrent"])
    inputs = jnp.swapaxes(params["embedding"][codes] @ params["inputs"] + params["gates"][None, None], 0, 1)

    def step(carry: Any, x: jax.Array) -> Any:
        memory, hidden = carry
        let, forget, out, new = jnp.split(x + hidden @ params["recurrent"], 4, axis=1)
        memory = jax.nn.sigmoid(forget + 1) * memory + jax.nn.sigmoid(let) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(out) * jnp.tanh(memory)
        return (memory, hidden), hidden

    zeros = jnp.zeros((len(codes), width))
    hidden = jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), inputs)[1], 0, 1)
    logits = hidden @ params["output"] + params["bias"][None, None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, following))


def training_loss(params: PyTree, log_decays: PyTree, batch: PyTree) -> jax.Array:
    """`log_decays` is a pytree like the parameters, or one number for all of them."""
    each = jax.tree.broadcast(log_decays, params)
    decay = jax.tree.map(lambda p, log_decay: jnp.sum(jnp.exp(log_decay) * p**2) / 2, params, each)
    return nats(params, batch) + sum(jax.tree.leaves(decay))


def trained(params: PyTree, log_decays: PyTree, train: PyTree, valid: PyTree, looks: int) -> tuple[PyTree, jax.Array]:
    """A training run at fixed decays: its parameters where validation was best, and the validation losses `[looks]`."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = TRAINING.update(jax.grad(training_loss)(params, log_decays, train), state)
        return (optax.apply_updates(params, updates), state), None

    def look(carry: Any, _: None) -> Any:
        now, best, lowest = carry
        now, _ = jax.lax.scan(step, now, None, length=INNER)
        value = nats(now[0], valid)
        best = jax.tree.map(lambda a, b: jnp.where(value < lowest, a, b), now[0], best)
        return (now, best, jnp.minimum(value, lowest)), value

    begin = ((params, TRAINING.init(params)), params, jnp.asarray(jnp.inf))
    (_, best, _), values = jax.lax.scan(look, begin, None, length=looks)
    return best, values


def tune(params: PyTree, log_decays: PyTree, train: PyTree, valid: PyTree, looks: int) -> hg.Result:
    problem = hg.Problem(training_loss, lambda params, _, batch: nats(params, batch))
    inner = hg.inner.gradient(TRAINING, steps=INNER)
    solver = hg.implicit(problem, inner=inner, linear=hg.linear.identity(STEP_SIZE))
    return hg.tune(solver, params, log_decays, train, valid, outer=optax.adam(0.1), steps=looks)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    width, looks, rows = (8, 3, (8, 8, 8)) if options.smoke else (48, 60, ROWS)
    parts, alphabet = stretches(options.seed, rows, LENGTH)
    train, valid, test = jax.tree.map(jnp.asarray, parts)
    key = jax.random.key(options.seed)
    params, *fresh = (start(jax.random.fold_in(key, i), alphabet, width) for i in range(3))
    numbers["hyperparameters"] = sum(p.size for p in jax.tree.leaves(params))
    bits = jax.jit(lambda params: nats(params, test) / np.log(2))
    run = jax.jit(lambda params, decays: trained(params, decays, train, valid, looks))

    plain, curve = run(params, jnp.float32(-np.inf))
    began = time.perf_counter()
    grid = jax.block_until_ready([run(params, jnp.float32(d)) for d in GRID])
    seconds = (time.perf_counter() - began) / len(GRID)
    numbers["test_plain"], numbers["valid_plain"] = bits(plain), curve.min() / np.log(2)
    chosen = int(np.argmin([values.min() for _, values in grid]))
    numbers["single"] = GRID[chosen]
    numbers["test_single"], numbers["valid_single"] = bits(grid[chosen][0]), grid[chosen][1].min() / np.log(2)

    one = tune(params, jnp.float32(START), train, valid, looks)
    numbers["test_single_tuned"] = bits(one.best.params)
    result = tune(params, jax.tree.map(lambda p: jnp.full_like(p, START), params), train, valid, looks)
    numbers["test_tuned"], numbers["valid_tuned"] = bits(result.best.params), result.best.value / np.log(2)
    numbers["best_step"], numbers["skipped"] = result.best.step, int(np.sum(~result.history.usable))
    numbers["trainings"] = float(np.median(np.diff(result.history.seconds)) * looks / seconds)
    decays = result.best.hparams
    numbers["test_retrained"] = bits(run(params, decays)[0])
    numbers["test_new_start"] = np.mean([bits(run(other, decays)[0]) for other in fresh])
    numbers["test_single_new_start"] = np.mean([bits(run(p, jnp.float32(GRID[chosen]))[0]) for p in fresh])
    mean = jax.tree.map(jnp.mean, decays)
    numbers["test_by_group"] = np.mean([bits(run(other, mean)[0]) for other in fresh])
    numbers["gain"] = numbers["test_single"] - numbers["test_tuned"]
    numbers["gain_retrained"] = numbers["test_single"] - numbers["test_retrained"]
    numbers["log_decay"] = mean
    picture(numbers, {"no decay": curve, "best single decay": grid[chosen][1]}, result, options.out)


def picture(numbers: dict[str, Any], curves: dict[str, Any], result: hg.Result, folder: Path) -> None:
    canvas = figure(12.5, 4.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1.2, 1, 1))
    curves = curves | {"a decay per parameter": result.history.value}
    for (name, values), color in zip(curves.items(), (INK, ORANGE, BLUE), strict=True):
        left.plot(INNER * np.arange(len(values)), np.asarray(values) / np.log(2), color=color, label=name, linewidth=2)
    left.legend(frameon=False, fontsize=9)
    titled(left, "While training", xlabel="training step", ylabel="validation, bits per character")
    for name, color in zip(GROUPS, (GREEN, BLUE, ORANGE, SKY), strict=True):
        middle.hist(np.asarray(result.best.hparams[name]).ravel(), 60, color=color, label=name, histtype="step", lw=1.6)
    middle.legend(frameon=False, fontsize=9)
    middle.axvline(START, color=INK, linewidth=0.8)
    titled(middle, "Where the decays went", xlabel="log decay (line: start)", ylabel="parameters")
    rows = {
        "no decay": (numbers["test_plain"], INK),
        "single, grid": (numbers["test_single"], ORANGE),
        "single, tuned": (numbers["test_single_tuned"], ORANGE),
        "per parameter": (numbers["test_tuned"], BLUE),
        "… retrained": (numbers["test_retrained"], SKY),
        "… from new starts": (numbers["test_new_start"], SKY),
        "single, new starts": (numbers["test_single_new_start"], ORANGE),
    }
    values = [float(value) for value, _ in rows.values()]
    bars(right, rows, "Test", xlabel="bits per character", xlim=(min(values) - 0.3, max(values) + 0.15))
    save(canvas, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Test",
            "bits per character",
            {
                "no decay": ("test_plain", style.INK),
                "single, grid": ("test_single", style.ORANGE),
                "single, tuned": ("test_single_tuned", style.ORANGE),
                "one for each group": ("test_by_group", style.GREEN),
                "per parameter": ("test_tuned", style.BLUE),
                "… retrained": ("test_retrained", style.SKY),
                "… from new starts": ("test_new_start", style.SKY),
                "single, new starts": ("test_single_new_start", style.ORANGE),
            },
        ),
        (
            "Where the decays went",
            "log decay, mean over the group",
            {
                "embedding": ("log_decay.embedding", style.BLUE),
                "inputs": ("log_decay.inputs", style.BLUE),
                "recurrent": ("log_decay.recurrent", style.BLUE),
                "gates": ("log_decay.gates", style.BLUE),
                "output": ("log_decay.output", style.BLUE),
                "bias": ("log_decay.bias", style.BLUE),
            },
        ),
        digits=2,
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

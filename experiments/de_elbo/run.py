"""Data-emphasized ELBO: noise that is learned where weights outnumber data, and transfer learning without a grid.

First 1,024 random Fourier features for 20 points of sin 3x with noise of 0.1: noise, length scale and output scale
follow the plain gradient of the variational bound, with κ = 1 and with κ = D/n. Then a perceptron, pre-trained on the
digits 5 to 9, is fine-tuned on a few labels of the digits 0 to 4: by the data-emphasized bound on all labels, and by a
grid of two L2-SP strengths and a learning rate on a split of them, trained again on all at the best.

    python experiments/de_elbo/run.py --seed 0 --json
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
from experiments._data import digits  # noqa: E402

POINTS, FEATURES, NOISE = 20, 1024, 0.1
RATES = (0.1, 0.03, 0.01)
STRENGTHS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)  # of L2-SP, times half the squared distance
WIDTH, STEPS, BATCH = 64, 1000, 25


# One dimension: features whose number exceeds that of the data fifty times.


def draw_curve(seed: int) -> tuple[Any, Any, Any]:
    """`(x, y, the frequencies and phases of the features)`."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.5, 1.5, POINTS)
    y = np.sin(3 * x) + NOISE * rng.standard_normal(POINTS)
    drawn = rng.standard_normal(FEATURES), rng.uniform(0, 2 * np.pi, FEATURES)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.asarray(drawn, jnp.float32)


def curve(weights: Any, h: Any, x: Any, features: Any) -> Any:
    """A Gaussian process with a squared-exponential kernel, in the limit of many features."""
    frequencies, phases = features
    waves = jnp.cos(x[:, None] * frequencies[None] / jnp.exp(h["length"]) + phases[None])
    return jnp.exp(h["output"]) * np.sqrt(2 / FEATURES) * waves @ weights


def learn_noise(seed: int, kappa: Any, steps: int) -> tuple[float, float, Any]:
    """`(learned noise, RMSE against the curve without noise, predictions on a grid)`."""
    x, y, features = draw_curve(seed)
    losses = hg.objectives.elbo(
        lambda w, h, x: curve(w, h, x, features),
        likelihood="gaussian",
        noise=lambda h: jnp.exp(h["noise"]),
        kappa=kappa,
        rows=POINTS,
        expectation="linear",
    )
    solver = hg.direct(hg.Problem(*losses), inner=hg.inner.gradient(optax.adam(0.01), steps=1))
    weights = 0.1 * jax.random.normal(jax.random.key(seed), (FEATURES,))
    result = hg.tune(
        solver,
        hg.objectives.posterior(weights, scale=0.1),
        {"noise": 0.0, "length": 0.0, "output": 0.0},
        (x, y),
        (x, y),
        outer=optax.adam(0.01),
        steps=steps,
        steps_per_call=steps,
        progress=False,
    )
    grid = jnp.linspace(-1.5, 1.5, 200)
    found = curve(result.params.mean, result.hparams, grid, features)
    return float(jnp.exp(result.hparams["noise"])), float(jnp.sqrt(jnp.mean((found - jnp.sin(3 * grid)) ** 2))), found


# Transfer: pre-trained features, a new head, a few labels.


def network(weights: Any, h: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ weights["backbone"]["w1"] + weights["backbone"]["b1"][None])
    hidden = jnp.tanh(hidden @ weights["backbone"]["w2"] + weights["backbone"]["b2"][None])
    return hidden @ weights["head"]["w"] + weights["head"]["b"][None]


def new_weights(key: Any) -> Any:
    keys = jax.random.split(key, 3)
    sizes = (64, WIDTH, WIDTH, 5)
    w = [jax.random.normal(k, (a, b)) / np.sqrt(a) for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=True)]
    zeros = [jnp.zeros(b) for b in sizes[1:]]
    backbone = {"w1": w[0], "b1": zeros[0], "w2": w[1], "b2": zeros[1]}
    return {"backbone": backbone, "head": {"w": 0.1 * w[2], "b": zeros[2]}}


def nll(weights: Any, data: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network(weights, None, data[0]), data[1]))


def descent(loss: Any, params: Any, data: Any, rate: Any, key: Any, steps: int) -> Any:
    """Nesterov's momentum with a cosine schedule, on minibatches; `loss(params, batch, key)`."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(1.0)
    )
    n = len(data[1])

    def step(carry: Any, at: Any) -> Any:
        (params, state), (key, t) = carry, at
        rows, draw = jax.random.split(key)
        index = jax.random.randint(rows, (min(BATCH, n),), 0, n)
        grads = jax.grad(loss)(params, (data[0][index], data[1][index]), draw)
        updates, state = optimizer.update(grads, state, params)
        scale = rate * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))
        params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
        return (params, state), None

    at = jax.random.split(key, steps), jnp.arange(steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), at)[0][0]


def split_tasks(seed: int, per_class: int) -> tuple[Any, Any, Any]:
    """`(the digits 5 to 9, a few labels of 0 to 4, the rest of them)`; labels count from 0."""
    ((x, y),) = digits(seed, ())
    source = y >= 5
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~source))
    few = np.concatenate([order[y[order] == c][:per_class] for c in range(5)])
    rest = np.setdiff1d(order, few)
    pack = lambda rows, shift: (jnp.asarray(x[rows]), jnp.asarray(y[rows] - shift, jnp.int32))
    return pack(source, 5), pack(few, 0), pack(rest, 0)


def pre_trained(seed: int, source: Any, steps: int) -> Any:
    """A backbone from the source digits, and a head of zeros."""
    train = jax.jit(lambda key: descent(lambda w, batch, key: nll(w, batch), new_weights(key), source, 0.1, key, steps))
    weights = train(jax.random.key(seed))
    return {"backbone": weights["backbone"], "head": jax.tree.map(jnp.zeros_like, weights["head"])}


def by_elbo(start: Any, data: Any, seed: int, steps: int) -> tuple[dict[str, Any], int]:
    """`({κ: (posterior, prior variances)}, training steps of each)`, on all labels; of three learning rates the one
    with the lowest training objective.
    """
    groups, n = {"backbone": "backbone", "head": "head"}, len(data[1])
    kappas = {"one": 1.0, "data": sum(leaf.size for leaf in jax.tree.leaves(start)) / n}
    inner, _ = hg.objectives.elbo(
        network, likelihood="categorical", kappa=lambda kappa: kappa, rows=n, center=start, groups=groups
    )
    posterior = hg.objectives.posterior(start, scale=1e-2)

    @jax.jit
    @jax.vmap
    def run(setting: Any) -> Any:
        kappa, rate = setting
        key, test_key = jax.random.split(jax.random.key(seed))
        q = descent(lambda q, batch, key: inner(q, kappa, batch, key), posterior, data, rate, key, steps)
        keys = jax.random.split(test_key, 32)
        objective = jnp.mean(jax.lax.map(lambda k: inner(q, kappa, data, k), keys))
        return (q, hg.objectives.prior_variances(q, center=start, groups=groups)), objective

    found, objective = run(jnp.asarray(list(itertools.product(kappas.values(), RATES))))
    pick = np.nanargmin(np.asarray(objective).reshape(2, len(RATES)), axis=1) + np.asarray([0, len(RATES)])
    best = {name: jax.tree.map(lambda leaf, i=i: leaf[i], found) for name, i in zip(kappas, pick, strict=True)}
    return best, steps * len(RATES)


def by_grid(start: Any, data: Any, seed: int, steps: int) -> tuple[Any, int, tuple[float, ...]]:
    """`(weights, training steps, setting)`: L2-SP, chosen on a fifth of the labels, and trained again on all."""
    held = np.arange(len(data[1])) % 5 == 0  # the rows come class by class
    part = lambda rows: jax.tree.map(lambda a: a[np.flatnonzero(rows)], data)

    def loss(w: Any, batch: Any, setting: Any) -> Any:
        apart = {
            k: sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (w[k], start[k])), strict=True))
            for k in w
        }
        return nll(w, batch) + 0.5 * setting[0] * apart["backbone"] + 0.5 * setting[1] * apart["head"]

    def train(rows: Any, setting: Any) -> Any:
        key = jax.random.key(seed)
        return descent(lambda w, batch, key: loss(w, batch, setting), start, rows, setting[2], key, steps)

    grid = jnp.asarray(list(itertools.product(STRENGTHS, STRENGTHS, RATES)))
    validated = jax.jit(jax.vmap(lambda setting: nll(train(part(~held), setting), part(held))))(grid)
    best = grid[int(jnp.nanargmin(validated))]
    return jax.jit(train)(data, best), steps * (len(grid) + 1), tuple(map(float, best))


@jax.jit
def scored(weights: Any, scale: Any, data: Any) -> tuple[Any, Any]:
    """`(accuracy, NLL)` of ten draws around the weights."""
    leaves, treedef = jax.tree.flatten(weights)

    def one(key: Any) -> Any:
        keys = jax.random.split(key, len(leaves))
        drawn = [w + scale * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
        return jax.nn.log_softmax(network(treedef.unflatten(drawn), None, data[0]))

    logits = jax.nn.logsumexp(jax.lax.map(one, jax.random.split(jax.random.key(1), 10)), axis=0) - jnp.log(10)
    right = jnp.mean(jnp.argmax(logits, axis=1) == data[1])
    return right, -jnp.mean(jnp.take_along_axis(logits, data[1][:, None], axis=1))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    seed, curves = options.seed, {}
    kappas = {"data": "data"} if options.smoke else {"one": 1.0, "data": "data"}
    for name, kappa in kappas.items():
        noise, error, curves[name] = learn_noise(seed, kappa, 50 if options.smoke else 10_000)
        numbers[f"noise_{name}"], numbers[f"rmse_{name}"] = noise, error
    steps = 20 if options.smoke else STEPS
    for per_class in progress((5,) if options.smoke else (5, 20), "labels a class"):
        source, few, rest = split_tasks(seed, per_class)
        start = pre_trained(seed, source, steps)
        found: dict[str, Any] = {}
        best, cost = by_elbo(start, few, seed, steps)
        for name, (q, tau) in best.items():
            accuracy, loss = scored(q.mean, jax.nn.softplus(q.raw_scale), rest)
            found[f"elbo_{name}"] = {"accuracy": accuracy, "nll": loss, "steps": cost, **tau}
        weights, cost, setting = by_grid(start, few, seed, steps)
        accuracy, loss = scored(weights, 0.0, rest)
        found["grid"] = {"accuracy": accuracy, "nll": loss, "steps": cost, "setting": list(setting)}
        found["accuracy_gap"] = found["elbo_data"]["accuracy"] - found["grid"]["accuracy"]
        found["cost_ratio"] = found["elbo_data"]["steps"] / found["grid"]["steps"]
        numbers[f"labels_{per_class}"] = found
    if not options.smoke:
        draw(options.out, numbers, curves, seed)


def draw(folder: Path, numbers: dict[str, Any], curves: dict[str, Any], seed: int) -> None:
    from experiments import _figures as style

    figure = style.figure(12.5, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    x, y, _ = draw_curve(seed)
    grid = np.linspace(-1.5, 1.5, 200)
    left.plot(grid, np.sin(3 * grid), color=style.INK, linewidth=1, linestyle=style.DASHED, label="truth")
    for name, color, label in (("one", style.ORANGE, "κ = 1"), ("data", style.BLUE, "κ = D/n")):
        noise = numbers[f"noise_{name}"]
        left.plot(grid, curves[name], color=color, linewidth=2, label=f"{label}: noise {noise:.2f}")
        band = np.asarray(curves[name]) - 2 * noise, np.asarray(curves[name]) + 2 * noise
        left.fill_between(grid, *band, color=color, alpha=0.12, linewidth=0)
    left.plot(x, y, "o", color=style.INK, markersize=4)
    left.set_ylim(-1.4, 2.1)  # above the points there is room for the legend
    left.legend(frameon=False, loc="upper center", ncols=3)
    style.titled(left, "Twenty points, 1,024 random features: the noise that is learned", xlabel="x", ylabel="y")
    rows = {}
    for labels in (5, 20):
        found = numbers[f"labels_{labels}"]
        rows[f"{labels} labels a class: κ = 1"] = found["elbo_one"]["accuracy"], style.ORANGE
        rows[f"{labels}: κ = D/n"] = found["elbo_data"]["accuracy"], style.BLUE
        rows[f"{labels}: L2-SP grid, retrained"] = found["grid"]["accuracy"], style.GREEN
    style.bars(right, rows, "Transfer to unseen digits: test accuracy", xlabel="accuracy", xlim=(0, 1.1))
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Noise learned (truth 0.1)",
            "standard deviation",
            {
                "κ = 1": ("noise_one", style.ORANGE),
                "κ = D/n": ("noise_data", style.BLUE),
            },
        ),
        (
            "Transfer to unseen digits",
            "test accuracy",
            {
                "5 labels a class: κ = 1": ("labels_5.elbo_one.accuracy", style.ORANGE),
                "… κ = D/n": ("labels_5.elbo_data.accuracy", style.BLUE),
                "… L2-SP grid, retrained": ("labels_5.grid.accuracy", style.GREEN),
                "20 labels: κ = 1": ("labels_20.elbo_one.accuracy", style.ORANGE),
                "… κ = D/n ": ("labels_20.elbo_data.accuracy", style.BLUE),
                "… L2-SP grid, retrained ": ("labels_20.grid.accuracy", style.GREEN),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""Evidence of a network on digits: bounds of every kind beside the exact value, and augmentation tuned with it.

A perceptron of 1,210 weights on 200 digits, trained to its minimum at nine prior precisions: the Laplace evidence
exactly, by blocks of examples, of outputs and of classes, and by parametric forms; and the test loss where each is
highest, beside a fifth of the digits held out. Then digits that were turned: precisions of each layer and the ranges of
rotation and translation follow the evidence of a block of 100 during one training run on all of them; the rival chooses
the ranges on a validation split, and is trained again on all.

    python experiments/ntk_evidence/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402
from experiments._data import digits  # noqa: E402

N, SIZES, PRECISIONS = 200, (10, 25, 50, 100), tuple(float(10 ** (k / 2)) for k in range(-4, 5))
TURNED, ANGLE, DRAWS, BATCH = 200, 30.0, 4, 50  # degrees; draws of the augmentation
RANGES = ((1.0, 0.01), (30.0, 0.01))  # degrees and pixels that validation chooses from: hardly any, and the truth


def new_weights(key: Any, hidden: int = 16) -> Any:
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (64, hidden)) / 8, "b": jnp.zeros(hidden)},
        "head": {"w": jax.random.normal(second, (hidden, 10)) / np.sqrt(hidden), "b": jnp.zeros(10)},
    }


def network(weights: Any, h: Any, x: Any) -> Any:
    x = x.reshape(x.shape[0], 64) - 0.3  # about the mean of the pixels
    hidden = jnp.tanh(x @ weights["hidden"]["w"] + weights["hidden"]["b"][None])
    return hidden @ weights["head"]["w"] + weights["head"]["b"][None]


# Bounds beside the exact value.


def cases(n: int, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"exact": {"form": "full"}}  # fewer parameters than rows
    for size in sizes:
        found[f"random_{size}"] = {"size": size, "blocks": n // size}
    if len(sizes) > 1:  # not in a smoke run, where compiling is the time
        found |= {form: {"form": form} for form in ("block", "diagonal", "kronecker")}
        found["independent"] = {"outputs": "independent"}
        part = {"size": sizes[-1], "blocks": n // sizes[-1]}
        found["one_output"], found["by_class"] = {**part, "outputs": "one"}, {**part, "by_class": True}
    return found


def bounds(n: int, names: dict[str, dict[str, Any]], seed: int, steps: int) -> Any:
    """`(train, test, kept rows, key) -> found`: at each precision the evidence in nats per example of each kind, with
    the validation loss of training on the kept rows, and the test loss of training on all."""
    losses = {
        name: hg.objectives.evidence(network, likelihood="categorical", precision=jnp.exp, rows=n, **options)
        for name, options in names.items()
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    logs = jnp.log(jnp.asarray(PRECISIONS))
    nll = lambda w, data: optax.softmax_cross_entropy_with_integer_labels(network(w, None, data[0]), data[1])

    def train(log_precision: Any, data: Any, kept: Any) -> Any:
        """The minimum of −log p(y | θ) + ½ δ ‖θ‖² of the rows that are kept."""

        def loss(weights: Any) -> Any:
            squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights))
            return (jnp.sum(kept * nll(weights, data)) + 0.5 * jnp.exp(log_precision) * squares) / jnp.sum(kept)

        def step(carry: Any, _: None) -> Any:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
            return (optax.apply_updates(weights, updates), state), None

        start = new_weights(jax.random.key(seed))
        weights = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0]
        return weights, optax.global_norm(jax.grad(loss)(weights))

    def value(name: str, minima: Any, data: Any, key: Any) -> Any:
        loss, drawn = losses[name].outer_loss, (key,) if {"size", "outputs"} & set(names[name]) else ()
        drawn = () if names[name] == {"outputs": "independent"} else drawn
        return -jax.lax.map(lambda point: loss(*point, data, *drawn), (minima, logs))

    @jax.jit
    def found(data: Any, test: Any, kept: Any, key: Any) -> Any:
        minima, slopes = jax.vmap(lambda log: train(log, data, jnp.ones(n)))(logs)
        parts, _ = jax.vmap(lambda log: train(log, data, kept))(logs)
        held = jax.vmap(lambda w: jnp.sum((1 - kept) * nll(w, data)) / jnp.sum(1 - kept))(parts)
        tests = jax.vmap(lambda w: jnp.mean(nll(w, test)))(minima)
        evidences = {name: value(name, minima, data, key) for name in names}
        return evidences, {"held": held, "test": tests, "slope": slopes}

    return found


def over_subsets(data: Any, seed: int) -> list[float]:
    """The mean over all subsets of 1, 2, … 6 examples of log det(I + K) per example."""
    subsets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size)]
    kept = jnp.asarray([[float(i in s) for i in range(6) for _ in range(10)] for s in subsets], jnp.float32)

    @jax.jit
    def inside(x: Any, weights: Any) -> Any:
        jacobian = jax.jacrev(lambda w: network(w, None, x))(weights)
        rows = jnp.concatenate([leaf.reshape(6, 10, -1) for leaf in jax.tree.leaves(jacobian)], axis=2)
        p = jax.nn.softmax(network(weights, None, x))
        values, vectors = jnp.linalg.eigh(jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :])
        roots = jnp.einsum("nij,nj,nkj->nik", vectors, jnp.sqrt(jnp.maximum(values, 0)), vectors)
        weighted = jnp.einsum("nij,njd->nid", roots, rows).reshape(60, -1)
        kernel = weighted @ weighted.T
        return jax.vmap(lambda m: hg.objectives.log_determinant(kernel * m[:, None] * m[None]))(kept)

    found = np.asarray(inside(data[0][:6], new_weights(jax.random.key(seed))))
    sizes = np.asarray([len(s) for s in subsets])
    return [float(np.mean(found[sizes == size]) / size) for size in range(1, 7)]


def speedups(data: Any, seed: int, repeats: int) -> dict[str, float]:
    """Processor time of a gradient of the exact evidence over that of a bound, medians of turns."""
    weights, times, steps = new_weights(jax.random.key(seed)), {}, {}
    kinds: dict[str, dict[str, Any]] = {"exact": {"form": "full"}, "block": {"size": min(50, len(data[1]) // 2)}}
    kinds |= {} if repeats == 1 else {"output": {"size": 50, "outputs": "one"}}
    for name, options in kinds.items():
        losses = hg.objectives.evidence(
            network, likelihood="categorical", precision=jnp.exp, rows=len(data[1]), **options
        )
        steps[name] = jax.jit(jax.grad(losses.outer_loss, argnums=1))
    for turn, (name, step) in itertools.product(range(repeats + 1), steps.items()):
        drawn = (jax.random.key(turn),) if "size" in kinds[name] else ()
        began = time.process_time()
        jax.block_until_ready(step(weights, jnp.zeros(()), data, *drawn))
        if turn:
            times.setdefault(name, []).append(time.process_time() - began)
    middle = {name: float(np.median(each)) for name, each in times.items()}
    return {name: middle["exact"] / middle[name] for name in kinds if name != "exact"}


# Ranges of augmentation.


def turn_and_move(images: Any, h: Any, key: Any) -> Any:
    """Images `[n, 8, 8]` turned by up to `exp(h["angle"])` degrees and moved by up to `exp(h["shift"])` pixels."""
    turn_key, move_key = jax.random.split(key)
    angle = jnp.exp(h["angle"]) * jnp.pi / 180 * jax.random.uniform(turn_key, (images.shape[0],), minval=-1, maxval=1)
    at = jnp.stack(jnp.meshgrid(jnp.arange(8.0) - 3.5, jnp.arange(8.0) - 3.5, indexing="ij")).reshape(2, 64)

    def turned(image: Any, angle: Any) -> Any:
        c, s = jnp.cos(angle), jnp.sin(angle)
        row, column = c * at[0] - s * at[1] + 3.5, s * at[0] + c * at[1] + 3.5
        across = lambda place: jnp.maximum(1 - jnp.abs(place[:, None] - jnp.arange(8.0)[None]), 0)
        return jnp.einsum("pi,pj,ij->p", across(row), across(column), image).reshape(8, 8)

    return hg.augment.translate(jax.vmap(turned)(images, angle), jnp.exp(h["shift"]), key=move_key)


def options_of(rows: int, **more: Any) -> dict[str, Any]:
    precision = lambda h: {"hidden": jnp.exp(h["hidden"]), "head": jnp.exp(h["head"])}
    shared = {"likelihood": "categorical", "precision": precision, "rows": rows, "samples": DRAWS}
    return {**shared, "augment": turn_and_move, **more}


def turned_digits(seed: int) -> tuple[Any, Any]:
    (x, y), (xt, yt) = digits(seed, (TURNED,), centred=False)
    truth = {"angle": jnp.log(ANGLE), "shift": -jnp.inf}  # not moved
    moved = jax.jit(lambda x, key: turn_and_move(x.reshape(-1, 8, 8), truth, key))
    make = lambda x, y, key: (moved(jnp.asarray(x), key), jnp.asarray(y, jnp.int32))
    first, second = jax.random.split(jax.random.key(seed + 7))
    return make(x, y, first), make(xt, yt, second)


@jax.jit
def scored(weights: Any, h: Any, data: Any) -> tuple[Any, Any]:
    """`(NLL, accuracy)` of outputs averaged over 32 draws, the model that is trained."""
    draws = jax.random.split(jax.random.key(0), 32)
    logits = jnp.mean(jax.lax.map(lambda key: network(weights, None, turn_and_move(data[0], h, key)), draws), axis=0)
    nll = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data[1]))
    return nll, jnp.mean(jnp.argmax(logits, axis=1) == data[1])


def by_evidence(data: Any, start: Any, seed: int, rounds: int) -> Any:
    """One training run: after a burn-in, four steps of the hyperparameters after every twenty of training."""
    problem = hg.Problem(*hg.objectives.evidence(network, **options_of(TURNED, size=100)))
    solver = hg.objectives.interleaved(problem, optax.adam(0.01), burn_in=300, steps=20, hyper_steps=4)
    return hg.tune(
        solver,
        new_weights(jax.random.key(seed)),
        start,
        hg.minibatches(data, BATCH),
        data,
        outer=optax.adam(0.1),
        steps=4 * rounds,
        steps_per_call=4,
        key=jax.random.key(seed),
        progress=False,
    )


def by_validation(data: Any, seed: int, steps: int, ranges: Any) -> tuple[Any, Any, Any]:
    """`(weights, hyperparameters, validation losses)`: ranges chosen on a fifth of the rows, trained again on all."""
    angle, shift = jnp.log(jnp.asarray(ranges)).T
    settings = {
        "hidden": jnp.zeros(len(angle)),
        "head": jnp.full(len(angle), np.log(0.1)),
        "angle": angle,
        "shift": shift,
    }
    held = np.arange(TURNED) % 5 == 0
    part = lambda rows: jax.tree.map(lambda a: a[np.flatnonzero(rows)], data)
    optimizer = optax.adam(0.01)

    def train(rows: Any, h: Any) -> Any:
        n = len(rows[1])
        inner = hg.objectives.evidence(network, **options_of(n)).inner_loss

        def step(carry: Any, key: Any) -> Any:
            (weights, state), (draw, key) = carry, jax.random.split(key)
            index = jax.random.randint(draw, (BATCH,), 0, n)
            batch = rows[0][index], rows[1][index]
            updates, state = optimizer.update(jax.grad(inner)(weights, h, batch, key), state)
            return (optax.apply_updates(weights, updates), state), None

        start = new_weights(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(seed), steps)
        return jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]

    validated = jax.jit(lambda each: jax.lax.map(lambda h: scored(train(part(~held), h), h, part(held))[0], each))
    losses = np.asarray(validated(settings))
    best = jax.tree.map(lambda leaf: leaf[int(np.nanargmin(losses))], settings)
    return jax.jit(train)(data, best), best, losses


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    seed, smoke = options.seed, options.smoke
    n = 20 if smoke else N
    names = cases(n, (10,) if smoke else SIZES)
    evaluated = bounds(n, names, seed, 20 if smoke else 800)
    kept = jnp.asarray(np.arange(n) % 5 != 0, jnp.float32)
    data, test = (tuple(map(jnp.asarray, part)) for part in digits(seed, (n,), centred=False))
    evidences, losses = jax.tree.map(np.asarray, evaluated(data, test, kept, jax.random.key(seed)))
    at = PRECISIONS.index(1.0)
    numbers["evidence"] = {name: float(values[at]) for name, values in evidences.items()}
    numbers["slope"] = float(np.max(losses["slope"]))
    # One output, drawn for a block, is a bound on average alone.
    below = [name for name in names if name not in ("exact", "kronecker", "one_output")]
    numbers["worst_excess"] = max(float(np.max(evidences[name] - evidences["exact"])) for name in below)
    best = {name: int(np.argmax(values)) for name, values in evidences.items()}
    numbers["best"] = {name: PRECISIONS[each] for name, each in best.items()}
    apart = np.asarray([abs(best[name] - best["exact"]) for name in below])
    numbers["same_best"], numbers["near_best"] = float(np.mean(apart == 0)), float(np.mean(apart <= 1))
    chosen = {**best, "validation": int(np.argmin(losses["held"])), "oracle": int(np.argmin(losses["test"]))}
    numbers["best"]["validation"] = PRECISIONS[chosen["validation"]]
    numbers["nll"] = {name: float(losses["test"][each]) for name, each in chosen.items()}
    numbers["nll_gap"] = numbers["nll"]["exact"] - numbers["nll"]["validation"]
    means = over_subsets(data, seed)
    numbers["subsets"], numbers["largest_rise"] = means, float(np.max(np.diff(means)))
    numbers["speedup"] = speedups(data, seed, 1 if smoke else 3)

    start = {"hidden": 0.0, "head": float(np.log(0.1)), "angle": float(np.log(5.0)), "shift": float(np.log(0.2))}
    train, test = turned_digits(seed)
    rounds = 2 if smoke else 12
    result = by_evidence(train, start, seed, rounds)
    paths = jax.tree.map(np.exp, result.history.hparams)
    numbers["angle"], numbers["shift"] = float(paths["angle"][-1]), float(paths["shift"][-1])
    numbers["tuned_nll"], numbers["tuned_accuracy"] = scored(result.params, result.hparams, test)
    steps = 10 if smoke else 300 + 20 * (rounds - 1)
    weights, h, _ = by_validation(train, seed, steps, RANGES)
    numbers["validated_nll"], numbers["validated_accuracy"] = scored(weights, h, test)
    numbers["validated_angle"], numbers["validated_shift"] = float(jnp.exp(h["angle"])), float(jnp.exp(h["shift"]))
    numbers["turned_gap"] = float(numbers["tuned_nll"]) - float(numbers["validated_nll"])
    if not smoke:
        draw(options.out, evidences, paths)


def draw(folder: Path, found: dict[str, np.ndarray], paths: Any) -> None:
    from experiments import _figures as style

    figure = style.figure(12.5, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    shown = {
        "exact": (style.INK, "exact"),
        "random_100": (style.BLUE, "blocks of 100 examples"),
        "random_10": (style.SKY, "of 10"),
        "by_class": (style.GREEN, "of 100, by class"),
        "independent": (style.ORANGE, "each output by itself"),
        "diagonal": (style.PINK, "diagonal"),
    }
    for name, (color, label) in shown.items():
        left.semilogx(PRECISIONS, found[name], "o-", color=color, linewidth=1.8, markersize=4, label=label)
    left.legend(frameon=False, fontsize=9)
    style.titled(left, "Evidence and its lower bounds", xlabel="prior precision", ylabel="nats per example")
    steps = np.arange(len(paths["angle"]))
    right.plot(steps, paths["angle"] / ANGLE, color=style.BLUE, linewidth=2, label="rotation, of the true 30°")
    right.plot(steps, paths["shift"], color=style.ORANGE, linewidth=2, label="translation, in pixels (true: 0)")
    right.axhline(1, color=style.INK, linewidth=1, linestyle=style.DASHED)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    style.titled(right, "Ranges learned from 200 training digits", xlabel="hyperparameter step", ylabel="range")
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Log evidence at precision 1",
            "nats per example",
            {
                "exact": ("evidence.exact", style.INK),
                "blocks of 100": ("evidence.random_100", style.BLUE),
                "blocks of 25": ("evidence.random_25", style.BLUE),
                "blocks of 10": ("evidence.random_10", style.SKY),
                "100, by class": ("evidence.by_class", style.GREEN),
                "each output by itself": ("evidence.independent", style.ORANGE),
                "a block a leaf": ("evidence.block", style.YELLOW),
                "diagonal": ("evidence.diagonal", style.PINK),
                "Kronecker (no bound)": ("evidence.kronecker", style.YELLOW),
            },
        ),
        (
            "At the best precision",
            "test NLL",
            {
                "by the exact evidence": ("nll.exact", style.INK),
                "blocks of 100": ("nll.random_100", style.BLUE),
                "blocks of 25": ("nll.random_25", style.BLUE),
                "diagonal": ("nll.diagonal", style.PINK),
                "by validation": ("nll.validation", style.ORANGE),
                "by the test loss": ("nll.oracle", style.GREEN),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

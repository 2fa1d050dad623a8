"""Which 10, 20 or 50 of 1,000 real images teach the most: a subset chosen by hypergradients of its weights.

    python experiments/teaching_examples/run.py --seed 0 --json

Every image that is not chosen has a weight of zero, and a hypergradient all the same: what a little of it in the
training would do to the loss on all 1,000. One of the chosen leaves, the best of the others enters, their weights
follow their own hypergradients for a few steps, and so on. What a subset is worth shows in a fresh training on
it alone.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import digits  # noqa: E402

SIZES = (10, 20, 50)
POOL, WIDTH, DECAY = 1000, 32, 1e-3
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the fresh trainings; each subset has its best by accuracy on the pool
RIVALS = ("centres", "hardest", "trials", "matching")


class Subset(NamedTuple):
    """Chosen images.

    Attributes:
        rows: of the pool `[k]`.
        weights: of each in the training loss `[k]`, summing to 1.
    """

    rows: np.ndarray
    weights: np.ndarray


def alike(rows: Any) -> Subset:
    return Subset(np.asarray(rows), np.full(len(rows), 1 / len(rows)))


# The model, and a training of it.


def linear() -> Any:
    return {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def perceptron(key: Any) -> Any:
    first, second = jax.random.split(key)
    hidden = {"w1": jax.random.normal(first, (64, WIDTH)) / 4, "b1": jnp.zeros(WIDTH)}
    return hidden | {"w": jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5, "b": jnp.zeros(10)}


def logits(params: Any, x: Any) -> Any:
    if "w1" in params:
        x = jnp.tanh(x @ params["w1"] + params["b1"][None])
    return x @ params["w"] + params["b"][None]


def losses(params: Any, x: Any, y: Any) -> Any:
    """Cross entropy of each image `[n]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def penalty(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) / 2


def fit(params: Any, x: Any, y: Any, weights: Any, decay: Any, steps: int, rate: float = 0.05) -> Any:
    optimizer = optax.adam(rate)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        slope = jax.grad(lambda p: jnp.sum(weights * losses(p, x, y)) + decay * penalty(p))(params)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]


@partial(jax.jit, static_argnames="steps")
def taught(params: Any, rows: Any, weights: Any, pool: Any, test: Any, *, steps: int) -> Any:
    """Test accuracy `[subsets]` of fresh trainings from `params`, at the decay with the best accuracy on the pool."""

    def one(rows: Any, weights: Any, decay: Any) -> Any:
        end = fit(params, pool[0][rows], pool[1][rows], weights, decay, steps)
        right = [jnp.mean(jnp.argmax(logits(end, x), 1) == y) for x, y in (pool, test)]
        return right[0], right[1]

    by_decay = jax.vmap(one, (None, None, 0))
    on_pool, on_test = jax.vmap(by_decay, (0, 0, None))(rows, weights, jnp.asarray(DECAYS))
    return jnp.take_along_axis(on_test, jnp.argmax(on_pool, 1)[:, None], 1)[:, 0]


# Choosing, by hypergradients.


class Chooser(NamedTuple):
    """Weights of chosen images that follow their hypergradients.

    Attributes:
        begin: `log weights [50] -> carry`.
        step: `(carry, rows [50], present [50]) -> (carry, gains [1000], loss on the pool, status)`. The weights of
            those present sum to 1; a gain is what weight for that image would do to the loss, chosen or not.
    """

    begin: Any
    step: Any


def chooser(pool: Any) -> Chooser:
    """The hypergradient of the weight of image i, which need not be in the training, is `−∇L · H⁻¹ ∇ℓᵢ`. A term `t · w`
    of the training loss has at t = 0 the hypergradient `−H⁻¹ ∇L`, from which those of all 1,000 follow in one product:
    the training itself runs on the chosen ones alone.
    """

    def training(params: Any, h: Any, batch: Any) -> Any:
        x, y, present = batch
        weights = jax.nn.softmax(jnp.where(present, h["log"], -jnp.inf))
        tilt = sum(map(jnp.vdot, jax.tree.leaves(h["tilt"]), jax.tree.leaves(params)))
        return jnp.sum(weights * losses(params, x, y)) + DECAY * penalty(params) + tilt

    problem = hg.Problem(training, lambda params, h, batch: jnp.mean(losses(params, *batch)))
    solver = hg.implicit(problem, inner=hg.inner.lbfgs(), linear=hg.linear.cg())
    optimizer = optax.adam(0.1)

    def begin(log: Any) -> Any:
        h = {"log": log, "tilt": linear()}
        return h, solver.init(linear(), h), optimizer.init(log)

    @jax.jit
    def step(carry: Any, rows: Any, present: Any) -> Any:
        h, state, memory = carry
        out, state = solver.hypergrad(state, h, (pool[0][rows], pool[1][rows], present), pool)
        updates, memory = optimizer.update(out.grad["log"], memory)
        gains = jax.jvp(lambda p: losses(p, *pool), (state.params,), (out.grad["tilt"],))[1]
        return ({**h, "log": h["log"] + updates}, state, memory), gains, out.value, out.info.status

    return Chooser(begin, step)


def padded(rows: Any) -> np.ndarray:
    return np.concatenate([rows, np.zeros(SIZES[-1] - len(rows), int)])


def weighted(carry: Any, rows: np.ndarray, size: int) -> Subset:
    weights = np.exp(np.asarray(carry[0]["log"], float)[:size])
    return Subset(rows[:size].copy(), weights / weights.sum())


def weigh(chooser: Chooser, rows: Any, steps: int) -> Subset:
    """Weights for given images."""
    carry, slots = chooser.begin(jnp.zeros(SIZES[-1])), padded(rows)
    for _ in range(steps):
        carry, *_ = chooser.step(carry, slots, np.arange(SIZES[-1]) < len(rows))
    return weighted(carry, slots, len(rows))


def exchanged(chooser: Chooser, rows: Any, tries: int, polish: int, seed: int, chance: bool) -> tuple[Subset, Any]:
    """`(images and weights, statuses of all hypergradients)`: one image leaves, another enters, the weights follow for
    six steps, and the exchange stands if the loss on the pool fell.

    Args:
        chooser: from `chooser`.
        rows: to begin with.
        tries: exchanges tried; each takes seven hypergradients, and six by chance.
        polish: steps of the weights before the exchanges, and after them.
        seed: of what leaves, and of what enters.
        chance: whether any image may enter, or one of the three with the best hypergradients alone.
    """
    rng, size, statuses = np.random.default_rng(seed), len(rows), []
    slots, rows = np.arange(SIZES[-1]), padded(rows)

    def follow(carry: Any, rows: np.ndarray, steps: int) -> tuple[Any, float]:
        value = np.inf
        for _ in range(steps):
            carry, _, value, status = chooser.step(carry, rows, slots < size)
            statuses.append(status)
        return carry, float(value)

    carry, best = follow(chooser.begin(jnp.zeros(SIZES[-1])), rows, polish)
    for _ in progress(range(tries), "exchanges"):
        out, tried = rng.integers(size), rows.copy()
        if chance:
            tried[out] = rng.choice(np.setdiff1d(np.arange(POOL), rows[:size]))
        else:
            _, gains, _, status = chooser.step(carry, rows, (slots < size) & (slots != out))
            statuses.append(status)
            gains = np.asarray(gains).copy()
            gains[rows[:size]] = np.inf  # chosen before, or leaving
            tried[out] = np.argsort(gains)[rng.integers(3)]
        log = carry[0]["log"]
        begun = chooser.begin(log.at[out].set(jnp.mean(log[:size])))
        after, value = follow((begun[0], carry[1], begun[2]), tried, 6)
        if value < best:
            carry, rows, best = after, tried, value
    carry, _ = follow(carry, rows, polish)
    return weighted(carry, rows, size), statuses


def forward(chooser: Chooser, pool: Any, sizes: tuple[int, ...], joining: int, polish: int) -> dict[int, Subset]:
    """One image after the other, the one with the best hypergradient; none leaves again."""
    first = jax.grad(lambda params: jnp.mean(losses(params, *pool)))(linear())
    gains = -jax.jvp(lambda params: losses(params, *pool), (linear(),), (first,))[1]  # H is DECAY times the identity
    rows, carry, found = np.zeros(SIZES[-1], int), chooser.begin(jnp.zeros(SIZES[-1])), {}
    for size in range(1, sizes[-1] + 1):
        gains = np.asarray(gains).copy()
        gains[rows[: size - 1]] = np.inf
        rows[size - 1] = np.argmin(gains)
        h, state, memory = carry
        log = h["log"].at[size - 1].set(jnp.mean(h["log"][: max(size - 1, 1)]))
        carry = {**h, "log": log}, state, memory
        for _ in range(polish if size in sizes else joining):
            carry, gains, *_ = chooser.step(carry, rows, np.arange(SIZES[-1]) < size)
        if size in sizes:
            found[size] = weighted(carry, rows, size)
    return found


# Choosing, otherwise.


def centres(pool: Any, size: int, seed: int) -> np.ndarray:
    """The images closest to the centres of k-means within each class; with one a class, the medoids."""
    from sklearn.cluster import KMeans

    x, y = map(np.asarray, pool)
    rows = []
    for label in range(10):
        members = np.flatnonzero(y == label)
        middle = KMeans(size // 10, n_init=10, random_state=seed).fit(x[members]).cluster_centers_
        apart = ((x[members][:, None] - middle[None]) ** 2).sum(-1)
        for column in apart.T:
            pick = next(i for i in np.argsort(column) if members[i] not in rows)
            rows.append(int(members[pick]))
    return np.asarray(rows)


def hardest(pool: Any, sizes: tuple[int, ...], steps: int) -> dict[int, Subset]:
    """One after the other, the image with the highest loss after a training on those chosen before."""
    refit = jax.jit(
        lambda params, rows, weights: fit(params, pool[0][rows], pool[1][rows], weights, DECAY, steps=steps)
    )
    rows, params = np.zeros(SIZES[-1], int), linear()
    rows[0] = centres(pool, 10, 0)[0]
    for size in range(1, sizes[-1]):
        params = refit(params, rows, jnp.where(jnp.arange(SIZES[-1]) < size, 1 / size, 0.0))
        loss = np.asarray(losses(params, *pool)).copy()
        loss[rows[:size]] = -np.inf
        rows[size] = np.argmax(loss)
    return {size: alike(rows[:size]) for size in sizes}


def trials(pool: Any, sizes: tuple[int, ...], candidates: int, steps: int, seed: int) -> dict[int, Subset]:
    """One after the other, of some random images the one that a training with it says is best for the pool."""

    @jax.jit
    def attempt(params: Any, rows: Any, weights: Any) -> Any:
        end = fit(params, pool[0][rows], pool[1][rows], weights, DECAY, steps=steps)
        return jnp.mean(losses(end, *pool)), end

    attempts = jax.jit(jax.vmap(attempt, (None, 0, None)))
    rng = np.random.default_rng(seed)
    rows, params = np.zeros(SIZES[-1], int), linear()
    for size in range(sizes[-1]):
        others = np.setdiff1d(np.arange(POOL), rows[:size])
        tried = np.tile(rows, (candidates, 1))
        tried[:, size] = rng.choice(others, candidates, replace=False)
        value, ends = attempts(params, tried, jnp.where(jnp.arange(SIZES[-1]) <= size, 1 / (size + 1), 0.0))
        best = int(jnp.nanargmin(value))
        rows, params = tried[best], jax.tree.map(lambda leaf, at=best: leaf[at], ends)
    return {size: alike(rows[:size]) for size in sizes}


def matching(pool: Any, sizes: tuple[int, ...], steps: int) -> dict[int, Subset]:
    """Images and weights whose gradients add up to that of the pool, at five points of a training on all of it:
    orthogonal matching pursuit with weights of at least zero.
    """
    from scipy.optimize import nnls

    stops = [linear()]
    for _ in range(4):
        stops.append(jax.jit(lambda p: fit(p, *pool, 1 / POOL, 0.01, steps=steps))(stops[-1]))

    def gradients(params: Any) -> Any:
        one = lambda x, y: jax.grad(lambda p: losses(p, x[None], y[None])[0])(params)
        leaves = jax.tree.leaves(jax.vmap(one)(*pool))
        return jnp.concatenate([leaf.reshape(POOL, -1) for leaf in leaves], 1)

    features = np.concatenate([np.asarray(jax.jit(gradients)(p), float) for p in stops], 1)
    target, rows, found = features.mean(0), [], {}
    weights = np.zeros(0)
    for size in range(1, sizes[-1] + 1):
        scores = features @ (target - weights @ features[rows])
        scores[rows] = -np.inf
        rows.append(int(np.argmax(scores)))
        weights = nnls(features[rows].T, target)[0]
        if size in sizes:
            found[size] = Subset(np.asarray(rows), weights / weights.sum())
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    smoke = options.smoke
    sizes = SIZES[:1] if smoke else SIZES
    draws, steps = (2, 20) if smoke else (20, 400)
    pool, test = jax.tree.map(jnp.asarray, digits(options.seed, (POOL,)))
    steps_of_weights = chooser(pool)
    tries, polish = (1, 2) if smoke else (150, 30)
    middle = {size: centres(pool, size, options.seed) for size in sizes}
    found: dict[str, dict[int, Subset]] = {"chosen": {}, "by_chance": {}}
    statuses: list[Any] = []
    for size in sizes:
        args = (steps_of_weights, middle[size])
        found["chosen"][size], seen = exchanged(*args, tries, polish, options.seed, chance=False)
        found["by_chance"][size], _ = exchanged(*args, tries * 7 // 6, polish, options.seed, chance=True)
        statuses += seen
    numbers["hypergradients"] = len(statuses)
    numbers["unusable"] = sum(not hg.Status(int(status)).usable for status in statuses)
    found |= {
        "chosen_alike": {size: alike(subset.rows) for size, subset in found["chosen"].items()},
        "forward": forward(steps_of_weights, pool, sizes, 1 if smoke else 5, 2 * polish),
        "centres_weighed": {size: weigh(steps_of_weights, middle[size], 2 * polish) for size in sizes},
        "centres": {size: alike(middle[size]) for size in sizes},
        "hardest": hardest(pool, sizes, 20 if smoke else 100),
        "trials": trials(pool, sizes, 2 if smoke else 20, 10 if smoke else 100, options.seed),
        "matching": matching(pool, sizes, 20),
    }
    rng = np.random.default_rng(options.seed)
    by_class = [np.flatnonzero(np.asarray(pool[1]) == label) for label in range(10)]
    net = perceptron(jax.random.key(options.seed))
    for size in sizes:
        arms = {name: subsets[size] for name, subsets in found.items()}
        for i in range(draws):
            members = [rng.choice(rows, size // 10, replace=False) for rows in by_class]
            arms[f"random_{i}"] = alike(np.concatenate(members))
        rows = jnp.asarray(np.stack([subset.rows for subset in arms.values()]))
        weights = jnp.asarray(np.stack([subset.weights for subset in arms.values()]), jnp.float32)
        right = np.asarray(taught(linear(), rows, weights, pool, test, steps=steps))
        scores = dict(zip(arms, right, strict=True))
        part: dict[str, Any] = {name: scores[name] for name in found}
        part["random"] = np.mean(right[len(found) :])
        part["random_spread"] = np.std(right[len(found) :], ddof=1)
        part["lead"] = part["chosen"] - max(part[name] for name in RIVALS)
        part["over_chance"] = part["chosen"] - part["by_chance"]
        part["over_random"] = part["chosen"] - part["random"]
        few = slice(0, len(found) + 2)  # and two of the random draws
        nets = np.asarray(taught(net, rows[few], weights[few], pool, test, steps=steps))
        part["perceptron"] = dict(zip(found, nets, strict=False)) | {"random": np.mean(nets[len(found) :])}
        part["perceptron"]["lead"] = nets[0] - max(part["perceptron"][name] for name in RIVALS)
        part["classes"] = len(set(np.asarray(pool[1])[found["chosen"][size].rows].tolist()))
        numbers[f"images_{size}"] = part
    everything = jnp.arange(POOL)[None], jnp.full((1, POOL), 1 / POOL)
    numbers["all"] = taught(linear(), *everything, pool, test, steps=steps)[0]
    if not smoke:
        raw = np.asarray(pool[0])  # centred: the mean of the pool has been subtracted from each pixel
        raw = raw - raw.min(0)  # at least 0 again, as before
        draw(options.out, numbers, {name: (raw[s[10].rows], s[10].weights) for name, s in found.items()})


NAMES = {
    "chosen": "exchanged by hypergradients",
    "chosen_alike": "the same, weighted alike",
    "by_chance": "exchanged by chance",
    "forward": "added by hypergradients",
    "centres_weighed": "k-means centres, weighted",
    "centres": "k-means centres",
    "matching": "gradient matching",
    "trials": "greedy by trials",
    "random": "random",
    "hardest": "hardest first",
}


ROWS = {
    "chosen": "ten exchanged by hypergradients, and their weights",
    "centres": "ten k-means centres: the most typical of each class",
    "matching": "ten by gradient matching, and their weights",
    "hardest": "ten hardest, one after the other",
}


def draw(folder: Path, numbers: dict[str, Any], images: dict[str, Any]) -> None:
    from experiments import _figures as style

    canvas = style.figure(12.5, 4.6)
    left, right = canvas.subfigures(1, 2, width_ratios=(1.3, 1))
    for row, name in zip(left.subplots(len(ROWS), 10), ROWS, strict=True):
        for axes, pixels, weight in zip(row, *images[name], strict=True):
            style.image(axes, pixels.reshape(8, 8))
            if name in ("chosen", "matching"):
                axes.set_xlabel(f"{weight:.2f}", fontsize=7, labelpad=1)
        title = row[0].text(0, 1.1, ROWS[name], transform=row[0].transAxes, fontsize=10, color=style.INK)
        title.set_in_layout(False)  # it is wider than one picture
    axes = right.subplots()
    named = style.BLUE, style.SKY, style.BLUE, style.PINK, style.GREEN
    colors = *named, style.GREEN, style.PINK, style.YELLOW, style.INK, style.ORANGE
    for (name, label), color in zip(NAMES.items(), colors, strict=True):
        values = [float(numbers[f"images_{size}"][name]) for size in SIZES]
        dash = style.DASHED if name in ("by_chance", "centres_weighed", "forward") else "-"
        axes.plot(SIZES, values, "o", linestyle=dash, color=color, linewidth=1.8, markersize=4, label=label)
    axes.axhline(float(numbers["all"]), color=style.INK, linewidth=0.8, linestyle=style.DASHED)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, map(str, SIZES))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    style.titled(axes, "A fresh training on them alone (dashed: all 1,000)", xlabel="images", ylabel="test accuracy")
    style.save(canvas, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "10 images",
            "test accuracy",
            {
                "exchanged by hypergradients": ("images_10.chosen", style.BLUE),
                "… weighted alike": ("images_10.chosen_alike", style.BLUE),
                "exchanged by chance": ("images_10.by_chance", style.SKY),
                "added by hypergradients": ("images_10.forward", style.SKY),
                "k-means centres": ("images_10.centres", style.GREEN),
                "… weighted": ("images_10.centres_weighed", style.GREEN),
                "gradient matching": ("images_10.matching", style.PINK),
                "greedy by trials": ("images_10.trials", style.YELLOW),
                "hardest first": ("images_10.hardest", style.INK),
                "random": ("images_10.random", style.ORANGE),
            },
        ),
        (
            "20 images",
            "test accuracy",
            {
                "exchanged by hypergradients": ("images_20.chosen", style.BLUE),
                "… weighted alike": ("images_20.chosen_alike", style.BLUE),
                "exchanged by chance": ("images_20.by_chance", style.SKY),
                "added by hypergradients": ("images_20.forward", style.SKY),
                "k-means centres": ("images_20.centres", style.GREEN),
                "… weighted": ("images_20.centres_weighed", style.GREEN),
                "gradient matching": ("images_20.matching", style.PINK),
                "greedy by trials": ("images_20.trials", style.YELLOW),
                "hardest first": ("images_20.hardest", style.INK),
                "random": ("images_20.random", style.ORANGE),
            },
        ),
        (
            "50 images",
            "test accuracy",
            {
                "exchanged by hypergradients": ("images_50.chosen", style.BLUE),
                "… weighted alike": ("images_50.chosen_alike", style.BLUE),
                "exchanged by chance": ("images_50.by_chance", style.SKY),
                "added by hypergradients": ("images_50.forward", style.SKY),
                "k-means centres": ("images_50.centres", style.GREEN),
                "… weighted": ("images_50.centres_weighed", style.GREEN),
                "gradient matching": ("images_50.matching", style.PINK),
                "greedy by trials": ("images_50.trials", style.YELLOW),
                "hardest first": ("images_50.hardest", style.INK),
                "random": ("images_50.random", style.ORANGE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

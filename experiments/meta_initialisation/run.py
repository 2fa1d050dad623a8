"""Where should learning start? Initialisations and features for few-shot tasks, by hypergradients through adaptation.

    python experiments/meta_initialisation/run.py --seed 0 --json
    python experiments/meta_initialisation/run.py --seed 1 --json --omniglot omniglot/images_background

A batch of episodes is one bilevel problem. Its parameters are one small network for each episode, trained on the few
support images; its hyperparameters are what the episodes share: the starting point (MAML, iMAML) or the features
(hyper-representation); its outer loss is that of the query images. Tested on episodes of classes never seen.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment, progress
from experiments._figures import BLUE, DASHED, GREEN, INK, ORANGE, PINK, SKY, figure, save, titled
from experiments.meta_initialisation import omniglot
from experiments.meta_initialisation.episodes import MOST, QUERIES, ROOM, WAYS, Classes, Episodes, digits, draw, streams

SHOTS = {"one": 1, "five": 5}
TASKS = (1, 5) * 4  # support images a class in each episode of a batch
HIDDEN = (64, 64)
ADAPTATION = 5  # steps that are unrolled
PULL, SOLVER_RATE, SOLVER_STEPS = 0.1, 0.15, 16  # iMAML: strength of the pull to the start; gradient descent
DECAY = 0.01  # of the head whose optimum is differentiated
BATCH, PRETRAINING_DECAY = 256, 0.01  # plain transfer
META_STEPS, PRETRAINING = 600, 6000  # batches of episodes, and of images for plain transfer
LONGEST = 50  # steps of the longest adaptation that is tested

Net = dict[str, Any]


def network(key: Any, pixels: int, outputs: int, hidden: Sequence[int] = HIDDEN) -> Net:
    def layer(key: Any, fan_in: int, fan_out: int) -> Net:
        return {"w": jax.random.normal(key, (fan_in, fan_out)) / np.sqrt(fan_in), "b": jnp.zeros(fan_out)}

    sizes = (pixels, *hidden)
    *keys, last = jax.random.split(key, len(sizes))
    encoder = [layer(k, *pair) for k, pair in zip(keys, itertools.pairwise(sizes), strict=True)]
    return {"encoder": encoder, "head": layer(last, sizes[-1], outputs)}


def encode(encoder: list[Net], x: Any) -> Any:
    for layer in encoder:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x


def logits(net: Net, x: Any) -> Any:
    return encode(net["encoder"], x) @ net["head"]["w"] + net["head"]["b"][None]


def cross_entropy(outputs: Any, labels: Any) -> Any:
    """The mean over the images, which are the last axis of the labels."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels), -1)


def meta_problem(build: Callable[[Net, Net], Net], pull: float = 0.0) -> hg.Problem:
    """All episodes of a batch at once.

    Args:
        build: the network of an episode, from its own parameters and what all episodes share.
        pull: strength of a quadratic penalty on the distance between an episode's network and the shared one, or zero
            where nothing of the kind is shared.
    """
    each = jax.vmap(build, (0, None))
    outputs = lambda own, shared, batch: jax.vmap(logits)(each(own, shared), batch[0])

    def inner_loss(out: Any, own: Net, shared: Net, batch: Any) -> Any:
        """A sum, so that each episode follows its own gradient."""
        away = own if "start" not in shared else jax.tree.map(jnp.subtract, each(own, shared), shared["start"])
        penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(away))
        return jnp.sum(cross_entropy(out, batch[1])) + 0.5 * pull * penalty

    return hg.Problem(
        hg.compose(outputs, inner_loss),
        lambda own, shared, batch: jnp.mean(cross_entropy(outputs(own, shared, batch), batch[1])),
    )


def moved(offset: Net, shared: Net) -> Net:
    return jax.tree.map(jnp.add, shared["start"], offset)


def anchored(offset: Net, shared: Net) -> Net:
    """The same network, in coordinates that stay where they are while the start moves.

    The optimum near the start is the same, but now the start acts through the pull alone: what the adjoint system
    leaves unsolved after a few steps is missing from the hypergradient, where with `moved` it would be all there.
    """
    return jax.tree.map(lambda p, offset: jax.lax.stop_gradient(p) + offset, shared["start"], offset)


def headed(head: Net, shared: Net) -> Net:
    return {"encoder": shared["encoder"], "head": head}


def descent(shared: Net) -> optax.GradientTransformation:
    """Gradient descent with the learned rates, one of the encoder and one of the head."""
    return optax.partition({k: optax.sgd(r) for k, r in shared["rate"].items()}, {k: k for k in shared["rate"]})


class Arm(NamedTuple):
    """What is meta-trained: a method, where every episode's own parameters begin, and what is shared."""

    solver: hg.Solver
    own: Net
    shared: Net
    outer_rate: float = 3e-3


def arms(start: Net) -> dict[str, Arm]:
    """Every method, from one network."""
    zeros = jax.tree.map(lambda p: jnp.zeros((len(TASKS), *p.shape)), start)
    rate = {"encoder": jnp.float32(0.3), "head": jnp.float32(0.3)}
    both, head = {"start": start, "rate": rate}, {"encoder": start["encoder"]}
    whole = hg.inner.gradient(descent, steps=ADAPTATION)
    last = hg.inner.gradient(lambda shared: optax.sgd(shared["rate"]), steps=ADAPTATION)
    pulled = hg.inner.gradient(optax.sgd(SOLVER_RATE), steps=SOLVER_STEPS)
    cold: Any = {"warm_start": False}  # the next batch is of other episodes
    return {
        "maml.unrolled": Arm(hg.unrolled(meta_problem(moved), inner=whole), zeros, both, 1e-2),
        "maml.truncated": Arm(hg.unrolled(meta_problem(moved), inner=whole, truncate=1), zeros, both, 1e-2),
        "imaml": Arm(
            hg.implicit(
                meta_problem(anchored, PULL),
                inner=pulled,
                linear=hg.linear.cg(max_steps=5),
                curvature="gauss_newton",  # short of an optimum the Hessian is indefinite
                **cold,
            ),
            zeros,
            {"start": start},
            5e-3,
        ),
        "hyper_representation.unrolled": Arm(
            hg.unrolled(meta_problem(headed), inner=last), zeros["head"], head | {"rate": rate["head"]}
        ),
        "hyper_representation.implicit": Arm(
            hg.implicit(meta_problem(headed, DECAY), linear=hg.linear.cg(max_steps=20), **cold), zeros["head"], head
        ),
    }


class Recipe(NamedTuple):
    """How a network adapts: gradient descent with momentum, a rate each of encoder and head, a pull of each to where
    it began."""

    start: Net
    encoder: Any = 0.0
    head: Any = 0.0
    momentum: Any = 0.0
    pull: Any = 0.0
    steps: int = LONGEST


@jax.jit
def course(recipe: Recipe, episodes: Episodes) -> Any:
    """Accuracy on the queries before and after each step on the support images, [episodes, LONGEST + 1]."""

    def loss(net: Net, x: Any, y: Any) -> Any:
        away = jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), net, recipe.start)
        return cross_entropy(logits(net, x), y) + 0.5 * recipe.pull * sum(jax.tree.leaves(away))

    def one(support: Any, query: Any) -> Any:
        def step(carry: tuple[Net, Net], _: None) -> Any:
            net, speed = carry
            speed = jax.tree.map(lambda v, g: recipe.momentum * v + g, speed, jax.grad(loss)(net, *support))
            rates = {"encoder": recipe.encoder, "head": recipe.head}
            after = {k: jax.tree.map(lambda p, v, k=k: p - rates[k] * v, net[k], speed[k]) for k in net}
            return (after, speed), correct(net)

        correct = lambda net: jnp.mean(jnp.argmax(logits(net, query[0]), 1) == query[1])
        still = jax.tree.map(jnp.zeros_like, recipe.start)
        (net, _), found = jax.lax.scan(step, (recipe.start, still), None, length=LONGEST)
        return jnp.append(found, correct(net))

    return jax.vmap(one)(episodes.support, episodes.query)


def nearest(episodes: Episodes, features: Callable[[Any], Any], *, means: bool = False) -> np.ndarray:
    """Accuracy by the nearest support image, or the nearest mean of a class, [episodes]."""
    (x, y), (seen, asked) = episodes.support, episodes.query
    known = np.asarray(features(x))
    if means:  # the rows of a class lie together
        known, y = known.reshape(len(x), WAYS, MOST, -1).mean(2), y[:, ::MOST]
    away = np.sum((np.asarray(features(seen))[:, :, None] - known[:, None]) ** 2, -1)
    return np.mean(np.take_along_axis(y, away.argmin(2), 1) == asked, 1)


@functools.partial(jax.jit, static_argnames="steps")
def pretrain(net: Net, x: Any, y: Any, key: Any, *, steps: int) -> Net:
    """Plain classification of all classes of meta-training at once."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=PRETRAINING_DECAY)

    def step(carry: Any, key: Any) -> Any:
        net, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        slope = jax.grad(lambda net: cross_entropy(logits(net, x[rows]), y[rows]))(net)
        updates, state = optimizer.update(slope, state, net)
        return (optax.apply_updates(net, updates), state), None

    return jax.lax.scan(step, (net, optimizer.init(net)), jax.random.split(key, steps))[0][0]


def rivals(start: Net, train: Classes, key: Any, *, steps: int) -> tuple[dict[str, Recipe], dict[str, Any]]:
    """Recipes of what needs no hypergradient, and the features whose nearest neighbours and class means are tried."""
    y = np.repeat(np.arange(len(train), dtype=np.int32), [len(images) for images in train])
    sizes = [layer["b"].size for layer in start["encoder"]]
    net = network(key, train[0].shape[1], len(train), sizes)
    encoder = pretrain(net, np.concatenate(train), y, key, steps=steps)["encoder"]
    begun = {"encoder": encoder, "head": jax.tree.map(jnp.zeros_like, start["head"])}
    recipes = {
        "scratch": Recipe(start, encoder=0.5, head=0.5),
        "transfer.frozen": Recipe(begun, head=0.5),
        "transfer.whole": Recipe(begun, encoder=0.2, head=0.5),
    }
    return recipes, {"pixels": lambda x: x, "transfer": functools.partial(encode, encoder)}


def learned(name: str, shared: Net, start: Net) -> Recipe:
    """How an unseen episode adapts with what meta-training found: as in meta-training."""
    if name == "imaml":
        return Recipe(shared["start"], SOLVER_RATE, SOLVER_RATE, pull=PULL, steps=SOLVER_STEPS)
    if "start" in shared:
        return Recipe(shared["start"], **shared["rate"], steps=ADAPTATION)
    begun = {"encoder": shared["encoder"], "head": jax.tree.map(jnp.zeros_like, start["head"])}
    if "rate" in shared:
        return Recipe(begun, head=shared["rate"], steps=ADAPTATION)
    return Recipe(begun, head=0.1, momentum=0.9, pull=DECAY)  # to the optimum, as good as


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    steps, pretraining, tested = (20, 20, 20) if options.smoke else (META_STEPS, PRETRAINING, 200)
    if options.keep and (options.omniglot or options.room != ROOM):
        raise SystemExit(f"--keep: results.json is of digits with --room {ROOM}; leave it out.")
    if options.omniglot:
        train, test = omniglot.load(options.omniglot, options.seed, WAYS, MOST + QUERIES)
    else:
        train, test = digits(options.seed, options.room)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    hidden = HIDDEN[:1] if options.smoke else HIDDEN  # compiling is what costs
    start = network(keys[0], train[0].shape[1], WAYS, hidden)
    rng = np.random.default_rng(options.seed + 1_000_000)
    episodes = {name: draw(rng, test, (shots,) * tested) for name, shots in SHOTS.items()}

    courses: dict[str, dict[str, np.ndarray]] = {}  # accuracy before and after each step

    def note(name: str, found: dict[str, np.ndarray]) -> None:
        numbers[name] = {shots: accuracies.mean() for shots, accuracies in found.items()}
        errors.extend(accuracies.std() / np.sqrt(tested) for accuracies in found.values())

    def adapted(name: str, recipe: Recipe) -> None:
        found = {shots: np.asarray(course(jax.tree.map(jnp.float32, recipe), e)) for shots, e in episodes.items()}
        courses[name] = {shots: accuracies.mean(0) for shots, accuracies in found.items()}
        note(name, {shots: accuracies[:, recipe.steps] for shots, accuracies in found.items()})

    errors: list[Any] = []
    recipes, features = rivals(start, train, keys[1], steps=pretraining)
    for name, recipe in recipes.items():
        adapted(name, recipe)
    note("neighbour", {shots: nearest(e, features["pixels"]) for shots, e in episodes.items()})
    note("transfer.means", {shots: nearest(e, features["transfer"], means=True) for shots, e in episodes.items()})

    methods = arms(start)
    if options.smoke:
        methods = {"hyper_representation.unrolled": methods["hyper_representation.unrolled"]}
    else:
        methods["maml.again"] = arms(network(keys[2], train[0].shape[1], WAYS))["maml.unrolled"]
    for name, arm in progress(methods.items(), "methods"):
        result = hg.tune(
            arm.solver,
            arm.own,
            arm.shared,
            *streams(options.seed, train, TASKS),
            outer=optax.adam(optax.cosine_decay_schedule(arm.outer_rate, steps)),
            steps=steps,
            domain={k: hg.domains.log() if k == "rate" else None for k in arm.shared},
        )
        adapted(name, learned(name, result.hparams, start))
        numbers[name]["skipped"] = int(np.sum(~result.history.usable))
        numbers[name] |= {"rate": result.hparams["rate"]} if "rate" in result.hparams else {}
    numbers["error"] = max(errors)
    if options.smoke:
        return
    transfer = {s: max(numbers[f"transfer.{how}"][s] for how in ("frozen", "whole", "means")) for s in SHOTS}
    gain = lambda name, rival: {s: numbers[name][s] - rival[s] for s in SHOTS}
    numbers["gain_over_scratch"] = gain("maml.unrolled", numbers["scratch"])
    numbers["gain_over_transfer"] = gain("maml.unrolled", transfer)
    numbers["features_over_transfer"] = gain("hyper_representation.implicit", transfer)
    usual = not options.omniglot and options.room == ROOM
    save(picture(numbers, courses), options.out, "course.png" if usual else "other.png")


def picture(numbers: dict[str, Any], courses: dict[str, dict[str, np.ndarray]]) -> Any:
    canvas = figure(12.5, 5.4)
    left, right = canvas.subplots(1, 2, width_ratios=(1.1, 1))
    rows = {
        "nearest image": "neighbour",
        "from scratch": "scratch",
        "transfer, whole network": "transfer.whole",
        "transfer, new head": "transfer.frozen",
        "transfer, class means": "transfer.means",
        "iMAML": "imaml",
        "MAML, truncated": "maml.truncated",
        "MAML, unrolled": "maml.unrolled",
        "features, unrolled": "hyper_representation.unrolled",
        "features, implicit": "hyper_representation.implicit",
    }
    places = np.arange(len(rows))
    for shots, shift, color in (("one", -0.2, SKY), ("five", 0.2, BLUE)):
        values = [numbers[name][shots] for name in rows.values()]
        drawn = left.barh(
            places + shift,
            values,
            height=0.38,
            color=color,
            label=f"{SHOTS[shots]} a class",
        )
        left.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8.5)
    left.set_yticks(places, list(rows))
    left.invert_yaxis()
    title = f"Unseen classes, {WAYS} an episode"
    titled(left, title, xlabel="accuracy after adaptation", xlim=(1 / WAYS, 1.02 * max(values) + 0.06))
    left.legend(frameon=False, fontsize=9, loc="upper right")
    lines = {
        "features, implicit": ("hyper_representation.implicit", GREEN),
        "MAML, unrolled": ("maml.unrolled", BLUE),
        "transfer, whole network": ("transfer.whole", ORANGE),
        "iMAML": ("imaml", PINK),
        "from scratch": ("scratch", INK),
    }
    for text, (name, color) in lines.items():
        right.plot(courses[name]["five"][:51], color=color, label=text)
    right.axvline(ADAPTATION, color="#999999", linewidth=1, linestyle=DASHED)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    titled(right, "Five images a class", xlabel=f"steps of adaptation (dashed: {ADAPTATION})", ylabel="accuracy")
    return canvas


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--room",
        type=int,
        choices=range(9),
        default=ROOM,
        metavar="N",
        help=f"pixels by which a digit may be out of place, 0 to 8 (default: {ROOM}, and no other with --keep)",
    )
    parser.add_argument(
        "--omniglot",
        type=omniglot.folder,
        metavar="FOLDER",
        help="images_background of Omniglot in place of digits (alphabet/character/drawing.png); not with --keep",
    )


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "One image a class",
            "accuracy on unseen classes",
            {
                "from scratch": ("scratch.one", style.INK),
                "nearest image, pixels": ("neighbour.one", style.INK),
                "transfer, new head": ("transfer.frozen.one", style.ORANGE),
                "transfer, whole network": ("transfer.whole.one", style.ORANGE),
                "transfer, class means": ("transfer.means.one", style.ORANGE),
                "MAML, unrolled": ("maml.unrolled.one", style.BLUE),
                "MAML, truncated": ("maml.truncated.one", style.SKY),
                "iMAML": ("imaml.one", style.SKY),
                "features, unrolled": ("hyper_representation.unrolled.one", style.GREEN),
                "features, implicit": ("hyper_representation.implicit.one", style.GREEN),
            },
        ),
        (
            "Five images a class",
            "accuracy on unseen classes",
            {
                "from scratch": ("scratch.five", style.INK),
                "nearest image, pixels": ("neighbour.five", style.INK),
                "transfer, new head": ("transfer.frozen.five", style.ORANGE),
                "transfer, whole network": ("transfer.whole.five", style.ORANGE),
                "transfer, class means": ("transfer.means.five", style.ORANGE),
                "MAML, unrolled": ("maml.unrolled.five", style.BLUE),
                "MAML, truncated": ("maml.truncated.five", style.SKY),
                "iMAML": ("imaml.five", style.SKY),
                "features, unrolled": ("hyper_representation.unrolled.five", style.GREEN),
                "features, implicit": ("hyper_representation.implicit.five", style.GREEN),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, draw=drawing)

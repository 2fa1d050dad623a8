"""A network that augments: every weight of a U-Net is a hyperparameter of the classifier trained on what it draws.

    python experiments/augmentation_network/run.py --seed 0 --json

A classifier is trained on few images, each passed through a U-Net that also sees one random number an image. The
U-Net's thousands of weights are tuned by implicit differentiation, on validation images, while the classifier trains.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment
from experiments._data import Split, digits, faces

Augment = Callable[[Any, Any, Any], Any]  # (strengths, images [n, side, side], key) -> images

CHANNELS, HIDDEN = 8, 64  # of the U-Net before it pools; of the classifier
DECAY = 1e-4  # of the classifier's squared weights, in every arm
TRAINING, BATCH, RATE, COUNT = 1000, 50, 2e-3, 6  # of a run from scratch: steps, images, rate, classifiers side by side
STEPS, INNER, OUTER_RATE = 40, 10, 3e-3  # outer steps between two restarts, training steps in each, rate of the U-Net
KEPT = 20  # last steps of which the mean U-Net is kept
ROUNDS = {"digits": 4, "faces": 2}
BY_HAND = {"angle": 0.2, "shift": 1.0, "noise": 0.1}  # radians, pixels, brightness
BOX = {"angle": 0.4, "shift": 1.5, "noise": 0.3}  # what the search tries, from 0
COPIES = 5  # augmented copies of a test image
FRESH, TUNE, COPY = 100, 200, 300  # numbers of runs, and of keys, that no other use takes


class Task(NamedTuple):
    """Images [n, side, side] and labels [n]; `both` holds the training images, then those of validation."""

    train: Split
    valid: Split
    test: Split
    both: Split
    classes: int


class Found(NamedTuple):
    """A U-Net, the classifiers that were trained while it was tuned, and the validation loss of fresh ones."""

    net: Any
    online: Any
    value: float


def load(name: str, seed: int) -> Task:
    if name == "digits":
        parts = [(x.reshape(-1, 8, 8), y) for x, y in digits(seed, (100, 600), centred=False)]
    else:  # of 24 × 24 pixels, means of 2 × 2
        parts = [(x[:, :24, :24].reshape(-1, 12, 2, 12, 2).mean((2, 4)), y) for x, y in faces(seed, (60, 60))]
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts[:2])
    return Task(*parts, both, classes=len(np.unique(both[1])))


def u_net(rng: np.random.Generator) -> dict[str, Any]:
    """Weights of a U-Net of one level of pooling, whose last layer begins near zero."""
    c = CHANNELS
    shapes = {
        "in_1": (3, 3, 2, c),
        "in_2": (3, 3, c, c),
        "deep_1": (3, 3, c, 2 * c),
        "deep_2": (3, 3, 2 * c, 2 * c),
        "up": (2, 2, 2 * c, c),
        "out_1": (3, 3, 2 * c, c),
        "out_2": (3, 3, c, c),
        "last": (1, 1, c, 1),
    }
    scale = {name: np.sqrt(2 / np.prod(shape[:3])) * (0.1 if name == "last" else 1) for name, shape in shapes.items()}
    return {
        name: {"w": np.float32(scale[name] * rng.normal(size=shape)), "b": np.zeros(shape[-1], np.float32)}
        for name, shape in shapes.items()
    }


@jax.jit
def augmented(weights: dict[str, Any], x: Any, key: Any) -> Any:
    """`x + tanh(U(x, ε))` with one ε ~ N(0, 1) an image."""
    noise = jnp.broadcast_to(jax.random.normal(key, (len(x), 1, 1)), x.shape)

    def conv(name: str, h: Any) -> Any:
        axes = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(h, weights[name]["w"], (1, 1), "SAME", dimension_numbers=axes)
        return h + weights[name]["b"][None, None, None]

    def twice(name: str, h: Any) -> Any:
        return jax.nn.relu(conv(f"{name}_2", jax.nn.relu(conv(f"{name}_1", h))))

    skip = twice("in", jnp.stack([x, noise], -1))
    n, height, width, c = skip.shape
    deep = twice("deep", skip.reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4)))
    up = jnp.einsum("nhwc,ijcd->nhiwjd", deep, weights["up"]["w"]).reshape(n, height, width, c)
    up = up + weights["up"]["b"][None, None, None]
    out = conv("last", twice("out", jnp.concatenate([skip, up], -1)))
    return x + jnp.tanh(out[..., 0])


def by_hand(strengths: dict[str, Any], x: Any, key: Any) -> Any:
    """Rotated by up to `angle` radians, moved by up to `shift` pixels, noise added."""
    rotation, shift, noise = jax.random.split(key, 3)
    x = rotated(x, strengths["angle"] * jax.random.uniform(rotation, (len(x),), minval=-1.0))
    x = hg.augment.translate(x, strengths["shift"], key=shift)
    return hg.augment.gaussian_noise(x, strengths["noise"], key=noise)


def rotated(x: Any, angles: Any) -> Any:
    """Each image about its middle, by linear interpolation; what comes in from outside is zero."""
    middle = (x.shape[1] - 1) / 2
    rows, columns = jnp.meshgrid(*(jnp.arange(side) - middle for side in x.shape[1:]), indexing="ij")

    def one(picture: Any, angle: Any) -> Any:
        c, s = jnp.cos(angle), jnp.sin(angle)
        at = [c * rows - s * columns + middle, s * rows + c * columns + middle]
        return jax.scipy.ndimage.map_coordinates(picture, at, order=1, mode="constant")

    return jax.vmap(one)(x, angles)


def as_it_is(_: Any, x: Any, key: Any) -> Any:
    del key
    return x


def classifiers(rng: np.random.Generator, task: Task) -> list[dict[str, Any]]:
    """Perceptrons of one hidden layer from several starts, along the first axis of every array."""
    sizes = ((task.train[0][0].size, HIDDEN), (HIDDEN, task.classes))
    return [
        {
            "w": np.float32(np.sqrt(2 / size[0]) * rng.normal(size=(COUNT, *size))),
            "b": np.zeros((COUNT, 1, size[1]), np.float32),
        }
        for size in sizes
    ]


@jax.jit
def logits(params: Any, x: Any) -> Any:
    """Of every classifier, [classifiers, n, classes]."""
    first, last = params
    h = jax.nn.relu(x.reshape(1, len(x), -1) @ first["w"] + first["b"])
    return h @ last["w"] + last["b"]


def cross_entropy(out: Any, y: Any) -> Any:
    """Mean over images of each classifier, [classifiers]."""
    labels = jnp.broadcast_to(y[None], out.shape[:2])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, labels), 1)


def training_loss(augment: Augment) -> Callable[..., Any]:
    """Sum over the classifiers, which all see the same draws."""

    def outputs(params: Any, strengths: Any, batch: Any, key: Any) -> Any:
        return logits(params, augment(strengths, batch[0], key))

    def loss(out: Any, params: Any, _: Any, batch: Any) -> Any:
        return jnp.sum(cross_entropy(out, batch[1])) + DECAY * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    return hg.compose(outputs, loss)


@functools.partial(jax.jit, static_argnames=("augment", "steps"))
def train(augment: Augment, strengths: Any, params: Any, data: Split, count: int, key: Any, *, steps: int) -> Any:
    """A run from scratch on the first `count` images, a number that is traced: one program for all of them."""
    loss, optimizer = training_loss(augment), optax.adam(RATE)

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, count)
        grads = jax.grad(loss)(params, strengths, (data[0][rows], data[1][rows]), jax.random.fold_in(key, 1))
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


@jax.jit
def scores(out: Any, y: Any) -> dict[str, Any]:
    """Means over the classifiers."""
    return {"loss": jnp.mean(cross_entropy(out, y)), "accuracy": jnp.mean(jnp.argmax(out, 2) == y[None])}


@jax.jit
def validation_loss(params: Any, _: Any, batch: Any) -> Any:
    return jnp.mean(cross_entropy(logits(params, batch[0]), batch[1]))


class Study:
    """Trainings of a task, from scratch, and U-Nets tuned for it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.task = load(name, options.seed)
        self.name, self.seed = name, options.seed
        self.rounds, self.steps, self.training = ROUNDS[name], STEPS, TRAINING
        if options.smoke:
            self.rounds, self.steps, self.training = 1, 2, 30
        self.key = jax.random.key(options.seed)
        self.gradients = self.skipped = 0  # that the tuning took, and outer steps that it skipped
        problem = hg.Problem(training_loss(augmented), validation_loss)
        inner = hg.inner.gradient(optax.adam(RATE), steps=INNER)
        if options.smoke:  # the identity in place of the inverse compiles in half the time
            self.solver = hg.implicit(problem, inner=inner, linear=hg.linear.identity(step_size=1.0))
        else:
            linear = hg.linear.cg(max_steps=5)
            self.solver = hg.implicit(problem, inner=inner, linear=linear, curvature="gauss_newton", damping=0.1)

    def fit(self, augment: Augment, strengths: Any, run: int, *, both: bool = False) -> Any:
        """Classifiers trained from the starts and with the draws of that number."""
        data = self.task.both if both else self.task.train
        start = classifiers(np.random.default_rng((self.seed, run)), self.task)
        key = jax.random.fold_in(self.key, run)
        return train(augment, strengths, start, self.task.both, len(data[1]), key, steps=self.training)

    def fresh(self, augment: Augment, strengths: Any, *, both: bool = False) -> Any:
        """Classifiers from starts that neither tuning nor search has seen."""
        return self.fit(augment, strengths, FRESH, both=both)

    def score(self, params: Any, net: Any = None, copies: int = 0) -> dict[str, Any]:
        """On the test images, with logits averaged over themselves and so many augmented copies of each."""
        x, y = self.task.test
        keys = [jax.random.fold_in(self.key, COPY + i) for i in range(copies)]
        out = [logits(params, x), *(logits(params, augmented(net, x, key)) for key in keys)]
        return scores(sum(out) / len(out), y)

    def value(self, params: Any) -> float:
        return float(validation_loss(params, None, self.task.valid))

    def search(self, draws: int, seed: int) -> dict[str, Any]:
        """The best by validation loss of so many strengths, drawn evenly."""
        rng, tried = np.random.default_rng(seed), []
        for _ in range(draws):
            strengths = {name: np.float32(rng.uniform(0, most)) for name, most in BOX.items()}
            tried.append((self.value(self.fit(by_hand, strengths, 0)), strengths))
        return min(tried, key=lambda pair: pair[0])[1]

    def tune(self, net: Any, rounds: int, steps: int) -> list[Found]:
        """What each round ended with; every round trains new classifiers, then tunes for so many steps as they go on.

        A U-Net tuned beside one training answers to the state of that training; new ones ask what it does from the
        beginning, and their validation loss says which round to keep.
        """
        found, online = [], None
        for i in range(rounds + 1):
            params = self.fit(augmented, net, i)
            found.append(Found(net, params if online is None else online, self.value(params)))
            if i == rounds:
                break
            recent: collections.deque[Any] = collections.deque(maxlen=KEPT)
            result = hg.tune(
                self.solver,
                params,
                net,
                hg.minibatches(self.task.train, BATCH),
                self.task.valid,
                outer=optax.adam(OUTER_RATE),
                steps=steps,
                key=jax.random.fold_in(self.key, TUNE + i),
                callbacks=lambda _, metrics, recent=recent: recent.append(jax.device_get(metrics["hparams"])),
            )
            net, online = jax.tree.map(lambda *each: np.mean(each, 0), *recent), result.params
            history = result.history
            self.gradients += int(np.sum(history.inner_steps + 2 * history.linear_steps))
            self.skipped += int(np.sum(~history.usable))
        self.gradients += (rounds + 1) * self.training
        return found


def compare(study: Study, options: argparse.Namespace, numbers: dict[str, Any]) -> Any:
    """Every arm of a task; the U-Net that was learned."""
    start = u_net(np.random.default_rng(options.seed))
    found = study.tune(start, study.rounds, study.steps)
    chosen = int(np.argmin([each.value for each in found]))
    best = found[chosen]
    numbers["online"] = study.score(best.online)
    numbers["hparams"] = sum(p.size for p in jax.tree.leaves(start))
    numbers["round"], numbers["skipped"] = chosen, study.skipped
    if options.smoke:
        numbers["learned"] = study.score(study.fresh(augmented, best.net))
        return best.net
    draws = study.gradients // study.training
    searched = study.search(draws, options.seed)
    arms = {"none": (as_it_is, None), "searched": (by_hand, searched), "learned": (augmented, best.net)}
    fits = {name: study.fresh(*arm) for name, arm in arms.items()}
    numbers |= {name: study.score(params) for name, params in fits.items()}
    numbers["gain"] = numbers["learned"]["accuracy"] - numbers["none"]["accuracy"]
    numbers["drop"] = numbers["none"]["loss"] - numbers["learned"]["loss"]
    numbers["gain_over_search"] = numbers["learned"]["accuracy"] - numbers["searched"]["accuracy"]
    numbers["drop_over_search"] = numbers["searched"]["loss"] - numbers["learned"]["loss"]
    numbers["draws"], numbers["strengths"] = draws, searched
    numbers["averaged"] = study.score(fits["learned"], best.net, COPIES)
    numbers["valid"] = {name: study.value(params) for name, params in fits.items()}
    numbers["hand"] = study.score(study.fresh(by_hand, {name: np.float32(size) for name, size in BY_HAND.items()}))
    random = start | {"last": jax.tree.map(lambda p: np.float32(10) * p, start["last"])}
    numbers["random"] = study.score(study.fresh(augmented, random))
    numbers["both"] = {name: study.score(study.fresh(*arm, both=True)) for name, arm in arms.items()}
    if study.name == "digits":  # it costs as much as the tuning
        through = study.tune(start, 1, study.rounds * study.steps)[-1]
        numbers["one_round"] = study.score(study.fresh(augmented, through.net))
    return best.net


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    drawn = {}
    for name in ("digits",) if options.smoke else ROUNDS:
        study = Study(name, options)
        numbers[name] = {}
        net = compare(study, options, numbers[name])
        if not options.smoke:
            drawn[name] = before_and_after(study, net)
    if drawn:
        tiles(drawn, options.out)


def before_and_after(study: Study, net: Any, columns: int = 5, draws: int = 4) -> np.ndarray:
    """Training images side by side in the first row, what the U-Net draws of them below; NaN between them."""
    x, y = study.task.train
    shown = x[np.argsort(y)][np.linspace(0, len(y) - 1, columns).astype(int)]
    rows = [shown, *(augmented(net, shown, jax.random.fold_in(study.key, COPY + i)) for i in range(draws))]
    padded = [np.pad(np.asarray(row), ((0, 0), (1, 1), (1, 1)), constant_values=np.nan) for row in rows]
    return np.concatenate([np.concatenate(list(row), 1) for row in padded], 0)


def tiles(drawn: dict[str, np.ndarray], folder: Path) -> None:
    """What the U-Nets of one seed draw; the numbers of all seeds are in the other picture."""
    canvas = style.figure(9.5, 4.6)
    for axes, (name, shown) in zip(canvas.subplots(1, 2), drawn.items(), strict=True):
        axes.imshow(shown, cmap="gray_r" if name == "digits" else "gray", vmin=-0.3, vmax=1.3, interpolation="nearest")
        axes.set_title(name.capitalize(), loc="left", fontsize=12.5, fontweight="bold", pad=9)
        axes.set_yticks(len(shown) / 5 * (np.arange(5) + 0.5) - 0.5, ["image", *(f"draw {i}" for i in range(1, 5))])
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=11)
        axes.spines[:].set_visible(False)
    style.save(canvas, folder, "drawn.png", colours=64)


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 6.4)
    arms = {
        "none": ("none", style.ORANGE),
        "set by hand": ("hand", style.PINK),
        "searched": ("searched", style.PINK),
        "random U-Net": ("random", style.INK),
        "learned U-Net": ("learned", style.BLUE),
        "… averaged": ("averaged", style.SKY),
    }
    for row, name in zip(canvas.subplots(2, 2), ROUNDS, strict=True):
        for axes, kind, unit in zip(row, ("accuracy", "loss"), ("test accuracy", "test loss, nats"), strict=True):
            rows = {text: (style.each(results, f"{name}.{arm}.{kind}"), color) for text, (arm, color) in arms.items()}
            style.over_seeds(axes, rows, f"{name.capitalize()}, fresh training", xlabel=unit)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""Which activation does a sparse network want? Mixtures with learned scales, layer by layer, against ReLU.

    python experiments/sparse_activations/run.py --seed 0 --json

Dense networks are trained on digits and pruned to a twentieth of their weights. What the rest learns when it is trained
again depends on the activations; their mixtures and scales, the learning rate and the weight decay are tuned by the
derivative of the validation loss through that training. Then two scalars, tuned over many tasks: `tasks.py`.
"""

from __future__ import annotations

import functools
import sys
import time
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
from experiments._common import experiment, progress
from experiments._data import digits
from experiments.sparse_activations import tasks
from experiments.sparse_activations.networks import (
    NETWORKS,
    OPERATIONS,
    Network,
    cross_entropy,
    masked,
    masks,
    mixture,
    plain,
    start,
)

DEFAULT = {"rate": 0.01, "decay": 1e-4}  # of the dense training, and of the one after pruning where it is not tuned
RATES, DECAYS, SCALES = (1e-3, 0.1), (1e-6, 1e-2), (0.5, 2.0)  # what search draws from, log-uniform
TOGETHER, FRESH = 2, 2  # dense networks that are trained at once, as tuning sees them; and pairs that judge it
OUTER = 0.2  # learning rate of the hyperparameters, falling by a cosine
PAID = 3  # trainings that take about as long as a hypergradient of one, by `cost`


class Sizes(NamedTuple):
    dense: int  # steps of training before pruning
    steps: int  # and after
    outer: int
    operations: int
    draws: int


class Pruned(NamedTuple):
    """Networks `[TOGETHER, ...]` after pruning; what they train on and are judged on, with their masks."""

    train: Any
    valid: Any
    test: Any
    params: Any
    dense: Any  # test accuracy before


def inner_loss(network: Network, params: Any, hparams: dict[str, Any], batch: Any) -> Any:
    """Mean over the networks `[starts, ...]` of cross entropy and weight decay; `batch` holds their masks."""
    x, y, mask = batch
    activate = mixture(hparams["activation"])

    def one(params: Any, mask: Any) -> Any:
        kept = masked(params, mask)
        decay = hparams["decay"] / 2 * sum(jnp.sum(layer["w"] ** 2) for layer in kept)
        return cross_entropy(network.logits(kept, activate, x), y) + decay

    return jnp.mean(jax.vmap(one)(params, mask))


def outer_loss(network: Network, params: Any, hparams: dict[str, Any], batch: Any) -> Any:
    return inner_loss(network, params, hparams | {"decay": 0.0}, batch)


def accuracy(network: Network, params: Any, hparams: dict[str, Any], batch: Any) -> Any:
    x, y, mask = batch
    activate = mixture(hparams["activation"])
    one = lambda params, mask: jnp.mean(jnp.argmax(network.logits(masked(params, mask), activate, x), 1) == y)
    return jnp.mean(jax.vmap(one)(params, mask))


def adam(hparams: dict[str, Any]) -> optax.GradientTransformation:
    return optax.adam(hparams["rate"])


@functools.cache
def trainer(network: Network, steps: int) -> Callable[..., Any]:
    """`(params, hparams, train) -> params` after so many steps on the full batch."""

    @jax.jit
    def train(params: Any, hparams: dict[str, Any], data: Any) -> Any:
        optimizer = adam(hparams)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            # The mean over networks is undone: each is trained as if it were alone.
            slope = jax.grad(lambda p: inner_loss(network, p, hparams, data) * len(data[2][0]))(params)
            updates, state = optimizer.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    return train


class Study:
    """One network: pruned starts to tune on and to judge by, and what training makes of them."""

    def __init__(self, network: Network, data: tuple[Any, Any, Any], sizes: Sizes, key: Any) -> None:
        self.network, self.sizes = network, sizes
        self.train = trainer(network, sizes.steps)
        self.loss, self.right = (jax.jit(functools.partial(f, network)) for f in (outer_loss, accuracy))
        self.seen, *self.fresh = (self.pruned(data, each) for each in jax.random.split(key, 1 + FRESH))

    def pruned(self, data: tuple[Any, Any, Any], key: Any) -> Pruned:
        relu = self.relu(DEFAULT)
        params = jax.vmap(functools.partial(start, self.network))(jax.random.split(key, TOGETHER))
        full = [jnp.ones_like(layer["w"]) for layer in params]
        dense = trainer(self.network, self.sizes.dense)(params, relu, (*data[0], full))
        mask = jax.vmap(masks)(dense)
        splits = ((*split, mask) for split in data)
        return Pruned(*splits, jax.vmap(masked)(dense, mask), self.right(dense, relu, (*data[2], full)))

    def relu(self, training: dict[str, Any]) -> dict[str, Any]:
        return asarrays({"activation": plain(self.network, operations=1), **training})

    def judged(self, hparams: dict[str, Any]) -> float:
        """Test accuracy of fresh networks, which no tuning has seen, trained after pruning."""
        trained = (self.train(pair.params, hparams, pair.train) for pair in self.fresh)
        right = [self.right(params, hparams, pair.test) for params, pair in zip(trained, self.fresh, strict=True)]
        return float(np.mean(right))

    def validated(self, hparams: dict[str, Any]) -> float:
        return float(self.loss(self.train(self.seen.params, hparams, self.seen.train), hparams, self.seen.valid))

    def tuned(self, first: dict[str, Any], fixed: dict[str, Any]) -> tuple[hg.Result, dict[str, Any], float]:
        """From `first` on, beside what stays `fixed`: the run, what it found, and processor seconds a step."""
        problem = hg.Problem(
            lambda params, hparams, batch: inner_loss(self.network, params, fixed | hparams, batch) * TOGETHER,
            lambda params, hparams, batch: outer_loss(self.network, params, fixed | hparams, batch),
        )
        inner = hg.inner.gradient(lambda hparams: adam(fixed | hparams), steps=self.sizes.steps)
        domain: dict[str, Any] = {"rate": hg.domains.log(), "decay": hg.domains.log()}
        domain["activation"] = {"mix": hg.domains.simplex(), "output": hg.domains.log(), "input": hg.domains.log()}
        marks: list[float] = []
        result = hg.tune(
            hg.unrolled(problem, inner=inner, mode="reverse"),
            self.seen.params,
            first,
            self.seen.train,
            self.seen.valid,
            outer=optax.adam(optax.cosine_decay_schedule(OUTER, self.sizes.outer)),
            steps=self.sizes.outer,
            domain={name: domain[name] for name in first},
            callbacks=[lambda step, metrics: marks.append(time.process_time())],
        )
        return result, fixed | result.best.hparams, float(np.median(np.diff(marks)))

    def searched(self, draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The best of as many draws as cost what tuning does, by validation loss."""
        drawn = [draw() for _ in range(self.sizes.draws)]
        return min(progress(drawn, "search"), key=lambda hparams: nan_last(self.validated(hparams)))


def nan_last(value: float) -> float:
    return value if np.isfinite(value) else np.inf


def asarrays(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def draws(rng: np.random.Generator, network: Network, operations: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A draw of the training alone, with ReLU, and one of an operation and scales for each layer as well."""
    between = lambda box, size=None: np.exp(rng.uniform(*np.log(box), size))
    training = lambda: {"rate": between(RATES), "decay": between(DECAYS)}

    def everything() -> Any:
        activation = plain(network, rng.integers(operations, size=network.hidden), operations=operations)
        scales = {name: between(SCALES, network.hidden) for name in ("output", "input")}
        return asarrays(training() | {"activation": activation | scales})

    return lambda: asarrays(training() | {"activation": plain(network, operations=1)}), everything


def compare(study: Study, numbers: dict[str, Any], rng: np.random.Generator, *, whole: bool) -> None:
    """Fill in the test accuracies of the arms."""
    operations, hidden = study.sizes.operations, study.network.hidden
    default, ones = asarrays(DEFAULT), jnp.ones(hidden)
    mixed = {"mix": jnp.full((hidden, operations), 1 / operations), "output": ones, "input": ones}
    numbers["dense"] = np.mean([pair.dense for pair in study.fresh])
    numbers["relu_default"] = study.judged(study.relu(DEFAULT))
    result, tuned, seconds = study.tuned(default | {"activation": mixed}, {})
    found = tuned["activation"]
    numbers["tuned"] = study.judged(tuned)
    numbers["online"] = study.right(result.best.params, tuned, study.seen.test)
    numbers["gain_default"] = numbers["tuned"] - numbers["relu_default"]
    numbers["skipped"] = int(np.sum(~result.history.usable))
    if whole:
        draw_training, draw_everything = draws(rng, study.network, operations)
        numbers["learned_default"] = study.judged(study.tuned({"activation": mixed}, default)[1])
        relu = study.relu(DEFAULT)
        numbers["relu_tuned"] = study.judged(study.tuned(default, {"activation": relu["activation"]})[1])
        numbers["relu_searched"] = study.judged(study.searched(draw_training))
        numbers["searched"] = study.judged(study.searched(draw_everything))
        hard = plain(study.network, np.asarray(found["mix"]).argmax(1), operations=operations)
        numbers["discrete"] = study.judged(tuned | {"activation": found | {"mix": hard["mix"]}})
        numbers["gain_retuned"] = numbers["tuned"] - max(numbers["relu_tuned"], numbers["relu_searched"])
        numbers["gain_over_search"] = numbers["tuned"] - numbers["searched"]
        began = time.process_time()
        study.validated(tuned)
        numbers["cost"] = seconds / (time.process_time() - began)
    numbers |= {"rate": tuned["rate"], "decay": tuned["decay"], "activation": found}


def measure(options: Any, numbers: dict[str, Any]) -> None:
    whole = not options.smoke
    sizes = Sizes(200, 60, 20, len(OPERATIONS), 20 * PAID) if whole else Sizes(2, 2, 2, 2, 2)
    data = jax.tree.map(jnp.asarray, tuple(digits(options.seed, (200, 200))))
    small = {"mlp": NETWORKS["mlp"]._replace(shapes=((64, 16), (16, 10)))}
    for name, network in (NETWORKS if whole else small).items():
        study = Study(network, data, sizes, jax.random.key(options.seed))
        numbers[name] = {}
        compare(study, numbers[name], np.random.default_rng(options.seed), whole=whole)
    families = {
        "interpolation": lambda: tasks.interpolation(options.seed, *((20, 60) if whole else (2, 3))),
        "graph": lambda: tasks.graph(options.seed, 20),
    }
    for name in families if whole else ("interpolation",):
        numbers[name], grid, losses = tasks.study(families[name](), *((25, 15) if whole else (2, 2)))
        numbers[name] |= {"grid": grid, "losses": losses}


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 8.4)
    places = canvas.subplots(2, 2, width_ratios=(1.15, 1))
    texts = {
        "relu_default": ("ReLU, trained as before", style.INK),
        "relu_tuned": ("ReLU, training tuned", style.ORANGE),
        "relu_searched": ("ReLU, training searched", style.YELLOW),
        "learned_default": ("learned, trained as before", style.SKY),
        "tuned": ("learned, training tuned", style.BLUE),
        "searched": ("all of it searched", style.GREEN),
        "dense": ("ReLU, not pruned", style.PINK),
    }
    reach = np.linspace(-3, 3, 121)
    titles = {"mlp": "Perceptron, 5 % of weights", "lenet": "LeNet-like, 5 % of weights"}
    for (left, right), (name, title) in zip(places, titles.items(), strict=True):
        rows = {text: (style.each(results, f"{name}.{arm}"), color) for arm, (text, color) in texts.items()}
        style.over_seeds(left, rows, title, xlabel="test accuracy, fresh networks", xlim=(0.5, 1))
        right.plot(reach, np.maximum(reach, 0), color="#999999", linewidth=1.5, linestyle=style.DASHED, label="ReLU")
        for i, color in zip(range(NETWORKS[name].hidden), (style.BLUE, style.ORANGE, style.GREEN), strict=False):
            activation = lambda run: {k: np.asarray(v, np.float32) for k, v in run[name]["activation"].items()}  # noqa: B023
            by_seed = [mixture(activation(run))(i, reach) for run in results.values()]
            style.curves(right, reach, by_seed, color, f"layer {i + 1}")
        style.titled(right, "What was learned", xlabel="h", ylabel="activation")
    style.legend(canvas, places[1, 1], columns=4)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

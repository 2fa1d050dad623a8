"""Hyperparameters other than a decay for each parameter, tuned on the six networks while they train.

    python experiments/networks/hyperparameters.py --seed 0 --json

Decays of layers, label smoothing, weights of examples of which 30 % have a wrong label, and noise on the pixels by
`hg.online`; learning rates of layers by ten steps unrolled, as training goes on; a learning rate for each of a hundred
steps by the whole run unrolled, from the initialisation each time. Beside each the same training without tuning, and
the best of a random search over one value that costs about as many gradients.
"""

from __future__ import annotations

import argparse
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
from experiments._common import experiment
from experiments.networks.models import NETWORKS, Network, decay, network
from experiments.networks.run import DRAWS, OUTER, PRODUCTS, START, STEPS, TRAINING, outer_step, size

RATE = np.log(1e-2)  # of Adam, where training is not tuned
LONG, LESS = 100, 15  # steps of the run whose rates are tuned one by one, and how often they move
WRONG = 0.3  # share of wrong labels where examples have weights
PyTree = Any


class Kind(NamedTuple):
    """Hyperparameters of one kind.

    Attributes:
        start: network -> hyperparameters that leave training as it is.
        all_at: network and a number -> hyperparameters that all have this value.
        span: where random search draws the number; None where one value for all means nothing.
        loss: `(logits, params, hparams, batch) -> loss`.
        pixels: `(x, hparams, key) -> x`, or None.
        rule: how the hyperparameters move.
        images: whether it applies to pixels alone.
    """

    start: Callable[[Network], PyTree]
    all_at: Callable[[Network, Any], PyTree]
    span: tuple[float, float] | None
    loss: Callable[[jax.Array, PyTree, PyTree, PyTree], jax.Array]
    pixels: Callable[[jax.Array, PyTree, jax.Array], jax.Array] | None = None
    rule: optax.GradientTransformation = optax.adam(0.3)
    images: bool = False


def rows(logits: jax.Array, labels: jax.Array, smoothing: Any = 0.0) -> jax.Array:
    """Cross entropy of each row with labels smoothed towards all classes; the mean over the characters of a line."""
    log = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log, labels[..., None], -1)[..., 0]
    each = -(1 - smoothing) * right - smoothing * log.mean(-1)
    return each.reshape(len(each), -1).mean(1)


def fixed_decay(params: PyTree) -> Any:
    return decay(params, jax.tree.map(lambda w: jnp.asarray(START, w.dtype), params))


def plain(logits: jax.Array, params: PyTree, hparams: PyTree, batch: PyTree) -> jax.Array:
    return rows(logits, batch[1]).mean() + fixed_decay(params)


def smoothed(logits: jax.Array, params: PyTree, logit: PyTree, batch: PyTree) -> jax.Array:
    return rows(logits, batch[1], jax.nn.sigmoid(logit)).mean() + fixed_decay(params)


def weighted(logits: jax.Array, params: PyTree, logits_of_rows: PyTree, batch: PyTree) -> jax.Array:
    return jnp.mean(2 * jax.nn.sigmoid(logits_of_rows[batch[2]]) * rows(logits, batch[1])) + fixed_decay(params)


def of_layers(net: Network, value: Any) -> PyTree:
    return jax.tree.map(lambda w: jnp.asarray(value, w.dtype), net.params)


def number(net: Network, value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


KINDS = {
    "decays of layers": Kind(
        lambda net: of_layers(net, START),
        of_layers,
        (-9.0, -1.5),
        lambda logits, params, logs, batch: rows(logits, batch[1]).mean() + decay(params, logs),
    ),
    "label smoothing": Kind(lambda net: number(net, -5.0), number, (-5.0, 0.0), smoothed),
    "weights of examples": Kind(
        lambda net: jnp.zeros(len(net.data[0][1])),
        lambda net, value: jnp.full(len(net.data[0][1]), value),
        None,
        weighted,
    ),
    "noise on pixels": Kind(
        lambda net: number(net, np.log(0.01)),
        number,
        (np.log(0.01), 0.0),
        plain,
        lambda x, log, key: x + jnp.exp(log) * jax.random.normal(key, x.shape, x.dtype),
        images=True,
    ),
    "rates of layers": Kind(
        lambda net: of_layers(net, RATE), of_layers, (np.log(1e-3), np.log(1e-1)), plain, rule=optax.adam(0.1)
    ),
    "rates of steps": Kind(
        lambda net: jnp.full(LONG, RATE, jnp.float32),
        lambda net, value: jnp.full(LONG, value, jnp.float32),
        (np.log(1e-3), np.log(1e-1)),
        plain,
        rule=optax.adam(0.1),
    ),
}


def problem(net: Network, kind: Kind) -> hg.Problem:
    """Training and validation loss; a model apart from its loss where it has no state."""
    noisy = kind.pixels or (lambda x, hparams, key: x)
    outputs = net.outputs
    if outputs is not None:
        model = (
            (lambda params, hparams, batch: outputs(params, batch[0]))
            if kind.pixels is None
            else (lambda params, hparams, batch, key: outputs(params, noisy(batch[0], hparams, key)))
        )
        inner = hg.compose(model, kind.loss)
        return hg.Problem(inner, lambda params, hparams, batch: net.error(params, None, batch))

    def inner_loss(params: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array, model_state: PyTree) -> Any:
        for_model, for_pixels = jax.random.split(key)
        logits, model_state = net.train(params, model_state, noisy(batch[0], hparams, for_pixels), for_model)
        return kind.loss(logits, params, hparams, batch), model_state

    def outer_loss(params: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array, model_state: PyTree) -> jax.Array:
        return net.error(params, model_state, batch)

    return hg.Problem(inner_loss, outer_loss, model_state=True)


def adam(rates: Callable[[PyTree], optax.GradientTransformation]) -> Callable[[PyTree], optax.GradientTransformation]:
    return lambda hparams: optax.chain(optax.scale_by_adam(), rates(hparams))


def leafwise(logs: PyTree) -> optax.GradientTransformation:
    """A rate for each leaf."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, log: -jnp.exp(log) * u, updates, logs))


def solver(net: Network, name: str) -> hg.Solver:
    about = problem(net, KINDS[name])
    if name == "rates of layers":
        return hg.unrolled(about, inner=hg.inner.gradient(adam(leafwise), steps=STEPS), warm_start=True)
    if name == "rates of steps":
        by_step = lambda logs: optax.scale_by_schedule(lambda t: -jnp.exp(logs[t]))
        return hg.unrolled(about, inner=hg.inner.gradient(adam(by_step), steps=LONG))
    return hg.online(about, TRAINING, steps=STEPS, products=PRODUCTS)


def cell(name: str, what: str, seed: int, outer: int) -> dict[str, Any]:
    """One kind on one network: tuned, untuned, and the best of a random search."""
    net, kind = network(name, seed), KINDS[what]
    (x, y), rng = net.data[0], np.random.default_rng(seed)
    if what == "weights of examples":
        wrong = rng.random(len(y)) < WRONG
        y = jnp.where(wrong.reshape(-1, *[1] * (y.ndim - 1)), rng.permutation(np.asarray(y)), y)
    train, calls = hg.minibatches((x, y, jnp.arange(len(y))), net.batch), outer
    if what == "rates of steps":
        calls = min(outer, LESS)
    way = solver(net, what)
    step = outer_step(way, kind.rule)
    look = jax.jit(lambda state, hparams, key: way.evaluate(state, hparams, train, net.data[1], key=key))
    test = jax.jit(lambda state: net.error(state.params, state.model_state, net.data[2]))
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(calls)]

    def trained(hparams: PyTree) -> dict[str, Any]:
        state, value, seconds = way.init(net.params, hparams, model_state=net.model_state), jnp.inf, []
        for key in keys[:1] * 2 if what == "rates of steps" else keys:
            began = time.process_time()
            value, _, state = jax.block_until_ready(look(state, hparams, key))
            seconds.append(time.process_time() - began)
        return {"valid": value, "test": test(state), "seconds": np.median(seconds[len(seconds) > 1 :])}

    hparams = kind.start(net)
    state, descent = way.init(net.params, hparams, model_state=net.model_state), kind.rule.init(hparams)
    history, seconds = [], []
    for key in keys:
        began = time.process_time()
        state, hparams, descent, seen = jax.block_until_ready(step(state, hparams, descent, key, train, net.data[1]))
        seconds.append(time.process_time() - began)
        history.append(seen)
    values, status, _ = (np.asarray(column) for column in zip(*history, strict=True))
    untuned = trained(kind.start(net))
    found = {
        "usable": np.mean(status <= int(hg.Status.INSENSITIVE)),
        "statuses": {hg.Status(int(code)).name: int(np.sum(status == code)) for code in np.unique(status)},
        "tuned": {"valid": values[-1], "test": test(state), "cost": np.median(seconds) / untuned["seconds"]},
        "untuned": untuned,
    }
    if kind.span is not None:
        draws = rng.uniform(*kind.span, DRAWS if what != "rates of steps" else DRAWS * calls)
        tried = [trained(kind.all_at(net, value)) for value in draws]
        found["random"] = min(tried, key=lambda run: float(run["valid"]))
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    outer = 2 if options.smoke else OUTER
    for what, kind in KINDS.items():
        for name in NETWORKS[:1] if options.smoke else NETWORKS:
            if (kind.images and name.startswith("char")) or what not in (options.only or KINDS):
                continue
            if what == "rates of steps" and size(name) > 1e5:
                continue
            found = cell(name, what, options.seed, outer)
            numbers.setdefault(what, {})[name] = found
            ratios = ", ".join(
                f"{part} {float(found[part]['valid'] / found['untuned']['valid']):.3f} "
                f"{float(found[part]['test'] / found['untuned']['test']):.3f}"
                for part in ("tuned", "random")
                if part in found
            )
            print(
                f"{what:20} {name:16} usable {found['usable']:.2f}, {ratios}, cost {found['tuned']['cost']:.1f}",
                flush=True,
            )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, kept="hyperparameters.json")

"""Three dropout rates tuned in one training run, against twelve runs each of grid, random and Optuna search.

A network of two hidden layers on 300 digits overfits without dropout. The self-tuned network learns how its weights
respond to the three rates (one draw for each example), and moves the rates down the validation loss as it trains.

As in the papers the rates stay where they are at first: dropout slows the early descent, so that the validation loss of
a young network asks for less of it than that of a trained one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import hypergrad as hg
from experiments import _search
from experiments._common import experiment, progress
from experiments._data import Split, digits
from experiments._self_tuning import cross_entropy, draw_schedules

RATES = ("input", "hidden 1", "hidden 2")
RANGES = dict.fromkeys(RATES, (0.0, 0.9, "real"))
DOMAIN = hg.domains.interval(0, 0.9)
BATCH = 100
START = 0.05  # where tuning begins
SCALE = 2.0  # of the perturbation, in unconstrained coordinates: wide, most of the range is seen from the start
WARM_UP = 0.2  # share of the run before the rates move
PyTree = Any


def adam(steps: int) -> optax.GradientTransformation:
    """What every run trains by: Adam, its learning rate falling to 0."""
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


class Net(nnx.Module):
    """Dense layers with dropout before each; the same code for plain layers and for layers that respond."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, responding: bool) -> None:
        dense = hg.responses.layers.HyperDense if responding else nnx.Linear
        options: Any = {"hparams": len(RATES)} if responding else {}
        sizes = [64, width, width, 10]
        self.layers = nnx.List([dense(a, b, rngs=rngs, **options) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: jax.Array, *offset: jax.Array, rates: Any = None, key: Any = None) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = jax.nn.relu(x) if i else x
            x = x if rates is None else hg.augment.dropout(x, rates[i], key=jax.random.fold_in(key, i))
            x = layer(x, *offset)
        return x


def self_tuned(train: Split, valid: Split, width: int, calls: int, seed: int) -> tuple[hg.Result, Any, float]:
    """The run, its network `(params, x) -> logits` without dropout, and its processor time."""
    graph, state = nnx.split(Net(width, nnx.Rngs(seed), responding=True))

    def outputs(pair: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        params, offset = pair
        rates = [hparams[name] for name in RATES]
        return nnx.merge(graph, params)(batch[0], offset, rates=rates, key=key)

    def outer_loss(pair: PyTree, hparams: PyTree, batch: PyTree) -> jax.Array:
        params, offset = pair
        return cross_entropy(nnx.merge(graph, params)(batch[0], offset), batch[1])

    inner_loss = hg.compose(outputs, lambda logits, pair, hparams, batch: cross_entropy(logits, batch[1]))
    solver = hg.self_tuning(
        hg.Problem(inner_loss, outer_loss),
        response=hg.responses.gated(),
        optimizer=adam(5 * calls),
        steps=5,
        domain=DOMAIN,
        perturb="example",
        scale=SCALE,
        scale_optimizer=optax.adam(1e-2),
    )
    moving = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(3e-2)], [int(WARM_UP * calls)])
    clock = _search.Clock()
    result = hg.tune(
        solver,
        nnx.to_pure_dict(state),
        dict.fromkeys(RATES, START),
        hg.minibatches(train, BATCH),
        valid,
        outer=optax.adam(moving),
        steps=calls,
        domain=DOMAIN,
        key=jax.random.key(seed),
        callbacks=clock,
        progress=sys.stderr.isatty(),
    )
    return result, lambda pair, x: nnx.merge(graph, pair[0])(x, pair[1]), clock.seconds


def fixed(train: Split, valid: Split, width: int, steps: int, seed: int) -> tuple[Any, Any]:
    """A function that trains at a setting, and the network `(params, x) -> logits` without dropout."""
    graph, state = nnx.split(Net(width, nnx.Rngs(seed), responding=False))
    params, key = nnx.to_pure_dict(state), jax.random.key(seed)
    x, y = map(jnp.asarray, train)

    def training_loss(params: PyTree, setting: PyTree, key: jax.Array) -> jax.Array:
        rows_key, key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(y))
        logits = nnx.merge(graph, params)(x[rows], rates=[setting[name] for name in RATES], key=key)
        return cross_entropy(logits, y[rows])

    logits = lambda params, x: nnx.merge(graph, params)(x)
    validation_loss = lambda params: cross_entropy(logits(params, valid[0]), valid[1])
    run = _search.trainer(training_loss, validation_loss, adam(steps), steps=steps, every=5)
    return lambda setting: run(params, setting, key), logits


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    width, calls, trials = (16, 4, 2) if options.smoke else (100, 600, 12)
    train, valid, test = digits(options.seed, [300, 200])
    result, network, seconds = self_tuned(train, valid, width, calls, options.seed)
    nll = lambda logits: float(cross_entropy(logits, test[1]))
    numbers["validation_nll_stn"] = result.best.value
    numbers["test_nll_stn"] = nll(network(result.best.params, test[0]))
    numbers["test_nll_stn_last"] = nll(network(result.params, test[0]))
    numbers["validation_nll_stn_last"] = result.history.value[-1]
    numbers["rates_at_best"] = {name: result.best.hparams[name] for name in RATES}
    numbers["seconds_stn"] = seconds
    if not options.smoke:
        draw_schedules(result, RANGES, "Dropout rates learned while training", options.out / "schedules.png")

    evaluate, plain = fixed(train, valid, width, 5 * calls, options.seed)
    points = {"input": 3, "hidden 1": 2, "hidden 2": 2} if trials == 12 else dict.fromkeys(RATES, 1)
    settings = {
        "grid": list(_search.grid(RANGES, points)),
        "random": list(_search.random(RANGES, trials, options.seed)),
    }
    searches = {name: [evaluate(setting) for setting in progress(chosen, name)] for name, chosen in settings.items()}
    searches["tpe"] = _search.tpe(RANGES, trials, options.seed, evaluate)
    none = evaluate(dict.fromkeys(RATES, 0.0))
    numbers["test_nll_no_dropout"] = nll(plain(none.params, test[0]))
    retrained = evaluate({name: float(result.best.hparams[name]) for name in RATES})
    numbers["test_nll_retrained"] = nll(plain(retrained.params, test[0]))
    for name, runs in searches.items():
        if runs:
            chosen = _search.best(runs)
            numbers[f"validation_nll_{name}"] = chosen.value
            numbers[f"test_nll_{name}"] = nll(plain(chosen.params, test[0]))
            numbers[f"seconds_{name}"] = sum(run.seconds for run in runs)
    chosen = _search.best([run for runs in searches.values() for run in runs])
    numbers["test_nll_best_fixed"] = nll(plain(chosen.params, test[0]))
    numbers["rates_best_fixed"] = chosen.setting
    numbers["cost_ratio"] = seconds / np.mean([sum(run.seconds for run in runs) for runs in searches.values() if runs])
    numbers["excess"] = numbers["test_nll_stn"] - numbers["test_nll_best_fixed"]


if __name__ == "__main__":
    experiment(__file__, __doc__, measure)

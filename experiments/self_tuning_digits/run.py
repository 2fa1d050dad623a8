"""Three dropout rates tuned in one training run, against random search that costs as much.

    python experiments/self_tuning_digits/run.py --seed 0 --json

A network of two hidden layers on 300 digits overfits without dropout. The self-tuned network learns how its weights
respond to the three rates (one draw for each example), and moves the rates down the validation loss as it trains.
Costs are in runs at fixed rates: what one to twelve of them buy, on average over all subsets of 24 random settings, is
held against shorter self-tuned runs, one of full length, and the best of several.

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
from experiments import _figures as style
from experiments import _search
from experiments._common import experiment, progress
from experiments._data import Split, digits
from experiments._self_tuning import cross_entropy

RATES = ("input", "hidden 1", "hidden 2")
RANGES = dict.fromkeys(RATES, (0.0, 0.9, "real"))
DOMAIN = hg.domains.interval(0, 0.9)
CONVENTIONAL = (0.2, 0.5, 0.5)  # Srivastava et al. 2014
BATCH = 100
START = 0.05  # where tuning begins
SCALE = 2.0  # of the perturbation, in unconstrained coordinates: wide, most of the range is seen from the start
SHORT = (145, 290)  # outer steps of self-tuned runs that cost about as much as one and two fixed runs
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
    width, full, pool, starts = (16, 6, 3, 1) if options.smoke else (100, 600, 24, 3)
    train, valid, test = digits(options.seed, [300, 200])
    nll = lambda logits: float(cross_entropy(logits, test[1]))

    evaluate, plain = fixed(train, valid, width, 5 * full, options.seed)
    runs = [evaluate(s) for s in progress(list(_search.random(RANGES, pool, options.seed)), "random search")]
    pairs = [(run.value, nll(plain(run.params, test[0]))) for run in runs]
    a_run = float(np.mean([run.seconds for run in runs]))
    numbers["seconds_fixed"] = a_run
    curve = [_search.expected_best(pairs, count) for count in range(1, min(12, pool) + 1)]
    numbers["random_curve"] = curve
    for name, rates in {"no_dropout": (0.0, 0.0, 0.0), "conventional": CONVENTIONAL}.items():
        numbers[f"test_{name}"] = nll(plain(evaluate(dict(zip(RATES, rates, strict=True))).params, test[0]))

    # Self-tuned runs that cost about one fixed run and two, with schedules of their own length; then full ones.
    lengths = () if options.smoke else SHORT
    short = [self_tuned(train, valid, width, calls, options.seed) for calls in lengths]
    whole = [self_tuned(train, valid, width, full, options.seed + 1000 * i) for i in range(starts)]
    found = [(r.best.value, nll(network(r.best.params, test[0]))) for r, network, _ in whole]
    cost = float(np.mean([seconds for *_, seconds in whole])) / a_run
    numbers["cost"] = cost
    numbers["short_cost"] = [seconds / a_run for *_, seconds in short]
    numbers["short_test"] = [nll(network(r.best.params, test[0])) for r, network, _ in short]
    numbers["starts_test"] = [_search.expected_best(found, count) for count in range(1, starts + 1)]
    result, network, _ = whole[0]
    numbers["test_nll_stn"], numbers["test_nll_stn_last"] = found[0][1], nll(network(result.params, test[0]))
    numbers["rates_at_best"] = {name: result.best.hparams[name] for name in RATES}
    retrained = evaluate({name: float(result.best.hparams[name]) for name in RATES})
    numbers["test_nll_retrained"] = nll(plain(retrained.params, test[0]))
    every = max(full // 60, 1)
    numbers["rates"] = {name: result.history.hparams[name][::every] for name in RATES}
    numbers["validation"] = result.history.value[::every]

    # What was bought at each price: of ours the longest that costs no more, within a tenth.
    offers = [*zip(numbers["short_cost"], numbers["short_test"], strict=True)]
    offers += [(cost * (i + 1), value) for i, value in enumerate(numbers["starts_test"])]
    numbers["at_cost"] = {}
    for price in (1, 2, 4, 12) if not options.smoke else (1,):
        paid = [value for each, value in offers if each <= 1.1 * price] or [None]
        ours, theirs = paid[-1], curve[price - 1]
        gain = None if ours is None else theirs - ours
        numbers["at_cost"][str(price)] = {"self_tuned": ours, "random": theirs, "gain": gain}
    numbers["gain_over_conventional"] = numbers["test_conventional"] - numbers["test_nll_stn"]


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12, 4.8)
    left, right = canvas.subplots(1, 2, width_ratios=(1.15, 1))
    runs = np.arange(1, 13)
    random = np.array(style.each(results, "random_curve"))
    left.errorbar(runs, *style.mean_and_error(random), color=style.ORANGE, capsize=3, label="random search")
    costs = [[*short, *(cost * np.arange(1, len(starts) + 1))] for short, cost, starts in zip(
        *(style.each(results, name) for name in ("short_cost", "cost", "starts_test")), strict=True)]  # fmt: skip
    tests = [[*short, *starts] for short, starts in zip(
        *(style.each(results, name) for name in ("short_test", "starts_test")), strict=True)]  # fmt: skip
    ours = np.mean(costs, 0), *style.mean_and_error(tests)
    left.errorbar(*ours, fmt="o-", color=style.BLUE, capsize=3, label="self-tuned")
    for at, name, color, text in (
        (0.85, "test_no_dropout", style.PINK, "one run without dropout"),
        (1.15, "test_conventional", style.GREEN, "one run at rates .2, .5, .5"),
    ):
        mean, error = style.mean_and_error(style.each(results, name))
        left.errorbar([at], [mean], [error], fmt="s", color=color, capsize=3, label=text)
    style.titled(left, "What a budget buys", xlabel="cost, in runs at fixed rates", ylabel="test loss, nats")
    left.set_xlim(0, 13)
    share = np.linspace(0, 1, len(next(iter(results.values()))["validation"]))
    for name, color in zip(RATES, (style.BLUE, style.ORANGE, style.GREEN), strict=True):
        style.curves(right, share, style.each(results, f"rates.{name}"), color, f"rate, {name}")
    style.titled(right, "The rates, while they are learned", xlabel="share of the run", ylabel="dropout rate")
    right.set_ylim(0, 0.9)
    style.legend(canvas, left, right, columns=4)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

"""What a self-tuned run is compared with: runs at fixed hyperparameters, chosen by grid, random and Optuna search.

Every run keeps its parameters at the best validation loss, as the self-tuned one does, and is charged its processor
time without compilation.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Ranges = Mapping[str, tuple[float, float, str]]  # (low, high, "real" or "integer") by name


class Run(NamedTuple):
    """A run at fixed hyperparameters.

    Attributes:
        setting: hyperparameters by name.
        value: lowest validation loss.
        last: the validation loss at the end.
        params: parameters at the lowest.
        seconds: processor time.
    """

    setting: dict[str, float]
    value: float
    last: float
    params: PyTree
    seconds: float


def trainer(
    training_loss: Callable[[PyTree, PyTree, jax.Array], jax.Array],
    validation_loss: Callable[[PyTree], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    every: int,
) -> Callable[[PyTree, Mapping[str, float], jax.Array], Run]:
    """`(params, setting, key) -> Run`, compiled once for all settings.

    Args:
        training_loss: `(params, setting, key)`; draws its batch from the key.
        validation_loss: `params -> loss`, looked at every so many steps.
        optimizer: of the parameters.
        steps: training steps.
        every: steps between two looks.
    """

    @jax.jit
    def train(params: PyTree, setting: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
        def step(carry: tuple[PyTree, PyTree], key: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(training_loss)(params, setting, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        def look(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
            now, best, lowest = carry
            now, _ = jax.lax.scan(step, now, keys)
            value = validation_loss(now[0])
            better = value < lowest
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now[0], best)
            return (now, best, jnp.where(better, value, lowest)), value

        keys = jax.random.split(key, (steps // every, every))
        start = ((params, optimizer.init(params)), params, jnp.asarray(jnp.inf))
        (_, best, lowest), values = jax.lax.scan(look, start, keys)
        return best, lowest, values[-1]

    compiled: list[Any] = []

    def run(params: PyTree, setting: Mapping[str, float], key: jax.Array) -> Run:
        traced = {name: jnp.asarray(value, jnp.float32) for name, value in setting.items()}
        if not compiled:
            compiled.append(train.lower(params, traced, key).compile())
        began = time.process_time()
        best, lowest, last = jax.block_until_ready(compiled[0](params, traced, key))
        return Run(dict(setting), float(lowest), float(last), best, time.process_time() - began)

    return run


def grid(ranges: Ranges, points: Mapping[str, int]) -> Iterator[dict[str, float]]:
    """Every combination of `points[name]` values spread evenly over each range, its upper end left out."""
    axes = []
    for name, (low, high, kind) in ranges.items():
        values = low + (high - low) * np.arange(points[name]) / points[name]
        axes.append(np.round(values) if kind == "integer" else values)
    for values in itertools.product(*axes):
        yield dict(zip(ranges, map(float, values), strict=True))


def random(ranges: Ranges, count: int, seed: int) -> Iterator[dict[str, float]]:
    """Uniform over the ranges."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {name: _draw(rng, *limits) for name, limits in ranges.items()}


def tpe(ranges: Ranges, count: int, seed: int, evaluate: Callable[[dict[str, float]], Run]) -> list[Run]:
    """Optuna's tree-structured Parzen estimator, one run after the other; none where Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(count // 3, 1)))
    runs = []
    for _ in range(count):
        trial = study.ask()
        setting = {
            name: float(trial.suggest_int(name, int(low), int(high)))
            if kind == "integer"
            else trial.suggest_float(name, low, high)
            for name, (low, high, kind) in ranges.items()
        }
        runs.append(evaluate(setting))
        study.tell(trial, runs[-1].value)
    return runs


def best(runs: Iterable[Run]) -> Run:
    """The run with the lowest validation loss."""
    return min(runs, key=lambda run: run.value)


def expected_best(runs: Sequence[tuple[float, float]], count: int) -> float:
    """What a search of `count` of these runs finds, on average over all of their subsets of that size, exactly.

    Args:
        runs: `(validation loss, test loss)` of each.
        count: runs of a search, at most `len(runs)`.

    Returns:
        The mean test loss of the run with the lowest validation loss of a subset.

    >>> expected_best([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)], 2)  # of three pairs two have the first
    13.333333333333334
    """
    ordered = sorted(runs)
    first = [math.comb(len(ordered) - 1 - i, count - 1) for i in range(len(ordered))]  # subsets whose best is run i
    return sum(n * test for n, (_, test) in zip(first, ordered, strict=True)) / math.comb(len(ordered), count)


class Clock:
    """A callback of `hg.tune` that counts processor time from the end of the first step, which compiles."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def __call__(self, step: int, metrics: Any) -> None:
        self.ended = time.process_time()
        if step == 0:
            self.began = self.ended

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def _draw(rng: np.random.Generator, low: float, high: float, kind: str) -> float:
    return float(rng.integers(int(low), int(high) + 1)) if kind == "integer" else float(rng.uniform(low, high))

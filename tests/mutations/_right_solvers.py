"""Right solvers on random problems, which `hg.check` must confirm: methods, precisions, and losses that draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from tests.mutations import _check_bugs as table

SEEDS = 22


def _loss_with_noise(w: Any, h: Any, batch: Any, key: Any) -> Any:
    """Noise on the features, of a strength that is tuned."""
    x, y = batch
    x = x + jnp.exp(h["noise"]) * jax.random.normal(key, x.shape, x.dtype)
    return jnp.mean((x @ w - y) ** 2) + jnp.exp(h["l2"]) * jnp.sum(w**2)


def _poisson_loss(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    rate = x @ w
    return jnp.mean(jnp.exp(rate) - jnp.round(jnp.abs(y)) * rate) + jnp.sum(jnp.exp(h["l2"]) * w**2)


def _weighted_loss(w: Any, h: Any, batch: Any) -> Any:
    """A weight for each training row."""
    x, y = batch
    return jnp.mean(jax.nn.softplus(h["weights"]) * (x @ w - y) ** 2) + 0.1 * jnp.sum(w**2)


def _outer(w: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def _weights(rng: np.random.Generator, dtype: Any) -> Any:
    return {"weights": jnp.asarray(rng.normal(size=20), dtype)}


def _decays(rng: np.random.Generator, dtype: Any) -> Any:
    return {"l2": jnp.asarray(rng.uniform(-3, 1, 5), dtype)}


def _noisy(rng: np.random.Generator, dtype: Any) -> Any:
    return {"noise": jnp.asarray(rng.uniform(-3, -1), dtype), "l2": jnp.asarray(rng.uniform(-4, -1), dtype)}


# name: (solver, hyperparameters, whether it draws, whether data come in minibatches)
_MORE: dict[str, tuple[hg.Solver, Callable[..., Any], bool, bool]] = {
    "ridge, L-BFGS": (hg.implicit(table.RIDGE, inner=hg.inner.lbfgs()), table.ridge_hparams, False, False),
    "Poisson": (hg.implicit(hg.Problem(_poisson_loss, _outer)), _decays, False, False),
    "weights of rows": (hg.implicit(hg.Problem(_weighted_loss, _outer)), _weights, False, False),
    "noise at the optimum": (hg.implicit(hg.Problem(_loss_with_noise, _outer)), _noisy, True, False),
    "minibatches, Adam": (
        hg.unrolled(table.RIDGE, inner=hg.inner.gradient(optax.adam(0.05), steps=20)),
        table.ridge_hparams,
        True,
        True,
    ),
}


def right_solvers(seeds: int = SEEDS) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`(name, call)` with `call() -> Report`, half of the seeds in float32; a solver is compiled once a precision."""
    precisions = [jnp.float32] if not jax.config.read("jax_enable_x64") else [jnp.float64, jnp.float32]
    for seed in range(seeds):
        dtype = precisions[seed % len(precisions)]
        label = f"seed {seed}, {jnp.dtype(dtype).name}"
        for case in table.cases(1000 + seed, dtype):
            yield f"{case.name}, {label}", case.check
        for i, (name, (solver, hparams, draws, batches)) in enumerate(_MORE.items()):
            rng = np.random.default_rng([2000 + seed, i])
            train, valid = table.regression(rng, 20, 5, dtype)
            train = hg.minibatches(train, 8) if batches else train
            h, key = hparams(rng, dtype), jax.random.key(seed) if draws else None

            def call(solver: Any = solver, h: Any = h, train: Any = train, valid: Any = valid, key: Any = key) -> Any:
                start = jnp.zeros(5, jnp.result_type(jax.tree.leaves(h)[0]))
                return hg.check(solver, start, h, train, valid, key=key)

            yield f"{name}, {label}", call

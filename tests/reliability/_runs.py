"""Small runs of `hg.tune`, and what it means that two results are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from tests.outer import _ridge
from tests.outer._ridge import TRAIN

KEY = jax.random.key(7)


def loss(w: Any, hparams: Any, batch: Any, key: Any = None) -> jax.Array:
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * hparams["l2"] * jnp.sum(w**2)


PROBLEM = hg.Problem(loss, lambda w, hparams, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2))
SOLVERS: dict[str, Callable[[], hg.Solver]] = {
    "implicit": lambda: hg.implicit(
        PROBLEM, inner=hg.inner.gradient(optax.adam(0.05), steps=4), linear=hg.linear.neumann(max_steps=3)
    ),
    "unrolled": lambda: hg.unrolled(PROBLEM, inner=hg.inner.gradient(optax.adam(0.05), steps=4)),
}


def run(folder: Any = None, **options: Any) -> hg.Result:
    """The ridge that differentiates its closed form, on minibatches: it is traced and compiled fastest."""
    given: dict[str, Any] = {"train": hg.minibatches(TRAIN, 10), "key": KEY, "steps": 12, "every": 4}
    return _ridge.run(checkpoint=folder, **{**given, **options})


def bits(result: hg.Result) -> list[Any]:
    """Everything in a result but wall times, in bits."""
    history = result.history._replace(seconds=np.zeros(len(result.history.seconds)))
    leaves = jax.tree.leaves(tuple(result._replace(history=tuple(history), status=None, run=None)))  # pyright: ignore
    assert len(leaves) > 20
    return [(str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes()) for x in leaves]


def assert_same(found: hg.Result, expected: hg.Result) -> None:
    assert found.status == expected.status
    assert len(found.history.value) == len(expected.history.value)
    assert jax.tree.structure(found.state) == jax.tree.structure(expected.state)
    assert bits(found) == bits(expected)


def at(step: int, action: Callable[[], Any]) -> Callable[..., Any]:
    """A callback that does something after one step."""
    return lambda found, metrics: action() if found == step else None


def interrupt() -> None:
    raise KeyboardInterrupt

"""One task, two losses and one run for the models of every library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg


def images(rows: int = 12, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Pictures `[rows, 6, 6, 1]` and labels in {0, 1, 2}."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    x = rng.normal(size=(rows, 6, 6, 1)) + labels[:, None, None, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels)


def problem(model: Any, shape: Any = lambda x: x) -> hg.Problem:
    """Cross entropy with a decay for each leaf."""

    def entropy(logits: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def inner_loss(params, hparams, batch, key, model_state):
        x, y = batch
        logits, model_state = model.train(params, model_state, shape(x), key)
        decay = sum(jnp.exp(h) * jnp.sum(w**2) for h, w in zip(hparams, jax.tree.leaves(params), strict=True))
        return entropy(logits, y) + decay, model_state

    def outer_loss(params, hparams, batch, key, model_state):
        x, y = batch
        return entropy(model.evaluate(params, model_state, shape(x)), y)

    return hg.Problem(inner_loss, outer_loss, model_state=True)


def run(model: Any, build: Any, shape: Any = lambda x: x) -> tuple[Any, Any]:
    """One jitted hypergradient."""
    solver = build(problem(model, shape))
    hparams = [jnp.full((), -4.0, jnp.float32) for _ in jax.tree.leaves(model.params)]
    state = solver.init(model.params, hparams, key=jax.random.key(0), model_state=model.model_state)
    return jax.jit(solver.hypergrad)(state, hparams, images(), images(seed=1), key=jax.random.key(1))


def unrolled(p: hg.Problem) -> hg.Solver:
    return hg.unrolled(p, inner=hg.inner.gradient(optax.adam(1e-2), steps=3), mode="reverse")


def implicit(p: hg.Problem) -> hg.Solver:
    inner = hg.inner.gradient(optax.adam(1e-2), steps=3)
    return hg.implicit(p, inner=inner, linear=hg.linear.identity(step_size=1e-2))

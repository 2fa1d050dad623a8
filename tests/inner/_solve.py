"""One inner solve, as the solvers call it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad._problem import bind_inner


def problem(loss, model_state=False):
    return hg.Problem(loss, lambda *_: jnp.zeros(()), model_state=model_state)


def solve(
    inner: Any,
    loss: Any,
    params: Any,
    hparams: Any = 0.0,
    data: Any = None,
    *,
    state: Any = None,
    key: Any = None,
    model_state: Any = None,
    scale: Any = 1.0,
    options: Any = None,
):
    """The result of one solve, from the state of `inner.init` unless another is given."""
    state = inner.init(params, hparams) if state is None else state
    options = {**inner.options, **(options or {})}

    @jax.jit
    def run(params, state, hparams, data, key, model_state, scale, options):
        objective = bind_inner(problem(loss, model_state is not None), data, key, model_state)
        return inner.solve(objective, params, state, hparams, model_state, scale=scale, options=options)

    return run(params, state, hparams, data, key, model_state, jnp.asarray(scale, jnp.result_type(float)), options)


def status(result):
    return hg.Status(int(result.status)).name


def told_apart(
    problems: int, *, rows: int = 40, features: int = 10, classes: int = 3, size: float = 1.0
) -> tuple[Any, Any, Any]:
    """Softmax regression on rows that can be told apart, `[problems]`: `(loss, start, data)`.

    Its values are small differences of large logits, which lose more digits than their own size tells.
    """
    rng = np.random.default_rng(0)
    x = size * rng.normal(size=(problems, rows, features))
    y = np.eye(classes)[np.argmax(x @ rng.normal(size=(problems, features, classes)), -1)]

    def loss(w: Any, decay: Any, batch: Any) -> Any:
        x, y = batch
        logits = x @ w
        return decay * jnp.sum(w**2) + jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.sum(y * logits, 1))

    return loss, jnp.zeros((features, classes)), (jnp.asarray(x), jnp.asarray(y))

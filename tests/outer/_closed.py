"""A solver that is a closed form: controllers are tested on what they do, not on what a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hypergrad as hg


class State(NamedTuple):
    """Options that a controller may set, and the number of calls."""

    options: dict[str, Any]
    calls: Any


def closed(loss: Callable[[Any], Any]) -> hg.Solver:
    """`loss(hparams)` and its derivative; `info.extra` reports the tolerance it was asked for."""

    def init(params: Any, hparams: Any, *, key: Any = None, model_state: Any = None) -> State:
        number = jnp.asarray(0.5, jnp.result_type(float))
        return State({"inner": {"tol": number}, "linear": {"tol": number}}, jnp.int32(0))

    def info(state: State, value: Any) -> hg.Info:
        zero = jnp.zeros((), value.dtype)
        status = jnp.where(jnp.isfinite(value), 0, int(hg.Status.NONFINITE_LOSS)).astype(jnp.int32)
        steps = jnp.int32(0)
        return hg.Info(status, zero, zero, steps, steps, zero, {"asked": state.options["inner"]["tol"]})

    def hypergrad(state: State, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        value, grad = jax.value_and_grad(loss)(hparams)
        return hg.Hypergradient(value, grad, info(state, value), {}), state._replace(calls=state.calls + 1)

    def evaluate(state: State, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        value = loss(hparams)
        return value, info(state, value), state

    about = hg.About("closed", options=("inner.tol", "linear.tol"))
    return hg.Solver(init, hypergrad, lambda state, hparams: jnp.zeros(1), evaluate, about)

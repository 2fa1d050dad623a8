"""A ridge problem with a closed form, and solvers for it that are right, or wrong in a known way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._solver import Hypergradient, Info, Solver, Status

PyTree = Any


class State(NamedTuple):
    params: Any
    inner_state: Any
    model_state: Any
    options: dict


def make_info(**fields: Any) -> Info:
    nothing = jnp.zeros(())
    given = {
        "status": jnp.int32(Status.OK),
        "inner_residual": nothing,
        "linear_residual": nothing,
        "inner_steps": nothing,
        "linear_steps": nothing,
        "error_estimate": nothing,
        "extra": {},
    }
    return Info(**(given | fields))


def data(dtype: Any = None, seed: int = 0, rows: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(rows, 4)), np.asarray([1.0, -2.0, 0.5, 0.3])
    dtype = dtype or jnp.result_type(float)
    return jnp.asarray(x, dtype), jnp.asarray(x @ w + rng.normal(size=rows), dtype)


def hparams(dtype: Any = None) -> PyTree:
    dtype = dtype or jnp.result_type(float)
    return {"l2": jnp.asarray([0.3, -0.4, 0.2, -1.1], dtype), "none": None, "shift": jnp.asarray(0.7, dtype)}


@jax.jit
def best_response(hparams: PyTree, train: Any) -> Any:
    """argmin ‖X w − y‖²/n + Σ exp(l2) w²."""
    x, y = train
    n = x.shape[0]
    return jnp.linalg.solve(x.T @ x / n + jnp.diag(jnp.exp(hparams["l2"])), x.T @ y / n)


def outer_loss(w: Any, hparams: PyTree, valid: Any) -> Any:
    x, y = valid
    return jnp.mean((x @ w + hparams["shift"] - y) ** 2) + 0.05 * jnp.sum(hparams["l2"] ** 2)


@jax.jit
def outer_of(hparams: PyTree, train: Any, valid: Any) -> Any:
    return outer_loss(best_response(hparams, train), hparams, valid)


def solver(
    change=lambda total, direct: total,
    info=lambda grad: make_info(),
    value=lambda value, hparams, key: value,
    response=best_response,
) -> Solver:
    """A solver by the closed form, whose hypergradient is `change(total, direct)`."""

    def init(params, hparams, *, key=None, model_state=None):
        return State(params, (), model_state, {})

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        def total(h):
            return value(outer_loss(response(h, train), h, valid), h, key)

        w = response(hparams, train)
        out, grad = jax.value_and_grad(total)(hparams)
        direct = jax.grad(lambda h: value(outer_loss(w, h, valid), h, key))(hparams)
        grad = change(grad, direct)
        return Hypergradient(out, grad, info(grad), {}), state._replace(params=w)

    return Solver(init, hypergrad, lambda state, hparams: state.params)

"""The smallest solver that is exact: ten Newton steps and a dense solve, which compile in no time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from tests.diagnostics._ridge import make_info


class State(NamedTuple):
    params: Any


def newton(problem: hg.Problem, steps: int = 10) -> hg.Solver:
    """Implicit differentiation of losses without key or model state."""

    def init(params: Any, hparams: Any, *, key: Any = None, model_state: Any = None) -> State:
        del hparams, key, model_state
        return State(params)

    def solve(state: State, hparams: Any, train: Any) -> tuple[Any, Any, Any]:
        start, unravel = ravel_pytree(state.params)
        loss = lambda w: problem.inner_loss(unravel(w), hparams, train)  # pyright: ignore[reportOptionalCall]
        hessian = jax.hessian(loss)
        w = jax.lax.fori_loop(0, steps, lambda _, w: w - jnp.linalg.solve(hessian(w), jax.grad(loss)(w)), start)
        return w, unravel, hessian(w)

    def hypergrad(state: State, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        del key
        w, unravel, hessian = solve(state, hparams, train)
        outer = lambda w, h: problem.outer_loss(unravel(w), h, valid)
        value, (rhs, direct) = jax.value_and_grad(outer, argnums=(0, 1))(w, hparams)
        adjoint = jnp.linalg.solve(hessian, rhs)
        inner = lambda h, w: problem.inner_loss(unravel(w), h, train)  # pyright: ignore[reportOptionalCall]
        cross = jax.jvp(lambda w: jax.grad(inner)(hparams, w), (w,), (adjoint,))[1]
        grad = jax.tree.map(jnp.subtract, direct, cross)
        status = jnp.where(jnp.isfinite(value), hg.Status.OK, hg.Status.NONFINITE_LOSS).astype(jnp.int32)
        info = make_info(status=status, error_estimate=jnp.asarray(1e-6, value.dtype))
        return hg.Hypergradient(value, grad, info, {}), State(unravel(w))

    def evaluate(state: State, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        del key
        w, unravel, _ = solve(state, hparams, train)
        return problem.outer_loss(unravel(w), hparams, valid), make_info(), State(unravel(w))

    response = lambda state, hparams: state.params
    return hg.Solver(init, hypergrad, response, evaluate, hg.About("newton", "optimum"))

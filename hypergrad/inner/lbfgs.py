r"""L-BFGS: the default inner solver for smooth losses.

    w ← w − t B F,     B ≈ H⁻¹ from the last few pairs (Δw, ΔF),     t by a zoom line search

Source: Liu & Nocedal 1989, "On the limited memory BFGS method"; the implementation is `optax.lbfgs`. Differs: the stopping
test is relative to the natural size of F, and what stopped the solve is a status.
Cost: about 1.2 gradients a step. Memory: two vectors for each pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_options, suggest_names
from hypergrad._options import default_tol
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, InnerResult, gradient_residual

_MAX_STEPS = 500


class _Carry(NamedTuple):
    params: PyTree
    state: Any
    value: Array
    grad: PyTree
    residual: Array
    steps: Array
    status: Array


@suggest_names
def lbfgs(tol: ArrayLike | None = None, max_steps: ArrayLike | None = None, *, history: int = 10) -> Inner:
    """Minimise the inner loss by L-BFGS with a line search.

    Args:
        tol: tolerance on the gradient norm, relative to its natural scale (dimensionless). Default: what the precision
            supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: most steps. Default 500.
        history: pairs that approximate the inverse Hessian.

    Raises:
        InputError: for a negative tolerance or step count.

    >>> import hypergrad as hg
    >>> inner = hg.inner.lbfgs(tol=1e-8)
    """
    check_options("lbfgs", tol=tol, max_steps=max_steps, history=history)
    options = {"tol": tol, "max_steps": _MAX_STEPS if max_steps is None else max_steps}
    return Inner(init=lambda params, hparams: (), solve=partial(_solve, history=history), options=options, claims=True,
                 symmetric=True, residual=gradient_residual)


def _solve(objective: Objective, params: PyTree, state: PyTree, hparams: PyTree, model_state: PyTree, *,
           scale: Array, options: Mapping[str, ArrayLike], history: int) -> InnerResult:
    target = default_tol(options["tol"], params) * scale
    max_steps = jnp.asarray(options["max_steps"], jnp.int32)
    optimizer = optax.lbfgs(memory_size=history)
    loss = lambda w: objective.fixed(w, hparams)
    evaluate = optax.value_and_grad_from_state(loss)
    value, grad = jax.value_and_grad(loss)(params)

    def proceed(c: _Carry) -> Array:
        return (c.steps < max_steps) & (c.residual > target) & (c.status == int(Status.OK))

    def step(c: _Carry) -> _Carry:
        updates, state = optimizer.update(c.grad, c.state, c.params, value=c.value, grad=c.grad, value_fn=loss)
        params = optax.apply_updates(c.params, updates)
        value, grad = evaluate(params, state=state)
        residual = _tree.norm(grad)
        fine = jnp.isfinite(value) & jnp.isfinite(residual)
        moved = _tree.max_abs(updates) > 0
        status = jnp.where(~fine, int(Status.NONFINITE_LOSS), jnp.where(moved, int(Status.OK), int(Status.INNER_STALLED)))
        return _Carry(_tree.where(fine, params, c.params), state, value, grad, residual, c.steps + 1,
                      status.astype(jnp.int32))

    first = _tree.norm(grad)
    broken = jnp.where(jnp.isfinite(value), jnp.where(jnp.isfinite(first), int(Status.OK), int(Status.NONFINITE_GRAD)),
                       int(Status.NONFINITE_LOSS)).astype(jnp.int32)
    c = jax.lax.while_loop(proceed, step, _Carry(params, optimizer.init(params), value, grad, first, jnp.int32(0), broken))
    missed = (c.status == int(Status.OK)) & (c.residual > target)
    status = jnp.where(missed, int(Status.INNER_MAX_STEPS), c.status).astype(jnp.int32)
    return InnerResult(c.params, state, model_state, c.residual, c.steps, status)

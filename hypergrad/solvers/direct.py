r"""First order only: what the outer loss sees of the hyperparameters directly, at the parameters that training found.

    g = ∂_λ f(w, λ)   at w ≈ w*(λ)

Exact where the solution does not matter to first order: the outer loss *is* the inner one (the envelope theorem;
evidence objectives), or does not depend on the parameters. Elsewhere it is a bias that buys speed, as in first-order
DARTS.

Source: Liu, Simonyan & Yang 2019, arXiv:1806.09055 (ξ = 0). Differs: the outer gradient with respect to the parameters
is reported, since it is what is left out. Cost: the inner solve and a gradient of the outer loss. Memory O(|w|).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_data, check_hparams, check_params
from hypergrad._options import as_options, options
from hypergrad._problem import PROBLEM, Problem, bind_inner, bind_outer
from hypergrad._solver import Hypergradient, Info, Solver, Status, code, first_failure
from hypergrad._tree import PyTree
from hypergrad.inner._inner import INNER, Inner
from hypergrad.inner._optimum import find_optimum


class DirectState(NamedTuple):
    """What the next call starts from.

    Attributes:
        params: inner solution. pytree like the parameters.
        inner_state: state of the inner optimizer.
        model_state: state of the model (batch-norm statistics), or None.
        scale: natural size of the inner residual, scalar; 0 before the first call.
        options: `{"inner": ...}`, scalars that may be replaced between calls without recompiling.
    """

    params: PyTree
    inner_state: PyTree
    model_state: PyTree
    scale: Array
    options: dict[str, Any]


@options(problem=PROBLEM, inner=INNER)
def direct(problem: Problem, *, inner: Inner) -> Solver:
    """The direct derivative ∂outer/∂λ alone, with the parameters that the inner solver finds held fixed.

    Args:
        problem: the two losses.
        inner: how parameters are found; each call goes on from where the last one ended.

    Returns:
        A `Solver`. `info.linear_residual` is NaN. `info.error_estimate` is infinite, since nothing is known of the part
        that is left out, unless the outer loss has no gradient with respect to the parameters;
        `info.extra["outer_grad_norm"]` is the norm of that gradient.

    Raises:
        InputTypeError: for an unknown option; from `init` and `hypergrad`, for leaves that are no real numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2),
    ...                      lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2))
    >>> solver = hg.direct(problem, inner=hg.inner.lbfgs())
    >>> out, state = solver.hypergrad(solver.init(jnp.zeros(1), 1.0), 1.0)
    >>> print(f"{out.grad:.4f}")  # w = 1/2, and the envelope theorem
    0.2500
    """

    def init(params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None) -> DirectState:
        del key
        params, hparams = check_params(params), check_hparams(hparams)
        return DirectState(
            params,
            inner.init(params, hparams),
            model_state,
            jnp.zeros((), _tree.dtype(params)),
            {"inner": as_options(inner.options, params)},
        )

    def hypergrad(
        state: DirectState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, DirectState]:
        hparams = check_hparams(hparams)
        check_data("train", train)
        check_data("valid", valid)
        inner_key, outer_key, probe_key = (None, None, None) if key is None else jax.random.split(key, 3)
        objective = bind_inner(problem, train, inner_key, state.model_state)
        # What is wrong with the outer loss is said before the inner problem is solved.
        jax.eval_shape(bind_outer(problem, valid, outer_key, state.model_state), state.params, hparams)
        optimum = find_optimum(
            inner,
            objective,
            state.params,
            state.inner_state,
            state.model_state,
            hparams,
            scale=state.scale,
            options=state.options["inner"],
            polish_steps=0,
            preconditioner=None,
            key=jax.random.key(0) if probe_key is None else probe_key,
        )
        outer = bind_outer(problem, valid, outer_key, optimum.model_state)
        differentiate = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)
        (value, metrics), (rhs, grad) = differentiate(optimum.params, hparams)
        left_out = _tree.norm(rhs)
        status = first_failure(
            code(~jnp.isfinite(value), Status.NONFINITE_LOSS),
            optimum.status,
            code(~(_tree.all_finite(grad) & _tree.all_finite(rhs)), Status.NONFINITE_GRAD),
            code((_tree.max_abs(grad) == 0) & (left_out > 0), Status.INSENSITIVE),
        )
        info = Info(
            status=status,
            inner_residual=optimum.residual,
            linear_residual=jnp.full_like(left_out, jnp.nan),
            inner_steps=optimum.steps,
            linear_steps=jnp.int32(0),
            error_estimate=jnp.where(left_out > 0, jnp.inf, optimum.residual.astype(left_out.dtype)),
            extra={"outer_grad_norm": left_out},
        )
        state = state._replace(
            params=optimum.params,
            inner_state=optimum.inner_state,
            model_state=optimum.model_state,
            scale=jnp.where(jnp.isfinite(optimum.scale), optimum.scale, state.scale),
        )
        return Hypergradient(value, grad, info, metrics), state

    def response(state: DirectState, hparams: PyTree) -> PyTree:
        del hparams
        return state.params

    return Solver(init, hypergrad, response)

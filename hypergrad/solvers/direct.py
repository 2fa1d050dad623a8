r"""First order only: how the outer loss depends directly on the hyperparameters, at the parameters that training found.

    g = ∂_λ f(w, λ)   at w ≈ w*(λ)

This is exact where the solution does not matter to first order: where the outer loss *is* the inner one (the envelope
theorem; evidence objectives), or does not depend on the parameters. Elsewhere it accepts a bias in exchange for speed,
as in first-order DARTS.

Source: Liu, Simonyan & Yang 2019, arXiv:1806.09055 (ξ = 0). Differs: the outer gradient with respect to the parameters
is reported, since it is what the method leaves out. Cost: the inner solve and a gradient of the outer loss. Memory
O(|w|).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params
from hypergrad._options import as_options, options
from hypergrad._problem import PROBLEM, Problem
from hypergrad._solver import About, Hypergradient, Info, Solver, first_failure
from hypergrad._tree import PyTree
from hypergrad.inner._inner import INNER, Inner
from hypergrad.inner._optimum import Optimum, find_optimum
from hypergrad.solvers._call import (
    Call,
    bad_grad,
    bad_loss,
    bind,
    current_params,
    differentiate_outer,
    framed,
    go_on_from,
    no_influence,
    option_names,
    report,
)


class DirectState(NamedTuple):
    """The state from which the next call starts.

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
        A `Solver`. `info.linear_residual` is NaN. `info.error_estimate` is infinite, since nothing is known about the
        part that is left out, unless the outer loss has no gradient with respect to the parameters;
        `info.extra["outer_grad_norm"]` is the norm of that gradient.

    Raises:
        InputTypeError: for an unknown option; from `init` and `hypergrad`, for leaves that are not real numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2),
    ...                      lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2))
    >>> solver = hg.direct(problem, inner=hg.inner.lbfgs())
    >>> out, state = solver.hypergrad(solver.init(jnp.zeros(1), 1.0), 1.0)
    >>> print(f"{out.grad:.4f}")  # w = 1/2, and the envelope theorem
    0.2500
    """
    about = About(
        "hg.direct",
        "direct",
        biases=("leaving out the effect of the hyperparameters through the parameters",),
        options=option_names({"inner": inner.options}),
        trains_on=not inner.claims,
    )

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

    def solve(state: DirectState, call: Call) -> Optimum:
        # Mistakes in the outer loss are reported before the inner problem is solved.
        jax.eval_shape(call.outer(state.model_state), state.params, call.hparams)
        return find_optimum(
            inner,
            call.objective,
            state.params,
            state.inner_state,
            state.model_state,
            call.hparams,
            scale=state.scale,
            options=state.options["inner"],
            polish_steps=0,
            preconditioner=None,
            key=call.probe_key,
        )

    def hypergrad(
        state: DirectState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, DirectState]:
        call = bind(problem, state.model_state, hparams, train, valid, key)

        optimum = solve(state, call)
        outer = call.outer(optimum.model_state)
        value, metrics, rhs, grad = differentiate_outer(outer, optimum.params, call.hparams)

        left_out = _tree.norm(rhs)
        status = first_failure(bad_loss(value), optimum.status, bad_grad(grad, rhs), no_influence(grad, rhs))
        info = report(
            status,
            optimum.steps,
            like=left_out,
            inner_residual=optimum.residual,
            error_estimate=jnp.where(left_out > 0, jnp.inf, optimum.residual.astype(left_out.dtype)),
            extra={"outer_grad_norm": left_out},
        )
        return Hypergradient(value, grad, info, metrics), go_on_from(state, optimum)

    def evaluate(
        state: DirectState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, DirectState]:
        call = bind(problem, state.model_state, hparams, train, valid, key)
        optimum = solve(state, call)
        value, _ = call.outer(optimum.model_state)(optimum.params, call.hparams)
        status = first_failure(bad_loss(value), optimum.status)
        info = report(status, optimum.steps, like=value, inner_residual=optimum.residual)
        return value, info, go_on_from(state, optimum)

    return framed(init, hypergrad, current_params, evaluate, about)

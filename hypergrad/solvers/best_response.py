r"""The best response as a differentiable function, for use inside one's own `jax.grad`.

    w*(λ) = argmin_w h(w, λ),     dw*/dλ = −(∂²_{ww} h)⁻¹ ∂²_{wλ} h

Source: Griewank & Faure 2002, "Reduced functions, gradients and Hessians from fixed-point iterations"; Blondel et al.
2022, arXiv:2105.15183. Differs: where the inner or the linear solve failed, derivatives are NaN, never a plausible
wrong number, because a derivative has no place for a status; derivatives of any order, forward and reverse, come from
the same rule. Cost: the inner solve, and a linear solve for each derivative. Memory O(|w|).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_data, check_hparams, check_params
from hypergrad._jaxpr.semigradient import check_gradient
from hypergrad._options import as_options, options
from hypergrad._problem import PROBLEM, Objective, Problem, bind_inner
from hypergrad._sharding import spread_by_xla
from hypergrad._solver import InputError, usable
from hypergrad._tree import PyTree
from hypergrad.inner._inner import INNER, Inner
from hypergrad.inner._optimum import POLISH_STEPS, find_optimum
from hypergrad.inner.lbfgs import lbfgs
from hypergrad.linear._linear import LINEAR, Linear, Matvec
from hypergrad.linear._linear import solve as solve_linear
from hypergrad.linear.cg import cg
from hypergrad.linear.gmres import gmres
from hypergrad.solvers._error import lost_to_rounding


class BestResponseFn(Protocol):
    """`(hparams, params0, batch=None, *, key=None) -> params`; composes with `jax.grad`, `jax.jvp`, `jax.vmap` and
    `jax.jit`.
    """

    def __call__(self, hparams: PyTree, params0: PyTree, batch: PyTree = None, *, key: Array | None = None) -> PyTree:
        """Best-response parameters, a pytree like `params0`."""
        ...


@options(problem=PROBLEM, inner=INNER, linear=LINEAR)
def best_response(problem: Problem, *, inner: Inner | None = None, linear: Linear | None = None) -> BestResponseFn:
    """The solution of the inner problem as a function of the hyperparameters, differentiable any number of times.

    Args:
        problem: its `inner_loss` is solved; `outer_loss` is ignored.
        inner: how parameters are found; it must be a solver with a tolerance. Default `hg.inner.lbfgs()`.
        linear: how the tangent and adjoint systems are solved; it must be a solver that claims convergence. Default
            `hg.linear.cg()` (`gmres()` for a fixed-point inner solver).

    Returns:
        `(hparams, params0, batch=None, *, key=None) -> params`. The derivative with respect to `params0` is zero. Where
        a solve fails, the value is the best one reached and every derivative is NaN.

    Raises:
        InputError: for solvers without a tolerance, and for `cg` with a fixed-point inner solver.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2),
    ...                      lambda w, l2, batch: jnp.sum(w))
    >>> w_star = hg.best_response(problem)
    >>> slope = jax.grad(lambda l2: jnp.sum(w_star(l2, jnp.zeros(2))))(1.0)
    >>> print(f"{slope:.4f}")  # w = 1 / (1 + l2)
    -0.5000
    """
    solver = inner if inner is not None else lbfgs()
    method = linear if linear is not None else (cg() if solver.symmetric else gmres())
    if not solver.claims or not method.claims:
        which = "inner" if not solver.claims else "linear"
        raise InputError(
            f"best_response: {which} must solve to a tolerance, since a derivative has nowhere to report its error: "
            f"give it tol=, or use hg.implicit, whose out.info reports it."
        )
    if method.symmetric and not solver.symmetric:
        raise InputError(
            "best_response: linear=hg.linear.cg needs a symmetric operator, and that of hg.inner.fixed_point is not: "
            "use hg.linear.gmres()."
        )

    def w_star(hparams: PyTree, params0: PyTree, batch: PyTree = None, *, key: Array | None = None) -> PyTree:
        hparams, params0 = check_hparams(hparams), jax.lax.stop_gradient(check_params(params0))
        check_data("batch", batch)
        objective = bind_inner(problem, batch, key, None)
        if solver.symmetric:
            check_gradient(lambda w: objective.fixed(w, hparams), params0, "hg.best_response")

        def residual(params: PyTree) -> PyTree:
            return solver.residual(objective, params, hparams)

        def solve(_: Any, start: PyTree) -> tuple[PyTree, Array]:
            return _solve(solver, objective, start, hparams)

        def tangent_solve(push: Matvec, rhs: PyTree) -> PyTree:
            return _solve_tangent(method, push, rhs, params0, hparams)

        params, status = jax.lax.custom_root(residual, params0, solve, tangent_solve, has_aux=True)
        good = usable(jax.lax.stop_gradient(status))
        return jax.tree.map(lambda leaf: _nan_derivative_unless(good, leaf), params)

    return spread_by_xla(w_star, lambda hparams, params0: params0)


def _solve(inner: Inner, objective: Objective, start: PyTree, hparams: PyTree) -> tuple[PyTree, Array]:
    optimum = find_optimum(
        inner,
        objective,
        start,
        inner.init(start, hparams),
        None,
        hparams,
        scale=jnp.zeros((), _tree.dtype(start)),
        options=as_options(inner.options, start),
        polish_steps=POLISH_STEPS if inner.symmetric else 0,
        preconditioner=None,
        key=jax.random.key(0),
    )
    # Auxiliary outputs of custom_root must be floating: it gives integer outputs tangents of the wrong type.
    return optimum.params, optimum.status.astype(_tree.dtype(start))


def _solve_tangent(method: Linear, push: Matvec, rhs: PyTree, params: PyTree, hparams: PyTree) -> PyTree:
    """`(∂_w F)⁻¹ rhs`, transposable; NaN where the solve failed."""
    options = as_options(method.options, rhs)

    def run(matvec: Matvec, b: PyTree) -> PyTree:
        key = jax.random.key(0)
        apply = None if method.preconditioner is None else method.preconditioner(matvec, params, hparams, key)
        result = solve_linear(method, matvec, b, precondition=apply, options=options, key=key)
        good = jnp.where(usable(result.status) & ~lost_to_rounding(result, b), 1.0, jnp.nan)
        return _tree.scale(good, result.solution)

    return jax.lax.custom_linear_solve(push, _tied(rhs), run, transpose_solve=run, symmetric=method.symmetric)


def _tied(rhs: PyTree) -> PyTree:
    """Return the same right-hand side with each leaf made to depend on all of them: custom_linear_solve cannot be
    transposed where some leaves are linear in the tangent and others are constant zeros because no hyperparameter moves
    them.
    """
    zero = sum((0 * leaf.ravel()[0] for leaf in jax.tree.leaves(rhs) if leaf.size), start=jnp.zeros(()))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), rhs)


@jax.custom_jvp
def _nan_derivative_unless(good: Array, leaf: Array) -> Array:
    """Return `leaf` with a derivative that is NaN where the solve failed."""
    del good
    return leaf


@_nan_derivative_unless.defjvp
def _nan_derivative_unless_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    good, leaf = primals
    factor = jnp.where(good, 1.0, jnp.nan).astype(leaf.dtype)
    return _nan_derivative_unless(good, leaf), factor * tangents[1]

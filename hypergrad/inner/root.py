r"""Parameters that solve equations: multipliers, equilibria, games, semi-gradients.

    F(w, λ) = 0,     w ← w − t d,   ‖F − (∂_w F) d‖ ≤ η ‖F‖   by GMRES

F need not be the gradient of anything: KKT systems, fixed points of operators that do not contract, temporal-difference
learning, the first-order conditions of a game.
Source: Brown & Saad 1990, "Hybrid Krylov methods for nonlinear systems of equations"; Eisenstat & Walker 1996 for η.
Differs: the step is halved until ‖F‖ falls enough, and a step that GMRES could not finish is tried anyway.
Cost: one linearization of F and a few products a step. Memory: GMRES's basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._problem import Objective
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, iterative, map_of
from hypergrad.linear._linear import Matvec
from hypergrad.linear._linear import solve as solve_linear
from hypergrad.linear.gmres import gmres

_MAX_STEPS = 100
_PRODUCTS = 400  # largest number of GMRES products in one Newton step
_BASIS = 50
_HALVINGS = 30


class _Carry(NamedTuple):
    params: PyTree
    residual: Array
    before: Array
    steps: Array
    status: Array


@options(tol=Number(above=0), max_steps=Number(least=1, integer=True), steps=Number(least=0, integer=True, static=True))
def root(
    equations: Callable[..., PyTree],
    *,
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    steps: int | None = None,
) -> Inner:
    """Solve `equations(params, hparams, batch) = 0` by Newton's method; the problem's `inner_loss` is not used.

    Args:
        equations: `(params, hparams, batch) -> F` or `(params, hparams, batch, key) -> F`, with F of the structure,
            shapes and dtypes of the parameters. Every step sees the same batch and key.
        tol: tolerance on ‖F‖, relative to its natural scale (dimensionless). Default: what the precision supports, 1e-6
            in float32 and 1e-10 in float64.
        max_steps: largest number of Newton steps. Default 100.
        steps: number of full Newton steps that `hg.unrolled` takes and differentiates, a Python integer; it is required
            there.

    Returns:
        An `Inner` for `hg.implicit` and `hg.best_response`, whose adjoint system is solved by GMRES. The status is
        INNER_MAX_STEPS where the tolerance was missed, INNER_STALLED where no step lowers ‖F‖ (a local minimum of it,
        or a kink), NONFINITE_GRAD where F was NaN at the start.

    Raises:
        InputError: for an option out of range, or an F of another structure or shape than the parameters, naming the
            path.
        InputTypeError: for equations with another number of arguments, or of another dtype.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> circle = lambda w, r, batch: jnp.array([w[0]**2 + w[1]**2 - r**2, w[0] - w[1]])
    >>> problem = hg.Problem(None, lambda w, r, batch: w[0])
    >>> solver = hg.implicit(problem, inner=hg.inner.root(circle))
    >>> out, state = jax.jit(solver.hypergrad)(solver.init(jnp.array([1.0, 0.5]), 2.0), 2.0)
    >>> print(f"{out.value:.4f} {out.grad:.4f}")  # w = (r, r) / √2
    1.4142 0.7071
    """
    at = map_of("root: equations", equations, "F")

    def residual(objective: Objective, params: PyTree, hparams: PyTree) -> PyTree:
        return at(params, hparams, *objective.fixed_batch)

    def iterate(
        objective: Objective, params: PyTree, hparams: PyTree, target: Array, most: Array
    ) -> tuple[PyTree, Array, Array, Array]:
        return _newton(lambda w: residual(objective, w, hparams), params, target, most)

    def move(objective: Objective, params: PyTree, state: PyTree, hparams: PyTree, step: Any) -> tuple[PyTree, PyTree]:
        f = lambda w: at(w, hparams, *objective.batch(step))
        value, push = jax.linearize(f, params)
        exact = lambda matvec, b: _direction(matvec, b, _tree.eps(params) * 16)
        return _tree.sub(params, jax.lax.custom_linear_solve(push, value, exact, transpose_solve=exact)), state

    most = _MAX_STEPS if max_steps is None else max_steps
    return iterative(iterate, residual=residual, tol=tol, max_steps=most, steps=steps, move=move)


def _direction(matvec: Matvec, rhs: PyTree, forcing: ArrayLike) -> PyTree:
    found = solve_linear(gmres(tol=1.0, restart=_BASIS), matvec, rhs, options={"tol": forcing, "max_steps": _PRODUCTS})
    return found.solution


def _newton(
    f: Callable[[PyTree], PyTree], params: PyTree, target: Array, max_steps: Array
) -> tuple[PyTree, Array, Array, Array]:
    dtype = _tree.dtype(params)
    size = lambda w: _tree.norm(f(w)).astype(dtype)

    def proceed(c: _Carry) -> Array:
        return (c.steps < max_steps) & (c.residual > target) & (c.status == int(Status.OK))

    def step(c: _Carry) -> _Carry:
        value, push = jax.linearize(f, c.params)
        # The accuracy that this step can use or, if it will be the last, the accuracy that it needs.
        forcing = jnp.clip(0.5 * (c.residual / c.before) ** 2, 0.1 * target / c.residual, 0.1)
        direction = _direction(push, value, jnp.minimum(forcing, 0.1))

        def halve(attempt: tuple[Array, Array, PyTree, Array]) -> tuple[Array, Array, PyTree, Array]:
            length = attempt[0] / 2
            trial = _tree.axpy(-length, direction, c.params)
            return length, attempt[1] + 1, trial, size(trial)

        def falls(length: Array, found: Array) -> Array:
            return found <= (1 - 1e-4 * length) * c.residual

        length, _, trial, found = jax.lax.while_loop(
            lambda attempt: ~falls(attempt[0], attempt[3]) & (attempt[1] < _HALVINGS),
            halve,
            (jnp.full((), 2, dtype), jnp.int32(0), c.params, jnp.full((), jnp.inf, dtype)),
        )
        moved = falls(length, found)
        status = jnp.where(moved, int(Status.OK), int(Status.INNER_STALLED)).astype(jnp.int32)
        return _Carry(
            _tree.where(moved, trial, c.params), jnp.where(moved, found, c.residual), c.residual, c.steps + 1, status
        )

    first = size(params)
    broken = jnp.where(jnp.isfinite(first), int(Status.OK), int(Status.NONFINITE_GRAD)).astype(jnp.int32)
    c = jax.lax.while_loop(proceed, step, _Carry(params, first, first, jnp.int32(0), broken))
    missed = (c.status == int(Status.OK)) & (c.residual > target)
    return c.params, c.residual, c.steps, jnp.where(missed, int(Status.INNER_MAX_STEPS), c.status).astype(jnp.int32)

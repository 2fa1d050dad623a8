"""The interface of linear solvers, which solve `A v = b` given only products with A.

`hg.linear.cg(...)` and its siblings return a `Linear`. The right-hand side and the starting point reach its `solve`
with unit norm, and the norm is put back afterwards, so that an outer loss scaled by 1e-20 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Slot, as_options
from hypergrad._solver import Status, usable
from hypergrad._tree import PyTree

Matvec = Callable[[PyTree], PyTree]


class LinearResult(NamedTuple):
    """The result of a linear solve.

    Attributes:
        solution: pytree like the right-hand side.
        residual: `‖b − A v‖ / ‖b‖` as the solver knows it (dimensionless); NaN if it does not compute it.
        steps: int32, products with A.
        status: int32, see `hg.Status`.
        inverse: `r -> u`, a rough A⁻¹ r from what the solve learned about A.
        low: the smallest ‖M⁻¹A v‖ / ‖v‖ that the solve has seen, in the geometry of its preconditioner: an upper bound
            on the true one (a Ritz value for CG, a singular value for GMRES). Infinite if it saw none.
        high: the largest; 0 if it saw none.
    """

    solution: PyTree
    residual: Array
    steps: Array
    status: Array
    inverse: Matvec
    low: ArrayLike = jnp.inf
    high: ArrayLike = 0.0


class SolveFn(Protocol):
    """`solve(matvec, rhs, *, start, precondition, options, key) -> LinearResult`.

    `rhs` has unit norm. `start` is zero or a direction of unit norm, whose best length `fit` finds. `options` are
    scalar arrays, with the default in place of a `tol` of None. Among them may be `noise`: A is known so badly that
    curvature below this share of the largest cannot be told from zero.
    """

    def __call__(
        self,
        matvec: Matvec,
        rhs: PyTree,
        *,
        start: PyTree,
        precondition: Matvec | None,
        options: Mapping[str, Array],
        key: Array,
    ) -> LinearResult: ...


class Preconditioner(Protocol):
    """`build(matvec, params, hparams, key) -> (v -> M⁻¹ v)`, with M⁻¹ symmetric positive definite."""

    def __call__(self, matvec: Matvec, params: PyTree, hparams: PyTree, key: Array) -> Matvec: ...


class Linear(NamedTuple):
    """A linear solver for the adjoint system, made by `hg.linear.cg` and its siblings.

    Attributes:
        solve: see `SolveFn`; call it through `solve` of this module, which normalises `rhs`.
        options: numbers that may change from call to call without recompiling (`tol`, `max_steps`, ...).
        claims: whether a tolerance was asked for, so that a miss is a status.
        symmetric: whether the method needs a symmetric operator.
        preconditioner: see `Preconditioner`, or None.
        random: sources of randomness in the solution, in words, as in `About`.
        exact: whether `inverse` of its result is A⁻¹ to working precision.
        looks: whether it uses A at all; if it does not, no error can be estimated.
        entrywise: whether the solve and its preconditioner work alike on every pytree, so that they may be given the
            parameters as one vector.
    """

    solve: SolveFn
    options: Mapping[str, ArrayLike | None]
    claims: bool
    symmetric: bool
    preconditioner: Preconditioner | None = None
    random: tuple[str, ...] = ()
    exact: bool = False
    looks: bool = True
    entrywise: bool = False


LINEAR = Slot(Linear, "a linear solver", "hg.linear.cg() or one of its siblings")
PRECONDITIONER = Slot(
    ("__call__",), "a preconditioner", "hg.linear.jacobi(), hg.linear.precondition(fn) or None", none=True
)


def solve(
    linear: Linear,
    matvec: Matvec,
    rhs: PyTree,
    *,
    start: PyTree | None = None,
    precondition: Matvec | None = None,
    options: Mapping[str, ArrayLike] | None = None,
    key: Array | None = None,
) -> LinearResult:
    """Solve `A v = rhs` at any scale of `rhs`.

    A zero right-hand side gives zero, and one that is not finite gives a status.

    Args:
        linear: the method.
        matvec: `v -> A v` over pytrees like `rhs`.
        rhs: right-hand side b.
        start: a direction in which the solution may lie, of any length; None for none.
        precondition: `v -> M⁻¹ v`.
        options: replaces `linear.options`, for values that changed since the method was made.
        key: for methods that draw test vectors.

    Returns:
        See `LinearResult`.
    """
    size = _tree.norm(rhs)
    zero = size == 0
    if start is None:
        start = _tree.zeros_like(rhs)
    else:
        start = _tree.where(zero, _tree.zeros_like(rhs), _unit(start, _tree.norm(start)))
    key = jax.random.key(0) if key is None else key
    result = linear.solve(
        matvec,
        _unit(rhs, size),
        start=start,
        precondition=precondition,
        key=key,
        options=as_options(dict(linear.options) | dict(options or {}), rhs),
    )
    solution = _tree.where(zero, _tree.zeros_like(rhs), _tree.scale(jnp.where(zero, 1, size), result.solution))
    fine = _tree.all_finite(solution) | ~usable(result.status)
    status = jnp.where(fine, result.status, int(Status.NONFINITE_GRAD))
    return LinearResult(
        solution=solution,
        residual=jnp.where(zero, 0, result.residual),
        steps=result.steps,
        status=jnp.where(zero, int(Status.OK), status).astype(jnp.int32),
        inverse=result.inverse,
        low=jnp.where(zero, jnp.inf, result.low),
        high=jnp.where(zero, 0, result.high),
    )


def fit(matvec: Matvec, rhs: PyTree, start: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """Scale a starting direction so that its residual is as small as possible, and never larger than that of zero.

    Returns:
        The scaled start, its residual `b − A x`, and `A x`, at the cost of one product.
    """
    product = matvec(start)
    size = _tree.norm(product)
    unit = _unit(product, size)
    length = _tree.vdot(unit, rhs).astype(size.dtype)
    good = jnp.isfinite(length) & (size > 0)
    length = jnp.where(good, length, 0)
    unit = _tree.where(good, unit, _tree.zeros_like(rhs))
    x = _tree.scale(_tree.safe_divide(length, size, where=good), start)
    return x, _tree.axpy(-length, unit, rhs), _tree.scale(length, unit)


def against(stack: PyTree, v: PyTree) -> Array:
    """Inner products of `v` with each vector of a stack, `[m]`; a stack has one more leading axis in each leaf."""
    return jax.vmap(_tree.vdot, in_axes=(0, None))(stack, v)


def weigh(stack: PyTree, weights: Array) -> PyTree:
    """Sum of the vectors of a stack, weighted, in the dtypes of the stack."""

    def one(leaf: Array) -> Array:
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        factors = weights.reshape((-1,) + (1,) * (leaf.ndim - 1)).astype(wide)
        return jnp.sum(factors * leaf.astype(wide), axis=0).astype(leaf.dtype)

    return jax.tree.map(one, stack)


def _unit(x: PyTree, size: Array) -> PyTree:
    """`x / size`; zero where the size is not a positive number. In the wider dtype, which 1/size always fits."""
    good = (size > 0) & jnp.isfinite(size)
    safe = jnp.where(good, size, 1)

    def divide(leaf: Array) -> Array:
        wide = jnp.promote_types(leaf.dtype, safe.dtype)
        return jnp.where(good, leaf.astype(wide) / safe.astype(wide), 0).astype(leaf.dtype)

    return jax.tree.map(divide, x)

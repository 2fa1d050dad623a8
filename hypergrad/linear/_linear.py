"""What a linear solver is here: how `A v = b` is solved, given only products with A.

`hg.linear.cg(...)` and its siblings return a `Linear`. The right-hand side reaches `solve` with unit norm, and its norm is
put back afterwards, so that an outer loss scaled by 1e-20 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._tree import PyTree

Matvec = Callable[[PyTree], PyTree]


class LinearResult(NamedTuple):
    """What a linear solve returns.

    Attributes:
        solution: pytree like the right-hand side.
        residual: `‖b − A v‖ / ‖b‖` as the solver knows it (dimensionless); NaN if it never looked.
        steps: int32, products with A.
        status: int32, see `hg.Status`.
        inverse: `r -> u`, a rough A⁻¹ r from what the solve learned, which turns residuals into error estimates.
    """

    solution: PyTree
    residual: Array
    steps: Array
    status: Array
    inverse: Matvec


class SolveFn(Protocol):
    """`solve(matvec, rhs, *, start, precondition, options, key) -> LinearResult`, for a `rhs` of unit norm."""

    def __call__(self, matvec: Matvec, rhs: PyTree, *, start: PyTree, precondition: Matvec | None,
                 options: Mapping[str, ArrayLike], key: Array) -> LinearResult:
        ...


class Preconditioner(Protocol):
    """`build(matvec, params, hparams, key) -> (v -> M⁻¹ v)`, with M⁻¹ symmetric positive definite."""

    def __call__(self, matvec: Matvec, params: PyTree, hparams: PyTree, key: Array) -> Matvec:
        ...


class Linear(NamedTuple):
    """How the adjoint system is solved. Made by `hg.linear.cg` and its siblings.

    Attributes:
        solve: see `SolveFn`; call it through `solve` of this module, which normalises.
        options: numbers that may change from call to call without recompiling (`tol`, `max_steps`, ...).
        claims: whether a tolerance was asked for, so that a miss is a status.
        symmetric: whether the method needs a symmetric operator.
        preconditioner: see `Preconditioner`, or None.
    """

    solve: SolveFn
    options: Mapping[str, ArrayLike]
    claims: bool
    symmetric: bool
    preconditioner: Preconditioner | None = None


def solve(linear: Linear, matvec: Matvec, rhs: PyTree, *, start: PyTree | None = None, precondition: Matvec | None = None,
          options: Mapping[str, ArrayLike] | None = None, key: Array | None = None) -> LinearResult:
    """Solve `A v = rhs`, whatever the scale of `rhs`; a zero right-hand side gives zero in zero steps.

    Args:
        linear: the method.
        matvec: `v -> A v` over pytrees like `rhs`.
        rhs: right-hand side b.
        start: where to start, in the scale of the solution; None for zero.
        precondition: `v -> M⁻¹ v`.
        options: replaces `linear.options`, for values that changed since the method was made.
        key: for methods that draw test vectors.

    Returns:
        See `LinearResult`.
    """
    size = _tree.norm(rhs)
    safe = jnp.where(size > 0, size, 1)
    unit = _tree.scale(1 / safe, rhs)
    start = _tree.zeros_like(rhs) if start is None else _tree.scale(1 / safe, start)
    result = linear.solve(matvec, unit, start=start, precondition=precondition, key=jax.random.key(0) if key is None else key,
                          options=dict(linear.options) | dict(options or {}))
    zero = size == 0
    return LinearResult(
        solution=_tree.where(zero, _tree.zeros_like(rhs), _tree.scale(safe, result.solution)),
        residual=jnp.where(zero, 0, result.residual),
        steps=result.steps,
        status=jnp.where(zero, 0, result.status),
        inverse=result.inverse)

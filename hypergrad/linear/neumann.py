r"""The truncated Neumann series: a fixed number of gradient descent steps on the adjoint system.

    v = α Σ_{j=0..K} (I − αA)ʲ b,        A v = b − t_{K+1},   t_j = (I − αA)ʲ b

Source: Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590. Differs: the sum is added (the first version of the paper
prints a subtraction) and keeps its factor α; α comes from a power iteration if none is given; growing terms give a
status. The series converges where every eigenvalue of αA lies within the unit circle around 1 (0 < αλ < 2 if A is
symmetric, which it need not be), by a factor 1 − αμ per term, where μ is the smallest eigenvalue: at a condition number
of 100, fifty terms still leave a third of the error. Conjugate gradients do better with the same products wherever A is
symmetric positive definite.
Cost: K products; one more for a starting point in place of the last term. Memory: two vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._loops import once
from hypergrad._options import Number, options
from hypergrad._solver import Status
from hypergrad._tree import PyTree
from hypergrad.linear._linear import Linear, LinearResult, Matvec, fit
from hypergrad.linear.identity import unknown_inverse

_ROUNDING = 4  # units of rounding below which a residual by recursion means nothing
_GROWTH = 64  # units of rounding by which a term may exceed the last without counting as growth


class _Carry(NamedTuple):
    total: PyTree  # Σ t_i
    term: PyTree
    norm: Array  # of the term
    move: Array  # norm of its difference from the one before, α ‖A t‖
    ratio: Array  # of the term's norm to that of the one before
    halfway: tuple[Array, Array]  # norm and move in the middle of the sum
    grows: Array  # whether the last term grew
    products: Array


@options(
    max_steps=Number(least=0, integer=True),
    tol=Number(above=0),
    step_size=Number(above=0),
    power_steps=Number(least=1, integer=True, static=True),
)
def neumann(
    max_steps: ArrayLike, *, tol: ArrayLike | None = None, step_size: ArrayLike | None = None, power_steps: int = 10
) -> Linear:
    """Sum the terms 0 to `max_steps` of the Neumann series.

    Args:
        max_steps: K, the number of products. 0 is T1-T2.
        tol: relative tolerance on the residual (dimensionless). With it the sum ends at the first term below it, and a
            miss is a status; without it, exactly K products are made and nothing is claimed.
        step_size: α, in units of an inverse eigenvalue of A. Default: one over the largest growth of a vector under
            `power_steps` products.
        power_steps: products of the power iteration that finds the step size where none is given.

    The residual is the next term, extrapolated without a product from the ratio of the last two (NaN for K = 0, where
    there is only one). Their ratio ρ also gives the smallest relevant eigenvalue, (1 − ρ)/α, which turns residuals into
    errors.

    Raises:
        InputError: for a negative tolerance, step size or number of steps.

    >>> import hypergrad as hg
    >>> linear = hg.linear.neumann(max_steps=20)
    """
    options = {"max_steps": max_steps}
    if tol is not None:
        options["tol"] = tol
    if step_size is not None:
        options["step_size"] = step_size
    return Linear(
        partial(_solve, power_steps=int(power_steps)),
        options,
        claims=tol is not None,
        symmetric=False,
        random=("the start of the power iteration",) if tol is None and step_size is None else (),
        entrywise=True,
    )


def _solve(
    matvec: Matvec,
    rhs: PyTree,
    *,
    start: PyTree,
    precondition: Matvec | None,
    options: Mapping[str, Array],
    key: Array,
    power_steps: int,
) -> LinearResult:
    del precondition
    dtype, eps = _tree.dtype(rhs), _tree.eps(rhs)
    asked = options["tol"] if "tol" in options else jnp.zeros((), dtype)
    tol = jnp.maximum(asked, _ROUNDING * eps)
    max_steps = options["max_steps"]
    if "step_size" in options:
        step_size, searched = options["step_size"], 0
    else:
        step_size, searched = 1 / largest_growth(matvec, rhs, key, power_steps), power_steps

    def warm(_: tuple[PyTree, PyTree, Array]) -> tuple[PyTree, PyTree, Array]:
        x, r, _ = fit(matvec, rhs, start)
        return x, r, jnp.int32(1)

    cold = _tree.zeros_like(rhs), rhs, jnp.int32(0)
    x, term, used = once((_tree.max_abs(start) > 0) & (max_steps > 0), warm, cold)
    norm = _tree.norm(term).astype(dtype)
    nan = jnp.asarray(jnp.nan, dtype)
    inf = jnp.asarray(jnp.inf, dtype)
    first = _Carry(term, term, norm, inf, nan, (norm, inf), jnp.asarray(False), used)

    def proceed(c: _Carry) -> Array:
        # A diverging sum is abandoned while it is still finite.
        return (c.products < max_steps) & (c.norm > tol) & (c.norm < norm / eps)

    def step(c: _Carry) -> _Carry:
        product = _tree.scale(step_size, matvec(c.term))
        term = _tree.sub(c.term, product)
        move, after = _tree.norm(product).astype(dtype), _tree.norm(term).astype(dtype)
        noise = _GROWTH * eps * c.norm
        # Where A is not normal, terms may rise and fall for a while; lasting growth also shows over half of the sum. It
        # shows in the products, which weigh the large eigenvalues more, long before it shows in the terms.
        larger = (after > c.norm + noise) | (after > norm)
        grows = (larger & (after > c.halfway[0])) | ((move > c.move + noise) & (move > c.halfway[1]))
        taken, total = c.products + 1 - used, max_steps - used
        halfway = (
            jnp.where(taken == total // 2, after, c.halfway[0]),
            jnp.where(taken == (total + 1) // 2, move, c.halfway[1]),
        )
        return _Carry(_tree.add(c.total, term), term, after, move, after / c.norm, halfway, grows, c.products + 1)

    c = jax.lax.while_loop(proceed, step, first)
    residual = jnp.where(jnp.isnan(c.ratio), jnp.where(used > 0, c.norm, nan), c.norm * c.ratio)
    curvature = (1 - c.ratio) / step_size

    def inverse(v: PyTree) -> PyTree:
        known = curvature > 0
        return _tree.where(known, _tree.scale(_tree.safe_divide(1, curvature, where=known), v), unknown_inverse(v))

    missed = jnp.where(c.norm <= tol, int(Status.PRECISION_LIMITED), int(Status.LINEAR_MAX_STEPS))
    status = jnp.where((c.norm <= asked) | (asked == 0), int(Status.OK), missed)
    status = jnp.where(c.grows, int(Status.NEUMANN_DIVERGING), status)
    status = jnp.where(jnp.isfinite(c.norm), status, int(Status.NONFINITE_GRAD)).astype(jnp.int32)
    return LinearResult(_tree.axpy(step_size, c.total, x), residual, c.products + searched, status, inverse)


def largest_growth(matvec: Matvec, like: PyTree, key: Array, steps: int) -> Array:
    """The largest ‖A z‖ / ‖z‖ seen over some steps of the power iteration, a scalar; 1 for an operator that is zero.

    For symmetric A it approaches the largest absolute eigenvalue from below, more than halfway in a few steps. For
    other A it is at least the long-run growth from a random start.
    """
    signs = _tree.rademacher_like(key, like)
    size = _tree.norm(signs)

    def step(_: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        z, largest = carry
        product = matvec(z)
        growth = _tree.norm(product)
        safe = _tree.positive(growth)
        return _tree.scale(1 / safe, product), jnp.maximum(largest, growth)

    _, largest = jax.lax.fori_loop(0, steps, step, (_tree.scale(1 / size, signs), jnp.zeros_like(size)))
    return _tree.positive(largest)

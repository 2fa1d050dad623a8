r"""Proximal operators of common penalties, for `hg.inner.proximal`.

    prox_{s r}(v) = argmin_x  ½‖x − v‖² + s r(x)

Each takes one array and the strength s of its penalty, already multiplied by the step size. Their derivatives know
which entries, groups or singular values are zero; at a kink the derivative is that of the zero side.
Source: Parikh & Boyd 2014, "Proximal algorithms", section 6. Constraints are projections: `hg.inner.projected` with
those of `optax.projections`.
Cost: elementwise; one singular value decomposition for `nuclear`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options

_STRENGTH = Number(least=0, every=True, advice="keep it there by tuning it with domain=hg.domains.positive()")


@options(strength=_STRENGTH)
def l1(v: ArrayLike, strength: ArrayLike) -> Array:
    """Soft threshold, the proximal operator of `strength · ‖x‖₁`.

    Args:
        v: any array.
        strength: at least 0, broadcast against `v`.

    Raises:
        InputError: for a concrete strength below 0.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.prox.l1(jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    v = jnp.asarray(v)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - strength, 0)


@options(l1=_STRENGTH, l2=_STRENGTH)
def elastic_net(v: ArrayLike, l1: ArrayLike, l2: ArrayLike) -> Array:
    """The proximal operator of `l1 · ‖x‖₁ + ½ l2 · ‖x‖²`.

    Args:
        v: any array.
        l1: strength of the absolute values, at least 0, broadcast against `v`.
        l2: strength of the squares, at least 0, broadcast against `v`.

    Raises:
        InputError: for a concrete strength below 0.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.prox.elastic_net(jnp.array([-3.0, 0.5, 2.0]), 1.0, 1.0).tolist()
    [-1.0, 0.0, 0.5]
    """
    v = jnp.asarray(v)
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - l1, 0) / (1 + jnp.asarray(l2))


@options(strength=_STRENGTH)
def group(v: ArrayLike, strength: ArrayLike, axis: int | tuple[int, ...] = -1) -> Array:
    """The proximal operator of `strength · Σ_g ‖x_g‖₂`: a group is zero as a whole, or shrunk as a whole.

    Args:
        v: any array.
        strength: at least 0, broadcast against the norms of the groups, which keep the reduced axes.
        axis: the axes along which the entries of one group lie.

    Raises:
        InputError: for a concrete strength below 0.

    >>> import hypergrad as hg, jax.numpy as jnp, numpy as np
    >>> print(np.asarray(hg.prox.group(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 2.5)).round(3))
    [[1.5 2. ]
     [0.  0. ]]
    """
    v = jnp.asarray(v)
    square = jnp.sum(v**2, axis=axis, keepdims=True)
    alive = square > jnp.asarray(strength) ** 2  # the square root is taken only where it has a derivative
    norm = jnp.sqrt(jnp.where(alive, square, 1))
    return jnp.where(alive, v * (1 - strength / norm), 0)


@options(strength=_STRENGTH)
def nuclear(v: ArrayLike, strength: ArrayLike) -> Array:
    r"""The proximal operator of `strength · Σᵢ σᵢ(x)`, the nuclear norm: singular values are soft-thresholded.

    The derivative is that of a spectral operator. Unlike that of the decomposition, it exists where singular values
    coincide (Ding, Sun & Toh 2018, arXiv:1401.2269).

    Args:
        v: a matrix, `[m, n]`.
        strength: at least 0, scalar.

    Raises:
        ValueError: for an array that is not a matrix.

    >>> import hypergrad as hg, jax.numpy as jnp, numpy as np
    >>> print(np.asarray(hg.prox.nuclear(jnp.diag(jnp.array([3.0, 0.5])), 1.0)).round(2) + 0.0)
    [[2. 0.]
     [0. 0.]]
    """
    v = jnp.asarray(v)
    if v.ndim != 2:
        raise ValueError(f"prox.nuclear: v must be a matrix, found shape {v.shape}: reshape it, or use jax.vmap.")
    if v.shape[0] > v.shape[1]:
        return _nuclear(v.T, jnp.asarray(strength, v.dtype)).T
    return _nuclear(v, jnp.asarray(strength, v.dtype))


@jax.custom_jvp
def _nuclear(v: Array, strength: Array) -> Array:
    u, sigma, vt = jnp.linalg.svd(v, full_matrices=False)
    return _dot(u * jnp.maximum(sigma - strength, 0)[None, :], vt)


@_nuclear.defjvp
def _nuclear_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    v, strength = primals
    change, stronger = tangents
    u, sigma, vt = jnp.linalg.svd(v, full_matrices=False)
    kept = (sigma > strength).astype(v.dtype)
    shrunk = jnp.maximum(sigma - strength, 0)
    ratio = lambda top, bottom, limit: _tree.safe_divide(top, bottom, otherwise=limit)
    gap = sigma[:, None] - sigma[None, :]
    near = jnp.abs(gap) <= jnp.finfo(v.dtype).eps ** 0.5 * (sigma[:, None] + sigma[None, :])
    slopes = jnp.where(
        near, (kept[:, None] + kept[None, :]) / 2, (shrunk[:, None] - shrunk[None, :]) / jnp.where(near, 1, gap)
    )
    turns = ratio(shrunk[:, None] + shrunk[None, :], sigma[:, None] + sigma[None, :], 0.0)
    along = _dot(_dot(u.T, change), vt.T)
    even, odd = (along + along.T) / 2, (along - along.T) / 2
    inside = _dot(_dot(u, slopes * even + turns * odd), vt)
    rest = _dot(u.T, change) - _dot(along, vt)
    outside = _dot(u * ratio(shrunk, sigma, 0.0)[None, :], rest)
    thresholded = _dot(u * kept[None, :], vt)
    return _dot(u * shrunk[None, :], vt), inside + outside - stronger * thresholded


_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

"""The covariance and noise of a Gaussian process, checked, as one matrix; shared by its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._options import Slot
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.objectives import _found

Kernel = Callable[[PyTree, Array, Array], Array]
KERNEL = Slot(("__call__",), "a function", "covariance(hparams, x, z) -> [n, m]")
NOISE = Slot(("__call__",), "a function", "noise_variance(hparams), such as lambda h: jnp.exp(h['log_noise'])")
_ASYMMETRY = 1e-3  # relative; rounding of a float32 distance is below


def per_point(square: Array, logdet: Array, n: int) -> Array:
    """Negative log evidence per point from yᵀK⁻¹y and logdet K."""
    return (0.5 * square + 0.5 * logdet) / n + 0.5 * math.log(2 * math.pi)


def data(function: str, batch: PyTree) -> tuple[Array, Array]:
    """The rows x `[n, d]` and targets y `[n]` of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(f"{function}: the batch must be (x, y), found {type(batch).__name__}.")
    x, y = _found.table(f"{function}: x", batch[0]), jnp.asarray(batch[1])
    if y.shape != x.shape[:1]:
        raise InputError(
            f"{function}: y must have shape ({x.shape[0]},), one number for each row of x, found {y.shape}."
        )
    return x, y.astype(x.dtype)


def system(
    function: str,
    covariance: Kernel,
    noise_variance: Callable[[PyTree], ArrayLike] | None,
    hparams: PyTree,
    batch: PyTree,
) -> tuple[Array, Array, Array]:
    """`k(x, x) + diag(noise)`, x and y."""
    x, y = data(function, batch)
    check_kernel(function, covariance, hparams, x)
    matrix = covariance(hparams, x, x)
    skew = jnp.max(jnp.abs(matrix - matrix.T)) > _ASYMMETRY * jnp.max(jnp.abs(matrix))
    if not isinstance(skew, Tracer) and bool(skew):
        raise InputError(_asymmetric(function))
    matrix = jnp.where(skew, jnp.nan, matrix)
    if noise_variance is None:
        return matrix, x, y
    variance = _found.positive(f"{function}: noise_variance", noise_variance(hparams), "write jnp.exp(log_noise)")
    if variance.shape not in ((), (1,), y.shape):
        raise InputError(
            f"{function}: noise_variance must be a scalar or one variance for each of the {y.size} points, found shape "
            f"{variance.shape}."
        )
    return matrix + jnp.diag(jnp.broadcast_to(variance.astype(x.dtype), y.shape)), x, y


def check_kernel(function: str, covariance: Kernel, hparams: PyTree, x: Array) -> None:
    """Raise for a covariance that returns another shape, or that is not symmetric where it is tried on five points."""
    found = jax.eval_shape(covariance, hparams, x[:1], x)
    if getattr(found, "shape", None) != (1, x.shape[0]):
        raise InputError(
            f"{function}: covariance(hparams, x, z) must return one value for each pair of rows, shape [n, m]: for x "
            f"of shape {(1, x.shape[1])} and z of {x.shape} found {getattr(found, 'shape', type(found).__name__)}."
        )
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, x.shape[1])).astype(x.dtype)
    tried = jax.tree.map(lambda leaf: np.full(jnp.shape(leaf), 0.5, jnp.result_type(leaf)), hparams)
    try:
        with jax.ensure_compile_time_eval():
            matrix = np.asarray(covariance(jax.tree.map(jnp.asarray, tried), jnp.asarray(points), jnp.asarray(points)))
    except (jax.errors.TracerArrayConversionError, InputError):  # closes over traced values, or 0.5 is not allowed
        return
    if np.max(np.abs(matrix - matrix.T)) > _ASYMMETRY * np.max(np.abs(matrix)):
        raise InputError(_asymmetric(function))


def _asymmetric(function: str) -> str:
    return (
        f"{function}: covariance must be symmetric, covariance(hparams, x, z) equal to covariance(hparams, z, x).T, "
        "found another matrix: its Cholesky factor would be that of its lower half alone."
    )

"""Checks of the data that objectives are given. A mistake in values that are known raises; a mistake in traced values
becomes NaN, which every solver reports as a status.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad._solver import InputError, InputTypeError


def positive(where: str, value: Any, advice: str, *, zero: bool = False) -> Array:
    """Return `value`, with NaN where a traced entry is not greater than 0 (or is below 0, where zero is allowed).

    Raises:
        InputError: for such an entry of a value that is known.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    if not isinstance(array, Tracer):
        known = np.asarray(array)
        wrong = known[~((known >= 0) if zero else (known > 0))]
        if wrong.size:
            least = "at least 0" if zero else "greater than 0"
            raise InputError(f"{where} must be {least}, found {wrong.flat[0]:g}: {advice}.")
    return jnp.where(array >= 0 if zero else array > 0, array, jnp.nan)


def one_hot(where: str, labels: Any, shape: tuple[int | None, int | None] = (None, None)) -> Array:
    """Return `labels` `[n, c]` as floats, with NaN in a traced row that is not one-hot.

    Raises:
        InputError: for another shape, and for a row that is not one-hot of labels that are known.
    """
    array = jnp.asarray(labels)
    n, c = (found if wanted is None else wanted for wanted, found in zip(shape, (*array.shape, 0, 0), strict=False))
    if array.ndim != 2 or array.shape != (n, c):
        rows = "n" if shape[0] is None else shape[0]
        columns = "classes" if shape[1] is None else shape[1]
        raise InputError(
            f"{where} must be one-hot, shape [{rows}, {columns}], found shape {array.shape}: "
            "write jax.nn.one_hot(labels, classes)."
        )
    array = array.astype(jnp.result_type(float) if not jnp.issubdtype(array.dtype, jnp.floating) else array.dtype)
    right = jnp.all((array == 0) | (array == 1), axis=1) & (jnp.sum(array, axis=1) == 1)
    if not isinstance(right, Tracer) and not np.all(np.asarray(right)):
        row = int(np.argmin(np.asarray(right)))
        raise InputError(
            f"{where} must be one-hot, found {np.asarray(array[row]).tolist()} in row {row}: "
            "write jax.nn.one_hot(labels, classes)."
        )
    return jnp.where(right[:, None], array, jnp.nan)


def table(where: str, x: Any, columns: int | None = None) -> Array:
    """Return `x` `[n, d]`, which has at least one row.

    Raises:
        InputError: for another shape.
        InputTypeError: for entries that are not floating point.
    """
    array = jnp.asarray(x)
    if array.ndim != 2 or not array.shape[0] or (columns is not None and array.shape[1] != columns):
        d = "d" if columns is None else columns
        raise InputError(f"{where} must be a table of shape [n, {d}] with at least one row, found shape {array.shape}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputTypeError(f"{where} must be floating point, found {array.dtype}: write it as .astype(float).")
    return array

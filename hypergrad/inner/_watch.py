"""Detection of divergence from the height of the inner loss at each step of a run.

A number that is not finite gives a status at once: a loss that had been growing overflowed, any other turned NaN. A run
whose numbers stay finite diverged if every height of its last quarter is far above every one of its first quarter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._solver import Status, first_failure

ENOUGH = 16  # steps of a fixed budget below which a rise may come from the choice of batches
_RISE = 10  # a loss that rose this many times further than it ever fell has diverged
_OVERFLOW = 1e3  # a loss that grew by more than this was on its way to overflow


class Heights(NamedTuple):
    """The inner loss along a run (for a map, how far a step moved), in scalars.

    Attributes:
        status: the status that the first number that was not finite implies, if there was one; int32.
        first, last, low: height at the first step, at the last one and at its lowest.
        early, late: largest height of the first quarter of the steps, smallest height of the last quarter.
    """

    status: Array
    first: Array
    last: Array
    low: Array
    early: Array
    late: Array


def new_heights(dtype: np.dtype) -> Heights:
    """The heights of a run without steps."""
    zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
    return Heights(jnp.int32(Status.OK), zero, zero, inf, -inf, inf)


def enter(heights: Heights, height: Array, residual: Array, t: Any, steps: Any) -> Heights:
    """Record a step.

    Args:
        heights: heights of the steps before it.
        height: the loss at its start, in the dtype of the heights.
        residual: a size of the gradient there, which is checked for NaN.
        t: the number of steps before it.
        steps: number of steps of the whole run.
    """
    quarter = steps // 4
    first = jnp.where(t == 0, height, heights.first)
    growing = (t > 0) & ((heights.last > _OVERFLOW * jnp.abs(first)) | (height == jnp.inf))
    kind = jnp.where(
        growing,
        int(Status.INNER_DIVERGED),
        jnp.where(jnp.isfinite(height), int(Status.NONFINITE_GRAD), int(Status.NONFINITE_LOSS)),
    )
    found = jnp.where(jnp.isfinite(height) & jnp.isfinite(residual), int(Status.OK), kind)
    return Heights(
        status=first_failure(heights.status, found),
        first=first,
        last=height,
        low=jnp.minimum(heights.low, height),
        early=jnp.where(t <= quarter, jnp.maximum(heights.early, height), heights.early),
        late=jnp.where(t >= steps - 1 - quarter, jnp.minimum(heights.late, height), heights.late),
    )


def rose(heights: Heights) -> Array:
    """Whether every height of the last quarter is far above every one of the first."""
    rise = heights.late - heights.early
    return (rise > jnp.abs(heights.early)) & (rise > _RISE * (heights.early - heights.low))

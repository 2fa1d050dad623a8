"""Functions that several domains share: limits of a dtype, the sigmoid between two ends, limits of one step."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._options import Number
from hypergrad._solver import InputError

# Maps are compiled whole: outside `jit` each of their operations would be a separate program.
compiled = functools.partial(jax.jit, inline=True)
compiled_between = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)


def tiny(u: Any) -> float:
    """The smallest normal number of the dtype."""
    return float(jnp.finfo(u.dtype).tiny)


def huge(u: Array) -> float:
    """A number of the dtype that may still be doubled without overflow."""
    return float(jnp.finfo(u.dtype).max) / 4


def reach(u: Array) -> float:
    """The distance at which a sigmoid is within one rounding error of its end."""
    return -math.log(float(jnp.finfo(u.dtype).eps))


def exponents(u: Array, share: float) -> tuple[float, float]:
    """The given share of the smallest and largest argument for which exp stays in the normal range of the dtype."""
    return share * math.log(tiny(u)), share * math.log(float(jnp.finfo(u.dtype).max))


def creep(before: Array) -> Array:
    """The lowest u that one step may reach: where the derivative is at rounding level, or then a factor e less."""
    return jnp.maximum(jnp.minimum(before, -reach(before)) - 1, 0.99 * math.log(tiny(before)))


def bounds(lo: float, hi: float, u: Array) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest number of the dtype in [lo, hi]."""
    low, high = np.asarray(lo, u.dtype), np.asarray(hi, u.dtype)
    low = np.nextafter(low, np.asarray(np.inf, u.dtype)) if float(low) < lo else low
    high = np.nextafter(high, np.asarray(-np.inf, u.dtype)) if float(high) > hi else high
    if not low < high:
        raise InputError(
            f"interval({lo!r}, {hi!r}) holds fewer than two numbers of dtype {u.dtype}: "
            "widen it, or shift it towards 0."
        )
    return low, high


@compiled_between
def sigmoid(lo: float, hi: float, u: Array) -> Array:
    """`lo + (hi − lo) σ(u)`, with both ends to relative accuracy."""
    low, high = bounds(lo, hi, u)
    width = high - low
    return jnp.where(u < 0, low + width * jax.nn.sigmoid(u), high - width * jax.nn.sigmoid(-u))


@compiled_between
def logit(lo: float, hi: float, x: Array) -> Array:
    """The inverse of `sigmoid`; an end is mapped to where the sigmoid reaches it within rounding."""
    low, high = bounds(lo, hi, x)
    above, below, far = x - low, high - x, reach(x)
    inside = (above > 0) & (below > 0)
    u = jnp.log(jnp.where(inside, above, 1)) - jnp.log(jnp.where(inside, below, 1))
    return jnp.where(inside, u, jnp.where(above > 0, far, -far)).astype(x.dtype)


def settle_sigmoid(u: Array, before: Array) -> Array:
    """A step from `before` to u, stopped on either side where the sigmoid still has a derivative."""
    return jnp.clip(u, creep(before), -creep(-before))


END = Number(
    static=True,
    advice="use positive() or real() for an open side; where ends differ between entries, use one leaf each",
)


def ends(name: str, lo: Any, hi: Any) -> tuple[float, float]:
    """The two ends as floats, once they are numbers and in order."""
    low, high = float(lo), float(hi)
    if not low < high:
        remedy = f"write {name}({high:g}, {low:g})" if high < low else "keep a fixed value out of hparams"
        raise InputError(f"{name}: lo must be less than hi, found lo={low:g}, hi={high:g}: {remedy}.")
    return low, high

r"""Whole numbers through a rounded sigmoid: λ = round(lo − ½ + (hi − lo + 1) σ(u)), differentiated straight through."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hypergrad._options import options
from hypergrad._solver import InputError
from hypergrad.domains._domain import Domain
from hypergrad.domains._maps import END, compiled_between, ends, logit, settle_sigmoid, sigmoid


@options(lo=END, hi=END)
def integer(lo: ArrayLike, hi: ArrayLike) -> Domain:
    r"""The whole numbers lo, lo + 1, ..., hi, as floats: the losses see the rounded value, the tuned one is unrounded.

    `λ = round(lo − ½ + (hi − lo + 1) σ(u))`, with the derivative of the expression before rounding (a straight-through
    derivative): biased, but it points the right way where the outer loss is a smooth function of a λ that happens to be
    whole. The best of the rounded values tried is in `result.best`.

    Args:
        lo: smallest value, a whole number.
        hi: largest value, a whole number above `lo`.

    Raises:
        InputError: unless `lo < hi`, both whole.
        InputTypeError: for ends that are not numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.integer(1, 10).to_constrained(jnp.asarray(0.2)))
    6.0
    """
    low, high = ends("integer", lo, hi)
    if low != round(low) or high != round(high):
        raise InputError(
            f"integer: lo and hi must be whole numbers, found lo={low:g}, hi={high:g}: round them, or use interval."
        )
    sides = (low - 0.5, high + 0.5)
    return Domain(
        f"integer({low:g}, {high:g})",
        functools.partial(_rounded, low, high),
        functools.partial(logit, *sides),
        settle_sigmoid,
        lambda x: (x >= low) & (x <= high) & (x == np.round(x)),
        f"a whole number between {low:g} and {high:g}",
        "round it, or use interval",
    )


@compiled_between
def _rounded(lo: float, hi: float, u: Array) -> Array:
    return _round_into(lo, hi, sigmoid(lo - 0.5, hi + 0.5, u))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _round_into(lo: float, hi: float, x: Array) -> Array:
    return jnp.clip(jnp.round(x), lo, hi)


@_round_into.defjvp
def _round_straight_through(lo: float, hi: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _round_into(lo, hi, *primals), tangents[0]

r"""Numbers between two ends through a sigmoid: λ = lo + (hi − lo) σ(u)."""

from __future__ import annotations

import functools

import numpy as np
from jax.typing import ArrayLike

from hypergrad._options import options
from hypergrad.domains._domain import Domain
from hypergrad.domains._maps import END, ends, logit, settle_sigmoid, sigmoid


@options(lo=END, hi=END)
def interval(lo: ArrayLike, hi: ArrayLike) -> Domain:
    r"""Numbers between two ends, lo ≤ λ ≤ hi, through a sigmoid: `lo + (hi − lo) σ(u)`.

    The ends belong to the domain, since rounding reaches them, but the derivative vanishes there: start inside.

    Args:
        lo: lower end, a finite number.
        hi: upper end, a finite number above `lo`.

    Raises:
        InputError: unless `lo < hi`, both finite.
        InputTypeError: for ends that are not numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.interval(0.0, 0.5).to_constrained(jnp.zeros(())))
    0.25
    """
    low, high = ends("interval", lo, hi)
    return Domain(
        f"interval({low:g}, {high:g})",
        functools.partial(sigmoid, low, high),
        functools.partial(logit, low, high),
        settle_sigmoid,
        lambda x: (x >= np.asarray(low, x.dtype)) & (x <= np.asarray(high, x.dtype)),
        f"between {low:g} and {high:g}",
        "start inside, or widen the interval",
    )

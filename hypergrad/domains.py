r"""Where hyperparameters may live: smooth maps from unconstrained coordinates u onto a domain.

    λ = T(u),   dF/du = (∂T/∂u)ᵀ dF/dλ,   u ∈ Rⁿ

    positive   softplus(u) + tiny          interval   lo + (hi − lo) σ(u)      simplex   softmax(u), last axis
    log        exp(u), u clipped           integer    round(lo − ½ + (hi − lo + 1) σ(u)), derivative of the unrounded

Differs from clipping λ after each step (projection) in that the outer optimizer sees a smooth problem, and from the
bijections of probabilistic programming in that
1. T(u) is in the domain for every u, ±inf included, in the dtype of the leaf: rounding never carries λ out of it;
2. `settle` stops one huge step where T still has a derivative, so that it is not the last one;
3. both ends of an interval are computed to relative accuracy.
Cost: elementwise.

A domain is given as a pytree prefix of the hyperparameters,
`{"l2": hg.domains.log(), "augment": hg.domains.interval(0, 1)}`; None stands for `real()`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _checks
from hypergrad._domain import Domain as Domain
from hypergrad._domain import to_constrained as to_constrained
from hypergrad._domain import to_unconstrained as to_unconstrained
from hypergrad._solver import InputError, InputTypeError


def real() -> Domain:
    """Every finite number: no transform.

    >>> import hypergrad as hg
    >>> hg.domains.real().name
    'real()'
    """
    return Domain("real()", _same, _same, lambda u, before: u, np.isfinite, "finite", "start from a finite number")


def positive() -> Domain:
    r"""λ > 0 through softplus, `log(1 + exp(u)) + tiny`: steps are additive where λ is large, multiplicative near zero.

    For a hyperparameter whose order of magnitude is unknown (a regularization strength) take `log()`.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.positive().to_constrained(jnp.float32(-1e30))) > 0
    True
    """
    return Domain(
        "positive()",
        _softplus,
        _softplus_inverse,
        lambda u, before: jnp.clip(u, _creep(before), _huge(u)),
        lambda x: np.isfinite(x) & (x > 0),
        "greater than 0",
        "start from a small positive number such as 1e-6",
    )


def log() -> Domain:
    r"""λ > 0 through exp(u): a step of the outer optimizer is a factor, whatever the magnitude.

    u is clipped where exp(u) would leave the normal range of the dtype (1e-38 to 1e38 in float32).

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> bool(jnp.isfinite(hg.domains.log().to_constrained(jnp.float32(1e30))))
    True
    """
    return Domain(
        "log()",
        _exp,
        _log,
        lambda u, before: jnp.clip(jnp.clip(u, before - _reach(u), before + _reach(u)), *_exponents(u, 0.99)),
        lambda x: np.isfinite(x) & (x > 0),
        "greater than 0",
        "start from a small positive number such as 1e-6",
    )


@_checks.suggest_names
def interval(lo: ArrayLike, hi: ArrayLike) -> Domain:
    r"""Between two numbers, lo ≤ λ ≤ hi, through a sigmoid: `lo + (hi − lo) σ(u)`.

    The ends belong to the domain, since rounding reaches them, but the derivative vanishes there: start inside.

    Args:
        lo: lower end, a finite number.
        hi: upper end, a finite number above `lo`.

    Raises:
        InputError: unless `lo < hi`, both finite.
        InputTypeError: for ends that are no numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.interval(0.0, 0.5).to_constrained(jnp.zeros(())))
    0.25
    """
    low, high = _ends("interval", lo, hi)
    return Domain(
        f"interval({low:g}, {high:g})",
        functools.partial(_sigmoid, low, high),
        functools.partial(_logit, low, high),
        _settle_sigmoid,
        lambda x: (x >= np.asarray(low, x.dtype)) & (x <= np.asarray(high, x.dtype)),
        f"between {low:g} and {high:g}",
        "start inside, or widen the interval",
    )


def simplex() -> Domain:
    r"""λ ≥ 0 with sum 1 over the last axis, through softmax(u): mixture weights.

    Corners and edges belong to the domain, since rounding reaches them, but the derivative vanishes there: start
    inside.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.simplex().to_constrained(jnp.zeros(4))[0])
    0.25
    """

    def settle(u: Array, before: Array) -> Array:
        u = jnp.clip(u, -_huge(u), _huge(u))
        u = u - jnp.max(u, axis=-1, keepdims=True)
        u = jnp.maximum(u, _creep(before - jnp.max(before, axis=-1, keepdims=True)))
        return u - jnp.mean(u, axis=-1, keepdims=True)

    def contains(x: np.ndarray) -> np.ndarray:
        if x.ndim == 0:
            return np.zeros((), bool)
        off = np.abs(np.sum(x, axis=-1, keepdims=True, dtype=np.float64) - 1)
        return (x >= 0) & (off <= math.sqrt(float(jnp.finfo(x.dtype).eps)))

    return Domain(
        "simplex()",
        _softmax,
        _softmax_inverse,
        settle,
        contains,
        "at least 0 with sum 1 over the last axis",
        "divide an array of positive numbers by its sum",
    )


@_checks.suggest_names
def integer(lo: ArrayLike, hi: ArrayLike) -> Domain:
    r"""The whole numbers lo, lo + 1, ..., hi, as floats: what the losses see is rounded, what is tuned is not.

    `λ = round(lo − ½ + (hi − lo + 1) σ(u))`, with the derivative of the expression before rounding (a straight-through
    derivative): biased, but it points the right way where the outer loss is a smooth function of a λ that happens to be
    whole. The best of the rounded values tried is in `result.best`.

    Args:
        lo: smallest value, a whole number.
        hi: largest value, a whole number above `lo`.

    Raises:
        InputError: unless `lo < hi`, both whole.
        InputTypeError: for ends that are no numbers.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> float(hg.domains.integer(1, 10).to_constrained(jnp.asarray(0.2)))
    6.0
    """
    low, high = _ends("integer", lo, hi)
    if low != round(low) or high != round(high):
        raise InputError(
            f"integer: lo and hi must be whole numbers, found lo={low:g}, hi={high:g}: round them, or use interval."
        )
    sides = (low - 0.5, high + 0.5)
    return Domain(
        f"integer({low:g}, {high:g})",
        functools.partial(_rounded, low, high),
        functools.partial(_logit, *sides),
        _settle_sigmoid,
        lambda x: (x >= low) & (x <= high) & (x == np.round(x)),
        f"a whole number between {low:g} and {high:g}",
        "round it, or use interval",
    )


# Maps are compiled whole: outside `jit` each of their operations would be a program of its own.
_map = functools.partial(jax.jit, inline=True)
_map_between = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)


def _same(u: Array) -> Array:
    return u


def _tiny(u: Any) -> float:
    return float(jnp.finfo(u.dtype).tiny)


def _huge(u: Array) -> float:
    return float(jnp.finfo(u.dtype).max) / 4


def _reach(u: Array) -> float:
    """How far out a sigmoid is within one rounding error of its end."""
    return -math.log(float(jnp.finfo(u.dtype).eps))


def _bounds(lo: float, hi: float, u: Array) -> tuple[np.ndarray, np.ndarray]:
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


@_map
def _softplus(u: Array) -> Array:
    return jax.nn.softplus(jnp.clip(u, -_huge(u), _huge(u))) + _tiny(u)


@_map
def _softplus_inverse(x: Array) -> Array:
    y = x - _tiny(x)
    return jnp.where(y > 0, y + jnp.log(-jnp.expm1(-jnp.where(y > 0, y, 1))), math.log(_tiny(x))).astype(x.dtype)


@_map
def _exp(u: Array) -> Array:
    return jnp.exp(jnp.clip(u, *_exponents(u, 0.999)))


@_map
def _log(x: Array) -> Array:
    return jnp.clip(jnp.log(x), *_exponents(x, 0.99))


def _exponents(u: Array, share: float) -> tuple[float, float]:
    """What exp can take in the normal range of the dtype, or that share of it."""
    return share * math.log(_tiny(u)), share * math.log(float(jnp.finfo(u.dtype).max))


@_map
def _softmax(u: Array) -> Array:
    return jax.nn.softmax(jnp.clip(u, -_huge(u), _huge(u)), axis=-1)


@_map
def _softmax_inverse(x: Array) -> Array:
    peak = jnp.log(jnp.max(x, axis=-1, keepdims=True))
    u = jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), peak - _reach(x))
    return u - jnp.mean(u, axis=-1, keepdims=True)


@_map_between
def _sigmoid(lo: float, hi: float, u: Array) -> Array:
    low, high = _bounds(lo, hi, u)
    width = high - low
    return jnp.where(u < 0, low + width * jax.nn.sigmoid(u), high - width * jax.nn.sigmoid(-u))


@_map_between
def _logit(lo: float, hi: float, x: Array) -> Array:
    low, high = _bounds(lo, hi, x)
    above, below, reach = x - low, high - x, _reach(x)
    inside = (above > 0) & (below > 0)
    u = jnp.log(jnp.where(inside, above, 1)) - jnp.log(jnp.where(inside, below, 1))
    return jnp.where(inside, u, jnp.where(above > 0, reach, -reach)).astype(x.dtype)


def _settle_sigmoid(u: Array, before: Array) -> Array:
    return jnp.clip(u, _creep(before), -_creep(-before))


def _creep(before: Array) -> Array:
    """How low u may go in one step: to where the derivative is at rounding level, from there on by a factor e in it."""
    return jnp.maximum(jnp.minimum(before, -_reach(before)) - 1, 0.99 * math.log(_tiny(before)))


@_map_between
def _rounded(lo: float, hi: float, u: Array) -> Array:
    return _round_into(lo, hi, _sigmoid(lo - 0.5, hi + 0.5, u))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _round_into(lo: float, hi: float, x: Array) -> Array:
    return jnp.clip(jnp.round(x), lo, hi)


@_round_into.defjvp
def _round_straight_through(lo: float, hi: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _round_into(lo, hi, *primals), tangents[0]


def _ends(name: str, lo: Any, hi: Any) -> tuple[float, float]:
    ends = []
    for end, value in (("lo", lo), ("hi", hi)):
        if isinstance(value, (bool, str)) or np.ndim(value) or not np.isreal(value):
            raise InputTypeError(
                f"{name}: {end} must be a number, found {value!r}: "
                "where the ends differ between entries, use one leaf each."
            )
        ends.append(float(value))
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            f"{name}: lo and hi must be finite, found lo={low:g}, hi={high:g}: "
            "use positive() or real() for an open side."
        )
    if not low < high:
        remedy = f"write {name}({high:g}, {low:g})" if high < low else "keep a fixed value out of hparams"
        raise InputError(f"{name}: lo must be less than hi, found lo={low:g}, hi={high:g}: {remedy}.")
    return low, high

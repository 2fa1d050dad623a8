r"""How wrong an unrolled hypergradient may be: rounding of the path, rounding of the derivative, truncation.

Rounding is measured, not derived. A *twin* repeats training and its derivative with parameters that each step perturbs
by sixteen units of rounding. The difference between twins is the error that arithmetic may have made, whatever
amplified it: an optimizer that does not settle, a chaotic map, a sum that cancels. Twins come in pairs that are
perturbed in opposite directions, with hypergradients g₊ and g₋:

    s = √(mean ‖g_twin − g‖²) / ‖g‖,    p = √(mean ‖w_twin − w‖²) / ‖w‖ where training ended,
    m = c_k s + c p² / (eps (1 + √T)) for k twins,    estimate = m / (1 − 4 m),  inf from m = ¼ on
    u = √(mean ‖g₊ + g₋ − 2g‖²) / (2 s ‖g‖),          estimate = inf  where u > .3 and s > 1e-4

Where errors are small and nothing jumps, the two of a pair lie on opposite sides of g at equal distances, and u is near
0. Where rounding decides on which side of a kink of the loss a step lies, or whether it is clipped, one twin of the two
comes out on the other side, and u is near .7: what the run itself did there no twin knows.

Where an optimizer moves by signs, as Lion does, a twin takes those signs the other way that rounding could turn:
`hypergrad._jaxpr.signs`. Where that separates the twins the estimate is inf, as it is at calls without twins.

Where the path amplifies rounding by A, the derivative, which depends on the curvature of the path as well, amplifies it
by A² with heavy tails, which a few twins need not show. Hence the term in p², which is negligible where A is near 1.

A twin costs as much as the call itself, so twins run only at a state's first call, and a pair at every 32nd call. In
between, the estimate is b · (s/b at the last twins), where b is what the growth of the adjoint and the
cancellation in ∂_w f predict: b alone does not see the path, and counts growth that never reaches a hyperparameter.

Source: Parker 1997 (Monte Carlo arithmetic) for twins, Hammersley & Morton 1956 for opposite ones; truncation as in
`dropped_reverse`.
Cost: a first call takes three runs of training and derivative, or five if a pair differs by more than 4e-5; every 32nd
call takes three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._curvature import joint_product
from hypergrad._tree import PyTree

_EVERY = 32  # calls from one pair of twins to the next
_PAIRS = 2  # of twins at the first call
_SURE = 4e-5  # spread below which one pair is enough
_FACTOR = (1.0, 0.5)  # of the spread of one pair, of two: sixteen and eight times what one unit of rounding does
_BENT, _SEEN = 0.3, 1e-4  # u above which no twin knows the error, and the spread from which u is no rounding itself
_CURVED = 0.02  # of the square of the path's spread over what it would be without amplification
_STALE = 2.0  # factor for calls between twins
_ROUNDED = 2.0  # units of rounding in a sum, and for each further sixteen terms as if they were random

_ROUNDING = 1.3  # calibrated in float32 against float64
_TRUNCATION = 6.0  # calibrated on ridge and logistic regression, condition numbers 1 to 100
_HIDDEN = 1 / 60  # with the factor above, a tenth of what could be hidden
_SHORT = 16  # steps below which the sensitivity of the outer gradient is not worth its price

_MEANINGLESS = 0.1  # relative error from which a hypergradient is noise
_APART = 4 * _MEANINGLESS  # spread of twins that comes to the same
_GROWN = 10.0  # growth from which that is called an explosion
_CHAOTIC = 1.6e4  # times the accumulated rounding: twins that end further apart show that training is noise
_TURNED = 128.0  # times the accumulated rounding: twins that end further apart took a sign the other way

T = TypeVar("T")


class Trust(NamedTuple):
    """The part of the last twins' comparison that the state carries on.

    Attributes:
        calls: number of calls with the state, int32.
        ratio: error measured by the last twins over the predicted one; 1 before there were any, and the largest finite
            number if they showed that nothing is known.
    """

    calls: Array
    ratio: Array


class Spread(NamedTuple):
    """The difference between twins.

    Attributes:
        count: number of twins, int32.
        grad: Σ ‖g_twin − g‖², over the square of the scale of g.
        path: Σ ‖w_twin − w‖² / ‖w‖² where training ended.
        bend: Σ ‖g₊ + g₋ − 2g‖² over pairs, over the square of the scale of g.
    """

    count: Array
    grad: Array
    path: Array
    bend: Array


def new_trust(params: PyTree) -> Trust:
    """The trust of a state that was never used."""
    return Trust(jnp.int32(0), jnp.ones((), _tree.dtype(params)))


def with_twins(
    run: Callable[[Array], T], like: T, seen: Callable[[T], tuple[PyTree, PyTree]], trust: Trust
) -> tuple[T, Spread]:
    """The result of `run(0)`, and its differences from its twins.

    Args:
        run: function from the number of a twin to its result; 0 is the run without added rounding.
        like: pytree with the shapes and dtypes of the result of `run`; a scalar may have another dtype.
        seen: function from the result of a run to its hypergradient and last parameters.
        trust: the `Trust` that the state carries.

    The run is the body of one loop, so that it is compiled once.
    """
    dtype = trust.ratio.dtype
    first = trust.calls == 0
    most = 2 * jnp.where(first, _PAIRS, jnp.where(trust.calls % _EVERY == 0, 1, 0))

    def more(carry: tuple[Array, T, PyTree, Spread]) -> Array:
        k, _, _, spread = carry
        unsure = (spread.count < 2) | ((spread.grad >= _SURE**2) & jnp.isfinite(spread.grad))
        return (k == 0) | ((k <= most) & unsure)

    def body(carry: tuple[Array, T, PyTree, Spread]) -> tuple[Array, T, PyTree, Spread]:
        k, kept, before, spread = carry
        found = jax.tree.map(lambda x, y: x if _tree.is_key(y) else x.astype(y.dtype), run(k), kept)
        moved, walked = (_tree.sub(x, y) for x, y in zip(seen(found), seen(kept), strict=True))
        at, end = seen(kept)
        gaps = _relative(moved, at), _relative(walked, end), _relative(_tree.add(moved, before), at)
        grad, path, bend = (gap.astype(dtype) ** 2 for gap in gaps)
        bend = jnp.where(k % 2 == 0, bend, 0)  # the second of a pair
        fresh = Spread(spread.count + 1, spread.grad + grad, spread.path + path, spread.bend + bend)
        return (k + 1, *_tree.where(k == 0, (found, before, spread), (kept, moved, fresh)))

    zero = jnp.zeros((), dtype)
    none = Spread(jnp.int32(0), zero, zero, zero)
    _, kept, _, spread = jax.lax.while_loop(more, body, (jnp.int32(0), like, _tree.zeros_like(seen(like)[0]), none))
    return kept, spread


def amplified(numbers: PyTree, length: int, growth: Array) -> Array:
    """The rounding error after `length` steps that amplify it by `growth`, relative to the adjoint (dimensionless)."""
    return _ROUNDING * _tree.eps(numbers) * (1 + math.sqrt(length)) * growth


def cancelled(
    outer: Callable[[PyTree, PyTree], tuple[Array, Any]], end: PyTree, hparams: PyTree, rhs: PyTree, length: int
) -> Array:
    """How much larger a unit of rounding in the parameters is in ∂_w f, whose terms cancel near a minimum of f."""
    if length < _SHORT:
        return jnp.ones((), _tree.dtype(end))
    moved, _ = joint_product(lambda w, h: outer(w, h)[0], end, hparams, end)
    return 1 + _ratio(_tree.norm(moved), _tree.norm(rhs))


def least(grad: PyTree, numbers: PyTree, length: int) -> Array:
    """The error of a sum of `length` contributions even if its terms are exact, or the error from underflow."""
    sums = _ROUNDED * _tree.eps(numbers) * (1 + math.sqrt(length) / 4)
    return sums + _tree.safe_divide(jnp.finfo(_tree.dtype(grad)).tiny, _tree.norm(grad), otherwise=0)


def rounding(
    spread: Spread, predicted: Array, least: Array, calm: Array, trust: Trust, signs: bool = False
) -> tuple[Array, Trust]:
    """The rounding error relative to the computed ‖g‖ (dimensionless), and the `Trust` for the next call.

    Args:
        spread: spread of the twins of this call, if there were any.
        predicted: error predicted from growth and cancellation.
        least: error that no twin sees.
        calm: distance between the ends of twins where nothing is amplified.
        trust: the `Trust` that the state carries.
        signs: whether the optimizer moves by signs. The error is then known at calls with twins alone, and only if no
            sign that rounding could turn separated them.
    """
    count = jnp.maximum(spread.count, 1)
    apart = jnp.sqrt(spread.grad / count)
    factor = jnp.where(count <= 2, *_FACTOR).astype(predicted.dtype)
    twins = factor * apart + _CURVED * spread.path / count / calm + least
    fresh, first = spread.count > 0, trust.calls == 0
    if signs:
        together = jnp.maximum(apart, jnp.sqrt(spread.path / count)) <= _TURNED * calm  # not so for NaN
        return jnp.where(fresh & together, twins, jnp.inf), Trust(trust.calls + 1, trust.ratio)
    bent = (spread.bend > _BENT**2 * 2 * spread.grad) & (apart > _SEEN)
    twins = jnp.where(bent, jnp.inf, twins)
    ratio = _tree.safe_divide(twins, predicted)
    largest = jnp.finfo(trust.ratio.dtype).max  # stands for inf in the state, whose numbers are finite
    ratio = jnp.where(first | (trust.ratio == largest), ratio, jnp.fmax(ratio, trust.ratio / 4))
    ratio = jnp.minimum(jnp.where(fresh, ratio, trust.ratio), largest).astype(trust.ratio.dtype)
    scaled = jnp.where(ratio == largest, jnp.inf, _STALE * ratio * predicted)
    told = jnp.where(fresh & first, twins, jnp.maximum(scaled, least))
    # Nothing is kept from a call that was not finite: the next one measures again.
    trust = _tree.where(jnp.isfinite(spread.grad + predicted), Trust(trust.calls + 1, ratio), trust)
    return jnp.where(jnp.isnan(told), jnp.inf, told), trust


def exploded(
    rounding: Array, amplified: Array, growth: Array, calm: Array, spread: Spread, signs: bool = False
) -> Array:
    """Whether the hypergradient is noise because something was amplified: the adjoint, or the path itself.

    Where an optimizer moves by `signs`, one that rounding turned separates twins without anything being amplified.
    """
    apart, path = (jnp.sqrt(x / jnp.maximum(spread.count, 1)) for x in (spread.grad, spread.path))
    adjoint = (rounding > _MEANINGLESS) & (amplified > _MEANINGLESS) & (growth > _GROWN)
    return adjoint if signs else adjoint | ((apart > _APART) & (path > _CHAOTIC * calm))


def estimate(grad: PyTree, indirect: PyTree, rounding: Array, dropped: Array) -> Array:
    """Relative error of `grad` against the derivative of the whole run (dimensionless).

    Rounding counts as a share of the true value, which may be smaller than the computed one by that much. It counts
    four times, since strong amplification of rounding has heavy tails, and a run that stopped moving rounds alike in
    all twins.
    """
    through = _ratio(_tree.norm(indirect), _tree.norm(grad))
    told = jnp.where(4 * rounding < 1, _tree.safe_divide(rounding, 1 - 4 * rounding), jnp.inf)
    told = told + _TRUNCATION * jnp.where(dropped == 0, 0, dropped * through)
    return jnp.where(jnp.isnan(told) | ~_tree.all_finite(grad), jnp.inf, told)


def dropped_reverse(sizes: Array, kept: Array, more: int) -> Array:
    """Share of the indirect part that truncation left out, from ‖c_t‖ and ‖a_t‖ of the steps it kept, [K, 2].

    The contributions continue to decay, but no faster than the adjoint did at the end: a slow mode that starts small is
    seen there first.
    """
    half = max(sizes.shape[0] // 8, 1)
    adjoint = sizes[:, 1]
    slow = _ratio(jnp.sum(adjoint[-half:]), jnp.sum(adjoint[-2 * half : -half])) ** (1 / half)
    return _share(_tail(sizes[:, 0], more, jnp.minimum(slow, 1)), kept)


def dropped_forward(sizes: Array, kept: Array, indirect: PyTree, more: int) -> Array:
    """Like `dropped_reverse`, from the changes of the tangents at each step, [K, p], and their final sizes, [p]."""
    flat = jnp.concatenate([jnp.abs(leaf).ravel().astype(sizes.dtype) for leaf in jax.tree.leaves(indirect)])
    shares = jax.vmap(lambda s, k: _share(_tail(s, more, jnp.zeros((), s.dtype)), k), in_axes=(1, 0))(sizes, kept)
    unknown = jnp.any(jnp.isinf(shares) & (flat > 0))  # the norm of an infinite share is NaN
    known = jnp.where(jnp.isinf(shares), 0, shares)
    return jnp.where(unknown, jnp.inf, _ratio(_tree.norm(known * flat), _tree.norm(flat)))


def dropped_whole(decay: Array, length: int, more: int) -> Array:
    """Like `dropped_reverse`, if only the adjoint's size at the beginning is known: it is taken to stay constant."""
    if not more:
        return jnp.zeros_like(decay)
    return jnp.where(decay < 1, jnp.minimum(1, decay * more / length), jnp.inf)


def _tail(sizes: Array, more: int, slow: Array) -> Array:
    """Σ of `more` further terms of a sequence; inf if it did not decay.

    The decay continues as in its second half, as in its last eighths, or by the factor `slow` per term, whichever is
    slowest. A mode too small to be seen may still contribute to every term: at least `_HIDDEN` of that counts.
    """
    window = sizes.shape[0] // 4 or sizes.shape[0] // 2
    if not window:
        return jnp.full((), jnp.inf, sizes.dtype)
    part = max(window // 2, 1)
    ends = lambda width: (jnp.sum(sizes[-2 * width : -width]), jnp.sum(sizes[-width:]))
    (old, new), (before, last) = ends(window), ends(part)
    ratio = _tree.safe_divide(new, old, otherwise=0)
    late = jnp.minimum(_tree.safe_divide(last, before, otherwise=0), 1) ** (window / part)
    safe = jnp.clip(jnp.maximum(jnp.maximum(ratio, late), slow**window), 0, 1 - 1e-6)
    level = jnp.where(safe > ratio, last * (window / part), new * ratio)
    tail = level * (1 - safe ** (more / window)) / (1 - safe)
    return jnp.where(ratio < 1, jnp.maximum(tail, _HIDDEN * more * last / part), jnp.inf)


def _share(tail: Array, kept: Array) -> Array:
    """The share of the whole that is in the tail, if both point the same way; inf for an infinite tail."""
    return jnp.where(jnp.isinf(tail), jnp.inf, _ratio(tail, kept + tail))


def _ratio(x: Array, y: Array) -> Array:
    return _tree.safe_divide(x, y, otherwise=jnp.where(x > 0, jnp.inf, 0))


def _relative(gap: PyTree, y: PyTree) -> Array:
    size = _tree.norm(gap)
    return jnp.where(size == 0, 0, _tree.safe_divide(size, _tree.norm(y)))

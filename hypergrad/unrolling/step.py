r"""One training step as unrolling needs it: taken, pulled back, pushed forward.

    (w, s, m) ↦ Ψ_t(w, s, m, λ),     w: parameters,   s, m: floating-point parts of optimizer's and model's state

Counters and keys are carried along and never differentiated. The gradient inside a step is differentiated in mixed
mode: along the cotangent ḡ of the gradient, one forward-mode product of the joint gradient (∂_w h, ∂_m h, ∂_λ h) gives
H ḡ and the cross terms together, where reverse mode over reverse mode would store every intermediate of both passes.

Source: Kemaev et al. 2025 (MixFlow-MG), arXiv:2505.00793. Differs: the recursion over steps is written out, so that
only what it names is ever stored, and no custom derivative rule is involved.
Cost: a step pulled back is about two gradients of the inner loss (three with a model state), a step pushed forward
about a half for each direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_same_structure
from hypergrad._curvature import joint_product
from hypergrad._jaxpr.semigradient import is_gradient, released
from hypergrad._jaxpr.sensitivity import influence
from hypergrad._jaxpr.signs import doubted, takes_signs
from hypergrad._problem import Objective
from hypergrad._solver import Status, code, first_failure
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner
from hypergrad.inner._watch import ENOUGH, Heights, enter, new_heights, rose

_DOUBT = 32  # units of rounding, for each step as if they were random, up to which signs are doubtful
_ULPS = 16  # units of rounding by which each step of a twin is perturbed


class Point(NamedTuple):
    """The point that training has reached, from which the next step starts."""

    params: PyTree
    state: PyTree
    model_state: PyTree


class Moving(NamedTuple):
    """The part of a point that derivatives flow through, or its tangents or cotangents."""

    params: PyTree
    floats: list[Array]  # floating-point leaves of the optimizer's state
    model: list[Array]  # floating-point leaves of the model's state


class Record(NamedTuple):
    """A summary of training in scalars.

    Attributes:
        heights: the inner loss; for a map, how far a step moved.
        peak, residual: largest entry of the gradient (for a map, of the move) over the run, and at the last step.
    """

    heights: Heights
    peak: Array
    residual: Array


class Taken(NamedTuple):
    """The result of one step.

    Attributes:
        point: where the next one starts.
        height: inner loss before the step; for a map, how far it moved.
        residual: largest entry of the gradient before the step; for a map, how far it moved.
        grads: the gradient before the step; None for a map.
    """

    point: Point
    height: Array
    residual: Array
    grads: PyTree


class Step(NamedTuple):
    """One training step at a point.

    Attributes:
        take: `(point, t) -> Taken`.
        pull: `(point, grads, t, cotangent) -> (cotangent, contribution)`, the second a pytree like the hyperparameters;
            `grads` as in `Taken`, or None unless it `uses_grads()`.
        uses_grads: `() -> bool`, whether pulling back can use the gradient.
        replay: `(point, grads, model_state, t) -> point`, the step once more where its gradient and the model's state
            after it are known; None for a map.
        through: `(moving, hparams, point, t) -> (moving, Taken)`, differentiable in the first two.
        watch: `(record, taken, t) -> record`, with the step entered.
    """

    take: Callable[[Point, Any], Taken]
    pull: Callable[[Point, PyTree, Any, Moving], tuple[Moving, PyTree]]
    uses_grads: Callable[[], bool]
    replay: Any
    through: Callable[[Moving, PyTree, Point, Any], tuple[Moving, Taken]]
    watch: Callable[[Record, Taken, Any], Record]


def make_step(
    inner: Inner, objective: Objective, hparams: PyTree, start: Point, twin: Any = 0, signs: bool = False
) -> Step:
    """The step of an inner optimizer (`inner.update`) or of a map (`inner.move`).

    Each step of a `twin` other than 0 moves every parameter up or down by a few units of rounding at its end, and takes
    the optimizer's `signs` that rounding could turn the other way. Twins 1 and 2, 3 and 4, and so on are moved in
    opposite directions. Zeros stay zeros, as they do in arithmetic.
    """
    descends, update = inner.update is not None, inner.update
    if signs and update is not None:
        doubt = _DOUBT * _tree.eps(start.params) * (1 + math.sqrt(inner.steps or 0))
        update = doubted(update, jnp.where(twin == 0, 0, doubt))
    rule = _descent(update, objective, start, hparams) if descends else _map(inner.move, objective)

    def through(here: Moving, hparams: PyTree, point: Point, t: Any) -> tuple[Moving, Taken]:
        after, taken = rule.through(here, hparams, point, t)
        return off(after, t), taken._replace(point=off(taken.point, t))

    def off(at: Any, t: Any) -> Any:
        return at._replace(params=_off(at.params, twin, t))

    def take(point: Point, t: Any) -> Taken:
        return through(moving(point), hparams, point, t)[1]

    return Step(
        take,
        lambda point, grads, t, cotangent: rule.pull(hparams, point, grads, t, cotangent),
        rule.uses_grads,
        (lambda point, grads, model, t: off(rule.replay(hparams, point, grads, model), t)) if rule.replay else None,
        through,
        lambda record, taken, t: _watch(record, taken, t, inner.steps or 0),
    )


def moves_by_signs(inner: Inner, start: Point, hparams: PyTree) -> bool:
    """Whether the optimizer moves by the signs of numbers, as Lion does."""
    return inner.update is not None and takes_signs(inner.update, start.params, start.params, start.state, hparams)


def _off(params: PyTree, twin: Any, t: Any) -> PyTree:
    """Each number times 1 ± `_ULPS` units of rounding; times 1 for twin 0.

    The sign is a hash of the number, the step and the pair, and the opposite one for the second of a pair. Like the
    error of arithmetic, it is the same for equal numbers, so that symmetries are kept.
    """
    if isinstance(twin, int) and twin == 0:
        return params
    pair = (jnp.uint32(twin) + 1) // 2
    seed = jnp.uint32(t) * jnp.uint32(2654435761) + pair * jnp.uint32(0x9E3779B1)
    size = jnp.where(twin == 0, 0, jnp.where(jnp.uint32(twin) % 2 == 1, _ULPS, -_ULPS))
    return jax.tree.map(lambda leaf: _leaf_off(leaf, seed, size), params)


@jax.jit  # traced once for all leaves of a shape
def _leaf_off(leaf: Array, seed: Array, size: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(jnp.abs(leaf)).astype(jnp.float32), jnp.uint32)
    bits = (bits ^ seed) * jnp.uint32(0x846CA68B)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x9E3779B1)
    sign = jnp.where(bits >> 31, -size, size).astype(leaf.dtype)
    return leaf * (1 + jnp.finfo(leaf.dtype).eps * sign)


class _Rule(NamedTuple):
    """The functions that `Step` is made of, with the hyperparameters as an argument."""

    through: Callable[[Moving, PyTree, Point, Any], tuple[Moving, Taken]]
    pull: Callable[[PyTree, Point, PyTree, Any, Moving], tuple[Moving, PyTree]]
    uses_grads: Callable[[], bool] = lambda: False
    replay: Any = None


def _descent(update: Any, objective: Objective, start: Point, hparams: PyTree) -> _Rule:
    def loss_at(point: Point, t: Any) -> Callable[[PyTree, list[Array], PyTree], tuple[Array, PyTree]]:
        _, combine = _tree.partition(point.model_state)

        def loss(params: PyTree, model: list[Array], hparams: PyTree) -> tuple[Array, PyTree]:
            value, fresh = objective.stochastic(params, hparams, combine(model), t)
            return value, like(fresh, point.model_state)

        return loss

    def updated(
        grads: PyTree, params: PyTree, floats: list[Array], hparams: PyTree, point: Point
    ) -> tuple[PyTree, PyTree]:
        _, combine = _tree.partition(point.state)
        params, state = update(grads, params, combine(floats), hparams)
        return like(params, point.params), like(state, point.state)

    def pull_update(
        grads: PyTree, hparams: PyTree, point: Point, params: PyTree, floats: list[Array]
    ) -> tuple[PyTree, PyTree, list[Array], PyTree]:
        def moved(grads: PyTree, w: PyTree, s: list[Array], h: PyTree) -> tuple[PyTree, list[Array]]:
            new, state = updated(grads, w, s, h, point)
            return new, _tree.partition(state)[0]

        here = moving(point)
        return jax.vjp(moved, grads, here.params, here.floats, hparams)[1]((params, floats))

    # Where the update is not the gradient of the loss, its Jacobian is not symmetric: each step is differentiated as it
    # is, including what stop_gradient holds back.
    symmetric = is_gradient(lambda w: loss_at(start, 0)(w, moving(start).model, hparams)[0], start.params)

    # Pulling back SGD needs no gradient; pulling back Adam does. Storing the gradient saves a second evaluation.
    # Forward mode pulls nothing back, and is spared the trace.
    @functools.cache
    def uses_grads() -> bool:
        first = moving(start)
        seen = influence(pull_update, start.params, hparams, start, first.params, first.floats)
        return symmetric and any(leaf.value for leaf in seen.values())

    def through(here: Moving, hparams: PyTree, point: Point, t: Any) -> tuple[Moving, Taken]:
        evaluate = jax.value_and_grad(loss_at(point, t), has_aux=True)
        evaluate = evaluate if symmetric else released(evaluate)
        (loss, model_state), grads = evaluate(here.params, here.model, hparams)
        after = Point(*updated(grads, here.params, here.floats, hparams, point), model_state)
        return moving(after), Taken(after, loss, _tree.max_abs(grads), grads)

    def pull(hparams: PyTree, point: Point, grads: PyTree, t: Any, cotangent: Moving) -> tuple[Moving, PyTree]:
        loss, model = loss_at(point, t), moving(point).model
        along, kept, floats, contribution = pull_update(
            grads if uses_grads() else point.params, hparams, point, cotangent.params, cotangent.floats
        )
        curved, (mixed, cross) = joint_product(lambda w, rest: loss(w, *rest)[0], point.params, (model, hparams), along)
        if model:  # m_{t+1} = M(w, m, λ), pulled back along with the gradient
            carried = lambda *at: _tree.partition(loss(*at)[1])[0]
            seen = jax.vjp(carried, point.params, model, hparams)[1](cotangent.model)
            curved, mixed, cross = _tree.add((curved, mixed, cross), seen)
        return Moving(_tree.add(kept, curved), floats, mixed), _tree.add(contribution, cross)

    def replay(hparams: PyTree, point: Point, grads: PyTree, model_state: PyTree) -> Point:
        return Point(*updated(grads, point.params, moving(point).floats, hparams, point), model_state)

    return _Rule(through, pull if symmetric else _plain(through), uses_grads, replay)


def _map(move: Any, objective: Objective) -> _Rule:
    def through(here: Moving, hparams: PyTree, point: Point, t: Any) -> tuple[Moving, Taken]:
        _, combine = _tree.partition(point.state)
        params, state = move(objective, here.params, combine(here.floats), hparams, t)
        check_same_structure(
            "the map's result", params, point.params, "a map returns parameters like those it is given."
        )
        params, state = like(params, point.params), like(state, point.state)
        size = _tree.max_abs(_tree.sub(params, point.params))
        after = Point(params, state, point.model_state)
        return moving(after)._replace(model=here.model), Taken(after, size, size, None)

    return _Rule(through, _plain(through))


def _plain(through: Any) -> Any:
    """A rule that pulls back any step in plain reverse mode."""

    def pull(hparams: PyTree, point: Point, grads: PyTree, t: Any, cotangent: Moving) -> tuple[Moving, PyTree]:
        del grads
        return jax.vjp(lambda m, h: through(m, h, point, t)[0], moving(point), hparams)[1](cotangent)

    return pull


def moving(point: Point) -> Moving:
    """The part of a point that derivatives flow through."""
    return Moving(point.params, *(_tree.partition(part)[0] for part in (point.state, point.model_state)))


def like(new: PyTree, old: PyTree) -> PyTree:
    """`new` in the dtypes of `old`, so that a step can be repeated in a loop."""
    return jax.tree.map(lambda a, b: a if _tree.is_key(b) else jnp.asarray(a).astype(b.dtype), new, old)


def new_record(params: PyTree) -> Record:
    """The record of a run without steps."""
    zero = jnp.zeros((), _tree.dtype(params))
    return Record(new_heights(_tree.dtype(params)), zero, zero)


def _watch(record: Record, taken: Taken, t: Any, steps: int) -> Record:
    height, residual = (x.astype(record.peak.dtype) for x in (taken.height, taken.residual))
    return Record(
        heights=enter(record.heights, height, residual, t, steps),
        peak=jnp.fmax(record.peak, residual),
        residual=residual,
    )


def training_status(inner: Inner, record: Record, end: PyTree) -> Array:
    """Whether the run diverged or met a number that is not finite; int32.

    As in `hg.inner.gradient`, a loss diverged if every value of the last quarter of the run is far above every one of
    the first quarter. A map has no loss, and may wander; it diverged if it overflowed after its steps had grown.
    """
    descends = inner.update is not None
    grown = rose(record.heights) & descends & ((inner.steps or 0) >= ENOUGH)
    status = first_failure(record.heights.status, code(grown | ~_tree.all_finite(end), Status.INNER_DIVERGED))
    if descends:
        return status
    # A map that is not finite has no loss to blame.
    return jnp.where(status == int(Status.NONFINITE_LOSS), int(Status.NONFINITE_GRAD), status).astype(jnp.int32)

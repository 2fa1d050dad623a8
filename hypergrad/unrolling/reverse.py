r"""Reverse mode through training, written out, within a budget of stored points.

    a_T = ∂_{(w, m)} f,   (a_t, c_t) = (∂Ψ_t/∂(w, s, m))ᵀ a_{t+1}, (∂Ψ_t/∂λ)ᵀ a_{t+1},   g = ∂_λ f + Σ_t c_t

The plan for storage is a list of branching factors (k_d, ..., k_1): a block of k_d ⋯ k_1 steps stores where each of its
k_d children starts, and each child is later run again from there in the same way. (T) stores every step; (√T, √T) is
classical checkpointing; (k, ..., k) holds k log_k T points at a time.

Where the gradients of all steps are kept, a step is run again by the optimizer's update alone, which costs next to
nothing. Blocks are cut as in the tree; within the last ones every step is replayed from the block's start.

Source: Franceschi et al. 2017, arXiv:1703.01785 (the recursion); Griewank 1992 and Engstrom et al. 2025 (REPLAY),
arXiv:2503.13751 (the tree). Differs: mixed-mode steps (see `step.py`); contributions are summed block by block, so
that rounding grows with the square root of what one running sum would give; the adjoint starts with unit norm.
Cost for T steps: training once, once more for each level below the first, and about two gradients a step.
Memory: (k_1 + ... + k_d) points; with gradients kept T gradients, and (k_2 + ... + k_d) points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._tree import PyTree
from hypergrad.unrolling.step import Moving, Point, Record, Step, Taken

_FAN = 8  # most children of a node of the tree
_LONG = 64  # sums longer than this are taken block by block

Plan = tuple[int, ...]
T = TypeVar("T")


class Stored(NamedTuple):
    """The state kept at the beginning of a block, or of many blocks, stacked.

    Attributes:
        point: where it starts.
        grads: for a single step, its gradient, if pulling back uses it.
    """

    point: Point
    grads: PyTree


class Kept(NamedTuple):
    """The data from which a step can be replayed, stacked: its gradient, and the model's state after it."""

    grads: PyTree
    model_state: PyTree


class Backward(NamedTuple):
    """The progress of the recursion backwards.

    Attributes:
        adjoint: a_t.
        total: Σ c over the steps passed, a pytree like the hyperparameters.
        growth: max ‖a‖ (of the parameters) so far.
        sizes: ‖c_t‖ and ‖a_t‖ (of the parameters) by step, [T, 2]; None unless asked for.
    """

    adjoint: Moving
    total: PyTree
    growth: Array
    sizes: Array | None


def plan(remat: str, steps: int, point_bytes: int, memory: float | None) -> Plan:
    """Branching factors for `steps` steps; `auto` takes the fastest that stores at most `memory` bytes."""
    if steps == 0:
        return ()
    if remat == "auto":
        budget = max(2.0**30, 16.0 * point_bytes) if memory is None else float(memory)
        if steps * point_bytes <= budget:
            remat = "step"
        else:
            remat = "sqrt" if sum(_factors(steps, 2)) * point_bytes <= budget else "tree"
    if remat == "step":
        return (steps,)
    if remat == "sqrt":
        return _factors(steps, 2)
    return _factors(steps, max(1, math.ceil(math.log(steps) / math.log(_FAN) - 1e-9)))


def _factors(steps: int, depth: int) -> Plan:
    """`depth` factors of about equal size whose product is `steps`, or the least above it if there are none near."""
    factors = []
    for level in range(depth, 1, -1):
        ideal = steps ** (1 / level)
        near = [k for k in range(math.ceil(ideal / 1.5), math.floor(1.5 * ideal) + 1) if steps % k == 0]
        factors.append(min(near, key=lambda k: abs(k - ideal)) if near else math.ceil(ideal - 1e-9))
        steps = -(-steps // factors[-1])
    return tuple(k for k in (steps, *factors) if k > 1) or (1,)


def train(step: Step, point: Point, begin: Any, length: Any, record: Record) -> tuple[Point, Record]:
    """Take `length` steps from step `begin` on, and store nothing."""

    def body(i: Any, carry: tuple[Point, Record]) -> tuple[Point, Record]:
        taken = step.take(carry[0], begin + i)
        return taken.point, step.watch(carry[1], taken, begin + i)

    return _loop(length, body, (point, record))


def train_and_store(
    step: Step, layout: Plan, point: Point, begin: int, length: int, record: Record
) -> tuple[Point, Stored, Record]:
    """Like `train`, but store where the children of the top block start."""
    size = math.prod(layout[1:])

    def child(i: Any, carry: tuple[Point, Stored, Record]) -> tuple[Point, Stored, Record]:
        point, stored, record = carry
        if size == 1:
            taken = step.take(point, begin + i)
            return taken.point, _put(stored, i, _stored(step, point, taken)), step.watch(record, taken, begin + i)
        after, record = train(step, point, begin + i * size, _length(layout, i, length), record)
        return after, _put(stored, i, Stored(point, None)), record

    return _loop(layout[0], child, (point, _room(step, layout, point), record))


def train_and_keep_gradients(
    step: Step, point: Point, begin: int, length: int, record: Record
) -> tuple[Point, Kept, Record]:
    """Like `train`, but keep the data from which the steps can be replayed."""

    def body(i: Any, carry: tuple[Point, Kept, Record]) -> tuple[Point, Kept, Record]:
        point, kept, record = carry
        taken = step.take(point, begin + i)
        kept = _put(kept, i, Kept(taken.grads, taken.point.model_state))
        return taken.point, kept, step.watch(record, taken, begin + i)

    return _loop(length, body, (point, _stack(length, Kept(point.params, point.model_state)), record))


def sweep(step: Step, layout: Plan, stored: Stored, begin: Any, length: Any, last: int, back: Backward) -> Backward:
    """Take the recursion from the end of a block to its beginning.

    Args:
        step: the training step.
        layout: branching factors of the block.
        stored: where its children start, stacked.
        begin: first step of the block.
        length: its number of steps.
        last: number of steps of the whole run; row k of `back.sizes` is the step `last - 1 - k`.
        back: the recursion at the block's end.
    """
    size = math.prod(layout[1:])

    def child(i: Any, back: Backward) -> Backward:
        at = begin + i * size
        here = jax.tree.map(lambda x: x[i], stored)
        if size == 1:
            return _pull(step, here, at, last, back)
        part = _length(layout, i, length)
        return sweep(step, layout[1:], _store(step, layout[1:], here.point, at, part), at, part, last, back)

    return _sum_down(_count(layout, length), layout[0], child, back)


def sweep_replayed(
    step: Step, layout: Plan, kept: Kept, point: Point, begin: Any, length: Any, last: int, back: Backward
) -> Backward:
    """Like `sweep`, for a block from `point` on, by replaying its steps; `kept` ends with the run's last step."""
    size, first = math.prod(layout[1:]), last - jax.tree.leaves(kept.grads)[0].shape[0]

    def again(point: Point, t: Any) -> Taken:
        grads, model_state = jax.tree.map(lambda x: x[t - first], kept)
        zero = jnp.zeros((), _tree.dtype(point.params))
        return Taken(step.replay(point, grads, model_state, t), zero, zero, grads)

    replayed = step._replace(take=again)
    starts = _store(replayed, layout, point, begin, length) if size > 1 else None

    def child(i: Any, back: Backward) -> Backward:
        at = begin + i * size
        if size > 1:
            part = _length(layout, i, length)
            here = jax.tree.map(lambda x: x[i], starts).point
            return sweep_replayed(step, layout[1:], kept, here, at, part, last, back)
        here = _loop(i, lambda k, p: again(p, begin + k).point, point)
        return _pull(step, Stored(here, jax.tree.map(lambda x: x[at - first], kept.grads)), at, last, back)

    return _sum_down(_count(layout, length), layout[0], child, back)


def _pull(step: Step, here: Stored, t: Any, last: int, back: Backward) -> Backward:
    adjoint, contribution = step.pull(here.point, here.grads, t, back.adjoint)
    size = jnp.sqrt(_tree.vdot(adjoint.params, adjoint.params)).astype(back.growth.dtype)
    sizes = back.sizes
    if sizes is not None:
        both = jnp.stack([_tree.norm(contribution).astype(sizes.dtype), size.astype(sizes.dtype)])
        sizes = sizes.at[last - 1 - t].set(both)
    # A comparison with NaN is false, so the growth before the overflow is kept, which explains it.
    growth = jnp.where(size > back.growth, size, back.growth)
    return Backward(adjoint, _tree.add(back.total, contribution), growth, sizes)


def _store(step: Step, layout: Plan, point: Point, begin: Any, length: Any) -> Stored:
    """The points where the children of a block start; the last child is run only if its gradient is wanted."""
    size = math.prod(layout[1:])
    count, room = _count(layout, length), _room(step, layout, point)

    def child(i: Any, carry: tuple[Point, Stored]) -> tuple[Point, Stored]:
        point, stored = carry
        if size == 1:
            taken = step.take(point, begin + i)
            return taken.point, _put(stored, i, _stored(step, point, taken))
        after = _loop(size, lambda k, p: step.take(p, begin + i * size + k).point, point)
        return after, _put(stored, i, Stored(point, None))

    if room.grads is not None:
        return _loop(count, child, (point, room))[1]
    point, stored = _loop(count - 1, child, (point, room))
    return _put(stored, count - 1, Stored(point, None))


def _count(layout: Plan, length: Any) -> Any:
    """The number of children of a block of `length` steps; a Python integer, where it can be."""
    size = math.prod(layout[1:])
    return -(-length // size)


def _length(layout: Plan, i: Any, length: Any) -> Any:
    """The number of steps in child `i` of a block. The last is shorter where the factors do not divide `length`."""
    size = math.prod(layout[1:])
    return size if isinstance(length, int) and length == layout[0] * size else jnp.minimum(size, length - i * size)


def _loop(length: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    return body(0, carry) if isinstance(length, int) and length == 1 else jax.lax.fori_loop(0, length, body, carry)


def _sum_down(count: Any, most: int, body: Callable[[Any, Backward], Backward], back: Backward) -> Backward:
    """`body(count - 1)` to `body(0)`, with a total of its own for each block of about √count."""
    width = most if most <= _LONG else _factors(most, 2)[1]
    exact = isinstance(count, int) and count % width == 0

    def block(j: Any, back: Backward) -> Backward:
        fresh = back._replace(total=_tree.zeros_like(back.total))
        length = width if exact else jnp.minimum(width, count - j * width)
        part = _loop(length, lambda i, b: body(count - 1 - (j * width + i), b), fresh)
        return part._replace(total=_tree.add(back.total, part.total))

    return _loop(1 if most <= width else -(-count // width), block, back)


def stored_by_step(step: Step, point: Point) -> Stored:
    """The part of one step that is kept; a gradient is like the parameters."""
    return Stored(point, point.params if step.uses_grads() else None)


def _stored(step: Step, point: Point, taken: Taken) -> Stored:
    return Stored(point, taken.grads if step.uses_grads() else None)


def _room(step: Step, layout: Plan, point: Point) -> Stored:
    return _stack(layout[0], stored_by_step(step, point) if len(layout) == 1 else Stored(point, None))


def _stack(count: int, one: T) -> T:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), one)


def _put(stored: T, i: Any, here: T) -> T:
    return jax.tree.map(lambda room, x: room.at[i].set(x), stored, here)

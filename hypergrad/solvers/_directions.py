r"""Single-loop bilevel optimization: three directions from blocks of rows, and five ways to estimate them.

    w ← w − ρ d_w,   d_w ≈ ∂_w h                     the parameters
    v ← v − ρ d_v,   d_v ≈ (∂²_{ww} h) v + ∂_w f     the adjoint; at rest v = −(∂²_{ww} h)⁻¹ ∂_w f
    g = d_λ,         d_λ ≈ (∂²_{λw} h) v + ∂_λ f     the hypergradient, by which `tune` moves λ

Five terms enter: three on a block of training rows, two on a block of validation rows. Each method is one function from
the point (w, v, λ) to the next, and differs from the others in how it estimates the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hypergrad import _tree
from hypergrad._problem import Problem, inner_value, outer_value
from hypergrad._tree import PyTree


class Point(NamedTuple):
    """The values of the three variables, or the directions along which they move."""

    params: PyTree
    adjoint: PyTree
    hparams: PyTree


class InnerTerms(NamedTuple):
    """The three terms of a block of training rows: ∂_w h, (∂²_{ww} h) v, (∂²_{λw} h) v."""

    grad: PyTree
    product: PyTree
    cross: PyTree


class OuterTerms(NamedTuple):
    """The two terms of a block of validation rows: ∂_w f, ∂_λ f."""

    grad: PyTree
    direct: PyTree


class Terms(NamedTuple):
    """All five."""

    inner: InnerTerms
    outer: OuterTerms


class Seen(NamedTuple):
    """The values that the losses returned on the way.

    Attributes:
        loss: the loss that the parameters descend on, at the first point of the call.
        value: validation loss.
        metrics: metrics of the validation loss.
        model_state: model state after the last step of the parameters.
    """

    loss: Array
    value: Array
    metrics: dict[str, Any]
    model_state: PyTree


class Step(NamedTuple):
    """The next parameters and adjoint, the hypergradient, the method's memory, and what the losses returned."""

    params: PyTree
    adjoint: PyTree
    grad: PyTree
    memory: Any
    seen: Seen


class Method(NamedTuple):
    """A method of `hg.single_loop`.

    Attributes:
        step: `(oracles, point, memory, model_state) -> Step`; it returns finite memory even after a failure.
        start: `(point, blocks of training rows, blocks of validation rows) -> memory`.
        products: Hessian products of one call, given the number of inner steps.
        draws: blocks that one call draws from each of the two data sets, given the number of inner steps.
        repeats: whether it takes several inner steps a call.
    """

    step: Callable[[Oracles, Point, Any, PyTree], Step]
    start: Callable[[Point, int, int], Any]
    products: Callable[[int], int]
    draws: Callable[[int], int] = lambda steps: 1
    repeats: bool = False


class Blocks(NamedTuple):
    """Arrays cut into contiguous blocks of `size` rows; the last one holds the rows that are left over.

    A block is drawn with replacement, each with the same probability, and its terms are weighted by its rows, so that
    their mean over all blocks is the term of all rows.
    """

    arrays: PyTree
    rows: int
    size: int

    @property
    def count(self) -> int:
        """The number of blocks."""
        return -(-self.rows // self.size)

    def at(self, index: Array, term: Callable[[PyTree], tuple[PyTree, Any]]) -> tuple[PyTree, Any]:
        """`term(block) -> (what is weighted, the rest)` on one block."""
        whole, left = divmod(self.rows, self.size)

        def on(length: int) -> tuple[PyTree, Any]:
            cut = lambda x: lax.dynamic_slice_in_dim(x, index * self.size, length)
            found, rest = term(jax.tree.map(cut, self.arrays))
            return (_tree.scale(length * self.count / self.rows, found) if left else found), rest

        if not left:
            return on(self.size)
        return lax.cond(index < whole, lambda: on(self.size), lambda: on(left))


class Oracles(NamedTuple):
    """The terms on blocks, bound to the data, the draws and the step sizes of one call.

    Attributes:
        problem: the two losses.
        train: blocks of training rows.
        valid: blocks of validation rows.
        drawn: int32 `[draws, 2]`, the blocks of training and validation rows of each draw.
        key: key for losses that draw random numbers.
        step_size: step size of the parameters.
        adjoint_step_size: step size of the adjoint.
        perturbation: ε of `f2sa`.
        inner_steps: number of inner steps, for a method that takes several.
    """

    problem: Problem
    train: Blocks
    valid: Blocks
    drawn: Array
    key: Array
    step_size: Array
    adjoint_step_size: Array
    perturbation: Array
    inner_steps: int

    def slopes(self, k: Any, params: PyTree, hparams: PyTree, model_state: PyTree) -> tuple[Any, tuple[Array, PyTree]]:
        """`((∂_w h, ∂_λ h), (training loss, model state))` on the training block of draw k."""
        return self.train.at(self.drawn[k, 0], lambda rows: self._slopes(k, rows, params, hparams, model_state))

    def inner(self, k: Any, point: Point, model_state: PyTree) -> tuple[InnerTerms, tuple[Array, PyTree]]:
        """The three terms on the training block of draw k, in one pass forward over reverse."""
        return self.train.at(self.drawn[k, 0], lambda rows: self._inner(k, rows, point, model_state))

    def outer(self, k: Any, point: Point, model_state: PyTree) -> tuple[OuterTerms, tuple[Array, dict[str, Any]]]:
        """The two terms on the validation block of draw k."""
        return self.valid.at(self.drawn[k, 1], lambda rows: self._outer(k, rows, point, model_state))

    def terms(self, k: Any, point: Point, model_state: PyTree) -> tuple[Terms, Seen]:
        """All five terms on the blocks of draw k."""
        inner, (loss, fresh) = self.inner(k, point, model_state)
        outer, (value, metrics) = self.outer(k, point, model_state)
        return Terms(inner, outer), Seen(loss, value, metrics, fresh)

    def full(self, point: Point, model_state: PyTree) -> tuple[Terms, Seen]:
        """All five terms on all rows."""
        inner, (loss, fresh) = self._inner(0, self.train.arrays, point, model_state)
        outer, (value, metrics) = self._outer(0, self.valid.arrays, point, model_state)
        return Terms(inner, outer), Seen(loss, value, metrics, fresh)

    def move(self, point: Point, directions: Point) -> Point:
        """A step of the parameters and of the adjoint; λ is the caller's to move."""
        params = _tree.axpy(-self.step_size, directions.params, point.params)
        adjoint = _tree.axpy(-self.adjoint_step_size, directions.adjoint, point.adjoint)
        return point._replace(params=params, adjoint=adjoint)

    def _slopes(self, k: Any, rows: PyTree, params: PyTree, hparams: PyTree, model_state: PyTree) -> Any:
        key = jax.random.fold_in(self.key, 2 * k)
        loss = lambda w, h: inner_value(self.problem, w, h, rows, key, model_state)
        seen, slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hparams)
        return slopes, seen

    def _inner(self, k: Any, rows: PyTree, point: Point, model_state: PyTree) -> Any:
        slopes = lambda w: self._slopes(k, rows, w, point.hparams, model_state)
        (grad, _), products, seen = jax.jvp(slopes, (point.params,), (point.adjoint,), has_aux=True)
        return InnerTerms(grad, *products), seen

    def _outer(self, k: Any, rows: PyTree, point: Point, model_state: PyTree) -> Any:
        key = jax.random.fold_in(self.key, 2 * k + 1)
        loss = lambda w, h: outer_value(self.problem, w, h, rows, key, model_state)
        seen, slopes = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(point.params, point.hparams)
        return OuterTerms(*slopes), seen


def directions(terms: Terms) -> Point:
    """`(∂_w h, (∂²_{ww} h) v + ∂_w f, (∂²_{λw} h) v + ∂_λ f)`."""
    inner, outer = terms
    return Point(inner.grad, _tree.add(inner.product, outer.grad), _tree.add(inner.cross, outer.direct))


def soba(oracles: Oracles, point: Point, memory: None, model_state: PyTree) -> Step:
    """One block of each data set; all three directions are taken at the old point (Dagréou, Ablin, Vaiter & Moreau
    2022).
    """
    terms, seen = oracles.terms(0, point, model_state)
    move = directions(terms)
    new = oracles.move(point, move)
    return Step(new.params, new.adjoint, move.hparams, None, seen)


class Table(NamedTuple):
    """The terms of every block as they were when it was last drawn, and their mean over the blocks."""

    inner: InnerTerms
    outer: OuterTerms
    mean: Terms


def saba(oracles: Oracles, point: Point, memory: Table, model_state: PyTree) -> Step:
    """`new − remembered + mean(remembered)` for each term; the mean moves after use (as SOBA's authors do)."""
    i, j = oracles.drawn[0]
    new, seen = oracles.terms(0, point, model_state)
    old = Terms(_row(memory.inner, i), _row(memory.outer, j))
    move = directions(_tree.add(_tree.sub(new, old), memory.mean))
    after = oracles.move(point, move)

    kept = _tree.where(_tree.all_finite(new), new, old)
    moved = _tree.sub(kept, old)
    mean = Terms(
        _tree.axpy(1 / oracles.train.count, moved.inner, memory.mean.inner),
        _tree.axpy(1 / oracles.valid.count, moved.outer, memory.mean.outer),
    )
    table = Table(_put(memory.inner, i, kept.inner), _put(memory.outer, j, kept.outer), mean)
    return Step(after.params, after.adjoint, move.hparams, table, seen)


def _row(table: PyTree, index: Array) -> PyTree:
    """Return row `index` of each leaf. The row is read inside a conditional, which XLA does not merge with the code
    that uses it: if XLA repeated the read after the new row is written, every call would copy the table.
    """
    read = lambda: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), table)
    return lax.cond(index >= 0, read, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), table))


def _put(table: PyTree, index: Array, row: PyTree) -> PyTree:
    return jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, index, 0), table, row)


def _empty_table(point: Point, train: int, valid: int) -> Table:
    """Zeros, with which the first pass over the blocks takes the steps of SOBA."""
    inner = InnerTerms(point.params, point.params, point.hparams)
    outer = OuterTerms(point.params, point.hparams)
    rows = lambda n, tree: jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), tree)
    return Table(rows(train, inner), rows(valid, outer), _tree.zeros_like(Terms(inner, outer)))


def amigo(oracles: Oracles, point: Point, memory: None, model_state: PyTree) -> Step:
    """K steps of the parameters, K steps of the adjoint from its last value, then g (Arbel & Mairal 2022)."""
    steps, (params, adjoint, hparams) = oracles.inner_steps, point

    def train(k: Any, carry: Any) -> Any:
        params, model_state, first = carry
        (grad, _), (loss, fresh) = oracles.slopes(k, params, hparams, model_state)
        first = jnp.where(k == 0, loss.astype(first.dtype), first)
        return _tree.axpy(-oracles.step_size, grad, params), fresh, first

    def solve(k: Any, adjoint: PyTree) -> PyTree:
        terms, _ = oracles.terms(k, Point(params, adjoint, hparams), model_state)
        return _tree.axpy(-oracles.adjoint_step_size, directions(terms).adjoint, adjoint)

    start = params, model_state, jnp.zeros((), _tree.dtype(params))
    params, model_state, loss = lax.fori_loop(0, steps, train, start)
    adjoint = lax.fori_loop(steps, 2 * steps, solve, adjoint)
    terms, seen = oracles.terms(2 * steps, Point(params, adjoint, hparams), model_state)
    return Step(params, adjoint, directions(terms).hparams, None, seen._replace(loss=loss, model_state=model_state))


class Recursion(NamedTuple):
    """The last directions, the point at which they were taken, and the calls since the last restart."""

    directions: Point
    before: Point
    age: Array


def srba(oracles: Oracles, point: Point, memory: Recursion, model_state: PyTree) -> Step:
    """Return `new(now) + (last − new(before))` on one block; restart from all rows every half pass (Dagréou et al.
    2024).
    """
    period = max(1, (oracles.train.count + oracles.valid.count) // 2)

    def restart() -> tuple[Point, Seen]:
        terms, seen = oracles.full(point, model_state)
        return directions(terms), seen

    def follow() -> tuple[Point, Seen]:
        now, seen = oracles.terms(0, point, model_state)
        before, _ = oracles.terms(0, memory.before, model_state)
        return _tree.add(directions(now), _tree.sub(memory.directions, directions(before))), seen

    move, seen = lax.cond(memory.age == 0, restart, follow)
    new = oracles.move(point, move)

    sound = _tree.all_finite(move)
    last, before = _tree.where(sound, (move, point), (memory.directions, memory.before))
    age = jnp.where(sound, (memory.age + 1) % period, 0)
    return Step(new.params, new.adjoint, move.hparams, Recursion(last, before, age), seen)


def _no_recursion(point: Point, train: int, valid: int) -> Recursion:
    del train, valid
    return Recursion(_tree.zeros_like(point), point, jnp.int32(0))


def f2sa(oracles: Oracles, point: Point, memory: None, model_state: PyTree) -> Step:
    """First derivatives only: w± = w ± εv descend on h ± εf, and their difference replaces every second derivative
    (Kwon, Kwon, Wright & Nowak 2023, here in the central form).
    """
    epsilon, steps = oracles.perturbation, oracles.inner_steps

    def side(k: Any, point: Point, sign: int, model_state: PyTree) -> tuple[tuple[PyTree, PyTree], Seen]:
        """`∂h ± ε ∂f` at w ± εv, with respect to w and to λ."""
        at = point._replace(params=_tree.axpy(sign * epsilon, point.adjoint, point.params))
        inner, (loss, fresh) = oracles.slopes(k, at.params, at.hparams, model_state)
        outer, (value, metrics) = oracles.outer(k, at, model_state)
        perturbed = loss + sign * epsilon * value
        return _tree.axpy(sign * epsilon, tuple(outer), inner), Seen(perturbed, value, metrics, fresh)

    def differences(k: Any, point: Point, model_state: PyTree) -> tuple[Point, Seen]:
        (up, up_cross), seen = side(k, point, 1, model_state)
        (down, down_cross), other = side(k, point, -1, model_state)
        slope = lambda a, b: _tree.scale(0.5 / epsilon, _tree.sub(a, b))
        move = Point(_tree.scale(0.5, _tree.add(up, down)), slope(up, down), slope(up_cross, down_cross))
        mean = lambda a, b: ((a + b) / 2).astype(a.dtype)
        loss, value, metrics = jax.tree.map(mean, seen[:3], other[:3])
        return move, Seen(loss, value, metrics, seen.model_state)

    def descend(k: Any, carry: Any) -> Any:
        point, model_state, first = carry
        move, seen = differences(k, point, model_state)
        first = jnp.where(k == 0, seen.loss.astype(first.dtype), first)
        return oracles.move(point, move), seen.model_state, first

    start = point, model_state, jnp.zeros((), _tree.dtype(point.params))
    point, model_state, loss = lax.fori_loop(0, steps, descend, start)
    move, seen = differences(steps, point, model_state)
    seen = seen._replace(loss=loss, model_state=model_state)
    return Step(point.params, point.adjoint, move.hparams, None, seen)


def _nothing(point: Point, train: int, valid: int) -> None:
    del point, train, valid


METHODS: Mapping[str, Method] = {
    "soba": Method(soba, _nothing, lambda steps: 1),
    "saba": Method(saba, _empty_table, lambda steps: 1),
    "amigo": Method(amigo, _nothing, lambda steps: steps, lambda steps: 2 * steps + 1, repeats=True),
    "srba": Method(srba, _no_recursion, lambda steps: 2),
    "f2sa": Method(f2sa, _nothing, lambda steps: 0, lambda steps: steps + 1, repeats=True),
}

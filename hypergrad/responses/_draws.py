r"""Hyperparameters drawn around the current ones, and the losses there.

    u_i = u₀ + σ ε_i,  ε_i ~ N(0, 1),   one for a batch, for each of G groups of its rows, or for each row

A response that makes parameters makes them once for each draw, and the losses are averaged over the draws. A response
that leaves the draws to the layers of the model (`hg.responses.gated`) gets all of them at once, as rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._data import rows
from hypergrad._problem import Composed, Problem, inner_value, outer_value
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.domains._domain import to_constrained
from hypergrad.responses.gated import Gated


def draw_around(key: Array, u: PyTree, sigma: PyTree, count: int | None = None, shared: PyTree = None) -> PyTree:
    """Draw u + σ ε with independent standard normal ε.

    Args:
        key: split into one for each leaf.
        u: pytree of arrays.
        sigma: pytree like u, of scalars or arrays that fit the leaves.
        count: number of draws, along a new leading axis; None for one, without an axis.
        shared: pytree of bools like u: whether all draws of a leaf are the same; None for no such leaves.
    """

    def one(key: Array, x: Array, sigma: Array, together: bool) -> Array:
        lead = () if count is None else (1,) if together else (count,)
        epsilon = jax.random.normal(key, (*lead, *x.shape), x.dtype)
        if count is None:
            return x + sigma.astype(x.dtype) * epsilon
        spread = jnp.broadcast_to(sigma.astype(x.dtype), x.shape)
        return jnp.broadcast_to(x[None] + spread[None] * epsilon, (count, *x.shape))

    return _by_leaf(key, one, u, sigma, jax.tree.map(lambda _: False, u) if shared is None else shared)


def draw_between(key: Array, lo: PyTree, hi: PyTree) -> PyTree:
    """Draw uniformly from the box between two pytrees of arrays; the key is split into one for each leaf."""
    return _by_leaf(key, lambda k, a, b: a + (b - a) * jax.random.uniform(k, a.shape, a.dtype), lo, hi)


def _by_leaf(key: Array, function: Callable[..., Array], like: PyTree, *rest: PyTree) -> PyTree:
    """`function(key of the leaf, leaf, leaves of the rest)` on every leaf of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    parts = zip(keys, leaves, *(jax.tree.leaves(tree) for tree in rest), strict=True)
    return treedef.unflatten([function(*part) for part in parts])


class Around(NamedTuple):
    """The places where draws are made, and the quantities evaluated there.

    Attributes:
        problem: the two losses.
        response: how parameters follow hyperparameters.
        domain: pytree prefix of domains, or None.
        perturb: `"batch"`, `"example"` or a number of groups.
        shared: pytree of bools like the hyperparameters: whether all draws of a step are the same.
        centre: u₀, pytree like the hyperparameters.
    """

    problem: Problem
    response: Any
    domain: PyTree
    perturb: str | int
    shared: PyTree
    centre: PyTree

    @property
    def by_rows(self) -> bool:
        """Whether the losses take all draws at once."""
        return isinstance(self.response, Gated) and self.perturb != "batch"

    def params(self, weights: PyTree, u: PyTree) -> PyTree:
        """The parameters that the losses receive."""
        return self.response.apply(weights, u, self.centre)

    def hparams(self, u: PyTree) -> PyTree:
        """λ = T(u)."""
        return to_constrained(self.domain, u)

    def still(self, u: PyTree, count: int | None) -> PyTree:
        """Without perturbation: u itself, or as many equal rows of it as the losses expect."""
        if not self.by_rows:
            return u
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), u)

    def draw(self, u: PyTree, scale: PyTree, count: int | None, key: Array) -> PyTree:
        """Draw u + softplus(scale) ε, with a leading axis of `count`; `shared` leaves repeat along it."""
        return draw_around(key, u, jax.tree.map(jax.nn.softplus, scale), count, self.shared)

    def mean(
        self,
        function: Callable[[PyTree, PyTree, Array | None], PyTree],
        u: PyTree,
        batch: PyTree,
        key: Array | None,
        count: int | None,
    ) -> PyTree:
        """`function(u, batch, key)`; where it takes one draw at a time, its mean over groups of the rows.

        Leaves that are not floating point are those of the first group.
        """
        if count is None or self.by_rows:
            return function(u, batch, key)
        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        keys = None if key is None else jax.random.split(key, count)
        found = jax.vmap(function)(u, parts, keys)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0) if _tree.is_float(x) else x[0], found)


def training_loss(
    around: Around,
    training: str,
    weights: Any,
    scale: PyTree,
    batch: PyTree,
    loss_key: Array | None,
    noise_key: Array,
    model_state: PyTree,
) -> tuple[Array, PyTree]:
    """The loss whose gradient trains the weights, and the model state.

    Args:
        around: where draws are made.
        training: `"joint"`, `"split"` or `"linearized"`.
        weights: base and slope.
        scale: s.
        batch: training data of one step.
        loss_key: key of the inner loss, or None.
        noise_key: key of the draws.
        model_state: state of the model, or None.
    """
    count = draws(around.perturb, batch, "train")
    u = around.draw(around.centre, scale, count, noise_key)

    def loss(problem: Problem, weights: Any, u: PyTree, batch: PyTree, key: Array | None) -> tuple[Array, PyTree]:
        return inner_value(problem, around.params(weights, u), around.hparams(u), batch, key, model_state)

    if training == "joint":
        return around.mean(functools.partial(loss, around.problem, weights), u, batch, loss_key, count)
    base = weights._replace(slope=jax.lax.stop_gradient(weights.slope))
    slope = weights._replace(base=jax.lax.stop_gradient(weights.base))
    first, fresh = loss(around.problem, base, around.still(around.centre, count), batch, loss_key)

    def second(u: PyTree, batch: PyTree, key: Array | None) -> Array:
        problem = around.problem if training == "split" else linearized(around, slope, u, count)
        return loss(problem, slope, u, batch, key)[0]

    return first + around.mean(second, u, batch, loss_key, count), fresh


def linearized(around: Around, weights: Any, u: PyTree, count: int | None) -> Problem:
    """The problem with f(u₀) + ∂f/∂u (u − u₀) for the outputs f of the model, where u acts through the parameters."""
    composed: Any = around.problem.inner_loss
    start = around.still(around.centre, count)

    @functools.wraps(composed.outputs)  # keeps the signature, from which it is read whether a key is taken
    def outputs(params: PyTree, hparams: PyTree, *rest: Any) -> PyTree:
        del params
        change = lambda v: composed.outputs(around.params(weights, v), hparams, *rest)
        return _tree.add(*jax.jvp(change, (start,), (_tree.sub(u, start),)))

    return dataclasses.replace(around.problem, inner_loss=Composed(outputs, composed.loss))


def validation_loss(
    around: Around,
    weights: Any,
    through: PyTree,
    seen: PyTree,
    scale: PyTree,
    batch: PyTree,
    loss_key: Array | None,
    noise_key: Array,
    model_state: PyTree,
) -> tuple[Array, dict[str, Any]]:
    """The outer loss and its metrics.

    Args:
        around: where draws are made.
        weights: weights of the response.
        through: u that the parameters respond to.
        seen: u of the hyperparameters that the outer loss reads itself; equal to `through`.
        scale: s of a perturbation, or None for none.
        batch: validation data.
        loss_key: key of the outer loss, or None.
        noise_key: key of the draws.
        model_state: state of the model, or None.
    """
    count = draws(around.perturb, batch, "valid") if around.by_rows or scale is not None else None

    def loss(points: tuple[PyTree, PyTree], batch: PyTree, key: Array | None) -> tuple[Array, dict[str, Any]]:
        u, v = points
        return outer_value(around.problem, around.params(weights, u), around.hparams(v), batch, key, model_state)

    if scale is None:
        return loss((around.still(through, count), around.still(seen, count)), batch, loss_key)
    points = tuple(around.draw(u, scale, count, noise_key) for u in (through, seen))
    return around.mean(loss, points, batch, loss_key, count)


def check_perturb(perturb: Any) -> None:
    """Raise unless it is `"batch"`, `"example"` or a number of groups."""
    if perturb in ("batch", "example"):
        return
    if isinstance(perturb, (bool, str)) or not hasattr(perturb, "__index__") or perturb < 1:
        raise InputTypeError(
            f"self_tuning: perturb must be 'batch', 'example', or a number of groups of the batch, found {perturb!r}."
        )


def draws(perturb: str | int, batch: PyTree, name: str) -> int | None:
    """The number of draws for a batch; None for one draw that the whole batch shares.

    Raises:
        InputError: for a batch that cannot be divided in this way.
    """
    if perturb == "batch":
        return None
    if not jax.tree.leaves(batch):
        if perturb == "example":
            raise InputError(
                f"self_tuning: perturb='example' needs the rows of {name}, which holds no arrays: pass the data to "
                "hypergrad instead of closing over them, or write perturb='batch'."
            )
        return int(perturb)
    count = rows(batch, f"self_tuning: {name}")
    if perturb == "example":
        return count
    if count % int(perturb):
        raise InputError(
            f"self_tuning: perturb={perturb} groups do not divide the {count} rows of a batch of {name}: choose a "
            "divisor, 'batch' or 'example'."
        )
    return int(perturb)

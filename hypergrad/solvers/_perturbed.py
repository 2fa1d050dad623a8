r"""Losses at hyperparameters drawn around the current ones.

    u_i = u₀ + softplus(s) ε_i,  ε_i ~ N(0, 1),   one for a batch, for each of G groups of its rows, or for each row

A response that makes parameters makes them once a draw, and the losses are averaged over the draws; one that leaves the
draws to the layers of the model (`hg.responses.gated`) gets all of them at once, as rows.
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


class Around(NamedTuple):
    """Where draws are made and what is evaluated there.

    Attributes:
        problem: the two losses.
        response: how parameters follow hyperparameters.
        domain: pytree prefix of domains, or None.
        perturb: `"batch"`, `"example"` or a number of groups.
        shared: pytree like the hyperparameters of bools: whether all draws of a step are the same.
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
        """What the losses get for their parameters."""
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
        leaves, treedef = jax.tree.flatten(u)
        parts = zip(
            leaves,
            jax.tree.leaves(scale),
            jax.tree.leaves(self.shared),
            jax.random.split(key, len(leaves)),
            strict=True,
        )

        def one(x: Array, s: Array, together: bool, key: Array) -> Array:
            lead = () if count is None else (1,) if together else (count,)
            epsilon = jax.random.normal(key, (*lead, *x.shape), x.dtype)
            if count is None:
                return x + jax.nn.softplus(s) * epsilon
            return jnp.broadcast_to(x[None] + jax.nn.softplus(s)[None] * epsilon, (count, *x.shape))

        return treedef.unflatten([one(*part) for part in parts])

    def mean(
        self,
        function: Callable[[PyTree, PyTree, Array | None], PyTree],
        u: PyTree,
        batch: PyTree,
        key: Array | None,
        count: int | None,
    ) -> PyTree:
        """`function(u, batch, key)`; where it takes one draw at a time, its mean over groups of the rows.

        What is no float is that of the first group.
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
    """A loss whose gradient with respect to the weights is the one that they are trained by, and the model state.

    Args:
        around: where.
        training: `"joint"`, `"split"` or `"linearized"`.
        weights: base and slope.
        scale: s.
        batch: training data of one step.
        loss_key: for the inner loss, or None.
        noise_key: for the draws.
        model_state: of the model, or None.
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
        around: where.
        weights: of the response.
        through: u that the parameters respond to.
        seen: u of the hyperparameters that the outer loss reads itself; the same numbers.
        scale: s of a perturbation, or None for none.
        batch: validation data.
        loss_key: for the outer loss, or None.
        noise_key: for the draws.
        model_state: of the model, or None.
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
    """How many draws a batch gets; None for one that all of it shares.

    Raises:
        InputError: for a batch that cannot be divided so.
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

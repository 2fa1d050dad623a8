r"""Several outer losses at once: one weighted sum, or a Pareto front of compromises with one end for each loss.

    F_α(λ) = Σₜ αₜ fₜ(w*(λ), λ),    α on the simplex
    min over λ₁ … λ_T of the mean over α of F_α(λ(α)),    λ(α) = Σₜ αₜ λₜ

The second tunes the corners of a simplex of hyperparameters together, so that each point between them is good for its
own weights: the front is read off by interpolation, and costs T vectors of hyperparameters whatever its resolution.

Source: Dimitriadis, Frossard & Fleuret 2023, "Pareto manifold learning: tackling multiple tasks via ensembles of
single-task models", arXiv:2210.09759, there for the weights of a network. Differs: hyperparameters are interpolated,
and α runs over a fixed grid (tasks of `hg.tasks`) where the paper draws it.
Where it fails: a weighted sum reaches the convex part of a front alone, losses of different units need scales of their
own (the weights say nothing else), and a front that is strongly curved in λ is only as good as the simplex that fits
it.
Cost: that of the solver, once for each weight of the grid. Memory: as many states.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._options import Number, options
from hypergrad._problem import Problem, key_use
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, keystr
from hypergrad.folds import Fold

Losses = Mapping[str, Callable[..., Any]]


@options()
def several(losses: Losses, weights: Mapping[str, float] | ArrayLike | None = None) -> Callable[..., Any]:
    r"""Combine several outer losses into one, `Σₜ αₜ fₜ`; each arrives in the metrics under its name.

    Args:
        losses: outer losses `(params, hparams, batch) -> scalar` by name, at least one.
        weights: α, one for each name, or an array in the order of `losses`: at least 0 and with sum 1. None: the batch
            is `(data, weights)`, as `with_weights` makes it.

    Returns:
        `outer_loss(params, hparams, batch) -> (scalar, metrics)`, for `hg.Problem`.

    Raises:
        InputError: for no losses, weights that are not on the simplex (where they are traced, NaN), or for other names.
        InputTypeError: for losses that are not a mapping, or that need a key.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> losses = {"left": lambda w, h, b: (w + 1.0)**2, "right": lambda w, h, b: (w - 1.0)**2}
    >>> value, each = hg.objectives.several(losses, {"left": 0.25, "right": 0.75})(0.5, None, None)
    >>> float(value), float(each["left"]), float(each["right"])
    (0.75, 2.25, 0.25)
    """
    names = _names("several", losses)
    if isinstance(weights, Mapping) and set(weights) != set(names):
        raise InputError(f"several: weights has {sorted(weights)}, and losses has {sorted(names)}: give one of each.")
    listed = [weights[name] for name in names] if isinstance(weights, Mapping) else weights
    fixed = None if listed is None else _on_simplex("several", listed, len(names))

    def outer_loss(params: PyTree, hparams: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        data, alpha = (batch, fixed) if fixed is not None else _unpack("several", batch, len(names))
        values = {name: jnp.asarray(losses[name](params, hparams, data)) for name in names}
        for name, value in values.items():
            if value.shape:
                raise InputError(f"several: losses[{name!r}] must return a scalar, found shape {value.shape}.")
        terms = [a.astype(value.dtype) * value for a, value in zip(alpha, values.values(), strict=True)]
        return jnp.sum(jnp.stack(terms)), values

    return outer_loss


@options()
def pareto(inner_loss: Callable[..., Any], losses: Losses) -> Problem:
    r"""A problem whose hyperparameters are the ends of a Pareto front: with one end, `[T, ...]`, for each outer loss.

    Both losses see `λ(α) = Σₜ αₜ λₜ`, for the weights α that come with the batch. Tune it with `hg.tasks` over a grid
    of weights; `between(ends, α)` is then the hyperparameters of any compromise.

    Args:
        inner_loss: `(params, hparams, data) -> scalar`, with a fourth argument `key` or without.
        losses: outer losses `(params, hparams, data) -> scalar` by name, at least two.

    Returns:
        An `hg.Problem` with batches `(data, weights)`, as `with_weights` makes them, and hyperparameters with a leading
        axis of ends in the order of `losses`.

    Raises:
        InputError: for fewer than two losses; when the losses are called, for hyperparameters without the axis of ends.
        InputTypeError: for losses that are not a mapping of functions.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> inner = lambda w, h, data: (w - h)**2
    >>> losses = {"left": lambda w, h, data: (w + 1.0)**2, "right": lambda w, h, data: (w - 1.0)**2}
    >>> problem = hg.objectives.pareto(inner, losses)
    >>> ends, weights = jnp.array([-1.0, 1.0]), jnp.array([0.25, 0.75])
    >>> float(hg.objectives.between(ends, weights)), float(problem.inner_loss(0.5, ends, (None, weights)))
    (0.5, 0.0)
    """
    names = _names("pareto", losses)
    if len(names) < 2:
        raise InputError("pareto: losses must hold at least two outer losses, found 1: a front needs two ends.")
    outer = several(losses)
    keyed = key_use(inner_loss, "pareto: inner_loss", False) in ("required", "optional")

    def at(ends: PyTree, batch: PyTree) -> tuple[PyTree, Any]:
        data, alpha = _unpack("pareto", batch, len(names))
        return between(ends, alpha), data

    def inner(params: PyTree, ends: PyTree, batch: PyTree) -> Any:
        hparams, data = at(ends, batch)
        return inner_loss(params, hparams, data)

    def inner_with_key(params: PyTree, ends: PyTree, batch: PyTree, key: Array) -> Any:
        hparams, data = at(ends, batch)
        return inner_loss(params, hparams, data, key)

    def compromise(params: PyTree, ends: PyTree, batch: PyTree) -> Any:
        return outer(params, at(ends, batch)[0], batch)

    return Problem(inner_with_key if keyed else inner, compromise)


@options()
def between(ends: PyTree, weights: ArrayLike) -> PyTree:
    r"""Return the point `Σₜ αₜ λₜ` between the ends of a front.

    Args:
        ends: pytree of arrays `[T, ...]`.
        weights: α, `[T]`, at least 0 and with sum 1.

    Returns:
        A pytree like `ends` without its leading axis.

    Raises:
        InputError: for another number of weights than ends, and for weights that are not on the simplex (where they are
            traced, NaN).

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.objectives.between({"l2": jnp.array([-4.0, 0.0])}, jnp.array([0.25, 0.75]))["l2"].item()
    -1.0
    """
    alpha = _on_simplex("between", weights, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ends):
        if jnp.shape(leaf)[:1] != alpha.shape:
            raise InputError(
                f"between: ends{keystr(path)} must have a leading axis of {alpha.size} ends, one for each weight, "
                f"found shape {jnp.shape(leaf)}: stack one start for each outer loss."
            )
    return jax.tree.map(lambda leaf: jnp.tensordot(alpha.astype(leaf.dtype), leaf, axes=1), ends)


@options(
    count=Number(least=1, integer=True, static=True),
    parts=Number(least=1, integer=True, static=True, advice="write into how many steps each edge is divided"),
)
def simplex_grid(count: int, *, parts: int) -> Array:
    r"""Return all weights of `count` losses that are multiples of `1/parts`.

    Args:
        count: T, number of losses.
        parts: steps along an edge of the simplex.

    Returns:
        `[K, T]` with `K = C(parts + T − 1, T − 1)`, corners included; for two losses `parts + 1` rows.

    Raises:
        InputError: for fewer than one loss or part.
        InputTypeError: for numbers that are not integers.

    >>> import hypergrad as hg
    >>> hg.objectives.simplex_grid(2, parts=2).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    count, parts = int(count), int(parts)
    rows = []
    for bars in combinations(range(parts + count - 1), count - 1):  # stars and bars
        edges = [-1, *bars, parts + count - 1]
        rows.append([right - left - 1 for left, right in pairwise(edges)])
    assert len(rows) == math.comb(parts + count - 1, count - 1)
    return jnp.asarray(np.asarray(rows) / parts, jnp.result_type(float))


@options()
def with_weights(data: PyTree, weights: ArrayLike) -> Fold:
    r"""Data that all weights of a grid share, as a batch for `hg.tasks`.

    Args:
        data: pytree of arrays, or None.
        weights: `[K, T]`, a row for each task, on the simplex.

    Returns:
        A batch that `hg.tasks` gives to task k as `(data, weights[k])`, without a copy of the data.

    Raises:
        InputError: for weights of another shape, or not on the simplex.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> hg.objectives.with_weights(jnp.zeros(3), hg.objectives.simplex_grid(2, parts=4)).weight.shape
    (5, 2)
    """
    if jnp.ndim(weights) != 2:
        raise InputError(
            f"with_weights: weights must have shape [tasks, losses], found {jnp.shape(weights)}: write "
            "hg.objectives.simplex_grid(losses, parts=8)."
        )
    return Fold(data, _on_simplex("with_weights", weights, None))


def _names(function: str, losses: Any) -> list[str]:
    if not isinstance(losses, Mapping):
        raise InputTypeError(f"{function}: losses must be a dict of functions by name, found {type(losses).__name__}.")
    if not losses:
        raise InputError(f"{function}: losses is empty: give at least one outer loss.")
    for name, loss in losses.items():
        if key_use(loss, f"{function}: losses[{name!r}]", False) == "required":
            raise InputTypeError(
                f"{function}: losses[{name!r}] takes {inspect.signature(loss)}, with a key, and is given none: bind "
                "one with functools.partial."
            )
    return list(losses)


def _unpack(function: str, batch: PyTree, count: int) -> tuple[PyTree, Array]:
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise InputError(
            f"{function}: the batch must be (data, weights), found {type(batch).__name__}: write "
            "hg.objectives.with_weights(data, weights), and hg.tasks around the solver."
        )
    return batch[0], _on_simplex(function, batch[1], count)


def _on_simplex(function: str, weights: Any, count: int | None) -> Array:
    """Return the weights, along their last axis, with NaN where traced ones are not on the simplex."""
    alpha = jnp.asarray(weights, jnp.result_type(float, weights) if hasattr(weights, "dtype") else None)
    if not jnp.issubdtype(alpha.dtype, jnp.floating):
        alpha = alpha.astype(jnp.result_type(float))
    if not alpha.ndim or (count is not None and alpha.shape != (count,)):
        wanted = "[losses]" if count is None else f"({count},), one for each loss"
        raise InputError(f"{function}: weights must have shape {wanted}, found {alpha.shape}.")
    slack = 100 * jnp.finfo(alpha.dtype).eps
    right = jnp.all(alpha >= 0, axis=-1) & (jnp.abs(jnp.sum(alpha, axis=-1) - 1) <= slack)
    if not isinstance(right, Tracer) and not np.all(np.asarray(right)):
        row = np.asarray(alpha).reshape(-1, alpha.shape[-1])[int(np.argmin(np.ravel(np.asarray(right))))]
        raise InputError(
            f"{function}: weights must be at least 0 and add up to 1, found {row.tolist()}: divide by their sum."
        )
    return jnp.where(right[..., None], alpha, jnp.nan)

r"""The outer loss over one or two hyperparameters, by solving the problem again at every point of a grid.

    F(λ) = f(w*(λ), λ),   λ_a ∈ {a₁, …, a_m},   λ_b ∈ {b₁, …, b_n}

Differs from grid search only in its purpose: it shows the surface that the hypergradient descends. Every point starts
from the same parameters, so that no point depends on the order of the grid.
Cost: m or m·n solutions of the problem; one compilation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hypergrad._checks import check_hparams, nearest
from hypergrad._data import Stream, prepare
from hypergrad._options import SOLVER, options
from hypergrad._solver import InputError, Solver
from hypergrad._tree import PyTree, keystr
from hypergrad.diagnostics._differences import Setting, flatten, make_resolve


class Landscape(NamedTuple):
    """The outer loss on a grid; draw it with `hg.diagnostics.plots.landscape`.

    Attributes:
        names: names of the one or two hyperparameters, as given.
        index: their positions among all entries of the hyperparameters, in the order of the leaves.
        axes: values along each of them, `[m]` and `[n]`.
        values: outer loss, `[m]` or `[m, n]`; NaN where it is not finite.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    axes: tuple[np.ndarray, ...]
    values: np.ndarray


@options(solver=SOLVER)
def landscape(
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    along: Mapping[str, ArrayLike | Sequence[float]],
    train: PyTree = None,
    valid: PyTree = None,
    *,
    key: Array | None = None,
    model_state: PyTree = None,
) -> Landscape:
    """Compute the outer loss over one or two hyperparameters, while the others stay fixed.

    Args:
        solver: any solver; its own outer loss is used, once it stops changing at the same hyperparameters.
        params: the model's parameters at the start.
        hparams: pytree of hyperparameters.
        along: one or two names, each with the values `[m]` to try. A name is the key of a scalar (`"l2"`), the path of
            an entry (`"['decay'][3]"`), or `"hparams"` if the hyperparameters are a single number.
        train: training data, a pytree of arrays or `hg.minibatches(...)`.
        valid: validation data, in the same forms.
        key: for losses and data that draw; the same key is used at every point.
        model_state: as for `solver.init`.

    Returns:
        See `Landscape`.

    Raises:
        InputError: for a name that is not a hyperparameter, more than two names, or values that are not a vector.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> from hypergrad.diagnostics import landscape
    >>> problem = hg.Problem(inner_loss=lambda w, h, batch: jnp.sum((w - 2.0)**2) + h["l2"] * jnp.sum(w**2),
    ...                      outer_loss=lambda w, h, batch: jnp.sum((w - 1.0)**2))
    >>> grid = landscape(hg.implicit(problem), jnp.zeros(1), {"l2": 0.3}, {"l2": [0.5, 1.0, 2.0]})
    >>> grid.values.round(3).tolist()
    [0.111, 0.0, 0.111]
    """
    hparams = check_hparams(hparams)
    known = entry_names(hparams)
    if not 1 <= len(along) <= 2:
        raise InputError(
            f"landscape: along must name one or two hyperparameters, found {list(along)}: write "
            f"{{{next(iter(known))!r}: values}}."
        )
    axes = []
    for name, values in along.items():
        if name not in known:
            raise InputError(
                f"landscape: along names {name!r}, which is not an entry of hparams"
                f"{nearest(name, list(known))}; the entries are {', '.join(list(known)[:10])}."
            )
        values = np.asarray(values, np.float64)
        if values.ndim != 1 or not values.size:
            raise InputError(f"landscape: along[{name!r}] must be a vector of values, found shape {values.shape}.")
        axes.append(values)
    for name, batch in (("train", train), ("valid", valid)):
        if isinstance(batch, Stream):
            raise InputError(f"landscape: {name} must be arrays, found hg.stream, which cannot be read twice.")
    problem = Setting(solver, params, hparams, prepare("train", train), prepare("valid", valid), key, model_state)
    resolve, (at, _) = make_resolve(problem), flatten(hparams)
    index = tuple(known[name] for name in along)
    grid = np.full(tuple(len(axis) for axis in axes), np.nan)
    for place in np.ndindex(grid.shape):
        point = at.copy()
        point[list(index)] = [axis[i] for axis, i in zip(axes, place, strict=True)]
        grid[place] = resolve(point).settled
    return Landscape(tuple(along), index, tuple(axes), grid)


def entry_names(hparams: PyTree) -> dict[str, int]:
    """Return every name of every entry of the hyperparameters, with its position in the order of the leaves."""
    names: dict[str, int] = {}
    position = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(hparams):
        for index in np.ndindex(np.shape(leaf)):
            suffix = str(list(index)) if index else ""
            names[(keystr(path) or "hparams") + suffix] = position
            if len(path) == 1 and isinstance(key := getattr(path[0], "key", getattr(path[0], "name", None)), str):
                names.setdefault(key + suffix, position)
            position += 1
    return names

r"""The response of models whose own layers respond: those of `hg.responses.layers`, or similar ones.

    (params, h),   h = u − u₀   for each example

with u the unconstrained hyperparameters of an example and u₀ the current ones. The losses take the pair in place of the
parameters, and pass h to the layers.

Source: MacKay et al. 2019, arXiv:1903.03088; Bae & Grosse 2020, arXiv:2010.13514 (centred at u₀).
Cost: none here; it is in the layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._solver import InputError
from hypergrad._tree import PyTree, keystr
from hypergrad.responses._response import Weights


class Gated(NamedTuple):
    """A response whose parameters serve every example, with one vector of hyperparameters each; made by `gated`.

    Attributes:
        init: `(key, params, hparams) -> weights`.
        apply: `(weights, hparams, centre) -> (params, offset)`, with `offset` `[H]`, or `[n, H]` for hyperparameters
            with a leading axis.
    """

    init: Any
    apply: Any


def gated(*, name: str = "response") -> Gated:
    """Let the layers of the model respond, for each example, to its own hyperparameters.

    The losses get `(params, offset)` in place of the parameters: `offset` is `[n, H]`, one row for each example of the
    batch, with all entries of all hyperparameters in the order of `jax.tree.leaves`; and every leaf of `hparams` has
    the same leading axis. With `hg.self_tuning(..., perturb="batch")` all examples share one of each.

    Args:
        name: name that occurs in the path of each parameter of the response; the rest belong to the plain model.

    Returns:
        A response for `hg.self_tuning`.

    Raises:
        InputError: from `init`, for parameters without any such path.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> params = {"plain": jnp.ones(3), "response": {"layer": jnp.ones(3), "gate": jnp.zeros((2, 3))}}
    >>> response = hg.responses.gated()
    >>> weights = response.init(jax.random.key(0), params, {"rate": jnp.zeros(2)})
    >>> _, offset = response.apply(weights, {"rate": jnp.ones((5, 2))}, {"rate": jnp.zeros(2)})
    >>> offset.shape
    (5, 2)
    """

    def belongs(path: Any) -> bool:
        return any(str(getattr(part, "key", getattr(part, "name", ""))) == name for part in path)

    def part(params: PyTree, response: bool) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if belongs(path) is response else None, params, is_leaf=lambda x: x is None
        )

    def init(key: Array | None, params: PyTree, hparams: PyTree) -> Weights:
        del key, hparams
        weights = Weights(part(params, False), part(params, True))
        if not jax.tree.leaves(weights.slope):
            known = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise InputError(
                f"gated: no leaf of params lies below {name!r} (they are {', '.join(known[:4])}, ...), so that nothing "
                "can respond: build the model of hg.responses.layers, or use hg.responses.structured(), which needs "
                "no change of the model."
            )
        return weights

    def apply(weights: Weights, hparams: PyTree, centre: PyTree = None) -> tuple[PyTree, Array]:
        none = lambda x: x is None
        params = jax.tree.map(lambda b, s: s if b is None else b, weights.base, weights.slope, is_leaf=none)
        columns = []
        for u, u0 in zip(jax.tree.leaves(hparams), jax.tree.leaves(centre), strict=True):
            lead = u.shape[: u.ndim - u0.ndim]
            columns.append((u - u0.reshape((1,) * len(lead) + u0.shape)).reshape(*lead, u0.size))
        return params, jnp.concatenate(columns, axis=-1)

    return Gated(init, apply)

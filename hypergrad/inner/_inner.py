"""What an inner solver is: how parameters follow from hyperparameters.

`hg.inner.gradient(...)` and its siblings return an `Inner`. `solve` is used by `hg.implicit`, which differentiates the
solution; `step` by `hg.unrolled`, which differentiates the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._checks import check_same_structure
from hypergrad._options import Slot
from hypergrad._problem import Objective
from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree, keystr


class InnerResult(NamedTuple):
    """What an inner solve returns: parameters and states that the next call can start from, whatever the status.

    Attributes:
        params: pytree like the starting parameters; finite if those are.
        state: the inner optimizer's state, for the next call; finite if the last one is.
        model_state: the model's state, for the next call.
        residual: norm of F at a recent iterate, in the units of F (divide by `scale` for the relative one).
        steps: int32.
        status: int32, see `hg.Status`.
    """

    params: PyTree
    state: PyTree
    model_state: PyTree
    residual: Array
    steps: Array
    status: Array


class SolveFn(Protocol):
    """`solve(objective, params, state, hparams, model_state, *, scale, options) -> InnerResult`.

    `scale` is a positive scalar: the natural size of F on this problem. A solve to tolerance stops at ‖F‖ ≤ tol ·
    scale.
    """

    def __call__(
        self,
        objective: Objective,
        params: PyTree,
        state: PyTree,
        hparams: PyTree,
        model_state: PyTree,
        *,
        scale: Array,
        options: Mapping[str, ArrayLike],
    ) -> InnerResult: ...


class Inner(NamedTuple):
    """How parameters are found. Made by `hg.inner.lbfgs` and its siblings.

    Attributes:
        init: `(params, hparams) -> state` of the inner optimizer.
        solve: see `SolveFn`.
        options: numbers that may change from call to call without recompiling (`tol`, `max_steps`).
        claims: whether the solve is to a tolerance, so that a miss is a status.
        symmetric: whether F is the gradient of a loss, so that its Jacobian is symmetric.
        residual: `(objective, params, hparams) -> F`, a pytree like the parameters; zero at the solution.
        steps: number of steps to unroll, a Python integer; None for solvers that cannot be unrolled.
        update: `(grads, params, state, hparams) -> (params, state)`, one differentiable optimizer step for a given
            gradient; None unless a step is one.
        move: `(objective, params, state, hparams, step) -> (params, state)`, one differentiable step of a map; None
            unless a step is one. Exactly one of `update` and `move` is given where `steps` is.
    """

    init: Callable[[PyTree, PyTree], PyTree]
    solve: SolveFn
    options: Mapping[str, ArrayLike]
    claims: bool
    symmetric: bool
    residual: Callable[[Objective, PyTree, PyTree], PyTree]
    steps: int | None = None
    update: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    move: Callable[[Objective, PyTree, PyTree, PyTree, Any], tuple[PyTree, PyTree]] | None = None


def gradient_residual(objective: Objective, params: PyTree, hparams: PyTree) -> PyTree:
    """F = ∂_w h, for every solver that minimises the inner loss."""
    return jax.grad(objective.fixed)(params, hparams)


INNER = Slot(
    Inner,
    "an inner solver",
    "hg.inner.lbfgs(), or hg.inner.gradient(optimizer, steps=100) for an optax optimizer",
)
STEPS = INNER._replace(write="hg.inner.gradient(optimizer, steps=100), with an optax optimizer such as optax.sgd(0.1)")


def check_like_params(what: str, result: PyTree, params: PyTree) -> None:
    """Raise unless what a user's function returned has the structure, shapes and dtypes of the parameters.

    Args:
        what: "fixed_point: the map's result", say.
        result: what it returned.
        params: what it was given.
    """
    check_same_structure(what, result, params, "it must be like the parameters that it is given.")
    pairs = zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(params), strict=True)
    for (path, found), expected in pairs:
        if jnp.result_type(found) != jnp.result_type(expected):
            raise InputTypeError(
                f"{what}{keystr(path)} has dtype {jnp.result_type(found)}, expected {jnp.result_type(expected)}: cast "
                "it with .astype, or give parameters and hyperparameters one dtype."
            )

"""The interface of inner solvers, which find the parameters for given hyperparameters.

`hg.inner.gradient(...)` and its siblings return an `Inner`. `hg.implicit` uses `solve` and differentiates the solution;
`hg.unrolled` uses `update` or `move` and differentiates the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._checks import check_same_structure
from hypergrad._jaxpr.semigradient import released
from hypergrad._options import Slot, default_tol
from hypergrad._packing import Packing
from hypergrad._problem import Objective, key_use
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, keystr


class InnerResult(NamedTuple):
    """The result of an inner solve: parameters and states from which the next call can start at any status.

    Attributes:
        params: pytree like the starting parameters; finite if those are.
        state: the inner optimizer's state, for the next call; finite if the last one is.
        model_state: the model's state, for the next call.
        residual: norm of F at a recent iterate, in the units of F (divide by `scale` for the relative one).
        steps: number of steps, int32.
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

    `scale` is the natural size of F, a positive scalar. A solve to tolerance stops at ‖F‖ ≤ tol · scale.
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
    """An inner solver, which finds the parameters; made by `hg.inner.lbfgs` and its siblings.

    Attributes:
        init: `(params, hparams) -> state` of the inner optimizer.
        solve: see `SolveFn`.
        options: numbers that may change from call to call without recompiling (`tol`, `max_steps`).
        claims: whether the solve is to a tolerance, so that a miss is a status.
        symmetric: whether F is the gradient of a loss, so that its Jacobian is symmetric.
        residual: `(objective, params, hparams) -> F`, a pytree like the parameters; zero at the solution.
        steps: number of steps to unroll, a Python integer; None for solvers that cannot be unrolled.
        update: `(grads, params, state, hparams) -> (params, state)`, one differentiable optimizer step for a given
            gradient; None for a solver without such a step.
        move: `(objective, params, state, hparams, step) -> (params, state)`, one differentiable step of a map; None for
            a solver without such a step. Exactly one of `update` and `move` is given where `steps` is.
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


def packed(inner: Inner, objective: Objective, packing: Packing) -> Inner:
    """The same inner solver for parameters that are packed; it works on `objective` and the tree itself, as before."""
    pack, unpack = packing

    def solve(packed: Objective, params: PyTree, *rest: PyTree, **options: Any) -> InnerResult:
        del packed
        found = inner.solve(objective, unpack(params), *rest, **options)
        return found._replace(params=pack(found.params))

    return inner._replace(
        init=lambda params, hparams: inner.init(unpack(params), hparams),
        solve=solve,
        residual=lambda _, params, hparams: pack(inner.residual(objective, unpack(params), hparams)),
    )


Iterate = Callable[[Objective, PyTree, PyTree, Any, Array], tuple[PyTree, Array, Array, Array]]


def iterative(
    iterate: Iterate,
    *,
    residual: Callable[[Objective, PyTree, PyTree], PyTree],
    tol: ArrayLike | None,
    max_steps: ArrayLike,
    symmetric: bool = False,
    claims: bool = True,
    steps: int | None = None,
    move: Callable[[Objective, PyTree, PyTree, PyTree, Any], tuple[PyTree, PyTree]] | None = None,
) -> Inner:
    """Make an `Inner` that keeps no state of its own between calls from a function that iterates.

    Args:
        iterate: `(objective, params, hparams, target, max_steps) -> (params, ‖F‖, steps, status)`; `target` is the ‖F‖
            at which to stop, None where nothing is claimed.
        residual: see `Inner`.
        tol: relative tolerance; None means what the precision supports.
        max_steps: largest number of steps.
        symmetric: see `Inner`.
        claims: see `Inner`.
        steps: number of steps of an unrolled run, or None.
        move: a step of an unrolled run; it is used where `steps` is given.
    """

    def solve(
        objective: Objective,
        params: PyTree,
        state: PyTree,
        hparams: PyTree,
        model_state: PyTree,
        *,
        scale: Array,
        options: Mapping[str, ArrayLike],
    ) -> InnerResult:
        target = default_tol(options["tol"], params) * scale if claims else None
        most = jnp.asarray(options["max_steps"], jnp.int32)
        solution, left, taken, status = iterate(objective, params, hparams, target, most)
        return InnerResult(solution, state, model_state, left, taken, status)

    numbers: dict[str, Any] = ({"tol": tol} if claims else {}) | {"max_steps": max_steps}
    return Inner(
        lambda params, hparams: (),
        solve,
        numbers,
        claims=claims,
        symmetric=symmetric,
        residual=residual,
        steps=None if steps is None else int(steps),
        move=None if steps is None else move,
    )


def map_of(name: str, function: Any, returns: str) -> Callable[[PyTree, PyTree, PyTree, Array | None], PyTree]:
    """A user's `(params, hparams, batch[, key]) -> pytree like params`, as a checked function of four arguments.

    Args:
        name: name of the argument in messages, such as `"root: equations"`.
        function: the user's function.
        returns: what it returns, for the message.

    Raises:
        InputTypeError: for something that is not such a function. When it is called: for a result of another dtype
            than the parameters.
        InputError: when it is called: for a missing key, and for a result of another structure or shape.
    """
    if not callable(function):
        raise InputTypeError(
            f"{name} must be a function (params, hparams, batch[, key]) -> {returns}, found {type(function).__name__}."
        )
    use = key_use(function, name, False)
    differentiable = released(function)
    result = "{}: the result of {}".format(*name.split(": "))

    def apply(params: PyTree, hparams: PyTree, batch: PyTree, key: Array | None) -> PyTree:
        if use == "required" and key is None:
            raise InputError(
                f"{name} takes a key, but none was given: pass key=jax.random.key(0) to hypergrad or tune, or give the "
                "key a default."
            )
        keys = () if key is None or use == "none" else (key,)
        found = differentiable(params, hparams, batch, *keys)
        check_like_params(result, found, params)
        return found

    return apply


INNER = Slot(
    Inner,
    "an inner solver",
    "hg.inner.lbfgs(), or hg.inner.gradient(optimizer, steps=100) for an optax optimizer",
)
STEPS = INNER._replace(write="hg.inner.gradient(optimizer, steps=100), with an optax optimizer such as optax.sgd(0.1)")


def check_like_params(what: str, result: PyTree, params: PyTree) -> None:
    """Raise unless what a user's function returned has the structure, shapes and dtypes of the parameters.

    Args:
        what: name of the result in messages, such as "fixed_point: the result of map".
        result: what the function returned.
        params: the parameters that it was given.
    """
    check_same_structure(what, result, params, "it must be like the parameters that it is given.")
    pairs = zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(params), strict=True)
    for (path, found), expected in pairs:
        if jnp.result_type(found) != jnp.result_type(expected):
            raise InputTypeError(
                f"{what}{keystr(path)} has dtype {jnp.result_type(found)}, expected {jnp.result_type(expected)}: cast "
                "it with .astype, or give parameters and hyperparameters one dtype."
            )

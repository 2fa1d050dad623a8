"""The frame of a call: how `hypergrad` and `evaluate` begin and end in every method.

    call = bind(problem, state.model_state, hparams, train, valid, key)    # checks; binds data and keys to the losses
    ...                                                                    # the method, in the order of its paper
    status = first_failure(bad_loss(value), ..., bad_grad(grad, rhs), no_influence(grad, rhs))
    info = report(status, steps, like=value, ...)
    return Hypergradient(value, grad, info, metrics), state                # finite, whatever happened

    return framed(init, hypergrad, response, evaluate, about)              # the solver, whose loops convolve fast

The file of a method therefore holds its mathematics, and only those helpers that no other method needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_data, check_hparams
from hypergrad._jaxpr.convolutions import fast_convolutions
from hypergrad._problem import Objective, Problem, bind_inner, bind_outer
from hypergrad._sharding import COPIED, spread_by_xla
from hypergrad._solver import About, Hypergradient, Info, InputError, Solver, Status, code
from hypergrad._tree import PyTree
from hypergrad.inner._optimum import Optimum

Outer = Callable[[PyTree, PyTree], tuple[Array, dict[str, Any]]]
State = TypeVar("State", bound=Any)


class Call(NamedTuple):
    """One call of a solver, checked, with its data and keys bound to the losses.

    Attributes:
        hparams: as floating arrays.
        objective: the inner problem.
        outer: `model_state -> (params, hparams) -> (outer loss, metrics)`.
        outer_key: the key that `outer` draws with, or None.
        keys: the method's own keys, as many as it asked for; each is None in a call without a key.
    """

    hparams: PyTree
    objective: Objective
    outer: Callable[[PyTree], Outer]
    outer_key: Any
    keys: tuple[Any, ...]

    def of(self, change: Callable[[PyTree], PyTree]) -> Call:
        """The same call over other parameters x: its losses evaluate at `change(x)`."""

        def outer(model_state: PyTree) -> Outer:
            given = self.outer(model_state)
            return lambda x, hparams: given(change(x), hparams)

        return self._replace(objective=self.objective.of(change), outer=outer)

    @property
    def probe_key(self) -> Array:
        """A key for random signs that steer a solve without changing its result; fixed in a call without a key."""
        (key,) = self.keys
        return jax.random.key(0) if key is None else key


def bind(
    problem: Problem,
    model_state: PyTree,
    hparams: PyTree,
    train: PyTree,
    valid: PyTree,
    key: Array | None,
    *,
    own_keys: int = 1,
) -> Call:
    """Check what a call was given, and bind it to the losses.

    Args:
        problem: the two losses.
        model_state: model state with which the inner problem starts, or None.
        hparams: pytree of floating arrays or Python numbers.
        train: pytree of arrays, minibatches, or None.
        valid: pytree of arrays, minibatches, or None.
        key: key of this call, or None.
        own_keys: how many keys the method itself needs.

    Raises:
        InputTypeError: for hyperparameters that are not real numbers.
        InputError: for data without examples, and for data that are drawn at random in a call without a key.
    """
    hparams = check_hparams(hparams)
    check_data("train", train)
    check_data("valid", valid)
    count = 2 + own_keys
    inner_key, outer_key, *keys = (None,) * count if key is None else jax.random.split(key, count)

    def outer(model_state: PyTree) -> Outer:
        return bind_outer(problem, valid, outer_key, model_state)

    return Call(hparams, bind_inner(problem, train, inner_key, model_state), outer, outer_key, tuple(keys))


def require_key(solver: str, function: str, key: Array | None, draws: str = "hyperparameters") -> Array:
    """Return the key, for a method that needs one in every call because it draws what `draws` names.

    Raises:
        InputError: if `key` is None.
    """
    if key is None:
        raise InputError(
            f"{solver} draws {draws} in every step, but key is None: pass key=jax.random.key(0) to "
            f"{function}, or to tune."
        )
    return key


def differentiate_outer(outer: Outer, params: PyTree, hparams: PyTree) -> tuple[Array, dict[str, Any], PyTree, PyTree]:
    """`(f, metrics, ∂_w f, ∂_λ f)`."""
    (value, metrics), (rhs, direct) = jax.value_and_grad(outer, argnums=(0, 1), has_aux=True)(params, hparams)
    return value, metrics, rhs, direct


def bad_loss(value: Array) -> Array:
    """NONFINITE_LOSS for an outer loss that is not finite, else OK."""
    return code(~jnp.isfinite(value), Status.NONFINITE_LOSS)


def bad_grad(*grads: PyTree) -> Array:
    """NONFINITE_GRAD where a gradient is not finite, else OK."""
    return code(~_tree.all_finite(grads), Status.NONFINITE_GRAD)


def no_influence(grad: PyTree, rhs: PyTree = None) -> Array:
    """INSENSITIVE for a zero hypergradient, unless the outer loss's gradient `rhs` is known to be zero; else OK."""
    zero = _tree.max_abs(grad) == 0
    return code(zero if rhs is None else zero & (_tree.max_abs(rhs) > 0), Status.INSENSITIVE)


def report(
    status: Array,
    inner_steps: ArrayLike,
    *,
    like: Array,
    inner_residual: Array | None = None,
    linear_residual: Array | None = None,
    linear_steps: ArrayLike = 0,
    error_estimate: Array | None = None,
    extra: Mapping[str, Array] | None = None,
) -> Info:
    """The `Info` of a call. What a method has no value for is left out, and becomes NaN, or inf for the error estimate.

    Args:
        status: int32 code.
        inner_steps: steps of the inner solver.
        like: floating scalar whose dtype is used for the numbers that are left out.
        inner_residual: see `Info`.
        linear_residual: see `Info`.
        linear_steps: products with the operator of the adjoint system.
        error_estimate: see `Info`; inf where nothing is known.
        extra: scalars by name.
    """
    nan, inf = jnp.full_like(like, jnp.nan), jnp.full_like(like, jnp.inf)
    return Info(
        status=status,
        inner_residual=nan if inner_residual is None else inner_residual,
        linear_residual=nan if linear_residual is None else linear_residual,
        inner_steps=jnp.asarray(inner_steps, jnp.int32),
        linear_steps=jnp.asarray(linear_steps, jnp.int32),
        error_estimate=inf if error_estimate is None else error_estimate,
        extra=dict(extra or {}),
    )


def go_on_from(state: State, optimum: Optimum) -> State:
    """The state with which the next call of a solver that works at the optimum starts; finite if the last one is."""
    return state._replace(
        params=optimum.params,
        inner_state=optimum.inner_state,
        model_state=optimum.model_state,
        scale=finite_or(optimum.scale, state.scale),
    )


def finite_or(new: PyTree, old: PyTree) -> PyTree:
    """`new` if every entry is finite, else `old`."""
    return _tree.where(_tree.all_finite(new), new, old)


def current_params(state: Any, hparams: PyTree) -> PyTree:
    """The `response` of a solver whose state holds the parameters themselves."""
    del hparams
    return state.params


def option_names(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The names by which `About.options` knows traced options: `"inner.tol"` for `{"inner": {"tol": ...}}`."""
    names: list[str] = []
    for name, value in options.items():
        names += [f"{name}.{part}" for part in option_names(value)] if isinstance(value, Mapping) else [name]
    return tuple(names)


def framed(
    init: Callable[..., Any],
    hypergrad: Callable[..., Any],
    response: Callable[..., PyTree],
    evaluate: Callable[..., Any],
    about: About,
) -> Solver:
    """Make a solver that owns its state, whose convolutions are as fast inside its loops as outside, and that accepts
    parameters spread over an Explicit mesh.
    """
    hypergrad = fast_convolutions(_spread_alike(hypergrad))
    hypergrad = spread_by_xla(hypergrad, lambda state, hparams: (Hypergradient(COPIED, hparams, COPIED, COPIED), state))
    evaluate = spread_by_xla(fast_convolutions(evaluate), lambda state, hparams: (COPIED, COPIED, state))
    return Solver(owned(init), hypergrad, response, evaluate, about)


def _spread_alike(hypergrad: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same solver with its gradient spread over an Auto mesh as the hyperparameters are.

    XLA spreads the two operands of one operation alike; otherwise it would copy what a learned response or a sum over
    tangents yields to every device. The gradient is NaN where the hyperparameter is, as it was before.
    """

    @functools.wraps(hypergrad)
    def call(state: Any, hparams: PyTree, *args: Any, **kwargs: Any) -> Any:
        out, state = hypergrad(state, hparams, *args, **kwargs)
        return out._replace(grad=jax.tree.map(lambda g, h: jnp.where(jnp.isnan(h), h, g), out.grad, hparams)), state

    return call


def owned(init: Callable[..., State]) -> Callable[..., State]:
    """Return the same `init`, with a state that shares no buffer with its arguments or within itself, so that it can be
    donated, and that lies on the devices of the parameters, so that the second call compiles nothing.
    """

    @functools.wraps(init)
    def copied(*args: Any, **kwargs: Any) -> State:
        return _beside((args, kwargs), jax.tree.map(jnp.copy, init(*args, **kwargs)))

    return copied


def _beside(given: PyTree, state: State) -> State:
    """Copy what lies on one device in the state to every device of the mesh that the arguments lie on, if any."""
    spread = lambda x: isinstance(x, Array) and not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding)
    meshes = {x.sharding.mesh for x in jax.tree.leaves(given) if spread(x)}
    if len(meshes) != 1:
        return state
    mesh = meshes.pop()
    named = AxisType.Explicit in mesh.axis_types  # so that the sharding has the name that a compiled program gives it
    everywhere = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim * named)))
    apart = lambda x: isinstance(x, Array) and not isinstance(x, Tracer) and not isinstance(x.sharding, NamedSharding)
    return jax.tree.map(lambda x: jax.device_put(x, everywhere(x)) if apart(x) else x, state)

"""The problem: two loss functions, and one way to call them.

    inner_loss, outer_loss: f(params, hparams, batch[, key][, model_state]) -> scalar, or (scalar, metrics)

The rest of the library calls losses through `inner_value` and `outer_value`, where every optional argument and every
optional output is present.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._checks import check_same_structure
from hypergrad._data import draw
from hypergrad._options import Slot
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_key


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem: tune `hparams` so that training on `inner_loss` gives a low `outer_loss`.

        minimise over hparams   outer_loss(w*(hparams), hparams)
        with                    w*(hparams) = argmin over w of inner_loss(w, hparams)

    Each loss is `f(params, hparams, batch, key) -> scalar`; a function of three arguments is taken as one that needs
    no key. `params`, `hparams` and `batch` are any pytrees; the leaves of `params` and `hparams` are floating point.

    Args:
        inner_loss: the training loss. It is None only for `hg.inner.fixed_point` and `hg.inner.root`, whose map and
            equations take its place.
        outer_loss: the validation loss. May return `(scalar, metrics)` with a dict of scalars.
        model_state: True for losses with state in addition to the parameters (batch-norm statistics): both then take a
            last argument `model_state`, and `inner_loss` returns `(scalar, model_state)`. `outer_loss` sees it frozen.

    Raises:
        InputTypeError: if a loss is not a function of the number of arguments above.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 0.5)**2))
    """

    inner_loss: Callable[..., Any] | None
    outer_loss: Callable[..., Any]
    model_state: bool = False

    def __post_init__(self) -> None:
        for name, loss in (("inner_loss", self.inner_loss), ("outer_loss", self.outer_loss)):
            if name == "outer_loss" or loss is not None:
                key_use(loss, name, self.model_state)

    @property
    def needs_key(self) -> bool:
        """Whether one of the losses takes a key."""
        losses = [
            (n, f) for n, f in (("inner_loss", self.inner_loss), ("outer_loss", self.outer_loss)) if f is not None
        ]
        return any(key_use(f, n, self.model_state) == "required" for n, f in losses)


PROBLEM = Slot(Problem, "an hg.Problem", "hg.Problem(inner_loss, outer_loss)")


def key_use(loss: Any, name: str, model_state: bool) -> Literal["none", "optional", "required", "unknown"]:
    """Whether a loss takes a key, from the number of its positional arguments; unknown if they cannot be counted.

    Raises:
        InputTypeError: if the number fits neither form.
    """
    if not callable(loss):
        raise InputTypeError(
            f"{name} must be a function f(params, hparams, batch) -> scalar, found {type(loss).__name__}."
        )
    last = ", model_state" if model_state else ""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return "unknown"
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):  # a decorator's g(*args)
        return "unknown"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    without = 3 + bool(model_state)
    if required <= without + 1 <= len(positional):
        return "optional" if required <= without and not model_state else "required"
    if required <= without <= len(positional):
        return "none"
    names = ", ".join(p.name for p in positional)
    raise InputTypeError(
        f"{name} must take (params, hparams, batch{last}) or (params, hparams, batch, key{last}), found ({names}). "
        f"Bind other arguments with functools.partial"
        + (
            "."
            if model_state or len(positional) != 5
            else "; for a model with state pass hg.Problem(..., model_state=True)."
        )
    )


class Objective(NamedTuple):
    """The inner problem within one call of `hypergrad`, with data and randomness bound; parameters and λ are free.

    Attributes:
        stochastic: `(params, hparams, model_state, step) -> (loss, model_state)`; draws the batch and key of `step`.
        fixed: `(params, hparams) -> loss`, with the same batch, key and model state at every call. Solves to a
            tolerance minimise it, and the Hessian and the cross product are those of this loss.
        batch: `step -> (batch, key)`, what `stochastic` draws; for maps that are not losses.
        fixed_batch: `(batch, key)` that `fixed` uses.
        outputs: `(params, hparams) -> model outputs`, for losses made by `hg.compose`; else None.
        loss_of_outputs: `(outputs, params, hparams) -> loss`, for losses made by `hg.compose`; else None.
    """

    stochastic: Callable[[PyTree, PyTree, PyTree, Any], tuple[Array, PyTree]]
    fixed: Callable[[PyTree, PyTree], Array]
    batch: Callable[[Any], tuple[PyTree, Array | None]]
    fixed_batch: tuple[PyTree, Array | None]
    outputs: Callable[[PyTree, PyTree], PyTree] | None = None
    loss_of_outputs: Callable[[PyTree, PyTree, PyTree], Array] | None = None

    def of(self, change: Callable[[PyTree], PyTree]) -> Objective:
        """The same problem over other parameters x: its functions take x and evaluate at `change(x)`."""
        stochastic, fixed, outputs, loss = self.stochastic, self.fixed, self.outputs, self.loss_of_outputs
        # Under a `jit` of its own a loss of many leaves is traced and differentiated once, where JAX would do so at
        # each of the dozen places that use it.
        return self._replace(
            stochastic=lambda x, *rest: stochastic(change(x), *rest),
            fixed=jax.jit(lambda x, hparams: fixed(change(x), hparams)),
            outputs=outputs and (lambda x, hparams: outputs(change(x), hparams)),
            loss_of_outputs=loss and (lambda out, x, hparams: loss(out, change(x), hparams)),
        )


@dataclasses.dataclass(frozen=True)
class Composed:
    """A loss in two parts, the model and a loss of its outputs that is convex in them; made by `compose`."""

    outputs: Callable[..., Any]
    loss: Callable[..., Any]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.outputs)

    def __call__(self, params: PyTree, hparams: PyTree, batch: PyTree, *key: Array) -> Any:
        return self.loss(self.outputs(params, hparams, batch, *key), params, hparams, batch)


def compose(outputs: Callable[..., Any], loss: Callable[..., Any]) -> Composed:
    """An inner loss `loss(outputs(params, hparams, batch), params, hparams, batch)` with a Gauss-Newton Hessian.

    The Gauss-Newton matrix is `Jᵀ (∂² loss) J` with `J` the Jacobian of `(outputs, params)` with respect to `params`:
    the curvature of the model is dropped, and that of a regularizer written in `loss` is kept exactly. It is positive
    semi-definite whenever `loss` is convex in `(outputs, params)`.

    Args:
        outputs: `(params, hparams, batch[, key]) -> pytree`, the model.
        loss: `(outputs, params, hparams, batch) -> scalar`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> inner_loss = hg.compose(lambda w, l2, x: jnp.tanh(x @ w),
    ...                         lambda out, w, l2, x: jnp.mean(out**2) + l2 * jnp.sum(w**2))
    >>> float(inner_loss(jnp.zeros(2), 0.1, jnp.ones((3, 2))))
    0.0
    """
    return Composed(outputs, loss)


def bind_inner(problem: Problem, train: PyTree, key: Array | None, model_state: PyTree) -> Objective:
    """Bind the training data, the key of this call and the model state to the inner loss."""
    step_key, fixed_key = (None, None) if key is None else jax.random.split(key)

    def batch(step: Any) -> tuple[PyTree, Array | None]:
        if step_key is None:
            return draw(train, None, step), None
        data_key, loss_key = jax.random.split(jax.random.fold_in(step_key, step))
        return draw(train, data_key, step), loss_key

    fixed_data, fixed_loss = (None, None) if fixed_key is None else jax.random.split(fixed_key)
    fixed_batch = (draw(train, fixed_data, 0), fixed_loss)

    def stochastic(params: PyTree, hparams: PyTree, state: PyTree, step: Any) -> tuple[Array, PyTree]:
        return inner_value(problem, params, hparams, *batch(step), state)

    def fixed(params: PyTree, hparams: PyTree) -> Array:
        return inner_value(problem, params, hparams, *fixed_batch, model_state)[0]

    if isinstance(problem.inner_loss, Composed):
        composed, (data, loss_key) = problem.inner_loss, fixed_batch
        keys = () if loss_key is None or key_use(composed, "inner_loss", False) == "none" else (loss_key,)
        return Objective(
            stochastic,
            fixed,
            batch,
            fixed_batch,
            outputs=lambda params, hparams: composed.outputs(params, hparams, data, *keys),
            loss_of_outputs=lambda out, params, hparams: composed.loss(out, params, hparams, data),
        )
    return Objective(stochastic, fixed, batch, fixed_batch)


def bind_outer(
    problem: Problem, valid: PyTree, key: Array | None, model_state: PyTree
) -> Callable[[PyTree, PyTree], tuple[Array, dict[str, Any]]]:
    """`(params, hparams) -> (outer loss, metrics)`, with data, key and model state bound."""
    data_key, loss_key = (None, None) if key is None else jax.random.split(key)
    batch = draw(valid, data_key, 0)
    return lambda params, hparams: outer_value(problem, params, hparams, batch, loss_key, model_state)


def reparametrized(problem: Problem, change: Callable[[PyTree], PyTree]) -> Problem:
    """The same problem over other hyperparameters u: its losses take u and evaluate at `change(u)`."""

    def transform(loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss)  # keeps the signature, from which the Problem reads whether the loss takes a key
        def transformed(params: PyTree, hparams: PyTree, *rest: Any) -> Any:
            return loss(params, change(hparams), *rest)

        return transformed

    inner = problem.inner_loss
    if isinstance(inner, Composed):
        loss = inner.loss
        inner = Composed(
            transform(inner.outputs), lambda out, params, hparams, batch: loss(out, params, change(hparams), batch)
        )
    elif inner is not None:
        inner = transform(inner)
    return Problem(inner, transform(problem.outer_loss), problem.model_state)


def inner_value(
    problem: Problem, params: PyTree, hparams: PyTree, batch: PyTree, key: Array | None, model_state: PyTree
) -> tuple[Array, PyTree]:
    """Training loss and the new model state (None without one)."""
    if problem.inner_loss is None:
        raise InputError(
            "inner_loss is None, which only hg.inner.fixed_point and hg.inner.root can work with: give hg.Problem an "
            "inner_loss."
        )
    result = _call(problem, problem.inner_loss, "inner_loss", params, hparams, batch, key, model_state)
    if problem.model_state:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise InputTypeError(
                "inner_loss must return (loss, model_state) when hg.Problem(..., model_state=True), "
                f"found {_describe(result)}."
            )
        check_same_structure(
            "inner_loss: the model_state that it returns",
            result[1],
            model_state,
            "return one like the model_state it was given.",
        )
        # In the given dtypes, so that steps can be repeated in a loop.
        fresh = jax.tree.map(
            lambda new, old: new if is_key(old) else jnp.asarray(new, jnp.result_type(old)), result[1], model_state
        )
        return _scalar(result[0], "inner_loss"), fresh
    loss, _ = _split(result, "inner_loss")
    return loss, None


def outer_value(
    problem: Problem, params: PyTree, hparams: PyTree, batch: PyTree, key: Array | None, model_state: PyTree
) -> tuple[Array, dict[str, Any]]:
    """Validation loss and its metrics (an empty dict without any)."""
    result = _call(problem, problem.outer_loss, "outer_loss", params, hparams, batch, key, model_state)
    return _split(result, "outer_loss")


def _call(
    problem: Problem,
    loss: Callable[..., Any],
    name: str,
    params: PyTree,
    hparams: PyTree,
    batch: PyTree,
    key: Array | None,
    model_state: PyTree,
) -> Any:
    args: list[Any] = [params, hparams, batch]
    use = key_use(loss, name, problem.model_state)
    if use == "required" or (use in ("optional", "unknown") and key is not None):
        if key is None:
            raise InputError(
                f"{name} takes a key, but none was given: pass key=jax.random.key(0) to init, hypergrad or tune."
            )
        args.append(key)
    if problem.model_state:
        args.append(model_state)
    try:
        return _with_or_without(key, loss, args) if use == "unknown" else loss(*args)
    except jax.errors.ConcretizationTypeError as error:
        raise InputTypeError(
            f"{name}: Python needs the value of something that is traced, as parameters, hyperparameters and batches "
            "are: write jnp.where or jax.lax.cond instead of `if`. For a dropout rate that is a hyperparameter, "
            f"hg.augment.dropout(x, rate, key=key) takes the place of the layer. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        if not getattr(error, "__notes__", None):
            shapes = ", ".join(
                f"{what} {_shapes(value)}"
                for what, value in (("params", params), ("hparams", hparams), ("batch", batch))
            )
            error.add_note(f"hypergrad: raised while tracing {name}, which was given {shapes}.")
        raise


def _with_or_without(key: Array | None, loss: Callable[..., Any], args: list[Any]) -> Any:
    """The value of a loss whose arguments cannot be counted: with the key, or without if it does not take one."""
    try:
        return loss(*args)
    except TypeError:
        if key is None:
            raise
        try:
            return loss(*(arg for arg in args if arg is not key))
        except TypeError:
            pass
        raise  # the error of the first call


def _split(result: Any, name: str) -> tuple[Array, dict[str, Any]]:
    if not isinstance(result, tuple):
        return _scalar(result, name), {}
    if len(result) != 2 or not isinstance(result[1], dict):
        raise InputTypeError(f"{name} must return a scalar or (scalar, dict of metrics), found {_describe(result)}.")
    for metric, value in result[1].items():
        if jnp.shape(value) != ():
            raise InputError(
                f"{name} returned the metric {metric!r} of shape {jnp.shape(value)}; metrics are scalars: "
                "take its mean."
            )
    return _scalar(result[0], name), result[1]


def _scalar(value: Any, name: str) -> Array:
    if not hasattr(value, "shape") and not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must return a scalar, found {_describe(value)}.")
    if jnp.shape(value) != ():
        raise InputError(
            f"{name} must return a scalar, found shape {jnp.shape(value)}: "
            "return its mean or sum (for shape (1,), squeeze it)."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise InputTypeError(f"{name} must return a real floating-point scalar, found {jnp.result_type(value)}.")
    return jnp.asarray(value)


def _shapes(tree: PyTree) -> str:
    return str(jax.tree.map(lambda x: tuple(jnp.shape(x)) if hasattr(x, "shape") else x, tree))


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_describe(v) for v in value) + ")"
    if hasattr(value, "shape"):
        return f"an array of shape {value.shape}"
    return type(value).__name__

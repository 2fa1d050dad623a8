r"""A number of steps of any optax optimizer, which `hg.unrolled` can differentiate.

    wₜ₊₁, sₜ₊₁ = update(∂_w h(wₜ, λ; batchₜ), wₜ, sₜ; λ),    t = 0 … T − 1

The optimizer may itself depend on λ (learning rate, momentum, betas, a rate per step or layer): pass a function
`hparams -> optimizer`. Its update is differentiable even where a gradient is exactly zero (see
`hypergrad._jaxpr.differentiable`); optax's own is not, for Adam and twelve others.
Cost: one gradient per step, on a fresh batch where the data are minibatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_same_structure
from hypergrad._jaxpr.differentiable import differentiable
from hypergrad._options import Number, Slot, default_tol, options
from hypergrad._problem import Objective
from hypergrad._solver import HypergradError, InputError, InputTypeError, Status, code, first_failure
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner, InnerResult, gradient_residual
from hypergrad.inner._watch import ENOUGH, Heights, enter, new_heights, rose

Optimizer = optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
_Step = Callable[[PyTree, PyTree, PyTree, PyTree, Array | None], tuple[PyTree, PyTree]]


class _Carry(NamedTuple):
    params: PyTree
    state: PyTree
    model_state: PyTree
    residual: Array
    heights: Heights
    steps: Array
    met: Array  # whether the tolerance is met


OPTIMIZER = Slot(("init", "update"), "an optax optimizer", "optax.adam(1e-3)")


@options(steps=Number(least=0, integer=True, static=True), tol=Number(above=0))
def gradient(optimizer: Optimizer, *, steps: int, tol: ArrayLike | None = None) -> Inner:
    """Take `steps` steps of an optax optimizer on the inner loss.

    The optimizer's state (momenta, step count, and so the position in a schedule) is carried to the next call. Each
    step draws its own batch and key, and passes on the model state.

    Without `tol` the steps are a budget that claims nothing, and the residual is the gradient norm before the last
    step. With `tol` the solve stops at the tolerance, and a miss is INNER_MAX_STEPS. Either way the status is
    INNER_DIVERGED if the loss overflowed, or every value of the last quarter of the steps is far above every one of
    the first quarter (from 16 steps on, where there is no `tol`), and NONFINITE_LOSS or NONFINITE_GRAD where a
    number turned NaN from one step to the next. After these failures the parameters and states are those the call
    started from.

    Args:
        optimizer: an optax optimizer, or a function `hparams -> optimizer` that builds it from traced
            hyperparameters: `lambda h: optax.adam(h['lr'], b1=h['b1'])`; a rate per step,
            `lambda h: optax.sgd(lambda t: h['lr'][t])`; a rate per layer,
            `lambda h: optax.partition({'a': optax.sgd(h['lr_a']), ...}, labels)`. Optax's linear, polynomial and join
            schedules compute in float32 even in float64; a lambda schedule has the precision of its hyperparameters.
            `optax.lion` and `optax.sign_sgd` see only the sign of the momentum, so their betas have derivative zero.
        steps: number of steps, a Python integer; with `tol`, the largest number.
        tol: tolerance on the gradient norm, relative to its natural scale (dimensionless).

    Raises:
        InputError: for a negative step count or tolerance; from `init`, for an optimizer whose update changes the
            structure of the parameters, needs the loss function itself, or cannot be differentiated by its setting.
        InputTypeError: for anything but an optimizer or a function that returns one.

    >>> import hypergrad as hg, optax
    >>> inner = hg.inner.gradient(optax.sgd(0.1, momentum=0.9), steps=100)
    >>> tuned = hg.inner.gradient(lambda h: optax.adam(h['lr'], b1=h['b1']), steps=100)
    """
    if not _is_optimizer(optimizer) and not callable(optimizer):
        raise InputTypeError(
            "gradient: optimizer must be an optax optimizer or a function hparams -> optimizer, found "
            f"{_describe(optimizer)}: write optax.sgd(0.1), or "
            "lambda hparams: optax.sgd(hparams['lr'])."
        )

    def init(params: PyTree, hparams: PyTree) -> PyTree:
        _check(optimizer, params, hparams)
        state = _build(optimizer, hparams).init(params)
        return _tree.strong(state)

    def step(
        grads: PyTree, params: PyTree, state: PyTree, hparams: PyTree, value: Array | None
    ) -> tuple[PyTree, PyTree]:
        return _apply(_build(optimizer, hparams), grads, params, state, value)

    def update(
        grads: PyTree, params: PyTree, state: PyTree, hparams: PyTree, value: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        made = _build(optimizer, hparams)  # outside: what the caller computes from hparams keeps its own derivative
        return differentiable(lambda g, w, s, v: _apply(made, g, w, s, v))(grads, params, state, value)

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
        target = default_tol(options["tol"], params) * scale if tol is not None else None
        return _solve(
            step,
            objective,
            params,
            state,
            hparams,
            model_state,
            target=target,
            max_steps=jnp.asarray(options["max_steps"], jnp.int32),
        )

    options: dict[str, Any] = {"max_steps": int(steps)} | ({} if tol is None else {"tol": tol})
    return Inner(
        init,
        solve,
        options,
        claims=tol is not None,
        symmetric=True,
        residual=gradient_residual,
        steps=int(steps),
        update=update,
    )


def _solve(
    step: _Step,
    objective: Objective,
    params: PyTree,
    state: PyTree,
    hparams: PyTree,
    model_state: PyTree,
    *,
    target: Array | None,
    max_steps: Array,
) -> InnerResult:
    dtype = _tree.dtype(params)
    loss = jax.value_and_grad(objective.stochastic, has_aux=True)

    def proceed(c: _Carry) -> Array:
        # With a tolerance, the point that the last step reached is checked as well.
        more = c.steps < max_steps if target is None else (c.steps <= max_steps) & ~c.met
        return more & (c.heights.status == int(Status.OK))

    def body(c: _Carry) -> _Carry:
        (value, fresh), grads = loss(c.params, hparams, c.model_state, c.steps)
        residual = _tree.norm(grads).astype(dtype)
        heights = enter(c.heights, value.astype(dtype), residual, c.steps, max_steps)
        moved, moved_state = step(grads, c.params, c.state, hparams, value)
        met = jnp.asarray(False) if target is None else residual <= target
        if target is not None:
            stay = met | (c.steps >= max_steps)
            kept = c.params, c.state, c.model_state
            moved, moved_state, fresh = _tree.where(stay, kept, (moved, moved_state, fresh))
        return _Carry(moved, moved_state, fresh, residual, heights, c.steps + 1, met)

    zero, no = jnp.zeros((), dtype), jnp.asarray(False)
    start = _Carry(params, state, model_state, zero, new_heights(dtype), jnp.int32(0), no)
    c = jax.lax.while_loop(proceed, body, start)
    if target is None:
        steps, missed, grown = c.steps, Status.OK, rose(c.heights) & (max_steps >= ENOUGH)
    else:  # the last check was not a step
        steps, missed, grown = c.steps - 1, code(~c.met, Status.INNER_MAX_STEPS), rose(c.heights) & ~c.met
    diverged = code(grown | ~_tree.all_finite(c.params), Status.INNER_DIVERGED)
    status = first_failure(c.heights.status, diverged, missed)
    failed = (status != int(Status.OK)) & (status != int(Status.INNER_MAX_STEPS))
    params, model_state = _tree.where(failed, (params, model_state), (c.params, c.model_state))
    overflown = ~_tree.all_finite(c.state) & _tree.all_finite(state)  # some optimizers start from infinity
    state = _tree.where(failed | overflown, state, c.state)
    return InnerResult(params, state, model_state, c.residual, steps, status)


def _is_optimizer(found: Any) -> bool:
    return callable(getattr(found, "init", None)) and callable(getattr(found, "update", None))


def _describe(found: Any) -> str:
    return f"an array of shape {found.shape}" if hasattr(found, "shape") else f"{type(found).__name__}"


def _build(optimizer: Optimizer, hparams: PyTree) -> optax.GradientTransformationExtraArgs:
    made: Any = optimizer if _is_optimizer(optimizer) else optimizer(hparams)  # pyright: ignore[reportCallIssue]
    if not _is_optimizer(made):
        raise InputTypeError(
            f"gradient: optimizer(hparams) must return an optax optimizer, found {_describe(made)}: "
            "write lambda hparams: optax.sgd(hparams['lr'])."
        )
    return optax.with_extra_args_support(made)


def _apply(
    optimizer: optax.GradientTransformationExtraArgs, grads: PyTree, params: PyTree, state: PyTree, value: Array | None
) -> tuple[PyTree, PyTree]:
    extra = {} if value is None else {"value": value}
    try:
        updates, fresh = optimizer.update(grads, state, params, **extra)
    except TypeError as error:
        if value is None and "'value'" in str(error):
            raise InputError(
                "gradient: the optimizer needs the value of the loss at each step (optax.polyak_sgd, "
                "reduce_on_plateau), which an unrolled step does not carry: use one that needs only the "
                "gradient, or hg.implicit."
            ) from error
        raise
    # Dtypes are kept: some optimizers promote their state on the way.
    keep = lambda new, old: new if _tree.is_key(old) else jnp.asarray(new, jnp.result_type(old))
    fresh = jax.tree.map(keep, fresh, state)
    return optax.apply_updates(params, updates), fresh


def _check(optimizer: Optimizer, params: PyTree, hparams: PyTree) -> None:
    """Trace one update abstractly, and report errors in the caller's terms."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)

    def once(params: PyTree, hparams: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        made = _build(optimizer, hparams)
        state = made.init(params)
        updates, fresh = made.update(params, state, params, value=jnp.zeros((), _tree.dtype(params)))
        check_same_structure(
            "gradient: the optimizer's update",
            updates,
            like,
            "an update must have the structure and shapes of the parameters.",
        )
        return optax.apply_updates(params, updates), state, fresh

    try:
        moved, state, fresh = jax.eval_shape(once, params, hparams)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise InputError(
            f"gradient: {_frame(error)} needs the value of a hyperparameter while tracing, so it cannot be "
            f"differentiated in it ({_culprits(params, hparams, once)}): write schedules as functions of the step, "
            "such as optax.sgd(lambda step: hparams['lr'] * hparams['rate'] ** (step / 100)), "
            "or keep that setting fixed."
        ) from error
    except HypergradError:
        raise
    except (TypeError, ValueError) as error:
        known = _translated(optimizer, hparams, str(error))
        if known is None:
            raise
        raise known from error
    check_same_structure(
        "gradient: the parameters after an update",
        moved,
        like,
        "an update must keep the structure and shapes of the parameters.",
    )
    check_same_structure(
        "gradient: the optimizer's state after an update",
        fresh,
        state,
        "an update must keep the structure and shapes of the state.",
    )


def _translated(optimizer: Optimizer, hparams: PyTree, text: str) -> Exception | None:
    """An error from optax in the caller's terms, if its cause is known."""
    for need in ("value_fn", "obj_fn"):
        if need in text:
            return InputError(
                f"gradient: the optimizer needs the loss function itself ({need}), as line searches and "
                "Hessian probes do: use hg.inner.lbfgs() or hg.inner.newton(), or switch the line search "
                "off (optax.lbfgs(learning_rate, linesearch=None))."
            )
    module = getattr(optimizer, "__module__", "") or ""
    if not _is_optimizer(optimizer) and module.startswith("optax") and not hasattr(hparams, "shape"):
        name = getattr(optimizer, "__name__", "sgd")
        return InputTypeError(
            f"gradient: optimizer is the function optax.{name} itself, so that all of hparams became "
            f"its learning rate: write optax.{name}(0.1), or "
            f"lambda hparams: optax.{name}(hparams['lr'])."
        )
    return None


def _culprits(params: PyTree, hparams: PyTree, once: Callable[..., Any]) -> str:
    """The hyperparameters that cannot be traced, found one by one while the others are known."""
    leaves, treedef = jax.tree.flatten(hparams)
    paths = [f"hparams{_tree.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(hparams)]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return "one of " + ", ".join(paths)
    found, fixed = [], [np.asarray(leaf) for leaf in leaves]  # NumPy's values stay values while tracing
    for i, path in enumerate(paths):
        try:
            jax.eval_shape(lambda x, i=i: once(params, treedef.unflatten([*fixed[:i], x, *fixed[i + 1 :]])), leaves[i])
        except jax.errors.JAXTypeError:
            found.append(path)
    return "it depends on " + ", ".join(found or paths)


def _frame(error: Exception) -> str:
    """The innermost optax function in the traceback of an error, or the caller's own."""
    trace, names = error.__traceback__, []
    while trace is not None:
        frame = trace.tb_frame.f_code
        if "optax" in Path(frame.co_filename).parts:
            names.append(f"optax's {frame.co_name}")
        trace = trace.tb_next
    return names[-1] if names else "the function optimizer(hparams)"

r"""Self-tuning networks: one training run in which the parameters learn how they respond to the hyperparameters.

    train   u = u₀ + softplus(s) ε:     w(u) ← step on L_T(w(u), T(u))
    tune    g = d/du₀ [L_V(w(u), T(u))],   s ← step on L_V − τ Σ log(σ √(2πe)),  σ = softplus(s)

where u₀ are the current hyperparameters in unconstrained coordinates and λ = T(u) is what the losses see. The training
loss is never differentiated with respect to λ: dropout rates, augmentation and whole numbers are tuned like the rest.

There are three ways to train the weights of w(u) = base + slope (u − u₀), chosen by `training=`:

    joint        both on L_T(w(u), T(u))
    split        base on L_T(w(u₀), T(u₀)), slope on L_T(w(u), T(u))
    linearized   base as in split, slope on L_T(f(u₀) + ∂f/∂u (u − u₀), T(u)) with f the model's outputs: one jvp

Source: MacKay et al. 2019, arXiv:1903.03088 (joint); Bae & Grosse 2020 (Δ-STN), arXiv:2010.13514 (split, linearized).
Differs:
1. The papers switch dropout and augmentation off in validation and detach λ there, so that λ acts through w alone. Here
   validation is the outer loss as written: if it contains no dropout, λ acts through w alone without being detached. If
   the outer loss does read λ, that part counts, since the derivative would be wrong without it.
2. The hypergradient is returned, not applied: any outer optimizer, domain or loop can use it.
3. `value` is the outer loss at u₀, free of perturbation.
Cost: `steps` gradients of training (about 1.7 times as much each for linearized) and one of validation; learned scales
add a forward pass. Memory: that of the response, which is twice the parameters for `structured` and `gated`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import caller_level, check_hparams, check_params, check_same_structure, spread
from hypergrad._data import draw
from hypergrad._jaxpr.sensitivity import influence
from hypergrad._options import Choice, Number, Slot, as_options, options
from hypergrad._problem import PROBLEM, Composed, Problem, inner_value, outer_value
from hypergrad._solver import About, Hypergradient, Info, InputError, Solver, Status, first_failure
from hypergrad._tree import PyTree, keystr
from hypergrad.domains._domain import to_unconstrained
from hypergrad.inner._inner import InnerResult
from hypergrad.inner.gradient import OPTIMIZER, gradient
from hypergrad.responses._draws import Around, check_perturb, draws, training_loss, validation_loss
from hypergrad.responses._response import Response, recentre
from hypergrad.responses.gated import Gated
from hypergrad.responses.structured import structured
from hypergrad.solvers._call import (
    Call,
    bad_grad,
    bad_loss,
    bind,
    finite_or,
    framed,
    no_influence,
    option_names,
    report,
    require_key,
)

Validation = Callable[[PyTree, PyTree, PyTree, Any], tuple[Array, dict[str, Any]]]

_ENTRIES = 8  # entries up to which each scale of a leaf is reported


class SelfTuningState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        weights: weights of the response.
        inner_state: state of the optimizer of the weights.
        model_state: state of the model (batch-norm statistics), or None.
        scale: s, a pytree like the hyperparameters; the perturbation has the scale softplus(s).
        scale_state: state of the optimizer of s, or None.
        centre: u₀ of the last call, a pytree like the hyperparameters.
        options: `{"inner": ..., "entropy": τ}`, scalars that may be replaced between calls without recompiling.
    """

    weights: PyTree
    inner_state: PyTree
    model_state: PyTree
    scale: PyTree
    scale_state: PyTree
    centre: PyTree
    options: dict[str, Any]


@options(
    problem=PROBLEM,
    response=Slot(
        (Response, Gated),
        "an hg.responses.Response",
        "hg.responses.structured(), or hg.responses.gated() for a model of hg.responses.layers",
    ),
    optimizer=OPTIMIZER,
    steps=Number(least=0, integer=True, static=True),
    valid_steps=Number(least=1, integer=True, static=True),
    scale=Number(least=0, every=True),
    scale_optimizer=OPTIMIZER,
    entropy=Number(least=0),
    training=Choice(("joint", "split", "linearized")),
)
def self_tuning(
    problem: Problem,
    *,
    response: Any = None,
    optimizer: Any,
    steps: int = 2,
    valid_steps: int = 1,
    scale: PyTree = 0.5,
    scale_optimizer: optax.GradientTransformation | None = None,
    entropy: ArrayLike = 1e-3,
    domain: PyTree = None,
    perturb: str | int = "batch",
    shared: PyTree = False,
    training: str = "joint",
) -> Solver:
    """Hypergradients through a response that is trained along with the parameters, in a single training run.

    Args:
        problem: the two losses. With `hg.responses.gated()` they get `(params, offset)` for the parameters.
        response: how parameters follow hyperparameters; default `hg.responses.structured()`.
        optimizer: optax optimizer of the response's weights.
        steps: training steps per call.
        valid_steps: draws of validation data (and perturbations) over which the hypergradient of a call is averaged.
        scale: initial standard deviation of the perturbation, in unconstrained coordinates, above 0: a number, or a
            pytree prefix of `hparams`.
        scale_optimizer: optax optimizer that learns the scales, one step per call; None keeps them as they are.
        entropy: τ, where scales are learned: weight of the entropy of the perturbation relative to the outer loss, in
            units of the outer loss. It keeps the scales from shrinking to zero.
        domain: pytree prefix of `hparams` with `hg.domains` as leaves; pass the same one to `hg.tune`. Perturbations
            are drawn in its unconstrained coordinates; whole numbers are rounded afterwards.
        perturb: `"batch"`, one draw per step; a number of groups, each a part of the batch with its own draw and
            parameters; `"example"`, one draw for each row, which `hg.responses.gated()` is made for (other responses
            then compute parameters for each row).
        shared: pytree prefix of bools: True for hyperparameters that have one draw for the whole step, because they are
            meaningless for a single row.
        training: `"joint"`, `"split"` or `"linearized"`, see the file's header; linearized needs an inner loss made by
            `hg.compose`.

    Returns:
        A `Solver`, for `hg.tune` with the same `domain`. Its calls train the model: early ones come before anything is
        learned, and the outer loss at the end may be far above that at the best step, `result.best`. `info.extra` holds
        the scales, `"scale['rate']"` for each leaf of `hparams` (the mean for large leaves), and the norms
        `indirect_norm`, of the part that acts through the response, and `direct_norm`, of the part that the outer loss
        reads itself. `info.inner_residual` and `linear_residual` are NaN, and `error_estimate` is infinite, since it is
        not known how far the response has been learned: compare with `hg.check`.

    Raises:
        InputError: for options out of range, and `linearized` without `hg.compose` or with `model_state=True`; from
            `init` and `hypergrad`, for hyperparameters of another structure or outside their domain, and batches that
            cannot be divided into groups.
        InputTypeError: for options of the wrong type; from `init` and `hypergrad`, for leaves that are not floating
            point.

    Warns:
        UserWarning: from `hypergrad`, for a hyperparameter that neither loss uses.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> def inner_loss(w, rate, batch, key):  # dropout: no derivative in its rate
    ...     return jnp.mean((hg.augment.dropout(batch[0], rate, key=key) @ w - batch[1])**2)
    >>> problem = hg.Problem(inner_loss, lambda w, rate, batch: jnp.mean((batch[0] @ w - batch[1])**2))
    >>> domain = hg.domains.interval(0, 0.9)
    >>> solver = hg.self_tuning(problem, optimizer=optax.adam(0.03), steps=5, domain=domain)
    >>> x = jax.random.normal(jax.random.key(0), (32, 20))
    >>> y = x[:, 0] + jax.random.normal(jax.random.key(1), (32,))
    >>> result = hg.tune(solver, jnp.zeros(20), 0.1, (x[:16], y[:16]), (x[16:], y[16:]), domain=domain,
    ...                  outer=optax.adam(0.02), steps=300, key=jax.random.key(2), progress=False)
    >>> bool(result.hparams > 0.1)  # it rose
    True
    """
    check_perturb(perturb)
    if not isinstance(problem.inner_loss, Composed) and training == "linearized":
        raise InputError(
            "self_tuning: training='linearized' linearizes the model's outputs, which an inner loss made by "
            "hg.compose(outputs, loss) keeps apart; write that, or training='split'."
        )
    if problem.model_state and training == "linearized":
        raise InputError("self_tuning: training='linearized' does not carry model_state: write training='split'.")
    chosen: Any = structured() if response is None else response
    inner = gradient(optimizer, steps=steps)
    about = About(
        "hg.self_tuning",
        "response",
        random=("draws of hyperparameters",),
        options=option_names({"inner": inner.options, "entropy": entropy}),
        trains_on=True,
    )

    def init(
        params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> SelfTuningState:
        params, hparams = check_params(params), check_hparams(hparams)
        centre = _tree.strong(to_unconstrained(domain, hparams))
        spread("self_tuning", "shared", shared, centre)
        start = jax.tree.map(_start, spread("self_tuning", "scale", scale, centre), centre)
        weights = _tree.strong(chosen.init(require_key("self_tuning", "init", key), params, centre))
        return SelfTuningState(
            weights,
            _tree.strong(inner.init(weights, hparams)),
            _tree.strong(model_state),
            start,
            None if scale_optimizer is None else _tree.strong(scale_optimizer.init(start)),
            centre,
            {"inner": as_options(inner.options, centre), **as_options({"entropy": entropy}, centre)},
        )

    def begin(
        state: SelfTuningState, hparams: PyTree, train: PyTree, valid: PyTree, key: Array | None, function: str
    ) -> tuple[Call, Around]:
        key = require_key("self_tuning", function, key)
        call = bind(problem, state.model_state, hparams, train, valid, key, own_keys=2)
        remedy = "pass hyperparameters like those that init was given, or call init anew."
        check_same_structure("hparams", call.hparams, state.centre, remedy)
        draws(perturb, call.objective.fixed_batch[0], "train")  # says what is wrong with the batch
        centre = _tree.strong(to_unconstrained(domain, call.hparams))
        return call, Around(problem, chosen, domain, perturb, spread("self_tuning", "shared", shared, centre), centre)

    def fit(state: SelfTuningState, call: Call, around: Around) -> InnerResult:
        train_key, _ = call.keys
        start = state.weights
        if isinstance(chosen, Response):
            start = recentre(chosen, state.weights, around.centre, state.centre)

        def loss(weights: PyTree, _: PyTree, model_state: PyTree, step: Any) -> tuple[Array, PyTree]:
            noise_key = jax.random.fold_in(train_key, step)
            batch, loss_key = call.objective.batch(step)
            return training_loss(around, training, weights, state.scale, batch, loss_key, noise_key, model_state)

        return inner.solve(
            call.objective._replace(stochastic=loss),
            start,
            state.inner_state,
            call.hparams,
            state.model_state,
            scale=jnp.ones((), _tree.dtype(around.centre)),
            options=state.options["inner"],
        )

    def validation(call: Call, around: Around, valid: PyTree, weights: Any, model_state: PyTree) -> Validation:
        _, valid_key = call.keys

        def outer_loss(through: PyTree, seen: PyTree, scale: PyTree, i: Any) -> tuple[Array, dict[str, Any]]:
            data_key, loss_key = jax.random.split(jax.random.fold_in(call.outer_key, i))
            batch, noise_key = draw(valid, data_key, i), jax.random.fold_in(valid_key, i)
            return validation_loss(around, weights, through, seen, scale, batch, loss_key, noise_key, model_state)

        return outer_loss

    def hypergrad(
        state: SelfTuningState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, SelfTuningState]:
        call, around = begin(state, hparams, train, valid, key, "hypergrad")
        _check_use(around, state, call, valid)
        u = around.centre

        fitted = fit(state, call, around)
        weights = finite_or(fitted.params, state.weights)
        outer_loss = validation(call, around, valid, weights, fitted.model_state)

        def still(i: Any) -> Any:
            if scale_optimizer is not None:
                return outer_loss(u, u, None, i), None
            return jax.value_and_grad(lambda v, w: outer_loss(v, w, None, i), argnums=(0, 1), has_aux=True)(u, u)

        def perturbed(i: Any) -> Any:
            return jax.grad(lambda v, w, s: outer_loss(v, w, s, i)[0], argnums=(0, 1, 2))(u, u, state.scale)

        (value, metrics), parts = _mean(still, valid_steps)
        scale, scale_state = state.scale, state.scale_state
        if scale_optimizer is not None:
            *parts, pull = _mean(perturbed, valid_steps)
            bonus = jax.tree.map(lambda s: jax.nn.sigmoid(s) / jax.nn.softplus(s), scale)  # of Σ log softplus(s)
            descent = _tree.axpy(-state.options["entropy"], bonus, pull)
            updates, fresh = scale_optimizer.update(descent, scale_state, scale)
            scale, scale_state = finite_or((optax.apply_updates(scale, updates), fresh), (scale, scale_state))
        pull_out = jax.vjp(lambda h: to_unconstrained(domain, h), call.hparams)[1]
        through, direct = (pull_out(part)[0] for part in parts)
        grad = _tree.add(through, direct)

        status = first_failure(fitted.status, bad_loss(value), bad_grad(grad), no_influence(grad))
        info = report(
            status,
            fitted.steps,
            like=jnp.zeros((), _tree.dtype(u)),
            extra={"indirect_norm": _tree.norm(through), "direct_norm": _tree.norm(direct), **_scales(scale)},
        )
        state = _go_on_from(state, fitted, weights, u)._replace(
            scale=_tree.strong(scale), scale_state=_tree.strong(scale_state)
        )
        return Hypergradient(value, grad, info, metrics), state

    def evaluate(
        state: SelfTuningState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, SelfTuningState]:
        call, around = begin(state, hparams, train, valid, key, "evaluate")
        fitted = fit(state, call, around)
        weights, u = finite_or(fitted.params, state.weights), around.centre
        outer_loss = validation(call, around, valid, weights, fitted.model_state)
        value = _mean(lambda i: outer_loss(u, u, None, i)[0], valid_steps)
        info = report(first_failure(fitted.status, bad_loss(value)), fitted.steps, like=jnp.zeros((), _tree.dtype(u)))
        return value, info, _go_on_from(state, fitted, weights, u)

    def respond(state: SelfTuningState, hparams: PyTree) -> PyTree:
        return chosen.apply(state.weights, to_unconstrained(domain, check_hparams(hparams)), state.centre)

    return framed(init, hypergrad, respond, evaluate, about)


def _go_on_from(state: SelfTuningState, fitted: InnerResult, weights: Any, u: PyTree) -> SelfTuningState:
    """Return the state after training around u, or the one before it if training failed."""
    failed = fitted.status != int(Status.OK)
    after = weights, fitted.state, fitted.model_state, u
    before = state.weights, state.inner_state, state.model_state, state.centre
    weights, inner_state, model_state, centre = _tree.where(failed, before, after)
    return state._replace(weights=weights, inner_state=inner_state, model_state=model_state, centre=centre)


def _mean(function: Callable[[Any], PyTree], count: int) -> PyTree:
    """Stack `function(0), ..., function(count - 1)`, leaf by leaf."""
    if count == 1:
        return function(0)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(function, jnp.arange(count)))


def _start(scale: ArrayLike, leaf: Array) -> Array:
    """Return the number whose softplus is `scale`, in the shape of the leaf."""
    if not np.all(np.asarray(scale) > 0):
        raise InputError(
            f"self_tuning: scale must be greater than 0, found {scale!r}: without perturbation the response to the "
            "hyperparameters is not learned."
        )
    value = jnp.broadcast_to(jnp.asarray(scale, leaf.dtype), leaf.shape)
    return value + jnp.log(-jnp.expm1(-value))


def _scales(scale: PyTree) -> dict[str, Array]:
    """Return σ by path: each entry of small leaves, and the mean of large ones."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(scale):
        sigma, name = jax.nn.softplus(leaf), f"scale{keystr(path)}"
        if leaf.ndim and leaf.size <= _ENTRIES:
            found |= {name + str(list(index)): sigma[index] for index in np.ndindex(leaf.shape)}
        else:
            found[name] = jnp.mean(sigma)
    return found


def _check_use(around: Around, state: SelfTuningState, call: Call, valid: PyTree) -> None:
    """Warn about hyperparameters that neither loss uses: through the response they would seem to matter, and drift."""
    data_key, loss_key = jax.random.split(jax.random.fold_in(call.outer_key, 0))

    def used(value: Any, data: tuple[Any, Any], name: str) -> dict[str, bool]:
        batch, key = data
        u = around.still(around.centre, draws(around.perturb, batch, name) if around.by_rows else None)
        params = around.params(state.weights, u)
        found = influence(
            lambda h: value(around.problem, params, h, batch, key, state.model_state)[0], around.hparams(u)
        )
        return {path: reach.value for path, reach in found.items()}

    inner = used(inner_value, call.objective.fixed_batch, "train")
    outer = used(outer_value, (draw(valid, data_key, 0), loss_key), "valid")
    keys = ", ".join(path or "one array" for path in inner)
    for path in inner:
        if not (inner[path] or outer[path]):
            warnings.warn(
                f"hg.self_tuning: hparams{path} is used neither by inner_loss nor by outer_loss, so that its response "
                f"is noise: a misspelt key? hparams holds {keys}.",
                UserWarning,
                stacklevel=caller_level(),
            )

r"""Hypergradient through a learned response: parameters are trained as a function of the hyperparameters.

    min over φ of  E h(θ_φ(ũ), T(ũ)),   ũ ~ N(u, σ²) or a given distribution;      g = d/dλ f(θ_φ(u), λ),   λ = T(u)

The training loss is never differentiated with respect to λ: λ may act through dropout, augmentation, or an integer. u
are unconstrained coordinates, so that no draw leaves the domain.

Source: Lorraine & Duvenaud 2018, "Stochastic hyperparameter optimization through hypernetworks", arXiv:1802.09419:
local (around u), global (`distribution`), joint (local, with `steps=1`). Differs:
1. a centred response is moved with λ without changing it (see `responses._response.recentre`);
2. the residual of the equation that a best response satisfies is measured at every call, in one random direction:

       d/du ∂_w h(θ(u), T(u)) = H θ' + C = 0

   and ‖(H θ' + C) p‖ / ‖C p‖, which is comparable to a linear solver's residual, gives an estimate of the error.
Cost: `steps` gradients of the inner loss per draw, and about six for the residual. Memory: that of the response.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import caller_level, check_hparams, check_params, check_same_structure
from hypergrad._jaxpr.sensitivity import check_amortised_sensitivity
from hypergrad._options import Number, Slot, as_options, options
from hypergrad._problem import PROBLEM, Objective, Problem
from hypergrad._solver import About, Hypergradient, Info, InputError, InputTypeError, Solver, Status, first_failure
from hypergrad._tree import PyTree
from hypergrad.domains._domain import to_constrained, to_unconstrained
from hypergrad.inner._inner import InnerResult
from hypergrad.inner.gradient import OPTIMIZER, gradient
from hypergrad.responses._draws import draw_around, draw_between
from hypergrad.responses._response import Response, Weights, recentre
from hypergrad.responses.linear import linear
from hypergrad.solvers._call import (
    Call,
    bad_grad,
    bad_loss,
    bind,
    differentiate_outer,
    finite_or,
    framed,
    no_influence,
    option_names,
    report,
    require_key,
)

_SAFETY = 3.0  # as in the other solvers whose residuals stand for errors
_FORGET = 0.1  # a scale that no longer occurs loses a digit per call

Distribution = Callable[[Array], PyTree] | tuple[PyTree, PyTree]


class HypernetworkState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        weights: weights of the response; `weights.base` is a pytree like the parameters.
        inner_state: state of the optimizer of the weights.
        model_state: state of the model (batch-norm statistics), or None.
        centre: unconstrained coordinates around which the response is written. pytree like the hyperparameters.
        peak: natural size of ∂_w h, scalar; 0 before the first call.
        warmup: int32, additional steps that the next call takes.
        options: `{"inner": {"max_steps": ...}, "scale": ...}`, scalars that may be replaced between calls without
            recompiling. With a `distribution`, `scale` is 1, and stretches its draws away from the current λ.
    """

    weights: Weights
    inner_state: PyTree
    model_state: PyTree
    centre: PyTree
    peak: Array
    warmup: Array
    options: dict[str, Any]


@options(
    problem=PROBLEM,
    optimizer=OPTIMIZER._replace(
        write="optax.adam(1e-3) (learning rates cannot be tuned through a response; hg.unrolled sees them)"
    ),
    steps=Number(least=0, integer=True, static=True),
    scale=Number(least=0),
    response=Slot(Response, "an hg.responses.Response", "hg.responses.linear()"),
    draws=Number(least=1, integer=True, static=True),
    warmup=Number(least=0, integer=True, static=True),
)
def hypernetwork(
    problem: Problem,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    scale: ArrayLike | None = None,
    distribution: Distribution | None = None,
    response: Response | None = None,
    draws: int = 1,
    warmup: int = 0,
    domain: PyTree = None,
    measure: bool = True,
) -> Solver:
    """Hypergradients by a response that is trained along with the parameters, as in hypernetworks.

    Each call trains the response on hyperparameters drawn around the current ones (`scale`), or from a given
    distribution (`distribution`), and differentiates the outer loss through it. Every draw needs a key: pass `key=` to
    `init`, `hypergrad` and `tune`.

    Args:
        problem: the two losses.
        optimizer: optax optimizer of the response's weights.
        steps: training steps in each call. `steps=1` is joint training, which alternates one step of each.
        scale: standard deviation of the draws around the current hyperparameters, in unconstrained coordinates, for
            local training. Values from 0.1 to 0.5 are usual; 0 leaves the slope of the response undetermined, and
            warns.
        distribution: for global training, what hyperparameters are drawn from instead: a function `key -> hparams`, or
            a pair of pytrees like hparams, `(lo, hi)`, between which draws are uniform in unconstrained coordinates.
        response: `hg.responses.linear()` (the default), `mlp` or `structured`, or a response of your own.
        draws: hyperparameters drawn in each step, over which the loss is averaged, all on one batch.
        warmup: additional steps that the first call takes, so that there is a response to differentiate.
        domain: pytree prefix of the hyperparameters with `hg.domains` as leaves, as for `tune`. The losses see
            hyperparameters inside the domain; the response sees unconstrained coordinates.
        measure: whether to measure the residual. If False, `error_estimate` is inf.

    Returns:
        A `Solver`. `info.inner_residual` is ‖∂_w h‖ at the current hyperparameters over its largest recent size,
        `info.linear_residual` is the residual of the response's slope (see the file's header; NaN where λ has no smooth
        influence on the gradient of the training loss), and `info.linear_steps` is 0. `info.error_estimate` combines
        both, and is inf where the slope explains nothing yet. `info.extra` holds `"scale"` and `"response_residual"`.

    Raises:
        InputError: for an option out of range, for both or none of `scale` and `distribution`; from `init` and
            `hypergrad`, for a missing key, or hyperparameters that are not like those of `init`.
        InputTypeError: for an optimizer, response or distribution of another type.

    Warns:
        UserWarning: for a `scale` of 0.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, log_l2, batch: jnp.sum((w - 1.0)**2) + jnp.exp(log_l2) * jnp.sum(w**2),
    ...                      lambda w, log_l2, batch: jnp.sum((w - 0.4)**2))
    >>> solver = hg.hypernetwork(problem, optimizer=optax.sgd(0.1), steps=10, scale=0.1, warmup=1000)
    >>> state = solver.init(jnp.zeros(1), 0.0)
    >>> out, state = solver.hypergrad(state, 0.0, key=jax.random.key(0))
    >>> print(f"{out.grad:.2f}")  # w = 1/2, dw/dlog_l2 = -1/4
    -0.05
    """
    _check(scale, distribution)
    chosen = response if response is not None else linear()
    inner = gradient(optimizer, steps=steps)
    constrained = functools.partial(to_constrained, domain)
    unconstrained = functools.partial(to_unconstrained, domain)

    about = About(
        "hg.hypernetwork",
        "response",
        random=("draws of hyperparameters",),
        options=option_names({"inner": inner.options, "scale": scale}),
        trains_on=True,
    )

    def init(
        params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> HypernetworkState:
        params, hparams = check_params(params), check_hparams(hparams)
        centre = unconstrained(hparams)
        weights = chosen.init(key, params, centre)
        dtype = _tree.dtype(params)
        return HypernetworkState(
            weights,
            inner.init(weights, centre),
            model_state,
            centre,
            jnp.zeros((), dtype),
            jnp.int32(warmup),
            {
                "inner": as_options(inner.options, params),
                "scale": jnp.asarray(1.0 if scale is None else scale, dtype),
            },
        )

    def begin(
        state: HypernetworkState, hparams: PyTree, train: PyTree, valid: PyTree, key: Array | None, function: str
    ) -> tuple[Call, PyTree]:
        key = require_key("hypernetwork", function, key)
        call = bind(problem, state.model_state, hparams, train, valid, key)
        remedy = "pass hyperparameters like those given to init."
        check_same_structure("hparams", call.hparams, state.centre, remedy)
        return call, unconstrained(call.hparams)

    def fit(state: HypernetworkState, call: Call, u: PyTree) -> InnerResult:
        (draw_key,) = call.keys

        def drawn(key: Array) -> PyTree:
            if distribution is None:
                return draw_around(key, u, jax.tree.map(lambda _: state.options["scale"], u))
            away = _tree.sub(_sample(distribution, unconstrained, key, u), u)
            return _tree.axpy(state.options["scale"], away, u)

        def loss(weights: Weights, u: PyTree, model_state: PyTree, step: Any) -> tuple[Array, PyTree]:
            def at(key: Array) -> tuple[Array, PyTree]:
                ours = drawn(key)
                params = chosen.apply(weights, ours, u)
                return call.objective.stochastic(params, constrained(ours), model_state, step)

            keys = jax.random.fold_in(draw_key, step)
            if draws == 1:
                return at(keys)
            losses, states = jax.vmap(at)(jax.random.split(keys, draws))
            return jnp.mean(losses), jax.tree.map(_average, states)

        return inner.solve(
            call.objective._replace(stochastic=loss),
            recentre(chosen, state.weights, u, state.centre),
            state.inner_state,
            u,
            state.model_state,
            scale=jnp.ones(()),
            options={"max_steps": state.options["inner"]["max_steps"] + state.warmup},
        )

    def hypergrad(
        state: HypernetworkState,
        hparams: PyTree,
        train: PyTree = None,
        valid: PyTree = None,
        *,
        key: Array | None = None,
    ) -> tuple[Hypergradient, HypernetworkState]:
        call, u = begin(state, hparams, train, valid, key, "hypergrad")
        hparams = call.hparams
        check_amortised_sensitivity(
            lambda w, h: jax.grad(call.objective.fixed)(w, h),
            call.outer(state.model_state),
            state.weights.base,
            hparams,
            "hg.hypernetwork",
        )

        fitted = fit(state, call, u)
        weights = finite_or(fitted.params, state.weights)
        outer = call.outer(fitted.model_state)
        value, metrics, rhs, direct = differentiate_outer(outer, chosen.apply(weights, u, u), hparams)
        indirect = jax.vjp(lambda h: chosen.apply(weights, unconstrained(h), u), hparams)[1](rhs)[0]
        grad = jax.tree.map(lambda d, i: d + i.astype(d.dtype), direct, indirect)

        residual, inner_residual, peak = _measure(
            call.objective, chosen, weights, u, constrained, state.peak, call.keys[0], measure=measure
        )
        status = first_failure(fitted.status, bad_loss(value), bad_grad(grad, rhs), no_influence(grad, rhs))
        info = report(
            status,
            fitted.steps,
            like=residual,
            inner_residual=inner_residual,
            linear_residual=residual,
            error_estimate=_error_estimate(grad, indirect, residual, inner_residual),
            extra={"response_residual": residual, "scale": state.options["scale"]},
        )
        state = _go_on_from(state, fitted, weights, u)
        return Hypergradient(value, grad, info, metrics), state._replace(peak=finite_or(peak, state.peak))

    def evaluate(
        state: HypernetworkState,
        hparams: PyTree,
        train: PyTree = None,
        valid: PyTree = None,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Info, HypernetworkState]:
        call, u = begin(state, hparams, train, valid, key, "evaluate")
        fitted = fit(state, call, u)
        weights = finite_or(fitted.params, state.weights)
        value, _ = call.outer(fitted.model_state)(chosen.apply(weights, u, u), call.hparams)
        status = first_failure(fitted.status, bad_loss(value))
        return value, report(status, fitted.steps, like=state.peak), _go_on_from(state, fitted, weights, u)

    def respond(state: HypernetworkState, hparams: PyTree) -> PyTree:
        return chosen.apply(state.weights, unconstrained(check_hparams(hparams)), state.centre)

    return framed(init, hypergrad, respond, evaluate, about)


def _go_on_from(state: HypernetworkState, fitted: InnerResult, weights: Weights, u: PyTree) -> HypernetworkState:
    """The response that was fitted around u or, if that failed, the one before."""
    failed = fitted.status != int(Status.OK)
    return state._replace(
        weights=_tree.where(failed, state.weights, weights),
        inner_state=fitted.state,
        model_state=fitted.model_state,
        centre=_tree.where(failed, state.centre, u),
        warmup=jnp.where(failed, state.warmup, 0),
    )


def _measure(
    objective: Objective,
    response: Response,
    weights: Weights,
    u: PyTree,
    constrained: Callable[[PyTree], PyTree],
    peak: Array,
    key: Array,
    *,
    measure: bool,
) -> tuple[Array, Array, Array]:
    """`(‖(H θ' + C) p‖ / ‖C p‖, ‖∂_w h‖ / peak, peak)` at u, p random signs: E‖A p‖² = ‖A‖² for every matrix A."""
    nothing = jnp.full_like(peak, jnp.nan)
    if not measure:
        return nothing, nothing, peak
    descent = lambda params, u: jax.grad(objective.fixed)(params, constrained(u))
    signs = _tree.rademacher_like(key, u)
    params, tangent = jax.jvp(lambda at: response.apply(weights, at, u), (u,), (signs,))
    slope, push = jax.linearize(descent, params, u)
    whole, cross = push(tangent, signs), push(_tree.zeros_like(tangent), signs)
    size = _tree.norm(cross)
    residual = _tree.safe_divide(_tree.norm(whole), size, otherwise=jnp.nan)
    # ‖H w‖ measures how much the gradient changes when the parameters are scaled up from zero to their current size.
    seen = jnp.maximum(_tree.norm(push(params, _tree.zeros_like(u))), _tree.norm(slope)).astype(peak.dtype)
    largest = jnp.maximum(seen, peak)
    inner = _tree.safe_divide(_tree.norm(slope), largest)
    return residual.astype(peak.dtype), inner.astype(peak.dtype), jnp.maximum(seen, _FORGET * peak)


def _error_estimate(grad: PyTree, indirect: PyTree, residual: Array, inner_residual: Array) -> Array:
    """Estimate of ‖ĝ − g‖ / ‖g‖ (dimensionless): a residual ρ of the slope hides at most ρ / (1 − ρ) of what the slope
    shows, as far as the Hessian treats all directions alike; inf where the slope explains nothing or was not measured.
    """
    through = _tree.safe_divide(_tree.norm(indirect), _tree.norm(grad))
    missing = _tree.safe_divide(residual, 1 - residual, where=residual < 1, otherwise=jnp.inf)
    estimate = _SAFETY * through * (missing + inner_residual)
    return jnp.where(jnp.isnan(estimate), jnp.inf, estimate)


def _sample(distribution: Distribution, unconstrained: Callable[[PyTree], PyTree], key: Array, like: PyTree) -> PyTree:
    remedy = "a distribution gives hyperparameters like those given to init."
    if callable(distribution):
        found = check_hparams(distribution(key))
        check_same_structure("hypernetwork: what distribution(key) returns", found, like, remedy)
        return unconstrained(found)
    lo, hi = (check_hparams(end) for end in distribution)
    for name, end in (("distribution[0]", lo), ("distribution[1]", hi)):
        check_same_structure(f"hypernetwork: {name}", end, like, remedy)
    lo, hi = unconstrained(lo), unconstrained(hi)
    return draw_between(key, lo, hi)


def _average(states: Array) -> Array:
    """Combine a model's state over the draws of one step: the mean of numbers, and the first of counters and keys."""
    return jnp.mean(states, axis=0) if _tree.is_float(states) else states[0]


def _check(scale: Any, distribution: Any) -> None:
    if (scale is None) == (distribution is None):
        found = "neither" if scale is None else "both"
        raise InputError(
            f"hypernetwork: give scale= to draw around the current hyperparameters, or distribution= to draw from "
            f"a distribution that you choose, found {found}."
        )
    pair = isinstance(distribution, tuple) and len(distribution) == 2
    if distribution is not None and not callable(distribution) and not pair:
        raise InputTypeError(
            f"hypernetwork: distribution must be a function key -> hparams or a pair (lo, hi), found {distribution!r}."
        )
    if scale is not None and not isinstance(scale, Tracer) and not np.any(np.asarray(scale)):
        warnings.warn(
            "hypernetwork: with scale=0 the response is trained at one point, so that its slope, and with it the "
            "hypergradient, is not determined by the data: biased, or zero where the response is centred. Take 0.1.",
            UserWarning,
            stacklevel=caller_level(),
        )

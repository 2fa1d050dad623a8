r"""Implicit hypergradient: differentiate the optimum, not the path to it.

    g = ∂_λ f − (∂²_{λw} h) v,   (∂²_{ww} h) v = ∂_w f,   at w ≈ w*(λ)

and for a fixed point w = Φ(w, λ) the same with F = w − Φ in place of ∂_w h.

Source: Bengio 2000, "Gradient-based optimization of hyperparameters"; Pedregosa 2016, arXiv:1602.02355; Lorraine, Vicol
& Duvenaud 2020, arXiv:1911.02590 (with `hg.linear.neumann` or `hg.linear.identity` and a fixed budget).
Differs: w, the optimizer's state and v are carried to the next call as its starting points; the inner solution is
refined by Newton steps with the preconditioner of the adjoint system; both residuals are measured where the
hypergradient is taken, and give an estimate of its error.
Cost: the inner solve, a few products with ∂²h (an eighth of a gradient each above the probes), three gradients. Memory
O(|w|), times eight for the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params
from hypergrad._curvature import System, damped, gauss_newton, rms_eigenvalue
from hypergrad._data import warn_small_batch
from hypergrad._jaxpr.semigradient import check_gradient
from hypergrad._jaxpr.sensitivity import check_implicit_sensitivity
from hypergrad._options import Choice, Number, as_options, options
from hypergrad._packing import AS_IT_IS, Packing, packing
from hypergrad._problem import PROBLEM, Problem
from hypergrad._solver import (
    About,
    Hypergradient,
    Info,
    InputError,
    Solver,
    Status,
    code,
    failure,
    first_failure,
    usable,
)
from hypergrad._tree import PyTree
from hypergrad.inner._inner import INNER, Inner
from hypergrad.inner._inner import packed as packed_inner
from hypergrad.inner._optimum import POLISH_STEPS, Optimum, find_optimum
from hypergrad.inner.lbfgs import lbfgs
from hypergrad.linear._linear import LINEAR, Linear, LinearResult, Matvec
from hypergrad.linear._linear import solve as solve_linear
from hypergrad.linear.cg import cg
from hypergrad.linear.gmres import gmres
from hypergrad.solvers._call import (
    Call,
    bad_grad,
    bad_loss,
    bind,
    current_params,
    differentiate_outer,
    framed,
    go_on_from,
    no_influence,
    option_names,
    report,
)
from hypergrad.solvers._error import Point, Spectrum, estimate, hidden_curvature, unknown_spectrum
from hypergrad.solvers.regularity import KnownRegularity, cross_size, error_bound, known_at


class ImplicitState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        params: inner solution. pytree like the parameters.
        inner_state: state of the inner optimizer.
        model_state: state of the model (batch-norm statistics), or None.
        adjoint: v, a pytree like the parameters; zeros before the first call.
        spectrum: what is known of the Hessian's eigenvalues, with which errors are estimated.
        start: where every call starts without `warm_start`, else None.
        scale: natural size of the inner residual, scalar; 0 before the first call.
        options: `{"inner": ..., "linear": ..., "damping": ...}`, scalars that may be replaced between calls without
            recompiling.
    """

    params: PyTree
    inner_state: PyTree
    model_state: PyTree
    adjoint: PyTree
    spectrum: Spectrum
    start: PyTree
    scale: Array
    options: dict[str, Any]


@options(
    problem=PROBLEM,
    inner=INNER,
    linear=LINEAR,
    polish=Number(least=0, integer=True, static=True),
    curvature=Choice(("hessian", "gauss_newton")),
    damping=Number(least=0),
)
def implicit(
    problem: Problem,
    *,
    inner: Inner | None = None,
    linear: Linear | None = None,
    polish: int | None = None,
    curvature: str = "hessian",
    damping: ArrayLike | None = None,
    warm_start: bool = True,
    regularity: KnownRegularity | None = None,
) -> Solver:
    """Hypergradients by the implicit function theorem: memory and cost do not grow with the length of training.

    Only hyperparameters that move the *optimum* of the inner loss have an implicit hypergradient. Learning rates and
    initialisations do not; `hg.unrolled` sees them.

    Args:
        problem: the two losses.
        inner: how parameters are found. Default `hg.inner.lbfgs()`.
        linear: how the adjoint system is solved. Default `hg.linear.cg()` (`gmres()` for a fixed-point inner solver,
            whose system is not symmetric).
        polish: the most Newton-CG steps on the inner solution; each is taken only if those before it did not suffice,
            and at most two if the inner solver ran out of steps. Default 8 for inner solvers that minimise a loss to a
            tolerance, else 0.
        curvature: `"hessian"`, or, for an inner loss made by `hg.compose`, `"gauss_newton"`, which stays positive
            definite on networks.
        damping: added to the operator's diagonal, relative to the root mean square of its eigenvalues (dimensionless).
            It biases the hypergradient; `hg.check` says by how much.
        warm_start: start each call from the parameters and adjoint of the last one.
        regularity: an `hg.Regularity`, or a function from the hyperparameters to one, that states what is known about
            the losses. `info.extra["error_bound"]` is then a proved bound on ‖ĝ − g‖ in the units of the hypergradient,
            which holds for every status, up to 64 units of rounding in each residual; `info.error_estimate` is
            relative, and an estimate.

    Returns:
        A `Solver`. `info.extra` holds `"damping"` and `"indirect_norm"`, the norm of the part of the hypergradient that
        acts through the solution.

    Raises:
        InputError: for an unknown or contradictory option.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> x, y = jnp.eye(3), jnp.arange(3.0)
    >>> problem = hg.Problem(lambda w, l2, batch: jnp.sum((x @ w - y)**2) + l2 * jnp.sum(w**2),
    ...                      lambda w, l2, batch: jnp.sum((x @ w - 0.5 * y)**2))
    >>> solver = hg.implicit(problem)
    >>> state = solver.init(jnp.zeros(3), 0.5)
    >>> out, state = jax.jit(solver.hypergrad)(state, 0.5)
    >>> print(f"{out.grad:.4f}")  # w = y / 1.5, dw/dl2 = -w / 1.5
    -0.7407
    """
    chosen = inner if inner is not None else lbfgs()
    method = linear if linear is not None else (cg() if chosen.symmetric else gmres())
    if method.symmetric and not chosen.symmetric:
        raise InputError(
            "implicit: linear=hg.linear.cg needs a symmetric operator, and that of hg.inner.fixed_point is not: "
            "use hg.linear.gmres() or hg.linear.neumann()."
        )
    if not chosen.symmetric and (polish or curvature != "hessian"):
        raise InputError(
            "implicit: polish and curvature='gauss_newton' need an inner loss; leave them out with "
            "hg.inner.fixed_point."
        )
    if regularity is not None and (not chosen.symmetric or curvature != "hessian"):
        raise InputError(
            "implicit: regularity bounds the error for the Hessian of an inner loss: leave it out with "
            "hg.inner.fixed_point and curvature='gauss_newton'."
        )
    polish_steps = int((POLISH_STEPS if chosen.claims and chosen.symmetric else 0) if polish is None else polish)
    if polish_steps and not chosen.claims:
        raise InputError(
            "implicit: polish works towards the tolerance of the inner solver, which has none: "
            "give hg.inner.gradient a tol=, or leave polish out."
        )

    exact = curvature == "hessian" and damping is None  # whether the adjoint system is that of the Hessian itself
    given: dict[str, Any] = {"inner": chosen.options, "linear": method.options}
    if damping is not None:
        given["damping"] = damping
    about = About(
        "hg.implicit",
        "optimum",
        random=method.random + (() if damping is None else ("the probe that measures the size of the operator",)),
        biases=_biases(chosen, method, curvature, damping),
        options=option_names(given),
        trains_on=warm_start and not chosen.claims,
    )

    def init(params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None) -> ImplicitState:
        del key
        params, hparams = check_params(params), check_hparams(hparams)
        options: dict[str, Any] = {
            "inner": as_options(chosen.options, params),
            "linear": as_options(method.options, params),
        }
        if damping is not None:
            options["damping"] = jnp.asarray(damping, _tree.dtype(params))
        return ImplicitState(
            params,
            chosen.init(params, hparams),
            model_state,
            _tree.zeros_like(params),
            unknown_spectrum(params),
            None if warm_start else params,
            jnp.zeros((), _tree.dtype(params)),
            options,
        )

    def check(state: ImplicitState, call: Call, train: PyTree) -> None:
        if method.claims:
            warn_small_batch(train, _tree.size(state.params))
        if chosen.symmetric:
            check_gradient(lambda w: call.objective.fixed(w, call.hparams), state.params, "hg.implicit")
        check_implicit_sensitivity(
            lambda w, h: chosen.residual(call.objective, w, h),
            call.outer(state.model_state),
            chosen.update,
            state.params,
            state.inner_state,
            call.hparams,
            "hg.implicit",
        )

    def packed(state: ImplicitState, call: Call) -> tuple[ImplicitState, Call, Inner, Packing]:
        """Everything in one vector where the parameters are many small leaves, and as it is elsewhere."""
        form = packing(state.params) if method.entrywise else AS_IT_IS
        if form is AS_IT_IS:
            return state, call, chosen, form
        return _in_form(state, form.pack), call.of(form.unpack), packed_inner(chosen, call.objective, form), form

    def solve(state: ImplicitState, call: Call, inner: Inner) -> Optimum:
        begin, inner_state, scale = state.params, state.inner_state, state.scale
        if not warm_start:  # every call is like the first
            begin, inner_state, scale = state.start, inner.init(state.start, call.hparams), jnp.zeros_like(state.scale)
        return find_optimum(
            inner,
            call.objective,
            begin,
            inner_state,
            state.model_state,
            call.hparams,
            scale=scale,
            options=state.options["inner"],
            polish_steps=polish_steps,
            preconditioner=method.preconditioner,
            key=call.probe_key,
        )

    def hypergrad(
        state: ImplicitState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, ImplicitState]:
        call = bind(problem, state.model_state, hparams, train, valid, key)
        hparams, known = call.hparams, None if regularity is None else known_at(regularity, call.hparams)
        check(state, call, train)

        state, call, inner, form = packed(state, call)
        optimum = solve(state, call, inner)
        params, outer = optimum.params, call.outer(optimum.model_state)
        system, operator, shift = _operator(curvature, state.options.get("damping"), call, optimum)
        value, metrics, rhs, direct = differentiate_outer(outer, params, hparams)
        adjoint = solve_linear(
            method,
            operator,
            rhs,
            start=state.adjoint if warm_start else None,
            precondition=optimum.precondition,
            options=_aim(method, state.options["linear"], optimum),
            key=call.probe_key,
        )
        measured = method.claims or known is not None  # one additional product, which shows how far the adjoint is off
        product, indirect = system.both(adjoint.solution) if measured else (None, system.cross(adjoint.solution))
        grad = jax.tree.map(lambda d, c: d - c.astype(d.dtype), direct, indirect)

        residual = _residual(method, shift, rhs, product, adjoint)
        point = Point(params, hparams, rhs, direct, adjoint.solution, product if exact else None, indirect, grad)
        carried = state.spectrum if warm_start else unknown_spectrum(params)
        error, trust, spectrum = estimate(carried, inner, method, call, outer, optimum, adjoint, point, exact=exact)
        missed = ~(residual <= state.options["linear"]["tol"]) if method.claims else False
        status = first_failure(
            bad_loss(value),
            failure(optimum.status),
            failure(adjoint.status),
            bad_grad(grad, rhs),
            trust,
            optimum.status,
            adjoint.status,
            code(missed, Status.PRECISION_LIMITED),
            no_influence(grad, rhs),
        )
        extra = {"damping": shift, "indirect_norm": _tree.norm(indirect)}
        if known is not None:
            cross = cross_size(known, lambda h: inner.residual(call.objective, params, h), hparams)
            extra["error_bound"] = error_bound(
                known, system.residual, optimum.scale, rhs, product, adjoint.solution, cross
            )
        info = report(
            status,
            optimum.steps,
            like=value,
            inner_residual=optimum.residual,
            linear_residual=residual,
            linear_steps=adjoint.steps,
            error_estimate=error,
            extra=extra,
        )
        state = go_on_from(state, optimum)
        blank = _tree.zeros_like(rhs), unknown_spectrum(params)
        kept, spectrum = _tree.where(usable(status), (adjoint.solution, spectrum), blank)
        state = _in_form(state._replace(adjoint=kept, spectrum=spectrum), form.unpack)
        return Hypergradient(value, grad, info, metrics), state

    def evaluate(
        state: ImplicitState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, ImplicitState]:
        call = bind(problem, state.model_state, hparams, train, valid, key)
        state, call, inner, form = packed(state, call)
        optimum = solve(state, call, inner)
        value, _ = call.outer(optimum.model_state)(optimum.params, call.hparams)
        status = first_failure(bad_loss(value), optimum.status)
        info = report(status, optimum.steps, like=value, inner_residual=optimum.residual)
        return value, info, _in_form(go_on_from(state, optimum), form.unpack)

    return framed(init, hypergrad, current_params, evaluate, about)


def _in_form(state: ImplicitState, change: Callable[[PyTree], PyTree]) -> ImplicitState:
    """The state with everything that is like the parameters in another form."""
    start = None if state.start is None else change(state.start)
    return state._replace(params=change(state.params), adjoint=change(state.adjoint), start=start)


def _biases(inner: Inner, linear: Linear, curvature: str, damping: ArrayLike | None) -> tuple[str, ...]:
    """What the caller gave up, in the words of `About.biases`."""
    chosen = {
        "damping": damping is not None,
        "the Gauss-Newton matrix in place of the Hessian": curvature == "gauss_newton",
        "an inner problem that is not solved to a tolerance": not inner.claims,
        "an adjoint system that is not solved to a tolerance": not linear.claims,
    }
    return tuple(words for words, holds in chosen.items() if holds)


def _operator(curvature: str, damping: Array | None, call: Call, optimum: Optimum) -> tuple[System, Matvec, Array]:
    """Return the system at the optimum, the operator of the adjoint system, and what damping added to its diagonal."""
    system = optimum.system
    if curvature == "gauss_newton":
        curved = gauss_newton(call.objective, optimum.params, call.hparams)
        system = system._replace(matvec=curved, both=lambda v: (curved(v), optimum.system.cross(v)))
    if damping is None:
        return system, system.matvec, jnp.zeros((), _tree.dtype(optimum.params))
    shift = damping * rms_eigenvalue(system.matvec, optimum.params, call.probe_key)
    return system, damped(system.matvec, shift), shift


def _aim(method: Linear, options: Mapping[str, Array], optimum: Optimum) -> dict[str, Array]:
    """Half the tolerance: recursions lose some accuracy to rounding, and the true residual must meet the full one.
    Where the inner residual is not zero, nor is the curvature along a symmetry, in which there is nothing to solve.
    """
    if not method.claims:
        return dict(options)
    return {**options, "tol": options["tol"] / 2, "noise": hidden_curvature(optimum)}


def _residual(method: Linear, shift: Array, rhs: PyTree, product: PyTree, adjoint: LinearResult) -> Array:
    """`‖b − A v‖ / ‖b‖`, measured where a tolerance was asked for; otherwise the value that the solver reports."""
    if not method.claims:
        return adjoint.residual
    gap = _tree.sub(rhs, _tree.axpy(shift, adjoint.solution, product))
    return _tree.norm(gap) / jnp.where(_tree.max_abs(rhs) > 0, _tree.norm(rhs), 1)

"""The interface of every method: a `Solver` of pure functions, and the values that they return.

The state holds what the next call needs, and `Info` holds what a person wants to know. Numerical outcomes are values,
not errors: an int32 code in `info.status`, one per problem under `vmap`. A new method is a function that returns a
`Solver`.
"""

from __future__ import annotations

import enum
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._tree import PyTree


class Status(enum.IntEnum):
    """Why a hypergradient can, or cannot, be trusted: the earliest cause wins.

    The value of each member is its int32 code in `info.status`; `Status(code).advice` is a paragraph on what happened,
    why, and what to try. Codes up to `INSENSITIVE` are usable: `tune` takes the step.

    >>> import hypergrad as hg
    >>> hg.Status(0).usable, hg.Status.NEG_CURVATURE.usable
    (True, False)
    >>> print(hg.Status(8))
    NEG_CURVATURE
    """

    OK = 0
    PRECISION_LIMITED = 1
    INSENSITIVE = 2
    NONFINITE_LOSS = 3
    NONFINITE_GRAD = 4
    INNER_DIVERGED = 5
    INNER_MAX_STEPS = 6
    INNER_STALLED = 7
    NEG_CURVATURE = 8
    SINGULAR = 9
    NEUMANN_DIVERGING = 10
    LINEAR_BREAKDOWN = 11
    LINEAR_MAX_STEPS = 12
    UNROLL_EXPLODED = 13
    INACCURATE = 14

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec.endswith("d") else format(self.name, spec)

    @property
    def usable(self) -> bool:
        """Whether the hypergradient is good enough to take a step with."""
        return self <= Status.INSENSITIVE

    @property
    def advice(self) -> str:
        """A paragraph that says what happened, why, and what to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.OK: "Every tolerance that was asked for is met; `error_estimate` says how accurate the hypergradient is.",
    Status.PRECISION_LIMITED: (
        "The tolerance is below what the floating-point precision can give on this problem: the residual stopped "
        "falling at rounding level. No solve in this precision is more accurate, and `error_estimate` says how "
        "accurate that is. Loosen `tol`, standardise the features, or compute in float64 "
        "(`jax.config.update('jax_enable_x64', True)`)."
    ),
    Status.INSENSITIVE: (
        "The hypergradient is exactly zero although the outer loss has a gradient: no hyperparameter moves the "
        "solution. Either a key is misspelt, or the hyperparameters act on the training (learning rate, "
        "initialisation) and not on its optimum; `hg.unrolled` sees those."
    ),
    Status.NONFINITE_LOSS: (
        "A loss is NaN or infinite. Look for log(0), 0/0, an empty batch, NaN in the data, or hyperparameters that "
        "left their valid range (a negative weight decay): give `domain=` to `hg.tune`."
    ),
    Status.NONFINITE_GRAD: (
        "The losses are finite, but a gradient is not: typically sqrt, norm or log at 0, or `jnp.where` around one "
        "(make the argument safe on both branches). Run once under `jax.debug_nans(True)` to find the line."
    ),
    Status.INNER_DIVERGED: (
        "The inner loss grew instead of falling. The learning rate is too large for the curvature (stable below "
        "2 / largest eigenvalue), or the hyperparameters made the problem unbounded. Lower the learning rate or use "
        "`hg.inner.lbfgs`."
    ),
    Status.INNER_MAX_STEPS: (
        "The inner solve used up `max_steps` before reaching its tolerance, so the parameters are not the optimum at "
        "which implicit differentiation is exact. The state keeps the progress: call again, raise `max_steps`, loosen "
        "`tol`, or use `hg.unrolled`, which differentiates the steps that were actually taken. A network that is never "
        "trained to a tolerance is a case for `hg.online`."
    ),
    Status.INNER_STALLED: (
        "The inner solver stopped making progress above its tolerance and above rounding level: a kink (ReLU, L1), a "
        "discontinuous loss, or a condition number beyond the precision. Use `hg.inner.fixed_point` with a proximal "
        "step for L1, smooth the loss, standardise the features, compute in float64, or unroll. A network, whose kinks "
        "never let it settle, is a case for `hg.online`, which takes a few steps a call and claims no optimum."
    ),
    Status.NEG_CURVATURE: (
        "The inner Hessian has a direction of negative curvature: the parameters sit at a saddle, or an unconverged "
        "network is being treated as an optimum. For a network in training use `hg.online`, which stops there and "
        "steps along what it has. Otherwise train longer, add `damping`, or use `curvature='gauss_newton'`, "
        "`hg.unrolled`, or a solver that does not need a positive definite Hessian (`hg.linear.gmres`)."
    ),
    Status.SINGULAR: (
        "The inner Hessian is singular and the outer gradient has a part in its null space: the optimum is not "
        "unique, so the best response has no unique derivative. Add weight decay or `damping`, or use `hg.unrolled`; "
        "for a network in training use `hg.online`."
    ),
    Status.NEUMANN_DIVERGING: (
        "The terms of the Neumann series grow: its step size exceeds 2 / largest eigenvalue, or the Hessian is "
        "indefinite, as it is for a network in training, at any step size: use `hg.online` there. Elsewhere "
        "leave `step_size` out to have it set by a power iteration, or use `hg.linear.cg`."
    ),
    Status.LINEAR_BREAKDOWN: (
        "The linear solver believes that it converged, but the true residual says otherwise: the operator is not "
        "symmetric (use `hg.linear.gmres`), or the preconditioner is not positive definite."
    ),
    Status.LINEAR_MAX_STEPS: (
        "The adjoint system used up `max_steps` before reaching its tolerance. The state keeps the progress: call "
        "again, raise `max_steps`, loosen `tol`, add a preconditioner or `damping`; for a network in training use "
        "`hg.online`, which makes a few products and claims no tolerance."
    ),
    Status.UNROLL_EXPLODED: (
        "The adjoint, or training itself, amplified rounding by more than the precision can carry: training is "
        "chaotic or beyond the edge of stability, and the hypergradient is noise. Lower the learning rate, clip, "
        'warm up, or truncate (`truncate=`). With few hyperparameters `mode="forward"` is worth a try: it carries no '
        "adjoint, so parts of the adjoint that reach no hyperparameter cannot grow."
    ),
    Status.INACCURATE: (
        "Every tolerance is met, and yet the estimated error of the hypergradient is larger than the hypergradient "
        "itself: the problem is so ill-conditioned, or so curved, at this point that the tolerances do not determine "
        "the answer. Lower `tol`, standardise the features, compute in float64 "
        "(`jax.config.update('jax_enable_x64', True)`), or add weight decay; tune a "
        "network with `hg.online`, which claims no tolerance."
    ),
}


class Info(NamedTuple):
    """The diagnostics of one hypergradient, for a person to read. All leaves are scalar arrays.

    Attributes:
        status: int32 code, see `Status`.
        inner_residual: size of the inner optimality condition at the returned parameters, relative to its natural
            scale (dimensionless); NaN where the method does not need an optimum.
        linear_residual: `‖b − A v‖ / ‖b‖` of the adjoint system (dimensionless); NaN where there is none.
        inner_steps: int32, steps of the inner solver in this call.
        linear_steps: int32, products with the operator of the adjoint system in this call.
        error_estimate: estimate of the relative error of `grad` against the exact hypergradient of what the method
            claims to differentiate (dimensionless). `inf` where nothing is known (T1-T2 on a fixed budget).
        extra: further scalars of the method, by name (`"damping"`, `"adjoint_growth"`, ...). They go into the history;
            no part of the library recognises a method by them.
    """

    status: Array
    inner_residual: Array
    linear_residual: Array
    inner_steps: Array
    linear_steps: Array
    error_estimate: Array
    extra: dict[str, Array]


class Hypergradient(NamedTuple):
    """One evaluation of the outer problem.

    Attributes:
        value: outer loss at the current best response, scalar.
        grad: its total derivative, a pytree like `hparams`.
        info: see `Info`.
        metrics: dict of the scalars that `outer_loss` returned besides the loss (empty if there were none).
    """

    value: Array
    grad: PyTree
    info: Info
    metrics: dict[str, Any]


class InitFn(Protocol):
    """`init(params, hparams, *, key=None, model_state=None) -> state`; pure and jit-able."""

    def __call__(
        self, params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> Any: ...


class HypergradFn(Protocol):
    """`hypergrad(state, hparams, train=None, valid=None, *, key=None) -> (Hypergradient, state)`.

    Pure; jit-able, vmap-able and shardable. `train` and `valid` are pytrees of arrays, `hg.minibatches(...)`, or None
    for losses that close over their data.
    """

    def __call__(
        self, state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, Any]: ...


class ResponseFn(Protocol):
    """`response(state, hparams) -> params`, the current best-response parameters."""

    def __call__(self, state: Any, hparams: PyTree) -> PyTree: ...


class EvaluateFn(Protocol):
    """`evaluate(state, hparams, train=None, valid=None, *, key=None) -> (value, info, state)`.

    The outer loss at the best response, without the adjoint: for line searches, checks, landscapes and held-out data.
    `info.linear_residual` and `info.error_estimate` are NaN and inf, since there is no hypergradient; `hypergrad` can
    continue from the returned state.
    """

    def __call__(
        self, state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, Any]: ...


Differentiates = Literal["optimum", "path", "response", "direct", "unknown"]


class About(NamedTuple):
    """A static description of a solver, declared by its author and never guessed from reported numbers.

    About a solver that declares nothing, the library says only what is true of every solver.

    Attributes:
        name: as the user writes it, `"hg.implicit"`.
        differentiates: what its hypergradient is the derivative of. `"optimum"`: the solution of the inner problem.
            `"path"`: the steps of training. `"response"`: a fitted function from hyperparameters to parameters.
            `"direct"`: the outer loss at fixed parameters. `"unknown"`: not declared.
        random: sources of randomness in its result other than the data, in words (`("draws of hyperparameters",)`).
        biases: approximations that the caller chose, in words that complete "the hypergradient is biased by ..."
            (`("damping",)`).
        options: names of the traced options that may be replaced in `state.options` (`"inner.tol"`, `"linear.tol"`,
            `"damping"`).
        trains_on: whether each call continues training where the last one ended, so that no two calls at the same
            hyperparameters agree.
    """

    name: str = ""
    differentiates: Differentiates = "unknown"
    random: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    trains_on: bool = False


class Solver(NamedTuple):
    """A method for hypergradients: pure functions and a description. The caller owns `jit`.

    Attributes:
        init: see `InitFn`.
        hypergrad: see `HypergradFn`.
        response: see `ResponseFn`.
        evaluate: see `EvaluateFn`; None for a solver that does not define it. Call `evaluation(solver)`, which then
            falls back on `hypergrad` with the gradient dropped.
        about: see `About`.
    """

    init: InitFn
    hypergrad: HypergradFn
    response: ResponseFn
    evaluate: EvaluateFn | None = None
    about: About = About()


class HypergradError(Exception):
    """Base class of the errors that hypergrad raises about its inputs and outcomes."""


class InputError(HypergradError, ValueError):
    """A value that cannot work: wrong structure, shape, range or option."""


class InputTypeError(HypergradError, TypeError):
    """A value of a type or dtype that cannot work."""


class FailedHypergradientError(HypergradError, RuntimeError):
    """A hypergradient whose status is not usable, raised by `raise_if_failed` alone."""


def evaluation(solver: Solver) -> EvaluateFn:
    """The solver's `evaluate`, or its `hypergrad` with the gradient dropped: always correct, but more costly."""
    own = getattr(solver, "evaluate", None)
    if own is not None:
        return own

    def evaluate(
        state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, Any]:
        out, state = solver.hypergrad(state, hparams, train, valid, key=key)
        return out.value, out.info, state

    return evaluate


def about_of(solver: Any) -> About:
    """The description that a solver gives of itself, or an empty one."""
    return getattr(solver, "about", None) or About()


def usable(status: ArrayLike) -> Any:
    """Whether a code allows a step to be taken; elementwise, also under `jit`, and in NumPy for NumPy arrays."""
    return (status if isinstance(status, np.ndarray) else jnp.asarray(status)) <= int(Status.INSENSITIVE)


def failure(status: ArrayLike) -> Array:
    """The code itself if it is not usable, else OK."""
    return jnp.where(usable(status), int(Status.OK), jnp.asarray(status)).astype(jnp.int32)


def first_failure(*codes: ArrayLike) -> Array:
    """The first code that is not OK, else OK: the earliest cause wins."""
    result = jnp.asarray(int(Status.OK), jnp.int32)
    for code in reversed(codes):
        code = jnp.asarray(code, jnp.int32)
        result = jnp.where(code == int(Status.OK), result, code)
    return result


def code(condition: ArrayLike, status: Status) -> Array:
    """`status` where `condition` holds, else OK, as an int32 scalar."""
    return jnp.where(condition, jnp.int32(status), jnp.int32(Status.OK))


def raise_if_failed(info: Info | Hypergradient) -> None:
    """Raise, on the host, if a hypergradient is not usable.

    Args:
        info: `out.info`, or `out` itself; under `vmap` one status per problem.

    Raises:
        FailedHypergradientError: naming each status that is not usable, its advice and the residuals.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, l, batch: jnp.sum(w**2 - w * l), lambda w, l, batch: jnp.sum(w))
    >>> solver = hg.implicit(problem)
    >>> state = solver.init(jnp.ones(3), 0.5)
    >>> hg.raise_if_failed(solver.hypergrad(state, 0.5)[0])
    """
    if isinstance(info, Hypergradient):
        info = info.info
    if isinstance(info.status, Tracer):
        raise InputTypeError(
            "raise_if_failed works on the host: call it on the result of the jitted function, not inside it; "
            "under jit read info.status instead."
        )
    codes = np.atleast_1d(np.asarray(info.status))
    failed = [Status(int(c)) for c in codes.ravel() if not Status(int(c)).usable]
    if not failed:
        return
    where = "" if codes.size == 1 else f" in {len(failed)} of {codes.size} problems"
    causes = "\n".join(f"{status.name}: {status.advice}" for status in dict.fromkeys(failed))
    raise FailedHypergradientError(
        f"the hypergradient is not usable{where}.\n{causes}\n"
        f"inner_residual={np.asarray(info.inner_residual)}, linear_residual={np.asarray(info.linear_residual)}, "
        f"inner_steps={np.asarray(info.inner_steps)}, linear_steps={np.asarray(info.linear_steps)}, "
        f"error_estimate={np.asarray(info.error_estimate)}"
    )

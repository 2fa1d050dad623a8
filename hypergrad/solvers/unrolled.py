r"""Unrolled hypergradient: differentiate training itself, step by step.

    g = d/dλ f(w_T(λ), λ),     (w_{t+1}, s_{t+1}) = Ψ_t(w_t, s_t, λ),     t = 0, ..., T − 1

with the optimizer's and the model's state in s.

Exact for the T steps that were taken, converged or not, and the only solver here that sees learning rates, momenta,
schedules and initialisations.

Source: Domke 2012, "Generic methods for optimization-based modeling"; Maclaurin et al. 2015, arXiv:1502.03492;
Franceschi et al. 2017, arXiv:1703.01785 (forward mode); Shaban et al. 2019, arXiv:1810.10667 (truncation); Kemaev et
al. 2025, arXiv:2505.00793 (mixed mode); Engstrom et al. 2025, arXiv:2503.13751 (the tree of checkpoints).
Differs: the recursions are written out rather than left to nested automatic differentiation; the amount by which
training and the recursions amplify rounding is measured, and a run that amplifies it beyond meaning reports that.
Cost: reverse mode takes about three gradients of the inner loss per step, for any number of hyperparameters; forward
mode one and a half with one hyperparameter, and a third to a half more for each further one. A state's first call costs
as much as three calls, or five where rounding shows, and every 32nd call as much as three: see
`hypergrad.unrolling.error`. Memory: see `remat`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params
from hypergrad._jaxpr.sensitivity import check_unrolled_sensitivity
from hypergrad._options import Choice, Number, options
from hypergrad._problem import PROBLEM, Problem
from hypergrad._solver import About, Hypergradient, Info, InputError, Solver, Status, code, first_failure
from hypergrad._tree import PyTree
from hypergrad.inner._inner import STEPS, Inner
from hypergrad.solvers._call import Call, bad_grad, bad_loss, bind, current_params, framed, no_influence, report
from hypergrad.unrolling import error as measured
from hypergrad.unrolling import forward as forward_mode
from hypergrad.unrolling import reverse as reverse_mode
from hypergrad.unrolling.step import (
    Moving,
    Point,
    Record,
    Step,
    make_step,
    moves_by_signs,
    moving,
    new_record,
    training_status,
)

_FORWARD_AT_MOST = 3  # scalar hyperparameters up to which forward mode is the faster one (measured)


class UnrolledState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        params: parameters after the last step. pytree like the parameters.
        inner_state: state of the inner optimizer after the last step.
        model_state: state of the model (batch-norm statistics) after the last step, or None.
        start: `(params, model_state)` with which every call starts; None with `warm_start`.
        options: empty: the number of steps is part of the compiled program.
        trust: how much rounding there was when it was last measured.
    """

    params: PyTree
    inner_state: PyTree
    model_state: PyTree
    start: tuple[PyTree, PyTree] | None
    options: dict[str, Any]
    trust: measured.Trust


class _Pass(NamedTuple):
    """The result of either mode."""

    point: Point
    record: Record
    value: Array
    metrics: dict[str, Any]
    direct: PyTree
    rhs: tuple[PyTree, list[Array]]  # ∂_w f, ∂_m f
    indirect: PyTree
    growth: Array
    dropped: Array  # estimate of what truncation left out, as a share of the whole indirect part


@options(
    problem=PROBLEM,
    inner=STEPS,
    mode=Choice(("auto", "reverse", "forward")),
    truncate=Number(least=1, integer=True, static=True),
    remat=Choice(("auto", "none", "step", "sqrt", "tree", "gradient")),
    memory=Number(above=0, static=True),
)
def unrolled(
    problem: Problem,
    *,
    inner: Inner,
    mode: str = "auto",
    truncate: int | None = None,
    remat: str = "auto",
    memory: float | None = None,
    warm_start: bool = False,
) -> Solver:
    """Hypergradients by differentiating a training run, wherever it ended.

    Args:
        problem: the two losses.
        inner: what is unrolled, and for how many steps: `hg.inner.gradient(optimizer, steps=100)`, or
            `hg.inner.fixed_point(map, steps=100)`. An optimizer given as a function of `hparams` is tuned too. To tune
            the starting point, train an offset from it: `lambda offset, hparams, batch: loss(hparams["start"] + offset,
            batch)`.
        mode: `"forward"` costs a third to a half of a training run for each scalar hyperparameter and stores nothing;
            `"reverse"` costs one or two training runs for any number of them; `"auto"` is forward for at most three.
        truncate: differentiate only the last `truncate` steps; the steps before them run as usual, and the parameters
            that they reach are treated as constant. The result is biased; `error_estimate` says by how much, judging by
            how fast the contributions of the steps decay.
        remat: what reverse mode stores. `"step"`: parameters and optimizer state at each of T steps, and the gradient
            where pulling back the optimizer needs it. `"sqrt"`: about 2√T of them, for one more training run. `"tree"`:
            k log_k T of them with k ≤ 8, for log_k T more training runs. `"none"`: every intermediate, as plain
            automatic differentiation does; for comparison. `"gradient"`: the gradient of each step and k log_k T points
            more, from which the optimizer's updates are replayed; for Adam this takes a third to a quarter of the
            memory of `"step"`, without additional gradients. `"auto"`: the first of step, sqrt and tree whose storage
            fits `memory`. To reduce the memory of a single step inside a deep model, wrap the model's blocks in
            `jax.checkpoint`, and its layers in `jax.lax.scan`.
        memory: bytes that `remat="auto"` may store. Default: 2³⁰ (1 GiB), or 16 times one state where that is more.
        warm_start: False: each call trains from the parameters given to `init`, with a fresh optimizer, and the result
            is the exact derivative of that run. True: each call continues from where the last one ended, and the
            derivative is that of this call's steps alone.

    Returns:
        A `Solver`. `info.extra["adjoint_growth"]` is how much the recursion amplified (at least 1, dimensionless): in
        reverse mode, max ‖a_t‖ / ‖a_T‖ over the steps; in forward mode, the largest tangent over the sum of what the
        steps contributed. Where the recursion, or training itself, leaves no correct digit, the status is
        UNROLL_EXPLODED. `info.inner_residual` is the inner gradient of the last step over the largest of the run, and
        `info.linear_residual` is NaN. `info.error_estimate` is relative to the exact derivative of the run of T steps
        (with `warm_start`, of this call's steps), and is `inf` where rounding may be a quarter of the hypergradient, or
        more, or where it depends on which side of a kink rounding puts a step. It is measured at a state's first call,
        which takes three to five times as long, and at every 32nd, which takes three times as long; other calls scale
        what was measured. For an optimizer whose update takes the sign of a number (Lion, sign SGD, Rprop, Yogi) those
        other calls say `inf`, and so does every call in which rounding could turn such a sign. Model state (batch-norm
        statistics) follows the steps, and the derivative goes through it.

    Raises:
        InputError: for an unknown option, an inner solver without a number of steps, or a truncation beyond them.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, lr, batch: 0.5 * jnp.sum(w**2), lambda w, lr, batch: jnp.sum(w))
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(lambda lr: optax.sgd(lr), steps=3))
    >>> state = solver.init(jnp.ones(1), 0.5)
    >>> out, state = jax.jit(solver.hypergrad)(state, 0.5)
    >>> print(f"{out.value:.4f} {out.grad:.4f}")  # w = (1 - lr)^3, dw/dlr = -3 (1 - lr)^2
    0.1250 -0.7500
    """
    if inner.steps is None or (inner.update is None and inner.move is None):
        raise InputError(
            "unrolled: inner must be a number of differentiable steps, found a solver to a tolerance: "
            "write hg.inner.gradient(optimizer, steps=100) or hg.inner.fixed_point(map, steps=100), "
            "or use hg.implicit."
        )
    if remat == "gradient" and inner.update is None:
        raise InputError(
            'unrolled: remat="gradient" replays the updates of an optimizer, but hg.inner.fixed_point has '
            'no optimizer: write remat="sqrt" or remat="tree".'
        )
    steps = inner.steps
    length = steps if truncate is None else int(truncate)
    if length > steps:
        raise InputError(
            f"unrolled: truncate must be at most the {steps} steps of inner, found {truncate}: leave it out to "
            "differentiate all of them."
        )
    skip = steps - length

    about = About(
        "hg.unrolled",
        "path",
        biases=(f"truncation to the last {length} of {steps} steps",) if skip else (),
        trains_on=warm_start,
    )

    def init(params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None) -> UnrolledState:
        del key
        params, hparams = check_params(params), check_hparams(hparams)
        model_state = _tree.strong(model_state)
        return UnrolledState(
            params,
            _tree.strong(inner.init(params, hparams)),
            model_state,
            start=None if warm_start else (params, model_state),
            options={},
            trust=measured.new_trust(params),
        )

    def begin(
        state: UnrolledState, hparams: PyTree, train: PyTree, valid: PyTree, key: Array | None
    ) -> tuple[Call, Point, Callable[[PyTree], PyTree]]:
        params, model_state = (state.params, state.model_state) if state.start is None else state.start
        call = bind(problem, model_state, hparams, train, valid, key)
        first_state = lambda h: state.inner_state if warm_start else _tree.strong(inner.init(params, h))
        return call, Point(params, first_state(call.hparams), model_state), first_state

    def check(call: Call, start: Point, first_state: Callable[[PyTree], PyTree]) -> None:
        check_unrolled_sensitivity(
            lambda w, s, h: make_step(inner, call.objective, h, start).take(
                Point(w, first_state(h), start.model_state), 0
            )[0],
            call.outer(start.model_state),
            start.params,
            start.state,
            call.hparams,
        )

    def differentiate(step: Step, hparams: PyTree, point: Point, record: Record, floats: Any, finish: Any) -> _Pass:
        if mode == "forward" or (mode == "auto" and _tree.size(hparams) <= _FORWARD_AT_MOST):
            return _forward(step, hparams, point, skip, length, record, floats, finish)
        if remat == "none":
            return _reverse_whole(step, hparams, point, skip, length, record, floats, finish)
        layout = reverse_mode.plan(remat, length, _tree.nbytes(reverse_mode.stored_by_step(step, point)), memory)
        replays = remat == "gradient"
        return _reverse(step, layout, replays, hparams, point, skip, length, record, floats, finish)

    def hypergrad(
        state: UnrolledState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, UnrolledState]:
        call, start, first_state = begin(state, hparams, train, valid, key)
        hparams, outer = call.hparams, lambda end: call.outer(end.model_state)
        check(call, start, first_state)

        # Beyond the steps, the hyperparameters act through the optimizer's initial state, unless that is cut off.
        floats = None if skip or warm_start else lambda h: _tree.partition(first_state(h))[0]
        finish = lambda end: _finish(outer, end, hparams)

        signs = moves_by_signs(inner, start, hparams)

        def run(twin: Array) -> _Pass:
            step = make_step(inner, call.objective, hparams, start, twin, signs)
            point, record = start, new_record(start.params)
            if skip:
                point, record = reverse_mode.train(step, point, 0, skip, record)
            return differentiate(step, hparams, point, record, floats, finish)

        done, spread = measured.with_twins(run, _empty(finish, start, hparams), _seen, state.trust)
        grad, _ = _seen(done)
        amplified = measured.amplified((done.point.params, hparams), length, done.growth)
        cancelled = measured.cancelled(outer(done.point), done.point.params, hparams, done.rhs[0], length)
        least = measured.least(grad, (done.point.params, hparams), length)
        calm = measured.amplified(done.point.params, steps, jnp.ones_like(done.growth))
        rounding, trust = measured.rounding(spread, amplified * cancelled, least, calm, state.trust, signs)
        error = measured.estimate(grad, done.indirect, rounding, done.dropped)
        status = first_failure(
            training_status(inner, done.record, done.point.params),
            bad_loss(done.value),
            bad_grad(done.rhs, done.direct),
            code(measured.exploded(rounding, amplified, done.growth, calm, spread, signs), Status.UNROLL_EXPLODED),
            bad_grad(grad),
            no_influence(grad, done.rhs),
        )
        info = report(
            status,
            steps,
            like=done.record.residual,
            inner_residual=_tree.safe_divide(done.record.residual, done.record.peak),
            error_estimate=error,
            extra={"adjoint_growth": done.growth},
        )
        return Hypergradient(done.value, grad, info, done.metrics), _go_on_from(state, done.point)._replace(trust=trust)

    def evaluate(
        state: UnrolledState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, UnrolledState]:
        call, start, _ = begin(state, hparams, train, valid, key)
        step = make_step(inner, call.objective, call.hparams, start)
        end, record = reverse_mode.train(step, start, 0, steps, new_record(start.params))
        value, _ = call.outer(end.model_state)(end.params, call.hparams)
        status = first_failure(training_status(inner, record, end.params), bad_loss(value))
        residual = _tree.safe_divide(record.residual, record.peak)
        return value, report(status, steps, like=residual, inner_residual=residual), _go_on_from(state, end)

    return framed(init, hypergrad, current_params, evaluate, about)


def _go_on_from(state: UnrolledState, end: Point) -> UnrolledState:
    """The point where training ended or, if that is not finite, where the last call ended."""
    last = Point(state.params, state.inner_state, state.model_state)
    params, inner_state, model_state = _tree.where(_tree.all_finite(end), end, last)
    return state._replace(params=params, inner_state=inner_state, model_state=model_state)


def _seen(done: _Pass) -> tuple[PyTree, PyTree]:
    """The values by which twins are compared: the hypergradient, and the point where training ended."""
    return jax.tree.map(lambda d, i: d + i.astype(d.dtype), done.direct, done.indirect), done.point.params


def _empty(finish: Callable[[Point], Any], start: Point, hparams: PyTree) -> _Pass:
    """An empty pass with the same shapes, dtypes and shardings."""
    (value, metrics), _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(finish, start))
    zero, none = jnp.zeros((), _tree.dtype(start.params)), _tree.zeros_like(hparams)
    rhs = _tree.zeros_like((start.params, moving(start).model))
    return _Pass(start, new_record(start.params), value, metrics, none, rhs, none, zero, zero)


def _forward(
    step: Step,
    hparams: PyTree,
    point: Point,
    begin: int,
    length: int,
    record: Record,
    floats: Callable[[PyTree], list[Array]] | None,
    finish: Callable[[Point], Any],
) -> _Pass:
    units, count = forward_mode.basis(hparams), _tree.size(hparams)
    stack = lambda tree: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tree)
    if floats is None:
        z = stack(_tree.partition(point.state)[0])
    else:
        z = jax.vmap(lambda unit: jax.jvp(floats, (hparams,), (unit,))[1])(units)
    first = Moving(stack(point.params), z, stack(moving(point).model))
    result, growth = forward_mode.push(step, hparams, point, first, begin, length, record, keep_sizes=begin > 0)
    (value, metrics), (rhs, direct) = finish(result.point)
    indirect = forward_mode.pull_out((result.tangent.params, result.tangent.model), rhs, hparams)
    if result.sizes is None:
        dropped = jnp.zeros_like(growth)
    else:
        end = jax.vmap(_tree.max_abs)(result.tangent.params)
        dropped = measured.dropped_forward(result.sizes, end, indirect, begin)
    return _Pass(result.point, result.record, value, metrics, direct, rhs, indirect, growth, dropped)


def _reverse(
    step: Step,
    layout: reverse_mode.Plan,
    replays: bool,
    hparams: PyTree,
    point: Point,
    begin: int,
    length: int,
    record: Record,
    floats: Callable[[PyTree], list[Array]] | None,
    finish: Callable[[Point], Any],
) -> _Pass:
    sweep = lambda back: back
    if length and replays:
        start = point
        point, kept, record = reverse_mode.train_and_keep_gradients(step, point, begin, length, record)
        sweep = lambda back: reverse_mode.sweep_replayed(step, layout, kept, start, begin, length, begin + length, back)
    elif length:
        point, stored, record = reverse_mode.train_and_store(step, layout, point, begin, length, record)
        sweep = lambda back: reverse_mode.sweep(step, layout, stored, begin, length, begin + length, back)
    (value, metrics), (rhs, direct) = finish(point)
    size, (unit, model) = _unit(rhs)
    dtype = _tree.dtype(rhs)
    still = [jnp.zeros_like(x) for x in moving(point).floats]
    back = sweep(
        reverse_mode.Backward(
            Moving(unit, still, model),
            _tree.zeros_like(hparams),
            jnp.ones((), dtype),
            jnp.zeros((length, 2), dtype) if begin else None,
        )
    )
    total = back.total
    if floats is not None:
        total = _tree.add(total, jax.vjp(floats, hparams)[1](back.adjoint.floats)[0])
    dropped = jnp.zeros((), dtype)
    if back.sizes is not None:
        dropped = measured.dropped_reverse(back.sizes, _tree.norm(total), begin)
    return _Pass(point, record, value, metrics, direct, rhs, _tree.scale(size, total), back.growth, dropped)


def _reverse_whole(
    step: Step,
    hparams: PyTree,
    point: Point,
    begin: int,
    length: int,
    record: Record,
    floats: Callable[[PyTree], list[Array]] | None,
    finish: Callable[[Point], Any],
) -> _Pass:
    """Plain reverse mode over a scan; it stores every intermediate, and yields the adjoint only at the first step."""

    def run(here: Moving, hparams: PyTree) -> tuple[tuple[PyTree, list[Array]], tuple[Point, Record]]:
        def body(carry: tuple[Moving, Point, Record], t: Array) -> tuple[tuple[Moving, Point, Record], None]:
            here, point, record = carry
            here, taken = step.through(here, hparams, point, t)
            return (here, *jax.lax.stop_gradient((taken.point, step.watch(record, taken, t)))), None

        (here, end, seen), _ = jax.lax.scan(body, (here, point, record), begin + jnp.arange(length))
        return (here.params, here.model), (end, seen)

    _, back, (end, seen) = jax.vjp(run, moving(point), hparams, has_aux=True)
    (value, metrics), (rhs, direct) = finish(end)
    size, unit = _unit(rhs)
    first, total = back(unit)
    if floats is not None:
        total = _tree.add(total, jax.vjp(floats, hparams)[1](first.floats)[0])
    decay = jnp.sqrt(_tree.vdot(first.params, first.params)).astype(_tree.dtype(rhs))
    dropped = measured.dropped_whole(decay, length, begin)
    growth = jnp.where(decay > 1, decay, jnp.ones_like(decay))
    return _Pass(end, seen, value, metrics, direct, rhs, _tree.scale(size, total), growth, dropped)


def _finish(outer: Callable[[Point], Callable[..., Any]], end: Point, hparams: PyTree) -> Any:
    """`((f, metrics), ((∂_w f, ∂_m f), ∂_λ f))` where training ended."""
    _, combine = _tree.partition(end.model_state)

    def value(at: tuple[PyTree, list[Array]], hparams: PyTree) -> Any:
        return outer(end._replace(model_state=combine(at[1])))(at[0], hparams)

    here = moving(end)
    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)((here.params, here.model), hparams)


def _unit(rhs: PyTree) -> tuple[Array, PyTree]:
    """Norm and direction, so that an outer loss scaled by 1e-20 changes nothing but the scale of the result."""
    size = _tree.norm(rhs)
    return size, _tree.scale(_tree.safe_divide(1, size), rhs)

r"""Single-loop stochastic bilevel optimization: one step of the parameters and one of the adjoint in each call.

    w ← w − ρ d_w,   v ← v − ρ' d_v,   g = d_λ

The directions d are estimated from one block of training rows and one block of validation rows at a time
(`_directions.py` has one function for each method). Nothing is solved: the adjoint is carried from block to block as
the parameters are, and all three variables converge together.

Source: SOBA and SABA: Dagréou, Ablin, Vaiter & Moreau 2022, arXiv:2201.13409. AmIGO: Arbel & Mairal 2022,
arXiv:2111.14580. SRBA: Dagréou, Moreau, Vaiter & Ablin 2024, arXiv:2302.08766. F2SA: Kwon, Kwon, Wright & Nowak 2023,
arXiv:2301.10945.
Differs: blocks are drawn with replacement and weighted by their rows, so that a shorter last block causes no bias; λ is
moved by the caller. SRBA does not project the adjoint onto a ball. F2SA takes the central difference, whose bias is ε²
instead of ε, in the coordinates w = (w₊ + w₋)/2 and v = (w₊ − w₋)/2ε.
Cost of a call, in gradients of h and f on a block: 2.8 and 1 (SOBA and SABA); 2.8 (K + 1) + K and K + 1 (AmIGO); 5.6
and 2, and a pass over all rows every half pass (SRBA); 2 (K + 1) of each and no second derivative (F2SA). Memory: two
copies of the parameters; SABA stores the five terms of every block, and SRBA two more points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_data, check_hparams, check_params
from hypergrad._data import Minibatches, Stacked, Stream
from hypergrad._data import rows as count_rows
from hypergrad._jaxpr.sensitivity import check_implicit_sensitivity
from hypergrad._options import Choice, Number, as_options, options
from hypergrad._problem import PROBLEM, Problem
from hypergrad._solver import (
    About,
    Hypergradient,
    Info,
    InputError,
    InputTypeError,
    Solver,
    Status,
    first_failure,
)
from hypergrad._tree import PyTree
from hypergrad.solvers._call import (
    bad_grad,
    bad_loss,
    bind,
    current_params,
    framed,
    no_influence,
    option_names,
    report,
    require_key,
)
from hypergrad.solvers._directions import METHODS, Blocks, Oracles, Point, Step

Rate = ArrayLike | Callable[[Array], ArrayLike]

_TABLE = 2.0**30  # bytes that a table may take unless the caller says otherwise


class _Rates(NamedTuple):
    """A step size that is a positive number, or a schedule: a function of the number of calls so far."""

    def check(self, function: str, name: str, value: Any) -> None:
        if not callable(value):
            Number(above=0, advice="write 0.1, or a schedule of optax").check(function, name, value)
            return
        for call in (0, 1000):
            try:
                found = jnp.asarray(value(jnp.int32(call)))
            except (TypeError, ValueError) as error:
                raise InputTypeError(
                    f"{function}: {name} must be a number or a function of the number of calls so far, such as a "
                    f"schedule of optax; at call {call}: {error}"
                ) from error
            if isinstance(found, Tracer):
                return
            if found.ndim or not (jnp.isfinite(found) and found >= 0):
                raise InputError(
                    f"{function}: {name} gave {np.asarray(found).tolist()} at call {call}: a schedule returns one "
                    "number, at least 0, such as optax.constant_schedule(0.1) does."
                )


class SingleLoopState(NamedTuple):
    """The state from which the next call starts.

    Attributes:
        params: pytree like the parameters.
        adjoint: v, which converges to −(∂²h)⁻¹ ∂_w f; a pytree like the parameters, zeros before the first call.
        memory: what else the method remembers: the table of SABA, the last directions of SRBA, else None.
        model_state: state of the model (batch-norm statistics), or None.
        calls: int32, the number of calls so far, which schedules depend on.
        options: `{"step_size": ..., "adjoint_step_size": ..., "perturbation": ...}`, as far as they were given as
            numbers; they may be replaced between calls without recompiling.
    """

    params: PyTree
    adjoint: PyTree
    memory: PyTree
    model_state: PyTree
    calls: Array
    options: dict[str, Any]


@options(
    problem=PROBLEM,
    method=Choice(tuple(METHODS)),
    size=Number(least=1, integer=True, static=True, advice="write the rows of one block"),
    step_size=_Rates(),
    adjoint_step_size=_Rates(),
    inner_steps=Number(least=1, integer=True, static=True),
    perturbation=Number(above=0),
    memory=Number(above=0, static=True),
)
def single_loop(
    problem: Problem,
    *,
    method: str,
    size: int,
    rows: tuple[int, int] | None = None,
    step_size: Rate,
    adjoint_step_size: Rate | None = None,
    inner_steps: int = 1,
    perturbation: ArrayLike | None = None,
    memory: float = _TABLE,
) -> Solver:
    """Stochastic bilevel optimization in a single loop: each call takes one step of the parameters and of the adjoint.

    `train` and `valid` are arrays with a leading axis of rows. The solver draws contiguous blocks of them itself, with
    replacement, so rows that are sorted must be shuffled once. The losses are means over the rows that they are given.
    λ is moved by the caller: `outer=optax.sgd(0.01)` in `hg.tune` gives the papers' methods. The methods are:

        "soba"   One block of each data set; all three steps start from the old point. It needs decreasing steps (t^−½):
                 with constant steps it stops at a floor proportional to them.
        "saba"   SOBA with the noise of the blocks removed by a table of the terms of all blocks. It converges with
                 constant steps, and is the method of choice where the table fits into memory.
        "amigo"  `inner_steps` steps of the parameters, as many of the adjoint, then the hypergradient. Constant steps.
        "srba"   Differences between consecutive points on one block, restarted from all rows every half pass. It
                 converges with constant steps and without a table, at twice the cost of SOBA and that of the full
                 passes.
        "f2sa"   The parameters of two perturbed problems, by first derivatives only, for losses without second
                 derivatives. It is biased in proportion to the square of `perturbation`.

    Other papers' methods are settings of these, where t counts calls, and λ moves by the schedule given to `outer`:

        StocBiO        "amigo" with inner_steps=10 and constant steps; it starts each adjoint from zero
        BSA            "amigo" with several inner_steps, all steps as t^−½; it starts each adjoint from zero
        TTSA           "amigo" with inner_steps=1, step_size as t^−2/5, λ as t^−3/5
        FSLA           "soba" with all steps as t^−½ and outer=optax.sgd(schedule, momentum=0.9)
        SUSTAIN, MRBO  "srba" with all steps as t^−⅓; a decaying momentum replaces the restarts
        VRBO           "srba" with constant steps, and several steps of the parameters in each call

    Args:
        problem: the two losses.
        method: see the table.
        size: rows of one block, of either data set; 64 is usual. The last block of the data holds the remaining rows.
        rows: `(n, m)`, the numbers of training and validation rows. Needed by `"saba"`, whose table is made by `init`.
        step_size: ρ of the parameters: a number, or a function of the number of calls so far, such as an optax schedule
            or `lambda t: 0.1 / (1 + t)**0.5`. It must be below 2 / the largest eigenvalue of the Hessian of a block.
        adjoint_step_size: step size of the adjoint, in the same forms. Default: that of the parameters.
        inner_steps: K of `"amigo"` and `"f2sa"`, steps of the parameters and the adjoint in each call.
        perturbation: ε of `"f2sa"`, the weight with which the outer loss is added to, and subtracted from, the inner
            loss. The bias of the hypergradient is proportional to ε²; rounding errors and sampling noise grow as 1 / ε.
        memory: bytes that the table of `"saba"` may take. Default: 2³⁰ (1 GiB).

    Returns:
        A `Solver`. `out.value` is the outer loss on one block of validation rows, so that the best value of a run is
        that of a lucky block: use `result.hparams` and `result.params`, not `result.best`. `info.error_estimate` is
        infinite and the residuals are NaN, because nothing that is computed shows how far the variables are from
        convergence. `evaluate` takes the same step of the parameters and leaves the adjoint unchanged.

    Raises:
        InputError: for an unknown method, an option that is out of range or that the method does not take, a schedule
            that is not a number of at least 0 at calls 0 and 1000, `rows` that are missing or differ from those of the
            data, blocks larger than the data, or a table larger than `memory`; from `hypergrad`, for a missing key, and
            for data that are not arrays of rows.
        InputTypeError: for an option of the wrong type, or a schedule that is no function of the number of calls.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, l2, x: jnp.mean((w - x)**2) + l2 * w**2, lambda w, l2, x: jnp.mean((w - x)**2))
    >>> train, valid = jnp.linspace(0.0, 2.0, 64), jnp.linspace(-0.5, 1.5, 64)
    >>> solver = hg.single_loop(problem, method="saba", size=8, rows=(64, 64), step_size=0.1)
    >>> result = hg.tune(solver, jnp.zeros(()), 0.0, train, valid, outer=optax.sgd(0.1), steps=1000,
    ...                  key=jax.random.key(0), progress=False)
    >>> print(f"{result.hparams:.3f} {result.params:.3f}")  # w = 1 / (1 + l2) is best at 1/2
    1.000 0.500
    """
    way = METHODS[method]
    _check(method, size, rows, inner_steps, perturbation, repeats=way.repeats)
    given = {"step_size": step_size, "adjoint_step_size": adjoint_step_size, "perturbation": perturbation}
    numbers = {name: value for name, value in given.items() if value is not None and not callable(value)}
    rest = ("parameters and an adjoint that are still on their way",)
    about = About(
        "hg.single_loop",
        "optimum",
        random=() if rows == (size, size) else ("blocks of rows",),
        biases=(*rest, "differences at a finite perturbation") if method == "f2sa" else rest,
        options=option_names(numbers),
        trains_on=True,
    )

    def init(
        params: PyTree, hparams: PyTree, *, key: Array | None = None, model_state: PyTree = None
    ) -> SingleLoopState:
        del key
        params, hparams = check_params(params), check_hparams(hparams)
        point = Point(params, _tree.zeros_like(params), hparams)
        counts = (0, 0) if rows is None else (-(-rows[0] // size), -(-rows[1] // size))
        start = lambda: way.start(point, *counts)
        needed = _tree.nbytes(jax.eval_shape(start))
        if method == "saba" and needed > memory:
            raise InputError(
                f"single_loop: memory must be at least the {needed:.3g} bytes of the table of method='saba' for "
                f"{counts[0]} + {counts[1]} blocks, found {memory:.3g}: write a larger size, allow more memory, or "
                "write method='srba' or 'amigo', which hold no table."
            )
        return SingleLoopState(params, point.adjoint, start(), model_state, jnp.int32(0), as_options(numbers, params))

    def run(
        state: SingleLoopState, hparams: PyTree, train: PyTree, valid: PyTree, key: Array | None, function: str
    ) -> Step:
        key = require_key("single_loop", function, key, draws="blocks of rows")
        bound_key, drawn_key, loss_key = jax.random.split(key, 3)
        blocks = _blocks("train", train, size, rows and rows[0]), _blocks("valid", valid, size, rows and rows[1])
        call = bind(problem, state.model_state, hparams, train, valid, bound_key)
        check_implicit_sensitivity(
            lambda w, h: jax.grad(call.objective.fixed)(w, h),
            call.outer(state.model_state),
            None,
            state.params,
            None,
            call.hparams,
            "hg.single_loop",
        )

        def option(name: str) -> Array:
            value = given[name]
            if callable(value):
                return jnp.asarray(value(state.calls), _tree.dtype(state.params))
            return option("step_size") if value is None else state.options[name]

        bits = jax.random.bits(drawn_key, (way.draws(inner_steps), 2), jnp.uint32)  # same bits in both precisions
        draws = (bits % jnp.asarray([[b.count for b in blocks]], jnp.uint32)).astype(jnp.int32)
        oracles = Oracles(
            problem, *blocks, draws, loss_key, option("step_size"), option("adjoint_step_size"), option("perturbation"),
            inner_steps,
        )  # fmt: skip
        return way.step(oracles, Point(state.params, state.adjoint, call.hparams), state.memory, state.model_state)

    def hypergrad(
        state: SingleLoopState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Hypergradient, SingleLoopState]:
        step = run(state, hparams, train, valid, key, "hypergrad")
        moved = _tree.max_abs(state.adjoint) > 0  # before the adjoint's first step, a zero means nothing
        status = first_failure(
            _failed(step),
            bad_grad(step.grad, step.adjoint),
            jnp.where(moved, no_influence(step.grad, step.adjoint), int(Status.OK)),
        )
        info = report(status, inner_steps, like=step.seen.value, linear_steps=way.products(inner_steps))
        sound = _tree.all_finite((step.params, step.adjoint, step.seen.model_state))
        new = state._replace(params=step.params, adjoint=step.adjoint, model_state=step.seen.model_state)
        new = _tree.where(sound, new._replace(memory=None), state._replace(memory=None))
        new = new._replace(memory=step.memory, calls=state.calls + 1)
        return Hypergradient(step.seen.value, step.grad, info, step.seen.metrics), new

    def evaluate(
        state: SingleLoopState, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Array | None = None
    ) -> tuple[Array, Info, SingleLoopState]:
        step = run(state, hparams, train, valid, key, "evaluate")
        info = report(_failed(step), inner_steps, like=step.seen.value)
        after, before = (step.params, step.seen.model_state), (state.params, state.model_state)
        params, model_state = _tree.where(_tree.all_finite(after), after, before)
        return step.seen.value, info, state._replace(params=params, model_state=model_state)

    return framed(init, hypergrad, current_params, evaluate, about)


def _failed(step: Step) -> Array:
    """The status of the losses and the parameters."""
    return first_failure(bad_loss(step.seen.loss), bad_grad(step.params), bad_loss(step.seen.value))


def _check(method: str, size: int, rows: Any, inner_steps: int, perturbation: Any, *, repeats: bool) -> None:
    if rows is not None:
        whole = lambda n: isinstance(n, (int, np.integer)) and not isinstance(n, bool)
        if not (isinstance(rows, tuple) and len(rows) == 2 and all(map(whole, rows))):
            raise InputTypeError(
                f"single_loop: rows must be (training rows, validation rows), two integers, found {rows!r}."
            )
        for n, name in zip(rows, ("training", "validation"), strict=True):
            _check_size(size, n, f"the {n} {name} rows of rows={rows}")
    elif method == "saba":
        raise InputError(
            "single_loop: rows must be given for method='saba', which holds a table of all blocks, found None: write "
            "rows=(len(x_train), len(x_valid))."
        )
    if inner_steps != 1 and not repeats:
        raise InputError(
            f"single_loop: inner_steps must be 1 for method={method!r}, found {inner_steps}: write method='amigo', "
            "which takes several."
        )
    if (perturbation is None) == (method == "f2sa"):
        raise InputError(
            f"single_loop: perturbation must be given for method='f2sa' and for no other, found {perturbation!r} for "
            f"method={method!r}: " + ("write perturbation=0.01." if method == "f2sa" else "leave it out.")
        )


def _check_size(size: int, rows: int, where: str) -> None:
    if size > rows:
        raise InputError(f"single_loop: size must be at most {where}, found {size}: write a smaller one.")


def _blocks(name: str, data: PyTree, size: int, expected: int | None) -> Blocks:
    """The data cut into blocks.

    Raises:
        InputError: for data that are not arrays of rows, with fewer rows than a block, or with another number than
            stated.
    """
    if isinstance(data, (Minibatches, Stacked, Stream)) or data is None:
        found = "None" if data is None else "hg.minibatches" if isinstance(data, Minibatches) else "hg.stream"
        raise InputError(
            f"single_loop: {name} must be arrays with a leading axis of rows, found {found}: single_loop draws blocks "
            "of them itself, so that the losses must not hold the data; pass the arrays."
        )
    check_data(name, data)
    n = count_rows(data, f"single_loop: {name}")
    if expected is not None and n != expected:
        raise InputError(f"single_loop: {name} has {n} rows, but rows= says {expected}: write the rows of the data.")
    _check_size(size, n, f"the {n} rows of {name}")
    return Blocks(data, n, size)

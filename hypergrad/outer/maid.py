r"""MAID: gradient descent that finds its step size and the accuracy it needs, from any accuracy it begins with.

    z to an estimated relative error of at most ½, else ε ← ½ ε at the same point
    trial = u − α z;   accept  ⇔  f(trial) + e(trial) ≤ f(u) − e(u) − η α ‖z‖²,   e = ε |f|
    accepted: α ← 10/9 α, ε ← 5/4 ε;   refused: α ← ½ α, or, where no step of this length could be told from the errors
    of the two values, ε ← ½ ε, and f and z once more at u

Source: Salehi, Mukherjee, Roberts & Ehrhardt 2024 (method of adaptive inexact descent), arXiv:2308.10098. Differs: the
error of z is the solver's `error_estimate` (against a proved bound where a `hg.Regularity` is known, which has a direct
term that the paper's lacks); that of a value is taken to be ε |f|, in place of a first-order bound with constants that
nobody has; and the accuracy is raised at once where it is what is missing, not after ten shorter steps.
Cost: an evaluation for each trial, and a hypergradient for each that is accepted or repeated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._solver import Hypergradient, Info
from hypergrad._tree import PyTree
from hypergrad.outer.controllers import Controller, set_options

_DECREASE = 1e-4  # η
_SHORTER, _LONGER = 0.5, 10 / 9  # of the step
_TIGHTER, _LOOSER = 0.5, 1.25  # of the accuracy
_SURE = 0.5  # the largest relative error with which −z certainly descends
_ROUNDING = 32  # units of rounding, below which no tolerance is asked for


class MaidState(NamedTuple):
    """The controller's state, from which the next trial follows.

    Attributes:
        free: u, the last accepted point.
        grad: the hypergradient there.
        value: the outer loss there; inf before the first.
        noise: the largest error that this value is taken to have.
        step: α, scalar.
        accuracy: ε of the next trial.
        again: whether the next trial is u once more, to know f and z there more accurately.
        count: accepted points, int32.
    """

    free: PyTree
    grad: PyTree
    value: Array
    noise: Array
    step: Array
    accuracy: Array
    again: Array
    count: Array


@options(step_size=Number(above=0), tol=Number(above=0, below=1))
def maid(*, step_size: ArrayLike | None = None, tol: ArrayLike = 1e-2) -> Controller:
    """Gradient descent that finds both its step size and the tolerances of the two solves.

    For deterministic problems and solvers that work at the optimum (`hg.implicit`): it sets `inner.tol` and
    `linear.tol` of the solver at every step, whatever they were. It ends where descent with the best fixed accuracy
    ends, without knowing that accuracy; `hg.outer.hoag` follows a schedule instead. Values of different steps are
    compared, so data that are drawn are refused.

    Args:
        step_size: of the first step, in units of (unconstrained hyperparameter)² over outer loss. Default: such that
            the root mean square of its entries is 1.
        tol: tolerance of the first step on both systems, and the loosest of the run (relative, dimensionless).

    Returns:
        A `Controller` for `hg.tune(outer=...)`. Where steps can no longer be told from rounding, all trials are
        rejected, and `max_rejections` ends the run as CONVERGED.

    Raises:
        InputError: for an option out of range; in `hg.tune`, for a solver without these tolerances.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: 1 + jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=hg.outer.maid(), steps=60,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 1)
    1.0
    """

    def init(free: PyTree) -> MaidState:
        dtype = _tree.dtype(free)
        zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        first = jnp.ones((), dtype) if step_size is None else jnp.asarray(step_size, dtype)
        loosest = jnp.asarray(tol, dtype)
        return MaidState(free, _tree.zeros_like(free), inf, zero, first, loosest, jnp.asarray(False), jnp.int32(0))

    def finest(state: MaidState) -> float:
        return _ROUNDING * _tree.eps(state.free)

    def prepare(state: MaidState, solver: Any) -> Any:
        return set_options(solver, {"inner.tol": state.accuracy, "linear.tol": state.accuracy})

    def trial_of(state: MaidState) -> PyTree:
        length = jnp.where(state.again, 0, state.step)
        return _tree.axpy(-length, state.grad, state.free)

    def tighter(state: MaidState) -> Array:
        return jnp.maximum(_TIGHTER * state.accuracy, finest(state)).astype(state.accuracy.dtype)

    def judge(value: Array, state: MaidState, free: PyTree, info: Info) -> tuple[PyTree, MaidState, Array]:
        del free, info
        noise = state.accuracy * jnp.abs(value) + state.noise
        expected = state.step * _tree.vdot(state.grad, state.grad).astype(state.step.dtype)
        ok = (state.count == 0) | state.again | (value + noise <= state.value - _DECREASE * expected)
        # A decrease of the whole first-order size would not have been seen either: the values are what is missing.
        blind = jnp.isfinite(value) & (expected <= 2 * noise) & (state.accuracy > finest(state))
        refused = state._replace(
            step=jnp.where(blind, state.step, _SHORTER * state.step).astype(state.step.dtype),
            accuracy=jnp.where(blind, tighter(state), state.accuracy),
            again=blind,
        )
        return trial_of(refused), _tree.where(ok, state, refused), ok

    def update(grad: PyTree, state: MaidState, free: PyTree, out: Hypergradient) -> tuple[PyTree, MaidState, Array]:
        finite = jnp.isfinite(out.value)
        sure = (out.info.error_estimate <= _SURE) | (state.accuracy <= finest(state))
        first, value = state.count == 0, out.value.astype(state.value.dtype)
        natural = _tree.safe_divide(_tree.size(free) ** 0.5, _tree.norm(grad)).astype(state.step.dtype)
        begins = natural if step_size is None else state.step
        step = jnp.where(first, begins, jnp.where(state.again, state.step, _LONGER * state.step))
        accuracy = jnp.where(first | state.again, state.accuracy, jnp.minimum(_LOOSER * state.accuracy, tol))
        here = MaidState(
            free,
            grad,
            value,
            (state.accuracy * jnp.abs(value)).astype(state.noise.dtype),
            step.astype(state.step.dtype),
            accuracy.astype(state.accuracy.dtype),
            jnp.asarray(False),
            state.count + 1,
        )
        # The same point once more, and more accurately; nearer as well where the solver itself refused it.
        shorter = jnp.where(finite, state.step, _SHORTER * state.step).astype(state.step.dtype)
        there = state._replace(step=shorter, accuracy=tighter(state))
        ok = finite & sure
        following = _tree.where(ok, trial_of(here), _tree.where(finite, free, trial_of(there)))
        return following, _tree.where(ok, here, there), ok

    return Controller(init, update, prepare, judge=judge, compares=True)

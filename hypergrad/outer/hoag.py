r"""HOAG: gradient descent on hyperparameters with accuracies that increase during the run.

    inner and adjoint systems to ε_k;   u_{k+1} = u_k − g_k / L
    accept u_k  ⇔  f_k ≤ f_{k−1} + s (C ε_k + (C + 1) ε_{k−1} ‖u_k − u_{k−1}‖),   C = ¼
    accepted: L ← .95 L;   refused: back to (u, w, v)_{k−1}, L ← 2 L, and a shorter step along the same gradient

Early steps are cheap, since ε starts large, and the run still converges if Σ ε_k is finite.
Source: Pedregosa 2016, arXiv:1602.02355. Differs: a step is judged by its own length, where the published code takes
that of the next one, and a rejection really goes back; ε is relative to the natural scale of each system, and s is
|f_{k−1}|, so that units do not matter.
Cost: one hypergradient per step, including rejected steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._solver import Hypergradient, InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.outer.controllers import Controller, set_options

_SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: 1 / (k + 1) ** 2,
    "cubic": lambda k: 1 / (k + 1) ** 3,
    "exact": lambda k: 0.0 * k,
}
_SLACK = 0.25  # C
_LONGER, _SHORTER, _BROKEN = 0.95, 2.0, 10.0  # factors of L after an accepted, a rejected, and an unusable trial
_ROUNDING = 32  # units of rounding; no tolerance below this is asked for


class HoagState(NamedTuple):
    """The controller's state, from which the next trial follows.

    Attributes:
        free: u, the last accepted point.
        grad: the hypergradient there.
        value: the outer loss there; inf before the first.
        inverse_step: L, scalar.
        accuracy: ε of the last accepted point, as a share of `tol`.
        count: accepted points, int32.
    """

    free: PyTree
    grad: PyTree
    value: Array
    inverse_step: Array
    accuracy: Array
    count: Array


@options(step_size=Number(above=0), tol=Number(above=0, below=1))
def hoag(
    *,
    step_size: ArrayLike | None = None,
    schedule: str | Callable[[Any], Any] = "exponential",
    tol: ArrayLike = 1e-3,
) -> Controller:
    """Gradient descent that finds its step size, with solves that start loose and become exact.

    Use it for deterministic problems and solvers that work at the optimum (`hg.implicit`). It sets `inner.tol` and
    `linear.tol` of the solver at every step and overrides the values that they had. Values of different steps are
    compared, so data that are drawn at random are refused.

    Args:
        step_size: size of the first step, in units of (unconstrained hyperparameter)² over outer loss. By default it is
            chosen such that the root mean square of the step's entries is 1.
        schedule: how the tolerance of step k, counted from 0, follows from `tol`: `"exponential"` (0.9ᵏ, recommended),
            `"quadratic"` (1/(k+1)²), `"cubic"` (1/(k+1)³), `"exact"` (as accurate as the precision allows from the
            first step on), or a function of the step number whose values have a finite sum.
        tol: tolerance of the first step for both systems (relative, dimensionless).

    Returns:
        A `Controller` for `hg.tune(outer=...)`.

    Raises:
        InputError: for an unknown schedule, one whose values are not positive numbers or have no finite sum, or an
            option out of range; in `hg.tune`, for a solver without these tolerances.
        InputTypeError: for a schedule that does not return one number for a step.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(3), 0.1, outer=hg.outer.hoag(), steps=40,
    ...                  domain=hg.domains.log(), progress=False)
    >>> round(float(result.hparams), 2)
    1.0
    """
    share = _checked(schedule)

    def init(free: PyTree) -> HoagState:
        dtype = _tree.dtype(free)
        one, inf = jnp.ones((), dtype), jnp.full((), jnp.inf, dtype)
        first = one if step_size is None else 1 / jnp.asarray(step_size, dtype)
        return HoagState(free, _tree.zeros_like(free), inf, first, one, jnp.int32(0))

    def accuracy(state: HoagState) -> Array:
        return jnp.asarray(share(state.count), state.accuracy.dtype)

    def prepare(state: HoagState, solver: Any) -> Any:
        asked = jnp.maximum(tol * accuracy(state), _ROUNDING * _tree.eps(state.free))
        return set_options(solver, {"inner.tol": asked, "linear.tol": asked})

    def update(grad: PyTree, state: HoagState, free: PyTree, out: Hypergradient) -> tuple[PyTree, HoagState, Array]:
        value = out.value.astype(state.value.dtype)
        first, broken = state.count == 0, ~jnp.isfinite(value)
        moved = _tree.norm(_tree.sub(free, state.free)).astype(value.dtype)
        room = _SLACK * accuracy(state) + (_SLACK + 1) * state.accuracy * moved
        ok = ~broken & (first | (value <= state.value + jnp.abs(state.value) * tol * room))

        length = _tree.norm(grad) / _tree.size(free) ** 0.5
        natural = _tree.positive(length) if step_size is None else state.inverse_step
        after = jnp.where(first, natural, _LONGER * state.inverse_step)
        shorter = jnp.where(broken, _BROKEN, _SHORTER) * state.inverse_step
        inverse_step = jnp.where(ok, after, shorter).astype(state.inverse_step.dtype)
        here = HoagState(free, grad, value, inverse_step, accuracy(state), state.count + 1)
        there = state._replace(inverse_step=inverse_step)
        state = _tree.where(ok, here, there)
        return _tree.axpy(-1 / state.inverse_step, state.grad, state.free), state, ok

    return Controller(init, update, prepare, compares=True)


def _checked(schedule: Any) -> Callable[[Any], Any]:
    """Return the schedule as a function, after checking that it is positive and has a finite sum."""
    if isinstance(schedule, str) and schedule in _SCHEDULES:
        return _SCHEDULES[schedule]
    if not callable(schedule):
        raise InputError(
            f"hoag: schedule must be one of {', '.join(map(repr, _SCHEDULES))}, or a function of the step number, "
            f"found {schedule!r}."
        )
    share: Callable[[Any], Any] = schedule
    values = np.asarray([_number(share, k) for k in (0, 10**3, 10**6)])
    if not (np.all(np.isfinite(values)) and np.all(values >= 0)):
        raise InputError(
            f"hoag: schedule gave {values.tolist()} at steps 0, 1e3 and 1e6: it must be at least 0 and fall, as "
            "lambda k: 0.9**k does."
        )
    # If k ε_k does not fall over three decades, the sum behaves like that of 1/k, or worse.
    if values[2] * 10**6 > 0.5 * values[1] * 10**3:
        raise InputError(
            f"hoag: schedule has no finite sum, or hardly one: it gave {values[1]:.3g} at step 1e3 and {values[2]:.3g} "
            "at step 1e6; let it fall faster than 1/k, as lambda k: 0.9**k does."
        )
    return schedule


def _number(schedule: Callable[[Any], Any], step: int) -> float:
    try:
        return float(schedule(step))
    except OverflowError:  # Python's numbers, where an array's would be infinite
        return float("inf")
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            f"hoag: schedule must be a function of the step number that returns one number, as lambda k: 0.9**k does; "
            f"at step {step}: {error}"
        ) from error

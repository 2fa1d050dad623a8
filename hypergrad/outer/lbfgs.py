r"""A quasi-Newton method with a line search, for a few dozen hyperparameters.

    d = −B g  by the two-loop recursion over the last m pairs (s, y),   trial = u + t d
    accept  ⇔  f(trial) ≤ f(u) + 10⁻⁴ t g·d;   refused: t ← the minimum of the parabola through f(u), g·d, f(trial)

Source: Nocedal 1980; Liu & Nocedal 1989. Differs: the line search evaluates the outer loss alone (`solver.evaluate`),
and the hypergradient only where the loss has fallen; a pair with s·y ≤ 0, which a search without a curvature condition
may produce, is left out.
Cost: an evaluation for each trial and a hypergradient for each accepted one. Memory: 2 m copies of the hyperparameters.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._solver import Hypergradient, Info
from hypergrad._tree import PyTree
from hypergrad.outer.controllers import Controller

_ARMIJO = 1e-4
_SHORTEST, _LONGEST = 0.1, 0.5  # smallest and largest ratio of the next trial step to a rejected one
_ROUNDING = 8  # a rise of the outer loss by fewer units of rounding does not count


class LbfgsState(NamedTuple):
    """The controller's state, from which the next trial follows.

    Attributes:
        free: u, the last accepted point.
        grad: the hypergradient there.
        value: the outer loss there; inf before the first.
        direction: d, a pytree like the hyperparameters.
        slope: g·d, scalar.
        size: t of the current trial, scalar.
        steps, changes: s and y of the last pairs, stacked on a leading axis of m, the newest last.
        inverse: 1/(s·y) of each pair, `[m]`; 0 where there is none.
        count: accepted points, int32.
    """

    free: PyTree
    grad: PyTree
    value: Array
    direction: PyTree
    slope: Array
    size: Array
    steps: PyTree
    changes: PyTree
    inverse: Array
    count: Array


@options(history=Number(least=1, integer=True, static=True))
def lbfgs(*, history: int = 10) -> Controller:
    """L-BFGS with a backtracking line search on the outer loss.

    Use it for deterministic problems with up to a few dozen hyperparameters, where it needs a third of the evaluations
    of Adam; with hundreds, or with hypergradients that are noisy or biased, prefer `optax.adam`. Values of different
    steps are compared, so data that are drawn at random are refused.

    Args:
        history: number of pairs kept, a Python integer.

    Returns:
        A `Controller` for `hg.tune(outer=...)`.

    Raises:
        InputError: for a history below 1.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + jnp.sum(l2 * w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - jnp.array([1.0, 0.5]))**2))
    >>> result = hg.tune(hg.implicit(problem), jnp.zeros(2), jnp.full(2, 0.1), outer=hg.outer.lbfgs(), steps=30,
    ...                  domain=hg.domains.log(), progress=False)
    >>> print(result.hparams.round(2))
    [1. 3.]
    """
    pairs = int(history)

    def init(free: PyTree) -> LbfgsState:
        dtype = _tree.dtype(free)
        stack = jax.tree.map(lambda x: jnp.zeros((pairs, *jnp.shape(x)), jnp.result_type(x)), free)
        zero, inf = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        none = _tree.zeros_like(free)
        one = jnp.ones((), dtype)
        return LbfgsState(free, none, inf, none, zero, one, stack, stack, jnp.zeros(pairs, dtype), jnp.int32(0))

    def judge(value: Array, state: LbfgsState, free: PyTree, info: Info) -> tuple[PyTree, LbfgsState, Array]:
        del info
        value = value.astype(state.value.dtype)
        rise = value - state.value
        # Along the step that was really taken, which a domain may have shortened.
        expected = _tree.vdot(state.grad, _tree.sub(free, state.free)).astype(state.slope.dtype)
        noise = _ROUNDING * _tree.eps(free) * jnp.abs(state.value)
        ok = (state.count == 0) | (rise <= _ARMIJO * jnp.minimum(expected, 0)) | (jnp.abs(rise) <= noise)
        ok &= jnp.isfinite(value)
        bent = 2 * (rise - expected)
        best = _tree.safe_divide(-expected, bent)  # minimum of the parabola, as a share of t
        share = jnp.where(jnp.isfinite(value), jnp.clip(best, _SHORTEST, _LONGEST), _SHORTEST)
        shorter = state._replace(size=(share * state.size).astype(state.size.dtype))
        return _tree.axpy(shorter.size, shorter.direction, shorter.free), _tree.where(ok, state, shorter), ok

    def update(grad: PyTree, state: LbfgsState, free: PyTree, out: Hypergradient) -> tuple[PyTree, LbfgsState, Array]:
        ok = jnp.isfinite(out.value)
        step, change = _tree.sub(free, state.free), _tree.sub(grad, state.grad)
        curvature = _tree.vdot(step, change).astype(state.slope.dtype)
        enough = _tree.eps(free) * _tree.norm(step) * _tree.norm(change)
        learned = (state.count > 0) & (curvature > enough)
        push = lambda stack, new: jax.tree.map(lambda s, x: jnp.concatenate([s[1:], x[None]]), stack, new)
        steps = _tree.where(learned, push(state.steps, step), state.steps)
        changes = _tree.where(learned, push(state.changes, change), state.changes)
        entry = 1 / jnp.where(learned, curvature, 1)
        inverse = jnp.where(learned, jnp.concatenate([state.inverse[1:], entry[None]]), state.inverse)
        direction = _tree.scale(-1.0, _two_loops(grad, steps, changes, inverse))
        slope = _tree.vdot(grad, direction).astype(state.slope.dtype)
        here = LbfgsState(
            free,
            grad,
            out.value.astype(state.value.dtype),
            direction,
            slope,
            jnp.ones_like(state.size),
            steps,
            changes,
            inverse,
            state.count + 1,
        )
        # If the hypergradient is unusable although the loss was fine, go back, and ten times closer.
        size = (0.1 * state.size).astype(state.size.dtype)
        state = _tree.where(ok, here, state._replace(size=size))
        return _tree.axpy(state.size, state.direction, state.free), state, ok

    return Controller(init, update, judge=judge, compares=True)


def _two_loops(grad: PyTree, steps: PyTree, changes: PyTree, inverse: Array) -> PyTree:
    """B g, with B from the pairs and scaled by the newest; without pairs, such that the first step has length 1."""
    pairs = inverse.shape[0]
    at = lambda stack, i: jax.tree.map(lambda x: x[i], stack)

    def back(i: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        q, alphas = carry
        j = pairs - 1 - i
        alpha = (inverse[j] * _tree.vdot(at(steps, j), q)).astype(alphas.dtype)
        return _tree.axpy(-alpha, at(changes, j), q), alphas.at[j].set(alpha)

    def forth(j: Array, r: PyTree) -> PyTree:
        beta = (inverse[j] * _tree.vdot(at(changes, j), r)).astype(inverse.dtype)
        return _tree.axpy(alphas[j] - beta, at(steps, j), r)

    q, alphas = jax.lax.fori_loop(0, pairs, back, (grad, jnp.zeros_like(inverse)))
    newest = at(changes, pairs - 1)
    square = _tree.vdot(newest, newest).astype(inverse.dtype)
    length = _tree.norm(grad).astype(inverse.dtype)
    plain = _tree.safe_divide(1, length)
    gain = _tree.safe_divide(1, inverse[-1] * square, where=inverse[-1] > 0, otherwise=plain)
    return jax.lax.fori_loop(0, pairs, forth, _tree.scale(gain, q))

"""Runs of different controllers side by side in one compiled program, by `hg.multistart`; MAID at a fixed accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

_APART = 1e-5  # starts that would be the same differ by so much in their first entry for each lane


class Lane(NamedTuple):
    """Which controller moves this lane, and that controller's state."""

    which: Any
    state: Any


def side_by_side(
    controllers: Sequence[hg.outer.Controller], starts: Sequence[Any]
) -> tuple[hg.outer.Controller, np.ndarray]:
    """One controller for all lanes, and the starts to give to `hg.multistart`.

    Args:
        controllers: one for each lane; states of one structure, all with a `judge` or none.
        starts: unconstrained hyperparameters of each lane, arrays of one shape. Each is moved by a few units of the
            fifth digit in its first entry, by which a lane is told from the others.
    """
    given = np.asarray(starts, float)
    flat = given.reshape(len(given), -1).copy()
    flat[:, 0] += _APART * np.arange(len(flat))
    unique = list({id(c): c for c in controllers}.values())
    lane = jnp.asarray([unique.index(c) for c in controllers])

    def init(free: Any) -> Lane:
        which = lane[jnp.argmin(jnp.sum((jnp.ravel(free) - flat) ** 2, -1))]
        return Lane(which, jax.lax.switch(which, [c.init for c in unique], free))

    def prepare(here: Lane, solver: Any) -> Any:
        return jax.lax.switch(here.which, [c.prepare for c in unique], here.state, solver)

    def update(grad: Any, here: Lane, free: Any, out: Any) -> Any:
        following, state, ok = jax.lax.switch(here.which, [c.update for c in unique], grad, here.state, free, out)
        return following, Lane(here.which, state), ok

    def judge(value: Any, here: Lane, free: Any, info: Any) -> Any:
        judges: Any = [c.judge for c in unique]
        following, state, ok = jax.lax.switch(here.which, judges, value, here.state, free, info)
        return following, Lane(here.which, state), ok

    compares = any(c.compares for c in unique)
    judges = judge if unique[0].judge is not None else None
    return hg.outer.Controller(init, update, prepare, judges, compares), flat.reshape(given.shape)


def held(tol: float) -> hg.outer.Controller:
    """MAID's line search at an accuracy that never changes."""
    base = hg.outer.maid(tol=tol)
    assert base.judge is not None
    decide = base.judge
    still = lambda state: state._replace(accuracy=jnp.full_like(state.accuracy, tol), again=jnp.asarray(False))

    def update(grad: Any, state: Any, free: Any, out: Any) -> Any:
        following, after, ok = base.update(grad, state, free, out)
        return following, still(after), ok

    def judge(value: Any, state: Any, free: Any, info: Any) -> Any:
        _, after, ok = decide(value, state, free, info)
        shorter = jnp.where(after.again, 0.5 * state.step, after.step).astype(state.step.dtype)
        after = still(after._replace(step=jnp.where(ok, after.step, shorter)))
        return after.free - after.step * after.grad, after, ok

    return base._replace(update=update, judge=judge)

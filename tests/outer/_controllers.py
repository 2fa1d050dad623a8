"""Controllers of twenty lines each, as a person would write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hypergrad.outer import Controller, set_options

Tree = jax.tree.map


def descend(u, g, length):
    return Tree(lambda x, y: x - length * y, u, g)


def every_second(length: float = 0.3) -> Controller:
    """Gradient descent that rejects every second trial, and tries half the step after that."""

    def init(free):
        return {"n": jnp.int32(0), "u": free, "g": Tree(jnp.zeros_like, free)}

    def update(grad, s, free, out):
        ok = s["n"] % 2 == 0
        point, slope = (Tree(lambda a, b: jnp.where(ok, a, b), x, y) for x, y in ((free, s["u"]), (grad, s["g"])))
        return (
            descend(point, slope, jnp.where(ok, length, length / 2)),
            {"n": s["n"] + 1, "u": point, "g": slope},
            ok,
        )

    return Controller(init, update)


def backtracking(length: float = 1.0, *, judged: bool = False, compares: bool = False, tol: float | None = None):
    """Gradient descent whose step is halved until the outer loss falls, and doubled where it did.

    With `judged`, the loss alone decides. With `tol`, the inner tolerance follows the length of the step.
    """

    def init(free):
        zero = Tree(jnp.zeros_like, free)
        return {"u": free, "g": zero, "value": jnp.asarray(jnp.inf), "length": jnp.asarray(length)}

    def shorter(s, failed):
        s = s | {"length": jnp.where(failed, s["length"] / 10, s["length"] / 2)}
        return descend(s["u"], s["g"], s["length"]), s

    def judge(value, s, free, info):
        proposed, refused = shorter(s, jnp.isinf(value))
        return proposed, Tree(lambda a, b: jnp.where(value < s["value"], a, b), s, refused), value < s["value"]

    def update(grad, s, free, out):
        ok = out.value < s["value"]
        proposed, refused = shorter(s, jnp.isinf(out.value))
        value = jnp.asarray(out.value, s["value"].dtype)
        taken = {"u": free, "g": grad, "value": value, "length": jnp.minimum(2 * s["length"], length)}
        ahead = descend(free, grad, taken["length"])
        pick = lambda a, b: jnp.where(ok, a, b)
        return Tree(pick, ahead, proposed), Tree(pick, taken, refused), ok

    def prepare(s, solver):
        return set_options(solver, {"inner.tol": tol * s["length"]})

    options = {} if tol is None else {"prepare": prepare}
    return Controller(init, update, judge=judge if judged else None, compares=compares, **options)


def failing(*at: int, length: float = 0.3) -> Controller:
    """Gradient descent that proposes what is not a number at some of its steps."""

    def init(free):
        return jnp.int32(0)

    def update(grad, n, free, out):
        bad = jnp.isin(n, jnp.asarray(at))
        ahead = descend(free, grad, length)
        return Tree(lambda x: jnp.where(bad, jnp.nan, x), ahead), n + 1, jnp.isfinite(out.value)

    return Controller(init, update)


def recording(steps: int, length: float = 0.1) -> Controller:
    """Rejects everything but the first, goes down in a straight line, and remembers what it was told."""

    def init(free):
        none = jnp.full(steps, jnp.nan)
        return {"n": jnp.int32(0), "value": none, "grad": none, "free": none, "status": jnp.full(steps, -1)}

    def update(grad, s, free, out):
        (g,), (u,) = jax.tree.leaves(grad), jax.tree.leaves(free)
        told = {"value": out.value, "grad": g, "free": u, "status": out.info.status}
        kept = {name: s[name].at[s["n"]].set(value) for name, value in told.items()}
        return Tree(lambda x: x + length, free), kept | {"n": s["n"] + 1}, jnp.bool_(False)

    return Controller(init, update)

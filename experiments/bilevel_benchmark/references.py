"""The single-loop methods as their papers print them, in plain JAX and nothing else: what ours are held against.

Each is `(g, f, train, valid, rates, steps) -> (start, step)` with `step(carry, (t, draws)) -> carry`: g and f are the
two losses, `draws` the indices of the blocks of training and validation rows, `rates` the step sizes of the parameters
and the adjoint, and of λ, functions of t. The carry begins with (w, v, λ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bilevel_benchmark.problems import BLOCK


class Setting(NamedTuple):
    """The losses, the data and the step sizes of a run."""

    g: Callable[..., Any]
    f: Callable[..., Any]
    train: Any
    valid: Any
    rate: Callable[[Any], Any]
    outer_rate: Callable[[Any], Any]
    steps: int = 1
    epsilon: float = 0.01


def cut(rows: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK), rows)


def blocks(rows: Any) -> int:
    return len(jax.tree.leaves(rows)[0]) // BLOCK


def inner_terms(g: Any, w: Any, v: Any, x: Any, rows: Any) -> Any:
    """∂_w g, ∂²_ww g v, ∂²_xw g v."""
    (slope, _), (hv, cv) = jax.jvp(lambda w: jax.grad(g, (0, 1))(w, x, rows), (w,), (v,))
    return slope, hv, cv


def soba(s: Setting) -> Any:
    def step(carry: Any, at: Any) -> Any:
        (w, v, x), (t, draws) = carry, at
        i, j = draws[0]
        slope, hv, cv = inner_terms(s.g, w, v, x, cut(s.train, i))
        fw, fx = jax.grad(s.f, (0, 1))(w, x, cut(s.valid, j))
        rho, gamma = s.rate(t), s.outer_rate(t)
        return w - rho * slope, v - rho * (hv + fw), x - gamma * (cv + fx)

    return lambda w, x: (w, jnp.zeros_like(w), x), step


def saba(s: Setting) -> Any:
    n, m = blocks(s.train), blocks(s.valid)

    def start(w: Any, x: Any) -> Any:
        zeros = lambda count, like: jnp.zeros((count, *like.shape), like.dtype)
        tables = [zeros(n, w), zeros(n, w), zeros(n, x), zeros(m, w), zeros(m, x)]
        return w, jnp.zeros_like(w), x, tables, [jnp.zeros_like(table[0]) for table in tables]

    def step(carry: Any, at: Any) -> Any:
        (w, v, x, tables, means), (t, draws) = carry, at
        i, j = draws[0]
        rows, counts = (i, i, i, j, j), (n, n, n, m, m)
        new = [
            *inner_terms(s.g, w, v, x, cut(s.train, i)),
            *jax.grad(s.f, (0, 1))(w, x, cut(s.valid, j)),
        ]
        old = [table[k] for table, k in zip(tables, rows, strict=True)]
        slope, hv, cv, fw, fx = (a - b + mean for a, b, mean in zip(new, old, means, strict=True))
        means = [mean + (a - b) / count for mean, a, b, count in zip(means, new, old, counts, strict=True)]
        tables = [table.at[k].set(a) for table, k, a in zip(tables, rows, new, strict=True)]
        rho, gamma = s.rate(t), s.outer_rate(t)
        return w - rho * slope, v - rho * (hv + fw), x - gamma * (cv + fx), tables, means

    return start, step


def amigo(s: Setting) -> Any:
    def step(carry: Any, at: Any) -> Any:
        (w, v, x), (t, draws) = carry, at
        rho, gamma = s.rate(t), s.outer_rate(t)
        w = lax.fori_loop(0, s.steps, lambda k, w: w - rho * jax.grad(s.g)(w, x, cut(s.train, draws[k, 0])), w)

        def solve(k: Any, v: Any) -> Any:
            _, hv, _ = inner_terms(s.g, w, v, x, cut(s.train, draws[k, 0]))
            return v - rho * (hv + jax.grad(s.f)(w, x, cut(s.valid, draws[k, 1])))

        v = lax.fori_loop(s.steps, 2 * s.steps, solve, v)
        i, j = draws[2 * s.steps]
        _, _, cv = inner_terms(s.g, w, v, x, cut(s.train, i))
        return w, v, x - gamma * (cv + jax.grad(s.f, 1)(w, x, cut(s.valid, j)))

    return lambda w, x: (w, jnp.zeros_like(w), x), step


def srba(s: Setting) -> Any:
    period = max(1, (blocks(s.train) + blocks(s.valid)) // 2)

    def directions(w: Any, v: Any, x: Any, train: Any, valid: Any) -> Any:
        slope, hv, cv = inner_terms(s.g, w, v, x, train)
        fw, fx = jax.grad(s.f, (0, 1))(w, x, valid)
        return slope, hv + fw, cv + fx

    def step(carry: Any, at: Any) -> Any:
        (*now, before, last), (t, draws) = carry, at
        i, j = draws[0]

        def follow() -> Any:
            rows = cut(s.train, i), cut(s.valid, j)
            return jax.tree.map(lambda a, b, c: a + (b - c), directions(*now, *rows), last, directions(*before, *rows))

        move = lax.cond(t % period == 0, lambda: directions(*now, s.train, s.valid), follow)
        rates = s.rate(t), s.rate(t), s.outer_rate(t)
        return (*(a - rate * d for a, rate, d in zip(now, rates, move, strict=True)), tuple(now), move)

    def start(w: Any, x: Any) -> Any:
        point = w, jnp.zeros_like(w), x
        return (*point, point, jax.tree.map(jnp.zeros_like, point))

    return start, step


def f2sa(s: Setting) -> Any:
    e = s.epsilon

    def slopes(w: Any, v: Any, x: Any, draw: Any) -> Any:
        train, valid = cut(s.train, draw[0]), cut(s.valid, draw[1])
        perturbed = lambda sign: jax.grad(lambda w, x: s.g(w, x, train) + sign * e * s.f(w, x, valid), (0, 1))
        up, down = perturbed(1)(w + e * v, x), perturbed(-1)(w - e * v, x)
        return (up[0] + down[0]) / 2, (up[0] - down[0]) / (2 * e), (up[1] - down[1]) / (2 * e)

    def step(carry: Any, at: Any) -> Any:
        (w, v, x), (t, draws) = carry, at
        rho, gamma = s.rate(t), s.outer_rate(t)

        def descend(k: Any, point: Any) -> Any:
            w, v = point
            dw, dv, _ = slopes(w, v, x, draws[k])
            return w - rho * dw, v - rho * dv

        w, v = lax.fori_loop(0, s.steps, descend, (w, v))
        return w, v, x - gamma * slopes(w, v, x, draws[s.steps])[2]

    return lambda w, x: (w, jnp.zeros_like(w), x), step


METHODS = {"soba": soba, "saba": saba, "amigo": amigo, "srba": srba, "f2sa": f2sa}
DRAWS = {
    "soba": lambda k: 1,
    "saba": lambda k: 1,
    "amigo": lambda k: 2 * k + 1,
    "srba": lambda k: 1,
    "f2sa": lambda k: k + 1,
}

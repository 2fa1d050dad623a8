r"""One outer step of T1 in plain JAX: what `hg.implicit` and Adam do, without what makes it general.

    L-BFGS to √tol, eight probes, one Newton-CG step, preconditioned warm-started CG, residuals and error estimate, Adam
    on λ

The same products in the same order, on arrays instead of pytrees, tolerances as constants; no statuses, no fallbacks,
no negative curvature, no checks, no scaling of right-hand sides. It is what a careful engineer would write for this one
problem, and what V6 holds the library against.

L-BFGS and the probes are the library's own building blocks, so that both take the same steps: what differs is all that
is around them. `optax_lbfgs=True` is the step of someone who takes `optax.lbfgs`, which starts afresh at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from hypergrad._problem import Objective


class State(NamedTuple):
    """What the next step starts from."""

    w: jax.Array
    v: jax.Array
    scale: jax.Array
    hparams: jax.Array
    opt: Any
    pairs: Any


def _optax_lbfgs(
    loss: Callable[[jax.Array], jax.Array], w: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    optimizer = optax.lbfgs(memory_size=10)
    evaluate = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        w, state, value, grad, count = carry
        updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        w = optax.apply_updates(w, updates)
        value, grad = evaluate(w, state=state)
        return w, state, value, grad, count + 1

    value, grad = jax.value_and_grad(loss)(w)
    w, _, _, _, count = jax.lax.while_loop(
        lambda c: jnp.linalg.norm(c[3]) > target, step, (w, optimizer.init(w), value, grad, 0)
    )
    return w, count


def _cg(
    product: Callable[[jax.Array], jax.Array], b: jax.Array, inverse: jax.Array, tol: Any, x: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solution, products, and the smallest Rayleigh quotient, which turns residuals into error estimates."""

    def warm(x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        ax = product(x)
        fit = jnp.sum(ax * b) / jnp.sum(ax**2)
        return fit * x, b - fit * ax, 1

    cold = lambda x: (jnp.zeros_like(b), b, 0)
    x, r, used = cold(b) if x is None else jax.lax.cond(jnp.any(x != 0), warm, cold, x)
    stop = tol * jnp.linalg.norm(b)
    z = inverse * r
    rz = jnp.sum(r * z)

    def step(carry: Any) -> Any:
        x, r, p, rz, pmp, low, count = carry
        ap = product(p)
        pap = jnp.sum(p * ap)
        alpha = rz / pap
        x, r = x + alpha * p, r - alpha * ap
        z = inverse * r
        fresh = jnp.sum(r * z)
        beta = fresh / rz
        return x, r, z + beta * p, fresh, fresh + beta**2 * pmp, jnp.minimum(low, pap / pmp), count + 1

    x, *_, low, count = jax.lax.while_loop(
        lambda c: jnp.linalg.norm(c[1]) > stop, step, (x, r, z, rz, rz, jnp.float32(jnp.inf), used)
    )
    return x, count, jnp.where(jnp.isfinite(low), low, 1)


def make_step(
    inner_loss: Callable[..., jax.Array],
    outer_loss: Callable[..., jax.Array],
    optimizer: Any,
    *,
    tol: float = 1e-6,
    optax_lbfgs: bool = False,
) -> tuple[Callable[..., State], Callable[..., Any]]:
    """`init(w, hparams) -> state` and the compiled `step(state, train, valid) -> (state, what it found)`."""

    lbfgs, jacobi = hg.inner.lbfgs(), hg.linear.jacobi()

    def init(w: jax.Array, hparams: jax.Array) -> State:
        pairs = None if optax_lbfgs else lbfgs.init(w, hparams)
        return State(w, jnp.zeros_like(w), jnp.zeros(()), hparams, optimizer.init(hparams), pairs)

    def minimise(state: State, train: Any, scale: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        if optax_lbfgs:
            loss = lambda w: inner_loss(w, state.hparams, train)
            w, count = _optax_lbfgs(loss, state.w, tol**0.5 * scale)
            return w, None, count
        fixed = lambda w, hparams: inner_loss(w, hparams, train)
        objective = Objective(stochastic=None, fixed=fixed, batch=None, fixed_batch=None)  # type: ignore[arg-type]
        options = {"tol": tol**0.5, "max_steps": 500}
        found = lbfgs.solve(objective, state.w, state.pairs, state.hparams, None, scale=scale, options=options)
        return found.params, found.state, found.steps

    @jax.jit
    def step(state: State, train: Any, valid: Any) -> tuple[State, dict[str, jax.Array]]:
        hparams = state.hparams
        loss = lambda w: inner_loss(w, hparams, train)
        gradient = jax.grad(loss)
        scale = jnp.where(state.scale > 0, state.scale, jnp.linalg.norm(gradient(state.w)))
        w, pairs, iterations = minimise(state, train, scale)

        residual, product = jax.linearize(gradient, w)
        inverse = jacobi(product, w, hparams, jax.random.key(0))(jnp.ones_like(w))

        def polish(carry: Any) -> Any:
            w, before, _, count = carry
            residual, product = jax.linearize(gradient, w)
            forcing = jnp.clip(0.3 * tol * scale / before, 1e-8, 0.1)
            trial = w - _cg(product, residual, inverse, forcing, None)[0]
            after = jnp.linalg.norm(gradient(trial))
            return jnp.where(after < before, trial, w), jnp.minimum(after, before), before, count + 1

        w, _, _, polished = jax.lax.while_loop(
            lambda c: (c[3] < 2) & ((c[3] == 0) | (c[1] > tol * scale)) & (c[1] < c[2]),
            polish,
            (w, jnp.linalg.norm(residual), jnp.float32(jnp.inf), 0),
        )
        residual, product = jax.linearize(gradient, w)
        size = jnp.maximum(jnp.linalg.norm(product(w)), jnp.linalg.norm(residual))

        value, rhs = jax.value_and_grad(outer_loss)(w, hparams, valid)
        v, count, low = _cg(product, rhs, inverse, tol / 2, state.v)
        at = lambda w, v: jax.jvp(lambda w: jax.grad(inner_loss, argnums=(0, 1))(w, hparams, train), (w,), (v,))[1]
        av, cross = at(w, v)
        gap = rhs - av

        # The library's estimate of the error: a second point, four times as far off as the optimum.
        norm, delta = jnp.linalg.norm, inverse * residual / low
        moved_product, moved_cross = at(w - 4 * delta, v)
        r = jax.grad(outer_loss)(w - 4 * delta, hparams, valid) - moved_product + 3 * gap
        epsilon = inverse * r / low
        change = norm(moved_cross - cross + at(w, epsilon)[1]) / (4 * norm(cross))
        share = change + norm(delta) / norm(w) + norm(epsilon) / (40 * norm(v))
        estimate = 4 * share / (1 - share)
        updates, opt = optimizer.update(-cross, state.opt, hparams)
        state = State(w, v, jnp.maximum(size, 0.1 * scale), optax.apply_updates(hparams, updates), opt, pairs)
        return state, {
            "value": value,
            "inner steps": iterations + polished,
            "cg steps": count,
            "error": estimate,
            "residual": jnp.linalg.norm(residual) / scale,
            "linear residual": jnp.linalg.norm(gap) / jnp.linalg.norm(rhs),
        }

    return init, step

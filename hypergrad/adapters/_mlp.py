r"""Weight decays of small perceptrons tuned while they train, as one compiled program, for `adapters.sklearn`.

    F(u) = mean over folds of loss(w_k, validation rows of fold k),   h = loss(w, the other rows) + ½ Σ exp(u_j) w_j²
    w_k ← 20 steps of Adam,   (G_k + diag(exp u) + δ) v_k ≈ ∂_w F in 10 products,   g_j = −mean over k of Σ exp(u_j) w v

with G the Gauss-Newton matrix, the sums over the weights that share u_j.

Source: Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590, with conjugate gradients in place of their Neumann series,
as in `hg.online`. Differs from `hg.tasks(hg.online(...))` in: a decay's mixed derivative is written down, folds are an
axis of one training run, and a grid of shared decays, from which the best is taken up again, runs in the same loop.
That compiles in a fifth of the time. The last "fold" trains on all rows along the same path and validates nothing: it
is the refit.
Cost: a call is 20 gradients and 10 products (two gradients each) on all rows, for each of k + 1 networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hypergrad._tree import axpy, safe_divide, vdot, where, zeros_like

STEPS = 20  # of Adam, in a call
STAGE = 10  # calls for each decay of the grid
_PRODUCTS = 10
_DAMPING = 1e-2  # a share of the curvature along the outer gradient
INNER, OUTER = optax.adam(1e-2), optax.adam(0.2)
_STALLED = 60  # calls in a row that gain nothing, which ends the search; a network overfits before its decays act
_LIMIT = (-20.0, 10.0)  # of a logarithm of a decay
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "logistic": jax.nn.sigmoid, "identity": lambda z: z}

Net = list[tuple[Array, Array]]  # weights `[inputs, units]` and biases `[units]` of each layer


class Data(NamedTuple):
    """What networks are tuned on; rows, columns and outputs that were added to reach a bucket's size weigh nothing.

    Attributes:
        x: `[n, d]`.
        y: targets `[n, c]`; for a classifier zeros and ones, one column a class.
        real: which outputs there are, zeros and ones `[c]`.
        train: weights of the rows in each fold's training loss, `[k + 1, n]`; the last are all rows.
        valid: weights in each fold's validation loss, `[k, n]`.
        first: which hyperparameter decays the weights of which input, integers `[d]`.
        rest: which one decays each further layer, integers `[layers - 1]`.
    """

    x: Array
    y: Array
    real: Array
    train: Array
    valid: Array
    first: Array
    rest: Array


class Tuned(NamedTuple):
    """The best call: its hyperparameters (logarithms), the networks of all folds `[k + 1, ...]`, the outer loss."""

    log: Array
    nets: Net
    value: Array


class Found(NamedTuple):
    """What a search ends with: the best call, the calls after the grid, and whether these had stopped gaining."""

    best: Tuned
    steps: Array
    converged: Array


def outputs(net: Net, x: Array, activation: Callable[[Array], Array]) -> Array:
    """`[n, c]`: logits, or predictions."""
    for i, (w, b) in enumerate(net):
        x = (x if i == 0 else activation(x)) @ w + b[None, :]
    return x


def squared(out: Array, y: Array, real: Array, weight: Array) -> Array:
    """Half the weighted mean of the squared errors."""
    return jnp.sum(weight[:, None] * real[None, :] * (out - y) ** 2) / (2 * _total(weight) * jnp.sum(real))


def log_loss(out: Array, y: Array, real: Array, weight: Array) -> Array:
    """Weighted mean of the negative log-likelihood of logits."""
    out = jnp.where(real[None, :] > 0, out, -1e9)
    return jnp.sum(weight * (jax.nn.logsumexp(out, axis=1) - jnp.sum(y * out, axis=1))) / _total(weight)


def _total(weight: Array) -> Array:
    total = jnp.sum(weight)
    return jnp.where(total > 0, total, 1.0)


LOSSES = {"squared": squared, "log_loss": log_loss}


def decays(log: Array, net: Net, data: Data) -> Net:
    """exp(u) for each weight, 0 for the biases."""
    strength = jnp.exp(jnp.clip(log, *_LIMIT))
    spread = [strength[data.first][:, None], *(strength[i] for i in data.rest)]
    return [(jnp.broadcast_to(a, w.shape), jnp.zeros_like(b)) for a, (w, b) in zip(spread, net, strict=True)]


def adjoint(product: Callable[[Any], Any], rhs: Any, products: int, damping: float) -> Any:
    """(A + δ)⁻¹ b by conjugate gradients; A is positive semidefinite, δ a share of its curvature along b."""
    shift = damping * safe_divide(vdot(rhs, product(rhs)), vdot(rhs, rhs))

    def step(_: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        v, r, p = carry
        ap = axpy(shift, p, product(p))
        rr = vdot(r, r)
        size = safe_divide(rr, vdot(p, ap), otherwise=0.0)
        r = axpy(-size, ap, r)
        return axpy(size, p, v), r, axpy(safe_divide(vdot(r, r), rr, otherwise=0.0), p, r)

    return jax.lax.fori_loop(0, products, step, (zeros_like(rhs), rhs, rhs))[0]


def hypergradient(
    net: Net,
    log: Array,
    data: Data,
    train: Array,
    valid: Array,
    *,
    loss: Any,
    activation: Any,
    products: int = _PRODUCTS,
    damping: float = _DAMPING,
) -> tuple[Array, Array]:
    """The validation loss of one fold at its network, and its hypergradient `[p]`."""
    forward = lambda net: outputs(net, data.x, activation)
    out, push = jax.linearize(forward, net)
    pull = jax.linear_transpose(push, net)
    curvature = jax.linearize(jax.grad(lambda out: loss(out, data.y, data.real, train)), out)[1]
    value, slope = jax.value_and_grad(lambda out: loss(out, data.y, data.real, valid))(out)
    strength = decays(log, net, data)
    gauss_newton = lambda v: jax.tree.map(lambda g, a, x: g + a * x, pull(curvature(push(v)))[0], strength, v)
    v = adjoint(gauss_newton, pull(slope)[0], products, damping)
    # ∂²h/∂u∂w v, from the derivative of Σ exp(u) w v, which is linear in the strengths.
    mixed = jax.grad(lambda log: vdot(decays(log, net, data), jax.tree.map(jnp.multiply, net, v)))
    return value, -mixed(log)


class _Carry(NamedTuple):
    log: Array
    outer: Any
    nets: Net
    adam: Any
    best: Tuned
    idle: Array
    calls: Array


@functools.cache
def program(kind: str, activation: str) -> Callable[[Data, Net, Array, Array, Array], Found]:
    """The compiled search; one for each loss and activation in this process, with a trace for each bucket of shapes.

    Args:
        kind: a key of `LOSSES`.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `(data, start, grid, max_iter, tol) -> Found`: `STAGE` calls at each decay of the grid `[g, p]`, each from the
        network `start`, then calls that move the decays, from the best, until `max_iter`, or until `_STALLED` calls
        have gained less than `tol`, relative to the loss.
    """
    loss, act = LOSSES[kind], ACTIVATIONS[activation]

    def train(net: Net, adam: Any, log: Array, data: Data, weight: Array) -> tuple[Net, Any]:
        strength = decays(log, net, data)
        fit = jax.grad(lambda net: loss(outputs(net, data.x, act), data.y, data.real, weight))

        def step(_: Any, carry: tuple[Net, Any]) -> tuple[Net, Any]:
            grad = jax.tree.map(lambda g, a, w: g + a * w, fit(carry[0]), strength, carry[0])
            updates, adam = INNER.update(grad, carry[1])
            return jax.tree.map(jnp.add, carry[0], updates), adam

        return jax.lax.fori_loop(0, STEPS, step, (net, adam))

    def search(data: Data, start: Net, grid: Array, max_iter: Array, tol: Array) -> Found:
        folds = len(data.train)
        fresh = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (folds, *leaf.shape)), start)
        still = jax.vmap(INNER.init)(fresh)
        valid = jnp.concatenate([data.valid, jnp.zeros_like(data.valid[:1])])
        stages = len(grid) * STAGE

        def call(c: _Carry) -> _Carry:
            moves = c.calls >= stages
            begins = ~moves & (c.calls % STAGE == 0)
            takes_up = c.calls == stages  # the best of the grid
            log = jnp.where(
                moves, jnp.where(takes_up, c.best.log, c.log), grid[jnp.minimum(c.calls // STAGE, len(grid) - 1)]
            )
            nets = where(begins, fresh, where(takes_up, c.best.nets, c.nets))
            adam = where(begins | takes_up, still, c.adam)
            nets, adam = jax.vmap(train, (0, 0, None, None, 0))(nets, adam, log, data, data.train)
            slope = functools.partial(hypergradient, loss=loss, activation=act)
            values, grads = jax.vmap(slope, (0, None, None, 0, 0))(nets, log, data, data.train, valid)
            value, grad = jnp.mean(values[:-1]), jnp.mean(grads[:-1], axis=0)
            usable = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
            value = jnp.where(usable, value, jnp.inf)
            gained = jnp.where(jnp.isfinite(c.best.value), c.best.value - value > tol * jnp.abs(value), usable)
            shift: Any
            shift, outer = OUTER.update(jnp.where(usable, grad, 0.0), c.outer)
            best = where(value < c.best.value, Tuned(log, nets, value), c.best)
            return _Carry(
                jnp.where(moves, jnp.clip(log + shift, *_LIMIT), log),
                where(moves, outer, c.outer),
                nets,
                adam,
                best,
                jnp.where(gained | ~moves, 0, c.idle + 1),
                c.calls + 1,
            )

        none = Tuned(grid[0], fresh, jnp.asarray(jnp.inf, data.x.dtype))
        begin = _Carry(grid[0], OUTER.init(grid[0]), fresh, still, none, jnp.int32(0), jnp.int32(0))
        go_on = lambda c: (c.calls < stages + max_iter) & (c.idle < _STALLED)
        end = jax.lax.while_loop(go_on, call, begin)
        return Found(end.best, end.calls - stages, end.idle >= _STALLED)

    return jax.jit(search)

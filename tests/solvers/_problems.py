"""Inner problems whose derivatives are written by hand, in NumPy and float64: what the solvers are compared with.

    g = ∂_λ f − (∂²_{λw} h) H⁻¹ ∂_w f,     H = ∂²_{ww} h,   at ∂_w h(w, λ) = 0

Each case is a `Problem` in JAX beside the same problem as an `Analytic`: no automatic differentiation, no code of the
library, one dense solve. Data are rounded to float32, so that both precisions solve the same problem; hyperparameters
are random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy import ndarray

import hypergrad as hg

PyTree = Any


class Analytic(NamedTuple):
    """Both losses by their derivatives, over flat vectors w `[d]` and λ `[p]`.

    Attributes:
        grad: ∂_w h, `[d]`.
        hess: ∂²_{ww} h, `[d, d]`.
        cross: ∂²_{λw} h, `[p, d]`.
        outer: f.
        outer_grads: (∂_w f, ∂_λ f), `[d]` and `[p]`.
        solve: λ ↦ w*, where Newton's method is not the way.
        active: w ↦ which coordinates move with λ, where not all do (L1).
    """

    grad: Callable[[ndarray, ndarray], ndarray]
    hess: Callable[[ndarray, ndarray], ndarray]
    cross: Callable[[ndarray, ndarray], ndarray]
    outer: Callable[[ndarray, ndarray], float]
    outer_grads: Callable[[ndarray, ndarray], tuple[ndarray, ndarray]]
    solve: Callable[[ndarray], ndarray] | None = None
    active: Callable[[ndarray], ndarray] | None = None


class Case(NamedTuple):
    """One problem with its data.

    Attributes:
        problem: both losses in JAX.
        params: zeros.
        hparams: pytree of float64 NumPy arrays.
        train, valid: pytrees of float64 NumPy arrays.
        analytic: the same, by hand.
    """

    problem: hg.Problem
    params: PyTree
    hparams: PyTree
    train: PyTree
    valid: PyTree
    analytic: Analytic

    def arrays(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """`params, hparams, train, valid` as JAX arrays of this run's precision."""
        return jax.tree.map(jnp.asarray, (self.params, self.hparams, self.train, self.valid))


def flatten(tree: PyTree) -> ndarray:
    """All leaves as one float64 vector, in the order of `jax.tree.leaves`."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def solution(case: Case, hparams: ndarray) -> ndarray:
    """w*(λ) to rounding, by damped Newton steps with dense solves, or by the problem's own closed form."""
    a = case.analytic
    if a.solve is not None:
        return a.solve(hparams)
    w = flatten(case.params)
    for _ in range(100):
        g = a.grad(w, hparams)
        d = np.linalg.solve(a.hess(w, hparams), g)
        t = 1.0
        while t > 1e-6 and not np.linalg.norm(a.grad(w - t * d, hparams)) < np.linalg.norm(g):
            t /= 2
        if t <= 1e-6:
            break
        w = w - t * d
    return w


def outer_value(case: Case, hparams: ndarray) -> float:
    """f(w*(λ), λ), for central differences of the re-solved problem."""
    return case.analytic.outer(solution(case, hparams), hparams)


def hypergradient(case: Case, hparams: ndarray | None = None) -> ndarray:
    """The closed form at the top of this file, `[p]`."""
    a, h = case.analytic, flatten(case.hparams) if hparams is None else hparams
    w = solution(case, h)
    f_w, f_h = a.outer_grads(w, h)
    s = np.ones(w.shape, bool) if a.active is None else a.active(w)
    v = np.linalg.solve(a.hess(w, h)[np.ix_(s, s)], f_w[s])
    return f_h - a.cross(w, h)[:, s] @ v


def rounded(x: Any) -> ndarray:
    """Float64 values that float32 holds exactly."""
    return np.asarray(x, np.float32).astype(np.float64)


def regression_data(rng: np.random.Generator, n: int = 30, d: int = 6, noise: float = 0.5) -> tuple[tuple, tuple]:
    """Two samples (X, y) of one linear model with correlated features."""
    mix = np.eye(d) + 0.4 * rng.normal(size=(d, d))
    w = rng.normal(size=d)

    def sample(rows: int) -> tuple[ndarray, ndarray]:
        x = rounded(rng.normal(size=(rows, d)) @ mix)
        return x, rounded(x @ w + noise * rng.normal(size=rows))

    return sample(n), sample(n - 7)


def label_data(rng: np.random.Generator, n: int = 40, d: int = 5) -> tuple[tuple, tuple]:
    """As `regression_data`, with labels ±1."""
    train, valid = regression_data(rng, n, d, noise=1.0)
    return tuple((x, np.where(y > 0, 1.0, -1.0)) for x, y in (train, valid))  # pyright: ignore[reportReturnType]


def squares(valid: tuple[ndarray, ndarray], p: int) -> dict[str, Callable]:
    """The outer loss ½ mean (Xw − y)², by hand."""
    x, y = valid
    return {
        "outer": lambda w, h: 0.5 * np.mean((x @ w - y) ** 2),
        "outer_grads": lambda w, h: (x.T @ (x @ w - y) / len(y), np.zeros(p)),
    }


def half_mse(w, hparams, batch):
    """The outer loss ½ mean (Xw − y)², in JAX."""
    del hparams
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def ridge(kind: str) -> Case:
    """h = ½ mean (Xw − y)² + ½ Σ ρᵢ wᵢ²; ρ is λ, exp λ, or exp λᵢ."""
    rng = np.random.default_rng(1)
    train, valid = regression_data(rng)
    (x, y), d = train, train[0].shape[1]
    hparams = {"scalar": rng.uniform(0.2, 0.7), "log": rng.normal(), "per coordinate": rng.normal(size=d)}[kind]
    rho, rho_grad = {
        "scalar": (lambda h: h * np.ones(d), lambda h: np.ones((1, d))),
        "log": (lambda h: np.exp(h) * np.ones(d), lambda h: np.exp(h) * np.ones((1, d))),
        "per coordinate": (np.exp, lambda h: np.diag(np.exp(h))),
    }[kind]
    strength = (lambda h: h) if kind == "scalar" else jnp.exp
    problem = hg.Problem(lambda w, h, b: half_mse(w, h, b) + 0.5 * jnp.sum(strength(h) * w**2), half_mse)
    analytic = Analytic(
        grad=lambda w, h: x.T @ (x @ w - y) / len(y) + rho(h) * w,
        hess=lambda w, h: x.T @ x / len(y) + np.diag(rho(h)),
        cross=lambda w, h: rho_grad(h) * w,
        **squares(valid, np.size(hparams)),
    )
    return Case(problem, np.zeros(d), np.asarray(rounded(hparams)), train, valid, analytic)


def tikhonov() -> Case:
    """h = ½ mean (Xw − y)² + ½ ‖Lw‖², with the whole matrix L `[k, d]` as hyperparameter."""
    rng = np.random.default_rng(2)
    train, valid = regression_data(rng)
    (x, y), d, k = train, train[0].shape[1], 4

    def cross(w: ndarray, h: ndarray) -> ndarray:
        m = h.reshape(k, d)
        # ∂(LᵀLw)_c / ∂L_ij = δ_jc (Lw)_i + L_ic w_j
        return (np.einsum("jc,i->ijc", np.eye(d), m @ w) + np.einsum("ic,j->ijc", m, w)).reshape(k * d, d)

    problem = hg.Problem(lambda w, h, b: half_mse(w, h, b) + 0.5 * jnp.sum((h @ w) ** 2), half_mse)
    analytic = Analytic(
        grad=lambda w, h: x.T @ (x @ w - y) / len(y) + h.reshape(k, d).T @ h.reshape(k, d) @ w,
        hess=lambda w, h: x.T @ x / len(y) + h.reshape(k, d).T @ h.reshape(k, d),
        cross=cross,
        **squares(valid, k * d),
    )
    return Case(problem, np.zeros(d), rounded(0.7 * rng.normal(size=(k, d))), train, valid, analytic)


def example_weights() -> Case:
    """h = ½ mean σ(λᵢ) rᵢ² + 0.15 ‖w‖²: one weight per training example."""
    rng = np.random.default_rng(3)
    train, valid = regression_data(rng)
    (x, y), d, n = train, train[0].shape[1], len(train[1])
    sigmoid = lambda h: 1 / (1 + np.exp(-h))
    slope = lambda h: sigmoid(h) * (1 - sigmoid(h))
    problem = hg.Problem(
        lambda w, h, b: 0.5 * jnp.mean(jax.nn.sigmoid(h) * (b[0] @ w - b[1]) ** 2) + 0.15 * jnp.sum(w**2), half_mse
    )
    analytic = Analytic(
        grad=lambda w, h: x.T @ (sigmoid(h) * (x @ w - y)) / n + 0.3 * w,
        hess=lambda w, h: x.T @ (sigmoid(h)[:, None] * x) / n + 0.3 * np.eye(d),
        cross=lambda w, h: (slope(h) * (x @ w - y))[:, None] * x / n,
        **squares(valid, n),
    )
    return Case(problem, np.zeros(d), rounded(rng.normal(size=n)), train, valid, analytic)


def data_as_hparams(which: str) -> Case:
    """h = ½ mean (Xw − y)² + 0.2 ‖w‖², with y or X as the hyperparameters."""
    rng = np.random.default_rng(4)
    train, valid = regression_data(rng, n=20, d=4)
    (x, y), n, d = train, 20, 4
    inputs = which == "inputs"
    at = (lambda h: (h.reshape(n, d), y)) if inputs else (lambda h: (x, h))

    def cross(w: ndarray, h: ndarray) -> ndarray:
        a, b = at(h)
        if not inputs:
            return -a / n
        # ∂(Aᵀ(Aw − b))_c / ∂A_ij = δ_jc rᵢ + A_ic w_j
        both = np.einsum("jc,i->ijc", np.eye(d), a @ w - b) + np.einsum("ic,j->ijc", a, w)
        return both.reshape(n * d, d) / n

    def inner(w, h, batch):
        data = (h, batch[1]) if inputs else (batch[0], h)
        return half_mse(w, h, data) + 0.2 * jnp.sum(w**2)

    def grad(w: ndarray, h: ndarray) -> ndarray:
        a, b = at(h)
        return a.T @ (a @ w - b) / n + 0.4 * w

    hparams = x + rounded(0.3 * rng.normal(size=(n, d))) if inputs else y + rounded(0.3 * rng.normal(size=n))
    analytic = Analytic(
        grad=grad,
        hess=lambda w, h: at(h)[0].T @ at(h)[0] / n + 0.4 * np.eye(d),
        cross=cross,
        **squares(valid, np.size(hparams)),
    )
    return Case(hg.Problem(inner, half_mse), np.zeros(d), rounded(hparams), train, valid, analytic)


def direct_terms() -> Case:
    """Ridge whose outer loss depends on λ itself: f = ½ mean (Xw − y)² + ½ e^{2λ₀} ‖w‖² + sin λ₀ cos λ₁."""
    rng = np.random.default_rng(5)
    train, valid = regression_data(rng)
    (x, y), (xv, yv), d = train, valid, train[0].shape[1]

    def outer(w, h, batch):
        return half_mse(w, h, batch) + 0.5 * jnp.exp(2 * h[0]) * jnp.sum(w**2) + jnp.sin(h[0]) * jnp.cos(h[1])

    def outer_grads(w: ndarray, h: ndarray) -> tuple[ndarray, ndarray]:
        return (
            xv.T @ (xv @ w - yv) / len(yv) + np.exp(2 * h[0]) * w,
            np.array([np.exp(2 * h[0]) * w @ w + np.cos(h[0]) * np.cos(h[1]), -np.sin(h[0]) * np.sin(h[1])]),
        )

    problem = hg.Problem(lambda w, h, b: half_mse(w, h, b) + 0.5 * jnp.exp(h[0] + h[1]) * jnp.sum(w**2), outer)
    analytic = Analytic(
        grad=lambda w, h: x.T @ (x @ w - y) / len(y) + np.exp(h[0] + h[1]) * w,
        hess=lambda w, h: x.T @ x / len(y) + np.exp(h[0] + h[1]) * np.eye(d),
        cross=lambda w, h: np.exp(h[0] + h[1]) * np.stack([w, w]),
        outer_grads=outer_grads,
        outer=lambda w, h: float(
            0.5 * np.mean((xv @ w - yv) ** 2) + 0.5 * np.exp(2 * h[0]) * w @ w + np.sin(h[0]) * np.cos(h[1])
        ),
    )
    return Case(problem, np.zeros(d), rounded(rng.normal(size=2) * 0.6), train, valid, analytic)


def odd_pytree() -> Case:
    """h = ½ wᵀAw + ½ Σ exp(Pλ)ᵢ wᵢ² − (Bλ + c)ᵀw over trees with None, tuples, scalars, nesting; f = ½‖Cw − e‖² + ½
    λᵀDλ."""
    rng = np.random.default_rng(6)
    params = {"a": (np.zeros(()), None, np.zeros(3)), "b": [np.zeros((2, 2)), {"c": ()}]}
    hparams = {
        "x": rounded(rng.normal()),
        "y": (rounded(rng.normal(size=3)), None),
        "z": [rounded(rng.normal(size=(2, 1)))],
    }
    d, p = 8, 6
    root = rng.normal(size=(d, d))
    a = rounded(root @ root.T / d + 0.5 * np.eye(d))
    mix, b, c, cc, e, dd = (rounded(rng.normal(size=s) * 0.5) for s in ((d, p), (d, p), d, (5, d), 5, p))

    def inner(w, h, batch):
        a, mix, b, c = batch
        w, h = ravel_pytree(w)[0], ravel_pytree(h)[0]
        return 0.5 * w @ a @ w + 0.5 * jnp.sum(jnp.exp(mix @ h) * w**2) - (b @ h + c) @ w

    def outer(w, h, batch):
        cc, e, dd = batch
        w, h = ravel_pytree(w)[0], ravel_pytree(h)[0]
        return 0.5 * jnp.sum((cc @ w - e) ** 2) + 0.5 * jnp.sum(dd * h**2)

    analytic = Analytic(
        grad=lambda w, h: a @ w + np.exp(mix @ h) * w - b @ h - c,
        hess=lambda w, h: a + np.diag(np.exp(mix @ h)),
        cross=lambda w, h: (mix * (np.exp(mix @ h) * w)[:, None] - b).T,
        outer=lambda w, h: float(0.5 * np.sum((cc @ w - e) ** 2) + 0.5 * np.sum(dd * h**2)),
        outer_grads=lambda w, h: (cc.T @ (cc @ w - e), dd * h),
    )
    return Case(hg.Problem(inner, outer), params, hparams, (a, mix, b, c), (cc, e, dd), analytic)


def kernel_ridge() -> Case:
    """h = ½ αᵀ(K + ρI)α − yᵀα, K = exp(−‖x − x'‖²/2ℓ²), λ = (log ℓ, log ρ); f = ½ mean (K_v α − y_v)² sees ℓ
    directly."""
    rng = np.random.default_rng(7)
    (x, y), (xv, yv) = regression_data(rng, n=18, d=2)
    sq = lambda u, v: np.sum((u[:, None] - v[None]) ** 2, -1)
    gram = lambda s, h: np.exp(-0.5 * s * np.exp(-2 * h[0]))
    gram_slope = lambda s, h: gram(s, h) * s * np.exp(-2 * h[0])  # ∂K/∂log ℓ
    st, sv, n = sq(x, x), sq(xv, x), len(y)

    def distances(u, v):
        return jnp.sum((u[:, None] - v[None]) ** 2, -1)

    def inner(w, h, batch):
        x, y = batch
        return 0.5 * w @ jnp.exp(-0.5 * distances(x, x) * jnp.exp(-2 * h[0])) @ w + 0.5 * jnp.exp(h[1]) * w @ w - y @ w

    def outer(w, h, batch):
        x, xv, yv = batch
        return 0.5 * jnp.mean((jnp.exp(-0.5 * distances(xv, x) * jnp.exp(-2 * h[0])) @ w - yv) ** 2)

    def outer_grads(w: ndarray, h: ndarray) -> tuple[ndarray, ndarray]:
        r = (gram(sv, h) @ w - yv) / len(yv)
        return gram(sv, h).T @ r, np.array([r @ gram_slope(sv, h) @ w, 0.0])

    analytic = Analytic(
        grad=lambda w, h: gram(st, h) @ w + np.exp(h[1]) * w - y,
        hess=lambda w, h: gram(st, h) + np.exp(h[1]) * np.eye(n),
        cross=lambda w, h: np.stack([gram_slope(st, h) @ w, np.exp(h[1]) * w]),
        outer=lambda w, h: float(0.5 * np.mean((gram(sv, h) @ w - yv) ** 2)),
        outer_grads=outer_grads,
    )
    return Case(
        hg.Problem(inner, outer),
        np.zeros(n),
        rounded([0.4, -1.3] + 0.2 * rng.normal(size=2)),
        (x, y),
        (x, xv, yv),
        analytic,
    )

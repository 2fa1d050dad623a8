"""Inner problems beyond least squares, with derivatives by hand as in `_problems.py`: likelihoods, Huber, L1, bad
scaling."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

import hypergrad as hg
from tests.solvers._problems import Analytic, Case, half_mse, label_data, regression_data, rounded, squares


def logistic_loss(w, hparams, batch):
    """Mean log(1 + exp(−y xᵀw)), in JAX."""
    del hparams
    x, y = batch
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))


def logistic() -> Case:
    """h = mean log(1 + exp(−y xᵀw)) + ½ Σ exp(λᵢ) wᵢ²."""
    rng = np.random.default_rng(11)
    train, valid = label_data(rng)
    (x, y), (xv, yv), d = train, valid, train[0].shape[1]
    sigmoid = lambda z: 1 / (1 + np.exp(-z))

    def slope(w: ndarray, x: ndarray, y: ndarray) -> ndarray:
        return x.T @ (-y * sigmoid(-y * (x @ w))) / len(y)

    def hess(w: ndarray, h: ndarray) -> ndarray:
        s = sigmoid(x @ w)
        return x.T @ ((s * (1 - s))[:, None] * x) / len(y) + np.diag(np.exp(h))

    problem = hg.Problem(lambda w, h, b: logistic_loss(w, h, b) + 0.5 * jnp.sum(jnp.exp(h) * w**2), logistic_loss)
    analytic = Analytic(
        grad=lambda w, h: slope(w, x, y) + np.exp(h) * w,
        hess=hess,
        cross=lambda w, h: np.diag(np.exp(h) * w),
        outer=lambda w, h: float(np.mean(np.logaddexp(0, -yv * (xv @ w)))),
        outer_grads=lambda w, h: (slope(w, xv, yv), np.zeros(d)),
    )
    return Case(problem, np.zeros(d), rounded(rng.normal(size=d) - 2.5), train, valid, analytic)


def softmax() -> Case:
    """h = mean cross entropy of softmax(xᵀW) + ½ Σ_c exp(λ_c) ‖W_c‖²: a decay for each class, parameters `[d, k]`."""
    rng = np.random.default_rng(12)
    d, k = 4, 3
    teacher = rng.normal(size=(d, k))

    def sample(n: int) -> tuple[ndarray, ndarray]:
        x = rounded(rng.normal(size=(n, d)))
        return x, np.eye(k)[np.argmax(x @ teacher + rng.gumbel(size=(n, k)), 1)]

    train, valid = sample(40), sample(33)
    (x, y), (xv, yv) = train, valid

    def probability(x: ndarray, w: ndarray) -> ndarray:
        z = x @ w.reshape(d, k)
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def slope(w: ndarray, x: ndarray, y: ndarray) -> ndarray:
        return (x.T @ (probability(x, w) - y) / len(y)).ravel()

    def hess(w: ndarray, h: ndarray) -> ndarray:
        p = probability(x, w)
        inside = p[:, :, None] * np.eye(k) - p[:, :, None] * p[:, None, :]
        return np.einsum("ia,ib,icd->acbd", x, x, inside).reshape(d * k, d * k) / len(y) + np.diag(
            np.tile(np.exp(h), d)
        )

    def cross(w: ndarray, h: ndarray) -> ndarray:
        return np.stack([(np.exp(h[c]) * w.reshape(d, k) * (np.arange(k) == c)).ravel() for c in range(k)])

    def loss(w, h, batch):
        x, y = batch
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(x @ w), axis=1))

    problem = hg.Problem(lambda w, h, b: loss(w, h, b) + 0.5 * jnp.sum(jnp.exp(h)[None, :] * w**2), loss)
    analytic = Analytic(
        grad=lambda w, h: slope(w, x, y) + np.tile(np.exp(h), d) * w,
        hess=hess,
        cross=cross,
        outer=lambda w, h: float(-np.mean(np.sum(yv * np.log(probability(xv, w)), 1))),
        outer_grads=lambda w, h: (slope(w, xv, yv), np.zeros(k)),
    )
    return Case(problem, np.zeros((d, k)), rounded(rng.normal(size=k) - 2), train, valid, analytic)


def poisson() -> Case:
    """h = mean (exp(xᵀw) − y xᵀw) + ½ e^λ ‖w‖², counts y; f the same without the penalty."""
    rng = np.random.default_rng(13)
    d = 4
    teacher = 0.5 * rng.normal(size=d)

    def sample(n: int) -> tuple[ndarray, ndarray]:
        x = rounded(0.7 * rng.normal(size=(n, d)))
        return x, rng.poisson(np.exp(x @ teacher + 0.3)).astype(np.float64)

    train, valid = sample(40), sample(33)
    (x, y), (xv, yv) = train, valid

    def loss(w, h, batch):
        x, y = batch
        return jnp.mean(jnp.exp(x @ w) - y * (x @ w))

    def hess(w: ndarray, h: ndarray) -> ndarray:
        return x.T @ (np.exp(x @ w)[:, None] * x) / len(y) + np.exp(h[0]) * np.eye(d)

    problem = hg.Problem(lambda w, h, b: loss(w, h, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2), loss)
    analytic = Analytic(
        grad=lambda w, h: x.T @ (np.exp(x @ w) - y) / len(y) + np.exp(h[0]) * w,
        hess=hess,
        cross=lambda w, h: np.exp(h[0]) * w[None],
        outer=lambda w, h: float(np.mean(np.exp(xv @ w) - yv * (xv @ w))),
        outer_grads=lambda w, h: (xv.T @ (np.exp(xv @ w) - yv) / len(yv), np.zeros(1)),
    )
    return Case(problem, np.zeros(d), np.asarray(rounded(rng.normal() - 1.5)), train, valid, analytic)


def huber() -> Case:
    """h = mean huber_δ(xᵀw − y) + ½ ρ ‖w‖², λ = (log δ, log ρ): the threshold acts on the outliers alone."""
    rng = np.random.default_rng(14)
    (x, y), valid = regression_data(rng, n=40, d=5)
    y = rounded(y + (rng.uniform(size=40) < 0.2) * 6 * rng.normal(size=40))
    train, d = (x, y), 5

    def inner(w, h, batch):
        x, y = batch
        delta, r = jnp.exp(h[0]), x @ w - y
        size = jnp.abs(r)
        return jnp.mean(jnp.where(size < delta, 0.5 * r**2, delta * size - 0.5 * delta**2)) + 0.5 * jnp.exp(
            h[1]
        ) * jnp.sum(w**2)

    def cross(w: ndarray, h: ndarray) -> ndarray:
        r, delta = x @ w - y, np.exp(h[0])
        return np.stack([x.T @ (delta * np.sign(r) * (abs(r) > delta)) / len(y), np.exp(h[1]) * w])

    analytic = Analytic(
        grad=lambda w, h: x.T @ np.clip(x @ w - y, -np.exp(h[0]), np.exp(h[0])) / len(y) + np.exp(h[1]) * w,
        hess=lambda w, h: x.T @ ((abs(x @ w - y) < np.exp(h[0]))[:, None] * x) / len(y) + np.exp(h[1]) * np.eye(d),
        cross=cross,
        **squares(valid, 2),
    )
    return Case(
        hg.Problem(inner, half_mse),
        np.zeros(d),
        rounded([-0.2, -2.1] + 0.2 * rng.normal(size=2)),
        train,
        valid,
        analytic,
    )


def l1(ridge: bool) -> tuple[Case, Callable]:
    """h = ½ mean (Xw − y)² + e^{λ₀} ‖w‖₁ (+ ½ e^{λ₁} ‖w‖²), and the proximal gradient step whose fixed point is its
    minimum.

    On the active set S, with signs s:  w_S = (X_SᵀX_S/n + ρI)⁻¹ (X_Sᵀy/n − ‖·‖₁-strength · s).
    """
    rng = np.random.default_rng(15)
    d, n = 10, 30
    teacher = np.where(np.arange(d) < 4, 2 * rng.normal(size=d), 0)

    def sample(n: int) -> tuple[ndarray, ndarray]:
        x = rounded(rng.normal(size=(n, d)))
        return x, rounded(x @ teacher + 0.5 * rng.normal(size=n))

    train, valid = sample(n), sample(25)
    x, y = train
    step = float(np.float32(1 / (np.linalg.eigvalsh(x.T @ x / n)[-1] + 0.5)))
    p = 2 if ridge else 1
    rho = (lambda h: np.exp(h[1])) if ridge else (lambda h: 0.0)

    def proximal_step(w, h, batch):
        x, y = batch
        slope = x.T @ (x @ w - y) / n + (jnp.exp(h[1]) * w if ridge else 0)
        z = w - step * slope
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - step * jnp.exp(h[0]), 0)

    def solve(h: ndarray) -> ndarray:
        w = np.zeros(d)
        gram, b = x.T @ x / n + rho(h) * np.eye(d), x.T @ y / n
        for _ in range(3000):
            z = w - step * (gram @ w - b)
            w = np.sign(z) * np.maximum(abs(z) - step * np.exp(h[0]), 0)
        s = w != 0
        w[s] = np.linalg.solve(gram[np.ix_(s, s)], b[s] - np.exp(h[0]) * np.sign(w[s]))
        return w

    analytic = Analytic(
        grad=lambda w, h: x.T @ (x @ w - y) / n + rho(h) * w + np.exp(h[0]) * np.sign(w),
        hess=lambda w, h: x.T @ x / n + rho(h) * np.eye(d),
        cross=lambda w, h: np.stack([np.exp(h[0]) * np.sign(w), rho(h) * w][:p]),
        solve=solve,
        active=lambda w: w != 0,
        **squares(valid, p),
    )
    hparams = rounded(np.array([-1.6, -1.9])[:p] + 0.2 * rng.normal(size=p))
    return Case(hg.Problem(None, half_mse), np.zeros(d), hparams, train, valid, analytic), proximal_step


def diagonal(forces: str, spread: float = 1e8) -> Case:
    """h = ½ Σ sᵢ exp(λᵢ) wᵢ² − bᵀw, s from 1 to `spread`; forces bᵢ of order 1, or of order sᵢ (so that all wᵢ are of
    order 1)."""
    rng = np.random.default_rng(16)
    d = 9
    s = rounded(np.logspace(0, np.log10(spread), d))
    b = rounded(rng.normal(size=d) * (s if forces == "large" else 1))
    e, weight = rounded(b / s * (1 + rng.normal(size=d))), s  # the outer loss is an energy too
    problem = hg.Problem(
        lambda w, h, batch: 0.5 * jnp.sum(batch[0] * jnp.exp(h) * w**2) - jnp.sum(batch[1] * w),
        lambda w, h, batch: 0.5 * jnp.sum(batch[1] * (w - batch[0]) ** 2),
    )
    analytic = Analytic(
        grad=lambda w, h: s * np.exp(h) * w - b,
        hess=lambda w, h: np.diag(s * np.exp(h)),
        cross=lambda w, h: np.diag(s * np.exp(h) * w),
        outer=lambda w, h: float(0.5 * np.sum(weight * (w - e) ** 2)),
        outer_grads=lambda w, h: (weight * (w - e), np.zeros(d)),
    )
    return Case(problem, np.zeros(d), rounded(0.5 * rng.normal(size=d)), (s, b), (e, weight), analytic)

"""The bilevel problems of the benchmark, on made-up data of the shapes that its own downloads have.

Each has both losses as means over rows, and an evaluator of ‖∇F(λ)‖² in float64 NumPy that solves the inner problem
exactly: it is what every method's iterates are scored by, outside of any timer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

BLOCK = 64


class Task(NamedTuple):
    """A bilevel problem.

    Attributes:
        name: for the tables.
        problem: losses of `(w, λ, rows)`.
        train, valid: arrays of rows, a multiple of `BLOCK` of them.
        params, hparams: where every method starts.
        score: λ -> ‖∇F(λ)‖², exact.
        rates, outer_rates: the grids of step sizes of w, and of λ over w.
    """

    name: str
    problem: hg.Problem
    train: Any
    valid: Any
    params: Any
    hparams: Any
    score: Callable[[np.ndarray], float]
    rates: tuple[float, ...]
    outer_rates: tuple[float, ...]


def simulated(rows: int, dimension: int, seed: int) -> Task:
    """A quadratic each of whose rows has terms of its own.

    h = mean ½ (aᵢᵀw)² + (aᵢᵀw)(bᵢᵀλ) − yᵢ aᵢᵀw + ½ μ ‖w‖²,  f = mean ½ (cⱼᵀw − tⱼ)² + ½ (dⱼᵀλ)² + ½ μ ‖λ‖²
    """
    rng, mu = np.random.default_rng(seed), 0.1
    draw = lambda scale: scale * rng.normal(size=(rows, dimension))
    a, b, c, d = draw(1.0), draw(0.3), draw(1.0), draw(0.3)
    for x in (a, c):  # directions of curvatures from 1 down to a hundredth
        x *= np.logspace(0, -1, dimension)
        x /= np.linalg.norm(x, 2) / rows**0.5
    y, t = rng.normal(size=rows), rng.normal(size=rows)

    def inner(w: Any, h: Any, rows: Any) -> Any:
        a, b, y = rows
        out = a @ w
        return jnp.mean(0.5 * out**2 + out * (b @ h - y)) + 0.5 * mu * jnp.sum(w**2)

    def outer(w: Any, h: Any, rows: Any) -> Any:
        c, d, t = rows
        return jnp.mean(0.5 * (c @ w - t) ** 2 + 0.5 * (d @ h) ** 2) + 0.5 * mu * jnp.sum(h**2)

    hessian = a.T @ a / rows + mu * np.eye(dimension)
    cross, slope = a.T @ b / rows, a.T @ y / rows
    of_w, of_h = c.T @ c / rows, d.T @ d / rows + mu * np.eye(dimension)

    def score(h: np.ndarray) -> float:
        w = np.linalg.solve(hessian, slope - cross @ h)
        v = np.linalg.solve(hessian, of_w @ w - c.T @ t / rows)
        return float(np.sum((of_h @ h - cross.T @ v) ** 2))

    arrays = lambda *x: tuple(map(jnp.asarray, x))
    start = jnp.zeros(dimension, jnp.float64), -2 * jnp.ones(dimension, jnp.float64)
    return Task(
        f"simulated {rows:,}", hg.Problem(inner, outer), arrays(a, b, y), arrays(c, d, t), *start, score,
        (0.03, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0),
    )  # fmt: skip


def ijcnn1(rows: tuple[int, int], seed: int) -> Task:
    """Binary logistic regression with a penalty for each of 22 features, on 49,990 and 91,701 rows less a remainder.

    The data are made up: features in [−1, 1], a tenth of positive labels from a noisy linear rule.
    """
    rng, dimension = np.random.default_rng(seed), 22
    n, m = (BLOCK * (count // BLOCK) for count in rows)
    x = np.clip(0.4 * rng.normal(size=(n + m, dimension)), -1, 1)
    x[:, :10] = rng.random((n + m, 10)) < 0.1  # ten of the 22 say which of ten phases a row is in
    signal = x @ rng.normal(size=dimension) + 0.5 * rng.normal(size=n + m)
    y = np.where(signal > np.quantile(signal, 0.9), 1.0, -1.0)
    xt, yt, xv, yv = x[:n], y[:n], x[n:], y[n:]

    fit = lambda w, rows: jnp.mean(jnp.logaddexp(0, -rows[1] * (rows[0] @ w)))
    problem = hg.Problem(
        lambda w, h, rows: fit(w, rows) + 0.5 * jnp.sum(jnp.exp(h) * w**2), lambda w, h, rows: fit(w, rows)
    )
    warm = [np.zeros(dimension)]

    def score(h: np.ndarray) -> float:
        w, decay = warm[0], np.exp(h)
        for _ in range(50):
            p = 1 / (1 + np.exp(np.clip(yt * (xt @ w), -60, 60)))
            grad = -xt.T @ (yt * p) / n + decay * w
            hessian = (xt.T * (p * (1 - p))) @ xt / n + np.diag(decay)
            step = np.linalg.solve(hessian, grad)
            w = w - step
            if np.linalg.norm(step) < 1e-11 * max(1.0, float(np.linalg.norm(w))):
                break
        warm[0] = w if np.all(np.isfinite(w)) else np.zeros(dimension)
        p = 1 / (1 + np.exp(yv * (xv @ w)))
        v = np.linalg.solve(hessian, -xv.T @ (yv * p) / m)
        return float(np.sum((decay * w * v) ** 2))

    single = lambda *arrays: tuple(jnp.asarray(array, jnp.float32) for array in arrays)
    start = single(rng.normal(size=dimension), np.log(rng.random(dimension)))
    return Task(
        "ijcnn1's shape",
        problem,
        single(xt, yt),
        single(xv, yv),
        *start,
        score,
        (0.03, 0.1, 0.3),
        (0.3, 1.0, 3.0, 10.0),
    )


def _softmax(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and their differences from the labels."""
    logits = x @ w
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return p, p - np.eye(w.shape[1])[y]


class _Newton:
    """The exact solution of a weighted and penalised softmax regression, from where the last one ended."""

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int) -> None:
        self.x, self.y, self.w = x, y, np.zeros((x.shape[1], classes))

    def __call__(self, weights: np.ndarray, decay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters, Hessian, and `x_i` times what each row's loss derives to, of `mean weights ℓ + ½ Σ decay w²`."""
        x, y, w = self.x, self.y, self.w
        n, size = len(x), w.size
        hessian, gap = np.eye(size), np.zeros((n, w.shape[1]))
        for _ in range(30):
            p, gap = _softmax(x, y, w)
            grad = x.T @ (weights[:, None] * gap) / n + decay * w
            hessian = np.zeros((*w.shape, *w.shape))
            for i in range(w.shape[1]):  # class by class, so that no row's matrix is made
                for j in range(i, w.shape[1]):
                    curve = weights * p[:, i] * ((i == j) - p[:, j])
                    hessian[:, i, :, j] = hessian[:, j, :, i] = (x.T * curve) @ x / n
            hessian = hessian.reshape(size, size) + np.diag(np.broadcast_to(decay, w.shape).ravel())
            step = np.linalg.solve(hessian, grad.ravel()).reshape(w.shape)
            w = w - step
            if np.linalg.norm(step) < 1e-10 * max(1.0, float(np.linalg.norm(w))):
                break
        self.w = w if np.all(np.isfinite(w)) else np.zeros_like(w)
        return w, hessian, gap


def _labelled(rng: np.random.Generator, rows: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features of uneven sizes, and classes that a noisy linear rule gives."""
    x = rng.normal(size=(rows, features)) * np.logspace(0, -0.7, features)
    x[:, 0] = 1.0
    scores = 2 * x @ rng.normal(size=(features, classes)) + rng.gumbel(size=(rows, classes))
    return x, np.argmax(scores, 1)


def _cross_entropy(w: Any, x: Any, y: Any) -> Any:
    logits = x @ w
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]


def covtype(rows: tuple[int, int], seed: int) -> Task:
    """Softmax regression with 54 features and 7 classes, and a penalty for each feature; made-up data."""
    rng, (features, classes) = np.random.default_rng(seed), (54, 7)
    n, m = (BLOCK * (count // BLOCK) for count in rows)
    x, y = _labelled(rng, n + m, features, classes)
    xt, yt, xv, yv = x[:n], y[:n], x[n:], y[n:]
    outer = lambda w, h, rows: jnp.mean(_cross_entropy(w, *rows))
    inner = lambda w, h, rows: outer(w, h, rows) + 0.5 * jnp.sum(jnp.exp(h)[:, None] * w**2)
    newton = _Newton(xt, yt, classes)

    def score(h: np.ndarray) -> float:
        decay = np.exp(h)[:, None]
        w, hessian, _ = newton(np.ones(n), decay)
        slope = xv.T @ _softmax(xv, yv, w)[1] / m
        v = np.linalg.solve(hessian, slope.ravel()).reshape(w.shape)
        return float(np.sum(np.sum(decay * w * v, 1) ** 2))

    data = lambda x, y: (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    start = jnp.zeros((features, classes), jnp.float32), jnp.full(features, -3.0, jnp.float32)
    return Task(
        "covtype's shape", hg.Problem(inner, outer), data(xt, yt), data(xv, yv), *start, score,
        (0.03, 0.1, 0.3), (0.3, 1.0, 3.0, 10.0),
    )  # fmt: skip


def hyper_cleaning(rows: tuple[int, int], seed: int) -> Task:
    """Softmax regression with 64 features and 10 classes on rows half of whose labels are wrong, a weight for each."""
    rng, (features, classes), mu = np.random.default_rng(seed), (64, 10), 0.1
    n, m = (BLOCK * (count // BLOCK) for count in rows)
    x, y = _labelled(rng, n + m, features, classes)
    xt, yt, xv, yv = x[:n], y[:n].copy(), x[n:], y[n:]
    wrong = rng.random(n) < 0.5
    yt[wrong] = rng.integers(0, classes, int(wrong.sum()))

    def inner(w: Any, h: Any, rows: Any) -> Any:
        x, y, at = rows
        return jnp.mean(jax.nn.sigmoid(h[at]) * _cross_entropy(w, x, y)) + 0.5 * mu * jnp.sum(w**2)

    newton = _Newton(xt, yt, classes)

    def score(h: np.ndarray) -> float:
        weights = 1 / (1 + np.exp(-h))
        w, hessian, gap = newton(weights, np.full((1, 1), mu))
        slope = xv.T @ _softmax(xv, yv, w)[1] / m
        v = np.linalg.solve(hessian, slope.ravel()).reshape(w.shape)
        return float(np.sum((weights * (1 - weights) * np.sum(gap * (xt @ v), 1) / n) ** 2))

    train = (jnp.asarray(xt, jnp.float32), jnp.asarray(yt, jnp.int32), jnp.arange(n))
    valid = (jnp.asarray(xv, jnp.float32), jnp.asarray(yv, jnp.int32))
    start = jnp.zeros((features, classes), jnp.float32), jnp.zeros(n, jnp.float32)
    return Task(
        "hyper-cleaning", hg.Problem(inner, lambda w, h, rows: jnp.mean(_cross_entropy(w, *rows))), train, valid,
        *start, score, (0.03, 0.1, 0.3), (10.0, 100.0, 1000.0, 10000.0),
    )  # fmt: skip

r"""P17 and P18: what `error_estimate` is worth, family by family.

    python experiments/reliability/families.py --only ridge --solver default --precision float32   # a row of the table
    python experiments/reliability/families.py --keep          # all rows that are missing, into families.jsonl
    python experiments/reliability/families.py --page          # the table on the page from families.jsonl

    error = ‖ĝ − g‖ / max(‖g‖, 10⁻³ (‖∂_λ f‖ + ‖(∂²_{λw} h) v‖)),    silent: usable, estimate < .05, error > .1

The truth is a dense float64 solution: Newton's method from where the solver ended, to rounding, then one solve with the
Hessian (the Jacobian, for a fixed point). A usable result at a saddle counts as wrong by any amount. Draws whose truth
is doubtful (condition number times rounding above .1, or a residual that Newton's method leaves) are left out.

Each family is a loss or a map of a flat vector of parameters, and a function that draws one instance; all draws of a
family run in one program, under `jax.vmap`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import hypergrad as hg  # noqa: E402

Rng = np.random.Generator


class Family(NamedTuple):
    """Problems of one kind.

    Attributes:
        inner, outer: `(w, h, batch) -> scalar`; `w` is a vector.
        draw: `rng -> (start, hparams, train, valid)`, numpy arrays of the same shapes in every draw.
        solvers: names of `SOLVERS`.
        dtypes: precisions in which it is run.
        step: of the map `w − step · ∂_w h`, or a map itself, for fixed points.
        compose: `(outputs, loss)` for Gauss-Newton.
        warm: calls before the one that is judged, each at slightly other hyperparameters.
    """

    inner: Callable[[Any, Any, Any], Any]
    outer: Callable[[Any, Any, Any], Any]
    draw: Callable[[Rng], tuple[Any, Any, Any, Any]]
    solvers: tuple[str, ...] = ("default",)
    dtypes: tuple[str, ...] = ("float64", "float32")
    map: Callable[[Any, Any, Any], Any] | None = None
    compose: tuple[Any, Any] | None = None
    warm: int = 0


linear = hg.linear
SOLVERS: dict[str, Callable[[hg.Problem], hg.Solver]] = {
    "default": lambda p: hg.implicit(p),
    "loose": lambda p: hg.implicit(p, inner=hg.inner.lbfgs(tol=1e-3), linear=linear.cg(tol=1e-2), polish=0),
    "newton, dense": lambda p: hg.implicit(p, inner=hg.inner.newton(), linear=linear.dense()),
    "gmres": lambda p: hg.implicit(p, linear=linear.gmres()),
    "neumann(10)": lambda p: hg.implicit(p, linear=linear.neumann(10)),
    "neumann(1000)": lambda p: hg.implicit(p, linear=linear.neumann(1000)),
    "cg(2)": lambda p: hg.implicit(p, linear=linear.cg(max_steps=2)),
    "cg(5)": lambda p: hg.implicit(p, linear=linear.cg(max_steps=5)),
    "gmres(5)": lambda p: hg.implicit(p, linear=linear.gmres(max_steps=5)),
    "nystrom": lambda p: hg.implicit(p, linear=linear.nystrom(4, damping=0.01)),
    "identity": lambda p: hg.implicit(p, linear=linear.identity()),
    "damping 1e-3": lambda p: hg.implicit(p, damping=1e-3),
    "damping 1e-1": lambda p: hg.implicit(p, damping=1e-1),
    "gauss_newton": lambda p: hg.implicit(p, curvature="gauss_newton"),
}
FIXED_BUDGETS = ("neumann(10)", "neumann(1000)", "cg(2)", "cg(5)", "gmres(5)", "nystrom", "identity")


def decays(w: Any, h: Any) -> Any:
    return 0.5 * jnp.sum(jnp.exp(h) * w**2)


def penalised(fit: Callable[[Any, Any], Any]) -> tuple[Callable[[Any, Any, Any], Any], Callable[[Any, Any, Any], Any]]:
    """A data term with one decay a parameter (or one for all), and the data term alone."""
    return lambda w, h, b: fit(w, b) + decays(w, h), lambda w, h, b: fit(w, b)


def features(rng: Rng, rows: int, width: int, decades: float) -> Any:
    """Two sets of rows whose covariance has a spectrum over 2 × `decades` decades in a random basis, and a truth."""
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    s = 10.0 ** -np.linspace(0, rng.uniform(0, decades), width)
    x = rng.normal(size=(2, rows, width)) * s @ turn.T
    truth = turn @ (rng.normal(size=width) / s) / width**0.5
    return x, truth


def regression(width: int, rows: int, target: Callable[[Rng, Any], Any], decades: float = 3, one: bool = False) -> Any:
    def draw(rng: Rng) -> Any:
        x, truth = features(rng, rows, width, decades)
        y = target(rng, x @ truth)
        h = np.log(10) * rng.uniform(-2 * decades - 1, 0) + (0 if one else 0.5 * rng.normal(size=width))
        return np.zeros(width), np.asarray(h), (x[0], y[0]), (x[1], y[1])

    return draw


def _ridge(w: Any, b: Any) -> Any:
    return 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2)


def _logistic(w: Any, b: Any) -> Any:
    return jnp.mean(jax.nn.softplus(-b[1] * (b[0] @ w)))


def _softmax(w: Any, b: Any) -> Any:
    z = b[0] @ w.reshape(-1, 3)
    return jnp.mean(jax.nn.logsumexp(z, 1) - jnp.take_along_axis(z, b[1].astype(jnp.int32)[:, None], 1)[:, 0])


def _poisson(w: Any, b: Any) -> Any:
    z = b[0] @ w
    return jnp.mean(jnp.exp(z) - b[1] * z)


def _negative_binomial(w: Any, b: Any) -> Any:
    z = b[0] @ w
    return jnp.mean((b[1] + 2) * jnp.logaddexp(z, jnp.log(2.0)) - b[1] * z)


def _squared_hinge(w: Any, b: Any) -> Any:
    return jnp.mean(jax.nn.relu(1 - b[1] * (b[0] @ w)) ** 2)


def _pinball(w: Any, b: Any) -> Any:
    """Of a quantile of .8, smoothed over a tenth."""
    r = b[1] - b[0] @ w
    return jnp.mean(0.8 * r + 0.1 * jax.nn.softplus(-r / 0.1))


def _cox(w: Any, b: Any) -> Any:
    """Partial likelihood of rows in the order of their times; `b[1]` says who was observed."""
    z = b[0] @ w
    return -jnp.mean(b[1] * (z - jax.lax.cumlogsumexp(z, reverse=True)))


signs = lambda rng, z: np.where(rng.random(z.shape) < 1 / (1 + np.exp(-z / max(z.std(), 1e-9))), 1.0, -1.0)
noisy = lambda rng, z: z + 0.5 * rng.normal(size=z.shape)
counts = lambda rng, z: rng.poisson(np.exp(np.clip(z / max(z.std(), 1e-9), -3, 1.5))).astype(float)
classes = lambda rng, z: rng.integers(0, 3, z.shape).astype(float)
observed = lambda rng, z: (rng.random(z.shape) < 0.7).astype(float)


def _net(w: Any, x: Any, hidden: int = 3) -> Any:
    d = x.shape[1]
    first, bias, last = w[: d * hidden].reshape(d, hidden), w[d * hidden :][:hidden], w[d * hidden :][hidden:]
    return jnp.tanh(x @ first + bias) @ last


def _net_draw(rng: Rng) -> Any:
    x = rng.normal(size=(2, 30, 3))
    y = np.sin(x @ rng.normal(size=3)) + 0.2 * rng.normal(size=(2, 30))
    return 0.5 * rng.normal(size=15), np.asarray(rng.uniform(-7, -2)), (x[0], y[0]), (x[1], y[1])


def _curve(w: Any, x: Any) -> Any:
    return w[0] + w[1] * jnp.exp(-w[2] * x)


def _curve_draw(rng: Rng) -> Any:
    x = np.sort(rng.uniform(0, 3, (2, 20)), axis=1)
    y = 0.5 + 2 * np.exp(-1.2 * x) + 0.3 * rng.normal(size=x.shape)
    return np.array([0.3, 1.5, 1.0]), np.asarray(rng.uniform(-7, -1)), (x[0], y[0]), (x[1], y[1])


def _fold_draw(rng: Rng) -> Any:
    """Near λ = 2 / 3^1.5, at which the minimum that the start leads to meets a maximum."""
    return np.array([-0.62]), np.asarray(2 / 3**1.5 * (1 - 10 ** rng.uniform(-7, -1))), np.zeros(1), np.zeros(1)


def _saddle_draw(rng: Rng) -> Any:
    k = 4
    turn = np.linalg.qr(rng.normal(size=(k, k)))[0]
    return np.zeros(k), np.asarray(rng.uniform(0.1, 2)), (turn, rng.uniform(0.3, 3, k)), (turn, rng.normal(size=k))


def _saddle(w: Any, h: Any, b: Any) -> Any:
    """A bowl in all directions but the first, along which the loss falls to both sides: ¼z⁴ − ½λz²."""
    z = b[0].T @ w
    return 0.5 * jnp.sum(b[1][1:] * (z[1:] - h) ** 2) + 0.25 * z[0] ** 4 - 0.5 * h * z[0] ** 2


def _saddle_outer(w: Any, h: Any, b: Any) -> Any:
    z = b[0].T @ w
    return 0.5 * jnp.sum((z[1:] - b[1][1:]) ** 2) + 0.5 * (z[0] - 1) ** 2 + z[0]  # whose slope is 0 at z₀ = 0


def _factors_draw(rng: Rng) -> Any:
    a = rng.normal(size=(2, 4, 2)) @ rng.normal(size=(2, 2, 3)) + 0.1 * rng.normal(size=(2, 4, 3))
    start = np.zeros(14) if rng.random() < 0.3 else 10 ** rng.uniform(-3, 0) * rng.normal(size=14)
    return start, np.asarray(rng.uniform(-5, 0)), a[0], a[0] + 0.3 * rng.normal(size=(4, 3))


def _factors(w: Any, b: Any) -> Any:
    return 0.5 * jnp.sum((w[:8].reshape(4, 2) @ w[8:].reshape(2, 3) - b) ** 2)


def _flat_draw(rng: Rng) -> Any:
    """Quadratics with a direction of curvature 1e-9 to 1e-3 in which the start is off and the outer slope is small."""
    k = 6
    turn = np.linalg.qr(rng.normal(size=(k, k)))[0]
    curvature = np.concatenate([[10 ** rng.uniform(-9, -3)], rng.uniform(0.3, 3, k - 1)])
    centre, off = rng.normal(size=k), np.zeros(k)
    off[0] = 1
    start = turn @ (centre + np.concatenate([[10 ** rng.uniform(-2, 1)], np.zeros(k - 1)]))
    target = turn @ (start @ turn + np.concatenate([[0], rng.normal(size=k - 1)]))
    return start, np.asarray(rng.normal(size=k)), (turn, curvature, centre), (turn, curvature, target)


def _flat(w: Any, h: Any, b: Any) -> Any:
    z = b[0].T @ w
    return 0.5 * jnp.sum(b[1] * (z - b[2]) ** 2) - jnp.sum(jnp.sqrt(b[1]) * h * z) * 0.1


def _flat_outer(w: Any, h: Any, b: Any) -> Any:
    return 0.5 * jnp.sum((w - b[2]) ** 2)


def _table_draw(rng: Rng) -> Any:
    """Features as people have them: a constant, a year, an income, an age, a small number."""
    n = 40

    def rows() -> Any:
        return np.stack(
            [
                np.ones(n),
                rng.integers(1990, 2025, n),
                rng.lognormal(10.5, 0.7, n),
                rng.integers(18, 90, n),
                1e-3 * rng.random(n),
            ],
            axis=1,
        )

    x = np.stack([rows(), rows()])
    z = (x - x.mean((0, 1))) / (x.std((0, 1)) + (x.std((0, 1)) == 0))
    y = z @ rng.normal(size=5) + 0.5 * rng.normal(size=(2, n))
    h = rng.uniform(-12, 0) + 0.5 * rng.normal(size=5)
    return np.zeros(5), h, (x[0], y[0]), (x[1], y[1])


def _spheres_draw(rng: Rng) -> Any:
    """Soft spheres in the plane, a ring of springs of random lengths: translations and rotations cost nothing."""
    k = 5
    angle = 2 * np.pi * np.arange(k) / k
    start = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.normal(size=(k, 2))
    lengths = np.abs(rng.uniform(0.8, 1.2, (k, k)))
    return start.ravel(), np.asarray(rng.uniform(-0.3, 0.3)), lengths + lengths.T, lengths


def _distances(w: Any) -> Any:
    x = w.reshape(-1, 2)
    gaps = x[:, None] - x[None]
    return jnp.sqrt(jnp.sum(gaps**2, -1) + jnp.eye(x.shape[0]))


def _spheres(w: Any, h: Any, b: Any) -> Any:
    return 0.25 * jnp.sum(jnp.triu((_distances(w) - jnp.exp(h) * b * 0.7) ** 2, 1))


def _spheres_outer(w: Any, h: Any, b: Any) -> Any:
    return jnp.sum(jnp.triu(b * _distances(w), 1))


def _process_draw(rng: Rng) -> Any:
    """A latent Gaussian process at 12 points under a Poisson likelihood; length, height and noise are tuned."""
    x = np.sort(rng.uniform(0, 4, 12))
    f = np.sin(2 * x) + 0.3 * rng.normal(size=12)
    y = rng.poisson(np.exp(f)).astype(float), rng.poisson(np.exp(f)).astype(float)
    return np.zeros(12), rng.uniform([-1, -1, -4], [0.5, 1, -1]), (x, y[0]), (x, y[1])


def _covariance(x: Any, h: Any) -> Any:
    return jnp.exp(2 * h[1] - 0.5 * ((x[:, None] - x[None]) / jnp.exp(h[0])) ** 2) + jnp.exp(h[2]) * jnp.eye(12)


def _process(w: Any, h: Any, b: Any) -> Any:
    return jnp.sum(jnp.exp(w) - b[1] * w) + 0.5 * w @ jnp.linalg.solve(_covariance(b[0], h), w)


def _process_outer(w: Any, h: Any, b: Any) -> Any:
    """Laplace's approximation of the evidence."""
    c = _covariance(b[0], h)
    fit = jnp.sum(jnp.exp(w) - b[1] * w)
    return fit + 0.5 * jnp.linalg.slogdet(jnp.eye(12) + c * jnp.exp(w)[None])[1]


def _deep(w: Any, b: Any) -> Any:
    """A linear network of three layers."""
    return 0.5 * jnp.mean((b[0] @ w[:9].reshape(3, 3) @ w[9:18].reshape(3, 3) @ w[18:] - b[1]) ** 2)


def _deep_draw(rng: Rng) -> Any:
    x = rng.normal(size=(2, 30, 3))
    y = x @ rng.normal(size=3) + 0.3 * rng.normal(size=(2, 30))
    return 0.5 * rng.normal(size=21), np.asarray(rng.uniform(-6, -2)), (x[0], y[0]), (x[1], y[1])


def _attention(w: Any, b: Any) -> Any:
    """One head over sequences of four tokens in two dimensions."""
    x, y = b
    q, k, v = w[:4].reshape(2, 2), w[4:8].reshape(2, 2), w[8:12].reshape(2, 2)
    weights = jax.nn.softmax(jnp.einsum("nti,ij,nsj->nts", x @ q, k, x), -1)
    return 0.5 * jnp.mean((jnp.einsum("nts,nsi,ij->nj", weights, x, v) @ w[12:] - y) ** 2)


def _attention_draw(rng: Rng) -> Any:
    x = rng.normal(size=(2, 20, 4, 2))
    y = np.tanh(x[:, :, 0, 0] + x[:, :, 1, 1]) + 0.2 * rng.normal(size=(2, 20))
    return 0.5 * rng.normal(size=14), np.asarray(rng.uniform(-5, -1)), (x[0], y[0]), (x[1], y[1])


def _markov(w: Any, b: Any) -> Any:
    """A hidden chain of two states that emits one of three symbols: the mean negative log-likelihood."""
    start, move, emit = (
        jax.nn.log_softmax(jnp.concatenate([w[:1], jnp.zeros(1)])),
        jax.nn.log_softmax(w[1:5].reshape(2, 2)),
        jax.nn.log_softmax(w[5:11].reshape(2, 3)),
    )

    def one(symbols: Any) -> Any:
        alpha = start + emit[:, symbols[0]]
        for t in range(1, 8):
            alpha = jax.nn.logsumexp(alpha[:, None] + move, 0) + emit[:, symbols[t]]
        return -jax.nn.logsumexp(alpha)

    return jnp.mean(jax.vmap(one)(b.astype(jnp.int32)))


def _markov_draw(rng: Rng) -> Any:
    symbols = rng.integers(0, 3, (2, 20, 8)).astype(float)
    return 0.5 * rng.normal(size=11), np.asarray(rng.uniform(-5, 0)), symbols[0], symbols[1]


def _gradient_map(w: Any, h: Any, b: Any) -> Any:
    return w - jax.grad(lambda w: _ridge(w, b) + decays(w, h))(w) / (1.5 + jnp.max(jnp.exp(h)))


def _map_draw(rng: Rng) -> Any:
    x, truth = features(rng, 30, 5, 1)
    x = x / np.linalg.norm(x[0], 2) * 30**0.5
    y = noisy(rng, x @ truth)
    return np.zeros(5), rng.uniform(-6, 0, 5), (x[0], y[0]), (x[1], y[1])


def _equilibrium(w: Any, h: Any, b: Any) -> Any:
    """w = tanh(A w + b + h), with A not symmetric and of norm below 1."""
    return jnp.tanh(b[0] @ w + b[1] + h)


def _equilibrium_draw(rng: Rng) -> Any:
    a = rng.normal(size=(6, 6))
    a *= (1 - 10 ** rng.uniform(-4, -0.1)) / np.abs(np.linalg.eigvals(a)).max()
    return np.zeros(6), 0.3 * rng.normal(size=6), (a, 0.1 * rng.normal(size=6)), rng.normal(size=6)


def _proximal(w: Any, h: Any, b: Any) -> Any:
    z = w - jax.grad(_ridge)(w, b) / 1.5
    return jnp.sign(z) * jax.nn.relu(jnp.abs(z) - jnp.exp(h) / 1.5)


def _slow(w: Any, h: Any, b: Any) -> Any:
    return w - b[0] * (w - h)


def _slow_draw(rng: Rng) -> Any:
    return np.zeros(2), rng.uniform(0.3, 1, 2), (10 ** rng.uniform(-7, -1, 2), np.zeros(2)), rng.normal(size=2)


_spread = lambda w, h, b: 0.5 * jnp.sum((w - b) ** 2)
_few = ("default", "loose")
_most = (*_few, "newton, dense", "gmres", *FIXED_BUDGETS)
_narrow, _wide = ("float64", "float32"), ("float64",)

FAMILIES: dict[str, Family] = {
    "ridge": Family(*penalised(_ridge), regression(6, 30, noisy), (*_most, "damping 1e-3", "damping 1e-1")),
    "ridge, 40 features": Family(*penalised(_ridge), regression(40, 60, noisy, one=True), (*_few, *FIXED_BUDGETS)),
    "logistic": Family(*penalised(_logistic), regression(6, 30, signs, 2), (*_most, "damping 1e-3")),
    "softmax": Family(*penalised(_softmax), lambda rng: _tripled(regression(4, 30, classes, 1.5)(rng)), _few),
    "Poisson": Family(*penalised(_poisson), regression(6, 30, counts, 1), (*_few, "cg(5)", "neumann(1000)")),
    "negative binomial": Family(*penalised(_negative_binomial), regression(6, 30, counts, 1), _few),
    "squared hinge": Family(*penalised(_squared_hinge), regression(6, 30, signs, 1), _few),
    "pinball": Family(*penalised(_pinball), regression(6, 30, noisy, 1), _few),
    "Cox": Family(*penalised(_cox), regression(5, 30, observed, 1), _few),
    "Gaussian process": Family(_process, _process_outer, _process_draw, _few),
    "features of a table": Family(*penalised(_ridge), _table_draw, _few),
    "network": Family(
        *penalised(lambda w, b: 0.5 * jnp.mean((_net(w, b[0]) - b[1]) ** 2)),
        _net_draw,
        (*_few, "gauss_newton", "damping 1e-1", "cg(5)", "neumann(10)", "identity"),
        compose=(
            lambda w, h, b: _net(w, b[0]),
            lambda z, w, h, b: 0.5 * jnp.mean((z - b[1]) ** 2) + decays(w, h),
        ),
    ),
    "exponential curve": Family(
        *penalised(lambda w, b: 0.5 * jnp.mean((_curve(w, b[0]) - b[1]) ** 2)),
        _curve_draw,
        (*_few, "gauss_newton"),
        compose=(
            lambda w, h, b: _curve(w, b[0]),
            lambda z, w, h, b: 0.5 * jnp.mean((z - b[1]) ** 2) + decays(w, h),
        ),
    ),
    "deep linear": Family(*penalised(_deep), _deep_draw, (*_few, "cg(5)")),
    "attention": Family(*penalised(_attention), _attention_draw, _few),
    "hidden Markov": Family(*penalised(_markov), _markov_draw, _few),
    "factorization": Family(*penalised(_factors), _factors_draw, _few),
    "saddle": Family(_saddle, _saddle_outer, _saddle_draw, _few),
    "fold": Family(
        lambda w, h, b: jnp.sum(w**4 / 4 - w**2 / 2) - h * jnp.sum(w),
        lambda w, h, b: jnp.sum((w - 1) ** 2),
        _fold_draw,
        (*_few, "cg(2)"),
    ),
    "flat direction": Family(_flat, _flat_outer, _flat_draw, (*_few, "cg(5)")),
    "zero modes": Family(_spheres, _spheres_outer, _spheres_draw, ("default",)),
    "gradient map": Family(*penalised(_ridge), _map_draw, ("fixed point",), map=_gradient_map),
    "equilibrium": Family(_spread, _spread, _equilibrium_draw, ("fixed point",), map=_equilibrium),
    "proximal": Family(*penalised(_ridge), lambda r: _one(_map_draw(r)), ("fixed point",), map=_proximal),
    "slow map": Family(_spread, _spread, _slow_draw, ("fixed point",), map=_slow),
    "bfloat16 parameters": Family(*penalised(_ridge), regression(4, 30, noisy, 0.3), _few, ("bfloat16 w",)),
    "bfloat16 hyperparameters": Family(*penalised(_ridge), regression(4, 30, noisy, 0.3), _few, ("bfloat16 h",)),
    "ridge, warm": Family(*penalised(_ridge), regression(6, 30, noisy), ("default", "cg(5)", "neumann(10)"), warm=4),
    "logistic, warm": Family(*penalised(_logistic), regression(6, 30, signs, 2), _few, warm=4),
    "network, warm": Family(
        *penalised(lambda w, b: 0.5 * jnp.mean((_net(w, b[0]) - b[1]) ** 2)), _net_draw, _few, warm=4
    ),
}


def _tripled(draw: Any) -> Any:
    start, h, train, valid = draw
    return np.zeros(3 * len(start)), np.tile(h, 3), train, valid


def _one(draw: Any) -> Any:
    start, h, train, valid = draw
    return start, np.asarray(h[0]), train, valid


class Row(NamedTuple):
    """One line of the table; `judged` are the draws whose truth is known."""

    family: str
    solver: str
    precision: str
    judged: int
    usable: int
    silent: int
    violations: int
    refused: int  # though right to 1e-6
    right: int
    over: float  # median of estimate / error among finite estimates above 1e-3, condition number × rounding < .01
    finite: int
    told: int | None = None  # over how many draws `over` is the median; None for rows from before it was counted


def _solver(family: Family, name: str) -> hg.Solver:
    if name == "gauss_newton":
        assert family.compose is not None
        return SOLVERS[name](hg.Problem(hg.compose(*family.compose), family.outer))
    problem = hg.Problem(family.inner, family.outer)
    if name == "fixed point":
        return hg.implicit(problem, inner=hg.inner.fixed_point(family.map))  # pyright: ignore
    return SOLVERS[name](problem)


def _truth(family: Family) -> Callable[..., Any]:
    """`(ŵ, h, train, valid) -> (g, floor, condition, residual, definite)` in float64."""
    if family.map is not None:
        residual = lambda w, h, b: w - family.map(w, h, b)  # pyright: ignore
    else:
        residual = jax.grad(family.inner)

    def solve(w: Any, h: Any, train: Any, valid: Any) -> Any:
        find = lambda w: residual(w, h, train)

        def newton(_: Any, w: Any) -> Any:
            matrix = jax.jacobian(find)(w)
            d = jnp.sqrt(jnp.abs(jnp.diag(matrix))) if family.map is None else jnp.ones_like(w)
            d = jnp.maximum(d, 1e-12 * jnp.max(d))
            u, s, vt = jnp.linalg.svd(matrix / d[:, None] / d[None])
            kept = s > 1e-14 * s[0]
            step = vt.T @ jnp.where(kept, (u.T @ (find(w) / d)) / jnp.where(kept, s, 1), 0) / d
            sizes = 0.5 ** jnp.arange(12.0)
            norms = jax.vmap(lambda t: jnp.linalg.norm(find(w - t * step)))(sizes)
            norms = jnp.where(jnp.isnan(norms), jnp.inf, norms)
            best = jnp.argmin(norms)
            return jnp.where(norms[best] < jnp.linalg.norm(find(w)), w - sizes[best] * step, w)

        def fall(_: Any, w: Any) -> Any:
            """A Newton step with the sizes of the eigenvalues, which does not end at a saddle beside the way."""
            values, vectors = jnp.linalg.eigh(jax.jacobian(find)(w))
            size = jnp.maximum(jnp.abs(values), 1e-14 * jnp.max(jnp.abs(values)))
            step = vectors @ ((vectors.T @ find(w)) / size)
            sizes = 0.5 ** jnp.arange(12.0)
            losses = jax.vmap(lambda t: family.inner(w - t * step, h, train))(sizes)
            best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
            return jnp.where(losses[best] < family.inner(w, h, train), w - sizes[best] * step, w)

        found = jax.lax.fori_loop(0, 40, newton, w)
        if family.map is None:
            lower = jax.lax.fori_loop(0, 40, newton, jax.lax.fori_loop(0, 40, fall, w))
            found = jnp.where(jnp.linalg.eigvalsh(jax.hessian(family.inner)(found, h, train))[0] < 0, lower, found)
        w = found
        matrix = jax.jacobian(find)(w)
        # Features of other units are no condition number: the inverse of a scaled Hessian knows as many digits.
        d = jnp.sqrt(jnp.abs(jnp.diag(matrix))) if family.map is None else jnp.ones_like(w)
        d = jnp.maximum(d, 1e-12 * jnp.max(d))
        matrix = matrix / d[:, None] / d[None]
        u, s, vt = jnp.linalg.svd(matrix)
        kept = s > 1e-13 * s[0]
        rhs, direct = jax.grad(family.outer, argnums=(0, 1))(w, h, valid)
        v = u @ jnp.where(kept, (vt @ (rhs / d)) / jnp.where(kept, s, 1), 0) / d  # of the transpose
        flat = jnp.linalg.norm(jnp.where(kept, 0, vt @ (rhs / d))) / jnp.linalg.norm(rhs / d)
        pulled = jax.vjp(lambda h: residual(w, h, train), h)[1](v)[0]
        g = direct - pulled
        size = lambda x: jnp.linalg.norm(jnp.ravel(x))
        floor = jnp.maximum(size(g), 1e-3 * (size(direct) + size(pulled)))
        lowest = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0] / s[0]
        definite = (lowest > -1e-9) | (family.map is not None)
        smallest = jnp.min(jnp.where(kept, s, jnp.inf))
        scale = jnp.maximum(size(matrix @ (d * w)), size(matrix) * 1e-3 * size(d * w)) + 1e-30
        return g, floor, s[0] / smallest, size(find(w) / d) / scale, definite & (flat < 1e-7), w

    return jax.jit(jax.vmap(solve))


_CASTS = {
    "float64": (jnp.float64, jnp.float64, jnp.float64),
    "float32": (jnp.float32, jnp.float32, jnp.float32),
    "bfloat16 w": (jnp.bfloat16, jnp.float32, jnp.float32),
    "bfloat16 h": (jnp.float32, jnp.bfloat16, jnp.float32),
}


def sample(family: Family, name: str, solver: str, precision: str, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Errors, estimates, statuses, condition numbers and whether the truth is known, one a draw."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    instances = [family.draw(rng) for _ in range(draws)]
    start, h, train, valid = jax.tree.map(lambda *x: np.stack([np.asarray(y, np.float64) for y in x]), *instances)
    casts = _CASTS[precision]
    cast = lambda tree, dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    start, h = cast(start, casts[0]), cast(h, casts[1])
    train, valid = cast((train, valid), casts[2])
    made = _solver(family, solver)

    def run(start: Any, h: Any, train: Any, valid: Any) -> Any:
        state = made.init(start, h)
        if family.warm:
            shifts = jnp.linspace(0.2, 0, family.warm, endpoint=False).astype(h.dtype)
            state = jax.lax.fori_loop(
                0, family.warm, lambda i, s: made.hypergrad(s, h + shifts[i], train, valid)[1], state
            )
        out, state = made.hypergrad(state, h, train, valid)
        return out.grad, out.info.error_estimate, out.info.status, state.params

    grad, estimate, status, params = jax.jit(jax.vmap(run))(start, h, train, valid)
    wide = lambda tree: cast(tree, jnp.float64)
    g, floor, condition, left, definite, exact = _truth(family)(
        jnp.nan_to_num(wide(params)), wide(h), wide(train), wide(valid)
    )
    flat = lambda x: np.asarray(x, np.float64).reshape(draws, -1)
    error = np.linalg.norm(flat(grad) - flat(g), axis=1) / np.asarray(floor)
    error = np.where(np.asarray(definite), error, np.inf)
    condition, left = np.asarray(condition), np.asarray(left)
    known = (condition * 2.2e-16 < 0.1) & (left < 1e-9) & np.isfinite(np.asarray(floor)) & (np.asarray(floor) > 0)
    return {
        "error": error,
        "estimate": np.asarray(estimate, np.float64),
        "status": np.asarray(status),
        "condition": condition,
        "known": known,
        "grad": flat(grad),
        "truth": flat(g),
        "params": np.asarray(params, np.float64),
        "exact": np.asarray(exact),
        "hparams": flat(h),
    }


def judge(name: str, solver: str, precision: str, found: dict[str, np.ndarray]) -> Row:
    known = found["known"]
    error, estimate, status, condition = (found[k][known] for k in ("error", "estimate", "status", "condition"))
    usable = status <= int(hg.Status.INSENSITIVE)
    eps = 2.2e-16 if precision == "float64" else 1.2e-7 if precision == "float32" else 7.8e-3
    silent = usable & (estimate < 0.05) & ~(error <= 0.1)
    violations = usable & ~(estimate >= 0.1 * error)
    right = error <= 1e-6
    useful = usable & np.isfinite(estimate) & (estimate > 1e-3) & (condition * eps < 0.01)
    over = float(np.median((estimate / np.maximum(error, 1e-300))[useful])) if useful.any() else np.nan
    count = lambda x: int(np.sum(x))
    return Row(
        name,
        solver,
        precision,
        judged=count(known),
        usable=count(usable),
        silent=count(silent),
        violations=count(violations),
        refused=count(right & ~usable),
        right=count(right),
        over=over,
        finite=count(usable & np.isfinite(estimate)),
        told=count(useful),
    )


def cases() -> Iterator[tuple[str, str, str]]:
    """Family, solver and precision of every row."""
    for name, family in FAMILIES.items():
        for solver in family.solvers:
            for precision in family.dtypes:
                yield name, solver, precision


def row(name: str, solver: str, precision: str, seed: int, draws: int) -> Row:
    return judge(name, solver, precision, sample(FAMILIES[name], name, solver, precision, draws, seed))


@functools.cache
def measured(seed: int, smoke: bool) -> tuple[Row, ...]:
    """The whole table; of a smoke run, three families in small."""
    table = []
    for case in cases():
        if not smoke or case[0] in ("Poisson", "saddle", "slow map"):
            table.append(row(*case, seed, 8 if smoke else DRAWS))
            print(f"     {line(table[-1])}", flush=True)
    return tuple(table)


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    over = "-" if np.isnan(row.over) else f"{row.over:.2g}" + (f" of {row.told}" if row.told is not None else "")
    cells = (row.family, row.solver, row.precision, row.judged, row.usable, row.finite, row.silent, row.violations)
    return "| " + " | ".join(map(str, (*cells, f"{row.refused} of {row.right}", over))) + " |"


HEAD = (
    "| family | solver | precision | draws | usable | finite estimate | silent | below a tenth | right, refused | "
    "median over-estimate |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def p17(seed: int, smoke: bool, table: list[str] | None = None) -> tuple[str, str, bool]:
    """An estimate is at least a tenth of the error, or infinite; nothing is silent."""
    found = measured(seed, smoke)
    if table is not None:
        table += [*HEAD, *map(line, found)]
    return honest(found)


def p18(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """What is right to 1e-6 is not refused."""
    return fair(measured(seed, smoke))


def honest(found: tuple[Row, ...]) -> tuple[str, str, bool]:
    """What a table says of P17."""
    draws, silent = sum(r.judged for r in found), sum(r.silent for r in found)
    below = sum(r.violations for r in found)
    worst = max(found, key=lambda r: r.violations / max(r.judged, 1))
    over = [r.over for r in found if not np.isnan(r.over)]
    figure = (
        f"{silent} silent and {below} below a tenth of {draws}; most in {worst.family} ({worst.solver}, "
        f"{worst.precision}): {worst.violations} of {worst.judged}; over-estimate: median of medians "
        f"{np.median(over) if over else np.nan:.1f}, {sum(o > 30 for o in over)} of {len(over)} above 30"
    )
    met = silent == 0 and all(r.violations <= r.judged / 1000 for r in found) and all(o <= 30 for o in over)
    return figure, "0 silent; <= 1 in 1000 of each below; over-estimate <= 30", bool(met)


def fair(found: tuple[Row, ...]) -> tuple[str, str, bool]:
    """What a table says of P18."""
    refused, right = sum(r.refused for r in found), sum(r.right for r in found)
    draws = sum(r.judged for r in found)
    return f"{refused} of {right} right, of {draws} draws", "<= 2 % of the draws", refused <= 0.02 * draws


# The table on the page ------------------------------------------------------------------------------------------------

DRAWS, SEED = 200, 5
KEPT, PAGE = (Path(__file__).with_name(name) for name in ("families.jsonl", "README.md"))


def kept() -> dict[tuple[str, str, str], Row]:
    """The rows of `families.jsonl`, in the order of `FAMILIES`; a later line takes the place of an earlier one."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    known = {(r.family, r.solver, r.precision): r for r in (Row(**json.loads(text)) for text in lines)}
    return {case: known[case] for case in cases() if case in known}


def write_page() -> None:
    """The table, and what it says of both promises, between the marks on the page."""
    rows = kept()
    found, left = tuple(rows.values()), [case for case in cases() if case not in rows]
    names = sorted({case[0] for case in left})
    missing = f"; {len(left)} rows are not measured yet: {', '.join(names)}" if left else ""
    text = [
        f"{len(found)} of {len(found) + len(left)} rows, {sum(r.judged for r in found)} draws{missing}.",
        f"P17: {honest(found)[0]}. P18: {fair(found)[0]}.",
        "",
        *HEAD,
        *map(line, found),
    ]
    head, rest = PAGE.read_text().split("<!-- families -->\n")
    PAGE.write_text(
        f"{head}<!-- families -->\n" + "\n".join(text) + "\n<!-- /families -->" + rest.split("<!-- /families -->")[1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(FAMILIES), help="a family (again for more)")
    parser.add_argument("--solver")
    parser.add_argument("--precision")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--keep", action="store_true", help="append the rows that families.jsonl lacks to it")
    parser.add_argument("--page", action="store_true", help="write the table on the page, and measure nothing")
    options = parser.parse_args()
    known = kept() if options.keep else {}
    print(*HEAD, sep="\n")
    for case in cases():
        name, solver, precision = case
        chosen = (not options.only or name in options.only) and options.solver in (None, solver)
        if options.page or not chosen or options.precision not in (None, precision) or case in known:
            continue
        found = row(*case, options.seed, options.draws)
        print(line(found), flush=True)
        if options.keep:
            with KEPT.open("a") as file:
                file.write(json.dumps(found._asdict()) + "\n")
    if options.page or options.keep:
        write_page()


if __name__ == "__main__":
    main()

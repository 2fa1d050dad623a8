"""The problems of P17 and P18: each a loss or a map of a flat vector of parameters, with a function that draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg

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

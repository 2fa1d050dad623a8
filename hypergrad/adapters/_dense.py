r"""Cross-validated tuning of small convex models as one compiled program, for the estimators of `adapters.sklearn`.

    F(u) = mean over folds of loss(w_k(u), validation rows of fold k),   w_k = argmin of the loss on the others
    dF/du = ∂_u F − ∂_w F H⁻¹ ∂²_{wu} h,   H written down and factorised

Sources: Bengio 2000 (the implicit gradient); Bertrand et al. 2020, arXiv:2002.08943 (on the support of an L1 penalty).
Differs from `hg.tasks(hg.implicit(...))`, which a test holds it against, in: H is a matrix, its factors serve the
training and the derivative, folds are an axis of one solve, and the whole outer loop (a grid of shared strengths, then
L-BFGS) runs inside the program. That takes a second to compile and no call to the host, for models in which nothing
else can go wrong.
Cost: an outer step is k + 1 factorisations, O(k d³) (ridge, elastic net), O(k d³ c³) for each Newton step (logistic),
O(k n³) (kernel). Memory: k such matrices. The last "fold" trains on all rows and validates nothing: it is the refit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve

from hypergrad._solver import Hypergradient
from hypergrad.outer.lbfgs import lbfgs

_LIMIT = 46.0  # of a logarithm: strengths between 1e-20 and 1e20
_STALLED = 6  # outer steps in a row without a gain, after which tuning has converged
_RESOLVED = 0.1  # share of √tol to which the logarithm of a logistic penalty is rounded
_NEWTON = 60  # largest number of Newton steps of a logistic fit
_SWEEPS = 2000  # largest number of sweeps of coordinate descent
_INTERCEPT = 1e-11  # curvature of a logistic intercept, as a share of the rows: a class may be missing in a fold


class Data(NamedTuple):
    """What a model is tuned on; rows and columns that were added to reach a bucket's size are zero and weigh nothing.

    Attributes:
        x: features `[n, d]`.
        y: targets `[n, c]`; for a classifier zeros and ones, one column for two classes.
        train: weights of the rows in each fold's training loss, `[k + 1, n]`; the last are all rows.
        valid: weights in each fold's validation loss, `[k, n]`.
        assign: which hyperparameter is the penalty of which coefficient, integers `[d, c]`.
        unit: logarithms in whose units hyperparameters are compared with one another, `[p]`.
        pull: of a prior that draws them together, for each, `[p]`: what `log loss` gains by a squared distance of one.
    """

    x: Array
    y: Array
    train: Array
    valid: Array
    assign: Array
    unit: Array
    pull: Array


class Fits(NamedTuple):
    """One model per fold: coefficients `[k + 1, ...]`, intercepts `[k + 1, c]`, outputs on all rows `[k + 1, n, c]`."""

    coef: Array
    intercept: Array
    outputs: Array


class Tuned(NamedTuple):
    """Where tuning ended: the best hyperparameters (logarithms), their models and validation loss, and how it ended."""

    log: Array
    fits: Fits
    value: Array
    steps: Array
    converged: Array


class Model(NamedTuple):
    """`prepare(x, y, s)` once a fold; `solve(log, coef, prepared, data, s)` fits one fold, differentiable in `log`."""

    prepare: Callable[[Array, Array, Array], Any]
    solve: Callable[[Array, Array, Any, Data, Array], tuple[Array, Array, Array]]
    loss: Callable[[Array, Array, Array], Array]


def strengths(log: Array) -> Array:
    """`exp(log)`, for logarithms that a line search may have made very large or small."""
    return jnp.exp(jnp.clip(log, -_LIMIT, _LIMIT))


def squared(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted mean of the squared errors."""
    return jnp.sum(weight[:, None] * (outputs - y) ** 2) / (jnp.sum(weight) * y.shape[1])


def log_loss(outputs: Array, y: Array, weight: Array) -> Array:
    """Weighted mean of the negative log-likelihood of logits."""
    return jnp.sum(weight * _nll(outputs, y)) / jnp.sum(weight)


def _nll(z: Array, y: Array) -> Array:
    if z.shape[1] == 1:
        return jax.nn.softplus(z[:, 0]) - y[:, 0] * z[:, 0]
    return jax.nn.logsumexp(z, axis=1) - jnp.sum(y * z, axis=1)


def _solve(matrix: Array, rhs: Array) -> Array:
    """A⁻¹ b of a positive definite A. Its derivative is A⁻¹ (db − dA x), with the factors already computed."""
    factors = (_cholesky(jax.lax.stop_gradient(matrix)), True)
    x = jax.lax.stop_gradient(cho_solve(factors, rhs))
    return x + cho_solve(factors, rhs - matrix @ x)


def _cholesky(matrix: Array) -> Array:
    """The lower factor; NaN where there is none. Reads the lower triangle alone, where `cho_factor` averages both."""
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


class _Centred(NamedTuple):
    gram: Array
    cross: Array
    x_mean: Array
    y_mean: Array


def _centre(intercept: bool, x: Array, y: Array, s: Array) -> _Centred:
    """Second moments of one fold; an intercept, which nothing penalises, is what centring takes away."""
    total = jnp.sum(s)
    x_mean = s @ x / total if intercept else jnp.zeros(x.shape[1], x.dtype)
    y_mean = s @ y / total if intercept else jnp.zeros(y.shape[1], y.dtype)
    # Rows of weight zero are not centred, but have no weight.
    xc, yc = x - x_mean[None, :], y - y_mean[None, :]
    return _Centred((xc * s[:, None]).T @ xc, (xc * s[:, None]).T @ yc, x_mean, y_mean)


def _linear(coef: Array, p: _Centred, x: Array) -> tuple[Array, Array, Array]:
    """Coefficients `[d, c]`, their intercept and outputs."""
    intercept = p.y_mean - p.x_mean @ coef
    return coef, intercept, x @ coef + intercept[None, :]


def ridge(intercept: bool) -> Model:
    """Min Σ s (y − x·w − b)² + Σ α_j w_j², one factorisation an output."""

    def solve(log: Array, coef: Array, p: _Centred, data: Data, s: Array) -> tuple[Array, Array, Array]:
        del coef, s
        penalty = strengths(log)[data.assign]
        one = lambda a, b: _solve(p.gram + jnp.diag(a), b)
        return _linear(jax.vmap(one, 1, 1)(penalty, p.cross), p, data.x)

    return Model(functools.partial(_centre, intercept), solve, squared)


def elastic_net(intercept: bool) -> Model:
    """Min Σ s (y − x·w − b)² / 2 Σs + Σ a_j |w_j| + ½ Σ b_j w_j²; `log` holds the a, then as many b."""

    def prepare(x: Array, y: Array, s: Array) -> _Centred:
        p = _centre(intercept, x, y, s)
        return p._replace(gram=p.gram / jnp.sum(s), cross=p.cross / jnp.sum(s))

    def solve(log: Array, coef: Array, p: _Centred, data: Data, s: Array) -> tuple[Array, Array, Array]:
        del s
        first, second = jnp.split(strengths(log), 2)
        l1, l2 = first[data.assign[:, 0]], second[data.assign[:, 0]]
        w = _coordinate_descent(p.gram, p.cross[:, 0], *jax.lax.stop_gradient((l1, l2)), coef[:, 0])
        # On its support, with its signs, the solution is that of a linear system, which is what is differentiated.
        on = (w != 0).astype(w.dtype)
        matrix = on[:, None] * (p.gram + jnp.diag(l2)) * on[None, :] + jnp.diag(1 - on)
        w = _solve(matrix, on * (p.cross[:, 0] - l1 * jnp.sign(w)))
        return _linear(w[:, None], p, data.x)

    return Model(prepare, solve, squared)


def _coordinate_descent(gram: Array, cross: Array, l1: Array, l2: Array, start: Array) -> Array:
    scale = jnp.diag(gram) + l2
    scale = jnp.where(scale > 0, scale, 1)

    def visit(j: Array, w: Array) -> Array:
        rest = cross[j] - gram[j] @ w + gram[j, j] * w[j]
        return w.at[j].set(jnp.sign(rest) * jnp.maximum(jnp.abs(rest) - l1[j], 0) / scale[j])

    def sweep(c: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w = jax.lax.fori_loop(0, len(cross), visit, c[0])
        return w, jnp.max(jnp.abs(w - c[0]) * jnp.sqrt(scale)), c[2] + 1

    small = 1e-9 * jnp.max(jnp.abs(cross) / jnp.sqrt(scale))
    go_on = lambda c: (c[1] > small) & (c[2] < _SWEEPS)
    return jax.lax.while_loop(go_on, sweep, (start, jnp.full((), jnp.inf, start.dtype), jnp.int32(0)))[0]


def logistic(intercept: bool) -> Model:
    """Min Σ s nll(x·w + b) + ½ Σ α_jc w_jc², by Newton's method; the intercept is the last row of the coefficients."""

    def solve(log: Array, coef: Array, p: Any, data: Data, s: Array) -> tuple[Array, Array, Array]:
        del p
        n, c = data.y.shape
        x = jnp.concatenate([data.x, jnp.full((n, 1), float(intercept), data.x.dtype)], axis=1)
        penalty = strengths(log)[data.assign]
        last = jnp.full((1, c), _INTERCEPT * jnp.sum(s) if intercept else 1.0, x.dtype)
        penalty = jnp.concatenate([penalty, last])
        value = lambda w: jnp.sum(s * _nll(x @ w, data.y)) + jnp.sum(fixed * w**2) / 2
        fixed = jax.lax.stop_gradient(penalty)
        slope = lambda w, penalty: x.T @ (s[:, None] * (_mean(x @ w) - data.y)) + penalty * w

        def factors(w: Array) -> Array:
            q = _mean(x @ w)
            one = lambda a, b: jnp.einsum("n,ni,nj->ij", s * (q[:, a] * (float(a == b) - q[:, b])), x, x)
            hessian = jnp.block([[one(a, b) for b in range(c)] for a in range(c)])
            # A shift of all intercepts changes nothing: any curvature that way keeps its rounding small.
            shift = jnp.zeros((len(w), c), x.dtype).at[-1].set(float(intercept and c > 1)).T.ravel()
            gauge = jnp.sum(s) * shift[:, None] * shift[None, :]
            return _cholesky(hessian + gauge + jnp.diag(fixed.T.ravel()))

        back = lambda chol, g: cho_solve((chol, True), g.T.ravel()).reshape(c, -1).T

        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w, _, i = carry
            g = slope(w, fixed)
            direction = back(factors(w), g)
            sizes = 0.5 ** jnp.arange(0, 12, dtype=x.dtype)
            values = jax.vmap(lambda t: value(w - t * direction))(sizes)
            size = sizes[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]
            return w - size * direction, jnp.sum(g * direction), i + 1

        # The Newton decrement is twice what is left of the loss; the step that ends the solve squares what it leaves.
        go_on = lambda carry: (carry[1] > 1e-12 * jnp.sum(s)) & (carry[2] < _NEWTON)
        start = jax.lax.stop_gradient(coef), jnp.full((), jnp.inf, x.dtype), jnp.int32(0)
        w = jax.lax.stop_gradient(jax.lax.while_loop(go_on, step, start)[0])
        w = w - back(jax.lax.stop_gradient(factors(w)), slope(w, penalty))
        return w, w[-1] * float(intercept), x @ w

    return Model(lambda x, y, s: (), solve, log_loss)


def _mean(z: Array) -> Array:
    return jax.nn.sigmoid(z) if z.shape[1] == 1 else jax.nn.softmax(z, axis=1)


def kernel_ridge(intercept: bool) -> Model:
    """Min Σ s (y − f − b)² + α |f|², in the space of exp(−½ Σ (x_j − x'_j)² / ℓ_j²); `log` holds the ℓ, then α.

    The coefficients are those of the rows, `[n, c]`.
    """

    def prepare(x: Array, y: Array, s: Array) -> Array:
        del x
        return s @ y / jnp.sum(s) if intercept else jnp.zeros(y.shape[1], y.dtype)

    def solve(log: Array, coef: Array, y_mean: Array, data: Data, s: Array) -> tuple[Array, Array, Array]:
        del coef
        kernel = gaussian(data.x, strengths(log)[:-1][data.assign[:, 0]])
        root = jnp.sqrt(s)
        matrix = root[:, None] * kernel * root[None, :] + strengths(log)[-1] * jnp.eye(len(s), dtype=s.dtype)
        dual = root[:, None] * _solve(matrix, root[:, None] * (data.y - y_mean[None, :]))
        return dual, y_mean, kernel @ dual + y_mean[None, :]

    return Model(prepare, solve, squared)


def gaussian(x: Array, lengths: Array) -> Array:
    """The kernel's matrix `[n, n]`."""
    z = x / lengths[None, :]
    square = jnp.sum(z**2, axis=1)
    distance = square[:, None] + square[None, :] - 2 * (z @ z.T)
    return jnp.exp(-jnp.maximum(distance, 0) / 2)


MODELS = {"ridge": ridge, "elastic_net": elastic_net, "logistic": logistic, "kernel_ridge": kernel_ridge}


def objective(model: Model, data: Data) -> Callable[[Array, Array], tuple[Array, Fits]]:
    """`(log, coef) -> (validation loss times `surprise`, fits)`; `coef` is where the fits start."""
    prepared = jax.vmap(model.prepare, (None, None, 0))(data.x, data.y, data.train)

    def evaluate(log: Array, coef: Array) -> tuple[Array, Fits]:
        fits = Fits(*jax.vmap(model.solve, (None, 0, 0, None, 0))(log, coef, prepared, data, data.train))
        losses = jax.vmap(model.loss, (0, None, 0))(fits.outputs[:-1], data.y, data.valid)
        return jnp.mean(losses) * surprise(log, data), fits

    return evaluate


def surprise(log: Array, data: Data) -> Array:
    """Factor of the loss by which the prior speaks: `exp(Σ pull (z − mean z)²)` of z = log − unit, 1 without one."""
    z = log - data.unit
    mean = jnp.sum(data.pull * z) / jnp.maximum(jnp.sum(data.pull), jnp.finfo(z.dtype).tiny)
    return jnp.exp(jnp.sum(data.pull * (z - mean) ** 2))


class _Carry(NamedTuple):
    trial: Array
    control: Any
    fits: Fits
    best: Tuned
    idle: Array
    steps: Array


@functools.cache
def program(kind: str, intercept: bool) -> Callable[[Data, Array, Array, Array], Tuned]:
    """The compiled search; one for each kind of model in this process, with a trace for each bucket of shapes.

    Args:
        kind: a key of `MODELS`.
        intercept: whether the model has one.

    Returns:
        `(data, grid, max_iter, tol) -> Tuned`: the best of a grid of logarithms `[g, p]`, then L-BFGS from there, until
        `_STALLED` steps in a row have gained less than `tol`, relative to the loss.
    """
    model, control = MODELS[kind](intercept), lbfgs()
    judge = control.judge
    assert judge is not None  # a search along a line has one

    def search(data: Data, grid: Array, max_iter: Array, tol: Array) -> Tuned:
        evaluate = objective(model, data)
        rows = {"kernel_ridge": data.x.shape[0], "logistic": data.x.shape[1] + 1}.get(kind, data.x.shape[1])
        coef = jnp.zeros((data.train.shape[0], rows, data.y.shape[1]), data.x.dtype)

        def first(coef: Array, log: Array) -> tuple[Array, Array]:
            value, fits = evaluate(log, coef)
            value = jnp.where(jnp.isfinite(value), value, jnp.inf)
            return jnp.where(jnp.isfinite(fits.coef), fits.coef, 0), value

        _, values = jax.lax.scan(first, coef, grid)
        start = grid[jnp.argmin(values)]
        slope = jax.value_and_grad(evaluate, has_aux=True)
        # The loss resolves no steps far below √tol. Intercepts have next to no curvature, so that what two machines, or
        # weights and repeated rows, round differently would grow from step to step.
        unit = jnp.maximum(_RESOLVED * jnp.sqrt(tol), jnp.finfo(start.dtype).eps)
        resolved = (lambda log: jnp.round(log / unit) * unit) if kind == "logistic" else (lambda log: log)

        def step(c: _Carry) -> _Carry:
            (value, fits), grad = slope(c.trial, c.fits.coef)
            refused, held, ok = judge(value, c.control, c.trial, None)  # pyright: ignore[reportArgumentType]
            moved, learned, _ = control.update(grad, held, c.trial, Hypergradient(value, grad, None, None))  # pyright: ignore[reportArgumentType]
            choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(ok, x, y), a, b)
            better = value < c.best.value
            gained = jnp.where(jnp.isfinite(c.best.value), c.best.value - value, jnp.inf)
            idle = jnp.where(gained > tol * jnp.abs(value), 0, c.idle + 1)
            here = Tuned(c.trial, fits, value, c.steps + 1, c.best.converged)
            best = jax.tree.map(lambda x, y: jnp.where(better, x, y), here, c.best)
            flat = ok & (jnp.max(jnp.abs(grad)) <= 1e-3 * tol * jnp.abs(value))
            return _Carry(
                resolved(choose(moved, refused)),
                choose(learned, held),
                choose(fits, c.fits),
                best._replace(steps=c.steps + 1, converged=(idle >= _STALLED) | flat),
                idle,
                c.steps + 1,
            )

        nothing = Fits(coef, jnp.zeros_like(coef[:, 0]), jnp.zeros((len(data.train), *data.y.shape), data.y.dtype))
        none = Tuned(start, nothing, jnp.full((), jnp.inf, start.dtype), jnp.int32(0), jnp.bool_(False))
        go_on = lambda c: (c.steps < max_iter) & ~c.best.converged
        begin = _Carry(start, control.init(start), nothing, none, jnp.int32(0), jnp.int32(0))
        best = jax.lax.while_loop(go_on, step, begin).best
        return best._replace(value=best.value / surprise(best.log, data))

    return jax.jit(search)

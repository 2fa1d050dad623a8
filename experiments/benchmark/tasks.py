r"""The problems that are timed, and their exact answers.

    T1  min_w  mean log(1 + exp(−yᵢ xᵢᵀw)) + ½ Σⱼ exp(λⱼ) wⱼ²,         f(w) = the first term on validation rows
    T2  T gradient steps on  mean λᵢ ℓ(xᵢ; W) over 2000 examples, softmax regression, half of the labels wrong
    T3  one batch of a 64-256-256-10 network with  ½ Σⱼ exp(λⱼ) wⱼ²  over its 85,002 parameters
    T4  T1 with 600 rows of 100 features, k hyperparameters shared by groups of features
    V11 T Adam steps of a 4-layer transformer on  mean λᵢ ℓ(xᵢ; w), one weight per sequence

Losses take `(params, hparams, batch)`, everything is float32, and data are arguments, never closed over: XLA folds
constants. T1's answer is dense and in float64: Newton's method to rounding, then one Cholesky solve. Errors are
measured as ‖ĝ − g‖ / max(‖g‖, 10⁻³ ‖∂²_{λw} h‖ ‖H⁻¹ ∂_w f‖), the floor keeps a gradient near zero from raising an
alarm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

SIZES = {"S": (2000, 100), "M": (8000, 300), "L": (20_000, 1000)}
_SPREAD = 2.4  # of the log of the features' scales: the Hessian's condition number comes out between 80 and 110


class Logistic(NamedTuple):
    """One instance of T1: λ in float32, data as tuples of float32 arrays."""

    hparams: np.ndarray
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]


class Exact(NamedTuple):
    """The answer of an instance of T1, in float64."""

    params: np.ndarray
    grad: np.ndarray
    floor: float  # 10⁻³ ‖∂²_{λw} h‖ ‖H⁻¹ ∂_w f‖
    condition: float


def logistic(n: int, d: int, *, seed: int, valid: int | None = None) -> Logistic:
    """Gaussian features of log-uniform scale, labels from a logistic model, one log-L2 per feature around 1e-3."""
    rng = np.random.default_rng(seed)
    rows = n + (valid or n // 2)
    scale = np.exp(rng.permutation(np.linspace(-_SPREAD, 0, d)))
    x = (rng.standard_normal((rows, d)) * scale).astype(np.float32)
    w = 2 * rng.standard_normal(d) / np.sqrt(d) / scale
    y = np.where(rng.random(rows) < 1 / (1 + np.exp(-x @ w)), 1, -1).astype(np.float32)
    hparams = (np.log(1e-3) + 0.5 * rng.standard_normal(d)).astype(np.float32)
    return Logistic(hparams, (x[:n], y[:n]), (x[n:], y[n:]))


def logistic_outer(w: Any, hparams: Any, batch: Any) -> jax.Array:
    """Mean logistic loss, without the penalty."""
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def logistic_inner(w: Any, hparams: Any, batch: Any) -> jax.Array:
    """Mean logistic loss with one log-L2 per feature."""
    return logistic_outer(w, hparams, batch) + 0.5 * jnp.sum(jnp.exp(hparams) * w**2)


LOGISTIC = hg.Problem(logistic_inner, logistic_outer)


def exact(task: Logistic, *, condition: bool = False) -> Exact:
    """Solution and hypergradient in dense float64."""
    (x, y), (xv, yv) = (tuple(np.asarray(a, np.float64) for a in pair) for pair in (task.train, task.valid))
    penalty, w = np.exp(task.hparams.astype(np.float64)), np.zeros(x.shape[1])

    def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 1 / (1 + np.exp(y * (x @ w)))
        return -x.T @ (p * y) / len(y) + penalty * w, (x.T * (p * (1 - p))) @ x / len(y) + np.diag(penalty)

    for _ in range(60):  # converges quadratically in about eight; the best step that rounding allows ends it
        grad, hessian = derivatives(w)
        w = w - np.linalg.solve(hessian, grad)
        if np.linalg.norm(grad) < 1e-14:
            break
    _, hessian = derivatives(w)
    outer = -xv.T @ (yv / (1 + np.exp(yv * (xv @ w)))) / len(yv)
    adjoint = np.linalg.solve(hessian, outer)
    cross = penalty * w  # the diagonal of ∂²_{λw} h
    eigenvalues = np.linalg.eigvalsh(hessian) if condition else np.array([1.0, np.nan])
    return Exact(
        w,
        -cross * adjoint,
        1e-3 * float(np.abs(cross).max() * np.linalg.norm(adjoint)),
        float(eigenvalues[-1] / eigenvalues[0]),
    )


def error(grad: Any, answer: Exact) -> float:
    """Relative error of a hypergradient of T1 (dimensionless)."""
    gap = np.linalg.norm(np.asarray(grad, np.float64) - answer.grad)
    return float(gap / max(np.linalg.norm(answer.grad), answer.floor))


def digits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits, shuffled, pixels in [0, 1]; a stand-in of the same shape without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        x, y = rng.random((1797, 64)), rng.integers(0, 10, 1797)
    else:
        x, y = load_digits(return_X_y=True)
        x = x / 16
    order = rng.permutation(len(y))
    return np.asarray(x, np.float32)[order], np.asarray(y, np.int32)[order]


def softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _cleaning_inner(w: Any, hparams: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jax.nn.sigmoid(hparams) * softmax_loss(x @ w["kernel"] + w["bias"], y))


def _cleaning_outer(w: Any, hparams: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(softmax_loss(x @ w["kernel"] + w["bias"], y))


CLEANING = hg.Problem(_cleaning_inner, _cleaning_outer)


def cleaning(*, seed: int, n: int = 2000) -> tuple[Any, jax.Array, Any, Any]:
    """`(params, hparams, train, valid)` of T2: 2000 rows drawn from 1200 digits, half of the labels replaced."""
    rng = np.random.default_rng(seed)
    x, y = digits(rng)
    rows = rng.integers(0, 1200, n)
    labels = np.where(rng.random(n) < 0.5, rng.integers(0, 10, n), y[rows]).astype(np.int32)
    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return params, jnp.zeros(n), (x[rows], labels), (x[1200:], y[1200:])


def _mlp(w: Any, hparams: Any, batch: Any) -> jax.Array:
    h = batch[0]
    for layer in w[:-1]:
        h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
    return h @ w[-1]["kernel"] + w[-1]["bias"]


def _decay(w: Any, hparams: Any) -> jax.Array:
    terms = jax.tree.map(lambda a, b: jnp.sum(jnp.exp(b) * a**2), w, hparams)
    return 0.5 * sum(jax.tree.leaves(terms), start=jnp.zeros(()))


def _mlp_outer(w: Any, hparams: Any, batch: Any) -> jax.Array:
    return jnp.mean(softmax_loss(_mlp(w, hparams, batch), batch[1]))


MLP = hg.Problem(
    hg.compose(_mlp, lambda out, w, hparams, batch: jnp.mean(softmax_loss(out, batch[1])) + _decay(w, hparams)),
    _mlp_outer,
)


def mlp(*, seed: int, widths: tuple[int, ...] = (64, 256, 256, 10), batch: int = 256) -> tuple[Any, Any, Any, Any]:
    """`(params, hparams, train, valid)` of T3, the parameters after 300 steps of Adam."""
    rng = np.random.default_rng(seed)
    x, y = digits(rng)
    params = [
        {"kernel": jnp.asarray(rng.standard_normal((i, o)) * np.sqrt(2 / i), jnp.float32), "bias": jnp.zeros(o)}
        for i, o in itertools.pairwise(widths)
    ]
    hparams = jax.tree.map(lambda w: jnp.full(w.shape, np.log(1e-4), jnp.float32), params)
    train, valid = (x[:batch], y[:batch]), (x[-batch:], y[-batch:])
    optimizer = optax.adam(1e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, opt = carry
        updates, opt = optimizer.update(jax.grad(MLP.inner_loss)(w, hparams, train), opt)  # type: ignore[arg-type]
        return (optax.apply_updates(w, updates), opt), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=300))(
        (params, optimizer.init(params))
    )
    return params, hparams, train, valid


def grouped(groups: np.ndarray) -> hg.Problem:
    """T4: T1 with one log-L2 per group of features."""
    return hg.Problem(lambda w, hparams, batch: logistic_inner(w, hparams[groups], batch), logistic_outer)


def transformer(
    *,
    seed: int,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    sequences: int = 8,
    length: int = 128,
    vocabulary: int = 64,
) -> tuple[Callable[..., hg.Problem], Any, jax.Array, Any, Any]:
    """`(problem of remat and chunks, params, hparams, train, valid)` of V11: a pre-norm decoder, a weight per sequence.

    `remat` wraps each block in `jax.checkpoint`, which belongs to the model and not to the unrolling; `chunks` is the
    number of pieces in which `hg.chunked` takes the training batch. A batch is tokens and the sequences' numbers.
    """
    rng = np.random.default_rng(seed)

    def dense(i: int, o: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((i, o)) / np.sqrt(i), jnp.float32)

    params = {
        "embed": dense(vocabulary, width),
        "position": dense(length, width),
        "head": dense(width, vocabulary),
        "blocks": [
            {
                "qkv": dense(width, 3 * width),
                "out": dense(width, width),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
            for _ in range(layers)
        ],
    }
    tokens = rng.integers(0, vocabulary, (2, sequences, length + 1)).astype(np.int32)
    mask = np.tril(np.ones((length, length), bool))

    def normalise(h: jax.Array) -> jax.Array:
        return (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)

    def block(w: Any, h: jax.Array) -> jax.Array:
        q, k, v = jnp.split((normalise(h) @ w["qkv"]).reshape(*h.shape[:2], heads, -1), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e9), axis=-1)
        h = h + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape) @ w["out"]
        return h + jax.nn.gelu(normalise(h) @ w["up"]) @ w["down"]

    def problem(remat: bool = False, chunks: int = 1) -> hg.Problem:
        apply = jax.checkpoint(block) if remat else block

        def losses(w: Any, batch: jax.Array) -> jax.Array:
            h = w["embed"][batch[:, :-1]] + w["position"][None]
            for layer in w["blocks"]:
                h = apply(layer, h)
            return jnp.mean(softmax_loss(normalise(h) @ w["head"], batch[:, 1:]), axis=-1)

        def weighted(w: Any, hparams: jax.Array, batch: Any) -> jax.Array:
            return jnp.mean(jax.nn.sigmoid(hparams[batch[1]]) * losses(w, batch[0]))

        return hg.Problem(
            hg.chunked(weighted, chunks) if chunks > 1 else weighted,
            lambda w, hparams, batch: jnp.mean(losses(w, batch[0])),
        )

    train, valid = ((x, np.arange(sequences)) for x in tokens)
    return problem, params, jnp.zeros(sequences), train, valid

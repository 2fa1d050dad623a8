r"""Gaussian processes: hyperparameters of a covariance from the training data, with no validation set.

    evidence   log p(y|λ) = −½ yᵀK⁻¹y − ½ logdet K − n/2 log 2π,    K = k_λ(x, x) + diag(noise_variance)
    LOO        Σᵢ log N(yᵢ; yᵢ − αᵢ/Pᵢᵢ, 1/Pᵢᵢ),                      P = K⁻¹, α = P y

Source: Rasmussen & Williams 2006, chapter 5 (equations 5.8, 5.12).
Where they fail: with many hyperparameters (a length scale for each feature) the evidence overfits, just as a validation
loss does; `hmc` averages over them instead. LOO is less biased where the model is wrong, and noisier where it is right.
Cost: O(n³), memory O(n²). `gp_evidence_matrix_free` holds nothing of size n².
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._options import options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.objectives import _found
from hypergrad.objectives._process import KERNEL, NOISE, Kernel, per_point, system


@options()
def squared_exponential(x: ArrayLike, z: ArrayLike, length: ArrayLike, variance: ArrayLike) -> Array:
    r"""The kernel `variance · exp(−½ Σⱼ ((xⱼ − zⱼ)/lengthⱼ)²)`, with a length for each feature (ARD) or one for all.

    Args:
        x: `[n, d]`.
        z: `[m, d]`.
        length: scalar or `[d]`, in the units of x; greater than 0.
        variance: scalar, in the squared units of y; greater than 0.

    Returns:
        `[n, m]`.

    Raises:
        InputError: for other shapes, and for a length or variance that is not positive (where traced, NaN).

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> x = jnp.array([[0.0], [1.0]])
    >>> print(f"{hg.objectives.squared_exponential(x, x, 1.0, 2.0)[0, 1]:.4f}")  # 2 exp(−1/2)
    1.2131
    """
    x = _found.table("squared_exponential: x", x)
    z = _found.table("squared_exponential: z", z, x.shape[1])
    length = _found.positive("squared_exponential: length", length, "write jnp.exp(log_length)")
    variance = _found.positive("squared_exponential: variance", variance, "write jnp.exp(log_variance)")
    if length.shape not in ((), (1,), x.shape[1:]):
        raise InputError(
            f"squared_exponential: length must be a scalar or one for each of the {x.shape[1]} features, found shape "
            f"{length.shape}."
        )
    length = jnp.broadcast_to(length.astype(x.dtype), x.shape[1:])[None, :]
    u, v = x / length, z / length
    squares = jnp.sum(u**2, axis=1)[:, None] + jnp.sum(v**2, axis=1)[None, :] - 2 * u @ v.T
    return variance.astype(x.dtype) * jnp.exp(-0.5 * jnp.maximum(squares, 0))


@options(covariance=KERNEL, noise_variance=NOISE)
def gp_evidence(covariance: Kernel, noise_variance: Callable[[PyTree], ArrayLike]) -> Callable[..., Array]:
    r"""The negative log evidence per point of Gaussian-process regression, by a Cholesky factorisation.

    Args:
        covariance: `(hparams, x, z) -> [n, m]`, symmetric.
        noise_variance: `hparams -> variance` of the noise, a scalar or `[n]`, greater than 0.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which ignores the parameters; y `[n]` has zero mean under the prior.
        NaN where K is not positive definite.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: when the loss is called, for data of other shapes, a covariance that is not symmetric, and noise
            that is not positive.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> covariance = lambda h, x, z: hg.objectives.squared_exponential(x, z, jnp.exp(h), 1.0)
    >>> loss = hg.objectives.gp_evidence(covariance, lambda h: 1.0)
    >>> print(f"{loss(None, 0.0, (jnp.zeros((1, 1)), jnp.ones(1))):.4f}")  # −log N(1; 0, 2)
    1.5155
    """

    def loss(params: PyTree, hparams: PyTree, batch: PyTree) -> Array:
        del params
        matrix, _, y = system("gp_evidence", covariance, noise_variance, hparams, batch)
        lower = jnp.linalg.cholesky(matrix)
        half = jax.scipy.linalg.solve_triangular(lower, y, lower=True)
        return per_point(jnp.sum(half**2), 2 * jnp.sum(jnp.log(jnp.diag(lower))), y.size)

    return loss


@options(covariance=KERNEL, noise_variance=NOISE)
def gp_leave_one_out(covariance: Kernel, noise_variance: Callable[[PyTree], ArrayLike]) -> Callable[..., Array]:
    r"""Negative log density of each point given all the others, averaged over the points, in closed form.

    Args:
        covariance: as in `gp_evidence`.
        noise_variance: as in `gp_evidence`.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which ignores the parameters.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: as in `gp_evidence`.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> covariance = lambda h, x, z: hg.objectives.squared_exponential(x, z, jnp.exp(h), 1.0)
    >>> loss = hg.objectives.gp_leave_one_out(covariance, lambda h: 1.0)
    >>> far = jnp.array([[0.0], [100.0]])  # so that neither point says anything about the other
    >>> print(f"{loss(None, 0.0, (far, jnp.ones(2))):.4f}")  # −log N(1; 0, 2)
    1.5155
    """

    def loss(params: PyTree, hparams: PyTree, batch: PyTree) -> Array:
        del params
        matrix, _, y = system("gp_leave_one_out", covariance, noise_variance, hparams, batch)
        lower = jnp.linalg.cholesky(matrix)
        inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(y.size, dtype=y.dtype), lower=True)
        precision = jnp.sum(inverse**2, axis=0)
        alpha = inverse.T @ (inverse @ y)
        return jnp.mean(0.5 * alpha**2 / precision - 0.5 * jnp.log(precision)) + 0.5 * math.log(2 * math.pi)

    return loss


@options(covariance=KERNEL, noise_variance=NOISE)
def gp_predict(
    covariance: Kernel, noise_variance: Callable[[PyTree], ArrayLike], hparams: PyTree, batch: PyTree, x: ArrayLike
) -> tuple[Array, Array]:
    r"""Mean and variance of new, noisy observations under the process.

    Args:
        covariance: as in `gp_evidence`.
        noise_variance: as in `gp_evidence`; a scalar.
        hparams: hyperparameters, pytree.
        batch: the data `(x, y)`.
        x: where to predict, `[m, d]`.

    Returns:
        `(mean [m], variance [m])`, the variance with the noise of a new observation.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: as in `gp_evidence`, and for noise that is not a scalar.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> covariance = lambda h, x, z: hg.objectives.squared_exponential(x, z, jnp.exp(h), 1.0)
    >>> data = (jnp.zeros((1, 1)), jnp.ones(1))
    >>> mean, variance = hg.objectives.gp_predict(covariance, lambda h: 1.0, 0.0, data, jnp.zeros((1, 1)))
    >>> print(f"{mean[0]:.4f} {variance[0]:.4f}")
    0.5000 1.5000
    """
    matrix, inputs, y = system("gp_predict", covariance, noise_variance, hparams, batch)
    new = _found.table("gp_predict: x", x, inputs.shape[1])
    variance = jnp.asarray(noise_variance(hparams), y.dtype)
    if variance.ndim:
        raise InputError(f"gp_predict: noise_variance must be a scalar for new points, found shape {variance.shape}.")
    lower = jnp.linalg.cholesky(matrix)
    whiten = lambda b: jax.scipy.linalg.solve_triangular(lower, b, lower=True)
    half = whiten(covariance(hparams, inputs, new))
    prior = jax.vmap(lambda row: covariance(hparams, row[None], row[None])[0, 0])(new)
    return half.T @ whiten(y), prior - jnp.sum(half**2, axis=0) + variance

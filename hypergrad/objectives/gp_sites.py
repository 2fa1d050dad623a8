r"""Gaussian processes with a non-Gaussian likelihood: variational inference by sites.

    log ∫ p(f) Πᵢ tᵢ(fᵢ) df + Σᵢ log E_cavity[p(yᵢ|fᵢ)] − log E_cavity[tᵢ(fᵢ)]    is the EP-like log evidence

Source: Khan & Lin 2017, arXiv:1703.04265 (conjugate-computation variational inference); Li, John & Solin 2023,
arXiv:2306.04201 (that for the posterior, the energy of expectation propagation to learn hyperparameters by).
Cost: O(n³) for each update, memory O(n²).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad._options import Number, Slot, options
from hypergrad._tree import PyTree
from hypergrad.objectives import _found
from hypergrad.objectives._process import KERNEL, Kernel, system


class VariationalSites(NamedTuple):
    """A Gaussian process with a non-Gaussian likelihood: an inner problem and an outer loss; made by `gp_sites`.

    Attributes:
        init: `n -> sites`, a dict of `linear` and `precision`, `[n]` each.
        update: `(sites, hparams, (x, y)) -> sites`, for `hg.inner.fixed_point`.
        outer_loss: `(sites, hparams, (x, y)) -> scalar`, the negative EP-like log evidence per point.
        marginals: `(sites, hparams, (x, y)) -> (mean, variance)` of the latent function at x, `[n]` each.
    """

    init: Callable[[int], dict[str, Array]]
    update: Callable[..., dict[str, Array]]
    outer_loss: Callable[..., Array]
    marginals: Callable[..., tuple[Array, Array]]


@options(
    covariance=KERNEL,
    log_likelihood=Slot(("__call__",), "a function", "log_likelihood(y, f) -> log p(y|f), elementwise"),
    rate=Number(above=0, most=1),
    nodes=Number(least=2, integer=True, static=True),
)
def gp_sites(
    covariance: Kernel, log_likelihood: Callable[[Array, Array], Array], *, rate: float = 0.5, nodes: int = 20
) -> VariationalSites:
    r"""Conjugate-computation variational inference, with the EP-like evidence as the loss to learn hyperparameters by.

        tᵢ(f) = exp(aᵢ f − ½ bᵢ f²),   q(f) ∝ p(f) Πᵢ tᵢ(fᵢ) with marginals N(mᵢ, vᵢ)
        b ← (1 − ρ) b − 2ρ ∂_v E_q log p(y|f),   a ← (1 − ρ) a + ρ (∂_m − 2 m ∂_v) E_q log p(y|f)

    An update is a natural-gradient step on the variational bound, which is a Gaussian regression on the sites. With
    `hg.direct` the sites are held while the loss is differentiated, as in the paper; with `hg.implicit` and
    `hg.linear.gmres` they follow. For a Gaussian likelihood the result is exact after one step of rate 1. Cost: O(n³) a
    step.

    Args:
        covariance: as in `gp_evidence`.
        log_likelihood: `(y, f) -> log p(y|f)`, elementwise, and log-concave in f: else site precisions may fall below
            0, where values are NaN.
        rate: ρ, the step size.
        nodes: number of nodes of Gauss-Hermite quadrature.

    Returns:
        `VariationalSites`.

    Raises:
        InputError: for a rate or number of nodes out of range; when called, as `gp_evidence`.
        InputTypeError: for something that is not a function.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> covariance = lambda h, x, z: hg.objectives.squared_exponential(x, z, jnp.exp(h), 4.0)
    >>> gp = hg.objectives.gp_sites(covariance, lambda y, f: jax.nn.log_sigmoid(y * f))  # y is -1 or 1
    >>> problem = hg.Problem(None, gp.outer_loss)
    >>> solver = hg.direct(problem, inner=hg.inner.fixed_point(gp.update))
    >>> data = (jnp.array([[0.0], [1.0], [2.0]]), jnp.array([1.0, 1.0, -1.0]))
    >>> out, state = jax.jit(solver.hypergrad)(solver.init(gp.init(3), 0.0), 0.0, data, data)
    >>> hg.Status(int(out.info.status)).name, bool(out.value > 0)
    ('OK', True)
    """
    points, weights = np.polynomial.hermite.hermgauss(int(nodes))
    normal = weights / math.sqrt(math.pi)

    def latent(y: Array, mean: Array, variance: Array) -> Array:
        """Log-likelihood at the nodes, `[nodes, n]`."""
        f = mean[None] + jnp.sqrt(2 * variance)[None] * jnp.asarray(points, mean.dtype)[:, None]
        return log_likelihood(jnp.broadcast_to(y[None], f.shape), f)

    def expected(y: Array, mean: Array, variance: Array) -> Array:
        return jnp.sum(jnp.asarray(normal, mean.dtype)[:, None] * latent(y, mean, variance))

    def posterior(sites: dict[str, Array], hparams: PyTree, batch: PyTree) -> tuple[Array, Array, Array, Array]:
        matrix, _, y = system("gp_sites", covariance, None, hparams, batch)
        root = jnp.sqrt(_found.positive("gp_sites: precision", sites["precision"], "start from init(n)", zero=True))
        lower = jnp.linalg.cholesky(jnp.eye(y.size, dtype=y.dtype) + root[:, None] * matrix * root[None, :])
        half = jax.scipy.linalg.solve_triangular(lower, root[:, None] * matrix, lower=True)
        joint = matrix - half.T @ half
        return y, joint @ sites["linear"], jnp.diag(joint), 2 * jnp.sum(jnp.log(jnp.diag(lower)))

    def update(sites: dict[str, Array], hparams: PyTree, batch: PyTree) -> dict[str, Array]:
        y, mean, variance, _ = posterior(sites, hparams, batch)
        by_mean, by_variance = jax.grad(expected, argnums=(1, 2))(y, mean, variance)
        return {
            "linear": (1 - rate) * sites["linear"] + rate * (by_mean - 2 * mean * by_variance),
            "precision": (1 - rate) * sites["precision"] - 2 * rate * by_variance,
        }

    def outer_loss(sites: dict[str, Array], hparams: PyTree, batch: PyTree) -> Array:
        y, mean, variance, logdet = posterior(sites, hparams, batch)
        a, b = sites["linear"], sites["precision"]
        spread = 1 / (1 / variance - b)  # the cavity: the marginal without its own site
        centre = spread * (mean / variance - a)
        ours = jax.nn.logsumexp(latent(y, centre, spread), axis=0, b=jnp.asarray(normal, mean.dtype)[:, None])
        shrunk = 1 + spread * b
        site = -0.5 * jnp.log(shrunk) + (a * centre + 0.5 * spread * a**2 - 0.5 * b * centre**2) / shrunk
        return -(-0.5 * logdet + 0.5 * jnp.sum(a * mean) + jnp.sum(ours - site)) / y.size

    return VariationalSites(
        lambda n: {"linear": jnp.zeros(n), "precision": jnp.zeros(n)},
        update,
        outer_loss,
        lambda sites, hparams, batch: posterior(sites, hparams, batch)[1:3],
    )

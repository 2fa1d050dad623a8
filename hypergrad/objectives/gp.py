r"""Gaussian processes: hyperparameters of a covariance from the training data, with no validation set.

    evidence   log p(y|λ) = −½ yᵀK⁻¹y − ½ logdet K − n/2 log 2π,    K = k_λ(x, x) + diag(noise)
    LOO        Σᵢ log N(yᵢ; yᵢ − αᵢ/Pᵢᵢ, 1/Pᵢᵢ),                      P = K⁻¹, α = P y
    EP-like    log ∫ p(f) Πᵢ tᵢ(fᵢ) df + Σᵢ log E_cavity[p(yᵢ|fᵢ)] − log E_cavity[tᵢ(fᵢ)]   for other likelihoods

Past some 10⁴ points nothing of size n² is held: K⁻¹y comes from conjugate gradients to a stated tolerance, logdet K
from stochastic Lanczos quadrature, and its derivative from the same probes; both with their errors.

Source: Rasmussen & Williams 2006, chapter 5 (equations 5.8, 5.12); Ubaru, Chen & Saad 2017 (quadrature); Golub &
Meurant 1994 (its two-sided bounds); Lalchand & Rasmussen 2020, arXiv:1912.13440 (fully Bayesian); Khan & Lin 2017,
arXiv:1703.04265 (CVI); Li, John & Solin 2023, arXiv:2306.04201 (CVI for the posterior, the EP energy to learn by).
Differs: the matrix-free evidence brackets its quadrature from both sides, the noise being a bound on the spectrum.
Where they fail: with many hyperparameters (a length scale for each feature) evidence over-fits as a validation loss
does; `hmc` averages instead. LOO is the less biased where the model is wrong, and the noisier where it is right.
Cost: O(n³) and memory O(n²) exactly; matrix-free O(n² (steps + depth)) and memory O(n (block + depth · probes)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._checks import check_hparams, install
from hypergrad._options import Number, Slot, options
from hypergrad._solver import HypergradError, InputError, usable
from hypergrad._tree import PyTree
from hypergrad.linear._linear import solve
from hypergrad.linear.cg import cg
from hypergrad.objectives import _found

Kernel = Callable[[PyTree, Array, Array], Array]
_KERNEL = Slot(("__call__",), "a function", "covariance(hparams, x, z) -> [n, m]")
_NOISE = Slot(("__call__",), "a function", "noise_variance(hparams), such as lambda h: jnp.exp(h['log_noise'])")
_ASYMMETRY = 1e-3  # relative; rounding of a float32 distance is below


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


@options(covariance=_KERNEL, noise_variance=_NOISE)
def gp_evidence(covariance: Kernel, noise_variance: Callable[[PyTree], ArrayLike]) -> Callable[..., Array]:
    r"""Negative log evidence per point of Gaussian-process regression, by a Cholesky factorisation.

    Args:
        covariance: `(hparams, x, z) -> [n, m]`, symmetric.
        noise_variance: `hparams -> variance` of the noise, a scalar or `[n]`, greater than 0.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which does not look at the parameters; y `[n]` has zero mean under the
        prior. NaN where K is not positive definite.

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
        matrix, _, y = _system("gp_evidence", covariance, noise_variance, hparams, batch)
        lower = jnp.linalg.cholesky(matrix)
        half = jax.scipy.linalg.solve_triangular(lower, y, lower=True)
        return _per_point(jnp.sum(half**2), 2 * jnp.sum(jnp.log(jnp.diag(lower))), y.size)

    return loss


def _per_point(square: Array, logdet: Array, n: int) -> Array:
    return (0.5 * square + 0.5 * logdet) / n + 0.5 * math.log(2 * math.pi)


@options(covariance=_KERNEL, noise_variance=_NOISE)
def gp_leave_one_out(covariance: Kernel, noise_variance: Callable[[PyTree], ArrayLike]) -> Callable[..., Array]:
    r"""Negative log density of each point under the process fitted to all others, mean over points, in closed form.

    Args:
        covariance: as in `gp_evidence`.
        noise_variance: as in `gp_evidence`.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which does not look at the parameters.

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
        matrix, _, y = _system("gp_leave_one_out", covariance, noise_variance, hparams, batch)
        lower = jnp.linalg.cholesky(matrix)
        inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(y.size, dtype=y.dtype), lower=True)
        precision = jnp.sum(inverse**2, axis=0)
        alpha = inverse.T @ (inverse @ y)
        return jnp.mean(0.5 * alpha**2 / precision - 0.5 * jnp.log(precision)) + 0.5 * math.log(2 * math.pi)

    return loss


@options(covariance=_KERNEL, noise_variance=_NOISE)
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
    matrix, inputs, y = _system("gp_predict", covariance, noise_variance, hparams, batch)
    new = _found.table("gp_predict: x", x, inputs.shape[1])
    variance = jnp.asarray(noise_variance(hparams), y.dtype)
    if variance.ndim:
        raise InputError(f"gp_predict: noise_variance must be a scalar for new points, found shape {variance.shape}.")
    lower = jnp.linalg.cholesky(matrix)
    whiten = lambda b: jax.scipy.linalg.solve_triangular(lower, b, lower=True)
    half = whiten(covariance(hparams, inputs, new))
    prior = jax.vmap(lambda row: covariance(hparams, row[None], row[None])[0, 0])(new)
    return half.T @ whiten(y), prior - jnp.sum(half**2, axis=0) + variance


class EvidenceEstimate(NamedTuple):
    """A matrix-free estimate of the negative log evidence per point, with its errors.

    Attributes:
        value: the estimate, scalar.
        value_error: standard error over the probes, plus what conjugate gradients and quadrature can be wrong by.
        grad: pytree like the hyperparameters.
        grad_error: standard error over the probes of each entry of `grad`.
        status: code of `hg.Status`, of the worst of the linear solves.
        steps: most products of one of them.
    """

    value: Array
    value_error: Array
    grad: PyTree
    grad_error: PyTree
    status: Array
    steps: Array


class MatrixFreeEvidence(NamedTuple):
    """The evidence of a process with many points; made by `gp_evidence_matrix_free`.

    Attributes:
        outer_loss: `(params, hparams, (x, y), key) -> (value, metrics)`, for `hg.Problem`.
        estimate: `(hparams, (x, y), key) -> EvidenceEstimate`.
    """

    outer_loss: Callable[..., tuple[Array, dict[str, Array]]]
    estimate: Callable[..., EvidenceEstimate]


@options(
    covariance=_KERNEL,
    noise_variance=_NOISE,
    tol=Number(above=0, below=1, advice="write a relative residual such as 1e-4"),
    max_steps=Number(least=1, integer=True),
    probes=Number(least=2, integer=True, static=True),
    depth=Number(least=2, integer=True, static=True),
    block=Number(least=1, integer=True, static=True),
)
def gp_evidence_matrix_free(
    covariance: Kernel,
    noise_variance: Callable[[PyTree], ArrayLike],
    *,
    tol: ArrayLike,
    max_steps: int = 1000,
    probes: int = 10,
    depth: int = 30,
    block: int = 256,
) -> MatrixFreeEvidence:
    r"""Negative log evidence per point without a matrix of size n², with its error and that of its gradient.

        −½ αᵀ K̇ α + ½ mean_i uᵢᵀ K̇ zᵢ,    K α = y,  K uᵢ = zᵢ,  zᵢ random signs

    Products with K are made of blocks of its rows. Logdet comes from `depth` steps of Lanczos (matfree) for each probe,
    as the middle of the bounds of Gauss and Gauss-Radau quadrature, which hold since no eigenvalue is below the noise.

    Args:
        covariance: as in `gp_evidence`.
        noise_variance: as in `gp_evidence`; a scalar.
        tol: relative residual to which every linear system is solved. A miss makes the value NaN.
        max_steps: most products of a solve.
        probes: vectors of random signs; errors fall with their square root.
        depth: steps of Lanczos, at most n.
        block: rows of K that are made at once.

    Returns:
        `MatrixFreeEvidence`: the `outer_loss`, with the metrics `value_error` and `steps`, and `estimate`.

    Raises:
        InputError: for numbers out of range; when called, as `gp_evidence`.
        InputTypeError: for something that is not a function.
        HypergradError: if matfree is not installed.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> covariance = lambda h, x, z: hg.objectives.squared_exponential(x, z, jnp.exp(h), 1.0)
    >>> free = hg.objectives.gp_evidence_matrix_free(covariance, lambda h: 0.5, tol=1e-5, depth=8)
    >>> data = (jnp.linspace(0, 5, 20)[:, None], jnp.sin(jnp.linspace(0, 5, 20)))
    >>> found = jax.jit(free.estimate)(0.0, data, jax.random.key(0))
    >>> exact = hg.objectives.gp_evidence(covariance, lambda h: 0.5)(None, 0.0, data)
    >>> bool(abs(found.value - exact) < 3 * found.value_error)
    True
    """
    decomposition = _import("matfree", "gp_evidence_matrix_free").decomp
    linear = cg(tol=tol, max_steps=max_steps, preconditioner=None)
    count = int(probes)

    def estimate(hparams: PyTree, batch: PyTree, key: Array) -> EvidenceEstimate:
        hparams = check_hparams(hparams)
        x, y = _data("gp_evidence_matrix_free", batch)
        _check_kernel("gp_evidence_matrix_free", covariance, hparams, x)
        variance = _found.positive(
            "gp_evidence_matrix_free: noise_variance", noise_variance(hparams), "write jnp.exp(log_noise)"
        )
        if variance.ndim:
            raise InputError(f"gp_evidence_matrix_free: noise_variance must be a scalar, found shape {variance.shape}.")
        n = y.size
        variance = variance.astype(y.dtype)

        def products(h: PyTree, columns: Array) -> Array:
            """`K columns`, in blocks of rows, the last of which is filled up with the first points again."""
            size = min(int(block), n)
            rows = jnp.arange(-(-n // size) * size).reshape(-1, size) % n
            part = jax.checkpoint(lambda at: covariance(h, x[at], x) @ columns)
            found = jax.lax.map(part, rows).reshape(-1, columns.shape[1])[:n]
            return found + jnp.asarray(noise_variance(h), y.dtype) * columns

        matvec = lambda v: products(hparams, v[:, None])[:, 0]
        signs = jax.random.rademacher(key, (count, n), y.dtype)

        def solved(rhs: Array) -> tuple[Array, Array, Array, Array]:
            result = solve(linear, matvec, rhs)
            return result.solution, result.residual, result.status, result.steps

        solutions, residuals, statuses, steps = jax.vmap(solved)(jnp.concatenate([y[None], signs]))
        alpha, u = solutions[0], solutions[1:]
        square = jnp.sum(y * alpha)
        left = (residuals[0] * jnp.linalg.norm(y)) ** 2 / variance  # yᵀK⁻¹y − yᵀα lies between 0 and this

        lanczos = decomposition.tridiag_sym(min(int(depth), n), materialize=True, reortho="full")
        bounds = jax.vmap(lambda z: _log_quadrature(lanczos(matvec, z), variance))(signs)
        logdets = n * jnp.mean(bounds, axis=1)
        width = 0.5 * n * jnp.mean(bounds[:, 0] - bounds[:, 1])

        def forms(h: PyTree) -> Array:
            images = products(h, jnp.concatenate([alpha[None], signs]).T).T
            return 0.5 * jnp.concatenate([-jnp.sum(alpha * images[0])[None], jnp.sum(u * images[1:], axis=1)]) / n

        grads = jax.jacrev(forms)(hparams)
        spread = lambda s: jnp.std(s, axis=0, ddof=1) / count**0.5
        status = statuses[jnp.argmax(jnp.where(usable(statuses), -1, statuses))]
        fine = jnp.where(usable(status), 1.0, jnp.nan).astype(y.dtype)
        return EvidenceEstimate(
            fine * _per_point(square, jnp.mean(logdets), n),
            (0.5 * spread(logdets) + 0.5 * width + 0.5 * left) / n,
            jax.tree.map(lambda g: fine.astype(g.dtype) * (g[0] + jnp.mean(g[1:], axis=0)), grads),
            jax.tree.map(lambda g: spread(g[1:]), grads),
            status,
            jnp.max(steps),
        )

    def outer_loss(params: PyTree, hparams: PyTree, batch: PyTree, key: Array) -> tuple[Array, dict[str, Array]]:
        del params
        found = jax.lax.stop_gradient(estimate(jax.lax.stop_gradient(hparams), batch, key))
        moves = jax.tree.map(lambda g, h: jnp.sum(g * (h - jax.lax.stop_gradient(h))), found.grad, hparams)
        value = found.value + sum(jax.tree.leaves(moves), start=jnp.zeros((), found.value.dtype))
        return value, {"value_error": found.value_error, "steps": found.steps.astype(found.value.dtype)}

    return MatrixFreeEvidence(outer_loss, estimate)


def _log_quadrature(decomposition: Any, low: Array) -> Array:
    """`zᵀ log(K) z / zᵀz` by Gauss, from above, and by Gauss-Radau with a node below the spectrum, from below."""
    small = decomposition.J_small
    edge = jnp.linalg.norm(decomposition.residual)
    low = 0.999 * low  # clear of an eigenvalue that rounding puts on the bound
    last = jnp.zeros(small.shape[0], small.dtype).at[-1].set(edge**2)
    corner = low + jnp.linalg.solve(small - low * jnp.eye(small.shape[0], dtype=small.dtype), last)[-1]
    off = jnp.zeros((small.shape[0], 1), small.dtype).at[-1, 0].set(edge)
    radau = jnp.block([[small, off], [off.T, corner[None, None]]])

    def rule(matrix: Array) -> Array:
        nodes, vectors = jnp.linalg.eigh(matrix)
        return jnp.sum(vectors[0] ** 2 * jnp.log(jnp.maximum(nodes, low)))

    return jnp.stack([rule(small), rule(radau)])


class HMCSamples(NamedTuple):
    """What `hmc` drew.

    Attributes:
        hparams: pytree of samples, `[samples, ...]`.
        acceptance: mean probability of acceptance.
        divergent: how many trajectories diverged; a few say that the sampler avoided a region.
        step_size: of the integrator, found in the warm-up.
    """

    hparams: PyTree
    acceptance: Array
    divergent: Array
    step_size: Array


@options(
    log_density=Slot(("__call__",), "a function", "log_density(hparams) -> scalar"),
    samples=Number(least=1, integer=True, static=True),
    warmup=Number(least=20, integer=True, static=True),
    steps=Number(least=1, integer=True, static=True),
)
def hmc(
    log_density: Callable[[PyTree], Array],
    start: PyTree,
    *,
    key: Array,
    samples: int,
    warmup: int = 300,
    steps: int = 10,
) -> HMCSamples:
    r"""Hyperparameters drawn from their posterior by Hamiltonian Monte Carlo, for predictions that average over them.

    Step size and the scale of each hyperparameter are adapted in the warm-up (blackjax). Cost: `steps` gradients for
    each draw.

    Args:
        log_density: `hparams -> scalar`, unnormalised: log evidence (not per point) plus log prior, over unconstrained
            hyperparameters.
        start: pytree of hyperparameters.
        key: randomness.
        samples: number of draws.
        warmup: steps before the first of them.
        steps: of the integrator, for each draw.

    Returns:
        `HMCSamples`.

    Raises:
        InputError: for a number of draws or steps out of range.
        InputTypeError: for something that is not a function, and hyperparameters that are not real numbers.
        HypergradError: if blackjax is not installed.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> normal = lambda h: -0.5 * jnp.sum((h - 3.0)**2)
    >>> found = hg.objectives.hmc(normal, 0.0, key=jax.random.key(0), samples=500, warmup=100)
    >>> found.hparams.shape, bool(abs(jnp.mean(found.hparams) - 3) < 0.3)
    ((500,), True)
    """
    blackjax = _import("blackjax", "hmc")
    start = check_hparams(start)
    tune_key, draw_key = jax.random.split(key)

    @jax.jit
    def run(start: PyTree) -> HMCSamples:
        adapt = blackjax.window_adaptation(blackjax.hmc, log_density, num_integration_steps=int(steps))
        (state, found), _ = adapt.run(tune_key, start, int(warmup))
        sampler = blackjax.hmc(log_density, **found)

        def draw(state: Any, key: Array) -> tuple[Any, Any]:
            state, info = sampler.step(key, state)
            return state, (state.position, info.acceptance_rate, info.is_divergent)

        _, (drawn, rate, divergent) = jax.lax.scan(draw, state, jax.random.split(draw_key, int(samples)))
        return HMCSamples(drawn, jnp.mean(rate), jnp.sum(divergent), jnp.asarray(found["step_size"]))

    return run(start)


class VariationalSites(NamedTuple):
    """A Gaussian process with another likelihood: an inner problem of sites and an outer loss; made by `gp_sites`.

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
    covariance=_KERNEL,
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

    Natural-gradient steps on the variational bound, each of which is a Gaussian regression on the sites. With
    `hg.direct` the sites are held while the loss is differentiated, as in the paper; with `hg.implicit` and
    `hg.linear.gmres` they follow. Exact for a Gaussian likelihood, in one step of rate 1. Cost: O(n³) a step.

    Args:
        covariance: as in `gp_evidence`.
        log_likelihood: `(y, f) -> log p(y|f)`, elementwise, and log-concave in f: else site precisions may fall below
            0, where values are NaN.
        rate: ρ, length of a step.
        nodes: of Gauss-Hermite quadrature.

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
        matrix, _, y = _system("gp_sites", covariance, None, hparams, batch)
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


def _data(function: str, batch: PyTree) -> tuple[Array, Array]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(f"{function}: the batch must be (x, y), found {type(batch).__name__}.")
    x, y = _found.table(f"{function}: x", batch[0]), jnp.asarray(batch[1])
    if y.shape != x.shape[:1]:
        raise InputError(
            f"{function}: y must have shape ({x.shape[0]},), one number for each row of x, found {y.shape}."
        )
    return x, y.astype(x.dtype)


def _system(
    function: str,
    covariance: Kernel,
    noise_variance: Callable[[PyTree], ArrayLike] | None,
    hparams: PyTree,
    batch: PyTree,
) -> tuple[Array, Array, Array]:
    """`k(x, x) + diag(noise)`, x and y."""
    x, y = _data(function, batch)
    _check_kernel(function, covariance, hparams, x)
    matrix = covariance(hparams, x, x)
    skew = jnp.max(jnp.abs(matrix - matrix.T)) > _ASYMMETRY * jnp.max(jnp.abs(matrix))
    if not isinstance(skew, Tracer) and bool(skew):
        raise InputError(_asymmetric(function))
    matrix = jnp.where(skew, jnp.nan, matrix)
    if noise_variance is None:
        return matrix, x, y
    variance = _found.positive(f"{function}: noise_variance", noise_variance(hparams), "write jnp.exp(log_noise)")
    if variance.shape not in ((), (1,), y.shape):
        raise InputError(
            f"{function}: noise_variance must be a scalar or one variance for each of the {y.size} points, found shape "
            f"{variance.shape}."
        )
    return matrix + jnp.diag(jnp.broadcast_to(variance.astype(x.dtype), y.shape)), x, y


def _check_kernel(function: str, covariance: Kernel, hparams: PyTree, x: Array) -> None:
    """Raise for a covariance that returns another shape, or that is not symmetric where it is tried on five points."""
    found = jax.eval_shape(covariance, hparams, x[:1], x)
    if getattr(found, "shape", None) != (1, x.shape[0]):
        raise InputError(
            f"{function}: covariance(hparams, x, z) must return one value for each pair of rows, shape [n, m]: for x "
            f"of shape {(1, x.shape[1])} and z of {x.shape} found {getattr(found, 'shape', type(found).__name__)}."
        )
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, x.shape[1])).astype(x.dtype)
    tried = jax.tree.map(lambda leaf: np.full(jnp.shape(leaf), 0.5, jnp.result_type(leaf)), hparams)
    try:
        with jax.ensure_compile_time_eval():
            matrix = np.asarray(covariance(jax.tree.map(jnp.asarray, tried), jnp.asarray(points), jnp.asarray(points)))
    except (jax.errors.TracerArrayConversionError, InputError):  # closes over traced values, or 0.5 is not allowed
        return
    if np.max(np.abs(matrix - matrix.T)) > _ASYMMETRY * np.max(np.abs(matrix)):
        raise InputError(_asymmetric(function))


def _asymmetric(function: str) -> str:
    return (
        f"{function}: covariance must be symmetric, covariance(hparams, x, z) equal to covariance(hparams, z, x).T, "
        "found another matrix: its Cholesky factor would be that of its lower half alone."
    )


def _import(name: str, function: str) -> Any:
    try:
        if name == "matfree":
            import matfree
            import matfree.decomp

            return matfree
        import blackjax

        return blackjax
    except ImportError as error:
        raise HypergradError(f"{function} needs {name}: {install('gp')}.") from error

r"""The evidence of a Gaussian process without a matrix of size n², with its error and that of its gradient.

    log p(y|λ) = −½ yᵀK⁻¹y − ½ logdet K − n/2 log 2π

K⁻¹y comes from conjugate gradients to a stated tolerance, logdet K from stochastic Lanczos quadrature, and the
derivative of both from the same solves and probes.

Source: Ubaru, Chen & Saad 2017 (quadrature); Golub & Meurant 1994 (its two-sided bounds). Differs: the quadrature is
bracketed from both sides, the noise being a bound on the spectrum.
Cost: O(n² (steps + depth + probes)), memory O(n · probes · (block + depth)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._checks import check_hparams, install
from hypergrad._options import Number, options
from hypergrad._solver import HypergradError, InputError, usable
from hypergrad._tree import PyTree
from hypergrad.linear._linear import solve
from hypergrad.linear.cg import cg
from hypergrad.objectives import _found
from hypergrad.objectives._process import KERNEL, NOISE, Kernel, check_kernel, data, per_point


class EvidenceEstimate(NamedTuple):
    """A matrix-free estimate of the negative log evidence per point, with its errors.

    Attributes:
        value: the estimate, scalar.
        value_error: standard error over the probes, plus bounds on the errors of conjugate gradients and quadrature.
        grad: pytree like the hyperparameters.
        grad_error: standard error over the probes of each entry of `grad`.
        status: the `hg.Status` code of the worst linear solve.
        steps: products with K that the longest solve took.
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
    covariance=KERNEL,
    noise_variance=NOISE,
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
    r"""The negative log evidence per point without a matrix of size n², with its error and that of its gradient.

        −½ αᵀ K̇ α + ½ mean_i uᵢᵀ K̇ zᵢ,    K α = y,  K uᵢ = zᵢ,  zᵢ random signs

    Products with K are computed block by block of its rows. The log-determinant comes from `depth` steps of Lanczos
    (matfree) for each probe, as the middle of the bounds of Gauss and Gauss-Radau quadrature, which hold since no
    eigenvalue is below the noise.

    Args:
        covariance: as in `gp_evidence`.
        noise_variance: as in `gp_evidence`; a scalar.
        tol: relative residual to which every linear system is solved. A miss makes the value NaN.
        max_steps: largest number of products with K in one solve.
        probes: number of vectors of random signs; errors fall with its square root.
        depth: number of Lanczos steps, at most n.
        block: rows of K that are computed at once.

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
    decomposition = _matfree().decomp
    linear = cg(tol=tol, max_steps=max_steps, preconditioner=None)
    count = int(probes)

    def estimate(hparams: PyTree, batch: PyTree, key: Array) -> EvidenceEstimate:
        hparams = check_hparams(hparams)
        x, y = data("gp_evidence_matrix_free", batch)
        check_kernel("gp_evidence_matrix_free", covariance, hparams, x)
        variance = _found.positive(
            "gp_evidence_matrix_free: noise_variance", noise_variance(hparams), "write jnp.exp(log_noise)"
        )
        if variance.ndim:
            raise InputError(f"gp_evidence_matrix_free: noise_variance must be a scalar, found shape {variance.shape}.")
        n = y.size
        variance = variance.astype(y.dtype)

        def products(h: PyTree, columns: Array) -> Array:
            """Return `K columns`, by blocks of rows; the first points fill up the last block."""
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
            fine * per_point(square, jnp.mean(logdets), n),
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


def _matfree() -> Any:
    try:
        import matfree
        import matfree.decomp
    except ImportError as error:
        raise HypergradError(f"gp_evidence_matrix_free needs matfree: {install('gp')}.") from error

    return matfree

"""Random systems, and every linear solver compiled once: what the tests of this folder share."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad._options import as_options
from hypergrad.linear._linear import Linear, solve
from tests._helpers import tol

N = 24
PRECISE = tol(1e-10, 1e-6)  # the default tolerance of this run
EPS = tol(2.3e-16, 1.2e-7)

SOLVERS: dict[str, Linear] = {
    "cg": hg.linear.cg(preconditioner=None),
    "cg budget": hg.linear.cg(max_steps=5),
    "cg truncated": hg.linear.cg(max_steps=5, indefinite="truncate"),
    "gmres": hg.linear.gmres(restart=N),
    "gmres restarted": hg.linear.gmres(restart=6),
    "gmres budget": hg.linear.gmres(max_steps=5),
    "neumann": hg.linear.neumann(20_000, tol=1e-6),
    "neumann budget": hg.linear.neumann(5, step_size=0.5),
    "nystrom": hg.linear.nystrom(rank=N, damping=1e-2),
    "nystrom low": hg.linear.nystrom(rank=8, damping=1e-1),
    "nystrom columns": hg.linear.nystrom(rank=8, damping=1e-1, sketch="columns"),
    "dense": hg.linear.dense(),
    "identity": hg.linear.identity(0.5),
}
CLAIMING = [name for name, linear in SOLVERS.items() if linear.claims]
GENERAL = [name for name in CLAIMING if not SOLVERS[name].symmetric]
METHODS = ["cg", "gmres restarted", "neumann", "nystrom low", "dense", "identity"]  # one of each, where compiling costs
ITERATIVE = ["cg", "gmres", "gmres restarted", "neumann"]


class Outcome(NamedTuple):
    x: np.ndarray
    residual: float
    true_residual: float
    steps: int
    status: hg.Status
    inverse_of_gap: np.ndarray


@functools.cache
def compiled(name: str) -> Any:
    """`(matrix, rhs, start, options, scales) -> (result fields, inverse of the true gap)`, compiled once a shape."""

    def run(matrix, rhs, start, options, scales=None):
        apply = None if scales is None else lambda v: scales * v
        result = solve(
            SOLVERS[name],
            lambda v: matrix @ v,
            rhs,
            start=start,
            precondition=apply,
            options=options,
            key=jax.random.key(7),
        )
        gap = rhs - matrix @ result.solution
        return result.solution, result.residual, result.steps, result.status, gap, result.inverse(gap)

    return jax.jit(run)


def all_options(name: str, **changed: float) -> dict[str, Any]:
    """The options of a solver as arrays, with other values: always one structure, so that nothing compiles twice."""
    own = SOLVERS[name].options
    assert changed.keys() <= own.keys(), f"{name} has the options {list(own)}"
    return as_options({**own, **changed}, jnp.zeros((), float))


def run(name: str, matrix: Any, rhs: Any, start: Any = None, scales: Any = None, **options: float) -> Outcome:
    """Solve with one of `SOLVERS`; `scales` are the diagonal of M⁻¹, and `options` replace those of the solver."""
    a, b = jnp.asarray(matrix, float), jnp.asarray(rhs, float)
    x0 = jnp.zeros_like(b) if start is None else jnp.asarray(start, float)
    d = () if scales is None else (jnp.asarray(scales, float),)
    x, residual, steps, status, gap, inverse = compiled(name)(a, b, x0, all_options(name, **options), *d)
    size = float(jnp.linalg.norm(b)) or 1.0
    return Outcome(
        np.asarray(x),
        float(residual),
        float(jnp.linalg.norm(gap)) / size,
        int(steps),
        hg.Status(int(status)),
        np.asarray(inverse),
    )


def rotation(seed: int, n: int = N) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def spd(condition: float, seed: int = 0, n: int = N) -> np.ndarray:
    """Symmetric positive definite with eigenvalues from 1 down to 1 / condition."""
    q = rotation(seed, n)
    return (q * np.geomspace(1, 1 / condition, n)) @ q.T


def general(condition: float, seed: int = 0, n: int = N) -> np.ndarray:
    """Not symmetric, with singular values from 1 down to 1 / condition."""
    return (rotation(seed, n) * np.geomspace(1, 1 / condition, n)) @ rotation(seed + 1000, n).T


def contraction(radius: float, seed: int = 0, n: int = N) -> np.ndarray:
    """I − J with J not symmetric, of that spectral radius: the system of a fixed point."""
    jacobian = np.random.default_rng(seed).normal(size=(n, n))
    return np.eye(n) - radius * jacobian / np.abs(np.linalg.eigvals(jacobian)).max()


def singular(rank: int = N // 2, seed: int = 0, n: int = N) -> np.ndarray:
    """Symmetric positive semi-definite."""
    x = np.random.default_rng(seed).normal(size=(rank, n))
    return x.T @ x / n


def vector(seed: int = 1, n: int = N) -> np.ndarray:
    return np.random.default_rng([2, seed]).normal(size=n)  # no other function here draws these numbers


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

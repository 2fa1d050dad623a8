"""The error estimate is calibrated: on random problems, solved to random tolerances, the true error is seldom above it
and mostly not far below.

    ridge      h = ½ mean (xᵢᵀw − yᵢ)² + ½ Σ exp(λⱼ) wⱼ²          f = ½ mean (xᵢᵀw − yᵢ)² on other rows
    logistic   the same with mean log(1 + exp(−yᵢ xᵢᵀw))

The truth is a dense float64 solution: Newton's method to rounding, then one solve with the Hessian.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import tol

DRAWS, ROWS, WIDTH = 200, 24, 6


def _fit(kind: str, w, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) if kind == "ridge" else jnp.mean(jax.nn.softplus(-y * (x @ w)))


def _problem(kind: str) -> hg.Problem:
    return hg.Problem(
        lambda w, h, batch: _fit(kind, w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2), lambda w, h, b: _fit(kind, w, b)
    )


def _draw(rng: np.random.Generator, kind: str):
    """Features of scales over one to three decades, a strength of 1e-4 to 1 times the largest eigenvalue."""
    scale = 10.0 ** -rng.uniform(0, rng.uniform(0, 1.5), WIDTH)
    x = rng.normal(size=(2 * ROWS, WIDTH)) * scale
    y = x @ (rng.normal(size=WIDTH) / scale) / WIDTH**0.5 + 0.5 * rng.normal(size=2 * ROWS)
    return x, np.where(y > 0, 1.0, -1.0) if kind == "logistic" else y


def _truth(kind: str, h: np.ndarray, train, valid) -> np.ndarray:
    """Hypergradient with respect to one log-strength per coordinate."""
    (x, y), (xv, yv) = train, valid
    penalty, w = np.exp(h), np.zeros(WIDTH)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))

    def derivatives(w, x, y):
        if kind == "ridge":
            return x.T @ (x @ w - y) / len(y), x.T @ x / len(y)
        p = sigmoid(-y * (x @ w))
        return -x.T @ (p * y) / len(y), (x.T * (p * (1 - p))) @ x / len(y)

    for _ in range(50):
        grad, hessian = derivatives(w, x, y)
        w = w - np.linalg.solve(hessian + np.diag(penalty), grad + penalty * w)
    grad, hessian = derivatives(w, x, y)
    assert np.linalg.norm(grad + penalty * w) < 1e-12
    outer = derivatives(w, xv, yv)[0]
    return -penalty * w * np.linalg.solve(hessian + np.diag(penalty), outer)


KINDS = ("ridge", "logistic")


class Solved(NamedTuple):
    """`DRAWS` problems and what was found: features, targets, log-strengths, hypergradients, estimates, statuses."""

    x: np.ndarray
    y: np.ndarray
    hparams: np.ndarray
    grads: np.ndarray
    estimates: np.ndarray
    statuses: np.ndarray


@functools.cache
def _solved(width: int, polish: int | None) -> dict[str, Solved]:
    """Problems of each kind, each solved to tolerances of its own; one program, since the kinds have most in common."""
    given = {}
    for kind in KINDS:
        rng = np.random.default_rng(width)
        x, y = (np.stack(part) for part in zip(*(_draw(rng, kind) for _ in range(DRAWS)), strict=True))
        hparams = np.log(10.0) * rng.uniform(-4, 0, (DRAWS, width))
        given[kind] = x, y, hparams, *10.0 ** rng.uniform(*tol_range(), (2, DRAWS))
    solvers = {kind: hg.implicit(_problem(kind), polish=polish) for kind in KINDS}

    def one(solver, x, y, h, inner_tol, linear_tol):
        state = solver.init(jnp.zeros(WIDTH), h)
        for name, value in (("inner", inner_tol), ("linear", linear_tol)):
            state.options[name]["tol"] = value.astype(state.options[name]["tol"].dtype)
        out, _ = solver.hypergrad(state, h, (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]))
        return out.grad, out.info.error_estimate, out.info.status

    run = jax.jit(lambda given: {k: jax.vmap(functools.partial(one, solvers[k]))(*given[k]) for k in KINDS})
    found = run(jax.tree.map(jnp.asarray, given))
    return {k: Solved(*given[k][:3], *(np.asarray(part) for part in found[k])) for k in KINDS}


def _errors(kind: str, width: int, polish: int | None) -> tuple[np.ndarray, np.ndarray]:
    """True relative errors and estimates; those of which the status says not to use them, at most one in twenty, are
    left out."""
    x, y, hparams, grads, estimates, statuses = _solved(width, polish)[kind]
    usable = np.flatnonzero(statuses <= hg.Status.INSENSITIVE)
    assert len(usable) >= 0.95 * DRAWS
    errors = []
    for i in usable:
        h = np.broadcast_to(hparams[i], WIDTH)
        exact = _truth(kind, h, (x[i, :ROWS], y[i, :ROWS]), (x[i, ROWS:], y[i, ROWS:]))
        exact = exact if width > 1 else exact.sum(keepdims=True)
        errors.append(np.linalg.norm(grads[i].astype(np.float64) - exact) / np.linalg.norm(exact))
    return np.asarray(errors), estimates[usable].astype(np.float64)


def tol_range() -> tuple[float, float]:
    """Decimal logarithms of the tolerances that are tried."""
    return tol(-8.0, -5.0), -1.0


@pytest.mark.parametrize("polish", [None, 0], ids=["polished", "as the inner solver left it"])
@pytest.mark.parametrize("width", [1, WIDTH], ids=["one strength", "one a feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_true_errors_are_below_the_estimate_and_not_far_below(kind, width, polish):
    errors, estimates = _errors(kind, width, polish)
    below, near = np.mean(errors <= estimates), np.mean(errors >= estimates / 30)
    assert below >= 0.95, f"{below:.3f} of {len(errors)} errors are below their estimates"
    assert near >= 0.5, f"{near:.3f} of {len(errors)} errors are within a factor of 30 of their estimates"
    # Neither holds by itself: of estimates a tenth or ten times as large one would fail.
    assert np.mean(errors <= estimates / 10) < 0.95
    assert np.mean(errors >= estimates / 3) < 0.5

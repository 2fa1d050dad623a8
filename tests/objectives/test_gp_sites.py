"""Sites of a Gaussian likelihood are regression; of one label or two they give the evidence of quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.objectives import gp_evidence, gp_sites
from tests._helpers import tol
from tests.objectives._points import H, N, X, Y, covariance, kernel, noise_variance


@pytest.fixture(scope="module")
def sites():
    """The loss of two kinds of site, after 60 updates."""

    def run(log_likelihood, data, rate, rounds):
        gp = gp_sites(kernel, log_likelihood, rate=rate, nodes=40)

        @jax.jit
        def fitted(h):
            found = jax.lax.fori_loop(0, rounds, lambda _, s: gp.update(s, h, data), gp.init(data[1].size))
            return gp.outer_loss(found, h, data), found, gp.marginals(found, h, data)

        return gp, fitted

    return run


def test_sites_of_a_gaussian_likelihood_are_regression_in_one_step(sites):
    log_likelihood = lambda y, f: -0.5 * (y - f) ** 2 / jnp.exp(-1.4) - 0.5 * (jnp.log(2 * jnp.pi) - 1.4)
    _, fitted = sites(log_likelihood, (X, Y), 1.0, 1)
    value, found, (mean, _) = fitted(H)
    np.testing.assert_allclose(found["precision"], np.exp(1.4), rtol=tol(1e-8, 1e-3))
    np.testing.assert_allclose(value, gp_evidence(kernel, noise_variance)(None, H, (X, Y)), rtol=tol(1e-8, 1e-3))
    smooth = covariance(H) @ np.linalg.solve(covariance(H) + np.exp(-1.4) * np.eye(N), np.asarray(Y))
    np.testing.assert_allclose(mean, smooth, atol=tol(1e-8, 1e-3))


def test_sites_of_one_label_give_its_evidence_exactly_and_of_two_nearly(sites):
    labels = lambda y, f: jax.nn.log_sigmoid(3 * y * f)
    logistic = lambda f: 1 / (1 + np.exp(-3 * f))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for n, close in ((1, tol(1e-6, 1e-4)), (2, 2e-3)):
        data = (X[:n], jnp.array([1.0, -1.0])[:n])
        _, fitted = sites(labels, data, 0.7, 60)
        root = np.linalg.cholesky(covariance(H, X[:n], X[:n]))
        if n == 1:
            exact = np.log(weights @ logistic(root[0, 0] * nodes) / weights.sum())
        else:
            f = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1) @ root.T
            w = np.outer(weights, weights) / weights.sum() ** 2
            exact = np.log(np.sum(w * logistic(f[..., 0]) * logistic(-f[..., 1]))) / 2
        np.testing.assert_allclose(fitted(H)[0], -exact, atol=close)

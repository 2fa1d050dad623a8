"""Gaussian processes: closed forms against numpy, matrix-free within its stated error, sampling against quadrature."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.objectives import (
    gp_evidence,
    gp_evidence_matrix_free,
    gp_leave_one_out,
    gp_predict,
    gp_sites,
    hmc,
    squared_exponential,
)
from tests._helpers import central_difference, relative_error, tol

RNG = np.random.default_rng(0)
N, D = 40, 2
X = jnp.asarray(RNG.normal(size=(N, D)))
Y = jnp.asarray(np.sin(2 * np.asarray(X)[:, 0]) + 0.4 * RNG.normal(size=N))
H = {"length": jnp.array([-0.3, 0.8]), "noise": jnp.asarray(-1.4), "variance": jnp.asarray(0.2)}


def kernel(h, x, z):
    return squared_exponential(x, z, jnp.exp(h["length"]), jnp.exp(h["variance"]))


def noise(h):
    return jnp.exp(h["noise"])


def covariance(h, x=X, z=X):
    x, z = np.asarray(x, float), np.asarray(z, float)
    gaps = (x[:, None] - z[None]) / np.exp(np.asarray(h["length"], float))
    return np.exp(float(h["variance"])) * np.exp(-0.5 * np.sum(gaps**2, axis=2))


def log_normal(y, mean, variance):
    return -0.5 * ((y - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def test_evidence_leave_one_out_and_prediction_are_those_of_numpy():
    y, s2 = np.asarray(Y, float), np.exp(-1.4)
    full = covariance(H) + s2 * np.eye(N)
    evidence = (y @ np.linalg.solve(full, y) + np.linalg.slogdet(full)[1]) / (2 * N) + np.log(2 * np.pi) / 2
    left_out = []
    for i in range(N):
        kept = np.arange(N) != i
        half = np.linalg.solve(full[np.ix_(kept, kept)], full[kept, i])
        left_out.append(-log_normal(y[i], half @ y[kept], full[i, i] - half @ full[kept, i]))
    new = jnp.asarray(RNG.normal(size=(3, D)))
    cross = covariance(H, X, new)
    mean = cross.T @ np.linalg.solve(full, y)
    variance = np.exp(0.2) + s2 - np.sum(cross * np.linalg.solve(full, cross), axis=0)
    found = jax.jit(
        lambda h: (
            gp_evidence(kernel, noise)(None, h, (X, Y)),
            gp_leave_one_out(kernel, noise)(None, h, (X, Y)),
            *gp_predict(kernel, noise, h, (X, Y), new),
        )
    )(H)
    for a, b in zip(found, (evidence, np.mean(left_out), mean, variance), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol(1e-9, 2e-4), atol=tol(1e-10, 1e-4))


@pytest.mark.parametrize("objective", [gp_evidence, gp_leave_one_out])
def test_gradients_are_those_of_finite_differences(objective, x64):
    both = jax.jit(jax.value_and_grad(lambda h: objective(kernel, noise)(None, h, (X, Y))))
    expected = central_difference(lambda h: both(h)[0], H, 1e-4 if x64 else 3e-2)
    assert relative_error(both(H)[1], expected) < tol(1e-8, 1e-2)


@pytest.mark.experiment
def test_matrix_free_evidence_and_gradient_are_within_their_stated_errors_of_cholesky():
    exact, slope = jax.value_and_grad(lambda h: gp_evidence(kernel, noise)(None, h, (X, Y)))(H)
    free = gp_evidence_matrix_free(kernel, noise, tol=tol(1e-10, 1e-5), probes=8, depth=15, block=16)  # 16 ∤ 40
    found = jax.jit(jax.vmap(lambda k: free.estimate(H, (X, Y), k)))(jax.random.split(jax.random.key(1), 20))
    assert np.all(np.asarray(found.status) == hg.Status.OK)
    off = np.abs(np.asarray(found.value) - float(exact)) / np.asarray(found.value_error)
    assert off.max() < 6 and np.mean(off < 2) > 0.8  # errors that are estimated from eight probes
    assert np.asarray(found.value_error).max() < 0.15
    for key, error in found.grad_error.items():
        gaps, error = np.asarray(found.grad[key]) - np.asarray(slope[key]), np.asarray(error)
        assert np.mean(np.abs(gaps) < 2 * error) > 0.8, key
        mean_off = np.abs(gaps.mean(0)) / (gaps.std(0, ddof=1) / 20**0.5)
        assert mean_off.max() < 3.5, key  # unbiased

    outer = free.outer_loss
    out = jax.jit(jax.value_and_grad(lambda h, k: outer(None, h, (X, Y), k), has_aux=True))
    (value, metrics), grad = out(H, jax.random.split(jax.random.key(1), 20)[3])
    np.testing.assert_allclose(value, found.value[3], rtol=tol(1e-10, 1e-4))
    np.testing.assert_allclose(metrics["value_error"], found.value_error[3], rtol=tol(1e-8, 1e-2))
    assert relative_error(grad, jax.tree.map(lambda g: g[3], found.grad)) < tol(1e-8, 1e-3)


@pytest.mark.experiment
def test_hmc_draws_the_posterior_of_a_length_scale_that_quadrature_gives():
    x, y = X[:12], Y[:12]
    fixed = {"noise": H["noise"], "variance": H["variance"]}
    density = lambda t: (
        -12 * gp_evidence(kernel, noise)(None, {**fixed, "length": jnp.full(2, t)}, (x, y)) - 0.5 * jnp.sum(t**2)
    )
    grid = jnp.linspace(-4, 4, 400)
    logs = np.asarray(jax.jit(jax.vmap(density))(grid), float)
    weight = np.exp(logs - logs.max()) / np.sum(np.exp(logs - logs.max()))
    mean = weight @ np.asarray(grid)
    spread = (weight @ (np.asarray(grid) - mean) ** 2) ** 0.5
    found = hmc(density, jnp.asarray(0.0), key=jax.random.key(0), samples=1500, warmup=200, steps=5)
    drawn = np.asarray(found.hparams)
    parts = drawn.reshape(15, 100)
    for statistic, expected in ((np.mean, mean), (np.std, spread)):
        blocks = np.array([statistic(part) for part in parts])
        assert abs(statistic(drawn) - expected) < 3.5 * blocks.std(ddof=1) / 15**0.5
    assert 0.5 < float(found.acceptance) <= 1 and int(found.divergent) < 15


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
    np.testing.assert_allclose(value, gp_evidence(kernel, noise)(None, H, (X, Y)), rtol=tol(1e-8, 1e-3))
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


def test_mistakes_are_named(monkeypatch):
    loss, asymmetric = gp_evidence(kernel, noise), lambda h, x, z: kernel(h, x, z) * (1 + x[:, :1])
    with pytest.raises(hg.InputError, match="covariance must be symmetric"):
        jax.eval_shape(lambda h: gp_evidence(asymmetric, noise)(None, h, (X, Y)), H)  # before anything compiles
    with pytest.raises(hg.InputError, match=r"one value for each pair of rows, .* found \(1,\)"):
        gp_evidence(lambda h, x, z: kernel(h, x, z)[:, 0], noise)(None, H, (X, Y))
    with pytest.raises(
        hg.InputError, match=r"noise_variance must be greater than 0, found 0: write jnp\.exp\(log_noise\)"
    ):
        gp_leave_one_out(kernel, lambda h: 0.0)(None, H, (X, Y))
    with pytest.raises(hg.InputError, match=r"one variance for each of the 40 points, found shape \(3,\)"):
        gp_evidence(kernel, lambda h: jnp.ones(3))(None, H, (X, Y))
    with pytest.raises(hg.InputError, match=r"the batch must be \(x, y\), found dict"):
        loss(None, H, {})
    with pytest.raises(hg.InputError, match=r"y must have shape \(40,\), one number for each row .* found \(40, 1\)"):
        loss(None, H, (X, Y[:, None]))
    with pytest.raises(hg.InputError, match=r"table of shape \[n, d\] .* found shape \(40,\)"):
        loss(None, H, (X[:, 0], Y))
    with pytest.raises(hg.InputError, match=r"length must be .* each of the 2 features, found shape \(3,\)"):
        squared_exponential(X, X, jnp.ones(3), 1.0)
    with pytest.raises(hg.InputError, match="variance must be greater than 0, found -1"):
        squared_exponential(X, X, 1.0, -1.0)
    with pytest.raises(hg.InputError, match=r"noise_variance must be a scalar for new points, found shape \(40,\)"):
        gp_predict(kernel, lambda h: jnp.ones(N), H, (X, Y), X)
    monkeypatch.setitem(sys.modules, "blackjax", None)
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(hg.HypergradError, match=r"hmc needs blackjax: pip install -e '\.\[gp\]'"):
        hmc(lambda h: -(h**2), 0.0, key=jax.random.key(0), samples=10)
    with pytest.raises(hg.HypergradError, match=r"gp_evidence_matrix_free needs matfree: .*\[gp\]"):
        gp_evidence_matrix_free(kernel, noise, tol=1e-3)

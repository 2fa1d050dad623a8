"""Gaussian processes: evidence, leave-one-out and prediction against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.objectives import gp_evidence, gp_leave_one_out, gp_predict, squared_exponential
from tests._helpers import central_difference, relative_error, tol
from tests.objectives._points import RNG, D, H, N, X, Y, covariance, kernel, noise_variance


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
            gp_evidence(kernel, noise_variance)(None, h, (X, Y)),
            gp_leave_one_out(kernel, noise_variance)(None, h, (X, Y)),
            *gp_predict(kernel, noise_variance, h, (X, Y), new),
        )
    )(H)
    for a, b in zip(found, (evidence, np.mean(left_out), mean, variance), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol(1e-9, 2e-4), atol=tol(1e-10, 1e-4))


@pytest.mark.parametrize("objective", [gp_evidence, gp_leave_one_out])
def test_gradients_are_those_of_finite_differences(objective, x64):
    both = jax.jit(jax.value_and_grad(lambda h: objective(kernel, noise_variance)(None, h, (X, Y))))
    expected = central_difference(lambda h: both(h)[0], H, 1e-4 if x64 else 3e-2)
    assert relative_error(both(H)[1], expected) < tol(1e-8, 1e-2)


def test_mistakes_are_named():
    loss, asymmetric = gp_evidence(kernel, noise_variance), lambda h, x, z: kernel(h, x, z) * (1 + x[:, :1])
    with pytest.raises(hg.InputError, match="covariance must be symmetric"):
        jax.eval_shape(
            lambda h: gp_evidence(asymmetric, noise_variance)(None, h, (X, Y)), H
        )  # before anything compiles
    with pytest.raises(hg.InputError, match=r"one value for each pair of rows, .* found \(1,\)"):
        gp_evidence(lambda h, x, z: kernel(h, x, z)[:, 0], noise_variance)(None, H, (X, Y))
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

"""The matrix-free evidence lies within its stated error of Cholesky's."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.objectives import gp_evidence, gp_evidence_matrix_free
from tests._helpers import relative_error, tol
from tests.objectives._points import H, X, Y, kernel, noise_variance


@pytest.mark.experiment
def test_matrix_free_evidence_and_gradient_are_within_their_stated_errors_of_cholesky():
    exact, slope = jax.value_and_grad(lambda h: gp_evidence(kernel, noise_variance)(None, h, (X, Y)))(H)
    free = gp_evidence_matrix_free(
        kernel, noise_variance, tol=tol(1e-10, 1e-5), probes=8, depth=15, block=16
    )  # 16 ∤ 40
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


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(hg.HypergradError, match=r"gp_evidence_matrix_free needs matfree: .*\[gp\]"):
        gp_evidence_matrix_free(kernel, noise_variance, tol=1e-3)

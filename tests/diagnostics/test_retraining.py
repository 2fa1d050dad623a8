"""Training without rows, against ridge in closed form; correlations against SciPy's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import lds, loo_correlation, retrain
from tests._helpers import relative_error, tol
from tests.diagnostics.test_attribution import EXACT, L2, QUERIES, SQUARES, TRAIN, D, N, Q, arrays, without

SUBSETS = [[0], [3, 5], list(range(12))]


@pytest.mark.parametrize("memory", [2**30, 10_000])
def test_retraining_solves_again_without_the_rows(memory):
    given = (SQUARES, jnp.zeros(D), L2, arrays(TRAIN), arrays(QUERIES))
    found = retrain(*given, SUBSETS, method=EXACT, memory=memory)
    assert relative_error(found.changes, np.stack([without(rows) for rows in SUBSETS])) < tol(1e-8, 1e-3)
    assert found.status.tolist() == [0, 0, 0]
    masks = np.stack([np.isin(np.arange(N), rows) for rows in SUBSETS])
    np.testing.assert_array_equal(retrain(*given, masks, method=EXACT, memory=memory).losses, found.losses)


def test_a_training_that_fails_has_no_losses():
    wild = lambda problem: hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(1e30), steps=9))
    found = retrain(SQUARES, jnp.zeros(D), L2, arrays(TRAIN), arrays(QUERIES), SUBSETS, method=wild)
    assert not any(hg.Status(code).usable for code in found.status)
    assert np.isnan(found.losses).all()


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ([[0, N]], f"must name rows from 0 to {N - 1}"),
        ([list(range(N))], f"holds all {N} rows"),
        (3, "must be subsets of the rows"),
        ([0, 1], "must be subsets of the rows"),
        (np.zeros((2, N - 1), bool), f"must name rows from 0 to {N - 1}"),
    ],
)
def test_subsets_that_are_none_are_refused(left_out, message):
    with pytest.raises(hg.InputError, match=message):
        retrain(SQUARES, jnp.zeros(D), L2, arrays(TRAIN), arrays(QUERIES), left_out)


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    scores, changes = rng.normal(size=(Q, N)).round(), rng.normal(size=(9, Q)).round(1)  # with ties, exact in binary
    masks = rng.random((9, N)) < 0.3
    expected = [stats.spearmanr(masks @ scores[q], changes[:, q])[0] for q in range(Q)]
    np.testing.assert_allclose(lds(scores, masks, changes), expected, rtol=1e-10)
    expected = [stats.pearsonr(scores[q, :9], changes[:, q])[0] for q in range(Q)]
    np.testing.assert_allclose(loo_correlation(scores[:, :9], changes), expected, rtol=1e-10)


def test_a_query_without_scores_has_no_correlation_and_a_constant_one_none_either():
    scores = np.asarray([[1.0, np.nan, 2.0], [1.0, 1.0, 1.0], [3.0, 1.0, 2.0]])
    changes = np.asarray([[1.0, 1, 1], [2, 2, 2], [3, 3, 4]])
    for found in (lds(scores, [[0], [1], [2]], changes), loo_correlation(scores, changes)):
        assert np.isnan(found[0])
        assert found[1] == 0
        assert -1 <= found[2] <= 1


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(hg.InputError, match=r"changes must have shape \[subsets, queries\] = \[3, 2\], found \[2, 3\]"):
        lds(np.ones((2, 4)), [[0], [1], [2]], np.ones((2, 3)))
    with pytest.raises(hg.InputError, match=r"changes must have shape \[examples, queries\] = \[4, 2\]"):
        loo_correlation(np.ones((2, 4)), np.ones((2, 4)))
    with pytest.raises(hg.InputError, match="at least three subsets, found 2"):
        loo_correlation(np.ones((1, 2)), np.ones((2, 1)))
    with pytest.raises(hg.InputError, match="scores must have two axes"):
        lds(np.ones(3), [[0]], np.ones((1, 1)))

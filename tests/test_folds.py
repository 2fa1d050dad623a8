"""`hg.folds`: every row is validated exactly once, labels are spread, groups stay together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg

ROWS = 53


@pytest.mark.parametrize("k", [2, 5, ROWS])
@pytest.mark.parametrize("shuffled", [False, True])
def test_each_row_is_validated_once_and_trained_on_otherwise(k, shuffled):
    key = jax.random.key(1) if shuffled else None
    train, valid = hg.folds({"x": jnp.zeros((ROWS, 3))}, k, key=key)
    assert valid.weight.shape == train.weight.shape == (k, ROWS)
    np.testing.assert_array_equal(valid.weight.sum(0), np.ones(ROWS))
    np.testing.assert_array_equal(train.weight + valid.weight, np.ones((k, ROWS)))
    sizes = np.asarray(valid.weight.sum(1))
    assert sizes.max() - sizes.min() <= 1
    contiguous = np.all(np.diff(np.argmax(valid.weight, axis=0)) >= 0)
    assert contiguous != (shuffled and k < ROWS) or k == ROWS


def test_another_key_makes_other_folds_and_the_same_key_the_same():
    weights = [hg.folds(jnp.zeros(ROWS), 4, key=jax.random.key(i))[1].weight for i in (0, 0, 1)]
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])


def test_stratified_folds_have_the_same_share_of_each_label():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 15, 25]))
    for key in (None, jax.random.key(2)):
        _, valid = hg.folds(jnp.zeros(50), 5, stratify=labels, key=key)
        counts = [[int(valid.weight[f][labels == c].sum()) for c in range(3)] for f in range(5)]
        assert counts == [[2, 3, 5]] * 5


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_group_is_never_in_both_parts(stratified, shuffled):
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 12, size=60)
    labels = rng.integers(0, 2, size=60) if stratified else None
    _, valid = hg.folds(jnp.zeros(60), 4, groups=groups, stratify=labels, key=jax.random.key(0) if shuffled else None)
    np.testing.assert_array_equal(valid.weight.sum(0), np.ones(60))
    for group in np.unique(groups):
        assert len(np.unique(np.argmax(valid.weight, axis=0)[groups == group])) == 1


def test_mistakes_are_named():
    x = jnp.zeros((6, 2))
    with pytest.raises(hg.InputError, match="k must be at least 2, found 1"):
        hg.folds(x, 1)
    with pytest.raises(hg.InputError, match="found 7"):
        hg.folds(x, 7)
    with pytest.raises(hg.InputTypeError, match=r"integer, found 2\.5"):
        hg.folds(x, 2.5)
    with pytest.raises(hg.InputError, match=r"stratify must be one label a row, shape \(6,\), found shape \(5,\)"):
        hg.folds(x, 2, stratify=np.zeros(5))
    with pytest.raises(hg.InputError, match="2 groups, fewer than the k=3 folds"):
        hg.folds(x, 3, groups=[0, 0, 0, 1, 1, 1])
    with pytest.raises(hg.InputError, match="a label of stratify has 1 rows"):
        hg.folds(x, 2, stratify=[0, 0, 0, 0, 0, 1])
    with pytest.raises(hg.InputError, match=r"arrays\[0\] has 6 rows"):
        hg.folds((x, jnp.zeros(5)), 2)
    with pytest.raises(hg.InputTypeError, match="outside jit"):
        jax.jit(lambda key: hg.folds(x, 2, key=key)[0].weight)(jax.random.key(0))

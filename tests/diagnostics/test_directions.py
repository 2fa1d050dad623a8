"""Directions weigh what they say they weigh."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad.diagnostics._directions import along_entry, directions_along, groups, level, parts_of, random, scales_of

HPARAMS = {"a": jnp.asarray([[3.0, -4.0], [0.0, 0.0]]), "b": jnp.asarray(1e-5), "none": None, "zero": jnp.zeros(3)}
AT = np.asarray([3.0, -4.0, 0.0, 0.0, 1e-5, 0.0, 0.0, 0.0])
PARTS = parts_of(HPARAMS)
SCALES = scales_of(AT, PARTS)


def test_leaves_and_entries_have_their_paths_and_each_leaf_its_scale():
    assert [part.path for part in PARTS] == ["['a']", "['b']", "['zero']"]
    assert [PARTS[0].entry(2), PARTS[1].entry(0)] == ["['a'][1, 0]", "['b']"]
    np.testing.assert_allclose(SCALES, [2.5] * 4 + [1e-5] + [1.0] * 3)


@pytest.mark.parametrize("make", [random, lambda parts, scales, rng: level(parts, scales, np.arange(8.0) + 1, rng)])
def test_magnitudes_are_continuous_and_stay_inside_the_leaves(make):
    direction = make(PARTS[:1], SCALES, np.random.default_rng(0))
    assert not np.any(direction[4:])
    assert len(np.unique(np.abs(direction[:4]))) == 4


def test_entries_of_a_level_direction_contribute_alike_down_to_a_thousandth():
    grad = np.asarray([1.0, 1e-2, 1e-3, 1e-6, 5.0, 0.0, 0.0, 0.0])
    draws = [level(PARTS[:1], SCALES, grad, np.random.default_rng(i)) * grad for i in range(2000)]
    sizes = np.sqrt(np.mean(np.square(draws), 0))[:4]
    np.testing.assert_allclose(sizes[:3] / sizes[0], 1, rtol=0.1)
    np.testing.assert_allclose(sizes[3] / sizes[0], 1e-3, rtol=0.1)
    with_nan = level(PARTS[:1], SCALES, grad * [np.nan, 1, 1, 1, 1, 1, 1, 1], np.random.default_rng(0))
    assert np.all(np.isfinite(with_nan))


def test_few_entries_are_looked_at_one_by_one_and_many_in_sums():
    rng = np.random.default_rng(0)
    single = list(directions_along(PARTS[:1], SCALES, 2, 4, rng))
    assert [name for name, _ in single] == [f"['a'][{i}, {j}]" for i in (0, 1) for j in (0, 1)]
    np.testing.assert_array_equal(single[1][1], along_entry(PARTS[0], 1, SCALES))
    assert [name for name, _ in directions_along(PARTS, SCALES, 2, 4, rng)] == ["random 1", "random 2"]


def test_leaves_are_grouped_by_the_size_of_their_hypergradient():
    hparams = {str(i): jnp.ones(2) for i in range(6)}
    parts, grad = parts_of(hparams), np.repeat([1.0, 100.0, 1.1, 90.0, 1e-4, 1e-3], 2)
    found = groups(parts, np.ones(12), grad, 3)
    assert [sorted(part.path for part in group) for group in found] == [
        ["['4']", "['5']"],
        ["['0']", "['2']"],
        ["['1']", "['3']"],
    ]
    assert groups(parts, np.ones(12), grad, 6) == [[part] for part in parts]

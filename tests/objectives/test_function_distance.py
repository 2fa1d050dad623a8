"""Distances between networks as functions: the closed form is the mean of the draws, and keeps no data."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import _tree
from hypergrad.objectives import (
    exact_function_distance,
    function_distance,
    function_moments,
    ntk_function_distance,
)
from tests._helpers import central_difference, relative_error, tol


def network(*widths, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape))
    return [(draw(m, k) / m**0.5, draw(k) / 2) for m, k in itertools.pairwise(widths)]


def apply(layers, x):
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b[None])
    return x @ layers[-1][0] + layers[-1][1][None]


def moved(layers, by, seed=1):
    shift = network(layers[0][0].shape[0], *[w.shape[1] for w, _ in layers], seed=seed)
    return jax.tree.map(lambda a, b: jnp.asarray(np.asarray(a) + by * np.asarray(b)), layers, shift)


@jax.jit
def distances(layers, after, x, labels):
    """Exact, of the linearised network, and from moments."""
    kept = function_moments(layers, x, labels)
    exact, ntk = exact_function_distance(apply, layers), ntk_function_distance(apply, layers)
    return exact(after, None, x), ntk(after, None, x), function_distance(kept, by="moments")(after, None, None)


moments_of = jax.jit(function_moments)


RNG = np.random.default_rng(5)
LABELS = jnp.asarray(np.eye(2)[RNG.integers(0, 2, size=60)])
X = jnp.asarray(RNG.normal(size=(60, 3)) @ RNG.normal(size=(3, 3)) + np.asarray(LABELS) @ RNG.normal(size=(2, 3)))


@pytest.mark.parametrize("widths", [(3, 6, 2), (3, 5, 4, 2)], ids=["one-hidden-layer", "two"])
def test_the_moments_are_the_mean_of_the_draws_at_any_depth(widths):
    layers = network(*widths)
    after = moved(jax.tree.map(lambda leaf: 1.4 * leaf, layers), 0.2)  # what is added goes along with what was there
    kept = moments_of(layers, X, LABELS)
    draws = function_distance(kept, by="samples", samples=2000)
    found = jax.jit(jax.vmap(lambda k: draws(after, None, None, k)))(jax.random.split(jax.random.key(0), 30))
    error = np.std(found, ddof=1) / 30**0.5
    expected = float(distances(layers, after, X, LABELS)[2])
    assert abs(np.mean(found) - expected) < 3 * error
    assert error < 0.01 * expected  # fine enough to see a moment that is left out, which is 6 %


def test_without_hidden_layers_all_are_the_exact_distance():
    layers = network(3, 2)
    after = moved(layers, 0.5)
    exact, ntk, kept = distances(layers, after, X, LABELS)
    np.testing.assert_allclose([ntk, kept], [exact] * 2, rtol=tol(1e-12, 1e-5))


def test_gates_that_are_always_on_or_off_are_exact_too():
    layers = network(3, 6, 2)
    (w, b), last = layers
    layers = [(w, b + jnp.array([50.0, 50.0, -50.0, 50.0, -50.0, 50.0])), last]
    after = moved(layers, 0.1)
    exact, _, kept = distances(layers, after, X, LABELS)
    np.testing.assert_allclose(kept, exact, rtol=tol(1e-10, 1e-3))


def test_the_linearised_distance_is_that_of_small_steps():
    layers = network(3, 6, 2)
    ratios = []
    for by in (1e-3, 2e-3):
        after = moved(layers, by)
        exact, ntk, _ = distances(layers, after, X, LABELS)
        ratios.append(float(ntk / exact))
    np.testing.assert_allclose(ratios, 1, atol=tol(1e-2, 2e-2))


def test_what_is_kept_does_not_grow_with_the_rows():
    layers = network(3, 6, 2)
    few, many = jax.eval_shape(function_moments, layers, X[:10], None), moments_of(layers, jnp.tile(X, (10, 1)))
    assert _tree.nbytes(few) == _tree.nbytes(many)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(moments_of(layers, X)), strict=True):
        np.testing.assert_allclose(a, b, atol=tol(1e-12, 1e-5))


def test_moments_are_those_of_each_class():
    layers = network(3, 6, 2)
    kept = moments_of(layers, X, LABELS)
    for c in range(2):
        rows = np.asarray(X)[np.asarray(LABELS)[:, c] == 1]
        np.testing.assert_allclose(kept.share[c], len(rows) / 60, rtol=1e-6)
        np.testing.assert_allclose(kept.mean[c], rows.mean(0), atol=tol(1e-12, 1e-5))
        np.testing.assert_allclose(kept.covariance[c], np.cov(rows.T, bias=True), atol=tol(1e-12, 1e-4))
        on = rows @ np.asarray(layers[0][0]) + np.asarray(layers[0][1]) > 0
        np.testing.assert_allclose(kept.active[0][c], on.mean(0), atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(x64):
    layers = network(3, 6, 2)
    value = function_distance(moments_of(layers, X), by="moments")
    distance = jax.jit(jax.value_and_grad(lambda p: value(p, None, None)))
    after = moved(layers, 0.3)
    expected = central_difference(lambda p: distance(p)[0], after, 1e-4 if x64 else 1e-2)
    assert relative_error(distance(after)[1], expected) < tol(1e-8, 1e-2)


def test_mistakes_are_named():
    layers = network(3, 4, 2)
    with pytest.raises(hg.InputTypeError, match=r"sequence of pairs \(weight, bias\), one for each layer"):
        function_moments({"w": layers[0][0]}, X)
    with pytest.raises(hg.InputError, match=r"params\[1\] must have a weight of shape \(4, k\) .* found shapes \(2, 4"):
        function_moments([layers[0], (layers[1][0].T, layers[1][1])], X)
    with pytest.raises(hg.InputError, match=r"x must be a table of shape \[n, d\] .*, found shape \(3,\)"):
        function_moments(layers, X[0])
    with pytest.raises(hg.InputError, match=r"labels must be one-hot, shape \[60, classes\], found shape \(60,\)"):
        function_moments(layers, X, jnp.argmax(LABELS, axis=1))
    with pytest.raises(hg.InputError, match="has no row of class 2, whose moments are unknown"):
        function_moments(layers, X, jnp.pad(LABELS, ((0, 0), (0, 1))))
    kept = moments_of(layers, X)
    with pytest.raises(hg.InputError, match="between networks of one architecture"):
        function_distance(kept, by="moments")(network(3, 6, 2), None, None)
    with pytest.raises(hg.InputTypeError, match=r"moments must be hg.objectives.FunctionMoments, found list"):
        function_distance(layers, by="moments")

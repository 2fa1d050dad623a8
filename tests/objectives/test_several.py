"""Several outer losses: the weighted sum, and a front whose ends and middle are known in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.objectives import between, pareto, several, simplex_grid, with_weights
from tests._helpers import tol

# w*(h) = h; the losses are least at -1 and at 2, and F_α is least at -α₁ + 2 α₂: a line between two ends.
LOSSES = {"left": lambda w, h, data: jnp.sum((w + data) ** 2), "right": lambda w, h, data: jnp.sum((w - 2 * data) ** 2)}
INNER = lambda w, h, data: 0.5 * jnp.sum((w - h) ** 2)


def test_the_sum_and_its_gradient_are_weighted_and_each_loss_is_a_metric():
    w, data, weights = jnp.array([0.3, -0.2]), jnp.ones(2), np.array([0.3, 0.7])
    expected = weights @ [float(loss(w, None, data)) for loss in LOSSES.values()]
    for outer, batch in (
        (several(LOSSES, weights), data),
        (several(LOSSES, {"right": 0.7, "left": 0.3}), data),
        (several(LOSSES), (data, jnp.asarray(weights))),
    ):
        value, metrics = outer(w, None, batch)
        np.testing.assert_allclose(value, expected, rtol=tol(1e-12, 1e-5))
        np.testing.assert_allclose(metrics["left"], np.sum((np.asarray(w) + 1) ** 2), rtol=1e-5)
    grad = jax.grad(lambda w: several(LOSSES, weights)(w, None, data)[0])(w)
    np.testing.assert_allclose(grad, 2 * (0.3 * (w + 1) + 0.7 * (w - 2)), rtol=tol(1e-12, 1e-4))


def test_the_ends_of_a_front_are_found_and_every_point_between_is_best_for_its_weights():
    problem = pareto(INNER, LOSSES)
    batch = with_weights(jnp.ones(1), simplex_grid(2, parts=4))
    solver = hg.tasks(
        hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(1.0), steps=1)), count=5
    )  # one step of length one finds w = h
    result = hg.tune(
        solver, jnp.zeros(1), jnp.zeros((2, 1)), batch, batch, outer=optax.sgd(0.8), steps=60, progress=False
    )
    np.testing.assert_allclose(result.hparams[:, 0], [-1, 2], atol=tol(1e-5, 1e-3))
    for alpha in np.asarray(simplex_grid(2, parts=7)):
        np.testing.assert_allclose(between(result.hparams, alpha), -alpha[0] + 2 * alpha[1], atol=tol(1e-5, 1e-3))
    assert set(result.history.metrics) >= {"left", "right"}


@pytest.mark.parametrize(("count", "parts", "rows"), [(1, 3, 1), (2, 4, 5), (3, 4, 15)])
def test_the_grid_holds_each_weight_once(count, parts, rows):
    grid = np.asarray(simplex_grid(count, parts=parts))
    assert grid.shape == (rows, count) and len(np.unique(grid, axis=0)) == rows
    np.testing.assert_allclose(grid.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(grid * parts, np.round(grid * parts), atol=1e-5)


def test_mistakes_are_named():
    for weights in ([0.5, 0.6], [1.5, -0.5], {"left": 1.0, "right": 1.0}):
        with pytest.raises(hg.InputError, match="several: weights must be at least 0 and add up to 1, found"):
            several(LOSSES, weights)
    with pytest.raises(hg.InputError, match=r"weights must have shape \(2,\), one for each loss, found \(3,\)"):
        several(LOSSES, [0.2, 0.3, 0.5])
    with pytest.raises(hg.InputError, match=r"weights has \['left'\], and losses has \['left', 'right'\]"):
        several(LOSSES, {"left": 1.0})
    with pytest.raises(hg.InputTypeError, match="must be a dict of functions by name, found list"):
        several(list(LOSSES.values()))
    with pytest.raises(hg.InputError, match="losses is empty"):
        several({})
    with pytest.raises(hg.InputTypeError, match="with a key, and is given none: bind one"):
        several({"noisy": lambda w, h, data, key: w})
    with pytest.raises(hg.InputError, match=r"losses\['each'\] must return a scalar, found shape \(2,\)"):
        several({"each": lambda w, h, data: w}, [1.0])(jnp.ones(2), None, None)
    with pytest.raises(hg.InputError, match="at least two outer losses, found 1"):
        pareto(INNER, {"left": LOSSES["left"]})
    with pytest.raises(hg.InputError, match=r"the batch must be \(data, weights\), found NoneType"):
        pareto(INNER, LOSSES).inner_loss(0.0, jnp.zeros(2), None)
    with pytest.raises(hg.InputError, match=r"leading axis of 2 ends, one for each weight, found shape \(3,\)"):
        between(jnp.zeros(3), jnp.array([0.5, 0.5]))
    with pytest.raises(hg.InputError, match=r"weights must have shape \[tasks, losses\], found \(2,\)"):
        with_weights(None, jnp.array([0.5, 0.5]))
    assert np.isnan(jax.jit(lambda a: several(LOSSES)(0.0, None, (0.0, a))[0])(jnp.array([0.5, 0.6])))

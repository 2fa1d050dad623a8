"""Proximal operators: optimality of the minimum that defines them, and derivatives against differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import tol

V = np.random.default_rng(0).normal(size=(4, 6))
# Name: operator of (v, strength), penalty of x.
OPERATORS = {
    "l1": (hg.prox.l1, lambda x, s: s * np.abs(x).sum()),
    "elastic net": (lambda v, s: hg.prox.elastic_net(v, s, 0.4), lambda x, s: s * np.abs(x).sum() + 0.2 * np.sum(x**2)),
    "group": (hg.prox.group, lambda x, s: s * np.linalg.norm(x, axis=-1).sum()),
    "group, two axes": (lambda v, s: hg.prox.group(v, s, axis=(0, 1)), lambda x, s: s * np.linalg.norm(x)),
    "nuclear": (hg.prox.nuclear, lambda x, s: s * np.linalg.svd(x, compute_uv=False).sum()),
    "nuclear, tall": (
        lambda v, s: hg.prox.nuclear(v.T, s).T,
        lambda x, s: s * np.linalg.svd(x, compute_uv=False).sum(),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.1, 50.0])
def test_no_other_point_is_better(name, strength):
    operator, penalty = OPERATORS[name]
    x = np.asarray(operator(jnp.asarray(V), strength), np.float64)
    objective = lambda x: 0.5 * np.sum((x - V) ** 2) + penalty(x, strength)
    best, rng = objective(x), np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(40):
            other = x + size * rng.normal(size=V.shape) * (rng.random(V.shape) < rng.random())
            assert objective(other) >= best - tol(1e-12, 1e-5) * abs(best)
    assert objective(V) >= best - tol(1e-12, 1e-5) and objective(0 * V) >= best - tol(1e-12, 1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_equal_central_differences(name):
    operator, _ = OPERATORS[name]
    rng, h = np.random.default_rng(2), 1e-6
    direction, weights = rng.normal(size=V.shape), rng.normal(size=V.shape)
    value = lambda t: jnp.sum(weights * operator(jnp.asarray(V) + t * direction, 0.8 + 0.3 * t))
    with jax.enable_x64(True):  # differences need float64 in either run
        difference = (value(h) - value(-h)) / (2 * h)
        np.testing.assert_allclose(jax.jvp(value, (0.0,), (1.0,))[1], difference, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(value)(0.0), difference, rtol=1e-6)


def test_the_nuclear_norm_has_a_derivative_where_singular_values_coincide():
    v = jnp.diag(jnp.asarray([2.0, 2.0, 0.1]))
    slope = jax.jvp(lambda t: hg.prox.nuclear(v + t * jnp.eye(3), 1.0), (0.0,), (1.0,))[1]
    np.testing.assert_allclose(slope, np.diag([1.0, 1.0, 0.0]), atol=tol(1e-12, 1e-5))
    assert np.all(np.isfinite(jax.jacobian(lambda v: hg.prox.nuclear(v, 1.0))(jnp.zeros((2, 3)))))


@pytest.mark.parametrize("name", OPERATORS)
def test_zero_has_finite_derivatives(name):
    operator, _ = OPERATORS[name]
    slope = jax.jacobian(operator)(jnp.zeros((3, 3)), 0.5)
    np.testing.assert_array_equal(slope, np.zeros_like(slope))


def test_a_vector_has_no_nuclear_norm():
    with pytest.raises(ValueError, match=r"must be a matrix, found shape \(3,\)"):
        hg.prox.nuclear(jnp.ones(3), 1.0)

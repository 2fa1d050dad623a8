"""Finite differences with an error that can be believed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.diagnostics._differences import Solution, settled, slopes, tighten
from tests.diagnostics import _ridge as ridge

EPS = 2.0**-52


def slope_of(f, at, eps=EPS):
    def resolve(vector):
        value = float(f(float(vector[0])))
        return Solution(value, value, 1, 0.0, True, eps)

    point = np.asarray([at])
    return slopes(resolve, point, np.ones(1), resolve(point), 1e-6)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("f", "derivative"),
    [
        (np.sin, np.cos),
        (np.exp, np.exp),
        (lambda x: 1e6 + x**3, lambda x: 3 * x**2),
        (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
        (lambda x: np.sin(300 * x), lambda x: 300 * np.cos(300 * x)),
        (lambda x: x * 1e-12, lambda x: 1e-12),
    ],
)
def test_the_error_estimate_bounds_the_error(f, derivative, seed):
    at = np.random.default_rng(seed).uniform(0.2, 1.8)
    found = slope_of(f, at)
    assert abs(found.value - derivative(at)) <= found.error
    assert found.jump == 0


@pytest.mark.parametrize("noise", [1e-13, 1e-9, 1e-6])
def test_noise_shows_in_the_error_estimate_and_seldom_makes_a_kink(noise):
    rng = np.random.default_rng(0)
    points = rng.uniform(0.2, 1.8, 100)
    found = [slope_of(lambda x: np.exp(x) + noise * rng.normal(), at) for at in points]
    wrong = [abs(s.value - np.exp(at)) > 3 * s.error for s, at in zip(found, points, strict=True)]
    assert np.mean(wrong) <= 0.05
    assert np.mean([s.jump != 0 for s in found]) <= 0.05
    assert all(s.error < 1e4 * noise + 1e-6 for s in found)


def test_a_kink_is_the_difference_of_the_slopes():
    found = slope_of(lambda x: np.exp(x) + 3 * abs(x - 0.6), 0.6)
    assert found.jump == pytest.approx(6, rel=1e-2)
    assert found.value == pytest.approx(np.exp(0.6), rel=1e-6)
    assert slope_of(lambda x: np.exp(x) + 3 * abs(x - 0.6), 0.7).jump == 0


def test_a_sequence_settles_at_rounding_level_and_not_before():
    assert not settled([1.0], EPS)
    assert settled([2.0, 1.0, 1.0], EPS)
    assert not settled([1 + 2.0**-k for k in range(20)], EPS)
    assert settled([1 + 2.0**-k for k in range(60)], EPS)
    assert settled([2.0, 1 + 3e-12, 1 - 2e-12, 1 + 2.5e-12, 1 - 2.5e-12], EPS)  # noise
    assert not settled([1.0, 2.0, 1.0, 2.0, 1.0], EPS)


def test_tightening_changes_the_inner_tolerance_alone_and_keeps_types():
    inner = {"tol": jnp.asarray(1e-3, jnp.float32), "max_steps": jnp.int32(7)}
    state = ridge.State(jnp.ones(2), (), None, {"inner": inner, "linear": {"tol": jnp.asarray(1e-3)}})
    about = hg.About("mine", "optimum", options=("inner.tol", "inner.max_steps", "linear.tol"))
    tight = tighten(state, about)
    assert float(tight.options["inner"]["tol"]) < 1e-5 and int(tight.options["inner"]["max_steps"]) > 1000
    assert tight.options["linear"] == state.options["linear"]
    assert all(a.dtype == b.dtype for a, b in zip(tight.options["inner"].values(), inner.values(), strict=True))
    for other in (jnp.ones(2), (1, 2), state._replace(options={}), state._replace(options={"inner": {}})):
        assert tighten(other, about) is other
    budget = state._replace(options={"inner": {"tol": jnp.zeros(()), "max_steps": jnp.int32(7)}})
    assert int(tighten(budget, about).options["inner"]["max_steps"]) == 7  # a fixed budget stays one


def test_tightening_replaces_only_options_that_the_solver_declares():
    options = {"inner": {"tol": jnp.asarray(1e-3), "max_steps": jnp.int32(7)}, "scale": jnp.asarray(0.1)}
    state = ridge.State(jnp.ones(2), (), None, options)
    every = ("inner.tol", "inner.max_steps", "scale")
    assert tighten(state, hg.About()) is state
    assert tighten(state, hg.About("mine", "response")) is state
    assert float(tighten(state, hg.About("mine", "optimum", options=every)).options["scale"]) == float(options["scale"])
    learned = tighten(state, hg.About("mine", "response", options=every)).options
    assert float(learned["scale"]) == 0 and int(learned["inner"]["max_steps"]) > 7


def test_a_function_that_bends_within_a_thousandth_is_followed_by_smaller_steps():
    """Near the edge of stability the outer loss is such a function of the learning rate."""
    slope = slope_of(lambda x: np.sin(3e4 * x) + x, 0.7)
    np.testing.assert_allclose(slope.value, 3e4 * np.cos(2.1e4) + 1, rtol=1e-6)
    assert abs(slope.value - 3e4 * np.cos(2.1e4) - 1) <= slope.error <= 0.01 * abs(slope.value)

"""The quasi-Newton controller: minima, evaluations, refusals."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import tol
from tests.outer._closed import closed


def run(loss, u, steps=60, **options):
    return hg.tune(
        closed(loss), jnp.zeros(1), jnp.asarray(u, jnp.result_type(float)), outer=hg.outer.lbfgs(**options),
        steps=steps, progress=False,
    )  # fmt: skip


_TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]


def quadratic(u):
    """Turned, so that no method which scales each entry by itself sees its eigenvalues."""
    return 0.5 * jnp.sum(jnp.logspace(0, 2, 30) * (_TURN @ (u - 1.0)) ** 2)


def rosenbrock(u):
    return (1 - u[0]) ** 2 + 100 * (u[1] - u[0] ** 2) ** 2


def test_thirty_hyperparameters_take_a_third_of_the_evaluations_of_adam():
    result = run(quadratic, np.zeros(30), steps=60)
    reached = int(np.flatnonzero(result.history.value < 1e-4 * quadratic(jnp.zeros(30)))[0])
    adam = hg.tune(
        closed(quadratic), jnp.zeros(1), jnp.zeros(30), outer=optax.adam(0.1), steps=400, progress=False
    ).history.value
    assert reached < np.flatnonzero(adam < 1e-4 * quadratic(jnp.zeros(30)))[0] / 3


def test_the_minimum_of_a_curved_valley_is_found_and_values_fall():
    result = run(rosenbrock, [-1.2, 1.0], steps=80)
    np.testing.assert_allclose(result.hparams, 1.0, atol=tol(1e-6, 5e-2))
    kept = result.history.value[result.history.accepted]
    assert np.all(np.diff(kept) <= 1e-12 + tol(0, 1e-5)) and not result.history.accepted.all()


def test_a_refused_trial_costs_no_hypergradient():
    result = run(rosenbrock, [-1.2, 1.0], steps=40)
    assert int(result.state.calls) == int(result.history.accepted.sum()) < 40
    assert np.all(np.isnan(result.history.grad_norm[~result.history.accepted]))


def test_what_is_not_finite_is_left_by_a_shorter_step():
    barrier = lambda u: jnp.sum(u - jnp.log(u))  # NaN for u ≤ 0, which the first unit steps may reach
    result = run(barrier, [6.0, 0.2], steps=60)
    np.testing.assert_allclose(result.hparams, 1.0, atol=tol(1e-5, 1e-2))
    assert hg.Status.NONFINITE_LOSS not in result.history.status[result.history.accepted]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_the_unit_of_the_outer_loss_does_not_matter(factor):
    """A power of two changes no digit; from any other, a line search in float32 would take another path."""
    plain, scaled = (run(lambda u, c=c: c * rosenbrock(u), [-1.2, 1.0], steps=25) for c in (1.0, factor))
    np.testing.assert_allclose(plain.history.hparams, scaled.history.hparams, rtol=tol(1e-8, 1e-3), atol=0)


def test_a_domain_may_shorten_its_steps():
    problem = hg.Problem(
        lambda w, l2, b: jnp.sum((w - 2.0) ** 2) + jnp.sum(l2 * w**2),
        lambda w, l2, b: jnp.sum((w - jnp.asarray([1.0, 0.5])) ** 2),
    )
    result = hg.tune(
        hg.implicit(problem), jnp.zeros(2), jnp.full(2, 0.1), outer=hg.outer.lbfgs(history=3), steps=30,
        domain=hg.domains.interval(0.0, 10.0), progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(result.hparams, [1.0, 3.0], rtol=tol(1e-5, 2e-2))


def test_mistakes_are_named():
    with pytest.raises(hg.InputError, match="history must be at least 1"):
        hg.outer.lbfgs(history=0)
    with pytest.raises(hg.InputTypeError, match="history must be"):
        hg.outer.lbfgs(history=2.5)

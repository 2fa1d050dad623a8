"""MAID from any accuracy and any step size: the same optimum, and never a step that its errors could explain."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.outer import TuneStatus
from tests._helpers import tol
from tests.outer._closed import closed

CURVES = jnp.asarray([1.0, 6.0])


def bowl(u):
    return 0.5 * jnp.sum(CURVES * (u - 0.7) ** 2) + 1.0


def quadratic(seed=29, n=40, m=5):
    """A least-squares outer loss of the solution of a linear system; and its minimum in closed form."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = basis * np.linspace(1, 20, n) @ basis.T
    b, c, y = rng.normal(size=(n, m)), rng.normal(size=(n, n)) / n**0.5, 3 * rng.normal(size=n)
    through = c @ np.linalg.solve(a, b)
    best = 0.5 * np.linalg.norm(through @ np.linalg.lstsq(through, y, rcond=None)[0] - y) ** 2
    a, b, c, y = map(jnp.asarray, (a, b, c, y))
    inner = lambda w, h, batch: 0.5 * w @ a @ w - w @ (b @ h)
    return hg.Problem(inner, lambda w, h, batch: 0.5 * jnp.sum((c @ w - y) ** 2)), best


def test_it_ends_at_the_optimum_from_any_accuracy_and_any_step_size():
    problem, best = quadratic()
    solver, found = hg.implicit(problem), []
    for first, step_size in ((1e-1, None), (1e-5, 1e-3), (1e-3, 10.0)):
        outer = hg.outer.maid(step_size=step_size, tol=first)
        result = hg.tune(solver, jnp.zeros(40), jnp.ones(5), outer=outer, steps=250, progress=False)
        found.append(result.best.value)
    np.testing.assert_allclose(found, best, rtol=tol(1e-8, 1e-4))


def test_a_fixed_accuracy_that_is_too_loose_stalls_and_this_one_is_tightened():
    problem, best = quadratic()
    result = hg.tune(
        hg.implicit(problem), jnp.zeros(40), jnp.ones(5), outer=hg.outer.maid(tol=0.5), steps=250, progress=False
    )
    assert result.outer_state.accuracy < 1e-4
    np.testing.assert_allclose(result.best.value, best, rtol=tol(1e-8, 1e-4))


def test_an_accepted_value_is_lower_by_more_than_both_errors():
    result = hg.tune(
        closed(bowl), jnp.zeros(1), jnp.array([3.0, -2.0]), outer=hg.outer.maid(step_size=1.0, tol=1e-2), steps=120,
        progress=False,
    )  # fmt: skip
    asked, history = result.history.extra["asked"], result.history
    taken = np.flatnonzero(history.accepted)
    path = history.hparams
    again = np.asarray([np.array_equal(path[i], path[j]) for j, i in itertools.pairwise(taken)])
    values, noise = history.value[taken], (asked * np.abs(history.value))[taken]
    falls = values[:-1] - values[1:] >= (noise[:-1] + noise[1:]) * (1 - 1e-5)
    assert np.all(falls | again) and np.any(~again)
    np.testing.assert_allclose(result.best.hparams, 0.7, atol=tol(1e-3, 2e-2))


def test_where_no_step_can_be_told_from_rounding_the_run_has_converged():
    outer = hg.outer.maid(step_size=0.1)
    result = hg.tune(closed(bowl), jnp.zeros(1), jnp.array([0.7, 0.7]), outer=outer, steps=500, progress=False)
    assert result.status is TuneStatus.CONVERGED and len(result.history.value) < 200


def test_a_gradient_that_is_worth_nothing_is_asked_for_again_more_accurately():
    inner = closed(bowl)

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        out, state = inner.hypergrad(state, hparams, train, valid, key=key)
        loose = out.info.extra["asked"] > 1e-3
        return out._replace(info=out.info._replace(error_estimate=jnp.where(loose, 0.9, 0.01))), state

    solver = inner._replace(hypergrad=hypergrad)
    result = hg.tune(
        solver, jnp.zeros(1), jnp.array([3.0, -2.0]), outer=hg.outer.maid(step_size=0.1, tol=1e-2), steps=8,
        progress=False,
    )  # fmt: skip
    history = result.history
    assert list(history.accepted[:5]) == [True, False, False, False, True], "the first always is, by the loop"
    np.testing.assert_allclose(history.extra["asked"][:5], 1e-2 * 0.5 ** np.arange(5), rtol=1e-5)
    assert np.all(history.hparams[:5] == history.hparams[0])


def test_mistakes_are_named():
    for name, value in (("step_size", 0.0), ("tol", 0.0), ("tol", 1.0)):
        with pytest.raises(hg.InputError, match=f"{name} must be"):
            hg.outer.maid(**{name: value})
    problem, _ = quadratic()
    solver = hg.implicit(problem, inner=hg.inner.gradient(optax.sgd(0.01), steps=3))
    with pytest.raises(hg.InputError, match=r"inner\.tol"):
        hg.tune(solver, jnp.zeros(40), jnp.ones(5), outer=hg.outer.maid(), steps=2, progress=False)
    with pytest.raises(hg.InputError, match=r"minibatches|drawn"):
        hg.tune(
            hg.implicit(problem), jnp.zeros(40), jnp.ones(5), hg.minibatches((jnp.ones((4, 1)),), 2),
            outer=hg.outer.maid(), steps=2, key=jax.random.key(0), progress=False,
        )  # fmt: skip

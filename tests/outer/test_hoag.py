"""HOAG by its own rule: what it accepts, where it goes back to, which accuracies it asks for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import tol
from tests.outer._closed import closed

CURVES = jnp.asarray([1.0, 6.0])


def bowl(u):
    return 0.5 * jnp.sum(CURVES * (u - 0.7) ** 2) + 1.0


def by_hand(u, step_size, steps, first_tol=1e-3):
    """The rule in NumPy: `(points tried, accepted, tolerances)`."""
    curves = np.asarray(CURVES, np.float64)
    f = lambda u: 0.5 * np.sum(curves * (u - 0.7) ** 2) + 1.0
    tried, accepted, asked = [], [], []
    here, value, inverse, before, count, trial = u, np.inf, 1 / step_size, 1.0, 0, u
    for _ in range(steps):
        share = 0.9**count
        asked.append(first_tol * share)
        tried.append(trial)
        room = abs(value) * first_tol * (0.25 * share + 1.25 * before * np.linalg.norm(trial - here))
        ok = count == 0 or f(trial) <= value + room
        accepted.append(ok)
        if ok:
            inverse = inverse * (1 if count == 0 else 0.95)
            here, value, before, count = trial, f(trial), share, count + 1
        else:
            inverse *= 2
        trial = here - curves * (here - 0.7) / inverse
    return np.asarray(tried), np.asarray(accepted), np.asarray(asked)


def run(step_size, steps, u=(3.0, -2.0), loss=bowl, **options):
    return hg.tune(
        closed(loss), jnp.zeros(1), jnp.asarray(u), outer=hg.outer.hoag(step_size=step_size, **options), steps=steps,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("step_size", [0.1, 5.0])
def test_the_run_is_that_of_the_rule(step_size):
    result = run(step_size, 25)
    tried, accepted, asked = by_hand(np.array([3.0, -2.0]), step_size, 25)
    np.testing.assert_array_equal(result.history.accepted, accepted)
    np.testing.assert_allclose(result.history.hparams, tried, rtol=tol(1e-10, 1e-3), atol=tol(1e-12, 1e-4))
    np.testing.assert_allclose(result.history.extra["asked"], asked, rtol=tol(1e-10, 1e-5))
    assert accepted.all() == (step_size == 0.1)


def test_a_first_step_fifty_times_too_long_costs_a_few_refusals():
    result = run(50 / 6, 60)
    assert not result.history.accepted.all() and np.sum(~result.history.accepted) < 20
    np.testing.assert_allclose(result.hparams, 0.7, atol=1e-2)
    assert result.best.value == result.history.value[result.history.accepted][-1]  # the last accepted


def test_a_trial_that_is_not_finite_is_ten_times_closer_next():
    result = run(5.0, 12, loss=lambda u: jnp.where(jnp.all(jnp.abs(u) < 3.5), bowl(u), jnp.nan))
    bad = np.flatnonzero(~np.isfinite(result.history.value))
    assert bad.size and not result.history.accepted[bad].any()
    far, near = (np.linalg.norm(result.history.hparams[i] - [3.0, -2.0]) for i in (bad[0], bad[0] + 1))
    np.testing.assert_allclose(near, far / 10, rtol=tol(1e-9, 1e-3))


def test_the_unit_of_the_outer_loss_does_not_matter():
    runs = [run(None, 20, loss=lambda u, c=c: c * bowl(u)) for c in (1.0, 1e8)]
    np.testing.assert_array_equal(runs[0].history.accepted, runs[1].history.accepted)
    np.testing.assert_allclose(runs[0].history.hparams, runs[1].history.hparams, rtol=tol(1e-9, 1e-3))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("quadratic", lambda k: 1 / (k + 1) ** 2),
        ("cubic", lambda k: 1 / (k + 1) ** 3),
        (lambda k: 0.5**k, lambda k: 0.5**k),
    ],
)
def test_schedules(schedule, expected):
    asked = run(0.1, 6, schedule=schedule, tol=1e-2).history.extra["asked"]
    np.testing.assert_allclose(asked, 1e-2 * expected(np.arange(6.0)), rtol=1e-5)
    exact = run(0.1, 2, schedule="exact").history.extra["asked"]
    assert np.all(exact < tol(1e-13, 1e-5))


def test_a_ridge_is_tuned_and_a_run_goes_on_in_the_middle_of_a_backtrack(tmp_path):
    problem = hg.Problem(
        lambda w, l2, b: jnp.sum((w - 2.0) ** 2) + l2 * jnp.sum(w**2), lambda w, l2, b: jnp.sum((w - 1.0) ** 2)
    )

    def go(steps, **options):
        return hg.tune(
            hg.implicit(problem), jnp.zeros(3), 0.1, outer=hg.outer.hoag(step_size=20.0), steps=steps,
            domain=hg.domains.log(), progress=False, **options,
        )  # fmt: skip

    whole = go(24)
    refused = int(np.flatnonzero(~whole.history.accepted)[0])
    go(refused + 1, checkpoint=tmp_path, every=1)
    resumed = go(24, checkpoint=tmp_path, every=1)
    np.testing.assert_array_equal(resumed.history.value, whole.history.value)
    assert resumed.hparams == whole.hparams
    np.testing.assert_allclose(whole.hparams, 1.0, rtol=2e-2)


def test_mistakes_are_named():
    with pytest.raises(hg.InputError, match=r"schedule must be one of 'exponential', .*found 'linear'"):
        hg.outer.hoag(schedule="linear")
    with pytest.raises(hg.InputError, match="schedule has no finite sum"):
        hg.outer.hoag(schedule=lambda k: 1 / (k + 1))
    with pytest.raises(hg.InputError, match="schedule has no finite sum"):
        hg.outer.hoag(schedule=lambda k: 0.1)
    with pytest.raises(hg.InputError, match="it must be at least 0"):
        hg.outer.hoag(schedule=lambda k: -(0.9**k))
    with pytest.raises(hg.InputError, match=r"inf\] at steps .*must be at least 0 and fall"):
        hg.outer.hoag(schedule=lambda k: 1.1**k)
    for schedule in (lambda: 0.1, lambda k: jnp.ones(2), lambda k: None):
        with pytest.raises(hg.InputTypeError, match="schedule must be a function of the step number"):
            hg.outer.hoag(schedule=schedule)
    with pytest.raises(hg.InputError, match="tol must be"):
        hg.outer.hoag(tol=2.0)
    problem = hg.Problem(lambda w, h, b: jnp.sum((w - h) ** 2), lambda w, h, b: jnp.sum(w**2))
    unrolled = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=3))
    with pytest.raises(hg.InputError, match=r"hoag: hg\.unrolled has no inner\.tol"):
        hg.tune(unrolled, jnp.zeros(2), 1.0, outer=hg.outer.hoag(), steps=2, progress=False)
    rows = hg.minibatches(jnp.zeros((8, 2)), 4)
    with pytest.raises(hg.InputError, match=r"train is hg\.minibatches"):
        hg.tune(
            hg.implicit(problem), jnp.zeros(2), 1.0, rows, outer=hg.outer.hoag(), steps=2, progress=False,
            key=jax.random.key(0),
        )  # fmt: skip

"""The error estimate of an unrolled run: rounding of the path, what truncation left out, what never mattered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.unrolling import error as measured
from tests._helpers import relative_error, tol

CURVE = np.array([1.0, 0.3, 0.05])
USABLE = hg.Status.INSENSITIVE


def bowl(w, h, batch):
    return 0.5 * jnp.sum(jnp.asarray(CURVE, w.dtype) * (w - batch) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optax.rmsprop(0.05, decay=0.95),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.3, b1=0.3, b2=0.5)),
    ],
    ids=["rmsprop", "clipped adamw"],
)
def test_an_optimizer_that_never_settles_amplifies_rounding_and_the_estimate_says_so(optimizer):
    """In float32, two starts a unit of rounding apart give different hypergradients; neither claims to be right."""
    draws, rng = 64, np.random.default_rng(3)
    solver = hg.unrolled(
        hg.Problem(bowl, lambda w, h, b: jnp.sum((w - b) ** 2)),
        inner=hg.inner.gradient(optimizer(), steps=200),
        mode="reverse",
    )
    start, train, valid = (jnp.asarray(rng.normal(size=(draws, 3)), jnp.float32) for _ in range(3))
    hparams = jnp.asarray(rng.uniform(-5, 0, draws), jnp.float32)
    run = jax.jit(jax.vmap(lambda w, h, t, v: solver.hypergrad(solver.init(w, h), h, t, v)[0]))
    out, near = (run(w, hparams, train, valid) for w in (start, start * np.float32(1 + 2e-7)))
    moved = np.abs(np.asarray(out.grad - near.grad)) / np.maximum(np.abs(out.grad), np.abs(near.grad))
    usable = np.asarray(out.info.status) <= USABLE
    assert np.sum(moved > 0.1) >= 3  # there are such draws
    told = np.asarray(out.info.error_estimate)
    assert np.all(told[usable] >= moved[usable] / 10)


def test_logistic_maps_from_calm_to_chaos_are_right_or_say_that_they_are_not():
    """In float32, against the recursion in NumPy; for a fifth of them, float64 is too coarse as well."""
    rng, draws, steps = np.random.default_rng(5), 200, 150
    rates, starts = rng.uniform(2.5, 4, draws).astype(np.float32), rng.uniform(0.1, 0.9, draws).astype(np.float32)

    def by_hand(w, slope=0.0):
        h = rates.astype(float)
        for _ in range(steps):
            w, slope = h * w * (1 - w), w * (1 - w) + h * (1 - 2 * w) * slope
        return slope

    exact, near = (by_hand(starts.astype(float) * (1 + nudge)) for nudge in (0, 1e-13))
    known = np.abs(exact - near) < 1e-3 * np.abs(exact)
    inner = hg.inner.fixed_point(lambda w, h, b: h * w * (1 - w), steps=steps)
    solver = hg.unrolled(hg.Problem(bowl, lambda w, h, b: w[0]), inner=inner, mode="reverse")
    run = jax.jit(jax.vmap(lambda w, h: solver.hypergrad(solver.init(w, h), h)[0]))
    out = run(jnp.asarray(starts[:, None], jnp.float32), jnp.asarray(rates, jnp.float32))
    told, usable = np.asarray(out.info.error_estimate), np.asarray(out.info.status) <= USABLE
    error = np.abs(np.asarray(out.grad, np.float64) - exact) / np.abs(exact)
    assert np.sum(known) >= 100 and np.sum(~known) >= 30
    assert np.all(told[known & usable] >= error[known & usable] / 10)
    assert np.all(usable[known & (error < 1e-2)])
    assert np.all(np.isinf(told[~known]))


def test_a_slow_mode_that_starts_small_is_not_left_out_of_the_estimate():
    """Of w₀ + .01 w₁ only the first seems to matter in the last twenty steps; the second takes a thousand."""
    curve, target = jnp.asarray([1.0, 1e-3]), jnp.asarray([1.0, 3.0])
    problem = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum(curve * (w - target) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2),
        lambda w, h, b: w[0] + 0.01 * w[1],
    )
    inner = hg.inner.gradient(optax.sgd(0.3), steps=3000)
    exact = -np.exp(-5) * np.sum(
        np.array([1, 0.01]) * np.asarray(curve * target) / (np.asarray(curve) + np.exp(-5)) ** 2
    )
    options = [{"mode": "reverse"}, {"mode": "reverse", "remat": "none"}, {"mode": "forward"}]
    solvers = [hg.unrolled(problem, inner=inner, truncate=20, **o) for o in options]
    h = jnp.asarray(-5.0)
    for out in jax.jit(lambda h: [s.hypergrad(s.init(jnp.zeros(2), h), h)[0] for s in solvers])(h):
        error = relative_error(out.grad, exact)
        assert 0.3 < error < 0.35
        assert error <= float(out.info.error_estimate)


def adapter(w, h, batch):
    """A branch that is zero at first: its first factor has a gradient of exactly zero, and Adam divides by it."""
    return jnp.mean((jnp.sum(batch["x"], 1) / 5 + batch["x"] @ w["a"] @ w["b"] - batch["y"]) ** 2) * jnp.exp(h["gain"])


def test_parts_of_the_adjoint_that_reach_no_hyperparameter_are_no_explosion():
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(20, 5))), "y": jnp.asarray(rng.normal(size=20))}
    start = {"a": jnp.asarray(rng.normal(size=(5, 2))), "b": jnp.zeros(2)}
    hparams = {"gain": jnp.asarray(0.3), "lr": jnp.asarray(0.02)}
    inner = hg.inner.gradient(lambda h: optax.adam(h["lr"]), steps=40)
    problem = hg.Problem(adapter, lambda w, h, b: adapter(w, {"gain": jnp.zeros(())}, b))
    solvers = [hg.unrolled(problem, inner=inner, mode=mode) for mode in ("reverse", "forward")]
    reverse, forward = jax.jit(lambda h: [s.hypergrad(s.init(start, h), h, batch, batch)[0] for s in solvers])(hparams)
    assert relative_error(reverse.grad, forward.grad) <= tol(1e-9, 1e-3)
    for out in (reverse, forward):
        assert int(out.info.status) == hg.Status.OK
        assert float(out.info.error_estimate) <= tol(1e-9, 1e-2)
    assert float(reverse.info.extra["adjoint_growth"]) > 1e5  # what it was called an explosion for


def test_half_precision_is_counted():
    for params, hparams in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        solver = hg.unrolled(
            hg.Problem(bowl, lambda w, h, b: jnp.sum((w - b) ** 2)),
            inner=hg.inner.gradient(optax.sgd(0.3), steps=10),
            mode="reverse",
        )
        w, h = jnp.asarray([0.5, -1.0, 2.0], params), jnp.asarray(-1.2, hparams)
        out, _ = jax.jit(solver.hypergrad)(solver.init(w, h), h, jnp.ones(3, params), jnp.zeros(3, params))
        assert float(out.info.error_estimate) >= 2 * 2.0**-8


def test_what_twins_cannot_see_is_counted():
    """The sum of a thousand contributions, and a result among numbers that underflow: twins round those alike."""
    one, eps = jnp.ones(()), float(jnp.finfo(jnp.ones(()).dtype).eps)
    assert 2 * eps <= float(measured.least(one, one, 1)) <= 4 * eps
    assert float(measured.least(one, one, 1000)) >= 0.5 * np.sqrt(1000) * eps
    tiny = float(jnp.finfo(one.dtype).tiny)
    assert float(measured.least(100 * tiny * one, one, 1)) >= 0.01
    assert float(measured.least(0 * one, one, 1)) <= 4 * eps


def toy(gap):
    """A run whose twins differ by `gap` in the hypergradient, and by twice that in where they end."""
    sign = lambda k: jnp.where(k % 2 == 1, (k + 1) // 2, -(k // 2))
    return lambda k: (jnp.asarray(1.0) + sign(k) * gap, jnp.asarray([2.0]) * (1 + 2 * sign(k) * gap))


@pytest.mark.parametrize(
    ("calls", "gap", "count"), [(0, 1e-2, 4), (0, 0.0, 2), (1, 1e-2, 0), (31, 1e-2, 0), (32, 1e-2, 2)]
)
def test_pairs_of_twins_run_at_the_first_call_and_at_every_32nd(calls, gap, count):
    trust = measured.Trust(jnp.int32(calls), jnp.asarray(1.0))
    like = (jnp.zeros(()), jnp.zeros(1))
    (grad, end), spread = jax.jit(lambda trust: measured.with_twins(toy(gap), like, lambda done: done, trust))(trust)
    assert int(spread.count) == count
    assert float(grad) == 1 and float(end[0]) == 2  # what is returned is the run, not a twin
    squares = 2 * np.sum(np.arange(1, count // 2 + 1) ** 2)
    np.testing.assert_allclose(spread.grad, squares * gap**2, rtol=tol(1e-9, 1e-3))
    np.testing.assert_allclose(spread.path, 4 * squares * gap**2, rtol=tol(1e-9, 1e-3))
    np.testing.assert_allclose(spread.bend, 0, atol=tol(1e-30, 1e-12))  # opposite twins lie opposite


def test_twins_on_one_side_leave_nothing_known_until_the_next_pair():
    """Where rounding decides on which side of a kink a step lies, one twin of a pair moves and the other does not."""
    kinked = lambda k: (jnp.where(k % 2 == 1, 1.01, 1.0), jnp.asarray([2.0]))
    like, one = (jnp.zeros(()), jnp.zeros(1)), jnp.asarray(1.0)
    trust, told = measured.new_trust(one), []
    for run in [kinked] + 31 * [kinked] + [toy(1e-3)] + [toy(1e-3)]:
        _, spread = measured.with_twins(run, like, lambda done: done, trust)
        found, trust = measured.rounding(spread, one * 1e-4, one * 1e-7, one * 1e-3, trust)
        told.append(float(found))
        assert np.isfinite(trust.ratio)
    np.testing.assert_array_equal(np.isinf(told), 32 * [True] + 2 * [False])
    assert 1e-3 <= told[32] <= 2e-2 and int(trust.calls) == 34


def test_what_twins_said_calibrates_the_calls_between_them():
    number, floor, calm = jnp.asarray(1.0), jnp.asarray(1e-6), jnp.asarray(1e-6)
    spread = measured.Spread(jnp.int32(4), jnp.asarray(0.1), *2 * [jnp.asarray(0.0)])  # .16 each: 1e-2 a unit
    first, trust = measured.rounding(spread, jnp.asarray(1e-4), floor, calm, measured.new_trust(number))
    assert 0.02 <= float(first) <= 0.1
    none = measured.Spread(jnp.int32(0), *3 * [jnp.asarray(0.0)])
    same, trust = measured.rounding(none, jnp.asarray(1e-4), floor, calm, trust)
    worse, trust = measured.rounding(none, jnp.asarray(1e-3), floor, calm, trust)
    assert first <= same <= 4 * first and int(trust.calls) == 3
    np.testing.assert_allclose(worse, 10 * same, rtol=1e-5)


def test_an_error_a_quarter_as_large_as_what_was_found_leaves_nothing_known():
    grad, zero = jnp.asarray(1.0), jnp.asarray(0.0)
    told = [float(measured.estimate(grad, grad, jnp.asarray(share), zero)) for share in (1e-3, 0.125, 0.25, np.nan)]
    np.testing.assert_allclose(told, [1e-3 / (1 - 4e-3), 0.25, np.inf, np.inf], rtol=1e-5)


def test_a_path_that_amplifies_rounding_is_believed_over_twins_that_agree():
    """Twins end a thousand times further apart than rounding takes a run, but agree in the hypergradient by chance."""
    one, floor, calm = jnp.asarray(1.0), jnp.asarray(1e-7), jnp.asarray(1e-6)
    told = []
    for path in (16e-6, 16e-3):
        spread = measured.Spread(jnp.int32(4), jnp.asarray(1e-5), jnp.asarray(4 * path**2), jnp.asarray(0.0))
        told.append(float(measured.rounding(spread, one, floor, calm, measured.new_trust(one))[0]))
    assert 1e-4 <= told[0] <= 1e-3 and told[1] > 0.5


@pytest.mark.parametrize("modes", [{0.7: 1.0}, {0.7: 1.0, 0.999: 1e-3}, {0.9: 1.0, 0.99: 0.1, 0.9995: 0.02}])
def test_what_truncation_left_out_is_no_more_than_six_times_the_estimate_and_not_nothing(modes):
    """Contributions and adjoints of a few real modes, of which thirty steps were kept."""
    kept, more = 30, 1000
    steps = np.arange(kept + more)
    terms = sum(size * rate**steps for rate, size in modes.items())
    adjoints = np.sqrt(sum(size**2 * rate ** (2 * steps) for rate, size in modes.items()))
    sizes = jnp.asarray(np.stack([terms, adjoints], 1)[:kept])
    share = float(measured.dropped_reverse(sizes, jnp.asarray(terms[:kept].sum()), more))
    true = terms[kept:].sum() / terms.sum()
    assert true / 6 <= share <= 60 * true


def test_terms_that_do_not_decay_leave_everything_open():
    sizes = jnp.ones((20, 2))
    assert np.isinf(measured.dropped_reverse(sizes, jnp.asarray(20.0), 100))
    assert float(measured.dropped_whole(jnp.asarray(0.01), 20, 0)) == 0
    assert np.isinf(measured.dropped_whole(jnp.asarray(1.0), 20, 10))


def test_a_call_that_was_not_finite_is_measured_again():
    number, floor, calm = jnp.asarray(1.0), jnp.asarray(1e-6), jnp.asarray(1e-6)
    spread = measured.Spread(jnp.int32(2), jnp.asarray(np.nan), jnp.asarray(0.0), jnp.asarray(np.nan))
    told, trust = measured.rounding(spread, jnp.asarray(1e-4), floor, calm, measured.new_trust(number))
    assert np.isinf(told) and int(trust.calls) == 0 and float(trust.ratio) == 1


@pytest.mark.parametrize("optimizer", [optax.lion(0.01), optax.sign_sgd(0.01)], ids=["lion", "sign_sgd"])
def test_a_sign_that_rounding_could_turn_leaves_nothing_known(optimizer):
    """One of two slopes is as small as rounding errors of the other: which way its parameter goes is chance."""
    hung = hg.Problem(lambda w, h, slopes: h * jnp.sum(slopes * w), lambda w, h, b: jnp.sum((w - 1) ** 2))
    solver = hg.unrolled(hung, inner=hg.inner.gradient(lambda h: optax.chain(optimizer, optax.scale(h)), steps=20))
    call, start = jax.jit(solver.hypergrad), solver.init(jnp.zeros(2), jnp.asarray(0.5))
    eps = jnp.finfo(start.params.dtype).eps
    told = []
    for small in (0.5, 4 * eps):
        state, found = start, []
        for _ in range(2):
            out, state = call(state, jnp.asarray(0.5), jnp.asarray([1.0, small]))
            assert int(out.info.status) <= USABLE  # nothing was amplified
            found.append(float(out.info.error_estimate))
        told.append(found)
    assert told[0][0] < 1e-3 and np.isinf(told[1][0])
    assert np.isinf(told[0][1])  # no twin looked


def test_twins_under_signs_are_counted_like_any_call():
    one, floor, calm = jnp.asarray(1.0), jnp.asarray(1e-7), jnp.asarray(1e-6)
    spread = measured.Spread(jnp.int32(2), jnp.asarray(0.0), jnp.asarray(1e-2), jnp.asarray(0.0))
    told, trust = measured.rounding(spread, one, floor, calm, measured.new_trust(one), signs=True)
    assert np.isinf(told) and int(trust.calls) == 1
    apart = (jnp.asarray(1.0), jnp.asarray(1.0), jnp.asarray(1.0), calm, spread._replace(grad=jnp.asarray(0.5)))
    assert bool(measured.exploded(*apart)) and not bool(measured.exploded(*apart, signs=True))

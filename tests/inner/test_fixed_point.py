from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._problem import bind_inner
from tests._helpers import assert_trees_equal, relative_error, tol
from tests.inner._solve import problem, status

X = np.random.default_rng(0).normal(size=(30, 8))
Y = X @ np.array([2.0, 0, 0, -1.5, 0, 0, 0.7, 0]) + 0.1 * np.random.default_rng(1).normal(size=30)
STEP = 0.9 / np.linalg.eigvalsh(X.T @ X / 30).max()
# Not symmetric, spectral radius 0.8.
A = np.array([[0.5, 0.6, 0.0], [-0.6, 0.5, 0.1], [0.0, 0.2, -0.3]])
B = np.array([1.0, -2.0, 0.5])


def shrink(z, amount):
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - amount, 0.0)


def elastic_net(w, hparams, data):
    """A proximal gradient step on ‖Xw − y‖²/2n + l2 ‖w‖²/2 + l1 ‖w‖₁."""
    x, y = data
    grads = x.T @ (x @ w - y) / x.shape[0] + hparams["l2"] * w
    return shrink(w - STEP * grads, STEP * hparams["l1"])


def affine(w, gain, batch):
    return gain * (jnp.asarray(A, w.dtype) @ w) + jnp.asarray(B, w.dtype)


def solve(inner: Any, params: Any, hparams: Any = 1.0, data: Any = None, *, key=None, scale=1.0, options=None):
    @jax.jit
    def run(params, hparams, data, key, scale, options):
        objective = bind_inner(hg.Problem(None, lambda *_: jnp.zeros(())), data, key, None)
        return inner.solve(objective, params, inner.init(params, hparams), hparams, None, scale=scale, options=options)

    return run(
        params, hparams, data, key, jnp.asarray(scale, jnp.result_type(float)), {**inner.options, **(options or {})}
    )


# What it finds.


@pytest.mark.parametrize("l2", [0.0, 0.13])
def test_proximal_steps_reach_the_optimum_of_the_lasso_and_the_elastic_net(l2):
    l1 = 0.17
    result = solve(
        hg.inner.fixed_point(elastic_net, tol=tol(1e-12, 1e-6)),
        jnp.zeros(8),
        {"l1": l1, "l2": l2},
        (jnp.asarray(X), jnp.asarray(Y)),
    )
    w = np.asarray(result.params, np.float64)
    slope = X.T @ (X @ w - Y) / 30 + l2 * w
    assert status(result) == "OK"
    assert 0 < np.sum(w == 0) < 8
    np.testing.assert_allclose(slope[w != 0], -l1 * np.sign(w[w != 0]), atol=tol(1e-9, 1e-4))
    assert np.all(np.abs(slope[w == 0]) <= l1 + tol(1e-9, 1e-4))


def test_an_affine_map_that_is_not_symmetric_reaches_its_fixed_point():
    inner = hg.inner.fixed_point(affine)
    result = solve(inner, jnp.zeros(3))
    assert status(result) == "OK" and not inner.symmetric and inner.claims
    assert relative_error(result.params, np.linalg.solve(np.eye(3) - A, B)) < tol(1e-8, 1e-4)
    assert relative_error(result.residual, jnp.linalg.norm(result.params - affine(result.params, 1.0, None))) < 1e-3


def test_the_residual_is_the_step_the_map_would_take():
    objective = bind_inner(hg.Problem(None, lambda *_: 0.0), None, None, None)
    w = jnp.asarray([0.3, -1.0, 2.0])
    found = hg.inner.fixed_point(affine).residual(objective, w, 0.7)
    assert relative_error(found, np.asarray(w) - (0.7 * A @ np.asarray(w) + B)) < tol(1e-14, 1e-5)


def test_odd_pytrees_are_kept():
    params = {"a": jnp.zeros(()), "b": [None, (jnp.zeros(2),)]}
    result = solve(hg.inner.fixed_point(lambda w, h, b: jax.tree.map(lambda x: 0.5 * x + 1, w), tol=1e-5), params)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert all(np.allclose(x, 2.0, atol=1e-4) for x in jax.tree.leaves(result.params))


# Outcomes.


def test_a_missed_tolerance_is_inner_max_steps_and_keeps_the_progress():
    result = solve(hg.inner.fixed_point(affine, tol=1e-6, max_steps=3), jnp.zeros(3))
    w = np.zeros(3)
    for _ in range(3):
        w = A @ w + B
    assert status(result) == "INNER_MAX_STEPS" and int(result.steps) == 3
    assert relative_error(result.params, w) < tol(1e-14, 1e-5)
    assert relative_error(result.residual, np.linalg.norm(w - (A @ w + B))) < 1e-5


@pytest.mark.parametrize("max_steps", [40, 10_000])
def test_an_expanding_map_is_inner_diverged_and_gives_back_the_start(max_steps):
    result = solve(hg.inner.fixed_point(affine, max_steps=max_steps), jnp.ones(3), 1.9)
    assert status(result) == "INNER_DIVERGED" and int(result.steps) < 200
    assert_trees_equal(result.params, jnp.ones(3))


def test_a_map_that_overflows_has_diverged_and_one_that_is_nan_is_nonfinite():
    exploding = solve(hg.inner.fixed_point(lambda w, h, b: jnp.exp(w)), jnp.ones(2))
    broken = solve(hg.inner.fixed_point(lambda w, h, b: jnp.log(-w)), jnp.ones(2))
    later = solve(hg.inner.fixed_point(lambda w, h, b: jnp.where(w > 1, jnp.nan, 0.9 * w + 0.3)), jnp.zeros(2))
    assert status(exploding) == "INNER_DIVERGED"
    assert status(broken) == status(later) == "NONFINITE_GRAD"
    assert_trees_equal(later.params, jnp.zeros(2))


def test_a_cycle_is_inner_stalled():
    result = solve(hg.inner.fixed_point(lambda w, h, b: -w + 1.0), jnp.ones(2))
    assert status(result) == "INNER_STALLED" and int(result.steps) < 2000


def test_a_map_that_flickers_at_rounding_level_is_precision_limited():
    flicker = lambda w, h, batch: jnp.where(w > 1, 1.0, jnp.nextafter(w, jnp.full_like(w, 2.0)))
    result = solve(hg.inner.fixed_point(flicker, tol=1e-30), jnp.ones(3))
    assert status(result) == "PRECISION_LIMITED" and int(result.steps) < 100


# Acceleration.

SLOW = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
SLOW = SLOW @ np.diag(np.linspace(-0.2, 0.995, 12)) @ SLOW.T
PUSH = np.random.default_rng(3).normal(size=12)


def counted(step):
    """The map, and a list that grows with each evaluation of it."""
    seen: list[int] = []

    def counting(w, hparams, batch):
        jax.debug.callback(lambda: seen.append(1))
        return step(w, hparams, batch)

    return counting, seen


@pytest.mark.parametrize("history", [1, 3, 12])
def test_acceleration_finds_the_same_point_of_a_slow_map_in_far_fewer_evaluations(history):
    step, seen = counted(lambda w, h, b: jnp.asarray(SLOW, w.dtype) @ w + jnp.asarray(PUSH, w.dtype))
    result = solve(hg.inner.fixed_point(step, history=history, tol=tol(1e-10, 1e-4)), jnp.zeros(12))
    jax.effects_barrier()
    exact = np.linalg.solve(np.eye(12) - SLOW, PUSH)
    assert status(result) == "OK" and relative_error(result.params, exact) < tol(1e-9, 1e-3)
    assert len(seen) == int(result.steps) + 1  # the last look is not a step
    plain = np.log(tol(1e-10, 1e-4)) / np.log(0.995)  # evaluations in which the slowest direction falls as far
    assert len(seen) < plain / (5 if history == 1 else 20)
    assert history < 12 or len(seen) <= 16  # as many directions as there are


def test_the_first_accelerated_step_is_the_secant_through_two_points():
    step = lambda w, h, b: 0.9 * jnp.cos(w)
    result = solve(hg.inner.fixed_point(step, history=4, max_steps=2, tol=1e-30), jnp.asarray(0.3))
    g = lambda w: 0.9 * np.cos(w)
    a, b = 0.3, g(0.3)
    secant = b - (g(b) - b) * (b - a) / ((g(b) - b) - (g(a) - a))
    assert abs(secant - g(b)) > 0.01  # it differs from the plain step
    assert relative_error(result.params, g(secant)) < tol(1e-12, 1e-5)  # of an accelerated point, its image is returned


def test_accelerated_steps_keep_the_zeros_of_a_kink_and_the_bounds_of_a_box():
    data = (jnp.asarray(X), jnp.asarray(Y))
    hparams = {"l1": 0.17, "l2": 0.0}
    plain = solve(hg.inner.fixed_point(elastic_net, tol=tol(1e-12, 1e-6)), jnp.zeros(8), hparams, data)
    lasso = solve(hg.inner.fixed_point(elastic_net, tol=tol(1e-12, 1e-6), history=5), jnp.zeros(8), hparams, data)
    assert status(lasso) == "OK" and int(lasso.steps) <= int(plain.steps)
    assert relative_error(lasso.params, plain.params) < tol(1e-9, 1e-4)
    np.testing.assert_array_equal(np.asarray(lasso.params) == 0, np.asarray(plain.params) == 0)

    capped = hg.inner.fixed_point(lambda w, h, b: jnp.minimum(0.8 * w + 0.22, 1.0), tol=0.12, history=1)
    assert solve(capped, jnp.asarray(0.0)).params == 1.0  # the accelerated point, 1.1, was near enough

    box = lambda w, h, b: jnp.clip(jnp.asarray(SLOW, w.dtype) @ w + jnp.asarray(PUSH, w.dtype), -h, h)
    found = solve(hg.inner.fixed_point(box, history=5, tol=tol(1e-10, 1e-5)), jnp.zeros(12), 0.8)
    w = np.asarray(found.params, float)
    slack = w - (SLOW @ w + PUSH)  # the gradient of ½ wᵀ(I − SLOW)w − PUSHᵀw: zero inside, outwards at the bounds
    assert status(found) == "OK" and np.abs(w).max() <= np.float32(0.8) and (np.abs(w) > 0.799).sum() >= 3
    assert np.abs(np.where(np.abs(w) < 0.799, slack, np.maximum(0, slack * np.sign(w)))).max() < tol(1e-9, 1e-4)


def test_steps_that_do_not_help_are_taken_back():
    # An extrapolated point beyond 1 gives NaN, and one near 0 leads to the root that the map itself moves away from.
    fenced = lambda w, h, b: jnp.where(w > 1.2, jnp.nan, 0.9 * w + 0.1 + 0.2 * jnp.sin(6 * w) * (1 - w) ** 2)
    result = solve(hg.inner.fixed_point(fenced, history=5, tol=tol(1e-10, 1e-5)), jnp.linspace(0.0, 0.9, 5))
    assert status(result) == "OK" and relative_error(result.params, np.ones(5)) < tol(1e-8, 1e-3)
    root = solve(
        hg.inner.fixed_point(lambda w, h, b: 2 * jnp.log1p(w), history=5, tol=tol(1e-10, 1e-5)), jnp.full(3, 1.0)
    )
    w = np.asarray(root.params, float)
    assert status(root) == "OK" and np.abs(w - 2 * np.log1p(w)).max() < tol(1e-9, 1e-4)


def test_statuses_are_those_of_the_map_where_acceleration_cannot_help():
    exploding = solve(hg.inner.fixed_point(lambda w, h, b: jnp.exp(w), history=3), jnp.ones(2))
    broken = solve(hg.inner.fixed_point(lambda w, h, b: jnp.log(-w), history=3), jnp.ones(2))
    short = solve(hg.inner.fixed_point(affine, history=3, max_steps=2, tol=1e-6), jnp.zeros(3))
    drift = solve(hg.inner.fixed_point(lambda w, h, b: w + 0.1, history=3), jnp.ones(2))
    assert status(exploding) == "INNER_DIVERGED" and status(broken) == "NONFINITE_GRAD"
    assert status(short) == "INNER_MAX_STEPS" and int(short.steps) == 2
    assert status(drift) == "INNER_STALLED" and np.abs(np.asarray(drift.params)).max() < 1000
    assert_trees_equal(exploding.params, jnp.ones(2))


def test_the_hypergradient_of_an_accelerated_solve_is_that_of_the_map():
    step = lambda w, gain, batch: gain * jnp.tanh(jnp.asarray(SLOW, w.dtype) @ w) + jnp.asarray(PUSH, w.dtype)
    problem = hg.Problem(None, lambda w, gain, batch: jnp.sum(w**2))

    def hypergradient(history):
        inner = hg.inner.fixed_point(step, history=history, tol=tol(1e-11, 1e-6))
        solver = hg.implicit(problem, inner=inner, linear=hg.linear.gmres(tol=tol(1e-11, 1e-6)))
        return jax.jit(lambda g: solver.hypergrad(solver.init(jnp.zeros(12), g), g)[0])(0.9)

    plain, accelerated = hypergradient(0), hypergradient(5)
    assert int(accelerated.info.status) == 0
    assert int(accelerated.info.inner_steps) < int(plain.info.inner_steps)
    assert relative_error(accelerated.grad, plain.grad) < tol(1e-8, 1e-3)


def test_lanes_of_an_accelerated_vmap_are_independent():
    inner = hg.inner.fixed_point(affine, tol=1e-5, history=2)
    objective = bind_inner(problem(None), None, None, None)
    run = lambda gain: inner.solve(objective, jnp.zeros(3), (), gain, None, scale=jnp.ones(()), options=inner.options)
    gains = jnp.asarray([0.9, 0.1, 1.05])
    batched = jax.jit(jax.vmap(run))(gains)
    single: Any = jax.jit(run)
    for i, gain in enumerate(gains):
        assert int(batched.status[i]) == int(single(gain).status)
        assert relative_error(batched.params[i], single(gain).params) < tol(1e-9, 1e-3)


# A number of steps, to be unrolled.


def test_unrolled_steps_see_their_own_batches(key):
    x = jax.random.normal(key, (50, 2))
    inner = hg.inner.fixed_point(
        lambda w, h, batch, key: 0.5 * w + jnp.mean(batch, 0) + h * jax.random.normal(key, (2,)), steps=4
    )
    objective = bind_inner(problem(None), hg.minibatches(x, 3), key, None)
    assert inner.steps == 4 and inner.update is None and inner.move is not None and not inner.claims
    w, state = jnp.ones(2), inner.init(jnp.ones(2), 0.1)
    expected = np.ones(2)
    for t in range(4):
        w, state = inner.move(objective, w, state, 0.1, t)
        batch, k = objective.batch(t)
        assert k is not None
        expected = 0.5 * expected + np.mean(batch, 0) + 0.1 * np.asarray(jax.random.normal(k, (2,)))
    assert relative_error(w, expected) < tol(1e-13, 1e-5)


def test_steps_without_a_tolerance_are_taken_and_nothing_is_claimed():
    result = solve(hg.inner.fixed_point(affine, steps=5), jnp.zeros(3))
    w = np.zeros(3)
    for _ in range(5):
        w = A @ w + B
    assert int(result.steps) == 5 and status(result) == "OK" and relative_error(result.params, w) < tol(1e-14, 1e-5)
    assert hg.inner.fixed_point(affine, steps=5, tol=1e-3).claims and not hg.inner.fixed_point(affine, steps=5).claims
    assert hg.inner.fixed_point(affine).steps is None and hg.inner.fixed_point(affine).move is None


def test_to_a_tolerance_every_step_sees_the_same_batch_and_key(key):
    noisy = lambda w, h, batch, key: 0.5 * w + jnp.mean(batch) + jax.random.normal(key)
    result = solve(
        hg.inner.fixed_point(noisy, tol=1e-5), jnp.zeros(()), 0.0, hg.minibatches(jnp.arange(20.0), 2), key=key
    )
    assert status(result) == "OK"


# Under the transformations.


def test_traced_tolerance_and_step_count_never_recompile():
    inner = hg.inner.fixed_point(affine)
    objective = bind_inner(problem(None), None, None, None)
    run: Any = jax.jit(
        lambda options: inner.solve(objective, jnp.zeros(3), (), 1.0, None, scale=jnp.ones(()), options=options)
    )
    steps = [
        int(run({"tol": jnp.asarray(t), "max_steps": jnp.asarray(m)}).steps)
        for t, m in ((1e-1, 50), (1e-3, 50), (1e-3, 3))
    ]
    assert run._cache_size() == 1 and steps[0] < steps[1] and steps[2] == 3


def test_lanes_of_a_vmap_are_independent():
    inner = hg.inner.fixed_point(affine, tol=1e-5)
    objective = bind_inner(problem(None), None, None, None)
    run = lambda gain: inner.solve(objective, jnp.zeros(3), (), gain, None, scale=jnp.ones(()), options=inner.options)
    gains = jnp.asarray([0.9, 2.0, 0.1])
    batched = jax.jit(jax.vmap(run))(gains)
    for i, gain in enumerate(gains):
        single = jax.jit(run)(gain)
        assert int(batched.status[i]) == int(single.status) and int(batched.steps[i]) == int(single.steps)
        assert relative_error(batched.params[i], single.params) < tol(1e-12, 1e-4)
    assert [hg.Status(int(s)).name for s in batched.status] == ["OK", "INNER_DIVERGED", "OK"]


# Mistakes.


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            lambda w: {"v": w["w"]},
            hg.InputError,
            r"the result of map\['w'\] is missing \(expected shape \(2,\)\)",
        ),
        (
            lambda w: {"w": w["w"][:1]},
            hg.InputError,
            r"the result of map\['w'\] has shape \(1,\), expected \(2,\)",
        ),
        (lambda w: (w["w"],), hg.InputError, r"the result of map\['w'\] is missing"),
        (
            lambda w: {"w": w["w"].astype(jnp.bfloat16)},
            hg.InputTypeError,
            r"the result of map\['w'\] has dtype bfloat16, expected float\d\d: cast it with .astype",
        ),
    ],
)
def test_a_result_unlike_the_parameters_is_named_by_its_path(result, error, message):
    for inner in (
        hg.inner.fixed_point(lambda w, h, b: result(w)),
        hg.inner.fixed_point(lambda w, h, b: result(w), steps=2),
    ):
        with pytest.raises(error, match=f"fixed_point: {message}"):
            solve(inner, {"w": jnp.ones(2)})


def test_a_map_that_takes_a_key_says_when_there_is_none():
    with pytest.raises(
        hg.InputError, match=r"fixed_point: map takes a key, but none was given: pass key=jax.random.key\(0\)"
    ):
        solve(hg.inner.fixed_point(lambda w, h, batch, key: w), jnp.ones(2))
    assert status(solve(hg.inner.fixed_point(lambda w, h, batch, key=None: 0.5 * w), jnp.ones(2))) == "OK"


wrong: Any = hg.inner  # to be called as its types forbid


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: wrong.fixed_point(3.0), hg.InputTypeError, "map must be a function.*found float"),
        (
            lambda: wrong.fixed_point(lambda w: w),
            hg.InputTypeError,
            r"map must take \(params, hparams, batch\).*found \(w\)",
        ),
        (lambda: wrong.fixed_point(affine, tol=-1.0), hg.InputError, "tol must be greater than 0"),
        (lambda: wrong.fixed_point(affine, max_steps=0), hg.InputError, "max_steps must be at least 1"),
        (lambda: wrong.fixed_point(affine, steps=-2), hg.InputError, "steps must be at least 0"),
        (lambda: wrong.fixed_point(affine, history=-1), hg.InputError, "history must be at least 0"),
        (lambda: wrong.fixed_point(affine, history=2.5), hg.InputTypeError, "history must be an integer, found 2.5"),
        (
            lambda: wrong.fixed_point(affine, history=5, steps=3),
            hg.InputError,
            "history must be 0 where steps is given, found history=5 and steps=3.*leave steps out",
        ),
        (lambda: wrong.fixed_point(affine, steps=2.0), hg.InputTypeError, "steps must be an integer, found 2.0"),
        (lambda: wrong.fixed_point(affine, steps=jnp.int32(2)), hg.InputTypeError, "steps must be a Python integer"),
        (
            lambda: wrong.fixed_point(affine, tolerance=1e-3),
            hg.InputTypeError,
            "unknown option 'tolerance', did you mean 'tol'",
        ),
    ],
)
def test_mistakes_name_the_argument_and_the_remedy(make, error, message):
    with pytest.raises(error, match=f"fixed_point: {message}"):
        make()

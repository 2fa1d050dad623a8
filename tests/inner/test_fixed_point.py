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

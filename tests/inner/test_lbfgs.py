from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import hypergrad as hg
from hypergrad._problem import bind_inner
from hypergrad.inner.lbfgs import _learn
from tests._helpers import assert_trees_equal, relative_error, shard_rows, tol
from tests.inner._solve import problem, solve, status, told_apart

EIGENVALUES = np.geomspace(1.0, 300.0, 12)
AIM = np.linspace(-1.0, 2.0, 12)


def quadratic(w, hparams, batch):
    return 0.5 * jnp.sum(jnp.asarray(EIGENVALUES, w.dtype) * (w - jnp.asarray(AIM, w.dtype)) ** 2)


def logistic(w, log_l2, data):
    x, y = data
    z = x @ w
    return jnp.mean(jax.nn.softplus(z) - y * z) + 0.5 * jnp.sum(jnp.exp(log_l2) * w**2)


@pytest.fixture
def data(key):
    x = jax.random.normal(key, (150, 8)) * jnp.geomspace(1, 0.1, 8)[None, :]
    return x, (jax.random.uniform(jax.random.key(1), (150,)) < jax.nn.sigmoid(x @ jnp.linspace(-2, 2, 8))).astype(
        x.dtype
    )


def scale_of(loss, params, *args):
    return jnp.linalg.norm(jax.grad(loss)(params, *args))


# What it finds.


def test_the_minimum_of_a_quadratic():
    result = solve(
        hg.inner.lbfgs(tol=tol(1e-10, 1e-5)),
        quadratic,
        jnp.zeros(12),
        scale=scale_of(quadratic, jnp.zeros(12), 0, None),
    )
    assert status(result) == "OK"
    assert relative_error(result.params, AIM) < tol(1e-7, 1e-3)


def test_the_reported_residual_is_the_gradient_norm_at_the_returned_parameters_and_meets_the_tolerance(data):
    l2 = jnp.linspace(-6.0, -3.0, 8)
    scale = scale_of(logistic, jnp.zeros(8), l2, data)
    result = solve(hg.inner.lbfgs(tol=1e-4), logistic, jnp.zeros(8), l2, data, scale=scale)
    residual = jnp.linalg.norm(jax.grad(logistic)(result.params, l2, data))
    assert status(result) == "OK" and residual <= 1.001e-4 * scale
    assert relative_error(result.residual, residual) < tol(1e-6, 1e-2)


def test_the_default_tolerance_is_reached(data):
    l2 = jnp.full(8, -4.0)
    scale = scale_of(logistic, jnp.zeros(8), l2, data)
    result = solve(hg.inner.lbfgs(), logistic, jnp.zeros(8), l2, data, scale=scale)
    assert status(result) == "OK" and result.residual <= tol(1e-10, 1e-6) * scale


def test_the_bottom_of_a_curved_valley():
    rosenbrock = lambda w, h, b: jnp.sum(100.0 * (w[1:] - w[:-1] ** 2) ** 2 + (1.0 - w[:-1]) ** 2)
    result = solve(hg.inner.lbfgs(tol=1e-6), rosenbrock, jnp.full(6, -1.2), scale=100.0)
    assert status(result) == "OK" and relative_error(result.params, np.ones(6)) < 1e-3


def test_odd_pytrees_keep_their_dtypes():
    params = {"a": jnp.zeros((), jnp.float32), "b": [None, (jnp.zeros(2, jnp.bfloat16),)], "c": jnp.zeros((1, 2))}
    loss = lambda w, h, b: sum(jnp.sum((x.astype(jnp.float32) - 1.5) ** 2) for x in jax.tree.leaves(w))
    inner = hg.inner.lbfgs(tol=1e-3)
    result = solve(inner, loss, params)  # measured against a scale of 1
    assert [x.dtype for x in jax.tree.leaves(result.params)] == [x.dtype for x in jax.tree.leaves(params)]
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    # The tolerance asks for ‖F‖ ≤ 1e-3 with F = 2 (w − 1.5): half of that in the parameters, which bfloat16 holds to
    # 2⁻⁸ of 1.5 and has exactly at the solution.
    error = np.concatenate([np.ravel(np.asarray(x, np.float64)) - 1.5 for x in jax.tree.leaves(result.params)])
    assert status(result) == "OK" and np.linalg.norm(error) <= 0.5e-3 * (1 + 1e-5)
    assert jax.tree.map(jnp.result_type, result.state) == jax.tree.map(jnp.result_type, inner.init(params, 0.0))


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_a_loss_of_another_scale_takes_the_same_steps(factor, data):
    l2, params = jnp.full(8, -4.0), jnp.zeros(8)
    scaled = lambda w, h, d: factor * logistic(w, h, d)
    scale = scale_of(logistic, params, l2, data)
    expected = solve(hg.inner.lbfgs(tol=1e-4), logistic, params, l2, data, scale=scale)
    result = solve(hg.inner.lbfgs(tol=1e-4), scaled, params, l2, data, scale=factor * scale)
    assert int(result.steps) == int(expected.steps) and status(result) == "OK"
    assert relative_error(result.params, expected.params) < tol(1e-8, 1e-3)
    assert relative_error(result.residual, factor * expected.residual) < tol(1e-6, 1e-2)


# Against SciPy's, on problems of the literature (Moré, Garbow & Hillstrom 1981, in twelve dimensions) and of practice.


def _pairs(w):
    return w.reshape(-1, 2).T


def _extended_beale(w, x, y):
    a, b = _pairs(w)
    return jnp.sum((1.5 - a * (1 - b)) ** 2 + (2.25 - a * (1 - b**2)) ** 2 + (2.625 - a * (1 - b**3)) ** 2)


def _extended_rosenbrock(w, x, y):
    a, b = _pairs(w)
    return jnp.sum(100 * (b - a**2) ** 2 + (1 - a) ** 2)


def _extended_powell(w, x, y):
    a, b, c, d = w.reshape(-1, 4).T
    return jnp.sum((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4)


def _wood(w, x, y):
    a, b, c, d = w.reshape(-1, 4).T
    valleys = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
    return jnp.sum(valleys + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2)


def _trigonometric(w, x, y):
    i = jnp.arange(1.0, 13.0, dtype=w.dtype)
    return jnp.sum((12 - jnp.sum(jnp.cos(w)) + i * (1 - jnp.cos(w)) - jnp.sin(w)) ** 2)


def _variably_dimensioned(w, x, y):
    t = jnp.sum(jnp.arange(1.0, 13.0, dtype=w.dtype) * (w - 1))
    return jnp.sum((w - 1) ** 2) + t**2 + t**4


def _broyden(w, x, y):
    left, right = jnp.concatenate([jnp.zeros(1, w.dtype), w[:-1]]), jnp.concatenate([w[1:], jnp.zeros(1, w.dtype)])
    return jnp.sum(((3 - 2 * w) * w - left - 2 * right + 1) ** 2)


FAMILIES = {  # name: loss, draws
    "quadratic": (lambda w, x, y: 0.5 * jnp.sum((x @ w - y) ** 2), 12),
    "logistic": (lambda w, x, y: jnp.sum(jax.nn.softplus(x @ w) - (y > 0) * (x @ w)) + 0.05 * jnp.sum(w**2), 8),
    "poisson": (lambda w, x, y: jnp.sum(jnp.exp(0.3 * x @ w) - y**2 * (x @ w)) + 0.5 * jnp.sum(w**2), 4),
    "huber": (lambda w, x, y: jnp.sum(jnp.sqrt(1 + (x @ w - y) ** 2)) + 0.01 * jnp.sum(w**2), 4),
    "rosenbrock": (_extended_rosenbrock, 3),
    "chain": (lambda w, x, y: jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2), 3),
    "beale": (_extended_beale, 3),
    "powell": (_extended_powell, 3),
    "brown": (lambda w, x, y: (w[0] - 1e6) ** 2 + (w[1] - 2e-6) ** 2 + (w[0] * w[1] - 2) ** 2 + 0 * w[2], 1),
    "wood": (_wood, 3),
    "trigonometric": (_trigonometric, 3),
    "variably dimensioned": (_variably_dimensioned, 3),
    "broyden": (_broyden, 3),
}
STARTS = {
    "rosenbrock": np.tile([-1.2, 1.0], 6),
    "chain": np.tile([-1.2, 1.0], 6),
    "beale": np.ones(12),
    "powell": np.tile([3.0, -1.0, 0.0, 1.0], 3),
    "brown": np.ones(12),
    "wood": np.tile([-3.0, -1.0, -3.0, -1.0], 3),
    "trigonometric": np.full(12, 1 / 12),
    "variably dimensioned": 1 - np.arange(1, 13) / 12,
    "broyden": -np.ones(12),
}


def scipy_problems():
    """Fifty of `(family, start, x, y)`."""
    rng = np.random.default_rng(3)
    for family, (_, draws) in FAMILIES.items():
        for i in range(draws):
            x, y = rng.normal(size=(24, 12)), rng.normal(size=24)
            if family == "quadratic":  # condition numbers of the Hessian from 1 to 2.5e4
                u, _, v = np.linalg.svd(x, full_matrices=False)
                x = u * np.geomspace(1, 10 ** (-i / 5), 12) @ v
            if family in ("logistic", "huber"):
                x = x * np.geomspace(1, 10 ** (-i / 4), 12)
            start = STARTS.get(family, np.zeros(12)) * (1 + 0.2 * i * rng.uniform(-1, 1, 12))
            yield family, start, x, y


def test_it_finds_what_scipys_finds_with_at_most_half_as_many_evaluations_more():
    """On fifty problems, one compiled program for each side."""
    losses = [loss for loss, _ in FAMILIES.values()]

    def loss(w, kind, data):
        return jax.lax.switch(kind, losses, w, *data)

    evaluate = jax.jit(jax.value_and_grad(loss))
    inner = hg.inner.lbfgs(tol=tol(1e-8, 1e-4), max_steps=2000)

    @jax.jit
    def run(start, kind, data, scale):
        objective = bind_inner(problem(loss), data, None, None)
        return inner.solve(objective, start, inner.init(start, kind), kind, None, scale=scale, options=inner.options)

    ours, theirs = [], []
    for family, start, x, y in scipy_problems():
        kind, data, start = list(FAMILIES).index(family), (jnp.asarray(x), jnp.asarray(y)), jnp.asarray(start)
        scale = np.linalg.norm(evaluate(start, kind, data)[1])
        found, last = [], []

        def counted(
            w, kind=kind, data=data, dtype=start.dtype, aim=scale * inner.options["tol"], found=found, last=last
        ):
            value, grad = jax.device_get(evaluate(w.astype(dtype), kind, data))
            last.append(value)
            if np.linalg.norm(grad) <= aim:
                found.append(value)
                raise StopIteration
            return float(value), grad.astype(np.float64)

        options = {"gtol": 0, "ftol": 0, "maxiter": 2000, "maxfun": 5000}
        with contextlib.suppress(StopIteration):
            scipy.optimize.minimize(counted, np.asarray(start), jac=True, method="L-BFGS-B", options=options)
        result = run(start, kind, data, jnp.asarray(scale))
        value = float(evaluate(result.params, kind, data)[0])
        if found:  # where SciPy's gives up above the tolerance there is nothing to compare
            assert status(result) in ("OK", "PRECISION_LIMITED"), (family, status(result))
            assert abs(value - found[0]) <= tol(1e-9, 1e-3) * (abs(value) + float(evaluate(start, kind, data)[0])), (
                family
            )
            ours.append(int(result.steps))
            theirs.append(len(last))
    ratio = np.asarray(ours) / np.asarray(theirs)
    assert len(ratio) >= tol(40, 25)
    assert np.sum(ours) <= 1.2 * np.sum(theirs)
    assert np.mean(ratio <= 1.5) >= 0.95


# Carrying on.


def test_the_pairs_of_one_call_save_evaluations_in_the_next(data):
    inner, scale = hg.inner.lbfgs(tol=1e-4), 0.3
    first = solve(inner, logistic, jnp.zeros(8), jnp.full(8, -4.0), data, scale=scale)
    again = lambda state: int(
        solve(inner, logistic, first.params, jnp.full(8, -4.3), data, state=state, scale=scale).steps
    )
    assert 1 < again(first.state) < again(inner.init(first.params, 0.0))


def test_a_pair_whose_curvature_overflows_is_not_learned():
    empty = hg.inner.lbfgs().init(jnp.zeros(2), 0.0)
    tiny = float(np.finfo(empty.unit.dtype).tiny)

    def learn(size: float, sy: float) -> Any:
        return _learn(empty, jnp.ones(2), jnp.full(2, size), jnp.asarray(sy, empty.unit.dtype), jnp.asarray(True))

    assert int(learn(1.0, 2.0).count) == 1
    far = learn(2 * tiny**0.5, tiny**-0.9)  # ⟨s, y⟩ / ⟨y, y⟩ is infinite
    assert int(far.count) == 0 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(far))


@pytest.mark.parametrize("unit", [0.0, jnp.inf])
def test_pairs_whose_unit_is_beyond_the_precision_are_forgotten(data, unit):
    inner, l2, scale = hg.inner.lbfgs(tol=1e-4), jnp.full(8, -4.0), 0.3
    first = solve(inner, logistic, jnp.zeros(8), l2, data, scale=scale)
    far = first.state._replace(unit=jnp.full_like(first.state.unit, unit))
    again = solve(inner, logistic, jnp.zeros(8), l2, data, state=far, scale=scale)
    assert_trees_equal(again.params, first.params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(again.state))


def test_pairs_measured_in_another_scale_give_the_same_steps(data):
    inner, l2 = hg.inner.lbfgs(tol=1e-5), jnp.full(8, -4.3)
    first = solve(inner, logistic, jnp.zeros(8), jnp.full(8, -4.0), data, scale=0.3)
    same = solve(inner, logistic, first.params, l2, data, state=first.state, scale=0.3)
    other = solve(inner, logistic, first.params, l2, data, state=first.state, scale=3e5, options={"tol": 1e-11})
    assert int(same.steps) == int(other.steps)
    assert relative_error(same.params, other.params) < tol(1e-9, 1e-3)


def test_a_start_at_the_minimum_takes_one_look(data):
    first = solve(hg.inner.lbfgs(tol=1e-4), logistic, jnp.zeros(8), jnp.full(8, -4.0), data)
    second = solve(hg.inner.lbfgs(tol=1e-4), logistic, first.params, jnp.full(8, -4.0), data, state=first.state)
    assert int(second.steps) == 1 and status(second) == "OK"
    assert_trees_equal(second.params, first.params)


# Outcomes.


def test_three_evaluations_are_inner_max_steps_and_keep_the_progress():
    result = solve(hg.inner.lbfgs(tol=1e-6, max_steps=3), quadratic, jnp.zeros(12))
    assert status(result) == "INNER_MAX_STEPS" and int(result.steps) == 3
    assert quadratic(result.params, 0, None) < quadratic(jnp.zeros(12), 0, None)


@pytest.mark.parametrize(
    "loss", [lambda w, h, b: jnp.sum(w), lambda w, h, b: -jnp.sum(w**2)], ids=["linear", "concave"]
)
def test_a_loss_without_a_minimum_is_inner_diverged(loss):
    result = solve(hg.inner.lbfgs(), loss, jnp.ones(4), scale=2.0)
    assert status(result) == "INNER_DIVERGED"
    assert_trees_equal(result.params, jnp.ones(4))


def test_a_valley_that_falls_for_ever_is_never_called_solved():
    """Convex in two directions, concave in two: the walk outwards may use up its steps before it looks endless."""
    loss = lambda w, h, b: jnp.sum(w[:2] ** 2) - 0.1 * jnp.sum(w[2:] ** 2)
    assert status(solve(hg.inner.lbfgs(), loss, jnp.ones(4), scale=2.0)) in ("INNER_DIVERGED", "INNER_MAX_STEPS")


def test_a_kink_is_inner_stalled():
    loss = lambda w, h, b: jnp.sum(jnp.abs(w - 1 / 3))
    result = solve(hg.inner.lbfgs(), loss, jnp.zeros(4), scale=2.0)
    assert status(result) == "INNER_STALLED" and np.all(np.isfinite(result.params))


def test_a_tolerance_below_rounding_is_precision_limited(data):
    scale = scale_of(logistic, jnp.zeros(8), jnp.full(8, -4.0), data)
    result = solve(hg.inner.lbfgs(tol=1e-30), logistic, jnp.zeros(8), jnp.full(8, -4.0), data, scale=scale)
    assert status(result) == "PRECISION_LIMITED"
    assert result.residual < tol(1e-12, 1e-5) * scale


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda w, h, b: jnp.sum(jnp.log(w)), "NONFINITE_LOSS"),
        (lambda w, h, b: jnp.sum(jnp.sqrt(jnp.abs(w + 1))), "NONFINITE_GRAD"),
        (lambda w, h, b: jnp.where(w[0] == -1.0, jnp.sum(w**2), jnp.nan), "NONFINITE_LOSS"),
        (lambda w, h, b: jnp.sum(w**2) + jnp.sqrt(jnp.where(w[0] == -1.0, 1.0, 0.0) + 0 * w[1]), "NONFINITE_GRAD"),
    ],
    ids=["loss_at_the_start", "gradient_at_the_start", "loss_anywhere_else", "gradient_anywhere_else"],
)
def test_numbers_that_are_not_finite_are_named(loss, expected):
    inner, params = hg.inner.lbfgs(), -jnp.ones(3)
    result = solve(inner, loss, params)
    assert status(result) == expected
    assert_trees_equal(result.params, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result.state))


def test_a_region_where_the_loss_is_nan_is_stepped_around():
    loss = lambda w, h, b: jnp.sum(-jnp.log(1 - w**2) - 3 * w)  # 2w / (1 − w²) = 3
    result = solve(hg.inner.lbfgs(tol=1e-5), loss, jnp.zeros(5))
    assert status(result) == "OK"
    assert relative_error(result.params, np.full(5, (np.sqrt(10.0) - 1) / 3)) < 1e-4


def test_a_failed_solve_leaves_no_pairs_behind():
    inner = hg.inner.lbfgs()
    result = solve(inner, lambda w, h, b: -jnp.sum(w**2), jnp.ones(4))
    assert int(result.state.count) == 0 and np.all(result.state.rho == 0)
    recovered = solve(inner, lambda w, h, b: jnp.sum((w - 2.0) ** 2), result.params, state=result.state)
    assert status(recovered) == "OK" and relative_error(recovered.params, np.full(4, 2.0)) < 1e-5


# Under the transformations.


def test_traced_tolerance_and_step_count_never_recompile():
    inner = hg.inner.lbfgs()
    objective = bind_inner(problem(quadratic), None, None, None)
    run: Any = jax.jit(
        lambda options, scale: inner.solve(
            objective, jnp.zeros(12), inner.init(jnp.zeros(12), 0.0), 0.0, None, scale=scale, options=options
        )
    )
    steps = [
        int(run({"tol": jnp.asarray(t), "max_steps": jnp.asarray(m)}, jnp.asarray(s)).steps)
        for t, m, s in ((1e-1, 50, 10.0), (1e-3, 50, 10.0), (1e-3, 4, 3.0))
    ]
    assert run._cache_size() == 1 and steps[0] < steps[1] and steps[2] == 4


def test_sharded_parameters_compile_once(devices):
    inner = hg.inner.lbfgs(tol=1e-3)
    loss = lambda w, h, b: jnp.sum((w - h) ** 2 * jnp.arange(1.0, 17.0)[:, None])
    objective = bind_inner(problem(loss), None, None, None)

    def solve_from(params, state, hparams):
        return inner.solve(objective, params, state, hparams, None, scale=jnp.ones(()), options=inner.options)

    run: Any = jax.jit(solve_from)
    params = shard_rows(jnp.zeros((16, 2)), devices)
    state, counts = inner.init(params, 0.0), []
    for k in range(3):
        result = run(params, state, 1.0 + k)
        params, state = result.params, result.state
        counts.append(run._cache_size())
        assert params.sharding.device_set == set(devices) and relative_error(params, np.full((16, 2), 1.0 + k)) < 1e-2
    assert counts == [1, 1, 1]


def test_lanes_of_a_vmap_are_independent(data):
    inner = hg.inner.lbfgs(tol=1e-4)

    def run(log_l2):
        objective = bind_inner(problem(logistic), data, None, None)
        return inner.solve(
            objective,
            jnp.zeros(8),
            inner.init(jnp.zeros(8), log_l2),
            log_l2,
            None,
            scale=jnp.asarray(0.3),
            options=inner.options,
        )

    strengths = jnp.asarray([[-5.0], [jnp.nan], [1.0]]) * jnp.ones((3, 8))
    batched = jax.jit(jax.vmap(run))(strengths)
    for i in range(3):
        single = jax.jit(run)(strengths[i])
        assert int(batched.status[i]) == int(single.status) and int(batched.steps[i]) == int(single.steps)
        assert relative_error(batched.params[i], single.params) < tol(1e-8, 1e-3)
    assert [hg.Status(int(s)).name for s in batched.status] == ["OK", "NONFINITE_LOSS", "OK"]


def test_the_loss_is_traced_once():
    traces = []

    def counted(w, h, b):
        traces.append(1)
        return quadratic(w, h, b)

    solve(hg.inner.lbfgs(), counted, jnp.zeros(12))
    assert len(traces) == 1


wrong: Any = hg.inner  # to be called as its types forbid


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrong.lbfgs(tol=-1e-3), "lbfgs: tol must be greater than 0, found -0.001"),
        (lambda: wrong.lbfgs(max_steps=0), "lbfgs: max_steps must be at least 1, found 0"),
        (lambda: wrong.lbfgs(history=0), "lbfgs: history must be at least 1, found 0"),
        (lambda: wrong.lbfgs(memory=3), "lbfgs: unknown option 'memory'"),
        (lambda: wrong.lbfgs(max_steps=2.5), "lbfgs: max_steps must be an integer, found 2.5"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises((hg.InputError, hg.InputTypeError), match=message):
        make()


def test_gradients_decide_where_values_lose_digits():
    loss, start, data = told_apart(8, rows=400, features=30, classes=5, size=10)
    decay = tol(1e-5, 1e-2)  # smaller ones, float32's gradients do not resolve
    result = jax.jit(jax.vmap(lambda batch: solve(hg.inner.lbfgs(), loss, start, decay, batch)))(data)
    assert max(result.status) <= tol(hg.Status.OK, hg.Status.PRECISION_LIMITED)
    assert max(result.steps) < 400  # in float64 each of them once ended at the limit of its precision

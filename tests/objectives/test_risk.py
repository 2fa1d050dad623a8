"""Risk estimates: unbiased where they say so, equal to explicit leave-one-out fits, and differentiated exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.objectives import calibration_error, gcv, leave_one_out, press, ridge_smoother, sure
from tests._helpers import central_difference, relative_error, tol

N, D = 12, 4
RIDGE = ridge_smoother(jnp.exp)


def rows(seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D))
    return jnp.asarray(x), jnp.asarray(x @ rng.normal(size=D) + 0.5 * rng.normal(size=N))


# A denoiser that is not linear in its data and has a closed form: x + c x³ = y in every entry, c = exp(h).
def quartic(x, h, y):
    return 0.5 * jnp.sum((x - y) ** 2) + jnp.sum(jnp.exp(h) * x**4) / 4


def by_hand(h, y, sigma):
    """SURE of it, in NumPy."""
    x = np.array([next(r.real for r in np.roots([np.exp(h), 0, 1, -v]) if abs(r.imag) < 1e-9) for v in y])
    return np.mean((y - x) ** 2 - sigma**2 + 2 * sigma**2 / (1 + 3 * np.exp(h) * x**2))


def test_sure_and_its_gradient_through_an_inner_problem_are_those_of_the_closed_form(x64):
    y, h, sigma = np.array([0.7, -1.9, 0.2]), -0.6, 0.4
    denoiser = hg.best_response(
        hg.Problem(quartic, quartic), inner=hg.inner.newton(), linear=hg.linear.cg(preconditioner=None)
    )
    outer = sure(denoiser, noise=sigma, divergence="exact")
    solver = hg.direct(hg.Problem(quartic, outer), inner=hg.inner.newton())
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.asarray(y), h), h, jnp.asarray(y), jnp.asarray(y))
    assert int(out.info.status) == hg.Status.OK
    assert float(out.info.extra["outer_grad_norm"]) == 0  # what hg.direct leaves out is nothing
    np.testing.assert_allclose(out.value, by_hand(h, y, sigma), rtol=tol(1e-9, 1e-4))
    slope = (by_hand(h + 1e-5, y, sigma) - by_hand(h - 1e-5, y, sigma)) / 2e-5
    np.testing.assert_allclose(out.grad, slope, rtol=tol(1e-7, 1e-3))


def test_sure_is_unbiased_and_its_two_divergences_agree():
    clean, sigma, threshold = jnp.array([0.0, 0.0, 2.0, 1.0, 0.0, 0.3]), 0.3, 0.35
    mix = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0])  # a Jacobian that is not diagonal
    soft = lambda h, start, y: mix.T @ hg.prox.l1(mix @ y, h)
    exact = sure(soft, noise=sigma, divergence="exact")
    random = sure(soft, noise=sigma, divergence="monte_carlo", samples=2)

    @jax.jit
    @jax.vmap
    def both(noise, key):
        y = clean + sigma * noise
        error = jnp.mean((soft(threshold, None, y) - clean) ** 2)
        value = exact(y, threshold, y)
        return value - error, random(y, threshold, y, key) - value

    draws = jnp.asarray(np.random.default_rng(2).normal(size=(2000, 6)))
    for gaps in map(np.asarray, both(draws, jax.random.split(jax.random.key(0), 2000))):
        assert abs(gaps.mean()) < 3 * gaps.std(ddof=1) / len(gaps) ** 0.5
    assert gaps.std() > 1e-3  # random signs were drawn


def test_noise_that_differs_by_entry_weighs_the_divergence():
    shrink = lambda gain, start, y: gain * y
    sigma = jnp.array([0.1, 0.5, 1.0])
    y, gain = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.2, 0.5, 0.9])
    expected = np.mean(((1 - gain) * y) ** 2 - sigma**2 + 2 * sigma**2 * gain)
    exact = sure(shrink, noise=sigma, divergence="exact")(y, gain, y)
    random = sure(shrink, noise=sigma, divergence="monte_carlo")(y, gain, y, jax.random.key(3))  # J is diagonal
    np.testing.assert_allclose([exact, random], expected, rtol=tol(1e-12, 1e-5))


def test_press_is_that_of_n_explicit_fits(x64):
    x, y = rows()
    log_l2 = jnp.array([-2.0, 0.5, -30.0, 1.0])

    def inner(w, h, fold):
        (x, y), weight = fold
        return jnp.sum(weight * (x @ w - y) ** 2) + jnp.sum(jnp.exp(h) * w**2)

    def outer(w, h, fold):
        (x, y), weight = fold
        return jnp.sum(weight * (x @ w - y) ** 2)

    explicit = hg.tasks(hg.direct(hg.Problem(inner, outer), inner=hg.inner.newton()), count=N)
    train, valid = hg.folds((x, y), N)
    value, *_ = jax.jit(explicit.evaluate)(explicit.init(jnp.zeros(D), log_l2), log_l2, train, valid)
    both = jax.jit(lambda h: jnp.stack([press(RIDGE)(None, h, (x, y)) / N, leave_one_out(RIDGE)(None, h, (x, y))]))
    np.testing.assert_allclose(both(log_l2), [value] * 2, rtol=tol(1e-8, 1e-4))
    expected = central_difference(lambda h: both(h)[0], log_l2, 1e-4 if x64 else 3e-2)
    for grad in jax.jit(jax.jacobian(both))(log_l2):
        assert relative_error(grad, expected) < tol(1e-8, 1e-2)


def test_gcv_of_a_matrix_and_of_ridge_and_its_gradient(x64):
    x, y = rows(1)
    two = jnp.stack([y, y**2], axis=1)
    matrix = lambda h, x: x @ jnp.linalg.solve(x.T @ x + jnp.exp(h) * jnp.eye(D), x.T)
    of_matrix = lambda h, x, y: (matrix(h, x) @ y, jnp.diag(matrix(h, x)))
    h = jnp.asarray(0.4)

    @jax.jit
    def values(h):
        return jnp.stack([gcv(smoother)(None, h, (x, two)) for smoother in (RIDGE, of_matrix)])

    hat = np.asarray(x) @ np.linalg.solve(np.asarray(x.T @ x) + np.exp(0.4) * np.eye(D), np.asarray(x).T)
    expected = np.mean((np.asarray(two) - hat @ np.asarray(two)) ** 2) / (1 - np.trace(hat) / N) ** 2
    np.testing.assert_allclose(values(h), [expected] * 2, rtol=tol(1e-10, 1e-4))
    value = lambda h: values(h)[0]
    slope = central_difference(value, h, 1e-4 if x64 else 1e-2)
    assert relative_error(jax.jit(jax.grad(value))(h), slope) < tol(1e-8, 1e-2)


def test_gcv_is_press_where_all_leverages_are_equal():
    x = jnp.asarray(np.linalg.qr(np.kron(np.ones((2, 1)), np.array([[1.0, 1], [1, -1]])))[0])
    y = jnp.array([1.0, -0.5, 2.0, 0.3])
    both = jax.jit(lambda h: (gcv(RIDGE)(None, h, (x, y)), press(RIDGE)(None, h, (x, y)) / 4))
    np.testing.assert_allclose(*both(0.3), rtol=tol(1e-10, 1e-5))


def test_leave_one_out_takes_any_loss():
    x, y = rows(2)
    loss = leave_one_out(RIDGE, loss=lambda y, p: jnp.abs(y - p))
    absolute = jax.jit(lambda h: loss(None, h, (x, y)))(0.1)
    gaps = []
    for i in range(N):
        kept = np.arange(N) != i
        a, b = np.asarray(x)[kept], np.asarray(y)[kept]
        gaps.append(abs(float(y[i]) - np.asarray(x)[i] @ np.linalg.solve(a.T @ a + np.exp(0.1) * np.eye(D), a.T @ b)))
    np.testing.assert_allclose(absolute, np.mean(gaps), rtol=tol(1e-9, 1e-4))


def test_calibration_error_is_its_sum_over_pairs_and_zero_on_average_when_calibrated(x64):
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(2000, 3)))
    p = np.asarray(jax.nn.softmax(logits, axis=1))
    labels = jnp.asarray(np.eye(3)[[rng.choice(3, p=row / row.sum()) for row in p]])
    few, e = slice(0, 5), np.asarray(labels)
    pairs = [
        np.exp(-np.sum((p[i] - p[j]) ** 2) / (2 * 0.4**2)) * (e[i] - p[i]) @ (e[j] - p[j])
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    error = jax.jit(lambda logits, labels: calibration_error(logits, labels, width=0.4))
    found = error(logits[few], labels[few])
    np.testing.assert_allclose(found, np.mean(pairs), rtol=tol(1e-10, 1e-4))
    parts = np.asarray(jax.jit(jax.vmap(error))(logits.reshape(20, 100, 3), labels.reshape(20, 100, 3)))
    assert abs(np.mean(parts)) < 3 * np.std(parts, ddof=1) / 20**0.5
    sure_of_itself = np.asarray(jax.jit(jax.vmap(error))(3 * logits.reshape(20, 100, 3), labels.reshape(20, 100, 3)))
    assert np.mean(sure_of_itself) > 10 * np.std(parts) / 20**0.5
    value = lambda t: error(t * logits[few], labels[few])
    slope = central_difference(value, jnp.asarray(1.7), 1e-4 if x64 else 1e-2)
    assert relative_error(jax.jit(jax.grad(value))(1.7), slope) < tol(1e-7, 2e-2)


def test_mistakes_are_named_and_traced_ones_are_nan():
    x, y = rows()
    shrink = lambda h, start, y: h * y
    for wrong in (0.0, -1.0, jnp.array([1.0, 0.0])):
        with pytest.raises(hg.InputError, match=r"sure: noise.* must be greater than 0, found"):
            sure(shrink, noise=wrong, divergence="exact")
    with pytest.raises(hg.InputError, match=r"noise of shape \(3,\) does not broadcast to y of shape \(12,\)"):
        sure(shrink, noise=jnp.ones(3), divergence="exact")(y, 1.0, y)
    with pytest.raises(hg.InputError, match=r"the prediction has shape \(4,\) where y has \(12,\): give prediction="):
        sure(lambda h, w, y: h * x.T @ y, noise=1.0, divergence="exact")(y, 1.0, y)
    with pytest.raises(hg.InputError, match=r"one array y .*, found 2 leaves"):
        sure(shrink, noise=1.0, divergence="exact")(y, 1.0, (x, y))
    with pytest.raises(hg.InputError, match=r"penalty must be at least 0, found -1: write jnp\.exp"):
        press(ridge_smoother(lambda h: h))(None, jnp.asarray(-1.0), (x, y))
    assert np.isnan(jax.jit(lambda h: press(ridge_smoother(lambda h: h))(None, h, (x, y)))(-1e-3))
    with pytest.raises(hg.InputError, match=r"one entry for each of the 4 features, found shape \(3,\)"):
        gcv(RIDGE)(None, jnp.zeros(3), (x, y))
    with pytest.raises(hg.InputError, match=r"gcv: the batch must be \(x, y\), found dict"):
        gcv(RIDGE)(None, 0.0, {"x": x, "y": y})
    with pytest.raises(hg.InputError, match=r"table of shape \[n, d\] with at least one row, found shape \(0, 4\)"):
        gcv(RIDGE)(None, 0.0, (x[:0], y))
    with pytest.raises(hg.InputError, match=r"features have 12 rows, and y has shape \(11,\)"):
        gcv(RIDGE)(None, 0.0, (x, y[1:]))
    with pytest.raises(hg.InputError, match=r"of a matrix H write \(H @ y, jnp.diag\(H\)\)"):
        press(lambda h, x, y: jnp.eye(N))(None, 0.0, (x, y))
    with pytest.raises(hg.InputError, match=r"12 leverages, found shapes \(12,\) and \(12, 12\)"):
        press(lambda h, x, y: (y, jnp.eye(N)))(None, 0.0, (x, y))
    logits, labels = jnp.zeros((2, 3)), jnp.eye(3)[:2]
    with pytest.raises(hg.InputError, match=r"must be one-hot, shape \[2, 3\], found shape \(2,\): write jax.nn.one"):
        calibration_error(logits, jnp.array([0, 1]), width=0.5)
    wrong = labels.at[1, 2].set(1.0)
    with pytest.raises(hg.InputError, match=r"must be one-hot, found \[0.0, 1.0, 1.0\] in row 1"):
        calibration_error(logits, wrong, width=0.5)
    assert np.isnan(jax.jit(lambda y: calibration_error(logits, y, width=0.5))(wrong))
    with pytest.raises(hg.InputError, match="at least two rows, found 1"):
        calibration_error(logits[:1], labels[:1], width=0.5)

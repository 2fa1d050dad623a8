"""Proximal gradient steps: optima of penalised and constrained problems, and hypergradients through them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import relative_error, tol
from tests.inner._solve import solve, status, told_apart

RNG = np.random.default_rng(4)
N, D = 40, 12
X = RNG.normal(size=(N, D)) * np.logspace(0, -1, D)
W = np.where(np.arange(D) % 3 == 0, RNG.normal(size=D) * 3, 0.0)
Y = X @ W + 0.1 * RNG.normal(size=N)
X_VALID = RNG.normal(size=(30, D)) * np.logspace(0, -1, D)
Y_VALID = X_VALID @ W + 0.1 * RNG.normal(size=30)
TRAIN, VALID = (jnp.asarray(X), jnp.asarray(Y)), (jnp.asarray(X_VALID), jnp.asarray(Y_VALID))


def square(w, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


# Name: inner loss, prox, hyperparameters.
PENALTIES = {
    "lasso": (lambda w, h, b: square(w, b), lambda w, h, s: hg.prox.l1(w, s * jnp.exp(h)), jnp.asarray(-2.6)),
    "weighted lasso": (
        lambda w, h, b: square(w, b),
        lambda w, h, s: hg.prox.l1(w, s * jnp.exp(h)),
        jnp.linspace(-4.0, -2.0, D),
    ),
    "elastic net": (
        lambda w, h, b: square(w, b) + 0.5 * jnp.exp(h["l2"]) * jnp.sum(w**2),
        lambda w, h, s: hg.prox.l1(w, s * jnp.exp(h["l1"])),
        {"l1": jnp.asarray(-2.7), "l2": jnp.asarray(-3.4)},
    ),
    "group lasso": (
        lambda w, h, b: square(w, b),
        lambda w, h, s: hg.prox.group(w.reshape(4, 3), s * jnp.exp(h)).reshape(-1),
        jnp.asarray(-2.4),
    ),
    "lasso of a logistic loss": (
        lambda w, h, b: jnp.mean(jax.nn.softplus(-jnp.sign(b[1]) * (b[0] @ w))),
        lambda w, h, s: hg.prox.l1(w, s * jnp.exp(h)),
        jnp.asarray(-4.0),
    ),
    "box": (
        lambda w, h, b: square(w, b),
        lambda w, h, s: jnp.clip(w, -jnp.exp(h), jnp.exp(h)),
        jnp.asarray(-0.2),
    ),
    "nonnegative, ridge": (
        lambda w, h, b: square(w, b) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
        lambda w, h, s: jnp.maximum(w, 0),
        jnp.linspace(-4.0, -1.0, D),
    ),
}


@pytest.fixture(scope="module", params=list(PENALTIES))
def case(request):
    loss, prox, hparams = PENALTIES[request.param]
    problem = hg.Problem(loss, lambda w, h, b: square(w, b))
    solver = hg.implicit(problem, inner=hg.inner.proximal(prox, tol=tol(1e-13, 1e-6)))
    return solver, jax.jit(solver.hypergrad), hparams


def test_the_hypergradient_is_the_derivative_of_the_solved_problem(case, x64):
    solver, step, hparams = case
    out, state = step(solver.init(jnp.zeros(D), hparams), hparams, TRAIN, VALID)
    assert hg.Status(int(out.info.status)).usable, hg.Status(int(out.info.status))
    if not x64:
        return
    leaves, treedef = jax.tree.flatten(hparams)
    unit = [RNG.normal(size=leaf.shape) for leaf in leaves]
    moved = lambda t: treedef.unflatten([leaf + t * u for leaf, u in zip(leaves, unit, strict=True)])
    h = 1e-5
    up, down = (step(state, moved(t), TRAIN, VALID)[0].value for t in (h, -h))
    slope = sum(np.sum(g * u) for g, u in zip(jax.tree.leaves(out.grad), unit, strict=True))
    np.testing.assert_allclose(slope, (up - down) / (2 * h), rtol=2e-5)


def test_the_start_does_not_matter(case, x64):
    solver, step, hparams = case
    found = [
        solver.response(step(solver.init(start, hparams), hparams, TRAIN, VALID)[1], hparams)
        for start in (jnp.zeros(D), 10 * jnp.asarray(RNG.normal(size=D)))
    ]
    np.testing.assert_allclose(*found, atol=tol(1e-6, 2e-3))


@pytest.mark.parametrize("l1_ratio", [1.0, 0.6])
def test_lasso_and_elastic_net_are_those_of_scikit_learn(l1_ratio):
    linear_model = pytest.importorskip("sklearn.linear_model")
    alpha = 0.07
    theirs = linear_model.ElasticNet(alpha=alpha, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-14, max_iter=10**6)
    inner = hg.inner.proximal(lambda w, h, s: hg.prox.elastic_net(w, s * alpha * l1_ratio, s * alpha * (1 - l1_ratio)))
    result = solve(inner, lambda w, h, b: square(w, b), jnp.zeros(D), 0.0, TRAIN)
    assert status(result) == "OK"
    np.testing.assert_allclose(result.params, theirs.fit(X, Y).coef_, atol=tol(1e-8, 1e-4))


def test_the_dual_of_a_support_vector_machine_is_that_of_scikit_learn(x64):
    svm = pytest.importorskip("sklearn.svm")
    labels = np.sign(Y)
    c = 0.8
    kernel = (X * labels[:, None]) @ (X * labels[:, None]).T
    loss = lambda a, h, b: 0.5 * a @ b @ a - jnp.sum(a)
    inner = hg.inner.projected(lambda a: jnp.clip(a, 0, c), tol=tol(1e-9, 1e-5))
    result = solve(inner, loss, jnp.zeros(N), 0.0, jnp.asarray(kernel))
    assert status(result) == "OK"
    theirs = svm.LinearSVC(C=c, loss="hinge", fit_intercept=False, tol=1e-9, max_iter=10**6).fit(X, labels)
    ours = (np.asarray(result.params) * labels) @ X
    assert relative_error(ours, theirs.coef_[0]) < tol(1e-6, 1e-3)


def test_simplex_constrained_quadratics_have_their_closed_form():
    # min ½‖w − c‖² on the simplex with every entry active: w = c + (1 − Σc)/d, dw/dc = I − 1/d.
    c = jnp.asarray(0.25 + 0.05 * RNG.normal(size=4))
    problem = hg.Problem(lambda w, c, b: 0.5 * jnp.sum((w - c) ** 2), lambda w, c, b: jnp.sum(jnp.arange(4.0) * w))
    solver = hg.implicit(problem, inner=hg.inner.projected(optax.projections.projection_simplex))
    out, state = jax.jit(solver.hypergrad)(solver.init(jnp.ones(4) / 4, c), c)
    np.testing.assert_allclose(solver.response(state, c), c + (1 - jnp.sum(c)) / 4, atol=tol(1e-10, 1e-5))
    np.testing.assert_allclose(out.grad, np.arange(4.0) - 1.5, atol=tol(1e-8, 1e-4))


def test_a_set_may_depend_on_hyperparameters():
    problem = hg.Problem(lambda w, r, b: 0.5 * jnp.sum((w - 3.0) ** 2), lambda w, r, b: jnp.sum(w))
    ball = lambda w, r: w * jnp.minimum(1, r / jnp.sqrt(jnp.sum(w**2) + 1e-30))
    solver = hg.implicit(problem, inner=hg.inner.projected(ball))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(4), 1.5), 1.5)  # w = r/2 each
    np.testing.assert_allclose([out.value, out.grad], [3.0, 2.0], rtol=tol(1e-8, 1e-4))


def test_best_response_goes_through_it():
    w_star = hg.best_response(
        hg.Problem(lambda w, h, b: square(w, b), lambda w, h, b: square(w, b)),
        inner=hg.inner.proximal(lambda w, h, s: hg.prox.l1(w, s * jnp.exp(h))),
    )
    slope = jax.jit(jax.jacobian(lambda h: w_star(h, jnp.zeros(D), TRAIN)))(-2.6)
    w = np.asarray(jax.jit(w_star)(-2.6, jnp.zeros(D), TRAIN))
    active = np.abs(w) > 1e-6
    closed = np.zeros(D)  # dw/dh on the active set: −H⁻¹ sign(w) e^h
    closed[active] = -np.linalg.solve((X.T @ X / N)[np.ix_(active, active)], np.sign(w[active]) * np.exp(-2.6))
    assert 0 < active.sum() < D
    np.testing.assert_allclose(slope, closed, atol=tol(1e-7, 3e-2))


def test_unrolled_steps_converge_to_the_implicit_hypergradient():
    loss, prox, hparams = PENALTIES["elastic net"]
    problem = hg.Problem(loss, lambda w, h, b: square(w, b))
    size = float(1 / np.linalg.eigvalsh(X.T @ X / N).max())
    run = hg.unrolled(problem, inner=hg.inner.proximal(prox, steps=3000, step_size=size))
    exact = hg.implicit(problem, inner=hg.inner.proximal(prox))
    init = lambda solver: solver.init(jnp.zeros(D), hparams)
    outs = [jax.jit(s.hypergrad)(init(s), hparams, TRAIN, VALID)[0] for s in (run, exact)]
    assert relative_error(outs[0].grad, outs[1].grad) < tol(1e-6, 1e-2)


@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1e8])
def test_the_unit_of_the_loss_does_not_matter(factor):
    inner = hg.inner.proximal(lambda w, h, s: hg.prox.l1(w, s * factor * 0.07))
    loss = lambda w, h, b: factor * square(w, b)
    problem = hg.Problem(loss, lambda w, h, b: square(w, b))
    solver = hg.direct(problem, inner=inner)
    _, state = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(D), 0.0), 0.0, TRAIN, VALID)
    plain = hg.direct(
        hg.Problem(lambda w, h, b: square(w, b), lambda w, h, b: square(w, b)),
        inner=hg.inner.proximal(lambda w, h, s: hg.prox.l1(w, s * 0.07)),
    )
    _, other = jax.jit(plain.hypergrad)(plain.init(jnp.zeros(D), 0.0), 0.0, TRAIN, VALID)
    np.testing.assert_allclose(solver.response(state, 0.0), plain.response(other, 0.0), atol=tol(1e-8, 2e-4))


def test_it_beats_plain_steps_on_an_ill_conditioned_problem():
    # κ = 1e4: plain steps need of the order of κ log(1/tol) of them, accelerated ones √κ.
    scales = jnp.logspace(0, -4, 20)
    loss = lambda w, h, b: 0.5 * jnp.sum(scales * (w - 1.0) ** 2)
    result = solve(hg.inner.proximal(lambda w, h, s: w, tol=1e-5), loss, jnp.zeros(20), 0.0)
    assert status(result) == "OK" and int(result.steps) < 3000


def test_steps_do_not_shrink_where_values_lose_digits():
    # Values resolve the quadratic bound only far from the solution; steps that were halved there for good stalled.
    loss, start, data = told_apart(8)
    inner = hg.inner.proximal(lambda w, h, s: hg.prox.elastic_net(w, s * 1e-4, s * 1e-4))
    result = jax.jit(jax.vmap(lambda batch: solve(inner, loss, start, 0.0, batch)))(data)
    assert max(result.status) <= tol(hg.Status.OK, hg.Status.PRECISION_LIMITED)
    assert max(result.steps) < 1800  # once up to ten thousand


def test_failures_have_a_status():
    prox = lambda w, h, s: hg.prox.l1(w, s * 1e-3)
    short = solve(hg.inner.proximal(prox, max_steps=3), lambda w, h, b: square(w, b), jnp.zeros(D), 0.0, TRAIN)
    assert status(short) == "INNER_MAX_STEPS" and int(short.steps) <= 3
    broken = solve(hg.inner.proximal(prox), lambda w, h, b: jnp.sum(jnp.log(w - 1)), jnp.zeros(3))
    assert status(broken) == "NONFINITE_LOSS" and np.all(np.isfinite(broken.params))
    kinked = lambda w, h, b: jnp.sum(jnp.sqrt(w))
    assert status(solve(hg.inner.proximal(prox), kinked, jnp.zeros(3))) == "NONFINITE_GRAD"


def test_mistakes_are_named():
    prox = lambda w, h, s: w
    with pytest.raises(hg.InputTypeError, match=r"prox must take \(params, hparams, step_size\), found \(w, h\)"):
        hg.inner.proximal(lambda w, h: w)
    with pytest.raises(hg.InputTypeError, match="prox must be a function"):
        hg.inner.proximal(0.1)
    with pytest.raises(hg.InputError, match="steps is given without step_size"):
        hg.inner.proximal(prox, steps=10)
    with pytest.raises(hg.InputError, match="step_size is given without steps"):
        hg.inner.proximal(prox, step_size=0.1)
    with pytest.raises(hg.InputError, match="tol must be greater than 0"):
        hg.inner.proximal(prox, tol=-1.0)
    with pytest.raises(hg.InputTypeError, match="steps must be"):
        hg.inner.proximal(prox, steps=2.5, step_size=0.1)
    with pytest.raises(hg.InputError, match=r"proximal: the result of prox has shape \(\), expected \(3,\)"):
        solve(hg.inner.proximal(lambda w, h, s: jnp.sum(w)), lambda w, h, b: jnp.sum(w**2), jnp.zeros(3))
    with pytest.raises(hg.InputTypeError, match=r"projection must take \(params\) or \(params, hparams\)"):
        hg.inner.projected(lambda a, b, c: a)
    with pytest.raises(hg.InputTypeError, match="projection must be a function"):
        hg.inner.projected("simplex")

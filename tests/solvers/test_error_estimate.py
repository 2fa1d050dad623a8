"""The error estimate is calibrated: on random problems, solved to random tolerances, the true error is seldom above it
and mostly not far below.

    ridge      h = ½ mean (xᵢᵀw − yᵢ)² + ½ Σ exp(λⱼ) wⱼ²          f = ½ mean (xᵢᵀw − yᵢ)² on other rows
    logistic   the same with mean log(1 + exp(−yᵢ xᵢᵀw))

The truth is a dense float64 solution: Newton's method to rounding, then one solve with the Hessian. Below, one problem
of each kind in which a hypergradient once was wrong and looked right; `experiments/reliability` has whole families.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import count, together, tol

DRAWS, ROWS, WIDTH = 200, 24, 6


def _fit(kind: str, w, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2) if kind == "ridge" else jnp.mean(jax.nn.softplus(-y * (x @ w)))


def _problem(kind: str) -> hg.Problem:
    return hg.Problem(
        lambda w, h, batch: _fit(kind, w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2), lambda w, h, b: _fit(kind, w, b)
    )


def _draw(rng: np.random.Generator, kind: str):
    """Features of scales over one to three decades, a strength of 1e-4 to 1 times the largest eigenvalue."""
    scale = 10.0 ** -rng.uniform(0, rng.uniform(0, 1.5), WIDTH)
    x = rng.normal(size=(2 * ROWS, WIDTH)) * scale
    y = x @ (rng.normal(size=WIDTH) / scale) / WIDTH**0.5 + 0.5 * rng.normal(size=2 * ROWS)
    return x, np.where(y > 0, 1.0, -1.0) if kind == "logistic" else y


def _truth(kind: str, h: np.ndarray, train, valid) -> np.ndarray:
    """Hypergradient with respect to one log-strength per coordinate."""
    (x, y), (xv, yv) = train, valid
    penalty, w = np.exp(h), np.zeros(WIDTH)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))

    def derivatives(w, x, y):
        if kind == "ridge":
            return x.T @ (x @ w - y) / len(y), x.T @ x / len(y)
        p = sigmoid(-y * (x @ w))
        return -x.T @ (p * y) / len(y), (x.T * (p * (1 - p))) @ x / len(y)

    for _ in range(50):
        grad, hessian = derivatives(w, x, y)
        w = w - np.linalg.solve(hessian + np.diag(penalty), grad + penalty * w)
    grad, hessian = derivatives(w, x, y)
    assert np.linalg.norm(grad + penalty * w) < 1e-12
    outer = derivatives(w, xv, yv)[0]
    return -penalty * w * np.linalg.solve(hessian + np.diag(penalty), outer)


KINDS = ("ridge", "logistic")


class Solved(NamedTuple):
    """`DRAWS` problems and what was found: features, targets, log-strengths, hypergradients, estimates, statuses."""

    x: np.ndarray
    y: np.ndarray
    hparams: np.ndarray
    grads: np.ndarray
    estimates: np.ndarray
    statuses: np.ndarray


@functools.cache
def _solved(width: int, polish: int | None) -> dict[str, Solved]:
    """Problems of each kind, each solved to tolerances of its own; one program, since the kinds have most in common."""
    given = {}
    for kind in KINDS:
        rng = np.random.default_rng(width)
        x, y = (np.stack(part) for part in zip(*(_draw(rng, kind) for _ in range(DRAWS)), strict=True))
        hparams = np.log(10.0) * rng.uniform(-4, 0, (DRAWS, width))
        given[kind] = x, y, hparams, *10.0 ** rng.uniform(*tol_range(), (2, DRAWS))
    solvers = {kind: hg.implicit(_problem(kind), polish=polish) for kind in KINDS}

    def one(solver, x, y, h, inner_tol, linear_tol):
        state = solver.init(jnp.zeros(WIDTH), h)
        for name, value in (("inner", inner_tol), ("linear", linear_tol)):
            state.options[name]["tol"] = value.astype(state.options[name]["tol"].dtype)
        out, _ = solver.hypergrad(state, h, (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]))
        return out.grad, out.info.error_estimate, out.info.status

    run = jax.jit(lambda given: {k: jax.vmap(functools.partial(one, solvers[k]))(*given[k]) for k in KINDS})
    found = run(jax.tree.map(jnp.asarray, given))
    return {k: Solved(*given[k][:3], *(np.asarray(part) for part in found[k])) for k in KINDS}


def _errors(kind: str, width: int, polish: int | None) -> tuple[np.ndarray, np.ndarray]:
    """True relative errors and estimates; those of which the status says not to use them, at most one in twenty, are
    left out."""
    x, y, hparams, grads, estimates, statuses = _solved(width, polish)[kind]
    usable = np.flatnonzero(statuses <= hg.Status.INSENSITIVE)
    assert len(usable) >= 0.95 * DRAWS
    errors = []
    for i in usable:
        h = np.broadcast_to(hparams[i], WIDTH)
        exact = _truth(kind, h, (x[i, :ROWS], y[i, :ROWS]), (x[i, ROWS:], y[i, ROWS:]))
        exact = exact if width > 1 else exact.sum(keepdims=True)
        errors.append(np.linalg.norm(grads[i].astype(np.float64) - exact) / np.linalg.norm(exact))
    return np.asarray(errors), estimates[usable].astype(np.float64)


def tol_range() -> tuple[float, float]:
    """Decimal logarithms of the tolerances that are tried."""
    return tol(-8.0, -5.0), -1.0


@pytest.mark.parametrize("polish", [None, 0], ids=["polished", "as the inner solver left it"])
@pytest.mark.parametrize("width", [1, WIDTH], ids=["one strength", "one a feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_true_errors_are_below_the_estimate_and_not_far_below(kind, width, polish):
    errors, estimates = _errors(kind, width, polish)
    below, near = np.mean(errors <= estimates), np.mean(errors >= estimates / 30)
    assert below >= 0.95, f"{below:.3f} of {len(errors)} errors are below their estimates"
    assert near >= 0.5, f"{near:.3f} of {len(errors)} errors are within a factor of 30 of their estimates"
    # Neither holds by itself: of estimates a tenth or ten times as large one would fail.
    assert np.mean(errors <= estimates / 10) < 0.95
    assert np.mean(errors >= estimates / 3) < 0.5


# One problem of each kind: name -> (solver, start, hyperparameters, data, right hypergradient or None, may it be OK).
def _graded() -> tuple[hg.Problem, Any, Any, np.ndarray]:
    """Ridge with a spectrum over four decades, and its hypergradient."""
    rng = np.random.default_rng(4)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    s, h = np.logspace(0, -2, WIDTH), np.full(WIDTH, -10.0)
    x = rng.normal(size=(60, WIDTH)) * s @ turn.T
    y = x @ (turn @ (rng.normal(size=WIDTH) / s)) / WIDTH**0.5 + 0.5 * rng.normal(size=60)
    train, valid = (x[:30], y[:30]), (x[30:], y[30:])
    return _problem("ridge"), h, (train, valid), _truth("ridge", h, train, valid)


def _net(w, x):
    return jnp.tanh(x @ w[:6].reshape(2, 3) + w[None, 6:9]) @ w[9:]


def _fitted(model: Any) -> tuple[hg.Problem, Any]:
    """Least squares with one decay, composed for Gauss-Newton products, and its inner loss."""
    loss = lambda w, b: 0.5 * jnp.mean((model(w, b[0]) - b[1]) ** 2)
    inner = lambda w, h, b: loss(w, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2)
    composed = hg.compose(
        lambda w, h, b: model(w, b[0]),
        lambda z, w, h, b: 0.5 * jnp.mean((z - b[1]) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2),
    )
    return hg.Problem(composed, lambda w, h, b: loss(w, b)), inner


def _dense(inner: Any, outer: Any, w: Any, h: Any) -> np.ndarray:
    """The hypergradient at the stationary point that Newton's method finds from `w`, in float64."""
    with jax.enable_x64(True):
        w, h = jnp.asarray(np.asarray(w, np.float64)), jnp.asarray(np.asarray(h, np.float64))
        for _ in range(30):
            w = w - jnp.linalg.solve(jax.hessian(inner)(w, h), jax.grad(inner)(w, h))
        assert jnp.linalg.norm(jax.grad(inner)(w, h)) < 1e-10
        v = jnp.linalg.solve(jax.hessian(inner)(w, h), jax.grad(outer)(w, h))
        return np.asarray(jax.grad(outer, 1)(w, h) - jax.jvp(lambda w: jax.grad(inner, 1)(w, h), (w,), (v,))[1])


def _honest(out: Any, right: Any) -> bool:
    """Not usable, or at most ten times as wrong as it says."""
    error = np.linalg.norm(np.asarray(out.grad, np.float64) - right) / np.linalg.norm(right)
    assert not np.isnan(out.info.error_estimate)
    return not hg.Status(int(out.info.status)).usable or bool(error <= 10 * out.info.error_estimate)


@functools.cache
def _budgets() -> dict[str, Any]:
    problem, h, data, _ = _graded()
    linears = {
        "cg": hg.linear.cg(max_steps=5),
        "neumann": hg.linear.neumann(300),
        "gmres": hg.linear.gmres(max_steps=4),
        "nystrom": hg.linear.nystrom(4, damping=0.01),
        "identity": hg.linear.identity(),
    }
    solvers = {name: hg.implicit(problem, linear=linear) for name, linear in linears.items()}
    solvers["damping"] = hg.implicit(problem, damping=0.1)
    h = jnp.asarray(h)
    given = {name: (solver.init(jnp.zeros(WIDTH), h), h, *data) for name, solver in solvers.items()}
    return together({name: solver.hypergrad for name, solver in solvers.items()}, given)


@pytest.mark.parametrize("method", ["cg", "neumann", "gmres", "nystrom", "identity", "damping"])
def test_what_a_budget_or_damping_leaves_out_is_in_the_estimate(method):
    out, _ = _budgets()[method]
    right = _graded()[3]
    error = np.linalg.norm(np.asarray(out.grad, np.float64) - right) / np.linalg.norm(right)
    assert error > 0.1  # or there is nothing to tell
    assert _honest(out, right), f"error {error}, {out.info}"
    assert hg.Status(int(out.info.status)).usable or method == "damping"  # a budget claims nothing


@pytest.mark.parametrize("kind", ["network", "curve"])
def test_what_gauss_newton_leaves_out_is_in_the_estimate(kind):
    rng = np.random.default_rng(1)
    if kind == "network":
        model, w, h = _net, 0.5 * rng.normal(size=12), np.asarray(-4.0)
        x = rng.normal(size=(60, 2))
        y = np.sin(2 * x[:, 0]) * x[:, 1] + 0.5 * rng.normal(size=60)
    else:
        model, w, h = lambda w, x: w[0] + w[1] * jnp.exp(-w[2] * x), np.array([0.3, 1.5, 1.0]), np.asarray(-3.0)
        x = rng.uniform(0, 3, 60)
        y = 0.5 + 2 * np.exp(-1.2 * x) + 0.5 * rng.normal(size=60)
    train, valid = (x[:30], y[:30]), (x[30:], y[30:])
    problem, inner = _fitted(model)
    solver = hg.implicit(problem, curvature="gauss_newton")
    out, state = jax.jit(solver.hypergrad)(solver.init(jnp.asarray(w), jnp.asarray(h)), jnp.asarray(h), train, valid)
    with jax.enable_x64(True):
        right = _dense(
            lambda w, h: inner(w, h, train),
            lambda w, h: 0.5 * jnp.mean((model(w, valid[0]) - valid[1]) ** 2),
            state.params,
            h,
        )
    assert _honest(out, right), f"right {right}, found {out}"


@functools.cache
def _points() -> dict[str, Any]:
    """Small problems under default options."""
    fold = hg.Problem(lambda w, h, b: w**4 / 4 - w**2 / 2 - h * w, lambda w, h, b: (w - 1) ** 2)
    saddle = hg.Problem(
        lambda w, h, b: 0.5 * (w[0] - h) ** 2 + 0.25 * w[1] ** 4 - 0.5 * h * w[1] ** 2,
        lambda w, h, b: jnp.sum((w - 1.0) ** 2) + w[0] + 2 * w[1],
    )
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    product = lambda w: w[:8].reshape(4, 2) @ w[8:].reshape(2, 3)
    factors = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum((product(w) - target) ** 2) + 0.5 * jnp.exp(h) * jnp.sum(w**2),
        lambda w, h, b: 0.5 * jnp.sum((product(w) - target - 0.1) ** 2),
    )
    distances = lambda w: jnp.sqrt(jnp.sum((w[:, None] - w[None]) ** 2, -1) + jnp.eye(4))
    lengths = jnp.asarray(np.random.default_rng(2).uniform(0.8, 1.2, (4, 4)))
    spheres = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum(jnp.triu((distances(w) - h * lengths) ** 2, 1)),
        lambda w, h, b: jnp.sum(jnp.triu(lengths * distances(w), 1)),
    )
    slow = hg.inner.fixed_point(lambda w, h, b: w - 1e-6 * (w - h))
    ball = hg.Problem(lambda w, h, b: jnp.sum(w**2), lambda w, h, b: jnp.sum((w - 1.0) ** 2))
    square = jnp.asarray([[1.0, 0.2], [-0.1, 1.1], [-1.0, 0.1], [0.2, -1.2]])
    edge = 2 / 3**1.5
    rows = {
        "fold": (hg.implicit(fold), jnp.asarray(-0.5774), jnp.asarray(edge * (1 - 1e-5))),
        "loose fold": (
            hg.implicit(fold, inner=hg.inner.newton(tol=1e-3), polish=0),
            jnp.asarray(-0.58),
            jnp.asarray(edge * (1 - 1e-4)),
        ),
        "saddle": (hg.implicit(saddle), jnp.zeros(2), jnp.asarray(0.5)),
        "factors": (hg.implicit(factors), jnp.zeros(14), jnp.asarray(-3.0)),
        "spheres": (hg.implicit(spheres), square, jnp.asarray(1.0)),
        "slow": (hg.implicit(ball, inner=slow), jnp.zeros(2), jnp.asarray([0.3, 0.7])),
    }
    found = together(
        {k: row[0].hypergrad for k, row in rows.items()},
        {k: (solver.init(start, h), h) for k, (solver, start, h) in rows.items()},
    )
    return found


@pytest.mark.parametrize(("name", "closeness"), [("fold", 1e-5), ("loose fold", 1e-4)])
def test_near_a_fold_the_hessian_changes_by_its_own_size_and_the_estimate_knows(name, closeness):
    out, _ = _points()[name]
    level = np.float64(np.asarray(jnp.asarray(2 / 3**1.5 * (1 - closeness))))
    roots = np.roots([1, 0, -1, -level])
    w = np.real(roots[(np.abs(np.imag(roots)) < 1e-9) & (np.real(roots) < -(3**-0.5))])
    assert len(w) == 1
    right = 2 * (w[0] - 1) / (3 * w[0] ** 2 - 1)
    assert _honest(out, right), f"right {right}, {out}"


@pytest.mark.parametrize("name", ["saddle", "factors"])
def test_a_saddle_is_seen_where_the_outer_gradient_does_not_point_down_from_it(name):
    out, _ = _points()[name]
    assert int(out.info.status) == hg.Status.NEG_CURVATURE


def test_directions_that_a_symmetry_makes_flat_leave_the_estimate_finite():
    out, _ = _points()["spheres"]
    assert hg.Status(int(out.info.status)).usable
    assert float(out.info.error_estimate) <= tol(1e-3, np.inf)  # in float32 nothing need be known


@functools.cache
def _turned_layers():
    """Status and estimate for linear networks of three layers; their flat directions are curved where F is not zero."""
    draws, rng = 60, np.random.default_rng(3)
    x = rng.normal(size=(draws, 2, 30, 3))
    y = np.einsum("dsni,di->dsn", x, rng.normal(size=(draws, 3))) + 0.3 * rng.normal(size=(draws, 2, 30))
    starts, h = 0.5 * rng.normal(size=(draws, 21)), rng.uniform(-6, -2, draws)

    def fit(w, batch):
        return 0.5 * jnp.mean((batch[0] @ w[:9].reshape(3, 3) @ w[9:18].reshape(3, 3) @ w[18:] - batch[1]) ** 2)

    solver = hg.implicit(
        hg.Problem(lambda w, h, b: fit(w, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2), lambda w, h, b: fit(w, b))
    )
    run = jax.vmap(lambda w, h, t, v: solver.hypergrad(solver.init(w, h), h, t, v)[0].info)
    info = jax.jit(run)(*(jnp.asarray(a) for a in (starts, h)), (x[:, 0], y[:, 0]), (x[:, 1], y[:, 1]))
    return np.asarray(info.status), np.asarray(info.error_estimate)


def test_layers_that_can_be_turned_against_each_other_are_no_saddle():
    status, _ = _turned_layers()
    refused = [hg.Status(int(code)).name for code in status if not hg.Status(int(code)).usable]
    assert len(refused) <= tol(0, 6), (
        refused
    )  # in float32 no solve goes below the curvature that is to be told from zero


def test_turning_layers_against_each_other_changes_no_hypergradient_and_often_is_seen_to():
    _, estimate = _turned_layers()
    finite = estimate[np.isfinite(estimate)]
    assert len(finite) >= tol(15, 0)
    assert np.all(finite < tol(1e-2, np.inf))


def test_where_a_dozen_products_are_too_few_the_first_call_takes_more():
    """Quadratics of 40 dimensions and a condition number of 1e3, solved to two digits."""
    draws, width, rng = 60, 40, np.random.default_rng(8)
    turns = np.stack([np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(draws)])
    curved = np.einsum("dij,j,dkj->dik", turns, np.logspace(0, -3, width), turns)
    b, target = rng.normal(size=(2, draws, width))

    problem = hg.Problem(
        lambda w, h, batch: 0.5 * w @ batch[0] @ w - h * batch[1] @ w,
        lambda w, h, batch: 0.5 * jnp.sum((w - batch) ** 2),
    )
    solver = hg.implicit(problem, inner=hg.inner.lbfgs(tol=1e-3), linear=hg.linear.cg(tol=1e-2), polish=0)

    def run(start, train, valid):
        out = solver.hypergrad(solver.init(start, jnp.ones(())), jnp.ones(()), train, valid)[0]
        return out.grad, out.info.error_estimate, out.info.status

    given = jnp.zeros((draws, width)), (jnp.asarray(curved), jnp.asarray(b)), jnp.asarray(target)
    grad, estimate, status = (np.asarray(x) for x in jax.jit(jax.vmap(run))(*given))
    slope = np.linalg.solve(curved, b[..., None])[..., 0]  # w* = h·slope
    right = np.einsum("di,di->d", slope - target, slope)
    error = np.abs(grad - right) / np.abs(right)
    told = np.isfinite(estimate) & (status <= hg.Status.INSENSITIVE)
    assert np.all(estimate[told] >= error[told] / 10)
    assert np.mean(told) >= 0.8
    assert np.median(estimate[told] / error[told]) <= 30

    out, _ = _points()["slow"]
    error = np.linalg.norm(np.asarray(out.grad, np.float64) - 2 * (np.array([0.3, 0.7]) - 1)) / 2
    assert not hg.Status(int(out.info.status)).usable or error <= 10 * float(out.info.error_estimate)


def test_beyond_the_precision_a_best_response_has_no_derivative():
    """Ridge in float32 at a condition number of 1e6 to 1e9: what is finite is right."""
    rng = np.random.default_rng(0)
    turns = np.stack([np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] for _ in range(DRAWS)])
    spectra = 10.0 ** -np.linspace(0, rng.uniform(3, 4.5, DRAWS), WIDTH).T
    x = (rng.normal(size=(DRAWS, 30, WIDTH)) * spectra[:, None] @ turns.transpose(0, 2, 1)).astype(np.float32)
    y = rng.normal(size=(DRAWS, 30)).astype(np.float32)
    h = np.full(DRAWS, -18.0, np.float32)
    w_star = hg.best_response(
        hg.Problem(lambda w, h, b: _fit("ridge", w, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2), lambda w, h, b: 0.0)
    )
    slope = jax.grad(lambda h, x, y: jnp.sum(w_star(h, jnp.zeros(WIDTH, jnp.float32), (x, y))))
    found = np.asarray(jax.jit(jax.vmap(slope))(h, x, y), np.float64)
    wide, decay = x.astype(np.float64), np.exp(np.float64(h[0]))
    hessian = np.einsum("kni,knj->kij", wide, wide) / 30 + decay * np.eye(WIDTH)
    w = np.linalg.solve(hessian, np.einsum("kni,kn->ki", wide, y.astype(np.float64))[..., None] / 30)
    right = -decay * np.sum(np.linalg.solve(hessian, w)[..., 0], axis=1)
    size = decay * np.linalg.norm(np.linalg.solve(hessian, w)[..., 0], axis=1)
    wrong = np.isfinite(found) & (np.abs(found - right) > 0.1 * size)
    assert wrong.sum() == 0, f"{wrong.sum()} of {np.isfinite(found).sum()} finite ones are wrong"


@pytest.mark.parametrize("linear", [hg.linear.neumann(5, step_size=0.1), hg.linear.cg(max_steps=5)])
def test_where_nothing_is_known_the_estimate_makes_no_product(linear):
    curvature = jnp.diag(jnp.asarray([1.0, 2.0, 3.0]))
    inner = lambda w, h, batch: 0.5 * w @ (curvature @ w) + jnp.sum(h * w)
    problem = hg.Problem(inner, lambda w, h, batch: jnp.sum((w - 1) ** 2))
    counts = []
    for method in (hg.linear.identity(step_size=0.1), linear):  # the first has no estimate
        solver = hg.implicit(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=3), linear=method)
        state = solver.init(jnp.ones(3), jnp.ones(3))
        program = jax.make_jaxpr(solver.hypergrad)(state, jnp.ones(3))
        counts.append(count(program, "dot_general", except_in=("while", "scan", "cond")))
    assert counts[0] == counts[1] > 0

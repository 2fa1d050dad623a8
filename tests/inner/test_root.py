"""Equations that are no gradient: closed forms of multipliers, games, transport, temporal differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import relative_error, tol
from tests.inner._solve import status

RNG = np.random.default_rng(7)
_M = RNG.normal(size=(5, 5))
Q = _M @ _M.T + np.eye(5)
A = RNG.normal(size=(2, 5))
G = RNG.normal(size=(3, 4))
P = RNG.random((6, 6)) + 0.1
P /= P.sum(axis=1, keepdims=True)
PHI, REWARD = RNG.normal(size=(6, 3)), RNG.normal(size=6)
COST = RNG.random((4, 4))


class Case(NamedTuple):
    equations: Any
    start: Any
    hparams: Any
    outer: Any
    closed: Any  # hparams -> the outer loss at the solution


def _kkt(w, h, batch):
    """min ½xᵀQx − hᵀx subject to Ax = 1."""
    return {"x": Q @ w["x"] - h + A.T @ w["nu"], "nu": A @ w["x"] - 1.0}


def _kkt_closed(h):
    system = jnp.block([[jnp.asarray(Q), jnp.asarray(A).T], [jnp.asarray(A), jnp.zeros((2, 2))]])
    return jnp.sum(jnp.linalg.solve(system, jnp.concatenate([h, jnp.ones(2)]))[:5] ** 2)


def _game(w, h, batch):
    """min_x ½‖x‖² + xᵀGy − bᵀx, max_y xᵀGy − ½e^h‖y‖² + 1ᵀy: no loss has these two as its gradient."""
    return {"x": w["x"] + G @ w["y"] - 0.3, "y": jnp.exp(h) * w["y"] - G.T @ w["x"] - 1.0}


def _game_closed(h):
    y = jnp.linalg.solve(jnp.exp(h) * jnp.eye(4) + G.T @ G, 1.0 + 0.3 * G.T @ jnp.ones(3))
    return jnp.sum(y**2)


def _td(w, discount, batch):
    """TD(0): the target is no function of the parameters that are trained, so there is no loss."""
    return PHI.T @ (PHI @ w - (REWARD + discount * P @ (PHI @ w))) / 6


def _td_closed(discount):
    w = jnp.linalg.solve(PHI.T @ (PHI - discount * P @ PHI), PHI.T @ REWARD)
    return jnp.sum((PHI @ w) ** 2)


def _cubic(w, h, batch):
    return w**3 + w - h


def _cubic_closed(h):
    root = jnp.sqrt(h**2 / 4 + 1 / 27)
    return jnp.sum(jnp.cbrt(h / 2 + root) + jnp.cbrt(h / 2 - root))


CASES = {
    "multipliers": Case(
        _kkt,
        {"x": jnp.zeros(5), "nu": jnp.zeros(2)},
        jnp.linspace(-1.0, 1.0, 5),
        lambda w: jnp.sum(w["x"] ** 2),
        _kkt_closed,
    ),
    "a game of two": Case(
        _game, {"x": jnp.zeros(3), "y": jnp.zeros(4)}, jnp.asarray(0.4), lambda w: jnp.sum(w["y"] ** 2), _game_closed
    ),
    "temporal differences": Case(_td, jnp.zeros(3), jnp.asarray(0.8), lambda w: jnp.sum((PHI @ w) ** 2), _td_closed),
    "a cubic, far from its root": Case(
        _cubic, jnp.asarray([30.0, -20.0]), jnp.asarray([2.0, 0.3]), jnp.sum, _cubic_closed
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    found = CASES[request.param]
    problem = hg.Problem(None, lambda w, h, b: found.outer(w))
    return found, problem


def test_value_and_hypergradient_equal_the_closed_form(case):
    found, problem = case
    solver = hg.implicit(problem, inner=hg.inner.root(found.equations))
    out, _ = jax.jit(solver.hypergrad)(solver.init(found.start, found.hparams), found.hparams)
    value, grad = jax.value_and_grad(found.closed)(found.hparams)
    assert hg.Status(int(out.info.status)).usable
    np.testing.assert_allclose(out.value, value, rtol=tol(1e-9, 1e-4))
    assert relative_error(out.grad, grad) < tol(1e-8, 1e-3)


def test_best_response_and_unrolled_steps_give_the_same(case):
    found, problem = case
    w_star = hg.best_response(problem, inner=hg.inner.root(found.equations))
    grad = jax.grad(found.closed)(found.hparams)
    assert relative_error(jax.jit(jax.grad(lambda h: found.outer(w_star(h, found.start))))(found.hparams), grad) < tol(
        1e-8, 1e-3
    )
    run = hg.unrolled(problem, inner=hg.inner.root(found.equations, steps=14))
    out, _ = jax.jit(run.hypergrad)(run.init(found.start, found.hparams), found.hparams)
    assert relative_error(out.grad, grad) < tol(1e-8, 1e-3)


def test_entropic_transport_by_its_marginals():
    """Sinkhorn's potentials: exp((f + g − C)/ε) has uniform marginals; one potential is pinned."""

    def marginals(w, eps, batch):
        plan = jnp.exp((w["f"][:, None] + jnp.concatenate([jnp.zeros(1), w["g"]])[None, :] - COST) / eps)
        return {"f": plan.sum(1) - 0.25, "g": plan.sum(0)[1:] - 0.25}

    def cost(w, eps):
        plan = jnp.exp((w["f"][:, None] + jnp.concatenate([jnp.zeros(1), w["g"]])[None, :] - COST) / eps)
        return jnp.sum(plan * COST)

    start = {"f": jnp.zeros(4), "g": jnp.zeros(3)}
    problem = hg.Problem(None, lambda w, eps, b: cost(w, eps))
    solver = hg.implicit(problem, inner=hg.inner.root(marginals))
    step = jax.jit(solver.hypergrad)
    out, _ = step(solver.init(start, 0.3), 0.3)
    assert hg.Status(int(out.info.status)).usable

    def sinkhorn(eps):
        def turn(_, at):
            f = eps * (jnp.log(0.25) - jax.nn.logsumexp((at[1][None, :] - COST) / eps, axis=1))
            return f, eps * (jnp.log(0.25) - jax.nn.logsumexp((f[:, None] - COST) / eps, axis=0))

        f, g = jax.lax.fori_loop(0, 200, turn, (jnp.zeros(4), jnp.zeros(4)))
        return jnp.sum(jnp.exp((f[:, None] + g[None, :] - COST) / eps) * COST)

    value, grad = jax.jit(jax.value_and_grad(sinkhorn))(0.3)
    np.testing.assert_allclose([out.value, out.grad], [value, grad], rtol=tol(1e-7, 1e-3))


def _solve(equations, start, **options):
    problem = hg.Problem(None, lambda w, h, b: jnp.sum(w) * h)
    solver = hg.implicit(problem, inner=hg.inner.root(equations, **options))
    return jax.jit(solver.hypergrad)(solver.init(start, 1.0), 1.0)


def test_failures_have_a_status_and_keep_finite_parameters():
    no_root = lambda w, h, b: w**2 + 1.0 + 0 * h
    out, state = _solve(no_root, jnp.asarray([2.0]))
    assert status(out.info) in ("INNER_STALLED", "SINGULAR") and np.all(np.isfinite(state.params))
    out, state = _solve(_cubic, jnp.asarray([1e6]), max_steps=2)
    assert status(out.info) == "INNER_MAX_STEPS"
    out, state = _solve(lambda w, h, b: jnp.log(w) * h, jnp.asarray([-1.0]))
    assert status(out.info) in ("NONFINITE_GRAD", "NONFINITE_LOSS") and np.all(np.isfinite(state.params))


def test_a_key_is_passed_on_and_asked_for():
    noisy = lambda w, h, b, key: w - h * jax.random.normal(key, w.shape)
    problem = hg.Problem(None, lambda w, h, b: jnp.sum(w**2))
    solver = hg.implicit(problem, inner=hg.inner.root(noisy))
    state = solver.init(jnp.zeros(3), 1.0)
    outs = [jax.jit(solver.hypergrad)(state, 1.0, key=jax.random.key(i))[0].value for i in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]
    with pytest.raises(hg.InputError, match="equations takes a key, but none was given"):
        solver.hypergrad(state, 1.0)


def test_mistakes_are_named():
    problem = hg.Problem(None, lambda w, h, b: jnp.sum(w))
    with pytest.raises(hg.InputTypeError, match="equations must be a function"):
        hg.inner.root(jnp.zeros(3))
    with pytest.raises(hg.InputTypeError, match=r"root: equations must take \(params, hparams, batch\)"):
        hg.inner.root(lambda w, h: w)
    with pytest.raises(hg.InputError, match="max_steps must be at least 1"):
        hg.inner.root(_cubic, max_steps=0)
    with pytest.raises(hg.InputTypeError, match="steps must be"):
        hg.inner.root(_cubic, steps=2.5)
    solver = hg.implicit(problem, inner=hg.inner.root(lambda w, h, b: jnp.sum(w) - h))
    with pytest.raises(hg.InputError, match=r"root: the result of equations has shape \(\), expected \(3,\)"):
        solver.hypergrad(solver.init(jnp.zeros(3), 1.0), 1.0)
    solver = hg.implicit(problem, inner=hg.inner.root(lambda w, h, b: (w - h).astype(jnp.float16)))
    with pytest.raises(hg.InputTypeError, match="has dtype float16"):
        solver.hypergrad(solver.init(jnp.zeros(3), 1.0), 1.0)
    with pytest.raises(hg.InputError, match="symmetric operator"):
        hg.implicit(problem, inner=hg.inner.root(_cubic), linear=hg.linear.cg())

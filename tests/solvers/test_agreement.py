"""Different routes to one hypergradient agree; truncated and damped ones equal their own formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad._problem import bind_inner
from tests._helpers import assert_trees_close, relative_error, together, tol
from tests.solvers import _curved_problems as curved
from tests.solvers import _problems as problems
from tests.solvers._problems import Case, flatten


def hypergradient(solver: hg.Solver, case: Case, calls: int = 1, **options: Any) -> hg.Hypergradient:
    """The last of several calls; `options` replace values in the state, as `linear={"max_steps": 3}`.

    A solver compiles once, whatever the options and the number of calls.
    """
    params, hparams, train, valid = case.arrays()
    step, state = jax.jit(solver.hypergrad), solver.init(params, hparams)
    given = {
        name: state.options[name] | values if isinstance(values, dict) else values for name, values in options.items()
    }
    like = jax.tree.map(lambda value, old: jnp.asarray(value, old.dtype), state.options | given, state.options)
    state = state._replace(options=like)
    for _ in range(calls - 1):
        _, state = step(state, hparams, train, valid)
    return step(state, hparams, train, valid)[0]


def hypergradients(solvers: Mapping[str, hg.Solver], case: Case) -> dict[str, hg.Hypergradient]:
    """The first of each solver, in one program."""
    params, *others = case.arrays()
    arguments = {name: (solver.init(params, others[0]), *others) for name, solver in solvers.items()}
    found = together({name: solver.hypergrad for name, solver in solvers.items()}, arguments)
    return {name: out for name, (out, _) in found.items()}


def parts(case: Case) -> tuple[np.ndarray, ...]:
    """H, ∂²_{λw} h, ∂_w f and ∂_λ f at the solution, from the closed form."""
    a, h = case.analytic, flatten(case.hparams)
    w = problems.solution(case, h)
    return a.hess(w, h), a.cross(w, h), *a.outer_grads(w, h)


def step_size(case: Case, fraction: float = 1.0) -> float:
    """A stable step for gradient descent and Neumann: a fraction of 1 / the largest eigenvalue at the solution."""
    return float(np.float32(fraction / np.linalg.eigvalsh(parts(case)[0])[-1]))


AGREE: dict[str, Callable[[], Case]] = {"ridge": lambda: problems.ridge("per coordinate"), "logistic": curved.logistic}


@pytest.mark.parametrize("name", AGREE)
def test_long_unrolls_implicit_and_the_neumann_series_agree(name):
    case = AGREE[name]()
    rate = step_size(case, 1.5)
    descent = hg.inner.gradient(optax.sgd(rate), steps=400)
    solvers = {
        "implicit": hg.implicit(case.problem),
        "implicit, neumann": hg.implicit(case.problem, inner=descent, linear=hg.linear.neumann(400, step_size=rate)),
        "implicit, descent": hg.implicit(case.problem, inner=descent, linear=hg.linear.cg(max_steps=20)),
        "unrolled, reverse": hg.unrolled(case.problem, inner=descent, mode="reverse"),
        "unrolled, forward": hg.unrolled(case.problem, inner=descent, mode="forward"),
        "unrolled, truncated": hg.unrolled(case.problem, inner=descent, mode="reverse", truncate=300),
    }
    expected = problems.hypergradient(case)
    for route, out in hypergradients(solvers, case).items():
        error = relative_error(flatten(out.grad), expected)
        assert error <= tol(1e-8, 1e-4), f"{route}: {error:.2g}"


def test_every_linear_solver_that_claims_agrees_with_the_closed_form():
    case = problems.direct_terms()
    loose = 1e-6
    methods = {
        "gmres": hg.linear.gmres(),
        "dense": hg.linear.dense(),
        "neumann": hg.linear.neumann(1000, tol=loose),
        "plain cg": hg.linear.cg(preconditioner=None),
    }
    solvers = {name: hg.implicit(case.problem, linear=linear) for name, linear in methods.items()}
    for name, out in hypergradients(solvers, case).items():
        assert int(out.info.status) == hg.Status.OK, name
        error = relative_error(flatten(out.grad), problems.hypergradient(case))
        assert error <= max(10 * loose if name == "neumann" else 0, tol(1e-8, 1e-4)), name


def test_every_inner_solver_that_claims_agrees_with_the_closed_form():
    case = curved.logistic()
    rate = step_size(case, 1.5)
    slope = jax.grad(case.problem.inner_loss)
    inners = {
        "newton": hg.inner.newton(),
        "gradient to a tolerance": hg.inner.gradient(optax.sgd(rate), steps=2000, tol=tol(1e-10, 1e-6)),
        "descent as a map": hg.inner.fixed_point(lambda w, h, b: w - rate * slope(w, h, b)),
    }
    solvers = {name: hg.implicit(case.problem, inner=inner) for name, inner in inners.items()}
    for name, out in hypergradients(solvers, case).items():
        assert int(out.info.status) == hg.Status.OK, name
        assert relative_error(flatten(out.grad), problems.hypergradient(case)) <= tol(1e-7, 1e-4), name


def test_neumann_with_k_terms_equals_its_polynomial():
    """v = α Σ_{j ≤ K} (I − αH)ʲ ∂_w f."""
    case = problems.direct_terms()
    hess, cross, f_w, f_h = parts(case)
    alpha = step_size(case, 0.9)
    solver = hg.implicit(case.problem, linear=hg.linear.neumann(7, step_size=alpha))
    v, term = np.zeros_like(f_w), f_w
    for terms in range(8):
        v, term = v + alpha * term, term - alpha * hess @ term
        if terms in (0, 1, 2, 7):
            out = hypergradient(solver, case, linear={"max_steps": terms})
            assert relative_error(flatten(out.grad), f_h - cross @ v) <= tol(1e-8, 1e-4), terms
            assert relative_error(f_h - cross @ v, problems.hypergradient(case)) > 1e-3  # else it would show nothing


def test_t1_t2_equals_its_formula():
    """g = ∂_λ f − α ∂²_{λw} h ∂_w f: the Neumann series with no product."""
    case = problems.direct_terms()
    _, cross, f_w, f_h = parts(case)
    out = hypergradient(hg.implicit(case.problem, linear=hg.linear.identity(step_size=0.37)), case)
    assert relative_error(flatten(out.grad), f_h - 0.37 * cross @ f_w) <= tol(1e-8, 1e-4)
    assert np.isposinf(out.info.error_estimate)
    assert int(out.info.linear_steps) == 0


def test_cg_on_a_budget_equals_the_minimiser_over_its_krylov_space():
    case = problems.direct_terms()
    hess, cross, f_w, f_h = parts(case)
    krylov = np.linalg.qr(np.stack([np.linalg.matrix_power(hess, k) @ f_w for k in range(3)], 1))[0]
    v = krylov @ np.linalg.solve(krylov.T @ hess @ krylov, krylov.T @ f_w)
    out = hypergradient(hg.implicit(case.problem, linear=hg.linear.cg(max_steps=3)), case)
    assert relative_error(flatten(out.grad), f_h - cross @ v) <= tol(1e-8, 1e-4)


@pytest.mark.parametrize("linear", [hg.linear.cg(max_steps=2), hg.linear.neumann(8)], ids=["cg", "neumann"])
def test_a_small_budget_that_is_warm_started_reaches_the_closed_form_over_many_calls(linear):
    case = problems.direct_terms()
    solver = hg.implicit(case.problem, linear=linear)
    once, often = hypergradient(solver, case), hypergradient(solver, case, calls=60)
    expected = problems.hypergradient(case)
    assert relative_error(flatten(once.grad), expected) > 1e-3
    assert relative_error(flatten(often.grad), expected) <= tol(1e-6, 1e-4)


def test_damping_equals_the_dense_damped_solve_at_the_documented_scale_and_may_be_replaced():
    """(H + δ I) v = ∂_w f with δ relative to the root mean square eigenvalue, which one probe finds exactly where H is
    diagonal."""
    case = curved.diagonal("unit", spread=30)
    hess, cross, f_w, f_h = parts(case)
    scale = np.sqrt(np.mean(np.linalg.eigvalsh(hess) ** 2))
    solver = hg.implicit(case.problem, damping=0.6)
    for given, damping in (({}, 0.6), ({"damping": 0.05}, 0.05), ({"damping": 0.0}, 0.0)):
        v = np.linalg.solve(hess + damping * scale * np.eye(len(f_w)), f_w)
        out = hypergradient(solver, case, **given)
        # The solve is as asked; its bias against the undamped hypergradient may exceed the hypergradient's own size.
        expected = (hg.Status.OK, hg.Status.INACCURATE) if damping else (hg.Status.OK,)
        assert int(out.info.status) in expected
        np.testing.assert_allclose(float(out.info.extra["damping"]), damping * scale, rtol=tol(1e-6, 1e-4))
        assert relative_error(flatten(out.grad), f_h - cross @ v) <= tol(1e-7, 1e-4)


def test_damping_scales_with_the_inner_loss_and_is_found_within_a_factor():
    case = problems.tikhonov()
    inner = case.problem.inner_loss
    assert inner is not None
    hess, cross, f_w, f_h = parts(case)
    scale = np.sqrt(np.mean(np.linalg.eigvalsh(hess) ** 2))
    params, hparams, train, valid = case.arrays()
    solver = hg.implicit(hg.Problem(lambda w, h, b: b[1] * inner(w, h, b[0]), case.problem.outer_loss), damping=0.3)
    for size in (1.0, 1e5):
        out, _ = jax.jit(solver.hypergrad)(solver.init(params, hparams), hparams, (train, jnp.asarray(size)), valid)
        shift = float(out.info.extra["damping"]) / size
        assert 0.3 * scale / 3 < shift < 0.3 * scale * 3
        v = np.linalg.solve(hess + shift * np.eye(len(f_w)), f_w)
        assert relative_error(flatten(out.grad), f_h - cross @ v) <= tol(1e-7, 1e-4)


def test_gauss_newton_equals_the_hessian_on_a_linear_model():
    case = curved.logistic()
    inner = hg.compose(
        lambda w, h, b: b[0] @ w,
        lambda z, w, h, b: jnp.mean(jnp.logaddexp(0.0, -b[1] * z)) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
    )
    solver = hg.implicit(hg.Problem(inner, curved.logistic_loss), curvature="gauss_newton")
    out = hypergradient(solver, case)
    assert int(out.info.status) == hg.Status.OK
    assert relative_error(flatten(out.grad), problems.hypergradient(case)) <= tol(1e-7, 1e-4)


def network() -> tuple[Callable, Callable, Any, Any, Any]:
    """A tanh network of 25 parameters, not at its optimum, with a decay for each leaf."""
    rng = np.random.default_rng(21)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "c": rng.normal(size=(4, 2)), "d": np.zeros(1)}
    hparams = jax.tree.map(lambda x: rng.normal() - 1, params)
    batch = (rng.normal(size=(9, 3)), rng.normal(size=(9, 2)))

    def outputs(w, h, batch):
        return jnp.tanh(batch[0] @ w["a"] + w["b"][None]) @ w["c"] + w["d"][0]

    def loss(z, w, h, batch):
        decay = sum(jnp.exp(h[k]) * jnp.sum(w[k] ** 2) for k in w)
        return jnp.mean((z - batch[1]) ** 2) + 0.5 * decay

    return outputs, loss, *jax.tree.map(jnp.asarray, (params, hparams, batch))


def test_gauss_newton_on_a_network_equals_the_dense_product():
    """g = ∂_λ f − ∂²_{λw} h (JᵀQJ + R)⁻¹ ∂_w f with J, Q and R written out, where the Hessian itself is indefinite."""
    outputs, loss, params, hparams, batch = network()
    outer = lambda w, h, b: jnp.mean(jnp.abs(outputs(w, h, b) - b[1] - 0.3) ** 3)
    inner = hg.compose(outputs, loss)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def derivatives(w):
        jac = jax.jacfwd(lambda w: outputs(unravel(w), hparams, batch).ravel())(w)
        hess = jax.jacfwd(jax.grad(lambda w: inner(unravel(w), hparams, batch)))(w)
        return jac, hess, jax.grad(lambda w: outer(unravel(w), hparams, batch))(w)

    jac, hess, f_w = (np.asarray(x) for x in derivatives(flat))
    assert np.linalg.eigvalsh(hess)[0] < 0
    decay = np.asarray(ravel_pytree(jax.tree.map(lambda w, h: jnp.full(w.shape, jnp.exp(h)), params, hparams))[0])
    v = np.linalg.solve(2 / len(jac) * jac.T @ jac + np.diag(decay), f_w)
    expected = [-np.sum(leaf) for leaf in jax.tree.leaves(unravel(jnp.asarray(decay * np.asarray(flat) * v)))]
    stay = hg.inner.gradient(optax.sgd(0.1), steps=0)
    problem, how = hg.Problem(inner, outer), {"inner": stay, "curvature": "gauss_newton"}
    solvers = {name: hg.implicit(problem, linear=getattr(hg.linear, name)(), **how) for name in ("cg", "dense")}
    run = {name: solver.hypergrad for name, solver in solvers.items()}
    found = together(run, dict.fromkeys(run, (solvers["cg"].init(params, hparams), hparams, batch, batch)))
    for name, (out, state) in found.items():
        assert relative_error(flatten(out.grad), np.asarray(expected)) <= tol(1e-7 if name == "cg" else 1e-9, 1e-3)
        assert_trees_close(state.params, params, 0.0)


def test_the_solve_the_hessian_and_the_cross_product_see_one_minibatch():
    """With minibatches, the hypergradient is that of the one batch drawn, exactly."""
    case = problems.ridge("per coordinate")
    params, hparams, train, valid = case.arrays()
    key = jax.random.key(3)
    solver = hg.implicit(case.problem)
    drawn = bind_inner(case.problem, hg.minibatches(train, 20), jax.random.split(key, 3)[0], None).fixed_batch[0]
    data = {"one batch": hg.minibatches(train, 20), "that batch": drawn, "all rows": train}
    run = dict.fromkeys(data, solver.hypergrad) | {"one batch": functools.partial(solver.hypergrad, key=key)}
    state = solver.init(params, hparams)
    found = together(run, {name: (state, hparams, rows, valid) for name, rows in data.items()})
    out, again, full = (found[name][0] for name in data)
    assert int(out.info.status) == int(again.info.status) == hg.Status.OK
    assert_trees_close(out.grad, again.grad, tol(1e-8, 1e-4))
    assert relative_error(full.grad, out.grad) > 1e-2

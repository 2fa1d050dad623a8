"""The best response has the derivatives of its closed form, of any order and in both modes, or none at all (NaN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from tests._helpers import assert_trees_close, relative_error, together, tol
from tests.solvers import _curved_problems as curved
from tests.solvers import _problems as problems
from tests.solvers._problems import Case, flatten

CASES: dict[str, Callable[[], Case]] = {
    "ridge, per coordinate": lambda: problems.ridge("per coordinate"),
    "direct terms": problems.direct_terms,
    "odd pytree": problems.odd_pytree,
    "logistic": curved.logistic,
}


def composed(case: Case, **options: Any) -> Callable[[Any], jax.Array]:
    """λ ↦ f(w*(λ), λ) as a user writes it."""
    params, _, train, valid = case.arrays()
    w_star = hg.best_response(case.problem, **options)
    return lambda h: case.problem.outer_loss(w_star(h, params, train), h, valid)


def in_both_modes(loss: Callable[[Any], jax.Array]) -> Callable[[Any], tuple[jax.Array, Any, Any]]:
    """Value, gradient in reverse mode and in forward mode: `jax.vjp` and `jax.jacfwd`, of one solve."""

    def run(h: Any) -> tuple[jax.Array, Any, Any]:
        value, push = jax.linearize(loss, h)
        (reverse,) = jax.linear_transpose(push, h)(jnp.ones_like(value))
        flat, unravel = ravel_pytree(h)
        return value, reverse, unravel(jax.vmap(lambda e: push(unravel(e)))(jnp.eye(flat.size, dtype=flat.dtype)))

    return run


def second_derivative(case: Case) -> np.ndarray:
    """Central differences of the closed form of the first, `[p, p]`."""
    h = flatten(case.hparams)
    eps = 1e-4
    columns = []
    for e in np.eye(h.size) * eps:
        near = problems.hypergradient(case, h + e) - problems.hypergradient(case, h - e)
        far = problems.hypergradient(case, h + 2 * e) - problems.hypergradient(case, h - 2 * e)
        columns.append((8 * near - far) / (12 * eps))
    return np.stack(columns)


def test_gradient_equals_closed_form_in_both_modes():
    cases = {name: make() for name, make in CASES.items()}
    hparams = {name: case.arrays()[1] for name, case in cases.items()}
    found = together(
        {name: in_both_modes(composed(case)) for name, case in cases.items()},
        {name: (h,) for name, h in hparams.items()},
    )
    for name, (value, reverse, forward) in found.items():
        expected, h = problems.hypergradient(cases[name]), hparams[name]
        assert relative_error(flatten(reverse), expected) <= tol(1e-7, 1e-4), name
        assert relative_error(flatten(forward), expected) <= tol(1e-7, 1e-4), name
        assert jax.tree.structure(reverse) == jax.tree.structure(h)
        np.testing.assert_allclose(float(value), problems.outer_value(cases[name], flatten(h)), rtol=tol(1e-8, 1e-4))


def test_second_derivative_equals_central_differences_of_the_closed_form():
    cases = {name: CASES[name]() for name in ("ridge, per coordinate", "direct terms", "logistic")}
    found = together(
        {name: jax.hessian(composed(case)) for name, case in cases.items()},
        {name: (case.arrays()[1],) for name, case in cases.items()},
    )
    for name, matrix in found.items():
        assert relative_error(matrix, second_derivative(cases[name])) <= tol(1e-6, 1e-3), name
        assert relative_error(np.asarray(matrix).T, matrix) <= tol(1e-6, 1e-3), name


def test_reverse_over_reverse_equals_forward_over_reverse():
    case = problems.ridge("log")
    loss, h = composed(case), case.arrays()[1]
    twice, mixed = jax.jit(
        lambda h: (jax.grad(jax.grad(loss))(h), jax.jvp(jax.grad(loss), (h,), (jnp.ones_like(h),))[1])
    )(h)
    expected = second_derivative(case)
    assert relative_error(twice, expected.reshape(())) <= tol(1e-6, 1e-3)
    assert relative_error(mixed, expected.reshape(())) <= tol(1e-6, 1e-3)


def test_vmap_of_first_and_second_derivatives_equals_a_loop():
    case = problems.direct_terms()
    loss = composed(case)
    twice = jax.jacfwd(lambda h: (jax.grad(loss)(h),) * 2, has_aux=True)
    both = lambda h: (*twice(h)[::-1], jax.jacfwd(loss)(h))
    many = case.arrays()[1][None] + jnp.asarray([[0.0, 0.0], [0.3, -0.2], [-0.5, 0.4]])
    batched = jax.jit(jax.vmap(both))(many)
    one = jax.jit(both)
    for i in range(3):
        assert_trees_close(jax.tree.map(lambda x: x[i], batched), one(many[i]), tol(1e-8, 1e-3))
        assert relative_error(batched[0][i], problems.hypergradient(case, flatten(many[i]))) <= tol(1e-7, 1e-4)


def test_through_a_proximal_fixed_point_the_gradient_is_that_of_the_active_set():
    case, step = curved.l1(ridge=True)
    loss = composed(case, inner=hg.inner.fixed_point(step))
    _, reverse, forward = jax.jit(in_both_modes(loss))(case.arrays()[1])
    assert relative_error(reverse, problems.hypergradient(case)) <= tol(1e-7, 1e-4)
    assert relative_error(forward, problems.hypergradient(case)) <= tol(1e-7, 1e-4)


def test_every_linear_solver_gives_the_same_derivatives():
    case = problems.direct_terms()
    methods = {"cg": hg.linear.cg(), "gmres": hg.linear.gmres(), "dense": hg.linear.dense()}
    runs = {name: in_both_modes(composed(case, inner=hg.inner.newton(), linear=m)) for name, m in methods.items()}
    for name, (_, reverse, forward) in together(runs, dict.fromkeys(runs, (case.arrays()[1],))).items():
        assert relative_error(reverse, problems.hypergradient(case)) <= tol(1e-7, 1e-4), name
        assert relative_error(forward, problems.hypergradient(case)) <= tol(1e-7, 1e-4), name


def test_the_start_has_derivative_zero_and_does_not_matter():
    case = problems.ridge("per coordinate")
    params, hparams, train, valid = case.arrays()
    w_star = hg.best_response(case.problem)
    loss = lambda w0: case.problem.outer_loss(w_star(hparams, w0, train), hparams, valid)
    value, grad = jax.jit(jax.value_and_grad(loss))(params + 3)
    np.testing.assert_array_equal(np.asarray(grad), np.zeros(params.shape))
    np.testing.assert_allclose(float(value), problems.outer_value(case, flatten(hparams)), rtol=tol(1e-8, 1e-4))


def test_derivatives_reach_the_batch_and_arrays_that_a_loss_closes_over():
    """Labels as the batch, as hyperparameters and as a traced array in a closure are one derivative."""
    case = problems.data_as_hparams("labels")
    params, labels, (x, _), valid = case.arrays()
    plain = lambda w, h, b: problems.half_mse(w, None, b) + h * jnp.sum(w**2)
    ridge = jnp.asarray(0.2)

    def through_batch(y):
        w = hg.best_response(hg.Problem(plain, plain))(ridge, params, (x, y))
        return problems.half_mse(w, None, valid)

    def through_closure(y):
        def inner(w, h, batch):
            return plain(w, h, (x, y))

        return problems.half_mse(hg.best_response(hg.Problem(inner, inner))(ridge, params), None, valid)

    expected = problems.hypergradient(case)
    runs = {loss.__name__: in_both_modes(loss) for loss in (through_batch, through_closure)}
    for _, reverse, forward in together(runs, dict.fromkeys(runs, (labels,))).values():
        assert relative_error(reverse, expected) <= tol(1e-7, 1e-4)
        assert relative_error(forward, expected) <= tol(1e-7, 1e-4)


def test_inside_a_scan_and_a_users_own_objective():
    """Tuning by hand: gradient descent on a loss that calls the best response twice and closes over traced data."""
    case = problems.ridge("log")
    params, hparams, train, valid = case.arrays()

    @jax.jit
    def descend(h, train, valid):
        w_star = hg.best_response(case.problem)

        def objective(h):
            twice = w_star(h, params, train) + w_star(h + 0.5, params, train)
            return problems.half_mse(0.5 * twice, None, valid)

        def step(h, _):
            value, grad = jax.value_and_grad(objective)(h)
            return h - 2.0 * grad, value

        return jax.lax.scan(step, h, length=3)

    h, values = descend(hparams, train, valid)

    def reference(h: np.ndarray) -> float:
        w = 0.5 * (problems.solution(case, h) + problems.solution(case, h + 0.5))
        return case.analytic.outer(w, h)

    expected = flatten(hparams)
    for value in np.asarray(values):
        np.testing.assert_allclose(value, reference(expected), rtol=tol(1e-7, 1e-3))
        expected = expected - 2.0 * np.asarray(central_difference64(reference, expected))
    np.testing.assert_allclose(float(h), expected[0], rtol=tol(1e-6, 1e-3))


def central_difference64(f: Callable[[np.ndarray], float], x: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """Fourth-order central differences that stay in NumPy's float64, whatever the run."""
    slope = []
    for e in np.eye(x.size) * eps:
        slope.append((8 * (f(x + e) - f(x - e)) - (f(x + 2 * e) - f(x - 2 * e))) / (12 * eps))
    return np.asarray(slope)


FAILURES = {
    "inner solve": {"inner": hg.inner.lbfgs(max_steps=2)},
    "linear solve": {"linear": hg.linear.cg(tol=1e-5, max_steps=1, preconditioner=None)},
}


@pytest.mark.parametrize("name", FAILURES)
def test_where_a_solve_fails_the_value_is_finite_and_every_derivative_nan(name):
    case = curved.logistic()
    value, reverse, forward = jax.jit(in_both_modes(composed(case, **FAILURES[name])))(case.arrays()[1])
    assert np.isfinite(value)
    assert np.all(np.isnan(reverse))
    assert np.all(np.isnan(forward))


def test_a_second_derivative_through_a_failed_solve_is_nan():
    case = curved.poisson()
    found = jax.jit(jax.grad(jax.grad(composed(case, **FAILURES["inner solve"]))))(case.arrays()[1])
    assert np.isnan(found)


def test_one_failed_member_of_a_batch_leaves_the_others_right():
    """At a negative ridge the inner problem has no minimum."""
    case = problems.ridge("scalar")
    loss = composed(case)
    good = flatten(case.hparams)[0]
    many = jnp.asarray([good, -50.0, good + 0.1])
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
    assert np.isnan(grads[1])
    for i in (0, 2):
        h = np.asarray([float(many[i])])
        assert relative_error(grads[i].reshape(1), problems.hypergradient(case, h)) <= tol(1e-7, 1e-4)
        np.testing.assert_allclose(float(values[i]), problems.outer_value(case, h), rtol=tol(1e-8, 1e-4))


def test_solvers_that_claim_nothing_are_refused():
    problem = problems.ridge("log").problem
    with pytest.raises(hg.InputError, match=r"best_response: linear must solve to a tolerance.*give it tol="):
        hg.best_response(problem, linear=hg.linear.neumann(max_steps=5))
    import optax

    with pytest.raises(hg.InputError, match=r"best_response: inner must solve to a tolerance.*hg\.implicit"):
        hg.best_response(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=3))
    step = lambda w, h, b: 0.5 * w
    with pytest.raises(hg.InputError, match=r"hg\.linear\.cg needs a symmetric operator.*gmres"):
        hg.best_response(problem, inner=hg.inner.fixed_point(step), linear=hg.linear.cg())


@pytest.mark.parametrize(
    "inner", [None, hg.inner.root(lambda w, h, b: {"a": w["a"] - h, "b": w["b"] - 2.0 + 0 * w["a"]})]
)
def test_parameters_that_no_hyperparameter_moves_are_no_obstacle(inner):
    loss = lambda w, h, b: jnp.sum((w["a"] - h) ** 2) + jnp.sum((w["b"] - 2.0) ** 2)
    w_star = hg.best_response(hg.Problem(loss, lambda w, h, b: 0.0 * h), inner=inner)
    start = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    outer = lambda h: w_star(h, start)["a"] ** 2 * w_star(h, start)["b"]
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(0.7), 2 * 0.7 * 2.0, rtol=tol(1e-9, 1e-4))

"""What every linear solver does: one answer at any scale, on any pytree, under jit and vmap, and an honest status."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.linear._linear import fit, solve
from tests._helpers import assert_trees_equal, flat, relative_error, shard_rows, tol
from tests.linear._systems import (
    CLAIMING,
    EPS,
    GENERAL,
    ITERATIVE,
    METHODS,
    PRECISE,
    SOLVERS,
    N,
    all_options,
    compiled,
    contraction,
    error,
    general,
    run,
    spd,
    vector,
)


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["cg", "gmres", "dense"])
def test_solution_is_that_of_a_dense_solve_where_a_is_positive_definite(name, condition):
    for seed in range(3):
        matrix, rhs = spd(condition, seed), vector(seed)
        out = run(name, matrix, rhs)
        assert out.status.usable
        allowed = tol(2e-16 * condition + 3 * PRECISE * condition**0.5, 2e-7 * condition)
        assert error(out.x, np.linalg.solve(matrix, rhs)) <= allowed
        assert out.true_residual <= tol(2 * PRECISE, PRECISE + 3 * EPS * condition)


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["gmres", "dense"])
def test_solution_is_that_of_a_dense_solve_where_a_is_not_symmetric(name, condition):
    for seed in range(3):
        matrix, rhs = general(condition, seed), vector(seed)
        out = run(name, matrix, rhs)
        assert out.status.usable
        assert error(out.x, np.linalg.solve(matrix, rhs)) <= tol(1e-10 + 1e-15 * condition, 3e-7 * condition)


@pytest.mark.parametrize("name", GENERAL)
def test_fixed_point_systems_are_solved(name):
    for seed in range(3):
        matrix, rhs = contraction(0.7, seed), vector(seed)
        out = run(name, matrix, rhs)
        asked = 1e-6 if name == "neumann" else PRECISE
        assert out.status == hg.Status.OK
        assert out.true_residual <= 2 * asked + 20 * EPS


@pytest.mark.parametrize("name", CLAIMING)
def test_ok_means_that_the_residual_is_known_and_met(name):
    for condition, loose in itertools.product([3.0, 30.0], [1e-1, 1e-3, 1e-5]):
        out = run(name, spd(condition), vector(), tol=loose)
        assert out.status == hg.Status.OK
        assert out.residual <= loose
        assert out.true_residual <= 1.01 * loose
        if name != "neumann":  # which foretells it
            assert out.true_residual <= 1.01 * out.residual + 30 * EPS


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_right_hand_side_gives_zero(name):
    out = run(name, spd(10.0), np.zeros(N), start=vector())
    assert out.status == hg.Status.OK and out.residual == 0
    np.testing.assert_array_equal(out.x, 0)
    if name in ITERATIVE and name != "neumann":  # that one still searches for its step size
        assert out.steps == 0


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-30, 2.0**30, 2.0**100])  # powers of two, which round nothing
@pytest.mark.parametrize("name", SOLVERS)
def test_scaling_the_right_hand_side_scales_the_solution(name, scale):
    matrix, rhs, start = spd(30.0), vector(), vector(5)
    out, scaled = run(name, matrix, rhs, start), run(name, matrix, rhs * scale, start * 2.0**10)
    assert (scaled.status, scaled.steps) == (out.status, out.steps)
    np.testing.assert_array_equal(scaled.x, out.x * scale)
    np.testing.assert_array_equal(scaled.residual, out.residual)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20, 2.0**-50, 2.0**50])
@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("identity", "neumann budget")])
def test_scaling_the_operator_divides_the_solution(name, scale):
    matrix, rhs, start = spd(30.0), vector(), vector(5)
    out, scaled = run(name, matrix, rhs, start), run(name, scale * matrix, rhs, start)
    assert (scaled.status, scaled.steps) == (out.status, out.steps)
    assert error(scaled.x * scale, out.x) <= 100 * EPS
    if np.isfinite(out.inverse_of_gap).all():
        assert error(scaled.inverse_of_gap * scale, out.inverse_of_gap) <= 1e-2


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["cg", "gmres", "dense", "neumann"])
def test_scaling_system_and_right_hand_side_together_changes_nothing(name, scale):
    matrix, rhs = spd(30.0), vector()
    out, scaled = run(name, matrix, rhs), run(name, scale * matrix, scale * rhs)
    assert scaled.status == out.status and abs(scaled.steps - out.steps) <= 1
    assert error(scaled.x, out.x) <= 100 * EPS + 2 * PRECISE


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("where", ["rhs", "matrix"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_a_status(name, where, value):
    matrix, rhs = spd(10.0), vector()
    if where == "rhs":
        rhs[3] = value
    elif name == "identity":
        return  # it never looks
    else:
        matrix[3, 5] = value
    assert run(name, matrix, rhs).status == hg.Status.NONFINITE_GRAD


@pytest.mark.parametrize("name", ITERATIVE)
def test_start_at_the_solution_at_any_length_takes_one_product(name):
    matrix, rhs = spd(10.0), vector()
    solution = np.linalg.solve(matrix, rhs)
    for length in (1.0, -7.0, 1e-3):
        out = run(name, matrix, rhs, start=length * solution, tol=1e-5)
        assert out.status == hg.Status.OK
        assert out.steps == 1 + 10 * (name == "neumann")
        assert error(out.x, solution) <= tol(1e-9, 1e-5)


@pytest.mark.parametrize("name", ITERATIVE)
def test_a_start_near_the_solution_saves_products_and_a_far_one_costs_two_at_most(name):
    matrix, rhs = spd(100.0), vector()
    solution = np.linalg.solve(matrix, rhs)
    cold = run(name, matrix, rhs, tol=1e-4)
    for far, slack in [(1e-6, 0), (1e-2, 0), (0.3, 2)]:
        near = solution + far * np.linalg.norm(solution) / N**0.5 * vector(4)
        warm = run(name, matrix, rhs, start=-3 * near, tol=1e-4)
        assert warm.status == hg.Status.OK
        assert warm.steps <= cold.steps + slack, far
    assert warm.steps > run(name, matrix, rhs, start=solution + 1e-8 * vector(4), tol=1e-4).steps


def test_fitted_start_is_never_worse_than_zero():
    matrix = jnp.asarray(general(1e3), float)
    for seed in range(20):
        rhs, start = jnp.asarray(vector(seed), float), jnp.asarray(10.0 ** (seed % 7 - 3) * vector(100 + seed), float)
        x, gap, product = fit(lambda v: matrix @ v, rhs, start)
        assert relative_error(gap, rhs - matrix @ x) <= 50 * EPS
        assert relative_error(product, matrix @ x) <= 50 * EPS
        assert jnp.linalg.norm(gap) <= jnp.linalg.norm(rhs) * (1 + EPS)
    x, gap, _ = fit(lambda v: 0 * v, rhs, start)
    np.testing.assert_array_equal(gap, rhs)


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_the_products_made(name):
    count = [0]

    def add(_):
        count[0] += 1

    matrix = jnp.asarray(spd(20.0), float)

    def counted(v):
        jax.debug.callback(add, v[0])
        return matrix @ v

    f = jax.jit(lambda start: solve(SOLVERS[name], counted, jnp.asarray(vector(), float), start=start).steps)
    for start in (jnp.zeros(N), jnp.asarray(vector(3), float)):
        count[0] = 0
        steps = int(f(start))
        jax.effects_barrier()
        assert count[0] == steps


@pytest.mark.parametrize("name", [name for name in SOLVERS if "budget" in name])
def test_a_fixed_budget_is_used_to_the_last_product(name):
    for start in (None, vector(3)):
        assert run(name, spd(20.0), vector(), start).steps == 5


@pytest.mark.parametrize("name", ["cg budget", "gmres budget", "neumann budget"])
def test_a_larger_budget_lowers_the_residual(name):
    residuals = [run(name, spd(100.0), vector(), max_steps=k).true_residual for k in (1, 4, 16, 40)]
    assert np.all(np.diff(residuals) < 0)
    assert run(name, spd(100.0), vector(), max_steps=40).status == hg.Status.OK


@pytest.mark.parametrize("name", ["cg", "gmres restarted", "neumann"])
def test_adding_steps_never_turns_ok_into_a_failure(name):
    matrix, rhs = spd(10.0), vector()
    codes = [run(name, matrix, rhs, max_steps=k, tol=1e-4).status for k in (1, 3, 10, 30, 100, 1000)]
    assert codes[0] == hg.Status.LINEAR_MAX_STEPS and codes[-1] == hg.Status.OK
    assert codes == sorted(codes, key=lambda c: c == hg.Status.OK)


@pytest.mark.parametrize("name", ["cg", "gmres", "neumann"])
def test_tolerance_below_the_precision_is_named(name):
    # Neumann's terms shrink by their ratio at best; the others may hit zero.
    out = run(name, spd(3.0), vector(), tol=EPS / 100, max_steps=500)
    assert out.status == hg.Status.PRECISION_LIMITED and out.status.usable
    assert error(out.x, np.linalg.solve(spd(3.0), vector())) <= 100 * EPS


@pytest.mark.parametrize("name", METHODS)
def test_a_failing_lane_leaves_the_others_bit_equal(name):
    good = [(spd(20.0, seed), vector(seed)) for seed in range(3)]
    saddle = spd(20.0) - 0.3 * np.eye(N)
    bad = [
        (np.full((N, N), np.nan), vector()),
        (saddle, vector()),
        (np.zeros((N, N)), vector()),
        (spd(20.0), np.full(N, np.inf)),
    ]
    mapped = jax.jit(jax.vmap(compiled(name), in_axes=(0, 0, 0, None)))

    def lanes(systems):
        a, b = (jnp.asarray(np.stack(x), float) for x in zip(*systems, strict=True))
        return jax.tree.map(lambda x: x[:3], mapped(a, b, jnp.zeros_like(b), all_options(name)))

    expected = lanes([*good, *good, good[0]])
    assert_trees_equal(lanes([*good, *bad]), expected)
    alone = run(name, *good[1])
    assert error(np.asarray(expected[0][1]), alone.x) <= 1e3 * EPS
    assert hg.Status(int(expected[3][1])) == alone.status


def odd_tree():
    """A parameter tree with None, a scalar, nesting and two dtypes, and a positive definite operator on it."""
    f = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
    rng = np.random.default_rng(0)
    tree = {
        "none": None,
        "scalar": jnp.asarray(rng.normal(), f),
        "pair": (jnp.asarray(rng.normal(size=(2, 3)), f), [jnp.asarray(rng.normal(size=4), jnp.float32)]),
        "empty": jnp.zeros((0, 2), f),
    }
    scales = jax.tree.map(lambda x: 1 + jnp.abs(x), tree)
    ones = jax.tree.map(jnp.ones_like, tree)

    def matvec(v):
        total = jnp.asarray(sum(jnp.sum(leaf.astype(f)) for leaf in jax.tree.leaves(v)))
        return jax.tree.map(lambda s, x, o: s * x + (0.1 * total).astype(x.dtype) * o, scales, v, ones)

    dense = np.diag(flat(scales)) + 0.1
    return tree, matvec, dense


@pytest.mark.parametrize("name", METHODS)
def test_any_pytree_keeps_its_structure_and_dtypes(name):
    tree, matvec, matrix = odd_tree()
    result = jax.jit(lambda b: solve(SOLVERS[name], matvec, b, start=b)[:4])(tree)
    solution, residual, steps, status = result
    assert jax.tree.structure(solution) == jax.tree.structure(tree)
    assert [x.dtype for x in jax.tree.leaves(solution)] == [x.dtype for x in jax.tree.leaves(tree)]
    assert residual.shape == steps.shape == status.shape == () and status.dtype == steps.dtype == jnp.int32
    if name in CLAIMING:
        assert hg.Status(int(status)).usable
        assert error(flat(solution), np.linalg.solve(matrix, flat(tree))) <= 2e-5


@pytest.mark.parametrize("name", SOLVERS)
def test_new_values_of_options_count_and_do_not_recompile(name):
    changes = {"tol": 1e-2, "max_steps": 3, "step_size": 0.25, "damping": 0.5}
    out = run(name, spd(10.0), vector())
    programs = compiled(name)._cache_size()  # another test of this process may have called it with other shapes
    for option in SOLVERS[name].options:
        other = run(name, spd(10.0), vector(), **{option: changes[option]})
        unused = option == "tol" and (name == "dense" or not SOLVERS[name].claims)
        assert error(other.x, out.x) > 0 or unused
    assert compiled(name)._cache_size() == programs


@pytest.mark.parametrize("name", ["cg", "gmres restarted"])
def test_sharded_vectors_are_solved_where_they_lie(name, devices):
    tree = {"a": jnp.asarray(vector(0, 16), float), "b": jnp.asarray(vector(1, 8), float)}
    scales = jax.tree.map(lambda x: 1 + jnp.abs(x), tree)

    def f(tree, scales):
        def matvec(v):
            total = 0.1 * sum(jnp.sum(x) for x in jax.tree.leaves(v))
            return jax.tree.map(lambda s, x: s * x + total, scales, v)

        return solve(SOLVERS[name], matvec, tree).solution

    expected = jax.jit(f)(tree, scales)
    found = jax.jit(f)(shard_rows(tree, devices), shard_rows(scales, devices))
    assert relative_error(found, expected) <= tol(1e-10, 1e-4)


@pytest.mark.parametrize("name", ["cg", "gmres", "gmres restarted", "neumann", "dense", "nystrom"])
def test_inverse_turns_residuals_into_errors(name):
    """‖inverse(r)‖ is the size of the error: rarely too small by four, never by a hundred, and seldom far too large."""
    ratios = []
    for seed, loose in itertools.product(range(8), [1e-1, 1e-3]):
        condition = 10.0 ** (1 + seed % 3)
        if name == "neumann" and condition > 100:
            continue
        matrix, rhs = spd(condition, seed), vector(seed)
        out = run(name, matrix, rhs, **({} if name == "nystrom" else {"tol": loose}))
        ratios.append(np.linalg.norm(out.inverse_of_gap) / np.linalg.norm(out.x - np.linalg.solve(matrix, rhs)))
    assert np.mean(np.array(ratios) > 0.25) >= 0.95, np.sort(ratios)
    assert np.min(ratios) > 0.01, np.sort(ratios)
    assert np.median(ratios) < 30, np.sort(ratios)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: hg.linear.cg(tol=-1.0), "cg: tol must be greater than 0, found -1.0"),
        (lambda: hg.linear.cg(max_steps=2.5), "cg: max_steps must be an integer, found 2.5"),
        (lambda: hg.linear.cg(max_step=3), "cg: unknown option 'max_step', did you mean 'max_steps'"),  # pyright: ignore[reportCallIssue]
        (lambda: hg.linear.gmres(restart=0), "gmres: restart must be at least 1, found 0"),
        (lambda: hg.linear.gmres(restart=2.0), "gmres: restart must be an integer, found 2.0"),  # pyright: ignore[reportArgumentType]
        (
            lambda: jax.jit(lambda m: solve(hg.linear.gmres(restart=m), lambda v: v, jnp.ones(2)).solution)(3),
            "gmres: restart must be a Python integer",
        ),
        (lambda: hg.linear.neumann(-1), "neumann: max_steps must be at least 0, found -1"),
        (lambda: hg.linear.neumann(True), "neumann: max_steps must be an integer, found True"),
        (lambda: hg.linear.neumann(3, step_size=0.0), "neumann: step_size must be greater than 0, found 0.0"),
        (lambda: hg.linear.neumann(3, power_steps=0), "neumann: power_steps must be at least 1, found 0"),
        (lambda: hg.linear.neumann(3, stepsize=0.1), "neumann: unknown option 'stepsize', did you mean 'step_size'"),  # pyright: ignore[reportCallIssue]
        (lambda: hg.linear.nystrom(0, damping=0.1), "nystrom: rank must be at least 1, found 0"),
        (lambda: hg.linear.nystrom(3, damping=0.0), "nystrom: damping must be greater than 0, found 0"),
        (lambda: hg.linear.nystrom(3, damping=-0.1), "nystrom: damping must be greater than 0, found -0.1"),
        (lambda: hg.linear.nystrom(3, damping=0.1, sketch="gauss"), "nystrom: sketch must be one of.*found 'gauss'"),
        (lambda: hg.linear.dense(tol=0.0), "dense: tol must be greater than 0, found 0.0"),
        (lambda: hg.linear.identity(step_size=-1.0), "identity: step_size must be greater than 0, found -1.0"),
        (lambda: hg.linear.jacobi(probes=0), "jacobi: probes must be at least 1, found 0"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(hg.HypergradError, match=match):
        make()

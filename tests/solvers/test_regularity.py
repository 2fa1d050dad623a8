"""With `regularity=` the error of an implicit hypergradient is bounded, and no more loosely than it has to be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.solvers.regularity import cross_norm
from tests._helpers import tol

A, B, C = 1.7, 0.6, 0.8  # curvature of the inner loss, of the outer loss, and slope in the hyperparameter
HERE = hg.inner.gradient(optax.sgd(0.0), steps=0)  # the point is given: no step is taken


def found(inner_loss: Any, outer_loss: Any, known: Any, *points: float, hparam: float = 0.9) -> np.ndarray:
    """Hypergradient and bound at points that are not the optimum, `[points, 2]`."""
    solver = hg.implicit(
        hg.Problem(inner_loss, outer_loss), inner=HERE, linear=hg.linear.cg(max_steps=4), regularity=known
    )
    h, step = jnp.asarray(hparam), jax.jit(solver.hypergrad)
    outs = [step(solver.init(jnp.asarray([w]), h), h)[0] for w in points]
    return np.asarray([[out.grad, out.info.extra["error_bound"]] for out in outs])


# One dimension, where every inequality of the bound is an equality, and one constant at a time matters.
EXACT = {
    # h = A w²/2 − C λ w, f = B w²/2: w* = C λ / A, g = B C w* / A
    "outer": (
        lambda w, h, b: 0.5 * A * jnp.sum(w**2) - C * h * jnp.sum(w),
        lambda w, h, b: 0.5 * B * jnp.sum(w**2),
        {"outer_gradient": B},
        lambda h: B * C * C * h / A**2,
    ),
    # f = w λ: ∂_λ f = w moves with w, and ∂_w f does not
    "direct": (
        lambda w, h, b: 0.5 * A * jnp.sum(w**2) - C * jnp.sum(w),
        lambda w, h, b: h * jnp.sum(w),
        {"direct": 1.0},
        lambda h: C / A,
    ),
    # h = (A + λ) w²/2 − C w, f = w: J = w moves with w; w* = C / (A + λ), g = −w* / (A + λ)
    "cross": (
        lambda w, h, b: 0.5 * (A + h) * jnp.sum(w**2) - C * jnp.sum(w),
        lambda w, h, b: jnp.sum(w),
        {"cross": 1.0},
        lambda h: -C / (A + h) ** 2,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_in_one_dimension_the_bound_is_the_error(name):
    inner_loss, outer_loss, constants, truth = EXACT[name]
    none = {"outer_gradient": 0.0, "cross": 0.0}
    with_it, without = (
        found(inner_loss, outer_loss, hg.Regularity(A + 0.9 if name == "cross" else A, **known), 0.1, 1.4)
        for known in (none | constants, none)
    )
    np.testing.assert_allclose(with_it[:, 1], np.abs(with_it[:, 0] - truth(0.9)), rtol=tol(1e-10, 1e-3))
    assert np.all(without[:, 1] < 0.01 * with_it[:, 1]), "the constant is what the bound comes from"


def test_the_change_of_the_hessian_is_in_the_bound():
    """h = cosh(w) − λ w on |w| ≤ 1, f = w: v* = 1 / cosh(w*), and |sinh| ≤ sinh(1) is the slope of the Hessian."""
    inner_loss = lambda w, h, b: jnp.sum(jnp.cosh(w)) - h * jnp.sum(w)
    outer_loss = lambda w, h, b: jnp.sum(w)
    known = hg.Regularity(1.0, 0.0, 0.0, hessian=np.sinh(1.0))
    for grad, bound in found(inner_loss, outer_loss, known, 0.0, 0.4, 1.0, hparam=0.7):
        error = abs(grad - 1 / np.cosh(np.arcsinh(0.7)))
        assert error <= bound <= 20 * error


RNG = np.random.default_rng(4)
X, Y = (jnp.asarray(RNG.normal(size=s) / 5) for s in ((30, 6), (30,)))


def ridge(w, h, batch):
    return 0.5 * jnp.sum((X @ w - Y) ** 2) + 0.5 * jnp.sum(jnp.exp(h) * w**2)


def fit(w, h, batch):
    return 0.5 * jnp.sum((X[::-1] @ w - Y) ** 2)


def known_of_ridge(h):
    weakest = jnp.min(jnp.exp(h))
    return hg.Regularity(weakest, outer_gradient=jnp.linalg.norm(X, 2) ** 2, cross=jnp.max(jnp.exp(h)))


@pytest.mark.parametrize("damping", [None, 0.5])
def test_the_bound_holds_whatever_the_budget_and_the_damping(damping):
    solver = hg.implicit(
        hg.Problem(ridge, fit),
        inner=hg.inner.gradient(optax.sgd(0.3), steps=1),
        linear=hg.linear.cg(max_steps=1),
        damping=damping,
        regularity=known_of_ridge,
    )

    @jax.jit
    @jax.vmap
    def step(h, budget):
        state = solver.init(jnp.zeros(6), h)
        for part in ("inner", "linear"):
            state.options[part]["max_steps"] = budget
        return solver.hypergrad(state, h)[0]

    hparams, budgets = RNG.uniform(-2, 1, (80, 6)), np.repeat([1, 2, 4, 30], 20)
    out = step(jnp.asarray(hparams), jnp.asarray(budgets, jnp.int32))
    np.testing.assert_array_equal(out.info.inner_steps, budgets)
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    for h, grad, bound in zip(
        *(np.asarray(x, np.float64) for x in (hparams, out.grad, out.info.extra["error_bound"])), strict=True
    ):
        hessian = x.T @ x + np.diag(np.exp(h))
        w = np.linalg.solve(hessian, x.T @ y)
        v = np.linalg.solve(hessian, x[::-1].T @ (x[::-1] @ w - y))
        assert np.linalg.norm(grad + np.exp(h) * w * v) <= bound


def test_a_bound_may_be_given_for_the_cross_derivative_instead_of_its_norm():
    solver = lambda **more: hg.implicit(
        hg.Problem(ridge, fit), regularity=lambda h: known_of_ridge(h)._replace(**more), inner=HERE
    )
    bounds = []
    for more in ({}, {"cross_norm": 100.0}):
        made, h = solver(**more), jnp.zeros(6)
        out, _ = jax.jit(made.hypergrad)(made.init(jnp.full(6, 0.1), h), h)
        bounds.append(float(out.info.extra["error_bound"]))
    assert bounds[0] < bounds[1]


def test_the_norm_of_the_cross_derivative_is_that_of_its_matrix():
    hparams = {"a": jnp.asarray(RNG.normal(size=(2, 2))), "b": (jnp.asarray(0.3), None)}
    slope = lambda h: {"w": jnp.sin(h["a"]) @ jnp.ones(2) * h["b"][0], "v": h["b"][0] ** 2}
    matrix, found = jax.jit(lambda h: (jax.jacobian(slope)(h), cross_norm(slope, h)))(hparams)
    expected = np.sqrt(sum(np.sum(np.asarray(x) ** 2) for x in jax.tree.leaves(matrix)))
    np.testing.assert_allclose(float(found), expected, rtol=tol(1e-12, 1e-5))


def test_new_constants_do_not_recompile():
    """They may depend on the hyperparameters, as a weight decay does."""
    traces = []

    def known(h):
        traces.append(1)
        return known_of_ridge(h)

    solver = hg.implicit(hg.Problem(ridge, fit), inner=HERE, linear=hg.linear.cg(max_steps=4), regularity=known)
    step, state = jax.jit(solver.hypergrad), solver.init(jnp.full(6, 0.1), jnp.zeros(6))
    bounds = [float(step(state, jnp.full(6, h))[0].info.extra["error_bound"]) for h in (0.0, -1.0)]
    assert len(traces) == 1 and bounds[0] < bounds[1]


@pytest.mark.parametrize(
    ("known", "match"),
    [
        ({"strong_convexity": 1.0}, r"regularity must be an hg\.Regularity, or a function.*found dict"),
        (lambda h: 0.5, r"regularity must be an hg\.Regularity, or a function.*found float"),
        (hg.Regularity(0.0, 1.0, 1.0), "strong_convexity must be greater than 0, found 0.0"),
        (hg.Regularity(1.0, -1.0, 1.0), "outer_gradient must be at least 0, found -1.0"),
        (hg.Regularity(1.0, 1.0, "x"), "cross must be a number, found 'x'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_mistakes_are_named(known, match):
    solver = hg.implicit(hg.Problem(ridge, fit), regularity=known)
    with pytest.raises(hg.HypergradError, match=match):
        solver.hypergrad(solver.init(jnp.zeros(6), jnp.zeros(6)), jnp.zeros(6))


@pytest.mark.parametrize(
    "options", [{"inner": hg.inner.fixed_point(lambda w, h, b: 0.5 * w)}, {"curvature": "gauss_newton"}]
)
def test_no_bound_is_promised_where_there_is_none(options):
    with pytest.raises(hg.InputError, match="regularity bounds the error for the Hessian of an inner loss"):
        hg.implicit(hg.Problem(ridge, fit), regularity=hg.Regularity(1.0, 1.0, 1.0), **options)

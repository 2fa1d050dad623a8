"""Every second-order product equals the dense matrix times the vector: Hessian, cross derivative, Gauss-Newton."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad._curvature import damped, gauss_newton, joint_product, loss_system, map_system, rms_eigenvalue
from hypergrad._problem import bind_inner
from tests._helpers import assert_trees_close, relative_error, tol

RNG = np.random.default_rng(0)
W, H, V = (jnp.asarray(RNG.normal(size=n)) for n in (4, 3, 4))
A, X = jnp.asarray(RNG.normal(size=(4, 3))), jnp.asarray(RNG.normal(size=(6, 4)))


def loss(w, h):
    return jnp.sum(jnp.cos(w) ** 2) + jnp.sum(jnp.tanh(w @ A) * jnp.exp(h))


def test_products_of_a_loss_are_those_of_its_hessian_and_its_cross_derivative():
    @jax.jit
    def found(w, h, v):
        system = loss_system(loss, w, h)
        return system.residual, (system.matvec(v), system.cross(v)), system.both(v), joint_product(loss, w, h, v)

    residual, *pairs = found(W, H, V)
    hessian, cross = jax.hessian(loss)(W, H), jax.jacobian(jax.grad(loss), argnums=1)(W, H)
    assert_trees_close(residual, jax.grad(loss)(W, H), tol(1e-13, 1e-5))
    for pair in pairs:
        assert_trees_close(pair, (hessian @ V, V @ cross), tol(1e-13, 1e-5))


def test_products_of_a_map_are_transposed():
    def residual(w, h):
        return w - jnp.tanh(jnp.roll(w, 1) * 0.5 + A @ h)

    @jax.jit
    def found(w, h, v):
        system = map_system(residual, w, h)
        return system.residual, (system.matvec(v), system.cross(v)), system.both(v)

    value, *pairs = found(W, H, V)
    by_w, by_h = jax.jacobian(residual, argnums=(0, 1))(W, H)
    assert relative_error(by_w.T @ V, by_w @ V) > 0.1, "a matrix that is its own transpose would show nothing"
    assert_trees_close(value, residual(W, H), tol(1e-13, 1e-5))
    for pair in pairs:
        assert_trees_close(pair, (by_w.T @ V, by_h.T @ V), tol(1e-13, 1e-5))


def test_gauss_newton_keeps_the_curvature_of_the_loss_and_drops_that_of_the_model():
    """Jᵀ diag(cosh) J + 2 eʰ I for outputs tanh(Xw), the loss Σ cosh(out) and a decay."""
    inner = hg.compose(
        lambda w, h, x: jnp.tanh(x @ w), lambda out, w, h, x: jnp.sum(jnp.cosh(out)) + jnp.exp(h[0]) * w @ w
    )
    objective = bind_inner(hg.Problem(inner, lambda w, h, x: jnp.sum(w)), X, None, None)
    out = np.tanh(np.asarray(X) @ np.asarray(W))
    jacobian = (1 - out**2)[:, None] * np.asarray(X)
    expected = jacobian.T @ (np.cosh(out) * (jacobian @ np.asarray(V))) + 2 * np.exp(float(H[0])) * np.asarray(V)
    assert_trees_close(jax.jit(lambda v: gauss_newton(objective, W, H)(v))(V), expected, tol(1e-13, 1e-5))


def test_damping_adds_a_multiple_of_the_vector():
    assert_trees_close(
        damped(lambda v: {"a": 3 * v["a"]}, jnp.asarray(0.5))({"a": V}), {"a": 3.5 * V}, tol(1e-14, 1e-6)
    )


def test_the_scale_of_an_operator_is_the_root_mean_square_of_its_eigenvalues():
    """Exact where A² is diagonal; unbiased in the square elsewhere: the mean over many probes is ‖A‖_F² / n."""
    diagonal = jnp.asarray([3.0, -4.0, 0.0, 0.0])
    assert_trees_close(rms_eigenvalue(lambda v: diagonal * v, V, jax.random.key(0)), jnp.asarray(2.5), tol(1e-14, 1e-6))
    matrix = A @ A.T
    probes = jax.vmap(lambda key: rms_eigenvalue(lambda v: matrix @ v, V, key) ** 2)(
        jax.random.split(jax.random.key(1), 400)
    )
    error = np.std(np.asarray(probes)) / 20
    assert abs(np.mean(np.asarray(probes)) - float(jnp.sum(matrix**2)) / 4) < 4 * error

"""The hypergradient of decays is that of a dense solve, and of ridge's closed form; the search keeps its best call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hypergrad.adapters import _mlp


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(seed, sizes, n=20, folds=1):
    """Rows, weights of the folds, a network, and a decay for each input and further layer."""
    rng = np.random.default_rng(seed)
    net = [(jnp.asarray(rng.normal(size=s) / np.sqrt(s[0])), jnp.asarray(rng.normal(size=s[1]))) for s in sizes]
    d, c = sizes[0][0], sizes[-1][1]
    train, valid = rng.uniform(0.2, 1, (folds + 1, n)), rng.uniform(0.2, 1, (folds, n))
    y = rng.normal(size=(n, c))
    first, rest = np.arange(d), np.arange(d, d + len(sizes) - 1)
    data = _mlp.Data(*map(jnp.asarray, (rng.normal(size=(n, d)), y, np.ones(c), train, valid, first, rest)))
    return net, jnp.asarray(rng.uniform(-3, 0, d + len(rest))), data


def test_of_a_linear_model_it_is_the_derivative_of_the_closed_form():
    _, log, data = problem(0, [(3, 2)])
    train, valid = data.train[0], data.valid[0]

    def optimum(log):
        """Centred normal equations; the loss is half the weighted mean over rows and outputs."""
        s = train / jnp.sum(train)
        x, y = data.x - (s @ data.x)[None], data.y - (s @ data.y)[None]
        gram = (x * s[:, None]).T @ x / 2 + jnp.diag(jnp.exp(log))
        w = jnp.linalg.solve(gram, (x * s[:, None]).T @ y / 2)
        return [(w, s @ data.y - s @ data.x @ w)]

    judge = lambda log: _mlp.squared(_mlp.outputs(optimum(log), data.x, jnp.tanh), data.y, data.real, valid)
    slope = lambda log: _mlp.hypergradient(
        optimum(log), log, data, train, valid, loss=_mlp.squared, activation=jnp.tanh, products=30, damping=0.0
    )
    (expected, grad), (value, found) = jax.jit(lambda log: (jax.value_and_grad(judge)(log), slope(log)))(log)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(found, grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", list(_mlp.LOSSES))
def test_of_a_network_it_is_that_of_a_dense_gauss_newton_solve_and_padding_weighs_nothing(kind):
    net, log, data = problem(1, [(3, 4), (4, 2)])
    loss, train, valid = _mlp.LOSSES[kind], data.train[0], data.valid[0]
    if kind == "log_loss":
        data = data._replace(y=np.eye(2)[np.argmax(data.y, axis=1)])

    @jax.jit
    def both(net, log, damping):
        flat, back = ravel_pytree(net)
        out = lambda flat: _mlp.outputs(back(flat), data.x, jnp.tanh).ravel()
        of = lambda z, weight: loss(z.reshape(data.y.shape), data.y, data.real, weight)
        jacobian = jax.jacobian(out)(flat)
        curvature = jax.hessian(lambda z: of(z, train))(out(flat))
        strength = lambda log: ravel_pytree(_mlp.decays(log, net, data))[0]
        right = jacobian.T @ jax.grad(of)(out(flat), valid)
        matrix = jacobian.T @ curvature @ jacobian + jnp.diag(strength(log))
        matrix += damping * (right @ matrix @ right) / (right @ right) * jnp.eye(len(flat))
        v = jnp.linalg.solve(matrix, right)
        expected = -jax.jacobian(strength)(log).T @ (flat * v)
        found = _mlp.hypergradient(
            net, log, data, train, valid, loss=loss, activation=jnp.tanh, products=80, damping=damping
        )
        return found, (of(out(flat), valid), expected)

    for damping in (0.0, 0.1):
        (value, found), (loss_there, expected) = both(net, log, damping)
        np.testing.assert_allclose(value, loss_there, rtol=1e-12)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    pad = lambda a, *widths: np.pad(np.asarray(a), [(0, width) for width in widths])
    wide = _mlp.Data(
        pad(data.x, 3, 2), pad(data.y, 3, 1), pad(data.real, 1), pad(data.train, 0, 3), pad(data.valid, 0, 3),
        pad(data.first, 2), data.rest,
    )  # fmt: skip
    padded = [(pad(net[0][0], 2, 0), net[0][1]), (pad(net[1][0], 0, 1), pad(net[1][1], 1))]
    slope = jax.jit(lambda net, b: _mlp.hypergradient(
        net, log, b, b.train[0], b.valid[0], loss=loss, activation=jnp.tanh, products=80, damping=0.1))  # fmt: skip
    more, there = slope(padded, jax.tree.map(jnp.asarray, wide))
    np.testing.assert_allclose(more, value, rtol=1e-12)
    np.testing.assert_allclose(there, found, rtol=1e-6, atol=1e-9)


def test_the_search_takes_up_the_best_of_the_grid_and_keeps_the_best_call():
    net, log, data = problem(3, [(3, 4), (4, 1)], n=30, folds=2)
    # The last "fold" trains on all rows: given the rows of the first, it is the first.
    data = data._replace(train=data.train.at[-1].set(data.train[0]), y=jnp.sin(data.x[:, :1]))
    grid = jnp.log(jnp.asarray([1e-3, 10.0]))[:, None] * jnp.ones((1, len(log)))
    search = _mlp.program("squared", "tanh")
    none, some = (search(data, net, grid, jnp.int32(steps), jnp.asarray(0.0)) for steps in (0, 12))
    np.testing.assert_array_equal(none.best.log, grid[0])
    assert int(none.steps) == 0 and int(some.steps) == 12 and not bool(some.converged)
    assert some.best.value < none.best.value and not jnp.allclose(some.best.log, grid[0])
    for w, b in some.best.nets:
        np.testing.assert_array_equal(w[0], w[-1])
        np.testing.assert_array_equal(b[0], b[-1])
    values = [
        _mlp.squared(_mlp.outputs([(w[k], b[k]) for w, b in some.best.nets], data.x, jnp.tanh), data.y, data.real, row)
        for k, row in enumerate(data.valid)
    ]
    np.testing.assert_allclose(some.best.value, jnp.mean(jnp.asarray(values)), rtol=1e-12)
    assert bool(search(data, net, grid, jnp.int32(500), jnp.asarray(0.9)).converged)

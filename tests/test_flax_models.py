"""Models with state and noise: a flax net with BatchNorm and Dropout, behind the same two losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import hypergrad as hg
from hypergrad._problem import bind_inner
from tests._helpers import assert_trees_close, tol

PyTree = Any


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Dense(8)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(0.2, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(1)(x)[:, 0]


NET = Net()


def _linen_problem() -> hg.Problem:
    def inner_loss(
        params: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array, stats: PyTree
    ) -> tuple[jax.Array, PyTree]:
        x, y = batch
        out, updated = NET.apply(
            {"params": params, "batch_stats": stats}, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean((out - y) ** 2) + jnp.exp(hparams["l2"]) * decay, updated["batch_stats"]

    def outer_loss(params: PyTree, hparams: PyTree, batch: PyTree, key: jax.Array, stats: PyTree) -> jax.Array:
        x, y = batch
        out = NET.apply({"params": params, "batch_stats": stats}, x, train=False)
        return jnp.mean((out - y) ** 2)

    return hg.Problem(inner_loss, outer_loss, model_state=True)


@pytest.fixture(scope="module")
def data() -> tuple[PyTree, PyTree]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 5))
    y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=48)
    x, y = jnp.asarray(x, jnp.result_type(float)), jnp.asarray(y, jnp.result_type(float))
    return (x[:32], y[:32]), (x[32:], y[32:])


@pytest.fixture(scope="module")
def start() -> tuple[PyTree, PyTree]:
    variables = NET.init(jax.random.key(1), jnp.zeros((2, 5), jnp.result_type(float)), train=False)
    # flax starts the statistics in float32, whatever the data are: in the precision of the run here, as all else.
    return variables["params"], jax.tree.map(lambda a: a.astype(jnp.result_type(float)), variables["batch_stats"])


def test_unrolling_threads_batch_norm_and_dropout_like_a_hand_written_loop(data, start):
    (train, valid), (params, stats) = data, start
    problem = _linen_problem()
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=4), mode="reverse")
    hparams = {"l2": jnp.asarray(-3.3)}
    state = solver.init(params, hparams, key=jax.random.key(2), model_state=stats)
    out, after = jax.jit(solver.hypergrad)(state, hparams, train, valid, key=jax.random.key(3))
    hg.raise_if_failed(out)
    # The statistics moved with the steps, and the outer loss saw the last ones.
    assert not np.allclose(jax.tree.leaves(after.model_state)[0], jax.tree.leaves(stats)[0])
    seen = problem.outer_loss(solver.response(after, hparams), hparams, valid, jax.random.key(0), after.model_state)
    assert_trees_close(out.value, seen, tol(1e-12, 1e-5))
    # The same steps by hand, differentiated by plain reverse mode.
    objective = bind_inner(problem, train, jax.random.split(jax.random.key(3), 3)[0], stats)

    def by_hand(hparams: PyTree, held: bool = False) -> jax.Array:
        w, moving = params, stats
        for t in range(4):
            (_, moving), grads = jax.value_and_grad(objective.stochastic, has_aux=True)(w, hparams, moving, t)
            w = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, w, grads)
            moving = jax.lax.stop_gradient(moving) if held else moving
        return problem.outer_loss(w, hparams, valid, jax.random.key(0), moving)

    expected, frozen = jax.jit(lambda h: (jax.grad(by_hand)(h), jax.grad(by_hand)(h, held=True)))(hparams)
    assert abs(frozen["l2"] / expected["l2"] - 1) > 0.01  # what is left out if statistics count as constants
    assert_trees_close(out.grad, expected, tol(1e-6, 1e-3))  # the statistics are float32 in either precision


def test_tune_carries_the_model_state(data, start):
    (train, valid), (params, stats) = data, start
    solver = hg.implicit(
        _linen_problem(), inner=hg.inner.gradient(optax.adam(1e-2), steps=5), linear=hg.linear.identity(0.01)
    )
    result = hg.tune(
        solver,
        params,
        {"l2": -3.0},
        hg.minibatches(train, 16),
        valid,
        outer=optax.adam(1e-2),
        steps=6,
        key=jax.random.key(4),
        model_state=stats,
        progress=False,
    )
    assert result.history.value.shape == (6,)
    assert np.all(np.isfinite(result.history.value))
    assert not np.allclose(jax.tree.leaves(result.state.model_state)[0], jax.tree.leaves(stats)[0])


def test_an_nnx_model_is_a_pytree_of_parameters_and_a_rest(data):
    (x, y), valid = data

    class Regressor(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.last = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(jnp.tanh(self.first(x)))[:, 0]

    graph, variables, rest = nnx.split(Regressor(nnx.Rngs(0)), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(variables), nnx.to_pure_dict(rest)
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)

    def error(params: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean((nnx.merge(graph, params, rest)(batch[0]) - batch[1]) ** 2)

    def inner_loss(params: PyTree, l2: PyTree, batch: PyTree) -> jax.Array:
        penalty = jax.tree.map(lambda w, a: jnp.sum(jnp.exp(a) * w**2), params, l2)
        return error(params, batch) + sum(jax.tree.leaves(penalty))

    solver = hg.implicit(hg.Problem(inner_loss, lambda w, l2, batch: error(w, batch)))
    l2 = jax.tree.map(lambda leaf: jnp.full((), -3.0, leaf.dtype), params)
    step = jax.jit(solver.hypergrad)
    out, state = step(solver.init(params, l2), l2, (x, y), valid)
    hg.raise_if_failed(out)
    assert jax.tree.structure(out.grad) == jax.tree.structure(params)
    shifted = lambda t: jax.tree.map(lambda a: a + t, l2)
    value = lambda t: float(step(state, shifted(t), (x, y), valid)[0].value)
    eps = tol(1e-4, 5e-2)
    slope = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out.grad))
    assert_trees_close(slope, (value(eps) - value(-eps)) / (2 * eps), tol(1e-5, 5e-2))

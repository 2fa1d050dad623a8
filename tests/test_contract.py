"""The contract of a solver: what every method keeps, whatever it computes.

A new method adds one line to `SOLVERS` and passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, assert_trees_equal, shard_rows, tol

PyTree = Any


def _sgd(steps: int = 12) -> Any:
    return hg.inner.gradient(optax.sgd(0.2, momentum=0.5), steps=steps)


def _descent(params: PyTree, hparams: PyTree, batch: PyTree) -> PyTree:
    grads = jax.grad(_inner_loss)(params, hparams, batch)
    return jax.tree.map(lambda w, g: w - 0.2 * g, params, grads)


SOLVERS: dict[str, Callable[[hg.Problem], hg.Solver]] = {
    "implicit": hg.implicit,
    "implicit, cold": lambda p: hg.implicit(p, warm_start=False),
    "implicit, newton": lambda p: hg.implicit(p, inner=hg.inner.newton()),
    "implicit, damped": lambda p: hg.implicit(p, damping=0.1),
    "implicit, gmres": lambda p: hg.implicit(p, linear=hg.linear.gmres()),
    "implicit, dense": lambda p: hg.implicit(p, linear=hg.linear.dense()),
    "implicit, nystrom": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.nystrom(5, damping=0.1)),
    "implicit, neumann": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.neumann(5)),
    "implicit, fixed budget": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.cg(max_steps=3)),
    "implicit, T1-T2": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.identity(0.2)),
    "implicit, fixed point": lambda p: hg.implicit(p, inner=hg.inner.fixed_point(_descent)),
    "unrolled": lambda p: hg.unrolled(p, inner=_sgd()),
    "unrolled, adam": lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.adam(0.1), steps=8)),
    "unrolled, forward": lambda p: hg.unrolled(p, inner=_sgd(), mode="forward"),
    "unrolled, nothing recomputed": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="none"),
    "unrolled, sqrt": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="sqrt"),
    "unrolled, tree": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="tree"),
    "unrolled, truncated": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", truncate=4),
    "unrolled, warm": lambda p: hg.unrolled(p, inner=_sgd(), warm_start=True),
    "unrolled, fixed point": lambda p: hg.unrolled(p, inner=hg.inner.fixed_point(_descent, steps=10)),
    "direct": lambda p: hg.direct(p, inner=hg.inner.lbfgs()),
}


def _inner_loss(params: PyTree, hparams: PyTree, batch: PyTree) -> jax.Array:
    x, y = batch
    w, (bias, _), scale = params["w"], params["odd"], params["deep"]["scale"]
    prediction = x @ w + bias + scale
    decay = jnp.sum(jnp.exp(hparams["l2"]) * w**2) + jnp.exp(hparams["pair"][0]) * (bias**2 + scale**2)
    return 0.5 * jnp.mean((prediction - y) ** 2) + 0.5 * decay


def _outer_loss(params: PyTree, hparams: PyTree, batch: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
    x, y = batch
    error = x @ params["w"] + params["odd"][0] + params["deep"]["scale"] - y
    return jnp.mean(error**2) + 0.01 * jnp.sum(hparams["l2"] ** 2), {"mae": jnp.mean(jnp.abs(error))}


PROBLEM = hg.Problem(_inner_loss, _outer_loss)


def _setting(seed: int = 0) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=4)

    def data(rows: int) -> PyTree:
        x = rng.normal(size=(rows, 4))
        return jnp.asarray(x), jnp.asarray(x @ weights + 0.5 + 0.3 * rng.normal(size=rows))

    params = {"w": jnp.asarray(0.1 * rng.normal(size=4)), "odd": (jnp.asarray(0.2), None), "deep": {"scale": jnp.asarray(-0.1), "none": None}}
    hparams = {"l2": jnp.asarray(-1.5 + 0.3 * rng.normal(size=4)), "pair": (jnp.asarray(-0.7), None)}
    return params, hparams, data(24), data(16)


@pytest.fixture(params=list(SOLVERS))
def solver(request: pytest.FixtureRequest) -> hg.Solver:
    return SOLVERS[request.param](PROBLEM)


def test_hypergradient_has_the_structure_shapes_and_dtypes_of_hparams(solver):
    params, hparams, train, valid = _setting()
    out, state = solver.hypergrad(solver.init(params, hparams), hparams, train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(out.grad, hparams)
    chex.assert_trees_all_equal_shapes_and_dtypes(solver.response(state, hparams), params)
    chex.assert_shape([out.value, *jax.tree.leaves(out.info)], ())
    assert out.info.status.dtype == jnp.int32
    assert set(out.metrics) == {"mae"}
    hg.raise_if_failed(out)


def test_two_calls_trace_once_and_keep_the_structure_and_dtypes_of_the_state(solver):
    params, hparams, train, valid = _setting()
    step = jax.jit(chex.assert_max_traces(solver.hypergrad, n=1))
    state = solver.init(params, hparams)
    _, after = step(state, hparams, train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    other = jax.tree.map(lambda x: x + 0.1, hparams)
    out, again = step(after, other, train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, again)
    assert np.isfinite(out.value)
    chex.clear_trace_counter()


def test_jit_equals_eager(solver):
    params, hparams, train, valid = _setting()
    state = solver.init(params, hparams)
    eager, _ = solver.hypergrad(state, hparams, train, valid)
    jitted, _ = jax.jit(solver.hypergrad)(state, hparams, train, valid)
    assert_trees_close(jitted.grad, eager.grad, tol(1e-8, 1e-3))
    assert_trees_close(jitted.value, eager.value, tol(1e-10, 1e-4))


def test_vmap_equals_a_loop(solver):
    params, _, train, valid = _setting()
    grid = [_setting(seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grid)

    def run(hparams: PyTree) -> PyTree:
        return solver.hypergrad(solver.init(params, hparams), hparams, train, valid)[0]

    batched = jax.jit(jax.vmap(run))(stacked)
    single = jax.jit(run)
    for i, hparams in enumerate(grid):
        one = single(hparams)
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], batched.grad), one.grad, tol(1e-7, 2e-3))
        assert batched.info.status[i] == one.info.status


def test_sharded_data_give_the_unsharded_result_and_a_stable_state(solver, devices):
    params, hparams, train, valid = _setting()
    state = solver.init(params, hparams)
    step = jax.jit(solver.hypergrad)
    expected, _ = step(state, hparams, train, valid)
    split_train, split_valid = shard_rows(train, devices), shard_rows(valid, devices)
    found, after = step(state, hparams, split_train, split_valid)
    assert_trees_close(found.grad, expected.grad, tol(1e-8, 1e-3))
    _, again = step(after, hparams, split_train, split_valid)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, again)


def test_same_call_gives_the_same_bits(solver):
    params, hparams, train, valid = _setting()
    step = jax.jit(solver.hypergrad)
    state = solver.init(params, hparams)
    assert_trees_equal(step(state, hparams, train, valid), step(state, hparams, train, valid))


def test_nan_in_the_loss_is_a_status_and_leaves_the_state_finite(solver):
    params, hparams, train, valid = _setting()
    step = jax.jit(solver.hypergrad)
    state = solver.init(params, hparams)
    _, state = step(state, hparams, train, valid)
    broken = (train[0].at[0, 0].set(jnp.nan), train[1])
    out, after = step(state, hparams, broken, valid)
    status = hg.Status(int(out.info.status))
    assert status in (hg.Status.NONFINITE_LOSS, hg.Status.NONFINITE_GRAD)
    assert not status.usable
    for leaf in jax.tree.leaves(after):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64)))
    recovered, _ = step(after, hparams, train, valid)
    assert hg.Status(int(recovered.info.status)).usable
    with pytest.raises(hg.FailedHypergradientError, match=status.name):
        hg.raise_if_failed(out)


def test_nan_in_the_validation_loss_is_a_status(solver):
    params, hparams, train, valid = _setting()
    out, _ = solver.hypergrad(solver.init(params, hparams), hparams, train, (valid[0], valid[1].at[0].set(jnp.nan)))
    assert hg.Status(int(out.info.status)) in (hg.Status.NONFINITE_LOSS, hg.Status.NONFINITE_GRAD)


def test_one_bad_member_of_a_batch_leaves_the_bits_of_the_others(solver):
    params, hparams, train, valid = _setting()
    good = jax.tree.map(lambda x: jnp.stack([x, x, x]), train)
    bad = (good[0].at[1].set(jnp.nan), good[1])

    @jax.jit
    def run(train: PyTree) -> PyTree:
        def one(train: PyTree) -> PyTree:
            return solver.hypergrad(solver.init(params, hparams), hparams, train, valid)[0]

        return jax.vmap(one)(train)

    clean, dirty = run(good), run(bad)
    for i in (0, 2):
        assert_trees_equal(jax.tree.map(lambda x, i=i: x[i], clean.grad), jax.tree.map(lambda x, i=i: x[i], dirty.grad))
        assert dirty.info.status[i] == clean.info.status[i]
    assert not hg.Status(int(dirty.info.status[1])).usable


@pytest.mark.parametrize("name", [n for n in SOLVERS if not n.endswith("fixed point")])  # there the map sees the batch
def test_losses_that_close_over_their_data_take_none(name):
    params, hparams, train, valid = _setting()
    solver = SOLVERS[name](PROBLEM)
    expected, _ = solver.hypergrad(solver.init(params, hparams), hparams, train, valid)
    closed = SOLVERS[name](hg.Problem(lambda w, h, _: _inner_loss(w, h, train), lambda w, h, _: _outer_loss(w, h, valid)))
    out, _ = closed.hypergrad(closed.init(params, hparams), hparams)
    assert_trees_close(out.grad, expected.grad, tol(1e-9, 1e-3))


def test_integer_hyperparameters_are_refused_by_path(solver):
    params, hparams, train, valid = _setting()
    wrong = {**hparams, "l2": jnp.zeros(4, jnp.int32)}
    with pytest.raises(TypeError, match=r"hparams\['l2'\].*int32.*float"):
        solver.init(params, wrong)
    with pytest.raises(TypeError, match=r"hparams\['l2'\].*int32.*float"):
        solver.hypergrad(solver.init(params, hparams), wrong, train, valid)


def test_empty_data_are_refused_by_name(solver):
    params, hparams, train, valid = _setting()
    state = solver.init(params, hparams)
    with pytest.raises(ValueError, match=r"train\[0\] is empty"):
        solver.hypergrad(state, hparams, (train[0][:0], train[1][:0]), valid)
    with pytest.raises(ValueError, match=r"valid\[0\] is empty"):
        solver.hypergrad(state, hparams, train, (valid[0][:0], valid[1][:0]))

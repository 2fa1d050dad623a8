"""`hg.tasks` is the loop over its tasks, with one hypergradient and a status that counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, tol

TASKS, ROWS, FEATURES = 4, 20, 3


def _error(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


PROBLEM = hg.Problem(
    lambda w, h, batch: _error(w, batch) + jnp.sum(jnp.exp(h) * w**2),
    lambda w, h, batch: (_error(w, batch), {"size": jnp.sum(w**2)}),
)
SOLVERS = {
    "implicit": hg.implicit(PROBLEM),
    "unrolled": hg.unrolled(PROBLEM, inner=hg.inner.gradient(optax.sgd(0.1), steps=20)),
    "direct": hg.direct(PROBLEM, inner=hg.inner.lbfgs()),
}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(TASKS, FEATURES))

    def draw():
        x = rng.normal(size=(TASKS, ROWS, FEATURES))
        return jnp.asarray(x), jnp.asarray(np.einsum("tnd,td->tn", x, w) + 0.3 * rng.normal(size=(TASKS, ROWS)))

    return draw(), draw()


H = jnp.asarray([-1.2, -0.4, -2.1])


def _task(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_mean_over_tasks_is_that_of_a_loop(name, data):
    train, valid = data
    solver, lifted = SOLVERS[name], hg.tasks(SOLVERS[name], count=TASKS)
    step, one = jax.jit(lifted.hypergrad), jax.jit(solver.hypergrad)
    out, state = step(lifted.init(jnp.zeros(FEATURES), H), H, train, valid)
    each = [one(solver.init(jnp.zeros(FEATURES), H), H, _task(train, i), _task(valid, i)) for i in range(TASKS)]
    rtol = tol(1e-9, 2e-3)
    np.testing.assert_allclose(out.value, np.mean([o.value for o, _ in each]), rtol=rtol)
    np.testing.assert_allclose(out.grad, np.mean([o.grad for o, _ in each], axis=0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(out.metrics["size"], np.mean([o.metrics["size"] for o, _ in each]), rtol=rtol)
    np.testing.assert_allclose(
        lifted.response(state, H), np.stack([solver.response(s, H) for _, s in each]), rtol=rtol, atol=rtol
    )
    assert out.info.extra["failed_tasks"] == 0 and hg.Status(int(out.info.status)).usable
    value, info, _ = jax.jit(lifted.evaluate)(state, H, train, valid)
    again, _ = step(state, H, train, valid)
    np.testing.assert_allclose(value, again.value, rtol=rtol)
    assert info.extra["failed_tasks"] == 0


def test_folds_of_ridge_have_the_closed_form_of_cross_validation(data, x64):
    (x, y), _ = _task(data[0], 0), None
    inner = lambda w, h, fold: _weighted(w, fold) + jnp.sum(jnp.exp(h) * w**2)
    problem = hg.Problem(inner, lambda w, h, fold: _weighted(w, fold))
    train, valid = hg.folds((x, y), 5, key=jax.random.key(3))
    solver = hg.tasks(hg.implicit(problem), count=5)
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(FEATURES), H), H, train, valid)

    def cross_validation(h):
        def fold(weight):
            share = weight / jnp.sum(weight)
            w = jnp.linalg.solve(x.T @ (share[:, None] * x) + jnp.diag(jnp.exp(h)), x.T @ (share * y))
            return jnp.sum((1 - weight) * (x @ w - y) ** 2) / jnp.sum(1 - weight)

        return jnp.mean(jax.vmap(fold)(train.weight))

    value, grad = jax.value_and_grad(cross_validation)(H)
    np.testing.assert_allclose(out.value, value, rtol=tol(1e-10, 1e-4))
    np.testing.assert_allclose(out.grad, grad, rtol=tol(1e-8, 2e-3))
    if x64:
        error = np.linalg.norm(out.grad - grad) / np.linalg.norm(grad)
        assert out.info.error_estimate >= 0.1 * error


def _weighted(w, fold):
    (x, y), weight = fold
    return jnp.sum(weight * (x @ w - y) ** 2) / jnp.sum(weight)


def test_a_failed_task_is_left_out_and_counted_or_fails_the_call(data):
    train, valid = data
    broken = (train[0], train[1].at[2].set(jnp.nan))
    lifted = hg.tasks(SOLVERS["implicit"], count=TASKS)
    state = lifted.init(jnp.zeros(FEATURES), H)
    step = jax.jit(lifted.hypergrad)
    out, after = step(state, H, broken, valid)
    assert hg.Status(int(out.info.status)) == hg.Status.OK and out.info.extra["failed_tasks"] == 1
    kept = np.array([0, 1, 3])
    rest = hg.tasks(SOLVERS["implicit"], count=3)
    good, _ = jax.jit(rest.hypergrad)(rest.init(jnp.zeros(FEATURES), H), H, *_task((train, valid), kept))
    assert_trees_close((out.value, out.grad), (good.value, good.grad), rtol=tol(1e-9, 1e-3))
    recovered, _ = step(after, H, train, valid)
    assert recovered.info.extra["failed_tasks"] == 0
    strict = hg.tasks(SOLVERS["implicit"], count=TASKS, failed="fail")
    out, after = jax.jit(strict.hypergrad)(state, H, broken, valid)
    assert not hg.Status(int(out.info.status)).usable and out.info.extra["failed_tasks"] == 1
    its_own = PROBLEM.outer_loss(strict.response(after, H)[2], H, _task(valid, 2))[0]
    np.testing.assert_allclose(out.value, (3 * good.value + its_own) / TASKS, rtol=tol(1e-8, 1e-3))  # over all tasks
    out, _ = step(state, H, (train[0], train[1] * jnp.nan), valid)
    assert not hg.Status(int(out.info.status)).usable and out.info.extra["failed_tasks"] == TASKS


def test_parameters_keys_and_options_of_each_task(data):
    train, valid = data
    own = jnp.arange(TASKS * FEATURES, dtype=H.dtype).reshape(TASKS, FEATURES)
    lifted = hg.tasks(SOLVERS["unrolled"], params_axis=0)
    np.testing.assert_array_equal(lifted.response(lifted.init(own, H), H), own)
    noisy = hg.Problem(PROBLEM.inner_loss, lambda w, h, batch, key: jnp.sum(w * jax.random.normal(key, w.shape)))
    draws = hg.tasks(hg.direct(noisy, inner=hg.inner.lbfgs()), count=TASKS)
    one, key = hg.direct(noisy, inner=hg.inner.lbfgs()), jax.random.key(9)
    keys = jax.random.split(key, TASKS)
    step = jax.jit(draws.hypergrad)
    out, _ = step(draws.init(jnp.zeros(FEATURES), H), H, train, valid, key=key)
    expected = [
        jax.jit(one.hypergrad)(one.init(jnp.zeros(FEATURES), H), H, *_task((train, valid), i), key=keys[i])[0].value
        for i in range(TASKS)
    ]
    np.testing.assert_allclose(out.value, np.mean(expected), rtol=tol(1e-8, 1e-3))
    state = lifted.init(own, H)
    assert all(jnp.shape(leaf) == () for leaf in jax.tree.leaves(state.options))


def test_tune_moves_the_shared_hyperparameters_over_folds(data):
    x, y = _task(data[0], 1)
    problem = hg.Problem(lambda w, h, f: _weighted(w, f) + jnp.exp(h) * jnp.sum(w**2), lambda w, h, f: _weighted(w, f))
    train, valid = hg.folds((x, y), 4)
    solver = hg.tasks(hg.implicit(problem), count=4)
    result = hg.tune(solver, jnp.zeros(FEATURES), 1.0, train, valid, outer=optax.adam(0.3), steps=15, progress=False)
    assert result.history.value[-1] < 0.8 * result.history.value[0]
    assert result.params.shape == (4, FEATURES) and not result.history.extra["failed_tasks"].any()


def test_mistakes_are_named(data):
    train, valid = data
    lifted = hg.tasks(SOLVERS["implicit"], count=TASKS)
    state = lifted.init(jnp.zeros(FEATURES), H)
    with pytest.raises(hg.InputError, match=r"train\[1\] has a leading axis of 2 for 4 tasks"):
        lifted.hypergrad(state, H, (train[0], train[1][:2]), valid)
    with pytest.raises(hg.InputError, match=r"the number of tasks is unknown: pass count=5"):
        hg.tasks(SOLVERS["implicit"]).init(jnp.zeros(FEATURES), H)
    with pytest.raises(hg.InputError, match="params is a scalar"):
        hg.tasks(SOLVERS["implicit"], params_axis=0).init(jnp.zeros(()), H)
    with pytest.raises(hg.InputError, match=r"hg\.minibatches, which draw rows and not tasks"):
        lifted.hypergrad(state, H, hg.minibatches(train, 2), valid, key=jax.random.key(0))
    with pytest.raises(hg.InputError, match="key holds 3 keys for 4 tasks"):
        lifted.hypergrad(state, H, train, valid, key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(hg.InputTypeError, match=r"must be an hg\.Solver, found Problem"):
        hg.tasks(PROBLEM)
    with pytest.raises(hg.InputError, match="did you mean 'skip'"):
        hg.tasks(SOLVERS["implicit"], failed="skp")
    with pytest.raises(hg.InputError, match="count must be at least 1, found 0"):
        hg.tasks(SOLVERS["implicit"], count=0)
    with pytest.raises(hg.InputError, match="params_axis must be None or 0, found 1"):
        hg.tasks(SOLVERS["implicit"], params_axis=1)

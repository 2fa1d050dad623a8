"""The compiled search: its hypergradients against central differences and `hg.implicit`, its optimum, its padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adapters import _dense

KINDS = sorted(_dense.MODELS)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def problem(kind: str, seed: int = 0, n: int = 18, d: int = 3) -> tuple[_dense.Data, np.ndarray]:
    """Two folds and the refit, unequal weights, one hyperparameter a feature; and random logarithms."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = x @ rng.normal(size=(d, 2)) + 0.5 * rng.normal(size=(n, 2))
    if kind == "elastic_net":
        y = y[:, :1]
    if kind == "logistic":
        y = np.eye(3)[np.concatenate([np.arange(3), np.arange(3), rng.integers(0, 3, n - 6)])]
    weight, fold = rng.uniform(0.5, 2.0, n), np.arange(n) % 2
    valid = np.stack([fold == 0, fold == 1]) * weight
    train = np.concatenate([weight - valid, weight[None]])
    assign = np.arange(d)[:, None] * np.ones((1, y.shape[1]), int)
    log = {"elastic_net": 2 * d, "kernel_ridge": d + 1}.get(kind, d)
    start = rng.uniform(-2.0, 1.0, log) - 2.0 * (kind == "elastic_net")
    # Where a prior is meant to speak it does, loudly, but not of the strength, which is the last.
    pull = 0.3 * (np.arange(log) < d) * (kind == "kernel_ridge")
    return _dense.Data(x, y, train, valid, assign, rng.normal(size=log), pull), start


def coef(kind: str, data: _dense.Data) -> jnp.ndarray:
    n, d = data.x.shape
    return jnp.zeros((3, {"kernel_ridge": n, "logistic": d + 1}.get(kind, d), data.y.shape[1]))


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hypergradient_agrees_with_central_differences(kind, intercept):
    data, log = problem(kind)
    data = jax.tree.map(jnp.asarray, data)
    evaluate = jax.jit(
        jax.value_and_grad(lambda log: _dense.objective(_dense.MODELS[kind](intercept), data)(log, coef(kind, data))[0])
    )
    grad = np.asarray(evaluate(log)[1])
    step = 1e-5 * np.eye(len(log))
    found = np.array([(evaluate(log + s)[0] - evaluate(log - s)[0]) / 2e-5 for s in step])
    assert np.abs(found).max() > 1e-4
    np.testing.assert_allclose(grad, found, atol=1e-7 * np.abs(found).max(), rtol=1e-6)


def test_the_hypergradient_is_that_of_tasks_of_implicit():
    """Multinomial logistic regression over folds, written as any user of `hg.tasks` would."""
    data, log = problem("logistic")
    data = jax.tree.map(jnp.asarray, data)

    def nll(w, fold):
        z = data.x @ w
        return jnp.sum(fold * (jax.nn.logsumexp(z, axis=1) - jnp.sum(data.y * z, axis=1)))

    inner = lambda w, log, fold: nll(w, fold) + jnp.sum(jnp.exp(log)[:, None] * w**2) / 2
    outer = lambda w, log, fold: nll(w, fold) / jnp.sum(fold)
    one = hg.implicit(hg.Problem(inner, outer), inner=hg.inner.newton(), linear=hg.linear.dense())
    solver = hg.tasks(one, count=2)
    state = solver.init(jnp.zeros((3, 3)), jnp.asarray(log))
    out, _ = jax.jit(solver.hypergrad)(state, jnp.asarray(log), data.train[:2], data.valid)
    evaluate = lambda log: _dense.objective(_dense.logistic(False), data)(log, coef("logistic", data))[0]
    value, grad = jax.jit(jax.value_and_grad(evaluate))(jnp.asarray(log))
    np.testing.assert_allclose(value, out.value, rtol=1e-8)
    np.testing.assert_allclose(grad, out.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_of_zeros_change_nothing(kind):
    data, log = problem(kind)
    more = _dense.Data(
        *(
            np.pad(a, [(0, p) for p in pad])
            for a, pad in zip(data, [(5, 2), (5, 0), (0, 5), (0, 5), (2, 0), (0,), (0,)], strict=True)
        )
    )
    values = [
        jax.jit(lambda log, d=d: _dense.objective(_dense.MODELS[kind](True), d)(log, coef(kind, d))[0])(log)
        for d in (jax.tree.map(jnp.asarray, data), jax.tree.map(jnp.asarray, more))
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-9)


def test_a_prior_draws_together_in_its_units_and_is_silent_where_it_has_no_pull():
    data, log = problem("kernel_ridge")
    shifted = log + np.array([2.0, 2.0, 2.0, -7.0])  # all lengths by one factor, and the strength
    z = (log - data.unit)[:3]
    expected = np.exp(0.3 * np.sum((z - z.mean()) ** 2))
    for at in (log, shifted):
        np.testing.assert_allclose(_dense.surprise(jnp.asarray(at), data), expected, rtol=1e-12)
    assert _dense.surprise(jnp.asarray(log), data._replace(pull=np.zeros(4))) == 1.0


def test_the_search_ends_where_the_hypergradient_vanishes():
    data, log = problem("ridge", n=40)
    tuned = _dense.program("ridge", True)(data, np.stack([log, log + 1]), np.int32(200), np.float64(1e-12))
    evaluate = jax.value_and_grad(
        lambda log: _dense.objective(_dense.ridge(True), jax.tree.map(jnp.asarray, data))(log, coef("ridge", data))[0]
    )
    value, grad = jax.jit(evaluate)(tuned.log)
    assert bool(tuned.converged) and float(jnp.max(jnp.abs(grad))) < 1e-5 * float(value)
    np.testing.assert_allclose(value, tuned.value, rtol=1e-12)

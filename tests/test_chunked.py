"""`hg.chunked`: the same value and derivatives, in less memory, or a clear refusal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, tol


def _network(params, l2, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["first"])
    error = (hidden @ params["second"] - y) ** 2
    return jnp.mean(error) + jnp.exp(l2) * sum(jnp.sum(w**2) for w in params.values()), {"worst": jnp.mean(error**2)}


def _loss(params, l2, batch):
    return _network(params, l2, batch)[0]


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(3)
    params = {"first": jnp.asarray(rng.normal(size=(5, 7))), "second": jnp.asarray(rng.normal(size=7))}
    return params, jnp.asarray(-2.3), (jnp.asarray(rng.normal(size=(24, 5))), jnp.asarray(rng.normal(size=24)))


@pytest.mark.parametrize("chunks", [1, 3, 24])
def test_value_metrics_and_gradients_are_those_of_the_whole_batch(chunks, setting):
    params, l2, batch = setting
    whole = jax.jit(jax.value_and_grad(_network, argnums=(0, 1), has_aux=True))(params, l2, batch)
    pieces = jax.jit(jax.value_and_grad(hg.chunked(_network, chunks), argnums=(0, 1), has_aux=True))(params, l2, batch)
    assert_trees_close(pieces, whole, rtol=tol(1e-12, 1e-5))


@pytest.mark.parametrize(
    "build",
    [
        lambda p: hg.implicit(
            p,
            inner=hg.inner.gradient(optax.sgd(0.05), steps=9),
            linear=hg.linear.cg(max_steps=3),
            damping=0.1,
        ),
        lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.adam(0.05), steps=9)),
    ],
    ids=["implicit", "unrolled"],
)
def test_hypergradients_are_those_of_the_whole_batch(build, setting):
    params, l2, batch = setting

    def run(loss):
        solver = build(hg.Problem(loss, lambda w, h, b: _network(w, h, b)[0]))
        valid = jax.tree.map(lambda x: x[::2] + 0.1, batch)
        return jax.jit(solver.hypergrad)(solver.init(params, l2), l2, batch, valid)[0].grad

    np.testing.assert_allclose(run(hg.chunked(_loss, 4)), run(_loss), rtol=tol(1e-9, 1e-3))


def test_each_piece_has_a_key_of_its_own():
    loss = lambda w, h, batch, key: jnp.sum(w) * jax.random.normal(key) + 0 * jnp.mean(batch)
    key = jax.random.key(5)
    found = hg.chunked(loss, 4)(jnp.ones(()), 0.0, jnp.zeros(8), key)
    expected = np.mean([jax.random.normal(jax.random.fold_in(key, j)) for j in range(4)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_gradient_takes_the_memory_of_a_piece(setting):
    params, l2, _ = setting
    batch = jax.tree.map(lambda x: jnp.tile(x, (400, *[1] * (x.ndim - 1))), setting[2])

    def temporary(loss):
        return jax.jit(jax.grad(loss)).lower(params, l2, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(hg.chunked(_loss, 16)) < 0.3 * temporary(_loss)


def test_what_cannot_be_cut_is_refused_with_what_to_write_instead(setting):
    params, l2, batch = setting
    with pytest.raises(hg.InputError, match=r"5 chunks do not divide the 24 rows.*use one of 4, 6"):
        hg.chunked(_loss, 5)(params, l2, batch)
    with pytest.raises(hg.InputError, match="at least 1, found 0"):
        hg.chunked(_loss, 0)
    with pytest.raises(hg.InputTypeError, match=r"integer, found 2\.5"):
        hg.chunked(_loss, 2.5)
    with pytest.raises(hg.InputTypeError, match=r"hg\.compose"):
        hg.chunked(hg.compose(lambda w, h, b: w, lambda out, w, h, b: jnp.sum(out)), 2)
    with pytest.raises(hg.InputTypeError, match="chunked: loss must be a function"):
        hg.chunked(3.0, 2)
    with pytest.raises(hg.InputError, match="model state"):
        hg.chunked(lambda w, h, b, state: (jnp.mean(b), state), 2)(params, l2, batch, {"mean": jnp.zeros(3)})
    with pytest.raises(hg.InputError, match="model state"):
        hg.chunked(lambda w, h, b: (jnp.mean(b[1]), jnp.zeros(3)), 2)(params, l2, batch)
    with pytest.raises(hg.InputError, match="different lengths"):
        hg.chunked(_loss, 2)(params, l2, (batch[0], batch[1][:-1]))

"""equinox: one example at a time under a named axis, state that may be used again, shared layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adapters.equinox import split
from tests.adapters._networks import images, implicit, run, unrolled

eqx = pytest.importorskip("equinox")


class Convolution(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv, self.norm = eqx.nn.Conv2d(1, 2, 3, key=first), eqx.nn.BatchNorm(2, "batch", mode="ema")
        self.drop, self.head = eqx.nn.Dropout(0.5), eqx.nn.Linear(32, 3, key=second)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.conv(jnp.moveaxis(x, -1, 0)), state)
        return self.head(self.drop(jax.nn.relu(x).ravel(), key=key)), state


class Attention(eqx.Module):
    embed: eqx.nn.Linear
    attend: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(6, 4, key=a)
        self.attend = eqx.nn.MultiheadAttention(2, 4, dropout_p=0.3, key=b)
        self.head = eqx.nn.Linear(4, 3, key=c)

    def __call__(self, x, *, key=None):
        h = jax.vmap(self.embed)(x[..., 0])
        return self.head((h + self.attend(h, h, h, key=key)).mean(axis=0))


class Dense(eqx.Module):
    net: eqx.nn.MLP

    def __init__(self, key):
        self.net = eqx.nn.MLP(36, 3, 5, 1, key=key)

    def __call__(self, x):
        return self.net(x.ravel())


def _model(name):
    key = jax.random.key(0)
    with jax.enable_x64(False):  # equinox makes parameters in the precision of the process, pictures are float32
        if name == "convolution":
            return split(*eqx.nn.make_with_state(Convolution)(key))
        return split({"dense": Dense, "attention": Attention}[name](key))


@pytest.mark.usefixtures("once")  # the models are in float32 in either run
@pytest.mark.parametrize("build", [unrolled, implicit])
@pytest.mark.parametrize("name", ["dense", "convolution", "attention"])
def test_hypergradients_go_through(name, build):
    out, _ = run(_model(name), build)
    assert hg.Status(int(out.info.status)).usable
    assert all(np.all(np.isfinite(g)) for g in out.grad) and any(np.any(g != 0) for g in out.grad)


def test_statistics_move_in_training_alone_and_each_key_draws_another_mask():
    model, (x, _) = _model("convolution"), images()
    train = jax.jit(model.train)
    outs = [train(model.params, model.model_state, x, jax.random.key(i)) for i in (0, 0, 1)]
    assert np.array_equal(outs[0][0], outs[1][0]) and not np.allclose(outs[0][0], outs[2][0])
    assert not all(np.allclose(a, b) for a, b in zip(model.model_state, outs[0][1], strict=True))
    np.testing.assert_array_equal(*(model.evaluate(model.params, outs[0][1], x) for _ in range(2)))
    with pytest.raises(hg.InputError, match=r"draws random numbers in training, but key is None"):
        model.train(model.params, model.model_state, x, None)


def test_merged_it_is_a_module_in_inference_mode_with_its_state():
    model, (x, _) = _model("convolution"), images()
    params = jax.tree.map(lambda w: 0.5 * w, model.params)
    _, leaves = model.train(params, model.model_state, x, jax.random.key(0))
    net, state = model.merge(params, leaves)
    assert isinstance(net, Convolution)
    out, _ = jax.vmap(net, (0, None), (0, None), axis_name="batch")(x, state)
    np.testing.assert_allclose(out, model.evaluate(params, leaves, x), rtol=1e-6)
    dense = _model("dense")
    assert isinstance(dense.merge(dense.params, dense.model_state), Dense)


def test_shared_layers_are_one_leaf():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            first, second = eqx.nn.Linear(3, 3, key=key), eqx.nn.Linear(3, 3, key=key)
            self.shared = eqx.nn.Shared(
                (first, second), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
            )

        def __call__(self, x):
            first, second = self.shared()
            return second(jnp.tanh(first(x)))

    model = split(Tied(jax.random.key(0)))
    assert sorted(w.shape for w in jax.tree.leaves(model.params)) == [(3,), (3,), (3, 3)]


def test_a_module_may_take_whole_batches():
    class Batched(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return x @ self.weight

    model = split(Batched(jnp.ones((3, 2))), batched=True)
    assert model.evaluate(model.params, model.model_state, jnp.ones((4, 3))).shape == (4, 2)


def test_mistakes_are_named():
    with pytest.raises(hg.InputTypeError, match=r"found Dense: call it first"):
        split(Dense)
    with pytest.raises(hg.InputTypeError, match=r"found function: pass an equinox\.Module"):
        split(lambda x: x)

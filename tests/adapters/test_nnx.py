"""flax nnx: statistics that move in training alone, a fresh mask a step, shared weights that stay shared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hypergrad as hg
from hypergrad.adapters.nnx import split
from tests.adapters._networks import images, implicit, run, unrolled


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(36, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x.reshape(len(x), -1))))


class Convolution(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(1, 2, (3, 3), rngs=rngs), nnx.BatchNorm(2, momentum=0.8, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(72, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x))).reshape(len(x), -1)
        return self.head(self.drop(x))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.3, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x[..., 0])
        return self.head((h + self.attend(h)).mean(axis=1))


MODELS = {"dense": Dense, "convolution": Convolution, "attention": Attention}


@pytest.mark.usefixtures("once")  # the models are in float32 in either run
@pytest.mark.parametrize("build", [unrolled, implicit])
@pytest.mark.parametrize("name", MODELS)
def test_hypergradients_go_through(name, build):
    out, _ = run(split(MODELS[name](nnx.Rngs(0))), build)
    assert hg.Status(int(out.info.status)).usable
    assert all(np.all(np.isfinite(g)) for g in out.grad) and any(np.any(g != 0) for g in out.grad)


def test_statistics_move_in_training_as_the_module_moves_them_and_are_frozen_in_evaluation():
    net, (x, _) = Convolution(nnx.Rngs(0)), images()
    model = split(net)
    _, after = jax.jit(model.train)(model.params, model.model_state, x, jax.random.key(0))
    hidden = net.conv(x)
    np.testing.assert_allclose(after["norm"]["mean"], 0.2 * hidden.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(2))  # the caller's module is as it was
    evaluated = jax.jit(model.evaluate)(model.params, after, x)
    np.testing.assert_array_equal(evaluated, jax.jit(model.evaluate)(model.params, after, x))
    assert not np.allclose(evaluated, model.evaluate(model.params, model.model_state, x))


def test_each_key_draws_another_mask_and_the_same_key_the_same():
    model, (x, _) = split(Convolution(nnx.Rngs(0))), images()
    train = jax.jit(model.train)
    outs = [train(model.params, model.model_state, x, jax.random.key(i))[0] for i in (0, 0, 1)]
    assert np.array_equal(outs[0], outs[1]) and not np.allclose(outs[0], outs[2])
    with pytest.raises(hg.InputError, match=r"draws random numbers in training, but key is None"):
        model.train(model.params, model.model_state, x, None)


def test_merged_it_is_a_module_in_evaluation_mode():
    net, (x, _) = Convolution(nnx.Rngs(0)), images()
    model = split(net)
    params = jax.tree.map(lambda w: 0.5 * w, model.params)
    _, state = model.train(params, model.model_state, x, jax.random.key(0))
    merged = model.merge(params, state)
    assert isinstance(merged, Convolution)
    np.testing.assert_array_equal(merged(x), model.evaluate(params, state, x))
    np.testing.assert_array_equal(merged.norm.mean[...], state["norm"]["mean"])
    np.testing.assert_array_equal(net.norm.mean[...], np.zeros(2))  # the caller's module is as it was


def test_shared_weights_are_one_leaf():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    net = Tied(nnx.Rngs(0))
    model = split(net)
    assert len(jax.tree.leaves(model.params)) == 2 and model.model_state == {}
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(model.evaluate(model.params, {}, x), net(x), rtol=1e-6)


def test_the_modules_own_arrays_survive_a_donation():
    net, (x, _) = Dense(nnx.Rngs(0)), images()
    model = split(net)
    jax.jit(lambda p: jax.tree.map(lambda w: w + 1, p), donate_argnums=0)(model.params)
    assert np.all(np.isfinite(net(x)))


def test_mistakes_are_named():
    with pytest.raises(
        hg.InputTypeError, match=r"found Dense: call it first, as in split\(Net\(rngs=nnx\.Rngs\(0\)\)\)"
    ):
        split(Dense)
    with pytest.raises(hg.InputTypeError, match=r"found dict: pass an nnx\.Module"):
        split({})

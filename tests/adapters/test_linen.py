"""flax linen: modes found from the signature, statistics, masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import hypergrad as hg
from hypergrad.adapters.linen import split
from tests.adapters._networks import images, implicit, run, unrolled


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(jnp.tanh(linen.Dense(5)(x.reshape(len(x), -1))))


class Convolution(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.8)(linen.Conv(2, (3, 3))(x))
        x = linen.Dropout(0.5, deterministic=not train)(jax.nn.relu(x).reshape(len(x), -1))
        return linen.Dense(3)(x)


class Empty(linen.Module):
    def __call__(self, x):
        return x


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic: bool):
        h = linen.Dense(4)(x[..., 0])
        h = h + linen.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=deterministic)(h)
        return linen.Dense(3)(h.mean(axis=1))


MODELS = {"dense": Dense, "convolution": Convolution, "attention": Attention}


def _model(name):
    return split(MODELS[name](), images()[0], key=jax.random.key(0))


@pytest.mark.usefixtures("once")  # the models are in float32 in either run
@pytest.mark.parametrize("build", [unrolled, implicit])
@pytest.mark.parametrize("name", MODELS)
def test_hypergradients_go_through(name, build):
    out, _ = run(_model(name), build)
    assert hg.Status(int(out.info.status)).usable
    assert all(np.all(np.isfinite(g)) for g in out.grad) and any(np.any(g != 0) for g in out.grad)


def test_statistics_move_in_training_alone_and_each_key_draws_another_mask():
    model, (x, _) = _model("convolution"), images()
    train = jax.jit(model.train)
    outs = [train(model.params, model.model_state, x, jax.random.key(i)) for i in (0, 0, 1)]
    assert np.array_equal(outs[0][0], outs[1][0]) and not np.allclose(outs[0][0], outs[2][0])
    before, after = (s["batch_stats"]["BatchNorm_0"]["mean"] for s in (model.model_state, outs[0][1]))
    assert not np.allclose(before, after)
    np.testing.assert_array_equal(*(model.evaluate(model.params, outs[0][1], x) for _ in range(2)))
    with pytest.raises(hg.InputError, match=r"draws random numbers in training, but key is None"):
        model.train(model.params, model.model_state, x, None)


def test_merged_it_is_the_variables_that_the_module_is_applied_to():
    model, (x, _) = _model("convolution"), images()
    params = jax.tree.map(lambda w: 0.5 * w, model.params)
    _, state = model.train(params, model.model_state, x, jax.random.key(0))
    variables = model.merge(params, state)
    assert sorted(variables) == ["batch_stats", "params"]
    np.testing.assert_array_equal(Convolution().apply(variables, x, train=False), model.evaluate(params, state, x))


def test_a_plain_module_needs_no_key_and_has_no_state():
    model, (x, _) = _model("dense"), images()
    out, state = model.train(model.params, model.model_state, x, None)
    assert state == {} and out.shape == (12, 3)
    np.testing.assert_array_equal(out, model.evaluate(model.params, {}, x))


def test_modes_of_other_names_are_given_by_hand():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, noisy):
            return linen.Dropout(0.5, deterministic=not noisy)(linen.Dense(8)(x))

    model = split(Net(), jnp.ones((2, 3)), key=jax.random.key(0), train={"noisy": True}, evaluate={"noisy": False})
    out, _ = model.train(model.params, model.model_state, jnp.ones((2, 3)), jax.random.key(1))
    assert np.any(np.asarray(out) == 0)
    with pytest.raises(hg.InputError, match="give both train= and evaluate="):
        split(Net(), jnp.ones((2, 3)), key=jax.random.key(0), train={"noisy": True})


def test_mistakes_are_named():
    with pytest.raises(hg.InputTypeError, match=r"found Dense: call it first"):
        split(Dense, jnp.ones((2, 3)), key=jax.random.key(0))
    with pytest.raises(hg.InputTypeError, match=r"found int: pass a linen\.Module"):
        split(3, jnp.ones((2, 3)), key=jax.random.key(0))
    with pytest.raises(hg.InputError, match="no parameters"):
        split(Empty(), jnp.ones((2, 3)), key=jax.random.key(0))

"""Layers gated by one vector of hyperparameters per example, against a loop over examples with weights of their own."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hypergrad as hg
from tests._helpers import assert_trees_close, random_like, tol

PyTree = Any
layers = hg.responses.layers
H, N = 3, 5
DTYPE = jnp.result_type(float)


_OPTIONS = {"param_dtype": DTYPE}
KINDS = {
    "dense": (lambda rngs: layers.HyperDense(4, 6, H, rngs=rngs, **_OPTIONS), (N, 4)),
    "dense over time": (lambda rngs: layers.HyperDense(4, 6, H, rngs=rngs, **_OPTIONS), (N, 7, 4)),
    "dense without bias": (lambda rngs: layers.HyperDense(4, 6, H, use_bias=False, rngs=rngs, **_OPTIONS), (N, 4)),
    "conv": (lambda rngs: layers.HyperConv(2, 3, (3, 3), H, rngs=rngs, **_OPTIONS), (N, 6, 6, 2)),
    "strided conv": (
        lambda rngs: layers.HyperConv(2, 3, (3,), H, strides=2, padding="VALID", rngs=rngs, **_OPTIONS),
        (N, 9, 2),
    ),
    "embed": (lambda rngs: layers.HyperEmbed(8, 4, H, rngs=rngs, **_OPTIONS), (N, 7)),
}


@functools.cache
def _layer(name: str) -> tuple[nnx.Module, jax.Array]:
    make, shape = KINDS[name]
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 8, shape) if name == "embed" else rng.normal(size=shape).astype(DTYPE)
    return make(nnx.Rngs(0)), jnp.asarray(inputs)


def _scrambled(layer: nnx.Module) -> tuple[Any, PyTree]:
    """A layer's graph, and random parameters for it: a new layer's gates are closed."""
    graph, state = nnx.split(layer)
    return graph, random_like(1, nnx.to_pure_dict(state))


def _with_weights_of(params: PyTree, offset: jax.Array) -> PyTree:
    """Parameters whose plain layer has the weights W₀ + diag(Q_w h) W₁ and the biases b₀ + (Q_b h) ⊙ b₁."""
    response = params["response"]
    plain = dict(params["plain"])
    for name, second in response["layer"].items():
        gate = offset @ response["gate"]
        plain[name] = plain[name] + second * gate.reshape((1,) * (second.ndim - 1) + (-1,))
    if response.get("bias") is not None:
        plain["bias"] = plain["bias"] + (offset @ response["bias_gate"]) * response["bias"]
    return {**params, "plain": plain}


@pytest.mark.parametrize("name", KINDS)
def test_each_example_has_the_layer_with_its_own_weights(name):
    layer, inputs = _layer(name)
    graph, params = _scrambled(layer)
    offset = jax.random.normal(jax.random.key(2), (N, H), DTYPE)
    found = nnx.merge(graph, params)(inputs, offset)
    alone = jax.jit(lambda x, h: nnx.merge(graph, _with_weights_of(params, h)).plain(x))
    for i in range(N):
        assert_trees_close(found[i : i + 1], alone(inputs[i : i + 1], offset[i]), tol(1e-12, 1e-6))


def test_a_cell_runs_each_example_with_its_own_weights():
    cell = layers.HyperLSTMCell(4, 5, H, param_dtype=DTYPE, rngs=nnx.Rngs(0))
    graph, params = _scrambled(cell)
    offset = jax.random.normal(jax.random.key(2), (N, H), DTYPE)
    inputs = jax.random.normal(jax.random.key(3), (3, N, 4), DTYPE)

    def run(params: PyTree, inputs: jax.Array, offset: jax.Array) -> jax.Array:
        cell = nnx.merge(graph, params)
        step = lambda carry, x: cell(carry, x, offset)
        return jax.lax.scan(step, cell.initialize_carry((inputs.shape[1],)), inputs)[1]

    found = jax.jit(run)(params, inputs, offset)
    plain_graph, state = nnx.split(nnx.OptimizedLSTMCell(4, 5, param_dtype=DTYPE, rngs=nnx.Rngs(0)))
    rest = nnx.to_pure_dict(state)

    @jax.jit
    def alone(inputs: jax.Array, offset: jax.Array) -> jax.Array:
        own = {name: _with_weights_of(params[name], offset)["plain"] for name in ("from_input", "from_hidden")}
        weights = {"dense_i": {"kernel": own["from_input"]["kernel"]}, "dense_h": own["from_hidden"]}
        cell = nnx.merge(plain_graph, {**rest, **weights})
        return jax.lax.scan(lambda carry, x: cell(carry, x), (jnp.zeros((1, 5), DTYPE),) * 2, inputs)[1]

    for i in range(N):
        assert_trees_close(found[:, i : i + 1], alone(inputs[:, i : i + 1], offset[i]), tol(1e-12, 2e-6))


@pytest.mark.parametrize("name", ["dense", "conv", "embed"])
def test_a_new_layer_is_the_plain_one_and_one_offset_serves_all_examples(name):
    layer, inputs = _layer(name)
    offset = jax.random.normal(jax.random.key(2), (H,), DTYPE)
    assert_trees_close(layer(inputs, offset), layer.plain(inputs), tol(1e-14, 1e-6))
    graph, params = _scrambled(layer)
    layer = nnx.merge(graph, params)
    assert_trees_close(layer(inputs, offset), layer(inputs, jnp.tile(offset, (N, 1))), tol(1e-14, 1e-6))


def test_every_parameter_of_a_new_layer_can_learn():
    layer, inputs = _layer("dense")
    graph, state = nnx.split(layer)
    offset = jax.random.normal(jax.random.key(2), (N, H), DTYPE)
    loss = lambda params: jnp.sum(nnx.merge(graph, params)(inputs, offset) ** 2)
    params = nnx.to_pure_dict(state)
    grads = jax.grad(loss)(params)
    params = jax.tree.map(lambda w, g: w - 0.01 * g, params, grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        assert np.all(np.asarray(grad) != 0), path


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (layers.HyperDense, lambda rngs: nnx.Linear(64, 64, rngs=rngs)),
        (layers.HyperConv, lambda rngs: nnx.Conv(64, 64, (3, 3), rngs=rngs)),
        (layers.HyperEmbed, lambda rngs: nnx.Embed(64, 64, rngs=rngs)),
        (layers.HyperLSTMCell, lambda rngs: nnx.OptimizedLSTMCell(64, 64, rngs=rngs)),
    ],
)
def test_a_layer_has_at_most_two_and_a_fifth_times_the_parameters(kind, plain):
    window = ((3, 3),) if kind is layers.HyperConv else ()

    def size(make: Any) -> int:
        shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))

    assert size(lambda rngs: kind(64, 64, *window, hparams=4, rngs=rngs)) <= 2.2 * size(plain)


@pytest.mark.parametrize("shape", [(), (H + 1,), (N, H - 1)])
def test_an_offset_of_another_number_of_hyperparameters_is_refused(shape):
    layer, inputs = _layer("dense")
    with pytest.raises(ValueError, match=r"offset has shape .* made for 3 hyperparameters: pass one vector \[3\]"):
        layer(inputs, jnp.zeros(shape))


def test_an_offset_for_another_number_of_examples_is_refused():
    layer, inputs = _layer("conv")
    with pytest.raises(ValueError, match=r"offset has shape \(4, 3\).*output has shape \(5, 6, 6, 3\).*leading axes"):
        layer(inputs, jnp.zeros((N - 1, H)))


def test_without_flax_the_layers_name_the_extra():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import hypergrad as hg\n"
        "try:\n    hg.responses.layers\nexcept hg.HypergradError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "hg.responses.layers needs flax: pip install -e '.[flax]' in a clone of hypergrad.", (
        run.stderr
    )

"""Six ordinary networks with a weight decay for each parameter; the Hessians of five fit into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from experiments._data import digits, stretches

ROWS, BATCH = (200, 200), 50  # digits for training and validation, the rest for testing; rows of a step
LINES, LENGTH, LINE_BATCH = (100, 100, 200), 16, 25  # stretches of text, their characters, and those of a step
WIDTH = 8  # of the networks that read text
PyTree = Any


class Network(NamedTuple):
    """A network with its data.

    Attributes:
        params: at its initialisation.
        model_state: statistics of batch normalization, or None.
        problem: both losses; the hyperparameters are a log decay for each parameter.
        outputs: `(params, x) -> logits`, or None for a network with a model state.
        train: `(params, model_state, x, key) -> (logits, model_state)`, in training.
        error: `(params, model_state, batch) -> loss` without decay and without noise.
        data: training, validation, test.
        batch: rows of a step of training.
    """

    params: PyTree
    model_state: PyTree
    problem: hg.Problem
    outputs: Callable[[PyTree, jax.Array], jax.Array] | None
    train: Callable[[PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
    error: Callable[[PyTree, PyTree, PyTree], jax.Array]
    data: tuple[PyTree, PyTree, PyTree]
    batch: int


def decay(params: PyTree, log_decays: PyTree) -> Any:
    """½ Σ exp(λᵢ) wᵢ²."""
    each = jax.tree.map(lambda w, log_decay: jnp.sum(jnp.exp(log_decay) * w**2) / 2, params, log_decays)
    return sum(jax.tree.leaves(each))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def network(name: str, seed: int) -> Network:
    """One of `NETWORKS`, initialised from the seed that also splits its data."""
    text = name in ("char LSTM", "char transformer")
    if text:
        parts, alphabet = stretches(seed, LINES, LENGTH)
    else:
        parts, alphabet = digits(seed, ROWS), 0
    data: Any = tuple((jnp.asarray(x), jnp.asarray(y)) for x, y in parts)
    key = jax.random.key(seed)
    if name == "CNN":
        return _with_state(seed, data)
    draw = _Draw(key)
    if name == "tanh MLP":
        params, outputs = _perceptron(draw, (64, 16, 10), jnp.tanh)
    elif name == "ReLU MLP":
        params, outputs = _perceptron(draw, (64, 410, 410, 10), jax.nn.relu)
    elif name == "ResNet":
        params, outputs = _resnet(draw)
    elif name == "char LSTM":
        params, outputs = _lstm(draw, alphabet)
    else:
        params, outputs = _transformer(draw, alphabet)
    inner_loss = hg.compose(
        lambda params, log_decays, batch: outputs(params, batch[0]),
        lambda logits, params, log_decays, batch: cross_entropy(logits, batch[1]) + decay(params, log_decays),
    )
    error = lambda params, model_state, batch: cross_entropy(outputs(params, batch[0]), batch[1])
    problem = hg.Problem(inner_loss, lambda params, log_decays, batch: error(params, None, batch))
    train = lambda params, model_state, x, key: (outputs(params, x), model_state)
    return Network(params, None, problem, outputs, train, error, data, LINE_BATCH if text else BATCH)


class _Draw:
    """Weights of one layer after the other, with a standard deviation of one over the root of their inputs."""

    def __init__(self, key: jax.Array):
        self.key = key

    def __call__(self, *shape: int) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return jax.random.normal(key, shape, jnp.float32) / math.sqrt(math.prod(shape[:-1]))


def _perceptron(draw: _Draw, widths: tuple[int, ...], activation: Any) -> Any:
    layers = [(draw(a, b), jnp.zeros(b, jnp.float32)) for a, b in itertools.pairwise(widths)]

    def outputs(params: PyTree, x: jax.Array) -> jax.Array:
        for weights, bias in params[:-1]:
            x = activation(x @ weights + bias[None])
        return x @ params[-1][0] + params[-1][1][None]

    return layers, outputs


def _convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _resnet(draw: _Draw) -> Any:
    params = {
        "stem": draw(3, 3, 1, 6),
        "blocks": [(draw(3, 3, 6, 6), draw(3, 3, 6, 6)) for _ in range(2)],
        "head": draw(6 * 4, 10),
    }

    def outputs(params: PyTree, x: jax.Array) -> jax.Array:
        x = _convolve(x.reshape(-1, 8, 8, 1), params["stem"], 2)
        for first, second in params["blocks"]:
            x = x + _convolve(jax.nn.relu(_convolve(jax.nn.relu(x), first)), second)
        pooled = x.reshape(-1, 2, 2, 2, 2, 6).mean((2, 4))
        return pooled.reshape(len(pooled), -1) @ params["head"]

    return params, outputs


def _lstm(draw: _Draw, alphabet: int) -> Any:
    params = {
        "embedding": draw(alphabet, WIDTH) * math.sqrt(alphabet / WIDTH),  # read and write
        "cell": draw(2 * WIDTH, 4 * WIDTH),
        "gates": jnp.zeros(4 * WIDTH, jnp.float32),
        "bias": jnp.zeros(alphabet, jnp.float32),
    }

    def outputs(params: PyTree, codes: jax.Array) -> jax.Array:
        inputs = jnp.swapaxes(params["embedding"][codes], 0, 1)

        def step(carry: Any, x: jax.Array) -> Any:
            memory, hidden = carry
            gates = jnp.concatenate([x, hidden], axis=1) @ params["cell"] + params["gates"][None]
            let, forget, out, new = jnp.split(gates, 4, axis=1)
            memory = jax.nn.sigmoid(forget + 1) * memory + jax.nn.sigmoid(let) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(out) * jnp.tanh(memory)
            return (memory, hidden), hidden

        zeros = jnp.zeros_like(inputs[0])
        hidden = jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), inputs)[1], 0, 1)
        return hidden @ params["embedding"].T + params["bias"][None, None]

    return params, outputs


def _transformer(draw: _Draw, alphabet: int) -> Any:
    params = {
        "embedding": draw(alphabet, WIDTH) * math.sqrt(alphabet / WIDTH),
        "place": draw(LENGTH, WIDTH),
        "attention": draw(WIDTH, 3 * WIDTH),
        "mix": draw(WIDTH, WIDTH),
        "up": draw(WIDTH, 2 * WIDTH),
        "down": draw(2 * WIDTH, WIDTH),
        "bias": jnp.zeros(alphabet, jnp.float32),
    }

    def normal(x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def outputs(params: PyTree, codes: jax.Array) -> jax.Array:
        x = params["embedding"][codes] + params["place"][None]
        query, key, value = jnp.split(normal(x) @ params["attention"], 3, axis=-1)
        scores = jnp.einsum("bqi,bki->bqk", query, key) / math.sqrt(WIDTH)
        seen = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None]
        x = x + jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1) @ value @ params["mix"]
        x = x + jax.nn.gelu(normal(x) @ params["up"]) @ params["down"]
        return normal(x) @ params["embedding"].T + params["bias"][None, None]

    return params, outputs


def _with_state(seed: int, data: Any) -> Network:
    from flax import nnx

    from hypergrad.adapters.nnx import split

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.first = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
            self.second = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)])
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.head = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.norms[0](self.first(x.reshape(-1, 8, 8, 1))))
            x = nnx.relu(self.norms[1](self.second(x)))
            return self.head(self.dropout(x.reshape(len(x), -1)))

    model = split(Net(nnx.Rngs(seed)))

    def inner_loss(params: PyTree, log_decays: PyTree, batch: PyTree, key: jax.Array, model_state: PyTree) -> Any:
        logits, model_state = model.train(params, model_state, batch[0], key)
        return cross_entropy(logits, batch[1]) + decay(params, log_decays), model_state

    def error(params: PyTree, model_state: PyTree, batch: PyTree) -> jax.Array:
        return cross_entropy(model.evaluate(params, model_state, batch[0]), batch[1])

    def outer_loss(params: PyTree, log_decays: PyTree, batch: PyTree, key: jax.Array, model_state: PyTree) -> jax.Array:
        return error(params, model_state, batch)

    problem = hg.Problem(inner_loss, outer_loss, model_state=True)
    return Network(model.params, model.model_state, problem, None, model.train, error, data, BATCH)


NETWORKS = ("tanh MLP", "ReLU MLP", "CNN", "ResNet", "char LSTM", "char transformer")

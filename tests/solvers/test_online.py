"""A preset: the same numbers as the call that it stands for, and usable on networks from their initialisation on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_equal

ADAM = optax.adam(1e-2)
ROWS, INPUTS, CLASSES = 32, 6, 3
PyTree = Any


def _data(seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, INPUTS))
    return jnp.asarray(x), jnp.asarray(np.argmax(np.sin(x[:, :CLASSES] * 2) + x[:, CLASSES:], axis=1))


TRAIN, VALID = _data(0), _data(1)


def _weights(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0])) for shape in shapes]


def _layers(activation: Any) -> Any:
    def outputs(params: PyTree, x: jax.Array) -> jax.Array:
        for w in params[:-1]:
            x = activation(x @ w)
        return x @ params[-1]

    return outputs


def _recurrent(params: PyTree, x: jax.Array) -> jax.Array:
    """The features of a row, read one after the other."""
    read, repeat, out = params
    hidden = jnp.zeros((len(x), len(repeat)), x.dtype)
    for column in x.T:
        hidden = jnp.tanh(column[:, None] * read + hidden @ repeat)
    return hidden @ out


NETWORKS = {
    "tanh": (_layers(jnp.tanh), _weights((INPUTS, 8), (8, CLASSES))),
    "ReLU": (_layers(jax.nn.relu), _weights((INPUTS, 8), (8, 8), (8, CLASSES))),
    "recurrent": (_recurrent, _weights((1, 8), (8, 8), (8, CLASSES))),
}


def _error(logits: jax.Array, batch: PyTree) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def _decay(params: PyTree, log_decays: PyTree) -> Any:
    return sum(jnp.sum(jnp.exp(h) * w**2) / 2 for h, w in zip(log_decays, params, strict=True))


def _problem(outputs: Any, composed: bool) -> hg.Problem:
    inner_loss = lambda w, h, batch: _error(outputs(w, batch[0]), batch) + _decay(w, h)
    if composed:
        inner_loss = hg.compose(
            lambda w, h, batch: outputs(w, batch[0]), lambda out, w, h, batch: _error(out, batch) + _decay(w, h)
        )
    return hg.Problem(inner_loss, lambda w, h, batch: _error(outputs(w, batch[0]), batch))


def _start(params: PyTree) -> PyTree:
    return [jnp.full_like(w, -5) for w in params]


@pytest.mark.parametrize("composed", [False, True])
def test_it_is_the_implicit_call_that_it_stands_for_bit_for_bit(composed):
    outputs, params = NETWORKS["tanh"]
    problem = _problem(outputs, composed)
    short = hg.online(problem, ADAM, steps=3, products=4)
    long = hg.implicit(
        problem,
        inner=hg.inner.gradient(ADAM, steps=3),
        linear=hg.linear.cg(max_steps=4, indefinite="truncate"),
        curvature="gauss_newton" if composed else "hessian",
        damping=0.01 if composed else 0.1,
    )
    found = []
    for solver in (short, long):
        step = jax.jit(solver.hypergrad)
        state = solver.init(params, _start(params))
        for _ in range(2):
            out, state = step(state, _start(params), TRAIN, VALID)
        found.append((out, state))
    assert_trees_equal(*found)
    assert (short.about.name, long.about.name) == ("hg.online", "hg.implicit")
    assert short.about._replace(name="") == long.about._replace(name="")


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_usable_from_the_initialisation_of_a_network_on(name):
    """On the Hessian itself, where the Gauss-Newton matrix is not known: it is indefinite, and CG alone refuses."""
    outputs, params = NETWORKS[name]
    solver = hg.online(_problem(outputs, composed=False), ADAM, steps=5)
    outer = optax.adam(0.1)

    def step(carry: Any, _: None) -> Any:
        state, hparams, moments = carry
        out, state = solver.hypergrad(state, hparams, TRAIN, VALID)
        updates, moments = outer.update(out.grad, moments, hparams)
        stopped = jnp.isnan(out.info.linear_residual)
        return (state, optax.apply_updates(hparams, updates), moments), (out.info, stopped)

    hparams = _start(params)
    begin = solver.init(params, hparams), hparams, outer.init(hparams)
    _, (info, stopped) = jax.jit(lambda begin: jax.lax.scan(step, begin, None, length=40))(begin)
    usable = np.asarray([hg.Status(int(code)).usable for code in info.status])
    assert usable.mean() >= 0.95
    assert np.isinf(np.asarray(info.error_estimate)[np.asarray(stopped)]).all()
    assert stopped.any(), "a network that is positive definite all the way tests nothing"


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda p: hg.online(p, optax.adam), "online: optimizer must be an optax optimizer"),
        (lambda p: hg.online(p, 1e-3), "online: optimizer must be an optax optimizer"),
        (lambda p: hg.online(p, ADAM, steps=0), "online: steps"),
        (lambda p: hg.online(p, ADAM, steps=2.5), "online: steps"),
        (lambda p: hg.online(p, ADAM, products=0), "online: products"),
        (lambda p: hg.online(p, ADAM, product=5), "online: .*products"),
        (lambda p: hg.online(lambda w, h, b: 0.0, ADAM), "online: problem must be an hg.Problem"),
    ],
)
def test_mistakes_are_refused_by_name(mistake, says):
    with pytest.raises((hg.InputError, hg.InputTypeError), match=says):
        mistake(_problem(NETWORKS["tanh"][0], composed=False))


@pytest.mark.parametrize(
    "status",
    ["INNER_MAX_STEPS", "INNER_STALLED", "NEG_CURVATURE", "SINGULAR", "NEUMANN_DIVERGING", "LINEAR_MAX_STEPS"]
    + ["INACCURATE"],
)
def test_the_statuses_of_a_network_name_it(status):
    """Everything but `INNER_DIVERGED` that `hg.implicit` refuses a network with whose losses are finite."""
    assert "`hg.online`" in hg.Status[status].advice
    page = (Path(__file__).parents[2] / "README.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("|") and f"`{status}`" in line.split("|")[1])
    assert "`hg.online`" in row

"""What a caller can get wrong is named before anything is compiled: argument, what was found, what to write."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
# Wrong types are what these tests are about.

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import domains
from hypergrad._data import minibatches, stream
from hypergrad._problem import Problem
from hypergrad._solver import HypergradError, InputError, InputTypeError
from hypergrad.outer import tune
from tests.outer._ridge import counted, data, ridge

TRAIN, VALID = data()
X, Y = TRAIN
GOOD = {
    "solver": ridge(),
    "params": jnp.zeros(6),
    "hparams": {"l2": 0.1},
    "train": TRAIN,
    "valid": VALID,
    "outer": optax.adam(0.1),
    "steps": 3,
    "progress": False,
}


def call(**changes):
    return tune(**{**GOOD, **changes})


MISTAKES = {
    "solver": (
        {"solver": Problem(lambda w, h, b: 0.0, lambda w, h, b: 0.0)},
        InputTypeError,
        ["solver", "Problem", "hg.implicit"],
    ),
    "outer a number": ({"outer": 0.1}, InputTypeError, ["outer", "float", "optax.adam"]),
    "outer not called": ({"outer": optax.adam}, InputTypeError, ["outer", "found adam", "optax.adam(3e-2)"]),
    "outer with a line search": ({"outer": optax.lbfgs()}, InputTypeError, ["outer", "value_fn", "linesearch=None"]),
    "steps zero": ({"steps": 0}, InputError, ["steps", "at least 1", "found 0"]),
    "steps negative": ({"steps": -3}, InputError, ["steps", "at least 1", "-3", "how many outer steps"]),
    "steps a float": ({"steps": 1e3}, InputTypeError, ["steps", "integer", "1000.0"]),
    "failures": ({"max_failures": 0}, InputError, ["max_failures", "at least 1"]),
    "patience": ({"patience": -1}, InputError, ["patience", "at least 1", "-1"]),
    "unknown option": ({"callback": print}, InputTypeError, ["'callback'", "did you mean 'callbacks'"]),
    "callbacks": ({"callbacks": [print, 3]}, InputTypeError, ["callbacks", "fn(step, metrics)"]),
    "key a number": ({"key": 0}, InputTypeError, ["key", "found 0", "jax.random.key(0)"]),
    "several keys": ({"key": jax.random.split(jax.random.key(0))}, InputTypeError, ["one PRNG key"]),
    "key missing": ({"train": minibatches(TRAIN, 4)}, InputError, ["train", "key is None", "jax.random.key(0)"]),
    "key missing for valid": ({"valid": minibatches(VALID, 4)}, InputError, ["valid", "key is None"]),
    "hparams integer": ({"hparams": {"l2": np.arange(2)}}, InputTypeError, ["hparams['l2']", "int", "float"]),
    "hparams complex": ({"hparams": {"l2": 1j}}, InputTypeError, ["hparams['l2']", "complex"]),
    "hparams empty": ({"hparams": {}}, InputError, ["hparams", "no leaves"]),
    "hparams NaN": ({"hparams": {"l2": np.nan}}, InputError, ["hparams['l2']", "NaN"]),
    "hparams outside": (
        {"hparams": {"l2": -1.0}, "domain": domains.positive()},
        InputError,
        ["hparams['l2']", "greater than 0", "-1", "start from"],
    ),
    "domain elsewhere": ({"domain": {"l1": domains.log()}}, InputError, ["domain['l1']", "['l2']"]),
    "train empty": ({"train": (X[:0], Y[:0])}, InputError, ["train[0]", "empty", "(0, 6)"]),
    "valid empty": ({"valid": {"x": Y[:0]}}, InputError, ["valid['x']", "empty"]),
    "lengths differ": ({"train": (X, Y[:-1])}, InputError, ["train[0] has 30 rows", "train[1] has 29", "dict"]),
    "text": ({"train": {"x": X, "y": np.asarray(["a", "b"])}}, InputTypeError, ["train['y']", "<U1", "encode"]),
    "name of a file": ({"train": "train.csv"}, InputTypeError, ["train is a str", "arrays"]),
    "loader": ({"train": iter([TRAIN])}, InputTypeError, ["train is a list_iterator", "hg.stream(loader"]),
    "function": ({"train": {"loader": lambda: TRAIN}}, InputTypeError, ["train['loader']", "function"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_it_is_compiled(mistake):
    changes, kind, words = MISTAKES[mistake]
    solver, traces = counted(GOOD["solver"])
    with pytest.raises(kind) as error:
        call(**{"solver": solver, **changes})
    for word in words:
        assert word in str(error.value)
    assert len(traces) == (mistake == "outer with a line search"), "found while tracing at the latest"
    assert isinstance(error.value, HypergradError)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: minibatches(TRAIN, 31), InputError, ["size", "between 1 and the 30 rows", "31"]),
        (lambda: minibatches(TRAIN, 0), InputError, ["size", "found 0"]),
        (lambda: minibatches(TRAIN, 2.0), InputTypeError, ["size", "2.0"]),
        (lambda: minibatches((X, Y[:-1]), 4), InputError, ["[0] has 30", "[1] has 29"]),
        (lambda: minibatches({"x": X, "y": Y[:-1]}, 4), InputError, ["['x'] has 30", "['y'] has 29"]),
        (lambda: minibatches((X[:0], Y[:0]), 1), InputError, ["[0] is empty"]),
        (lambda: minibatches((), 1), InputError, ["no arrays"]),
        (lambda: minibatches((X, 3.0), 1), InputError, ["[1] is a scalar"]),
        (lambda: minibatches(iter([X]), 1), InputTypeError, ["list_iterator", "hg.stream"]),
        (lambda: stream([TRAIN], 0), InputError, ["per_step", "0"]),
        (lambda: stream([TRAIN], 1.5), InputTypeError, ["per_step", "1.5"]),
        (lambda: stream(7, 1), InputTypeError, ["iterable", "int"]),
        (lambda: stream([], 1).next(), InputError, ["ended after 0 of the 1"]),
        (lambda: stream(iter([TRAIN]), 2).next(), InputError, ["ended after 1 of the 2", "while True"]),
        (
            lambda: stream([(X, Y), (X[:5], Y[:5])], 2).next(),
            InputError,
            ["same shape", "[30, 6]", "[5, 6]", "drop or pad"],
        ),
        (lambda: stream([{"x": np.zeros((0, 2))}], 1).next(), InputError, ["['x'] is empty"]),
    ],
)
def test_unusable_data_are_named(make, kind, words):
    with pytest.raises(kind) as error:
        make()
    for word in words:
        assert word in str(error.value)


def wrapped(change):
    solver = ridge()

    def hypergrad(*args, **kwargs):
        return change(*solver.hypergrad(*args, **kwargs))

    return solver._replace(hypergrad=hypergrad)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda out, state: (out.value, state), InputTypeError, ["hg.Hypergradient"]),
        (
            lambda out, state: (out._replace(value=jnp.ones(3)), state),
            InputError,
            ["outer loss must be a scalar", "(3,)"],
        ),
        (lambda out, state: (out._replace(grad={}), state), InputError, ["hypergradient['l2'] is missing"]),
        (lambda out, state: (out._replace(metrics={"value": 1.0}), state), InputError, ["metric", "'value'", "rename"]),
        (lambda out, state: (out._replace(metrics={"norm": 1.0}), state), InputError, ["metric", "'norm'", "rename"]),
        (lambda out, state: (out._replace(metrics={"all": jnp.ones(2)}), state), InputError, ["all", "(2,)", "reduce"]),
        (lambda out, state: (out, state | {"new": jnp.ones(2)}), InputError, ["the solver['new']", "not expected"]),
        (
            lambda out, state: (out, state | {"params": jnp.ones(2)}),
            InputError,
            ["the solver['params']", "(2,)", "(6,)"],
        ),
        (lambda out, state: (out, state | {"calls": jnp.float32(1)}), InputTypeError, ["['calls']", "int32", "float"]),
    ],
)
def test_a_solver_that_breaks_the_interface_is_named(change, kind, words):
    with pytest.raises(kind) as error:
        call(solver=wrapped(change))
    for word in words:
        assert word in str(error.value)


def test_tune_inside_jit_is_refused():
    with pytest.raises(InputTypeError, match="outside jit"):
        jax.jit(lambda params: call(params=params).hparams)(jnp.zeros(6))


def test_nan_in_the_data_is_a_warning():
    x = X.copy()
    x[2, 3] = np.nan
    solver = ridge()
    masked = solver._replace(
        hypergrad=lambda state, h, train=None, valid=None, *, key=None: solver.hypergrad(state, h, train["pair"], valid)
    )
    with pytest.warns(UserWarning, match=r"train\['x'\] holds 1 NaN") as caught:
        call(train={"x": x, "pair": TRAIN}, solver=masked)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("wrap", [lambda pair: pair, lambda pair: minibatches(pair, 4), lambda pair: stream([pair], 1)])
def test_a_label_outside_its_classes_is_named(wrap):
    def loss(w, h, batch):
        x, y = batch
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w, y)) + h["l2"] * jnp.sum(w**2)

    labels = np.arange(30) % 3
    labels[7] = 3
    with pytest.raises(InputError, match=r"train\[1\]: labels run from 0 to 2, found 3 at (row 7|index \(0, 7\))"):
        call(
            solver=hg.implicit(hg.Problem(loss, loss)),
            params=jnp.zeros((6, 3)),
            train=wrap((X, labels)),
            valid=(X, np.arange(30) % 3),
            key=jax.random.key(0),
        )

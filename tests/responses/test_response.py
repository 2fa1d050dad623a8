"""What every response does: it is its base at its centre, moving a centre moves no parameters, mistakes are named."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.responses._response import recentre
from tests._helpers import assert_trees_close, assert_trees_equal, tol
from tests.responses._model import CENTRE, HPARAMS, KEY, PARAMS, trained

PyTree = Any
RESPONSES = {
    "linear": hg.responses.linear,
    "linear, rank 2": lambda **options: hg.responses.linear(rank=2, **options),
    "structured": hg.responses.structured,
    "structured, axis 0": lambda **options: hg.responses.structured(axis=0, **options),
    "mlp": lambda **options: hg.responses.mlp(hidden=(5, 4), **options),
    "mlp, within": lambda **options: hg.responses.mlp(hidden=(4,), within=(-2.0, 2.0), **options),
}


class Case(NamedTuple):
    """A kind of response, centred and not, its compiled functions shared by the tests of this file."""

    centred: hg.responses.Response
    plain: hg.responses.Response
    apply_centred: Any
    apply_plain: Any
    start: hg.responses.Weights


@pytest.fixture(scope="module", params=list(RESPONSES))
def case(request: pytest.FixtureRequest) -> Case:
    centred, plain = (RESPONSES[request.param](centred=on) for on in (True, False))
    start = jax.jit(lambda: centred.init(KEY, PARAMS, HPARAMS))()
    return Case(centred, plain, jax.jit(centred.apply), jax.jit(plain.apply), start)


def test_a_new_linear_or_structured_response_is_the_model_itself(case):
    if not hasattr(case.start.slope, "hidden"):
        assert_trees_equal(case.apply_plain(case.start, HPARAMS), PARAMS)


def test_at_its_centre_a_centred_response_is_its_base(case):
    weights = trained(case.centred)
    assert_trees_equal(case.apply_centred(weights, CENTRE, CENTRE), weights.base)
    assert np.max(np.abs(case.apply_centred(weights, HPARAMS, CENTRE)["bias"] - weights.base["bias"])) > 0.01


def test_moving_the_centre_changes_no_parameters(case):
    weights = trained(case.centred)
    moved = jax.jit(lambda w: recentre(case.centred, w, HPARAMS, CENTRE))(weights)
    for at in (HPARAMS, CENTRE, jax.tree.map(lambda x: 2 * x + 0.3, HPARAMS)):
        expected = case.apply_centred(weights, at, CENTRE)
        assert_trees_close(case.apply_centred(moved, at, HPARAMS), expected, tol(1e-13, 1e-5))
    assert recentre(case.plain, weights, HPARAMS, CENTRE) is weights


def test_all_weights_of_a_new_response_can_learn_from_the_second_step_on(case):
    """No saddle at the start, not even for a model whose parameters are all zero."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    ones = lambda w: sum(jnp.sum((x - 1.0) ** 2) for x in jax.tree.leaves(case.plain.apply(w, HPARAMS)))

    @jax.jit
    def second_gradient():
        weights = case.plain.init(KEY, zero, HPARAMS)
        return jax.grad(ones)(jax.tree.map(lambda w, g: w - 1e-2 * g, weights, jax.grad(ones)(weights)))

    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(second_gradient()))


def test_parameters_keep_their_structure_and_dtypes(case):
    params = PARAMS | {"bias": jnp.ones(5, jnp.bfloat16), "gain": jnp.float32(2.0)}
    weights = jax.eval_shape(lambda: case.centred.init(KEY, params, HPARAMS))
    found = jax.eval_shape(case.centred.apply, weights, HPARAMS, CENTRE)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)


def test_weights_of_another_model_are_refused_by_path(case):
    for other, message in (
        ({**PARAMS, "bias": jnp.zeros(4)}, r"params\['bias'\] has shape \(4,\), expected \(5,\): .*call init"),
        ({**PARAMS, "extra": jnp.zeros(4)}, r"params\['extra'\] of shape \(4,\) is not expected: .*call init"),
    ):
        with pytest.raises(ValueError, match=message):
            case.plain.apply(case.start._replace(base=other), HPARAMS)


def test_hyperparameters_of_another_structure_are_refused_by_path(case):
    with pytest.raises(ValueError, match=r"hparams\['a'\] has shape \(3,\), expected \(2,\): .*structure of centre"):
        case.centred.apply(case.start, {**HPARAMS, "a": np.zeros(3)}, CENTRE)
    with pytest.raises(ValueError, match=r"hparams hold 4 numbers, but the response was made for 3: call init"):
        case.centred.apply(case.start, np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match=r"a centred response needs its centre"):
        case.centred.apply(case.start, HPARAMS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hg.responses.linear(rank=0), ValueError, r"linear: rank must be at least 1, found 0"),
        (lambda: hg.responses.linear(rnk=3), TypeError, r"linear: unknown option 'rnk', did you mean 'rank'"),
        (lambda: hg.responses.mlp(hidden=()), ValueError, r"hidden must be positive integers, found \(\).*\(64, 64\)"),
        (lambda: hg.responses.mlp(hidden=(0.5,)), ValueError, r"hidden must be positive integers, found \(0.5,\)"),
        (lambda: hg.responses.mlp(within=(1, 0)), ValueError, r"within must be \(lo, hi\).* found \(1, 0\)"),
        (
            lambda: hg.responses.structured(axis=0.0),
            TypeError,
            r"axis must be an integer, found 0.0: write -1 or 0",
        ),
        (lambda: hg.responses.structured(axis=2).init(KEY, PARAMS, 0.0), ValueError, r"\['dense'\]\[0\].*no axis 2"),
        (lambda: hg.responses.structured().init(None, PARAMS, 0.0), ValueError, r"structured draws.*pass key="),
        (lambda: hg.responses.mlp().init(None, PARAMS, 0.0), ValueError, r"mlp draws.*pass key=jax.random.key"),
        (lambda: hg.responses.linear(rank=1).init(None, PARAMS, 0.0), ValueError, r"rank.*draws.*pass key="),
        (lambda: hg.responses.linear().init(None, {}, 0.0), ValueError, r"params has no leaves"),
    ],
)
def test_mistakes_are_named_with_a_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


LARGE = {  # parameters, hyperparameters, the words of the remedy
    "linear": (lambda **options: hg.responses.linear(**options), (10**5,), 10**5, r"linear\(rank=10\)"),
    "linear, rank": (lambda **options: hg.responses.linear(rank=100, **options), (10**7,), 10, r"linear\(rank=10\)"),
    "structured": (lambda **options: hg.responses.structured(**options), (10**5,), 10**5, r"linear\(rank=10\)"),
    "mlp": (lambda **options: hg.responses.mlp(**options), (10**8,), 10, r"hidden=\(16, 10\)"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_response_larger_than_its_memory_is_refused_before_it_is_made(name):
    """With abstract parameters: nothing of this size is ever allocated."""
    make, shape, n, remedy = LARGE[name]
    params, hparams = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    begin = lambda response: jax.eval_shape(response.init, KEY, params, hparams)
    with pytest.raises(hg.InputError, match=rf"[0-9]+,[0-9]{{3}} bytes, more than the .* allowed: write .*{remedy}"):
        begin(make())
    begin(make(memory=1e12))


def test_what_a_response_may_hold_is_counted_in_bytes():
    params, hparams = jnp.ones(25, jnp.float32), jnp.zeros(4, jnp.float32)
    hg.responses.linear(memory=400).init(KEY, params, hparams)
    with pytest.raises(hg.InputError, match=r"for 4 hyperparameters and 25 parameters .* needs 400 bytes, more than"):
        hg.responses.linear(memory=399).init(KEY, params, hparams)

"""Linear responses against their formula, entry by entry."""

from __future__ import annotations

import jax
import numpy as np

import hypergrad as hg
from hypergrad.responses._response import coordinates
from tests._helpers import assert_trees_close, tol
from tests.responses._model import CENTRE, HPARAMS, trained


def test_linear_is_the_sum_of_one_tensor_per_hyperparameter():
    response = hg.responses.linear(centred=True)
    weights = trained(response)
    offset = np.asarray(coordinates(HPARAMS)) - np.asarray(coordinates(CENTRE))
    expected = jax.tree.map(lambda b, s: np.asarray(b) + np.tensordot(offset, np.asarray(s), 1), *weights)
    assert_trees_close(jax.jit(response.apply)(weights, HPARAMS, CENTRE), expected, tol(1e-14, 1e-6))


def test_factorised_linear_is_the_linear_response_of_the_product():
    response = hg.responses.linear(rank=2, centred=False)
    weights = trained(response)
    inner = np.asarray(coordinates(HPARAMS)) @ np.asarray(weights.slope.inputs)
    expected = jax.tree.map(
        lambda b, s: np.asarray(b) + np.tensordot(inner, np.asarray(s), 1), weights.base, weights.slope.outputs
    )
    assert_trees_close(jax.jit(response.apply)(weights, HPARAMS), expected, tol(1e-13, 1e-5))

"""Structured responses against their formula, entry by entry."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.responses._response import coordinates
from tests._helpers import assert_trees_close, tol
from tests.responses._model import HPARAMS, trained


@pytest.mark.parametrize("axis", [-1, 0])
def test_structured_kernels_have_a_gate_a_unit_and_vectors_one_an_entry(axis):
    response = hg.responses.structured(axis=axis, centred=False)
    weights = trained(response)
    u = np.asarray(coordinates(HPARAMS))
    found = jax.jit(response.apply)(weights, HPARAMS)
    base, (gates, kernels) = jax.tree.map(np.asarray, weights)
    diagonal = np.diag(u @ gates["dense"][0])
    wide = kernels["dense"][0] @ diagonal if axis == -1 else diagonal @ kernels["dense"][0]
    conv = np.moveaxis(np.moveaxis(kernels["conv"], axis, -1) * (u @ gates["conv"]), -1, axis)
    expected = {
        "conv": base["conv"] + conv,
        "dense": (base["dense"][0] + wide, None),
        "bias": base["bias"] + u @ gates["bias"],
        "gain": base["gain"] + u @ gates["gain"],
    }
    assert_trees_close(found, expected, tol(1e-14, 1e-6))

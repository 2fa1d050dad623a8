"""What the adapters share: inputs no wider than the parameters, and errors that say what is missing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adapters._model import missing, narrowed, need_key


def test_inputs_are_in_no_wider_type_than_the_parameters(x64):
    params = {"w": jnp.zeros(2, jnp.float32), "b": jnp.zeros(2, jnp.bfloat16)}
    x = {"wide": np.ones(3, np.float64), "narrow": jnp.ones(3, jnp.bfloat16), "tokens": jnp.arange(3)}
    found = narrowed(x, params)
    assert found["wide"].dtype == jnp.float32 and found["narrow"].dtype == jnp.bfloat16
    assert found["tokens"].dtype == x["tokens"].dtype
    if x64:
        assert narrowed(x, {"w": jnp.zeros(2, jnp.float64)})["wide"].dtype == jnp.float64


def test_errors_say_what_is_missing():
    error = missing("nnx", "flax", ImportError("no flax"))
    assert isinstance(error, hg.HypergradError) and "pip install -e '.[flax]'" in str(error)
    with pytest.raises(hg.InputError, match=r"adapters\.nnx: the model draws random numbers in training"):
        need_key("adapters.nnx", None)
    assert need_key("adapters.nnx", jax.random.key(0)) is not None

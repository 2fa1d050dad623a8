"""Signs in a program are found wherever they are nested, and taken the other way where rounding could turn them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad._jaxpr.signs import doubted, takes_signs


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optax.lion(0.1), True),
        (optax.sign_sgd(0.1), True),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)), True),
        (optax.partition({"a": optax.sgd(0.1), "b": optax.lion(0.1)}, {"x": "a", "y": "b"}), True),
        (optax.adamw(0.1), False),
        (optax.sgd(0.1, momentum=0.9), False),
    ],
)
def test_an_optimizer_that_moves_by_signs_is_told_from_one_that_does_not(optimizer, expected):
    params = {"x": jnp.ones(3), "y": jnp.ones(2)}
    assert takes_signs(optimizer.update, params, optimizer.init(params), params) is expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.cond(jnp.sum(x) > -1e9, f, lambda x: x, x),
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(x) + 0 * c, None), x, None, length=2)[0],
        lambda f: lambda x: jax.vmap(f)(x[None])[0],
    ],
    ids=["plain", "jit", "checkpoint", "cond", "scan", "vmap"],
)
def test_small_numbers_change_their_sign_and_others_do_not(wrap):
    function = wrap(lambda x: jnp.sign(x) * 2)
    x = jnp.asarray([1.0, -1.0, 1e-4, -1e-4, 0.0])
    assert takes_signs(function, x)
    np.testing.assert_array_equal(doubted(function, 1e-3)(x), [2.0, -2.0, -2.0, 2.0, 0.0])
    np.testing.assert_array_equal(doubted(function, 1e-5)(x), [2.0, -2.0, 2.0, -2.0, 0.0])
    np.testing.assert_array_equal(doubted(function, 0.0)(x), function(x))


def test_what_is_not_a_sign_keeps_its_value_and_derivative():
    function = lambda x: jnp.sum(jnp.sign(x) * x**2)
    x = jnp.asarray([1.0, 1e-4])
    np.testing.assert_allclose(jax.grad(doubted(function, 1e-3))(x), [2.0, -2e-4], rtol=1e-6)


def test_integers_keys_and_empty_arrays_pass():
    both = lambda n, x, key: (jnp.sign(n), jnp.sign(x), key)
    found = doubted(both, 1e-3)(jnp.asarray([-3, 1]), jnp.zeros(0), jax.random.key(0))
    np.testing.assert_array_equal(found[0], [-1, 1])
    assert found[1].shape == (0,)

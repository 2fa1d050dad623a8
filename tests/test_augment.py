"""Augmentation with traced strengths: distributions, derivatives, and strengths per example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, tol

DTYPE = jnp.result_type(float)
N = 6
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(N, 8, 8)), DTYPE)
AUGMENTATIONS: dict[str, Any] = {
    "dropout": lambda x, s, key: hg.augment.dropout(x, s / 4, key=key),
    "gaussian_noise": lambda x, s, key: hg.augment.gaussian_noise(x, s, key=key),
    "brightness": lambda x, s, key: hg.augment.brightness(x, s, key=key),
    "contrast": lambda x, s, key: hg.augment.contrast(x, s, key=key),
    "jitter": lambda x, s, key: hg.augment.jitter(x, s, key=key),
    "translate": lambda x, s, key: hg.augment.translate(x, s, key=key),
    "cutout": lambda x, s, key: hg.augment.cutout(x, s, s, max_holes=3, key=key),
}
SMOOTH = ("gaussian_noise", "brightness", "contrast", "jitter", "translate")


@pytest.fixture(scope="module", params=AUGMENTATIONS)
def augmentation(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, jax.jit(AUGMENTATIONS[request.param])


def test_zero_strength_changes_nothing_and_strengths_of_examples_are_their_own(augmentation, key):
    _, augment = augmentation
    strength = jnp.where(jnp.arange(N) % 2 == 0, 0.0, 2.0).astype(DTYPE)
    found = augment(IMAGES, strength, key)
    assert found.shape == IMAGES.shape and found.dtype == IMAGES.dtype
    np.testing.assert_allclose(found[::2], IMAGES[::2], atol=tol(1e-14, 1e-6))
    assert np.all(np.any(np.asarray(found[1::2] != IMAGES[1::2]), axis=(1, 2)))
    whole = augment(IMAGES, jnp.full(N, 2.0, DTYPE), key)
    np.testing.assert_array_equal(found[1::2], whole[1::2])


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_is_that_of_the_sample(name, key):
    loss = jax.jit(lambda s: jnp.sum(jnp.sin(AUGMENTATIONS[name](IMAGES, s, key))))
    strength = jnp.full(N, 0.7, DTYPE)
    step = tol(1e-5, 1e-2)
    direction = jnp.asarray(RNG.normal(size=N), DTYPE)
    slope = (loss(strength + step * direction) - loss(strength - step * direction)) / (2 * step)
    assert_trees_close(jnp.sum(jax.grad(loss)(strength) * direction), slope, tol(1e-7, 2e-2))


@pytest.mark.parametrize("name", ["dropout", "cutout"])
def test_derivative_is_zero_where_there_is_none(name, key):
    loss = lambda s: jnp.sum(AUGMENTATIONS[name](IMAGES, s, key))
    assert float(jax.grad(loss)(jnp.asarray(1.3, DTYPE))) == 0.0


@pytest.mark.parametrize("strength", [-3.0, 1e30, 4.0])
def test_traced_strengths_outside_their_range_stay_bounded(augmentation, key, strength):
    name, augment = augmentation
    found = augment(IMAGES, jnp.asarray(strength, DTYPE), key)
    assert np.all(np.isfinite(found))
    if strength < 0:
        np.testing.assert_allclose(found, IMAGES, atol=tol(1e-14, 1e-6))
    if name == "dropout":
        assert float(jnp.max(jnp.abs(found))) <= 1024 * float(jnp.max(jnp.abs(IMAGES)))


def test_dropout_keeps_the_mean(key):
    rates = jnp.asarray([0.2, 0.5, 0.9], DTYPE)
    found = hg.augment.dropout(jnp.ones((3, 20_000), DTYPE), rates, key=key)
    error = jnp.sqrt(rates / (1 - rates) / 20_000)
    assert np.all(np.abs(np.asarray(jnp.mean(found, 1) - 1)) < 4 * np.asarray(error))
    assert np.all(np.abs(np.asarray(jnp.mean(found == 0, 1) - rates)) < 4 * np.sqrt(0.25 / 20_000))


def test_translation_moves_by_the_drawn_share_of_the_shift():
    key = jax.random.key(3)
    down, right = np.asarray(jax.random.uniform(key, (2, 1), DTYPE, -1, 1))[:, 0]
    image = np.zeros((1, 20, 20))
    image[0, 10, 10] = 1.0
    found = np.asarray(hg.augment.translate(jnp.asarray(image, DTYPE), 5.0, key=key)[0])
    rows, columns = np.mgrid[:20, :20]
    centre = np.asarray([np.sum(found * rows), np.sum(found * columns)])
    np.testing.assert_allclose(centre, [10 + 5 * down, 10 + 5 * right], rtol=tol(1e-12, 1e-5))
    np.testing.assert_allclose(np.sum(found), 1.0, rtol=tol(1e-12, 1e-5))
    assert np.sum(found > 0) <= 4


def test_cutout_hides_whole_squares_of_the_rounded_length(key):
    ones = jnp.ones((50, 30, 30, 2), DTYPE)
    found = hg.augment.cutout(ones, 4.4, 1.2, max_holes=3, key=key)
    hidden = np.sum(np.asarray(found == 0), axis=(1, 2, 3)) / 2
    assert hidden.max() == 16.0  # those that stick out hide less
    assert np.mean(hidden == 16.0) > 0.5
    more = hg.augment.cutout(ones, 4.0, 3.0, max_holes=3, key=key)
    assert np.sum(np.asarray(more == 0)) > 2 * np.sum(np.asarray(found == 0))


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan"), np.asarray([0.1] * 5 + [1.3])])
def test_a_rate_outside_its_range_is_refused(rate, key):
    with pytest.raises(ValueError, match=r"dropout: rate must be in \[0, 1\), found .*domain=hg.domains.interval"):
        hg.augment.dropout(IMAGES, rate, key=key)


def test_other_mistakes_are_named(key):
    with pytest.raises(ValueError, match="gaussian_noise: scale must be at least 0, found -1"):
        hg.augment.gaussian_noise(IMAGES, -1.0, key=key)
    with pytest.raises(ValueError, match=r"contrast: strength must be a scalar or .*\[6\], found shape \(3,\)"):
        hg.augment.contrast(IMAGES, jnp.ones(3), key=key)
    with pytest.raises(ValueError, match=r"translate: images must be .* found shape \(6, 64\): reshape"):
        hg.augment.translate(IMAGES.reshape(6, 64), 1.0, key=key)
    with pytest.raises(ValueError, match="cutout: holes must be at most max_holes=2, found 3: raise max_holes"):
        hg.augment.cutout(IMAGES, 2.0, 3.0, max_holes=2, key=key)
    with pytest.raises(TypeError, match="jitter: the data must be floating-point examples"):
        hg.augment.jitter(jnp.ones((3, 2), jnp.int32), 0.1, key=key)


def test_a_rate_is_told_apart_from_a_smooth_strength_before_it_is_tuned(key):
    """Implicit differentiation of a dropout rate would be silently zero: it warns, and names the leaf."""

    def inner(w: Any, h: Any, batch: Any) -> jax.Array:
        return jnp.mean((hg.augment.dropout(batch, h["rate"], key=key) @ w - 1) ** 2) + jnp.exp(h["l2"]) * jnp.sum(w**2)

    solver = hg.implicit(hg.Problem(inner, lambda w, h, batch: jnp.sum(w**2)))
    x = IMAGES[:, 0]
    hparams = {"rate": jnp.asarray(0.2, DTYPE), "l2": jnp.asarray(-1.0, DTYPE)}
    with pytest.warns(UserWarning, match=r"hparams\['rate'\] is used only through rounding"):
        jax.eval_shape(solver.hypergrad, solver.init(jnp.zeros(8, DTYPE), hparams), hparams, x, x)

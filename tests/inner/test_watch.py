"""Divergence is seen in the heights of the loss alone, whoever takes the steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.inner._watch import Heights, enter, new_heights, rose

STEPS = 40
T = np.arange(STEPS)
NAN, INF = float("nan"), float("inf")


@jax.jit
def watch(heights: jax.Array, residuals: jax.Array) -> tuple[Heights, jax.Array]:
    def body(seen: Heights, step: tuple[jax.Array, ...]) -> tuple[Heights, None]:
        t, height, residual = step
        return enter(seen, height, residual, t, STEPS), None

    seen, _ = jax.lax.scan(body, new_heights(heights.dtype), (jnp.arange(STEPS), heights, residuals))
    return seen, rose(seen)


def run(heights: np.ndarray, residuals: np.ndarray | None = None) -> tuple[hg.Status, bool]:
    residuals = np.ones(STEPS) if residuals is None else residuals
    seen, grown = watch(jnp.asarray(heights, float), jnp.asarray(residuals, float))
    return hg.Status(int(seen.status)), bool(grown)


@pytest.mark.parametrize(
    ("heights", "grown"),
    [
        (np.exp(-0.1 * T), False),
        (np.exp(0.3 * T), True),
        (1 + 0.5 * np.sin(T), False),  # noise of batches
        (np.where(T < 20, 1.0, 1.5), False),  # a rise by less than the loss itself
        (np.where(T < 5, 100.0 - 20 * T, np.where(T < 30, 0.1, 50.0)), False),  # fell further than it rose
        (-np.exp(0.3 * T), False),
    ],
)
def test_a_loss_rose_if_all_of_its_end_is_far_above_all_of_its_beginning(heights, grown):
    assert run(heights) == (hg.Status.OK, grown)
    assert run(1e-6 * heights) == (hg.Status.OK, grown)


@pytest.mark.parametrize(
    ("height", "residual", "before", "status"),
    [
        (NAN, NAN, 1.0, hg.Status.NONFINITE_LOSS),
        (1.0, NAN, 1.0, hg.Status.NONFINITE_GRAD),
        (INF, INF, 1.0, hg.Status.INNER_DIVERGED),
        (NAN, NAN, 1e4, hg.Status.INNER_DIVERGED),  # it had been growing
        (-INF, 1.0, 1.0, hg.Status.NONFINITE_LOSS),
    ],
)
def test_the_first_number_that_is_not_finite_says_why_and_later_ones_nothing(height, residual, before, status):
    heights, residuals = np.ones(STEPS), np.ones(STEPS)
    heights[9], heights[10], residuals[10] = before, height, residual
    heights[11:], residuals[11:] = NAN, NAN
    assert run(heights, residuals)[0] is status


def test_a_first_step_that_is_not_finite_has_not_diverged():
    heights = np.ones(STEPS)
    heights[0] = NAN
    assert run(heights)[0] is hg.Status.NONFINITE_LOSS

"""Reverse mode: whatever is stored, the recursion is the transpose of a Python loop over the steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from hypergrad import _tree
from hypergrad.unrolling.reverse import Backward, plan, sweep, train_and_store
from hypergrad.unrolling.step import moving, new_record
from tests._helpers import assert_trees_close, random_like, tol
from tests.unrolling._training import H, training

STEPS = 7


@pytest.fixture(scope="module")
def by_hand():
    """The cotangent at the end of the run, and what the loop makes of it: at the start, and for the hyperparameters."""
    step, point = training()

    def loop(here, h):
        at = point
        for t in range(1, 1 + STEPS):
            here, taken = step.through(here, h, at, t)
            at = taken.point
        return here

    cotangent = random_like(3, moving(point))
    return cotangent, *jax.jit(lambda c: jax.vjp(loop, moving(point), H)[1](c))(cotangent)


@pytest.mark.parametrize("layout", [(7,), (4, 2), (2, 2, 2)], ids=str)
def test_the_sweep_is_the_transpose_of_the_loop_whatever_is_stored(layout, by_hand):
    cotangent, start, contribution = by_hand
    step, point = training()

    @jax.jit
    def run(cotangent):
        _, stored, _ = train_and_store(step, layout, point, 1, STEPS, new_record(point.params))
        back = Backward(cotangent, _tree.zeros_like(H), jnp.zeros((), point.params.dtype), None)
        return sweep(step, layout, stored, 1, STEPS, 1 + STEPS, back)

    found = run(cotangent)
    assert_trees_close(found.adjoint, start, tol(1e-12, 1e-5))
    assert_trees_close(found.total, contribution, tol(1e-12, 1e-5))
    assert float(found.growth) >= float(jnp.linalg.norm(start.params)) * (1 - tol(1e-12, 1e-5))


@pytest.mark.parametrize("remat", ["step", "sqrt", "tree"])
def test_a_plan_covers_its_steps_and_stores_no_more_than_it_promises(remat):
    for steps in (1, 2, 7, 64, 97, 1000, 4096):
        layout = plan(remat, steps, 8, None)
        assert math.prod(layout) >= steps and len(layout) <= {"step": 1, "sqrt": 2, "tree": 4}[remat]
        most = {"step": steps, "sqrt": 3 * math.isqrt(steps) + 3, "tree": 12 * math.ceil(math.log(steps + 1, 8))}
        assert sum(layout) <= most[remat], (steps, layout)
    assert plan(remat, 0, 8, None) == ()


def test_auto_takes_the_fastest_plan_within_the_memory():
    assert plan("auto", 100, 1000, 100e3) == (100,)
    assert sorted(plan("auto", 100, 1000, 20e3)) == [10, 10]
    assert plan("auto", 4096, 1000, 40e3) == plan("tree", 4096, 1000, None)

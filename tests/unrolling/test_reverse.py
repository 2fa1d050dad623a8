"""Reverse mode: whatever is stored, the recursion is the transpose of a Python loop over the steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad import _tree
from hypergrad.unrolling.reverse import (
    Backward,
    plan,
    sweep,
    sweep_replayed,
    train_and_keep_gradients,
    train_and_store,
)
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


@pytest.mark.parametrize("replays", [False, True], ids=["stored", "replayed"])
@pytest.mark.parametrize("layout", [(7,), (4, 2), (2, 2, 2)], ids=str)
def test_the_sweep_is_the_transpose_of_the_loop_whatever_is_stored(layout, replays, by_hand):
    cotangent, start, contribution = by_hand
    step, point = training()

    @jax.jit
    def run(cotangent):
        record = new_record(point.params)
        back = Backward(cotangent, _tree.zeros_like(H), jnp.zeros((), point.params.dtype), None)
        if replays:
            end, kept, _ = train_and_keep_gradients(step, point, 1, STEPS, record)
            return end, sweep_replayed(step, layout, kept, point, 1, STEPS, 1 + STEPS, back)
        end, stored, _ = train_and_store(step, layout, point, 1, STEPS, record)
        return end, sweep(step, layout, stored, 1, STEPS, 1 + STEPS, back)

    end, found = run(cotangent)
    assert int(end.model_state["seen"]) == 1 + STEPS
    assert_trees_close(found.adjoint, start, tol(1e-12, 1e-5))
    assert_trees_close(found.total, contribution, tol(1e-12, 1e-5))
    assert float(found.growth) >= float(jnp.linalg.norm(start.params)) * (1 - tol(1e-12, 1e-5))


@pytest.mark.parametrize("remat", ["step", "sqrt", "tree", "gradient"])
def test_a_plan_covers_its_steps_and_stores_no_more_than_it_promises(remat):
    for steps in (1, 2, 7, 64, 97, 1000, 4096):
        layout = plan(remat, steps, 8, None)
        assert math.prod(layout) >= steps and len(layout) <= {"step": 1, "sqrt": 2, "tree": 4, "gradient": 4}[remat]
        deep = 12 * math.ceil(math.log(steps + 1, 8))
        most = {"step": steps, "sqrt": 3 * math.isqrt(steps) + 3, "tree": deep, "gradient": deep}
        assert sum(layout) <= most[remat], (steps, layout)
    assert plan(remat, 0, 8, None) == ()


def test_auto_takes_the_fastest_plan_within_the_memory():
    assert plan("auto", 100, 1000, 100e3) == (100,)
    assert sorted(plan("auto", 100, 1000, 20e3)) == [10, 10]
    assert plan("auto", 4096, 1000, 40e3) == plan("tree", 4096, 1000, None)


def test_gradients_alone_take_a_quarter_of_what_adam_stores_by_step():
    """A point of Adam is three copies of the parameters, and its gradient is a fourth."""
    width, steps = 4096, 64
    problem = hg.Problem(lambda w, h, b: jnp.exp(h) * jnp.sum(jnp.cos(w)), lambda w, h, b: jnp.sum(w))
    inner = hg.inner.gradient(optax.adam(0.1), steps=steps)
    h, start = jnp.asarray(0.1), jnp.linspace(-1, 1, width)

    def copies(remat):
        """How many copies of the parameters a call allocates."""
        solver = hg.unrolled(problem, inner=inner, mode="reverse", remat=remat)
        program = jax.jit(solver.hypergrad).lower(solver.init(start, h), h).compile()
        return program.memory_analysis().temp_size_in_bytes / start.nbytes

    assert copies("step") >= 4 * steps
    assert copies("gradient") <= 1.75 * steps

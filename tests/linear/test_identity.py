"""T1-T2: a multiple of the right-hand side, and no claim."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from tests.linear._systems import EPS, run, spd, vector


def test_solution_is_a_multiple_of_the_right_hand_side():
    for step_size in (0.5, 3.0):
        out = run("identity", spd(10.0), vector(), start=vector(4), step_size=step_size)
        np.testing.assert_allclose(out.x, step_size * vector(), rtol=10 * EPS)
        assert out.steps == 0


def test_it_claims_and_knows_nothing():
    out = run("identity", spd(10.0), vector())
    assert not hg.linear.identity().claims
    assert out.status == hg.Status.OK
    assert np.isnan(out.residual) and np.isinf(out.inverse_of_gap).all()


def test_the_operator_is_never_called():
    from hypergrad.linear._linear import solve

    def refuse(v):
        raise AssertionError

    np.testing.assert_array_equal(solve(hg.linear.identity(), refuse, jnp.arange(3.0)).solution, jnp.arange(3.0))

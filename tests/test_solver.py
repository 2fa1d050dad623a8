"""What every method is made of: statuses with an algebra, a solver of three functions, and what it says of itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._solver import code, evaluation, failure, first_failure, usable


def test_every_status_has_advice_and_the_codes_up_to_insensitive_are_usable():
    assert [s.usable for s in hg.Status] == [s <= hg.Status.INSENSITIVE for s in hg.Status]
    assert all(len(s.advice) > 40 for s in hg.Status) and len({s.advice for s in hg.Status}) == len(hg.Status)
    found = jax.jit(jax.vmap(usable))(jnp.asarray([int(s) for s in hg.Status]))
    np.testing.assert_array_equal(found, [s.usable for s in hg.Status])


def test_a_status_is_written_by_its_name_and_counts_as_its_code():
    status = hg.Status.SINGULAR
    assert str(status) == f"{status}" == "SINGULAR" and f"{status:>9}|" == " SINGULAR|" and f"{status:d}" == "9"
    assert status == 9 and int(jnp.int32(status)) == 9


def test_a_failure_is_what_cannot_be_used():
    codes = jnp.asarray([int(s) for s in hg.Status])
    found = jax.jit(jax.vmap(failure))(codes)
    np.testing.assert_array_equal(found, [0 if s.usable else s for s in hg.Status])
    assert found.dtype == jnp.int32


def test_the_first_failure_is_the_earliest_that_is_not_ok():
    codes = jnp.asarray([[0, 0, 0], [0, 8, 3], [5, 0, 9], [0, 0, 1]])
    found = jax.jit(jax.vmap(lambda c: first_failure(*c)))(codes)
    np.testing.assert_array_equal(found, [0, 8, 5, 1])
    assert found.dtype == jnp.int32 and int(first_failure()) == hg.Status.OK
    assert int(code(True, hg.Status.SINGULAR)) == hg.Status.SINGULAR and int(code(False, hg.Status.SINGULAR)) == 0


def constant(status: hg.Status) -> hg.Solver:
    """A user's own: the parameters are the hyperparameters, and every call counts."""

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        numbers = (jnp.int32(status), *(jnp.float32(0),) * 2, *(jnp.int32(0),) * 2, jnp.float32(0), {})
        return hg.Hypergradient(hparams**2, 2 * hparams, hg.Info(*numbers), {}), state + 1

    init = lambda params, hparams, *, key=None, model_state=None: jnp.int32(0)
    return hg.Solver(init, hypergrad, lambda state, hparams: hparams)


def test_three_functions_are_a_solver_of_which_nothing_is_known():
    solver = constant(hg.Status.OK)
    assert solver.evaluate is None and solver.about == hg.About() and solver.about.differentiates == "unknown"
    value, info, state = evaluation(solver)(solver.init(None, 3.0), jnp.asarray(3.0))
    assert value == 9 and int(info.status) == hg.Status.OK and state == 1


def test_a_solvers_own_evaluate_is_the_one_that_is_used():
    own = lambda state, hparams, train=None, valid=None, *, key=None: ("value", "info", "state")
    assert evaluation(constant(hg.Status.OK)._replace(evaluate=own))(None, None) == ("value", "info", "state")


def test_raise_if_failed_is_silent_for_what_can_be_used_and_names_the_rest():
    for status in hg.Status:
        out, _ = constant(status).hypergrad(0, jnp.asarray(1.0))
        if status.usable:
            hg.raise_if_failed(out)
            continue
        with pytest.raises(hg.FailedHypergradientError, match=f"^the hypergradient is not usable.\n{status.name}: "):
            hg.raise_if_failed(out)
    batch = jax.tree.map(lambda *x: jnp.stack(x), *[constant(s).hypergrad(0, 1.0)[0].info for s in (0, 8, 9)])
    with pytest.raises(hg.FailedHypergradientError, match=r"(?s)in 2 of 3 problems.*NEG_CURVATURE.*SINGULAR"):
        hg.raise_if_failed(batch)

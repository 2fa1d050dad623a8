"""Optimism of tuned validation losses: against leave-one-out of a linear smoother, in closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.diagnostics import overtuning
from tests._helpers import tol
from tests.diagnostics._newton import State, newton

N, K = 40, 4
# The hyperparameters are the parameters: tuning is least squares on the validation rows.
FITTED = hg.Problem(
    lambda w, h, batch: jnp.sum((w - h["at"]) ** 2) / 2, lambda w, h, v: jnp.mean((v[0] @ w - v[1]) ** 2)
)


def draw(rows: int = N, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, K))
    return x, x @ rng.normal(size=K) + noise * rng.normal(size=rows)


def estimate(make: Any = newton, problem: hg.Problem = FITTED, **changes: Any) -> hg.diagnostics.Overtuning:
    x, y = draw(**changes)
    dtype = jnp.result_type(float)
    at = {"at": jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0], dtype)}
    solver = make(problem)
    state = solver.init(jnp.zeros(K, dtype), at)
    return overtuning(solver, state, at, None, (jnp.asarray(x, dtype), jnp.asarray(y, dtype)))


def closed_form(rows: int = N) -> tuple[float, float, float]:
    """Validation loss, leave-one-out loss, and the trace formula."""
    x, y = draw(rows)
    smoother = x @ np.linalg.pinv(x)
    residual, leverage = y - smoother @ y, np.diag(smoother)
    return (
        float(np.mean(residual**2)),
        float(np.mean((residual / (1 - leverage)) ** 2)),
        float(2 * np.mean(residual**2 * leverage)),
    )


@pytest.mark.parametrize("make", [newton, hg.implicit, lambda p: newton(p)._replace(evaluate=None)])
def test_optimism_of_a_linear_smoother_is_that_of_leaving_one_out(make):
    found, (raw, left_out, trace) = estimate(make), closed_form()
    accuracy = tol(1e-6, 2e-2)
    np.testing.assert_allclose(found.raw, raw, rtol=tol(1e-9, 1e-4))
    np.testing.assert_allclose(found.corrected, left_out, rtol=accuracy)
    np.testing.assert_allclose(found.optimism, left_out - raw, rtol=accuracy)
    np.testing.assert_allclose(found.trace, trace, rtol=accuracy)
    np.testing.assert_allclose(found.effective, K, rtol=accuracy)  # the trace of the smoother
    assert (found.hyperparameters, found.rows) == (K, N)


def test_a_large_correction_is_said_in_plain_words():
    with pytest.warns(
        UserWarning, match=r"overtuning: about 4.0 of 4 hyperparameters were fitted to 10 validation rows"
    ):
        found = estimate(rows=10)
    assert found.warning in str(found)
    assert "expect about" in str(found)
    assert estimate(rows=200).warning == ""


def test_hyperparameters_that_nothing_depends_on_do_not_count():
    silent = hg.Problem(
        lambda w, h, batch: FITTED.inner_loss(w, {"at": h["at"][:K]}, batch),  # pyright: ignore[reportOptionalCall]
        FITTED.outer_loss,
    )
    x, y = (jnp.asarray(a, jnp.result_type(float)) for a in draw())
    at = {"at": jnp.concatenate([jnp.linalg.lstsq(x, y)[0], jnp.ones(3, x.dtype)])}
    solver = newton(silent)
    found = overtuning(solver, solver.init(jnp.zeros(K, x.dtype), at), at, None, (x, y))
    np.testing.assert_allclose(found.corrected, closed_form()[1], rtol=tol(1e-6, 2e-2))
    np.testing.assert_allclose(found.effective, K, rtol=tol(1e-6, 2e-2))


def test_zero_hyperparameters_give_zero_optimism():
    x, y = (jnp.asarray(a, jnp.result_type(float)) for a in draw())
    still = hg.Problem(lambda w, h, batch: jnp.sum((w - 1) ** 2) / 2, FITTED.outer_loss)
    solver = newton(still)
    for none in ({}, jnp.zeros(0, x.dtype), None):
        found = overtuning(solver, State(jnp.zeros(K, x.dtype)), none, None, (x, y))
        assert found.optimism == found.trace == found.effective == 0
        assert found.corrected == found.raw
        np.testing.assert_allclose(found.raw, np.mean((np.asarray(x).sum(1) - np.asarray(y)) ** 2), rtol=1e-5)


def test_it_takes_at_most_2k_and_2_hypergradients():
    for has_evaluate in (True, False):
        count = 0

        def counted(problem: hg.Problem, keep: bool = has_evaluate) -> hg.Solver:
            right = newton(problem)

            def hypergrad(*args: Any, **options: Any) -> Any:
                jax.debug.callback(seen)
                return right.hypergrad(*args, **options)

            return right._replace(hypergrad=hypergrad, evaluate=right.evaluate if keep else None)

        def seen() -> None:
            nonlocal count
            count += 1

        estimate(counted)
        jax.effects_barrier()
        assert 2 * K <= count <= 2 * K + 2  # a batch over rows counts once


def test_an_unusable_status_gives_no_correction():
    wrong = jnp.int32(hg.Status.SINGULAR)

    def failing(problem: hg.Problem) -> hg.Solver:
        right = newton(problem)

        def hypergrad(state, hparams, train=None, valid=None, *, key=None):
            out, state = right.hypergrad(state, hparams, train, valid)
            return out._replace(info=out.info._replace(status=wrong)), state

        return right._replace(hypergrad=hypergrad)

    found = estimate(failing)
    assert found.status == hg.Status.SINGULAR
    assert np.isnan([found.corrected, found.optimism, found.trace, found.effective]).all()
    np.testing.assert_allclose(found.raw, closed_form()[0], rtol=1e-4)
    assert "no correction, since the status is SINGULAR" in str(found)


def test_a_maximum_of_the_validation_loss_is_no_place_to_correct():
    upside_down = hg.Problem(FITTED.inner_loss, lambda w, h, v: -FITTED.outer_loss(w, h, v))
    assert estimate(problem=upside_down).status == hg.Status.INACCURATE


def test_unrolled_training_is_corrected_as_its_optimum():
    """Enough steps that each hyperparameter is reached: the same linear smoother."""
    run = lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.sgd(0.9), steps=20), mode="reverse")
    np.testing.assert_allclose(estimate(run).corrected, closed_form()[1], rtol=tol(1e-6, 2e-2))


def test_mistakes_are_named():
    x, y = (jnp.asarray(a, jnp.result_type(float)) for a in draw())
    solver, at = newton(FITTED), {"at": jnp.zeros(K, x.dtype)}
    state = solver.init(jnp.zeros(K, x.dtype), at)
    with pytest.raises(hg.InputError, match=r"hparams must be at most 64 numbers, found 65, which would cost 131"):
        overtuning(solver, state, {"at": jnp.zeros(65)}, None, (x, y))
    with pytest.raises(hg.InputTypeError, match=r"valid must be arrays, found Minibatches"):
        overtuning(solver, state, at, None, hg.minibatches((x, y), 4))
    with pytest.raises(hg.InputTypeError, match=r"train must be arrays, found Stream"):
        overtuning(solver, state, at, hg.stream([(x, y)], 1), (x, y))
    with pytest.raises(hg.InputError, match=r"valid must be arrays with one row an example, found None"):
        overtuning(solver, state, at, None, None)
    with pytest.raises(hg.InputError, match=r"at least 2 rows"):
        overtuning(solver, state, at, None, (x[:1], y[:1]))
    with pytest.raises(hg.InputTypeError, match=r"valid is traced: call overtuning outside of jit"):
        jax.jit(lambda v: overtuning(solver, state, at, None, v).raw)((x, y))
    online = hg.online(FITTED, optax.sgd(0.1))
    with pytest.raises(hg.InputError, match=r"goes on training from call to call.*warm_start=False"):
        overtuning(online, online.init(jnp.zeros(K), at), at, None, (x, y))
    summed = newton(hg.Problem(FITTED.inner_loss, lambda w, h, v: jnp.sum((v[0] @ w - v[1]) ** 2)))
    with pytest.raises(hg.InputError, match=r"outer_loss must be a mean over the rows of valid"):
        overtuning(summed, state, at, None, (x, y))

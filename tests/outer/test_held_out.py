"""Did it help? A loss on data that nothing was chosen by, and a fresh training run at the tuned hyperparameters."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import tol

RNG = np.random.default_rng(0)
W = RNG.normal(size=5)


def _draw(rows):
    x = RNG.normal(size=(rows, 5))
    return jnp.asarray(x), jnp.asarray(x @ W + 0.5 * RNG.normal(size=rows))


TRAIN, VALID, TEST = _draw(20), _draw(15), _draw(30)


def _error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.Problem(lambda w, h, b: _error(w, b) + jnp.sum(jnp.exp(h) * w**2), lambda w, h, b: _error(w, b))
SOLVERS = {
    "implicit": hg.implicit(PROBLEM),
    "unrolled": hg.unrolled(PROBLEM, inner=hg.inner.gradient(optax.sgd(0.1), steps=200)),
}


def _tune(name="implicit", steps=12, **options):
    return hg.tune(
        SOLVERS[name], jnp.zeros(5), jnp.full(5, 1.0), TRAIN, VALID, outer=optax.adam(0.4), steps=steps,
        progress=False, **options,
    )  # fmt: skip


def _ridge(h, data):
    x, y = data
    return jnp.linalg.solve(x.T @ x / len(y) + jnp.diag(jnp.exp(h)), x.T @ y / len(y))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_test_loss_is_that_of_the_best_step_and_changes_nothing_else(name):
    plain, held = _tune(name), _tune(name, test=TEST)
    np.testing.assert_array_equal(plain.history.value, held.history.value)
    assert plain.test is None
    expected = _error(_ridge(held.best.hparams, TRAIN), TEST)
    np.testing.assert_allclose(held.test, expected, rtol=tol(1e-6, 1e-3))
    assert "test   outer loss" in str(held) and "test   outer loss" not in str(plain)


def test_a_resumed_run_has_the_same_test_loss_and_test_data_are_part_of_its_configuration(tmp_path):
    whole = _tune(test=TEST)
    _tune(steps=6, test=TEST, checkpoint=tmp_path, every=3)
    resumed = _tune(test=TEST, checkpoint=tmp_path, every=3)
    assert resumed.test == whole.test
    with pytest.raises(hg.InputError, match="test"):
        _tune(checkpoint=tmp_path, every=3)


def test_a_retrained_model_is_that_of_the_best_hyperparameters_on_all_the_data():
    result = _tune()
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), TRAIN, VALID)
    fresh = result.retrain(SOLVERS["implicit"], jnp.ones(5), both, TEST)
    np.testing.assert_allclose(fresh.params, _ridge(result.best.hparams, both), rtol=tol(1e-7, 1e-3), atol=tol(0, 1e-4))
    np.testing.assert_allclose(fresh.value, _error(fresh.params, TEST), rtol=1e-6)
    assert fresh.status == "OK"


def test_mistakes_are_named():
    with pytest.raises(hg.InputTypeError, match=r"test is hg\.minibatches"):
        _tune(test=hg.minibatches(TEST, 4))
    stream = hg.stream([TRAIN], per_step=1)
    with pytest.raises(hg.InputError, match=r"train is hg\.stream"):
        hg.tune(
            SOLVERS["implicit"], jnp.zeros(5), jnp.ones(5), stream, VALID, outer=optax.adam(0.1), steps=2, test=TEST
        )
    with pytest.raises(hg.InputError, match=r"test\[0\] has 30 rows and test\[1\] has 29"):
        _tune(test=(TEST[0], TEST[1][:-1]))
    nan = hg.Problem(PROBLEM.inner_loss, lambda w, h, b: jnp.sum(w) * jnp.nan)
    with pytest.warns(UserWarning, match="stopped after"):
        failed = hg.tune(
            hg.implicit(nan), jnp.zeros(5), jnp.ones(5), TRAIN, VALID, outer=optax.adam(0.1), steps=5, test=TEST,
            progress=False,
        )  # fmt: skip
    assert failed.test is None
    with pytest.raises(hg.InputError, match="no step of the run was usable"):
        failed.retrain(SOLVERS["implicit"], jnp.zeros(5), TRAIN, VALID)
    with pytest.raises(hg.InputError, match="calls must be at least 1"):
        _tune(steps=2).retrain(SOLVERS["implicit"], jnp.zeros(5), TRAIN, VALID, calls=0)


def test_test_data_that_do_not_fit_are_refused_before_the_run():
    folded = hg.tasks(SOLVERS["implicit"], count=3)
    train, valid = (jax.tree.map(lambda a: jnp.stack([a] * 3), data) for data in (TRAIN, VALID))
    seen = []
    with pytest.raises(hg.InputError, match=r"valid\[0\] has a leading axis of 30 for 3 tasks") as raised:
        hg.tune(
            folded, jnp.zeros(5), jnp.ones(5), train, valid, test=TEST, outer=optax.sgd(0.1), steps=2, progress=False,
            callbacks=lambda step, metrics: seen.append(step),
        )  # fmt: skip
    assert seen == [] and "this is about test=" in "".join(raised.value.__notes__)


def test_without_a_terminal_the_log_says_that_it_compiles_and_where_it_is(caplog):
    with caplog.at_level(logging.INFO, logger="hypergrad"):
        hg.tune(SOLVERS["implicit"], jnp.zeros(5), jnp.ones(5), TRAIN, VALID, outer=optax.adam(0.1), steps=30)
    said = [record.getMessage() for record in caplog.records]
    said = [line for line in said if not line.startswith("tune: compiling (")]  # where that takes over ten seconds
    assert said[0] == "tune: compiling" and "took the first step" in said[1]
    assert any(line.startswith("tune: step 30 of 30, outer loss") for line in said) and len(said) < 10


def test_many_hyperparameters_for_the_validation_rows_are_named_with_both_counts():
    short = _tune(steps=2)
    assert short.validated == 15
    assert "warning: 5 hyperparameters were tuned on 15 validation rows" in repr(short)
    assert "hg.diagnostics.overtuning" in repr(short)
    assert "warning" not in repr(short._replace(validated=50))
    assert "warning" not in repr(short._replace(validated=None))
    assert "warning: 5 hyperparameters were tuned on 49" in repr(short._replace(validated=49, test=1.0))


def test_rows_of_validation_data_are_counted_where_they_are_examples():
    from hypergrad.outer.tune import _validated

    solver = SOLVERS["implicit"]
    assert _validated(solver, VALID) == 15
    assert _validated(solver, hg.minibatches(VALID, 4)) == 15
    assert _validated(hg.tasks(solver, count=3), hg.folds(VALID, 3)[1]) == 15
    assert _validated(hg.tasks(solver, count=15), VALID) is None
    for unknown in (None, hg.stream([VALID], 1), (jnp.zeros(3), jnp.zeros(4)), jnp.zeros(())):
        assert _validated(solver, unknown) is None

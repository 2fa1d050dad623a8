"""Many starts at once are the runs of `hg.tune` one after the other."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.outer import TuneStatus
from tests._helpers import assert_trees_close, tol
from tests.outer._ridge import START, TRAIN, VALID, ridge

STARTS = {"l2": jnp.array([0.01, 0.3, 5.0])}
OPTIONS = {"train": TRAIN, "valid": VALID, "outer": optax.adam(0.3), "steps": 7, "domain": hg.domains.log()}


@pytest.mark.parametrize("several", [1, 3])
def test_each_start_is_a_run_of_tune(several):
    key = jax.random.key(3)
    data = {"train": hg.minibatches(TRAIN, 10)}
    found = hg.multistart(ridge(), START, STARTS, **OPTIONS | data, key=key, steps_per_call=several)
    assert len(found.results) == 3
    for i, result in enumerate(found.results):
        alone = hg.tune(
            ridge(), START, {"l2": STARTS["l2"][i]}, **OPTIONS | data, key=jax.random.fold_in(key, i), progress=False
        )
        assert result.status is TuneStatus.FINISHED and len(result.history.value) == 7
        for name in ("hparams", "params", "state", "outer_state"):
            assert_trees_close(getattr(result, name), getattr(alone, name), tol(1e-10, 1e-4))
        np.testing.assert_allclose(result.history.value, alone.history.value, rtol=tol(1e-10, 1e-4))
        assert result.best.step == alone.best.step
    values = [result.best.value for result in found.results]
    assert found.best is found.results[int(np.argmin(values))]


def test_starts_end_in_different_optima_and_the_best_is_kept():
    problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h) ** 2), lambda w, h, batch: jnp.cos(3 * w) + 0.1 * w**2)
    starts = jnp.array([-3.0, 1.5, 4.0])
    found = hg.multistart(
        hg.implicit(problem), jnp.zeros(()), starts, outer=optax.adam(0.1), steps=100, steps_per_call=50
    )
    np.testing.assert_allclose([float(r.hparams) for r in found.results], [-3.07, 1.02, 3.07], atol=0.03)
    assert found.best is found.results[1]


def test_a_start_that_fails_leaves_the_others_alone():
    problem = hg.Problem(
        lambda w, h, batch: jnp.sum((w - h) ** 2), lambda w, h, batch: jnp.sum(jnp.where(h > 2, jnp.nan, w**2))
    )
    found = hg.multistart(hg.implicit(problem), jnp.zeros(1), jnp.array([3.0, 1.0]), outer=optax.sgd(0.1), steps=3)
    assert [r.status for r in found.results] == [TuneStatus.FAILED, TuneStatus.FINISHED]
    assert found.best is found.results[1] and np.isfinite(found.best.best.value)
    assert float(found.results[0].hparams) == 3.0
    none = hg.multistart(hg.implicit(problem), jnp.zeros(1), jnp.array([3.0]), outer=optax.sgd(0.1), steps=2)
    assert none.best is None


def test_ctrl_c_ends_all_starts_after_the_same_step(monkeypatch):
    module = sys.modules["hypergrad.outer.multistart"]
    note, calls = module.note, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3 * 4 + 2:  # at the second start of the fifth step
            raise KeyboardInterrupt
        return note(*args)

    monkeypatch.setattr(module, "note", interrupted)
    found = hg.multistart(ridge(), START, STARTS, **OPTIONS)
    monkeypatch.undo()
    whole = hg.multistart(ridge(), START, STARTS, **OPTIONS | {"steps": 4})
    for result, expected in zip(found.results, whole.results, strict=True):
        assert result.status is TuneStatus.INTERRUPTED and len(result.history.value) == 4
        assert_trees_close(result.hparams, expected.hparams, tol(1e-12, 1e-6))
        assert_trees_close(result.state, expected.state, tol(1e-12, 1e-6))


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"l2": 0.1}, "every leaf of hparams must have a leading axis"),
        ({"l2": jnp.ones(2), "other": jnp.ones(3)}, "found lengths"),
        ({"l2": jnp.ones(0)}, "leading axis"),
        ({"l2": jnp.array([0.1, -1.0])}, "l2"),
    ],
)
def test_starts_that_cannot_be_are_named(hparams, words):
    with pytest.raises(hg.InputError, match=words):
        hg.multistart(ridge(), START, hparams, **OPTIONS)


def test_a_stream_is_refused():
    with pytest.raises(hg.InputTypeError, match=r"multistart: train is hg\.stream"):
        hg.multistart(ridge(), START, STARTS, **OPTIONS | {"train": hg.stream([TRAIN], per_step=1)})

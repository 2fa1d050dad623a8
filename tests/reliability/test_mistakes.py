"""Mistakes of the caller are named before anything compiles, by every solver, as it is, under jit and under vmap.

What single functions refuse is in `test_checks.py` and `outer/test_mistakes.py`; here are the mistakes of the fault
list that reach a solver's `init` and `hypergrad`, or a run.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests.reliability._family import PROBLEM, STEPS, Member
from tests.reliability._mistakes import MISTAKES, MODES, W, accepted, labels, learning_rate, make

FAST = ("implicit, CG", "fixed point, GMRES", "unrolled, reverse", "direct")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.what)
def test_a_mistake_is_named_by_every_solver(mistake, mode):
    for name in FAST:
        if mistake.skip(name) or (mistake.warns and mode == "eager"):  # a warning does not stop what is run
            continue
        caught = pytest.warns(UserWarning, match="hparams") if mistake.warns else pytest.raises(hg.HypergradError)
        with caught as found:
            make(name, mistake, mode)
        text = str(found[0].message) if mistake.warns else str(found.value)
        for word in mistake.words:
            assert word in text, f"{name}: {text}"


def test_a_learning_rate_is_refused_where_it_has_no_effect_and_taken_where_it_has():
    with pytest.raises(hg.InputError, match=r"hparams\['rate'\] does not move the inner optimum.*hg\.unrolled"):
        learning_rate(lambda p, inner: hg.implicit(p, inner=inner))
    assert learning_rate(lambda p, inner: hg.unrolled(p, inner=inner)).grad["rate"] != 0


@pytest.mark.parametrize("hparams", [1, 0.5, np.float32(0.5), {"a": 0.5, "b": None}, (None, 0.25, [])])
def test_python_numbers_and_none_are_hyperparameters(hparams):
    for name in ("implicit, CG", "unrolled, forward", "direct"):
        grad = accepted(name, hparams).grad
        assert jax.tree.structure(grad) == jax.tree.structure(hparams)
        assert all(jnp.issubdtype(g.dtype, jnp.floating) for g in jax.tree.leaves(grad))


def test_each_leaf_keeps_its_precision():
    """float32 parameters and float64 hyperparameters: the gradient has the dtype of the hyperparameters."""
    for name in ("implicit, CG", "unrolled, reverse", "unrolled, forward", "direct"):
        for dtype in (jnp.float16, jnp.result_type(float)):
            assert accepted(name, {"h": jnp.asarray(0.5, dtype)}, W.astype(jnp.float32)).grad["h"].dtype == dtype


def test_a_map_that_returns_other_parameters_is_named():
    for change, words in (({"w": W, "v": W}, r"\['v'\].*not expected"), ({}, r"\['w'\] is missing")):
        inner = hg.inner.fixed_point(lambda w, h, b, change=change: change, steps=STEPS)
        for solver in (hg.implicit(PROBLEM, inner=inner), hg.unrolled(PROBLEM, inner=inner)):
            with pytest.raises(hg.InputError, match=words):
                solver.hypergrad(solver.init({"w": W}, 0.5), 0.5, *Member().data())


def test_conjugate_gradients_on_a_jacobian_that_is_not_symmetric_are_refused():
    inner = hg.inner.fixed_point(lambda w, h, b: w)
    with pytest.raises(hg.InputError, match=r"linear=hg.linear.cg needs a symmetric operator.*hg.linear.gmres"):
        hg.implicit(PROBLEM, inner=inner, linear=hg.linear.cg())


def test_a_minibatch_smaller_than_the_parameters_is_a_warning():
    x, y = jnp.ones((20, 8)), jnp.ones(20)
    loss = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) + h * jnp.sum(w**2)
    solver = hg.implicit(hg.Problem(loss, loss))
    state = solver.init(jnp.zeros(8), 0.5)
    with pytest.warns(UserWarning, match="minibatch of 4 rows for 8 parameters"):
        jax.eval_shape(
            lambda s, k: solver.hypergrad(s, 0.5, hg.minibatches((x, y), 4), (x, y), key=k), state, jax.random.key(0)
        )


def _classify(w, h, batch):
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w, y)) + h * jnp.sum(w**2)


def _run(train, **options):
    good = labels(1)
    return hg.tune(
        hg.implicit(hg.Problem(_classify, _classify)),
        jnp.zeros((4, 3)),
        0.1,
        train,
        good,
        outer=optax.adam(0.1),
        steps=1,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_its_classes_is_named(label):
    with pytest.raises(hg.InputError, match=rf"train\[1\]: labels run from 0 to 2, found {label} at row 7"):
        _run(labels(label))


def test_features_and_labels_of_different_lengths_are_named():
    x, y = labels(1)
    with pytest.raises(hg.InputError, match=r"train\[0\] has 12 rows and train\[1\] has 11"):
        _run((x, y[:-1]))


def test_a_start_outside_the_domain_is_named():
    with pytest.raises(hg.InputError, match=r"hparams must be between 1 and 2.*found 0.1: start inside"):
        _run(labels(1), domain=hg.domains.interval(1, 2))


def test_a_batch_of_another_shape_in_the_middle_of_a_run_is_named():
    x, y = labels(1)
    solver = hg.implicit(hg.Problem(_classify, _classify))
    odd = hg.stream([(x, y), (x[:5], y[:5])], per_step=1)
    with pytest.raises(hg.InputError, match=r"the batches of train changed from .*\[1, 12, 4\].* to .*\[1, 5, 4\]"):
        hg.tune(solver, jnp.zeros((4, 3)), 0.1, odd, (x, y), outer=optax.adam(0.1), steps=3, progress=False)


def test_a_state_that_was_given_away_cannot_be_used_again():
    """JAX's own error: no number comes back."""
    solver = hg.direct(PROBLEM, inner=hg.inner.lbfgs())
    h, data = jnp.asarray(0.5), Member().data()
    step, state = jax.jit(lambda s: solver.hypergrad(s, h, *data)[1], donate_argnums=0), solver.init(W, h)
    given = jax.tree.map(jnp.array, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Some donated buffers were not usable"
        step(given)
        if given.params.is_deleted():
            with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
                step(given)

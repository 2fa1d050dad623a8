"""The data-emphasized ELBO against its formula written out, and what it learns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, central_difference, relative_error, tol

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.standard_normal((6, 3)))
Y = jnp.asarray(RNG.standard_normal(6))
WEIGHTS = {"body": jnp.asarray(RNG.standard_normal(3)), "head": {"w": jnp.array([0.7]), "b": jnp.array(-0.2)}}
CENTER = {"body": jnp.asarray(RNG.standard_normal(3)), "head": {"w": jnp.array([0.0]), "b": jnp.array(0.0)}}
GROUPS = {"body": "body", "head": "head"}
SCALES = {"body": jnp.array([0.3, 0.1, 0.6]), "head": 0.2}
BATCH = (X, Y)
LOG_NOISE = jnp.array(-0.4)


def model(w, h, x):
    return (x @ w["body"]) * (1 + 0 * w["head"]["w"]) + w["head"]["w"] * x[:, 0] + w["head"]["b"]


def elbo(**changes: Any) -> Any:
    options: dict[str, Any] = {"likelihood": "gaussian", "noise": jnp.exp, "kappa": "data", "rows": 6}
    options |= {"center": CENTER, "groups": GROUPS, "expectation": "linear"}
    return hg.objectives.elbo(changes.pop("model", model), **(options | changes))


def written_out(log_noise: float, kappa: float) -> float:
    """The loss of `elbo`, in NumPy, from the general KL divergence at given prior variances."""
    s2 = float(np.exp(2 * log_noise))
    head = (X[:, 0], np.ones(6))
    sigma2 = np.concatenate([np.asarray(SCALES["body"]) ** 2, [0.04, 0.04]])
    design = np.column_stack([np.asarray(X), *map(np.asarray, head)])
    mean = np.concatenate([np.asarray(WEIGHTS["body"]), [0.7, -0.2]])
    center = np.concatenate([np.asarray(CENTER["body"]), [0.0, 0.0]])
    square = (np.asarray(Y) - design @ mean) ** 2 + design**2 @ sigma2
    misfit = np.mean(0.5 * square / s2 + 0.5 * np.log(2 * np.pi * s2))
    divergence = 0.0
    for part in (slice(0, 3), slice(3, 5)):
        d, v, gap = len(mean[part]), sigma2[part], mean[part] - center[part]
        tau = (gap @ gap + v.sum()) / d
        divergence += 0.5 * np.sum((v + gap**2) / tau - 1 + np.log(tau / v))
    return misfit + divergence / (kappa * 6)


@pytest.fixture(scope="module")
def start():
    return hg.objectives.posterior(WEIGHTS, SCALES)


@pytest.mark.parametrize(("kappa", "number"), [("data", 5 / 6), (1.0, 1.0), (0.3, 0.3)])
def test_the_loss_is_its_formula(start, kappa, number):
    loss = jax.jit(elbo(kappa=kappa).inner_loss)
    assert relative_error(loss(start, LOG_NOISE, BATCH), written_out(-0.4, number)) < tol(1e-12, 1e-5)


def test_its_gradient_is_that_of_the_value_in_weights_scales_and_noise(start):
    loss = elbo().outer_loss
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(start, LOG_NOISE, BATCH)
    value = jax.jit(lambda at: loss(*at, BATCH))
    if jax.config.read("jax_enable_x64"):
        assert_trees_close(found, central_difference(value, (start, LOG_NOISE)), 1e-8)
    assert np.all(np.isfinite(np.asarray(found[0].raw_scale["body"])))


def test_prior_variances_are_the_closed_form(start):
    found = jax.jit(lambda q: hg.objectives.prior_variances(q, center=CENTER, groups=GROUPS))(start)
    gap = np.asarray(WEIGHTS["body"]) - np.asarray(CENTER["body"])
    body = (gap @ gap + np.sum(np.asarray(SCALES["body"]) ** 2)) / 3
    head = (0.7**2 + 0.2**2 + 2 * 0.2**2) / 2
    assert relative_error(found["body"], body) < tol(1e-12, 1e-5)
    assert relative_error(found["head"], head) < tol(1e-12, 1e-5)
    one = hg.objectives.posterior(WEIGHTS, 0.3)
    (tau,) = hg.objectives.prior_variances(one).values()
    assert relative_error(tau, (sum(np.sum(w**2) for w in jax.tree.leaves(WEIGHTS)) + 5 * 0.09) / 5) < tol(1e-12, 1e-5)


def test_a_sampled_expectation_is_unbiased_and_more_samples_are_their_mean(start, key):
    losses = {n: elbo(expectation="sampled", samples=n).inner_loss for n in (1, 4)}
    draws = jax.jit(
        lambda keys: {n: jax.vmap(lambda k, f=f: f(start, LOG_NOISE, BATCH, k))(keys) for n, f in losses.items()}
    )(jax.random.split(key, 4000))
    for sample in map(np.asarray, draws.values()):
        assert abs(sample.mean() - written_out(-0.4, 5 / 6)) < 4 * sample.std() / 4000**0.5
    assert np.std(draws[1]) / np.std(draws[4]) == pytest.approx(2, rel=0.15)


def test_at_kappa_one_it_is_below_the_evidence_with_its_own_prior_variances():
    w, h = jnp.asarray(RNG.standard_normal(3)), jnp.array(-0.4)
    start = hg.objectives.posterior(w, 0.3)
    loss = hg.objectives.elbo(
        lambda w, h, x: x @ w, likelihood="gaussian", kappa=1.0, rows=6, noise=jnp.exp, expectation="linear"
    ).inner_loss
    bound = -6 * float(jax.jit(loss)(start, h, BATCH))
    tau = float(hg.objectives.prior_variances(start)["all"])
    covariance = np.exp(-0.8) * np.eye(6) + tau * np.asarray(X) @ np.asarray(X).T
    quadratic = np.asarray(Y) @ np.linalg.solve(covariance, np.asarray(Y))
    evidence = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert bound < evidence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kappa": 0.0}, "elbo: kappa must be greater than 0, found 0"),
        ({"kappa": "date"}, "elbo: kappa must be positive numbers, one of 'data', or a function"),
        ({"noise": None}, "elbo: noise is the standard deviation"),
        ({"likelihood": "categorical", "noise": None}, "expectation='linear' needs likelihood='gaussian'"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, says):
    with pytest.raises((hg.InputError, hg.InputTypeError)) as error:
        elbo(**changes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "params", "says"),
    [
        ({"groups": {"body": "body", "head": {"w": "head", "b": {}}}}, None, "pytree prefix of weights"),
        ({"groups": {"body": "body"}}, None, "pytree prefix of weights, whose leaves are"),
        ({"center": {**CENTER, "body": jnp.zeros(2)}}, None, "center['body'] has shape (2,), expected (3,)"),
        ({}, WEIGHTS, "params must be a Posterior, found dict: write hg.objectives.posterior(weights)"),
        ({}, hg.objectives.Posterior(WEIGHTS, jnp.zeros(2)), "one number for a leaf of the weights, or one for each"),
    ],
)  # fmt: skip
def test_calls_that_cannot_work_are_refused(start, changes, params, says):
    with pytest.raises((hg.InputError, hg.InputTypeError)) as error:
        jax.eval_shape(elbo(**changes).inner_loss, start if params is None else params, LOG_NOISE, BATCH)
    assert says in str(error.value)


def test_a_group_without_weights_is_refused():
    weights = {"body": jnp.ones(3), "head": {}, "none": jnp.ones((0, 2))}
    for groups in ({"body": 0, "head": 1, "none": 0}, {"body": 0, "head": 0, "none": 1}):
        with pytest.raises(hg.InputError, match="elbo: groups: the group 1 holds no weights"):
            hg.objectives.prior_variances(hg.objectives.posterior(weights), groups=groups)


@pytest.mark.parametrize(
    ("scale", "says"),
    [(0.0, "scale must be greater than 0"), (jnp.exp, "found a function"), ({"body": 1.0}, "pytree prefix of weights")],
)
def test_a_posterior_that_cannot_be_is_refused(scale, says):
    with pytest.raises((hg.InputError, hg.InputTypeError), match=says):
        hg.objectives.posterior(WEIGHTS, scale)


def test_labels_that_are_no_classes_are_refused(start):
    loss = elbo(likelihood="categorical", noise=None, expectation="sampled").inner_loss
    with pytest.raises(hg.InputError, match="elbo: targets of likelihood='categorical' must be class numbers"):
        jax.eval_shape(loss, start, None, BATCH, jax.random.key(0))
    with pytest.raises(hg.InputError, match="weights are drawn from the posterior"):
        loss(start, None, BATCH, None)

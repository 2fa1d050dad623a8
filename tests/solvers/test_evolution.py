"""Evolution strategies against closed forms: losses quadratic in the hyperparameters, which no smoothing changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_close, tol

PyTree = Any
STEPS = 12
INNER = hg.inner.gradient(optax.sgd(0.3), steps=STEPS)


def inner_loss(w, h, batch):
    return 0.5 * jnp.sum((w - h["to"]) ** 2)


def outer_loss(w, h, batch):
    return 0.5 * jnp.sum((w - 1.0) ** 2) + jnp.sum(h["to"]), {"first": w[0]}


PROBLEM = hg.Problem(inner_loss, outer_loss)
HPARAMS = {"to": jnp.array([0.2, -0.4, 1.5])}


def path(h: PyTree, mean: bool) -> jax.Array:
    """The outer loss at the end of training, or its mean over the steps, in closed form: w_t = h (1 − .7ᵗ)."""
    t = jnp.arange(1, STEPS + 1)[:, None] if mean else jnp.array([[STEPS]])
    w = h["to"][None] * (1 - 0.7**t)
    return jnp.mean(jax.vmap(lambda w: outer_loss(w, h, None)[0])(w))


def averaged(solver: hg.Solver, calls: int, hparams: PyTree = HPARAMS, **options: Any) -> tuple[PyTree, Any]:
    """The mean hypergradient of several calls, and the last one."""
    state, step = solver.init(jnp.zeros(3), hparams, **options), jax.jit(solver.hypergrad)
    grads = []
    for i in range(calls):
        out, state = step(state, hparams, key=jax.random.key(i))
        assert out.info.status == hg.Status.OK
        grads.append(out.grad)
    return jax.tree.map(lambda *x: sum(x) / calls, *grads), (out, state)


@pytest.mark.parametrize("method", ["es", "pes", "nres"])
def test_whole_episodes_give_the_derivative_of_the_final_loss(method):
    pairs = 4000
    solver = hg.evolution(PROBLEM, inner=INNER, method=method, scale=0.1, pairs=pairs)
    grad, (out, state) = averaged(solver, 1)
    value, expected = jax.value_and_grad(path)(HPARAMS, False)
    np.testing.assert_allclose(out.value, value, rtol=tol(1e-12, 1e-5))
    np.testing.assert_allclose(solver.response(state, HPARAMS), HPARAMS["to"] * (1 - 0.7**STEPS), rtol=1e-5)
    error = np.linalg.norm(grad["to"] - expected["to"]) / np.linalg.norm(expected["to"])
    assert error <= 4 * out.info.error_estimate <= 0.2
    assert out.info.extra["pairs"] == pairs and out.metrics["first"] == state.params[0]


@pytest.mark.parametrize("method", ["pes", "nres"])
def test_over_an_episode_of_truncated_calls_the_mean_over_steps_is_differentiated_without_bias(method):
    solver = hg.evolution(PROBLEM, inner=INNER, method=method, scale=0.1, pairs=4000, truncate=3)
    grad, (out, _) = averaged(solver, STEPS // 3)
    expected = jax.grad(path)(HPARAMS, True)["to"]
    np.testing.assert_allclose(grad["to"], expected, atol=5 * float(out.info.error_estimate) * np.linalg.norm(expected))
    assert out.info.error_estimate < 0.1


def test_truncated_es_sees_the_influence_within_a_call_alone():
    solver = hg.evolution(PROBLEM, inner=INNER, method="es", scale=0.1, pairs=4000, truncate=3)
    grad, _ = averaged(solver, STEPS // 3)
    assert "truncation" in solver.about.biases[0]
    far = np.linalg.norm(grad["to"] - jax.grad(path)(HPARAMS, True)["to"])
    assert far > 0.1

    def truncated(h):  # the same, with the start of each call held fixed
        w, total = jnp.zeros(3), 0.0
        for t in range(STEPS):
            w = jax.lax.stop_gradient(w) if t % 3 == 0 else w
            w = w + 0.3 * (h["to"] - w)
            total += outer_loss(w, h, None)[0] / STEPS
        return total

    np.testing.assert_allclose(grad["to"], jax.grad(truncated)(HPARAMS)["to"], atol=0.06)


def test_influence_balancing():
    """Tallec & Ollivier's problem, on which truncation has the wrong sign (n = 23, T = 200, K = 10): +29.858."""
    n, length = 23, 200
    a, b = 0.5 * jnp.eye(n) + 0.5 * jnp.eye(n, k=1), jnp.where(jnp.arange(n) < 10, 1.0, -1.0)
    problem = hg.Problem(None, lambda x, theta, batch: 0.5 * (x[0] - 1) ** 2)
    inner = hg.inner.fixed_point(lambda x, theta, batch: a @ x + b * theta, steps=length)
    found = {}
    for method in ("nres", "es"):
        solver = hg.evolution(problem, inner=inner, method=method, scale=0.1, pairs=300, truncate=10)

        def episode(solver=solver):
            def call(state, i):
                out, state = solver.hypergrad(state, jnp.asarray(0.5), key=jax.random.fold_in(jax.random.key(3), i))
                return state, out.grad

            return jax.lax.scan(call, solver.init(jnp.ones(n), jnp.asarray(0.5)), jnp.arange(length // 10))[1].mean()

        found[method] = float(jax.jit(episode)())
    assert abs(found["nres"] - 29.858) < 4 and found["es"] < -10


def test_what_counts_errors_can_be_tuned():
    """A threshold in a loss that counts: no derivative anywhere."""
    x = jnp.linspace(-2, 2, 41)

    def count(w, h, batch):
        return jnp.mean((x > h) != (x > 0.3)) + 0.0 * jnp.sum(w)

    problem = hg.Problem(lambda w, h, batch: 0.5 * jnp.sum(w**2), count)
    assert jax.grad(lambda h: count(jnp.zeros(1), h, None))(1.5) == 0
    solver = hg.evolution(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=1), scale=0.3, pairs=30)
    result = hg.tune(
        solver, jnp.zeros(1), 1.5, outer=optax.adam(0.1), steps=60, key=jax.random.key(0), progress=False,
        steps_per_call=20,
    )  # fmt: skip
    assert result.best.value <= 0.025 and abs(float(result.best.hparams) - 0.3) < 0.1


def test_some_follow_gradients_and_the_others_evolve(x64):
    def loss(w, h, batch):
        return 0.5 * jnp.sum((w - h["a"]) ** 2) + 0.5 * h["b"] ** 2 * jnp.sum(w**2)

    problem = hg.Problem(loss, lambda w, h, batch: 0.5 * jnp.sum((w - 0.3) ** 2))
    hparams = {"a": jnp.array([0.4, 1.0]), "b": jnp.asarray(0.5)}
    exact = hg.unrolled(problem, inner=INNER)
    expected, _ = jax.jit(exact.hypergrad)(exact.init(jnp.zeros(2), hparams), hparams)
    solver = hg.evolution(problem, inner=INNER, method="es", scale=0.02, pairs=3000, evolve={"a": False, "b": True})
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(2), hparams), hparams, key=jax.random.key(1))
    assert_trees_close(out.grad["a"], expected.grad["a"], tol(1e-10, 1e-5))
    np.testing.assert_allclose(out.grad["b"], expected.grad["b"], rtol=0.1)
    assert float(out.value) == pytest.approx(float(expected.value), rel=1e-5)
    assert out.info.error_estimate < 0.1


def test_domains_are_perturbed_in_their_own_coordinates():
    problem = hg.Problem(lambda w, h, b: 0.5 * jnp.sum((w - jnp.log(h)) ** 2), lambda w, h, b: jnp.sum(w))
    domain = hg.domains.log()
    solver = hg.evolution(problem, inner=INNER, method="es", scale=0.5, pairs=2000, domain=domain)
    hparams = jnp.array([1e-3])
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(1), hparams), hparams, key=jax.random.key(1))
    np.testing.assert_allclose(out.grad * hparams, 1 - 0.7**STEPS, rtol=0.1)  # d w / d log h


def test_a_pair_that_is_lost_is_left_out_until_its_episode_ends():
    inner = hg.inner.gradient(lambda h: optax.sgd(h), steps=4)
    problem = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum(w**2), lambda w, h, b: jnp.where(h > 0.6, jnp.nan, jnp.sum(w**2))
    )
    solver = hg.evolution(problem, inner=inner, scale=0.1, pairs=64, truncate=2)
    state, step = solver.init(jnp.ones(1), 0.5), jax.jit(solver.hypergrad)
    counts = []
    for i in range(6):
        out, state = step(state, 0.5, key=jax.random.key(i))
        assert out.info.status == hg.Status.OK and np.isfinite(out.grad)
        counts.append(int(out.info.extra["pairs"]))
    assert all(0 < count < 64 for count in counts)
    assert counts[1] <= counts[0] and counts[3] <= counts[2], "within an episode none comes back"
    assert max(counts[2], counts[4]) > min(counts[1], counts[3]), "with a new episode they do"
    lost = hg.evolution(
        hg.Problem(problem.inner_loss, lambda w, h, b: jnp.nan * jnp.sum(w)), inner=inner, scale=0.1, pairs=4
    )
    out, state = jax.jit(lost.hypergrad)(lost.init(jnp.ones(1), 0.5), 0.5, key=jax.random.key(0))
    assert out.info.status == hg.Status.NONFINITE_LOSS and np.all(np.isfinite(state.params))


def test_a_single_pair_knows_nothing_of_its_error():
    solver = hg.evolution(PROBLEM, inner=INNER, pairs=1)
    _, (out, _) = averaged(solver, 1)
    assert out.info.error_estimate == np.inf


def test_evaluate_is_the_run_without_perturbation():
    solver = hg.evolution(PROBLEM, inner=INNER, pairs=2, truncate=4)
    assert solver.evaluate is not None
    state = solver.init(jnp.zeros(3), HPARAMS)
    values = []
    for _ in range(STEPS // 4):
        value, info, state = solver.evaluate(state, HPARAMS)
        assert info.status == hg.Status.OK
        values.append(value)
    np.testing.assert_allclose(np.mean(values), path(HPARAMS, True), rtol=tol(1e-12, 1e-5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 0}, "pairs must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"method": "cma"}, "method must be"),
        ({"truncate": 5}, "truncate must divide the 12 steps"),
        ({"inner": hg.inner.lbfgs()}, "inner must be a number of training steps"),
        ({"evolve": {"to": False}}, "where nothing evolves use hg.unrolled"),
        ({"evolve": True, "truncate": 3}, "need whole episodes"),
    ],
)
def test_mistakes_are_named_before_anything_compiles(options, words):
    with pytest.raises(hg.InputError, match=words):
        hg.evolution(PROBLEM, **{"inner": INNER} | options)


def test_a_call_needs_a_key_and_an_evolve_that_fits():
    solver = hg.evolution(PROBLEM, inner=INNER, pairs=2)
    with pytest.raises(hg.InputError, match="key is None: pass key="):
        solver.hypergrad(solver.init(jnp.zeros(3), HPARAMS), HPARAMS)
    solver = hg.evolution(PROBLEM, inner=INNER, pairs=2, evolve={"other": True})
    with pytest.raises(
        hg.InputError,
        match=r"evolution: evolve must be one value, or a pytree prefix.* leaves are \['to'\]",
    ):
        solver.init(jnp.zeros(3), HPARAMS)

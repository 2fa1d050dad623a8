"""The hypergradient of T steps is the derivative of those T steps, whatever the optimizer, the mode and what is stored;
and what a run carries along: batches, keys, the model's state, counters, and the state of the solver.

Runs of training are written out in NumPy and float64, and differentiated by central differences: no automatic
differentiation and no code of the library on that side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy import ndarray

import hypergrad as hg
from hypergrad._problem import bind_inner, bind_outer
from tests._helpers import assert_trees_close, assert_trees_equal, central_difference, relative_error, tol

STEPS = 11
ROOT = np.array([[1.1, 0.3, -0.2], [0.0, 0.8, 0.4], [0.5, 0.1, 0.6]], np.float32).astype(float)
A, B, C = ROOT @ ROOT.T, np.array([0.75, -0.5, 1.25]), np.array([0.5, -1.5, 0.25])
START = np.array([0.5, -0.25, 1.0])
MODES = {
    "forward": {"mode": "forward"},
    "none": {"mode": "reverse", "remat": "none"},
    "step": {"mode": "reverse", "remat": "step"},
    "sqrt": {"mode": "reverse", "remat": "sqrt"},
    "tree": {"mode": "reverse", "remat": "tree"},
    "gradient": {"mode": "reverse", "remat": "gradient"},
}
OF_MAPS = [mode for mode in MODES if mode != "gradient"]  # a map has no update that could be replayed


def quadratic(w, h, batch):
    """½ wᵀAw − bᵀw + ½ Σ exp(l2) w², with w offset by h["start"] where there is one."""
    w = w + h["start"] if "start" in h else w
    decay = 0.5 * jnp.sum(jnp.exp(h["l2"]) * w**2) if "l2" in h else 0.0
    return 0.5 * w @ jnp.asarray(A) @ w - jnp.asarray(B) @ w + decay


def distance(w, h, batch):
    """½ ‖w − c‖² + 0.3 Σ l2, which has a direct term."""
    w = w + h["start"] if "start" in h else w
    return 0.5 * jnp.sum((w - jnp.asarray(C)) ** 2) + (0.3 * jnp.sum(h["l2"]) if "l2" in h else 0.0)


PROBLEM = hg.Problem(quadratic, distance)


def slope(w: ndarray, h: dict[str, ndarray]) -> ndarray:
    return A @ w - B + (np.exp(h["l2"]) * w if "l2" in h else 0.0)


def height(w: ndarray, h: dict[str, ndarray]) -> float:
    return 0.5 * np.sum((w - C) ** 2) + (0.3 * np.sum(h["l2"]) if "l2" in h else 0.0)


class Run(NamedTuple):
    """An optimizer in optax, and the same run by hand.

    Attributes:
        optimizer: `hparams -> optimizer`.
        hparams: pytree of float64 NumPy arrays, none of them 0 or 1.
        train: `(w, hparams) -> w_T` in NumPy.
    """

    optimizer: Callable[[Any], optax.GradientTransformation]
    hparams: dict[str, ndarray]
    train: Callable[[ndarray, dict[str, ndarray]], ndarray]


def descent(w, h):
    for t in range(STEPS):
        w = w - (h["lr"][t] if np.ndim(h["lr"]) else h["lr"]) * slope(w, h)
    return w


def momentum(w, h, nesterov=False):
    v = np.zeros_like(w)
    for _ in range(STEPS):
        g = slope(w, h)
        v = h["m"] * v + g
        w = w - h["lr"] * (g + h["m"] * v if nesterov else v)
    return w


def adam(w, h, decay=0.0):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, STEPS + 1):
        g = slope(w, h)
        m, v = h["b1"] * m + (1 - h["b1"]) * g, h["b2"] * v + (1 - h["b2"]) * g**2
        unbiased = m / (1 - h["b1"] ** t), v / (1 - h["b2"] ** t)
        w = w - h["lr"] * (unbiased[0] / (np.sqrt(unbiased[1]) + h["eps"]) + h.get("wd", decay) * w)
    return w


def from_start(w, h):
    return descent(w + h["start"], h)


RUNS = {
    "learning rate": Run(lambda h: optax.sgd(h["lr"]), {"lr": np.array(0.23)}, descent),
    "learning rate of each step": Run(
        lambda h: optax.sgd(lambda t: h["lr"][t]), {"lr": np.linspace(0.31, 0.12, STEPS)}, descent
    ),
    "weight decay": Run(
        lambda h: optax.sgd(h["lr"]), {"lr": np.array(0.23), "l2": np.array([-1.3, 0.4, -0.7])}, descent
    ),
    "momentum": Run(
        lambda h: optax.sgd(h["lr"], momentum=h["m"]), {"lr": np.array(0.13), "m": np.array(0.63)}, momentum
    ),
    "nesterov": Run(
        lambda h: optax.sgd(h["lr"], momentum=h["m"], nesterov=True),
        {"lr": np.array(0.13), "m": np.array(0.63)},
        lambda w, h: momentum(w, h, nesterov=True),
    ),
    "adam": Run(
        lambda h: optax.adam(h["lr"], h["b1"], h["b2"], h["eps"]),
        {"lr": np.array(0.11), "b1": np.array(0.83), "b2": np.array(0.94), "eps": np.array(0.02)},
        adam,
    ),
    "adamw": Run(
        lambda h: optax.adamw(h["lr"], h["b1"], h["b2"], h["eps"], weight_decay=h["wd"]),
        {k: np.array(v) for k, v in {"lr": 0.11, "b1": 0.83, "b2": 0.94, "eps": 0.02, "wd": 0.17}.items()},
        adam,
    ),
    "starting point": Run(
        lambda h: optax.sgd(h["lr"]),
        {"lr": np.array(0.23), "start": np.array([0.3, -0.8, 0.45]), "l2": np.array(-0.9)},
        from_start,
    ),
}


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def hypergradient(optimizer: Any, hparams: Any, steps: int = STEPS, problem=PROBLEM, calls: int = 1, **options: Any):
    """`(out, state)` after some calls."""
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optimizer, steps=steps), **options)
    state, step = solver.init(jnp.asarray(START), arrays(hparams)), jax.jit(solver.hypergrad)
    out = None
    for _ in range(calls):
        out, state = step(state, arrays(hparams))
    return out, state


def in_every_mode(
    inner: Any, hparams: Any, problem=PROBLEM, modes: Iterable[str] = tuple(MODES), **options: Any
) -> dict[str, Any]:
    """`(out, state)` of one call by mode: one program, in which what the modes have in common is compiled once."""
    solvers = {mode: hg.unrolled(problem, inner=inner, **MODES[mode], **options) for mode in modes}

    @jax.jit
    def run(hparams: Any) -> dict[str, Any]:
        return {name: s.hypergrad(s.init(jnp.asarray(START), hparams), hparams) for name, s in solvers.items()}

    return run(arrays(hparams))


@pytest.mark.parametrize("name", RUNS)
def test_the_hypergradient_of_a_run_equals_its_central_differences(name):
    run = RUNS[name]
    value = lambda h: height(run.train(START, jax.tree.map(np.asarray, h)), jax.tree.map(np.asarray, h))
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, central_difference(value, run.hparams))
    inner, offset = hg.inner.gradient(run.optimizer, steps=STEPS), run.hparams.get("start", 0.0)
    for mode, (out, state) in in_every_mode(inner, run.hparams, modes=("forward", "step")).items():
        assert int(out.info.status) == hg.Status.OK
        np.testing.assert_allclose(float(out.value), value(run.hparams), rtol=tol(1e-12, 1e-5))
        assert relative_error(state.params + offset, run.train(START, run.hparams)) <= tol(1e-12, 1e-5)
        for leaf, found in out.grad.items():
            assert relative_error(found, expected[leaf]) <= tol(1e-7, 1e-3), (mode, leaf)


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_the_derivative_in_the_learning_rate_equals_its_closed_form(steps):
    """With b = 0: w_T = (I − ηA)ᵀ w₀ and dw_T/dη = −T A (I − ηA)ᵀ⁻¹ w₀, to the power T."""
    rate = 0.37
    problem = hg.Problem(lambda w, h, b: 0.5 * w @ jnp.asarray(A) @ w, distance)
    out, _ = hypergradient(lambda h: optax.sgd(h["lr"]), {"lr": np.array(rate)}, steps, problem)
    shrink = np.linalg.matrix_power(np.eye(3) - rate * A, steps - 1)
    end = (np.eye(3) - rate * A) @ shrink @ START
    expected = (end - C) @ (-steps * A @ shrink @ START)
    assert relative_error(out.grad["lr"], expected) <= tol(1e-12, 1e-4)


def _curved(w, h, batch):
    """Not quadratic, and with a term of λ in every coordinate."""
    return 0.5 * w @ jnp.asarray(A) @ w + jnp.sum(jnp.exp(h["l2"]) * w**4) + jnp.sum(jnp.sin(w)) * h["tilt"]


@pytest.mark.parametrize("steps", [1, 12, 67])
def test_forward_and_reverse_agree_whatever_is_stored(steps):
    problem = hg.Problem(_curved, distance)
    hparams = {"l2": np.array([-1.3, -2.4, -1.7]), "tilt": np.array(0.3), "lr": np.array(0.05), "m": np.array(0.35)}
    inner = hg.inner.gradient(lambda h: optax.adam(h["lr"], b1=h["m"]), steps=steps)
    found = in_every_mode(inner, hparams, problem)
    expected, end = found["none"]
    for name, (out, state) in found.items():
        assert int(out.info.status) == hg.Status.OK, name
        assert_trees_close(out.grad, expected.grad, tol(1e-12, 1e-3))
        assert_trees_close(state.params, end.params, tol(1e-14, 1e-5))
        assert int(out.info.inner_steps) == steps
        np.testing.assert_allclose(float(out.info.inner_residual), float(expected.info.inner_residual), rtol=1e-4)


def test_no_steps_leave_the_direct_term():
    hparams = {"l2": np.array([-1.3, 0.4, -0.7])}
    for out, state in in_every_mode(hg.inner.gradient(optax.sgd(0.1), steps=0), hparams).values():
        np.testing.assert_allclose(out.grad["l2"], 0.3, rtol=1e-6)
        np.testing.assert_allclose(state.params, START)


def test_an_unrolled_map_equals_the_descent_it_writes_out():
    hparams = {"l2": np.array([-1.3, 0.4, -0.7]), "lr": np.array(0.21)}
    expected, _ = hypergradient(lambda h: optax.sgd(h["lr"]), hparams, mode="reverse")
    move = lambda w, h, batch: w - h["lr"] * jax.grad(quadratic)(w, h, batch)
    for out, _ in in_every_mode(hg.inner.fixed_point(move, steps=STEPS), hparams, modes=OF_MAPS).values():
        assert int(out.info.status) == hg.Status.OK
        assert_trees_close(out.grad, expected.grad, tol(1e-13, 1e-5))
    with pytest.raises(hg.InputError, match=r'remat="gradient" replays .*write remat="sqrt"'):
        hg.unrolled(PROBLEM, inner=hg.inner.fixed_point(move, steps=STEPS), remat="gradient")


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_truncation_equals_the_explicit_sum_over_the_last_steps(kept):
    """Σ_{t ≥ T−K} ∂w_T/∂w_{t+1} ∂w_{t+1}/∂λ, with ∂w_{t+1}/∂w_t = I − ηH and ∂w_{t+1}/∂l2 = −η exp(l2) w_t."""
    rate, l2 = 0.21, np.array([-1.3, 0.4, -0.7])
    shrink = np.eye(3) - rate * (A + np.diag(np.exp(l2)))
    path = [START]
    for _ in range(STEPS):
        path.append(path[-1] - rate * slope(path[-1], {"l2": l2}))
    terms = [
        (path[-1] - C) @ np.linalg.matrix_power(shrink, STEPS - 1 - t) * -rate * np.exp(l2) * path[t]
        for t in range(STEPS - kept, STEPS)
    ]
    inner, modes = hg.inner.gradient(optax.sgd(rate), steps=STEPS), ("forward", "none", "step", "sqrt", "gradient")
    for mode, (out, state) in in_every_mode(inner, {"l2": l2}, modes=modes, truncate=kept).items():
        assert relative_error(out.grad["l2"], 0.3 + np.sum(terms, axis=0)) <= tol(1e-12, 1e-5), mode
        assert relative_error(state.params, path[-1]) <= tol(1e-14, 1e-6)
        assert float(out.info.error_estimate) > 0.01


def test_truncation_to_all_steps_is_none_and_to_more_is_refused():
    full, _ = hypergradient(optax.sgd(0.2), {"l2": np.array([-1.3, 0.4, -0.7])})
    same, _ = hypergradient(optax.sgd(0.2), {"l2": np.array([-1.3, 0.4, -0.7])}, truncate=STEPS)
    assert_trees_equal(full, same)
    with pytest.raises(hg.InputError, match=f"truncate must be at most the {STEPS} steps of inner, found {STEPS + 5}"):
        hypergradient(optax.sgd(0.2), {"l2": np.array([-1.3, 0.4, -0.7])}, truncate=STEPS + 5)


def test_example_weights_through_a_long_run_equal_the_weighted_least_squares():
    r"""w* = (Xᵀ S X + εI)⁻¹ Xᵀ S y with S = diag(s); ∂w*/∂s_i = H⁻¹ x_i (y_i − x_iᵀ w*)."""
    rng = np.random.default_rng(3)
    x, y, s = rng.normal(size=(9, 3)), rng.normal(size=9), rng.uniform(0.2, 0.9, 9)
    x, y, s = (v.astype(np.float32).astype(float) for v in (x, y, s))
    problem = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum(h * (b[0] @ w - b[1]) ** 2) + 0.05 * jnp.sum(w**2),
        lambda w, h, b: distance(w, {}, b),
    )
    hess = x.T @ (s[:, None] * x) + 0.1 * np.eye(3)
    w = np.linalg.solve(hess, x.T @ (s * y))
    expected = (x @ np.linalg.solve(hess, w - C)) * (y - x @ w)
    rate = 1.5 / np.linalg.eigvalsh(hess)[-1]
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(rate), steps=600))
    hparams, batch = jnp.asarray(s), (jnp.asarray(x), jnp.asarray(y))
    out, _ = jax.jit(solver.hypergrad)(solver.init(jnp.zeros(3), hparams), hparams, batch)
    assert relative_error(out.grad, expected) <= tol(1e-10, 1e-4)
    assert int(out.info.status) == hg.Status.OK


def test_the_optimizers_initial_state_may_depend_on_the_hyperparameters():
    """A velocity that starts at v₀: w_T moves by −η Σ_t mᵗ … v₀, which central differences see."""

    def optimizer(h):
        def init(params):
            return {"velocity": h["v0"] * jnp.ones_like(params), "count": jnp.zeros((), jnp.int32)}

        def update(grads, state, params=None):
            velocity = 0.7 * state["velocity"] + grads
            return -0.1 * velocity, {"velocity": velocity, "count": state["count"] + 1}

        return optax.GradientTransformation(init, update)

    def train(h):
        w, v = START, h["v0"] * np.ones(3)
        for _ in range(STEPS):
            v = 0.7 * v + slope(w, {})
            w = w - 0.1 * v
        return height(w, {})

    hparams = {"v0": np.array(0.45)}
    step = 1e-3
    expected = (train({"v0": 0.45 + step}) - train({"v0": 0.45 - step})) / (2 * step)  # quadratic in v0: exact
    for name, (out, _) in in_every_mode(hg.inner.gradient(optimizer, steps=STEPS), hparams).items():
        assert relative_error(out.grad["v0"], expected) <= tol(1e-9, 1e-4), name


def test_the_scale_of_the_outer_loss_scales_the_hypergradient_and_nothing_else():
    problem = hg.Problem(quadratic, lambda w, h, scale: scale * distance(w, h, None))
    hparams = arrays({"l2": np.array([-1.3, 0.4, -0.7])})
    solvers = [hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.2), steps=STEPS), **o) for o in MODES.values()]
    run = jax.jit(lambda scale: [s.hypergrad(s.init(START, hparams), hparams, None, scale)[0] for s in solvers])
    one, *others = (run(jnp.asarray(x, jnp.result_type(float))) for x in (1.0, 1e-30, 1e30))
    for scale, in_each_mode in zip((1e-30, 1e30), others, strict=True):
        for out, expected in zip(in_each_mode, one, strict=True):
            np.testing.assert_allclose(np.asarray(out.grad["l2"]) / scale, expected.grad["l2"], rtol=tol(1e-12, 1e-5))
            assert int(out.info.status) == hg.Status.OK
            growth = [out.info.extra["adjoint_growth"], expected.info.extra["adjoint_growth"]]
            np.testing.assert_allclose(*growth, rtol=1e-3)


def test_loops_and_branches_inside_the_loss_are_differentiated_in_every_mode():
    def loss(w, h, batch):
        z, _ = jax.lax.scan(lambda z, _: (jnp.tanh(0.8 * z + w), None), w, None, length=3)
        z = jax.lax.cond(jnp.sum(z) > 0, lambda z: z, lambda z: 0.5 * z, z)
        return quadratic(w, {}, batch) + jnp.sum(jnp.exp(h["l2"]) * z**2)

    problem = hg.Problem(loss, lambda w, h, b: distance(w, {}, b))
    hparams = {"l2": np.array([-1.3, 0.4, -0.7])}
    found = in_every_mode(hg.inner.gradient(optax.sgd(0.1), steps=STEPS), hparams, problem)
    for out, _ in found.values():
        assert_trees_close(out.grad, found["none"][0].grad, tol(1e-12, 1e-4))


# What a run of training carries along.

RNG = np.random.default_rng(5)
X, W = RNG.normal(size=(40, 3)), RNG.normal(size=3)
TRAIN = (jnp.asarray(X), jnp.asarray(X @ W + 0.3 * RNG.normal(size=40)))
VALID = (jnp.asarray(X[::-1].copy()), jnp.asarray(X[::-1] @ W))
HPARAMS = {"l2": jnp.asarray(np.array([-1.3, 0.4, -0.7])), "noise": jnp.asarray(0.31)}


def noisy(w, h, batch, key):
    """Ridge on jittered inputs: the key matters, and so does every hyperparameter."""
    x, y = batch
    x = x + h["noise"] * jax.random.normal(key, x.shape, x.dtype)
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(h["l2"]) * w**2)


def fit(w, h, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 0.1 * jnp.sum(h["l2"])


def by_hand(problem, optimizer, params, hparams, train, valid, key, steps):
    """Outer loss and gradient through a Python loop over the same batches and keys."""
    inner_key, outer_key, _ = jax.random.split(key, 3)
    objective, outer = bind_inner(problem, train, inner_key, None), bind_outer(problem, valid, outer_key, None)

    def value(hparams):
        w, state = params, optimizer.init(params)
        for t in range(steps):
            updates, state = optimizer.update(
                jax.grad(lambda w: objective.stochastic(w, hparams, None, t)[0])(w), state, w
            )
            w = optax.apply_updates(w, updates)
        return outer(w, hparams)[0], w

    return jax.value_and_grad(value, has_aux=True)(hparams)


@pytest.mark.parametrize("mode", MODES)
def test_a_key_determines_the_run_which_is_that_of_a_loop_over_its_batches(mode):
    problem = hg.Problem(noisy, fit)
    optimizer, steps = optax.sgd(0.1, momentum=0.6), 6
    train, valid, key = hg.minibatches(TRAIN, 8), hg.minibatches(VALID, 8), jax.random.key(7)
    (value, end), grad = by_hand(problem, optimizer, jnp.zeros(3), HPARAMS, train, valid, key, steps)
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optimizer, steps=steps), **MODES[mode])
    state, step = solver.init(jnp.zeros(3), HPARAMS), jax.jit(solver.hypergrad)
    out, after = step(state, HPARAMS, train, valid, key=key)
    assert_trees_close(out.grad, grad, tol(1e-12, 1e-4))
    np.testing.assert_allclose(out.value, value, rtol=tol(1e-12, 1e-5))
    assert_trees_close(after.params, end, tol(1e-12, 1e-5))
    again, _ = step(state, HPARAMS, train, valid, key=key)
    assert_trees_equal(again, out)
    other, _ = step(state, HPARAMS, train, valid, key=jax.random.key(8))
    assert relative_error(other.grad, out.grad) > 1e-3


def with_state(w, h, batch, model_state):
    """The model's state enters the loss and moves with the parameters; there is a counter in it, too."""
    loss = 0.5 * jnp.sum((w - jnp.exp(h)) ** 2) + jnp.sum(model_state["mean"] * w**2)
    return loss, {"mean": 0.5 * model_state["mean"] + 0.1 * w, "count": model_state["count"] + 1}


def through_state(w, h, batch, model_state):
    return jnp.sum(w**2) + jnp.sum(model_state["mean"] * w)


@pytest.mark.parametrize("mode", MODES)
def test_the_derivative_goes_through_the_state_of_the_model(mode):
    """w ← w − η (w − eʰ + 2 μ w), μ ← μ/2 + w/10: dw ← (1 − η − 2ημ) dw − 2ηw dμ + η eʰ, dμ ← dμ/2 + dw/10."""
    rate, steps, h = 0.2, 5, 0.3
    w, tangent, mean, drift = np.array([0.4, -0.2]), np.zeros(2), np.array([0.1, 0.3]), np.zeros(2)
    for _ in range(steps):
        new = w - rate * (w - np.exp(h) + 2 * mean * w)
        turned = (1 - rate - 2 * rate * mean) * tangent - 2 * rate * w * drift + rate * np.exp(h)
        mean, drift = 0.5 * mean + 0.1 * w, 0.5 * drift + 0.1 * tangent
        w, tangent = new, turned
    solver = hg.unrolled(
        hg.Problem(with_state, through_state, model_state=True),
        inner=hg.inner.gradient(optax.sgd(rate), steps=steps),
        **MODES[mode],
    )
    begin = {"mean": jnp.asarray(np.array([0.1, 0.3])), "count": jnp.int32(0)}
    state = solver.init(jnp.asarray(np.array([0.4, -0.2])), h, model_state=begin)
    out, after = jax.jit(solver.hypergrad)(state, h)
    assert relative_error(out.grad, np.sum((2 * w + mean) * tangent + w * drift)) <= tol(1e-12, 1e-5)
    assert relative_error(after.model_state["mean"], mean) <= tol(1e-12, 1e-5)
    assert relative_error(after.params, w) <= tol(1e-12, 1e-5)
    assert int(after.model_state["count"]) == steps and after.model_state["count"].dtype == jnp.int32


def bowl(w, h, batch):
    return 0.5 * jnp.sum(jnp.asarray([0.5, 1.0, 2.0]) * w**2) - jnp.sum(h["b"] * w)


def cubes(w, h, batch):
    return jnp.sum(w**3)


PULL = {"b": np.array([0.3, -0.7, 0.45])}


def adam(steps: int, **options: Any):
    inner = hg.inner.gradient(optax.adam(0.1), steps=steps)
    solver = hg.unrolled(hg.Problem(bowl, cubes), inner=inner, **options)
    return solver, solver.init(jnp.asarray(START), jax.tree.map(jnp.asarray, PULL)), jax.tree.map(jnp.asarray, PULL)


def test_cold_calls_repeat_themselves_to_the_bit():
    """But for the estimate, which the first call measures and the second takes from there."""
    solver, state, hparams = adam(6)
    step = jax.jit(solver.hypergrad)
    first, after = step(state, hparams)
    second, later = step(after, hparams)
    told, again = first.info.error_estimate, second.info.error_estimate
    assert_trees_equal(first._replace(info=first.info._replace(error_estimate=again)), second)
    assert told / 4 <= again <= 4 * told
    assert_trees_equal(after._replace(trust=later.trust), later)
    assert [int(state.trust.calls) for state in (after, later)] == [1, 2]
    assert_trees_equal(after.start[0], jnp.asarray(START))
    assert relative_error(solver.response(after, hparams), START) > 0.1


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_warm_calls_go_on_and_differentiate_their_own_steps(mode):
    """Two warm calls of 6 steps are one run of 12, of which the second differentiates the last 6."""
    solver, state, hparams = adam(6, warm_start=True, **MODES[mode])
    step = jax.jit(solver.hypergrad)
    _, state = step(state, hparams)
    out, state = step(state, hparams)
    long, begin, _ = adam(12, truncate=6, **MODES[mode])
    expected, end = jax.jit(long.hypergrad)(begin, hparams)
    assert_trees_close(out.grad, expected.grad, tol(1e-12, 1e-4))
    assert_trees_close(state.params, end.params, tol(1e-12, 1e-5))
    assert_trees_close(state.inner_state, end.inner_state, tol(1e-12, 1e-5))
    assert state.start is None
    assert float(out.info.error_estimate) < tol(1e-12, 1e-4)  # against its own steps, not against all twelve


def with_coordinates(optimizer: Any, size: int, *modes: str) -> list[hg.Hypergradient]:
    """Of a run with one coordinate that matters, one that does not, and perhaps one whose gradient is always zero."""

    def loss(w, h, batch):
        return 0.5 * jnp.sum((jnp.asarray([1.0, 2.0, 0.0][: w.size]) * w) ** 2) - h["b"] * w[0]

    inner = hg.inner.gradient(lambda h: optimizer(h["lr"]), steps=4)
    problem = hg.Problem(loss, lambda w, h, b: jnp.sum(w[:2] ** 2))
    solvers = [hg.unrolled(problem, inner=inner, **MODES[mode]) for mode in modes]
    start = jnp.asarray(START[:size])
    hparams = {"lr": jnp.asarray(0.1), "b": jnp.asarray(0.45)}
    return jax.jit(lambda h: [solver.hypergrad(solver.init(start, h), h)[0] for solver in solvers])(hparams)


@pytest.mark.parametrize("optimizer", [optax.adam, optax.adamw, optax.amsgrad, optax.rmsprop])
def test_a_coordinate_whose_gradient_is_always_zero_gives_no_nan(optimizer):
    """And the other coordinates get what they would get without it."""
    (expected,) = with_coordinates(optimizer, 2, "step")
    for mode, out in zip(MODES, with_coordinates(optimizer, 3, *MODES), strict=True):
        assert int(out.info.status) == hg.Status.OK, mode
        assert np.all(np.isfinite([out.grad["lr"], out.grad["b"]])), mode
        assert_trees_close(out.grad, expected.grad, tol(1e-12, 1e-3))


@pytest.mark.parametrize("mode", MODES)
def test_keys_and_counters_in_the_optimizers_state_are_carried_and_not_differentiated(mode):
    inner = hg.inner.gradient(
        lambda h: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(h["lr"])), steps=5
    )
    problem = hg.Problem(lambda w, h, b: bowl(w, {"b": jnp.asarray(PULL["b"])}, b), cubes)
    solver = hg.unrolled(problem, inner=inner, **MODES[mode])
    hparams = {"lr": jnp.asarray(0.2)}
    state, step = solver.init(jnp.asarray(START), hparams), jax.jit(solver.hypergrad)
    out, after = step(state, hparams)
    size = 1e-4
    near = [float(step(state, {"lr": jnp.asarray(0.2 + s * size)})[0].value) for s in (1, -1)]
    assert relative_error(out.grad["lr"], (near[0] - near[1]) / (2 * size)) <= tol(1e-6, 1e-1)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(
        jnp.result_type(a) == jnp.result_type(b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True)
    )


def test_each_leaf_keeps_its_dtype_whatever_the_others_are():
    """Half-precision weights beside single ones, under a loss in their common precision."""

    def loss(w, h, batch):
        z = w["half"].astype(jnp.float32) + w["single"]
        return jnp.mean((z - h["target"]) ** 2)

    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(3, jnp.float32)}
    hparams = {"target": jnp.asarray(0.3), "lr": jnp.asarray(0.1, jnp.float32)}
    inner = hg.inner.gradient(lambda h: optax.adam(h["lr"]), steps=4)
    solvers = [hg.unrolled(hg.Problem(loss, loss), inner=inner, **mode) for mode in MODES.values()]
    state = solvers[0].init(params, hparams)
    for out, after in jax.jit(lambda state, h: [solver.hypergrad(state, h) for solver in solvers])(state, hparams):
        assert int(out.info.status) == hg.Status.OK
        for found, given in ((after.params, params), (out.grad, hparams), (after.inner_state, state.inner_state)):
            assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(given)]


@pytest.mark.parametrize("mode", OF_MAPS)
def test_a_derivative_without_a_correct_digit_is_not_called_one(mode):
    """The logistic map w ← λ w (1 − w): at 2.8 it ends in 1 − 1/λ, whose slope is 1/λ²; at 3.9 it is chaotic."""
    inner = hg.inner.fixed_point(lambda w, h, batch: h * w * (1 - w), steps=150)
    solver = hg.unrolled(hg.Problem(bowl, lambda w, h, batch: w[0]), inner=inner, **MODES[mode])
    state, step = solver.init(jnp.asarray([0.3]), jnp.asarray(2.8)), jax.jit(solver.hypergrad)
    tame, _ = step(state, jnp.asarray(2.8))
    assert int(tame.info.status) == hg.Status.OK
    assert relative_error(tame.grad, 1 / 2.8**2) <= tol(1e-12, 1e-5)
    wild, _ = step(state, jnp.asarray(3.9))
    assert int(wild.info.status) == hg.Status.UNROLL_EXPLODED
    assert float(wild.info.error_estimate) > 0.1

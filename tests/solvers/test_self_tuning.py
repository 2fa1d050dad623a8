"""Self-tuning: the optimum of ridge regression by a learned response, whole numbers, scales, and every mistake."""

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
DTYPE = jnp.result_type(float)
RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=5)


def _data(rows: int) -> PyTree:
    x = RNG.normal(size=(rows, 5))
    return jnp.asarray(x, DTYPE), jnp.asarray(x @ TRUE + RNG.normal(size=rows), DTYPE)


TRAIN, VALID = _data(20), _data(40)


@jax.jit
def _error(w: PyTree, batch: PyTree) -> jax.Array:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def _ridge_loss(w: PyTree, l2: PyTree, batch: PyTree) -> jax.Array:
    return 0.5 * _error(w, batch) + 0.5 * l2 * jnp.sum(w**2)


RIDGE = hg.Problem(_ridge_loss, lambda w, l2, batch: _error(w, batch))
LOG = hg.domains.log()


@jax.jit
def _solution(l2: PyTree) -> jax.Array:
    x, y = TRAIN
    return jnp.linalg.solve(x.T @ x / 20 + l2 * jnp.eye(5, dtype=DTYPE), x.T @ y / 20)


def _solver(problem: hg.Problem = RIDGE, **options: Any) -> hg.Solver:
    return hg.self_tuning(problem, **{"optimizer": optax.adam(0.02), "steps": 5, **options})


class Calls:
    """Compiled calls of a solver, counting traces."""

    def __init__(self, solver: hg.Solver) -> None:
        self.traces = 0

        def counted(*args: Any, key: jax.Array) -> Any:
            self.traces += 1
            return solver.hypergrad(*args, key=key)

        self.solver, self.call = solver, jax.jit(counted)


@pytest.fixture(scope="module", params=["joint", "split"])
def ridge(request: pytest.FixtureRequest) -> tuple[Calls, hg.Result, PyTree]:
    """A tuned ridge regression, and the solver's state after 1,000 more calls at the strength found."""
    calls = Calls(_solver(training=request.param, scale=0.3, domain=LOG))
    solver = calls.solver._replace(hypergrad=calls.call)
    result = hg.tune(
        solver, jnp.zeros(5, DTYPE), 0.05, TRAIN, VALID, outer=optax.adam(0.01), steps=1500, domain=LOG,
        key=jax.random.key(0), progress=False,
    )  # fmt: skip
    return calls, result, result.state


def test_ridge_reaches_the_optimum_of_its_closed_form(ridge):
    _, result, _ = ridge
    grid = jnp.exp(jnp.linspace(-3, 2, 501)).astype(DTYPE)
    best = grid[jnp.argmin(jax.vmap(lambda l2: _error(_solution(l2), VALID))(grid))]
    assert abs(float(jnp.log(result.hparams / best))) < 0.15
    weights = result.state.weights
    assert_trees_close(weights.base, _solution(result.hparams), 0.05)
    slope = jax.jvp(lambda l2: _response(ridge, l2), (result.hparams,), (result.hparams,))[1]
    truth = jax.jvp(_solution, (result.hparams,), (result.hparams,))[1]
    assert_trees_close(slope, truth, 0.2)


def _response(ridge: tuple[Calls, hg.Result, PyTree], l2: PyTree) -> PyTree:
    return ridge[0].solver.response(ridge[2], l2)


def test_no_retrace_over_more_than_a_thousand_steps_and_options_that_change(ridge):
    calls, result, state = ridge
    assert calls.traces == 1  # of 1,500 steps
    shorter = {**state.options, "inner": {"max_steps": jnp.int32(3)}}
    out, _ = calls.call(state._replace(options=shorter), result.hparams, TRAIN, VALID, key=jax.random.key(1))
    assert int(out.info.inner_steps) == 3
    assert calls.traces <= 2  # outside of tune the state's arrays may be committed to a device


def test_hypergradient_is_the_derivative_of_what_it_reports(ridge):
    """With no training in between: dF/dλ through response and domain, and what the outer loss itself reads of λ."""
    calls, result, state = ridge
    problem = hg.Problem(_ridge_loss, lambda w, l2, batch: _error(w, batch) + jnp.sin(3 * l2))
    solver = _solver(problem, steps=0, domain=LOG)
    l2, state = result.hparams, state._replace(options={**state.options, "inner": {"max_steps": jnp.int32(0)}})

    def value(l2: PyTree) -> jax.Array:
        return problem.outer_loss(calls.solver.response(state, l2), l2, VALID)

    out, _ = solver.hypergrad(state, l2, TRAIN, VALID, key=jax.random.key(0))
    assert_trees_close(out.value, value(l2), tol(1e-12, 1e-5))
    assert_trees_close(out.grad, jax.grad(value)(l2), tol(1e-10, 1e-4))
    assert_trees_close(out.info.extra["direct_norm"], jnp.abs(3 * jnp.cos(3 * l2)), tol(1e-10, 1e-4))


def test_the_best_step_is_kept_apart_from_the_last(ridge):
    _, result, _ = ridge
    assert result.best.value == np.min(result.history.value) < result.history.value[-1]
    assert_trees_close(_error(result.best.params, VALID), result.best.value, tol(1e-10, 1e-5))
    assert_trees_close(_error(result.params, VALID), result.history.value[-1], 1e-3)


@pytest.fixture(scope="module")
def whole() -> hg.Result:
    """Training pulls w to the number of holes; validation wants 3. The losses see whole numbers only."""

    def inner(w: PyTree, h: PyTree, batch: PyTree) -> jax.Array:
        return (w - jnp.round(jax.lax.stop_gradient(h["holes"]))) ** 2  # no derivative in them at all

    problem = hg.Problem(inner, lambda w, h, batch: (w - 3.0) ** 2)
    domain = {"holes": hg.domains.integer(0, 6)}
    solver = _solver(problem, optimizer=optax.adam(0.05), steps=10, scale=0.5, domain=domain)
    return hg.tune(
        solver, jnp.asarray(1.0, DTYPE), {"holes": 1.0}, outer=optax.adam(0.05), steps=150, domain=domain,
        key=jax.random.key(0), progress=False,
    )  # fmt: skip


def test_a_whole_number_moves_to_its_known_best_value(whole):
    path = whole.history.hparams["holes"]
    assert path[0] == 1.0 and path[-1] == 3.0
    assert np.all(path == np.round(path))
    assert np.all(np.diff(path) >= 0) or np.max(path) <= 4.0


def test_scales_are_learned_and_reported_and_entropy_holds_them_up():
    problem = hg.Problem(lambda w, h, b: _ridge_loss(w, h["l2"], b), lambda w, h, b: _error(w, b))
    hparams = {"l2": jnp.ones((), DTYPE)}
    solver = _solver(
        problem, scale={"l2": 0.3}, scale_optimizer=optax.adam(0.05), entropy=0.0, perturb=4, domain={"l2": LOG}
    )
    step = jax.jit(solver.hypergrad)

    def learned(entropy: float) -> float:
        state = solver.init(jnp.zeros(5, DTYPE), hparams, key=jax.random.key(0))
        state = state._replace(options={**state.options, "entropy": jnp.asarray(entropy, DTYPE)})
        for i in range(60):
            out, state = step(state, hparams, TRAIN, VALID, key=jax.random.key(i))
        return float(out.info.extra["scale['l2']"])

    assert learned(0.0) < learned(10.0) and learned(10.0) > 0.3


def test_each_group_has_rows_and_hyperparameters_of_its_own():
    """The mean over groups is what a loop over them gives."""
    from hypergrad.responses._draws import Around, training_loss

    centre = {"l2": jnp.zeros((), DTYPE)}
    response = hg.responses.structured()
    weights = response.init(jax.random.key(0), jnp.ones(5, DTYPE), centre)
    weights = jax.tree.map(lambda x: x + 0.1, weights)
    problem = hg.Problem(lambda w, h, b: _ridge_loss(w, h["l2"], b), lambda w, h, b: _error(w, b))
    around = Around(problem, response, {"l2": LOG}, 4, {"l2": False}, centre)
    scale = {"l2": jnp.ones((), DTYPE)}
    arguments = (weights, scale, TRAIN, None, jax.random.key(1), None)
    found, _ = training_loss(around, "joint", *arguments)
    draws = around.draw(centre, scale, 4, jax.random.key(1))["l2"]
    assert len(np.unique(np.asarray(draws))) == 4
    losses = []
    for i in range(4):
        rows = tuple(part[5 * i : 5 * i + 5] for part in TRAIN)
        params = response.apply(weights, {"l2": draws[i]}, centre)
        losses.append(_ridge_loss(params, jnp.exp(draws[i]), rows))
    assert_trees_close(found, sum(losses) / 4, tol(1e-12, 1e-5))
    together = around._replace(shared={"l2": True}).draw(centre, scale, 4, jax.random.key(1))["l2"]
    assert len(np.unique(np.asarray(together))) == 1


def test_linearized_training_is_a_tangent_in_the_hyperparameters():
    """Outputs f(u₀) + ∂f/∂u (u − u₀), and gradients that keep base and slope apart."""
    from hypergrad.responses._draws import Around, training_loss

    centre = {"l2": jnp.zeros((), DTYPE)}
    response = hg.responses.structured()
    weights = jax.tree.map(lambda x: x + 0.3, response.init(jax.random.key(0), jnp.ones(5, DTYPE), centre))
    model = lambda w, h, batch: jnp.tanh(batch[0] @ w)
    square = lambda out, w, h, batch: jnp.mean((out - batch[1]) ** 2)
    problem = hg.Problem(hg.compose(model, square), lambda w, h, b: _error(w, b))
    around = Around(problem, response, {"l2": LOG}, "batch", {"l2": False}, centre)
    scale = {"l2": jnp.ones((), DTYPE)}

    def loss(weights: Any) -> jax.Array:
        return training_loss(around, "linearized", weights, scale, TRAIN, None, jax.random.key(1), None)[0]

    u = around.draw(centre, scale, None, jax.random.key(1))
    f = lambda weights, u: model(response.apply(weights, u, centre), None, TRAIN)

    def base_loss(base: Any) -> jax.Array:
        return square(f(weights._replace(base=base), centre), None, None, TRAIN)

    def slope_loss(slope: Any) -> jax.Array:
        ours = weights._replace(slope=slope)
        out, change = jax.jvp(lambda u: f(ours, u), (centre,), (jax.tree.map(jnp.subtract, u, centre),))
        return square(out + change, None, None, TRAIN)

    found = jax.grad(loss)(weights)
    assert_trees_close(found.base, jax.grad(base_loss)(weights.base), tol(1e-12, 1e-5))
    assert_trees_close(found.slope, jax.grad(slope_loss)(weights.slope), tol(1e-12, 1e-5))


def test_gated_losses_get_a_row_for_each_example():
    params = {"plain": jnp.ones(5, DTYPE), "response": {"gate": jnp.full((3, 5), 0.1, DTYPE)}}
    hparams = {"a": jnp.full(2, 0.3, DTYPE), "b": jnp.asarray(0.5, DTYPE)}
    seen: dict[str, Any] = {}

    def predict(pair: PyTree, x: jax.Array) -> jax.Array:
        params, offset = pair
        return jnp.sum(x * (params["plain"][None] + offset @ params["response"]["gate"]), axis=1)

    def inner(pair: PyTree, h: PyTree, batch: PyTree) -> jax.Array:
        seen.update(offset=pair[1].shape, **{name: leaf.shape for name, leaf in h.items()})
        return jnp.mean((predict(pair, batch[0]) - batch[1]) ** 2 * (1 + h["b"] + jnp.sum(h["a"], axis=-1)))

    problem = hg.Problem(inner, lambda pair, h, batch: jnp.mean((predict(pair, batch[0]) - batch[1]) ** 2))
    solver = _solver(problem, response=hg.responses.gated(), perturb="example")
    state = solver.init(params, hparams, key=jax.random.key(0))
    out, state = jax.jit(solver.hypergrad)(state, hparams, TRAIN, VALID, key=jax.random.key(1))
    assert seen == {"offset": (20, 3), "a": (20, 2), "b": (20,)}
    assert jax.tree.map(jnp.shape, out.grad) == jax.tree.map(jnp.shape, hparams)
    assert hg.Status(int(out.info.status)) == hg.Status.OK
    (after, offset) = solver.response(state, hparams)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    np.testing.assert_array_equal(offset, 0)


MISTAKES = {
    "scale": (lambda: _init(scale=0.0), r"scale must be greater than 0, found 0\.0"),
    "scale's tree": (lambda: _init(scale={"l1": 0.1}), r"scale must be one value, or a pytree prefix .*leaves are"),
    "perturb": (lambda: _solver(perturb="row"), "perturb must be 'batch', 'example', or a number of groups"),
    "training": (lambda: _solver(training="linear"), r"training must be one of .*did you mean 'linearized'\?"),
    "linearized": (lambda: _solver(training="linearized"), r"inner loss made by hg.compose\(outputs, loss\)"),
    "response": (lambda: _solver(response=3), "response must be an hg.responses.Response, found int"),
    "entropy": (lambda: _solver(entropy=-1.0), "entropy must be at least 0"),
    "option": (lambda: _solver(valid_step=1), r"unknown option 'valid_step', did you mean 'valid_steps'\?"),
    "groups": (lambda: _call(perturb=3), "perturb=3 groups do not divide the 20 rows of a batch of train"),
    "no rows": (lambda: _call(None, perturb="example"), "perturb='example' needs the rows of train"),
    "key": (lambda: _solver().init(jnp.zeros(5), 0.1), "key is None: pass key=jax.random.key"),
    "structure": (lambda: _call(hparams={"l2": 0.1}), r"hparams\['l2'\] of shape \(\) is not expected|is missing"),
    "domain": (lambda: _init(domain=hg.domains.interval(1, 2)), r"hparams must be between 1 and 2"),
    "gated": (lambda: _init(response=hg.responses.gated()), "no leaf of params lies below 'response'"),
}


def _init(**options: Any) -> Any:
    return _solver(**options).init(jnp.zeros(5, DTYPE), 0.1, key=jax.random.key(0))


def _call(train: PyTree = TRAIN, hparams: PyTree = 0.1, **options: Any) -> Any:
    solver = _solver(**options)
    state = solver.init(jnp.zeros(5, DTYPE), 0.1, key=jax.random.key(0))
    return jax.eval_shape(lambda: solver.hypergrad(state, hparams, train, VALID, key=jax.random.key(0))[0])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_with_what_to_write_instead(name):
    call, message = MISTAKES[name]
    with pytest.raises((hg.InputError, hg.InputTypeError), match=message):
        call()


def test_a_hyperparameter_that_neither_loss_uses_is_named():
    problem = hg.Problem(lambda w, h, b: _ridge_loss(w, h["l2"], b), lambda w, h, b: _error(w, b))
    hparams = {"l2": jnp.ones((), DTYPE), "l3": jnp.ones((), DTYPE)}
    solver = _solver(problem)
    state = solver.init(jnp.zeros(5, DTYPE), hparams, key=jax.random.key(0))
    with pytest.warns(UserWarning, match=r"hparams\['l3'\] is used neither by inner_loss nor by outer_loss"):
        jax.eval_shape(lambda: solver.hypergrad(state, hparams, TRAIN, VALID, key=jax.random.key(0))[0])


def test_check_says_that_the_response_is_learned_and_how_far_off_it_is():
    problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h) ** 2), lambda w, h, batch: jnp.sum((w - 1) ** 2))
    solver = _solver(problem, steps=50)
    report = hg.check(solver, jnp.zeros(2, DTYPE), jnp.asarray(0.3, DTYPE), key=jax.random.key(0))
    assert any(cause.startswith("learned: the best response is a fitted function") for cause in report.causes)
    assert not any("adjoint system was not solved" in cause for cause in report.causes)

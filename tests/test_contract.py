"""The contract of a solver: what every method keeps, whatever it computes.

A new method adds one line to `SOLVERS` and passes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType

import hypergrad as hg
from hypergrad._solver import evaluation
from hypergrad.solvers._call import option_names
from tests._helpers import assert_trees_close, assert_trees_equal, keyed, shard_rows, tol

PyTree = Any


def _sgd(steps: int = 12) -> Any:
    return hg.inner.gradient(optax.sgd(0.2, momentum=0.5), steps=steps)


def _descent(params: PyTree, hparams: PyTree, batch: PyTree) -> PyTree:
    grads = jax.grad(_inner_loss)(params, hparams, batch)
    return jax.tree.map(lambda w, g: w - 0.2 * g, params, grads)


def _self_tuning(problem: hg.Problem, **options: Any) -> hg.Solver:
    return keyed(hg.self_tuning(problem, optimizer=optax.adam(0.01), **options))


def _single_loop(method: str, **options: Any) -> Callable[[hg.Problem], hg.Solver]:
    return lambda problem: keyed(hg.single_loop(problem, method=method, size=16, step_size=0.2, **options))


def _two_tasks(solver: hg.Solver) -> hg.Solver:
    """The same data for two tasks, whose mean is either of them."""

    def lift(method: Any) -> Any:
        def lifted(state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, **rest: Any) -> Any:
            return method(state, hparams, *jax.tree.map(lambda x: jnp.stack([x, x]), (train, valid)), **rest)

        return lifted

    tasks = hg.tasks(solver, count=2)
    response = lambda state, hparams: jax.tree.map(lambda x: x[1], tasks.response(state, hparams))
    return tasks._replace(hypergrad=lift(tasks.hypergrad), evaluate=lift(tasks.evaluate), response=response)


SOLVERS: dict[str, Callable[[hg.Problem], hg.Solver]] = {
    "implicit": hg.implicit,
    "implicit, cold": lambda p: hg.implicit(p, warm_start=False),
    "implicit, newton": lambda p: hg.implicit(p, inner=hg.inner.newton()),
    "implicit, damped": lambda p: hg.implicit(p, inner=_sgd(), damping=0.1),
    "implicit, gmres": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.gmres()),
    "implicit, dense": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.dense()),
    "implicit, nystrom": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.nystrom(5, damping=0.1)),
    "implicit, neumann": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.neumann(5)),
    "implicit, fixed budget": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.cg(max_steps=3)),
    "implicit, T1-T2": lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.identity(0.2)),
    "implicit, fixed point": lambda p: hg.implicit(p, inner=hg.inner.fixed_point(_descent)),
    "online": lambda p: hg.online(p, optax.adam(0.1), steps=4, products=3),
    "unrolled": lambda p: hg.unrolled(p, inner=_sgd()),
    "unrolled, adam": lambda p: hg.unrolled(p, inner=hg.inner.gradient(optax.adam(0.1), steps=8)),
    "unrolled, forward": lambda p: hg.unrolled(p, inner=_sgd(), mode="forward"),
    "unrolled, nothing recomputed": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="none"),
    "unrolled, sqrt": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="sqrt"),
    "unrolled, tree": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="tree"),
    "unrolled, gradient": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", remat="gradient"),
    "unrolled, truncated": lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", truncate=4),
    "unrolled, warm": lambda p: hg.unrolled(p, inner=_sgd(), warm_start=True),
    "unrolled, fixed point": lambda p: hg.unrolled(p, inner=hg.inner.fixed_point(_descent, steps=10)),
    "direct": lambda p: hg.direct(p, inner=hg.inner.lbfgs()),
    "interleaved": lambda p: hg.objectives.interleaved(p, optax.sgd(0.1), burn_in=4, steps=3, hyper_steps=1),
    "tasks": lambda p: _two_tasks(hg.implicit(p, inner=_sgd())),
    "hypernetwork": lambda p: keyed(
        hg.hypernetwork(p, response=hg.responses.structured(), optimizer=optax.adam(0.01), steps=4, scale=0.3, draws=2)
    ),
    "self-tuning": _self_tuning,
    "self-tuning, groups and learned scales": lambda p: _self_tuning(
        p, perturb=4, scale_optimizer=optax.adam(0.01), training="split", valid_steps=2
    ),
    "single loop, SOBA": _single_loop("soba"),
    "single loop, SABA": _single_loop("saba", rows=(24, 16)),
    "single loop, AmIGO": _single_loop("amigo", inner_steps=2),
    "single loop, SRBA": _single_loop("srba"),
    "single loop, F2SA": _single_loop("f2sa", perturbation=0.1),
    "evolution, PES": lambda p: keyed(hg.evolution(p, inner=_sgd(), scale=0.05, pairs=4, truncate=4)),
    "evolution, whole episodes": lambda p: keyed(hg.evolution(p, inner=_sgd(), method="es", pairs=3)),
    "evolution and gradients": lambda p: keyed(
        hg.evolution(p, inner=_sgd(), method="es", pairs=3, evolve={"l2": True, "pair": False})
    ),
}


def _inner_loss(params: PyTree, hparams: PyTree, batch: PyTree) -> jax.Array:
    x, y = batch
    w, (bias, _) = params["w"], params["odd"]
    decay = jnp.sum(jnp.exp(hparams["l2"]) * w**2) + jnp.exp(hparams["pair"][0]) * bias**2
    return 0.5 * jnp.mean((x @ w + bias - y) ** 2) + 0.5 * decay


def _outer_loss(params: PyTree, hparams: PyTree, batch: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
    x, y = batch
    error = x @ params["w"] + params["odd"][0] - y
    return jnp.mean(error**2) + 0.01 * jnp.sum(hparams["l2"] ** 2), {"mae": jnp.mean(jnp.abs(error))}


PROBLEM = hg.Problem(_inner_loss, _outer_loss)


def _setting(seed: int = 0) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=4)

    def data(rows: int) -> PyTree:
        x = rng.normal(size=(rows, 4))
        return jnp.asarray(x), jnp.asarray(x @ weights + 0.5 + 0.3 * rng.normal(size=rows))

    params = {
        "w": jnp.asarray(0.1 * rng.normal(size=4)),
        "odd": (jnp.asarray(0.2), {"none": None}),
    }
    hparams = {"l2": jnp.asarray(-1.5 + 0.3 * rng.normal(size=4)), "pair": (jnp.asarray(-0.7), None)}
    return params, hparams, data(24), data(16)


class Case(NamedTuple):
    """A solver with its compiled functions, shared by the tests of this file: compiling is most of what they cost."""

    solver: hg.Solver
    step: Any
    evaluate: Any
    batched: Any
    traces: list[int]
    evaluations: list[int]
    state: Any
    setting: tuple[PyTree, PyTree, PyTree, PyTree]


@pytest.fixture(scope="module", params=list(SOLVERS))
def case(request: pytest.FixtureRequest) -> Case:
    solver = SOLVERS[request.param](PROBLEM)
    traces: list[int] = []
    evaluations: list[int] = []

    # Named like the solver's own, so that the tests that compile that find it compiled (see conftest.py).
    def hypergrad(state: Any, hparams: PyTree, train: PyTree, valid: PyTree) -> Any:
        traces.append(1)
        return solver.hypergrad(state, hparams, train, valid)

    def evaluate(state: Any, hparams: PyTree, train: PyTree, valid: PyTree) -> Any:
        evaluations.append(1)
        return evaluation(solver)(state, hparams, train, valid)

    params, hparams, _, valid = _setting()

    def run(hparams: PyTree, train: PyTree) -> PyTree:
        return solver.hypergrad(solver.init(params, hparams), hparams, train, valid)[0]

    functions = jax.jit(hypergrad), jax.jit(evaluate), jax.jit(jax.vmap(run))
    return Case(solver, *functions, traces, evaluations, solver.init(params, hparams), _setting())


def _stack(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _member(tree: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda x: x[i], tree)


def test_two_calls_trace_once_and_keep_the_structure_and_dtypes_of_the_state(case):
    _, hparams, train, valid = case.setting
    before = len(case.traces)
    _, after = case.step(case.state, hparams, train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(case.state, after)
    out, again = case.step(after, jax.tree.map(lambda x: x + 0.1, hparams), train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, again)
    assert np.isfinite(out.value)
    assert len(case.traces) - before <= 1 and len(case.traces) == 1


def test_hypergradient_has_the_structure_shapes_and_dtypes_of_hparams(case):
    params, hparams, train, valid = case.setting
    out, state = case.step(case.state, hparams, train, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(out.grad, hparams)
    chex.assert_trees_all_equal_shapes_and_dtypes(case.solver.response(state, hparams), params)
    chex.assert_shape([out.value, *jax.tree.leaves(out.info)], ())
    assert out.info.status.dtype == jnp.int32
    assert set(out.metrics) == {"mae"}
    hg.raise_if_failed(out)


def test_the_program_is_made_for_other_platforms_too(case):
    """Nothing that only a CPU can do, on which alone the suite runs; traced for the tests above."""
    before = len(case.traces)
    exported = export.export(case.step, platforms=["cuda", "tpu"])(case.state, *case.setting[1:])
    assert exported.platforms == ("cuda", "tpu") and len(case.traces) - before <= 1


def test_what_only_a_cpu_can_do_would_be_noticed():
    with pytest.raises(NotImplementedError, match="schur"):
        export.export(jax.jit(jax.lax.linalg.schur), platforms=["tpu"])(jnp.eye(2))


# The lowering of all takes a minute: three with every run of the suite, the others with the experiments.
SOON = ["online", "unrolled, adam", "implicit, T1-T2"]
LATER = [pytest.param(name, marks=pytest.mark.experiment) for name in SOLVERS if name not in SOON]


@pytest.mark.parametrize("name", [*SOON, *LATER])
def test_bfloat16_is_made_for_other_platforms_too(name):
    small = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    solver, (params, hparams, *data) = SOLVERS[name](PROBLEM), small(_setting())
    state = jax.eval_shape(solver.init, params, hparams)
    exported = export.export(jax.jit(solver.hypergrad), platforms=["cuda", "tpu"])(state, hparams, *data)
    assert "bf16" in exported.mlir_module()


def test_same_call_gives_the_same_bits(case):
    _, *arguments = case.setting
    assert_trees_equal(case.step(case.state, *arguments), case.step(case.state, *arguments))


def test_nan_in_the_loss_is_a_status_and_leaves_the_state_finite(case):
    _, hparams, train, valid = case.setting
    _, state = case.step(case.state, hparams, train, valid)
    out, after = case.step(state, hparams, (train[0].at[0, 0].set(jnp.nan), train[1]), valid)
    status = hg.Status(int(out.info.status))
    assert status in (hg.Status.NONFINITE_LOSS, hg.Status.NONFINITE_GRAD)
    for leaf in jax.tree.leaves(after):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64)))
    recovered, _ = case.step(after, hparams, train, valid)
    assert hg.Status(int(recovered.info.status)).usable
    with pytest.raises(hg.FailedHypergradientError, match=status.name):
        hg.raise_if_failed(out)


def test_an_evaluation_is_the_value_of_the_hypergradient_from_a_state_that_goes_on(case):
    assert case.solver.evaluate is not None
    _, hparams, train, valid = case.setting
    out, after = case.step(case.state, hparams, train, valid)
    value, info, state = case.evaluate(case.state, hparams, train, valid)
    assert_trees_close(value, out.value, tol(1e-12, 2e-6))
    assert_trees_close(case.solver.response(state, hparams), case.solver.response(after, hparams), tol(1e-10, 1e-4))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, case.state)
    assert hg.Status(int(info.status)) == hg.Status(int(out.info.status))
    assert info.inner_steps == out.info.inner_steps and info.linear_steps == 0
    assert np.isnan(info.linear_residual) and np.isposinf(info.error_estimate)
    next_out, _ = case.step(state, hparams, train, valid)
    hg.raise_if_failed(next_out)
    assert len(case.traces) == 1


def test_two_evaluations_trace_once(case):
    _, hparams, train, valid = case.setting
    _, _, state = case.evaluate(case.state, hparams, train, valid)
    case.evaluate(state, jax.tree.map(lambda x: x + 0.1, hparams), train, valid)
    assert len(case.evaluations) == 1


def test_nan_in_an_evaluation_is_a_status_and_leaves_the_state_finite(case):
    _, hparams, train, valid = case.setting
    for data in (((train[0].at[0, 0].set(jnp.nan), train[1]), valid), (train, (valid[0], valid[1].at[0].set(jnp.nan)))):
        _, info, state = case.evaluate(case.state, hparams, *data)
        assert hg.Status(int(info.status)) in (hg.Status.NONFINITE_LOSS, hg.Status.NONFINITE_GRAD)
        assert all(np.all(np.isfinite(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(state))


def test_the_options_that_a_solver_names_are_those_of_its_state_and_take_new_values_without_a_new_trace(case):
    _, *arguments = case.setting
    assert sorted(case.solver.about.options) == sorted(option_names(case.state.options))
    case.step(case.state, *arguments)
    for name in case.solver.about.options:
        *parts, last = name.split(".")
        options = jax.tree.map(lambda x: x, case.state.options)  # a copy
        holder = options[parts[0]] if parts else options
        holder[last] = jnp.asarray(2 * holder[last], holder[last].dtype)
        case.step(case.state._replace(options=options), *arguments)
    assert len(case.traces) == 1


def test_a_solver_says_its_name_and_whether_its_calls_train_on(case):
    about, (_, hparams, train, valid) = case.solver.about, case.setting
    name = re.fullmatch(r"(?:hg\.tasks\()?hg\.([\w.]+)\)?", about.name)
    assert name and callable(operator.attrgetter(name[1])(hg)) and about.differentiates != "unknown"
    first, after = case.step(case.state, hparams, train, valid)
    second, _ = case.step(after, hparams, train, valid)
    agree = abs(float(second.value - first.value)) <= tol(1e-8, 1e-4) * abs(float(first.value))
    assert agree != about.trains_on


def test_nan_in_the_validation_loss_is_a_status(case):
    _, hparams, train, valid = case.setting
    out, _ = case.step(case.state, hparams, train, (valid[0], valid[1].at[0].set(jnp.nan)))
    assert hg.Status(int(out.info.status)) in (hg.Status.NONFINITE_LOSS, hg.Status.NONFINITE_GRAD)


def test_vmap_equals_a_loop(case):
    params, _, train, valid = case.setting
    grid = [_setting(seed)[1] for seed in range(3)]
    batched = case.batched(_stack(grid), _stack([train] * 3))
    for i, hparams in enumerate(grid):
        one, _ = case.step(case.solver.init(params, hparams), hparams, train, valid)
        assert_trees_close(_member(batched.grad, i), one.grad, tol(1e-7, 2e-3))
        assert batched.info.status[i] == one.info.status


def test_one_bad_member_of_a_batch_leaves_the_bits_of_the_others(case):
    _, hparams, train, _ = case.setting
    good = _stack([train] * 3)
    clean, dirty = (case.batched(_stack([hparams] * 3), data) for data in (good, (good[0].at[1].set(jnp.nan), good[1])))
    for i in (0, 2):
        assert_trees_equal(_member(clean.grad, i), _member(dirty.grad, i))
        assert dirty.info.status[i] == clean.info.status[i]
    assert not hg.Status(int(dirty.info.status[1])).usable


def test_sharded_data_give_the_unsharded_result_and_a_stable_state(case, devices):
    _, hparams, train, valid = case.setting
    expected, _ = case.step(case.state, hparams, train, valid)
    split = shard_rows(train, devices), shard_rows(valid, devices)
    everywhere = jax.sharding.NamedSharding(jax.tree.leaves(split)[0].sharding.mesh, jax.sharding.PartitionSpec())
    state, hparams = jax.device_put((case.state, hparams), everywhere)
    # The solver's own function, since the tracing of a new sharding would be counted.
    found, after = jax.jit(case.solver.hypergrad)(state, hparams, *split)
    assert_trees_close(found.grad, expected.grad, tol(1e-8, 1e-3))
    stays = lambda new, old: new.sharding.is_equivalent_to(old.sharding, new.ndim)
    assert all(jax.tree.leaves(jax.tree.map(stays, after, state)))


@pytest.mark.parametrize("name", ["implicit", "unrolled", "self-tuning"])
def test_a_state_from_one_device_moves_to_where_the_data_are_and_stays(name, devices):
    solver, (params, hparams, *data) = SOLVERS[name](PROBLEM), _setting()
    step, split = jax.jit(solver.hypergrad), [shard_rows(x, devices) for x in data]
    _, after = jax.block_until_ready(step(solver.init(params, hparams), hparams, *split))
    _, again = jax.block_until_ready(step(after, hparams, *split))
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, again)


COMPILED_ONCE = {
    "implicit": hg.implicit,
    "forward": lambda p: hg.unrolled(p, inner=_sgd(2), mode="forward"),
    "online": lambda p: hg.online(p, optax.adam(0.1), steps=2, products=2),
    "unrolled": lambda p: hg.unrolled(p, inner=_sgd(2)),
    "hypernetwork": lambda p: hg.hypernetwork(p, optimizer=optax.adam(0.01), steps=2, scale=0.1),
    "self-tuning": lambda p: hg.self_tuning(p, optimizer=optax.adam(0.01), steps=2),
    "evolution": lambda p: hg.evolution(p, inner=_sgd(2), method="es", scale=0.1, pairs=2, truncate=2),
    "interleaved": lambda p: hg.objectives.interleaved(p, optax.sgd(0.1), burn_in=2, steps=2, hyper_steps=1),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", COMPILED_ONCE)
def test_parameters_and_data_that_are_spread_over_devices_compile_once(name, kind, devices):
    """The state lies where the parameters do from the beginning, vectors of a response included, and the hypergradient
    is the same; on the mesh that `jax.make_mesh` makes by default too. On two devices: where many collectives of one
    program are in flight, eight virtual ones can run out of threads, and wait for ever."""
    devices = devices[:2]
    error = lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    solver = COMPILED_ONCE[name](hg.Problem(lambda w, h, b: error(w, h, b) + jnp.sum(jnp.exp(h) * w**2), error))
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.normal(size=shape)) for shape in ((8,), (8,), (16, 8), (16,))]
    found = {}
    for spread, (params, hparams, x, y) in {False: given, True: shard_rows(given, devices, kind)}.items():
        data = (x, y)
        state, step = solver.init(params, hparams, key=(key := jax.random.key(0))), jax.jit(solver.hypergrad)
        before = step._cache_size()  # shared by every jit of one function
        for _ in range(2):  # one program at a time: two with collectives can wait for each other for ever
            out, state = jax.block_until_ready(step(state, hparams, data, data, key=key))
        found[spread] = out.grad
        assert step._cache_size() == before + 1
    assert found[True].sharding.spec == shard_rows(given[1], devices, kind).sharding.spec
    assert_trees_close(np.asarray(found[True]), np.asarray(found[False]), tol(1e-9, 1e-4))


def test_integer_hyperparameters_are_refused_by_path(case):
    params, hparams, train, valid = case.setting
    wrong = {**hparams, "l2": jnp.zeros(4, jnp.int32)}
    with pytest.raises(TypeError, match=r"hparams\['l2'\].*int32.*float"):
        case.solver.init(params, wrong)
    with pytest.raises(TypeError, match=r"hparams\['l2'\].*int32.*float"):
        case.solver.hypergrad(case.state, wrong, train, valid)


def test_empty_data_are_refused_by_name(case):
    _, hparams, train, valid = case.setting
    for name, data in (
        ("train", ((train[0][:0], train[1][:0]), valid)),
        ("valid", (train, (valid[0][:0], valid[1][:0]))),
    ):
        with pytest.raises(ValueError, match=rf"{name}\[0\] is empty"):
            case.solver.hypergrad(case.state, hparams, *data)


# Running without jit compiles every operation by itself: one solver of each kind.
@pytest.mark.parametrize(
    "name", ["implicit", "implicit, T1-T2", "unrolled", "unrolled, forward", "direct", "self-tuning"]
)
def test_jit_equals_eager(name):
    solver = SOLVERS[name](PROBLEM)
    params, *arguments = _setting()
    state = solver.init(params, arguments[0])
    eager, _ = solver.hypergrad(state, *arguments)
    jitted, _ = jax.jit(solver.hypergrad)(state, *arguments)
    assert_trees_close(jitted.grad, eager.grad, tol(1e-8, 1e-3))
    assert_trees_close(jitted.value, eager.value, tol(1e-10, 1e-4))
    assert_trees_close(evaluation(solver)(state, *arguments)[0], eager.value, tol(1e-12, 1e-5))


@pytest.mark.parametrize(
    "name", ["implicit", "implicit, T1-T2", "unrolled", "unrolled, warm", "direct", "hypernetwork", "self-tuning"]
)
def test_vmap_of_evaluations_equals_a_loop(name):
    solver, (params, _, train, valid) = SOLVERS[name](PROBLEM), _setting()

    def run(hparams: PyTree) -> PyTree:
        value, info, _ = evaluation(solver)(solver.init(params, hparams), hparams, train, valid)
        return value, info.status

    grid = [_setting(seed)[1] for seed in range(3)]
    one = jax.jit(run)
    values, statuses = jax.jit(jax.vmap(run))(_stack(grid))
    for i, hparams in enumerate(grid):
        value, status = one(hparams)
        assert_trees_close(values[i], value, tol(1e-9, 1e-4))
        assert statuses[i] == status


def test_what_depends_on_chance_is_declared():
    """With another key another hypergradient, of a problem that draws nothing, exactly where `about.random` says so."""
    solvers = {
        "exact": hg.implicit(PROBLEM),
        "sketched": hg.implicit(PROBLEM, linear=hg.linear.nystrom(2, damping=0.1)),
        "drawn": hg.hypernetwork(PROBLEM, optimizer=optax.adam(0.01), steps=2, scale=0.3),
    }
    params, hparams, *data = _setting()
    for solver in solvers.values():
        step, state = jax.jit(solver.hypergrad), solver.init(params, hparams, key=jax.random.key(0))
        one, other = (step(state, hparams, *data, key=jax.random.key(i))[0].grad for i in (1, 2))
        moved = float(jnp.max(jnp.abs(one["l2"] - other["l2"]))) > tol(1e-6, 1e-3) * float(jnp.max(jnp.abs(one["l2"])))
        assert moved == bool(solver.about.random)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "direct"])
def test_losses_that_close_over_their_data_take_none(name):
    params, hparams, train, valid = _setting()
    solver = SOLVERS[name](PROBLEM)
    expected, _ = jax.jit(solver.hypergrad)(solver.init(params, hparams), hparams, train, valid)
    problem = hg.Problem(lambda w, h, _: _inner_loss(w, h, train), lambda w, h, _: _outer_loss(w, h, valid))
    closed = SOLVERS[name](problem)
    out, _ = jax.jit(closed.hypergrad)(closed.init(params, hparams), hparams)
    assert_trees_close(out.grad, expected.grad, tol(1e-9, 1e-3))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_first_state_shares_no_buffer_so_that_it_can_be_donated(name, key):
    params, hparams, *_ = _setting()
    state = SOLVERS[name](PROBLEM).init(params, hparams, key=key)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, params, hparams)) if x.size]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("name", ["unrolled", "direct"])
def test_donated_states_leave_the_arguments_of_init_alone(name):
    params, hparams, train, valid = _setting()
    solver = SOLVERS[name](PROBLEM)
    state, step = solver.init(params, hparams), jax.jit(solver.hypergrad, donate_argnums=0)
    for _ in range(2):
        _, state = step(state, hparams, train, valid)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, hparams, state)))

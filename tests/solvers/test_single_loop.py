"""Single-loop methods against their update equations in NumPy, on a quadratic in which every term differs from row to
row.

    h = meanᵢ ½ (xᵢᵀw − yᵢ)² + (xᵢᵀw)(bᵢᵀλ) + ½ μ ‖w‖²,   f = meanⱼ ½ (uⱼᵀw − tⱼ)² + ½ (cⱼᵀλ)²
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.solvers._directions import METHODS, Blocks
from tests._helpers import assert_trees_close, relative_error, together, tol

MU, RATE, EPSILON = 0.3, 0.15, 0.1
TRAIN, VALID, SIZE = 22, 18, 8  # the last blocks hold 6 and 2 rows
LAMBDA = np.array([0.7, -0.4])


def _inner_loss(w: Any, h: Any, rows: Any) -> jax.Array:
    x, y, b = rows
    out = x @ w
    return jnp.mean(0.5 * (out - y) ** 2 + out * (b @ h)) + 0.5 * MU * jnp.sum(w**2)


def _outer_loss(w: Any, h: Any, rows: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    u, t, c = rows
    error = u @ w - t
    return jnp.mean(0.5 * error**2 + 0.5 * (c @ h) ** 2), {"mae": jnp.mean(jnp.abs(error))}


PROBLEM = hg.Problem(_inner_loss, _outer_loss)


def _rows(seed: int, n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.normal(size=n), rng.normal(size=(n, 2))


DATA = _rows(0, TRAIN), _rows(1, VALID)
SAME = _rows(2, 12), _rows(3, 12)


class Linear(NamedTuple):
    """A mean over rows of one of the losses: ∂_w = H w − r + B λ, ∂_λ = Bᵀ w + D λ."""

    h: np.ndarray
    r: np.ndarray
    b: np.ndarray
    d: np.ndarray


def _train_block(rows: Any) -> Linear:
    x, y, b = rows
    n = len(y)
    return Linear(x.T @ x / n + MU * np.eye(3), x.T @ y / n, x.T @ b / n, np.zeros((2, 2)))


def _valid_block(rows: Any) -> Linear:
    u, t, c = rows
    n = len(t)
    return Linear(u.T @ u / n, u.T @ t / n, np.zeros((3, 2)), c.T @ c / n)


def _mean_of_blocks(make: Any, rows: Any) -> list[Linear]:
    """Each block's terms, weighted by its rows, so that their plain mean is that of all rows."""
    n, cuts = len(rows[1]), range(0, len(rows[1]), SIZE)
    parts = [tuple(a[cut : cut + SIZE] for a in rows) for cut in cuts]
    return [Linear(*(len(p[1]) * len(cuts) / n * x for x in make(p))) for p in parts]


def _directions(g: Linear, f: Linear, z: Any, v: Any, x: Any) -> list[np.ndarray]:
    """The three of METHODS: ∂_w h, ∂²h v + ∂_w f, ∂²_{λw} h v + ∂_λ f."""
    return [g.h @ z - g.r + g.b @ x, g.h @ v + f.h @ z - f.r, g.b.T @ v + f.d @ x]


def _exact(data: Any, x: Any) -> np.ndarray:
    g, f = _train_block(data[0]), _valid_block(data[1])
    w = np.linalg.solve(g.h, g.r - g.b @ x)
    return f.d @ x - g.b.T @ np.linalg.solve(g.h, f.h @ w - f.r)


def _best(data: Any) -> np.ndarray:
    """λ where the hypergradient, linear in it, is zero."""
    start = _exact(data, np.zeros(2))
    slope = np.stack([_exact(data, e) - start for e in np.eye(2)], axis=1)
    return np.linalg.solve(slope, -start)


def _arrays(data: Any) -> Any:
    return jax.tree.map(jnp.asarray, data)


def _solver(method: str, size: int = SIZE, **options: Any) -> hg.Solver:
    options = {"step_size": RATE, "rows": (TRAIN, VALID) if size == SIZE else (size, size)} | options
    if method == "f2sa":
        options = {"perturbation": EPSILON} | options
    return hg.single_loop(PROBLEM, method=method, size=size, **options)


def _run(solver: hg.Solver, calls: int, rate: Any = 0.0, every: int = 1) -> Any:
    """`(state, λ, data, key) -> ((state, λ), what every `every`-th call returned and left)`; λ moves by `rate`."""

    def run(state: Any, hparams: Any, data: Any, key: Any) -> Any:
        def call(carry: Any, key: Any) -> Any:
            state, hparams = carry
            out, state = solver.hypergrad(state, hparams, *data, key=key)
            return (state, hparams - rate * out.grad), (out.grad, state.params, state.adjoint, state.memory)

        def several(carry: Any, keys: Any) -> Any:
            carry, seen = jax.lax.scan(call, carry, keys)
            return carry, jax.tree.map(lambda x: x[-1], seen)

        keys = jax.random.split(key, calls).reshape(calls // every, every)
        return jax.lax.scan(several, (state, hparams), keys)

    return run


def _start(solver: hg.Solver) -> Any:
    return solver.init(jnp.zeros(3), jnp.asarray(LAMBDA))


@functools.cache
def _first_steps() -> dict[str, Any]:
    """Three calls of each method on all rows at once, and six on blocks, in one program."""
    solvers = {name: _solver(name, 12, adjoint_step_size=0.1) for name in ("soba", "saba", "srba", "f2sa")}
    solvers["amigo"] = _solver("amigo", 12, inner_steps=2, adjoint_step_size=0.1)
    solvers["f2sa, two steps"] = _solver("f2sa", 12, inner_steps=2)
    solvers["scheduled"] = _solver("soba", 12, step_size=lambda t: RATE / (1 + t) ** 0.5)
    blocked = {f"{name}, blocks": _solver(name) for name in ("soba", "saba", "srba")}
    functions = {name: _run(solver, 3) for name, solver in solvers.items()}
    functions |= {name: _run(solver, 6) for name, solver in blocked.items()}
    data = {name: _arrays(SAME) for name in solvers} | {name: _arrays(DATA) for name in blocked}
    arguments = {
        name: (_start(solver), jnp.asarray(LAMBDA), data[name], jax.random.key(7))
        for name, solver in (solvers | blocked).items()
    }
    return {name: seen for name, (_, seen) in together(functions, arguments).items()}


def _assert_steps(name: str, expected: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    grads, params, adjoints, _ = _first_steps()[name]
    for t, (grad, z, v) in enumerate(expected):
        assert_trees_close([grads[t], params[t], adjoints[t]], [grad, z, v], tol(1e-12, 1e-5))


@pytest.mark.parametrize("name", ["soba", "saba", "srba", "scheduled"])
def test_first_steps_on_all_rows_take_the_three_directions_at_the_old_point(name):
    g, f, z, v = _train_block(SAME[0]), _valid_block(SAME[1]), np.zeros(3), np.zeros(3)
    expected = []
    for t in range(3):
        down, across, grad = _directions(g, f, z, v, LAMBDA)
        rate = RATE / (1 + t) ** 0.5 if name == "scheduled" else RATE
        z, v = z - rate * down, v - (rate if name == "scheduled" else 0.1) * across
        expected.append((grad, z, v))
    _assert_steps(name, expected)


def test_first_steps_of_amigo_take_several_of_each_from_a_warm_adjoint():
    g, f, z, v = _train_block(SAME[0]), _valid_block(SAME[1]), np.zeros(3), np.zeros(3)
    expected = []
    for _ in range(3):
        for _ in range(2):
            z = z - RATE * _directions(g, f, z, v, LAMBDA)[0]
        for _ in range(2):
            v = v - 0.1 * _directions(g, f, z, v, LAMBDA)[1]
        expected.append((_directions(g, f, z, v, LAMBDA)[2], z, v))
    _assert_steps("amigo", expected)


@pytest.mark.parametrize(("name", "steps", "rates"), [("f2sa", 1, (RATE, 0.1)), ("f2sa, two steps", 2, (RATE, RATE))])
def test_first_steps_of_f2sa_are_central_differences(name, steps, rates):
    g, f, z, v = _train_block(SAME[0]), _valid_block(SAME[1]), np.zeros(3), np.zeros(3)

    def side(sign: int) -> tuple[np.ndarray, np.ndarray]:
        w, e = z + sign * EPSILON * v, sign * EPSILON
        return g.h @ w - g.r + g.b @ LAMBDA + e * (f.h @ w - f.r), g.b.T @ w + e * (f.d @ LAMBDA)

    expected = []
    for _ in range(3):
        for _ in range(steps):
            (up, _), (down, _) = side(1), side(-1)
            if rates[0] == rates[1]:  # in the paper's coordinates
                above, below = z + EPSILON * v - RATE * up, z - EPSILON * v - RATE * down
                z, v = (above + below) / 2, (above - below) / (2 * EPSILON)
            else:
                z, v = z - rates[0] * (up + down) / 2, v - rates[1] * (up - down) / (2 * EPSILON)
        expected.append(((side(1)[1] - side(-1)[1]) / (2 * EPSILON), z, v))
    _assert_steps(name, expected)


def _pairs() -> list[tuple[int, int, Linear, Linear]]:
    g, f = _mean_of_blocks(_train_block, DATA[0]), _mean_of_blocks(_valid_block, DATA[1])
    return [(i, j, g[i], f[j]) for i in range(len(g)) for j in range(len(f))]


def _drawn(found: list[np.ndarray], of: Any) -> tuple[int, int]:
    """The pair of blocks whose directions are those that were found: exactly one."""
    same = [(i, j) for i, j, g, f in _pairs() if relative_error(of(i, j, g, f), found) < tol(1e-10, 1e-4)]
    assert len(same) == 1
    return same[0]


def _moves(name: str) -> Any:
    """`(z, v, directions)` of each call, read from where it left the variables."""
    grads, params, adjoints = (np.asarray(x, np.float64) for x in _first_steps()[name][:3])
    z, v = np.zeros(3), np.zeros(3)
    for grad, after, adjoint in zip(grads, params, adjoints, strict=True):
        yield z, v, [(z - after) / RATE, (v - adjoint) / RATE, grad]
        z, v = after, adjoint


def test_soba_steps_along_one_block_of_each_data():
    drawn = {
        _drawn(found, lambda i, j, g, f: _directions(g, f, z, v, LAMBDA)) for z, v, found in _moves("soba, blocks")
    }
    assert len(drawn) > 2


def test_saba_adds_what_changed_on_one_block_to_the_mean_of_the_table_before():
    new = lambda g, f, z, v: [
        g.h @ z - g.r + g.b @ LAMBDA, g.h @ v, g.b.T @ v, f.h @ z - f.r, f.d @ LAMBDA
    ]  # fmt: skip
    five = [np.zeros((n, k)) for n, k in ((3, 3), (3, 3), (3, 2), (3, 3), (3, 2))]

    def of(i: int, j: int, g: Linear, f: Linear) -> list[np.ndarray]:
        at = (i, i, i, j, j)
        a, b, c, d, e = (x - t[k] + t.mean(0) for x, t, k in zip(new(g, f, z, v), five, at, strict=True))
        return [a, b + d, c + e]

    for z, v, found in _moves("saba, blocks"):
        i, j = _drawn(found, of)
        ((g, f),) = [(g, f) for k, m, g, f in _pairs() if (k, m) == (i, j)]
        for table, row, x in zip(five, (i, i, i, j, j), new(g, f, z, v), strict=True):
            table[row] = x
    memory = _first_steps()["saba, blocks"][3]
    kept = [np.asarray(x)[-1] for x in (*memory.inner, *memory.outer)]
    assert_trees_close(kept, five, tol(1e-12, 1e-5))


def test_srba_starts_from_all_rows_and_adds_what_changed_on_one_block():
    everything = _train_block(DATA[0]), _valid_block(DATA[1])
    for t, (z, v, found) in enumerate(_moves("srba, blocks")):
        if t % 3 == 0:  # half of the three and three blocks
            assert_trees_close(found, _directions(*everything, z, v, LAMBDA), tol(1e-10, 1e-4))
        else:
            _drawn(
                found,
                lambda i, j, g, f: [
                    d + now - was
                    for d, now, was in zip(
                        last[2], _directions(g, f, z, v, LAMBDA), _directions(g, f, *last[:2], LAMBDA), strict=True
                    )
                ],
            )
        last = z, v, found


def test_the_mean_over_all_blocks_is_the_term_of_all_rows():
    x = jnp.asarray(DATA[0][0])

    def mean(size: int) -> jax.Array:
        blocks = Blocks(x, TRAIN, size)
        at = lambda i: blocks.at(i, lambda rows: (jnp.mean(rows, 0), rows.shape))[0]
        return jnp.mean(jax.vmap(at)(jnp.arange(blocks.count)), 0)

    for found in jax.jit(lambda: [mean(size) for size in (1, 7, 8, 11, 22)])():
        assert_trees_close(found, x.mean(0), tol(1e-14, 1e-5))


@functools.cache
def _settled() -> dict[str, Any]:
    """What a thousand calls come to, in one program."""

    def perturbed(epsilon: jax.Array) -> Any:
        state = _start(solvers["f2sa"])
        state.options["perturbation"] = epsilon
        run = _run(solvers["f2sa"], 1000, every=1000)
        return run(state, jnp.asarray(LAMBDA), _arrays(SAME), jax.random.key(0))[1][0][-1]

    solvers = {
        "soba": _solver("soba", 12),
        "f2sa": _solver("f2sa", 12),
        "saba": _solver("saba"),
        "srba": _solver("srba"),
    }
    runs: dict[str, Any] = {"f2sa": jax.vmap(perturbed), "soba": _run(solvers["soba"], 1000, every=1000)}
    runs |= {name: _run(solvers[name], 1000, rate=0.1, every=50) for name in ("saba", "srba")}
    arguments = {"f2sa": (EPSILON * jnp.asarray([1.0, 0.1]),)}
    for name, data in (("soba", SAME), ("saba", DATA), ("srba", DATA)):
        arguments[name] = (_start(solvers[name]), jnp.asarray(LAMBDA), _arrays(data), jax.random.key(1))
    return together(runs, arguments)


def test_at_rest_on_all_rows_the_hypergradient_is_that_of_implicit():
    implicit = hg.implicit(PROBLEM, inner=hg.inner.newton(), linear=hg.linear.dense())
    data = _arrays(SAME)
    out, _ = jax.jit(implicit.hypergrad)(implicit.init(jnp.zeros(3), jnp.asarray(LAMBDA)), jnp.asarray(LAMBDA), *data)
    grads = _settled()["soba"][1][0]
    assert_trees_close(grads[-1], out.grad, tol(1e-8, 1e-4))
    assert_trees_close(grads[-1], _exact(SAME, LAMBDA), tol(1e-8, 1e-4))


def test_the_bias_of_f2sa_falls_as_the_square_of_its_perturbation():
    g, f = _train_block(SAME[0]), _valid_block(SAME[1])

    def biased(e: float) -> np.ndarray:
        up, down = (np.linalg.solve(g.h + s * f.h, g.r - g.b @ LAMBDA + s * f.r) for s in (e, -e))
        return g.b.T @ (up - down) / (2 * e) + f.d @ LAMBDA

    exact = _exact(SAME, LAMBDA)
    for found, e in zip(_settled()["f2sa"], (EPSILON, EPSILON / 10), strict=True):
        assert_trees_close(found, biased(e), tol(1e-8, 1e-3))
    assert relative_error(biased(EPSILON), exact) == pytest.approx(
        100 * relative_error(biased(EPSILON / 10), exact), 0.2
    )


@pytest.mark.parametrize("name", ["saba", "srba"])
def test_variance_reduction_converges_linearly_to_the_best_hyperparameters(name):
    (_, hparams), (grads, *_) = _settled()[name]
    assert_trees_close(hparams, _best(DATA), tol(1e-12, 1e-4))
    size = np.linalg.norm(np.asarray(grads, np.float64), axis=1)  # after 50, 100, ... calls
    assert size[-1] < tol(1e-12, 1e-6)
    falling = int(np.argmax(size < tol(1e-14, 1e-6)))
    ratios = size[1 : falling + 1] / size[:falling]
    assert len(ratios) > tol(5, 1) and np.all((ratios > 1e-3) & (ratios < 0.2)), "by about the same factor each time"


def test_the_mean_of_the_table_is_its_full_recomputation_after_a_thousand_steps():
    (state, _), _ = _settled()["saba"]
    memory = state.memory
    for mean, table in zip(memory.mean, (memory.inner, memory.outer), strict=True):
        recomputed = jax.tree.map(lambda x: x.mean(0), table)
        difference = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), mean, recomputed)
        assert max(jax.tree.leaves(difference)) < tol(1e-13, 1e-5)
    assert int(state.calls) == 1000


def test_the_floor_of_soba_is_in_proportion_to_its_steps():
    solver = _solver("soba")
    steps = jnp.repeat(jnp.asarray([0.08, 0.02]), 16)

    def distance(step: Any, key: Any) -> Any:
        state = _start(solver)
        state.options["step_size"] = step.astype(state.options["step_size"].dtype)
        (_, hparams), _ = _run(solver, 400, rate=step, every=400)(state, jnp.asarray(LAMBDA), _arrays(DATA), key)
        return jnp.sum((hparams - _best(DATA)) ** 2)

    found = jax.jit(jax.vmap(distance))(steps, jax.random.split(jax.random.key(0), 32))
    large, small = np.asarray(found).reshape(2, 16).mean(1)
    assert 2 < large / small < 8


def test_f2sa_needs_no_second_derivative():
    @jax.custom_vjp
    def square(w):
        return 0.5 * jnp.sum(w**2)

    twice = lambda w: jax.pure_callback(lambda w: np.asarray(w), jax.ShapeDtypeStruct(w.shape, w.dtype), w)
    square.defvjp(lambda w: (square(w), w), lambda w, t: (t * twice(w),))
    problem = hg.Problem(
        lambda w, h, rows: square(w) - h * jnp.sum(w * jnp.mean(rows)),
        lambda w, h, rows: 0.5 * jnp.mean((w - rows) ** 2),
    )
    ones = jnp.ones(4)
    hparams = jnp.asarray(0.5)

    def grad(method: str, **options: Any) -> Any:
        solver = hg.single_loop(problem, method=method, size=4, step_size=0.5, **options)
        out, _ = jax.jit(solver.hypergrad)(
            solver.init(jnp.zeros(()), hparams), hparams, ones, ones, key=jax.random.key(0)
        )
        return out.grad

    assert np.isfinite(grad("f2sa", perturbation=0.01, inner_steps=8))
    with pytest.raises(Exception, match=r"(?i)callback"):
        grad("soba")


@pytest.mark.parametrize(("method", "moves"), [("soba", 1), ("amigo", 3), ("f2sa", 3)])
def test_the_state_of_a_model_moves_with_the_parameters(method, moves):
    problem = hg.Problem(
        lambda w, h, rows, s: (_inner_loss(w, h, rows), s + 1), lambda w, h, rows, s: _outer_loss(w, h, rows), True
    )
    options = {"inner_steps": moves} | ({"perturbation": 0.1} if method == "f2sa" else {})
    solver = hg.single_loop(problem, method=method, size=SIZE, step_size=0.1, **options)
    state = solver.init(jnp.zeros(3), jnp.asarray(LAMBDA), model_state=jnp.zeros(()))
    out, state = jax.jit(solver.hypergrad)(state, jnp.asarray(LAMBDA), *_arrays(DATA), key=jax.random.key(0))
    assert float(state.model_state) == moves == int(out.info.inner_steps)
    assert int(out.info.linear_steps) == METHODS[method].products(moves)
    hg.raise_if_failed(out)


@pytest.mark.parametrize("at_once", [1, 3])
def test_through_tune_it_takes_the_steps_of_a_loop_of_ones_own(at_once):
    solver, data = _solver("saba"), _arrays(DATA)
    result = hg.tune(
        solver, jnp.zeros(3), jnp.asarray(LAMBDA), *data, outer=optax.sgd(0.1), steps=6, steps_per_call=at_once,
        every=at_once, key=jax.random.key(3), progress=False,
    )  # fmt: skip
    key = jax.random.split(jax.random.key(3))[1]
    step, state, hparams = jax.jit(solver.hypergrad), _start(solver), jnp.asarray(LAMBDA)
    for t in range(6):
        out, state = step(state, hparams, *data, key=jax.random.fold_in(key, t))
        hparams = hparams - 0.1 * out.grad
    assert_trees_close(result.hparams, hparams, tol(1e-12, 1e-5))
    assert_trees_close(result.params, state.params, tol(1e-12, 1e-5))
    assert np.all(np.isposinf(result.history.error_estimate))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "sobo"}, "single_loop: method must be one of .*found 'sobo', did you mean 'soba'"),
    "no rows": ({"method": "saba", "rows": None}, r"rows must be given for method='saba'.*write rows=\(len"),
    "rows of one data": ({"rows": 22}, "rows must be .*two integers, found 22"),
    "rows that are no numbers": ({"rows": (22, 1.5)}, "two integers, found"),
    "size beyond the training rows": ({"size": 30}, "size must be at most the 22 training rows"),
    "size beyond the validation rows": ({"size": 20}, "size must be at most the 18 validation rows"),
    "size of zero": ({"size": 0}, "size must be at least 1, found 0"),
    "several steps": ({"method": "soba", "inner_steps": 3}, "inner_steps must be 1 .*found 3: write method='amigo'"),
    "no perturbation": ({"method": "f2sa"}, r"perturbation must be given .*write perturbation=0\.01"),
    "perturbation of another": ({"method": "soba", "perturbation": 0.1}, "perturbation .*leave it out"),
    "step of zero": ({"step_size": 0.0}, "step_size must be greater than 0, found 0.0"),
    "an optimizer as a step": ({"step_size": optax.sgd(0.1)}, "step_size must be a number.*a schedule of optax"),
    "a schedule below zero": ({"step_size": lambda t: -0.1}, r"step_size gave -0\.1.* at call 0.*at least 0"),
    "a schedule that grows": ({"step_size": lambda t: 8.0**t}, "step_size gave inf at call 1000"),
    "a schedule of vectors": ({"adjoint_step_size": lambda t: jnp.ones(2)}, "adjoint_step_size gave .*one number"),
    "a schedule of nothing": ({"step_size": lambda: 0.1}, "step_size must be a number or a function of the number"),
    "step of text": ({"adjoint_step_size": "0.1"}, "adjoint_step_size must be a number, found '0.1'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_options_raises_with_what_to_write(name):
    options, message = MISTAKES[name]
    options = {"method": "saba", "size": SIZE, "rows": (TRAIN, VALID), "step_size": RATE} | options
    with pytest.raises((hg.InputError, hg.InputTypeError), match=message):
        hg.single_loop(PROBLEM, **options)


def test_a_table_larger_than_memory_raises_before_it_is_made():
    for rows, memory in (((10**12, 10**9), {}), ((TRAIN, VALID), {"memory": 100})):
        solver = _solver("saba", rows=rows, **memory)
        with pytest.raises(hg.InputError, match=r"memory must be at least .* bytes of the table .*write a larger size"):
            _start(solver)
    _start(_solver("soba", memory=100))


def test_a_mistake_in_the_data_raises_before_anything_is_compiled():
    train, valid = _arrays(DATA)
    solver, data_of = _solver("soba", rows=None), hg.minibatches(train, 4)
    for data, message in (
        ((None, valid), "train must be arrays with a leading axis of rows, found None"),
        ((train, None), "valid must be arrays"),
        ((data_of, valid), r"train must be arrays.*found hg\.minibatches: single_loop draws"),
        ((train, jax.tree.map(lambda x: x[:5], valid)), "size must be at most the 5 rows of valid, found 8"),
        (((train[0], train[1][:9], train[2]), valid), "leading axes have different lengths"),
        ((jnp.ones(()), valid), "is a scalar"),
    ):
        with pytest.raises(hg.InputError, match=message):
            solver.hypergrad(_start(solver), jnp.asarray(LAMBDA), *data, key=jax.random.key(0))
    with pytest.raises(hg.InputError, match=r"single_loop draws blocks of rows .*key is None: pass key="):
        solver.hypergrad(_start(solver), jnp.asarray(LAMBDA), train, valid)
    with pytest.raises(hg.InputError, match="train has 22 rows, but rows= says 23"):
        other = _solver("soba", rows=(23, VALID))
        other.hypergrad(_start(other), jnp.asarray(LAMBDA), train, valid, key=jax.random.key(0))


def test_what_it_says_of_itself():
    for name in METHODS:
        about = _solver(name).about
        assert (about.name, about.differentiates, about.trains_on) == ("hg.single_loop", "optimum", True)
        assert about.random == ("blocks of rows",)
        assert set(about.options) == {"step_size"} | ({"perturbation"} if name == "f2sa" else set())
    assert _solver("soba", 12).about.random == ()
    assert _solver("soba", step_size=lambda t: 0.1, adjoint_step_size=0.2).about.options == ("adjoint_step_size",)

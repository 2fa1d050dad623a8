"""What must hold for every problem, on random ones; each checker fails on a bug planted in front of it.

One compiled hypergradient serves all: what a property varies is data.

    h = c (mean sᵢ log(1 + exp(−yᵢ xᵢᵀQw)) + ½ Σ exp(λⱼ) (Qw)ⱼ²) + k Σ λ²,   λ = gain · u
    f = α mean log(1 + exp(−yᵢ xᵢᵀQw)) + β (½ ‖Qw − t‖² + Σ sin λ) + γ h
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad import Status
from hypergrad._solver import first_failure
from tests._helpers import relative_error, tol

ROWS, WIDTH = 12, 3
EXAMPLES = int(os.environ.get("HYPERGRAD_EXAMPLES", "8"))
random = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
seeds = st.integers(0, 2**32 - 1)
CLOSE = tol(1e-6, 5e-3)

Example = dict[str, Any]
Run = Callable[..., tuple[np.ndarray, hg.Hypergradient, Any]]


def _inner(w, u, d):
    z, strength = d["turn"] @ w, d["gain"] * u
    fit = jnp.mean(d["weight"] * jax.nn.softplus(-d["y"] * (d["x"] @ z)))
    return d["scale"] * (fit + 0.5 * jnp.sum(jnp.exp(strength) * z**2)) + d["extra"] * jnp.sum(strength**2)


def _outer(w, u, d):
    z, strength = d["turn"] @ w, d["gain"] * u
    fit = jnp.mean(jax.nn.softplus(-d["yv"] * (d["xv"] @ z)))
    aim = 0.5 * jnp.sum((z - d["aim"]) ** 2) + jnp.sum(jnp.sin(strength))
    return d["alpha"] * fit + d["beta"] * aim + d["gamma"] * _inner(w, u, d)


SOLVER = hg.implicit(hg.Problem(_inner, _outer))
W_STAR = hg.best_response(hg.Problem(_inner, _outer))


def example(seed: int) -> Example:
    """A random problem with hyperparameters `u`; all knobs neutral, α and β random."""
    rng = np.random.default_rng(seed)
    neutral = {"turn": np.eye(WIDTH), "scale": 1.0, "extra": 0.0, "gain": 1.0, "gamma": 0.0}
    return neutral | {
        "x": rng.normal(size=(ROWS, WIDTH)),
        "y": rng.choice([-1.0, 1.0], ROWS),
        "xv": rng.normal(size=(ROWS, WIDTH)),
        "yv": rng.choice([-1.0, 1.0], ROWS),
        "weight": rng.uniform(0.2, 2.0, ROWS),
        "aim": rng.normal(size=WIDTH),
        "alpha": rng.uniform(0.5, 2.0),
        "beta": rng.uniform(0.5, 2.0),
        "u": rng.uniform(-3.0, 0.0, WIDTH),
        "free": rng.uniform(0.3, 3.0, 4),  # for what a property varies
        "order": rng.permutation(ROWS),
        "other": rng.normal(size=(WIDTH, WIDTH)),
    }


@functools.cache
def _step() -> Any:
    return jax.jit(SOLVER.hypergrad)


def run(e: Example, state: Any = None, **options: dict[str, float]) -> tuple[np.ndarray, hg.Hypergradient, Any]:
    """`(g, out, state)`; options by part, `inner={"max_steps": 3}`."""
    u = jnp.asarray(e["u"])
    data = {k: jnp.asarray(v) for k, v in e.items() if k not in ("u", "free", "order", "other")}
    state = SOLVER.init(jnp.zeros(WIDTH), u) if state is None else state
    for part, values in options.items():
        for name, value in values.items():
            state.options[part][name] = jnp.asarray(value, state.options[part][name].dtype)
    out, state = _step()(state, u, data, data)
    return np.asarray(out.grad, np.float64), out, state


def close(found: Any, expected: Any) -> None:
    assert relative_error(found, expected) <= CLOSE, f"{found} against {expected}"


def linear_in_the_outer_loss(run: Run, e: Example) -> None:
    fit, aim = run(e | {"alpha": 1.0, "beta": 0.0})[0], run(e | {"alpha": 0.0, "beta": 1.0})[0]
    close(run(e)[0], e["alpha"] * fit + e["beta"] * aim)


def unchanged_by_a_factor_of_the_inner_loss(run: Run, e: Example) -> None:
    close(run(e | {"scale": 100 * e["free"][0]})[0], run(e)[0])


def unchanged_by_a_term_of_hyperparameters_alone(run: Run, e: Example) -> None:
    close(run(e | {"extra": e["free"][0]})[0], run(e)[0])


def unchanged_by_other_coordinates_of_the_parameters(run: Run, e: Example) -> None:
    turn = np.linalg.qr(e["other"])[0] @ np.diag(e["free"][:WIDTH])
    close(run(e | {"turn": turn})[0], run(e)[0])


def follows_the_chain_rule_in_the_hyperparameters(run: Run, e: Example) -> None:
    gain = e["free"][0]
    close(run(e | {"gain": gain, "u": e["u"] / gain})[0], gain * run(e)[0])


def unchanged_by_the_order_of_the_data(run: Run, e: Example) -> None:
    shuffled = {k: e[k][e["order"]] for k in ("x", "y", "weight")}
    close(run(e | shuffled)[0], run(e)[0])


def permutes_with_the_hyperparameters(run: Run, e: Example) -> None:
    order = np.roll(np.arange(WIDTH), 1)
    moved = {"x": e["x"][:, order], "xv": e["xv"][:, order], "aim": e["aim"][order], "u": e["u"][order]}
    close(run(e | moved)[0], run(e)[0][order])


def is_the_direct_part_where_outer_is_inner(run: Run, e: Example) -> None:
    g, _, state = run(e | {"alpha": 0.0, "beta": 0.0, "gamma": 1.0})
    close(g, 0.5 * np.exp(e["u"]) * np.asarray(state.params, np.float64) ** 2)


def the_same_from_a_warm_start(run: Run, e: Example) -> None:
    warm = run(e | {"u": e["u"] + 0.3})[2]
    close(run(e, warm)[0], run(e)[0])


def no_worse_with_tighter_tolerances(run: Run, e: Example) -> None:
    exact = run(e)[0]
    loose, tight = (
        relative_error(run(e, inner={"tol": t}, linear={"tol": t})[0], exact) for t in (1e-1, tol(1e-6, 1e-4))
    )
    assert tight <= max(loose, CLOSE)


def no_step_too_many(run: Run, e: Example) -> None:
    """More steps never turn OK into something else."""
    fine = False
    for most in (1, 2, 4, 8, 16, 32, 64):
        status = Status(int(run(e, inner={"max_steps": most}, linear={"max_steps": most})[1].info.status))
        assert status == Status.OK or not fine, f"{status.name} with {most} steps"
        fine = status == Status.OK
    assert fine


def finite_where_it_is_ok(run: Run, e: Example) -> None:
    for size in (1e-20, 1.0, 1e20):
        g, out, _ = run(e | {"alpha": size, "beta": size})
        assert Status(int(out.info.status)) == Status.OK
        numbers = [*g, float(out.value), *(float(x) for x in jax.tree.leaves(out.info))]
        assert np.all(np.isfinite(numbers))


def downhill(run: Run, e: Example) -> None:
    g, out, _ = run(e)
    step = 1e-3 / max(1.0, float(np.linalg.norm(g)))
    fall = float(out.value) - float(run(e | {"u": e["u"] - step * g})[1].value)
    expected = step * float(g @ g)
    assert abs(fall - expected) <= 0.1 * expected + tol(1e-12, 1e-6)


def _altered(change: Callable[[np.ndarray, Example], np.ndarray]) -> Run:
    def wrong(e: Example, state: Any = None, **options: Any) -> Any:
        g, out, state = run(e, state, **options)
        return change(g, e), out, state

    return wrong


def _never_ok(e: Example, state: Any = None, **options: Any) -> Any:
    g, out, state = run(e, state, **options)
    late = options.get("inner", {}).get("max_steps", 0) > 50
    return g, out._replace(info=out.info._replace(status=jnp.int32(6)) if late else out.info), state


def _infinite(e: Example, state: Any = None, **options: Any) -> Any:
    g, out, state = run(e, state, **options)
    return g, out._replace(info=out.info._replace(error_estimate=jnp.inf)), state


def _stale(e: Example, state: Any = None, **options: Any) -> Any:
    g, out, after = run(e, state, **options)
    return g * (1.0 if state is None else 1.1), out, after


def _worse(e: Example, state: Any = None, **options: Any) -> Any:
    g, out, state = run(e, state, **options)
    return g * (1.0 if options.get("inner", {}).get("tol", 1) > 0.01 else 2.0), out, state


PROPERTIES: dict[Callable[[Run, Example], None], Run] = {  # each with the bug that it must find
    linear_in_the_outer_loss: _altered(lambda g, e: g + 0.1),
    unchanged_by_a_factor_of_the_inner_loss: _altered(lambda g, e: g * e["scale"]),
    unchanged_by_a_term_of_hyperparameters_alone: _altered(lambda g, e: g + 2 * e["extra"] * e["u"]),
    unchanged_by_other_coordinates_of_the_parameters: _altered(lambda g, e: g * np.sum(e["turn"] ** 2)),
    follows_the_chain_rule_in_the_hyperparameters: _altered(lambda g, e: g / e["gain"]),
    unchanged_by_the_order_of_the_data: _altered(lambda g, e: g * e["weight"][0]),
    permutes_with_the_hyperparameters: _altered(lambda g, e: g * np.arange(1, WIDTH + 1)),
    is_the_direct_part_where_outer_is_inner: _altered(lambda g, e: -g),
    the_same_from_a_warm_start: _stale,
    no_worse_with_tighter_tolerances: _worse,
    no_step_too_many: _never_ok,
    finite_where_it_is_ok: _infinite,
    downhill: _altered(lambda g, e: -g),
}


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_a_hypergradient_is(check):
    random(given(seeds)(lambda seed: check(run, example(seed))))()


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_the_checker_finds_the_bug_planted_for_it(check):
    with pytest.raises(AssertionError):
        check(PROPERTIES[check], example(1))


@functools.cache
def _both_modes() -> Any:
    def both(u, v, cotangent, data):
        response = lambda u: W_STAR(u, jnp.zeros(WIDTH), data)
        _, tangent = jax.jvp(response, (u,), (v,))
        (pulled,) = jax.vjp(response, u)[1](cotangent)
        return jnp.vdot(cotangent, tangent), jnp.vdot(pulled, v)

    return jax.jit(both)


def _adjoint(seed: int, sign: float = 1.0) -> None:
    e = example(seed)
    data = {k: jnp.asarray(v) for k, v in e.items() if k not in ("u", "free", "order", "other")}
    forward, reverse = _both_modes()(*(jnp.asarray(x) for x in (e["u"], e["other"][0], e["other"][1])), data)
    size = np.linalg.norm(e["other"][0]) * np.linalg.norm(e["other"][1])
    assert abs(float(forward) - sign * float(reverse)) <= CLOSE * max(abs(float(forward)), 1e-2 * size)


@random
@given(seeds)
def test_reverse_mode_is_the_adjoint_of_forward_mode(seed):
    _adjoint(seed)


def test_the_checker_of_adjoints_finds_a_sign():
    with pytest.raises(AssertionError):
        _adjoint(0, sign=-1.0)


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(st.lists(st.sampled_from(sorted(Status)), min_size=1, max_size=5))
def test_the_earliest_cause_wins(codes):
    expected = next((code for code in codes if code != Status.OK), Status.OK)
    assert int(first_failure(*map(int, codes))) == expected

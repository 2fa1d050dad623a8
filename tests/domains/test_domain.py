"""Domains: hyperparameters stay inside whatever the step, coordinates round-trip, derivatives follow the chain rule."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# Wrong types are what some of these tests are about.

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hypergrad import domains
from hypergrad._solver import InputError, InputTypeError
from hypergrad.domains._domain import settle
from tests._helpers import assert_trees_close, central_difference, tol

DOMAINS = {
    "real": domains.real(),
    "positive": domains.positive(),
    "log": domains.log(),
    "unit": domains.interval(0, 1),
    "offset": domains.interval(-3.3, 0.7),
    "narrow": domains.interval(5, 5.01),
    "tiny": domains.interval(0, 1e-6),
    "simplex": domains.simplex(),
    "integer": domains.integer(-2, 7),
}
BOUNDED = {name: d for name, d in DOMAINS.items() if name != "real"}
SMOOTH = {name: d for name, d in DOMAINS.items() if name != "integer"}


def inside(name, x):
    """The definition of each domain, written out again."""
    x = np.asarray(x)
    if not np.all(np.isfinite(x)):
        return False
    if name in ("positive", "log"):
        return bool(np.all(x > 0))
    if name == "simplex":
        off = np.abs(np.sum(x, -1, dtype=np.float64) - 1)
        return bool(np.all(x >= 0) and np.all(off <= x.shape[-1] * np.finfo(x.dtype).eps))
    if name == "integer":
        return bool(np.all((x == np.round(x)) & (x >= -2) & (x <= 7)))
    lo, hi = {"unit": (0, 1), "offset": (-3.3, 0.7), "narrow": (5, 5.01), "tiny": (0, 1e-6)}[name]
    return bool(np.all((x.astype(np.float64) >= lo) & (x.astype(np.float64) <= hi)))


def sample(name, shape=(7, 5)):
    """Interior points, in the default precision."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(shape)
    if name == "simplex":
        x = np.exp(3 * normal) / np.sum(np.exp(3 * normal), axis=-1, keepdims=True)
    elif name == "integer":
        x = rng.integers(-2, 8, shape).astype(float)
    elif name in ("positive", "log"):
        x = np.exp(6 * normal)
    elif name == "real":
        x = normal
    else:
        lo, hi = {"unit": (0, 1), "offset": (-3.3, 0.7), "narrow": (5, 5.01), "tiny": (0, 1e-6)}[name]
        x = rng.uniform(lo + 0.01 * (hi - lo), hi - 0.01 * (hi - lo), shape)
    return jnp.asarray(x)


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(1.0), optax.sgd(0.3, momentum=0.9), optax.adam(0.5)], ids=["sgd", "momentum", "adam"]
)
def test_no_step_leaves_the_domain(optimizer):
    """128 000 random steps a domain and optimizer, in float32, with gradients of every magnitude up to 1e30."""
    rng = np.random.default_rng(0)
    forces = (rng.choice([-1, 1], (400, 64, 5)) * 10 ** rng.uniform(-30, 30, (400, 64, 5))).astype(np.float32)
    start = {name: jnp.asarray(sample(name, (64, 5)), jnp.float32) for name in BOUNDED}

    def step(carry, force):
        u, state = carry
        x, pull = jax.vjp(functools.partial(domains.to_constrained, BOUNDED), u)
        (gradient,) = pull(dict.fromkeys(x, force))
        updates, new = optimizer.update(gradient, state, u)
        moved = settle(BOUNDED, optax.apply_updates(u, updates), u)
        # tune refuses whole steps that are not finite
        kept = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(a), a, b), (moved, new), (u, state))
        return kept, (x, jax.tree.map(lambda a: jnp.mean(jnp.isfinite(a)), moved))

    u = domains.to_unconstrained(BOUNDED, start)
    _, (path, moved) = jax.jit(lambda u: jax.lax.scan(step, (u, optimizer.init(u)), forces))(u)
    for name in BOUNDED:
        assert path[name].dtype == jnp.float32 and path[name].size >= 100_000
        assert inside(name, path[name]), name
        assert np.mean(moved[name]) > 0.95, f"{name}: the optimizer moved freely"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BOUNDED)
def test_every_coordinate_maps_into_the_domain(name, dtype):
    if dtype != jnp.float32 and name in ("narrow", "tiny"):
        pytest.skip("fewer than two numbers, or none that are normal, in half precision")
    limit = float(jnp.finfo(dtype).max)
    u = np.asarray([-np.inf, -limit, -1e3, -88, -20, -1, -1e-30, 0, 0.3, 5, 17, 100, 1e4, limit, np.inf], dtype)
    u = jnp.asarray(np.stack([u, u[::-1]], -1))
    x = DOMAINS[name].to_constrained(u)
    assert x.dtype == dtype and x.shape == u.shape
    wide = np.asarray(x, np.float32)
    assert inside(name, wide / np.sum(wide, -1, keepdims=True) if name == "simplex" else x)


@pytest.mark.parametrize("name", DOMAINS)
def test_coordinates_round_trip(name):
    x = sample(name)
    u = DOMAINS[name].to_unconstrained(x)
    back = DOMAINS[name].to_constrained(u)
    assert back.dtype == x.dtype
    atol = tol(1e-15, 1e-6) if name == "offset" else 0  # zero lies inside: accurate to the rounding of its ends
    np.testing.assert_allclose(back, x, rtol=tol(1e-13, 1e-5), atol=atol)


@pytest.mark.parametrize("name", ["positive", "log"])
def test_magnitudes_round_trip(name):
    x = jnp.asarray(np.logspace(-30, 30, 61))
    back = DOMAINS[name].to_constrained(DOMAINS[name].to_unconstrained(x))
    np.testing.assert_allclose(back, x, rtol=tol(2e-14, 2e-5))


@pytest.mark.parametrize("name", ["unit", "offset", "simplex", "integer"])
def test_the_ends_belong_to_the_domain_and_can_be_left(name):
    x = {"unit": [0.0, 1.0], "offset": [-3.3, 0.7], "simplex": [0.0, 1.0], "integer": [-2.0, 7.0]}[name]
    u = domains.to_unconstrained(DOMAINS[name], jnp.asarray(x))
    assert np.all(np.isfinite(u))
    np.testing.assert_allclose(DOMAINS[name].to_constrained(u), x, atol=tol(1e-14, 1e-6))
    slope = jax.jit(jax.grad(lambda u: DOMAINS[name].to_constrained(u)[0]))(u)
    assert np.max(np.abs(slope)) > tol(1e-17, 1e-9)


@pytest.mark.parametrize("name", ["positive", "unit", "offset", "simplex"])
def test_one_huge_step_is_not_the_last(name):
    """From the worst place a step can reach, the derivative still tells the optimizer the way back."""
    domain = DOMAINS[name]
    u = domain.to_unconstrained(jnp.asarray([0.3, 0.7], jnp.float32))

    @jax.jit
    def slope_after(step):
        return jax.jacrev(domain.to_constrained)(domain.settle(u + step, u))

    for force in (-1e30, 1e30):
        assert np.max(np.abs(slope_after(jnp.asarray([force, -force], jnp.float32)))) > 1e-8


def test_settling_never_blocks_a_slow_descent():
    unit = domains.interval(0, 1)
    u = jnp.float32(0)
    step = jax.jit(lambda u: unit.settle(u - 0.5, u))
    for _ in range(200):
        u = step(u)
    assert float(unit.to_constrained(u)) < 1e-30


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_matches_central_differences(name, x64):
    if not x64:
        pytest.skip("central differences in float32 show nothing")
    u, weights = np.random.default_rng(0).standard_normal((2, 3))

    def scalar(u):
        return jnp.sum(weights * DOMAINS[name].to_constrained(u))

    assert_trees_close(jax.jit(jax.grad(scalar))(2 * u), central_difference(jax.jit(scalar), jnp.asarray(2 * u)), 1e-8)


@pytest.mark.parametrize("name", DOMAINS)
def test_transforms_work_under_jit_and_vmap(name):
    x = sample(name)
    u = DOMAINS[name].to_unconstrained(x)
    for f, z in ((DOMAINS[name].to_constrained, u), (DOMAINS[name].to_unconstrained, x)):
        np.testing.assert_allclose(jax.jit(f)(z), f(z), rtol=tol(1e-12, 1e-5), atol=tol(1e-12, 1e-5))
        np.testing.assert_allclose(jax.vmap(f)(z), f(z), rtol=tol(1e-12, 1e-5), atol=tol(1e-12, 1e-5))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_map_outside_jit_is_one_program(name, caplog):
    u = jnp.asarray(np.random.default_rng(0).standard_normal((3, 11)))  # a shape that no other test has
    with jax.log_compiles():
        DOMAINS[name].to_unconstrained(DOMAINS[name].to_constrained(u))
    assert sum(record.getMessage().startswith("Compiling") for record in caplog.records) == 2


HPARAMS = {
    "l2": 0.3,
    "mix": {"weights": np.asarray([0.2, 0.8]), "rate": np.float32(0.5)},
    "none": None,
    "free": (2.0, [3.0]),
}
TREE = {
    "l2": domains.log(),
    "mix": {"weights": domains.simplex(), "rate": domains.interval(0, 1)},
    "none": None,
    "free": None,
}


def test_a_tree_of_domains_is_a_prefix():
    u = domains.to_unconstrained(TREE, HPARAMS)
    assert jax.tree.structure(u) == jax.tree.structure(HPARAMS)
    np.testing.assert_allclose(u["l2"], np.log(0.3), rtol=1e-6)
    assert u["mix"]["rate"].dtype == jnp.float32
    assert float(u["free"][1][0]) == 3.0
    assert_trees_close(domains.to_constrained(TREE, u), HPARAMS, 1e-6)
    one = domains.to_unconstrained(domains.positive(), {"a": 1.0, "b": (2.0, None)})
    np.testing.assert_allclose(one["b"][0], np.log(np.expm1(2.0)), rtol=1e-6)
    same = domains.to_constrained(None, {"a": 1.0})
    assert float(same["a"]) == 1.0


def test_settling_works_leaf_by_leaf():
    u = domains.to_unconstrained(TREE, HPARAMS)
    moved = jax.tree.map(lambda x: x - 1e6, u)
    settled = settle(TREE, moved, u)
    assert jax.tree.structure(settled) == jax.tree.structure(u)
    assert float(settled["free"][0]) == float(moved["free"][0])
    assert float(settled["mix"]["rate"]) > -100


@pytest.mark.parametrize(
    ("domain", "hparams", "words"),
    [
        (domains.positive(), {"l2": -0.1}, ["hparams['l2']", "greater than 0", "-0.1", "start from"]),
        (domains.log(), np.asarray([1.0, 0.0]), ["hparams must", "greater than 0", "found 0 at index (1,)"]),
        (domains.interval(0, 1), {"a": {"b": 1.3}}, ["hparams['a']['b']", "between 0 and 1", "1.3", "interval(0, 1)"]),
        (domains.interval(0, 1), np.nan, ["hparams must", "nan"]),
        (domains.simplex(), {"w": np.asarray([0.5, 0.6])}, ["hparams['w']", "sum of 1.1", "divide"]),
        (domains.simplex(), {"w": np.asarray([[0.5, 0.5], [1.5, -0.5]])}, ["hparams['w']", "-0.5 at index (1, 1)"]),
        (domains.simplex(), {"w": 1.0}, ["hparams['w']", "found a scalar"]),
        (domains.integer(1, 5), {"k": 2.5}, ["hparams['k']", "a whole number between 1 and 5", "2.5", "round it"]),
        (domains.real(), {"k": np.inf}, ["hparams['k']", "finite"]),
        ({"l3": domains.log()}, {"l2": 1.0}, ["domain['l3'] matches nothing", "['l2']", "did you mean", "prefix"]),
        ({"l2": domains.log()}, {"l2": 1.0, "rate": 2.0}, ["hparams['rate'] has no domain", "hg.domains.real()"]),
        ((domains.log(), None), [1.0, 2.0], ["prefix"]),
        (domains.interval(1e9, 1e9 + 1), np.float32(1e9), ["interval", "float32", "widen"]),
    ],
)
def test_a_start_outside_is_named(domain, hparams, words):
    with pytest.raises(InputError) as error:
        domains.to_unconstrained(domain, hparams)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: domains.interval(1, 0), InputError, ["interval", "lo=1", "hi=0", "interval(0, 1)"]),
        (lambda: domains.interval(1, 1), InputError, ["lo must be less than hi", "out of hparams"]),
        (lambda: domains.interval(0, np.inf), InputError, ["finite", "inf", "positive()"]),
        (lambda: domains.interval("0", 1), InputTypeError, ["lo must be a number", "'0'"]),
        (lambda: domains.interval(np.zeros(2), 1), InputTypeError, ["lo must be a number", "one leaf each"]),
        (lambda: domains.interval(low=0, hi=1), InputTypeError, ["unknown option 'low'", "did you mean 'lo'"]),
        (lambda: domains.integer(0.5, 3), InputError, ["whole", "0.5"]),
        (lambda: domains.to_constrained(domains.log, 1.0), InputTypeError, ["'log'", "call it"]),
        (
            lambda: domains.to_constrained({"a": (0, 1)}, {"a": 1.0}),
            InputTypeError,
            ["domain['a'][0]", "interval(lo, hi)"],
        ),
        (lambda: domains.to_constrained(domains.log(), {"a": np.arange(3)}), InputTypeError, ["hparams['a']", "int"]),
    ],
)
def test_a_wrong_domain_is_named(make, kind, words):
    with pytest.raises(kind) as error:
        make()
    for word in words:
        assert word in str(error.value)

"""Many small leaves as one vector: the same hypergradients, from a smaller program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import _packing, _tree
from hypergrad._jaxpr.walk import inner_jaxpr, parts
from hypergrad._packing import AS_IT_IS, packing

LEAVES = 9


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The tests run on several virtual devices, on which nothing is packed."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def parameters(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {f"layer {i}": jnp.asarray(rng.normal(size=(2, 3) if i % 2 else (i % 3,))) for i in range(LEAVES)}


def curved(w, hparams, batch):
    """Strictly convex, with a minimum that depends on both hyperparameters in every leaf."""
    pairs = enumerate(jax.tree.leaves(w))
    return sum(jnp.sum(jnp.cosh(x - hparams["at"] * (i + 1) / LEAVES)) for i, x in pairs) + 0.5 * jnp.exp(
        hparams["decay"]
    ) * sum(jnp.sum(x**2) for x in jax.tree.leaves(w))


def far(w, hparams, batch):
    return sum((i + 1) * jnp.sum((x - 0.3) ** 2) for i, x in enumerate(jax.tree.leaves(w)))


HPARAMS = {"at": jnp.asarray(0.7), "decay": jnp.asarray(-1.0)}
SOLVERS = {
    "default": lambda problem: hg.implicit(problem),
    "fixed budget, every call afresh": lambda problem: hg.implicit(
        problem, linear=hg.linear.cg(max_steps=40), damping=1e-3, warm_start=False
    ),
    "map": lambda problem: hg.implicit(
        problem,
        inner=hg.inner.fixed_point(
            lambda w, h, batch: jax.tree.map(lambda x, g: x - 0.3 * g, w, jax.grad(curved)(w, h, batch))
        ),
    ),
    "online": lambda problem: hg.online(problem, optax.adam(0.05), steps=20),
}


def twice(solver):
    """The hypergradients of two calls, the second from where the first ended, and the state."""
    state = solver.init(parameters(), HPARAMS)
    call = jax.jit(solver.hypergrad)
    first, state = call(state, HPARAMS)
    second, state = call(state, HPARAMS)
    return first, second, state


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_hypergradient_and_state_in_one_vector_and_in_the_tree(name, monkeypatch):
    problem = hg.Problem(curved, far)
    assert packing(parameters()) is not AS_IT_IS
    packed = twice(SOLVERS[name](problem))
    monkeypatch.setattr(_packing, "_LEAVES", LEAVES)
    tree = twice(SOLVERS[name](problem))
    assert packing(parameters()) is AS_IT_IS
    assert jax.tree.structure(packed) == jax.tree.structure(tree)
    assert jax.tree.map(jnp.shape, packed[2]) == jax.tree.map(jnp.shape, tree[2])
    close = 2e-4 if jnp.result_type(1.0) == jnp.float32 else 1e-8
    for one, other in zip(packed[:2], tree[:2], strict=True):
        assert hg.Status(int(one.info.status)) == hg.Status(int(other.info.status))
        for got, expected in zip(jax.tree.leaves(one.grad), jax.tree.leaves(other.grad), strict=True):
            np.testing.assert_allclose(got, expected, rtol=close)


def test_one_vector_is_the_leaves_one_after_the_other():
    w = parameters()
    pack, unpack = packing(w)
    np.testing.assert_array_equal(pack(w), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(w)]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), unpack(pack(w)), w))
    assert "optimization_barrier" in jax.jit(unpack).lower(pack(w)).as_text()  # leaves of one shape share kernels
    signs = _tree.rademacher_like(jax.random.key(1), w)
    np.testing.assert_array_equal(pack(signs), _tree.rademacher_like(jax.random.key(1), pack(w)))


def test_what_stays_as_it_is(monkeypatch):
    w = parameters()
    few = {f"{i}": jnp.zeros(2) for i in range(8)}
    mixed = w | {"layer 0": jnp.zeros(2, jnp.bfloat16)}
    large = w | {"layer 0": jnp.zeros(2**18)}
    assert all(packing(tree) is AS_IT_IS for tree in (few, mixed, large))
    assert packing(w) is not AS_IT_IS
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert packing(w) is AS_IT_IS


def test_a_preconditioner_of_the_user_sees_the_tree():
    seen = []

    def scaled(v, params, hparams):
        seen.append((jax.tree.structure(v), jax.tree.structure(params)))
        return jax.tree.map(lambda x: x / 3, v)

    linear = hg.linear.cg(preconditioner=hg.linear.precondition(scaled))
    solver = hg.implicit(hg.Problem(curved, far), linear=linear)
    jax.eval_shape(solver.hypergrad, solver.init(parameters(), HPARAMS), HPARAMS)
    assert set(seen) == {(jax.tree.structure(parameters()),) * 2}


def test_the_program_is_smaller(monkeypatch):
    def equations(jaxpr):
        return len(jaxpr.eqns) + sum(equations(inner_jaxpr(part)) for e in jaxpr.eqns for part in parts(e))

    def size():
        solver = hg.implicit(hg.Problem(curved, far))
        state = solver.init(parameters(), HPARAMS)
        return equations(jax.make_jaxpr(solver.hypergrad)(state, HPARAMS).jaxpr)

    packed = size()
    monkeypatch.setattr(_packing, "_LEAVES", LEAVES)
    assert packed < 0.7 * size()

"""What tests share: tolerances, derivatives by central differences, comparisons of pytrees, sharding.

`relative_error` and `central_difference` are tested themselves, in `test_helpers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hypergrad as hg
from hypergrad._jaxpr.walk import inner_jaxpr, parts
from hypergrad._solver import evaluation

PyTree = Any


def tol(f64: float, f32: float) -> float:
    """The tolerance of this run: the first in float64, the second in float32."""
    return f64 if jax.config.read("jax_enable_x64") else f32


def flat(tree: PyTree) -> np.ndarray:
    """All leaves as one float64 vector, in the order of `jax.tree.leaves`."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def relative_error(found: PyTree, expected: PyTree) -> float:
    """`‖found − expected‖ / ‖expected‖` over all leaves; NaN counts as infinite."""
    left, right = flat(found), flat(expected)
    assert left.shape == right.shape, f"{left.shape} against {right.shape}"
    error = np.linalg.norm(left - right)
    norm = np.linalg.norm(right)
    if not np.isfinite(error):
        return np.inf
    return float(error / norm) if norm > 0 else float(error)


def assert_trees_close(found: PyTree, expected: PyTree, rtol: float) -> None:
    """Same structure and leaf shapes, and `relative_error <= rtol`."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), (
        f"{jax.tree.structure(found)} against {jax.tree.structure(expected)}"
    )
    left, right = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (found, expected))
    assert left == right, f"leaf shapes {left} against {right}"
    error = relative_error(found, expected)
    assert error <= rtol, f"relative error {error:.3g} > {rtol:.3g}\nfound    {flat(found)}\nexpected {flat(expected)}"


def assert_trees_equal(found: PyTree, expected: PyTree) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert jnp.result_type(a) == jnp.result_type(b)


def central_difference(f: Callable[[PyTree], Any], tree: PyTree, eps: float = 1e-4) -> PyTree:
    """Gradient of the scalar function `f` by fourth-order central differences, one coordinate at a time.

        f'(x) ≈ (8 (f(x+h) − f(x−h)) − (f(x+2h) − f(x−2h))) / 12h,   h = eps · max(1, |x|)

    Error O(h⁴) from truncation and O(rounding of f / h): in float64 about 1e-11 at the default.
    """
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]

    def value(i: int, index: Any, shift: float) -> float:
        moved = [leaf.copy() for leaf in leaves]
        moved[i][index] += shift
        return float(f(jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in moved])))

    result = []
    for i, leaf in enumerate(leaves):
        gradient = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            h = eps * max(1.0, abs(float(leaf[index])))
            near = value(i, index, h) - value(i, index, -h)
            far = value(i, index, 2 * h) - value(i, index, -2 * h)
            gradient[index] = (8 * near - far) / (12 * h)
        result.append(jnp.asarray(gradient))
    return jax.tree.unflatten(treedef, result)


def together(functions: Mapping[str, Callable[..., Any]], arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`{name: function(*arguments)}` in one program: XLA compiles a kernel once however often a program has it, and
    what hypergrad does beside the losses is the same everywhere."""
    return jax.jit(lambda arguments: {name: fn(*arguments[name]) for name, fn in functions.items()})(dict(arguments))


def random_like(seed: int, tree: PyTree) -> PyTree:
    """Normal numbers in the shapes and dtypes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(jnp.shape(x)), jnp.result_type(x)), tree)


def mesh(devices: list[jax.Device], name: str = "data", kind: AxisType = AxisType.Auto) -> Mesh:
    """All devices on one axis, whose type is the same in every version of JAX."""
    return jax.make_mesh((len(devices),), (name,), devices=devices, axis_types=(kind,))


def shard_rows(tree: PyTree, devices: list[jax.Device], kind: AxisType = AxisType.Auto) -> PyTree:
    """Split each leaf's leading axis over the devices where it divides; copy the other leaves to each."""
    over = mesh(devices, kind=kind)

    def place(x: Any) -> Array:
        divides = jnp.ndim(x) > 0 and jnp.shape(x)[0] > 0 and jnp.shape(x)[0] % len(devices) == 0
        return jax.device_put(x, NamedSharding(over, PartitionSpec("data") if divides else PartitionSpec()))

    return jax.tree.map(place, tree)


def keyed(solver: hg.Solver) -> hg.Solver:
    """A solver that draws, with one key for every call that gives none."""

    def init(params: PyTree, hparams: PyTree, *, key: Any = None, model_state: PyTree = None) -> Any:
        return solver.init(params, hparams, key=jax.random.key(0) if key is None else key, model_state=model_state)

    def hypergrad(state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Any = None) -> Any:
        return solver.hypergrad(state, hparams, train, valid, key=jax.random.key(1) if key is None else key)

    def evaluate(state: Any, hparams: PyTree, train: PyTree = None, valid: PyTree = None, *, key: Any = None) -> Any:
        evaluate = evaluation(solver)
        return evaluate(state, hparams, train, valid, key=jax.random.key(1) if key is None else key)

    return hg.Solver(init, hypergrad, solver.response, evaluate, solver.about)


def count(program: Any, primitive: str, *, except_in: tuple[str, ...] = ()) -> int:
    """How often an operation stands in a program, nested ones included, except those inside the operations named."""
    eqns = inner_jaxpr(program).eqns
    inside = [part for eqn in eqns if eqn.primitive.name not in except_in for part in parts(eqn)]
    here = sum(eqn.primitive.name == primitive for eqn in eqns)
    return here + sum(count(part, primitive, except_in=except_in) for part in inside)

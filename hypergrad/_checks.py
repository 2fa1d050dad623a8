"""Checks that find a caller's mistakes before anything is compiled.

Each message names the argument, its path in the tree, what was found and what to write instead.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_float, is_key, keystr

P = ParamSpec("P")
R = TypeVar("R")


def caller_level() -> int:
    """The `stacklevel` with which the caller's warning points to the first frame outside this library and JAX."""
    inside = ("hypergrad", "jax", "functools", "contextlib")
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


def suggest_names(factory: Callable[P, R]) -> Callable[P, R]:
    """Turn an unknown keyword of a public function into an error that names the nearest known one."""
    known = list(inspect.signature(factory).parameters)

    @functools.wraps(factory)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise InputTypeError(
                    f"{factory.__name__}: unknown option {name!r}{nearest(name, known)}; "
                    f"the options are {', '.join(known)}."
                )
        return factory(*args, **kwargs)

    return checked


def install(extra: str) -> str:
    """The command that installs an extra, for messages. Until the package is published, it is run in a clone."""
    return f"pip install -e '.[{extra}]' in a clone of hypergrad"


def nearest(name: str, known: Sequence[str]) -> str:
    """The hint `, did you mean 'x'?`, or an empty string if no name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def check_choice(function: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of the allowed strings."""
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise InputError(
            f"{function}: {argument} must be one of {', '.join(map(repr, allowed))}, found {value!r}{hint}"
        )


def check_hparams(hparams: PyTree) -> PyTree:
    """Hyperparameters as floating arrays; Python numbers are converted, and other leaves that are not real are refused.

    Raises:
        InputError: for a pytree without leaves.
        InputTypeError: for integer, boolean, complex, key or non-numeric leaves, with path and remedy.
    """
    if not jax.tree.leaves(hparams):
        raise InputError(
            "hparams has no leaves, so there is nothing to tune: pass a pytree of floats such as {'l2': 0.1}."
        )
    return jax.tree_util.tree_map_with_path(functools.partial(_as_float, "hparams"), hparams)


def check_params(params: PyTree) -> PyTree:
    """Parameters as floating arrays, as in `check_hparams`; concrete NaN is refused."""
    if not jax.tree.leaves(params):
        raise InputError("params has no leaves, so there is nothing to train: pass the model's parameters.")
    params = jax.tree_util.tree_map_with_path(functools.partial(_as_float, "params"), params)
    check_finite("params", params)
    return params


def check_finite(name: str, tree: PyTree) -> None:
    """Raise if a concrete floating leaf holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not is_float(leaf):
            continue
        with jax.ensure_compile_time_eval():  # a concrete array may be a constant of a function being traced
            bad = int(_count_not_finite(leaf))
        if bad:
            raise InputError(
                f"{name}{keystr(path)} holds {bad} NaN or infinite of {np.size(leaf)} values; start from finite ones."
            )


@jax.jit  # one program per shape instead of three; not one for the tree, whose leaves may be on different devices
def _count_not_finite(leaf: Array) -> Array:
    return jnp.sum(~jnp.isfinite(leaf))


def check_same_structure(name: str, found: PyTree, expected: PyTree, remedy: str) -> None:
    """Raise unless two pytrees (of arrays or of shapes) agree in structure and shapes, naming the first path that
    differs.
    """
    left = {keystr(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(found)}
    right = {keystr(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(expected)}
    for path in dict.fromkeys([*right, *left]):
        if path not in left:
            raise InputError(f"{name}{path} is missing (expected shape {right[path]}): {remedy}")
        if path not in right:
            raise InputError(f"{name}{path} of shape {left[path]} is not expected: {remedy}")
        if left[path] != right[path]:
            raise InputError(f"{name}{path} has shape {left[path]}, expected {right[path]}: {remedy}")
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise InputError(f"{name} is {jax.tree.structure(found)}, expected {jax.tree.structure(expected)}: {remedy}")


def check_data(name: str, data: PyTree) -> None:
    """Raise for a batch without examples."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if 0 in getattr(leaf, "shape", ()):
            raise InputError(
                f"{name}{keystr(path)} is empty (shape {leaf.shape}); the loss of an empty batch is NaN or 0: "
                "pass at least one example, or None for a loss that closes over its data."
            )


def _as_float(name: str, path: Any, leaf: Any) -> jax.Array:
    where = f"{name}{keystr(path)}"
    if is_key(leaf):
        raise InputTypeError(
            f"{where} is a PRNG key; only floating-point numbers can be tuned or trained: pass keys as key=."
        )
    if not isinstance(leaf, (bool, int, float, complex, np.generic, np.ndarray, jax.Array)):
        raise InputTypeError(
            f"{where} is a {type(leaf).__name__}; leaves must be floating-point arrays: "
            "bind other settings with functools.partial."
        )
    weak_int = (isinstance(leaf, int) and not isinstance(leaf, bool)) or (
        getattr(leaf, "weak_type", False) and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
    )
    if weak_int or isinstance(leaf, float):
        return jnp.asarray(leaf, jnp.result_type(float))
    if not is_float(leaf):
        raise InputTypeError(
            f"{where} has dtype {jnp.result_type(leaf)}; leaves must be real floating point: write it as a float "
            "(1.0, or x.astype(jnp.float32)), or keep it out of the tree and let the loss close over it."
        )
    return jnp.asarray(leaf, jnp.result_type(leaf))  # not weakly typed, so that a second call fits the first's trace


def spread(function: str, name: str, prefix: PyTree, tree: PyTree, *, of: str = "hparams") -> PyTree:
    """Broadcast a pytree prefix to a pytree like `tree`.

    Args:
        function: name of the calling function, for messages.
        name: name of its argument, for messages.
        prefix: value of that argument: one value, or a pytree prefix of `tree`.
        tree: the hyperparameters, or another tree that `of` names.
        of: the name of `tree`, for the message.

    Raises:
        InputError: for a pytree that is not a prefix of `tree`.
    """
    try:
        return jax.tree.map(lambda value, part: jax.tree.map(lambda _: value, part), prefix, tree)
    except ValueError as error:
        leaves = ", ".join(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        raise InputError(
            f"{function}: {name} must be one value, or a pytree prefix of {of}, whose leaves are {leaves}: {error}"
        ) from error

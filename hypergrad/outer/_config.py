"""What must stay the same for a run to continue as if it had never stopped: short strings, by name.

Values are compared by SHA-256. Functions cannot be compared in this way, so the program that they are traced to is
compared instead: the jaxpr of one step, with its constants.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from hypergrad._checks import nearest
from hypergrad._data import Minibatches, Stream
from hypergrad._jaxpr.walk import constants
from hypergrad._solver import InputError
from hypergrad._tree import PyTree, is_key, keystr
from hypergrad.domains._domain import Domain

# In the order in which they are named. The program depends on all the others, so it is compared last, and only if they
# agree.
KEYS = (
    "hypergrad",
    "jax",
    "jaxlib",
    "x64",
    "device",
    "key",
    "params",
    "hparams",
    "model_state",
    "train",
    "valid",
    "domain",
    "outer",
    "max_failures",
    "max_rejections",
    "patience",
    "min_delta",
    "test",
    "solver",
)


def config(
    traced: Any, state: PyTree, outer: Mapping[str, Any], moment: PyTree, domain: PyTree, **arguments: Any
) -> dict[str, str]:
    """The configuration of a run.

    Args:
        traced: the traced step.
        state: the solver's state at the start, which holds its options.
        outer: the functions of the outer optimizer or controller that the step calls, each with the shapes of its
            arguments.
        moment: state of the outer optimizer or controller at the start.
        domain: pytree of domains.
        **arguments: arguments of `tune` by name; numbers as they are, everything else by fingerprint.
    """
    names = jax.tree.map(lambda d: d.name, domain, is_leaf=lambda d: isinstance(d, Domain))
    steps = [program(jax.jit(function).trace(*shapes)) for function, shapes in outer.values()]
    return {
        "hypergrad": sys.modules["hypergrad"].__version__,  # an import of it would point up
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "x64": "on" if jax.config.read("jax_enable_x64") else "off",
        "device": jax.devices()[0].device_kind,
        "domain": str(names),
        "outer": _digest(*steps, fingerprint(moment)),
        "solver": _digest(program(traced), fingerprint(state)),
        **{
            name: str(v) if isinstance(v, (int, float)) or v is None else fingerprint(v)
            for name, v in arguments.items()
        },
    }


def _text(value: Any) -> str:
    return str(value) if value is None or isinstance(value, (int, float)) else fingerprint(value)


def check_config(saved: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str], what: str) -> None:
    """Raise if a run would continue with a configuration other than the one it began with.

    Args:
        saved: configuration in the checkpoint.
        now: configuration of this call.
        allowed: names that may differ.
        what: name of the checkpoint, for the message.

    Raises:
        InputError: naming what differs.
    """
    differ = [name for name in KEYS if saved.get(name) != now[name]]
    if len(differ) > 1 and "solver" in differ:
        differ.remove("solver")
    wrong = [name for name in differ if name not in allowed]
    if wrong:
        parts = [name + _change(saved.get(name, "nothing"), now[name]) for name in wrong]
        raise InputError(
            f"tune: {what} was made with another {', '.join(parts)}: pass what that run began with, or a new "
            f"folder for a new run, or allow_changed={tuple(wrong)!r} to continue it with what is passed now."
        )


def check_allowed(allow_changed: Any) -> tuple[str, ...]:
    """Return the names that may differ, as a tuple.

    Raises:
        InputError: for an unknown name.
    """
    names = (allow_changed,) if isinstance(allow_changed, str) else allow_changed
    if not isinstance(names, Iterable):
        raise InputError(f"tune: allow_changed must be names such as ('train',), found {allow_changed!r}.")
    for name in (names := tuple(names)):
        if name not in KEYS:
            hint = nearest(name, KEYS) if isinstance(name, str) else ""
            raise InputError(f"tune: allow_changed has no {name!r}{hint}; the names are {', '.join(KEYS)}.")
    return names


def fingerprint(tree: PyTree) -> str:
    """Return the SHA-256 of the paths, types, shapes and bits of the leaves."""
    if isinstance(tree, Stream):
        return f"hg.stream of {tree.per_step} batches"
    parts = [str(tree.size)] if isinstance(tree, Minibatches) else []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts += [keystr(path), *_bits(leaf)]
    return _digest(*parts)


def program(traced: Any) -> str:
    """Return the SHA-256 of a traced function: its jaxpr as text, without addresses, and the constants in it."""
    jaxpr = traced.jaxpr
    text = re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))
    return _digest(text, *(part for value in constants(jaxpr) for part in _bits(value)))


def _bits(leaf: Any) -> list[Any]:
    if is_key(leaf):
        return [str(leaf.dtype), *_bits(jax.random.key_data(leaf))]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # the part of it that this process holds
        return [str(leaf.shape), *(part for shard in leaf.addressable_shards for part in _bits(shard.data))]
    if hasattr(leaf, "__array__") or isinstance(leaf, (bool, int, float, complex)):
        array = np.asarray(leaf)
        return [array.dtype.str, str(array.shape), np.ascontiguousarray(array).reshape(-1).view(np.uint8)]
    return [re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))]


def _digest(*parts: Any) -> str:
    """SHA-256 of strings and buffers, each with its length, so that two different lists of parts never agree."""
    sha256 = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else memoryview(part)
        sha256.update(f"{len(data)}:".encode())
        sha256.update(data)
    return sha256.hexdigest()


def _change(saved: str, now: str) -> str:
    """Write `(saved → now)` where a person can read the values."""
    return "" if max(len(saved), len(now)) > 60 else f" ({saved} → {now})"

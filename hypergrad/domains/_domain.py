r"""The interface of domains, and how a tree of them maps a tree of hyperparameters: λ = T(u), leaf by leaf.

The domains themselves are in `hypergrad.domains`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad._checks import check_hparams, nearest
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, keystr


class Domain(NamedTuple):
    """One set of numbers and a smooth map onto it. Every function is pure, elementwise (`simplex`: over the last axis),
    and keeps shape and dtype.

    Attributes:
        name: as the user writes it, `"interval(0, 1)"`.
        to_constrained: `u -> λ`, in the domain for every u that is not NaN.
        to_unconstrained: `λ -> u`, its inverse on the domain.
        settle: `(u, before) -> u`, for a step from `before`: it ends where the derivative of `to_constrained` is at
            rounding level, or a factor e beyond if it began there, so that later steps can still move.
        contains: `λ -> bool`, for concrete NumPy arrays, of the shape of λ.
        requirement: completes "must be ...", in messages.
        remedy: what to write instead.
    """

    name: str
    to_constrained: Callable[[Array], Array]
    to_unconstrained: Callable[[Array], Array]
    settle: Callable[[Array, Array], Array]
    contains: Callable[[np.ndarray], np.ndarray]
    requirement: str
    remedy: str


def to_constrained(domain: PyTree, hparams: PyTree) -> PyTree:
    """Map unconstrained coordinates to hyperparameters; pure, and works under `jit` and AD.

    Args:
        domain: pytree prefix of `hparams` with domains as leaves; None stands for `real()`.
        hparams: pytree of unconstrained coordinates.

    Returns:
        Pytree like `hparams`, every leaf in its domain.

    Raises:
        InputError: if `domain` is not a prefix of `hparams`.
        InputTypeError: if a leaf of `domain` is not a domain.

    >>> import hypergrad as hg
    >>> domain = {"l2": hg.domains.log(), "mix": None}
    >>> u = hg.domains.to_unconstrained(domain, {"l2": 1.0, "mix": 3.0})
    >>> float(hg.domains.to_constrained(domain, u)["l2"])
    1.0
    """
    return _each(domain, lambda path, d, u: d.to_constrained(u), check_hparams(hparams))


def to_unconstrained(domain: PyTree, hparams: PyTree) -> PyTree:
    """Map hyperparameters to unconstrained coordinates, the inverse of `to_constrained`.

    A start exactly at an end of an interval, or a zero in a simplex, is moved inside by one rounding error of the
    width, since its coordinate would be infinite.

    Args:
        domain: pytree prefix of `hparams` with domains as leaves; None stands for `real()`.
        hparams: pytree of hyperparameters, in their domains. Concrete values are checked, traced ones are not.

    Returns:
        Pytree like `hparams`.

    Raises:
        InputError: if a value is outside its domain, naming its path, or if `domain` is not a prefix of `hparams`.
        InputTypeError: if a leaf of `domain` is not a domain.

    >>> import hypergrad as hg
    >>> float(hg.domains.to_unconstrained(hg.domains.interval(0, 1), 0.5))
    0.0
    """

    def inverse(path: Any, d: Domain, leaf: Array) -> Array:
        if not isinstance(leaf, Tracer):
            _check_inside(path, d, np.asarray(leaf))
        return d.to_unconstrained(leaf)

    return _each(domain, inverse, check_hparams(hparams))


def settle(domain: PyTree, hparams: PyTree, before: PyTree) -> PyTree:
    """Unconstrained coordinates after a step from `before`, stopped where `to_constrained` still has a derivative."""
    return _each(domain, lambda path, d, u, old: d.settle(u, old), hparams, before)


def _is_domain(x: Any) -> bool:
    return x is None or isinstance(x, Domain)


def prefix(domain: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    """The leaves of a tree of domains with their paths, and its structure; None is a leaf."""
    return jax.tree_util.tree_flatten_with_path(domain, is_leaf=_is_domain)


def _each(domain: PyTree, function: Callable[..., Array], hparams: PyTree, *others: PyTree) -> PyTree:
    """Apply `function(path, domain, leaf, *leaves of the others)` to every leaf of hparams that has a domain."""
    leaves, structure = prefix(domain)
    for path, leaf in leaves:
        check_domain(path, leaf)
    try:
        subtrees = [structure.flatten_up_to(tree) for tree in (hparams, *others)]
    except (ValueError, TypeError) as error:
        raise InputError(_mismatch(leaves, hparams)) from error

    def over(path: Any, d: Domain | None, *trees: PyTree) -> PyTree:
        if d is None:
            return trees[0]
        return jax.tree_util.tree_map_with_path(lambda rest, *values: function((*path, *rest), d, *values), *trees)

    return structure.unflatten([over(path, d, *trees) for (path, d), *trees in zip(leaves, *subtrees, strict=True)])


def _mismatch(leaves: list[tuple[Any, Any]], hparams: PyTree) -> str:
    """Name the first path by which a domain tree fails to be a prefix of hparams."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(hparams)]
    names = [keystr(path) for path in paths]
    for path, leaf in leaves:
        if leaf is not None and not any(p[: len(path)] == path for p in paths):
            return (
                f"domain{keystr(path)} matches nothing in hparams{nearest(keystr(path), names)}; domain must be a "
                f"pytree prefix of hparams, whose leaves are {', '.join(names[:8])}{', ...' * (len(names) > 8)}."
            )
    for path, name in zip(paths, names, strict=True):
        if not any(path[: len(p)] == p for p, _ in leaves):
            return (
                f"hparams{name} has no domain; domain must be a pytree prefix of hparams: "
                "add hg.domains.real() for a hyperparameter that may take any value."
            )
    return f"domain must be a pytree prefix of hparams, {jax.tree.structure(hparams)}: write one domain for each leaf."


def check_domain(path: Any, leaf: Any) -> None:
    """Raise unless a leaf of a tree of domains is a domain or None, naming its path."""
    if _is_domain(leaf):
        return
    hint = (
        "call it, as in hg.domains.positive()"
        if callable(leaf)
        else "write one of hg.domains.real(), positive(), log(), interval(lo, hi), simplex(), integer(lo, hi)"
    )
    found = repr(getattr(leaf, "__name__", leaf))
    raise InputTypeError(f"domain{keystr(path)} must be a domain or None, found {found}: {hint}.")


def _check_inside(path: Any, domain: Domain, value: np.ndarray) -> None:
    inside = domain.contains(value)
    if np.all(inside):
        return
    where = f"hparams{keystr(path)}"
    if domain.name == "simplex()" and (value.ndim == 0 or np.all(value >= 0)):
        sums = np.sum(value, axis=-1, dtype=np.float64).ravel()
        found = f"a sum of {sums[np.argmin(inside.all(axis=-1))]:g}" if value.ndim else "a scalar"
    else:
        index = np.unravel_index(int(np.argmin(inside)), value.shape)
        found = f"{float(value[index]):g}" + (f" at index {tuple(int(i) for i in index)}" if value.ndim else "")
    raise InputError(f"{where} must be {domain.requirement} ({domain.name}), found {found}: {domain.remedy}.")

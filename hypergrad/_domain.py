r"""What a domain is, and how a tree of them maps a tree of hyperparameters: λ = T(u), leaf by leaf.

The domains themselves are in `hypergrad.domains`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from hypergrad._checks import check_hparams, nearest
from hypergrad._problem import Composed, Problem
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
            rounding level, or a factor e beyond if it began there, so that one huge step is not the last one.
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
    """Unconstrained coordinates to hyperparameters; pure, under `jit` and AD as well.

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
    """Hyperparameters to unconstrained coordinates, the inverse of `to_constrained`.

    A start on the very end of an interval, or a zero in a simplex, is moved inside by one rounding error of the width,
    since its coordinate would be infinite.

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


def constrain(problem: Problem, domain: PyTree) -> Problem:
    r"""The same problem in unconstrained coordinates: its losses take u and evaluate at λ = T(u).

    `hg.tune(..., domain=domain)` does the same for a solver that is already built; this is for loops of one's own.

    Args:
        problem: what to transform. Losses keep their keys and model state, those of `hg.compose` their two parts.
        domain: pytree prefix of the hyperparameters with domains as leaves; None stands for `real()`.

    Returns:
        A problem over unconstrained hyperparameters; map them with `hg.domains.to_unconstrained` and back.

    Raises:
        InputTypeError: if a leaf of `domain` is not a domain.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 1)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum(w**2))
    >>> free = hg.constrain(problem, hg.domains.log())
    >>> float(free.inner_loss(jnp.ones(1), jnp.log(3.0), None))
    3.0
    """
    if not isinstance(problem, Problem):
        raise InputTypeError(
            f"constrain: problem must be an hg.Problem, found {type(problem).__name__}: "
            "transform the problem before building the solver."
        )
    for path, leaf in _prefix(domain)[0]:
        _check_domain(path, leaf)

    def transform(loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss)  # keeps the signature, from which hg.Problem reads whether the loss takes a key
        def transformed(params: PyTree, hparams: PyTree, *rest: Any) -> Any:
            return loss(params, to_constrained(domain, hparams), *rest)

        return transformed

    inner = problem.inner_loss
    if isinstance(inner, Composed):
        loss = inner.loss
        inner = Composed(
            transform(inner.outputs),
            lambda out, params, hparams, batch: loss(out, params, to_constrained(domain, hparams), batch),
        )
    elif inner is not None:
        inner = transform(inner)
    return Problem(inner, transform(problem.outer_loss), problem.model_state)


def _is_domain(x: Any) -> bool:
    return x is None or isinstance(x, Domain)


def _prefix(domain: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(domain, is_leaf=_is_domain)


def _each(domain: PyTree, function: Callable[..., Array], hparams: PyTree, *others: PyTree) -> PyTree:
    """Apply `function(path, domain, leaf, *leaves of the others)` to every leaf of hparams that has a domain."""
    leaves, structure = _prefix(domain)
    for path, leaf in leaves:
        _check_domain(path, leaf)
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


def _check_domain(path: Any, leaf: Any) -> None:
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

r"""One step of the outer loop, to be compiled once.

    u ← u + optimizer(∂F/∂u),   ∂F/∂u = (∂T/∂u)ᵀ g

with g from any solver. A step that is not usable leaves u and the optimizer as they were.
Cost: the hypergradient. Its report is one vector, so that one transfer brings it to the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_same_structure
from hypergrad._solver import Hypergradient, InputError, InputTypeError, Solver, Status
from hypergrad._tree import PyTree, keystr
from hypergrad.domains._domain import settle, to_constrained
from hypergrad.outer._result import SCALARS, TRAJECTORY


class Loop(NamedTuple):
    """Everything that the next step needs beside data and key: what a checkpoint has to hold."""

    step: Array
    solver: Any
    free: PyTree  # unconstrained hyperparameters
    outer: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one step sends to the host: one vector, so that one transfer brings it."""

    vector: Array  # SCALARS, metrics, extra, then hyperparameters or their summary
    metrics: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    extra: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def make_step(solver: Solver, outer: Any, domain: PyTree) -> Callable[..., tuple[Loop, PyTree, Report]]:
    """`(loop, train, valid, key) -> (loop, hparams used, report)`, to be compiled once."""
    update = optax.with_extra_args_support(outer).update

    def advance(loop: Loop, train: PyTree, valid: PyTree, key: Array | None) -> tuple[Loop, PyTree, Report]:
        hparams, pull = jax.vjp(functools.partial(to_constrained, domain), loop.free)
        key = None if key is None else jax.random.fold_in(key, loop.step)
        out, state = solver.hypergrad(loop.solver, hparams, train, valid, key=key)
        _check_output(out, hparams)
        (grad,) = pull(jax.tree.map(lambda g, h: jnp.asarray(g).astype(h.dtype), out.grad, hparams))
        try:
            updates, outer_state = update(grad, loop.outer, loop.free, value=out.value, grad=grad)
        except TypeError as error:
            raise InputTypeError(
                f"tune: outer cannot take a step from a gradient and a value alone ({error}): use "
                "optax.adam or optax.sgd, and optax.lbfgs with linesearch=None."
            ) from error
        free = settle(domain, optax.apply_updates(loop.free, updates), loop.free)
        # An optimizer's state that overflows (a second moment of 1e60) would silently stop all later steps.
        sound = _tree.all_finite((out.grad, grad, free)) & (
            _tree.all_finite(outer_state) | ~_tree.all_finite(loop.outer)
        )
        status = jnp.asarray(out.info.status, jnp.int32)
        bad = jnp.where(jnp.isfinite(out.value), int(Status.NONFINITE_GRAD), int(Status.NONFINITE_LOSS))
        status = jnp.where((status <= int(Status.INSENSITIVE)) & ~(sound & jnp.isfinite(out.value)), bad, status)
        usable = status <= int(Status.INSENSITIVE)
        new = strong(Loop(loop.step + 1, state, *_tree.where(usable, (free, outer_state), (loop.free, loop.outer))))
        _check_stable(new, loop)
        return new, hparams, _make_report(out, status, hparams)

    return advance


def _make_report(out: Hypergradient, status: Array, hparams: PyTree) -> Report:
    info = out.info
    scalars = {"value": out.value, "grad_norm": _tree.norm(jax.tree.map(jnp.asarray, out.grad)), "status": status}
    scalars |= {name: getattr(info, name) for name in SCALARS if name not in scalars}
    scalars |= {name: jnp.asarray(scalars[name]).astype(jnp.int32) for name in ("inner_steps", "linear_steps")}
    values = [*scalars.values(), *out.metrics.values(), *info.extra.values()]
    leaves = jax.tree.leaves(hparams)
    if _tree.size(hparams) <= TRAJECTORY:
        parts = [leaf.ravel() for leaf in leaves]
    else:
        parts = [
            jnp.stack([leaf.min(), leaf.mean(), leaf.max()]) if leaf.size else jnp.full(3, jnp.nan, leaf.dtype)
            for leaf in leaves
        ]
    dtype = _tree.dtype([jnp.asarray(value) for value in (*values, *leaves)])
    vector = jnp.concatenate(
        [jnp.stack([jnp.asarray(value).astype(dtype) for value in values]), *(part.astype(dtype) for part in parts)]
    )
    return Report(vector, tuple(out.metrics), tuple(info.extra))


def strong(tree: PyTree) -> PyTree:
    """Arrays without weak types, so that the second call has the types of the first."""
    return jax.tree.map(lambda x: x if _tree.is_key(x) else jnp.asarray(x, jnp.result_type(x)), tree)


def _check_output(out: Any, hparams: PyTree) -> None:
    if not isinstance(out, Hypergradient):
        raise InputTypeError(
            f"tune: solver.hypergrad must return (hg.Hypergradient, state), found {type(out).__name__} first."
        )
    if jnp.shape(out.value) != ():
        raise InputError(f"tune: the outer loss must be a scalar, found shape {jnp.shape(out.value)}: take its mean.")
    check_same_structure("the hypergradient", out.grad, hparams, "it must be a pytree like hparams.")
    reported = out.info._asdict() | out.info.extra | out.metrics
    reported.pop("extra")
    for name, value in reported.items():
        if jnp.shape(value) != ():
            raise InputError(f"tune: the solver reports {name} of shape {jnp.shape(value)}, not a scalar: reduce it.")
    taken = [name for name in out.metrics if name in (*SCALARS, "seconds", "hparams", *out.info.extra)]
    if taken:
        raise InputError(f"tune: outer_loss returned a metric named {taken[0]!r}, a name that is taken: rename it.")


def _check_stable(new: Loop, old: Loop) -> None:
    remedy = "a step must return the state with which it can be called again."
    for part, found, expected in (
        ("state of the solver", new.solver, old.solver),
        ("state of outer", new.outer, old.outer),
    ):
        check_same_structure(part, found, expected, remedy)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
            if x.dtype != y.dtype:
                raise InputTypeError(f"tune: {part}{keystr(path)} changed from {y.dtype} to {x.dtype}: {remedy}")

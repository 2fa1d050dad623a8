r"""Which hyperparameters can move which values, read from the program before anything is compiled.

    λᵢ moves y           ⇔  some chain of operations leads from λᵢ to y
    ∂y/∂λᵢ can be ≠ 0    ⇔  one such chain avoids rounding, comparisons and stop_gradient

A hyperparameter without a chain to the function that a solver differentiates has a hypergradient of exactly zero. That
is correct, but almost never what was meant (a learning rate under implicit differentiation, a misspelt key). FAR-HO
refuses it (Franceschi et al. 2017, arXiv:1703.01785, in its code), and so does this module.

Method: a forward walk over the jaxpr with two bits for each leaf. It knows control flow and nested functions, and
counts an operation that it does not know as a chain: a `True` may be wrong, a `False` is not. Since the walk is over
the *gradient* with respect to the parameters, a term h(λ) added to the training loss does not count.
Cost: one trace of a gradient and of the outer loss; nothing is run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hypergrad._checks import caller_level
from hypergrad._jaxpr.walk import called, forward, scan_counts, while_counts
from hypergrad._solver import InputError
from hypergrad._tree import PyTree, keystr

# Their derivative is zero wherever it exists. Comparisons and conversions to integers return no floats.
_FLAT = frozenset({"floor", "ceil", "round", "sign", "stop_gradient", "nextafter"})
# A rule of its own may give a derivative that the primal computation does not show (a straight-through estimator).
_OWN_RULE = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"})


class _Reach(NamedTuple):
    """Sets of leaves, as bits of a Python integer.

    Attributes:
        value: leaves that the value depends on.
        slope: leaves that the derivative can flow back to; a subset of `value`.
    """

    value: int = 0
    slope: int = 0

    def __or__(self, other: Any) -> _Reach:
        return _Reach(self.value | other.value, self.slope | other.slope)


class Influence(NamedTuple):
    """The effect of one leaf on the output of a function.

    Attributes:
        value: whether the output's value can depend on it.
        derivative: whether the output's derivative with respect to it can be other than zero.
    """

    value: bool
    derivative: bool


def influence(fn: Callable[..., PyTree], tree: PyTree, *args: PyTree) -> dict[str, Influence]:
    """The effect that each leaf of `tree` can have on the floating outputs of `fn(tree, *args)`.

    Args:
        fn: any traceable function.
        tree: pytree of arrays, concrete or traced.
        *args: the function's other arguments.

    Returns:
        `Influence` by path (`"['l2']"`; the empty string for a tree that is one array).
    """
    leaves, treedef = jax.tree.flatten(tree)
    paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def flat(*leaves: Any) -> PyTree:
        out = fn(treedef.unflatten(leaves), *args)
        return [x for x in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    closed = jax.make_jaxpr(flat)(*leaves)
    outs = _union(_walk(closed, [_Reach(1 << i, 1 << i) for i in range(len(leaves))]))
    return {path: Influence(bool(outs.value >> i & 1), bool(outs.slope >> i & 1)) for i, path in enumerate(paths)}


def slopes(program: Any) -> int:
    """The inputs of a program that a derivative of its outputs can flow back to, as bits."""
    return _union(_walk(program, [_Reach(1 << i, 1 << i) for i in range(len(program.jaxpr.invars))])).slope


def influences(fn: Callable[..., PyTree], tree: PyTree, *args: PyTree) -> dict[str, bool]:
    """Whether the derivative of `fn(tree, *args)` with respect to each leaf of `tree` can be other than zero, by path.

    >>> import jax
    >>> from hypergrad._jaxpr.sensitivity import influences
    >>> influences(lambda h: h["a"] ** 2 + jax.lax.stop_gradient(h["b"]), {"a": 1.0, "b": 2.0, "c": 3.0})
    {"['a']": True, "['b']": False, "['c']": False}
    """
    return {path: found.derivative for path, found in influence(fn, tree, *args).items()}


def check_implicit_sensitivity(
    residual: Callable[[PyTree, PyTree], PyTree],
    outer: Callable[[PyTree, PyTree], Any] | None,
    update: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree] | None,
    params: PyTree,
    inner_state: PyTree,
    hparams: PyTree,
    solver_name: str,
) -> None:
    """Name the hyperparameters that a solver which differentiates the *optimum* cannot see.

    Args:
        residual: `(params, hparams) -> F`, zero at the optimum.
        outer: `(params, hparams) -> loss` or `(loss, metrics)`; None if there is none.
        update: `(grads, params, inner_state, hparams) -> anything`, one step of the inner optimizer, or None.
        params: pytree of arrays.
        inner_state: state of the inner optimizer.
        hparams: pytree of arrays.
        solver_name: name of the solver in the message, such as `"hg.implicit"`.

    Raises:
        InputError: for a hyperparameter that only the optimizer uses.

    Warns:
        UserWarning: for a hyperparameter that nothing uses, or that is used only where derivatives are zero.
    """
    found = [influence(lambda h: residual(params, h), hparams)]
    if outer is not None:
        found.append(influence(lambda h: _loss(outer(params, h)), hparams))
    silent = _silent(found, hparams)
    if not silent:
        return
    # The gradient has the type of the parameters; their values do not matter to a trace.
    path = influence(lambda h: update(params, params, inner_state, h), hparams) if update is not None else {}
    for leaf in silent:
        if path.get(leaf, Influence(False, False)).value:
            raise InputError(
                f"{solver_name}: hparams{leaf} does not move the inner optimum, only the path to it, so its "
                "hypergradient is zero: use hg.unrolled, which differentiates the path, or keep it out of hparams."
            )
    _warn(silent, found, hparams, solver_name)


def check_unrolled_sensitivity(
    step: Callable[[PyTree, PyTree, PyTree], PyTree],
    outer: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    inner_state: PyTree,
    hparams: PyTree,
    solver_name: str = "hg.unrolled",
) -> None:
    """Name the hyperparameters that a solver which differentiates the *path* cannot see.

    Args:
        step: `(params, inner_state, hparams) -> (params, inner_state)`, one step of training.
        outer: `(params, hparams) -> loss` or `(loss, metrics)`.
        params: pytree of arrays.
        inner_state: state of the inner optimizer.
        hparams: pytree of arrays.
        solver_name: name of the solver in the message.

    Warns:
        UserWarning: for a hyperparameter that nothing uses, or that is used only where derivatives are zero.
    """
    found = [
        influence(lambda h: step(params, inner_state, h), hparams),
        influence(lambda h: _loss(outer(params, h)), hparams),
    ]
    silent = _silent(found, hparams)
    if silent:
        _warn(silent, found, hparams, solver_name)


def check_amortised_sensitivity(
    residual: Callable[[PyTree, PyTree], PyTree],
    outer: Callable[[PyTree, PyTree], Any],
    params: PyTree,
    hparams: PyTree,
    solver_name: str,
) -> None:
    """Name the hyperparameters that a solver which *learns* the response cannot see.

    It learns from the value of the training gradient, so rounding and comparisons do no harm there.

    Args:
        residual: `(params, hparams) -> ∂_w inner_loss`.
        outer: `(params, hparams) -> loss` or `(loss, metrics)`.
        params: pytree of arrays.
        hparams: pytree of arrays.
        solver_name: name of the solver in the message.

    Warns:
        UserWarning: for a hyperparameter that neither the training gradient nor the derivative of the outer loss
            depends on.
    """
    learnt = influence(lambda h: residual(params, h), hparams)
    found = [{path: Influence(x.value, x.value) for path, x in learnt.items()}]
    found.append(influence(lambda h: _loss(outer(params, h)), hparams))
    silent = _silent(found, hparams)
    if silent:
        _warn(silent, found, hparams, solver_name)


def _loss(out: Any) -> Any:
    """The loss without its metrics, which have no derivative."""
    return out[0] if isinstance(out, tuple) else out


def _silent(found: Sequence[dict[str, Influence]], hparams: PyTree) -> list[str]:
    """Leaves with entries whose derivative cannot be other than zero in any of `found`."""
    sizes = {keystr(path): jnp.size(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(hparams)}
    return [path for path in found[0] if sizes[path] and not any(f[path].derivative for f in found)]


def _warn(silent: list[str], found: Sequence[dict[str, Influence]], hparams: PyTree, solver_name: str) -> None:
    keys = ", ".join(keystr(path) or "one array" for path, _ in jax.tree_util.tree_leaves_with_path(hparams))
    for leaf in silent:
        if any(f[leaf].value for f in found):
            message = (
                f"{solver_name}: hparams{leaf} is used only through rounding, comparisons or stop_gradient, "
                "whose derivative is zero, so its hypergradient is zero: use a smooth stand-in, or keep it out "
                "of hparams."
            )
        else:
            message = (
                f"{solver_name}: hparams{leaf} is used neither by inner_loss where it could move the parameters "
                f"nor by outer_loss, so its hypergradient is zero: a misspelt key? hparams holds {keys}."
            )
        warnings.warn(message, UserWarning, stacklevel=caller_level())


def _union(reaches: Iterable[_Reach]) -> _Reach:
    total = _Reach()
    for reach in reaches:
        total = total | reach
    return total


def _walk(program: Any, ins: Sequence[_Reach]) -> list[_Reach]:
    """The influences that reach each output of a program, given those that reach its inputs."""
    # What an operation with effects writes to a reference is read by later operations.
    written = lambda eqn, ins: _union(ins)
    return forward(program, ins, _operation, lambda value: _Reach(), written)


def _operation(eqn: Any, ins: list[_Reach]) -> list[_Reach]:
    # Integers and booleans carry no derivative. (Tokens and references have no dtype.)
    return [
        out if _smooth(getattr(var.aval, "dtype", None)) else _Reach(out.value, 0)
        for var, out in zip(eqn.outvars, _equation(eqn, ins), strict=True)
    ]


@functools.cache
def _smooth(dtype: Any) -> bool:
    return dtype is None or bool(jnp.issubdtype(dtype, jnp.inexact))


def _equation(eqn: Any, ins: list[_Reach]) -> Sequence[_Reach]:
    name, count = eqn.primitive.name, len(eqn.outvars)
    everything = _union(ins)
    if not everything.value:
        return [_Reach()] * count
    if name in _FLAT:
        return [_Reach(everything.value, 0)] * count
    if eqn.effects:
        return [everything] * count
    if name == "scan":
        return _scan(eqn, ins)
    if name == "while":
        return _while(eqn, ins)
    if name == "cond":
        branches = [_walk(branch, ins[1:]) for branch in eqn.params["branches"]]
        return [_union(outs) | _Reach(ins[0].value, 0) for outs in zip(*branches, strict=True)]
    if called(eqn) is not None:
        outs = _walk(called(eqn), ins)
        return [_Reach(o.value | everything.slope, everything.slope) for o in outs] if name in _OWN_RULE else outs
    return [everything] * count


def _scan(eqn: Any, ins: list[_Reach]) -> list[_Reach]:
    consts, carries = scan_counts(eqn)
    fixed, carry, rows = ins[:consts], ins[consts : consts + carries], ins[consts + carries :]
    while True:
        outs = _walk(eqn.params["jaxpr"], [*fixed, *carry, *rows])
        grown = [a | b for a, b in zip(carry, outs[:carries], strict=True)]
        if grown == carry:
            return [*carry, *outs[carries:]]
        carry = grown


def _while(eqn: Any, ins: list[_Reach]) -> list[_Reach]:
    """The number of turns depends on the condition: it carries a value, but no derivative."""
    n_cond, n_body = while_counts(eqn)
    cond, body, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    while True:
        stop = _union(_walk(eqn.params["cond_jaxpr"], [*cond, *carry])).value
        outs = _walk(eqn.params["body_jaxpr"], [*body, *carry])
        grown = [a | b | _Reach(stop, 0) for a, b in zip(carry, outs, strict=True)]
        if grown == carry:
            return carry
        carry = grown

"""Everything that the readers of traced programs need to know about jaxprs, in one place.

There are two ways through a program: `forward` carries what a reader knows about each value from inputs to outputs, and
`evaluate` runs the program again with some of its operations replaced. The other functions describe operations that
hold programs: loops, branches, calls. Differences between versions of JAX are handled in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from hypergrad._tree import is_key

T = TypeVar("T")


def inner_jaxpr(value: Any) -> Any:
    """The jaxpr inside a parameter of an operation, or None."""
    if isinstance(value, jex.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, jex.Jaxpr) else None


def parts(eqn: Any) -> list[Any]:
    """Every program that an operation holds, closed or not."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in values if inner_jaxpr(value) is not None]


def called(eqn: Any) -> Any:
    """The program that an operation runs once, on its inputs as they are (jit, remat, custom rules), or None."""
    inside = parts(eqn)
    if eqn.primitive.name in ("scan", "while", "cond") or len(inside) != 1:
        return None
    jaxpr = inner_jaxpr(inside[0])
    same = len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    return inside[0] if same else None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """The number of a scan's inputs that are constants, and of those that are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def while_counts(eqn: Any) -> tuple[int, int]:
    """The number of inputs that are constants of a loop's condition, and of those that are constants of its body."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def constants(program: Any) -> Iterable[Any]:
    """The arrays written into a program, nested ones included."""
    yield from getattr(program, "consts", ())
    for eqn in inner_jaxpr(program).eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, jex.Literal) and np.ndim(v.val))
        for part in parts(eqn):
            yield from constants(part)


def forward(
    program: Any,
    ins: Sequence[T],
    rule: Callable[[Any, list[T]], Sequence[T]],
    constant: Callable[[Any], T],
    written: Callable[[Any, list[T]], T] | None = None,
) -> list[T]:
    """Carry what is known of the inputs of a program to its outputs.

    Args:
        program: a jaxpr, closed or not.
        ins: what is known of each input.
        rule: `(operation, what is known of its inputs) -> of its outputs`.
        constant: `value -> what is known of it`; it is given None for a constant that an open jaxpr does not hold.
        written: `(operation, what is known of its inputs) -> what is known of them afterwards`, for operations with
            effects, which write to references among their inputs.
    """
    jaxpr = inner_jaxpr(program)
    env: dict[Any, T] = dict(zip(jaxpr.invars, ins, strict=True))
    env |= {var: constant(value) for var, value in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=False)}

    def read(atom: Any) -> T:
        if isinstance(atom, jex.Literal):
            return constant(atom.val)
        return env[atom] if atom in env else constant(None)

    for eqn in jaxpr.eqns:
        known = [read(atom) for atom in eqn.invars]
        env.update(zip(eqn.outvars, rule(eqn, known), strict=True))
        if eqn.effects and written is not None:
            after = written(eqn, known)
            env.update((atom, after) for atom in eqn.invars if not isinstance(atom, jex.Literal))
    return [read(atom) for atom in jaxpr.outvars]


Replace = Callable[[Any, list[Any]], Any]


def evaluate(program: Any, inputs: Sequence[Any], replace: Replace) -> list[Any]:
    """Run a program, as `jax.core.eval_jaxpr` does, with operations replaced wherever they are nested.

    Functions with a derivative rule of their own keep it, and are not looked into.

    Args:
        program: a jaxpr, closed or not.
        inputs: arrays, concrete or traced.
        replace: `(operation, inputs) -> outputs`, or None to look into an operation that holds programs, and to run any
            other as it is.
    """
    jaxpr = inner_jaxpr(program)
    env = dict(zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _apply(eqn, [read(atom) for atom in eqn.invars], replace), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def rewritten(function: Callable[..., Any], replace: Replace) -> Callable[..., Any]:
    """The same function of pytrees, traced and run by `evaluate` with some of its operations replaced."""

    def evaluated(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = [x if is_key(x) else jnp.asarray(x) for x in jax.tree.leaves(args)]
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed, leaves, replace))

    return evaluated


def _apply(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    replaced = replace(eqn, inputs)
    if replaced is not None:
        return replaced
    nested = _NESTED.get(eqn.primitive.name)
    return bind(eqn, inputs) if nested is None else nested(eqn, inputs, replace)


def bind(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Run one operation as it is, on other inputs."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # a pair before JAX 0.9
    results = eqn.primitive.bind(*functions, *inputs, **bound)
    return results if eqn.primitive.multiple_results else [results]


def _call(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    return evaluate(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"], inputs, replace)


def _remat(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    run = lambda *xs: evaluate(eqn.params["jaxpr"], xs, replace)
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*inputs)


def _cond(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    branches = [lambda *xs, branch=branch: evaluate(branch, xs, replace) for branch in eqn.params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


def _scan(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    consts, carried = scan_counts(eqn)
    fixed, carry, rows = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        results = evaluate(eqn.params["jaxpr"], [*fixed, *carry, *row], replace)
        return results[:carried], results[carried:]

    end, stacked = lax.scan(
        body, carry, rows, length=eqn.params["length"], reverse=eqn.params["reverse"], unroll=eqn.params["unroll"]
    )
    return [*end, *stacked]


def _while(eqn: Any, inputs: list[Any], replace: Replace) -> Sequence[Any]:
    n_cond, n_body = while_counts(eqn)
    proceed = lambda carry: evaluate(eqn.params["cond_jaxpr"], [*inputs[:n_cond], *carry], replace)[0]
    body = lambda carry: evaluate(eqn.params["body_jaxpr"], [*inputs[n_cond : n_cond + n_body], *carry], replace)
    return lax.while_loop(proceed, body, inputs[n_cond + n_body :])


_NESTED: dict[str, Callable[[Any, list[Any], Replace], Sequence[Any]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "checkpoint": _remat,
    "remat2": _remat,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

r"""Optimizer updates that can be differentiated in reverse wherever their value is defined.

Reverse mode multiplies local derivatives. Where one of them is infinite or NaN, the product is NaN even if the true
derivative of the whole is finite, and optimizers are full of such places: √v of Adam at a coordinate whose gradient
is exactly zero (∞ · 0), g · c/‖g‖ of clipping in the branch that `where` did not choose, the √ of a negative number
in RAdam's. Here every primitive keeps its value, and its derivative where that is finite; elsewhere it is 0:

    out = f(x),    ∂out/∂x = f'(x) if f'(x) is finite, else 0

Why that is right, and not merely finite:
1. In a branch that was not chosen the cotangent is 0, so every finite factor gives the true contribution, 0.
2. Statistics such as v = Σ aₛ gₛ² enter as √v. With all gₛ = 0, g ↦ √v is a norm at its kink, whose symmetric
   derivative is 0; and the update m/(√v + ε) has m = 0 there, so that the kink drops out and ∂m/ε remains: exactly
   the derivative.
3. Where all local derivatives are finite, nothing changes.

`max` and `min` have another weakness: JAX's rule asks which input equals the output. Where a compiler computes an input
twice and rounds it differently, none does, and the derivative is silently 0 (seen in adamax, on XLA without its
optimizations). Here the inputs are compared with each other, and ties are shared, as by JAX's rule.

Not covered: an update whose own derivative is infinite, such as a schedule √λ at λ = 0; hyperparameters belong
inside their domain. The usual remedy, a larger `eps_root`, changes the training itself (1e-4 biases d/d lr by 78 %
in our measurements).

Method: the function is traced to a jaxpr, and the jaxpr is evaluated with those primitives replaced by

    out = where(ok, f(where(ok, x, 1)), stop_gradient(f(x))),    ok: f'(x) is finite

plain operations, whose derivatives of every order and in both modes come out right by themselves (a `custom_jvp` rule
would not do: JAX 0.10 drops it from the second derivative of a scan). Functions with a derivative rule of their own
keep it.
Cost: one more trace; each such primitive is evaluated twice, elementwise, which XLA fuses.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Literal

from hypergrad._tree import PyTree, is_key


def differentiable(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The same function, with every local derivative that is not finite replaced by 0.

    Args:
        function: of any pytrees of arrays; integers, keys and closed-over tracers pass through.

    >>> import jax, jax.numpy as jnp
    >>> from hypergrad._jaxpr.differentiable import differentiable
    >>> norm = lambda x: jnp.sqrt(jnp.sum(x**2))
    >>> print(jax.grad(norm)(jnp.zeros(2)), jax.grad(differentiable(norm))(jnp.zeros(2)))
    [nan nan] [0. 0.]
    """

    def evaluated(*args: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = [x if is_key(x) else jnp.asarray(x) for x in jax.tree.leaves(args)]
        return jax.tree.unflatten(jax.tree.structure(shapes), _evaluate(closed, leaves))

    return evaluated


# `lax` rather than `jax.numpy` below: a network's update has hundreds of these operations, and each is traced.


def _finite(*xs: Any) -> Array:
    return functools.reduce(operator.and_, [lax.is_finite(x) for x in xs])


def _power_ok(params: dict[str, Any], x: Array, y: Array) -> Array:
    del params
    in_base = _finite(y * x ** (y - 1))
    if jnp.issubdtype(jnp.result_type(y), jnp.integer):
        return in_base
    return in_base & (x >= 0) & _finite(jnp.log(jnp.where(x > 0, x, 1)) * x**y)


# Where the derivatives of a primitive, as JAX computes them, are finite. Products are among them: in a branch that was
# not chosen, a factor that is NaN times a cotangent of 0 is NaN.
_OK: dict[str, Callable[..., Array]] = {
    "mul": lambda p, x, y: _finite(x, y),
    "div": lambda p, x, y: _finite(x, y, 1 / (y * y)),
    "sqrt": lambda p, x: _finite(x) & (x > 0),
    "rsqrt": lambda p, x: _finite(lax.rsqrt(x) / x),
    "cbrt": lambda p, x: _finite(x, 1 / x),
    "log": lambda p, x: _finite(x, 1 / x) & (x > 0),
    "log1p": lambda p, x: _finite(x, 1 / (1 + x)) & (x > -1),
    "exp": lambda p, x: _finite(lax.exp(x)),
    "abs": lambda p, x: _finite(x),
    "square": lambda p, x: _finite(x),
    "tanh": lambda p, x: _finite(x),
    "logistic": lambda p, x: _finite(x),
    "integer_pow": lambda p, x: _finite(p["y"] * lax.integer_pow(x, p["y"] - 1)),
    "pow": _power_ok,
}
_EXTREMA = {"max": operator.gt, "min": operator.lt}


def _extremum(eqn: Any, inputs: Sequence[Any]) -> Array:
    out, beats = eqn.outvars[0].aval, _EXTREMA[eqn.primitive.name]
    x, y = (jnp.broadcast_to(jnp.asarray(x, out.dtype), out.shape) for x in inputs)
    shared = 0.5 * x + 0.5 * y  # of a tie, or of NaN
    return lax.select(beats(x, y), x, lax.select(beats(y, x), y, shared))


def _guarded(eqn: Any, inputs: Sequence[Any]) -> Array:
    fixed = [lax.stop_gradient(x) for x in inputs]
    ok = _OK[eqn.primitive.name](eqn.params, *fixed)
    safe = [_select(ok, x, lax.full_like(x, 1)) if isinstance(x, Array) else x for x in inputs]
    return lax.select(ok, eqn.primitive.bind(*safe, **eqn.params), eqn.primitive.bind(*fixed, **eqn.params))


def _select(ok: Array, x: Array, y: Array) -> Array:
    # A scalar may be an operand as it is, beside an array.
    return lax.select(ok, x, y) if ok.shape == x.shape else jnp.where(ok, x, y)


def _evaluate(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """Run a closed jaxpr, as `jax.core.eval_jaxpr` does, with the replacements above."""
    return _run(closed.jaxpr, closed.consts, inputs)


def _run(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _apply(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _NESTED:
        return _NESTED[name](eqn, inputs)
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if name in _EXTREMA and floating:
        return [_extremum(eqn, inputs)]
    if name in _OK and floating and not _linear(name, inputs):
        return [_guarded(eqn, inputs)]
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # a pair before JAX 0.9
    results = eqn.primitive.bind(*functions, *inputs, **bound)
    return results if eqn.primitive.multiple_results else [results]


def _linear(name: str, inputs: Sequence[Any]) -> bool:
    """Whether the operation only multiplies by a constant that was written in the code."""
    constant = [not isinstance(x, Array) for x in inputs]
    return (name == "mul" and any(constant)) or (name == "div" and constant[1])


def _call(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    return _evaluate(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"], inputs)


def _remat(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    run = lambda *xs: _run(eqn.params["jaxpr"], (), xs)
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*inputs)


def _cond(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    branches = [lambda *xs, branch=branch: _evaluate(branch, xs) for branch in eqn.params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


def _scan(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    # Inputs are constants, carry, rows; outputs are carry, rows; rows have one axis more outside than inside. How the
    # parameters say so differs between versions of JAX.
    body_jaxpr = eqn.params["jaxpr"]
    same = lambda outside, inside: sum(v.aval.ndim == w.aval.ndim for v, w in zip(outside, inside, strict=True))
    last, carried = same(eqn.invars, body_jaxpr.jaxpr.invars), same(eqn.outvars, body_jaxpr.jaxpr.outvars)
    constants, carry, rows = inputs[: last - carried], inputs[last - carried : last], inputs[last:]

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluate(body_jaxpr, [*constants, *carry, *row])
        return results[:carried], results[carried:]

    end, stacked = lax.scan(
        body, carry, rows, length=eqn.params["length"], reverse=eqn.params["reverse"], unroll=eqn.params["unroll"]
    )
    return [*end, *stacked]


def _while(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    proceed = lambda carry: _evaluate(eqn.params["cond_jaxpr"], [*inputs[:first], *carry])[0]
    body = lambda carry: _evaluate(eqn.params["body_jaxpr"], [*inputs[first:last], *carry])
    return lax.while_loop(proceed, body, inputs[last:])


_NESTED: dict[str, Callable[[Any, list[Any]], Sequence[Any]]] = {
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

r"""The interface of responses: parameters as a function of hyperparameters, fitted by training instead of solved for.

    θ(u) = base + g(u)            or, centred at c,            θ(u) = base + g(u) − g(c)

u are the unconstrained coordinates of the hyperparameters (`hg.domains`), all entries of all leaves as one vector, so
that a draw around them never leaves the domain. `hg.responses.linear()` and its siblings return a `Response`; they
differ in g alone, whose weights are the `slope`. In a centred response the base is the parameters at c itself (Bae &
Grosse 2020, Δ-STN, arXiv:2010.13514), and c can be moved without changing θ: see `recentre`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_hparams, check_params, check_same_structure
from hypergrad._options import Number
from hypergrad._solver import InputError
from hypergrad._tree import PyTree

MEMORY = Number(above=0, static=True)


class Weights(NamedTuple):
    """The weights that are trained in place of the parameters; a pytree.

    Attributes:
        base: pytree like the parameters: their values at the centre or, without a centre, where g is zero.
        slope: weights of g, a pytree that depends on the kind of response.
    """

    base: PyTree
    slope: PyTree


class InitFn(Protocol):
    """`init(key, params, hparams) -> weights`; pure. `hparams` are in unconstrained coordinates, and `key` may be None
    where nothing is drawn. A new response gives `params`, or nearly so, for every u.
    """

    def __call__(self, key: Array | None, params: PyTree, hparams: PyTree) -> Weights: ...


class ApplyFn(Protocol):
    """`apply(weights, hparams, centre=None) -> params`; pure, differentiable in the first two.

    `hparams` and `centre` are in unconstrained coordinates and have one structure. A centred response needs `centre`;
    others ignore it.
    """

    def __call__(self, weights: Weights, hparams: PyTree, centre: PyTree = None) -> PyTree: ...


class Response(NamedTuple):
    """A family of functions from hyperparameters to parameters: two pure functions.

    To write your own, write a function that returns a `Response`; solvers need to know nothing more about it.

    Attributes:
        init: see `InitFn`.
        apply: see `ApplyFn`.
        centred: whether `apply` gives `weights.base` at the centre.
    """

    init: InitFn
    apply: ApplyFn
    centred: bool


def make_response(
    name: str,
    begin: Callable[[Array | None, PyTree, int], PyTree],
    added: Callable[[PyTree, Array, Array | None, PyTree], PyTree],
    outputs: Callable[[PyTree], PyTree],
    inputs: Callable[[PyTree], int],
    *,
    centred: bool,
    memory: float | None,
    smaller: str,
) -> Response:
    """Make a response from its function g.

    Args:
        name: of the factory, for messages.
        begin: `(key, params, n) -> slope` for n hyperparameters.
        added: `(slope, u, c, base) -> g(u) − g(c)`, or g(u) for a c of None; a pytree like `base`.
        outputs: `slope -> pytree like params`, leaves `[any, *shape]`: the parameters that the slope was made for.
        inputs: `slope -> n`, the number of hyperparameters that it was made for.
        centred: whether c is the centre; otherwise it is None.
        memory: largest size of a slope in bytes; None means 2³⁰, or 16 times the parameters if that is more.
        smaller: what to write if the slope would be larger.
    """

    def init(key: Array | None, params: PyTree, hparams: PyTree) -> Weights:
        params, n = check_params(params), _tree.size(check_hparams(hparams))
        needed = _tree.nbytes(jax.eval_shape(lambda key, params: begin(key, params, n), key, params))
        most = max(2.0**30, 16.0 * _tree.nbytes(params)) if memory is None else float(memory)
        if needed > most:
            raise InputError(
                f"responses.{name}: for {n:,} hyperparameters and {_tree.size(params):,} parameters the response needs "
                f"{needed:,} bytes, more than the {most:,.0f} allowed: {smaller}, or memory={needed:.2g} if there is "
                "as much."
            )
        return Weights(params, begin(key, params, n))

    def apply(weights: Weights, hparams: PyTree, centre: PyTree = None) -> PyTree:
        base, slope = weights
        _check_tree(name, base, outputs(slope))
        if centre is not None:
            check_same_structure("hparams", hparams, centre, f"responses.{name}: give them the structure of centre.")
        elif centred:
            raise InputError(f"responses.{name}: a centred response needs its centre: apply(weights, hparams, centre).")
        u = coordinates(hparams)
        if u.size != inputs(slope):
            raise InputError(
                f"responses.{name}: hparams hold {u.size} numbers, but the response was made for {inputs(slope)}: "
                "call init with hparams of this structure."
            )
        change = added(slope, u, coordinates(centre) if centred else None, base)
        return jax.tree.map(lambda b, d: b + d.astype(b.dtype), base, change)

    return Response(init, apply, centred)


def coordinates(hparams: PyTree) -> Array:
    """All entries of all leaves as one vector `[n]`."""
    leaves = [jnp.ravel(jnp.asarray(leaf)) for leaf in jax.tree.leaves(check_hparams(hparams))]
    dtype = jnp.result_type(*leaves)
    return jnp.concatenate([leaf.astype(dtype) for leaf in leaves])


def recentre(response: Response, weights: Weights, centre: PyTree, before: PyTree) -> Weights:
    """The same function θ, written around another centre: its base is θ there."""
    if not response.centred:
        return weights
    return weights._replace(base=response.apply(weights, centre, before))


def need_key(name: str, key: Array | None) -> Array:
    """The key, without which a response cannot draw its starting weights."""
    if key is None:
        raise InputError(f"responses.{name} draws its starting weights: pass key=jax.random.key(0) to init.")
    return key


def _check_tree(name: str, base: PyTree, outputs: PyTree) -> None:
    made_for = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), outputs)
    check_same_structure(
        "params", base, made_for, f"this responses.{name} was made for other parameters: call init with these."
    )


def normal(key: Array, like: PyTree) -> PyTree:
    """Standard normal numbers in the shapes and dtypes of a tree; one draw for all, which compiles once."""
    leaves, treedef = jax.tree.flatten(like)
    flat = jax.random.normal(key, (_tree.size(like),), _tree.dtype(like))
    ends = np.cumsum([_tree.size(leaf) for leaf in leaves])[:-1]
    parts = zip(jnp.split(flat, ends), leaves, strict=True)
    return treedef.unflatten([part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in parts])


def contract(vector: Array, matrices: Any) -> PyTree:
    """`Σᵢ vectorᵢ matrixᵢ` for each leaf `[n, *shape]`, in its dtype."""
    return jax.tree.map(lambda m: jnp.tensordot(vector.astype(m.dtype), m, axes=1), matrices)

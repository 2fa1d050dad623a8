r"""Structured response: every unit of every layer has a gate that the hyperparameters open.

    kernels    W₀ + diag(Q u) W₁,   one gate an output unit            vectors and scalars    b₀ + Q u

This is the linear response with S of a kernel held to low rank: two copies of the parameters, and n numbers per unit
for n hyperparameters. The model itself is not changed; it is given parameters.

Source: MacKay et al. 2019 (self-tuning networks), arXiv:1903.03088; centred: Bae & Grosse 2020 (Δ-STN),
arXiv:2010.13514. Differs: Q starts at zero, so that the start is the plain model, and W₁ as large as W₀; biases have no
b₁, since (Q u) ⊙ b₁ is Q' u; W₀ has no scale of its own.
Cost: twice the parameters and an elementwise product. If each example has its own hyperparameters, a layer gates its
outputs instead (`hg.responses.layers`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._options import Number, options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree, keystr
from hypergrad.responses._response import MEMORY, Response, contract, make_response, need_key, normal


class Gates(NamedTuple):
    """The weights of g.

    Attributes:
        gates: Q, a pytree like the parameters with leaves `[n, units]` for kernels, `[n, *shape]` for the others.
        kernels: W₁, a pytree like the parameters; None in place of vectors and scalars.
    """

    gates: PyTree
    kernels: PyTree


@options(axis=Number(integer=True, static=True, advice="write -1 or 0"), memory=MEMORY)
def structured(*, axis: int = -1, centred: bool = True, memory: float | None = None) -> Response:
    """Parameters of a self-tuning network, in which each unit responds to the hyperparameters.

    A model from any library becomes self-tuning without changes: the weights of this response are trained, and the
    model's own loss is evaluated at the parameters that the response gives.

    Args:
        axis: axis of kernels (leaves with two or more axes) along which their output units lie: −1 for flax and Haiku,
            0 for Equinox and PyTorch.
        centred: whether to write it around the current hyperparameters (Δ-STN), so that the base is the parameters
            there.
        memory: bytes that it may hold in addition to the parameters; `init` refuses more before it allocates them.
            Default: 2³⁰ (1 GiB), or 16 times the parameters if that is more.

    Returns:
        A `Response`.

    Raises:
        InputError: from `init`, for an axis that a kernel does not have, and for a response beyond `memory`, with its
            bytes.
        InputTypeError: for an axis that is not an integer.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)}
    >>> response = hg.responses.structured()
    >>> weights = response.init(jax.random.key(0), params, {"dropout": 0.0, "decay": 0.0})
    >>> jax.tree.map(jnp.shape, weights.slope.gates)
    {'bias': (2, 3), 'kernel': (2, 3)}
    >>> print(response.apply(weights, {"dropout": 1.0, "decay": 2.0}, {"dropout": 0.0, "decay": 0.0})["bias"])
    [0. 0. 0.]
    """

    def begin(key: Array | None, params: PyTree, n: int) -> PyTree:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.ndim > 1 and not -leaf.ndim <= axis < leaf.ndim:
                raise InputError(
                    f"responses.structured: params{keystr(path)} of shape {leaf.shape} has no axis {axis}: "
                    "axis= is the one along which output units lie, -1 or 0."
                )
        # Built from the parameters rather than from a shape, so that sharded vectors stay sharded.
        units = lambda x: jnp.zeros(x.shape[axis], x.dtype) if x.ndim > 1 else jnp.zeros_like(x)
        gates = lambda x: units(x)[None] * jnp.ones((n,) + (1,) * min(x.ndim, 1), x.dtype)
        kernels = lambda x, draw: _size(x, axis).astype(x.dtype) * draw if x.ndim > 1 else None
        draws = normal(need_key("structured", key), params)
        return Gates(jax.tree.map(gates, params), jax.tree.map(kernels, params, draws))

    def added(slope: PyTree, u: Array, centre: Array | None, base: PyTree) -> PyTree:
        opened = contract(u if centre is None else u - centre, slope.gates)

        def one(x: Array, gate: Array, kernel: Array | None) -> Array:
            return gate if kernel is None else jnp.expand_dims(gate, _others(x.ndim, axis)) * kernel

        return jax.tree.map(one, base, opened, slope.kernels)

    def outputs(slope: PyTree) -> PyTree:
        return jax.tree.map(lambda gate, kernel: gate if kernel is None else kernel[None], slope.gates, slope.kernels)

    return make_response(
        "structured",
        begin,
        added,
        outputs,
        lambda slope: jax.tree.leaves(slope.gates)[0].shape[0],
        centred=centred,
        memory=memory,
        smaller="write hg.responses.linear(rank=10), which keeps ten copies of the parameters",
    )


def _others(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != axis % ndim)


def _size(kernel: Array, axis: int) -> Array:
    """The size of the entries of a kernel, or the size that its fan-in suggests if they are zero."""
    size = jnp.sqrt(jnp.mean(kernel**2))
    fan_in = kernel.size / max(kernel.shape[axis], 1)
    return jnp.where(size > 0, size, 1 / math.sqrt(max(fan_in, 1)))

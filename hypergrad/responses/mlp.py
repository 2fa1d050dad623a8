r"""Nonlinear response: a multilayer perceptron from hyperparameters to parameters, in a magnitude-invariant form.

    θ(u) = base + K z(E(γ(u))),    E(γ) = [cos(πγ/2), sin(πγ/2)] for each coordinate,    γ ∈ [0, 1]

It serves responses over a whole range of hyperparameters, where a linear one is not enough. A network fed γ itself
makes parameters in proportion to γ, which all vanish at γ = 0. E has the same norm for every γ, and the base carries
the parameters without any response.

Source: Ortiz, Guttag & Dalca 2023, "Magnitude invariant parametrizations improve hypernetwork learning",
arXiv:2304.07645. Differs: a coordinate without a known range is squashed by a sigmoid; the base takes the place of the
last layer's biases. There is LeakyReLU between layers and no normalisation; weights are normal with variance gain² /
fan-out, which keeps the norm of signals (for K, tensor by tensor).
Cost: one copy of the parameters for each unit of the last hidden layer, and a product with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._options import options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.responses._response import MEMORY, Response, contract, make_response, need_key, normal

_LEAK = 0.01


class Layers(NamedTuple):
    """The weights of g.

    Attributes:
        hidden: `((kernel [in, out], bias [out]), ...)`.
        outputs: K, a pytree like the parameters with leaves `[out, *shape]`.
    """

    hidden: tuple[tuple[Array, Array], ...]
    outputs: PyTree


@options(memory=MEMORY)
def mlp(
    *,
    hidden: Sequence[int] = (64, 64),
    within: tuple[float, float] | None = None,
    centred: bool = False,
    memory: float | None = None,
) -> Response:
    """Parameters as a nonlinear function of the unconstrained hyperparameters.

    Args:
        hidden: number of units of each hidden layer.
        within: the range of the unconstrained coordinates that matters, rescaled to [0, 1]; draws beyond it do no
            harm. None: each coordinate goes through a sigmoid.
        centred: whether to write it around the current hyperparameters, so that the base is the parameters there.
        memory: bytes that it may hold in addition to the parameters; `init` refuses more before it allocates them.
            Default: 2³⁰ (1 GiB), or 16 times the parameters if that is more.

    Returns:
        A `Response`.

    Raises:
        InputError: for an empty list of layers, or sizes that are not positive integers; for a range that is empty;
            from `init`, for a response beyond `memory`, with its bytes.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> response = hg.responses.mlp(hidden=(16,), within=(-7.0, 3.0))
    >>> weights = response.init(jax.random.key(0), jnp.zeros((8, 4)), -2.0)
    >>> response.apply(weights, -7.0).shape
    (8, 4)
    """
    sizes = tuple(hidden)
    if not sizes or any(isinstance(s, bool) or not isinstance(s, (int, np.integer)) or s < 1 for s in sizes):
        raise InputError(
            f"responses.mlp: hidden must be positive integers, found {hidden!r}: write the units of each hidden layer, "
            "such as (64, 64)."
        )
    if within is not None and not within[0] < within[1]:
        raise InputError(f"responses.mlp: within must be (lo, hi) with lo < hi, found {within!r}.")

    def begin(key: Array | None, params: PyTree, n: int) -> PyTree:
        dtype, widths = _tree.dtype(params), (2 * n, *sizes)
        kernels = tuple(jax.ShapeDtypeStruct(pair, dtype) for pair in zip(widths[:-1], sizes, strict=True))
        outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((sizes[-1], *x.shape), x.dtype), params)
        kernels, outputs = normal(need_key("mlp", key), (kernels, outputs))
        gain = math.sqrt(2 / (1 + _LEAK**2))
        return Layers(
            tuple((gain / math.sqrt(k.shape[1]) * k, jnp.zeros(k.shape[1:], dtype)) for k in kernels),
            jax.tree.map(lambda x, k: k / math.sqrt(max(x.size, 1)), params, outputs),
        )

    def features(slope: PyTree, u: Array) -> Array:
        share = jax.nn.sigmoid(u) if within is None else (u - within[0]) / (within[1] - within[0])
        angle = (0.5 * jnp.pi * share).astype(slope.hidden[0][0].dtype)
        z = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])
        for kernel, bias in slope.hidden:
            z = jax.nn.leaky_relu(z @ kernel + bias, _LEAK)
        return z

    def added(slope: PyTree, u: Array, centre: Array | None, base: PyTree) -> PyTree:
        del base
        z = features(slope, u)
        return contract(z if centre is None else z - features(slope, centre), slope.outputs)

    def inputs(slope: PyTree) -> int:
        return slope.hidden[0][0].shape[0] // 2

    return make_response(
        "mlp",
        begin,
        added,
        lambda slope: slope.outputs,
        inputs,
        centred=centred,
        memory=memory,
        smaller="write fewer units, as hidden=(16, 10)",
    )

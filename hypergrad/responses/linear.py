r"""Linear response: the tangent of the best response, or its chord over the hyperparameters that are drawn.

    θ(u) = base + S u,    S: one tensor like the parameters for each hyperparameter;    factorised,   S = A B,  rank r

Fitted on draws of small spread around λ, S tends to dw*/du. A fit at a single λ says nothing about S.
Source: Lorraine & Duvenaud 2018, "Stochastic hyperparameter optimization through hypernetworks", arXiv:1802.09419 (rank
10 for 7,850 hyperparameters). Differs: S starts at zero (if factorised, B does), so that training begins as it would
without S.
Cost: n copies of the parameters for n hyperparameters, and a product with them; r copies if factorised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._options import Number, options
from hypergrad._tree import PyTree
from hypergrad.responses._response import MEMORY, Response, contract, make_response, need_key, normal


class Factors(NamedTuple):
    """S = A B.

    Attributes:
        inputs: A, `[n, r]`.
        outputs: B, a pytree like the parameters with leaves `[r, *shape]`.
    """

    inputs: Array
    outputs: PyTree


@options(rank=Number(least=1, integer=True, static=True), memory=MEMORY)
def linear(*, rank: int | None = None, centred: bool = True, memory: float | None = None) -> Response:
    """Parameters as a linear function of the unconstrained hyperparameters.

    Args:
        rank: rank of the slope, for many hyperparameters: `rank` copies of the parameters are kept instead of one for
            each hyperparameter. None means full rank.
        centred: whether to write it around the current hyperparameters (Δ-STN), so that the base is the parameters
            there. It then trains faster: in other coordinates an error in the slope is an error in the parameters.
        memory: bytes that it may hold in addition to the parameters; `init` refuses more before it allocates them.
            Default: 2³⁰ (1 GiB), or 16 times the parameters if that is more.

    Returns:
        A `Response`. Only the factorised one draws its starting weights.

    Raises:
        InputError: for a rank below 1; from `init`, for a response beyond `memory`, with its bytes.
        InputTypeError: for a rank that is not an integer.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> response = hg.responses.linear()
    >>> weights = response.init(None, {"w": jnp.ones(2)}, 0.0)
    >>> weights = weights._replace(slope={"w": jnp.asarray([[10.0, 20.0]])})
    >>> print(response.apply(weights, 0.5, 0.4)["w"])
    [2. 3.]
    """

    def begin(key: Array | None, params: PyTree, n: int) -> PyTree:
        # Built from the parameters rather than from a shape, so that sharded arrays stay sharded.
        copies = lambda x: jnp.zeros_like(x)[None] * jnp.ones((rank or n,) + (1,) * x.ndim, x.dtype)
        start = jax.tree.map(copies, params)
        if rank is None:
            return start
        inputs = normal(need_key("linear(rank=...)", key), jax.ShapeDtypeStruct((n, rank), _tree.dtype(params)))
        return Factors(inputs / math.sqrt(n), start)

    def added(slope: PyTree, u: Array, centre: Array | None, base: PyTree) -> PyTree:
        del base
        offset = u if centre is None else u - centre
        if rank is None:
            return contract(offset, slope)
        return contract(offset.astype(slope.inputs.dtype) @ slope.inputs, slope.outputs)

    def inputs(slope: PyTree) -> int:
        return (jax.tree.leaves(slope)[0] if rank is None else slope.inputs).shape[0]

    smaller = "write hg.responses.linear(rank=10), which keeps ten copies of the parameters"
    return make_response(
        "linear",
        begin,
        added,
        lambda slope: slope if rank is None else slope.outputs,
        inputs,
        centred=centred,
        memory=memory,
        smaller=smaller,
    )

"""What a response is: how parameters follow hyperparameters, with weights that are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hypergrad._tree import PyTree


class Weights(NamedTuple):
    """What is learned of a response.

    Attributes:
        base: what the parameters are at the centre.
        slope: how they move away from there.
    """

    base: PyTree
    slope: PyTree


class Response(NamedTuple):
    """How parameters follow hyperparameters, in unconstrained coordinates.

    Attributes:
        init: `(key, params, hparams) -> weights`.
        apply: `(weights, hparams, centre) -> params`.
    """

    init: Callable[..., Any]
    apply: Callable[..., PyTree]

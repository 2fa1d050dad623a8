"""Learned functions from hyperparameters to parameters; each function here returns a `Response`.

`layers` holds flax layers with one vector of hyperparameters per example; it is imported on first use and needs the
extra `flax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hypergrad.responses._response import Response as Response
from hypergrad.responses._response import Weights as Weights
from hypergrad.responses.gated import Gated as Gated
from hypergrad.responses.gated import gated as gated
from hypergrad.responses.linear import linear as linear
from hypergrad.responses.mlp import mlp as mlp
from hypergrad.responses.structured import structured as structured

if TYPE_CHECKING:
    from hypergrad.responses import layers as layers


def __getattr__(name: str) -> Any:
    if name == "layers":
        return importlib.import_module("hypergrad.responses.layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

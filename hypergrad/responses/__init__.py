"""How parameters respond to hyperparameters, as a function that is learned: each function returns a `Response`.

`layers` holds flax layers with one vector of hyperparameters per example; it is imported when it is asked for, and
needs the extra `flax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hypergrad.responses.gated import Gated as Gated
from hypergrad.responses.gated import gated as gated

if TYPE_CHECKING:
    from hypergrad.responses import layers as layers


def __getattr__(name: str) -> Any:
    if name == "layers":
        return importlib.import_module("hypergrad.responses.layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

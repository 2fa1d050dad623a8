"""Programs that a script compiles, lowered for the platforms that no machine at hand has.

While a script runs, the first call of each function that it jits is exported for CUDA and TPU as well. An operation
that one of them lacks fails there, in the name of the function, and not in the hands of the first person with a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import export

PLATFORMS = ("cuda", "tpu")


class Lowered:
    """A jitted function whose first call, or whose lowering, exports it."""

    def __init__(self, jitted: Any, exported: list[str]) -> None:
        self._jitted, self._exported, self._done = jitted, exported, False
        self.__wrapped__ = jitted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._export(args, kwargs)
        return self._jitted(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        self._export(args, kwargs)
        return self._jitted.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        self._export(args, kwargs)
        return self._jitted.lower(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def _export(self, args: Any, kwargs: Any) -> None:
        if self._done or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return
        self._done = True
        export.export(self._jitted, platforms=PLATFORMS)(*args, **kwargs)
        self._exported.append(getattr(self._jitted, "__name__", "function"))


def lower_everything() -> list[str]:
    """From here on `jax.jit` exports what it is given; the list of the functions that it did."""
    jit, exported = jax.jit, []

    def patched(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda function: patched(function, **options)
        return Lowered(jit(function, **options), exported)

    jax.jit = patched
    return exported

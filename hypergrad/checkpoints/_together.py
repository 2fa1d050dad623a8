"""Several processes of one program and one folder: the first alone writes names, and all know what came of it.

Rename, lock and sync are ordered for one writer. So all but the arrays, which Orbax writes from every process, is done
by the process of index 0, and its result, or its error, is sent to the others, which would otherwise wait for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hypergrad._solver import InputError
from hypergrad.checkpoints._durable import CheckpointError

_KINDS: dict[str, type[Exception]] = {"InputError": InputError, "CheckpointError": CheckpointError, "OSError": OSError}


def several() -> bool:
    """Whether the program has more than one process."""
    return jax.process_count() > 1


def by_first(action: Callable[[], Any]) -> Any:
    """Call `action` in the first process, and return in every process what it returned there, or raise what it raised.

    Args:
        action: returns what JSON can hold.
    """
    if not several():
        return action()
    said: dict[str, Any] = {}
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            said = {"result": action()}
        except Exception as found:
            kind = next((name for name, kind in _KINDS.items() if isinstance(found, kind)), "RuntimeError")
            said, error = {"kind": kind, "message": str(found)}, found
    said = json.loads(_from_first(json.dumps(said).encode()))
    if error is not None:
        raise error
    if "kind" in said:
        raise _KINDS.get(said["kind"], RuntimeError)(said["message"])
    return said["result"]


def of_all(values: Mapping[str, str]) -> dict[str, str]:
    """Return the values; where they differ between processes, one fingerprint of all, which is the same in each."""
    if not several():
        return dict(values)
    from jax.experimental import multihost_utils

    own = [list(hashlib.sha256(value.encode()).digest()) for value in values.values()]
    everywhere = np.asarray(multihost_utils.process_allgather(np.asarray(own, np.uint8)))  # [processes, values, 32]
    alike = (everywhere == everywhere[0]).all(axis=(0, 2))
    together = [hashlib.sha256(everywhere[:, i].tobytes()).hexdigest() for i in range(len(own))]
    return {name: values[name] if same else other for name, same, other in zip(values, alike, together, strict=True)}


def _from_first(data: bytes) -> bytes:
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        sent[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes()

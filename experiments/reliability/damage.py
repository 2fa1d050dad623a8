"""Ways in which a checkpoint can be damaged, and whether that is noticed. Each names the file that has to be named."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hypergrad as hg

KINDS = ("flip", "overwrite", "truncate", "extend", "insert", "zero", "missing", "swapped leaf", "other step", "empty")
FILES = ("leaves.npz", "manifest.json")


def damage(folder: Path, checkpoint: str, kind: str, rng: np.random.Generator) -> str:
    """Damage one checkpoint of a folder that holds at least two; returns the path of the damaged file."""
    file = folder / checkpoint / FILES[rng.integers(2)]
    data = bytearray(file.read_bytes())
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    if kind == "flip":
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == "overwrite":
        noise = rng.bytes(len(data[place : place + length]))
        data[place : place + length] = bytes([noise[0] ^ 1]) if noise == data[place : place + length] else noise
    elif kind == "truncate":
        del data[place:]
    elif kind == "extend":
        data += rng.bytes(length)
    elif kind == "insert":
        data[place:place] = rng.bytes(length)
    elif kind == "zero":
        data[place : place + 512] = bytes(len(data[place : place + 512]))
        data[place] ^= data[place] == file.read_bytes()[place]
    elif kind == "missing":
        file.unlink()
        return str(file)
    elif kind == "swapped leaf":  # two stretches of equal length change places
        file = folder / checkpoint / FILES[0]
        data = bytearray(file.read_bytes())
        half = len(data) // 2
        first, second = int(rng.integers(half - 64)), half + int(rng.integers(half - 64))
        data[first : first + 64], data[second : second + 64] = data[second : second + 64], data[first : first + 64]
        if data == file.read_bytes():
            data[first] ^= 1
    elif kind == "other step":  # a whole file of another checkpoint
        others = [path for path in folder.glob("step-*") if path.name != checkpoint]
        shutil.copy(others[int(rng.integers(len(others)))] / file.name, file)
        return str(file)
    elif kind == "empty":
        data = bytearray()
    file.write_bytes(data)
    return str(file)


def like(folder: Path) -> Any:
    """A tree like that of a checkpoint, by what its manifest says."""
    manifest = json.loads((max(folder.glob("step-*")) / "manifest.json").read_text())["manifest"]
    return _Paths({leaf["path"]: np.zeros(leaf["shape"], leaf["dtype"]) for leaf in manifest["leaves"]})


@jax.tree_util.register_pytree_with_keys_class
class _Paths(dict):
    """Leaves under the very paths that a manifest names, whatever kind of tree they came from."""

    def tree_flatten_with_keys(self) -> Any:
        return [(_Path(path), leaf) for path, leaf in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, paths: Any, leaves: Any) -> Any:
        return cls(zip(paths, leaves, strict=True))


class _Path(str):
    """An entry of a tree path that prints as itself."""


def detected(folder: Path, tree: Any, kind: str, rng: np.random.Generator) -> bool:
    """Damage the newest checkpoint, load, and put it back: whether the one before was used and the file named."""
    paths = sorted(folder.glob("step-*"))
    kept = {file: file.read_bytes() for file in paths[-1].iterdir()}
    file = damage(folder, paths[-1].name, kind, rng)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = hg.outer.load(folder, _shorter(tree, paths[-2])).step
        except hg.HypergradError:
            step = None
    for path, data in kept.items():
        path.write_bytes(data)
    return step == int(paths[-2].name[5:]) and any(file in str(w.message) for w in caught)


def _shorter(tree: Any, path: Path) -> Any:
    """The same tree with the tables of the checkpoint before: its history is shorter."""
    rows = int(path.name[5:])
    return _Paths({name: leaf[:rows] if name.startswith("['rows']") else leaf for name, leaf in tree.items()})


def format_refused(folder: Path, tree: Any, rng: np.random.Generator) -> bool:
    """A manifest of another format, with its checksum right."""
    file = max(folder.glob("step-*")) / "manifest.json"
    kept, number = file.read_bytes(), int(rng.integers(2, 1000))
    manifest = json.loads(kept)["manifest"] | {"format": number}
    sha256 = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({"manifest": manifest, "sha256": sha256}, indent=1, sort_keys=True))
    try:
        hg.outer.load(folder, tree)
    except ValueError as error:
        return f"manifest.json has format {number}" in str(error)
    finally:
        file.write_bytes(kept)
    return False

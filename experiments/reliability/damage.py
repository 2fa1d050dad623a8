"""Ways in which a checkpoint can be damaged. Each names the file that a warning has to name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

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

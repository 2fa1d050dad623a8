"""The leaves of a pytree as plain arrays, and NumPy's npz as the file that holds them.

A typed PRNG key is stored as its uint32 words, and a dtype that NumPy does not have (bfloat16) as unsigned integers of
its width. The manifest records the original types, and `like` restores them. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._checks import nearest
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_key, keystr
from hypergrad.checkpoints._durable import Damaged, Sink, open_regular

NPZ = "leaves.npz"
_HEADER = 1 << 16  # bytes that may precede the numbers in an .npy file


def as_arrays(tree: PyTree) -> tuple[list[Any], list[dict[str, Any]]]:
    """The leaves without key types, still where they are, and their entries in the manifest: path, shape, dtype.

    Raises:
        InputTypeError: for a leaf that is neither an array nor a number.
    """
    arrays, entries = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)) or (
            not is_key(leaf) and np.dtype(_dtype(leaf)).kind in "OUSMm"
        ):
            raise InputTypeError(
                f"checkpoint: {keystr(path) or 'the tree'} is a {type(leaf).__name__}, and only arrays and numbers are "
                "saved (nothing is pickled): leave it out of the tree."
            )
        entries.append({"path": keystr(path), **_kind(leaf)})
        arrays.append(_words(leaf) if is_key(leaf) else leaf)
    return arrays, entries


def treedef(tree: PyTree) -> str:
    """The structure, for people; without addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree)))


def check_like(entries: list[dict[str, Any]], like: PyTree, what: str) -> list[Any]:
    """Raise unless the leaves of `like` have the paths, shapes and dtypes of the entries; returns them, keys as words.

    Raises:
        InputError: naming the first path that differs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(like)
    saved = {entry["path"]: entry for entry in entries}
    wanted = {keystr(path): _kind(leaf) for path, leaf in leaves}
    for path in [*wanted, *saved]:
        name = path or "the tree itself"
        if path not in saved:
            raise InputError(f"{what} holds no {name}{nearest(path, list(saved))}: it was saved from another tree.")
        if path not in wanted:
            raise InputError(f"{what} holds {name} as well, which is not asked for: it was saved from another tree.")
        for part in ("shape", "dtype"):
            if saved[path][part] != wanted[path][part]:
                found, expected = str(saved[path][part]), str(wanted[path][part])
                hint = " (jax_enable_x64 differs?)" if {found, expected} in _WIDTHS else ""
                raise InputError(
                    f"{what}: {name} has {part} {found}, expected {expected}{hint}: it was saved from another tree."
                )
    return [jax.eval_shape(_words, leaf) if is_key(leaf) else leaf for _, leaf in leaves]


_WIDTHS = ({"float32", "float64"}, {"int32", "int64"}, {"uint32", "uint64"}, {"complex64", "complex128"})


def restore(arrays: list[Any], like: PyTree) -> PyTree:
    """A pytree with the kinds of leaves that `like` has: JAX arrays on its devices, NumPy arrays, Python numbers."""
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([_as(leaf, array) for leaf, array in zip(leaves, arrays, strict=True)])


def write_npz(folder: Path, arrays: list[Any]) -> tuple[list[str | None], dict[str, dict[str, Any]]]:
    """Write one npz file and sync it.

    Returns:
        The SHA-256 of each leaf; size and SHA-256 of each file by name.
    """
    plain = [_plain(array) for array in jax.device_get(arrays)]
    with Sink(folder / NPZ) as file, zipfile.ZipFile(file, "w") as archive:  # as np.savez, which needs a seekable file
        for index, array in enumerate(plain):
            with archive.open(f"{index:04d}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return [_sha256(array) for array in plain], {NPZ: {"size": file.size, "sha256": file.sha256.hexdigest()}}


def read_npz(folder: Path, entries: list[dict[str, Any]], like: list[Any]) -> list[Any]:
    """Read the npz file; `like` has the shapes and dtypes of the entries.

    Raises:
        Damaged: for anything other than what was written, naming the first leaf.
    """
    path, arrays, where = folder / NPZ, [], ""
    with open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(file)
            for index, (entry, leaf) in enumerate(zip(entries, like, strict=True)):
                where = f" (leaf {entry['path']})"
                arrays.append(_member(archive, index, np.dtype(_dtype(leaf)), np.shape(leaf), entry["sha256"]))
        except Exception as error:  # zipfile raises many kinds for files that are not zip archives
            raise Damaged(f"{path} cannot be read{where}: {error or type(error).__name__}") from error
    return arrays


def leaf_damaged(path: Path, entries: list[dict[str, Any]]) -> str:
    """The first leaf of a damaged npz that is not what was written, for a message; "" if that is not known."""
    if path.name != NPZ:
        return ""
    with contextlib.suppress(Exception), open_regular(path) as file:
        archive = zipfile.ZipFile(file)
        for index, entry in enumerate(entries):
            sound = False
            with contextlib.suppress(Exception), archive.open(f"{index:04d}.npy") as member:
                sound = _sha256(np.lib.format.read_array(member, allow_pickle=False)) == entry["sha256"]
            if not sound:
                return f" (leaf {entry['path']})"
    return ""


def _member(archive: zipfile.ZipFile, index: int, dtype: np.dtype, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    info = archive.getinfo(f"{index:04d}.npy")
    # No more bytes are read than the array has, whatever the file says; nothing is decompressed.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > dtype.itemsize * int(np.prod(shape)) + _HEADER:
        raise ValueError("it is larger than its array")
    with archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    if array.shape != shape or array.dtype != _storage(dtype) or _sha256(array) != sha256:
        raise ValueError("it is not what was written")
    return array.view(dtype)


def _words(key: Any) -> Any:
    return jax.random.key_data(key)


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype) if is_key(leaf) else np.dtype(_dtype(leaf)).name}


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)


def _plain(array: Any) -> np.ndarray:
    array = np.asarray(array, order="C")
    return array.view(_storage(array.dtype))


def _storage(dtype: np.dtype) -> np.dtype:
    """The dtype in a file: NumPy's own, or unsigned integers of the same width for those of ml_dtypes."""
    native = dtype.isbuiltin == 1 and dtype.kind in "biufc"
    return dtype.newbyteorder("<") if native else np.dtype(f"<u{dtype.itemsize}")


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _as(like: Any, array: Any) -> Any:
    if isinstance(like, (bool, int, float, complex)) and not isinstance(like, np.generic):
        return type(like)(array)
    if isinstance(like, np.generic):
        return np.asarray(array)[()]
    if isinstance(like, np.ndarray):
        return np.asarray(array)
    placed = isinstance(array, jax.Array) and not array.is_fully_addressable  # by Orbax, where `like` is
    if is_key(like):
        impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else None
        if placed:
            return jax.random.wrap_key_data(array, impl=impl)
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    elif not placed:
        array = jnp.asarray(array)
    sharding = getattr(like, "sharding", None)
    # An array that is bound to no device stays so: it goes where the data are, and the step is compiled once.
    if placed or sharding is None or not getattr(like, "committed", True):
        return array
    return jax.device_put(array, sharding)

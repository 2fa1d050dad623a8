r"""Checkpoints: a pytree on disk, whole or not at all, and never a different one from the one saved.

    folder/lock                          held by the one process that writes
    folder/step-000000000120/
        leaves.npz                       the arrays, for `numpy.load`; or what Orbax writes, see `hg.outer.orbax`
        manifest.json                    treedef; path, shape, dtype and SHA-256 of each leaf; SHA-256 of each file
    folder/rows/, folder/rows-copy/      all but the last rows of a growing table: see `_log`
    folder/tmp-120-4711/                 being written; once complete and synced it is renamed to step-...

Source: the order of operations is that of Pillai et al. 2014, "All file systems are not created equal"; see `_durable`.
Differs from `numpy.savez`, pickle, flax and Orbax in that
1. a flipped bit is an error that names the file: of those formats only npz notices it (it has checksums, though not of
   the names);
2. a kill at any instant, a full disk or a failing disk leaves the checkpoints before it as they were;
3. nothing in a file is run or followed: no pickle, no paths read from it, no links.
Cost: one transfer to the host, two SHA-256 of the bytes, four syncs (a few ms). Memory: one copy on the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hypergrad._checks import caller_level
from hypergrad._options import Number, options
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.checkpoints import _durable, _log, _together
from hypergrad.checkpoints._durable import CheckpointError, Damaged
from hypergrad.checkpoints._leaves import as_arrays, check_like, leaf_damaged, read_npz, restore, treedef, write_npz

FORMAT = 1
KEEP = 3
_MANIFEST = "manifest.json"
_LOOKS = 1000  # attempts of a reader next to a fast writer; each but the last was overtaken by a new checkpoint
_STEP = re.compile(r"step-(\d{12,})")


class Store(NamedTuple):
    """A folder of checkpoints, and how their leaves are written into it. A path alone stands for NumPy's npz.

    Attributes:
        folder: where the checkpoints are.
        name: name of the kind of file, in the manifest.
        write: `(folder, arrays) -> (hashes, files)`: writes a list of host or device arrays into an existing folder,
            synced. Returns the SHA-256 of each (None where no process has all of it); size and SHA-256 of each file.
        read: `(folder, entries, like)`: reads them back as a list. `entries` are the manifest's, `like` the arrays (or
            shapes) whose place on the devices is wanted.
    """

    folder: Path
    name: str
    write: Callable[[Path, list[Any]], tuple[list[str | None], dict[str, dict[str, Any]]]]
    read: Callable[[Path, list[dict[str, Any]], list[Any]], list[Any]]


class Loaded(NamedTuple):
    """The result of `hg.outer.load`.

    Attributes:
        step: the number under which it was saved.
        tree: pytree like the one asked for.
    """

    step: int
    tree: PyTree


@options(step=Number(least=0, integer=True), keep=Number(least=1, integer=True))
def save(folder: str | os.PathLike[str] | Store, tree: PyTree, *, step: int, keep: int = KEEP) -> Path:
    """Write a pytree of arrays to disk, so that it is there completely or not at all.

    Leaves may be arrays of any dtype (bfloat16 and typed PRNG keys included) and Python numbers. The last `keep`
    checkpoints are kept; an older one is deleted only after the new one was read back.

    Args:
        folder: folder of the checkpoints, made if it does not exist; or `hg.outer.orbax(folder)`, for state that is
            sharded over devices.
        tree: pytree of arrays.
        step: number of this checkpoint; the highest is the newest.
        keep: how many checkpoints are kept.

    Returns:
        The folder of this checkpoint.

    Raises:
        InputError: for a step or `keep` out of range, and for npz files where the program has several processes.
        InputTypeError: for a leaf that is not an array or number, naming its path.
        CheckpointError: if another process is writing to the folder.
        OSError: if it cannot be written; earlier checkpoints stay as they were.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> tree = {"w": jnp.arange(3.0, dtype=jnp.bfloat16), "key": jax.random.key(0)}
    >>> hg.outer.save(folder, tree, step=7).name
    'step-000000000007'
    >>> hg.outer.load(folder, tree).tree["w"]
    Array([0, 1, 2], dtype=bfloat16)
    """
    check_store("save", store := as_store("save", folder))
    with contextlib.ExitStack() as stack:
        _together.by_first(lambda: _hold(stack, store))
        return write(store, int(step), tree, keep=int(keep))


def _hold(stack: contextlib.ExitStack, store: Store) -> None:
    store.folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_durable.locked(store.folder))


@options()
def load(folder: str | os.PathLike[str] | Store, like: PyTree) -> Loaded:
    """Read the newest checkpoint that is whole, as a pytree like `like`, on the devices where `like` is.

    Every byte is checked against its SHA-256. A damaged checkpoint is named in a warning, and the one before it is
    used.

    Args:
        folder: as given to `save`.
        like: pytree of arrays (their values do not matter), instances of `jax.ShapeDtypeStruct`, or Python numbers.

    Returns:
        `(step, tree)`.

    Raises:
        CheckpointError: if there is no checkpoint, or none that is whole, naming the damaged files.
        InputError: if the checkpoint holds another tree, naming the first path that differs.

    Warns:
        UserWarning: naming each damaged file that was passed over.

    >>> import hypergrad as hg, jax.numpy as jnp, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = hg.outer.save(folder, {"n": 3, "w": jnp.ones(2, jnp.float32)}, step=1)
    >>> hg.outer.load(folder, {"n": 0, "w": jnp.zeros(2, jnp.float32)})
    Loaded(step=1, tree={'n': 3, 'w': Array([1., 1.], dtype=float32)})
    """
    store = as_store("load", folder)
    found = newest(store, lambda manifest: like)
    if found is None:
        raise CheckpointError(
            f"load: there is no checkpoint in {str(store.folder)!r}: is that the folder it was saved to?"
        )
    return Loaded(found.manifest["step"], found.tree)


def check_store(where: str, store: Store) -> None:
    """Check that the processes of a program may share a folder.

    Raises:
        InputError: for npz files under `jax.distributed` with several processes, none of which has all of the arrays.
    """
    if (count := jax.process_count()) > 1 and store.name == "npz":
        raise InputError(
            f"{where}: npz files are written by one process, and this program has {count}: pass "
            "hg.outer.orbax(folder), a folder that all processes see, in which each writes its part of the arrays."
        )


def as_store(where: str, folder: Any) -> Store:
    """A path becomes a store of npz files.

    Raises:
        InputError: on a system that cannot keep checkpoints.
        InputTypeError: for anything else.
    """
    _durable.check_system(where)
    if isinstance(folder, Store):
        return folder
    if isinstance(folder, (str, os.PathLike)) and isinstance(os.fspath(folder), str) and os.fspath(folder):
        return Store(Path(folder), "npz", write_npz, read_npz)
    raise InputTypeError(f"{where}: the folder must be a path such as 'runs/first', found {folder!r}.")


def write(
    store: Store,
    step: int,
    tree: PyTree,
    *,
    config: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
    keep: int = KEEP,
    damaged: Collection[Path] = (),
    log: _log.Tables | None = None,
    sealed: dict[tuple[int, int], _log.Segment] | None = None,
) -> Path:
    """`save`, for a caller that holds the lock.

    Args:
        store: where to write.
        step: number of the checkpoint.
        tree: pytree of arrays.
        config: values that must be the same for the checkpoint to be used, by name.
        notes: anything else, as JSON.
        keep: how many checkpoints stay.
        damaged: checkpoints that were found damaged, to be deleted once this one is safe.
        log: arrays of one length, by name: those of the previous checkpoint with more rows. Rows that were written
            before are not written again. The last rows join the tree, a dict, under `"rows"`.
        sealed: the segments already written, which the caller keeps from one call to the next; updated.

    Raises:
        OSError: if it cannot be written or read back; nothing was deleted.
    """
    segments: list[_log.Segment] = []
    if log is not None:
        known = {} if sealed is None else sealed
        made = _together.by_first(lambda: _log.seal(store.folder, log, known))
        segments = [_log.Segment(*segment) for segment in made]
        tree = {**tree, "rows": _log.tail(log)}
    arrays, entries = as_arrays(tree)
    target = store.folder / f"step-{step:012d}"
    new = store.folder / _together.by_first(lambda: _make(store.folder, f"tmp-{step}-{os.getpid()}"))

    def finish() -> None:
        manifest = {
            "format": FORMAT,
            "step": step,
            "store": store.name,
            "config": dict(config or {}),
            "notes": dict(notes or {}),
            "treedef": treedef(tree),
            "leaves": [entry | {"sha256": sha256} for entry, sha256 in zip(entries, hashes, strict=True)],
            "files": files,
        }
        if segments:
            manifest["log"] = [list(segment) for segment in segments]
        text = _encode(manifest)
        with _durable.Sink(new / _MANIFEST) as file:
            file.write(text)
        _durable.sync_folder(new)
        if not _is_whole(target, text, files):  # a run that was interrupted while saving saves the same again
            _durable.replace(new, target)
        _durable.remove(new)
        if not _holds(target, text):
            raise OSError(f"{target / _MANIFEST} reads back as something else than was written")
        for path in {*damaged, *[path for _, path in _candidates(store.folder)[keep:]]} - {target}:
            _prune(path, new)
        if log is not None:
            _clear_log(store)

    try:
        hashes, files = store.write(new, arrays)
        _together.by_first(finish)
    finally:
        if jax.process_index() == 0:
            _durable.remove(new)
    return target


def _make(folder: Path, name: str) -> str:
    _durable.remove(folder / name)
    os.mkdir(folder / name)
    return name


def _clear_log(store: Store) -> None:
    """Delete the segments of rows that no checkpoint needs any more; none, if a manifest cannot be read."""
    needed = set()
    with contextlib.suppress(Damaged, InputError):
        for step, path in _candidates(store.folder):
            needed |= {segment.name for segment in _log.parse(_read_manifest(path, store, step).get("log", []))}
        _log.clear(store.folder, needed)


class Found(NamedTuple):
    """A checkpoint that is whole.

    Attributes:
        tree: the pytree that was saved.
        manifest: its manifest.
        damaged: newer checkpoints that are damaged.
        log: the tables that were saved with it, all rows; empty if there were none.
        sealed: argument of `write` for the checkpoints after this one.
    """

    tree: PyTree
    manifest: dict[str, Any]
    damaged: list[Path]
    log: dict[str, Any]
    sealed: dict[tuple[int, int], _log.Segment]


def newest(
    store: Store,
    like: Callable[[dict[str, Any]], PyTree],
    check: Callable[[dict[str, Any]], None] = lambda manifest: None,
) -> Found | None:
    """The newest checkpoint that is whole, or None if no checkpoint exists at all.

    Args:
        store: where to look.
        like: function from a manifest to the pytree asked for.
        check: called with a manifest that is whole, before the leaves are read; raises to refuse it.

    Raises:
        CheckpointError: if all are damaged.
        InputError: if the checkpoint holds another tree.
    """
    if _together.several():
        return _newest_of_all(store, like, check)
    for _ in range(_LOOKS):
        with contextlib.suppress(_Moved):
            return _newest(store, like, check)
    raise CheckpointError(
        f"checkpoints: those in {str(store.folder)!r} are replaced faster than they can be read: write them less "
        "often, or read them in the process that writes them."
    )


class _Moved(Exception):
    """A writer replaced the checkpoint that looked damaged while it was being read."""


def _newest(
    store: Store, like: Callable[[dict[str, Any]], PyTree], check: Callable[[dict[str, Any]], None]
) -> Found | None:
    damaged: dict[Path, str] = {}
    for step, path in _candidates(store.folder):
        before = _identity(path)
        try:
            manifest = _read_manifest(path, store, step)
            check(manifest)
            tree = _read(store, path, manifest, like(manifest))
            log, sealed, lost = _read_log(store, manifest, tree)
        except Damaged as error:
            if before is None or _identity(path) != before:
                raise _Moved from None
            damaged[path] = str(error)
            continue
        if damaged:
            _warn_passed_over(damaged.values(), step)
        if lost and _identity(path) == before:
            warnings.warn(
                f"checkpoints: {'; '.join(lost)}. Nothing is lost: its copy is whole, and the next checkpoint writes "
                "it anew.",
                UserWarning,
                stacklevel=caller_level(),
            )
        return Found(tree, manifest, list(damaged), log, sealed)
    if damaged:
        raise _none_is_whole(store, damaged.values())
    return None


def _newest_of_all(
    store: Store, like: Callable[[dict[str, Any]], PyTree], check: Callable[[dict[str, Any]], None]
) -> Found | None:
    """The same for several processes: the first looks for the checkpoint, and all read it."""

    def choose() -> tuple[int, dict[str, str]] | None:
        damaged: dict[str, str] = {}
        for step, path in _candidates(store.folder):
            try:
                check(manifest := _read_manifest(path, store, step))
                _verify(path, manifest)
            except Damaged as error:
                damaged[str(path)] = str(error)
            else:
                return step, damaged
        if damaged:
            raise _none_is_whole(store, damaged.values())
        return None

    if (chosen := _together.by_first(choose)) is None:
        return None
    step, damaged = chosen
    if damaged and jax.process_index() == 0:
        _warn_passed_over(damaged.values(), step)
    path = store.folder / f"step-{step:012d}"
    try:
        manifest = _read_manifest(path, store, step)
        tree = _restored(store, path, manifest, like(manifest))
        log, sealed, _ = _read_log(store, manifest, tree)
    except Damaged as error:
        raise CheckpointError(f"checkpoints: {error}. Delete {str(path)!r} to use the one before it.") from error
    return Found(tree, manifest, [Path(name) for name in damaged], log, sealed)


def _warn_passed_over(damaged: Collection[str], step: int) -> None:
    warnings.warn(
        f"checkpoints: {'; '.join(damaged)}. Passed over: step {step} is used, and what the run did after it is done "
        "again.",
        UserWarning,
        stacklevel=caller_level(),
    )


def _none_is_whole(store: Store, damaged: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"checkpoints: none of the {len(damaged)} in {str(store.folder)!r} is whole: {'; '.join(damaged)}. Nothing was "
        "deleted; to begin anew, name another folder."
    )


def _identity(path: Path) -> Any:
    """The folder that exists under this name, or None if no folder does."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return found.st_dev, found.st_ino
    return None


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, newest first. Links, files and names of another form are not ours."""
    for _ in range(3):  # a list that is read while a writer adds and deletes may miss both
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            matches = [(_STEP.fullmatch(entry.name), entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
            if found := [(int(match[1]), folder / entry.name) for match, entry in matches if match]:
                return sorted(found, reverse=True)
    return []


def _read(store: Store, path: Path, manifest: dict[str, Any], like: PyTree) -> PyTree:
    _verify(path, manifest)
    return _restored(store, path, manifest, like)


def _verify(path: Path, manifest: dict[str, Any]) -> None:
    """Raise `Damaged` unless the files are those that were written."""
    found = _durable.digests(path, skip=_MANIFEST)
    for name in {**manifest["files"], **found}:
        if name not in found:
            raise Damaged(f"{path / name} is missing")
        if found[name] != manifest["files"].get(name):
            raise Damaged(f"{path / name} is not what was written{leaf_damaged(path / name, manifest['leaves'])}")


def _restored(store: Store, path: Path, manifest: dict[str, Any], like: PyTree) -> PyTree:
    leaves = check_like(manifest["leaves"], like, f"the checkpoint {path}")
    return restore(store.read(path, manifest["leaves"], leaves), like)


def _read_log(
    store: Store, manifest: dict[str, Any], tree: PyTree
) -> tuple[dict[str, Any], dict[tuple[int, int], _log.Segment], list[str]]:
    segments = _log.parse(manifest.get("log", []))
    tail = tree.get("rows") if isinstance(tree, dict) else None
    if not segments or not isinstance(tail, dict):
        return dict(tail or {}), {}, []
    return _log.read(store.folder, segments, tail)


def _read_manifest(path: Path, store: Store, step: int) -> dict[str, Any]:
    file = path / _MANIFEST
    text = _bytes(file)
    try:
        outer = json.loads(text)
        manifest = outer["manifest"]
        whole = _encode(manifest) == text
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{file} is not what was written")
    if isinstance(manifest, dict) and "format" in manifest and manifest["format"] != FORMAT:
        raise InputError(
            f"{file} has format {manifest['format']!r}, and this version of hypergrad reads format {FORMAT}: use "
            "the version that wrote it, or another folder."
        )
    if wrong := _malformed(manifest):
        raise Damaged(f"{file} is not of the form that hypergrad writes: {wrong}")
    if manifest["step"] != step:
        raise Damaged(f"{file} belongs to step {manifest['step']}, not {step}")
    if manifest["store"] != store.name:
        raise InputError(
            f"{file} was written with {manifest['store']!r}, not {store.name!r}: "
            "pass hg.outer.orbax(folder) for the first, the folder alone for npz."
        )
    return manifest


def _malformed(manifest: Any) -> str:
    """The entry of a manifest that `write` would not write, though its checksum is right; "" if there is none."""
    number = lambda x: type(x) is int and 0 <= x < 1 << 62
    text = lambda x: isinstance(x, str)
    each = lambda x, kind: isinstance(x, list) and all(map(kind, x))
    strings = lambda x: isinstance(x, dict) and all(map(text, x.values()))
    file = lambda x: isinstance(x, dict) and number(x.get("size")) and text(x.get("sha256"))
    leaf = lambda x: (
        isinstance(x, dict)
        and text(x.get("path"))
        and each(x.get("shape"), number)
        and text(x.get("dtype"))
        and (x.get("sha256", 0) is None or text(x.get("sha256")))
    )
    forms: dict[str, Callable[[Any], bool]] = {
        "format": number,
        "step": number,
        "store": text,
        "config": strings,
        "notes": lambda x: isinstance(x, dict),
        "treedef": text,
        "leaves": lambda x: each(x, leaf) and len({entry["path"] for entry in x}) == len(x),
        "files": lambda x: isinstance(x, dict) and all(map(file, x.values())),
    }
    if not isinstance(manifest, dict):
        return f"it is a {type(manifest).__name__}"
    for name, sound in forms.items():
        if name not in manifest:
            return f"it has no {name}"
        if not sound(manifest[name]):
            return f"its {name} is {repr(manifest[name])[:80]}"
    try:
        _log.parse(manifest.get("log", []))
    except Damaged as error:
        return str(error)
    return ""


def _bytes(path: Path) -> bytes:
    try:
        with _durable.open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error


def _is_whole(path: Path, text: bytes, files: dict[str, Any]) -> bool:
    """Whether a folder holds the checkpoint with this manifest."""
    with contextlib.suppress(Damaged):
        return _holds(path, text) and _durable.digests(path, skip=_MANIFEST) == files
    return False


def _holds(path: Path, text: bytes) -> bool:
    with contextlib.suppress(Damaged):
        return _bytes(path / _MANIFEST) == text
    return False


def _encode(manifest: Any) -> bytes:
    """The only encoding of a manifest, with its own SHA-256: a file that differs in any byte is damaged."""
    body = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return json.dumps(
        {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


def _prune(path: Path, new: Path) -> None:
    """Delete a checkpoint in one piece for any reader: half of one would be taken for a damaged one."""
    with contextlib.suppress(OSError):
        os.rename(path, new)
    _durable.remove(new)

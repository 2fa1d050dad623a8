r"""Files that are whole or absent after a kill, a power cut, a full disk or interference by somebody else.

    write → fsync(file) → fsync(folder) → rename → fsync(parent)

A rename within one folder is atomic in POSIX, and each fsync keeps the disk from doing a later step first (Pillai et
al. 2014, "All file systems are not created equal"). Reading opens regular files only and follows no links. Every byte
is written through `os.write`, and every failure is an `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypergrad._checks import caller_level
from hypergrad._solver import HypergradError, InputError

TEMPORARY = re.compile(r"tmp-\d+-(\d+)(-old)?")
# Lock files that this process holds: the kernel's locks tell processes apart, not runs within one.
_HELD: set[tuple[int, int]] = set()
_MUTEX = threading.Lock()


class CheckpointError(HypergradError, RuntimeError):
    """No checkpoint can be read, or another process writes to the folder.

    >>> import hypergrad as hg
    >>> issubclass(hg.outer.CheckpointError, hg.HypergradError)
    True
    """


class Damaged(Exception):
    """A checkpoint that is not what was written. The message names the file."""


class Sink:
    """A new file, open for writing, and the SHA-256 of what was written. It has what `zipfile` needs."""

    def __init__(self, path: Path):
        self.sha256, self.size = hashlib.sha256(), 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self.size += len(view)
        rest = view
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        return len(view)

    def flush(self) -> None:
        """Do nothing, since no writes are held back."""

    def close(self) -> None:
        """Close without a sync: a file that is left early is not kept."""
        os.close(self._fd)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
        finally:
            self.close()


def check_system(where: str) -> None:
    """Check that the system has what a checkpoint relies on: POSIX file locks, and folders that can be synced.

    Raises:
        InputError: on Windows.
    """
    if importlib.util.find_spec("fcntl") is None:
        raise InputError(
            f"{where}: checkpoints need the file locks of a POSIX system, and this one has none: use Linux or macOS, "
            "or on Windows the Windows Subsystem for Linux (WSL)."
        )


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as their files."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Make everything in a folder durable, for files that another library wrote."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(folder))


def open_regular(path: Path) -> Any:
    """Open a binary file for reading.

    Raises:
        Damaged: if there is none, or if it is a link, a pipe or a folder.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(f"{path} is not a regular file")
    return os.fdopen(fd, "rb")


def digests(folder: Path, skip: str = "") -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by relative path with `/`; links are not followed.

    Args:
        folder: where to look.
        skip: name of a file, directly in it, that is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for here, _, files in os.walk(folder):
        for name in sorted(files):
            path = Path(here) / name
            relative = path.relative_to(folder).as_posix()
            if relative != skip:
                with open_regular(path) as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    found[relative] = {"size": file.tell(), "sha256": sha256}
    return dict(sorted(found.items()))


def replace(new: Path, target: Path) -> None:
    """Put a finished folder in its place. One that is there already (a damaged one) is moved aside first."""
    old = new.with_name(f"{new.name}-old")
    if aside := os.path.lexists(target):
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if aside:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a folder if it is there; files that cannot be deleted stay."""
    shutil.rmtree(path, ignore_errors=True)


def prepare_folder(where: str, folder: Path) -> None:
    """Make the folder and check that files can be written, synced and renamed in it, now rather than an hour later.

    Raises:
        InputError: naming the folder and the reason.
    """
    probe = folder / f"tmp-0-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove(probe)
        probe.mkdir()
        with Sink(probe / "probe") as file:
            file.write(b"hypergrad")
        os.rename(probe / "probe", probe / "renamed")
        sync_folder(folder)
    except OSError as error:
        raise InputError(
            f"{where}: the folder {str(folder)!r} cannot be written to ({error.strerror or error}): "
            "name a folder that can, with some space left."
        ) from error
    finally:
        remove(probe)


def clear_leftovers(folder: Path) -> None:
    """Delete the half-written files of dead writers; anything else in the folder is not ours."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            remove(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against a second writer.

    The kernel keeps the lock and drops it when the process ends, however it ends; the file `lock` stays, and names its
    last holder.

    Raises:
        CheckpointError: if another run holds it, naming that run.
    """
    with _MUTEX:
        fd, name = _lock(folder, folder / "lock")
        _HELD.add(name)
    try:
        yield
    finally:
        with _MUTEX:
            _HELD.discard(name)
            os.close(fd)


def _lock(folder: Path, path: Path) -> tuple[int, tuple[int, int]]:
    import fcntl  # `check_system` has checked that it exists

    entry = None
    with contextlib.suppress(FileNotFoundError):
        entry = os.lstat(path)
    if entry is not None and not stat.S_ISREG(entry.st_mode):
        raise CheckpointError(
            f"{path} is not a regular file, as the lock of a folder of checkpoints must be (a link is not followed): "
            "delete it, or name another folder."
        )
    # Closing a file that this process holds elsewhere would drop its lock, so it is not even opened.
    if entry is not None and (entry.st_dev, entry.st_ino) in _HELD:
        raise CheckpointError(_second_writer(folder, "this very process"))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise CheckpointError(_second_writer(folder, holder)) from None
        warnings.warn(
            f"checkpoints: the file system of {str(folder)!r} has no file locks ({error.strerror}): make sure yourself "
            "that only one run writes there.",
            UserWarning,
            stacklevel=caller_level(),
        )
    with contextlib.suppress(OSError):  # a full disk: the lock still holds
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return fd, (os.fstat(fd).st_dev, os.fstat(fd).st_ino)


def _second_writer(folder: Path, holder: str) -> str:
    return (
        f"{holder} is writing to the checkpoint folder {str(folder)!r}, and two runs in one folder would overwrite "
        "each other: wait until it ends, or give this run a folder of its own."
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

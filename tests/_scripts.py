"""Scripts run as a user runs them, in a process of their own whose imports are already done.

What an experiment imports takes several seconds, more than most of them compute in small. One process (of each that
pytest has) imports it once and starts no JAX backend; every run is a fork of it, and shares nothing with the others.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from tests._lowering import lower_everything

_IMPORTS = ["jax", "optax", "flax.nnx", "scipy.optimize", "sklearn.datasets", "sklearn.model_selection", "hypergrad"]
_IMPORTS += ["matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.image"]


def run_script(
    path: Path,
    *arguments: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    elsewhere: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What `python path arguments...` would return and print, in JAX's default precision.

    Args:
        path: of the script.
        arguments: of its command line.
        cwd: where it runs; default here.
        environment: variables beside those of this process; JAX's are heeded as far as they are read after import.
        elsewhere: whether what it compiles is lowered for CUDA and TPU as well; it fails if nothing was.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        given = (str(path), arguments, written, str(cwd or "."), environment or {}, elsewhere)
        process = _SERVER.Process(target=_run, args=given)
        process.start()
        process.join()
        out, err = (Path(file).read_text() if os.path.exists(file) else "" for file in written)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, out, err)


def _run(
    path: str,
    arguments: tuple[str, ...],
    written: list[str],
    cwd: str,
    environment: Mapping[str, str],
    elsewhere: bool,
) -> None:
    for descriptor, file in enumerate(written, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    jax.config.update("jax_enable_x64", False)  # whatever the environment says, as the suite itself does
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    exported = lower_everything() if elsewhere else None
    runpy.run_path(path, run_name="__main__")
    assert exported != [], f"{path} called no jitted function"


def _server() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


_SERVER = _server()

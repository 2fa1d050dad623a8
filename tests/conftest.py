"""Precision, devices and strictness, set before JAX starts.

`HYPERGRAD_X64=0 pytest` runs the suite in float32, where users live; the default is float64, where theorems hold to
rounding. `XLA_FLAGS= pytest` compiles as users do; without it, what XLA does to make programs fast is left out, since
nearly every program here runs once or twice and compiling is most of the time.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

X64 = os.environ.get("HYPERGRAD_X64", "1") not in ("0", "false", "False")
DEVICES = 8  # virtual: what sharding tests see, on any machine

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
# At level 0 jaxlib 0.12 rounds float32 in a loop otherwise than outside of one, which no level that users have does.
QUICK = [f"--xla_backend_optimization_level={int(JAXLIB >= (0, 11))}"]
if (0, 10) <= JAXLIB <= (0, 12):  # a version that does not know a flag does not start
    QUICK += ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_emitter_verification_level=0"]
if JAXLIB == (0, 10):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))  # read when JAX first computes; scripts that tests start inherit it
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where each operation was written: carried for nobody

import jax
import pytest

gc.set_threshold(200_000, 20, 50)  # tracing makes many small objects; looking through them was a tenth of the time

jax.config.update("jax_enable_x64", X64)
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What several tests compile is compiled once. In a folder of this process alone, unless one is named: a result never
# depends on what an earlier run left, and a folder that two processes share can be read half-written.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    KEPT = tempfile.TemporaryDirectory(prefix="hypergrad-tests-")  # removed with this process
    jax.config.update("jax_compilation_cache_dir", KEPT.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# Files, functions or single tests, one per line: what takes longest, so that the rest is the suite to run at hand.
SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        function = item.nodeid.split("[")[0]
        if not SLOW.isdisjoint((item.nodeid, function, function.split("::")[0])):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def x64() -> bool:
    """Whether this run is in float64."""
    return X64


@pytest.fixture
def key() -> jax.Array:
    """The fixed key of a test; split it."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """Eight virtual CPU devices."""
    found = jax.devices("cpu")
    if len(found) < DEVICES:
        pytest.skip(f"needs {DEVICES} CPU devices, found {len(found)}")
    return found[:DEVICES]


@pytest.fixture(scope="session")  # before whatever a module prepares
def once(x64: bool) -> None:
    """For what runs in a process or precision of its own, the same in either run of the suite: the first is enough."""
    if not x64:
        pytest.skip("computes in a precision of its own: one run of the suite is enough")

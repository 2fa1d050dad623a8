"""Measure the bars of performance in one run, side by side with other libraries.

    python experiments/benchmark/run.py --seed 0 --json
    python experiments/benchmark/run.py --smoke             # every path in seconds, figures meaningless
    python experiments/benchmark/run.py --only V1,V4

Prints a table (what, measured, bar, met?) and, with `--json`, one JSON object as the last line. Everything runs in
float32 on one thread of each framework, set below before any of them starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

# One thread each. XLA on the CPU sizes its pool by NPROC; torch and BLAS read the others; peers.py sets torch's own
# count too.
os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
if "--smoke" in sys.argv:  # what is compiled is seldom run
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parent),
]  # a bare clone works as well as an installation

import jax  # noqa: E402

# Before anything is compiled: time to compile is measured, and a cache would hide it. A smoke run measures nothing.
jax.config.update("jax_enable_compilation_cache", "--smoke" in sys.argv)

import growth  # noqa: E402
import implicit  # noqa: E402
import loop  # noqa: E402
import peers  # noqa: E402
import timing  # noqa: E402
import unroll  # noqa: E402
from report import Setting, keep, rounded, rows  # noqa: E402

BARS = {
    "V1": implicit.v1,
    "V2": implicit.v2,
    "V3": implicit.v3,
    "V4": unroll.v4,
    "V5": implicit.v5,
    "V6": loop.v6,
    "V7": loop.v7,
    "V8": loop.v8,
    "V9": implicit.v9,
    "V10": growth.v10,
    "V11": unroll.v11,
    "V13": growth.v13,
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all data")
    parser.add_argument("--smoke", action="store_true", help="tiny problems, few samples")
    parser.add_argument("--large", action="store_true", help="T1 at n=20,000, d=1000 too")
    parser.add_argument("--only", default="", help="comma-separated bars, such as V1,V4")
    parser.add_argument(
        "--clock",
        choices=sorted(timing.CLOCKS),
        default="wall",
        help="cpu: time given to this process, for a machine that is busy with other things",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--keep", action="store_true", help="write the figures into expected.json and README.md")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.only.split(",") if name] or list(BARS)
    unknown = [name for name in chosen if name not in BARS]
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; the bars are {', '.join(BARS)}")
    if options.keep and options.smoke:
        parser.error("argument --keep: the figures of a smoke run mean nothing")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    timing.CLOCK[0] = options.clock

    setting = Setting(options.seed, options.smoke, options.large)
    missing = [name for name, found in peers.installed().items() if not found]
    machine = (
        f"jax {jax.__version__}, {jax.devices()[0].platform}, one thread, float32, clock: {options.clock}, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    print(machine)
    print(
        "not installed, skipped: " + ", ".join(missing) + " (pip install 'hypergrad-jax[bench]', and torch)"
        if missing
        else "all peers are installed"
    )
    print(f"{'bar':4} {'what':64} {'measured':>10}   {'bar':11} met?")
    found = {}
    for name in chosen:
        begin = time.perf_counter()
        found[name] = BARS[name](setting) | {"seconds": 0.0}
        found[name]["seconds"] = time.perf_counter() - begin
        print("\n".join(rows(name, found[name])), flush=True)
    met = [name for name in chosen if found[name]["met"]]
    print(
        f"{len(met)} of {len(chosen)} bars met in {sum(v['seconds'] for v in found.values()):.0f} s; "
        f"not met: {', '.join(k for k in chosen if found[k]['met'] is False) or 'none'}; "
        f"not measured: {', '.join(k for k in chosen if found[k]['met'] is None) or 'none'}"
    )
    if options.keep:
        keep(found, _command(options), machine, Path(__file__).parent)
    if options.json:
        print(json.dumps(rounded(found)))
    return found


def _command(options: argparse.Namespace) -> str:
    clock = "" if options.clock == "wall" else f" --clock {options.clock}"
    only = f" --only {options.only}" if options.only else ""
    return f"python experiments/benchmark/run.py --seed {options.seed}{' --large' * options.large}{only}{clock} --keep"


if __name__ == "__main__":
    main()

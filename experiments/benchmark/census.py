"""What a compiled step consists of: matrix products by the place that asks for them, and the kernels that XLA compiles.

    python experiments/benchmark/census.py                       # hg.implicit on ten tanh layers of 16 units
    python experiments/benchmark/census.py --solver unrolled --layers 2

XLA on CPU compiles a kernel once for all places with the same one, so compile time follows the *distinct* kernels.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from loop import network  # noqa: E402

import hypergrad as hg  # noqa: E402
from hypergrad._jaxpr.walk import inner_jaxpr, parts  # noqa: E402

_FRAMES = ("_packing.py", "_problem.py", "_call.py", "_sharding.py", "convolutions.py", "walk.py")  # on every path


def products(jaxpr: Any) -> Counter[tuple[str, str]]:
    """The matrix products of a program, by loops around them and lines of the package that led there."""
    found: Counter[tuple[str, str]] = Counter()
    for eqn in jaxpr.eqns:
        name, inside = eqn.primitive.name, [inner_jaxpr(part) for part in parts(eqn)]
        if name == "dot_general":
            found["", _place(eqn)] += 1
        # A loss under a jit of its own is traced once: what counts is where it is called.
        own = sum((products(part) for part in inside), Counter())
        shared = name not in ("while", "scan", "cond") and not any(loops for loops, _ in own)
        for (loops, place), count in own.items():
            inner = f"{name} {loops}".strip() if name in ("while", "scan", "cond") else loops
            found[inner, (_place(eqn) or place) if shared else place] += count
    return found


def _place(eqn: Any) -> str:
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else []
    ours = [f for f in frames if f"{hg.__name__}/" in f.file_name and not f.file_name.endswith(_FRAMES)]
    return " < ".join(f"{Path(f.file_name).stem}:{f.line_num}" for f in ours)


def kernels(program: str) -> tuple[int, int]:
    """Fusions in an optimized program, and how many of them differ by more than names."""
    bodies: dict[str, str] = {}
    for head, body in re.findall(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL):
        names: dict[str, str] = {}
        plain = re.sub(r", metadata=\{[^}]*\}", "", body)
        bodies[head] = re.sub(r"%[\w.-]+", lambda m, names=names: names.setdefault(m[0], f"%{len(names)}"), plain)
    fused = [bodies.get(name, name) for name in re.findall(r" fusion\(.*?calls=%?([\w.-]+)", program)]
    return len(fused), len(set(fused))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", choices=("implicit", "unrolled"), default="implicit")
    parser.add_argument("--layers", type=int, default=10)
    chosen = parser.parse_args()
    problem, params = network(chosen.layers)
    adam = hg.inner.gradient(optax.adam(1e-2), steps=20)
    solver = hg.implicit(problem) if chosen.solver == "implicit" else hg.unrolled(problem, inner=adam)
    x, h = jax.random.normal(jax.random.key(0), (64, 16)), jnp.asarray(-3.0)
    begin = time.process_time()
    traced = jax.jit(solver.hypergrad).trace(solver.init(params, h), h, x, x)
    lowered = traced.lower()
    middle = time.process_time()
    program = lowered.compile().as_text()
    end = time.process_time()
    for (loops, place), count in sorted(products(traced.jaxpr.jaxpr).items(), key=lambda item: -item[1]):
        print(f"{count:5d}  {loops or '-':24s}  {place or 'the call itself'}")
    total, distinct = kernels(program)
    print(f"{total} fusions, {distinct} of them distinct")
    print(f"traced and lowered in {middle - begin:.1f} s of processor time, compiled in {end - middle:.1f}")


if __name__ == "__main__":
    main()

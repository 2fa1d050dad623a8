"""Every solver on eight devices: does a mesh change the hypergradient, how often does it compile, what does it send?

    python experiments/sharding/run.py --seed 0 --json

A ridge regression with a decay per weight on eight virtual CPU devices, its data, its parameters and hyperparameters,
or both spread over them, on an Auto and on an Explicit mesh; and on two processes of four devices each. Collectives
are counted in the compiled program, where a loop's body stands once.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402

PROCESSES, DEVICES = 2, 8
WIDTH, ROWS, BATCH, OUTER_STEPS = 16, 64, 8, 3
DRAWS = 3  # of data and starts, through the same programs
COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
DEFINED = re.compile(r"%(\S+) = \w+\[([\d,]*)\]\S* (\w[\w-]*)\(%?([^\s,)]*)")
SUMMED = re.compile(r"(?:lhs_contracting_dims|dimensions)={([\d,]+)}")
SPREAD = {"data": (False, True), "params": (True, False), "both": (True, True)}  # parameters, data


def error(w: Any, h: Any, batch: Any) -> Any:
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.Problem(lambda w, h, batch: error(w, h, batch) + jnp.sum(jnp.exp(h) * w**2), error)


def few(steps: int = 5) -> Any:
    return hg.inner.gradient(optax.sgd(0.1), steps=steps)


SOLVERS: dict[str, Callable[[], hg.Solver]] = {
    "implicit": lambda: hg.implicit(PROBLEM),
    "implicit, GMRES": lambda: hg.implicit(PROBLEM, linear=hg.linear.gmres()),
    "implicit, Neumann": lambda: hg.implicit(PROBLEM, inner=few(20), linear=hg.linear.neumann(5, step_size=0.1)),
    "implicit, Nyström": lambda: hg.implicit(PROBLEM, linear=hg.linear.nystrom(3, damping=1e-3)),
    "implicit, dense": lambda: hg.implicit(PROBLEM, linear=hg.linear.dense()),
    "T1-T2": lambda: hg.implicit(PROBLEM, inner=few(), linear=hg.linear.identity(step_size=0.1)),
    "projected": lambda: hg.implicit(PROBLEM, inner=hg.inner.projected(lambda w: jnp.clip(w, -5, 5))),
    "online": lambda: hg.online(PROBLEM, optax.adam(0.1), steps=2, products=2),
    "unrolled, reverse": lambda: hg.unrolled(PROBLEM, inner=few(), mode="reverse"),
    "unrolled, forward": lambda: hg.unrolled(PROBLEM, inner=few(), mode="forward"),
    "hypernetwork": lambda: hg.hypernetwork(PROBLEM, optimizer=optax.adam(0.01), steps=2, scale=0.1),
    "self-tuning": lambda: hg.self_tuning(PROBLEM, optimizer=optax.adam(0.01), steps=2),
    "single loop": lambda: hg.single_loop(PROBLEM, method="soba", size=BATCH, step_size=0.1),
    "evolution": lambda: hg.evolution(PROBLEM, inner=few(4), method="es", scale=0.1, pairs=2, truncate=2),
    "direct": lambda: hg.direct(PROBLEM, inner=hg.inner.lbfgs()),
}


def instance(seed: int) -> tuple[Any, Any, Any, Any]:
    """`(params, hparams, train, valid)`, on the host."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.result_type(float))
    rows = lambda: (normal(ROWS, WIDTH), normal(ROWS))
    return normal(WIDTH), normal(WIDTH), rows(), rows()


def place(tree: Any, mesh: Mesh, split: bool) -> Any:
    """Arrays on a mesh, their first axis split over it or each copied; every process holds its part of them."""
    spec = PartitionSpec("data") if split else PartitionSpec()
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda part: x[part]), tree
    )


def on_mesh(given: Any, kind: AxisType, spread: str) -> tuple[Any, Any, Any, Any]:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    params, data = SPREAD[spread]
    return (*place(given[:2], mesh, params), *place(given[2:], mesh, data))


def one(solver: hg.Solver, draws: list[Any], count: bool = False) -> dict[str, Any]:
    """Two calls for each draw: the hypergradients of the first, how often they compile, and what the program sends."""
    step, key = jax.jit(lambda *args, **kwargs: solver.hypergrad(*args, **kwargs)), jax.random.key(0)
    grads, alike, given = [], True, draws[0]
    for params, hparams, train, valid in draws:
        # One program at a time: two with collectives on virtual devices can wait for each other for ever.
        state = jax.block_until_ready(solver.init(params, hparams, key=key))
        out, after = jax.block_until_ready(step(state, hparams, train, valid, key=key))
        jax.block_until_ready(step(after, hparams, train, valid, key=key))
        grads.append(out.grad)
        alike &= out.grad.sharding.is_equivalent_to(hparams.sharding, 1)
        given = state, hparams, train, valid
    found = {"grads": grads, "compilations": step._cache_size(), "alike": alike}
    if count:
        text = step.lower(*given, key=key).compile().as_text() or ""
        found |= {"collectives": len(COLLECTIVE.findall(text)), "least": sums_over_rows(text)}
    return found


def sums_over_rows(text: str) -> int:
    """How many products and sums in a program of one device run over rows, which are sent where those are spread."""
    shapes, count = {}, 0
    for line in text.splitlines():
        if not (match := DEFINED.search(line)):
            continue
        name, shape, kind, first = match.groups()
        shapes[name] = [int(size) for size in shape.split(",") if size]
        if kind in ("dot", "reduce") and (over := SUMMED.search(line)):
            lengths = shapes.get(first, [])
            count += any(lengths[int(axis)] in (ROWS, BATCH) for axis in over[1].split(",") if int(axis) < len(lengths))
    return count


def distance(found: Any, expected: Any) -> float:
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (size or 1.0))  # of hg.direct it is zero


def furthest(found: list[Any], expected: list[Any]) -> float:
    return max(distance(np.asarray(x), np.asarray(y)) for x, y in zip(found, expected, strict=True))


def compare(names: list[str], draws: list[Any]) -> dict[str, dict[str, Any]]:
    """The largest deviation, the most compilations, and collectives by what is spread, for each solver."""
    table = {}
    for name in progress(names, "solvers"):
        solver = SOLVERS[name]()
        plain = one(solver, [jax.tree.map(jnp.asarray, given) for given in draws], count=True)
        row: dict[str, Any] = {"deviation": 0.0, "compilations": 0, "spread_alike": True, "data_least": plain["least"]}
        for kind in (AxisType.Auto, AxisType.Explicit):
            for spread in SPREAD:
                found = one(solver, [on_mesh(given, kind, spread) for given in draws], count=True)
                row["deviation"] = max(row["deviation"], furthest(found["grads"], plain["grads"]))
                row["compilations"] = max(row["compilations"], found["compilations"])
                row["spread_alike"] &= bool(found["alike"])
                row[f"{spread}_collectives"] = max(found["collectives"], row.get(f"{spread}_collectives", 0))
        table[name] = row
    return table


def half_as_many_digits(names: list[str], seed: int) -> float:
    """The largest deviation in float32, of what needs most: data and parameters spread on an Explicit mesh."""
    with jax.enable_x64(False):
        draws, worst = [instance(seed + more) for more in range(DRAWS)], 0.0
        for name in progress(names, "float32"):
            plain = one(SOLVERS[name](), [jax.tree.map(jnp.asarray, given) for given in draws])
            found = one(SOLVERS[name](), [on_mesh(given, AxisType.Explicit, "both") for given in draws])
            worst = max(worst, furthest(found["grads"], plain["grads"]))
        return worst


def several_processes(seed: int, smoke: bool) -> list[str]:
    """What each process prints as its last line: the hypergradients of two solvers and a tuned hyperparameter."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--seed", str(seed), "--address", address]
    command += ["--smoke"] if smoke else []
    running = [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, text=True) for i in range(PROCESSES)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("one of the processes ended with an error, which stands above")
    return [text.splitlines()[-1] for text in said]


def as_process(options: argparse.Namespace) -> None:
    """One of several: prints how far its results are from those without a mesh, the worst of all."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.address, PROCESSES, options.process)
    assert jax.device_count() == DEVICES > jax.local_device_count()
    given = instance(options.seed)
    from jax.experimental.multihost_utils import process_allgather

    worst = 0.0
    for name in ("unrolled, reverse",) if options.smoke else ("unrolled, reverse", "implicit, Neumann"):
        solver = SOLVERS[name]()
        plain = one(solver, [jax.tree.map(jnp.asarray, given)])
        tuned = lambda given, solver=solver: hg.tune(
            solver, *given, outer=optax.sgd(0.1), steps=OUTER_STEPS, progress=False
        )
        expected = tuned(jax.tree.map(jnp.asarray, given)).hparams
        for spread in SPREAD:
            there = on_mesh(given, AxisType.Auto, spread)
            whole = lambda x: np.asarray(process_allgather(x, tiled=True))
            worst = max(worst, distance(whole(one(solver, [there])["grads"][0]), np.asarray(plain["grads"][0])))
            worst = max(worst, distance(whole(tuned(there).hparams), np.asarray(expected)))
    print(worst)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    # What is compiled here is hardly run; read when JAX first computes.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    jax.config.update("jax_num_cpu_devices", DEVICES if options.process is None else DEVICES // PROCESSES)
    jax.config.update("jax_enable_x64", True)
    if options.process is not None:
        return as_process(options)
    names = ["unrolled, reverse"] if options.smoke else list(SOLVERS)
    table = compare(names, [instance(options.seed + more) for more in range(DRAWS)])
    numbers["deviation"] = max(row["deviation"] for row in table.values())
    numbers["compilations"] = max(row["compilations"] for row in table.values())
    numbers["not_spread_alike"] = sum(not row["spread_alike"] for row in table.values())
    numbers["solvers"], numbers["draws"] = len(table), DRAWS
    numbers["above_least"] = sum(row["data_collectives"] > row["data_least"] for row in table.values())
    numbers["processes_deviation"] = max(map(float, several_processes(options.seed, options.smoke)))
    numbers["by_solver"] = table
    numbers["deviation_float32"] = half_as_many_digits(names, options.seed)
    width = max(map(len, table))
    print(f"\n{'':{width}}  deviation  compilations  sums over rows; collectives: data, params, both")
    for name, row in table.items():
        sent = "  ".join(f"{row[f'{spread}_collectives']:4d}" for spread in SPREAD)
        print(f"{name:{width}}  {row['deviation']:9.1e}  {row['compilations']:12d}  {row['data_least']:4d}  {sent}")
    if not options.smoke:
        draw(options.out, table)


def draw(folder: Path, table: dict[str, dict[str, Any]]) -> None:
    from experiments import _figures as style

    figure = style.figure(12.5, 5.6)
    axes = figure.subplots()
    looks = {"data": (style.SKY, "data spread"), "params": (style.BLUE, "parameters spread")}
    looks["both"] = (style.ORANGE, "both spread")
    at = np.arange(len(table))
    for shift, (spread, (color, label)) in zip((-0.27, 0, 0.27), looks.items(), strict=True):
        counts = [row[f"{spread}_collectives"] for row in table.values()]
        axes.bar_label(axes.barh(at + shift, counts, 0.25, color=color, label=label), padding=2, fontsize=7.5)
    axes.set_yticks(at, list(table))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right")
    style.titled(
        axes, "What a call sends between eight devices", xlabel="collectives in the compiled program", ylabel=""
    )
    axes.grid(axis="y", visible=False)
    style.save(figure, folder)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments)

"""P2, P11 to P14, P16: faults, messages, compilations, memory, domains, seeded bugs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import progress
from tests.reliability._faults import FAULTS, Fault, Outcome
from tests.reliability._harness import in_a_batch, one_by_one
from tests.reliability._methods import METHODS
from tests.reliability._mistakes import MISTAKES, MODES, Mistake, make

ROOT = Path(__file__).resolve().parents[2]


def p2(seed: int, smoke: bool, table: list[str] | None = None) -> tuple[str, str, bool]:
    """Every fault that is a value, through every solver: in a batch, alone under jit, and without jit."""
    del seed
    names = list(METHODS)[-4:] if smoke else list(METHODS)
    counts, silent, spoiled = dict.fromkeys(("vmap", "jit", "eager"), 0), [], []
    cells: dict[str, list[str]] = {fault.what: [] for fault in FAULTS}
    for name in progress(names, "solvers"):
        batch = in_a_batch(name, FAULTS)
        spoiled += [] if batch.same and batch.good and all(batch.finite) else [name]
        runs = {"vmap": _by_name(FAULTS, batch.outcomes)}
        if not smoke:
            runs["jit"] = _by_name(FAULTS, one_by_one(name, FAULTS, jit=True))
            runs["eager"] = _by_name(FAULTS, one_by_one(name, FAULTS, jit=False))
            jax.clear_caches()  # without jit every loop is a program of its own, and thousands do not fit into memory
        for mode, found in runs.items():
            counts[mode] += len(found)
            silent += [f"{what}, {name}, {mode}: {outcome}" for what, outcome in found.items() if outcome.silent]
        for what, cell in cells.items():
            first = runs["vmap"][what]
            others = {mode: found[what] for mode, found in runs.items()}
            cell.append("; ".join([str(first), *(f"{m}: {o}" for m, o in others.items() if o.status != first.status)]))
    if table is not None:
        table += [f"| | fault | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
        table += [f"| {f.number} | {f.what} | {' | '.join(cells[f.what])} |" for f in FAULTS]
    figure = f"{len(silent)} silent of " + ", ".join(f"{n} ({mode})" for mode, n in counts.items())
    figure += f"; batches whose good members changed: {len(spoiled)} of {len(names)}"
    return figure + (f": {silent + spoiled}" if silent or spoiled else ""), "0 silent, 0 changed", not silent + spoiled


def _by_name(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {fault.what: outcome for fault, outcome in zip(faults, outcomes, strict=True)}


def p11(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """Every mistake, by every solver, in every mode: named, with all that the message must hold, within a second."""
    del seed
    names, total, bad, slowest = ("direct",) if smoke else METHODS, 0, [], (0.0, "")
    for name in names:  # the first operation of a process sets up JAX itself
        _provoke(name, MISTAKES[0], "eager")
    for mistake in MISTAKES:
        for name in names:
            for mode in MODES:
                if mistake.skip(name) or (mistake.warns and mode == "eager"):
                    continue
                total, began = total + 1, time.process_time()
                text = _provoke(name, mistake, mode)
                here = f"{mistake.what}, {name}, {mode}"
                slowest = max(slowest, (time.process_time() - began, here))
                bad += [here] if not all(word in text for word in mistake.words) else []
    figure = f"{total - len(bad)} of {total} named, the slowest after {slowest[0]:.2f} s of CPU ({slowest[1]})"
    return figure + (f": {bad}" if bad else ""), "all, < 1 s", not bad and slowest[0] < 1


def _provoke(name: str, mistake: Mistake, mode: str) -> str:
    """What is said of a mistake; a warning ends the call, since the time until it comes is what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            make(name, mistake, mode)
        except (hg.HypergradError, UserWarning) as message:
            return str(message)
    return ""


def p12(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """`tune` traces and compiles its step once."""
    traces, after, steps = [], [], 20 if smoke else 1000
    rng = np.random.default_rng(seed)
    data = jnp.asarray(rng.normal(size=(20, 4))), jnp.asarray(rng.normal(size=20))

    def loss(w, h, batch):
        traces.append(1)
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2)

    problem = hg.Problem(loss, lambda w, h, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2))
    note = lambda step, metrics: after.append(len(traces)) if step == 0 else None
    result = hg.tune(
        hg.implicit(problem),
        jnp.zeros(4),
        -1.0,
        data,
        data,
        outer=optax.adam(0.05),
        steps=steps,
        callbacks=note,
        progress=False,
    )
    values = len(np.unique(np.asarray(result.history.hparams)))
    more = len(traces) - after[0]
    return f"1 + {more} over {steps} steps with {values} values", "1 + 0", more == 0 and values > 0.9 * steps


def p13(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """What XLA allocates: implicit whatever T, unrolled with remat="sqrt" a few √T states."""
    del seed
    width = 10_000
    problem = hg.Problem(
        lambda w, h, b: 0.5 * jnp.sum((w - 1) ** 2) + jnp.exp(h) * jnp.sum(w**2), lambda w, h, b: jnp.sum(w**2)
    )

    def memory(solver: hg.Solver) -> int:
        state = solver.init(jnp.zeros(width), 0.1)
        step = jax.jit(lambda s, h: solver.hypergrad(s, h)[0])
        return step.lower(state, jnp.asarray(0.1)).compile().memory_analysis().temp_size_in_bytes

    inner = lambda steps: hg.inner.gradient(optax.sgd(0.1), steps=steps)
    short, long = (memory(hg.implicit(problem, inner=inner(t), linear=hg.linear.cg())) for t in (100, 10_000))
    steps = 400 if smoke else 10_000
    states = memory(hg.unrolled(problem, inner=inner(steps), mode="reverse", remat="sqrt")) / (8 * width)
    share = states / math.sqrt(steps)
    figure = f"implicit T=10,000 over T=100: {long / short:.3f}; unrolled T={steps}: {share:.2f} sqrt(T) states"
    return figure, "within 5 %; <= 4 sqrt(T)", abs(long / short - 1) <= 0.05 and share <= 4


def p14(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """Hyperparameters under gradients of any size up to 1e30, through `tune`."""
    count, steps, wanted = (20, 20, 1) if smoke else (1000, 200, 10**6)
    domains = {
        "positive": hg.domains.positive(),
        "log": hg.domains.log(),
        "interval": hg.domains.interval(0, 1),
        "integer": hg.domains.integer(1, 9),
        "simplex": hg.domains.simplex(),
    }
    start = {name: jnp.full(count, 0.5) for name in ("positive", "log", "interval")}
    start |= {"integer": jnp.full(count, 3.0), "simplex": jnp.full((count // 5, 5), 0.2)}

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        def kick(k, h):
            sign, size = jax.random.split(k)
            power = jax.random.uniform(size, h.shape, h.dtype, -3.0, 30.0)
            return jax.random.rademacher(sign, h.shape, h.dtype) * 10.0**power

        keys = dict(zip(hparams, jax.random.split(jax.random.fold_in(key, state), 5), strict=True))
        nothing = jnp.zeros(())
        info = hg.Info(jnp.int32(0), nothing, nothing, jnp.int32(0), jnp.int32(0), nothing, {})
        grad = {name: kick(keys[name], h) for name, h in hparams.items()}
        return hg.Hypergradient(nothing, grad, info, {}), state + 1

    solver = hg.Solver(
        lambda params, hparams, *, key=None, model_state=None: jnp.int32(0), hypergrad, lambda state, h: jnp.zeros(1)
    )
    outside, seen, low = [0], [0], {"positive": 0.0, "log": 0.0, "interval": 0.0, "integer": 1.0, "simplex": 0.0}
    high = {"interval": 1.0, "integer": 9.0, "simplex": 1.0}

    def watch(step: int, metrics: Any) -> None:
        for name, value in metrics["hparams"].items():
            x = np.asarray(value)
            good = np.isfinite(x) & (x >= low[name]) & (x <= high.get(name, math.inf))
            good &= x > 0 if name in ("positive", "log") else True
            if name == "simplex":
                good &= np.abs(x.sum(-1, keepdims=True) - 1) < 1e-6
            outside[0] += int(np.sum(~good))
            seen[0] += x.size

    runs = 0
    while seen[0] < wanted:  # a run ends where the gradient in the free coordinates overflows: it is said, and right
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "tune: stopped after")
            hg.tune(
                solver,
                jnp.zeros(1),
                start,
                outer=optax.sgd(1.0),
                steps=steps,
                domain=domains,
                callbacks=watch,
                progress=False,
                key=jax.random.key(seed + 1000 * runs),
            )
        runs += 1
    return f"{outside[0]} of {seen[0]:,} values outside, in {runs} runs", "0 of 10^6", outside[0] == 0


def p16(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """Seeded bugs that the unit tests find."""
    del seed
    command = [sys.executable, str(ROOT / "tests" / "mutations" / "run.py"), "--json"]
    done = subprocess.run(command + (["--only", "T1-T2"] if smoke else []), capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    enough = found["planted"] >= (1 if smoke else 30)
    return f"{found['caught']} of {found['planted']} caught", "all of >= 30", not found["survived"] and enough

"""V4, V11: time and memory of differentiating a run of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tasks
from report import Check, Setting, result
from timing import compiled, interleaved

import hypergrad as hg


def training(problem: hg.Problem, optimizer: Any, steps: int) -> Callable[..., Any]:
    """A scan of gradient steps: training alone, and what plain reverse mode goes through."""

    def train(params: Any, hparams: Any, batch: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            w, state = carry
            updates, state = optimizer.update(jax.grad(problem.inner_loss)(w, hparams, batch), state, w)  # type: ignore[arg-type]
            return (optax.apply_updates(w, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
        return params

    return train


def plain(problem: hg.Problem, optimizer: Any, steps: int) -> Callable[..., Any]:
    """Scan and `jax.grad`, nothing recomputed."""
    train = training(problem, optimizer, steps)
    return jax.grad(
        lambda hparams, params, batch, valid: problem.outer_loss(train(params, hparams, batch), hparams, valid)
    )


def _ours(
    problem: hg.Problem, optimizer: Any, steps: int, params: Any, hparams: Any, **options: Any
) -> tuple[Any, Any]:
    """The call and a new state, with which rounding is measured: by two runs or more."""
    solver = hg.unrolled(problem, inner=hg.inner.gradient(optimizer, steps=steps), **options)
    return solver.hypergrad, solver.init(params, hparams)


def _timed(made: tuple[Any, Any], *args: Any) -> tuple[dict[str, Callable[[], Any]], float]:
    """The hypergradient by a call in a loop and by a state's first call, both from the same start; and the memory."""
    call, first = made
    run, megabytes = compiled(call, first, *args)
    later = first._replace(trust=run()[1].trust)
    return {"": lambda: run(later, *args)[0].grad, ", first call": lambda: run(first, *args)[0].grad}, megabytes


def _gap(a: Any, b: Any) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def v4(setting: Setting) -> dict[str, Any]:
    """Hyper-cleaning: 2000 weights, softmax regression, plain gradient steps."""
    params, hparams, train, valid = tasks.cleaning(seed=setting.seed, n=100 if setting.smoke else 2000)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    optimizer = optax.sgd(0.5)
    checks, figures = [], {}
    lengths = {50: (2.3, 3, 3.2)} if setting.smoke else {1000: (2.3, 3, 3.2), 10_000: (2.3, 26, None)}
    for steps, (auto_bar, memory_bar, sqrt_bar) in lengths.items():
        candidates, memory = {}, {}
        candidates["training"], least = compiled(training(tasks.CLEANING, optimizer, steps), params, hparams, train)
        for remat in ("auto", "sqrt"):
            made = _ours(tasks.CLEANING, optimizer, steps, params, hparams, remat=remat)
            calls, memory[remat] = _timed(made, hparams, train, valid)
            candidates |= {remat + which: call for which, call in calls.items()}
        if steps <= 1000:
            whole = plain(tasks.CLEANING, optimizer, steps)
            candidates["plain"], memory["plain"] = compiled(whole, hparams, params, train, valid)
        memory = {k: megabytes - least for k, megabytes in memory.items()}
        grads = {k: call() for k, call in candidates.items() if k != "training"}
        times = interleaved(candidates, samples=setting.samples if steps <= 1000 else 3, seconds=20)
        figures[f"T={steps}"] = {
            "ms": {k: times.ms(k) for k in candidates},
            "extra MB": memory,
            "sqrt against auto": _gap(grads["sqrt"], grads["auto"]),
            "sqrt / training": times.ratio("sqrt", "training"),
            "auto against plain": _gap(grads["auto"], grads["plain"]) if "plain" in grads else None,
        }
        checks += [
            Check(f"T2, T={steps}: auto / training alone", times.ratio("auto", "training"), "<=", auto_bar),
            Check(f"T2, T={steps}: extra memory of auto, MB", memory["auto"], "<=", memory_bar),
        ]
        if sqrt_bar:
            checks += [
                Check(f"T2, T={steps}: sqrt / training alone", times.ratio("sqrt", "training"), "<=", sqrt_bar),
                Check(f"T2, T={steps}: extra memory of sqrt, MB", memory["sqrt"], "<=", 1),
            ]
    return result(checks, figures)


def v11(setting: Setting) -> dict[str, Any]:
    """A transformer, eight steps of Adam; `mode="reverse"` with its defaults against plain scan and grad."""
    shape: dict[str, int] = {"layers": 1, "width": 16, "heads": 2, "sequences": 2, "length": 8} if setting.smoke else {}
    make, params, hparams, train, valid = tasks.transformer(seed=setting.seed, **shape)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    optimizer, steps = optax.sgd(1e-3) if setting.smoke else optax.adam(1e-3, eps_root=1e-8), 8
    candidates, memory = {}, {}
    candidates["training"], memory["training"] = compiled(training(make(), optimizer, steps), params, hparams, train)
    candidates["plain"], memory["plain"] = compiled(plain(make(), optimizer, steps), hparams, params, train, valid)
    least = "hypergrad, 4 chunks, gradients kept"
    ours = {"hypergrad": {}, least: {"chunks": 2 if setting.smoke else 4}}
    if not setting.smoke:
        ours |= {"hypergrad, 4 chunks": {"chunks": 4}, "hypergrad, blocks checkpointed": {"remat": True}}
    for name, model in ours.items():
        options = {"remat": "gradient"} if name == least else {}
        made = _ours(make(**model), optimizer, steps, params, hparams, mode="reverse", **options)
        calls, memory[name] = _timed(made, hparams, train, valid)
        candidates[name] = calls[""]
    reference = candidates["plain"]()
    gaps = {k: _gap(call(), reference) for k, call in candidates.items() if k.startswith("hypergrad")}
    times = interleaved(candidates, samples=3, seconds=60)
    growth = tree_memory(setting)
    lengths = sorted(growth)
    # ∝ log T: from 64 to 512 steps it grows by as much as from 8 to 64, where ∝ √T would give 2.8 and ∝ T 8 times as
    # much.
    steepness = (growth[lengths[2]] - growth[lengths[1]]) / max(growth[lengths[1]] - growth[lengths[0]], 1e-9)
    checks = [
        Check("transformer: memory of plain / hypergrad", memory["plain"] / memory["hypergrad"], ">=", 10),
        Check("transformer: the same with 4 chunks, gradients kept", memory["plain"] / memory[least], ">=", 20),
        Check("transformer: time of plain / hypergrad", times.ratio("plain", "hypergrad"), ">=", 1.5),
        Check("remat='tree': growth 64->512 steps over growth 8->64", steepness, "<=", 1.6),
    ]
    return result(
        checks,
        {
            "MB": memory,
            "ms": {k: times.ms(k) for k in candidates},
            "against plain": gaps,
            "plain / each": {k: {"memory": memory["plain"] / memory[k], "time": times.ratio("plain", k)} for k in gaps},
            "MB of remat='tree' at T": growth,
        },
    )


def tree_memory(setting: Setting) -> dict[int, float]:
    """Temporary memory in MB at growing T, from the compiler alone: nothing is run. Adam on T3, whose states
    dominate."""
    params, hparams, train, valid = tasks.mlp(
        seed=setting.seed, widths=(64, 10) if setting.smoke else (64, 256, 256, 10), batch=32
    )
    optimizer = optax.sgd(1e-3) if setting.smoke else optax.adam(1e-3, eps_root=1e-8)
    found = {}
    for steps in (2, 4, 8) if setting.smoke else (8, 64, 512):
        call, state = _ours(tasks.MLP, optimizer, steps, params, hparams, mode="reverse", remat="tree")
        found[steps] = compiled(call, state, hparams, train, valid)[1]
    return found

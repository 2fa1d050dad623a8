"""V6, V7, V8: the outer loop, against JAX written by hand, against black-box search, and its compilations."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import peers
import tasks
import timing
from byhand import make_step
from report import Check, Setting, result
from unroll import plain

import hypergrad as hg

_COMPILED = "/jax/core/compile/backend_compile_duration"


def v6(setting: Setting) -> dict[str, Any]:
    """Warm outer steps: ours, ours through `hg.tune`, and the same products written by hand.

    All three walk the same path from w = 0. A sample is the time of one whole path after its first three steps, so that
    what is timed is the warm step; the checks that `hg.tune` makes before it starts, and the compilation, fall into
    those three.
    """
    n, d = (200, 20) if setting.smoke else tasks.SIZES["M"]
    steps, skip = (6, 3) if setting.smoke else (30, 3)
    task = tasks.logistic(n, d, seed=setting.seed)
    hparams, train, valid = jax.tree.map(jnp.asarray, (task.hparams, task.train, task.valid))
    optimizer, solver = optax.adam(0.02), hg.implicit(tasks.LOGISTIC)
    init, by_hand = make_step(tasks.logistic_inner, tasks.logistic_outer, optimizer)
    init_optax, with_optax = make_step(tasks.logistic_inner, tasks.logistic_outer, optimizer, optax_lbfgs=True)

    @jax.jit
    def ours(state: Any, train: Any, valid: Any) -> Any:
        inner, opt, h = state
        out, inner = solver.hypergrad(inner, h, train, valid)
        updates, opt = optimizer.update(out.grad, opt, h)
        return (inner, opt, optax.apply_updates(h, updates)), out

    zeros = jnp.zeros(d)
    starts = {
        "by hand": (by_hand, init(zeros, hparams)),
        "by hand, optax.lbfgs": (with_optax, init_optax(zeros, hparams)),
        "hypergrad": (ours, (solver.init(zeros, hparams), optimizer.init(hparams), hparams)),
    }
    clock = timing.now

    def walk(step: Callable[..., Any], state: Any) -> tuple[float, Any]:
        begin = clock()
        for i in range(steps):
            if i == skip:
                jax.block_until_ready(state)
                begin = clock()
            state, found = step(state, train, valid)
            jax.block_until_ready(state)  # as hg.tune, which reads the value of every step
        return (clock() - begin) / (steps - skip), found

    def tuned() -> float:
        marks: list[float] = []
        hg.tune(
            solver,
            zeros,
            hparams,
            train,
            valid,
            outer=optimizer,
            steps=steps,
            progress=False,
            callbacks=lambda step, metrics: marks.append(clock()),
        )
        return (marks[-1] - marks[skip - 1]) / (steps - skip)

    seconds: dict[str, list[float]] = {name: [] for name in (*starts, "hg.tune")}
    last = {}
    for _ in range(setting.samples):
        for name, (step, state) in starts.items():
            took, last[name] = walk(step, state)
            seconds[name].append(took)
        seconds["hg.tune"].append(tuned())  # compiles each time, before what is timed
        if setting.smoke:
            break
    times = timing.Times({k: np.asarray(v) for k, v in seconds.items()})
    hand, info = last["by hand"], last["hypergrad"].info
    products = {
        "by hand": [int(hand["inner steps"]), int(hand["cg steps"])],
        "hypergrad": [int(info.inner_steps), int(info.linear_steps)],
    }
    gap = abs(float(last["hypergrad"].value) / float(hand["value"]) - 1)
    checks = [
        Check(
            "warm outer step: hypergrad / the same products by hand", times.ratio("hypergrad", "by hand"), "<=", 1.05
        ),
        Check("warm outer step: hg.tune, all checks on / by hand", times.ratio("hg.tune", "by hand"), "<=", 1.08),
    ]
    return result(
        checks,
        {
            "ms": {k: times.ms(k) for k in seconds},
            "inner and cg steps of the last step": products,
            "relative gap of the losses": gap,
        },
    )


def v7(setting: Setting) -> dict[str, Any]:
    """T4: inner solves until the validation loss is within 5 % of the way to what tuning can reach."""
    n, d = (100, 10) if setting.smoke else (2000, 100)
    task = tasks.logistic(n, d, seed=setting.seed, valid=600)
    groups = np.arange(d)
    problem = tasks.grouped(groups)
    train, valid = jax.tree.map(jnp.asarray, (task.train, task.valid))
    start = jnp.full(d, np.log(1e-3), jnp.float32)
    solver = hg.implicit(problem)
    call = jax.jit(solver.hypergrad)

    def descend(lr: float, steps: int, target: float = -np.inf) -> tuple[list[float], float]:
        optimizer = optax.adam(lr)
        update = jax.jit(lambda g, opt, h: (lambda u: (optax.apply_updates(h, u[0]), u[1]))(optimizer.update(g, opt)))
        update(start, optimizer.init(start), start)
        state, opt, h = solver.init(jnp.zeros(d), start), optimizer.init(start), start
        values: list[float] = []
        begin = time.perf_counter()
        for _ in range(steps):
            out, state = call(state, h, train, valid)
            values.append(float(out.value))
            if values[-1] <= target:
                break
            h, opt = update(out.grad, opt, h)
        return values, time.perf_counter() - begin

    long, _ = descend(0.2, 10 if setting.smoke else 400)
    target = long[0] - 0.95 * (long[0] - min(long))
    values, seconds = descend(0.5, len(long), target)
    ours = len(values)
    figures: dict[str, Any] = {
        "start": long[0],
        "best of 400 steps": min(long),
        "target": target,
        "solves": ours,
        "seconds": seconds,
    }
    checks = [Check("T4, 100 hyperparameters: inner solves to the target", float(ours), "<=", 30)]
    factor = None
    if peers.installed()["optuna"]:
        trials = 20 if setting.smoke else 15 * ours + 1
        reached, took, best = _tpe(problem, task, start, target, trials, setting.seed)
        figures |= {"TPE solves": reached, "TPE trials allowed": trials, "TPE seconds": took, "TPE best": best}
        factor = (reached if reached is not None else trials) / ours
    checks.append(Check("T4: Optuna TPE's solves / hypergrad's (it may never arrive)", factor, ">=", 15))
    return result(checks, figures, [] if factor is not None else ["optuna"])


def _tpe(
    problem: hg.Problem, task: tasks.Logistic, start: jax.Array, target: float, trials: int, seed: int
) -> tuple[int | None, float, float]:
    """Optuna's default sampler over log-L2 in [-12, 3], from the same start; the same inner solver finds each trial's
    w."""
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(logging.ERROR)
    train, valid = jax.tree.map(jnp.asarray, (task.train, task.valid))
    respond = hg.best_response(problem)
    value = jax.jit(lambda h, w, t, v: tasks.logistic_outer(respond(h, w, t), h, v))
    zeros = jnp.zeros_like(start)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    names = [f"l{i}" for i in range(start.size)]
    study.enqueue_trial({k: float(v) for k, v in zip(names, start, strict=True)})

    def objective(trial: Any) -> float:
        h = jnp.asarray([trial.suggest_float(k, -12, 3) for k in names], jnp.float32)
        return float(value(h, zeros, train, valid))

    def stop(study: Any, trial: Any) -> None:
        if study.best_value <= target:
            study.stop()

    begin = time.perf_counter()
    study.optimize(objective, n_trials=trials, callbacks=[stop])
    reached = len(study.trials) if study.best_value <= target else None
    return reached, time.perf_counter() - begin, float(study.best_value)


def v8(setting: Setting) -> dict[str, Any]:
    """Compilations while everything that may change changes, and the time of the first."""
    n, d = 200, 20
    steps = 20 if setting.smoke else 1000
    task = tasks.logistic(n, d, seed=setting.seed)
    hparams, train, valid = jax.tree.map(jnp.asarray, (task.hparams, task.train, task.valid))
    solver = hg.implicit(tasks.LOGISTIC, damping=1e-3)
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(state: Any, opt: Any, h: Any) -> Any:
        out, state = solver.hypergrad(state, h, train, valid)
        updates, opt = optimizer.update(out.grad, opt)
        return state, opt, optax.apply_updates(h, updates)

    state, opt = solver.init(jnp.zeros(d), hparams), optimizer.init(hparams)
    rng = np.random.default_rng(setting.seed)

    def changed(state: Any) -> Any:
        options = {
            "inner": state.options["inner"] | {"tol": jnp.asarray(10 ** rng.uniform(-6, -3), jnp.float32)},
            "linear": state.options["linear"] | {"tol": jnp.asarray(10 ** rng.uniform(-6, -2), jnp.float32)},
            "damping": jnp.asarray(10 ** rng.uniform(-5, -1), jnp.float32),
        }
        return state._replace(options=options)

    counts: list[str] = []
    listening = [False]

    def listen(event: str, seconds: float, **_: Any) -> None:
        if listening[0] and event == _COMPILED:
            counts.append(event)

    jax.block_until_ready(changed(state))  # the conversions above compile once themselves
    jax.monitoring.register_event_duration_secs_listener(listen)
    listening[0] = True
    for _ in range(steps):
        state, opt, hparams = step(changed(state), opt, hparams)
    jax.block_until_ready(hparams)
    listening[0] = False
    first = {
        size: _first_compile(tasks.logistic(*shape, seed=setting.seed), 1 if setting.smoke else 3)
        for size, shape in ({"S": (n, d)} if setting.smoke else {"S": tasks.SIZES["S"], "M": tasks.SIZES["M"]}).items()
    }
    layers, many = (2, 2) if setting.smoke else (10, 100)
    network, transformer = _leaves(layers, 1), _transformer(setting)
    checks = [
        Check(f"compilations over {steps} outer steps", float(len(counts)), "<=", 1),
        Check(
            f"{2 * layers} leaves: compile implicit, in gradients",
            network["implicit"] / network["one gradient"],
            "<=",
            20,
        ),
        Check(
            f"{2 * layers} leaves: compile unrolled, in gradients",
            network["unrolled"] / network["one gradient"],
            "<=",
            15,
        ),
        Check(
            "transformer: first call of unrolled / of jax.grad of a scan",
            transformer["hypergrad"] / transformer["jax.grad of a scan"],
            "<=",
            1.5,
        ),
        Check(f"{2 * many} leaves: trace and lower implicit, s", _lowered(many), "<=", 4),
    ]
    checks += [
        Check(f"T1-{size}: trace and compile hypergrad, s", v["hypergrad"], "<=", 1.5) for size, v in first.items()
    ]
    return result(
        checks,
        {
            "steps": steps,
            "compilations": len(counts),
            "entries in the cache of jit": step._cache_size(),
            "first compile, s": first,
            "first call of a transformer, s": transformer,
        },
    )


def _first_compile(task: tasks.Logistic, repeats: int) -> dict[str, float]:
    """Seconds to trace and compile T1's step."""
    zeros = jnp.zeros_like(task.hparams)
    args = jax.tree.map(jnp.asarray, (task.hparams, task.train, task.valid))

    def ours() -> Any:
        solver = hg.implicit(tasks.LOGISTIC)
        return jax.jit(solver.hypergrad), (solver.init(zeros, args[0]), *args)

    def plain() -> Any:
        return jax.jit(jax.grad(lambda h, w, t: tasks.logistic_inner(w, h, t))), (args[0], zeros, args[1])

    builders: dict[str, Callable[[], Any]] = {"hypergrad": ours, "one gradient": plain}
    if peers.installed()["jaxopt"]:
        builders["jaxopt cg"] = lambda: peers.jaxopt_gradient(task)
    return _compiled(builders, repeats)


def network(layers: int) -> tuple[hg.Problem, Any]:
    """A deep network of tanh layers of 16 units, two leaves each, and its parameters."""

    def outer(w: Any, h: Any, x: Any) -> Any:
        target = x
        for weight, shift in w:
            x = jnp.tanh(x @ weight + shift)
        return jnp.mean((x - target) ** 2)

    def inner(w: Any, h: Any, x: Any) -> Any:
        return outer(w, h, x) + sum(jnp.sum(jnp.exp(h) * leaf**2) for leaf in jax.tree.leaves(w))

    return hg.Problem(inner, outer), [(0.5 * jnp.eye(16), jnp.zeros(16))] * layers


def _leaves(layers: int, repeats: int) -> dict[str, float]:
    """Seconds to trace and compile a step on a network of `2 * layers` leaves, 64 rows."""
    problem, params = network(layers)
    x = jax.random.normal(jax.random.key(0), (64, 16))
    h = jnp.asarray(-3.0)
    adam = hg.inner.gradient(optax.adam(1e-2), steps=20)
    solvers = {"implicit": hg.implicit(problem), "unrolled": hg.unrolled(problem, inner=adam)}
    builders: dict[str, Callable[[], Any]] = {
        name: lambda solver=solver: (jax.jit(solver.hypergrad), (solver.init(params, h), h, x, x))
        for name, solver in solvers.items()
    }
    builders["one gradient"] = lambda: (jax.jit(jax.grad(lambda w, h: problem.inner_loss(w, h, x))), (params, h))
    return _compiled(builders, repeats)


def _transformer(setting: Setting) -> dict[str, float]:
    """Seconds until the first hypergradient of twenty Adam steps of a transformer of 17,664 parameters is there."""
    shape = (
        {"layers": 1, "width": 8, "heads": 1, "length": 4}
        if setting.smoke
        else {"layers": 2, "width": 24, "length": 32}
    )
    make, params, hparams, train, valid = tasks.transformer(seed=setting.seed, **shape)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    optimizer, steps = (optax.sgd(1e-3), 2) if setting.smoke else (optax.adam(1e-3, eps_root=1e-8), 20)
    solver = hg.unrolled(make(), inner=hg.inner.gradient(optimizer, steps=steps), mode="reverse")
    builders = {
        "hypergrad": lambda: (jax.jit(solver.hypergrad), (solver.init(params, hparams), hparams, train, valid)),
        "jax.grad of a scan": lambda: (jax.jit(plain(make(), optimizer, steps)), (hparams, params, train, valid)),
    }
    found = {}
    for name, build in builders.items():
        jax.clear_caches()
        call, args = build()
        begin = timing.now()
        jax.block_until_ready(call(*args))
        found[name] = timing.now() - begin
    return found


def _lowered(layers: int) -> float:
    """Seconds to trace and lower `hg.implicit`'s step on a network of `2 * layers` leaves."""
    problem, params = network(layers)
    solver, x = hg.implicit(problem), jnp.ones((64, 16))
    state = solver.init(params, -3.0)
    begin = timing.now()
    jax.jit(solver.hypergrad).lower(state, -3.0, x, x)
    return timing.now() - begin


def _compiled(builders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds to trace and compile, median of `repeats`, every cache of JAX cleared before each."""
    seconds: dict[str, list[float]] = {k: [] for k in builders}
    for _ in range(repeats):
        for name, build in builders.items():
            jax.clear_caches()
            function, arrays = build()
            begin = timing.now()
            function.lower(*arrays).compile()
            seconds[name].append(timing.now() - begin)
    return {k: float(np.median(v)) for k, v in seconds.items()}

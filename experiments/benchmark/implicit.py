"""V1, V2, V3, V5, V9: implicit hypergradients, at the optimum, from zero, on a network, along a path, and batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import tasks
from report import Check, Setting, result
from timing import compiled, interleaved

import hypergrad as hg
from hypergrad._curvature import loss_system
from hypergrad.linear._linear import solve as solve_linear

# The loosest round tolerance at which plain CG is within 1e-5 of the exact hypergradient, so that all who take one stop
# alike.
_TOL = 3e-6
_INNER_TOL = (
    2e-5  # on the norm of the inner gradient: jaxopt's hypergradient is then off by 3e-4 to 5e-4, as in the bar
)
_OURS_INNER_TOL, _OURS_TOL = 1e-5, 1e-5  # relative; with them V2's error is below 5e-5 on every seed tried (5, S and M)
_SMALL = (200, 20)


def _sizes(setting: Setting) -> dict[str, tuple[int, int]]:
    if setting.smoke:
        return {"S": _SMALL}
    return {k: v for k, v in tasks.SIZES.items() if k != "L" or setting.large}


def adjoint(hparams: jax.Array, w: jax.Array, train: Any, valid: Any) -> tuple[jax.Array, jax.Array]:
    """What `hg.implicit` does at the optimum, and no more: the system, its preconditioner, CG, the cross product.

    This is what the peers' implicit rules compute from a given solution; the polish, the check of the true residual and
    the error estimate, which they do not have, are timed as "whole call".
    """
    linear = hg.linear.cg(tol=_TOL)
    rhs = jax.grad(tasks.logistic_outer)(w, hparams, valid)
    system = loss_system(lambda w, h: tasks.logistic_inner(w, h, train), w, hparams)
    assert linear.preconditioner is not None
    precondition = linear.preconditioner(system.matvec, w, hparams, jax.random.key(0))
    found = solve_linear(linear, system.matvec, rhs, precondition=precondition)
    return -system.cross(found.solution), found.steps


def v1(setting: Setting) -> dict[str, Any]:
    """The adjoint alone, at the exact solution rounded to float32."""
    bars = {"S": (2.3, 15), "M": (3, 40)}
    checks, figures = [], {}
    for size, (n, d) in _sizes(setting).items():
        task = tasks.logistic(n, d, seed=setting.seed)
        answer = tasks.exact(task, condition=True)
        arrays = jax.tree.map(jnp.asarray, (task.hparams, answer.params.astype(np.float32), task.train, task.valid))
        ours = jax.jit(adjoint)
        solver = hg.implicit(tasks.LOGISTIC, linear=hg.linear.cg(tol=_TOL))
        state = solver.init(arrays[1], arrays[0])
        whole = jax.jit(lambda *a, solver=solver: solver.hypergrad(*a)[0].grad)
        gradient = jax.jit(jax.grad(tasks.logistic_inner))
        candidates = {
            "hypergrad": lambda ours=ours, arrays=arrays: ours(*arrays)[0],
            "hypergrad, whole call": lambda f=whole, s=state, a=arrays: f(s, a[0], a[2], a[3]),
            "one gradient": lambda f=gradient, a=arrays: f(a[1], a[0], a[2]),
        }
        candidates |= peers.adjoints(task, answer, tol=_TOL)
        times = interleaved(candidates, samples=setting.samples)
        errors = {k: tasks.error(f(), answer) for k, f in candidates.items() if k != "one gradient"}
        figures[size] = {
            "condition": answer.condition,
            "cg steps": int(ours(*arrays)[1]),
            "error": errors,
            "ms": {k: times.ms(k) for k in candidates},
        }
        if size in bars:
            checks.append(Check(f"T1a-{size}: error of hypergrad", errors["hypergrad"], "<=", 1e-5))
            for peer, bar in zip(("jaxopt cg", "jaxopt default"), bars[size], strict=True):
                ratio = times.ratio(peer, "hypergrad") if peer in candidates else None
                checks.append(Check(f"T1a-{size}: {peer} / hypergrad", ratio, ">=", bar))
    return result(checks, figures, [k for k, v in peers.installed().items() if not v])


def later(first: Any, after: Any) -> Any:
    """The state of a call in a loop that starts where `first` does: `after` knows the spectrum."""
    return first._replace(spectrum=after.spectrum, scale=after.scale)


def v2(setting: Setting) -> dict[str, Any]:
    """From w = 0, inner solve included; the whole public call, with its checks, as a loop makes it."""
    bars = {"jaxopt cg": 1.4, "jaxopt default": 5, "torchopt cg": 3}
    checks, figures = [], {}
    for size, (n, d) in _sizes(setting).items():
        task = tasks.logistic(n, d, seed=setting.seed)
        answer = tasks.exact(task)
        hparams, train, valid = jax.tree.map(jnp.asarray, (task.hparams, task.train, task.valid))
        solvers = {
            "hypergrad": hg.implicit(
                tasks.LOGISTIC, inner=hg.inner.lbfgs(tol=_OURS_INNER_TOL), linear=hg.linear.cg(tol=_OURS_TOL)
            ),
            "hypergrad, default tolerances": hg.implicit(tasks.LOGISTIC),
        }
        calls = {}
        for name, solver in solvers.items():
            call, first = jax.jit(solver.hypergrad), solver.init(jnp.zeros(d), hparams)
            after = call(first, hparams, train, valid)[1]
            calls[name] = call, (later(first, after), hparams, train, valid)
            calls[f"{name}, first call"] = call, (first, hparams, train, valid)
        candidates: dict[str, Callable[[], Any]] = {k: lambda f=f, a=a: f(*a)[0].grad for k, (f, a) in calls.items()}
        candidates |= peers.solves(task, tol=_INNER_TOL, cg_tol=_TOL)
        times = interleaved(candidates, samples=setting.samples)
        errors = {k: tasks.error(f(), answer) for k, f in candidates.items()}
        infos = {k: f(*a)[0].info for k, (f, a) in calls.items()}
        figures[size] = {
            "error": errors,
            "ms": {k: times.ms(k) for k in candidates},
            "info": {
                k: {
                    "status": int(i.status),
                    "inner steps": int(i.inner_steps),
                    "cg steps": int(i.linear_steps),
                    "error estimate": float(i.error_estimate),
                }
                for k, i in infos.items()
            },
        }
        if size != "L":
            checks.append(Check(f"T1b-{size}: error of hypergrad", errors["hypergrad"], "<=", 5e-5))
            checks += [
                Check(
                    f"T1b-{size}: {peer} / hypergrad",
                    times.ratio(peer, "hypergrad") if peer in candidates else None,
                    ">=",
                    bar,
                )
                for peer, bar in bars.items()
            ]
    return result(checks, figures, [k for k, v in peers.installed().items() if not v])


def v3(setting: Setting) -> dict[str, Any]:
    """One hypergradient of 85,002 decays, in gradients of the inner loss on a batch of the same size."""
    widths, batch = ((64, 16, 10), 32) if setting.smoke else ((64, 256, 256, 10), 128)
    params, hparams, train, valid = tasks.mlp(seed=setting.seed, widths=widths, batch=batch)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    here = hg.inner.gradient(optax.sgd(0.0), steps=0)  # the point is given: no step is taken
    budgets = (2,) if setting.smoke else (5, 20)
    methods = {"T1-T2": (hg.linear.identity(step_size=0.1), "hessian", 1.1)}
    for k in budgets:
        methods |= {
            f"Neumann {k}": (hg.linear.neumann(max_steps=k, step_size=0.01), "hessian", 1.85 * k + 2.5),
            f"CG {k}": (hg.linear.cg(max_steps=k), "hessian", 1.85 * k + 2.5),
            f"Gauss-Newton CG {k}": (hg.linear.cg(max_steps=k), "gauss_newton", 1.35 * k + 3),
        }
    gradient = jax.jit(jax.value_and_grad(tasks.MLP.inner_loss))  # type: ignore[arg-type]
    candidates: dict[str, Callable[[], Any]] = {"gradient": lambda: gradient(params, hparams, train)}
    info = {}
    for name, (linear, curvature, _) in methods.items():
        solver = hg.implicit(tasks.MLP, inner=here, linear=linear, curvature=curvature)
        call = jax.jit(solver.hypergrad)
        first = solver.init(params, hparams)
        _, state = call(first, hparams, train, valid)
        candidates[name] = lambda call=call, state=state: call(state, hparams, train, valid)[0].grad
        candidates[f"{name}, first call"] = lambda call=call, state=first: call(state, hparams, train, valid)[0].grad
        out = call(state, hparams, train, valid)[0].info
        info[name] = {"products": int(out.linear_steps), "status": int(out.status)}
    times = interleaved(candidates, samples=setting.samples)
    checks = [
        Check(f"T3: {name}, in gradients", times.ratio(name, "gradient"), "<=", bar)
        for name, (_, _, bar) in methods.items()
    ]
    return result(
        checks,
        {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "info": info,
            "ms": {k: times.ms(k) for k in candidates},
        },
    )


def _path(solver: hg.Solver, hparams: Any, train: Any, valid: Any, steps: int, lr: float) -> Callable[[], Any]:
    """`steps` outer steps of Adam from w = 0, a Python loop over one compiled step; returns the final loss at the final
    λ."""
    optimizer = optax.adam(lr)

    @jax.jit
    def step(state: Any, opt: Any, hparams: Any, train: Any, valid: Any) -> Any:
        out, state = solver.hypergrad(state, hparams, train, valid)
        updates, opt = optimizer.update(out.grad, opt)
        return state, opt, optax.apply_updates(hparams, updates), out.value, out.info

    begin = solver.init(jnp.zeros_like(hparams), hparams)

    def run() -> Any:
        state, opt, h = begin, optimizer.init(hparams), hparams
        values, infos = [], []
        for _ in range(steps):
            state, opt, h, value, info = step(state, opt, h, train, valid)
            values.append(value)
            infos.append((info.inner_steps, info.linear_steps, info.status))
        return values, infos, h

    return run


def v5(setting: Setting) -> dict[str, Any]:
    """A path of outer steps with everything carried over, against the same path started from zero each time."""
    n, d = _SMALL if setting.smoke else tasks.SIZES["M"]
    steps = 3 if setting.smoke else 40
    task = tasks.logistic(n, d, seed=setting.seed)
    hparams, train, valid = jax.tree.map(jnp.asarray, (task.hparams, task.train, task.valid))
    solvers = {
        "warm": hg.implicit(tasks.LOGISTIC),
        "warm, adjoint to 1e-2": hg.implicit(tasks.LOGISTIC, linear=hg.linear.cg(tol=1e-2)),
        "cold": hg.implicit(tasks.LOGISTIC, warm_start=False),
        "cold, plain": hg.implicit(tasks.LOGISTIC, warm_start=False, linear=hg.linear.cg(preconditioner=None)),
    }
    if setting.smoke:
        solvers = {k: solvers[k] for k in ("warm", "cold, plain")}
    runs = {k: _path(s, hparams, train, valid, steps, 0.1) for k, s in solvers.items()}
    finals, info = {}, {}
    for name, run in runs.items():
        values, infos, _ = run()
        finals[name] = float(values[-1])
        counts = np.asarray(infos)
        info[name] = {
            "inner steps": int(counts[:, 0].sum()),
            "cg steps": int(counts[:, 1].sum()),
            "worst status": int(counts[:, 2].max()),
        }
    times = interleaved(runs, samples=3 if setting.smoke else 7, seconds=40)
    drift = {k: abs(finals[k] / finals["cold, plain"] - 1) for k in finals}
    checks = [
        Check("40 outer steps: cold and plain / warm", times.ratio("cold, plain", "warm"), ">=", 3),
        Check("40 outer steps: relative gap of the final losses", drift["warm"], "<=", 1e-5),
    ]
    return result(
        checks,
        {
            "ms": {k: times.ms(k) for k in runs},
            "final loss": finals,
            "gap": drift,
            "totals": info,
            "time over warm": {k: times.ratio(k, "warm") for k in runs},
        },
    )


def v9(setting: Setting) -> dict[str, Any]:
    """Sixteen configurations that share the data, under vmap and one after the other."""
    n, d = _SMALL if setting.smoke else tasks.SIZES["M"]
    count = 16
    task = tasks.logistic(n, d, seed=setting.seed)
    train, valid = jax.tree.map(jnp.asarray, (task.train, task.valid))
    shifts = np.random.default_rng(setting.seed).normal(0, 0.5, (count, 1)).astype(np.float32)
    hparams = jnp.asarray(task.hparams + shifts)
    solver = hg.implicit(tasks.LOGISTIC)
    state = jax.vmap(solver.init)(jnp.zeros((count, d)), hparams)
    every = jax.vmap(solver.hypergrad, in_axes=(0, 0, None, None))
    batched, megabytes = compiled(every, state, hparams, train, valid)
    state = later(state, batched()[1])
    each = [jax.tree.map(lambda x, i=i: x[i], (state, hparams)) for i in range(count)]
    single = jax.jit(solver.hypergrad)
    candidates = {
        "vmap": lambda: batched(state, hparams, train, valid)[0].grad,
        "loop": lambda: [single(s, h, train, valid)[0].grad for s, h in each],
    }
    together, apart = candidates["vmap"](), jnp.stack(candidates["loop"]())
    gap = float(jnp.max(jnp.linalg.norm(together - apart, axis=1) / jnp.linalg.norm(apart, axis=1)))
    times = interleaved(candidates, samples=3 if setting.smoke else 7)
    checks = [
        Check("T1-M, 16 configurations: loop / vmap", times.ratio("loop", "vmap"), ">=", 2.5),
        Check("T1-M, 16 configurations: temporary memory, MB", megabytes, "<=", 10),
    ]
    return result(checks, {"ms": {k: times.ms(k) for k in candidates}, "largest relative difference": gap})

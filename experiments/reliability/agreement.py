"""P5, P6, P7: solvers against closed forms, against each other, and their rates of convergence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg

WIDTH, RATE = 8, 0.5
PROBLEM = hg.Problem(
    lambda w, h, b: 0.5 * w @ b["a"] @ w + 0.5 * jnp.exp(h) @ w**2 - b["b"] @ w,
    lambda w, h, b: 0.5 * jnp.sum((w - b["t"]) ** 2) + 0.1 * jnp.sum(h**2),
)


def setting(seed: int, condition: float, dtype: Any = jnp.float64) -> tuple[Any, Any]:
    """Log-strengths and data of a quadratic whose Hessian's eigenvalues lie in [1/condition, 1.2]."""
    rng = np.random.default_rng([seed, 7])
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    a = turn * np.geomspace(1, 1 / condition, WIDTH) @ turn.T
    batch = {"a": a, "b": rng.normal(size=WIDTH), "t": rng.normal(size=WIDTH)}
    h = np.log(rng.uniform(0.01, 0.2, WIDTH))
    as_float32 = lambda x: np.asarray(x, np.float32).astype(np.float64)
    return jax.tree.map(lambda x: jnp.asarray(as_float32(x), dtype), (h, batch))


def exact(h: Any, batch: Any, steps: int | None) -> np.ndarray:
    """The hypergradient of `steps` gradient steps from zero, or of the optimum, in NumPy and float64."""
    h, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), (h, batch))
    hess, penalty = batch["a"] + np.diag(np.exp(h)), np.exp(h)
    if steps is None:
        w = np.linalg.solve(hess, batch["b"])
        return 0.2 * h - penalty * w * np.linalg.solve(hess, w - batch["t"])
    w, z = np.zeros(WIDTH), np.zeros((WIDTH, WIDTH))
    for _ in range(steps):
        w, z = w - RATE * (hess @ w - batch["b"]), z - RATE * (hess @ z + np.diag(penalty * w))
    return 0.2 * h + z.T @ (w - batch["t"])


def gap(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def gradient(solver: hg.Solver, h: Any, batch: Any) -> hg.Hypergradient:
    state = solver.init(jnp.zeros(WIDTH, h.dtype), h)
    return jax.jit(lambda s: solver.hypergrad(s, h, batch, batch)[0])(state)


def sgd(steps: int) -> Any:
    return hg.inner.gradient(optax.sgd(RATE), steps=steps)


def p5(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """Unrolling is exact, in every mode."""
    modes: dict[str, dict[str, Any]] = {"forward": {"mode": "forward"}} | {
        f"reverse, {remat}": {"mode": "reverse", "remat": remat} for remat in ("none", "step", "sqrt", "tree")
    }
    worst = {}
    for dtype in (jnp.float64, jnp.float32):
        errors = []
        for steps in (20,) if smoke else (1, 20, 200):
            h, batch = setting(seed, 20, dtype)
            grads = [gradient(hg.unrolled(PROBLEM, inner=sgd(steps), **m), h, batch).grad for m in modes.values()]
            errors += [gap(g, exact(h, batch, steps)) for g in grads]
        worst[dtype.__name__] = max(errors)
    figure = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    return figure, "<= 1e-12 float64, <= 1e-5 float32", worst["float64"] <= 1e-12 and worst["float32"] <= 1e-5


def p6(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """Implicit = unrolled for ever = Neumann for ever = the closed form."""
    h, batch = setting(seed, 20)
    solvers = {
        "implicit": hg.implicit(PROBLEM),
        "unrolled": hg.unrolled(PROBLEM, inner=sgd(1000), mode="reverse"),
        "Neumann": hg.implicit(PROBLEM, linear=hg.linear.neumann(1000, step_size=RATE)),
        "GMRES": hg.implicit(PROBLEM, linear=hg.linear.gmres()),
    }
    errors = {name: gap(gradient(s, h, batch).grad, exact(h, batch, None)) for name, s in solvers.items()}
    return ", ".join(f"{n} {e:.1e}" for n, e in errors.items()), "<= 1e-8", max(errors.values()) <= 1e-8


def p7(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """The error falls as ρ(I − αH)^K in the terms of the Neumann series, and as T ρ^T in the steps of an unroll (T from
    differentiating a power), which is divided out."""
    h, batch = setting(seed, 50)
    hess = np.asarray(batch["a"], np.float64) + np.diag(np.exp(np.asarray(h, np.float64)))
    rate = np.log(np.max(np.abs(1 - RATE * np.linalg.eigvalsh(hess))))
    counts = np.array([120, 160, 200, 240])
    truth, slopes = exact(h, batch, None), {}
    neumann = lambda k: hg.implicit(PROBLEM, linear=hg.linear.neumann(int(k), step_size=RATE))
    unrolled = lambda k: hg.unrolled(PROBLEM, inner=sgd(int(k)), mode="reverse")
    for name, make, power in (("K", neumann, 0), ("T", unrolled, 1)):
        errors = [gap(gradient(make(k), h, batch).grad, truth) / k**power for k in counts]
        slopes[name] = float(np.polyfit(counts, np.log(errors), 1)[0]) / rate
    figure = ", ".join(f"slope in {n} over log rho: {s:.3f}" for n, s in slopes.items())
    return figure, "1 within 5 %", all(abs(s - 1) <= 0.05 for s in slopes.values())

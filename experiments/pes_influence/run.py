"""Influence balancing: a problem on which truncated derivatives have the wrong sign, with the truth in closed form.

A chain of 23 numbers x ← A x + b θ, 200 steps, loss ½(x₁ − 1)² averaged over the steps. The first ten entries of b are
+1, the others −1, and reach x₁ one after the other: over ten steps θ seems to help, over 200 it hurts.

    python experiments/pes_influence/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402

N, POSITIVE, LENGTH, TRUNCATE, START, SCALE = 23, 10, 200, 10, 0.5, 0.1
EVERY = 10  # outer steps between the losses that are kept for the picture
A = 0.5 * np.eye(N, dtype=np.float32) + 0.5 * np.eye(N, k=1, dtype=np.float32)
B = np.where(np.arange(N) < POSITIVE, 1, -1).astype(np.float32)

PROBLEM = hg.Problem(None, lambda x, theta, batch: 0.5 * (x[0] - 1) ** 2)
INNER = hg.inner.fixed_point(lambda x, theta, batch: jnp.asarray(A) @ x + jnp.asarray(B) * theta, steps=LENGTH)


def loss(theta: Any) -> Any:
    """The mean over the steps, to be differentiated as a whole."""

    def step(x: Any, _: None) -> tuple[Any, Any]:
        x = jnp.asarray(A) @ x + jnp.asarray(B) * theta
        return x, 0.5 * (x[0] - 1) ** 2

    return jnp.mean(jax.lax.scan(step, jnp.ones(N), None, length=LENGTH)[1])


def truncated(theta: Any) -> Any:
    """The same, with the influence of θ cut off every ten steps: truncated backpropagation through time."""

    def step(x: Any, t: Any) -> tuple[Any, Any]:
        x = jnp.where(t % TRUNCATE == 0, jax.lax.stop_gradient(x), x)
        x = jnp.asarray(A) @ x + jnp.asarray(B) * theta
        return x, 0.5 * (x[0] - 1) ** 2

    return jnp.mean(jax.lax.scan(step, jnp.ones(N), jnp.arange(LENGTH))[1])


def episodes(method: str, pairs: int, count: int, seed: int) -> np.ndarray:
    """Mean hypergradient of each of `count` independent episodes."""
    solver = hg.evolution(PROBLEM, inner=INNER, method=method, scale=SCALE, pairs=pairs, truncate=TRUNCATE)
    start, theta = jnp.ones(N), jnp.asarray(START)

    def episode(key: Any) -> Any:
        def call(state: Any, key: Any) -> tuple[Any, Any]:
            out, state = solver.hypergrad(state, theta, key=key)
            return state, out.grad

        return jnp.mean(jax.lax.scan(call, solver.init(start, theta), jax.random.split(key, LENGTH // TRUNCATE))[1])

    run = jax.jit(jax.vmap(episode))
    keys = jax.random.split(jax.random.key(seed), count)
    return np.concatenate([np.asarray(run(part)) for part in np.array_split(keys, max(count // 20, 1))])


def descend(method: str, pairs: int, steps: int, seed: int) -> np.ndarray:
    """The mean loss of whole episodes along a run of `hg.tune`."""
    solver = hg.evolution(PROBLEM, inner=INNER, method=method, scale=SCALE, pairs=pairs, truncate=TRUNCATE)
    result = hg.tune(
        solver,
        jnp.ones(N),
        START,
        outer=optax.adam(0.01),
        steps=steps,
        steps_per_call=LENGTH // TRUNCATE,
        key=jax.random.key(seed),
        progress=False,
    )
    return np.asarray(jax.jit(jax.vmap(loss))(jnp.asarray(result.history.hparams)))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    pairs, count, steps = (20, 20, 40) if options.smoke else (100, 200, 1000)
    numbers["truth"] = float(jax.grad(loss)(START))
    numbers["backpropagation_truncated"] = float(jax.grad(truncated)(START))
    for method in progress(("es", "pes", "nres"), "methods"):
        found = episodes(method, pairs, count, options.seed)
        numbers[f"{method}_mean"] = float(np.mean(found))
        numbers[f"{method}_spread"] = float(np.std(found, ddof=1))
        numbers[f"{method}_off"] = float(abs(np.mean(found) - numbers["truth"]) / (np.std(found, ddof=1) / count**0.5))
        path = descend(method, pairs, steps, options.seed)
        numbers[f"{method}_loss"] = float(np.mean(path[-steps // 10 :]))
        numbers[f"{method}_path"] = path[::EVERY]
    numbers["spread_ratio"] = numbers["nres_spread"] / numbers["pes_spread"]
    numbers["loss_start"] = float(loss(START))
    grid = np.linspace(-1, 1, 401)
    losses = np.asarray(jax.vmap(loss)(jnp.asarray(grid)))
    numbers["loss_best"] = float(losses.min())


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    figure = style.figure(12.5, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    names = {"es": "truncated ES", "pes": "PES", "nres": "NRES"}
    colors = {"es": style.ORANGE, "pes": style.BLUE, "nres": style.GREEN}
    truth = np.mean(style.each(results, "truth"))
    for row, method in enumerate(names):
        means, spreads = (np.array(style.each(results, f"{method}_{kind}")) for kind in ("mean", "spread"))
        for i, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
            at = row + 0.14 * (i - (len(means) - 1) / 2)
            left.errorbar(mean, at, xerr=spread, fmt="o", color=colors[method], capsize=3, markersize=5)
    left.axvline(truth, color=style.INK, linewidth=1, linestyle=style.DASHED)
    left.axvline(0, color=style.INK, linewidth=0.6)
    left.text(truth, 2.5, "truth ", ha="right", fontsize=11, color=style.INK)
    left.set_yticks(range(3), list(names.values()))
    left.set_ylim(-0.5, 2.8)
    style.titled(left, "Mean and spread of one episode's estimate", xlabel="dL/dθ at θ = 0.5", ylabel="")
    right.set_yscale("log")
    for method, color in colors.items():
        paths = np.array(style.each(results, f"{method}_path"))
        style.curves(right, EVERY * np.arange(paths.shape[1]), paths, color, names[method])
    right.axhline(np.mean(style.each(results, "loss_best")), color=style.INK, linewidth=1, linestyle=style.DASHED)
    style.titled(right, "Tuning θ", xlabel="outer step (10 steps of the chain)", ylabel="mean loss of an episode")
    style.legend(figure, right)
    return figure


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

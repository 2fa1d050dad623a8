"""What an ordinary network needs for a hypergradient alongside its training: linear solver, curvature, damping.

    python experiments/networks/run.py --seed 0 --json

Six small networks, each with a log weight decay for every parameter. Ten steps of Adam, a hypergradient from five
products with the Hessian or the Gauss-Newton matrix, a step of Adam on the hyperparameters, and so on from the
initialisation. Beside this, on the dense matrices early in training and at its end: the cosine between what five
products give and the exact hypergradient of the same damped system. `--cells FILE` keeps each network as it is
measured, and goes on from there; `--only` names some of the six.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from experiments._common import experiment, rounded
from experiments._figures import BLUE, GREEN, INK, ORANGE, PINK, SKY, figure, save, titled
from experiments.networks.models import NETWORKS, Network, network

START = -6.0  # log decay
STEPS, OUTER = 10, 30  # training steps of one outer step; outer steps
PRODUCTS = 5
TRAINING, DESCENT = optax.adam(1e-2), optax.adam(0.3)
GRID = np.linspace(-9.0, -1.5, 6)  # single log decays
PyTree = Any


class Method(NamedTuple):
    """A way to a hypergradient, and how it is drawn."""

    label: str
    linear: str | None  # of LINEAR; None for unrolling
    curvature: str
    damping: float
    color: str


LINEAR = {
    "cg": hg.linear.cg(max_steps=PRODUCTS, indefinite="truncate"),
    "neumann": hg.linear.neumann(PRODUCTS),
    "identity": hg.linear.identity(1e-2),
}
DAMPINGS = {"d0": 0.0, "d001": 0.01, "d01": 0.1, "d1": 1.0}
METHODS = {
    **{f"cg_{k}": Method(f"truncated CG, damping {d:g}", "cg", "hessian", d, BLUE) for k, d in DAMPINGS.items()},
    **{f"gn_{k}": Method(f"Gauss-Newton, damping {d:g}", "cg", "gauss_newton", d, GREEN) for k, d in DAMPINGS.items()},
    "neumann": Method("Neumann series", "neumann", "hessian", 0.0, ORANGE),
    "identity": Method("identity (T1-T2)", "identity", "hessian", 0.0, PINK),
    "unrolled": Method("ten steps unrolled", None, "hessian", 0.0, SKY),
}


def log_decays(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.full_like(w, START), params)


def solver(net: Network, linear: str | None = "cg", curvature: str = "hessian") -> hg.Solver:
    inner = hg.inner.gradient(TRAINING, steps=STEPS)
    if linear is None:
        return hg.unrolled(net.problem, inner=inner, warm_start=True)
    return hg.implicit(net.problem, inner=inner, linear=LINEAR[linear], curvature=curvature, damping=0.0)


class Programs(NamedTuple):
    """What is compiled once for a network, whatever the seed."""

    look: Any  # (state, hparams, key, train, valid) -> (validation loss, state): a training without tuning
    error: Any  # (state, batch) -> loss
    matrices: Any  # see `matrices`
    steps: dict[Any, tuple[hg.Solver, Any]]  # by linear solver and curvature, see `outer_step`


@functools.cache
def programs(name: str) -> Programs:
    net = network(name, 0)
    evaluate: Any = solver(net).evaluate

    @jax.jit
    def look(state: Any, hparams: PyTree, key: jax.Array, train: PyTree, valid: PyTree) -> Any:
        value, _, state = evaluate(state, hparams, train, valid, key=key)
        return value, state

    steps = {}
    for method in METHODS.values():
        kind = (method.linear, method.curvature)
        if kind not in steps and (method.curvature == "hessian" or net.outputs):
            way = solver(net, method.linear, method.curvature)
            steps[kind] = way, outer_step(way)
    error = jax.jit(lambda state, batch: net.error(state.params, state.model_state, batch))
    return Programs(look, error, matrices(net), steps)


def tuned(net: Network, program: Programs, method: Method, seed: int, outer: int) -> dict[str, Any]:
    """Tune from the initialisation; steps that are not usable are skipped, as in `hg.tune`."""
    way, step = program.steps[method.linear, method.curvature]
    hparams = log_decays(net.params)
    state, descent = way.init(net.params, hparams, model_state=net.model_state), DESCENT.init(hparams)
    if hasattr(state, "options") and "damping" in state.options:
        state = state._replace(options=state.options | {"damping": jnp.asarray(method.damping, jnp.float32)})
    train, history = hg.minibatches(net.data[0], net.batch), []
    for i in range(outer):
        key = jax.random.fold_in(jax.random.key(seed), i)
        state, hparams, descent, seen = step(state, hparams, descent, key, train, net.data[1])
        history.append(seen)
    value, usable, truncated = (np.asarray(column) for column in zip(*history, strict=True))
    return {
        "usable": usable.mean(),
        "truncated": truncated.mean(),
        "valid": value[-1],
        "valid_lowest": value.min(),
        "test": program.error(state, net.data[2]),
    }


def outer_step(method: hg.Solver) -> Any:
    @jax.jit
    def step(state: Any, hparams: PyTree, descent: PyTree, key: jax.Array, train: PyTree, valid: PyTree) -> Any:
        out, state = method.hypergrad(state, hparams, train, valid, key=key)
        usable = out.info.status <= int(hg.Status.INSENSITIVE)
        updates, fresh = DESCENT.update(out.grad, descent, hparams)
        moved = optax.apply_updates(hparams, updates), fresh
        hparams, descent = jax.tree.map(lambda a, b: jnp.where(usable, a, b), moved, (hparams, descent))
        return state, hparams, descent, (out.value, usable, jnp.isnan(out.info.linear_residual))

    return step


def trained(net: Network, log_decay: float, look: Any, seed: int, outer: int) -> tuple[list[Any], np.ndarray]:
    """A training at one fixed decay, of the same length and on the same batches: states and validation losses."""
    hparams = jax.tree.map(lambda w: jnp.full_like(w, log_decay), net.params)
    state = solver(net).init(net.params, hparams, model_state=net.model_state)
    train, states, values = hg.minibatches(net.data[0], net.batch), [], []
    for i in range(outer):
        value, state = look(state, hparams, jax.random.fold_in(jax.random.key(seed), i), train, net.data[1])
        states.append(state)
        values.append(float(value))
    return states, np.asarray(values)


def matrices(net: Network) -> Any:
    """`(params, model_state, batch, valid, key) -> (Hessian, Gauss-Newton matrix or None, ∂_w f, w)`, all dense."""
    unravel = ravel_pytree(net.params)[1]
    hparams = log_decays(net.params)

    @jax.jit
    def at(params: PyTree, model_state: PyTree, batch: PyTree, valid: PyTree, key: jax.Array) -> Any:
        w = ravel_pytree(params)[0]
        loss: Any = net.problem.inner_loss
        if net.outputs is None:
            inner = lambda w: loss(unravel(w), hparams, batch, key, model_state)[0]
        else:
            inner = lambda w: loss(unravel(w), hparams, batch)
        rows = lambda matvec: jax.lax.map(matvec, jnp.eye(len(w), dtype=w.dtype), batch_size=64)
        hessian = rows(jax.linearize(jax.grad(inner), w)[1])
        rhs = jax.grad(lambda w: net.error(unravel(w), model_state, valid))(w)
        if net.outputs is None:
            return hessian, None, rhs, w
        outputs: Any = net.outputs
        logits, push = jax.linearize(lambda w: outputs(unravel(w), batch[0]), w)
        pull = jax.linear_transpose(push, w)
        error = lambda z: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch[1]))
        curve = jax.linearize(jax.grad(error), logits)[1]
        return hessian, rows(lambda v: pull(curve(push(v)))[0] + jnp.exp(START) * v), rhs, w

    return at


@functools.cache
def solution(name: str) -> Any:
    """`(A, b) -> v`, as the solver gives it on a dense matrix."""

    linear = LINEAR[name]

    @jax.jit
    def solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(rhs)
        options = {name: jnp.asarray(value) for name, value in linear.options.items()}
        found = linear.solve(
            lambda v: matrix @ v,
            rhs / size,
            start=jnp.zeros_like(rhs),
            precondition=None,
            options=options,
            key=jax.random.key(0),
        )
        return size * found.solution

    return solve


def cosines(net: Network, at: Any, state: Any, seed: int) -> dict[str, Any]:
    """How each method's hypergradient points, against the exact one of the same damped system.

    One decay per parameter enters as exp(λ) w, so that the hypergradient is −exp(λ) w ⊙ v.
    """
    rows = np.random.default_rng(seed).permutation(len(net.data[0][1]))[: net.batch]
    batch = jax.tree.map(lambda x: x[rows], net.data[0])
    hessian, gauss_newton, rhs, w = at(state.params, state.model_state, batch, net.data[1], jax.random.key(seed))
    found: dict[str, Any] = {"negative": np.mean(np.linalg.eigvalsh(np.asarray(hessian, np.float64)) < 0)}
    for name, method in METHODS.items():
        matrix = gauss_newton if method.curvature == "gauss_newton" else hessian
        if method.linear is None or matrix is None:
            continue
        shift = method.damping * jnp.linalg.norm(matrix) / np.sqrt(len(w))
        matrix = matrix + shift * jnp.eye(len(w), dtype=w.dtype)
        given = np.asarray(w * solution(method.linear)(matrix, rhs), np.float64)
        exact = np.asarray(w, np.float64) * np.linalg.solve(np.asarray(matrix, np.float64), np.asarray(rhs, np.float64))
        found[name] = given @ exact / (np.linalg.norm(given) * np.linalg.norm(exact))
    return found


def cell(name: str, seed: int, outer: int) -> dict[str, Any]:
    """Everything about one network."""
    net = network(name, seed)
    found: dict[str, Any] = {"parameters": sum(w.size for w in jax.tree.leaves(net.params))}
    program = programs(name)
    states, values = trained(net, START, program.look, seed, outer)
    found["plain"] = {"valid": values[-1], "test": program.error(states[-1], net.data[2])}
    grid = [trained(net, float(d), program.look, seed, outer) for d in GRID]
    chosen = int(np.argmin([values[-1] for _, values in grid]))
    found["single"] = {
        "valid": grid[chosen][1][-1],
        "test": program.error(grid[chosen][0][-1], net.data[2]),
        "log_decay": GRID[chosen],
    }

    found["cosine_early"], found["cosine_late"] = (
        cosines(net, program.matrices, state, seed) for state in (states[0], states[-1])
    )
    for key, method in METHODS.items():
        if (method.linear, method.curvature) not in program.steps:
            continue
        found[key] = tuned(net, program, method, seed, outer)
        if method.linear != "cg":  # which alone says by a NaN that it stopped early
            del found[key]["truncated"]
        print(f"{name}, {method.label}: {json.dumps(rounded(found[key]))}", flush=True)
    return found


def summary(networks: dict[str, Any]) -> dict[str, Any]:
    """Of each method over the networks that it applies to."""
    found = {}
    for name in METHODS:
        runs = [net for net in networks.values() if name in net]
        if not runs:
            continue
        found[name] = {
            "usable_least": min(net[name]["usable"] for net in runs),
            "valid_ratio": np.exp(np.mean([np.log(net[name]["valid"] / net["plain"]["valid"]) for net in runs])),
            "test_ratio": np.exp(np.mean([np.log(net[name]["test"] / net["plain"]["test"]) for net in runs])),
        }
        if METHODS[name].linear == "cg":
            found[name]["truncated"] = np.mean([net[name]["truncated"] for net in runs])
        for when in ("cosine_early", "cosine_late"):
            if all(name in net[when] for net in runs):
                found[name][when] = np.mean([net[when][name] for net in runs])
    single = [net["single"]["valid"] / net["plain"]["valid"] for net in networks.values()]
    tested = [net["single"]["test"] / net["plain"]["test"] for net in networks.values()]
    found["single"] = {"valid_ratio": np.exp(np.mean(np.log(single))), "test_ratio": np.exp(np.mean(np.log(tested)))}
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    names, outer = (NETWORKS[:1], 2) if options.smoke else (options.only or NETWORKS, OUTER)
    cells = json.loads(options.cells.read_text()) if options.cells and options.cells.exists() else {}
    numbers["networks"] = {}
    for name in names:
        key, short = f"{name}, seed {options.seed}", name.replace(" ", "_").lower()
        if key not in cells:
            cells[key] = rounded(cell(name, options.seed, outer))
            if options.cells:
                options.cells.write_text(json.dumps(cells, indent=1))
        numbers["networks"][short] = cells[key]
    numbers["methods"] = summary(numbers["networks"])
    for when in ("early", "late"):
        found = [net[f"cosine_{when}"]["negative"] for net in numbers["networks"].values()]
        numbers[f"negative_{when}"] = np.mean(found)
    picture(numbers, options.out)


def picture(numbers: dict[str, Any], folder: Path) -> None:
    canvas = figure(12.5, 4.6)
    panels = canvas.subplots(1, 3, sharey=True)
    names = [name for name in METHODS if name in numbers["methods"]]
    titles = {
        "usable": "Usable steps, from initialisation",
        "valid": "Validation loss / untuned, after 30 steps",
        "cosine_late": "Cosine with what it claims, at the end",
    }
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        for y, name in enumerate(names):
            for net in numbers["networks"].values():
                if what == "cosine_late":
                    x = net[what].get(name)
                elif name not in net:
                    x = None
                else:
                    x = net[name][what] / (net["plain"]["valid"] if what == "valid" else 1)
                if x is not None:
                    axes.plot(x, y, "o", color=METHODS[name].color, alpha=0.7, markersize=6)
        titled(axes, title)
        axes.grid(axis="x", color="#E8E8E8", linewidth=0.8)
    panels[1].set_xscale("log")
    panels[1].axvline(1, color=INK, linewidth=0.8)
    panels[0].set_yticks(range(len(names)), [METHODS[name].label for name in names])
    panels[0].invert_yaxis()
    save(canvas, folder)


def arguments(parser: argparse.ArgumentParser) -> None:
    words = f"some of {', '.join(NETWORKS)}"
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK", help=words)
    parser.add_argument("--cells", type=Path, metavar="FILE", help="keep each network here, and go on from there")


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments)

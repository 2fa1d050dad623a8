"""What an ordinary network needs for a hypergradient alongside its training: linear solver, curvature, damping.

    python experiments/networks/run.py --seed 0 --json

Six networks, each with a log weight decay for every parameter. Ten steps of Adam, a hypergradient from five products
with the Hessian or the Gauss-Newton matrix, a step of Adam on the hyperparameters, and so on from the initialisation.
Beside this, on the dense matrices of the smaller five: the cosine between what five products give and the exact
hypergradient of the same damped system, early in training. Every cell, a network with a method, goes into
`cells.jsonl` as it is measured, and is not measured again; `--only` names some of the six networks.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
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
DRAWS = 3  # of a random search: (10 + 5 * 2 + 4) / 10 trainings cost as many gradients as one that is tuned
CALLS = 3  # of the default, which trains to a tolerance
DENSE = 5000  # most parameters of a matrix that is written out
TRAINING, DESCENT = optax.adam(1e-2), optax.adam(0.3)
PyTree = Any


class Method(NamedTuple):
    """A way to a hypergradient, and how it is drawn."""

    label: str
    linear: str | None  # of LINEAR; "default" and "online" for these solvers; None for unrolling
    curvature: str
    damping: float | None
    color: str


LINEAR = {
    "cg": hg.linear.cg(max_steps=PRODUCTS, indefinite="truncate"),
    "neumann": hg.linear.neumann(PRODUCTS),
    "identity": hg.linear.identity(1e-2),
}
METHODS = {
    "online": Method("hg.online", "online", "hessian", None, INK),
    "gn_d001": Method("Gauss-Newton, damping 0.01", "cg", "gauss_newton", 0.01, GREEN),
    "gn_d01": Method("Gauss-Newton, damping 0.1", "cg", "gauss_newton", 0.1, GREEN),
    "cg_d001": Method("truncated CG, damping 0.01", "cg", "hessian", 0.01, BLUE),
    "cg_d01": Method("truncated CG, damping 0.1", "cg", "hessian", 0.1, BLUE),
    "neumann": Method("Neumann series", "neumann", "hessian", 0.0, ORANGE),
    "identity": Method("identity (T1-T2)", "identity", "hessian", 0.0, PINK),
    "unrolled": Method("ten steps unrolled", None, "hessian", None, SKY),
    "default": Method("hg.implicit as it is", "default", "hessian", None, INK),
}
# What matters most comes first, so that a run that is stopped early is of use.
CELLS = ("online", "plain", "cg_d01", "gn_d001", "neumann", "identity", "unrolled", "random", "cosine", "default")
CELLS += tuple(name for name in METHODS if name not in CELLS)


def log_decays(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: jnp.full_like(w, START), params)


def solver(net: Network, linear: str | None = "cg", curvature: str = "hessian") -> hg.Solver:
    inner = hg.inner.gradient(TRAINING, steps=STEPS)
    if linear is None:
        return hg.unrolled(net.problem, inner=inner, warm_start=True)
    if linear == "online":
        return hg.online(net.problem, TRAINING, steps=STEPS, products=PRODUCTS)
    if linear == "default":
        return hg.implicit(net.problem)
    return hg.implicit(net.problem, inner=inner, linear=LINEAR[linear], curvature=curvature, damping=0.0)


def applies(name: str, method: Method) -> bool:
    """A Gauss-Newton matrix needs the model apart from its loss, which a model with a state is not."""
    return method.curvature == "hessian" or network(name, 0).outputs is not None


@functools.cache
def looks(name: str) -> Any:
    """`(state, hparams, key, train, valid) -> (validation loss, state)`: ten steps of training, without tuning."""
    evaluate: Any = solver(network(name, 0)).evaluate

    @jax.jit
    def look(state: Any, hparams: PyTree, key: jax.Array, train: PyTree, valid: PyTree) -> Any:
        value, _, state = evaluate(state, hparams, train, valid, key=key)
        return value, state

    return look


@functools.cache
def errors(name: str) -> Any:
    """`(state, batch) -> loss`."""
    net = network(name, 0)
    return jax.jit(lambda state, batch: net.error(state.params, state.model_state, batch))


@functools.cache
def ways(name: str, linear: str | None, curvature: str) -> tuple[hg.Solver, Any]:
    """A solver, and one outer step with it; compiled once for a network, whatever the seed."""
    way = solver(network(name, 0), linear, curvature)
    return way, outer_step(way)


def tuned(name: str, net: Network, method: Method, seed: int, outer: int) -> dict[str, Any]:
    """Tune from the initialisation; steps that are not usable are skipped, as in `hg.tune`."""
    way, step = ways(name, method.linear, method.curvature)
    hparams = log_decays(net.params)
    state, descent = way.init(net.params, hparams, model_state=net.model_state), DESCENT.init(hparams)
    if method.damping is not None:
        state = state._replace(options=state.options | {"damping": jnp.asarray(method.damping, jnp.float32)})
    train, history, seconds = hg.minibatches(net.data[0], net.batch), [], []
    for i in range(outer):
        key, began = jax.random.fold_in(jax.random.key(seed), i), time.process_time()
        state, hparams, descent, seen = jax.block_until_ready(step(state, hparams, descent, key, train, net.data[1]))
        seconds.append(time.process_time() - began)
        history.append(seen)
    value, status, truncated = (np.asarray(column) for column in zip(*history, strict=True))
    found = {
        "usable": np.mean(status <= int(hg.Status.INSENSITIVE)),
        "statuses": {hg.Status(int(code)).name: int(np.sum(status == code)) for code in np.unique(status)},
        "valid": value[-1],
        "test": errors(name)(state, net.data[2]),
        "seconds": np.median(seconds),
    }
    # Only conjugate gradients say by a NaN that they stopped early.
    return found | ({"truncated": truncated.mean()} if method.linear in ("cg", "online") else {})


def outer_step(method: hg.Solver, rule: optax.GradientTransformation = DESCENT) -> Any:
    @jax.jit
    def step(state: Any, hparams: PyTree, descent: PyTree, key: jax.Array, train: PyTree, valid: PyTree) -> Any:
        out, state = method.hypergrad(state, hparams, train, valid, key=key)
        usable = out.info.status <= int(hg.Status.INSENSITIVE)
        updates, fresh = rule.update(out.grad, descent, hparams)
        moved = optax.apply_updates(hparams, updates), fresh
        hparams, descent = jax.tree.map(lambda a, b: jnp.where(usable, a, b), moved, (hparams, descent))
        return state, hparams, descent, (out.value, out.info.status, jnp.isnan(out.info.linear_residual))

    return step


def trained(name: str, net: Network, log_decay: float, seed: int, outer: int) -> tuple[dict[str, Any], list[Any]]:
    """A training at one fixed decay, of the same length and on the same batches: its losses, and every state."""
    hparams = jax.tree.map(lambda w: jnp.full_like(w, log_decay), net.params)
    state = solver(net).init(net.params, hparams, model_state=net.model_state)
    train, states, value, seconds = hg.minibatches(net.data[0], net.batch), [], jnp.inf, []
    for i in range(outer):
        key, began = jax.random.fold_in(jax.random.key(seed), i), time.process_time()
        value, state = jax.block_until_ready(looks(name)(state, hparams, key, train, net.data[1]))
        seconds.append(time.process_time() - began)
        states.append(state)
    losses = {"valid": value, "test": errors(name)(state, net.data[2]), "seconds": np.median(seconds)}
    return losses, states


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
        if method.linear not in LINEAR or method.damping is None or matrix is None:
            continue
        shift = method.damping * jnp.linalg.norm(matrix) / np.sqrt(len(w))
        matrix = matrix + shift * jnp.eye(len(w), dtype=w.dtype)
        given = np.asarray(w * solution(method.linear)(matrix, rhs), np.float64)
        exact = np.asarray(w, np.float64) * np.linalg.solve(np.asarray(matrix, np.float64), np.asarray(rhs, np.float64))
        found[name] = given @ exact / (np.linalg.norm(given) * np.linalg.norm(exact))
    return found


def cell(name: str, what: str, seed: int, outer: int) -> dict[str, Any]:
    """One cell of the table."""
    net = network(name, seed)
    if what in METHODS:
        return tuned(name, net, METHODS[what], seed, min(outer, CALLS) if what == "default" else outer)
    if what == "random":
        draws = np.random.default_rng(seed).uniform(-9.0, -1.5, DRAWS)
        return min((trained(name, net, float(d), seed, outer)[0] for d in draws), key=lambda found: found["valid"])
    losses, states = trained(name, net, START, seed, outer if what == "plain" else 1)
    return losses if what == "plain" else cosines(net, matrices(net), states[0], seed)


def size(name: str) -> int:
    return sum(w.size for w in jax.tree.leaves(network(name, 0).params))


def wanted(name: str, what: str) -> bool:
    return size(name) <= DENSE if what == "cosine" else what not in METHODS or applies(name, METHODS[what])


def summary(networks: dict[str, Any]) -> dict[str, Any]:
    """Of each method over the networks that it was tried on."""
    found: dict[str, Any] = {}
    mean = lambda values: np.mean([*values]) if values else None
    for name in (*METHODS, "random"):
        runs = [net for net in networks.values() if name in net and "plain" in net]
        if not runs:
            continue
        found[name] = {"networks": len(runs)}
        if name != "default":
            for part in ("valid", "test"):
                found[name][f"{part}_ratio"] = np.exp(
                    mean([np.log(net[name][part] / net["plain"][part]) for net in runs])
                )
        if name in METHODS:
            found[name]["usable_least"] = min(net[name]["usable"] for net in runs)
            found[name]["cost"] = mean([net[name]["seconds"] / net["plain"]["seconds"] for net in runs])
        found[name]["truncated"] = mean([net[name]["truncated"] for net in runs if "truncated" in net[name]])
        found[name]["cosine"] = mean([net["cosine"][name] for net in runs if name in net.get("cosine", ())])
        found[name] = {key: value for key, value in found[name].items() if value is not None}
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    names, cells, outer = options.only or NETWORKS, CELLS, OUTER
    if options.smoke:
        names, cells, outer = NETWORKS[:1], ("online", "plain", "random", "cosine"), 2
    path = None if options.smoke else options.cells
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    known = {(line["network"], line["cell"], line["seed"]): line["found"] for line in lines}
    numbers["networks"] = {}
    for what in cells:
        for name in names:
            if not wanted(name, what):
                continue
            if (name, what, options.seed) not in known:
                found = known[name, what, options.seed] = rounded(cell(name, what, options.seed, outer))
                line = json.dumps({"network": name, "cell": what, "seed": options.seed, "found": found})
                print(line, flush=True)
                if path:
                    with path.open("a") as file:
                        file.write(line + "\n")
            short = name.replace(" ", "_").lower()
            numbers["networks"].setdefault(short, {"parameters": size(name)})[what] = known[name, what, options.seed]
    numbers["methods"] = summary(numbers["networks"])
    found = [net["cosine"]["negative"] for net in numbers["networks"].values() if "cosine" in net]
    numbers["negative"] = np.mean(found) if found else None
    picture(numbers, options.out)


def picture(numbers: dict[str, Any], folder: Path) -> None:
    canvas = figure(12.5, 4.6)
    panels = canvas.subplots(1, 3, sharey=True)
    names = [name for name in METHODS if name in numbers["methods"]]
    titles = {
        "usable": "Usable steps",
        "valid": "Validation loss / untuned",
        "cosine": "Cosine, early in training",
    }
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        for y, name in enumerate(names):
            for net in numbers["networks"].values():
                if what == "cosine":
                    x = net.get(what, {}).get(name)
                elif name not in net or "plain" not in net or (what == "valid" and name == "default"):
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
    cells = Path(__file__).parent / "cells.jsonl"
    parser.add_argument(
        "--cells", type=Path, metavar="FILE", default=cells, help="keep each cell here, and go on from there"
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, kept="measured.json")

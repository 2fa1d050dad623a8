"""Do hypernetworks give parameters in proportion to their input, and does the magnitude-invariant form train faster?

A perceptron makes the 53,000 parameters of a dense U-Net that denoises digits without seeing clean ones: its loss is
the distance to the noisy image plus exp(λ) times the roughness of the output, one λ a step, over the whole range.
Four forms of the perceptron: fed γ ∈ [0, 1] itself, or its encoding of constant norm, each with and without a learned
base for the parameters. Encoding and base together are the magnitude-invariant form, `hg.responses.mlp`.

    python experiments/hypernetwork_mip/run.py --seed 0 --json
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
from experiments import _figures as style  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import digits  # noqa: E402

LOW, HIGH = -6.0, 1.0
LOOKS = np.linspace(LOW, HIGH, 8).astype(np.float32)
HIDDEN = (32, 32)
ARMS = {  # encoding, base
    "raw": (False, False),
    "base": (False, True),
    "encoding": (True, False),
    "mip": (True, True),
}


def unet_start(seed: int) -> dict[str, Any]:
    """He-normal kernels of a dense network in the shape of a U-Net: 64, 128, 64, 128, 64 units, with skips."""
    rng = np.random.default_rng(seed)
    shapes = {"down": (64, 128), "deep": (128, 64), "up": (192, 128), "out": (192, 64)}
    kernel = lambda i, o: (rng.normal(size=(i, o)) * np.sqrt(2 / i)).astype(np.float32)
    return {name: {"kernel": kernel(i, o), "bias": np.zeros(o, np.float32)} for name, (i, o) in shapes.items()}


def unet(params: dict[str, Any], x: Any) -> Any:
    """Images `[n, 8, 8]` to images."""
    layer = lambda name, *parts: (
        jnp.concatenate(parts, axis=-1) @ params[name]["kernel"] + params[name]["bias"][None, :]
    )
    flat = x.reshape(-1, 64)
    down = jax.nn.relu(layer("down", flat))
    up = jax.nn.relu(layer("up", jax.nn.relu(layer("deep", down)), down))
    return layer("out", up, flat).reshape(x.shape)


def train_loss(params: Any, log_roughness: Any, batch: Any) -> Any:
    noisy, _ = batch
    found = unet(params, noisy)
    rough = jnp.mean(jnp.diff(found, axis=1) ** 2) + jnp.mean(jnp.diff(found, axis=2) ** 2)
    return jnp.mean((found - noisy) ** 2) + jnp.exp(log_roughness) * rough


def valid_loss(params: Any, log_roughness: Any, batch: Any) -> Any:
    noisy, clean = batch
    return jnp.mean((unet(params, noisy) - clean) ** 2)


def form(*, encoding: bool, base: bool) -> hg.responses.Response:
    """The four forms of one perceptron; with both it is the library's own."""
    mip = hg.responses.mlp(hidden=HIDDEN, within=(LOW, HIGH))
    if encoding and base:
        return mip

    def init(key: Any, params: Any, hparams: Any) -> hg.responses.Weights:
        weights = mip.init(key, params, hparams)
        if encoding:
            layers = weights.slope.hidden
        else:  # one input instead of cosine and sine
            layers = ((weights.slope.hidden[0][0][:1], weights.slope.hidden[0][1]), *weights.slope.hidden[1:])
        outputs = weights.slope.outputs
        if not base:  # its outputs are all there is: as large as the parameters of a network should be
            outputs = jax.tree.map(lambda k, p: k * jnp.sqrt(p.size / k.shape[0]) * jnp.std(p) * 4, outputs, params)
        kept = weights.base if base else jax.tree.map(jnp.zeros_like, params)
        return hg.responses.Weights(kept, (layers, outputs))

    def apply(weights: hg.responses.Weights, hparams: Any, centre: Any = None) -> Any:
        layers, outputs = weights.slope
        share = ((hparams - LOW) / (HIGH - LOW)).reshape(1).astype(jnp.float32)
        z = jnp.concatenate([jnp.cos(jnp.pi * share / 2), jnp.sin(jnp.pi * share / 2)]) if encoding else share
        for kernel, bias in layers:
            z = jax.nn.leaky_relu(z @ kernel + bias)
        return jax.tree.map(lambda b, k: b + jnp.tensordot(z, k, axes=1), weights.base, outputs)

    return hg.responses.Response(init, apply, centred=False)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    rng = np.random.default_rng(options.seed)
    pairs = []
    for x, _ in digits(options.seed, [800, 400], centred=False)[:2]:
        clean = x.reshape(-1, 8, 8)
        pairs.append(((clean + 0.3 * rng.normal(size=clean.shape)).astype(np.float32), clean))
    train, valid = hg.minibatches(pairs[0], 32), pairs[1]
    calls, steps = (2, 2) if options.smoke else (40, 50)
    params, problem = unet_start(options.seed), hg.Problem(train_loss, valid_loss)
    curves: dict[str, np.ndarray] = {}
    sizes: dict[str, list[float]] = {}
    for name, (encoding, base) in ARMS.items():
        if options.smoke and name in ("base", "encoding"):
            continue
        solver = hg.hypernetwork(
            problem,
            response=form(encoding=encoding, base=base),
            optimizer=optax.adam(1e-3),
            steps=steps,
            distribution=(LOW, HIGH),
            measure=False,
        )
        key = jax.random.key(options.seed)
        state = jax.jit(lambda key, solver=solver: solver.init(params, LOOKS[0], key=key))(key)
        step = jax.jit(solver.hypergrad)
        respond = jax.jit(solver.response)

        @jax.jit
        def looked(state: Any, solver: Any = solver) -> Any:
            at = lambda h: train_loss(solver.response(state, h), h, valid)
            return jnp.mean(jax.lax.map(at, jnp.asarray(LOOKS)))

        made = [respond(state, np.float32(LOW + share * (HIGH - LOW))) for share in (0.1, 0.5, 1.0)]
        flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        sizes[name] = [float(np.std(flat(tree))) for tree in made]
        numbers[f"std_ratio_{name}"] = max(sizes[name]) / min(sizes[name])
        losses = [float(looked(state))]
        for i in progress(range(calls), name):
            _, state = step(state, LOOKS[0], train, valid, key=jax.random.fold_in(key, i))
            losses.append(float(looked(state)))
        curves[name] = np.asarray(losses)
        numbers[f"final_{name}"] = float(np.mean(losses[-max(calls // 10, 1) :]))
    numbers["target"] = 1.02 * max(numbers["final_raw"], numbers["final_mip"])
    for name, losses in curves.items():
        below = losses <= numbers["target"]
        numbers[f"steps_{name}"] = int(np.argmax(below)) * steps if below.any() else None


def drawing(results: dict[str, Any]) -> Any:
    labels = {"raw": "γ itself", "base": "γ and base", "encoding": "encoding", "mip": "both (MIP)"}
    colors = dict(zip(ARMS, (style.ORANGE, style.PINK, style.GREEN, style.BLUE), strict=True))
    canvas = style.figure(12.5, 3.4)
    panels = {
        "std_ratio": ("Spread over γ", 2, {"xlabel": "largest over smallest (log scale)", "xscale": "log"}),
        "steps": ("Steps to the target", 0, {"xlabel": "training steps"}),
        "final": ("Loss at the end", 4, {"xlabel": "held-out training loss"}),
    }
    for axes, (name, (title, behind, more)) in zip(canvas.subplots(1, 3), panels.items(), strict=True):
        rows = {labels[arm]: (style.each(results, f"{name}_{arm}"), colors[arm]) for arm in ARMS}
        style.over_seeds(axes, rows, title, digits=behind, **more)
        if name == "std_ratio":
            axes.set(xlim=(0.9, 12), xticks=[1, 2, 5, 10])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

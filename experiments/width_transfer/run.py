"""Learning rates and decays tuned on a narrow network, used on a wide and on a deep one, with and without the rules.

    python experiments/width_transfer/run.py --seed 0 --json

A residual network learns digits by AdamW in 40 steps. The best learning rate is found on a grid of half octaves at
widths 64, 256 and 1024 and depths 2 and 8, with the rules of `hg.scaling` and without. Then rate and decay are tuned by
hypergradient at width 64, used at width 512, and compared with tuning there.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment, progress
from experiments._data import digits, stretches
from experiments._figures import BLUE, GREEN, ORANGE, PINK, SKY, figure, save, titled

BATCH, TUNED, LAYERS = 64, 64, 2  # the model whose hyperparameters are tuned
SHAPES = ((64, 2), (256, 2), (1024, 2), (64, 8))  # width and depth
GRID = {"with": (-18, -6), "without": (-24, -9)}  # half octaves from a rate of 1
WIDE = 512  # where hyperparameters tuned by hypergradient are used
START = {"rate": 2e-3, "decay": 0.1}


class Setting(NamedTuple):
    """What a run is made of; the same at every width and depth."""

    train: Any
    valid: Any
    test: Any
    rows: Any  # of each step's batch
    steps: int


@functools.partial(jax.jit, static_argnums=(1, 2))
def network(key: Any, width: int, layers: int) -> dict[str, Any]:
    """Parameters as LeCun would draw them; blocks are stacked along their first axis."""
    keys = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(keys[0], (64, width)) / 8,
        "blocks": jax.random.normal(keys[1], (layers, width, width)) / np.sqrt(width),
        "shift": jnp.zeros((layers, width)),
        "out": jax.random.normal(keys[2], (width, 10)) / np.sqrt(width),
    }


def activations(w: dict[str, Any], x: Any, *, branch: Any = 1.0) -> dict[str, Any]:
    """`branch` multiplies what each block adds."""

    def block(x: Any, layer: Any) -> Any:
        weight, shift = layer
        return x + branch * jnp.tanh(x @ weight + shift[None]), None

    start = jnp.tanh(x @ w["in"])
    features = jax.lax.scan(block, start, (w["blocks"], w["shift"]))[0]
    return {"first layer": start, "features": features, "logits": features @ w["out"]}


def loss(w: dict[str, Any], batch: Any, *, branch: Any = 1.0) -> Any:
    logits = activations(w, batch[0], branch=branch)["logits"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


DEPTH = {"in": 1.0, "blocks": "stacked", "shift": "stacked", "out": 1.0}
LAYOUT = {"in": "io", "blocks": "io", "shift": "o", "out": "io"}


def rules(seed: int, decay: str = "sqrt") -> hg.scaling.Scaling:
    """Read off two instances at the tuned width and twice that."""
    tuned, wider = (network(jax.random.key(seed), width, LAYERS) for width in (TUNED, 2 * TUNED))
    return hg.scaling.infer(tuned, wider, rule="adam", decay=decay, depth=DEPTH, layout=LAYOUT)


def branch_of(layers: int, scaling: hg.scaling.Scaling | None) -> float:
    return LAYERS / layers if scaling else 1.0


def begin(key: Any, width: int, layers: int, scaling: hg.scaling.Scaling | None) -> Any:
    params = network(key, width, layers)
    return hg.scaling.rescale(scaling, params) if scaling else params


def optimizer(hparams: Any, scaling: hg.scaling.Scaling | None, steps: int) -> Any:
    """AdamW, whose rate rises over the first tenth of the steps and falls to zero as a cosine does."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    made = optax.adamw(lambda count: hparams["rate"] * shape(count + 1), weight_decay=hparams["decay"])
    return hg.scaling.scaled(scaling, made) if scaling else made


def fitted(hparams: Any, params: Any, setting: Setting, scaling: hg.scaling.Scaling | None, branch: float) -> Any:
    made = optimizer(hparams, scaling, setting.steps)

    def step(carry: Any, rows: Any) -> Any:
        params, state = carry
        batch = setting.train[0][rows], setting.train[1][rows]
        grads = jax.grad(functools.partial(loss, branch=branch))(params, batch)
        updates, state = made.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, made.init(params)), setting.rows)[0][0]


def sweep(options: argparse.Namespace, setting: Setting, shape: Any, scaling: Any, rates: Any, repeats: int) -> Any:
    """Training loss after the last step at each rate, `[rates]`: a mean over initial parameters."""
    width, layers = shape
    branch = branch_of(layers, scaling)

    @jax.jit
    def run(params: Any, rate: Any) -> Any:
        end = fitted({"rate": rate, "decay": 0.0}, params, setting, scaling, branch)
        return loss(end, setting.train, branch=branch)

    found = []
    for repeat in range(repeats):
        params = begin(jax.random.key(1000 * options.seed + repeat), width, layers, scaling)
        found.append([float(run(params, rate)) for rate in rates])
    return np.mean(np.asarray(found), axis=0)


def lowest(rates: Any, losses: Any) -> float:
    """Half octaves from rate 1 to the lowest loss: the vertex of the parabola through the three lowest neighbours."""
    at = int(np.nanargmin(losses))
    octaves = 2 * np.log2(rates)
    if 0 < at < len(rates) - 1 and np.all(np.isfinite(losses[at - 1 : at + 2])):
        before, here, after = np.log(losses[at - 1 : at + 2])
        return float(octaves[at] + (before - after) / (2 * (before - 2 * here + after)))
    return float(octaves[at])


def transfer(options: argparse.Namespace, setting: Setting, numbers: dict[str, Any]) -> Any:
    """The best rate over widths and depths; the curves, for the picture."""
    shapes = ((16, 2), (16, 4)) if options.smoke else SHAPES
    curves, grids = {}, {}
    for name, scaling in (("with", rules(options.seed)), ("without", None)):
        best = {}
        rates = grids[name] = 2.0 ** (np.arange(*GRID[name], 4 if options.smoke else 1) / 2)
        for shape in progress(shapes, f"{name} rules"):
            repeats = 1 if options.smoke else 2 if shape[0] > 256 else 4
            curves[name, shape] = sweep(options, setting, shape, scaling, rates, repeats)
            best[shape] = lowest(rates, curves[name, shape])
            numbers[f"best_{name}_{shape[0]}_{shape[1]}"] = 2.0 ** (best[shape] / 2)
        for axis, over in ((0, "widths"), (1, "depths")):
            cells = [at for shape, at in best.items() if shape[1 - axis] == shapes[0][1 - axis]]
            numbers[f"cells_over_{over}_{name}"] = max(cells) - min(cells)
    return grids, curves


def coordinates(options: argparse.Namespace, setting: Setting, numbers: dict[str, Any]) -> dict[str, Any]:
    """How much four steps change activations, over widths."""
    batch = setting.train[0][:BATCH], setting.train[1][:BATCH]
    checks = {}
    for name, scaling in (("with", rules(options.seed, "fixed")), ("without", None)):
        checks[name] = hg.scaling.coordinate_check(
            lambda width, key, scaling=scaling: begin(key, width, LAYERS, scaling),
            loss,
            lambda w, batch: activations(w, batch[0]),
            hg.scaling.scaled(scaling, optax.adam(1e-3)) if scaling else optax.adam(1e-3),
            batch,
            widths=(8, 16) if options.smoke else (64, 128, 256, 512),
            key=jax.random.key(options.seed),
        )
        numbers[f"slopes_{name}"] = checks[name].slopes
        numbers[f"steepest_{name}"] = max(map(abs, checks[name].slopes.values()))
    return checks


def tuned(options: argparse.Namespace, setting: Setting, width: int, scaling: Any, steps: int) -> Any:
    """Rate and decay by hypergradient through the run at one width."""

    def train(w: Any, h: Any, batch: Any) -> Any:
        return loss(w, batch)

    problem = hg.Problem(train, train)
    inner = hg.inner.gradient(lambda h: optimizer(h, scaling, setting.steps), steps=setting.steps)
    solver = hg.unrolled(problem, inner=inner, mode="forward")
    result = hg.tune(
        solver,
        begin(jax.random.key(options.seed + 7), width, LAYERS, scaling),
        START,
        hg.minibatches(setting.train, BATCH),
        setting.valid,
        outer=optax.adam(0.15),
        steps=steps,
        domain={"rate": hg.domains.log(), "decay": hg.domains.log()},
        key=jax.random.key(options.seed),
        progress=False,
    )
    return result.best.hparams


def against_wide(options: argparse.Namespace, setting: Setting, numbers: dict[str, Any]) -> None:
    """Hyperparameters of the narrow network in the wide one, against tuning the wide one."""
    steps = 2 if options.smoke else 20
    wide = TUNED if options.smoke else WIDE
    scaling = rules(options.seed)
    began = time.process_time()
    narrow = tuned(options, setting, TUNED, scaling, steps)
    numbers["seconds_narrow"] = time.process_time() - began
    began = time.process_time()
    at_wide = narrow if wide == TUNED else tuned(options, setting, wide, scaling, steps)
    numbers["seconds_wide"] = time.process_time() - began
    evaluate = {"narrow": narrow, "wide": at_wide, "start": START, "narrow_without_rules": narrow}
    for rule, names in ((scaling, ("narrow", "wide", "start")), (None, ("narrow_without_rules",))):
        starts = [begin(jax.random.key(5000 + 10 * options.seed + i), wide, LAYERS, rule) for i in range(3)]
        run = jax.jit(lambda h, w, rule=rule: loss(fitted(h, w, setting, rule, 1.0), setting.test))
        for name in names:
            numbers[f"test_loss_{name}"] = float(np.mean([run(evaluate[name], w) for w in starts]))
            numbers[f"tuned_{name}"] = {k: float(v) for k, v in evaluate[name].items()}
    numbers["loss_ratio"] = numbers["test_loss_narrow"] / numbers["test_loss_wide"]
    products = lambda width: 64 * width + LAYERS * width**2 + 10 * width  # multiplications for a row
    # A hypergradient pushes two tangents through the run. The narrow way trains the wide network once besides.
    numbers["cost_ratio"] = products(TUNED) / products(wide) + 1 / (3 * steps)


def transformer(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """The coordinate check of one block on text, whose heads are of a fixed size."""
    length, size = (8, 4) if options.smoke else (16, 8)
    (batch,), letters = stretches(options.seed, [32], length)
    batch = jax.tree.map(jnp.asarray, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(width: int, key: Any) -> dict[str, Any]:
        keys = iter(jax.random.split(key, 8))
        weight = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
        heads = width // size
        return {
            "embed": weight(letters, width) * np.sqrt(letters),
            "place": weight(length, width),
            "qkv": weight(width, 3, heads, size),
            "mix": weight(width, width),
            "up": weight(width, 2 * width),
            "down": weight(2 * width, width),
            "out": weight(width, letters),
        }

    norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def layers(w: dict[str, Any], batch: Any) -> dict[str, Any]:
        x = w["embed"][batch[0]] + w["place"][None]
        q, k, v = jnp.einsum("btd,dche->cbthe", norm(x), w["qkv"])
        seen = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(seen[None, None], jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(size), -1e9)
        mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v).reshape(x.shape)
        attention = mixed @ w["mix"]
        features = x + attention + jnp.tanh(norm(x + attention) @ w["up"]) @ w["down"]
        return {"attention": attention, "features": features, "logits": norm(features) @ w["out"]}

    def fit(w: dict[str, Any], batch: Any) -> Any:
        logits = layers(w, batch)["logits"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    sizes = (8, 16) if options.smoke else (32, 64, 128, 256)
    layout = dict.fromkeys(("embed", "place", "mix", "up", "down", "out"), "io") | {"qkv": "i.oo"}
    key = jax.random.key(options.seed)
    scaling = hg.scaling.infer(draw(sizes[0], key), draw(sizes[1], key), rule="adam", layout=layout)
    for name in ("with",) if options.smoke else ("with", "without"):
        init = (lambda n, key: hg.scaling.rescale(scaling, draw(n, key))) if name == "with" else draw
        made = optax.adam(1e-3)
        check = hg.scaling.coordinate_check(
            init,
            fit,
            layers,
            hg.scaling.scaled(scaling, made) if name == "with" else made,
            batch,
            widths=sizes,
            key=key,
            repeats=2,
        )
        numbers[f"transformer_slopes_{name}"] = check.slopes
        numbers[f"transformer_steepest_{name}"] = max(map(abs, check.slopes.values()))


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    steps = 4 if options.smoke else 40
    parts = digits(options.seed, [200, 100] if options.smoke else [1000, 300])
    train, valid, test = jax.tree.map(jnp.asarray, parts)
    rows = jax.random.randint(jax.random.key(options.seed), (steps, BATCH), 0, len(train[1]))
    setting = Setting(train, valid, test, rows, steps)
    checks = coordinates(options, setting, numbers)
    transformer(options, numbers)
    against_wide(options, setting, numbers)
    grids, curves = transfer(options, setting, numbers)
    draw(options.out, grids, curves, checks)


def draw(folder: Path, grids: dict[str, Any], curves: dict[Any, Any], checks: dict[str, Any]) -> None:
    picture = figure(13.5, 7.2)
    axes = picture.subplots(2, 2)
    colors = (SKY, BLUE, GREEN, ORANGE, PINK)
    for column, name in enumerate(("without", "with")):
        (top, bottom), rates = axes[:, column], grids[name]
        shapes = [shape for arm, shape in curves if arm == name]
        for color, shape in zip(colors, shapes, strict=False):
            losses = np.where(curves[name, shape] < 3, curves[name, shape], np.nan)
            label = f"width {shape[0]}, {shape[1]} layers"
            top.loglog(rates, losses, color=color, label=label, linestyle="-" if shape[1] == shapes[0][1] else "--")
            best = int(np.nanargmin(losses))
            top.plot(rates[best], losses[best], "o", color=color, ms=7)
        top.legend(frameon=False, fontsize=9)
        titled(top, f"{name.capitalize()} the rules", xlabel="learning rate", ylabel="training loss after 40 steps")
        hg.diagnostics.plots.coordinates(checks[name], ax=bottom)
    low = min(ax.get_ylim()[0] for ax in axes[1])
    high = max(ax.get_ylim()[1] for ax in axes[1])
    for ax in axes[1]:
        ax.set_ylim(low, high)
    save(picture, folder, "course.png", colours=64)


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Best rate over sizes",
            "half octaves apart",
            {
                "widths, with the rules": ("cells_over_widths_with", style.BLUE),
                "widths, without": ("cells_over_widths_without", style.ORANGE),
                "depths, with the rules": ("cells_over_depths_with", style.BLUE),
                "depths, without": ("cells_over_depths_without", style.ORANGE),
            },
        ),
        (
            "Width 512",
            "test loss",
            {
                "where tuning starts": ("test_loss_start", style.INK),
                "tuned at 64, as it is": ("test_loss_narrow_without_rules", style.ORANGE),
                "tuned at 64, with the rules": ("test_loss_narrow", style.BLUE),
                "tuned at 512": ("test_loss_wide", style.GREEN),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

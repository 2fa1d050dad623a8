"""A learning rate and a momentum for each step, and a rate for each layer, learned through training itself.

    python experiments/learned_schedule/run.py --seed 0 --json

Schedules of a small network on digits start constant and follow the hypergradient of the validation loss after the
last step. They are compared at equal steps with schedules that are searched at equal cost and with optimizers that
need no learning rate, carried over to longer training and to a wider network, and driven to the edge of stability.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment
from experiments._data import Split, digits

Hparams = dict[str, Any]

LAYERS = ("in", "hidden", "out")
STEPS, BATCH, WIDTH, WIDER, LONGER = 80, 64, 32, 4, 3
REPLICAS = 2  # networks trained side by side at the same schedule, while it is tuned
COST = 3  # gradients of training that a hypergradient costs a step
RATES, LAG = (0.02, 2.0), (0.03, 1.0)  # where searches draw the peak of a rate and 1 - momentum
CONSTANT = {"rate": 0.05, "momentum": 0.5}  # where tuning starts
EDGE = np.geomspace(0.05, 50, 16)  # constant rates at which hypergradients are looked at
FREE = {
    "prodigy": optax.contrib.prodigy,
    "dadapt_adamw": optax.contrib.dadapt_adamw,
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1, momentum=0.9)),
    "dog": optax.contrib.dog,
    "cocob": optax.contrib.cocob,
}


class Data(NamedTuple):
    train: Split
    valid: Split
    test: Split


def start(key: Any, width: int = WIDTH, *, aware: bool = True) -> dict[str, Any]:
    """Three matrices; `aware` of width, the last is smaller by the square root of what it is wider than `WIDTH`."""
    keys = dict(zip(LAYERS, jax.random.split(key, 3), strict=True))
    last = np.sqrt(WIDTH) / width if aware else 1 / np.sqrt(width)
    return {
        "in": jax.random.normal(keys["in"], (64, width)) / 8,
        "hidden": jax.random.normal(keys["hidden"], (width, width)) / np.sqrt(width),
        "out": jax.random.normal(keys["out"], (width, 10)) * last,
    }


def loss(params: dict[str, Any], batch: Any) -> Any:
    x, y = batch
    logits = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["hidden"]) @ params["out"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def scheduled(hparams: Hparams) -> optax.GradientTransformation:
    """Gradient descent with a rate and a momentum for each step, and a factor for each layer."""

    def init(params: Any) -> Any:
        return jnp.int32(0), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        step, velocity = state
        velocity = jax.tree.map(lambda v, g: hparams["momentum"][step] * v + g, velocity, updates)
        return {k: -hparams["rate"][step] * hparams["layer"][k] * v for k, v in velocity.items()}, (step + 1, velocity)

    return optax.GradientTransformation(init, update)


def for_width(hparams: Hparams, factor: float) -> Hparams:
    """Rates of a network that is wider by `factor`: those of maximal update parametrization for gradient descent."""
    scales = {"in": factor, "hidden": 1.0, "out": 1 / factor}
    return hparams | {"layer": {k: v * scales[k] for k, v in hparams["layer"].items()}}


def for_length(hparams: Hparams, steps: int) -> Hparams:
    """The same curves over so many steps."""
    new, old = (np.linspace(0, 1, n) for n in (steps, len(hparams["rate"])))
    stretch = lambda y: np.interp(new, old, y).astype(np.float32)
    return hparams | {"rate": np.exp(stretch(np.log(hparams["rate"]))), "momentum": stretch(hparams["momentum"])}


def curves(rate: Any, momentum: Any, steps: int) -> Hparams:
    wide = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (steps,))
    return {
        "rate": wide(rate),
        "momentum": wide(momentum),
        "layer": dict.fromkeys(LAYERS, jnp.ones(())),
    }


def cosine(peak: Any, momentum: Any, shape: Any, steps: int) -> Hparams:
    """Up in a line over at most 30 % of the steps, down in a half wave."""
    t, up = (jnp.arange(steps) + 0.5) / steps, 0.3 * shape
    down = (1 + jnp.cos(jnp.pi * (t - up) / (1 - up))) / 2
    return curves(peak * jnp.where(t < up, t / jnp.maximum(up, 1e-3), down), momentum, steps)


def one_cycle(peak: Any, momentum: Any, shape: Any, steps: int) -> Hparams:
    """Up and down in half waves, the momentum by a tenth the other way."""
    t, up = (jnp.arange(steps) + 0.5) / steps, 0.1 + 0.4 * shape
    wave = (1 - jnp.cos(jnp.pi * jnp.where(t < up, t / up, (1 - t) / (1 - up)))) / 2
    return curves(peak * (0.04 + 0.96 * wave), momentum * (1 - 0.1 * wave), steps)


def power(peak: Any, momentum: Any, shape: Any, steps: int) -> Hparams:
    """Down from the start, by a power between 0.5 and 3 of the steps that are left."""
    return curves(peak * (1 - jnp.arange(steps) / steps) ** (0.5 + 2.5 * shape), momentum, steps)


def constant(peak: Any, momentum: Any, shape: Any, steps: int) -> Hparams:
    return curves(peak + 0 * shape, momentum, steps)


FAMILIES: dict[str, Callable[..., Hparams]] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "power": power,
}


def trained(optimizer: optax.GradientTransformation, params: Any, key: Any, train: Any, steps: int) -> tuple[Any, Any]:
    """Parameters and optimizer state after so many steps."""

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(train[1]))
        updates, state = optimizer.update(jax.grad(loss)(params, (train[0][rows], train[1][rows])), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0]


@functools.partial(jax.jit, static_argnames=("width", "aware"))
def after(hparams: Hparams, keys: Any, train: Any, held: Any, *, width: int = WIDTH, aware: bool = True) -> Any:
    """Loss on `held` after training at each of these schedules, [schedules, keys]."""

    def once(hparams: Hparams, key: Any) -> Any:
        params = start(key, width, aware=aware)
        return loss(trained(scheduled(hparams), params, key, train, hparams["rate"].shape[0])[0], held)

    return jax.vmap(lambda h: jax.vmap(lambda key: once(h, key))(keys))(hparams)


def stacked(hparams: list[Hparams]) -> Hparams:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, jnp.float32) for x in leaves]), *hparams)


def searched(family: Callable[..., Hparams], draws: int, keys: Any, data: Data, steps: int, seed: int) -> list[float]:
    """Peak, momentum and shape of the best of so many schedules by validation loss."""
    u = np.random.default_rng(seed).uniform(size=(3, draws)).astype(np.float32)
    log_between = lambda u, box: box[0] * (box[1] / box[0]) ** u
    drawn = log_between(u[0], RATES), 1 - log_between(u[1], LAG), u[2]
    found = after(jax.vmap(lambda p, m, s: family(p, m, s, steps))(*drawn), keys, data.train, data.valid)
    best = np.nanargmin(np.mean(found, axis=1))
    return [float(x[best]) for x in drawn]


def solver(steps: int) -> hg.Solver:
    """Hypergradients of the validation loss of `REPLICAS` networks after all of their training steps."""
    each = jax.vmap(loss, in_axes=(0, None))
    problem = hg.Problem(lambda w, _, batch: jnp.sum(each(w, batch)), lambda w, _, batch: jnp.mean(each(w, batch)))
    return hg.unrolled(problem, inner=hg.inner.gradient(scheduled, steps=steps), mode="reverse")


def tuned(method: hg.Solver, hparams: Hparams, data: Data, key: Any, steps: int, rate: float = 0.2) -> hg.Result:
    return hg.tune(
        method,
        replicas(key),
        hparams,
        hg.minibatches(data.train, BATCH),
        data.valid,
        outer=optax.adam(optax.cosine_decay_schedule(rate, steps)),
        steps=steps,
        key=key,
        domain={"rate": hg.domains.log(), "momentum": hg.domains.interval(0, 1), "layer": hg.domains.log()},
    )


def replicas(key: Any) -> Any:
    return jax.vmap(start)(jax.random.split(key, REPLICAS))


def without_rate(name: str, keys: Any, data: Data, steps: int) -> float:
    """Test loss of an optimizer that needs no learning rate, as optax has it."""
    once = lambda key: loss(trained(FREE[name](), start(key), key, data.train, steps)[0], data.test)
    return float(jnp.mean(jax.jit(jax.vmap(once))(keys)))


def schedule_free(draws: int, keys: Any, tests: Any, data: Data, steps: int) -> float:
    """Test loss of schedule-free gradient descent at the best of so many rates by validation loss."""

    @jax.jit
    def at(rates: Any, keys: Any, held: Any) -> Any:
        def once(rate: Any, key: Any) -> Any:
            params, state = trained(optax.contrib.schedule_free_sgd(rate), start(key), key, data.train, steps)
            return loss(optax.contrib.schedule_free_eval_params(state, params), held)

        return jnp.mean(jax.vmap(lambda rate: jax.vmap(lambda key: once(rate, key))(keys))(rates), axis=1)

    rates = np.geomspace(RATES[0], 10 * RATES[1], draws, dtype=np.float32)
    best = rates[np.nanargmin(at(rates, keys, data.valid))]
    return float(at(best[None], tests, data.test)[0])


def edge(method: hg.Solver, data: Data, key: Any, steps: int) -> dict[str, Any]:
    """Statuses along constant rates, and whether hypergradients survive a change of the start in the last digit."""

    @jax.jit
    def both(rate: Any) -> Any:
        hparams = curves(rate, 0.9, steps)

        def at(params: Any) -> Any:
            state = method.init(params, hparams)
            return method.hypergrad(state, hparams, hg.minibatches(data.train, BATCH), data.valid, key=key)[0]

        params = replicas(key)
        # One after the other, so that one program serves both.
        outs = jax.lax.map(at, jax.tree.map(lambda p: jnp.stack([p, p * (1 + 2e-7)]), params))
        a, b = jnp.concatenate([g.reshape(2, -1) for g in jax.tree.leaves(outs.grad)], axis=1)
        a, b = a / jnp.max(jnp.abs(a)), b / jnp.max(jnp.abs(b))
        cosine = jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        return outs.value[0], outs.info.status[0], outs.info.extra["adjoint_growth"][0], cosine

    value, status, growth, cosine = map(np.asarray, jax.vmap(both)(jnp.asarray(EDGE, jnp.float32)))
    usable = np.asarray([hg.Status(int(s)).usable for s in status])
    agree = np.nan_to_num(cosine, nan=-1.0)
    return {
        "value": value,
        "growth": growth,
        "usable": usable,
        "status": [hg.Status(int(s)).name for s in status],
        "cosine": agree,
        "last_usable_rate": EDGE[usable][-1],
        "least_cosine_of_usable": agree[usable].min(),
        "most_cosine_of_exploded": agree[~usable].max(),
    }


def survived(method: hg.Solver, rate: float, data: Data, key: Any, tests: Any, outer: int) -> dict[str, Any]:
    """Tuning from a constant rate at, or beyond, the edge of stability."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # five hypergradients in a row that are not usable
        result = tuned(method, curves(rate, 0.9, STEPS), data, key, outer, 0.1)
    return {
        "rate": rate,
        "first": result.history.value[0],
        "test": float(jnp.mean(after(stacked([result.hparams]), tests, data.train, data.test))),
        "skipped": int(np.sum(~result.history.usable)),
        "steps": len(result.history.value),
        "status": str(result.status),
    }


def metasmoothness(method: hg.Solver, kinds: dict[str, Hparams], data: Data, key: Any) -> dict[str, Any]:
    """What `hg.check` says of each schedule."""
    found = {}
    for name, hparams in kinds.items():
        batches = hg.minibatches(data.train, BATCH)
        report = hg.check(method, replicas(key), hparams, batches, data.valid, key=key, directions=1)
        smooth = report.metasmoothness
        found[name] = {
            "cosine": smooth.cosine if smooth else None,
            "signs": smooth.signs if smooth else None,
            "relative_error": report.relative_error,
            "value": report.value,
            "status": getattr(report.status, "name", str(report.status)),
        }
    return found


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    steps, outer, fresh = (8, 2, 2) if options.smoke else (STEPS, 60, 8)
    data = jax.tree.map(jnp.asarray, Data(*digits(options.seed, (800, 400))))
    key, tests = jax.random.key(options.seed), jax.random.split(jax.random.key(options.seed + 2**20), fresh)
    keys, method = jax.random.split(key, REPLICAS), solver(steps)
    result = tuned(method, curves(CONSTANT["rate"], CONSTANT["momentum"], steps), data, key, outer)
    draws = COST * outer
    families = {"cosine": cosine} if options.smoke else FAMILIES
    found = {name: searched(family, draws, keys, data, steps, options.seed) for name, family in families.items()}

    def compared(length: int, change: Callable[[Hparams], Hparams] = lambda h: h, **kind: Any) -> dict[str, float]:
        shapes = {name: family(*found[name], length) for name, family in families.items()}
        shapes["untuned"] = curves(CONSTANT["rate"], CONSTANT["momentum"], length)
        shapes["learned"] = for_length(result.hparams, length)
        losses = after(stacked([change(h) for h in shapes.values()]), tests, data.train, data.test, **kind)
        return dict(zip(shapes, np.mean(losses, axis=1).tolist(), strict=True))

    numbers["equal"] = compared(steps)
    numbers["wider"] = compared(steps, lambda h: for_width(h, WIDER), width=WIDER * WIDTH)
    if not options.smoke:
        numbers["longer"] = compared(LONGER * steps)
        numbers["wider_unaware"] = compared(steps, width=WIDER * WIDTH, aware=False)
    numbers["online"] = float(jnp.mean(jax.vmap(loss, in_axes=(0, None))(result.params, data.test)))
    numbers["layers"] = result.hparams["layer"]
    numbers["skipped"] = int(np.sum(~result.history.usable))
    numbers["searched"] = {name: dict(zip(("peak", "momentum", "shape"), u, strict=True)) for name, u in found.items()}
    names = list(FREE)[:1] if options.smoke else list(FREE)
    numbers["free"] = {name: without_rate(name, tests, data, steps) for name in names}
    if not options.smoke:
        numbers["free"]["schedule_free"] = schedule_free(draws, keys, tests, data, steps)
    rivals = {name: value for name, value in numbers["equal"].items() if name != "learned"} | numbers["free"]
    numbers["best_rival"] = min(rivals.values())
    numbers["gain"] = numbers["best_rival"] - numbers["equal"]["learned"]
    numbers["edge"] = edge(method, data, key, steps)
    last = float(numbers["edge"]["last_usable_rate"])
    if not options.smoke:
        kinds = {
            "rough": curves(last, 0.9, steps),
            "soft_ends": cosine(last, 0.9, 1.0, steps),
            "smooth": cosine(last / 4, 0.9, 1.0, steps),
        }
        numbers["at_the_edge"] = survived(method, last, data, key, tests, outer // 2)
        numbers["beyond"] = survived(method, float(EDGE[-1]), data, key, tests, outer // 2)
        numbers["metasmoothness"] = metasmoothness(method, kinds, data, key)
    factor = np.prod([np.asarray(result.hparams["layer"][name]) for name in LAYERS]) ** (1 / len(LAYERS))
    learned = {"rate": factor * result.hparams["rate"], "momentum": result.hparams["momentum"]}
    numbers["learned"] = {name: learned[name][:: max(steps // 40, 1)] for name in learned}


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 8.4)
    (rates, momenta), (ends, edges) = canvas.subplots(2, 2)
    colors = {"cosine": style.PINK, "one_cycle": style.GREEN, "power": style.YELLOW, "constant": style.SKY}
    for axes, name in ((rates, "rate"), (momenta, "momentum")):
        for family, color in colors.items():
            best = [run["searched"][family] for run in results.values()]
            shapes = [FAMILIES[family](*(found[k] for k in ("peak", "momentum", "shape")), STEPS) for found in best]
            mean = np.mean([shape[name] for shape in shapes], 0)
            axes.plot(np.arange(STEPS), mean, color=color, label=family.replace("_", "-"))
        learned = style.each(results, f"learned.{name}")
        style.curves(axes, np.linspace(0, STEPS, len(learned[0]), endpoint=False), learned, style.BLUE, "learned")
        axes.axhline(CONSTANT[name], color=style.INK, lw=0.9, linestyle=style.DASHED, label="start of tuning")
    rates.set(yscale="log", ylim=(3e-3, 5))
    style.titled(rates, "Learning rate", xlabel="training step", ylabel="rate (mean of layers)")
    style.titled(momenta, "Momentum", xlabel="training step", ylabel="momentum")
    names = {f"equal.{name}": style.PINK for name in ("constant", "cosine", "one_cycle", "power")}
    names |= {f"free.{name}": style.ORANGE for name in ("schedule_free", "cocob", "prodigy", "dadapt_adamw")}
    names["equal.learned"] = style.BLUE
    rows = {path.split(".")[1].replace("_", "-"): (style.each(results, path), color) for path, color in names.items()}
    rows = dict(sorted(rows.items(), key=lambda row: np.mean(row[1][0])))
    style.over_seeds(ends, rows, "At equal steps, new starts and batches", xlabel="test loss, nats")
    for run in results.values():
        usable, growth = (np.asarray(run["edge"][name]) for name in ("usable", "growth"))
        for which, color, text in ((usable, style.BLUE, "usable"), (~usable, style.ORANGE, "exploded, and said so")):
            edges.loglog(EDGE[which], growth[which].astype(float), "o", color=color, label=text, alpha=0.6)
    style.titled(edges, "The edge of stability, from inside", xlabel="constant rate", ylabel="growth of the adjoint")
    handles, labels = edges.get_legend_handles_labels()
    edges.legend(handles[:2], labels[:2], frameon=False, fontsize=11)
    style.legend(canvas, rates, columns=6)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

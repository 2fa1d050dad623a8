"""Three hyperparameters replace the weights of a network for sparse recovery (HyperLISTA), and are found by gradient.

    python experiments/sparse_recovery/run.py --seed 0 --json

Two of the three move the result smoothly. The third only decides which entries a comparison lets through, so that its
derivative is exactly zero; a solver made here for the purpose puts a wide central difference in its place.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment, progress

LAYERS = 16
NAMES = ("threshold", "momentum", "support")
LOW, HIGH = np.array([1e-3, 1e-3, 0.1]), np.array([1e-2, 1e-2, 1.0])  # the box of the paper's grid
WIDE = 3.0  # the box of random search is larger by this factor, upwards in the first two
TARGET = -60.0  # dB
RATE = 0.2  # of Adam, in the logarithm
WIDTH = 0.1  # of the central difference, in the logarithm


class Dictionary(NamedTuple):
    """y = x @ a.T is seen as x @ atoms.T, whose columns have length 1 and are less alike.

    Attributes:
        a: [m, n]. transform: [m, m], atoms = transform @ a. atoms: [m, n]. inverse: pseudo-inverse of atoms, [n, m].
    """

    a: Any
    transform: Any
    atoms: Any
    inverse: Any


def dictionary(key: Any, m: int, n: int) -> Dictionary:
    """Gaussian columns of length 1, and the transform that makes their Gram matrix as close to I as it gets."""
    a = np.asarray(jax.random.normal(key, (m, n)))
    a = a / np.linalg.norm(a, axis=0)
    values, vectors = np.linalg.eigh(a @ a.T)
    transform = np.asarray(_decorrelate(jnp.asarray(np.sqrt(n / m) * (vectors / np.sqrt(values)) @ vectors.T), a))
    return Dictionary(*map(jnp.asarray, (a, transform, transform @ a, np.linalg.pinv(transform @ a))))


@jax.jit
def _decorrelate(transform: Any, a: Any) -> Any:
    n, optimizer = a.shape[1], optax.adam(2e-3, b2=0.99)

    def coherence(transform: Any) -> Any:
        gram = (transform @ a).T @ (transform @ a)
        return jnp.sum((gram - jnp.eye(n)) ** 2) + n * jnp.sum((jnp.diag(gram) - 1) ** 2)

    def step(carry: Any, _: None) -> Any:
        transform, state = carry
        updates, state = optimizer.update(jax.grad(coherence)(transform), state)
        return (optax.apply_updates(transform, updates), state), None

    return jax.lax.scan(step, (transform, optimizer.init(transform)), None, length=100)[0][0]


def draw(key: Any, d: Dictionary, count: int, *, density: float = 0.1, scale: float = 1.0, snr: float | None = None):
    """`(y, x)`: sparse vectors x [count, n] and what is seen of them, [count, m] after the transform."""
    where, what, error = jax.random.split(key, 3)
    shape = (count, d.a.shape[1])
    x = scale * jax.random.bernoulli(where, density, shape) * jax.random.normal(what, shape)
    y = x @ d.a.T
    if snr is not None:
        noise = jax.random.normal(error, y.shape)
        y = y + noise * jnp.linalg.norm(y) / jnp.linalg.norm(noise) * 10 ** (-snr / 20)
    return y @ d.transform.T, x


def layer(params: dict[str, Any], hparams: dict[str, Any], batch: Any) -> dict[str, Any]:
    """One layer: a gradient step with momentum, then a threshold from which the largest entries are spared."""
    d, y = batch
    x, past = params["x"], params["past"]
    gap = x @ d.atoms.T - y
    error = jnp.sum(jnp.abs(gap @ d.inverse.T), axis=1, keepdims=True)
    at_first = jnp.sum(jnp.abs(y @ d.inverse.T), axis=1, keepdims=True)
    threshold = hparams["threshold"] * error
    momentum = hparams["momentum"] * jnp.sum(x != 0, axis=1, keepdims=True)
    share = jnp.clip(hparams["support"] * jnp.log(at_first / error), 0, 1)
    z = x - gap @ d.atoms + momentum * (x - past)
    size = jnp.abs(z)
    rank = jnp.floor((1 - share) * (x.shape[1] - 1)).astype(jnp.int32)
    spared = (size > jnp.take_along_axis(jnp.sort(jax.lax.stop_gradient(size), axis=1), rank, axis=1)) & (share > 0)
    shrunk = jnp.sign(z) * jnp.maximum(size - threshold, 0)
    return {"x": jnp.where(spared & (size > threshold), z, shrunk), "past": x}


def decibels(x: Any, true: Any) -> Any:
    """Normalised mean squared error; -60 is a relative error of a thousandth."""
    return 10 * jnp.log10(jnp.sum((x - true) ** 2) / jnp.sum(true**2))


def with_difference(solver: hg.Solver, name: str) -> hg.Solver:
    """`solver`, with ∂/∂hparams[name] from a central difference over a factor of exp(±WIDTH)."""

    def hypergrad(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        out, after = solver.hypergrad(state, hparams, train, valid, key=key)
        up, down = (
            curve(hparams | {name: hparams[name] * np.exp(side * WIDTH)}, *train, valid)[-1] for side in (1, -1)
        )
        return out._replace(grad=out.grad | {name: (up - down) / (2 * WIDTH * hparams[name])}), after

    return hg.Solver(solver.init, hypergrad, solver.response)


def zeros(count: int, d: Dictionary) -> dict[str, Any]:
    return {"x": jnp.zeros((count, d.a.shape[1])), "past": jnp.zeros((count, d.a.shape[1]))}


@jax.jit
def curve(hparams: dict[str, Any], d: Dictionary, y: Any, true: Any) -> Any:
    """Error after each layer, [LAYERS]."""

    def step(params: Any, _: None) -> Any:
        params = layer(params, hparams, (d, y))
        return params, decibels(params["x"], true)

    return jax.lax.scan(step, zeros(len(y), d), None, length=LAYERS)[1]


@jax.jit
def fista(strength: Any, rate: Any, d: Dictionary, y: Any, true: Any) -> Any:
    """The same number of steps of the accelerated proximal gradient method on ½‖y − Ãx‖² + strength ‖x‖₁."""

    def step(carry: Any, _: None) -> Any:
        x, point, t = carry
        z = point - rate * (point @ d.atoms.T - y) @ d.atoms
        new = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * strength, 0)
        after = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return (new, new + (t - 1) / after * (new - x), after), decibels(new, true)

    start = jnp.zeros((len(y), d.a.shape[1]))
    return jax.lax.scan(step, (start, start, 1.0), None, length=LAYERS)[1]


def tune(solver: hg.Solver, start: np.ndarray, d: Dictionary, train: Any, steps: int) -> hg.Result:
    return hg.tune(
        solver,
        zeros(len(train[0]), d),
        named(start),
        (d, train[0]),
        train[1],
        outer=optax.adam(optax.cosine_decay_schedule(RATE, steps)),
        steps=steps,
        domain=hg.domains.log(),
    )


def named(c: Any) -> dict[str, Any]:
    return {name: jnp.float32(value) for name, value in zip(NAMES, c, strict=True)}


def measure(options: Any, numbers: dict[str, Any]) -> None:
    m, n, count, steps, sides = (40, 80, 16, 4, (2, 2, 2)) if options.smoke else (250, 500, 64, 60, (6, 6, 7))
    tests = count if options.smoke else 4 * count
    keys = jax.random.split(jax.random.key(options.seed), 9)
    d = dictionary(keys[0], m, n)
    train, test = draw(keys[1], d, count), draw(keys[2], d, tests)
    score = lambda hparams, data, d=d: float(curve(hparams, d, *data)[-1])

    rate, strengths = 1 / np.linalg.norm(d.atoms, 2) ** 2, np.geomspace(1e-3, 1, 13)
    best = strengths[np.argmin([fista(s, rate, d, *train)[-1] for s in strengths])]
    numbers["fista"] = fista(best, rate, d, *test)[-1]
    numbers["untuned"] = score(named(LOW), test)

    problem = hg.Problem(None, lambda params, hparams, true: decibels(params["x"], true))
    alone = hg.unrolled(problem, inner=hg.inner.fixed_point(layer, steps=LAYERS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*'support'.* is used only through")  # what this is about
        result = tune(with_difference(alone, "support"), LOW, d, train, steps)
        tuned = result.best.hparams
        numbers["tuned"], numbers["tuned_train"] = score(tuned, test), result.best.value
        numbers["hyperparameters"] = tuned
        seconds, reached = result.history.seconds, np.flatnonzero(result.history.value <= TARGET)
        numbers["seconds_tuned"], numbers["seconds_to_60"] = seconds[-1], seconds[reached[0]] if len(reached) else None
        numbers["gradient_alone"] = score(tune(alone, LOW, d, train, steps).best.hparams, test)
        numbers["other_start"] = score(
            tune(with_difference(alone, "support"), HIGH, d, train, steps).best.hparams, test
        )

    def search(points: np.ndarray, seconds: float, text: str) -> tuple[dict[str, Any], float, int]:
        """The best of the points that can be tried in some seconds, the seconds, and their number."""
        began, tried = time.perf_counter(), []
        for c in progress(points, text):
            tried.append(score(named(c), train))
            if time.perf_counter() - began > seconds:
                break
        return named(points[np.argmin(tried)]), time.perf_counter() - began, len(tried)

    score(named(LOW), train)  # compiled before a clock starts
    axes = [np.geomspace(low, high, side) for low, high, side in zip(LOW, HIGH, sides, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    grid, numbers["seconds_grid"], _ = search(points, np.inf, "grid")
    rng, top = np.random.default_rng(options.seed), np.log(HIGH * [WIDE, WIDE, 1])
    points = np.exp(rng.uniform(np.log(LOW), top, (8 if options.smoke else 2000, 3)))
    random, _, numbers["random_draws"] = search(points, numbers["seconds_tuned"], "random search")
    numbers["grid"], numbers["random"] = score(grid, test), score(random, test)
    first = numbers["seconds_to_60"]
    numbers["time_ratio"] = None if first is None else numbers["seconds_grid"] / first

    changed = {
        "density_15": {"density": 0.15},
        "scale_2": {"scale": 2.0},
        "snr_40": {"snr": 40.0},
        "snr_20": {"snr": 20.0},
    }
    for key, (name, change) in zip(keys[3:], changed.items(), strict=False):
        data = draw(key, d, tests, **change)
        numbers[name] = {"tuned": score(tuned, data), "grid": score(grid, data), "random": score(random, data)}
    other = dictionary(keys[7], m, n)
    data = draw(keys[8], other, tests)
    numbers["new_dictionary"] = {
        name: score(c, data, other) for name, c in (("tuned", tuned), ("grid", grid), ("random", random))
    }


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 5.6)
    left, right = canvas.subplots(1, 2, width_ratios=(1, 1.25))
    arms = {
        "where tuning starts": ("untuned", style.INK),
        "FISTA, best strength": ("fista", style.INK),
        "tuned from the other corner": ("other_start", style.SKY),
        "best of a grid of 252": ("grid", style.ORANGE),
        "tuned by gradient": ("tuned", style.BLUE),
        "… a step for two of the three": ("gradient_alone", style.SKY),
        "random search, equal time": ("random", style.PINK),
    }
    rows = {text: (style.each(results, path), color) for text, (path, color) in arms.items()}
    style.over_seeds(left, rows, "Sixteen layers, three numbers", digits=0, xlabel="error on new signals, dB")
    changes = {
        "scale_2": "twice as large",
        "new_dictionary": "new dictionary",
        "density_15": "15 % nonzero",
        "snr_40": "40 dB of noise",
        "snr_20": "20 dB of noise",
    }
    rows = {}
    for place, text in changes.items():
        for arm, color in (("random", style.PINK), ("tuned", style.BLUE)):
            rows[f"{text}: {arm}"] = style.each(results, f"{place}.{arm}"), color
    style.over_seeds(right, rows, "Carried over to other signals", digits=0, xlabel="error, dB (lower is better)")
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

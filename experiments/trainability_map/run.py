"""Where does training converge? The boundary in the plane of two learning rates, and what hypergradients say near it.

    python experiments/trainability_map/run.py --seed 0 --json

A network of two layers with a learning rate each is trained on digits once for every pixel, thousands at once by vmap;
then again around a piece of the boundary, and again. Arrows are hypergradients of the loss at the end of training.
"""

from __future__ import annotations

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
from experiments._data import digits
from experiments._figures import INK, YELLOW, figure, image, save

WIDTH = 4  # inputs (principal components) and hidden units
ROWS = WIDTH * WIDTH + WIDTH  # as many as there are parameters
CAP = 1e6  # a loss above this times the first counts as this
TAIL = 20  # steps whose mean loss decides
BOX = (-1.0, 3.0)  # log10 of both learning rates
ZOOM = 12  # from one picture to the next
LANES = 2048  # trainings at once
NUDGE = 0.02  # length, in log10 of the rates, of the steps by which hypergradients are tried
STARTS = 16  # other starts, with other digits, on which rates are tried
SHADES = 8  # of blue, and of red
SHADING = ((True, (0.85, 0.92, 0.98), (0.03, 0.25, 0.5)), (False, (0.99, 0.9, 0.85), (0.6, 0.06, 0.08)))
# … of a pixel that converges or not: the colour of the slowest, that of the fastest


class Map(NamedTuple):
    """One picture; arrays are [side, side], rows by the first learning rate. Losses are over the loss at the start."""

    low: np.ndarray  # log10 of the rates in its lower corner
    size: float
    loss: np.ndarray  # mean of the last steps
    speed: np.ndarray  # of convergence or divergence, whichever it is

    @property
    def converged(self) -> np.ndarray:
        return self.loss < 1


def load(seed: int) -> tuple[Any, Any]:
    """Where training starts; principal components of digits, and whether the digit is even or odd as ±1."""
    (x, y), _ = digits(seed, (ROWS,))
    _, _, vectors = np.linalg.svd(x, full_matrices=False)
    x = x @ vectors[:WIDTH].T
    first, second = jax.random.split(jax.random.key(seed))
    params = {"first": jax.random.normal(first, (WIDTH, WIDTH)), "second": jax.random.normal(second, (WIDTH,))}
    return params, (jnp.asarray(x / x.std(0), float), jnp.asarray(np.where(y % 2, 1.0, -1.0)))


def loss(params: dict[str, Any], hparams: Any, batch: Any) -> Any:
    x, y = batch
    hidden = jnp.tanh(np.sqrt(2 / WIDTH) * x @ params["first"])
    return jnp.mean((hidden @ params["second"] / WIDTH - y) ** 2)


def train(log_rates: Any, params: Any, batch: Any, steps: int) -> tuple[Any, Any]:
    """Gradient descent at log10 rates [2]: mean loss of the last steps, and how fast it got there."""
    at_start = loss(params, None, batch)
    rates = dict(zip(("first", "second"), 10**log_rates, strict=True))

    def step(params: Any, _: None) -> Any:
        value, slope = jax.value_and_grad(loss)(params, None, batch)
        ratio = jnp.nan_to_num(jnp.minimum(value / at_start, CAP), nan=CAP)
        return jax.tree.map(lambda p, g, r: p - r * g, params, slope, rates), ratio

    _, ratios = jax.lax.scan(step, params, None, length=steps)
    end = jnp.mean(ratios[-TAIL:])
    return end, jnp.where(end < 1, -jnp.sum(ratios), -jnp.sum(1 / ratios))


@functools.partial(jax.jit, static_argnames="steps")
def train_all(log_rates: Any, params: Any, batch: Any, *, steps: int) -> tuple[Any, Any]:
    """One training for each row of `log_rates` [n, 2]."""
    return jax.vmap(lambda rates: train(rates, params, batch, steps))(log_rates)


def draw_map(run: Any, low: np.ndarray, size: float, side: int, text: str) -> Map:
    points = pixels(low, size, side)
    lanes = min(LANES, len(points))
    parts = [run(points[i : i + lanes]) for i in progress(range(0, len(points), lanes), text)]
    loss, speed = (np.concatenate(part).reshape(side, side) for part in zip(*parts, strict=True))
    return Map(low, size, loss, speed)


def pixels(low: Any, size: float, side: int) -> np.ndarray:
    """Centres, [side², 2]."""
    ticks = (np.arange(side) + 0.5) / side * size
    return np.stack(np.meshgrid(low[0] + ticks, low[1] + ticks, indexing="ij"), -1).reshape(-1, 2)


def boundary(converged: np.ndarray) -> np.ndarray:
    """Pixels with a neighbour, above or to the right, of the other kind."""
    edge = np.zeros_like(converged)
    edge[:-1] |= converged[:-1] != converged[1:]
    edge[:, :-1] |= converged[:, :-1] != converged[:, 1:]
    return edge


def dimension(converged: np.ndarray) -> float:
    """Box-counting slope of the boundary by least squares, over boxes of 2 pixels to an eighth of a side."""
    edge, side = boundary(converged), len(converged)
    sizes = 2 ** np.arange(1, int(np.log2(side / 8)) + 1)
    counts = [edge.reshape(side // s, s, side // s, s).any((1, 3)).sum() for s in sizes]
    return float(-np.polyfit(np.log2(sizes), np.log2(np.maximum(counts, 1)), 1)[0])


def next_corner(shown: Map) -> np.ndarray:
    """The next picture's corner: of the squares most evenly divided, the one with the median length of boundary."""
    side, edge = len(shown.loss), boundary(shown.converged)
    width = side // ZOOM
    even = np.abs(window_sums(shown.converged, width) / width**2 - 0.5)
    length = window_sums(edge, width)
    corners = np.argwhere((even <= max(0.05, even.min())) & (length > 0))
    order = np.argsort(length[tuple(corners.T)], kind="stable")
    return shown.low + corners[order[len(order) // 2]] / side * shown.size


def window_sums(mask: np.ndarray, width: int) -> np.ndarray:
    total = np.pad(mask.astype(int), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return total[width:, width:] - total[:-width, width:] - total[width:, :-width] + total[:-width, :-width]


def make_solver(steps: int) -> hg.Solver:
    """Of the loss at the end, in log10 of the two learning rates."""
    layers = {"first": "first", "second": "second"}
    optimizer = lambda h: optax.partition({"first": optax.sgd(10 ** h[0]), "second": optax.sgd(10 ** h[1])}, layers)
    return hg.unrolled(hg.Problem(loss, loss), inner=hg.inner.gradient(optimizer, steps=steps))


@functools.partial(jax.jit, static_argnames="steps")
def hypergradients(points: Any, params: Any, batch: Any, *, steps: int) -> dict[str, Any]:
    """At every point [n, 2]; and whether a short step against each lowers the loss."""
    solver = make_solver(steps)

    def one(log_rates: Any) -> dict[str, Any]:
        call = lambda rates: solver.hypergrad(solver.init(params, rates), rates, batch, batch)[0]
        out = call(log_rates)
        down = -out.grad / jnp.linalg.norm(out.grad)
        lower = call(log_rates + NUDGE * down).value < out.value
        return {"loss": out.value, "down": down, "status": out.info.status, "lower": lower}

    return jax.vmap(one)(points)


def measure(options: Any, numbers: dict[str, Any]) -> None:
    side, steps, levels, coarse, outer = (64, 24, 2, 4, 2) if options.smoke else (256, 200, 4, 20, 60)
    jax.config.update("jax_enable_x64", True)  # trainings on the boundary amplify rounding
    params, batch = load(options.seed)
    run = functools.partial(train_all, params=params, batch=batch, steps=steps)
    low, size = np.full(2, BOX[0]), BOX[1] - BOX[0]
    jax.block_until_ready(run(np.zeros((LANES, 2))))  # compiled before the clock starts
    began, maps = time.perf_counter(), []
    for level in range(levels):
        maps.append(draw_map(run, low, size, side, f"map {level + 1} of {levels}"))
        low, size = next_corner(maps[-1]), size / ZOOM
    numbers["trainings"] = levels * side**2
    numbers["trainings_per_second"] = numbers["trainings"] / (time.perf_counter() - began)
    numbers |= fractal(maps, np.random.default_rng(options.seed))

    field = {"at": pixels(maps[0].low, maps[0].size, coarse)}
    field |= jax.tree.map(np.asarray, hypergradients(field["at"], params, batch, steps=steps))
    converged = field["loss"] < loss(params, None, batch)
    usable = field["status"] <= hg.Status.INSENSITIVE
    exploded = converged & (field["status"] == hg.Status.UNROLL_EXPLODED)
    numbers["usable"] = {"where_converged": usable[converged].mean(), "elsewhere": usable[~converged].mean()}
    numbers["exploded_where_converged"] = exploded.sum() / converged.sum()
    numbers["descends"] = {
        "usable": field["lower"][usable & converged].mean(),
        "exploded": field["lower"][exploded].mean() if exploded.any() else None,
    }

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, outer))
    result = hg.tune(make_solver(steps), params, jnp.zeros(2), batch, batch, outer=optimizer, steps=outer)
    points = np.random.default_rng(options.seed).uniform(*BOX, (2 * outer, 2))  # a hypergradient costs two trainings
    grid = pixels(maps[0].low, maps[0].size, side)
    tried = {
        "plain": np.zeros(2),
        "tuned": np.asarray(result.best.hparams),
        "random": points[np.argmin(run(np.resize(points, (LANES, 2)))[0][: len(points)])],
        "best_pixel": grid[np.argmin(maps[0].loss)],
    }
    others = jax.tree.map(lambda *a: jnp.stack(a), *(load(1000 * (options.seed + 1) + i) for i in range(STARTS)))
    rates = jnp.asarray(np.stack(list(tried.values())))
    again = jax.jit(jax.vmap(lambda r, other: train(r, other[0], other[1], steps)[0], (0, None)))  # [4] of one start
    fresh = np.asarray(jax.vmap(again, (None, 0))(rates, others))
    here = np.asarray(again(rates, (params, batch)))
    numbers["loss"] = dict(zip(tried, here, strict=True))
    numbers["fresh"] = dict(zip(tried, np.median(fresh, 0), strict=True))
    numbers["fresh_diverged"] = dict(zip(tried, np.mean(~(fresh < 1), 0), strict=True))
    numbers["log10_rates"] = tried["tuned"]
    numbers["skipped"] = int(np.sum(~result.history.usable))
    picture(maps, field["at"][usable], field["down"][usable], result.history.hparams, options.out)


def fractal(maps: list[Map], rng: np.random.Generator) -> dict[str, Any]:
    """Box-counting slopes, and what they are held against: fewer pixels, pixels in random order, and a circle."""
    kinds = [shown.converged for shown in maps]
    side = len(kinds[0])
    slopes = np.array([dimension(kind) for kind in kinds])
    label = lambda values: {f"map_{i + 1}": value for i, value in enumerate(values)}
    shuffled = [rng.permuted(kind.ravel()).reshape(kind.shape) for kind in kinds]
    return {
        "converged": kinds[0].mean(),
        "slopes": label(slopes),
        "slopes_of_every_second_pixel": label([dimension(kind[::2, ::2]) for kind in kinds]),
        "slopes_of_shuffled_pixels": label([dimension(kind) for kind in shuffled]),
        "slope_of_a_circle": dimension(np.hypot(*(np.indices((side, side)) / side - 0.5)) < 0.4),
        "dimension": slopes.mean(),
        "standard_error": slopes.std(ddof=1) / np.sqrt(len(slopes)),
    }


def picture(maps: list[Map], at: np.ndarray, down: np.ndarray, path: np.ndarray, folder: Path) -> None:
    canvas = figure(12, 4.4)
    places = canvas.subplots(1, len(maps))
    for i, (axes, shown) in enumerate(zip(np.atleast_1d(places), maps, strict=True)):
        corner = shown.low
        extent = (corner[1], corner[1] + shown.size, corner[0], corner[0] + shown.size)
        image(axes, colours(shown), origin="lower", extent=extent)
        title = f"× {ZOOM**i:,}" if i else "Blue trainings converge"
        axes.set_title(title, loc="left", color=INK, pad=7, fontsize=11.5, fontweight="bold")
        if i + 1 < len(maps):
            axes.add_patch(_frame(maps[i + 1]))
        if i == 0:
            axes.set(xticks=[0, 2], yticks=[0, 2], xlabel="log10 rate of the second layer")
            axes.set_ylabel("log10 rate of the first layer")
            axes.quiver(
                at[:, 1],
                at[:, 0],
                down[:, 1],
                down[:, 0],
                color="white",
                edgecolor=INK,
                linewidth=0.3,
                scale=24,
                width=0.008,
            )
            axes.plot(path[:, 1], path[:, 0], color=YELLOW, linewidth=2.5, zorder=3)
            axes.plot(path[0, 1], path[0, 0], "o", color=YELLOW, markersize=6, zorder=3)
    _colour_bar(canvas, places)
    save(canvas, folder, "course.png", colours=40)


def _colour_bar(canvas: Any, places: Any) -> None:
    """What the colours say, from the slowest to the fastest that converge, and that diverge."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    (_, light_blue, blue), (_, light_red, red) = SHADING
    ends = red, light_red, light_blue, blue
    stops = list(zip((0, 0.4999, 0.5001, 1), ends, strict=True))
    shown = ScalarMappable(Normalize(-1, 1), LinearSegmentedColormap.from_list("rank", stops, 2 * SHADES))
    bar = canvas.colorbar(shown, ax=list(np.atleast_1d(places)), location="bottom", aspect=60, pad=0.04, shrink=0.8)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["at once", "diverges", "slowly", "converges", "at once"])
    bar.ax.tick_params(labelsize=11, length=0)
    bar.set_label("how fast, by rank within each map", fontsize=11.5)
    bar.outline.set_visible(False)


def _frame(inner: Map) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(tuple(inner.low[::-1]), inner.size, inner.size, fill=False, edgecolor=YELLOW, linewidth=1.5)


def colours(shown: Map) -> np.ndarray:
    """Blue where training converges, red where not, darker the faster it does so: by rank, as in the paper."""
    picture = np.empty((*shown.loss.shape, 3))
    for converges, slow, fast in SHADING:
        inside = shown.converged == converges
        rank = shown.speed[inside].argsort().argsort() * SHADES // max(inside.sum(), 1) / (SHADES - 1)
        picture[inside] = np.array(slow) + rank[:, None] * (np.array(fast) - np.array(slow))
    return picture


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Fresh starts and digits",
            "median loss over first loss",
            {
                "both rates 1": ("fresh.plain", style.INK),
                "tuned by 60 hypergradients": ("fresh.tuned", style.BLUE),
                "best of 120 random pairs": ("fresh.random", style.ORANGE),
                "best of 65,536 pixels": ("fresh.best_pixel", style.GREEN),
            },
        ),
        (
            "Roughness of the boundary",
            "box-counting slope (a circle: 0.95)",
            {
                "whole map": ("slopes.map_1", style.BLUE),
                "× 12": ("slopes.map_2", style.BLUE),
                "× 144": ("slopes.map_3", style.BLUE),
                "× 1,728": ("slopes.map_4", style.BLUE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

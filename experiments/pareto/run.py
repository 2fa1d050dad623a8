"""Two groups, one linear model: the front of compromises between their losses, by hypergradients and by NSGA-II.

Handwritten digits are read upright by one group and upside down by the other, and a softmax regression has to serve
both. Its hyperparameters are an L2 penalty and the weight of the training examples, either of each group (2 numbers) or
of each class in each group (21). `hg.objectives.pareto` tunes the two ends of a front; Optuna's multi-objective default
searches the same ranges with as many trainings.

    python experiments/pareto/run.py --seed 0 --json
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
from experiments._data import digits  # noqa: E402

TRAIN, VALID = 300, 600  # rows of both groups together; the rest are the test
GUESS = float(np.log(10))  # the loss of a uniform guess: the reference point of the hypervolume, in both directions
PARTS, STEPS, POINTS = 8, 20, 20  # of the grid of weights, of the outer loop, and read off the front in the end
BUDGET = (PARTS + 1) * STEPS + POINTS  # trainings of either search
SIZES = (20,)  # numbers of weights; 1 is that of the second group, over the first
MORE = 3  # times as many trainings, for Optuna once more
POPULATION = 50  # of Optuna's sampler, its default
RATE = 0.3  # of Adam, on the numbers that a sigmoid maps onto the ranges
RANGES = {"l2": (-9.0, -1.0), "weight": (-4.0, 4.0)}  # of logs, for both


def groups(seed: int) -> tuple[Any, Any, Any]:
    """Train, validation and test rows `(x [n, 16], y [n], group [n])`; the second group reads upside down."""
    parts = []
    for x, y in digits(seed, (TRAIN, VALID), centred=False):
        group = np.arange(len(y)) % 2
        x = np.where(group[:, None] == 1, x[:, ::-1], x)
        x = 4 * (x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) - 0.3)  # about zero, and of about one
        parts.append((jnp.asarray(x), jnp.asarray(y), jnp.asarray(group, jnp.int32)))
    return tuple(parts)


def logits(w: Any, x: Any) -> Any:
    return x @ w["w"] + w["b"][None]


def errors(w: Any, data: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, data[0]), data[1])


def inner_loss(w: Any, h: Any, data: Any) -> Any:
    _, y, group = data
    weight = jnp.exp(h["weight"])  # [1] or [20], of the second group over the first, or of each class in each group
    weight = jnp.where(group == 1, weight[0], 1.0) if weight.size == 1 else weight[10 * group + y]
    share = weight / jnp.sum(weight)  # only the ratios of the weights matter
    return jnp.sum(share * errors(w, data)) + 0.5 * jnp.exp(h["l2"]) * sum(jnp.sum(leaf**2) for leaf in w.values())


def of_group(g: int) -> Any:
    def loss(w: Any, h: Any, data: Any) -> Any:
        chosen = data[2] == g
        return jnp.sum(jnp.where(chosen, errors(w, data), 0)) / jnp.sum(chosen)

    return loss


LOSSES = {"upright": of_group(0), "upside down": of_group(1)}
INNER = hg.inner.newton(tol=1e-4)
WEIGHTS = {"w": jnp.zeros((16, 10)), "b": jnp.zeros(10)}


def start(size: int) -> Any:
    return {"l2": jnp.asarray(-5.0), "weight": jnp.zeros(size)}


@jax.jit
def trained(settings: Any, train: Any, valid: Any, test: Any) -> tuple[Any, Any]:
    """`(validation losses [k, 2], test losses [k, 2])` of settings `[k, ...]`, each trained from zero."""
    solver: Any = hg.implicit(hg.Problem(inner_loss, hg.objectives.several(LOSSES, jnp.full(2, 0.5))), inner=INNER)

    def one(h: Any) -> Any:
        _, _, state = solver.evaluate(solver.init(WEIGHTS, h), h, train, valid)
        w = solver.response(state, h)
        return tuple(jnp.stack([loss(w, h, data) for loss in LOSSES.values()]) for data in (valid, test))

    return jax.vmap(one)(settings)


def by_hypergradient(size: int, train: Any, valid: Any, score: Any, smoke: bool) -> Any:
    """Losses of the points read off a tuned front."""
    solver = hg.tasks(hg.implicit(hg.objectives.pareto(inner_loss, LOSSES), inner=INNER), count=PARTS + 1)
    grid = hg.objectives.simplex_grid(2, parts=PARTS)
    ends = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start(size))
    result = hg.tune(
        solver, WEIGHTS, ends, hg.objectives.with_weights(train, grid), hg.objectives.with_weights(valid, grid),
        outer=optax.adam(optax.cosine_decay_schedule(RATE, STEPS)), steps=2 if smoke else STEPS, progress=False,
        domain={name: hg.domains.interval(*ends) for name, ends in RANGES.items()},
    )  # fmt: skip
    alphas = jnp.linspace(0, 1, POINTS)
    return score(jax.vmap(lambda a: hg.objectives.between(result.hparams, jnp.stack([1 - a, a])))(alphas))


def by_nsga2(size: int, score: Any, seed: int, trials: int) -> Any:
    """Losses of every trial of Optuna's multi-objective default, which is told those of validation."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.NSGAIISampler(seed=seed))
    found, names = [], [f"weight{i}" for i in range(size)]
    study.enqueue_trial({"l2": float(start(size)["l2"]), **dict.fromkeys(names, 0.0)})  # where the other begins
    for _ in range(0, trials, POPULATION):  # a generation is trained at once
        asked = [study.ask() for _ in range(POPULATION)]
        settings = {
            "l2": [trial.suggest_float("l2", *RANGES["l2"]) for trial in asked],
            "weight": [[trial.suggest_float(name, *RANGES["weight"]) for name in names] for trial in asked],
        }
        losses = score({name: jnp.asarray(values, jnp.float32) for name, values in settings.items()})
        for trial, values in zip(asked, np.asarray(losses[0], float), strict=True):
            study.tell(trial, values.tolist())
        found.append(losses)
    return tuple(np.concatenate(part)[:trials] for part in zip(*found, strict=True))


def front(losses: Any) -> Any:
    """Which points no other is better than in both losses, by the first loss."""
    losses = np.asarray(losses)
    order = np.lexsort(losses.T[::-1])
    lowest = np.minimum.accumulate(losses[order, 1])
    return order[np.r_[True, losses[order, 1][1:] < lowest[:-1]]]


def hypervolume(losses: Any) -> float:
    """The share of the square below a guess's losses that the points dominate."""
    points = np.asarray(losses, float)[front(losses)]
    points = points[np.all(points < GUESS, axis=1)]
    right = np.r_[points[1:, 0], GUESS]
    return float(np.sum((right - points[:, 0]) * (GUESS - points[:, 1])) / GUESS**2)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    train, valid, test = groups(options.seed)
    score, fronts = lambda settings: trained(settings, train, valid, test), {}
    for size in progress(SIZES, "weights"):
        trials = by_nsga2(size, score, options.seed, POPULATION if options.smoke else MORE * BUDGET)
        arms = {
            "": by_hypergradient(size, train, valid, score, options.smoke),
            "_optuna": tuple(losses[:BUDGET] for losses in trials),
            "_optuna_more": trials,
        }
        found: dict[str, Any] = {}
        for name, (on_valid, on_test) in arms.items():
            kept = front(on_valid)  # what a person sees who has no test
            found[f"validation{name}"] = hypervolume(on_valid)
            found[f"hypervolume{name}"] = hypervolume(np.asarray(on_test)[kept])
            fronts[size, name] = np.asarray(on_valid), np.asarray(on_test)[kept]
        found["gain"] = found["hypervolume"] - found["hypervolume_optuna"]
        found["gain_more"] = found["hypervolume"] - found["hypervolume_optuna_more"]
        numbers[f"weights_{size}"] = found
    numbers["trainings"] = BUDGET
    if not options.smoke:
        draw(options.out, fronts)


def draw(folder: Path, fronts: dict[Any, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(6.5 * len(SIZES), 5.2)
    for chart, size in zip(figure.subplots(1, len(SIZES), squeeze=False)[0], SIZES, strict=True):
        for name, color, label in (
            ("_optuna_more", style.YELLOW, f"NSGA-II, {MORE * BUDGET:,} trainings"),
            ("_optuna", style.ORANGE, f"NSGA-II, {BUDGET} trainings"),
            ("", style.BLUE, f"hg.objectives.pareto, {BUDGET} trainings"),
        ):
            valid, test = fronts[size, name]
            chart.plot(*valid[front(valid)].T, "o-", color=color, markersize=4, label=label)
            chart.plot(*test.T, "x", color=color, markersize=5)
        chart.set(xlim=(0.3, GUESS), ylim=(0.3, GUESS))
        chart.legend(frameon=False, title="dots: validation, crosses: test", alignment="left")
        title = "one weight for a group" if size == 1 else "a weight for each class and group"
        style.titled(
            chart, f"{1 + size} hyperparameters: {title}",
            xlabel="loss of the group that reads upright", ylabel="loss of the group that reads upside down",
        )  # fmt: skip
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Validation",
            "hypervolume, share of a guess",
            {
                "NSGA-II": ("weights_20.validation_optuna", style.ORANGE),
                "NSGA-II, three times as many": ("weights_20.validation_optuna_more", style.YELLOW),
                "hg.objectives.pareto": ("weights_20.validation", style.BLUE),
            },
        ),
        (
            "Test",
            "hypervolume, share of a guess",
            {
                "NSGA-II": ("weights_20.hypervolume_optuna", style.ORANGE),
                "NSGA-II, three times as many": ("weights_20.hypervolume_optuna_more", style.YELLOW),
                "hg.objectives.pareto": ("weights_20.hypervolume", style.BLUE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

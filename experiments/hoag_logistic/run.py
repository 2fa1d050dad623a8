"""One penalty of a logistic regression, tuned while the accuracy of both solves follows four schedules.

From λ₀ = −5, 0 and 5, with a first step of the right size and with one fifty times too long. Beside it grid search,
random search and Optuna's default sampler, in the same unit: evaluations of the training gradient, products with the
Hessian included.

    python experiments/hoag_logistic/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments import _figures as style  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import shipped  # noqa: E402
from experiments._lanes import side_by_side  # noqa: E402

SCHEDULES = ("exact", "quadratic", "cubic", "exponential")
STARTS = (-5.0, 0.0, 5.0)
LONG = 50.0  # how many times too long a first step is
LOW, HIGH = -6.0, 6.0  # where grid and searches look
NEAR = 1e-3  # a loss within this share of the best counts as reached


ROWS, COLUMNS = 300, 31  # both data sets are padded to these, and share what is compiled


class Data(NamedTuple):
    """Rows for training and for validation: features with a column of ones, labels ±1, weights 1 or, of padding, 0."""

    train: tuple[Any, Any, Any]
    valid: tuple[Any, Any, Any]


def losses(w: Any, rows: Any) -> Any:
    x, y, weight = rows
    return weight * jnp.logaddexp(0, -y * (x @ w))


PROBLEM = hg.Problem(
    lambda w, log_l2, rows: jnp.sum(losses(w, rows)) + 0.5 * jnp.exp(log_l2) * jnp.sum(w[1:] ** 2),
    lambda w, log_l2, rows: jnp.sum(losses(w, rows)) / jnp.sum(rows[2]),
)
# Without polishing, whose products with the Hessian are not among the steps that are reported.
SOLVER = hg.implicit(PROBLEM, inner=hg.inner.lbfgs(), linear=hg.linear.cg(), polish=0)


def data(name: str, seed: int) -> Data:
    """Half the rows each; of randhie's 20,190 rows 600, with which the penalty still matters."""
    rng = np.random.default_rng(seed)
    if name == "breast_cancer":
        from sklearn.datasets import load_breast_cancer

        bunch: Any = load_breast_cancer()
        x, y = bunch.data, bunch.target
    else:
        table = shipped("statsmodels.datasets").randhie.load_pandas().data.to_numpy(float)
        table = table[rng.permutation(len(table))[: 2 * ROWS]]
        x, y = table[:, 1:], table[:, 0] > 0  # any visit to a doctor
    order = rng.permutation(len(y))
    x, y = x[order], np.where(y[order], 1.0, -1.0)
    half = len(y) // 2
    x = (x - x[:half].mean(0)) / np.maximum(x[:half].std(0), 1e-9)
    x = np.concatenate([np.ones((len(x), 1)), x], 1)

    def padded(part: slice) -> Any:
        n, k = x[part].shape
        wide = np.pad(x[part], ((0, ROWS - n), (0, COLUMNS - k)))
        return tuple(map(jnp.asarray, (wide, np.pad(y[part], (0, ROWS - n)), np.pad(np.ones(n), (0, ROWS - n)))))

    return Data(padded(slice(half)), padded(slice(half, None)))


class Curve(NamedTuple):
    """The validation loss over λ, exact, and what a solve from zero costs there."""

    at: np.ndarray
    loss: np.ndarray
    calls: np.ndarray

    @property
    def best(self) -> float:
        return float(self.at[self.loss.argmin()])

    def reached(self, log_l2: Any) -> np.ndarray:
        inside = (np.asarray(log_l2) >= LOW) & (np.asarray(log_l2) <= HIGH)
        return inside & (np.interp(log_l2, self.at, self.loss) <= (1 + NEAR) * self.loss.min())


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _solved(log_l2: Any, rows: Data) -> Any:
    state = hg.outer.set_options(SOLVER.init(jnp.zeros(COLUMNS), log_l2), {"inner.tol": 1e-8})
    value, info, _ = SOLVER.evaluate(state, log_l2, *rows)
    return value, info.inner_steps


def curve(rows: Data, points: int) -> Curve:
    grid = np.linspace(LOW, HIGH, points)
    return Curve(grid, *map(np.asarray, _solved(jnp.asarray(grid), rows)))


def begun(schedule: str, factor: float) -> hg.outer.Controller:
    """HOAG in [−6, 6], as its authors run it, with a first step that is so many times longer than the usual one."""
    base = hg.outer.hoag(schedule=schedule)

    def update(grad: Any, state: Any, free: Any, out: Any) -> Any:
        following, after, ok = base.update(grad, state, free, out)
        stretch = jnp.where((state.count == 0) & ok, factor, 1.0)
        after = after._replace(inverse_step=after.inverse_step / stretch)
        return jnp.clip(jnp.where(stretch > 1, free + stretch * (following - free), following), LOW, HIGH), after, ok

    return base._replace(update=update)


class Found(NamedTuple):
    """What a run needed, where it ended, and where it was."""

    calls: float
    end: float
    path: np.ndarray


def descend(rows: Data, exact: Curve, schedules: tuple[str, ...], steps: int) -> dict[tuple[str, float], list[Found]]:
    """A run from each start; calls until the exact loss at an accepted λ is within .1 % of the best."""
    cases = [(schedule, factor) for schedule in schedules for factor in (1.0, LONG)]
    lanes = [controller for case in cases for controller in [begun(*case)] * len(STARTS)]
    outer, starts = side_by_side(lanes, STARTS * len(cases))
    found = hg.multistart(
        SOLVER, jnp.zeros(COLUMNS), jnp.asarray(starts), *rows, outer=outer, steps=steps, steps_per_call=steps
    )
    runs: dict[tuple[str, float], list[Found]] = {case: [] for case in cases}
    for i, result in enumerate(found.results):
        history = result.history
        spent = np.cumsum(history.inner_steps + np.nan_to_num(history.linear_steps))
        reached = np.flatnonzero(history.accepted & exact.reached(history.hparams))
        calls = float(spent[reached[0]]) if len(reached) else np.nan
        stands = history.hparams[history.accepted]  # none, where not even the first solve was usable
        end = float(stands[-1] if len(stands) else starts[i])
        runs[cases[i // len(STARTS)]].append(Found(calls, end, history.hparams))
    return runs


def revert_is_exact(rows: Data) -> bool:
    """Whether the run stands, after a refused step, where it stood before, in every bit."""
    outer = hg.outer.hoag(step_size=1e4)
    run = lambda steps: hg.tune(SOLVER, jnp.zeros(COLUMNS), 0.0, *rows, outer=outer, steps=steps, progress=False)
    before, after = run(1), run(2)
    kept = [(before.params, after.params), (before.hparams, after.hparams)]
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in kept)
    return bool(before.history.accepted[0] and not after.history.accepted[1] and same)


def searches(exact: Curve, seed: int, repeats: int) -> dict[str, float]:
    """Calls until the best loss so far is within .1 % of the best there is, each evaluation solved from zero.

    Random search and Optuna's are means over repeats of at most 100 draws.
    """
    cost = lambda log_l2: np.interp(log_l2, exact.at, exact.calls)
    rng = np.random.default_rng(seed)

    def until(draws: np.ndarray) -> float:
        reached = np.flatnonzero(exact.reached(draws))
        return float(np.sum(cost(draws[: (reached[0] if len(reached) else len(draws) - 1) + 1])))

    grid = np.linspace(LOW, HIGH, 25)
    found = {
        "calls_grid": float(np.sum(cost(grid))),  # the best of a grid is known when all of it is
        "calls_random": float(np.mean([until(rng.uniform(LOW, HIGH, 100)) for _ in range(10 * repeats)])),
    }
    try:
        import optuna
    except ImportError:
        return found | {"calls_tpe": float("nan")}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    counts = []
    for repeat in range(repeats):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1000 * seed + repeat))
        draws: list[float] = []
        while len(draws) < 100 and not np.any(exact.reached(np.asarray(draws or [np.inf]))):
            trial = study.ask()
            draws.append(trial.suggest_float("log_l2", LOW, HIGH))
            study.tell(trial, float(np.interp(draws[-1], exact.at, exact.loss)))
        counts.append(until(np.asarray(draws)))
    return found | {"calls_tpe": float(np.mean(counts))}


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    steps, points, repeats = (12, 25, 2) if options.smoke else (150, 1201, 20)
    names = ("breast_cancer",) if options.smoke else ("breast_cancer", "randhie")
    schedules = ("exact", "exponential") if options.smoke else SCHEDULES
    for name in progress(names, "data"):
        rows = data(name, options.seed)
        exact = curve(rows, points)
        runs = descend(rows, exact, schedules, steps)
        calls = {case: np.asarray([run.calls for run in group]) for case, group in runs.items()}
        both = {schedule: np.concatenate([calls[schedule, 1.0], calls[schedule, LONG]]) for schedule in schedules}
        ends = {case: np.asarray([run.end for run in group]) for case, group in runs.items()}
        here: dict[str, Any] = {"best": exact.best}
        for schedule in schedules:
            here[f"calls_{schedule}"] = float(np.median(np.nan_to_num(both[schedule], nan=np.inf)))
        ratios = calls["exponential", LONG] / calls["exponential", 1.0]
        here |= {
            "halves": int(np.sum(both["exponential"] <= 0.5 * both["exact"])),
            "half_ratios": [*(both["exponential"] / both["exact"])],
            "off": float(max(np.max(np.abs(end - exact.best)) for end in ends.values())),
            "off_exponential": float(max(np.max(np.abs(ends["exponential", f] - exact.best)) for f in (1.0, LONG))),
            "long_ratio": float(np.max(ratios)),
            "long_ratios_met": int(np.sum(ratios <= 2)),
            "calls_good": float(np.median(calls["exponential", 1.0])),
            "calls_long": float(np.median(calls["exponential", LONG])),
        }
        here |= searches(exact, options.seed, repeats)
        if name == "breast_cancer":
            here["revert_exact"] = int(revert_is_exact(rows))
        numbers[name] = here


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(12.5, 4.2)
    names = [*SCHEDULES, "grid", "random", "tpe"]
    texts = {name: f"tolerances: {name}" for name in SCHEDULES}
    texts |= {"exact": "exact solves", "grid": "grid", "random": "random search", "tpe": "Optuna's TPE"}
    for axes, data_name in zip(canvas.subplots(1, 2), ("breast_cancer", "randhie"), strict=True):
        found = {name: style.each(results, f"{data_name}.calls_{name}") for name in names}
        color = lambda name: style.BLUE if name in SCHEDULES else style.ORANGE
        rows = {texts[name]: (values, color(name)) for name, values in found.items()}
        label = "gradients and products with the Hessian"
        style.over_seeds(axes, rows, f"{data_name}: evaluations to .1 %", digits=0, xlabel=label)
        axes.set_xlim(left=0)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

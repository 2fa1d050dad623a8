"""Black-box search beside hypergradients at equal cost: 1, 3, 10, 30 and 100 hyperparameters.

    python experiments/black_box/run.py --seed 0 --json

Random search (of all values, or of one that all share), Optuna's default sampler (TPE), its Gaussian process (which
needs torch), Hyperband on the inner steps, and hypergradients by Adam and L-BFGS, each on the same function: the
validation loss of a model trained from one start. The cost is counted in gradients of the training loss, in units of a
run at random hyperparameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare clone works as well as an installation

import hypergrad as hg
from experiments import _figures as style
from experiments._common import experiment, measured_before
from experiments._data import digits
from experiments._figures import BLUE, DASHED, GREEN, INK, ORANGE, PINK, SKY, YELLOW, figure, titled

COSTS = (1, 2, 4, 8, 16, 32)  # at which the curves are kept, in runs
PRODUCT = 2  # a product with the Hessian costs as much as so many gradients
GRADIENTS, PRODUCTS = 3, 4  # of an implicit hypergradient and its error estimate, besides the two solves
FIRST = 24  # products more at the first call, and at every 32nd
BLOCK = 8  # of runs in a compiled program
WORST = 10.0  # the loss of a run that diverged
NEAR = 1e-3  # a loss within this share of another is as good
RATE = 0.3  # of Adam, on all tasks
SHARED = "shared"  # by random search: one value for hyperparameters of a kind, as most people would begin
SEARCHES = ("random", "tpe", "gp", "hyperband")
OURS = {"adam": lambda: optax.adam(RATE), "lbfgs": hg.outer.lbfgs}
NAMES = {
    "random": ("random search", INK),
    SHARED: ("random search, shared values", GREEN),
    "tpe": ("TPE (Optuna's default)", ORANGE),
    "gp": ("Gaussian process (Optuna)", PINK),
    "hyperband": ("Hyperband with TPE (Optuna)", YELLOW),
    "adam": ("hypergradients, Adam", BLUE),
    "lbfgs": ("hypergradients, L-BFGS", SKY),
}


class Task(NamedTuple):
    """A problem whose hyperparameters lie in [-1, 1]; zero, where everybody starts, is the centre."""

    solver: hg.Solver
    loss: Callable[[Any, Any], Any]  # of parameters on rows
    start: Any  # parameters
    count: int  # of hyperparameters
    data: tuple[Any, Any, Any]  # training, validation, test
    steps: int = 0  # of a run, where it does not end at a tolerance
    trained: Callable[[Any, Any, Any, Any], Any] | None = None  # such a run's parameters after fewer steps
    kinds: int = 1  # of hyperparameters: the first of count / kinds, and so on


class Looked(NamedTuple):
    """What was evaluated one after the other: the cost of each, and the losses of the model that it left."""

    cost: list[float]
    valid: list[float]
    test: list[float]


def log_between(low: float, high: float, u: Any) -> Any:
    """From `low` to `high`, evenly in the logarithm, as u goes from -1 to 1."""
    return jnp.exp((np.log(low) + np.log(high)) / 2 + (np.log(high) - np.log(low)) / 2 * u)


def squares(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ w[1:] + w[0] - y) ** 2) / 2


def logs(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean(jnp.logaddexp(0, -y * (x @ w[1:] + w[0])))


def penalised(loss: Callable[..., Any], groups: np.ndarray, data: Any) -> Task:
    """A linear model with one penalty for each group of its features, from 1e-3 to 10."""
    problem = hg.Problem(
        lambda w, u, rows: loss(w, *rows) + 0.5 * jnp.sum(log_between(1e-3, 10.0, u)[groups] * w[1:] ** 2),
        lambda w, u, rows: loss(w, *rows),
    )
    # Without polishing, whose products with the Hessian are not among the steps that are reported.
    solver = hg.implicit(problem, inner=hg.inner.lbfgs(tol=1e-4), linear=hg.linear.cg(tol=1e-3), polish=0)
    return Task(solver, lambda w, rows: loss(w, *rows), jnp.zeros(1 + len(groups)), int(groups.max()) + 1, data)


def parts(x: Any, y: Any, order: Any, sizes: tuple[int, int]) -> Any:
    """Training, validation and test rows, standardized by the first."""
    x, y = x[order], y[order]
    a, b = sizes[0], sum(sizes)
    x = (x - x[:a].mean(0)) / np.maximum(x[:a].std(0), 1e-9)
    return tuple((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in (slice(a), slice(a, b), slice(b, None)))


def ridge(seed: int) -> Task:
    """Diabetes, with squares and products of the features: one penalty."""
    from sklearn.datasets import load_diabetes
    from sklearn.preprocessing import PolynomialFeatures

    bunch: Any = load_diabetes(scaled=True)
    x = PolynomialFeatures(2, include_bias=False).fit_transform(bunch.data * 20)
    y = (bunch.target - bunch.target.mean()) / bunch.target.std()
    order = np.random.default_rng(seed).permutation(len(y))
    return penalised(squares, np.zeros(x.shape[1], int), parts(x, y, order, (150, 146)))


def logistic(seed: int) -> Task:
    """Odd and even digits: a penalty each for the pixels of the border, of the ring inside it, and of the middle."""
    train, valid, test = digits(seed, [150, 500])
    at = np.arange(8)
    edge = np.minimum(np.minimum(at, 7 - at)[:, None], np.minimum(at, 7 - at))
    some = lambda part: (jnp.asarray(part[0] * 3, float), jnp.asarray(2.0 * (part[1] % 2) - 1))
    return penalised(logs, np.minimum(edge, 2).ravel(), (some(train), some(valid), some(test)))


def network(seed: int) -> Task:
    """Digits, five layers: a weight decay and a learning rate for each."""
    sizes = (64, 32, 24, 24, 24, 10)
    train, valid, test = digits(seed, [300, 500])
    keys = jax.random.split(jax.random.key(seed), 5)
    start = [
        {"w": jax.random.normal(key, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def loss(w: Any, rows: Any) -> Any:
        x = rows[0]
        for layer in w[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w[-1]["w"] + w[-1]["b"], rows[1]))

    def inner(w: Any, u: Any, rows: Any) -> Any:
        decay = log_between(1e-5, 1e-1, u[:5])
        return loss(w, rows) + 0.5 * sum(d * jnp.sum(layer["w"] ** 2) for d, layer in zip(decay, w, strict=True))

    def optimizer(u: Any) -> optax.GradientTransformation:
        rates = log_between(3e-3, 1.0, u[5:])
        step = lambda updates, _: [
            jax.tree.map(lambda x, r=r: -r * x, layer) for r, layer in zip(rates, updates, strict=True)
        ]
        return optax.chain(optax.trace(0.9), optax.stateless(step))

    steps = 90
    solver = hg.unrolled(
        hg.Problem(inner, lambda w, u, rows: loss(w, rows)),
        inner=hg.inner.gradient(optimizer, steps=steps),
        mode="reverse",
    )

    def trained(start: Any, u: Any, rows: Any, most: Any) -> Any:
        rule = optimizer(u)

        def step(_: Any, carry: Any) -> Any:
            w, state = carry
            updates, state = rule.update(jax.grad(inner)(w, u, rows), state, w)
            return optax.apply_updates(w, updates), state

        return jax.lax.fori_loop(0, most, step, (start, rule.init(start)))[0]

    data = tuple((jnp.asarray(x, float), jnp.asarray(y)) for x, y in (train, valid, test))
    return Task(solver, loss, start, 10, data, steps, trained, kinds=2)


def splines(seed: int) -> Task:
    """Friedman's function, an additive model: a penalty for the bumps of each of 30 features, of which five matter."""
    rng = np.random.default_rng(seed)
    x = rng.random((2500, 30))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + rng.normal(size=len(y)) - 14.4) / 5
    bumps = np.exp(-0.5 * ((x[:, :, None] - np.linspace(0, 1, 5)) / 0.2) ** 2).reshape(len(x), -1)
    return penalised(squares, np.repeat(np.arange(30), 5), parts(bumps, y, np.arange(len(x)), (200, 300)))


def features(seed: int) -> Task:
    """Logistic regression on 100 features of which twelve matter: a penalty for each."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2500, 100))
    w = np.where(np.arange(100) < 12, rng.choice([-1.0, 1.0], 100), 0.0)
    y = np.where(rng.random(len(x)) < 1 / (1 + np.exp(-x @ w)), 1.0, -1.0)
    return penalised(logs, np.arange(100), parts(x, y, np.arange(len(x)), (200, 300)))


TASKS: dict[str, Callable[[int], Task]] = {
    "ridge": ridge,
    "logistic": logistic,
    "network": network,
    "splines": splines,
    "features": features,
}
TITLES = {
    "ridge": "1: ridge, diabetes",
    "logistic": "3: logistic, digits",
    "network": "10: network, digits",
    "splines": "30: splines, Friedman",
    "features": "100: logistic, synthetic",
}


class Runner(NamedTuple):
    """Runs of a task from its start, compiled once; counted by whoever asks for them."""

    task: Task
    train: Callable[..., Any]

    def __call__(self, u: Any, most: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients, validation and test loss of runs at u `[n, k]` of at most so many gradients `[n]`."""
        most = np.full(len(u), self.whole) if most is None else most
        blocks = []
        for at in range(0, len(u), BLOCK):  # in blocks of one size, for one compiled program
            some, few = np.asarray(u[at : at + BLOCK], float), np.asarray(most[at : at + BLOCK])
            idle = BLOCK - len(some)
            padded = np.pad(some, ((0, idle), (0, 0))), np.pad(few, (0, idle), constant_values=1)
            found = self.train(self.task.start, self.task.data, *padded)
            blocks.append([np.asarray(x)[: len(some)] for x in found])
        steps, valid, test = map(np.concatenate, zip(*blocks, strict=True))
        bad = ~np.isfinite(valid) | ~np.isfinite(test)
        return steps, np.where(bad, WORST, valid), np.where(bad, WORST, test)

    @property
    def whole(self) -> int:
        return self.task.steps or 500


def runner(task: Task) -> Runner:
    """What the models of every method are made and judged by. The hyperparameters are values: one program for all."""

    def one(start: Any, data: Any, u: Any, most: Any) -> Any:
        train, valid, test = data
        if task.trained:
            steps, w = most, task.trained(start, u, train, most)
        else:
            state = hg.outer.set_options(task.solver.init(start, u), {"inner.max_steps": most})
            _, info, state = task.solver.evaluate(state, u, train, valid)
            steps, w = info.inner_steps, task.solver.response(state, u)
        return steps, task.loss(w, valid), task.loss(w, test)

    several = lambda start, data, u, most: jax.lax.map(lambda at: one(start, data, *at), (u, most))
    return Runner(task, jax.jit(several))


def search(kind: str, run: Runner, unit: float, budget: float, seed: int) -> Looked:
    """Random search, or a search of Optuna, whose first trial is the centre; until the budget is spent."""
    found = Looked([], [], [])
    k = run.task.count
    if kind in ("random", SHARED):
        alike = k // run.task.kinds if kind == SHARED else 1
        draws = np.random.default_rng([seed, 1]).uniform(-1, 1, (int(budget * 2), k // alike)).repeat(alike, 1)
        draws[0] = 0
        steps, valid, test = run(draws)
        last = np.searchsorted(np.cumsum(steps) / unit, budget) + 1
        return Looked([*(steps[:last] / unit)], [*valid[:last]], [*test[:last]])
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(seed=seed) if kind == "gp" else optuna.samplers.TPESampler(seed=seed)
    halving = kind == "hyperband"
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3) if halving else None
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.enqueue_trial({f"u{i}": 0.0 for i in range(k)})
    resources = np.asarray([1, 3, 9]) if halving else np.asarray([9])
    most = np.where(resources == 9, run.whole, np.maximum(np.round(unit * resources / 9), 1)).astype(int)
    spent = 0.0
    while spent < budget:
        trial = study.ask()
        u = np.asarray([trial.suggest_float(f"u{i}", -1, 1) for i in range(k)])
        steps, valid, test = run(np.tile(u, (len(most), 1)), most)
        before = pruned = 0
        for resource, now, *losses in zip(resources, steps, valid, test, strict=True):
            counts = losses if resource == 9 else (np.inf, np.inf)  # only whole runs: half of one is another model
            for kept, value in zip(found, ((now - before) / unit, *counts), strict=True):
                kept.append(float(value))
            spent, before = spent + (now - before) / unit, now
            if halving:
                trial.report(float(losses[0]), int(resource))
                if pruned := trial.should_prune():
                    break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, float(losses[0]))
    return found


class Counted(NamedTuple):
    """The state of a solver, what its last evaluation cost, and the number of its hypergradients."""

    own: Any
    pending: Any
    calls: Any


def counted(task: Task) -> hg.Solver:
    """The task's solver, reporting gradients of the training loss as `info.extra["cost"]`.

    A controller evaluates a trial first and differentiates it only if it is good: both are counted.
    """

    def solves(info: Any) -> Any:
        return jnp.asarray(task.steps or info.inner_steps + PRODUCT * info.linear_steps, float)

    def besides(calls: Any) -> Any:
        if task.steps:  # each step is pulled back; where the error is measured a call takes four and two times as long
            times = jnp.where(calls == 0, 4, jnp.where(calls % 16 == 0, 2, 1))
            return task.steps * ((1 + PRODUCT) * times - 1)
        return GRADIENTS + PRODUCT * (PRODUCTS + FIRST * (calls % 32 == 0))

    def noted(info: Any, cost: Any) -> Any:
        return info._replace(extra={**info.extra, "cost": jnp.asarray(cost, float)})

    def init(params: Any, hparams: Any, *, key: Any = None, model_state: Any = None) -> Counted:
        return Counted(task.solver.init(params, hparams), jnp.zeros(()), jnp.int32(0))

    def hypergrad(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        out, own = task.solver.hypergrad(state.own, hparams, train, valid)
        cost = state.pending + solves(out.info) + besides(state.calls)
        return out._replace(info=noted(out.info, cost)), Counted(own, jnp.zeros(()), state.calls + 1)

    def evaluate(state: Any, hparams: Any, train: Any = None, valid: Any = None, *, key: Any = None) -> Any:
        value, info, own = task.solver.evaluate(state.own, hparams, train, valid)
        cost = solves(info)
        return value, noted(info, cost), Counted(own, cost, state.calls)

    return hg.Solver(init, hypergrad, lambda s, h: task.solver.response(s.own, h), evaluate, task.solver.about)


def descent(kind: str, run: Runner, unit: float, budget: float) -> Looked:
    """Hypergradients from the centre, with all that they cost; what they found is judged by runs of its own."""
    task, (train, valid, _) = run.task, run.task.data
    steps = int(budget / 3) + 1 if task.steps else int(3 * budget)
    result = hg.tune(
        counted(task),
        task.start,
        jnp.zeros(task.count),
        train,
        valid,
        outer=OURS[kind](),
        steps=steps,
        steps_per_call=min(10, steps),
        domain=hg.domains.interval(-1, 1),
        progress=False,
    )
    _, *losses = run(result.history.hparams)
    return Looked([*map(float, result.history.extra["cost"] / unit)], *([*map(float, x)] for x in losses))


def curve(looked: Looked, costs: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """The lowest validation loss that so much bought, and the test loss of that model."""
    spent = np.cumsum(looked.cost)
    found: dict[str, dict[str, float]] = {"valid": {}, "test": {}}
    for cost in costs:
        several = max(int(np.sum(spent <= cost + 1e-6)), 1)  # the centre is known from the beginning
        best = int(np.argmin(looked.valid[:several]))
        found["valid"][str(cost)], found["test"][str(cost)] = looked.valid[best], looked.test[best]
    return found


def reached(looked: Looked, level: float) -> float:
    """What it cost to be as good as that; NaN for what never was."""
    good = np.flatnonzero(np.asarray(looked.valid) <= level)
    return float(np.cumsum(looked.cost)[good[0]]) if len(good) else np.nan


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    costs = COSTS[:3] if options.smoke else COSTS
    needs = {"optuna": ("tpe", "gp", "hyperband"), "torch": ("gp",)}
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    lacking = {kind for name in missing for kind in needs[name]}
    if missing:
        print(f"not installed: {', '.join(missing)}; skipped: {', '.join(sorted(lacking))}", flush=True)
    if options.methods:
        numbers |= measured_before(__file__, options)
    chosen = options.methods or [kind for kind in NAMES if not (options.smoke and kind == "lbfgs")]  # slow to compile
    methods = [kind for kind in chosen if kind not in lacking]
    for name in ("ridge",) if options.smoke else TASKS:
        task = TASKS[name](options.seed)
        run = runner(task)
        unit = float(np.mean(run(np.random.default_rng(options.seed).uniform(-1, 1, (32, task.count)))[0]))
        found = numbers.setdefault(name, {}) | {"unit": unit}
        for kind in methods:
            ours = kind in OURS
            looked = descent(kind, run, unit, costs[-1]) if ours else search(kind, run, unit, costs[-1], options.seed)
            found[kind] = curve(looked, costs)
            if ours:
                level = min(found[k]["valid"][str(costs[-1])] for k in SEARCHES if k in found)
                found[kind]["cost_of_best_search"] = reached(looked, (1 + NEAR) * level)
        numbers[name] = found
        shown = {kind: f"{found[kind]['valid'][str(costs[-1])]:.4f}" for kind in NAMES if kind in found}
        print(f"{name}, {task.count} hyperparameters: {shown}", flush=True)


def arguments(parser: argparse.ArgumentParser) -> None:
    def methods(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in NAMES]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(NAMES)}")
        return [name for name in NAMES if name in wanted]

    parser.add_argument(
        "--methods", type=methods, metavar="A,B", help=f"of {', '.join(NAMES)}; the others stay as kept"
    )


def drawing(results: dict[str, Any]) -> Any:
    """Means over seeds, with one standard error beside what a seed shares."""
    runs = [*results.values()]
    names = [name for name in TASKS if all(name in run for run in runs)]
    fig = figure(2.9 * len(names), 6.6)
    axes = fig.subplots(2, len(names), squeeze=False, sharex=True)
    for column, name in zip(axes.T, names, strict=True):
        for ax, loss in zip(column, ("valid", "test"), strict=True):
            every = {kind: [run[name][kind][loss] for run in runs if kind in run[name]] for kind in NAMES}
            shown = {
                kind: np.asarray([[*run.values()] for run in several]) for kind, several in every.items() if several
            }
            costs = [int(cost) for cost in next(found for found in every.values() if found)[0]]
            common = np.mean(
                [x[:, -1] for x in shown.values() if len(x) == len(runs)], axis=0
            )  # what makes a seed hard
            for kind, values in shown.items():
                label, colour = NAMES[kind]
                apart = values - common[: len(values), None]
                error = apart.std(0, ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0 * apart[0]
                line = "-" if kind in OURS else DASHED
                ax.errorbar(costs, values.mean(0), error, color=colour, linestyle=line, label=label, lw=1.6, capsize=2)
            ax.set_xscale("log", base=2)
            ax.set_xticks(costs, [str(cost) for cost in costs])
            ax.minorticks_off()
        titled(column[0], TITLES[name], ylabel="validation loss" if name == names[0] else "")
        titled(column[1], "", xlabel="cost, runs", ylabel="test loss" if name == names[0] else "")
    style.legend(fig, axes[0, 0])
    return fig


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, draw=drawing)

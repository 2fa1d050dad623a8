"""One penalty, one for each group of features, one for each feature: what five folds choose, and what test rows say.

    F(λ) = (1/5) Σᵢ loss of fold i at wᵢ*(λ),     wᵢ*(λ) = argmin loss of the other folds + penalty(w, λ)

Ridge, elastic net and logistic regression by `hg.tasks` over `hg.folds`, ten outer splits a seed, beside the *CV
estimators of scikit-learn and himalaya's ridge with a strength for each group.

    python experiments/cross_validation/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, measured_before, progress  # noqa: E402
from experiments._data import stratified  # noqa: E402

FOLDS = 5
FLOOR = 0.01  # of the squares in an elastic net, without which correlated features take a thousand steps
LOGISTIC_FLOOR = 0.001  # the same in units of the log-loss, whose curvature is a quarter at most
PER = ("all", "group", "feature")


class Data(NamedTuple):
    """Features, targets (numbers, or classes as zeros and ones), the group of each feature, and rows to train on."""

    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    rows: int


def diabetes() -> Data:
    """The body, its fat and pressure, and six measurements of its serum."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    return Data(x, (y - y.mean()) / y.std(), np.asarray([0, 0, 1, 1, 2, 2, 2, 2, 2, 2]), 200)


def squares() -> Data:
    """The same with all squares and products of its features: groups of 10, 9 (sex squared is sex) and 45."""
    base = diabetes()
    z = (base.x - base.x.mean(0)) / base.x.std(0)
    rows, columns = np.triu_indices(z.shape[1])
    kept = (rows != columns) | (rows != 1)
    products = (z[:, rows] * z[:, columns])[:, kept]
    groups = np.concatenate([np.zeros(10, int), np.where(rows == columns, 1, 2)[kept]])
    return base._replace(x=np.concatenate([z, products], 1), groups=groups)


def breast_cancer() -> Data:
    """Ten measurements of cell nuclei: their means, their standard errors and their worst values."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return Data(x, np.eye(2)[y], np.repeat([0, 1, 2], 10), 150)


def wine() -> Data:
    """Alcohol and minerals, phenols, and colour with proline."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return Data(x, np.eye(3)[y], np.asarray([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]), 80)


class Split(NamedTuple):
    """Standardised rows of one outer split: folds of the training rows, all of them, and the test rows."""

    train: Any
    valid: Any
    whole: Any
    test: Any


def outer_splits(data: Data, seed: int, count: int) -> Split:
    """Every leaf with a leading axis of outer splits."""
    found = []
    labels = np.argmax(data.y, 1) if data.y.ndim > 1 else None
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        if labels is None:
            order = rng.permutation(len(data.y))
            train, test = order[: data.rows], order[data.rows :]
        else:
            train, test = stratified(labels, [data.rows], int(rng.integers(2**31)))
        x = (data.x - data.x[train].mean(0)) / np.maximum(data.x[train].std(0), 1e-9)
        key = jax.random.key(int(rng.integers(2**31)))
        folds = hg.folds((x[train], data.y[train]), FOLDS, key=key, stratify=None if labels is None else labels[train])
        rest = folds[1]._replace(arrays=(jnp.asarray(x[test]), jnp.asarray(data.y[test])), weight=jnp.ones(len(test)))
        found.append(Split(*folds, folds[0]._replace(weight=jnp.ones(data.rows)), rest))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def padded(tree: Any, rows: int, features: int) -> Any:
    """Folds with rows of weight zero and features that are zero, so that problems share what is compiled."""
    (x, y), weight = tree
    more = rows - x.shape[-2]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, features - x.shape[-1])])
    wide = [(0, 0)] * (x.ndim - 2) + [(0, more)]
    y = jnp.pad(y, wide + ([(0, 3 - y.shape[-1])] if y.ndim == x.ndim else []))
    return tree._replace(arrays=(x, y), weight=jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, more)]))


def mean(errors: Any, weight: Any) -> Any:
    return jnp.sum(weight * errors) / jnp.sum(weight)


def squared(w: Any, batch: Any) -> Any:
    (x, y), weight = batch
    return mean((x @ w["coef"] + w["intercept"] - y) ** 2, weight)


def cross_entropy(w: Any, batch: Any) -> Any:
    """A class that no row has is none; the intercept of the first is zero."""
    (x, y), weight = batch
    logits = x @ w["coef"] + jnp.pad(w["intercept"], (1, 0))
    logits = jnp.where(jnp.any(y > 0, 0), logits, -1e9)
    return mean(-jnp.sum(y * jax.nn.log_softmax(logits), 1), weight)


def smooth(loss: Callable[[Any, Any], Any]) -> Callable[[Any], hg.Solver]:
    """A loss plus Σ λ_j w_j², whose strengths belong to the sum over rows, as those of a prior do, not to the mean."""

    def make(assign: Any) -> hg.Solver:
        def inner(w: Any, h: Any, batch: Any) -> Any:
            each = jnp.sum(w["coef"].reshape(len(assign), -1) ** 2, 1)
            return loss(w, batch) + jnp.sum(jnp.exp(h["l2"][assign]) * each) / jnp.sum(batch[1])

        problem = hg.Problem(inner, lambda w, h, batch: loss(w, batch))
        return hg.implicit(problem, inner=hg.inner.newton(), polish=0)

    return make


def elastic(loss: Callable[[Any, Any], Any], share: float, floor: float) -> Callable[[Any], hg.Solver]:
    """`share` of a loss + Σ λ₁_j |w_j| + ½ Σ (λ₂_j + floor) w_j², of strengths of the mean, as in scikit-learn."""

    def make(assign: Any) -> hg.Solver:
        def prox(w: Any, h: Any, step: Any) -> Any:
            shape = (-1,) + (1,) * (w["coef"].ndim - 1)  # the same strength for all classes
            l1, l2 = (jnp.exp(h[name][assign]).reshape(shape) for name in ("l1", "l2"))
            return w | {"coef": hg.prox.elastic_net(w["coef"], step * l1, step * (l2 + floor))}

        problem = hg.Problem(lambda w, h, batch: share * loss(w, batch), lambda w, h, batch: loss(w, batch))
        return hg.implicit(problem, inner=hg.inner.proximal(prox, tol=1e-8), linear=hg.linear.dense(), polish=0)

    return make


class Model(NamedTuple):
    """Its solver for features that have these strengths, its parameters at the start, and its kinds of strengths."""

    solver: Callable[[Any], hg.Solver]
    begin: Callable[[int], Any]
    strengths: dict[str, float]


plain = lambda features: {"coef": jnp.zeros(features), "intercept": jnp.zeros(())}
classes = lambda features: {"coef": jnp.zeros((features, 3)), "intercept": jnp.zeros(2)}
RIDGE = Model(smooth(squared), plain, {"l2": np.log(20.0)})
LOGISTIC = Model(smooth(cross_entropy), classes, {"l2": 0.0})
ELASTIC = Model(elastic(squared, 0.5, FLOOR), plain, {"l1": np.log(0.03), "l2": np.log(0.03)})
SPARSE = Model(elastic(cross_entropy, 1.0, LOGISTIC_FLOOR), classes, {"l1": np.log(0.01), "l2": np.log(0.01)})
PROBLEMS: dict[str, tuple[Callable[[], Data], Model]] = {
    "ridge_diabetes": (diabetes, RIDGE),
    "ridge_squares": (squares, RIDGE),
    "elastic_diabetes": (diabetes, ELASTIC),
    "elastic_squares": (squares, ELASTIC),
    "elastic_cancer": (breast_cancer, SPARSE),
    "elastic_wine": (wine, SPARSE),
    "logistic_cancer": (breast_cancer, LOGISTIC),
    "logistic_wine": (wine, LOGISTIC),
}


class Found(NamedTuple):
    """Along a search: the loss over the folds, and the test loss of a fit of all rows; where all was usable."""

    folds: Any
    test: Any
    usable: Any


def search(model: Model, steps: int) -> Callable[[Split, Any], Found]:
    """`(split, assign) -> Found`, by Adam on the mean over the folds."""

    def run(split: Split, assign: Any) -> Found:
        one = model.solver(assign)
        many = hg.tasks(one, count=FOLDS, failed="fail")
        begin = model.begin(len(assign))
        h = {name: jnp.full(len(assign), log) for name, log in model.strengths.items()}
        optimizer = optax.adam(optax.cosine_decay_schedule(0.5, steps))

        def step(carry: Any, _: None) -> Any:
            h, moments, folds, whole = carry
            out, folds = many.hypergrad(folds, h, split.train, split.valid)
            test, info, whole = one.evaluate(whole, h, split.whole, split.test)
            updates, after = optimizer.update(out.grad, moments)
            ok = out.info.status <= hg.Status.INSENSITIVE
            keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
            after = keep(optax.apply_updates(h, updates), h), keep(after, moments), folds, whole
            return after, Found(out.value, test, ok & (info.status <= hg.Status.INSENSITIVE))

        carry = (h, optimizer.init(h), many.init(begin, h), one.init(begin, h))
        return jax.lax.scan(step, carry, None, length=steps)[1]

    return run


def searches(model: Model, problems: dict[str, tuple[Data, Split]], steps: int) -> dict[str, dict[str, Found]]:
    """Every split and every kind of penalty, in one program for all problems of this model.

    One after the other: side by side, all would take as many inner steps as the slowest.
    """
    each = search(model, steps)
    run = jax.jit(lambda splits, kinds: jax.lax.map(lambda s: jax.lax.map(lambda kind: each(s, kind), kinds), splits))
    rows = max(data.rows for data, _ in problems.values())
    tests = max(len(data.x) - data.rows for data, _ in problems.values())
    features = max(data.x.shape[1] for data, _ in problems.values())
    found = {}
    for name, (data, splits) in problems.items():
        count = data.x.shape[1]
        assigns = {"all": np.zeros(count, int), "group": data.groups, "feature": np.arange(count)}
        stacked = jnp.asarray(np.stack([np.pad(assigns[per], (0, features - count)) for per in PER]))
        many = run(Split(*map(padded, splits, (rows, rows, rows, tests), [features] * 4)), stacked)
        found[name] = {per: jax.tree.map(lambda x, i=i: np.asarray(x[:, i]), many) for i, per in enumerate(PER)}
    return found


def rivals(name: str, data: Data) -> dict[str, Callable[[Any], Any]]:
    """Of the same folds; himalaya's only where it is installed."""
    from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV

    strengths = np.logspace(-2, 4, 20)
    if name.startswith("logistic"):
        make = lambda cv: LogisticRegressionCV(
            Cs=1 / strengths[::2], cv=cv, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,),
            use_legacy_attributes=False,
        )  # fmt: skip
        return {"LogisticRegressionCV": make}
    if name in ("elastic_cancer", "elastic_wine"):
        make = lambda cv: LogisticRegressionCV(
            Cs=np.logspace(-2, 2, 9), cv=cv, scoring="neg_log_loss", max_iter=1000, tol=1e-3, l1_ratios=(0.1, 0.5, 0.9),
            solver="saga", use_legacy_attributes=False,
        )  # fmt: skip
        return {"LogisticRegressionCV": make}
    if name.startswith("elastic"):
        return {"ElasticNetCV": lambda cv: ElasticNetCV(l1_ratio=[0.1, 0.5, 0.9, 1.0], cv=cv)}
    found: dict[str, Callable[[Any], Any]] = {"RidgeCV": lambda cv: RidgeCV(strengths, cv=cv)}
    try:
        from himalaya.ridge import GroupRidgeCV
    except ImportError:
        return found
    return found | {
        "GroupRidgeCV": lambda cv: GroupRidgeCV(
            groups=data.groups, cv=cv, fit_intercept=True, random_state=0,
            solver_params={"n_iter": 100, "alphas": strengths, "progress_bar": False},
        )
    }  # fmt: skip


def fit_rival(make: Callable[[Any], Any], splits: Split) -> np.ndarray:
    """Test loss of each outer split."""
    from sklearn.model_selection import PredefinedSplit

    losses = []
    for i in range(len(splits.whole.weight)):
        split = jax.tree.map(lambda x, i=i: np.asarray(x[i]), splits)
        (x, y), (u, v) = split.whole.arrays, split.test.arrays
        target = y if y.ndim == 1 else np.argmax(y, 1)
        model = make(PredefinedSplit(np.argmax(split.valid.weight, 0))).fit(x, target)
        if y.ndim == 1:
            losses.append(np.mean((np.ravel(model.predict(u)) - v) ** 2))
        else:
            losses.append(-np.mean(np.log(np.sum(model.predict_proba(u) * v, 1))))
    return np.asarray(losses)


def cost(model: Model, data: Data, splits: Split, repeats: int) -> dict[str, float]:
    """A hypergradient over the folds by `hg.tasks`, and by one call a fold; processor time, and inner steps."""
    one = model.solver(jnp.arange(data.x.shape[1]))
    many = hg.tasks(one, count=FOLDS)
    split = jax.tree.map(lambda x: x[0], splits)
    h = {name: jnp.full(data.x.shape[1], log) for name, log in model.strengths.items()}
    begin = model.begin(data.x.shape[1])
    parts = [tuple(fold._replace(weight=fold.weight[i]) for fold in (split.train, split.valid)) for i in range(FOLDS)]
    together, alone = jax.jit(many.hypergrad), jax.jit(one.hypergrad)
    fresh, first = many.init(begin, h), one.init(begin, h)
    each = lambda: [alone(first, h, *part)[0] for part in parts]
    whole = lambda: together(fresh, h, split.train, split.valid)[0]
    outs, out = jax.block_until_ready((each(), whole()))
    times: dict[str, list[float]] = {"each": [], "whole": []}
    for _ in range(repeats):
        for name, call in (("each", each), ("whole", whole)):
            began = time.process_time()
            jax.block_until_ready(call())
            times[name].append(1000 * (time.process_time() - began))
    steps = [int(o.info.inner_steps) for o in outs]
    apart = jax.tree.map(lambda *g: sum(g) / FOLDS, *[o.grad for o in outs])
    off = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (apart, out.grad)), strict=True))
    ratio = np.median(times["whole"]) / np.median(times["each"])
    return {"ratio": float(ratio), "steps_ratio": FOLDS * max(steps) / sum(steps), "off": off}


def cost_of_starts(model: Model, data: Data, splits: Split, starts: int, steps: int) -> dict[str, float]:
    """Runs from several strengths by `hg.multistart`, and by one call of `hg.tune` after the other; processor time.

    What is compiled is kept from a run before; tracing counts.
    """
    solver = model.solver(jnp.zeros(data.x.shape[1], int))
    train, valid = (jax.tree.map(lambda x: x[0], part) for part in (splits.train, splits.valid))
    train, valid = (fold._replace(weight=fold.weight[0]) for fold in (train, valid))
    begin = model.begin(data.x.shape[1])
    h = {name: log + jnp.linspace(-2, 2, starts)[:, None] for name, log in model.strengths.items()}
    options: dict[str, Any] = {"outer": optax.adam(0.1), "steps": steps, "steps_per_call": 10}
    each = lambda: [
        hg.tune(
            solver, begin, jax.tree.map(lambda x, i=i: x[i], h), train, valid, progress=False, **options
        ).history.value[-1]
        for i in range(starts)
    ]
    whole = lambda: [one.history.value[-1] for one in hg.multistart(solver, begin, h, train, valid, **options).results]
    times: dict[str, list[float]] = {"each": [], "whole": []}
    for repeat in range(3):
        ends = {}
        for name, call in (("each", each), ("whole", whole)):
            began = time.process_time()
            ends[name] = call()
            if repeat:
                times[name].append(time.process_time() - began)
    off = float(np.max(np.abs(np.asarray(ends["each"]) - np.asarray(ends["whole"]))))
    return {"starts_ratio": float(np.median(times["whole"]) / np.median(times["each"])), "starts_off": off}


def costs(data: Data, splits: Split) -> dict[str, float]:
    return cost(LOGISTIC, data, splits, repeats=30) | cost_of_starts(LOGISTIC, data, splits, starts=8, steps=50)


def error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    count, steps = (2, 4) if options.smoke else (10, 30)
    if options.only:
        numbers |= measured_before(__file__, options)
    every = ("ridge_diabetes",) if options.smoke else tuple(PROBLEMS)
    names = tuple(name for name in every if not options.only or name in options.only)
    problems = {name: (data := PROBLEMS[name][0](), outer_splits(data, options.seed, count)) for name in names}
    paths: dict[str, dict[str, Found]] = {}
    for model in progress({id(PROBLEMS[name][1]): PROBLEMS[name][1] for name in names}.values(), "models"):
        paths |= searches(model, {name: problems[name] for name in names if PROBLEMS[name][1] is model}, steps)
    for name in progress(names, "rivals"):
        data, splits = problems[name]
        lanes = np.arange(count)
        picked = {per: np.argmin(np.where(p.usable, p.folds, np.inf), 1) for per, p in paths[name].items()}
        tests = {per: p.test[lanes, picked[per]] for per, p in paths[name].items()}
        here: dict[str, Any] = {"usable": float(np.mean([p.usable for p in paths[name].values()]))}
        for per in PER:
            folds = paths[name][per].folds[lanes, picked[per]]
            single = paths[name]["all"].folds[lanes, picked["all"]]
            here[per] = {"folds": float(np.mean(folds)), "folds_over_all": float(np.mean(folds - single))}
        tests |= {rival: fit_rival(model, splits) for rival, model in rivals(name, data).items()}
        for which, test in tests.items():
            off = test - tests["all"]
            here.setdefault(which, {}).update(
                test=float(np.mean(test)), spread=float(np.std(test, ddof=1)),
                over_all=float(np.mean(off)), over_all_error=error(off),
            )  # fmt: skip
        numbers[name] = here
    if "cost" in options.only or not (options.only or options.smoke):
        data = wine()
        numbers["cost"] = costs(data, outer_splits(data, options.seed, 1))
    if not (options.only or options.smoke):
        draw(options.out, paths)


def draw(folder: Path, paths: dict[str, dict[str, Found]]) -> None:
    from experiments import _figures as style

    colors = dict(zip(PER, (style.INK, style.BLUE, style.ORANGE), strict=True))
    figure = style.figure(12.5, 9.3)
    places = figure.subplots(3, 3).ravel()
    for axes, name in zip(places, PROBLEMS, strict=False):
        for per, path in paths[name].items():
            seen = np.where(path.usable, path.folds, np.inf)
            best = [np.argmin(seen[:, : t + 1], 1) for t in range(seen.shape[1])]  # of each split so far
            for values, line in ((path.folds, style.DASHED), (path.test, "-")):
                means = [np.mean(values[np.arange(len(at)), at]) for at in best]
                axes.plot(means, color=colors[per], linestyle=line, linewidth=1.6)
        style.titled(axes, name.replace("_", ", "), xlabel="outer step", ylabel="loss")
    for per, color in colors.items():
        places[-1].plot([], [], color=color, label=f"one penalty for {'each ' * (per != 'all')}{per}")
    places[-1].plot([], [], color=style.INK, linestyle=style.DASHED, label="loss over the folds")
    places[-1].plot([], [], color=style.INK, label="loss of the test rows")
    places[-1].legend(frameon=False, loc="center left")
    places[-1].set_axis_off()
    style.save(figure, folder, "course.png", colours=64)


def arguments(parser: argparse.ArgumentParser) -> None:
    parts = [*PROBLEMS, "cost"]
    parser.add_argument("--only", nargs="+", choices=parts, default=[], help="these alone; the others stay as kept")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "A penalty a group, less one for all",
            "test loss, difference",
            {
                "ridge, diabetes": ("ridge_diabetes.group.over_all", style.GREEN),
                "ridge, products": ("ridge_squares.group.over_all", style.GREEN),
                "elastic net, diabetes": ("elastic_diabetes.group.over_all", style.GREEN),
                "elastic net, products": ("elastic_squares.group.over_all", style.GREEN),
                "elastic net, cancer": ("elastic_cancer.group.over_all", style.GREEN),
                "elastic net, wine": ("elastic_wine.group.over_all", style.GREEN),
                "logistic, cancer": ("logistic_cancer.group.over_all", style.GREEN),
                "logistic, wine": ("logistic_wine.group.over_all", style.GREEN),
            },
        ),
        (
            "A penalty a feature, less one for all",
            "test loss, difference",
            {
                "ridge, diabetes": ("ridge_diabetes.feature.over_all", style.ORANGE),
                "ridge, products": ("ridge_squares.feature.over_all", style.ORANGE),
                "elastic net, diabetes": ("elastic_diabetes.feature.over_all", style.ORANGE),
                "elastic net, products": ("elastic_squares.feature.over_all", style.ORANGE),
                "elastic net, cancer": ("elastic_cancer.feature.over_all", style.ORANGE),
                "elastic net, wine": ("elastic_wine.feature.over_all", style.ORANGE),
                "logistic, cancer": ("logistic_cancer.feature.over_all", style.ORANGE),
                "logistic, wine": ("logistic_wine.feature.over_all", style.ORANGE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, draw=drawing)

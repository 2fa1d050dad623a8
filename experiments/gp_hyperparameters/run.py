"""Length scales of a Gaussian process from the training data alone: by evidence, by leave-one-out, and averaged.

The diabetes data and the RAND health insurance data are split five times into 200 rows for training and the rest (at
most 2,000) for testing. One length scale for all features, and one for each (ARD), are found by the evidence; ARD also
by leave-one-out, by Hamiltonian Monte Carlo, and by scikit-learn's regressor from as many starts. Then the evidence
without a matrix is held against Cholesky's at 2,000 points, and computed at 20,000.

    python experiments/gp_hyperparameters/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment, progress  # noqa: E402
from experiments._data import shipped  # noqa: E402

ROWS, TEST, SPLITS, STARTS = 200, 2000, 5, 3
NEAR, FAR = 2_000, 20_000  # points where Cholesky is at hand, and where nothing of size n² is
KEYS = 20  # estimates without a matrix that are held against Cholesky's
PRIOR = 3.0  # variance of the log of each hyperparameter in the sampler


def covariance(h: Any, x: Any, z: Any) -> Any:
    return hg.objectives.squared_exponential(x, z, jnp.exp(h["length"]), jnp.exp(h["variance"]))


def noise(h: Any) -> Any:
    return jnp.exp(h["noise"])


EVIDENCE = hg.objectives.gp_evidence(covariance, noise)
LEAVE_ONE_OUT = hg.objectives.gp_leave_one_out(covariance, noise)


def table(name: str) -> tuple[Any, Any]:
    """`(x [n, d], y [n])`, both standardised later."""
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        found: Any = load_diabetes(return_X_y=True)
        return found
    data = shipped("statsmodels.datasets").randhie.load_pandas().data
    return data.drop(columns="mdvis").to_numpy(float), np.log1p(data["mdvis"].to_numpy(float))


def standardised(x: Any, y: Any, rows: Any, others: Any) -> tuple[Any, Any]:
    """Both parts, in units of the mean and spread of the first."""
    centre, spread = x[rows].mean(0), np.maximum(x[rows].std(0), 1e-6)
    part = lambda r: (
        jnp.asarray((x[r] - centre) / spread, jnp.float32),
        jnp.asarray((y[r] - y[rows].mean()) / y[rows].std(), jnp.float32),
    )
    return part(rows), part(others)


def ordered(x: Any, rng: Any, first: int) -> Any:
    """Rows in random order; a rare indicator that none of the first rows has would say nothing of its length scale."""
    while True:
        order = rng.permutation(len(x))
        if np.all(x[order[:first]].std(0) > 0):
            return order


def splits(name: str, seed: int, count: int) -> tuple[Any, Any]:
    """Training and test rows, `(x [count, n, d], y [count, n])` each."""
    x, y = table(name)
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        order = ordered(x, rng, ROWS)
        pairs.append(standardised(x, y, order[:ROWS], order[ROWS : ROWS + TEST]))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *pairs)


# Hyperparameters, found or drawn.


def tuned(objective: Any, train: Any, scales: int, seed: int, steps: int) -> Any:
    """Hyperparameters of each split from the best of its starts; all splits and starts are one problem to Adam, which
    treats each number on its own.
    """
    count, d = train[1].shape[0], train[0].shape[-1]
    shape = (count, STARTS, scales)
    spread = jax.random.normal(jax.random.key(seed), shape).at[:, 0].set(0)  # the first start is the usual one
    start = {
        "length": 0.5 * np.log(d) + spread,
        "noise": jnp.full(shape[:2], np.log(0.5)),
        "variance": jnp.zeros(shape[:2]),
    }

    each = jax.vmap(lambda h, batch: jax.vmap(lambda one: objective(None, one, batch))(h))
    solver = hg.direct(
        hg.Problem(None, lambda w, h, batch: jnp.sum(each(h, batch))), inner=hg.inner.fixed_point(lambda w, h, b: w)
    )
    result = hg.tune(
        solver, jnp.zeros(()), start, train, train, outer=optax.adam(optax.cosine_decay_schedule(0.1, steps)),
        steps=steps, steps_per_call=steps, progress=False,
    )  # fmt: skip
    values = jax.jit(each)(result.hparams, train)
    best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf), axis=1)
    return jax.tree.map(lambda leaf: leaf[jnp.arange(count), best], result.hparams)


def drawn(train: Any, start: Any, seed: int, samples: int) -> hg.objectives.HMCSamples:
    """Hyperparameters of each split from their posterior, `[splits, samples, ...]`."""

    def one(parts: Any) -> Any:
        batch, begin, key = parts
        n, d = batch[0].shape
        centre = {"length": 0.5 * np.log(d), "noise": 0.0, "variance": 0.0}

        def log_density(h: Any) -> Any:
            gaps = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), h, centre)
            return -n * EVIDENCE(None, h, batch) - 0.5 * sum(jax.tree.leaves(gaps)) / PRIOR

        return hg.objectives.hmc(log_density, begin, key=key, samples=samples, warmup=max(samples, 20), steps=8)

    keys = jax.random.split(jax.random.key(seed), train[1].shape[0])
    return jax.jit(lambda parts: jax.lax.map(one, parts))((train, start, keys))


def log_densities(h: Any, train: Any, test: Any) -> Any:
    mean, variance = hg.objectives.gp_predict(covariance, noise, h, train, test[0])
    return -0.5 * ((test[1] - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))


@jax.jit
def nlpd(h: Any, train: Any, test: Any) -> Any:
    """Negative log density of the held-out targets, mean over them, of each split."""
    return jax.vmap(lambda *parts: -jnp.mean(log_densities(*parts)))(h, train, test)


@jax.jit
def averaged_nlpd(h: Any, train: Any, test: Any) -> Any:
    """The same of predictions that average over samples."""

    def one(parts: Any) -> Any:
        h, train, test = parts
        each = jax.lax.map(lambda h: log_densities(h, train, test), h)
        return -jnp.mean(jax.nn.logsumexp(each, axis=0) - jnp.log(each.shape[0]))

    return jax.lax.map(one, (h, train, test))


def sklearn_regressor(train: Any, test: Any, seed: int, starts: int) -> tuple[Any, Any]:
    """`(negative log evidence per point, NLPD)` of each split."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    evidence, loss = [], []
    for (x, y), (new, target) in zip(zip(*train, strict=True), zip(*test, strict=True), strict=True):
        d = x.shape[1]
        usual: Any = np.full(d, d**0.5)
        kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(usual, (1e-2, 1e3)) + WhiteKernel(0.5, (1e-3, 10))
        model: Any = GaussianProcessRegressor(kernel, alpha=0.0, n_restarts_optimizer=starts - 1, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a length scale has reached its bound
            model.fit(np.asarray(x, float), np.asarray(y, float))
        mean, spread = model.predict(np.asarray(new, float), return_std=True)
        evidence.append(-model.log_marginal_likelihood_value_ / len(y))
        loss.append(0.5 * np.mean((np.asarray(target) - mean) ** 2 / spread**2 + np.log(2 * np.pi * spread**2)))
    return np.asarray(evidence), np.asarray(loss)


def compare(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The numbers of one table, NLPDs of its splits by arm, and its first split's shared length for each feature."""
    smoke, seed = options.smoke, options.seed
    train, test = splits(name, seed, 2 if smoke else SPLITS)
    if smoke:
        train, test = jax.tree.map(lambda leaf: leaf[:, :40], (train, test))
    d, steps = train[0].shape[-1], 5 if smoke else 150
    evidence = jax.jit(jax.vmap(lambda h, batch: EVIDENCE(None, h, batch)))
    arms = {
        "shared": tuned(EVIDENCE, train, 1, seed, steps),
        "ard": tuned(EVIDENCE, train, d, seed, steps),
    }
    if not smoke:  # the same program but for the loss
        arms["loo"] = tuned(LEAVE_ONE_OUT, train, d, seed, steps)
    found = {arm: {"train": evidence(h, train), "nlpd": nlpd(h, train, test)} for arm, h in arms.items()}
    samples = drawn(train, arms["ard"], seed, 10 if smoke else 150)
    found["hmc"] = {"nlpd": averaged_nlpd(samples.hparams, train, test)}
    value, loss = sklearn_regressor(train, test, seed, 1 if smoke else STARTS)
    found["sklearn"] = {"train": value, "nlpd": loss}

    numbers: dict[str, Any] = {arm: {k: jnp.mean(v) for k, v in each.items()} for arm, each in found.items()}
    numbers["acceptance"], numbers["divergent"] = jnp.mean(samples.acceptance), jnp.sum(samples.divergent)
    losses = {arm: np.asarray(each["nlpd"]) for arm, each in found.items()}
    gaps = {
        "evidence_gain": found["shared"]["train"] - found["ard"]["train"],
        "overfitting": losses["ard"] - losses["shared"],
        "averaging_gain": losses["ard"] - losses["hmc"],
        "against_sklearn": losses["ard"] - losses["sklearn"],
        "train_against_sklearn": np.asarray(found["ard"]["train"]) - found["sklearn"]["train"],
    }
    for key, gap in gaps.items():
        numbers[key] = np.mean(gap)
        numbers[f"{key}_se"] = np.std(np.asarray(gap), ddof=1) / len(gap) ** 0.5
    h = jax.tree.map(lambda leaf: leaf[0], arms["shared"])
    return numbers, losses, {**h, "length": jnp.full(d, h["length"][0])}


# Without a matrix.


def matrix_free(h: Any, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The estimate against Cholesky's at `NEAR` points, and alone at `FAR` with seed 0: numbers, gaps in stated errors.

    The gaps are those at the usual length scale, √d: at the shorter one that was found, some derivatives are 1e-9.
    """
    x, y = table("randhie")
    near, far, count = (100, 100, 2) if options.smoke else (NEAR, FAR, KEYS)
    order = ordered(x, np.random.default_rng(options.seed), near)
    rows = lambda n: standardised(x, y, order[:n], order[:1])[0]
    free = hg.objectives.gp_evidence_matrix_free(covariance, noise, tol=1e-3, depth=15, block=64)
    batch, keys = rows(near), jax.random.split(jax.random.key(options.seed), count)
    estimate, usual = jax.jit(free.estimate), {**h, "length": jnp.full_like(h["length"], 0.5 * np.log(x.shape[1]))}
    found = jax.tree.map(lambda *parts: jnp.stack(parts), *[estimate(usual, batch, key) for key in keys])
    value, grad = jax.jit(jax.value_and_grad(lambda h: EVIDENCE(None, h, batch)))(usual)
    off = (found.value - value) / found.value_error
    grad_off = jnp.concatenate(
        jax.tree.leaves(
            jax.tree.map(lambda g, e, s: ((g - e) / s).reshape(count, -1), found.grad, grad, found.grad_error)
        ),
        axis=1,
    )
    numbers: dict[str, Any] = {
        "cholesky": value,
        "value": jnp.mean(found.value),
        "value_error": jnp.mean(found.value_error),
        "largest_value_gap": jnp.max(jnp.abs(found.value - value)),
        "steps": jnp.max(found.steps),
    }
    for name, gaps in (("value", off), ("grad", grad_off)):
        numbers[f"{name}_off"] = jnp.sqrt(jnp.mean(gaps**2))
        numbers[f"{name}_within_3"] = jnp.mean(jnp.abs(gaps) <= 3)

    if options.seed:
        return numbers, {"value": np.asarray(off), "grad": np.asarray(grad_off)}
    batch = rows(far)
    alone = estimate.lower(h, batch, keys[0]).compile()
    began = time.process_time()
    one = jax.block_until_ready(alone(h, batch, keys[0]))
    size = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    memory = alone.memory_analysis()
    numbers["large"] = {
        "points": len(batch[1]),
        "value": one.value,
        "value_error": one.value_error,
        "grad_norm": size(one.grad),
        "grad_error_norm": size(one.grad_error),
        "status": int(one.status),
        "steps": int(one.steps),
        "seconds": time.process_time() - began,
        "megabytes": memory.temp_size_in_bytes / 1e6 if memory else None,
    }
    return numbers, {"value": np.asarray(off), "grad": np.asarray(grad_off)}


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    losses = {}
    for name in progress(("randhie",) if options.smoke else ("diabetes", "randhie"), "tables"):
        numbers[name], losses[name], h = compare(name, options)
    numbers["matrix_free"], gaps = matrix_free(h, options)
    if not options.smoke:
        draw(options.out, losses, gaps)


def draw(folder: Path, losses: dict[str, Any], gaps: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(13, 4.4)
    *charts, last = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    labels = {
        "ard": "ARD, evidence",
        "sklearn": "ARD, scikit-learn",
        "loo": "ARD, leave-one-out",
        "hmc": "ARD, averaged (HMC)",
    }
    colours = dict(zip(labels, (style.ORANGE, style.YELLOW, style.GREEN, style.BLUE), strict=True))
    for chart, (name, each) in zip(charts, losses.items(), strict=True):
        for row, arm in enumerate(labels):
            gap = each[arm] - each["shared"]
            chart.plot(gap, np.full(len(gap), row), "o", color=colours[arm], alpha=0.6)
            chart.plot(gap.mean(), row, "|", color=style.INK, markersize=22, markeredgewidth=2)
        chart.axvline(0, color=style.INK, linewidth=1, linestyle=style.DASHED)
        chart.set_yticks(range(len(labels)), labels.values() if chart is charts[0] else [""] * len(labels))
        chart.invert_yaxis()
        style.titled(chart, f"{name}: five splits and their mean", xlabel="test NLPD, less that of one length scale")
    bins = np.linspace(-4, 4, 33)
    for name, color, label in (("grad", style.SKY, "derivatives"), ("value", style.ORANGE, "value")):
        last.hist(gaps[name].ravel(), bins, density=True, color=color, alpha=0.6, label=label)
    last.plot(bins, np.exp(-0.5 * bins**2) / (2 * np.pi) ** 0.5, color=style.INK, linewidth=1, linestyle=style.DASHED)
    last.legend(frameon=False, loc="upper left")
    style.titled(last, "Matrix-free, n = 2,000", xlabel="gap to Cholesky, in stated errors", ylabel="density")
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "diabetes",
            "test NLPD, nats",
            {
                "one length scale": ("diabetes.shared.nlpd", style.INK),
                "ARD, evidence": ("diabetes.ard.nlpd", style.ORANGE),
                "ARD, scikit-learn": ("diabetes.sklearn.nlpd", style.YELLOW),
                "ARD, leave-one-out": ("diabetes.loo.nlpd", style.GREEN),
                "ARD, averaged by HMC": ("diabetes.hmc.nlpd", style.BLUE),
            },
        ),
        (
            "randhie",
            "test NLPD, nats",
            {
                "one length scale": ("randhie.shared.nlpd", style.INK),
                "ARD, evidence": ("randhie.ard.nlpd", style.ORANGE),
                "ARD, scikit-learn": ("randhie.sklearn.nlpd", style.YELLOW),
                "ARD, leave-one-out": ("randhie.loo.nlpd", style.GREEN),
                "ARD, averaged by HMC": ("randhie.hmc.nlpd", style.BLUE),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

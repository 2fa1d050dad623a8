"""What the hypergradient of each epoch adds to a forecast of the validation loss two epochs later.

    python experiments/predicting_runs/run.py --seed 0 --json

Thirty runs of a small network, whose thirteen hyperparameters wander from epoch to epoch, log their hyperparameters λ,
their validation loss and its hypergradient g. A ridge regression and a Gaussian process learn from some of the runs to
forecast the others: from λ, the changes of λ to come and the last three losses, and with g · Δλ as well.
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

ROWS, BATCH, WIDTH = 200, 50, 32
EPOCHS, AHEAD, PAST = 40, 2, 2  # the forecast sees the losses of this epoch and of two before
FIT, HELD = (2, 5, 10), 20  # runs learned from; runs forecast
CANDIDATES, EVERY = 8, 6  # changes of λ to choose from, at every sixth epoch of the held-out runs
MIDDLE = np.asarray([np.log(3e-3), *[np.log(1e-3)] * 2, *[0.0] * 10])  # learning rate, decays, weights of classes
APART = np.asarray([0.6, *[1.2] * 2, *[0.5] * 10])  # between runs
KEEPS, SPREAD = 0.8, 0.6  # an autoregression around the run's own middle, whose steps are so many times APART
KINDS = ("without", "placebo", "with")


# The runs.


def logits(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"] + params["b2"][None]


def cross_entropy(params: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def training_loss(params: Any, h: Any, batch: Any) -> Any:
    x, y = batch
    decays = jnp.exp(h[1]) * jnp.sum(params["w1"] ** 2) + jnp.exp(h[2]) * jnp.sum(params["w2"] ** 2)
    return jnp.mean(jnp.exp(h[3:])[y] * cross_entropy(params, x, y)) + decays / 2


def new_weights(key: Any) -> Any:
    first, second = jax.random.split(key)
    hidden = {"w1": jax.random.normal(first, (64, WIDTH)) / 8, "b1": jnp.zeros(WIDTH)}
    return hidden | {"w2": jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5, "b2": jnp.zeros(10)}


def epochs_of_runs(seed: int, runs: int, epochs: int) -> tuple[dict[str, np.ndarray], Any]:
    """`({λ, loss, gradient by run and epoch}, outcomes(run, epoch, changes) two epochs later)`."""
    train, valid, _ = jax.tree.map(jnp.asarray, digits(seed, (ROWS, 300)))
    flipped = jax.random.bernoulli(jax.random.key(seed), jnp.where(train[1] < 5, 0.3, 0.0))  # the classes differ
    train = train[0], jnp.where(flipped, (train[1] + 1) % 10, train[1])
    batches = hg.minibatches(train, BATCH)
    problem = hg.Problem(training_loss, lambda params, h, batch: jnp.mean(cross_entropy(params, *batch)))
    inner = hg.inner.gradient(lambda h: optax.adam(jnp.exp(h[0])), steps=ROWS // BATCH)
    solver = hg.unrolled(problem, inner=inner, mode="reverse", warm_start=True)

    @jax.jit
    def run(key: Any, path: Any) -> Any:
        def epoch(state: Any, at: Any) -> Any:
            out, after = solver.hypergrad(state, at[0], batches, valid, key=at[1])
            return after, (out.value, out.grad, out.info.status, after)

        begin, key = jax.random.split(key)
        return jax.lax.scan(epoch, solver.init(new_weights(begin), path[0]), (path, jax.random.split(key, epochs)))[1]

    evaluate = solver.evaluate

    @jax.jit
    @jax.vmap
    def outcome(state: Any, h: Any, keys: Any) -> Any:
        value = jnp.zeros(())
        for key in keys:
            value, _, state = evaluate(state, h, batches, valid, key=key)
        return value

    rng = np.random.default_rng(seed)
    logs: dict[str, list[Any]] = {"path": [], "loss": [], "slope": [], "status": []}
    states = []
    for i in progress(range(runs), "runs"):
        middle = MIDDLE + APART * rng.standard_normal(13)
        path = [middle]
        for _ in range(epochs - 1):
            path.append(middle + KEEPS * (path[-1] - middle) + SPREAD * APART * rng.standard_normal(13))
        key = jax.random.fold_in(jax.random.key(seed), i)
        loss, slope, status, state = run(key, jnp.asarray(np.stack(path), jnp.float32))
        for name, value in zip(logs, (np.stack(path), loss, slope, status), strict=True):
            logs[name].append(np.asarray(value, float))
        states.append(state)

    def outcomes(at: int, epoch: int, changed: np.ndarray) -> np.ndarray:
        """Losses after two epochs at each of some hyperparameters `[candidates, 13]`, the same batches for all."""
        count = len(changed)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf[epoch]] * count), states[at])
        keys = jnp.stack([jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), at * epochs + epoch))] * count)
        return np.asarray(outcome(state, jnp.asarray(changed, jnp.float32), keys), float)

    return {name: np.stack(values) for name, values in logs.items()}, outcomes


# The forecasts.


def features(logs: dict[str, np.ndarray], at: Any, epoch: Any, changes: np.ndarray, other: Any) -> np.ndarray:
    """`[n, columns]`: 13 of λ, 26 of the changes to come, 4 of time and losses, and 2 of g · Δλ, g that of `other` run.

    Args:
        logs: of `epochs_of_runs`.
        at: the run `[n]`.
        epoch: of that run, the present `[n]`.
        changes: of λ from now to the next epoch and to the one after `[n, 2, 13]`.
        other: the run whose g is used `[n]`, or None for no g: two columns of zeros.
    """
    level = np.log(logs["loss"])
    past = [level[at, epoch] - level[at, epoch - lag] for lag in range(1, PAST + 1)]
    history = np.stack([np.log(epoch + 1.0), level[at, epoch], *past], 1)
    relative = np.zeros((len(at), 2))
    if other is not None:
        slope = logs["slope"][other, epoch] / logs["loss"][other, epoch][:, None]  # of log L
        relative = np.einsum("nkd,nd->nk", changes, slope)
    present = (logs["path"][at, epoch] - MIDDLE) / APART
    return np.concatenate([present, *(changes / APART).swapaxes(0, 1), history, relative], 1)


GROUPS = np.repeat(np.arange(5), (13, 13, 13, 2 + PAST, 2))


def along(logs: dict[str, np.ndarray], runs: np.ndarray, kind: str, rng: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """`(features, change of log L in two epochs, run)` of every epoch that has a past and a future."""
    at, epoch = (a.ravel() for a in np.meshgrid(runs, np.arange(PAST, logs["loss"].shape[1] - AHEAD), indexing="ij"))
    path, level = logs["path"], np.log(logs["loss"])
    changes = np.stack([path[at, epoch + 1] - path[at, epoch], path[at, epoch + 2] - path[at, epoch]], 1)
    return features(logs, at, epoch, changes, whose(kind, at, rng)), level[at, epoch + 2] - level[at, epoch], at


def whose(kind: str, at: np.ndarray, rng: Any) -> Any:
    """The run of which g is: none, a random one at the same epoch, or the right one."""
    return {"without": None, "placebo": rng.permutation(at), "with": at}[kind]


def ridge(x: np.ndarray, y: np.ndarray, runs: np.ndarray) -> Any:
    """Ridge regression, its penalty chosen by leaving out one run after the other."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import LeaveOneGroupOut

    folds = list(LeaveOneGroupOut().split(x, y, runs))
    return RidgeCV(alphas=np.logspace(-1, 4, 11), cv=folds, scoring="neg_mean_squared_error").fit(x, y).predict


def covariance(h: Any, x: Any, z: Any) -> Any:
    """A linear function, and a smooth one around it; each group of features has its own two scales."""
    wide, near = jnp.exp(h["linear"])[GROUPS], jnp.exp(h["length"])[GROUPS]
    smooth = hg.objectives.squared_exponential(x / near, z / near, 1.0, jnp.exp(h["smooth"]))
    return (x * wide) @ (z * wide).T + smooth


def noise(h: Any) -> Any:
    return jnp.exp(h["noise"]) + 1e-4


@jax.jit
def evidence_descent(h: Any, data: Any) -> Any:
    loss, optimizer = hg.objectives.gp_evidence(covariance, noise), optax.adam(0.1)

    def step(carry: Any, _: None) -> Any:
        h, state = carry
        updates, state = optimizer.update(jax.grad(lambda h: loss(None, h, data))(h), state)
        return (optax.apply_updates(h, updates), state), None

    return jax.lax.scan(step, (h, optimizer.init(h)), None, length=80)[0][0]


def process(x: np.ndarray, y: np.ndarray, runs: np.ndarray) -> Any:
    """A Gaussian process whose scales maximise the evidence."""
    middle, scale = y.mean(), y.std()
    data = jnp.asarray(x, jnp.float32), jnp.asarray((y - middle) / scale, jnp.float32)
    h = {"linear": jnp.full(5, -2.0), "length": jnp.full(5, 2.0), "smooth": jnp.zeros(()), "noise": jnp.full((), -1.0)}
    h = evidence_descent(h, data)
    weights = jnp.linalg.solve(covariance(h, data[0], data[0]) + noise(h) * jnp.eye(len(y)), data[1])
    return lambda z: middle + scale * np.asarray(covariance(h, jnp.asarray(z, jnp.float32), data[0]) @ weights, float)


def ranks(found: np.ndarray, truth: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(found, truth)[0])


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    sizes, held, epochs = ((2,), 2, 10) if options.smoke else (FIT, HELD, EPOCHS)
    runs = sizes[-1] + held
    logs, outcomes = epochs_of_runs(options.seed, runs, epochs)
    numbers["unusable"] = int(sum(not hg.Status(int(s)).usable for s in logs["status"].ravel()))
    numbers["loss_first"], numbers["loss_last"] = logs["loss"][:, 0].mean(), logs["loss"][:, -1].mean()
    test = np.arange(sizes[-1], runs)
    level = np.log(logs["loss"])[test]
    now, earlier, later = level[:, PAST:-AHEAD], level[:, PAST - 1 : -AHEAD - 1], level[:, PAST + AHEAD :]
    truth = (later - now).ravel()
    slope = (AHEAD * (now - earlier)).ravel()
    error = lambda found: float(np.sqrt(np.mean((found - truth) ** 2)))
    numbers["persistence"] = {"error": error(0 * truth), "ranks_level": ranks(now.ravel(), later.ravel())}
    numbers["extrapolation"] = {"error": error(slope), "ranks": ranks(slope, truth)}
    numbers["extrapolation"]["ranks_level"] = ranks(now.ravel() + slope, later.ravel())

    # From where the held-out runs are, a choice between changes of λ.
    rng = np.random.default_rng(options.seed + 1)
    places = [(run, epoch) for run in test for epoch in range(PAST, epochs - AHEAD, EVERY)]
    jumps = SPREAD * APART * rng.standard_normal((len(places), CANDIDATES, 13))
    gains = np.stack(
        [
            np.log(outcomes(run, epoch, logs["path"][run, epoch] + jump) / logs["loss"][run, epoch])
            for (run, epoch), jump in zip(progress(places, "choices"), jumps, strict=True)
        ]
    )
    at, epoch = np.repeat(np.asarray(places), CANDIDATES, axis=0).T
    twice = np.stack([jumps.reshape(-1, 13)] * 2, 1)
    worst, best = gains.mean(), gains.min(1).mean()

    def choice(found: np.ndarray) -> dict[str, float]:
        found = found.reshape(gains.shape)
        picked = gains[np.arange(len(gains)), found.argmin(1)].mean()
        each = [ranks(a, b) for a, b in zip(found, gains, strict=True)]
        return {"ranks_choice": float(np.mean(each)), "gained": float((worst - picked) / (worst - best))}

    numbers["slope_alone"] = choice(features(logs, at, epoch, twice, at)[:, -1])
    for size in sizes:
        for name, learn in (("ridge", ridge), ("process", process)):
            part: dict[str, Any] = {}
            for kind in KINDS:
                x, y, groups = along(logs, np.arange(size), kind, rng)
                middle, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
                predict = learn((x - middle) / scale, y, groups)
                found = predict((along(logs, test, kind, rng)[0] - middle) / scale)
                part[kind] = {"error": error(found), "ranks": ranks(found, truth)}
                part[kind]["ranks_level"] = ranks(now.ravel() + found, later.ravel())
                branches = features(logs, at, epoch, twice, whose(kind, at, rng))
                part[kind] |= choice(predict((branches - middle) / scale))
            part["error_ratio"] = part["with"]["error"] / part["without"]["error"]
            part["ranks_gain"] = part["with"]["ranks"] - part["without"]["ranks"]
            part["choice_gain"] = part["with"]["ranks_choice"] - part["without"]["ranks_choice"]
            numbers[f"{name}_{size}"] = part


def drawing(results: dict[str, Any]) -> Any:
    canvas = style.figure(13, 5.2)
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1, 1, 0.85))
    colors = {"without": style.ORANGE, "placebo": style.INK, "with": style.BLUE}
    labels = {"without": "without g", "placebo": "with g of another run", "with": "with g · Δλ"}
    for axes, key in ((left, "error"), (middle, "ranks_choice")):
        for i, (name, dash) in enumerate((("ridge", "-"), ("process", style.DASHED))):
            for j, kind in enumerate(KINDS):
                found = np.transpose([style.each(results, f"{name}_{size}.{kind}.{key}") for size in FIT])
                at = np.array(FIT) + 0.08 * (3 * i + j - 2.5)  # apart, so that the error bars are
                label = f"{name}, {labels[kind]}"
                mean, error = style.mean_and_error(found)
                axes.errorbar(at, mean, error, fmt="o", ls=dash, color=colors[kind], ms=4, capsize=3, label=label)
        axes.set_xticks(FIT)
    for name, color in (("persistence", style.PINK), ("extrapolation", style.GREEN)):
        left.axhline(np.mean(style.each(results, f"{name}.error")), color=color, linewidth=1.5, label=name)
    alone = np.mean(style.each(results, "slope_alone.ranks_choice"))
    middle.axhline(alone, color=style.SKY, linewidth=1.5, label="g · Δλ alone")
    style.titled(left, "Error of log L, two epochs on", xlabel="runs learned from", ylabel="root mean square")
    style.titled(middle, "Ranking eight changes of λ", xlabel="runs learned from", ylabel="rank correlation")
    rows = {"g · Δλ alone": (style.each(results, "slope_alone.gained"), style.SKY)}
    for name in ("process", "ridge"):
        for kind in reversed(KINDS):
            found = style.each(results, f"{name}_{FIT[-1]}.{kind}.gained")
            rows[f"{name}, {labels[kind].replace('with g of another run', 'placebo')}"] = found, colors[kind]
    style.over_seeds(right, rows, "Choosing one of the eight", digits=2, xlabel="share of the best one's gain")
    style.legend(canvas, left, middle, columns=5)
    return canvas


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

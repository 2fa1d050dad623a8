"""Private random search: what a random number of private trials costs, and what it does not cover.

The Rényi privacy of releasing the best of a random number of private training runs, by its formulas, is held against
the exact divergence of a selection that can be integrated, and against dp-accounting where that is installed. Then
logistic regression learns digits by DP-SGD, at one total of privacy: untuned, tuned by a random number of trials, and
tuned by a fixed number whose costs add up. Last, one hypergradient step, which no such accounting covers, is released
without noise, and the validation row that it lacks is read from it.

    python experiments/private_tuning/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

sys.path[:0] = [str(Path(__file__).parents[2])]  # a bare clone works as well as an installation

import hypergrad as hg  # noqa: E402
from experiments._common import experiment  # noqa: E402
from experiments._data import digits  # noqa: E402

# Order 1, the Kullback-Leibler divergence, lets a mean of one trial give back a single run exactly.
ORDERS = np.asarray([1.0, *np.arange(1.1, 10.05, 0.1), *range(11, 64), 96, 128])
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}  # of the number of trials
DELTA, TOTAL, FEW, TRIALS, MANY = 1e-4, 3.0, 3, 10, 50
STEPS, RATE = 100, 0.1  # of DP-SGD, and the chance of a row to be in a step
TRAIN, VALID, COUNT_NOISE = 1200, 250, 6.0


# The privacy of one run.


def subsampled_gaussian(noise: float, steps: int = STEPS, rate: float = RATE, orders: Any = ORDERS) -> np.ndarray:
    """Rényi divergences of `steps` sums of norm-1 gradients with Gaussian noise, each row drawn with chance `rate`:
    log E[((1 − q) + q exp((2z − 1)/(2σ²)))^α] / (α − 1) for z ~ N(0, σ²) (Mironov, Talwar & Zhang 2019), by quadrature.
    """
    z = np.linspace(-12 * noise, max(orders) + 12 * noise, 8_001)
    base = norm.logpdf(z, scale=noise) + np.log(z[1] - z[0])
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
    at = lambda a: np.sum(np.exp(base + ratio) * ratio) if a == 1 else logsumexp(base + a * ratio) / (a - 1)
    return steps * np.asarray([at(a) for a in orders])


def gaussian(noise: float, orders: Any = ORDERS) -> np.ndarray:
    """Rényi divergences of a number of sensitivity 1 with Gaussian noise: α / (2σ²)."""
    return np.asarray(orders) / (2 * noise**2)


def to_delta(divergence: np.ndarray, epsilon: float, orders: Any = ORDERS) -> float:
    """The smallest δ for which (ε, δ) follows (Canonne, Kamath & Steinke 2020)."""
    a, r = (np.asarray(v)[np.asarray(orders) > 1.01] for v in (orders, divergence))
    by_order = (a - 1) * (r - epsilon + np.log1p(-1 / a)) - np.log(a)
    by_total_variation = 0.5 * np.log(-np.expm1(-np.min(divergence)))
    return float(np.exp(min(np.min(by_order), by_total_variation, 0.0)))


def to_epsilon(divergence: np.ndarray, delta: float = DELTA, orders: Any = ORDERS) -> float:
    """The smallest ε for which (ε, δ) follows (Canonne, Kamath & Steinke 2020)."""
    a, r = (np.asarray(v)[np.asarray(orders) > 1.01] for v in (orders, divergence))
    return max(0.0, float(np.min(r + np.log1p(-1 / a) - np.log(delta * a) / (a - 1))))


# The privacy of the best of a random number of runs.


def mean_trials(shape: float, gamma: float) -> float:
    """E[K] of the truncated negative binomial distribution; shape 0 is the logarithmic, 1 the geometric one."""
    if gamma == 1:
        return 1.0
    if shape == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return shape * (1 / gamma - 1) / -math.expm1(shape * math.log(gamma))


def stopping(shape: float, mean: float) -> float:
    """γ by the mean number of trials."""
    if mean == 1:
        return 1.0
    return math.exp(brentq(lambda t: mean_trials(shape, math.exp(t)) - mean, -40, -1e-9, xtol=1e-14, rtol=1e-14))


def best_of_random_number(divergence: np.ndarray, mean: float, shape: float, orders: Any = ORDERS) -> np.ndarray:
    """Rényi divergences of the best of K runs, by those of a single run (Papernot & Steinke 2022, Theorems 2 and 6):

    ε(λ) + (1 + η) min_λ̂ [(1 − 1/λ̂) ε(λ̂) + log(1/γ)/λ̂] + log E[K]/(λ − 1)    truncated negative binomial
    ε(λ) + E[K] δ(ε̂ = log(1 + 1/(λ − 1))) + log E[K]/(λ − 1)                     Poisson
    """
    orders = np.asarray(orders, float)
    with np.errstate(divide="ignore"):
        per_order = np.where(orders > 1, math.log(mean) / np.maximum(orders - 1, 1e-300), np.inf if mean > 1 else 0.0)
    if math.isinf(shape):
        extra = [mean * to_delta(divergence, math.log1p(1 / (a - 1)), orders) if a > 1 else np.inf for a in orders]
    else:
        hat = (1 - 1 / orders) * divergence - math.log(stopping(shape, mean)) / orders
        extra = (1 + shape) * np.min(hat)
    found = divergence + extra + per_order
    return np.minimum.accumulate(found[::-1])[::-1]  # a divergence does not fall with its order


def exact_best(
    noise: float, weigh: Callable[[np.ndarray], np.ndarray], orders: Any, *, none: float = -np.inf
) -> np.ndarray:
    """Rényi divergences, the larger of both directions, between the best of K draws from N(0, σ²) and from N(1, σ²).

    The largest of K draws has the density q(y) f'(Q(y)), with f the generating function of K; `weigh(log Q)` is the
    logarithm of f', and `none` that of the chance of K = 0, in which nothing is released.
    """
    y = np.linspace(-30 * noise, 30 * noise + 1, 20_001)
    p, q = (norm.logpdf(y, m, noise) + weigh(norm.logcdf(y, m, noise)) for m in (0, 1))
    step = math.log(y[1] - y[0])
    at = lambda p, q, a: np.logaddexp(logsumexp(a * p + (1 - a) * q) + step, none) / (a - 1)
    return np.asarray([max(at(p, q, a), at(q, p, a)) for a in orders])


def generating_slope(shape: float, mean: float) -> Callable[[np.ndarray], np.ndarray]:
    """log f'(x) by log x: E[K] γ^(1 + η) (1 − (1 − γ) x)^(−1 − η), or μ exp(μ (x − 1)) for Poisson."""
    if math.isinf(shape):
        return lambda log_x: math.log(mean) + mean * np.expm1(log_x)
    gamma = stopping(shape, mean)
    return lambda log_x: (
        math.log(mean) + (1 + shape) * (math.log(gamma) - np.log1p(-(1 - gamma) * np.exp(np.minimum(log_x, 0))))
    )


def draw_trials(rng: np.random.Generator, shape: float, mean: float, draws: int) -> np.ndarray:
    """Numbers of trials."""
    if math.isinf(shape):
        return rng.poisson(mean, draws)
    gamma = stopping(shape, mean)
    if shape == 0:
        return rng.logseries(1 - gamma, draws)
    found = rng.negative_binomial(shape, gamma, 100 * draws)  # zeros are left out: truncated
    return found[found > 0][:draws] if shape != 1 else rng.geometric(gamma, draws)


def check_accounting(numbers: dict[str, Any]) -> dict[str, Any]:
    """The formulas against closed forms, an exact selection, and dp-accounting."""
    single = subsampled_gaussian(2.0)
    means = np.asarray([1, 1.5, 2, 3, 5, 10, 20, 50, 100, 300, 1000])
    curves = {name: [to_epsilon(best_of_random_number(single, m, s)) for m in means] for name, s in SHAPES.items()}
    curves["composed"] = [to_epsilon(m * single) for m in means]
    shown = {"single": to_epsilon(single)} | {name: values[5] for name, values in curves.items()}
    numbers["epsilon_of_ten"] = shown
    numbers["ratio"] = {name: shown[name] / shown["single"] for name in curves}
    numbers["one_trial_error"] = max(
        float(np.max(np.abs(best_of_random_number(single, 1.0, s)[1:] - single[1:]))) for s in (0.0, 0.5, 1.0, 3.0)
    )
    many = np.geomspace(1.1, 1e8, 200)  # pure privacy of ε is that of (2 + η) ε, whatever the number
    pure = [best_of_random_number(np.ones(200), 1000.0, s, many)[-1] / (2 + s) - 1 for s in (0.0, 0.5, 1.0, 3.0)]
    numbers["pure_error"] = float(np.max(np.abs(pure)))
    numbers["smallest_rise"] = min(float(np.min(np.diff(curves[name]))) for name in SHAPES)

    # Exact: the largest of K numbers with noise. A bound below this would be wrong.
    orders = np.asarray([1.5, 2, 4, 8, 16, 32])
    exact: dict[str, Any] = {}
    for noise in (1.0, 3.0):
        one = gaussian(noise)
        for mean in (2, 10, 100):
            for name, shape in SHAPES.items():
                bound = np.interp(orders, ORDERS, best_of_random_number(one, mean, shape))
                none = -float(mean) if math.isinf(shape) else -np.inf
                known = exact_best(noise, generating_slope(shape, mean), orders, none=none)
                exact.setdefault(name, []).append(known / bound)
    numbers["exact_over_bound"] = {name: float(np.max(values)) for name, values in exact.items()}
    fixed = exact_best(3.0, lambda log_x: math.log(TRIALS) + (TRIALS - 1) * log_x, orders)
    random = np.interp(orders, ORDERS, best_of_random_number(gaussian(3.0), TRIALS, 1.0))
    numbers["fixed_over_random"] = float(np.max(fixed / random))
    numbers["negative_half"] = to_epsilon(best_of_random_number(single, TRIALS, -0.5))
    return {"means": means, **curves, "orders": orders}


def by_rival(smoke: bool) -> dict[str, float] | None:
    """Largest relative differences from dp-accounting; None where it is not installed."""
    logging.getLogger("absl").setLevel("ERROR")  # it names every order that it leaves out
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        print("dp-accounting is not installed and is skipped: pip install -e '.[bench]'")
        return None
    whole, apart = (
        ORDERS[(ORDERS > 1.5) & np.isclose(ORDERS % 1, 0)].round(),
        {"single": 0.0, "tuned": 0.0, "less": 0.0},
    )
    tell = lambda event, orders: RdpAccountant(orders).compose(event).get_epsilon(DELTA)
    for noise in (2.0,) if smoke else (2.0, 5.0):
        run: Any = dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(noise))
        run = dp_accounting.SelfComposedDpEvent(run, STEPS)
        fine, coarse = subsampled_gaussian(noise), subsampled_gaussian(noise, orders=whole)
        apart["single"] = max(apart["single"], abs(to_epsilon(coarse, orders=whole) / tell(run, whole) - 1))
        for mean in (10.0,) if smoke else (2.0, 10.0, 100.0):
            for shape in (0.0, 0.5, 1.0, math.inf):
                event = dp_accounting.dp_event.RepeatAndSelectDpEvent(run, mean, shape)
                same = to_epsilon(best_of_random_number(coarse, mean, shape, whole), orders=whole)
                apart["tuned"] = max(apart["tuned"], abs(same / tell(event, whole) - 1))
                if not smoke:
                    ours = to_epsilon(best_of_random_number(fine, mean, shape))
                    apart["less"] = max(apart["less"], 1 - ours / tell(event, ORDERS[1:]))
    # Between whole orders its series leaves out the signs of binomial coefficients, which makes it an upper bound.
    theirs = RdpAccountant([1.1]).compose(run)._rdp[0]
    apart["at_order_1.1"] = float(theirs / subsampled_gaussian(noise, orders=[1.1])[0])
    return apart


# DP-SGD of multinomial logistic regression.


def logits(w: Any, x: Any) -> Any:
    return x @ w[:-1] + w[-1]


def private_descent(key: Any, noise: Any, setting: Any, data: Any, steps: int) -> Any:
    """DP-SGD: every gradient is clipped to 1 in units of `clip`, rows are drawn independently, momentum is 0.9."""
    x, y = data
    rows = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    norms, targets = jnp.linalg.norm(rows, axis=1), jax.nn.one_hot(y, 10)
    rate, clip = setting

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        w, velocity = carry
        pick, draw = jax.random.split(key)
        apart = jax.nn.softmax(logits(w, x)) - targets
        size = norms * jnp.linalg.norm(apart, axis=1)  # of the gradient of each row
        kept = jax.random.bernoulli(pick, RATE, y.shape) * jnp.minimum(1 / jnp.maximum(size, 1e-12), 1 / clip)
        total = rows.T @ (kept[:, None] * apart) + noise * jax.random.normal(draw, w.shape)
        velocity = 0.9 * velocity - total / (RATE * len(y))
        return (w + rate * velocity, velocity), None

    zero = jnp.zeros((x.shape[1] + 1, 10))
    return jax.lax.scan(step, (zero, zero), jax.random.split(key, steps))[0][0]


def noise_for(whole: Callable[[np.ndarray], np.ndarray]) -> float:
    """The noise of DP-SGD with which the whole procedure, by the divergences of a run, has ε = TOTAL.

    A row is in the training data or in those of validation, whose noisy count of right answers orders the trials: the
    larger divergence counts.
    """
    run = lambda noise: np.maximum(subsampled_gaussian(noise), gaussian(COUNT_NOISE))
    return math.exp(
        brentq(lambda t: to_epsilon(whole(run(math.exp(t)))) - TOTAL, math.log(0.6), math.log(60), xtol=1e-4)
    )


def tune_privately(seed: int, smoke: bool, numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    train, valid, test = digits(seed, (TRAIN, VALID), centred=False)  # a mean of the rows would need noise, too
    pool, draws, steps = (8, 50, 3) if smoke else (200, 2000, STEPS)
    rng = np.random.default_rng(seed)
    settings = np.exp(rng.uniform(np.log([1e-3, 1e-2]), np.log([10.0, 100.0]), (pool, 2))).astype(np.float32)

    @jax.jit
    def trials(noise: Any, key: Any) -> tuple[Any, Any]:
        def one(at: Any) -> tuple[Any, Any]:
            w = private_descent(at[0], noise, at[1], train, steps)
            right = lambda data: jnp.sum(jnp.argmax(logits(w, data[0]), axis=1) == data[1])
            return right(valid), right(test) / len(test[1])

        return jax.lax.map(one, (jax.random.split(key, pool), settings), batch_size=8)

    arms: dict[str, tuple[float | None, int]] = {"untuned": (None, 1), "composed": (None, TRIALS)}
    arms |= {name: (shape, TRIALS) for name, shape in SHAPES.items() if not smoke or name == "geometric"}
    if not smoke:
        arms |= {"composed_few": (None, FEW), "logarithmic_many": (0.0, MANY), "geometric_many": (1.0, MANY)}
    found: dict[str, np.ndarray] = {}
    for name, (shape, mean) in arms.items():
        whole = lambda r, s=shape, m=mean: m * r if s is None else best_of_random_number(r, m, s)
        noise = noise_for(whole)
        right, tested = map(np.asarray, trials(noise, jax.random.key(seed)))
        counts = np.full(draws, mean) if shape is None else draw_trials(rng, shape, mean, draws)
        accuracy = np.full(draws, 0.1)  # Poisson: no trial at all, and a guess
        for i in np.flatnonzero(counts):
            tried = rng.integers(0, pool, counts[i])
            scores = right[tried] + COUNT_NOISE * rng.standard_normal(counts[i])
            accuracy[i] = tested[tried[np.argmax(scores)]]
        found[name] = accuracy
        low, middle = np.quantile(accuracy, (0.1, 0.5))
        numbers[name] = {"noise": noise, "accuracy": np.mean(accuracy), "tenth": low, "median": middle}
        if name == "untuned":
            numbers["best_setting"] = float(np.max(tested))
    mean = {name: numbers[name]["accuracy"] for name in arms}
    numbers["gain"] = mean["geometric"] - mean["untuned"]
    numbers["over_composed"] = mean["geometric"] - mean["composed"]
    if not smoke:
        numbers["poisson_over_composed"] = mean["poisson"] - max(mean["composed"], mean["composed_few"])
        numbers["many_over_composed"] = mean["geometric_many"] - max(mean["composed"], mean["composed_few"])
    return found


# What a hypergradient step without noise gives away.


def read_validation_row(seed: int, smoke: bool, numbers: dict[str, Any]) -> np.ndarray:
    """A weight for each of 300 training rows. The hypergradient on the validation data with one row left out tells
    which row that was, to one who knows the others.
    """
    rows, tried = (40, 3) if smoke else (300, 40)
    parts = digits(seed, (rows, VALID))
    train, (x, y) = (jax.tree.map(jnp.asarray, part) for part in parts[:2])
    each = lambda w, data: optax.softmax_cross_entropy_with_integer_labels(logits(w, data[0]), data[1])
    ridge = lambda w: 0.5e-2 * jnp.sum(w**2)
    problem = hg.Problem(
        lambda w, h, data: jnp.mean(jnp.exp(h) * each(w, data)) + ridge(w),
        lambda w, h, data: jnp.mean(data[2] * each(w, data[:2])),
    )
    solver = hg.implicit(problem)
    start, hparams = jnp.zeros((65, 10)), jnp.zeros(rows)
    step = jax.jit(solver.hypergrad)
    state = solver.init(start, hparams)
    everyone = jnp.ones(VALID)
    out, state = step(state, hparams, train, (x, y, everyone))
    numbers["statuses_ok"] = int(out.info.status) == int(hg.Status.OK)

    # The adversary's: the part of each row with each of its ten possible labels, by the Hessian in full.
    w = state.params

    @jax.jit
    def parts_of_rows(w: Any) -> Any:
        flat = w.ravel()
        loss = lambda v: problem.inner_loss(v.reshape(w.shape), hparams, train)
        hessian = jax.hessian(loss)(flat)
        of_train = jax.jacrev(lambda v: each(v.reshape(w.shape), train) / rows)(flat)
        spread = jnp.linalg.solve(hessian, of_train.T)  # [parameters, rows]
        slope = lambda row, label: jax.grad(lambda v: each(v, (row[None], label[None]))[0])(w).ravel() / VALID
        of_valid = jax.vmap(lambda row: jax.vmap(lambda label: slope(row, label))(jnp.arange(10)))(x)
        return -of_valid @ spread  # [rows, labels, training rows]

    known = np.asarray(parts_of_rows(w))
    true = known[np.arange(VALID), np.asarray(y)]
    whole = np.asarray(out.grad)
    changes, found, labels = [], [], []
    for i in np.random.default_rng(seed).permutation(VALID)[:tried]:
        lacking, state = step(state, hparams, train, (x, y, everyone.at[i].set(0.0)))
        change = whole - np.asarray(lacking.grad)
        changes.append(float(np.linalg.norm(change) / np.linalg.norm(whole)))
        found.append(int(np.argmin(np.sum((true - change) ** 2, axis=1))) == i)
        labels.append(int(np.argmin(np.sum((known[i] - change) ** 2, axis=1))) == int(y[i]))
    numbers["row_found"], numbers["label_found"] = float(np.mean(found)), float(np.mean(labels))
    numbers["chance"] = 1 / VALID
    numbers["change"] = float(np.median(changes))

    # Made private as a step of DP-SGD is: parts clipped at their median, and the noise that ε = 3 takes in ten steps.
    sizes = np.linalg.norm(true, axis=1)
    clipped = np.sum(true * np.minimum(1, np.median(sizes) / sizes)[:, None], axis=0)
    noise = brentq(lambda s: to_epsilon(10 * gaussian(s)) - TOTAL, 0.5, 50)
    numbers["noise_over_gradient"] = float(noise * np.median(sizes) * math.sqrt(rows) / np.linalg.norm(clipped))
    return np.asarray(changes)


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    curves = check_accounting(numbers)
    rival = by_rival(options.smoke)
    if rival is not None:
        numbers["rival"] = rival
    found = tune_privately(options.seed, options.smoke, numbers)
    read_validation_row(options.seed, options.smoke, numbers)
    if not options.smoke:
        draw(options.out, curves, found, numbers)


def draw(folder: Path, curves: dict[str, Any], found: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
    from experiments import _figures as style

    figure = style.figure(12.5, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    single = numbers["epsilon_of_ten"]["single"]
    lines = {  # label, and where it stands
        "composed": (style.ORANGE, "a fixed number,\ncosts added up", (15, 11.5), "right"),
        "geometric": (style.BLUE, "geometric", (1000, curves["geometric"][-1] + 0.3), "right"),
        "logarithmic": (style.GREEN, "logarithmic", (1000, curves["logarithmic"][-1] - 0.8), "right"),
        "poisson": (style.PINK, "Poisson", (45, 11.5), "left"),
    }
    for name, (color, label, at, side) in lines.items():
        left.plot(curves["means"], curves[name], color=color, linewidth=2)
        left.text(*at, label, color=color, ha=side)
    left.axhline(single, color=style.INK, linewidth=1, linestyle=style.DASHED)
    left.text(1000, single - 0.6, "a single run", color=style.INK, ha="right")
    left.set(xscale="log", ylim=(0, 14))
    style.titled(left, "The price of choosing the best", xlabel="trials, on average", ylabel=f"ε at δ = {DELTA:g}")
    bar = lambda name, color: (numbers[name]["accuracy"], color)
    rows = {
        "untuned: a random setting": bar("untuned", style.INK),
        "a fixed three, costs added up": bar("composed_few", style.ORANGE),
        "a fixed ten": bar("composed", style.ORANGE),
        "geometric, ten on average": bar("geometric", style.BLUE),
        "geometric, fifty": bar("geometric_many", style.BLUE),
        "logarithmic, ten on average": bar("logarithmic", style.GREEN),
        "logarithmic, fifty": bar("logarithmic_many", style.GREEN),
        "Poisson, ten on average": bar("poisson", style.PINK),
    }
    style.bars(right, rows, f"Digits by DP-SGD at ε = {TOTAL:g} in total", xlabel="mean test accuracy", xlim=(0, 1.0))
    style.save(figure, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "ε = 3 in total",
            "test accuracy of digits",
            {
                "a random setting": ("untuned.accuracy", style.INK),
                "a fixed three": ("composed_few.accuracy", style.ORANGE),
                "a fixed ten": ("composed.accuracy", style.ORANGE),
                "logarithmic, ten": ("logarithmic.accuracy", style.GREEN),
                "geometric, ten": ("geometric.accuracy", style.BLUE),
                "Poisson, ten": ("poisson.accuracy", style.PINK),
                "geometric, fifty": ("geometric_many.accuracy", style.BLUE),
                "the best of 200, known": ("best_setting", style.YELLOW),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

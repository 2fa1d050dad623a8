"""Stochastic bilevel optimization: `hg.single_loop` beside the methods as their papers print them, and other solvers.

The problems are benchmark_bilevel's `simulated` quadratics and a logistic regression of the shape of its ijcnn1, on
made-up data. Every iterate is scored by one exact evaluator in float64, outside of the timer; times are processor time
between barriers, sample by sample in turn with the plain formulation.

    python experiments/bilevel_benchmark/run.py --seed 0 --json
"""

from __future__ import annotations

import argparse
import functools
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
from experiments.bilevel_benchmark.problems import BLOCK, Task, covtype, hyper_cleaning, ijcnn1, simulated  # noqa: E402
from experiments.bilevel_benchmark.references import DRAWS, METHODS, Setting  # noqa: E402

DECAY = {"soba": 0.5}  # exponents of the step sizes; the others take constant ones
STEPS = {"soba": 1, "saba": 1, "amigo": 10, "srba": 1, "f2sa": 10}  # inner steps of a call
EPSILON = 0.03
TARGETS = (1e-5, 1e-7, 1e-8)
MODE = {"chunk": 1000}


class Path_(NamedTuple):
    """A run: seconds of processor time at some of its steps, and the score there."""

    seconds: np.ndarray
    score: np.ndarray
    calls: np.ndarray  # of a gradient of a block of rows or a product with its second derivatives; NaN: not counted

    def kept(self) -> dict[str, Any]:
        """What goes into the file."""
        at = [np.flatnonzero(self.score <= target)[:1] for target in TARGETS]
        return {
            "curve": self.listed(),
            "end": float(np.min(self.score)),
            "until": [self.until(target) for target in TARGETS],
            "calls": [float(self.calls[i[0]]) if len(i) else np.inf for i in at],
        }

    def listed(self) -> list[list[float]]:
        """For a file: four digits are enough for a picture."""
        return [[float(f"{x:.4g}") for x in part] for part in (self.seconds, self.score)]

    def until(self, target: float) -> float:
        reached = np.flatnonzero(self.score <= target)
        return float(self.seconds[reached[0]]) if len(reached) else np.inf


def score(task: Task, hparams: Any) -> float:
    """‖∇F‖², or infinity where a run has left all bounds."""
    h = np.asarray(hparams, np.float64)
    if not (np.all(np.isfinite(h)) and np.max(np.abs(h)) < 50):
        return np.inf
    with np.errstate(all="ignore"):
        found = task.score(h)
    return found if np.isfinite(found) else np.inf


def scored(
    task: Task, seconds: np.ndarray, hparams: np.ndarray, calls: np.ndarray | None = None, points: int = 25
) -> Path_:
    """At about so many steps, evenly spread over the logarithm of the step; the last among them."""
    last = len(seconds) - 1
    at = np.unique(np.round(np.geomspace(last + 1, 1, points)).astype(int) - 1)
    counted = np.full(last + 1, np.nan) if calls is None else calls
    return Path_(seconds[at], np.asarray([score(task, hparams[i]) for i in at]), counted[at])


def calls_a_step(task: Task, method: str) -> float:
    """Gradients of a block and products with its second derivatives, as the formulation counts them."""
    k, (n, m) = STEPS[method], (len(rows[0]) // BLOCK for rows in (task.train, task.valid))
    passes = (4 * n + 2 * m) / (n + m)  # of SRBA: a gradient and a product of all rows every (n + m)/2 steps
    return {"soba": 3, "saba": 3, "amigo": 3 * k + 2, "srba": 6 + passes, "f2sa": 4 * (k + 1)}[method]


def decayed(rate: Any, method: str) -> Callable[[Any], Any]:
    power = DECAY.get(method, 0.0)
    return lambda t: rate * (1.0 + t) ** -power


def setting(task: Task, method: str, rate: Any, outer_rate: Any) -> Setting:
    return Setting(
        task.problem.inner_loss, task.problem.outer_loss, task.train, task.valid, decayed(rate, method),
        decayed(outer_rate, method), STEPS[method], EPSILON,
    )  # fmt: skip


def drawn(task: Task, method: str, key: Any, t: Any) -> Any:
    """The blocks of step t, as `hg.single_loop` draws them when `hg.tune` is given this key."""
    _, step_key = jax.random.split(key)
    _, draw_key, _ = jax.random.split(jax.random.fold_in(step_key, t), 3)
    counts = jnp.asarray([[len(rows[0]) // BLOCK for rows in (task.train, task.valid)]], jnp.uint32)
    return (jax.random.bits(draw_key, (DRAWS[method](STEPS[method]), 2), jnp.uint32) % counts).astype(jnp.int32)


def best_rates(task: Task, method: str, steps: int, key: Any) -> tuple[float, float]:
    """The pair of the grid whose last iterate scores best; all pairs side by side in the plain formulation."""
    pairs = np.asarray([(rate, rate * ratio) for rate in task.rates for ratio in task.outer_rates])
    dtype = task.params.dtype

    @jax.jit
    def last(pairs: Any, train: Any, valid: Any) -> Any:
        here = task._replace(train=train, valid=valid)

        def run(pair: Any) -> Any:
            start, step = METHODS[method](setting(here, method, *pair))
            follow = lambda carry, t: (step(carry, (t, drawn(here, method, key, t))), None)
            return jax.lax.scan(follow, start(task.params, task.hparams), jnp.arange(steps))[0][2]

        return jax.vmap(run)(pairs)

    ends = last(jnp.asarray(pairs, dtype), task.train, task.valid)
    rate, outer_rate = pairs[int(np.argmin([score(task, end) for end in np.asarray(ends)]))]
    return float(rate), float(outer_rate)


class Turns:
    """A callback of `hg.tune`: after each call of so many steps, the plain formulation takes as many, both timed."""

    def __init__(self, other: Callable[[], Any]) -> None:
        self.other, self.ours, self.theirs, self.mark = other, [], [], time.process_time()

    def __call__(self, step: int, metrics: Any) -> None:
        chunk = MODE["chunk"]
        if step % chunk == 0:  # the first callback after a call: its steps have been taken
            self.ours.append(time.process_time() - self.mark)
        if step % chunk == chunk - 1:
            began = time.process_time()
            self.other()
            self.mark = time.process_time()
            self.theirs.append(self.mark - began)


def compare(task: Task, method: str, rates: tuple[float, float], calls: int, key: Any) -> dict[str, Any]:
    """Ours through `hg.tune` and the plain formulation, call by call in turn."""
    chunk = MODE["chunk"]
    start, _ = METHODS[method](setting(task, method, *rates))

    @jax.jit
    def plain(carry: Any, begin: Any, train: Any, valid: Any) -> Any:
        here = task._replace(train=train, valid=valid)
        _, step = METHODS[method](setting(here, method, *rates))
        follow = lambda carry, t: (step(carry, (t, drawn(here, method, key, t))), None)
        return jax.lax.scan(follow, carry, begin + jnp.arange(chunk))[0]

    carry, ends = start(task.params, task.hparams), []
    jax.block_until_ready(plain(carry, 0, task.train, task.valid))  # compiled

    def other() -> None:
        nonlocal carry
        carry = jax.block_until_ready(plain(carry, len(ends) * chunk, task.train, task.valid))
        ends.append(np.asarray(carry[2], np.float64))

    number = lambda rate: decayed(rate, method) if method in DECAY else rate
    more: dict[str, Any] = {"inner_steps": STEPS[method]} if STEPS[method] > 1 else {}
    more |= {"perturbation": EPSILON} if method == "f2sa" else {}
    solver = hg.single_loop(
        task.problem, method=method, size=BLOCK, rows=(len(task.train[0]), len(task.valid[0])),
        step_size=number(rates[0]), **more,
    )  # fmt: skip
    turns = Turns(other)
    result = hg.tune(
        solver, task.params, task.hparams, task.train, task.valid, outer=optax.sgd(number(rates[1])),
        steps=calls * chunk, steps_per_call=chunk, key=key, callbacks=turns, progress=False, max_failures=10**6,
    )  # fmt: skip
    path = np.asarray(result.history.hparams, np.float64)
    at = np.asarray([path[i * chunk] for i in range(1, calls)])
    apart = np.max(np.abs(at - np.asarray(ends[: calls - 1])))
    ours, theirs = np.asarray(turns.ours[1:]), np.asarray(turns.theirs[1:])
    times = lambda each: np.arange(1, calls) * float(np.median(each))
    oracles = np.arange(1, calls) * chunk * calls_a_step(task, method)
    return {
        "speed": float(np.median(theirs / ours)),
        "apart": float(apart),
        "ours": chunk / float(np.median(ours)),
        "plain": chunk / float(np.median(theirs)),
        "path": scored(task, times(ours), at, oracles),
        "path_plain": scored(task, times(theirs), np.asarray(ends[: calls - 1])),
        "rates": rates,
    }


class Clock:
    """A callback of `hg.tune` that notes processor time after each call."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, step: int, metrics: Any) -> None:
        self.at.append(time.process_time())


def timed(task: Task, solver: hg.Solver, outer: Any, steps: int, key: Any, *, rows: bool, points: int = 25) -> Path_:
    """A run of `hg.tune` of any other solver; the first call, which compiles, counts as long as the median one."""
    data = [hg.minibatches(d, BLOCK) if rows else d for d in (task.train, task.valid)]
    clock, call = Clock(), max(1, min(100, steps // 10)) if rows else 1
    result = hg.tune(
        solver, task.params, task.hparams, *data, outer=outer, steps=steps, steps_per_call=call, key=key,
        callbacks=clock, progress=False, max_failures=10**6, max_rejections=10**6,
    )  # fmt: skip
    spent = np.diff(np.asarray(clock.at)[::call])
    each = np.concatenate([[np.median(spent)], spent]) if len(spent) else np.asarray([0.0])
    seconds = np.cumsum(each)
    history = result.history
    n, m = (1, 1) if rows else (len(part[0]) // BLOCK for part in (task.train, task.valid))
    calls = np.cumsum(n * (history.inner_steps + history.linear_steps + 1) + m)
    last = np.maximum.accumulate(np.where(history.accepted, np.arange(steps), 0))  # where the run is, not its trials
    at = [np.asarray(x)[::call][: len(seconds)] for x in (np.asarray(history.hparams, np.float64)[last], calls)]
    return scored(task, seconds, *at, points)


def curvature(task: Task) -> float:
    """The largest eigenvalue of the inner loss's second derivatives at the start, from 50 products."""
    slope = lambda w: jax.grad(task.problem.inner_loss)(w, task.hparams, task.train)

    def turn(carry: Any, _: None) -> Any:
        product = jax.jvp(slope, (task.params,), (carry,))[1]
        size = jnp.linalg.norm(product)
        return product / size, size

    begin = jnp.ones_like(task.params) / task.params.size**0.5
    return float(jax.lax.scan(turn, begin, None, length=50)[1][-1])


def jaxopt_run(task: Task, implicit: bool) -> Callable[[float, int, int], Path_]:
    """jaxopt's gradient descent, ten steps on all rows from where it was, differentiated by either of its ways."""
    import jaxopt

    inner = jaxopt.GradientDescent(
        task.problem.inner_loss, maxiter=10, stepsize=1 / curvature(task), implicit_diff=implicit, acceleration=False,
        tol=0.0, unroll=not implicit, jit=True,
    )  # fmt: skip

    @jax.jit
    def step(w: Any, h: Any, outer_rate: Any, train: Any, valid: Any) -> Any:
        def outer(h: Any) -> Any:
            found = inner.run(w, h, train).params
            return task.problem.outer_loss(found, h, valid), found

        grad, w = jax.grad(outer, has_aux=True)(h)
        return w, h - outer_rate * grad

    def run(outer_rate: float, steps: int, points: int) -> Path_:
        w, h = task.params, task.hparams
        rate = jnp.asarray(outer_rate, h.dtype)
        jax.block_until_ready(step(w, h, rate, task.train, task.valid))
        seconds, hparams, spent = [], [], 0.0
        for _ in range(steps):
            began = time.process_time()
            w, h = jax.block_until_ready(step(w, h, rate, task.train, task.valid))
            spent += time.process_time() - began
            seconds.append(spent)
            hparams.append(np.asarray(h))
        return scored(task, np.asarray(seconds), np.asarray(hparams), points=points)

    return run


OTHERS = (
    "implicit, all rows",
    "implicit, minibatches",
    "unrolled, minibatches",
    "jaxopt, implicit",
    "jaxopt, unrolled",
)


def other(task: Task, name: str, rates: tuple[float, float], scale: float, key: Any) -> Path_ | None:
    """A solver that solves, at the best outer step of a grid by a third of its run; None: jaxopt is not installed."""
    rate, outer_rate = rates
    steps = lambda n: max(4, int(n * scale))
    if name == "implicit, all rows":
        return timed(task, hg.implicit(task.problem), hg.outer.lbfgs(), steps(40), key, rows=False)
    if name.startswith("jaxopt"):
        try:
            run, most, grid = jaxopt_run(task, name.endswith("implicit")), steps(60), (1, 3, 10, 30, 100)
        except ImportError:
            print(f"{name}: jaxopt is not installed, skipped", flush=True)
            return None
    else:
        inner = hg.inner.gradient(optax.sgd(rate), steps=10)
        if name.startswith("implicit"):
            solver = hg.implicit(task.problem, inner=inner, linear=hg.linear.neumann(10, step_size=rate))
        else:
            solver = hg.unrolled(task.problem, inner=inner, warm_start=True, mode="reverse")
        descent = optax.inject_hyperparams(optax.sgd)
        run = lambda at, steps, points: timed(
            task, solver, descent(learning_rate=at), steps, key, rows=True, points=points
        )
        most, grid = steps(3000), (1, 3, 10)
    short = {factor * outer_rate: run(factor * outer_rate, most // 3, 1).score[-1] for factor in grid}
    return run(min(short, key=lambda at: short[at]), most, 25)


def floor_ratio(task: Task, rates: tuple[float, float], steps: int, key: Any) -> float:
    """How the floor of SOBA with constant steps falls when both are halved: 2 where it is in proportion to them."""
    counted = steps // 2

    @jax.jit
    def tail(factor: Any) -> Any:
        constant = setting(task, "saba", rates[0] * factor, rates[1] * factor)  # without decay
        start, step = METHODS["soba"](constant)

        def follow(carry: Any, t: Any) -> Any:
            carry = step(carry, (t, drawn(task, "soba", key, t)))
            return carry, carry[2]

        path = jax.lax.scan(follow, start(task.params, task.hparams), jnp.arange(steps))[1]
        return path[counted :: max(1, counted // 400)]

    mean = lambda path: float(np.mean([task.score(h) for h in np.asarray(path, np.float64)]))
    return mean(tail(jnp.asarray(1.0))) / mean(tail(jnp.asarray(0.5)))


def label(task: Task) -> str:
    return task.name.replace(" ", "_").replace(",", "").replace("'s", "")


def summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the bars are about, of the problems that are there."""
    named = {name: here for name, here in numbers.items() if isinstance(here, dict)}
    every = [(name, found) for name, here in named.items() for found in here.values() if "speed" in found]
    text = {
        "slowest_speed": min(found["speed"] for _, found in every),
        "median_speed": float(np.median([found["speed"] for _, found in every])),
        "apart_float64": max((f["apart"] for name, f in every if name.startswith("simulated")), default=np.nan),
    }
    if "ijcnn1_shape" in named:
        here = named["ijcnn1_shape"]
        for k, target in enumerate(TARGETS):
            reached = {name: found["until"][k] or np.inf for name, found in here.items()}  # None: read from a file
            plain = [found["until_plain"][k] or np.inf for found in here.values() if "until_plain" in found]
            times = list(reached.values())
            ours = min(seconds for name, seconds in reached.items() if not name.startswith("jaxopt"))
            text[f"over_fastest_{target:.0e}"] = ours / min(times + plain) if np.isfinite(ours) else np.inf
    return text


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.filterwarnings("ignore", message="tune: ")  # that no error is known is what single loops are
    key = jax.random.key(options.seed)
    if options.smoke:
        MODE["chunk"] = 20
        tasks = [simulated(256, 5, options.seed)]
        methods, calls, tried = ["saba", "implicit, all rows"], lambda method: 3, lambda method: 40
    else:
        quadratics = [functools.partial(simulated, n, 100) for n in (1024, 8192, 32768)]
        made = [quadratics[0], functools.partial(ijcnn1, (49990, 91701)), *quadratics[1:]]
        made += [functools.partial(covtype, (16384, 8192)), functools.partial(hyper_cleaning, (960, 960))]
        tasks = [make(options.seed) for make in (made if options.problem is None else [made[options.problem]])]
        methods = options.methods or [*METHODS, *OTHERS]
        calls = lambda method: 31 if method in ("soba", "saba") else 9
        tried = lambda method: 8000 if method in ("soba", "saba") else 1000
    numbers |= measured_before(__file__, options, kept="measured.json")
    for task in progress(tasks, "problems"):
        here = numbers.setdefault(label(task), {})
        for method in [method for method in methods if method in METHODS]:
            rates = best_rates(task, method, tried(method), key)
            found = compare(task, method, rates, calls(method), key)
            ours, plain = found.pop("path"), found.pop("path_plain")
            found |= ours.kept()
            here[method] = found | {
                "curve_plain": plain.listed(), "until_plain": [plain.until(target) for target in TARGETS]
            }  # fmt: skip
            print(task.name, method, here[method], flush=True)
        rates = here["saba"]["rates"]
        if task.name.endswith((" 1,024", " 256")) and "soba" in methods:
            numbers["soba_floor_ratio"] = floor_ratio(task, rates, 40_000, key)
        for method in [method for method in methods if method in OTHERS]:
            path = other(task, method, rates, 0.1 if options.smoke else 1.0, key)
            if path is not None:
                here[method] = path.kept()
                print(task.name, method, here[method], flush=True)
        numbers |= summary(numbers)
    if options.out:
        draw(options.out, numbers)


TITLES = {
    "simulated_1024": "simulated, 1,024 rows",
    "simulated_8192": "simulated, 8,192 rows",
    "simulated_32768": "simulated, 32,768 rows",
    "ijcnn1_shape": "shape of ijcnn1",
    "covtype_shape": "shape of covtype",
    "hyper-cleaning": "hyper-cleaning",
}


def draw(folder: Path, numbers: dict[str, Any]) -> None:
    from experiments import _figures as style

    shown = [name for name in TITLES if any("curve" in found for found in numbers.get(name, {}).values())]
    if not shown:
        return
    figure = style.figure(13.5, 4.2 * -(-len(shown) // 3))
    colors = dict(zip(METHODS, (style.BLUE, style.GREEN, style.ORANGE, style.PINK, style.SKY), strict=True))
    colors |= {
        "implicit, all rows": style.INK, "implicit, minibatches": "#888888", "unrolled, minibatches": style.YELLOW,
        "jaxopt, implicit": "#8B5A2B", "jaxopt, unrolled": "#5A5A8B",
    }  # fmt: skip
    axes = figure.subplots(-(-len(shown) // 3), min(3, len(shown)), squeeze=False).ravel()
    lines = {}
    for ax, name in zip(axes, shown, strict=False):
        for method, found in numbers[name].items():
            for key, line in (("curve", "-"), ("curve_plain", style.DASHED)):
                seconds, score = (np.asarray(found.get(key, ((), ()))[i], float) for i in (0, 1))
                kept = np.isfinite(score) & (score > 0)
                (drawn,) = ax.loglog(seconds[kept], score[kept], color=colors[method], linestyle=line, linewidth=1.5)
                lines.setdefault(method, drawn)
        style.titled(ax, TITLES[name], xlabel="processor seconds", ylabel="‖∇F‖², exact")
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    names = [f"{name} (dashed: plain JAX)" if name in METHODS else name for name in lines]
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    style.save(figure, folder, colours=128)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--problem",
        type=int,
        choices=range(6),
        help="one alone: 1,024 rows, ijcnn1, 8,192, 32,768, covtype, hyper-cleaning",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *OTHERS], help="these alone; others stay as they were kept"
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, arguments=arguments, kept="measured.json")

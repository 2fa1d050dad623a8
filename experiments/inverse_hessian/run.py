"""How many products with the Hessian buy how much of its inverse?

    python experiments/inverse_hessian/run.py --seed 0 --json

The hypergradient of one decay per weight by each way to solve the adjoint system, against the dense inverse, on a
linear model (diabetes) and on a network (digits), both at their optimum; then what that does to tuning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments._common import experiment, progress
from experiments._data import digits
from experiments._figures import BLUE, DASHED, GREEN, INK, ORANGE, PINK, SKY, YELLOW, figure, save, titled

jax.config.update("jax_enable_x64", True)  # the curves go down to rounding

PROBES = 8  # products that the Jacobi preconditioner takes, which `info.linear_steps` leaves out


class Task(NamedTuple):
    """A problem at the optimum of its inner loss."""

    problem: hg.Problem
    params: Any
    hparams: Any
    train: Any
    valid: Any
    exact: np.ndarray  # hypergradient by the dense inverse
    eigenvalues: np.ndarray  # of the Hessian, ascending


class Curve(NamedTuple):
    """One method, with the relative error and the cosine of its hypergradient after so many products."""

    products: np.ndarray
    error: np.ndarray
    cosine: np.ndarray


def measure(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    tasks = {"linear": linear_task(options.seed)}
    if not options.smoke:
        tasks["network"] = network_task(options.seed)
    curves: dict[str, dict[str, Curve]] = {}
    for name, task in tasks.items():
        low, high = task.eigenvalues[0], task.eigenvalues[-1]
        found: dict[str, Any] = {"parameters": len(task.eigenvalues), "condition": high / low}
        curves[name], found["beyond_the_limit"] = compare(task, options.smoke)
        for method, curve in curves[name].items():
            found[method] = {f"cosine_{k}": cosine_at(curve, k) for k in (0, 5, 20)}
            found[method] |= {"lowest_error": np.min(curve.error), "error_20": error_at(curve, 20)}
        found["neumann_rate_ratio"] = rate(curves[name]["neumann"]) / np.log1p(-low / high)
        numbers[name] = found
    if not options.smoke:
        numbers["unconverged"] = unconverged(tasks["network"])
        numbers["tuning"] = tuning(options.seed)
    draw(tasks, curves, options.out)


def linear_task(seed: int) -> Task:
    """Ridge regression on diabetes, one decay per weight, all e^-7."""
    train, valid, _ = diabetes(seed)
    problem = hg.Problem(ridge, lambda w, log_decay, batch: squares(w, batch))
    return solved(problem, jnp.zeros(10), jnp.full(10, -7.0), train, valid)


def diabetes(seed: int) -> list[tuple[jax.Array, jax.Array]]:
    """Training, validation and test parts, standardised by the first."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    rows = np.array_split(np.random.default_rng(seed).permutation(len(y)), 3)
    x, y = (x - x[rows[0]].mean(0)) / x[rows[0]].std(0), (y - y[rows[0]].mean()) / y[rows[0]].std()
    return [(jnp.asarray(x[part]), jnp.asarray(y[part])) for part in rows]


def squares(w: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def ridge(w: jax.Array, log_decay: jax.Array, batch: Any) -> jax.Array:
    return squares(w, batch) + jnp.sum(jnp.exp(log_decay) * w**2)


def network_task(seed: int) -> Task:
    """A network of one hidden layer on digits, one decay per weight, all e^-6."""
    (x, y), valid, _ = digits(seed, [200, 400])
    train, valid = jax.tree.map(lambda a: jnp.asarray(a, float if a.ndim == 2 else None), ((x, y), valid))
    hidden = 12
    rng = np.random.default_rng(seed)
    params = {
        "hidden": {"w": jnp.asarray(rng.normal(size=(64, hidden)) / 8), "b": jnp.zeros(hidden)},
        "out": {"w": jnp.asarray(rng.normal(size=(hidden, 10)) / hidden**0.5), "b": jnp.zeros(10)},
    }

    def logits(w: Any, x: jax.Array) -> jax.Array:
        z = jnp.tanh(x @ w["hidden"]["w"] + w["hidden"]["b"][None])
        return z @ w["out"]["w"] + w["out"]["b"][None]

    def loss(z: jax.Array, w: Any, log_decay: Any, batch: Any) -> jax.Array:
        decay = jax.tree.map(lambda w, d: jnp.sum(jnp.exp(d) * w**2), w, log_decay)
        nll = optax.softmax_cross_entropy_with_integer_labels(z, batch[1])
        return jnp.mean(nll) + sum(jax.tree.leaves(decay))

    problem = hg.Problem(
        # hg.compose says where the network ends and the loss begins, which Gauss-Newton needs to know.
        hg.compose(lambda w, log_decay, batch: logits(w, batch[0]), loss),
        lambda w, _, batch: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(w, batch[0]), batch[1])),
    )
    return solved(problem, params, jax.tree.map(lambda w: jnp.full(w.shape, -6.0), params), train, valid)


def solved(problem: hg.Problem, params: Any, hparams: Any, train: Any, valid: Any) -> Task:
    """The task at the minimum of its inner loss, with the eigenvalues of the Hessian there."""
    solver = hg.implicit(problem, inner=hg.inner.lbfgs(tol=1e-9, max_steps=20_000), linear=hg.linear.dense())
    out, state = jax.jit(solver.hypergrad)(solver.init(params, hparams), hparams, train, valid)
    hg.raise_if_failed(out)
    best = solver.response(state, hparams)
    flat, unravel = jax.flatten_util.ravel_pytree(best)
    assert problem.inner_loss is not None
    inner = problem.inner_loss
    hessian = jax.jit(jax.hessian(lambda w: inner(unravel(w), hparams, train)))(flat)
    exact = np.asarray(jax.flatten_util.ravel_pytree(out.grad)[0])
    return Task(problem, best, hparams, train, valid, exact, np.linalg.eigvalsh(np.asarray(hessian)))


def compare(task: Task, smoke: bool) -> tuple[dict[str, Curve], dict[str, Any]]:
    """Every method at every budget, and the Neumann series beyond the limit of its step size."""
    n, high = len(task.eigenvalues), float(task.eigenvalues[-1])
    most = 30 if smoke else 500
    methods: dict[str, tuple[Any, dict[str, str], int]] = {
        "neumann": (hg.linear.neumann(max_steps=1, step_size=1 / high), {}, 0),
        "cg": (hg.linear.cg(max_steps=1), {}, 0),
        "gauss_newton": (hg.linear.cg(max_steps=1), {"curvature": "gauss_newton"}, 0),
        "cg_jacobi": (hg.linear.cg(max_steps=1, preconditioner=hg.linear.jacobi(PROBES)), {}, PROBES),
    }
    if n == 10:  # a linear model is its own Gauss-Newton approximation
        del methods["gauss_newton"]
    if smoke:
        del methods["cg_jacobi"]
    found, beyond = {}, {}
    for name, (linear, options, before) in progress(methods.items(), "methods"):
        run, state = call(task, linear, **options)
        points = []
        # The rate of the series shows when all but its slowest part is gone.
        budgets = [0, *np.geomspace(1, 10 * most, 30)] if name == "neumann" else np.geomspace(1, most, 24)
        for k in sorted({int(k) for k in budgets} | {5, 20}):
            points.append((k + before, *against(run(with_options(state, max_steps=jnp.int32(k)))[0], task.exact)))
        found[name] = curve(points)
        if name == "neumann":
            found["identity"] = Curve(*(column[:1] for column in found[name]))  # T1-T2 is the term K = 0
            grad, status = run(with_options(state, max_steps=jnp.int32(20), step_size=jnp.asarray(2.5 / high)))
            beyond = {"error": against(grad, task.exact)[0], "status": status}
    sketches = () if smoke else (5, 9) if n == 10 else (19, 99, 399)
    points = []
    for rank in sketches:
        run, state = call(task, hg.linear.nystrom(rank=rank, damping=1e-3))
        # The damping is chosen by the error itself: the best that it can do.
        tried = [run(with_options(state, damping=jnp.asarray(10.0**-d)))[0] for d in range(-1, 5)]
        points.append((rank + 1, *min(against(grad, task.exact) for grad in tried)))
    return found | ({"nystrom": curve(points)} if points else {}), beyond


def call(task: Task, linear: Any, **options: str) -> tuple[Callable[..., tuple[np.ndarray, str]], Any]:
    """`state -> (hypergradient, status)` at the parameters of the state, from which no step is taken; and a state."""
    here = hg.inner.gradient(optax.sgd(0.0), steps=0)
    solver = hg.implicit(task.problem, inner=here, linear=linear, **options)
    compiled = jax.jit(solver.hypergrad)

    def run(state: Any) -> tuple[np.ndarray, str]:
        out, _ = compiled(state, task.hparams, task.train, task.valid)
        return np.asarray(jax.flatten_util.ravel_pytree(out.grad)[0]), hg.Status(int(out.info.status)).name

    return run, solver.init(task.params, task.hparams)


def with_options(state: Any, **changed: Any) -> Any:
    """Budgets and step sizes travel in the state, so that new values compile nothing."""
    return state._replace(options=state.options | {"linear": state.options["linear"] | changed})


def against(grad: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Relative error and cosine."""
    size = np.linalg.norm(exact)
    return float(np.linalg.norm(grad - exact) / size), float(grad @ exact / (np.linalg.norm(grad) * size))


def curve(points: list[tuple[int, float, float]]) -> Curve:
    return Curve(*(np.asarray(column) for column in zip(*points, strict=True)))


def cosine_at(found: Curve, products: int) -> float | None:
    """The cosine of the largest budget within that many products; None if there is none."""
    within = found.products <= products
    return float(found.cosine[within][-1]) if within.any() else None


def error_at(found: Curve, products: int) -> float | None:
    within = found.products <= products
    return float(found.error[within][-1]) if within.any() else None


def rate(found: Curve) -> float:
    """The slope of log error against the number of products, over the last half of those above rounding."""
    keep = (found.error > 1e-8) & (found.products > 0)
    k, error = found.products[keep], found.error[keep]
    late = k >= k[-1] / 2
    return float(np.polyfit(k[late], np.log(error[late]), 1)[0])


def unconverged(task: Task) -> dict[str, str]:
    """What CG says of the network after 30 steps of training in place of the optimum."""
    rng = np.random.default_rng(0)
    start = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)) / max(w.shape) ** 0.5, task.params)
    found = {}
    for name, curvature in (("cg", "hessian"), ("gauss_newton", "gauss_newton")):
        short = hg.inner.gradient(optax.sgd(0.1), steps=30)
        solver = hg.implicit(task.problem, inner=short, linear=hg.linear.cg(max_steps=100), curvature=curvature)
        out, _ = jax.jit(solver.hypergrad)(solver.init(start, task.hparams), task.hparams, task.train, task.valid)
        found[name] = hg.Status(int(out.info.status)).name
    return found


def tuning(seed: int, steps: int = 100) -> dict[str, Any]:
    """Test error on diabetes with ten decays tuned, each outer step with 20 products, and what rivals make of it."""
    train, valid, test = diabetes(seed)
    problem = hg.Problem(ridge, lambda w, log_decay, batch: squares(w, batch))
    start = jnp.full(10, -7.0)

    @jax.jit
    def retrained(log_decay: jax.Array) -> jax.Array:
        """From scratch, in closed form."""
        x, y = train
        return jnp.linalg.solve(x.T @ x / len(y) + jnp.diag(jnp.exp(log_decay)), x.T @ y / len(y))

    grid = jnp.linspace(-10, 4, steps)  # as many inner solves as the tuning has
    single = grid[int(np.argmin([float(squares(retrained(jnp.full(10, d)), valid)) for d in grid]))]
    found: dict[str, Any] = {
        "plain": squares(retrained(start), test),
        "single": squares(retrained(jnp.full(10, single)), test),
    }
    for name, linear in {"neumann": hg.linear.neumann(max_steps=20), "cg": hg.linear.cg(max_steps=20)}.items():
        solver = hg.implicit(problem, linear=linear)
        result = hg.tune(solver, jnp.zeros(10), start, train, valid, outer=optax.adam(0.2), steps=steps, progress=False)
        found[name] = {
            "steps": len(result.history.value),
            "valid": result.best.value,
            "tuned": squares(result.best.params, test),
            "retrain": squares(retrained(result.best.hparams), test),
        }
    return found


def draw(tasks: dict[str, Task], curves: dict[str, dict[str, Curve]], folder: Path) -> None:
    styles = {
        "identity": ("identity (T1-T2)", INK, "o"),
        "neumann": ("Neumann", ORANGE, ""),
        "nystrom": ("Nyström", PINK, "s"),
        "gauss_newton": ("Gauss-Newton CG", YELLOW, ""),
        "cg": ("CG", BLUE, ""),
        "cg_jacobi": ("CG, Jacobi", SKY, ""),
    }
    picture = figure(12.5, 4.9)
    panels = picture.subplots(1, 2, squeeze=False)[0]
    titles = {
        "linear": "Linear model, diabetes: {n} decays, condition {c:,.0f}",
        "network": "Network, digits: {n:,} decays, condition {c:,.0f}",
    }
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        for method, (label, color, marker) in styles.items():
            if method in curves[name]:
                found = curves[name][method]
                line = "" if method == "identity" else "-"
                axes.plot(
                    found.products, found.error, line, marker=marker, markersize=5, color=color, label=label, lw=2
                )
        low, high = task.eigenvalues[0], task.eigenvalues[-1]
        k = np.arange(curves[name]["neumann"].products[-1])
        factor = (1 - low / high) ** (k + 1)
        last = curves[name]["neumann"].error[-1] / factor[-1]
        axes.plot(k, last * factor, color=GREEN, linestyle=DASHED, lw=1.4, label="∝ (1 − αμ)$^{K+1}$")
        titled(
            axes,
            titles[name].format(n=len(task.eigenvalues), c=high / low),
            xscale="symlog",
            yscale="log",
            xlabel="products with the Hessian",
            xlim=(-0.2, 6000),
            ylim=(1e-10, 30),
        )
        axes.set_xticks([0, 1, 5, 20, 100, 500, 5000], ["0", "1", "5", "20", "100", "500", "5000"])
    panels[0].set_ylabel("relative error of the hypergradient")
    panels[len(tasks) - 1].legend(frameon=False, fontsize=9, loc="lower left")
    save(picture, folder, "course.png")


def drawing(results: dict[str, Any]) -> Any:
    from experiments import _figures as style

    return style.panels(
        results,
        (
            "Diabetes, 20 products",
            "cosine to the hypergradient",
            {
                "identity (T1-T2)": ("linear.identity.cosine_20", style.INK),
                "Neumann": ("linear.neumann.cosine_20", style.ORANGE),
                "Nyström": ("linear.nystrom.cosine_20", style.GREEN),
                "CG": ("linear.cg.cosine_20", style.BLUE),
                "CG with Jacobi": ("linear.cg_jacobi.cosine_20", style.SKY),
            },
        ),
        (
            "Network, 20 products",
            "cosine to the hypergradient",
            {
                "identity (T1-T2)": ("network.identity.cosine_20", style.INK),
                "Neumann": ("network.neumann.cosine_20", style.ORANGE),
                "Nyström": ("network.nystrom.cosine_20", style.GREEN),
                "CG": ("network.cg.cosine_20", style.BLUE),
                "CG with Jacobi": ("network.cg_jacobi.cosine_20", style.SKY),
                "Gauss-Newton CG": ("network.gauss_newton.cosine_20", style.PINK),
            },
        ),
    )


if __name__ == "__main__":
    experiment(__file__, __doc__, measure, draw=drawing)

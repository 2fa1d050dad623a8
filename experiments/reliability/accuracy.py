"""P1, P3, P4: what OK is worth, on random problems whose hypergradient is known from dense linear algebra."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad import Status

ROWS, WIDTH, CLASSES = 60, 48, 3
KINDS = ("ridge", "logistic", "softmax", "poisson", "quadratic")
Data = dict[str, Any]


def fit(kind: str, w: Any, batch: Data) -> Any:
    """Data term, of curvature at most about 1."""
    x, y = batch["x"], batch["y"]
    if kind == "softmax":
        z = x @ w.reshape(-1, CLASSES)
        return jnp.sum(jax.nn.logsumexp(z, 1) - jnp.take_along_axis(z, batch["label"][:, None], 1)[:, 0])
    z = x @ w
    if kind == "logistic":
        return jnp.sum(jax.nn.softplus(-jnp.sign(y) * z))
    if kind == "poisson":
        return jnp.sum(jnp.exp(z) - jnp.round(jnp.abs(y)) * z)
    if kind == "ridge":
        return 0.5 * jnp.sum((z - y) ** 2)
    return 0.5 * jnp.sum(z**2) - batch["b"] @ w


def problem(kind: str) -> hg.Problem:
    return hg.Problem(
        lambda w, h, b: fit(kind, w, b) + 0.5 * jnp.exp(h) * jnp.sum(w**2), lambda w, h, b: fit(kind, w, b)
    )


def draw(rng: np.random.Generator, kind: str, most: float) -> tuple[float, Data, Data]:
    """`(h, train, valid)`: the Hessian's condition number is at most about 1/e^h, log-uniform in [1, `most`]; between 2
    and 48 parameters, the others padded with features of zero."""
    h = -np.log(most) * rng.uniform()
    width = WIDTH // CLASSES if kind == "softmax" else WIDTH
    used = int(rng.integers(2, width + 1))
    spectrum = np.exp(0.5 * np.linspace(0, h, used))
    turn = np.linalg.qr(rng.normal(size=(used, used)))[0]
    weights = rng.normal(size=used)

    def data() -> Data:
        x = np.zeros((ROWS, width))
        x[:, :used] = np.linalg.qr(rng.normal(size=(ROWS, used)))[0] * spectrum @ turn.T
        y = x[:, :used] @ weights + 0.3 * rng.normal(size=ROWS)
        label = rng.integers(0, CLASSES, ROWS).astype(np.int32)
        return {"x": x, "y": y, "label": label, "b": np.pad(turn @ (spectrum**2 * weights), (0, width - used))}

    return h, data(), data()


def dense(kind: str) -> Any:
    """`(h, train, valid) -> (g, scale, ‖F‖)` by Newton's method and one solve with the Hessian, in float64.

    The scale is that of the error metric, max(‖g‖, 10⁻³ ‖∂²_λw h‖ ‖H⁻¹ ∂_w f‖).
    """

    def solve(h: Any, train: Data, valid: Data) -> Any:
        loss = lambda w: fit(kind, w, train) + 0.5 * jnp.exp(h) * jnp.sum(w**2)
        grad, hessian = jax.grad(loss), jax.hessian(loss)

        def newton(_: Any, w: Any) -> Any:
            step = jnp.linalg.solve(hessian(w), grad(w))
            sizes = 0.5 ** jnp.arange(12.0)
            norms = jax.vmap(lambda t: jnp.linalg.norm(grad(w - t * step)))(sizes)
            return w - sizes[jnp.nanargmin(norms)] * step

        w = jax.lax.fori_loop(0, 25, newton, jnp.zeros(WIDTH))
        rhs = jax.grad(lambda w: fit(kind, w, valid))(w)
        v = jnp.linalg.solve(hessian(w), rhs)
        cross = jnp.exp(h) * w
        g = -cross @ v
        return g, jnp.maximum(jnp.abs(g), 1e-3 * jnp.linalg.norm(cross) * jnp.linalg.norm(v)), jnp.linalg.norm(grad(w))

    return jax.jit(jax.vmap(solve))


def stacked(draws: list[tuple[float, Data, Data]], dtype: Any) -> tuple[Any, Data, Data]:
    cast = lambda *x: jnp.asarray(np.stack(x), dtype if np.asarray(x[0]).dtype.kind == "f" else None)
    return jax.tree.map(cast, *draws)


class Measured(NamedTuple):
    """One row a problem: relative error of the hypergradient, status, estimate of that error, and what proves it to be
    at most (relative to the same scale); NaN where no bound is known."""

    error: np.ndarray
    status: np.ndarray
    estimate: np.ndarray
    bound: np.ndarray


def known(kind: str) -> Any:
    """What is known of a problem: features have singular values of at most 1, and so have rows at most that norm."""
    outer, hessian = {"ridge": (1.0, 0.0), "logistic": (0.25, 1 / (6 * np.sqrt(3)))}[kind]
    return lambda h: hg.Regularity(strong_convexity=jnp.exp(h), outer_gradient=outer, cross=jnp.exp(h), hessian=hessian)


def measure(seed: int, kind: str, count: int, most: float, dtype: Any, budgets: bool = False) -> Measured:
    """`count` random problems, each from zero with default options; with `budgets`, the steps of either solver are
    log-uniform in [1, 1000], and the bound is asked for."""
    rng = np.random.default_rng([seed, KINDS.index(kind), int(most)])
    draws = [draw(rng, kind, most) for _ in range(count)]
    inner, linear = (np.round(10 ** rng.uniform(0, 3, count)).astype(np.int32) for _ in range(2))
    exact, scale, left = dense(kind)(*stacked(draws, jnp.float64))
    solver = hg.implicit(problem(kind), regularity=known(kind) if budgets else None)

    def run(h: Any, train: Data, valid: Data, inner: Any, linear: Any) -> Any:
        state = solver.init(jnp.zeros(WIDTH, dtype), h)
        if budgets:
            state.options["inner"]["max_steps"], state.options["linear"]["max_steps"] = inner, linear
        out = solver.hypergrad(state, h, train, valid)[0]
        info = out.info
        return out.grad, info.status, info.error_estimate, info.extra.get("error_bound", jnp.nan)

    grad, status, estimate, bound = jax.jit(jax.vmap(run))(
        *stacked(draws, dtype), jnp.asarray(inner), jnp.asarray(linear)
    )
    error = np.abs(np.asarray(grad, np.float64) - np.asarray(exact)) / np.asarray(scale)
    found = (error, status, estimate, np.asarray(bound) / np.asarray(scale))
    return Measured(*(np.asarray(x, np.float64)[np.asarray(left) < 1e-9] for x in found))


def together(found: list[Measured]) -> Measured:
    return Measured(*(np.concatenate(x) for x in zip(*found, strict=True)))


def p1(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """OK means an error of at most 1e-5 in float64, 3e-3 in float32; in float64 it is said of nearly all."""
    count = 10 if smoke else 200
    texts, met = [], True
    for dtype, most, bar, wanted in ((jnp.float64, 5e5, 1e-5, Status.OK), (jnp.float32, 1e3, 3e-3, Status.INSENSITIVE)):
        error, status, *_ = together([measure(seed, kind, count, most, dtype) for kind in KINDS])
        ok, usable = status == Status.OK, status <= Status.INSENSITIVE
        wrong = int(np.sum(usable & ~(error <= bar)))
        texts.append(
            f"{dtype.__name__}: OK {ok.sum()} of {len(ok)} (usable {usable.sum()}), worst error of what is usable "
            f"{error[usable].max():.1e}, {wrong} above {bar:.0e}"
        )
        met &= wrong == 0 and np.mean(status <= wanted) >= 0.95
    return "; ".join(texts), "0 above; OK on >= 95 % (float32: usable)", bool(met)


def budgeted(seed: int, smoke: bool) -> Measured:
    rounds, count = (1, 20) if smoke else (5, 1000)
    return together(
        [measure(seed + 100 * r, k, count, 1e4, jnp.float64, True) for r in range(rounds) for k in KINDS[:2]]
    )


def p3(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """OK is never more than 10 % wrong, whatever the budgets; what is accurate is seldom flagged."""
    error, status, *_ = budgeted(seed, smoke)
    ok, accurate = status <= Status.INSENSITIVE, error <= 1e-8
    wrong, flagged = int(np.sum(ok & ~(error <= 0.1))), float(np.mean(~ok[accurate]))
    figure = f"{wrong} of {len(error)} usable and > 10 % wrong; {100 * flagged:.1f} % of those right to 1e-8 flagged"
    return figure, "0 wrong; flagged <= 10 %", wrong == 0 and flagged <= 0.1


def p4(seed: int, smoke: bool) -> tuple[str, str, bool]:
    """The bound that `regularity=` buys holds, whatever the budgets; the estimate that comes for nothing, nearly."""
    error, status, estimate, bound = budgeted(seed, smoke)
    usable, held = status <= Status.INSENSITIVE, bound >= error
    above = usable & (estimate >= np.where(error < 1e-14, 0, error))
    figure = (
        f"bound >= error in {int(np.sum(held))} of {len(error)}, where usable by a median factor of "
        f"{np.median((bound / np.maximum(error, 1e-16))[usable]):.0f}; error_estimate >= error in {int(np.sum(above))} "
        f"of the {int(usable.sum())} usable"
    )
    return figure, f"{len(error)} of {len(error)}", bool(np.all(held))

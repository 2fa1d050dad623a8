"""A solver written by hand: ridge regression on an orthogonal design, w = c / (s + l2), differentiated through that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hypergrad import domains
from hypergrad._data import draw
from hypergrad._solver import Hypergradient, Info, Solver, Status
from hypergrad.outer import Result, tune


def data(seed=6, n=30, d=6):
    """Train and validation pairs; NumPy, as a user has them."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    pairs = []
    for _ in range(2):
        x = np.linalg.qr(rng.normal(size=(n, d)))[0] * np.sqrt(n) * np.linspace(0.5, 1.5, d)
        pairs.append((x, x @ w + 2 * rng.normal(size=n)))
    return pairs


def weights(hparams, train):
    x, y = train
    return x.T @ y / len(y) / (jnp.mean(x**2, 0) + hparams["l2"])


def outer_loss(w, valid):
    return jnp.mean((valid[0] @ w - valid[1]) ** 2)


def info(status: Any = Status.OK, **extra: Any) -> Info:
    nothing: Any = float("nan")  # numbers that are no arrays, as a person writes them
    one: Any = 1
    return Info(status, nothing, nothing, one, one, nothing, extra)


def ridge(spoil: Callable | None = None) -> Solver:
    """State: the weights and the number of calls. `spoil(calls, value, grad, status)` plants faults."""

    def init(params, hparams, *, key=None, model_state=None):
        return {"params": params, "calls": jnp.int32(0)}

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        train, valid = draw(train, key, 0), draw(valid, key, 0)

        def value(h):
            w = weights(h, train)
            return outer_loss(w, valid), w

        (loss, w), grad = jax.value_and_grad(value, has_aux=True)(hparams)
        status = jnp.int32(Status.OK)
        if spoil is not None:
            loss, grad, status = spoil(state["calls"], loss, grad, status)
        out = Hypergradient(loss, grad, info(status, norm=jnp.sum(w**2)), {"rmse": jnp.sqrt(loss)})
        return out, {"params": w.astype(state["params"].dtype), "calls": state["calls"] + 1}

    return Solver(init, hypergrad, lambda state, hparams: state["params"])


def optimum(train, valid):
    """The best l2 and its outer loss, by golden section over log(l2) in NumPy, on the normal equations."""

    def value(u):
        x, y = train
        w = np.linalg.solve(x.T @ x / len(y) + np.exp(u) * np.eye(x.shape[1]), x.T @ y / len(y))
        return np.mean((valid[0] @ w - valid[1]) ** 2)

    a, b, g = -8.0, 5.0, (np.sqrt(5) - 1) / 2
    for _ in range(80):
        c, d = b - g * (b - a), a + g * (b - a)
        a, b = (a, d) if value(c) < value(d) else (c, b)
    return float(np.exp((a + b) / 2)), float(value((a + b) / 2))


def counted(solver: Solver) -> tuple[Solver, list[int]]:
    """The same solver, and a list that grows by one for each trace of `hypergrad`."""
    traces: list[int] = []

    def hypergrad(*args, **kwargs):
        traces.append(1)
        return solver.hypergrad(*args, **kwargs)

    return solver._replace(hypergrad=hypergrad), traces


TRAIN, VALID = data()
START = jnp.zeros(6)


def run(solver=None, hparams=None, *, steps=20, outer=None, **options) -> Result:
    options = {"train": TRAIN, "valid": VALID, "domain": domains.log(), "progress": False} | options
    return tune(
        solver or ridge(),
        START,
        {"l2": 0.01} if hparams is None else hparams,
        options.pop("train"),
        options.pop("valid"),
        outer=outer or optax.adam(0.3),
        steps=steps,
        **options,
    )

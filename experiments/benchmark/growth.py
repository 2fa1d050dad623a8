"""V10, V13: how the cost of a hypergradient grows with each size of a problem, and loops that hold convolutions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from implicit import later
from loop import network
from report import Check, Setting, result
from timing import compiled, interleaved
from unroll import training

import hypergrad as hg

_PRODUCTS = 5
_MILLION = (64, 964, 964, 10)  # widths of a network of 1,002,570 parameters


class _Case(NamedTuple):
    """A hypergradient, and the gradient or the training run whose growth it is compared with."""

    solver: hg.Solver
    params: Any
    hparams: Any
    train: Any
    valid: Any
    reference: Callable[[Any, Any, Any], Any]  # (params, hparams, train)


class _Cost(NamedTuple):
    calls: dict[str, Callable[[], Any]]
    megabytes: float
    compile_seconds: dict[str, float]


def _measured(case: _Case, name: str) -> _Cost:
    """What the compiler says, and the calls to be timed: as a loop makes them, with what the state knows."""
    first = case.solver.init(case.params, case.hparams)
    data = case.hparams, case.train, case.valid
    jax.clear_caches()
    begin = time.process_time()
    ours, megabytes = compiled(case.solver.hypergrad, first, *data)
    middle = time.process_time()
    reference, _ = compiled(case.reference, case.params, case.hparams, case.train)
    end = time.process_time()
    after = ours()[1]
    state = first._replace(trust=after.trust) if hasattr(first, "trust") else later(first, after)
    calls = {name: lambda: ours(state, *data)[0].grad, f"{name}, reference": reference}
    return _Cost(calls, megabytes, {"": middle - begin, "reference": end - middle})


def _logistic(rows: int, features: int, groups: int, seed: int) -> _Case:
    """T1 with fixed budgets, so that any two sizes take the same number of gradients and products."""
    task = tasks.logistic(rows, features, seed=seed)
    train, valid = jax.tree.map(jnp.asarray, (task.train, task.valid))
    problem = tasks.grouped(np.arange(features) % groups)
    inner = hg.inner.gradient(optax.sgd(0.5), steps=10)
    solver = hg.implicit(problem, inner=inner, linear=hg.linear.cg(max_steps=10))
    hparams = jnp.full(groups, np.log(1e-3), jnp.float32)
    return _Case(solver, jnp.zeros(features), hparams, train, valid, jax.grad(problem.inner_loss))


def _unrolled(rows: int, steps: int, seed: int) -> _Case:
    """T2, with a weight for each row."""
    params, hparams, train, valid = tasks.cleaning(seed=seed, n=rows)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    optimizer = optax.sgd(0.5)
    solver = hg.unrolled(tasks.CLEANING, inner=hg.inner.gradient(optimizer, steps=steps), mode="reverse")
    return _Case(solver, params, hparams, train, valid, training(tasks.CLEANING, optimizer, steps))


def _layers(count: int) -> _Case:
    """Tanh layers of 16 units, two leaves each."""
    problem, params = network(count)
    inner = hg.inner.gradient(optax.sgd(0.01), steps=10)
    solver = hg.implicit(problem, inner=inner, linear=hg.linear.cg(max_steps=10))
    x = jax.random.normal(jax.random.key(0), (64, 16))
    return _Case(solver, params, jnp.asarray(-3.0), x, x, jax.grad(problem.inner_loss))


def _decays(seed: int, widths: tuple[int, ...], batch: int) -> _Case:
    """T3 at any width: a decay for each parameter, a Neumann series at a given point."""
    params, hparams, train, valid = tasks.mlp(seed=seed, widths=widths, batch=batch)
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    here = hg.inner.gradient(optax.sgd(0.0), steps=0)
    solver = hg.implicit(tasks.MLP, inner=here, linear=hg.linear.neumann(max_steps=_PRODUCTS, step_size=0.01))

    def by_hand(params: Any, hparams: Any, train: Any) -> Any:
        """The same products in plain JAX: F, ∂_w f, K products with the Hessian, one with ∂²_{λw} h."""
        (rhs, direct) = jax.grad(tasks.MLP.outer_loss, argnums=(0, 1))(params, hparams, valid)
        slope = lambda w, h: jax.grad(tasks.MLP.inner_loss)(w, h, train)
        residual, pull = jax.vjp(slope, params, hparams)

        def add(_: int, carry: Any) -> Any:
            term, total = carry
            term = jax.tree.map(lambda t, p: t - 0.01 * p, term, pull(term)[0])
            return term, jax.tree.map(jnp.add, total, term)

        adjoint = jax.lax.fori_loop(0, _PRODUCTS, add, (rhs, rhs))[1]
        cross = pull(jax.tree.map(lambda v: 0.01 * v, adjoint))[1]
        return jax.tree.map(jnp.subtract, direct, cross), residual

    return _Case(solver, params, hparams, train, valid, by_hand)


def v10(setting: Setting) -> dict[str, Any]:
    """Ten times as many rows, features, steps, hyperparameters or leaves; and a million decays of a million parameters.

    Time is compared with the growth of one gradient (of the training run for steps, of the gradient's compilation for
    leaves); memory may grow tenfold, and a tenth more.
    """
    seed = setting.seed
    if setting.smoke:
        pairs = {"steps": (_unrolled(100, 2, seed), _unrolled(100, 20, seed))}
    else:
        base, wide = _logistic(2000, 100, 10, seed), _logistic(2000, 1000, 10, seed)
        pairs = {
            "rows": (base, _logistic(20_000, 100, 10, seed)),
            "features": (base, wide),
            "hyperparameters": (wide, _logistic(2000, 1000, 100, seed)),
            "steps": (_unrolled(2000, 100, seed), _unrolled(2000, 1000, seed)),
            "leaves": (_layers(1), _layers(10)),
        }
    checks, figures = [], {}
    for what, (small, large) in pairs.items():
        costs = {"base": _measured(small, "base"), "tenfold": _measured(large, "tenfold")}
        times = interleaved(costs["base"].calls | costs["tenfold"].calls, samples=setting.samples, seconds=30)
        growth = {
            "time": times.ratio("tenfold", "base"),
            "time of the reference": times.ratio("tenfold, reference", "base, reference"),
            "memory": costs["tenfold"].megabytes / costs["base"].megabytes,
            "compilation": costs["tenfold"].compile_seconds[""] / costs["base"].compile_seconds[""],
            "compilation of the reference": costs["tenfold"].compile_seconds["reference"]
            / costs["base"].compile_seconds["reference"],
        }
        figures[what] = growth | {
            "ms": {k: times.ms(k) for k in times.seconds},
            "MB": {k: cost.megabytes for k, cost in costs.items()},
            "compile, s": {k: cost.compile_seconds for k, cost in costs.items()},
        }
        relative = growth["time"] / growth["time of the reference"]
        made = growth["compilation"] / (growth["compilation of the reference"] if what == "leaves" else 1)
        checks += [
            Check(f"{what} × 10: time, growth over that of its products", relative, "<=", 1.1),
            Check(f"{what} × 10: temporary memory, growth", growth["memory"], "<=", 11),
            Check(f"{what} × 10: compilation, growth" + " over a gradient's" * (what == "leaves"), made, "<=", 1.1),
        ]
    case = _decays(seed, (64, 16, 10) if setting.smoke else _MILLION, 32 if setting.smoke else 128)
    cost = _measured(case, "hypergrad")
    times = interleaved(cost.calls, samples=3 if setting.smoke else 7)
    size = sum(x.size for x in jax.tree.leaves(case.params))
    words = cost.megabytes * 1e6 / 4 / size
    ratio = times.ratio("hypergrad", "hypergrad, reference")
    figures["a million by a million"] = {
        "parameters": size,
        "temporaries, in parameters": words,
        "ms": {k: times.ms(k) for k in times.seconds},
    }
    checks += [
        Check("a million decays of a million parameters: temporaries, in parameters", words, "<=", 10),
        Check("a million decays of a million parameters: time over the same products by hand", ratio, "<=", 1.1),
    ]
    return result(checks, figures)


def v13(setting: Setting) -> dict[str, Any]:
    """Eight training steps of a small CNN inside a call, and eight plain ones."""
    rng = np.random.default_rng(setting.seed)
    images, labels = tasks.digits(rng)
    rows = 32 if setting.smoke else 128
    train, valid = ((images[i : i + rows].reshape(-1, 8, 8, 1), labels[i : i + rows]) for i in (0, rows))
    train, valid = jax.tree.map(jnp.asarray, (train, valid))
    channels = (1, 4, 4) if setting.smoke else (1, 16, 32)
    params = {
        "kernels": [
            jnp.asarray(rng.standard_normal((3, 3, i, o)) / np.sqrt(9 * i), jnp.float32)
            for i, o in itertools.pairwise(channels)
        ],
        "head": jnp.asarray(rng.standard_normal((channels[-1], 10)) / np.sqrt(channels[-1]), jnp.float32),
    }

    def outer(w: Any, h: Any, batch: Any) -> jax.Array:
        x = batch[0]
        for kernel in w["kernels"]:
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            )
        return jnp.mean(tasks.softmax_loss(x.mean((1, 2)) @ w["head"], batch[1]))

    def inner(w: Any, h: Any, batch: Any) -> jax.Array:
        return outer(w, h, batch) + jnp.exp(h) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))

    problem, optimizer, steps = hg.Problem(inner, outer), optax.adam(1e-3), 8
    solver = hg.implicit(
        problem, inner=hg.inner.gradient(optimizer, steps=steps), linear=hg.linear.identity(step_size=0.1)
    )
    h = jnp.asarray(-6.0)
    state = solver.init(params, h)
    inside = jax.jit(lambda state, h, train, valid: solver.evaluate(state, h, train, valid)[0])

    @jax.jit
    def step(w: Any, opt: Any, h: Any, batch: Any) -> Any:
        updates, opt = optimizer.update(jax.grad(inner)(w, h, batch), opt, w)
        return optax.apply_updates(w, updates), opt

    value = jax.jit(outer)

    def plain() -> Any:
        w, opt = params, optimizer.init(params)
        for _ in range(steps):
            w, opt = step(w, opt, h, train)
        return value(w, h, valid)

    candidates = {"inside a call": lambda: inside(state, h, train, valid), "plain": plain}
    gap = abs(float(candidates["inside a call"]()) / float(plain()) - 1)
    times = interleaved(candidates, samples=setting.samples)
    checks = [
        Check("small CNN: eight steps inside a call / eight plain", times.ratio("inside a call", "plain"), "<=", 1.5)
    ]
    return result(checks, {"ms": {k: times.ms(k) for k in candidates}, "relative gap of the losses": gap})

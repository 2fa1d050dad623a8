"""One of each kind as a user writes it, outside the package, in at most twenty lines: tuned with, resumed, checked.

CONTRIBUTING says which files each of them touches where it moves into the package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from tests._helpers import assert_trees_equal, tol


def norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def solver_by_backpropagation(problem: hg.Problem, *, rate: float, steps: int) -> hg.Solver:
    """A method: gradient descent, differentiated by JAX."""

    def trained(params, hparams, batch):
        slope = jax.grad(problem.inner_loss)
        step = lambda w, _: (w - rate * slope(w, hparams, batch), None)
        return jax.lax.scan(step, params, length=steps)[0]

    def hypergrad(state, hparams, train=None, valid=None, *, key=None):
        def outer(hparams):
            params = trained(state, hparams, train)
            return problem.outer_loss(params, hparams, valid), params

        (value, params), grad = jax.value_and_grad(outer, has_aux=True)(hparams)
        nothing, zero = jnp.full_like(value, jnp.nan), jnp.full_like(value, 0)
        info = hg.Info(jnp.int32(hg.Status.OK), nothing, nothing, jnp.int32(steps), jnp.int32(0), zero, {})
        return hg.Hypergradient(value, grad, info, {}), params

    return hg.Solver(lambda params, hparams, *, key=None, model_state=None: params, hypergrad, lambda s, h: s)


def linear_richardson(*, step_size: float, max_steps: int) -> hg.linear.Linear:
    """A linear solver: v ← v + α (b − A v)."""

    def solve(matvec, rhs, *, start, precondition, options, key):
        def gap(v):
            return jax.tree.map(jnp.subtract, rhs, matvec(v))

        def step(_, v):
            return jax.tree.map(lambda v, r: v + options["step_size"] * r, v, gap(v))

        v = jax.lax.fori_loop(0, max_steps, step, start)
        inverse = lambda r: jax.tree.map(lambda x: options["step_size"] * x, r)
        steps, status = jnp.int32(max_steps + 1), jnp.int32(hg.Status.OK)
        return hg.linear.LinearResult(v, norm(gap(v)), steps, status, inverse)

    return hg.linear.Linear(solve, {"step_size": step_size}, claims=False, symmetric=False)


def inner_descent(*, rate: float, tol: float) -> hg.inner.Inner:
    """An inner solver: gradient descent until the gradient is small."""

    def slope(objective, params, hparams):
        return jax.grad(objective.fixed)(params, hparams)

    def solve(objective, params, state, hparams, model_state, *, scale, options):
        def step(carry):
            params, grads, steps = carry
            params = jax.tree.map(lambda w, g: w - rate * g, params, grads)
            return params, slope(objective, params, hparams), steps + 1

        proceed = lambda carry: (norm(carry[1]) > options["tol"] * scale) & (carry[2] < 5000)
        params, grads, steps = jax.lax.while_loop(proceed, step, (params, slope(objective, params, hparams), 0))
        status = jnp.where(steps < 5000, hg.Status.OK, hg.Status.INNER_MAX_STEPS).astype(jnp.int32)
        return hg.inner.InnerResult(params, state, model_state, norm(grads), steps, status)

    return hg.inner.Inner(lambda params, hparams: (), solve, {"tol": tol}, claims=True, symmetric=True, residual=slope)


def domain_above(least: float) -> hg.domains.Domain:
    """A domain: λ > least, through an exponential."""
    return hg.domains.Domain(
        f"above({least:g})",
        to_constrained=lambda u: least + jnp.exp(u),
        to_unconstrained=lambda x: jnp.log(x - least),
        settle=lambda u, before: jnp.clip(u, before - 3, before + 3),
        contains=lambda x: x > least,
        requirement=f"greater than {least:g}",
        remedy="start above it",
    )


def controller_that_halves(*, length: float) -> hg.outer.Controller:
    """A controller: gradient descent whose step doubles where the outer loss fell, and is halved until it does."""

    def init(u):
        return {"u": u, "grad": jax.tree.map(jnp.zeros_like, u), "value": jnp.inf, "length": length}

    def update(grad, s, u, out):
        accepted = out.value < s["value"]
        shorter = s | {"length": s["length"] * jnp.where(jnp.isfinite(out.value), 0.5, 0.1)}
        here = {"u": u, "grad": grad, "value": out.value, "length": 2 * s["length"]}
        s = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), here, shorter)
        return jax.tree.map(lambda u, g: u - s["length"] * g, s["u"], s["grad"]), s, accepted

    return hg.outer.Controller(init, update)


def response_affine() -> hg.responses.Response:
    """A response: the parameters plus a tensor times each hyperparameter."""

    def init(key, params, hparams):
        (h,) = jax.tree.leaves(hparams)
        return hg.responses.Weights(params, jax.tree.map(lambda w: jnp.zeros((h.size, *w.shape), w.dtype), params))

    def apply(weights, hparams, centre=None):
        (h,), (c,) = jax.tree.leaves(hparams), jax.tree.leaves(centre)
        return jax.tree.map(lambda w, s: w + jnp.tensordot(jnp.ravel(h - c), s, 1), *weights)

    return hg.responses.Response(init, apply, centred=True)


class Log:
    """A logger: a line a step, wherever it may go."""

    def __init__(self, write: Callable[[str], Any]):
        self.write = write

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        self.write(f"{step} {metrics['value']:.6f} {float(metrics['hparams']):.6f}")


KINDS = [
    solver_by_backpropagation,
    linear_richardson,
    inner_descent,
    domain_above,
    controller_that_halves,
    response_affine,
    Log,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_of_each_kind_is_at_most_twenty_lines(kind):
    lines = [line for line in inspect.getsource(kind).splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 20


X = np.random.default_rng(0).normal(size=(24, 3))
Y = X @ np.asarray([1.0, -2.0, 0.5]) + 0.5 * np.random.default_rng(1).normal(size=24)
TRAIN, VALID = (jnp.asarray(X[:12]), jnp.asarray(Y[:12])), (jnp.asarray(X[12:]), jnp.asarray(Y[12:]))
START = jnp.zeros(3)


def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


PROBLEM = hg.Problem(lambda w, h, batch: error(w, batch) + h * jnp.sum(w**2), lambda w, h, batch: error(w, batch))


def tune(solver: hg.Solver, steps: int, **options: Any) -> hg.Result:
    options = {"outer": optax.adam(0.1), "key": jax.random.key(0), "progress": False} | options
    return hg.tune(solver, START, 0.8, TRAIN, VALID, steps=steps, **options)


SOLVERS = {
    "solver": lambda: solver_by_backpropagation(PROBLEM, rate=0.1, steps=80),
    "linear": lambda: hg.implicit(PROBLEM, linear=linear_richardson(step_size=0.1, max_steps=80)),
    "inner": lambda: hg.implicit(PROBLEM, inner=inner_descent(rate=0.1, tol=tol(1e-8, 1e-5))),
    "response": lambda: hg.hypernetwork(
        PROBLEM, response=response_affine(), optimizer=optax.adam(0.03), steps=100, scale=0.05
    ),
    "domain, controller and logger": lambda: hg.implicit(PROBLEM),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_one_from_outside_is_tuned_with_resumed_to_the_bit_and_checked(name, tmp_path):
    solver, lines, outer = SOLVERS[name](), [], name.startswith("domain")
    options: dict[str, Any] = {}
    if outer:
        options = {"domain": domain_above(0.01), "outer": controller_that_halves(length=2.5)}
        options |= {"callbacks": Log(lines.append)}
    whole = tune(solver, 6, **options)
    history = whole.history
    assert history.value[-1] < history.value[0]
    assert np.all(history.usable)
    assert list(np.flatnonzero(~history.accepted)) == ([3, 5] if outer else [])

    kept, lines[:] = list(lines), []
    tune(solver, 4, checkpoint=tmp_path, every=2, **options)  # ends in the middle of the controller's backtrack
    again = tune(solver, 6, checkpoint=tmp_path, every=2, **options)
    for found, expected in ((again.hparams, whole.hparams), (again.params, whole.params), (again.best, whole.best)):
        assert_trees_equal(found, expected)
    assert lines == kept and len(kept) == (6 if outer else 0)

    report = hg.check(solver, START, whole.hparams if outer else 0.8, TRAIN, VALID, key=jax.random.key(1))
    if name == "response":
        assert any(cause.startswith("learned") for cause in report.causes), str(report)
    else:
        assert report.ok, str(report)
    if name == "solver":
        assert not any("adjoint" in cause or "response" in cause for cause in report.causes), "nothing is known of it"

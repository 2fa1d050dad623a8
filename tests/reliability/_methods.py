"""Every solver that meets the faults: one line each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from tests._helpers import keyed, tol
from tests.reliability._family import CUT, PROBLEM, RATE, STEPS, proximal_step


class Method(NamedTuple):
    """A solver and what it claims to compute.

    Attributes:
        make: `problem -> hg.Solver`.
        truth: whose derivative it is, see `_family.truth`.
    """

    make: Callable[[hg.Problem], hg.Solver]
    truth: str = "optimum"


def _sgd(**options) -> hg.inner._inner.Inner:
    return hg.inner.gradient(optax.sgd(RATE), steps=STEPS, **options)


def _single_loop(problem: hg.Problem, method: str, **options: Any) -> hg.Solver:
    """The problem as one row of a table, which is all that there is to draw."""

    def of_one_row(loss: Any) -> Any:
        return functools.wraps(loss)(lambda w, h, rows, *rest: loss(w, h, jax.tree.map(lambda x: x[0], rows), *rest))

    losses = of_one_row(problem.inner_loss), of_one_row(problem.outer_loss)
    solver = keyed(
        hg.single_loop(hg.Problem(*losses, problem.model_state), method=method, size=1, step_size=RATE, **options)
    )

    def hypergrad(state: Any, hparams: Any, train: Any = None, valid: Any = None, **rest: Any) -> Any:
        data = jax.tree.map(lambda x: jnp.asarray(x)[None] if jnp.size(x) else x, (train, valid))
        return solver.hypergrad(state, hparams, *data, **rest)

    return solver._replace(hypergrad=hypergrad)


METHODS: dict[str, Method] = {
    "implicit, CG": Method(hg.implicit),
    "implicit, GMRES": Method(lambda p: hg.implicit(p, linear=hg.linear.gmres())),
    "implicit, dense": Method(lambda p: hg.implicit(p, linear=hg.linear.dense())),
    "implicit, Neumann": Method(lambda p: hg.implicit(p, linear=hg.linear.neumann(2000, tol=tol(1e-8, 1e-5)))),
    "implicit, Neumann, own step size": Method(lambda p: hg.implicit(p, linear=hg.linear.neumann(200, step_size=RATE))),
    "implicit, Nyström": Method(lambda p: hg.implicit(p, linear=hg.linear.nystrom(3, damping=1e-6))),
    "implicit, SGD to a tolerance": Method(lambda p: hg.implicit(p, inner=_sgd(tol=tol(1e-6, 1e-4)))),
    "implicit, SGD and Neumann, fixed": Method(
        lambda p: hg.implicit(p, inner=_sgd(), linear=hg.linear.neumann(50, step_size=RATE))
    ),
    "fixed point, GMRES": Method(
        lambda p: hg.implicit(hg.Problem(None, p.outer_loss), inner=hg.inner.fixed_point(proximal_step, max_steps=3000))
    ),
    "unrolled, reverse": Method(lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse"), "path"),
    "unrolled, forward": Method(lambda p: hg.unrolled(p, inner=_sgd(), mode="forward"), "path"),
    "unrolled, truncated": Method(lambda p: hg.unrolled(p, inner=_sgd(), mode="reverse", truncate=CUT), "path"),
    "hypernetwork": Method(
        lambda p: keyed(
            hg.hypernetwork(
                p, response=hg.responses.linear(), optimizer=optax.adam(0.03), steps=STEPS, scale=0.1, draws=4
            )
        ),
        "response",
    ),
    "single loop, SABA": Method(lambda p: _single_loop(p, "saba", rows=(1, 1))),
    "single loop, SRBA": Method(lambda p: _single_loop(p, "srba")),
    "single loop, F2SA": Method(lambda p: _single_loop(p, "f2sa", perturbation=0.1)),
    "direct": Method(lambda p: hg.direct(p, inner=hg.inner.lbfgs()), "direct"),
}


def solver(name: str) -> hg.Solver:
    return METHODS[name].make(PROBLEM)

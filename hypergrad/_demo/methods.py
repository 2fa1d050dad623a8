"""The methods that `--method` selects: each is one line of the public interface."""

from __future__ import annotations

from collections.abc import Callable

import optax

import hypergrad as hg

# name: (what it does, (problem, learning rate, training steps) -> solver)
METHODS: dict[str, tuple[str, Callable[[hg.Problem, float, int], hg.Solver]]] = {
    "implicit": (
        "train to the optimum, then solve the adjoint system by conjugate gradients",
        lambda problem, rate, steps: hg.implicit(problem),
    ),
    "unrolled": (
        "differentiate every step of gradient descent, in reverse",
        lambda problem, rate, steps: hg.unrolled(
            problem, inner=hg.inner.gradient(optax.sgd(rate), steps=steps), mode="reverse"
        ),
    ),
    "truncated": (
        "the same, through the last tenth of the steps",
        lambda problem, rate, steps: hg.unrolled(
            problem, inner=hg.inner.gradient(optax.sgd(rate), steps=steps), mode="reverse", truncate=steps // 10
        ),
    ),
    "neumann": (
        "as implicit, with 20 terms of a Neumann series for the inverse Hessian",
        lambda problem, rate, steps: hg.implicit(problem, linear=hg.linear.neumann(max_steps=20)),
    ),
    "nystrom": (
        "as implicit, with a Nyström approximation of the inverse Hessian",
        lambda problem, rate, steps: hg.implicit(problem, linear=hg.linear.nystrom(rank=50, damping=1e-3)),
    ),
    "identity": (
        "as implicit, with the learning rate for the inverse Hessian (T1-T2)",
        lambda problem, rate, steps: hg.implicit(problem, linear=hg.linear.identity(step_size=rate)),
    ),
}

"""Why a hypergradient differs from finite differences, as far as the reason can be seen from outside the solver.

A solver describes itself (`About`). About a solver without a description, only what is true of every solver is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hypergrad._solver import About, Info, Status, usable
from hypergrad.diagnostics._differences import Slope, Solution
from hypergrad.diagnostics._report import Metasmoothness

_UNCONVERGED = (
    Status.INNER_DIVERGED,
    Status.INNER_MAX_STEPS,
    Status.INNER_STALLED,
    Status.LINEAR_MAX_STEPS,
    Status.LINEAR_BREAKDOWN,
    Status.NEUMANN_DIVERGING,
)


class Evidence(NamedTuple):
    """The measurements; they have the names of `Report`, and:

    Attributes:
        about: the solver's description of itself.
        doubt: relative error of the finite differences.
        first, center: the solution at λ after one call, and after as many calls as it takes.
        trains_on: whether the solver differentiates training that continues from call to call.
        batches: whether data are drawn at random.
        given: precision in which the hypergradient was given.
        eps: its rounding level.
        slopes: all finite differences.
        products: `(hypergradient, differences)` along the random directions.
        silent: finite differences within the leaves whose hypergradient is exactly zero, by path.
    """

    about: About
    ok: bool
    tol: float
    error: float
    doubt: float
    settled_error: float
    one_call_error: float
    info: Info
    status: Status | int
    value: float
    center: Solution
    trains_on: bool
    key_spread: float
    batches: bool
    precision: str
    given: str
    eps: float
    slopes: list[Slope]
    products: list[tuple[float, float]]
    silent: dict[str, Slope]
    metasmoothness: Metasmoothness | None


def find_causes(e: Evidence) -> tuple[str, ...]:
    """Yield plain sentences, each beginning with one word for the cause."""
    found = [
        *_status(e),
        *_unconverged(e),
        *_approximate(e),
        *_stochastic(e),
        *_kinked(e),
        *_insensitive(e),
        *_unreliable(e),
        *_precision(e),
        *_rough(e),
    ]
    if not e.ok and e.doubt <= e.tol and not found:
        found += _wrong(e)
    return tuple(found)


def is_unrolled(about: About) -> bool:
    """Whether a hypergradient is that of training itself instead of its optimum."""
    return about.differentiates == "path"


def is_learned(about: About) -> bool:
    """Whether a hypergradient is that of a fitted response."""
    return about.differentiates == "response"


def _status(e: Evidence) -> Iterator[str]:
    if not isinstance(e.status, Status):
        if not usable(e.status):
            yield f"failed: the solver reports status {e.status}."
    elif e.status == Status.PRECISION_LIMITED:
        yield f"precision: {e.status.advice}"
    elif e.status == Status.INACCURATE and e.about.biases:
        return  # the inaccuracy comes from the biases that the caller chose, which are named below
    elif not e.status.usable:
        word = {
            Status.NONFINITE_LOSS: "non-finite",
            Status.NONFINITE_GRAD: "non-finite",
            Status.SINGULAR: "singular",
            Status.NEG_CURVATURE: "indefinite",
            Status.UNROLL_EXPLODED: "chaotic",
            Status.INACCURATE: "inaccurate",
        }.get(e.status, "unconverged")
        yield f"{word}: status {e.status.name}. {e.status.advice}"


def _unconverged(e: Evidence) -> Iterator[str]:
    inner, linear, optimum = float(e.info.inner_residual), float(e.info.linear_residual), _is(e, "optimum")
    if _is(e, "optimum", "direct", "unknown") and not e.ok and e.status not in _UNCONVERGED:
        if inner > e.tol:
            yield f"unconverged: the relative residual of the inner problem is {inner:.1g}" + (
                ", as the solver reports it."
                if _is(e, "unknown")
                else "; the solver claims nothing about it. Take more inner steps, or solve to a tolerance."
            )
        if linear > e.tol:
            yield (
                f"unconverged: the relative residual of the adjoint system is {linear:.1g}, after "
                f"{int(e.info.linear_steps)} products"
            ) + (". Raise max_steps, or give the linear solver a tol." if optimum else ", as the solver reports it.")
        elif math.isnan(linear) and math.isinf(float(e.info.error_estimate)) and optimum:
            yield (
                "unconverged: the adjoint system was not solved, only replaced (error_estimate is inf). Use "
                "hg.linear.cg for an exact hypergradient."
            )
    if not e.ok and not e.trains_on and e.settled_error < 0.1 * e.error:
        yield (
            f"unconverged: the error falls to {e.settled_error:.1g} after more calls at the same hyperparameters: "
            "the first call stops short. In a loop that moves slowly, the warm start makes up for it."
        )


def _approximate(e: Evidence) -> Iterator[str]:
    if "damping" in e.about.biases:
        size = e.info.extra.get("damping")
        amount = "damping" if size is None else f"{float(size):.2g}"
        if size is None or float(size) > 0:
            yield (
                f"damped: {amount} is added to the inner Hessian's diagonal, so the hypergradient is that of "
                f"another problem; its error here is {e.error:.1g}."
            )
    if e.trains_on:
        yield (
            "truncated: each call trains on from where the last one ended and differentiates its own steps alone. "
            f"As the derivative of those its error is {e.one_call_error:.1g}; against training on until nothing "
            f"moves it is {e.error:.1g} at the first call and {e.settled_error:.1g} at the last."
        )
    estimate = float(e.info.error_estimate)
    if is_unrolled(e.about) and e.about.biases and not e.ok:
        yield (
            f"truncated: the hypergradient is biased by {' and '.join(e.about.biases)}. The solver estimates the error "
            f"at {estimate:.1g} of the hypergradient; it is {e.error:.1g}. Differentiate more steps: raise truncate=."
        )
    if is_learned(e.about):
        gap = abs(e.value - e.center.settled) / max(abs(e.center.settled), 1e-300)
        residual = float(e.info.linear_residual)
        left = "" if math.isnan(residual) else f"; its slope leaves {residual:.1g} of its equation"
        yield (
            f"learned: the best response is a fitted function. At the hyperparameters it gives an outer loss of "
            f"{e.value:.6g}, training there alone {e.center.settled:.6g} (off by {gap:.1g}){left}. "
            f"The hypergradient's error is {e.error:.1g} at the first call and {e.settled_error:.1g} at the last of "
            "many: more steps lower both, and another scale or response lowers the rest."
        )
    if _is(e, "direct") and not e.ok:
        yield (
            "direct: the effect of the hyperparameters through the parameters is left out on purpose; the error here "
            f"is {e.error:.1g}. hg.implicit has both parts."
        )


def _stochastic(e: Evidence) -> Iterator[str]:
    if e.key_spread > e.tol or (math.isnan(e.key_spread) and e.batches):
        chance = [*(("minibatches",) if e.batches else ()), *e.about.random]
        unknown = "random numbers in the losses" + (" or in the solver" if _is(e, "unknown") else "")
        drawn = " and ".join(chance) or unknown
        yield (
            f"stochastic: with another key the hypergradient changes by {e.key_spread:.1g} of its size ({drawn}); "
            "the comparison uses one draw, the same on both sides. Larger batches, or an average over keys, "
            "help."
        )


def _kinked(e: Evidence) -> Iterator[str]:
    jumps = [(abs(s.jump) / max(abs(s.value), abs(s.jump)), s) for s in e.slopes if s.jump]
    if jumps:
        _, worst = max(jumps, key=lambda pair: pair[0])
        yield (
            f"kinked: the outer loss has one slope ({worst.value + worst.jump / 2:.4g}) on one side and another "
            f"({worst.value - worst.jump / 2:.4g}) on the other, at any step size: an L1 term, a ReLU or a rounding "
            "is just switching there. Check at another point."
        )


def _insensitive(e: Evidence) -> Iterator[str]:
    for path, slope in e.silent.items():
        if abs(slope.value) > 10 * slope.error:
            where = {
                "direct": "through the parameters, which hg.direct leaves out",
                "optimum": (
                    "on the path of training, which hg.unrolled sees, or through an operation without a derivative"
                ),
                "path": "through an operation without a derivative, or before the steps that are differentiated",
                "response": "through an operation without a derivative, or where the response has not learned it",
            }.get(
                e.about.differentiates,
                "where the solver takes no derivative: on the path of training, which hg.unrolled sees, through an "
                "operation without a derivative, or in a part that it leaves out",
            )
            yield (
                f"insensitive: hparams{path} has a hypergradient of exactly zero, but the outer loss moves with it "
                f"(slope {slope.value:.3g}): it acts {where}."
            )
        else:
            yield (
                f"insensitive: hparams{path} moves nothing, neither parameters nor outer loss: a misspelt key, or a "
                "term that is switched off."
            )


def _unreliable(e: Evidence) -> Iterator[str]:
    values = [s.value for s in e.slopes]
    if not np.all(np.isfinite([*values, e.center.settled])):
        yield (
            "unreliable: the outer loss is not finite at the hyperparameters or a step away from them; nothing can "
            "be compared there."
        )
    elif not e.center.calm:
        yield (
            f"unreliable: the outer loss still changed by {e.center.drift:.1g} in call {e.center.calls} at the same "
            "hyperparameters, so the problem was never solved. Give the inner solver more steps or a tolerance."
        )
    elif e.doubt > e.tol:
        yield (
            f"unreliable: the finite differences are only good to {e.doubt:.1g}. The outer loss is nearly flat "
            "here, rough, or not solved finely enough: check at another point, or loosen tol."
        )


def _precision(e: Evidence) -> Iterator[str]:
    if e.precision == "float32":
        yield (
            "precision: the losses could not be computed in float64 (they fix a type, or draw other random "
            "numbers there), so the differences are in float32, good to a few digits."
        )
    gap = abs(e.value - e.center.first)
    if gap > 1e-3 * abs(e.center.first) and e.given != e.precision and is_unrolled(e.about):
        yield (
            f"precision: the outer loss is {e.value:.6g} in {e.given} and {e.center.first:.6g} in {e.precision}: "
            "training amplifies rounding, and no hypergradient can be trusted further than that."
        )


def _rough(e: Evidence) -> Iterator[str]:
    if e.metasmoothness is not None and not e.metasmoothness.cosine > 0.5:
        yield (
            f"rough: a step of {e.metasmoothness.step:.2g} away the hypergradient has a cosine of "
            f"{e.metasmoothness.cosine:.2g} with the one here: either the step crosses an optimum, or training is "
            "too rough for gradient descent on its hyperparameters: warm up, lower the learning rate, raise eps."
        )


def _wrong(e: Evidence) -> Iterator[str]:
    ours, theirs = np.asarray(e.products).T
    factor = float(ours @ theirs / (theirs @ theirs)) if np.any(theirs) else math.nan
    rest = np.linalg.norm(ours - factor * theirs) / max(float(np.linalg.norm(ours)), 1e-300)
    if len(ours) > 1 and rest < 0.1 * abs(factor - 1) and rest < 0.05:
        yield (
            f"scaled: the hypergradient is {factor:.4g} times the reference in every direction: a constant factor, "
            "a sign, or a mean that should be a sum."
        )
    elif e.about.biases:
        yield (
            f"biased: the method approximates on purpose: the hypergradient is biased by "
            f"{' and '.join(e.about.biases)}; its error here is {e.error:.1g}."
        )
    else:
        there = "Either the method approximates on purpose, or there" if _is(e, "unknown") else "There"
        yield (
            f"wrong: nothing that can be seen from outside explains the difference. {there} is a mistake in the "
            "solver, or in a derivative rule of the losses (custom_jvp, custom_vjp, stop_gradient)."
        )


def _is(e: Evidence, *kinds: str) -> bool:
    return e.about.differentiates in kinds

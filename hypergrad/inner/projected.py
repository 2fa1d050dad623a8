r"""Smooth losses over a convex set: accelerated projected gradient steps.

    min_{w ∈ C(λ)} h(w, λ),   F(w, λ) = w − P_{C(λ)}(w − η ∂_w h(w, λ)) = 0 at the solution, for every η > 0

A projection is the proximal operator of a constraint, so this is a special case of `hg.inner.proximal`.
Source: Levitin & Polyak 1966; Blondel et al. 2022, arXiv:2105.15183 (its derivative).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax.typing import ArrayLike

from hypergrad._options import Number, options
from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree
from hypergrad.inner._inner import Inner
from hypergrad.inner.proximal import proximal


@options(
    tol=Number(above=0),
    max_steps=Number(least=1, integer=True),
    steps=Number(least=0, integer=True, static=True),
    step_size=Number(above=0),
)
def projected(
    projection: Callable[..., PyTree],
    *,
    tol: ArrayLike | None = None,
    max_steps: ArrayLike | None = None,
    steps: int | None = None,
    step_size: ArrayLike | None = None,
) -> Inner:
    """Minimise the inner loss over a convex set, given the projection onto it.

    Args:
        projection: `(params) -> params`, such as `optax.projections.projection_simplex`, or `(params, hparams) ->
            params` for a set that depends on hyperparameters.
        tol: tolerance on ‖w − P(w − η ∂_w h)‖, relative to its natural scale (dimensionless). Default: what the
            precision supports, 1e-6 in float32 and 1e-10 in float64.
        max_steps: largest number of steps. Default 10,000.
        steps: number of unrolled steps, as in `hg.inner.proximal`; needs `step_size`.
        step_size: η of the unrolled steps, in units of an inverse eigenvalue of ∂²h.

    Returns:
        An `Inner`, like that of `hg.inner.proximal`.

    Raises:
        InputError: as for `hg.inner.proximal`.
        InputTypeError: for a projection that is not a function of one or two arguments.

    >>> import hypergrad as hg, jax, jax.numpy as jnp, numpy as np, optax
    >>> problem = hg.Problem(lambda w, shift, batch: 0.5 * jnp.sum((w - shift)**2), lambda w, shift, batch: w[0])
    >>> solver = hg.implicit(problem, inner=hg.inner.projected(optax.projections.projection_simplex))
    >>> shift = jnp.array([0.5, 0.25, -2.0])
    >>> out, state = jax.jit(solver.hypergrad)(solver.init(jnp.ones(3) / 3, shift), shift)
    >>> print(np.asarray(solver.response(state, shift)).round(3) + 0.0, np.asarray(out.grad).round(3) + 0.0)
    [0.625 0.375 0.   ] [ 0.5 -0.5  0. ]
    """
    if not callable(projection):
        raise InputTypeError(
            "projected: projection must be a function (params) -> params or (params, hparams) -> params, found "
            f"{type(projection).__name__}."
        )
    two = _takes_hparams(projection)

    def prox(params: PyTree, hparams: PyTree, step: Any) -> PyTree:
        del step
        return projection(params, hparams) if two else projection(params)

    return proximal(prox, tol=tol, max_steps=max_steps, steps=steps, step_size=step_size)


def _takes_hparams(projection: Callable[..., PyTree]) -> bool:
    try:
        parameters = inspect.signature(projection).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(required) in (1, 2):
        return len(required) == 2
    names = ", ".join(p.name for p in required)
    raise InputTypeError(
        f"projected: projection must take (params) or (params, hparams), found ({names}): bind the rest with "
        "functools.partial or a lambda."
    )

"""A problem rewritten in unconstrained coordinates."""

from __future__ import annotations

from hypergrad._problem import Problem, reparametrized
from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree
from hypergrad.domains._domain import check_domain, prefix, to_constrained


def constrain(problem: Problem, domain: PyTree) -> Problem:
    r"""The same problem in unconstrained coordinates: its losses take u and evaluate at λ = T(u).

    `hg.tune(..., domain=domain)` does the same for a solver that is already built; this is for your own loop.

    Args:
        problem: the problem to transform. Losses keep their keys, model state and parts (`hg.compose`).
        domain: pytree prefix of the hyperparameters with domains as leaves; None stands for `real()`.

    Returns:
        A problem over unconstrained hyperparameters; map them with `hg.domains.to_unconstrained` and back.

    Raises:
        InputTypeError: if a leaf of `domain` is not a domain.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 1)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum(w**2))
    >>> free = hg.constrain(problem, hg.domains.log())
    >>> float(free.inner_loss(jnp.ones(1), jnp.log(3.0), None))
    3.0
    """
    if not isinstance(problem, Problem):
        raise InputTypeError(
            f"constrain: problem must be an hg.Problem, found {type(problem).__name__}: "
            "transform the problem before building the solver."
        )
    for path, leaf in prefix(domain)[0]:
        check_domain(path, leaf)

    return reparametrized(problem, lambda hparams: to_constrained(domain, hparams))

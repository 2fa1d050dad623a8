r"""The sets in which hyperparameters may lie: smooth maps from unconstrained coordinates u onto a domain.

    λ = T(u),   dF/du = (∂T/∂u)ᵀ dF/dλ,   u ∈ Rⁿ

    positive   softplus(u) + tiny          interval   lo + (hi − lo) σ(u)      simplex   softmax(u), last axis
    log        exp(u), u clipped           integer    round(lo − ½ + (hi − lo + 1) σ(u)), derivative of the unrounded

Differs from clipping λ after each step (projection) in that the outer optimizer sees a smooth problem, and from the
bijections of probabilistic programming in that
1. T(u) is in the domain for every u, including ±inf, in the dtype of the leaf: rounding never carries λ out of it;
2. `settle` stops one huge step where T still has a derivative, so that later steps can still move;
3. both ends of an interval are computed to relative accuracy.
Cost: elementwise.

A domain is given as a pytree prefix of the hyperparameters,
`{"l2": hg.domains.log(), "augment": hg.domains.interval(0, 1)}`; None stands for `real()`.
"""

from hypergrad.domains._domain import Domain as Domain
from hypergrad.domains._domain import to_constrained as to_constrained
from hypergrad.domains._domain import to_unconstrained as to_unconstrained
from hypergrad.domains.integer import integer as integer
from hypergrad.domains.interval import interval as interval
from hypergrad.domains.log import log as log
from hypergrad.domains.positive import positive as positive
from hypergrad.domains.real import real as real
from hypergrad.domains.simplex import simplex as simplex

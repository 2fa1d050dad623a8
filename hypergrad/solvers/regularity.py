r"""A bound on the error of a hypergradient, proved from what the caller knows about the two losses.

With μ the strong convexity of h and L the Lipschitz constants in w of the quantities named, at ŵ and v̂

    ‖ŵ − w*‖ ≤ δ = ‖∂_w h(ŵ)‖ / μ
    ‖v̂ − v*‖ ≤ ε = (‖∂_w f(ŵ) − H(ŵ) v̂‖ + (L_H ‖v̂‖ + L_{∂_w f}) δ) / μ
    ‖ĝ − g‖ ≤ L_{∂_λ f} δ + L_J δ ‖v̂‖ + (‖J(ŵ)‖ + L_J δ) ε,          H = ∂²_{ww} h,  J = ∂²_{λw} h

Source: the a-posteriori bound of Salehi, Mukherjee, Roberts & Ehrhardt 2023 (MAID), arXiv:2308.10098. Differs: it uses
the measured residuals and the computed adjoint, where theirs uses tolerances and a Lipschitz constant of H⁻¹; it
includes the direct term; no constant is estimated, since an estimate proves nothing.
Cost: one norm for each quantity; where no bound on ‖J‖ is given, one product for each scalar hyperparameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._options import Number
from hypergrad._solver import InputTypeError
from hypergrad._tree import PyTree

_ROUNDING = 64  # units of rounding, relative to the size of its terms, by which a residual may be off


class Regularity(NamedTuple):
    """Bounds that hold for the losses, for all parameters between ŵ and w*.

    All norms are Euclidean (spectral for matrices), taken over all leaves together. Values are numbers or scalar
    arrays.

    Attributes:
        strong_convexity: a lower bound on the eigenvalues of ∂²_{ww} h, greater than 0.
        outer_gradient: Lipschitz constant in w of ∂_w f.
        cross: Lipschitz constant in w of ∂²_{λw} h. 0 where h is linear in w times a function of λ.
        hessian: Lipschitz constant in w of ∂²_{ww} h. 0 for a quadratic h.
        direct: Lipschitz constant in w of ∂_λ f. 0 where f does not depend on λ.
        cross_norm: bound on ‖∂²_{λw} h(ŵ)‖. None: its Frobenius norm is computed, at one product for each scalar
            hyperparameter.
    """

    strong_convexity: ArrayLike
    outer_gradient: ArrayLike
    cross: ArrayLike
    hessian: ArrayLike = 0.0
    direct: ArrayLike = 0.0
    cross_norm: ArrayLike | None = None


CONSTANTS = {name: Number(least=0) for name in Regularity._fields} | {"strong_convexity": Number(above=0)}
KnownRegularity = Regularity | Callable[[PyTree], Regularity]


def known_at(known: KnownRegularity, hparams: PyTree) -> Regularity:
    """Return the constants at these hyperparameters.

    Raises:
        InputTypeError: if the result is not a `Regularity`.
        InputError: for a number that is out of range.
    """
    found = known(hparams) if callable(known) else known
    if not isinstance(found, Regularity):
        raise InputTypeError(
            "implicit: regularity must be an hg.Regularity, or a function from the hyperparameters to one, "
            f"found {type(found).__name__}."
        )
    for name, value in found._asdict().items():
        if value is not Regularity._field_defaults.get(name, ...):
            CONSTANTS[name].check("implicit", name, value)
    return found


def cross_size(known: Regularity, gradient: Callable[[PyTree], PyTree], hparams: PyTree) -> ArrayLike:
    """Return a bound on ‖∂²_{λw} h‖, or its Frobenius norm, for `λ -> ∂_w h(ŵ, λ)`."""
    return cross_norm(gradient, hparams) if known.cross_norm is None else known.cross_norm


def cross_norm(gradient: Callable[[PyTree], PyTree], hparams: PyTree) -> Array:
    """Return the Frobenius norm of ∂²_{λw} h, from `λ -> ∂_w h(ŵ, λ)`, one column at a time."""
    leaves, treedef = jax.tree.flatten(hparams)
    total = jnp.zeros((), _tree.dtype(hparams))
    for at, leaf in enumerate(leaves):

        def column(i: Array, at: int = at, leaf: Array = leaf) -> Array:
            unit = jnp.zeros(leaf.size, leaf.dtype).at[i].set(1).reshape(leaf.shape)
            tangent = treedef.unflatten([unit if j == at else jnp.zeros_like(x) for j, x in enumerate(leaves)])
            return _tree.norm(jax.jvp(gradient, (hparams,), (tangent,))[1]) ** 2

        total += jax.lax.fori_loop(
            0, leaf.size, lambda i, s, f=column: s + f(i).astype(s.dtype), jnp.zeros((), total.dtype)
        )
    return jnp.sqrt(total)


def error_bound(
    known: Regularity, residual: PyTree, size: Array, rhs: PyTree, product: PyTree, adjoint: PyTree, cross: ArrayLike
) -> Array:
    """Bound on ‖ĝ − g‖, in the units of the hypergradient.

    Args:
        known: the constants.
        residual: ∂_w h(ŵ).
        size: size of the terms of which the residual is the sum, scalar.
        rhs: ∂_w f(ŵ).
        product: H(ŵ) v̂.
        adjoint: v̂.
        cross: bound on ‖J(ŵ)‖, scalar.
    """
    rounding = _ROUNDING * _tree.eps(residual)
    length = _tree.norm(adjoint)
    off = (_tree.norm(residual) + rounding * size) / known.strong_convexity
    missing = _tree.norm(_tree.sub(rhs, product)) + rounding * (_tree.norm(rhs) + _tree.norm(product))
    adjoint_off = (missing + (known.hessian * length + known.outer_gradient) * off) / known.strong_convexity
    bound = known.direct * off + known.cross * off * length + (cross + known.cross * off) * adjoint_off
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)

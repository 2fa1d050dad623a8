r"""Forward mode through training: one tangent for each scalar hyperparameter, carried along with the steps.

    Z_{t+1} = ∂Ψ_t/∂(w, s, m) Z_t + ∂Ψ_t/∂λ,     g = ∂_λ f + Z_Tᵀ ∂_{(w, m)} f

Source: Franceschi et al. 2017, arXiv:1703.01785. Differs: the tangents share one evaluation of the step; comparing them
with what one step injects shows when they are noise.
Cost: training, and a third to a half of it for each scalar hyperparameter. Memory: one point for each scalar
hyperparameter, at any number of steps.

Z starts from zero in each call, with `warm_start` too: the effect of earlier calls on the parameters is left out, which
is truncation. Real-time forward mode, which carries Z from call to call, is not offered. Measured on a stream of noisy
digits (a network of 32 units, calls of ten steps of SGD with momentum, Adam on three numbers: learning rate, momentum
and decay; 300 calls, six seeds, two starts, two outer rates): the mean loss of truncated runs, 1.04 to 1.16, fell by
.001 to .006 where Z was carried, clear of its standard error in one setting of four, and the decay it found went to
zero; by .005 to .017 (standard errors of .001) where Z was carried and shrunk by a tenth in each call, which is another
constant to choose. Where truncation has the wrong sign, `hg.evolution` has PES and NRES, without a tangent for each
hyperparameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import _tree
from hypergrad._tree import PyTree
from hypergrad.unrolling.step import Moving, Point, Record, Step, Taken, moving


class Forward(NamedTuple):
    """The progress of the tangents.

    Attributes:
        point, record: state and summary of training.
        tangent: Z, each leaf with a leading axis of scalar hyperparameters, [p].
        first, peak: largest entry of each tangent (of the parameters) after the first step, and so far, [p].
        sizes: largest entry of what each step changed in Z, [steps, p]; None unless asked for.
    """

    point: Point
    record: Record
    tangent: Moving
    first: Array
    peak: Array
    sizes: Array | None


def basis(hparams: PyTree) -> PyTree:
    """One unit vector for each scalar hyperparameter, stacked on a leading axis."""
    leaves, treedef = jax.tree.flatten(hparams)
    count, rows, offset = _tree.size(hparams), [], 0
    for leaf in leaves:
        rows.append(jnp.eye(count, leaf.size, -offset, leaf.dtype).reshape(count, *leaf.shape))
        offset += leaf.size
    return treedef.unflatten(rows)


def push(
    step: Step,
    hparams: PyTree,
    point: Point,
    tangent: Moving,
    begin: int,
    length: int,
    record: Record,
    keep_sizes: bool,
) -> tuple[Forward, Array]:
    """Carry tangents through `length` steps; also return how far they grew beyond what the steps put in."""
    units = basis(hparams)

    def one(point: Point, tangent: Moving, t: Any) -> tuple[Moving, Taken]:
        here = moving(point)

        def along(z: Moving, unit: PyTree) -> tuple[Moving, Taken]:
            through = lambda m, h: step.through(m, h, point, t)
            _, moved, taken = jax.jvp(through, (here, hparams), (z, unit), has_aux=True)
            return moved, taken

        return jax.vmap(along, out_axes=(0, None))(tangent, units)

    def body(i: Any, carry: Forward) -> Forward:
        tangent, taken = one(carry.point, carry.tangent, begin + i)
        size, sizes = jax.vmap(_tree.max_abs)(tangent.params).astype(carry.peak.dtype), carry.sizes
        if sizes is not None:
            change = jax.vmap(_tree.max_abs)(_tree.sub(tangent.params, carry.tangent.params))
            sizes = sizes.at[i].set(change.astype(sizes.dtype))
        record = step.watch(carry.record, taken, begin + i)
        return Forward(
            taken.point,
            record,
            tangent,
            jnp.where(i == 0, size, carry.first),
            jnp.where(size > carry.peak, size, carry.peak),
            sizes,
        )

    count, dtype = _tree.size(hparams), _tree.dtype(point.params)
    zero = jnp.zeros((count,), dtype)
    result = jax.lax.fori_loop(
        0,
        length,
        body,
        Forward(point, record, tangent, zero, zero, jnp.zeros((length, count), dtype) if keep_sizes else None),
    )
    # A step puts in what Z would be after it if Z had been zero before. In a stable run Z stays below their sum.
    final, _ = one(result.point, jax.tree.map(jnp.zeros_like, tangent), begin + max(length - 1, 0))
    injected = jnp.fmax(result.first, jax.vmap(_tree.max_abs)(final.params).astype(dtype))
    scale = max(length, 1) * jnp.where(injected > 0, injected, jnp.inf)
    return result, jnp.maximum(1, jnp.max(result.peak / scale))


def pull_out(tangent: PyTree, cotangent: PyTree, hparams: PyTree) -> PyTree:
    """`Zᵀ ∂f` as a pytree like the hyperparameters; `tangent` is like `cotangent`, with a leading axis."""
    size = _tree.norm(cotangent)
    unit = _tree.scale(_tree.safe_divide(1, size), cotangent)
    flat = size * jax.vmap(lambda z: _tree.vdot(z, unit))(tangent)
    leaves, treedef = jax.tree.flatten(hparams)
    parts, offset = [], 0
    for leaf in leaves:
        parts.append(flat[offset : offset + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        offset += leaf.size
    return treedef.unflatten(parts)

"""The arithmetic on pytrees that the solvers need.

Every inner product is written `sum(x * y)`, so that Krylov loops run unchanged on sharded arrays, and is accumulated in
at least float32. Every other function keeps the dtype of each leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

PyTree: TypeAlias = Any


def _accumulator(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _total(terms: list[Array]) -> Array:
    if not terms:
        return jnp.zeros((), jnp.float32)
    dtype = jnp.result_type(*terms)
    return sum((t.astype(dtype) for t in terms[1:]), start=terms[0].astype(dtype))


def vdot(x: PyTree, y: PyTree) -> Array:
    """Inner product of two pytrees of real arrays, a scalar."""
    products = jax.tree.map(lambda a, b: jnp.sum(_accumulator(a) * _accumulator(b)), x, y)
    return _total(jax.tree.leaves(products))


def max_abs(x: PyTree) -> Array:
    """Largest absolute entry, a scalar; 0 for a tree without entries."""
    peaks = [jnp.max(jnp.abs(_accumulator(leaf))) for leaf in jax.tree.leaves(x) if leaf.size]
    if not peaks:
        return jnp.zeros((), jnp.float32)
    dtype = jnp.result_type(*peaks)
    return jnp.max(jnp.stack([p.astype(dtype) for p in peaks]))


def norm(x: PyTree, unit: Array | None = None) -> Array:
    """Euclidean norm, a scalar.

    Where the sum of squares leaves the range of the dtype, or comes near its end, squares are summed again in units
    close to the largest entry, so that 1e-30 does not underflow and 1e30 does not overflow in float32. Units are powers
    of two, which round nothing: scaling by one changes no bit. Pass a size that is already known as `unit` to sum in
    its units at once.
    """

    def within(peak: Array) -> Array:
        power = positive(jax.lax.reduce_precision(0.5 * peak, jnp.finfo(peak.dtype).nexp, 0))
        return power * jnp.sqrt(
            _total([jnp.sum((_accumulator(a) / power.astype(_accumulator(a).dtype)) ** 2) for a in jax.tree.leaves(x)])
        )

    if unit is not None:
        return within(unit)
    square = vdot(x, x)
    limits = jnp.finfo(square.dtype)
    held = (square >= size(x) * limits.tiny / limits.eps**2) & (square < jnp.inf)  # what vanishes is below rounding
    return jax.lax.cond(held, lambda: jnp.sqrt(square), lambda: within(max_abs(x)))


def positive(x: ArrayLike) -> Array:
    """`x` where it is positive and 1 elsewhere: a size that is safe to divide by."""
    x = jnp.asarray(x)
    return jnp.where(x > 0, x, 1)


def safe_divide(x: ArrayLike, y: ArrayLike, *, where: ArrayLike | None = None, otherwise: Any = None) -> Array:
    """`x / y` where `where` holds (default: y > 0), and elsewhere `otherwise` (default: x itself).

    Nothing is divided by zero, so derivatives are finite on both branches.
    """
    y = jnp.asarray(y)
    good = y > 0 if where is None else where
    ratio: Any = x / jnp.where(good, y, 1)
    return ratio if otherwise is None else jnp.where(good, ratio, otherwise)


def scale(a: ArrayLike, x: PyTree) -> PyTree:
    """`a * x` for a scalar `a`, in the dtypes of `x`."""
    return jax.tree.map(lambda leaf: jnp.asarray(a).astype(leaf.dtype) * leaf, x)


def axpy(a: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """`a * x + y` for a scalar `a`, in the dtypes of `y`."""
    return jax.tree.map(lambda u, v: jnp.asarray(a).astype(v.dtype) * u.astype(v.dtype) + v, x, y)


def add(x: PyTree, y: PyTree) -> PyTree:
    """`x + y`, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def sub(x: PyTree, y: PyTree) -> PyTree:
    """`x - y`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, x, y)


def where(condition: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """`x` if the scalar `condition` holds, else `y`; typed keys and integers pass through as well."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def zeros_like(x: PyTree) -> PyTree:
    """A pytree of zeros with the shapes and dtypes of `x`."""
    return jax.tree.map(jnp.zeros_like, x)


def all_finite(x: PyTree) -> Array:
    """Whether every floating-point entry is finite, a boolean scalar."""
    # 0 · x is 0 except for NaN and infinities, and a sum takes a third of the time of testing each entry.
    return jnp.isfinite(_total([jnp.sum(0 * leaf) for leaf in jax.tree.leaves(x) if is_float(leaf)]))


def size(x: PyTree) -> int:
    """Number of entries over all leaves, a Python integer."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(x))


def nbytes(x: PyTree) -> int:
    """Bytes that the leaves occupy, a Python integer; works on abstract values."""
    return sum(
        int(np.prod(jnp.shape(leaf))) * jnp.result_type(leaf).itemsize
        for leaf in jax.tree.leaves(x)
        if not is_key(leaf)
    )


def dtype(x: PyTree) -> np.dtype:
    """The widest floating dtype among the leaves, at least float32."""
    leaves = [jnp.result_type(leaf) for leaf in jax.tree.leaves(x) if is_float(leaf)]
    return np.dtype(jnp.result_type(jnp.float32, *leaves))


def eps(x: PyTree) -> float:
    """Machine epsilon of the *narrowest* floating dtype among the leaves, which limits the accuracy of a solution."""
    return max(
        (float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(x) if is_float(leaf)),
        default=float(jnp.finfo(jnp.float32).eps),
    )


def rademacher_like(key: Array, x: PyTree, index: ArrayLike = 0) -> PyTree:
    """Random signs ±1 with the shapes and dtypes of `x`; `index` numbers independent draws from one key.

    Signs need no cryptographic generator: each is one bit of a 32-bit integer hash (two rounds of multiply and shift)
    of the entry's number, which compiles in a tenth of the time.
    """
    words = [w.ravel() for w in jax.tree.leaves(jax.random.key_data(key))]
    seed = jnp.asarray(index).astype(jnp.uint32)
    for word in jnp.concatenate(words).astype(jnp.uint32):
        seed = _hash(seed ^ word)
    leaves, treedef = jax.tree.flatten(x)
    signs, offset = [], 0
    for leaf in leaves:
        entries = jax.lax.iota(jnp.uint32, max(leaf.size, 1))[: leaf.size] + jnp.uint32(offset)
        bits = _hash(_hash(entries ^ seed) + seed) >> 31
        signs.append((1 - 2 * bits.astype(jnp.int32)).astype(leaf.dtype).reshape(leaf.shape))
        offset += leaf.size
    return treedef.unflatten(signs)


def _hash(x: Array) -> Array:
    """A bijection of 32-bit integers without visible structure (the "lowbias32" constants of C. Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def strong(x: PyTree) -> PyTree:
    """Leaves as arrays that are not weakly typed, so that a second call fits the trace of the first."""
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else jnp.asarray(leaf, jnp.result_type(leaf)), x)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key array."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is real floating point."""
    return not is_key(leaf) and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def partition(x: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """Split off the floating-point leaves.

    Returns the list of floating leaves and a function that puts (new) ones back among the untouched other leaves
    (step counters, keys), so that AD only ever sees what it can differentiate.
    """
    leaves, treedef = jax.tree.flatten(x)
    mask = [is_float(leaf) for leaf in leaves]

    def combine(floats: list[Array]) -> PyTree:
        fresh = iter(floats)
        return treedef.unflatten([next(fresh) if m else leaf for m, leaf in zip(mask, leaves, strict=True)])

    return [leaf for m, leaf in zip(mask, leaves, strict=True) if m], combine


def numbers(tree: PyTree, most: int | None = None) -> dict[str, float]:
    """Every entry as a Python number, under a path that trackers and databases accept: `l2`, `layer.rate.3`.

    A bare scalar is called `hparams`. A leaf of more than `most` entries gives its `.min`, `.mean` and `.max` instead.
    If two entries would share a name (`{"a.b": 1.0, "a": {"b": 2.0}}`), every entry is named as `keystr` writes its
    path.
    """

    def named(write: Callable[[Any], str]) -> list[tuple[str, float]]:
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, values = write(path) or "hparams", np.asarray(leaf, np.float64)
            if most is not None and values.size > most:
                found += [(f"{name}.{kind}", float(getattr(np, kind)(values))) for kind in ("min", "mean", "max")]
            else:
                found += [(".".join([name, *map(str, at)]), float(values[at])) for at in np.ndindex(values.shape)]
        return found

    found = named(lambda path: jax.tree_util.keystr(path, simple=True, separator="."))
    return dict(found if len(dict(found)) == len(found) else named(keystr))


def keystr(path: Any) -> str:
    """A tree path as the user would write it, `['layer']['w']`; '' becomes 'the tree itself'."""
    return jax.tree_util.keystr(path)

r"""Noise and augmentation whose strength is a traced hyperparameter, for a batch or for each example.

    dropout          x m / (1 − r),  m ~ Bernoulli(1 − r)       translate   x(· − s d),  d ~ U[−1, 1]² , bilinear
    gaussian_noise   x + s ε,  ε ~ N(0, 1)                      cutout      x = 0 on k squares of l × l pixels
    brightness       x + s d,  d ~ U[−1, 1]                     jitter      x_j (1 + s)^(d_j),  d_j ~ U[−1, 1]
    contrast         x̄ + (x − x̄) (1 + s)^d,  d ~ U[−1, 1]

A strength is a scalar, or an array `[n]` with one entry for each example of `x` `[n, ...]`. Derivatives are those of
the pathwise (reparametrized) sample, and are unbiased. Dropout's rate and cutout's length and holes have no such
derivative; theirs is zero, since differentiating 1 / (1 − r) alone would give a wrong number. Tune these with
`hg.self_tuning`, which needs no derivative of the training loss with respect to them.

Source: Srivastava et al. 2014 (dropout); DeVries & Taylor 2017 (cutout), arXiv:1708.04552; the strengths as in MacKay
et al. 2019, arXiv:1903.03088. Differs: every strength can change from call to call and from example to example without
recompiling; translation is by fractions of a pixel and has a derivative.
Cost: elementwise; translate, two products with `[n, size, size]` matrices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from hypergrad._options import Number, options
from hypergrad._solver import InputError, InputTypeError

# A strength: one number, or one for each example.
AMOUNT = Number(least=0, every=True, advice="keep it there by tuning it with domain=hg.domains.positive()")
_MOST = 1 - 2.0**-10  # largest dropout rate; kept entries are scaled by at most 1024


@options(rate=AMOUNT._replace(below=1, advice="keep it there by tuning it with domain=hg.domains.interval(0, 0.95)"))
def dropout(x: Array, rate: ArrayLike, *, key: Array) -> Array:
    """Set each entry to zero with probability `rate`, and divide the others by `1 - rate`.

    The derivative with respect to the rate is zero, because the mask has no pathwise derivative.

    Args:
        x: `[n, ...]`.
        rate: in [0, 1), a scalar or `[n]`. Traced values are clipped to [0, 1 − 2⁻¹⁰].
        key: PRNG key.

    Returns:
        Like `x`.

    Raises:
        InputError: for a concrete rate outside [0, 1), or a shape that is neither `[]` nor `[n]`.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> kept = hg.augment.dropout(jnp.ones((2, 1000)), jnp.asarray([0.0, 0.5]), key=jax.random.key(0))
    >>> [round(float(share), 1) for share in jnp.mean(kept > 0, axis=1)]
    [1.0, 0.5]
    """
    x, rate = _prepared("dropout", "rate", x, rate)
    rate = jnp.minimum(jax.lax.stop_gradient(rate), _MOST)
    kept = jax.random.uniform(key, x.shape, x.dtype) >= rate
    return jnp.where(kept, x / (1 - rate), 0)


@options(scale=AMOUNT)
def gaussian_noise(x: Array, scale: ArrayLike, *, key: Array) -> Array:
    """Add normal noise of standard deviation `scale` to each entry.

    Args:
        x: `[n, ...]`.
        scale: in the units of `x`, at least 0, a scalar or `[n]`.
        key: PRNG key.

    Returns:
        Like `x`.

    Raises:
        InputError: for a concrete scale below 0, or a shape that is neither `[]` nor `[n]`.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> noisy = hg.augment.gaussian_noise(jnp.zeros((2, 1000)), jnp.asarray([0.0, 3.0]), key=jax.random.key(0))
    >>> [round(float(s)) for s in jnp.std(noisy, axis=1)]
    [0, 3]
    """
    x, scale = _prepared("gaussian_noise", "scale", x, scale)
    return x + scale * jax.random.normal(key, x.shape, x.dtype)


@options(strength=AMOUNT)
def brightness(x: Array, strength: ArrayLike, *, key: Array) -> Array:
    """Add one number, uniform between `-strength` and `strength`, to every entry of an example.

    Args:
        x: `[n, ...]`.
        strength: in the units of `x`, at least 0, a scalar or `[n]`.
        key: PRNG key.

    Returns:
        Like `x`.

    Raises:
        InputError: for a concrete strength below 0, or a shape that is neither `[]` nor `[n]`.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> hg.augment.brightness(jnp.zeros((2, 8, 8)), 0.3, key=jax.random.key(0)).shape
    (2, 8, 8)
    """
    x, strength = _prepared("brightness", "strength", x, strength)
    return x + strength * _uniform(key, x, per_entry=False)


@options(strength=AMOUNT)
def contrast(x: Array, strength: ArrayLike, *, key: Array) -> Array:
    """Scale an example about its mean by one factor between `1 / (1 + strength)` and `1 + strength`.

    The factor is uniform on the logarithmic scale.

    Args:
        x: `[n, ...]`.
        strength: at least 0, dimensionless, a scalar or `[n]`.
        key: PRNG key.

    Returns:
        Like `x`.

    Raises:
        InputError: for a concrete strength below 0, or a shape that is neither `[]` nor `[n]`.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> x = jnp.arange(8.0).reshape(1, 8)
    >>> float(jnp.mean(hg.augment.contrast(x, 0.5, key=jax.random.key(0))))
    3.5
    """
    x, strength = _prepared("contrast", "strength", x, strength)
    mean = jnp.mean(x, axis=tuple(range(1, x.ndim)), keepdims=True)
    return mean + (x - mean) * jnp.exp(jnp.log1p(strength) * _uniform(key, x, per_entry=False))


@options(strength=AMOUNT)
def jitter(x: Array, strength: ArrayLike, *, key: Array) -> Array:
    """Scale each entry by a factor of its own between `1 / (1 + strength)` and `1 + strength`.

    The factors are uniform on the logarithmic scale.

    Args:
        x: `[n, ...]`.
        strength: at least 0, dimensionless, a scalar or `[n]`.
        key: PRNG key.

    Returns:
        Like `x`.

    Raises:
        InputError: for a concrete strength below 0, or a shape that is neither `[]` nor `[n]`.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> x = hg.augment.jitter(jnp.ones((1, 1000)), 1.0, key=jax.random.key(0))
    >>> bool(jnp.all((x >= 0.5) & (x <= 2.0)))
    True
    """
    x, strength = _prepared("jitter", "strength", x, strength)
    return x * jnp.exp(jnp.log1p(strength) * _uniform(key, x, per_entry=True))


@options(shift=AMOUNT)
def translate(images: Array, shift: ArrayLike, *, key: Array) -> Array:
    """Move each image by up to `shift` pixels along each axis, with linear interpolation for fractions of a pixel.

    Pixels that come in from outside are zero. The derivative with respect to `shift` is that of the interpolation.

    Args:
        images: `[n, height, width]` or `[n, height, width, channels]`.
        shift: in pixels, at least 0, a scalar or `[n]`.
        key: PRNG key.

    Returns:
        Like `images`.

    Raises:
        InputError: for a concrete shift below 0, a shape that is neither `[]` nor `[n]`, or images with other axes.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> hg.augment.translate(jnp.ones((2, 8, 8)), 1.5, key=jax.random.key(0)).shape
    (2, 8, 8)
    """
    images, shift = _prepared("translate", "shift", images, shift)
    _check_images("translate", images)
    n, height, width = images.shape[:3]
    moves = jax.random.uniform(key, (2, n), images.dtype, -1, 1) * shift.reshape(1, -1)

    def interpolation(size: int, move: Array) -> Array:
        """`[n, size, size]`: row i holds the weights of the pixels around `i - move`."""
        at = jnp.arange(size, dtype=images.dtype)
        distance = at[None, :, None] - move[:, None, None] - at[None, None, :]
        return jnp.maximum(1 - jnp.abs(distance), 0)

    moved = jnp.einsum("nij,nj...->ni...", interpolation(height, moves[0]), images)
    return jnp.einsum("nkj,nij...->nik...", interpolation(width, moves[1]), moved)


@options(length=AMOUNT, holes=AMOUNT, max_holes=Number(least=1, integer=True, static=True))
def cutout(images: Array, length: ArrayLike, holes: ArrayLike, *, max_holes: int, key: Array) -> Array:
    """Set `holes` squares of `length` × `length` pixels to zero, each around a pixel drawn uniformly.

    `length` and `holes` are rounded to whole numbers and have derivative zero. Squares may overlap and extend beyond
    the image.

    Args:
        images: `[n, height, width]` or `[n, height, width, channels]`.
        length: side in pixels, at least 0, a scalar or `[n]`.
        holes: number of squares, at least 0, a scalar or `[n]`. A traced number above `max_holes` counts as
            `max_holes`.
        max_holes: a Python integer; the cost grows with it, not with `holes`.
        key: PRNG key.

    Returns:
        Like `images`.

    Raises:
        InputError: for a concrete length or number below 0, or a number above `max_holes`; for a shape that is neither
            `[]` nor `[n]`, or images with other axes.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> cut = hg.augment.cutout(jnp.ones((3, 9, 9)), 3.0, jnp.asarray([0.0, 1.0, 2.0]), max_holes=2,
    ...                         key=jax.random.key(0))
    >>> [int(zeros) for zeros in jnp.sum(cut == 0, axis=(1, 2))]
    [0, 6, 18]
    """
    _check_most(holes, max_holes)
    images, length = _prepared("cutout", "length", images, length)
    _, holes = _prepared("cutout", "holes", images, holes)
    _check_images("cutout", images)
    n, sizes = images.shape[0], images.shape[1:3]
    length, holes = (jnp.round(jax.lax.stop_gradient(value)).reshape(1, -1, 1) for value in (length, holes))

    def inside(axis: int, key: Array) -> Array:
        """`[max_holes, n, size]`: which rows or columns each square covers."""
        first = jax.random.randint(key, (max_holes, n, 1), 0, sizes[axis]) - jnp.floor(length / 2)
        at = jnp.arange(sizes[axis], dtype=images.dtype).reshape(1, 1, -1)
        return (at >= first) & (at < first + length)

    rows, columns = (inside(axis, k) for axis, k in enumerate(jax.random.split(key)))
    used = jnp.arange(max_holes, dtype=images.dtype).reshape(-1, 1, 1) < holes
    hidden = jnp.any((rows & used)[:, :, :, None] & columns[:, :, None, :], axis=0)
    return jnp.where(hidden.reshape(*hidden.shape, *(1,) * (images.ndim - 3)), 0, images)


def _prepared(function: str, name: str, x: Array, strength: ArrayLike) -> tuple[Array, Array]:
    """Data and strength as arrays of one dtype; the strength is at least 0 and has as many axes as the data."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise InputTypeError(
            f"{function}: the data must be floating-point examples [n, ...], found {x.dtype} of shape {x.shape}: "
            "convert them to floats, and give one example an axis of its own, x[None]."
        )
    shape = jnp.shape(strength)
    if shape not in ((), (x.shape[0],)):
        raise InputError(
            f"{function}: {name} must be a scalar or one number for each example, [{x.shape[0]}], found shape {shape}."
        )
    value = jnp.asarray(strength, x.dtype)
    value = jnp.where(value < 0, 0, value)  # not jnp.maximum, whose derivative at 0 is one half
    return x, value.reshape(-1, *(1,) * (x.ndim - 1))


def _check_images(function: str, images: Array) -> None:
    if images.ndim not in (3, 4):
        raise InputError(
            f"{function}: images must be [n, height, width] or [n, height, width, channels], found shape "
            f"{images.shape}: reshape them."
        )


def _check_most(holes: ArrayLike, most: int) -> None:
    if not isinstance(holes, Tracer) and np.any(np.asarray(holes) > most):
        raise InputError(
            f"cutout: holes must be at most max_holes={most}, found {np.max(np.asarray(holes)):g}: raise max_holes."
        )


def _uniform(key: Array, x: Array, *, per_entry: bool) -> Array:
    """Uniform numbers between -1 and 1, one for each example or one for each entry."""
    shape = x.shape if per_entry else (x.shape[0],) + (1,) * (x.ndim - 1)
    return jax.random.uniform(key, shape, x.dtype, -1, 1)

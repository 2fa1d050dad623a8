r"""How far apart two ReLU networks are as functions, without the data: distances to a network that was trained before.

    D(θ, θ₀) = E_x ½ ‖f(x, θ) − f(x, θ₀)‖²

For each class, the mean and covariance of the inputs are kept of the data, and how often each unit is active at θ₀.
Gates are then independent coins m ~ Bernoulli(μ), the same for both networks (Bernoulli gated linear networks):

    a ← m ⊙ (Wᵀa + b),    from layer to layer, with one gate for θ₀ and θ

BGLN-S draws inputs and gates. BGLN-D carries the first two moments of a₀ and d = a − a₀ through the layers, the cross
moment E[d a₀ᵀ] included, and gates them by μμᵀ + diag(μ(1 − μ)): it is the expectation of BGLN-S to rounding, at any
depth. References: the distance itself on data, and that of the linearised network (the neural tangent kernel) on data.

Source: Dhawan, Huang, Bae & Grosse 2023, "Efficient parametric approximations of neural network function space
distance", arXiv:2302.03519. Differs: their code drops E[d a₀ᵀ], without which a distance comes out a few percent small.
Where it fails: the units of a layer are taken as independent of each other and of the input given the class, so that
distances come out too small while their order is right; far from θ₀ gates move, which a distance on data alone sees.
Cost of BGLN-D: O(c Σ width³), of BGLN-S O(c · samples · |θ|), whatever the number of rows was. Memory: O(c (d² + Σ
width)) kept, O(c width²) on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._options import Choice, Number, Slot, options
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.objectives import _found

Layers = Sequence[tuple[Array, Array]]


class FunctionMoments(NamedTuple):
    """What `function_distance` keeps of a network and its data; made by `function_moments`.

    Attributes:
        params: the layers `((weight, bias), ...)` of the network from which distances are measured.
        share: of each class in the data, `[c]`.
        mean: of the inputs, `[c, d]`.
        covariance: of the inputs, `[c, d, d]`.
        active: how often each unit of each hidden layer is active, `[c, width]` for each.
    """

    params: PyTree
    share: Array
    mean: Array
    covariance: Array
    active: tuple[Array, ...]


@options()
def function_moments(params: Layers, x: Array, labels: Array | None = None) -> FunctionMoments:
    r"""Summarise a ReLU network and its data, class by class, in a size that does not grow with the rows.

    Args:
        params: layers `((weight [m, k], bias [k]), ...)` of a network `relu(… relu(x W₁ + b₁) …) W_L + b_L`.
        x: inputs, `[n, d]`.
        labels: one-hot, `[n, c]`: moments of each class apart. None for all rows together.

    Returns:
        `FunctionMoments`, with a leading axis of classes.

    Raises:
        InputError: for layers whose shapes do not fit each other or x, labels that are not one-hot, and a class without
            rows (where labels are traced, NaN).
        InputTypeError: for parameters that are not a sequence of pairs.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> layers = [(jnp.array([[1.0, -1.0]]), jnp.zeros(2)), (jnp.ones((2, 1)), jnp.zeros(1))]  # f(x) = |x|
    >>> kept = hg.objectives.function_moments(layers, jnp.array([[1.0], [2.0], [-3.0]]))
    >>> [round(float(p), 3) for p in kept.active[0][0]]
    [0.667, 0.333]
    """
    inputs = _found.table("function_moments: x", x)
    layers = _layers("function_moments", params, inputs.shape[1])
    n = inputs.shape[0]
    if labels is None:
        member = jnp.ones((n, 1), inputs.dtype)
    else:
        member = _found.one_hot("function_moments: labels", labels, (n, None)).astype(inputs.dtype)
    count = jnp.sum(member, axis=0)
    if not isinstance(count, Tracer) and bool(jnp.any(count == 0)):
        empty = [i for i, rows in enumerate(count.tolist()) if not rows]
        raise InputError(
            f"function_moments: labels has no row of class {empty[0]}, whose moments are unknown: drop its column."
        )
    weight = (member / count[None, :]).T  # [c, n]; NaN for a class without rows
    mean = weight @ inputs
    apart = inputs[None] - mean[:, None]
    covariance = jnp.einsum("cn,cni,cnj->cij", weight, apart, apart)
    active, hidden = [], inputs
    for w, b in layers[:-1]:
        drive = hidden @ w + b[None, :]
        active.append(weight @ (drive > 0).astype(inputs.dtype))
        hidden = jax.nn.relu(drive)
    return FunctionMoments(layers, count / n, mean, covariance, tuple(active))


@options(
    moments=Slot(FunctionMoments, "hg.objectives.FunctionMoments", "hg.objectives.function_moments(params, x)"),
    by=Choice(("moments", "samples")),
    samples=Number(least=1, integer=True, static=True),
)
def function_distance(moments: FunctionMoments, *, by: str, samples: int = 100) -> Callable[..., Array]:
    r"""Measure how far a ReLU network is from an earlier one as a function, `E ½ ‖f(x, θ) − f(x, θ₀)‖²`, without data.

    Args:
        moments: of the earlier network and of its data.
        by: `"moments"` (BGLN-D): the expectation in closed form. `"samples"` (BGLN-S): a mean over draws of inputs
            and gates.
        samples: draws for each class, of BGLN-S.

    Returns:
        `loss(params, hparams, batch)`, which looks at the parameters alone; with a fourth argument `key` for
        `"samples"`. It is a term of an inner loss (keep what an earlier task taught) or of an outer loss.

    Raises:
        InputError: for an unknown `by`; when the loss is called, for layers of other shapes than those of `moments`.
        InputTypeError: for moments of another type, and parameters that are not a sequence of pairs.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> layers = [(jnp.array([[1.0, -1.0]]), jnp.zeros(2)), (jnp.ones((2, 1)), jnp.zeros(1))]
    >>> kept = hg.objectives.function_moments(layers, jnp.array([[1.0], [2.0], [-3.0]]))
    >>> distance = hg.objectives.function_distance(kept, by="moments")
    >>> moved = [layers[0], (layers[1][0], jnp.full(1, 0.5))]  # f + 1/2
    >>> print(f"{distance(layers, None, None):.3f} {distance(moved, None, None):.3f}")
    0.000 0.125
    """
    before = moments.params

    def moved(params: Layers) -> Layers:
        layers = _layers("function_distance", params, moments.mean.shape[1])
        shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (layers, before)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"function_distance: params has layers of shapes {shapes[0]}, and moments was made of {shapes[1]}: "
                "distances are between networks of one architecture."
            )
        return layers

    if by == "samples":
        values, vectors = jnp.linalg.eigh(moments.covariance)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]  # covariances of constant inputs are singular

        def sampled(params: Layers, hparams: PyTree, batch: PyTree, key: Array) -> Array:
            del hparams, batch
            layers = moved(params)
            each = jax.vmap(lambda m, r, p, k: _by_samples(before, layers, m, r, p, k, int(samples)))
            keys = jax.random.split(key, moments.share.shape[0])
            return jnp.sum(moments.share * each(moments.mean, root, moments.active, keys))

        return sampled

    def expected(params: Layers, hparams: PyTree, batch: PyTree) -> Array:
        del hparams, batch
        layers = moved(params)
        each = jax.vmap(lambda m, c, p: _by_moments(before, layers, m, c, p))
        return jnp.sum(moments.share * each(moments.mean, moments.covariance, moments.active))

    return expected


def _by_samples(
    before: Layers, after: Layers, mean: Array, root: Array, active: Sequence[Array], key: Array, samples: int
) -> Array:
    """BGLN-S for one class."""
    keys = jax.random.split(key, len(before))
    a = mean[None, :] + jax.random.normal(keys[0], (samples, mean.size), mean.dtype) @ root.T
    b = a
    for (w, bias), (v, shift), p, k in zip(before[:-1], after[:-1], active, keys[1:], strict=True):
        gate = jax.random.bernoulli(k, p[None, :], (samples, p.size)).astype(a.dtype)
        a, b = gate * (a @ w + bias[None, :]), gate * (b @ v + shift[None, :])
    (w, bias), (v, shift) = before[-1], after[-1]
    return 0.5 * jnp.mean(jnp.sum((b @ v - a @ w + (shift - bias)[None, :]) ** 2, axis=1))


def _by_moments(before: Layers, after: Layers, mean: Array, covariance: Array, active: Sequence[Array]) -> Array:
    """BGLN-D for one class: moments of a, activations before, and of d, how far those after are from them."""
    a = mean
    d = jnp.zeros_like(a)
    aa = covariance + jnp.outer(a, a)
    da = jnp.zeros_like(aa)  # E[d aᵀ]
    dd = jnp.zeros_like(aa)
    for layer, ((w, bias), (v, shift)) in enumerate(zip(before, after, strict=True)):
        # s = Ŵᵀâ and e = ΔᵀÂ + Vᵀd, with the bias as a last row of Ŵ and Δ and a one as the last entry of â.
        w_, delta = jnp.vstack([w, bias[None]]), jnp.vstack([v - w, (shift - bias)[None]])
        aa_ = jnp.block([[aa, a[:, None]], [a[None], jnp.ones((1, 1), a.dtype)]])
        da_ = jnp.hstack([da, d[:, None]])
        moved = v.T @ da_
        cross = moved @ delta
        dd = delta.T @ aa_ @ delta + cross + cross.T + v.T @ dd @ v
        if layer == len(before) - 1:
            return 0.5 * jnp.trace(dd)
        da = (delta.T @ aa_ + moved) @ w_
        a, d = w.T @ a + bias, (v - w).T @ a + (shift - bias) + v.T @ d
        aa = w_.T @ aa_ @ w_
        p = active[layer]
        gate = jnp.outer(p, p) + jnp.diag(p * (1 - p))
        a, d, aa, da, dd = p * a, p * d, gate * aa, gate * da, gate * dd
    raise AssertionError("a network has at least one layer")


@options(apply=Slot(("__call__",), "a function", "apply(params, x) -> outputs"))
def exact_function_distance(apply: Callable[[PyTree, Any], Array], params: PyTree) -> Callable[..., Array]:
    r"""Distance of any network from an earlier one on data, `mean_x ½ ‖f(x, θ) − f(x, θ₀)‖²`: the reference.

    Args:
        apply: `(params, x) -> outputs [n, k]`.
        params: of the earlier network, pytree.

    Returns:
        `loss(params, hparams, x)`, a mean over the rows of x.

    Raises:
        InputTypeError: for something that is not a function.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> distance = hg.objectives.exact_function_distance(lambda w, x: x @ w, jnp.zeros((1, 1)))
    >>> float(distance(jnp.ones((1, 1)), None, jnp.array([[1.0], [3.0]])))
    2.5
    """

    def loss(now: PyTree, hparams: PyTree, x: PyTree) -> Array:
        del hparams
        return _half_square(apply(now, x) - apply(params, x))

    return loss


@options(apply=Slot(("__call__",), "a function", "apply(params, x) -> outputs"))
def ntk_function_distance(apply: Callable[[PyTree, Any], Array], params: PyTree) -> Callable[..., Array]:
    r"""Distance on data of the network linearised at an earlier one, `mean_x ½ ‖J(x) (θ − θ₀)‖²`.

    The quadratic form of the neural tangent kernel's Gauss-Newton matrix. Cost: one derivative along θ − θ₀.

    Args:
        apply: `(params, x) -> outputs [n, k]`.
        params: of the earlier network, pytree.

    Returns:
        `loss(params, hparams, x)`, a mean over the rows of x.

    Raises:
        InputTypeError: for something that is not a function.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> distance = hg.objectives.ntk_function_distance(lambda w, x: x @ w**2, jnp.ones((1, 1)))
    >>> float(distance(jnp.full((1, 1), 1.5), None, jnp.array([[1.0]])))  # ½ (2 · 1/2)²
    0.5
    """

    def loss(now: PyTree, hparams: PyTree, x: PyTree) -> Array:
        del hparams
        return _half_square(jax.jvp(lambda w: apply(w, x), (params,), (_tree.sub(now, params),))[1])

    return loss


def _half_square(gap: Array) -> Array:
    return 0.5 * jnp.sum(gap**2) / gap.shape[0]


def _layers(function: str, params: Any, inputs: int) -> Layers:
    """Return the layers, after a check that their shapes fit each other."""
    pairs = isinstance(params, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in params)
    if not pairs or not params:
        raise InputTypeError(
            f"{function}: params must be a sequence of pairs (weight, bias), one for each layer, found "
            f"{jax.tree.structure(params)}."
        )
    for i, (w, b) in enumerate(params):
        if jnp.ndim(w) != 2 or jnp.shape(b) != jnp.shape(w)[1:] or jnp.shape(w)[0] != inputs:
            raise InputError(
                f"{function}: params[{i}] must have a weight of shape ({inputs}, k) and a bias of shape (k,), found "
                f"shapes {jnp.shape(w)} and {jnp.shape(b)}: weights multiply from the right, as in x @ weight + bias."
            )
        inputs = jnp.shape(w)[1]
    return tuple((jnp.asarray(w), jnp.asarray(b)) for w, b in params)

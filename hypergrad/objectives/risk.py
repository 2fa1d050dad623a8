r"""Estimates of the error on unseen data from the training data alone: risk estimates as outer losses.

    SURE(λ)  = (1/n) [ ‖y − x̂‖² − Σᵢ σᵢ² + 2 Σᵢ σᵢ² ∂x̂ᵢ/∂yᵢ ],      x̂ = w*(λ, y),   y = x + N(0, σ²)
    GCV(λ)   = (1/n) ‖y − ŷ‖² / (1 − tr H / n)²,                        ŷ = H(λ) y
    LOO(λ)   = (1/n) Σᵢ ℓ(yᵢ, ŷᵢ − hᵢ (yᵢ − ŷᵢ) / (1 − hᵢ)),            hᵢ = Hᵢᵢ
    PRESS(λ) = Σᵢ ((yᵢ − ŷᵢ) / (1 − hᵢ))²

SURE is unbiased for the error ‖x̂ − x‖²/n of a denoiser, without the clean signal x. LOO and PRESS are exactly what n
fits with a row left out would give, wherever leaving a row out equals replacing its label by its prediction, as for
ridge regression, smoothing splines and Gaussian processes. GCV is PRESS/n with every leverage replaced by their mean.
And the calibration error of a classifier, smooth in its logits, as a term beside another loss:

    SKCE = 1/(n(n−1)) Σ_{i≠j} exp(−‖pᵢ − pⱼ‖² / (2 width²)) (eᵢ − pᵢ)ᵀ(eⱼ − pⱼ),    p = softmax, e one-hot labels

Source: Stein 1981, "Estimation of the mean of a multivariate normal distribution"; Ramani, Blu & Unser 2008,
"Monte-Carlo SURE"; Golub, Heath & Wahba 1979; Allen 1974; Widmann, Lindsten & Zachariah 2019, arXiv:1910.11385 (SKCE).
Differs: the divergence in SURE is a derivative of the inner problem through `hg.best_response`, exactly or along random
signs, and no finite difference; noise may differ by entry.
Where they fail: SURE needs Gaussian noise of known size and a denoiser that is continuous in y: the jumps of a hard
threshold are not in its divergence, and an unconverged inner solve has NaN derivatives (a status). A leverage of one (a
row that nothing else determines) makes LOO and PRESS infinite; GCV is fooled where few rows hold most of the leverage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad._options import Choice, Number, Slot, options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.objectives import _found

_FUNCTION = Slot(("__call__",), "a function", "a function of the arguments that the docstring names")


class Smoother(Protocol):
    """`(hparams, x, y) -> (fitted, leverage)`: predictions `H y` of the rows that H was made of, like y, and the
    diagonal of H, `[n]`. H must not depend on y.
    """

    def __call__(self, hparams: PyTree, x: PyTree, y: Array) -> tuple[Array, Array]:
        """Predictions and leverages."""
        ...


@options(
    denoiser=_FUNCTION,
    noise=Number(above=0, every=True, advice="write the standard deviation of the noise"),
    divergence=Choice(("exact", "monte_carlo")),
    samples=Number(least=1, integer=True, static=True),
)
def sure(
    denoiser: Callable[[PyTree, PyTree, Array], PyTree],
    *,
    noise: ArrayLike,
    divergence: str,
    samples: int = 1,
    prediction: Callable[[PyTree, PyTree], Array] | None = None,
) -> Callable[..., Array]:
    r"""Stein's unbiased risk estimate: the error of a denoiser against the clean signal, without the clean signal.

        (1/n) [ ‖y − x̂‖² − Σᵢ σᵢ² + 2 Σᵢ σᵢ² ∂x̂ᵢ/∂yᵢ ],    x̂ = prediction(denoiser(λ, start, y), λ)

    The loss starts the denoiser from the parameters it is given and has no gradient with respect to them, so that
    `hg.direct` gives the whole hypergradient. Cost: a tangent solve for each sample (monte_carlo) or for each of the n
    entries (exact), and their derivatives. Memory: n vectors of parameters (exact), or one a sample (monte_carlo).

    Args:
        denoiser: `(hparams, params0, y) -> params`, what `hg.best_response` returns, or any function that is
            differentiable in y. A failed solve makes the estimate NaN.
        noise: σ, standard deviation of the Gaussian noise, in the units of y: a scalar, or an array that broadcasts to
            y.
        divergence: `"exact"`, or `"monte_carlo"`: along random signs b, Σᵢ bᵢ σᵢ² (J b)ᵢ, which is unbiased.
        samples: number of vectors of random signs.
        prediction: `(params, hparams) -> array like y`; None if the parameters are the signal.

    Returns:
        `outer_loss(params, hparams, y)`, with a fourth argument `key` for `"monte_carlo"`. `y` is an array of any
        shape.

    Raises:
        InputError: for noise that is not greater than 0; when the loss is called, for one that does not broadcast to
            y and a prediction of another shape than y.
        InputTypeError: for something that is not a function.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> # What hg.best_response finds for argmin_x ½‖x − y‖² + ½ l2 ‖x‖², here in closed form:
    >>> denoiser = lambda l2, start, y: y / (1 + l2)
    >>> loss = hg.objectives.sure(denoiser, noise=0.5, divergence="exact")
    >>> y = jnp.array([1.0, -2.0, 0.5])
    >>> by_hand = jnp.mean((y - y / 1.3)**2) - 0.25 + 2 * 0.25 / 1.3
    >>> bool(abs(loss(jnp.zeros(3), 0.3, y) - by_hand) < 1e-5)
    True
    """

    def estimate(params: PyTree, hparams: PyTree, y: PyTree, key: Array | None) -> Array:
        signal = _signal(y)
        variance = jnp.square(jnp.asarray(noise, signal.dtype))
        try:
            variance = jnp.broadcast_to(variance, signal.shape)
        except ValueError:
            raise InputError(
                f"sure: noise of shape {jnp.shape(noise)} does not broadcast to y of shape {signal.shape}: give one "
                "standard deviation, or one for each entry."
            ) from None
        start = jax.lax.stop_gradient(params)

        def denoised(at: Array) -> Array:
            found = denoiser(hparams, start, at)
            found = found if prediction is None else prediction(found, hparams)
            if jnp.shape(found) != signal.shape:
                raise InputError(
                    f"sure: the prediction has shape {jnp.shape(found)} where y has {signal.shape}: give prediction=, "
                    "a function from parameters to the signal."
                )
            return found

        guess, push = jax.linearize(denoised, signal)
        if key is None:
            basis = jnp.eye(signal.size, dtype=signal.dtype).reshape(signal.size, *signal.shape)
            spread = jnp.sum(jax.vmap(lambda e: jnp.sum(variance * e * push(e)))(basis))
        else:
            signs = jax.random.rademacher(key, (int(samples), *signal.shape), signal.dtype)
            spread = jnp.mean(jax.vmap(lambda b: jnp.sum(variance * b * push(b)))(signs))
        return (jnp.sum((signal - guess) ** 2) - jnp.sum(variance) + 2 * spread) / signal.size

    if divergence == "exact":
        return lambda params, hparams, y: estimate(params, hparams, y, None)
    return lambda params, hparams, y, key: estimate(params, hparams, y, key)


def _signal(y: PyTree) -> Array:
    leaves = jax.tree.leaves(y)
    if len(leaves) != 1 or not jnp.size(leaves[0]):
        raise InputError(
            f"sure: the batch must be one array y of noisy data with at least one entry, found {len(leaves)} leaves: "
            "let the losses close over anything else."
        )
    signal = jnp.asarray(leaves[0])
    return signal if jnp.issubdtype(signal.dtype, jnp.floating) else signal.astype(jnp.result_type(float))


@options(penalty=_FUNCTION)
def ridge_smoother(
    penalty: Callable[[PyTree], ArrayLike], *, features: Callable[[PyTree, PyTree], Array] | None = None
) -> Smoother:
    r"""Ridge regression as a linear smoother, for `gcv`, `leave_one_out` and `press`.

        H = Φ (ΦᵀΦ + diag(p))⁻¹ Φᵀ,    the fit of argmin_w ‖y − Φw‖² + Σⱼ pⱼ wⱼ²

    Cost: O(n d² + d³). Memory O(n d).

    Args:
        penalty: `hparams -> p`, a scalar or one for each feature `[d]`, at least 0. A zero leaves a feature free, such
            as a column of ones for the intercept; ΦᵀΦ must then determine it.
        features: `(hparams, x) -> Φ [n, d]`; None if x is the table of features.

    Returns:
        A `Smoother`, `(hparams, x, y) -> (fitted, leverage)`. Both are NaN where a penalty is below 0.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: when it is called, for a table, labels or penalties of another shape, and for a penalty below 0
            where it is known.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> smoother = hg.objectives.ridge_smoother(lambda log_l2: jnp.exp(log_l2))
    >>> fitted, leverage = smoother(0.0, jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0]))
    >>> [round(float(h), 4) for h in leverage]  # x² / (Σ x² + 1)
    [0.1667, 0.6667]
    """

    def smooth(hparams: PyTree, x: PyTree, y: Array) -> tuple[Array, Array]:
        table = _found.table("ridge_smoother: the features", x if features is None else features(hparams, x))
        n, d = table.shape
        strength = _found.positive("ridge_smoother: penalty", penalty(hparams), "write jnp.exp(log_penalty)", zero=True)
        if strength.shape not in ((), (1,), (d,)):
            raise InputError(
                f"ridge_smoother: penalty must be a scalar or have one entry for each of the {d} features, found shape "
                f"{strength.shape}."
            )
        if y.shape[0] != n:
            raise InputError(f"ridge_smoother: the features have {n} rows, and y has shape {y.shape}.")
        strength = jnp.broadcast_to(strength.astype(table.dtype), (d,))
        factor = jax.scipy.linalg.cho_factor(table.T @ table + jnp.diag(strength), lower=True)
        half = jax.scipy.linalg.solve_triangular(factor[0], table.T, lower=True)  # H = halfᵀ half
        return half.T @ (half @ y), jnp.sum(half**2, axis=0)

    return smooth


@options(smoother=_FUNCTION)
def gcv(smoother: Smoother) -> Callable[..., Array]:
    r"""Generalized cross-validation of a linear smoother, `(1/n) ‖y − ŷ‖² / (1 − tr H / n)²`.

    Invariant to rotations of the rows, where leave-one-out is not. Cost: that of the smoother.

    Args:
        smoother: `(hparams, x, y) -> (fitted, leverage)`, such as `ridge_smoother(...)`; of a matrix H(λ, x) write
            `lambda h, x, y: (H(h, x) @ y, jnp.diag(H(h, x)))`.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which does not look at the parameters: with `hg.direct` it is exact. For
        `y` of shape `[n, k]` it is a mean over the k columns too.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: when the loss is called, for a batch or smoother of other shapes.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = hg.objectives.gcv(hg.objectives.ridge_smoother(lambda log_l2: jnp.exp(log_l2)))
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0])
    >>> print(f"{loss(None, 0.0, (x, y)):.4f}")
    0.6939
    """

    def loss(params: PyTree, hparams: PyTree, batch: PyTree) -> Array:
        del params
        y, fitted, leverage = _smoothed("gcv", smoother, hparams, batch)
        return jnp.mean((y - fitted) ** 2) / (1 - jnp.mean(leverage)) ** 2

    return loss


@options(smoother=_FUNCTION, loss=_FUNCTION)
def leave_one_out(
    smoother: Smoother, *, loss: Callable[[Array, Array], Array] = lambda y, prediction: (y - prediction) ** 2
) -> Callable[..., Array]:
    r"""Leave-one-out error of a linear smoother in closed form: mean of `ℓ(yᵢ, ŷᵢ − hᵢ (yᵢ − ŷᵢ)/(1 − hᵢ))`.

    Each row is predicted by the fit to the n − 1 others. It costs as much as the smoother; n fits would cost
    n times as much.

    Args:
        smoother: as in `gcv`. Exact where a fit without row i is the fit in which yᵢ is replaced by its prediction.
        loss: `(y, prediction) -> array`, whose mean is taken. The default is the squared error.

    Returns:
        `outer_loss(params, hparams, (x, y))`, which does not look at the parameters: with `hg.direct` it is exact.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: when the loss is called, for a batch or smoother of other shapes.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = hg.objectives.leave_one_out(hg.objectives.ridge_smoother(lambda log_l2: jnp.exp(log_l2)))
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0])
    >>> print(f"{loss(None, 0.0, (x, y)):.4f}")  # of fits to the other row: 6/5 · 1 and 1/2 · 2
    2.0200
    """

    def outer(params: PyTree, hparams: PyTree, batch: PyTree) -> Array:
        del params
        y, fitted, leverage = _smoothed("leave_one_out", smoother, hparams, batch)
        return jnp.mean(loss(y, y - (y - fitted) / (1 - leverage)))

    return outer


@options(smoother=_FUNCTION)
def press(smoother: Smoother) -> Callable[..., Array]:
    r"""Allen's PRESS of a linear smoother, `Σᵢ ((yᵢ − ŷᵢ)/(1 − hᵢ))²`: the sum of squared leave-one-out errors.

    Args:
        smoother: as in `gcv`.

    Returns:
        `outer_loss(params, hparams, (x, y))`: n times `leave_one_out(smoother)`, in the units of a sum of squares.

    Raises:
        InputTypeError: for something that is not a function.
        InputError: when the loss is called, for a batch or smoother of other shapes.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = hg.objectives.press(hg.objectives.ridge_smoother(lambda log_l2: jnp.exp(log_l2)))
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0])
    >>> print(f"{loss(None, 0.0, (x, y)):.4f}")
    4.0400
    """

    def loss(params: PyTree, hparams: PyTree, batch: PyTree) -> Array:
        del params
        y, fitted, leverage = _smoothed("press", smoother, hparams, batch)
        return jnp.sum(((y - fitted) / (1 - leverage)) ** 2)

    return loss


def _smoothed(name: str, smoother: Smoother, hparams: PyTree, batch: PyTree) -> tuple[Array, Array, Array]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(f"{name}: the batch must be (x, y), found {type(batch).__name__}.")
    x, y = batch[0], jnp.asarray(batch[1])
    if y.ndim not in (1, 2) or not y.size:
        raise InputError(f"{name}: y must have shape [n] or [n, k] and at least one row, found shape {y.shape}.")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        y = y.astype(jnp.result_type(float))
    found = smoother(hparams, x, y)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise InputError(
            f"{name}: smoother must return (fitted, leverage), found {type(found).__name__}: of a matrix H write "
            "(H @ y, jnp.diag(H))."
        )
    fitted, leverage = found
    if jnp.shape(fitted) != y.shape or jnp.shape(leverage) != y.shape[:1]:
        raise InputError(
            f"{name}: smoother must return predictions like y, of shape {y.shape}, and {y.shape[0]} leverages, found "
            f"shapes {jnp.shape(fitted)} and {jnp.shape(leverage)}."
        )
    return y, fitted, leverage if y.ndim == 1 else leverage[:, None]


@options(width=Number(above=0, advice="write a distance between vectors of probabilities, such as 0.5"))
def calibration_error(logits: ArrayLike, labels: ArrayLike, *, width: ArrayLike) -> Array:
    r"""Squared kernel calibration error of a classifier, smooth in its logits: a term of an outer loss.

        1/(n(n−1)) Σ_{i≠j} exp(−‖pᵢ − pⱼ‖² / (2 width²)) (eᵢ − pᵢ)ᵀ(eⱼ − pⱼ)

    It is unbiased, and so lies around zero, on either side, for a calibrated classifier. Unlike binned errors of
    calibration, it has a derivative. It says nothing about accuracy: add it to a loss that does. Cost O(n² c), memory
    O(n²).

    Args:
        logits: `[n, c]`, n at least 2; probabilities are their softmax.
        labels: one-hot, `[n, c]`.
        width: of the kernel, a distance between vectors of probabilities (dimensionless, at most √2 apart).

    Returns:
        A scalar.

    Raises:
        InputError: for labels that are not one-hot (NaN where they are traced), fewer than two rows, and a width that
            is not greater than 0.
        InputTypeError: for logits that are not floating point.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    >>> sure_of_it = jnp.array([[5.0, 0.0]] * 4)  # right three times of four, and 0.993 sure
    >>> half_sure = jnp.array([[1.1, 0.0]] * 4)
    >>> error = lambda logits: hg.objectives.calibration_error(logits, labels, width=0.5)
    >>> bool(error(sure_of_it) > error(half_sure))
    True
    """
    scores = _found.table("calibration_error: logits", logits)
    n = scores.shape[0]
    if n < 2:
        raise InputError("calibration_error: logits must have at least two rows, found 1: its terms are pairs of rows.")
    wanted = _found.one_hot("calibration_error: labels", labels, (n, scores.shape[1])).astype(scores.dtype)
    p = jax.nn.softmax(scores, axis=1)
    size = jnp.sum(p**2, axis=1)
    squares = size[:, None] + size[None, :] - 2 * p @ p.T
    kernel = jnp.exp(-squares / (2 * jnp.asarray(width, scores.dtype) ** 2))
    gap = wanted - p
    products = kernel * (gap @ gap.T)
    return (jnp.sum(products) - jnp.trace(products)) / (n * (n - 1))

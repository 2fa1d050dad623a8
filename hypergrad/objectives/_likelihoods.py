r"""What the probabilistic objectives share: likelihoods of a model's outputs, and settings that may be hyperparameters.

    categorical   −log softmax(f)_y             Λ = diag p − p pᵀ        y: class numbers [n]
    bernoulli     −log sigmoid(±f)              Λ = diag p (1 − p)       y: 0 or 1, [n] or [n, c]
    gaussian      ½ (y − f)² / s² + ½ log 2πs²  Λ = I / s²               y: [n] or [n, c];  s: the noise

Λ is the Hessian of −log p(y | f) in the outputs f, which does not depend on y here, so that it is the Gauss-Newton and
the Fisher matrix at once. Its symmetric square root has no closed form for classes; its derivative solves S dS + dS S =
dΛ, which is done in the eigenbasis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from hypergrad import _tree
from hypergrad._data import rows as rows_of
from hypergrad._options import Choice, Number
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_float, keystr
from hypergrad.objectives import _found

LIKELIHOOD = Choice(("categorical", "bernoulli", "gaussian"))
ROWS = Number(least=1, integer=True, static=True, advice="write the number of training examples, len(x)")
HIGHEST = jax.lax.Precision.HIGHEST


class Positive(NamedTuple):
    """An option whose value is positive numbers, or a function from the hyperparameters to them.

    Attributes:
        words: strings that stand for a value of their own.
    """

    words: tuple[str, ...] = ()

    def check(self, function: str, name: str, value: Any) -> None:
        """Raise for numbers that are not positive, and for anything that is neither a number nor a function."""
        if callable(value) or (isinstance(value, str) and value in self.words):
            return
        written = f", one of {', '.join(map(repr, self.words))}" if self.words else ""
        leaves = jax.tree_util.tree_leaves_with_path(value)
        for path, leaf in leaves or [((), value)]:
            number = isinstance(leaf, (int, float, np.generic, np.ndarray, jax.Array)) and not isinstance(leaf, bool)
            if not number or not (is_float(leaf) or isinstance(leaf, int)):
                raise InputTypeError(
                    f"{function}: {name}{keystr(path)} must be positive numbers{written}, or a function from the "
                    f"hyperparameters to them, found {leaf!r}: write lambda hparams: jnp.exp(hparams['log_{name}'])."
                )
        positive(function, name, value)


class Likelihood(NamedTuple):
    """How the outputs of a model explain its targets.

    Attributes:
        nll: `(outputs [n, c], targets, hparams) -> [n]`, −log p(y | f) in nats.
        root: `(outputs [n, c], hparams, symmetric) -> [n, c, c]`, S with S Sᵀ = Λ; the symmetric one where that is
            asked for.
        noise: `hparams -> s`, for the Gaussian; else None.
    """

    nll: Callable[[Array, Array, PyTree], Array]
    root: Callable[[Array, PyTree, bool], Array]
    noise: Callable[[PyTree], Array] | None


def positive(function: str, name: str, values: PyTree) -> PyTree:
    """`values` as arrays. Concrete ones that are not positive raise; traced ones become NaN, which a status reports.

    Raises:
        InputError: naming function, setting, path and what was found.
    """
    advice = (
        f"tune its logarithm, as in {name}=lambda hparams: jnp.exp(hparams['log_{name}']), or keep it positive with "
        "domain=hg.domains.log()"
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _found.positive(f"{function}: {name}{keystr(path)}", leaf, advice), values
    )


def setting(function: str, name: str, value: Any) -> Callable[[PyTree], PyTree]:
    """`hparams -> value`, checked, for a setting that is constant or a function of the hyperparameters."""
    return lambda hparams: positive(function, name, value(hparams) if callable(value) else value)


def likelihood(function: str, name: str, noise: Any) -> Likelihood:
    """Return the likelihood of that name.

    Args:
        function: name of the caller, for messages.
        name: one of `LIKELIHOOD`.
        noise: standard deviation of the Gaussian, or a function from the hyperparameters to it; None for the others.

    Raises:
        InputError: for a Gaussian without noise, or noise without a Gaussian.
    """
    if (name == "gaussian") != (noise is not None):
        raise InputError(
            f"{function}: noise is the standard deviation of likelihood='gaussian', which needs it, and no other does; "
            f"found noise={noise!r} with likelihood={name!r}: "
            + ("write noise=lambda hparams: jnp.exp(hparams['log_noise'])." if noise is None else "leave noise out.")
        )
    if name == "categorical":
        return Likelihood(lambda f, y, h: _cross_entropy(function, f, y), _categorical_root, None)
    if name == "bernoulli":
        return Likelihood(lambda f, y, h: _binary(function, f, y), _bernoulli_root, None)
    scale = setting(function, "noise", noise)

    def deviation(hparams: PyTree) -> Array:
        found = scale(hparams)
        if jnp.shape(found) != ():
            raise InputError(f"{function}: noise must be one number, found shape {jnp.shape(found)}.")
        return found

    def nll(outputs: Array, targets: Array, hparams: PyTree) -> Array:
        s = deviation(hparams).astype(outputs.dtype)
        gap = (outputs - _beside(function, outputs, targets)) / s
        return jnp.sum(0.5 * gap**2 + jnp.log(s) + 0.5 * jnp.log(2 * jnp.pi), axis=1)

    def root(outputs: Array, hparams: PyTree, symmetric: bool) -> Array:
        del symmetric
        eye = jnp.eye(outputs.shape[1], dtype=outputs.dtype) / deviation(hparams).astype(outputs.dtype)
        return jnp.broadcast_to(eye, (outputs.shape[0], *eye.shape))

    return Likelihood(nll, root, deviation)


def pair(function: str, batch: Any, rows: int | None) -> tuple[PyTree, Array]:
    """`(x, y)` of a batch; `rows` of them, where that is given.

    Raises:
        InputTypeError: for a batch that is not a pair.
        InputError: for another number of rows.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise InputTypeError(
            f"{function}: the batch must be a pair (x, y) of inputs and targets, found {type(batch).__name__}: pass "
            "train=(x, y) and valid=(x, y), the same training data."
        )
    found = rows_of(tuple(batch), f"{function}: the batch")
    if rows is not None and found != rows:
        raise InputError(
            f"{function}: outer_loss must see all {rows} training examples, found {found}: pass all of them as valid, "
            "which draws blocks of its own with size=, or write the right number in rows=."
        )
    return batch[0], jnp.asarray(batch[1])


def outputs_of(function: str, model: Callable[..., Any], params: PyTree, hparams: PyTree, x: PyTree) -> Array:
    """The outputs of a model as `[n, c]`."""
    found = jnp.asarray(model(params, hparams, x))
    n = jax.tree.leaves(x)[0].shape[0]
    if found.ndim not in (1, 2) or found.shape[0] != n or not is_float(found):
        raise InputError(
            f"{function}: model(params, hparams, x) must return floating-point outputs [{n}, c] or [{n}] for {n} rows "
            f"of x, found {found.dtype} of shape {found.shape}."
        )
    return found.reshape(n, -1)


def _categorical_root(outputs: Array, hparams: PyTree, symmetric: bool) -> Array:
    del hparams
    log_p = jax.nn.log_softmax(outputs)
    p, q = jnp.exp(log_p), jnp.exp(0.5 * log_p)
    if not symmetric:  # (diag q − p qᵀ)(diag q − q pᵀ) = diag p − p pᵀ, since ‖q‖ = 1
        return q[:, :, None] * jnp.eye(p.shape[1], dtype=p.dtype)[None] - p[:, :, None] * q[:, None, :]
    hessian = p[:, :, None] * jnp.eye(p.shape[1], dtype=p.dtype)[None] - p[:, :, None] * p[:, None, :]
    return jax.vmap(symmetric_root)(hessian)


def _bernoulli_root(outputs: Array, hparams: PyTree, symmetric: bool) -> Array:
    del hparams, symmetric
    root = jnp.exp(0.5 * (jax.nn.log_sigmoid(outputs) + jax.nn.log_sigmoid(-outputs)))
    return root[:, :, None] * jnp.eye(outputs.shape[1], dtype=outputs.dtype)[None]


@jax.custom_jvp
def symmetric_root(matrix: Array) -> Array:
    """The symmetric square root of a positive semi-definite `[c, c]`; differentiable where it is singular as well, as
    long as its null space stays where it is.
    """
    return _spectral(matrix)[0]


@symmetric_root.defjvp
def _symmetric_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    root, values, vectors = _spectral(matrix)
    sums = values[:, None] + values[None, :]
    seen = sums > jnp.finfo(matrix.dtype).eps ** 0.5 * jnp.max(values)  # below, eigenvalues are rounding
    turned = jnp.matmul(jnp.matmul(vectors.T, change, precision=HIGHEST), vectors, precision=HIGHEST)
    solved = _tree.safe_divide(turned, sums, where=seen, otherwise=0.0)
    return root, jnp.matmul(jnp.matmul(vectors, solved, precision=HIGHEST), vectors.T, precision=HIGHEST)


def _spectral(matrix: Array) -> tuple[Array, Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    values = jnp.sqrt(jnp.maximum(values, 0))
    return jnp.matmul(vectors * values[None, :], vectors.T, precision=HIGHEST), values, vectors


def _cross_entropy(function: str, outputs: Array, labels: Array) -> Array:
    n, c = outputs.shape
    if labels.shape != (n,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        one_hot = " They look like one-hot rows: write jnp.argmax(y, axis=1)." if labels.shape == (n, c) else ""
        raise InputError(
            f"{function}: targets of likelihood='categorical' must be class numbers, integers of shape [{n}], found "
            f"{labels.dtype} of shape {labels.shape}.{one_hot}"
        )
    if c < 2:
        raise InputError(
            f"{function}: likelihood='categorical' needs an output for each of at least two classes, found {c}: write "
            "likelihood='bernoulli' for one logit."
        )
    _check_classes(function, labels, c)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def _binary(function: str, outputs: Array, labels: Array) -> Array:
    if labels.dtype != bool and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"{function}: targets of likelihood='bernoulli' must be 0 or 1, of an integer or boolean type, found "
            f"{labels.dtype}: write y.astype(jnp.int32)."
        )
    labels = _beside(function, outputs, labels.astype(jnp.int32))
    _check_classes(function, labels, 2)
    both = jnp.stack([jax.nn.log_sigmoid(-outputs), jax.nn.log_sigmoid(outputs)], axis=-1)
    return -jnp.sum(jnp.take_along_axis(both, labels[..., None], axis=-1), axis=(1, 2))


def _check_classes(function: str, labels: Array, classes: int) -> None:
    """Check labels that are concrete; `hg.tune` and `hg.check` check those that are traced."""
    if isinstance(labels, Tracer):
        return
    found = np.asarray(labels)
    wrong = (found < 0) | (found >= classes)
    if np.any(wrong):
        raise InputError(
            f"{function}: targets must be classes from 0 to {classes - 1}, found {found[wrong].flat[0]} in row "
            f"{int(np.argwhere(wrong)[0][0])}."
        )


def _beside(function: str, outputs: Array, targets: Array) -> Array:
    """Targets in the shape of the outputs."""
    if targets.shape != outputs.shape and not (targets.shape == outputs.shape[:1] and outputs.shape[1] == 1):
        raise InputError(
            f"{function}: targets must have the shape of the outputs, {outputs.shape}, found {targets.shape}: reshape "
            "one of them."
        )
    return targets.reshape(outputs.shape)

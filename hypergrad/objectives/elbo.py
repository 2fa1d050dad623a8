r"""Data-emphasized ELBO: a variational bound whose hyperparameters can be learned where parameters outnumber data.

    −(1/n) E_q log p(y | w)  +  KL(q ‖ p) / (κ n),     q = N(μ, σ²),   p = Π_g N(center_g, τ_g),   D = number of weights
    KL at the best variances   ½ Σ_g D_g log τ*_g − ½ Σ log σ²,     τ*_g = (‖μ_g − center_g‖² + Σ_g σ²) / D_g

κ = 1 is the evidence lower bound. With D ≫ n its KL term drowns the data, and its maximum under-fits: noise and prior
explain everything. κ = D/n weighs both alike, "data-emphasized": the loss is −(1/n) E_q log p + KL/D. The prior
variances are at their optimum in closed form, so that by the envelope theorem no derivative goes through them.

Source: Harvey, Petrov & Hughes 2025, "Learning hyperparameters via a data-emphasized variational objective",
arXiv:2502.01861. Differs: the standard deviation may be one for all, for each layer or each
parameter; for Gaussian noise the expectation can be exact for a model that is linear in its weights.
Cost of a loss: `samples` evaluations of the model. `expectation="linear"` one gradient of the model for each example
and output, memory n c D.
Where it fails: with κ ≠ 1 the loss bounds no evidence: compare models by it at one κ only. The noise that it learns
at κ = D/n is a little small (it is fitted where κ n data would be).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hypergrad import _tree
from hypergrad._checks import check_params, check_same_structure, spread
from hypergrad._options import Choice, Number, options
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree
from hypergrad.objectives._kernel import weighted_rows
from hypergrad.objectives._likelihoods import (
    LIKELIHOOD,
    ROWS,
    Positive,
    outputs_of,
    pair,
    setting,
)
from hypergrad.objectives._likelihoods import (
    likelihood as make_likelihood,
)
from hypergrad.objectives.evidence import Losses


class Posterior(NamedTuple):
    """A mean-field Gaussian over the weights of a model; the parameters of the inner problem of `elbo`.

    Attributes:
        mean: μ, a pytree like the weights.
        raw_scale: the standard deviation before the softplus that keeps it positive: a scalar, or a pytree prefix of
            `mean` with one for each layer or each weight.
    """

    mean: PyTree
    raw_scale: PyTree


@options(scale=Positive())
def posterior(mean: PyTree, scale: Any = 1e-4) -> Posterior:
    """The posterior around given weights from which training on `elbo` starts.

    Args:
        mean: initial or pre-trained weights, a pytree of floating arrays.
        scale: initial standard deviation: positive numbers, one for all or a pytree prefix of `mean`.

    Raises:
        InputError: for a scale that is not positive, or not a prefix of `mean`.
        InputTypeError: for weights or scales that are not numbers.

    >>> import hypergrad as hg, jax, jax.numpy as jnp
    >>> start = hg.objectives.posterior({"w": jnp.zeros(3)}, scale=0.1)
    >>> print(f"{jax.nn.softplus(start.raw_scale):.4f}")
    0.1000
    """
    mean = check_params(mean)
    if callable(scale):
        raise InputError("posterior: scale must be positive numbers, found a function: write scale=1e-4.")
    scales = jax.tree.map(lambda s: jnp.asarray(s, _tree.dtype(mean)), scale)
    made = Posterior(mean, jax.tree.map(lambda s: s + jnp.log(-jnp.expm1(-s)), scales))  # whose softplus is s
    jax.eval_shape(_scales, made)
    return made


@options()
def prior_variances(posterior: Posterior, *, center: PyTree = None, groups: PyTree = None) -> dict[Hashable, Array]:
    """The prior variances at which the KL divergence is smallest, one for each group of weights.

        τ*_g = (‖μ_g − center_g‖² + Σ_g σ²) / D_g

    Args:
        posterior: `Posterior(mean, raw_scale)`.
        center: mean of the prior, a pytree like the weights, such as pre-trained ones; None for zero.
        groups: names of the groups, a pytree prefix of the weights whose leaves are strings or integers, such as
            `{"backbone": "backbone", "head": "head"}`; None for one group, called "all".

    Returns:
        The variance of each group by its name, a scalar in the units of the weights, squared.

    Raises:
        InputError: for groups that are not a prefix of the weights, or are empty; for a centre unlike the weights.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> found = hg.objectives.prior_variances(hg.objectives.posterior(jnp.array([3.0, 4.0]), scale=0.5))
    >>> print(f"{found['all']:.2f}")  # (25 + 2 · 0.25) / 2
    12.75
    """
    return {name: square / size for name, (square, _, size) in _group_sums(posterior, center, groups).items()}


@options(
    likelihood=LIKELIHOOD,
    kappa=Positive(words=("data",)),
    rows=ROWS,
    noise=Positive(),
    expectation=Choice(("sampled", "linear")),
    samples=Number(least=1, integer=True, static=True),
)
def elbo(
    model: Callable[..., Any],
    *,
    likelihood: str,
    kappa: Any,
    rows: int,
    noise: Any = None,
    center: PyTree = None,
    groups: PyTree = None,
    expectation: str = "sampled",
    samples: int = 1,
) -> Losses:
    r"""Losses that fit a mean-field Gaussian over the weights, and the hyperparameters with it, to the training data.

        −(1/n) E_q log p(y | w, λ) + [½ Σ_g D_g log τ*_g − ½ Σ log σ²] / (κ n),    w = μ + σ ε

    The loss is in nats per example. The parameters of the problem are `hg.objectives.posterior(weights)`, its inner
    loss is this one, and so is its outer loss: hyperparameters (noise, length scales, whatever `model` reads) follow
    their plain gradient, which is what `hg.direct` gives, and which is exact where the inner loss is at its minimum. To
    move both at every step, as the paper does, write `hg.direct(problem, inner=hg.inner.gradient(optimizer, steps=1))`;
    prior variances need no hyperparameters at all. Give the training data twice, as `train` and as `valid`, whole or as
    `hg.minibatches`.

    Args:
        model: `(weights, hparams, x) -> outputs`, `[n, c]` or `[n]`.
        likelihood: `"categorical"` (logits, class numbers), `"bernoulli"` (logits, 0 or 1) or `"gaussian"`.
        kappa: weight of the data against the KL divergence: `"data"` for D/n, 1.0 for the evidence lower bound, any
            positive number, or a function from the hyperparameters to one.
        rows: n, the number of training examples, however many a batch has.
        noise: standard deviation of the Gaussian: a positive number, or a function from the hyperparameters to it.
        center: mean of the prior, a pytree like the weights: pre-trained ones for a backbone, zeros for a new head;
            None for zero.
        groups: see `prior_variances`: each group has a prior variance of its own.
        expectation: over the posterior: `"sampled"`, from a key, with one draw of weights for a batch; or `"linear"`,
            in closed form, for Gaussian noise and a model that is linear in its weights (any other is linearized).
        samples: draws of the weights for one loss.

    Returns:
        `Losses(inner_loss, outer_loss)`, for `hg.Problem(*losses)`; they take a key where the expectation is sampled.

    Raises:
        InputError: for numbers that are not positive, a Gaussian without noise, a closed form without a Gaussian. When
            a loss is called: for groups that hold no weights or are not a prefix of them, a centre unlike the weights,
            and targets that do not fit.
        InputTypeError: for options of another type; when a loss is called, for a batch that is not `(x, y)`, or
            parameters that are not a `Posterior`.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> x = jnp.linspace(1.0, 3.0, 20)
    >>> data = x[:, None], x + 0.1 * jnp.sin(40.0 * x)
    >>> losses = hg.objectives.elbo(lambda w, h, x: x @ w, likelihood="gaussian", kappa=1.0, rows=20,
    ...                             noise=lambda h: jnp.exp(h), expectation="linear")
    >>> solver = hg.direct(hg.Problem(*losses), inner=hg.inner.gradient(optax.adam(0.03), steps=1))
    >>> start = hg.objectives.posterior(jnp.zeros(1), scale=0.1)
    >>> result = hg.tune(solver, start, 0.0, data, data, outer=optax.adam(0.03), steps=600, progress=False)
    >>> bool(0.9 < result.params.mean[0] < 1.1), bool(jnp.exp(result.hparams) < 0.2)
    (True, True)
    """
    fit = make_likelihood("elbo", likelihood, noise)
    if expectation == "linear" and likelihood != "gaussian":
        raise InputError(
            f"elbo: expectation='linear' needs likelihood='gaussian', found {likelihood!r}: write "
            "expectation='sampled'."
        )
    emphasis = None if isinstance(kappa, str) else setting("elbo", "kappa", kappa)

    def divergence(params: Posterior, hparams: PyTree) -> Array:
        """KL at the best prior variances, per example and weighted."""
        sums = _group_sums(params, center, groups)
        parts = [0.5 * (size * jnp.log(square / size) - logs) for square, logs, size in sums.values()]
        weight = _tree.size(params.mean) if emphasis is None else rows * emphasis(hparams)
        return jnp.sum(jnp.stack(parts)) / weight

    def sampled(params: Posterior, hparams: PyTree, x: PyTree, y: Array, key: Array | None) -> Array:
        if key is None:
            raise InputError("elbo: weights are drawn from the posterior: pass key=jax.random.key(0).")
        scales = _scales(params)

        def drawn(key: Array) -> Array:
            leaves, treedef = jax.tree.flatten(params.mean)
            keys = treedef.unflatten(jax.random.split(key, len(leaves)))
            weights = jax.tree.map(
                lambda k, mu, s: mu + s * jax.random.normal(k, mu.shape, mu.dtype), keys, params.mean, scales
            )
            return fit.nll(outputs_of("elbo", model, weights, hparams, x), y, hparams)

        return jnp.mean(jax.vmap(drawn)(jax.random.split(key, samples)))

    def linear(params: Posterior, hparams: PyTree, x: PyTree, y: Array) -> Array:
        fitted = outputs_of("elbo", model, params.mean, hparams, x)
        eye = jnp.broadcast_to(jnp.eye(fitted.shape[1], dtype=fitted.dtype), (*fitted.shape, fitted.shape[1]))
        one = lambda w, example: outputs_of("elbo", model, w, hparams, jax.tree.map(lambda a: a[None], example))[0]
        gradients = weighted_rows(one, params.mean, x, eye, jax.tree.map(jnp.square, _scales(params)))
        spread_out = [jnp.sum(leaf.reshape(*fitted.shape, -1) ** 2, axis=(1, 2)) for leaf in jax.tree.leaves(gradients)]
        assert fit.noise is not None
        extra = jnp.mean(jnp.sum(jnp.stack(spread_out), axis=0)) / (2 * fit.noise(hparams) ** 2)
        return jnp.mean(fit.nll(fitted, y, hparams)) + extra

    def loss(params: Any, hparams: PyTree, batch: Any, key: Array | None) -> Array:
        params = _posterior(params)
        x, y = pair("elbo", batch, None)
        misfit = sampled(params, hparams, x, y, key) if expectation == "sampled" else linear(params, hparams, x, y)
        return misfit + divergence(params, hparams)

    def keyed(params: PyTree, hparams: PyTree, batch: Any, key: Array) -> Array:
        return loss(params, hparams, batch, key)

    def plain(params: PyTree, hparams: PyTree, batch: Any) -> Array:
        return loss(params, hparams, batch, None)

    chosen = keyed if expectation == "sampled" else plain
    return Losses(chosen, chosen)


def _group_sums(found: Any, center: PyTree, groups: PyTree) -> dict[Hashable, tuple[Array, Array, int]]:
    """`{group: (‖μ − center‖² + Σσ², Σ log σ², D)}`."""
    params = _posterior(found)
    if center is not None:
        check_same_structure("elbo: center", center, params.mean, "write a pytree like the weights, or None for zero.")
    names = spread("elbo", "groups", "all" if groups is None else groups, params.mean, of="weights")
    offsets = params.mean if center is None else _tree.sub(params.mean, center)
    sums: dict[Hashable, list[tuple[Array, Array, int]]] = {name: [] for name in jax.tree.leaves(groups) or ["all"]}
    for name, offset, scale in zip(*map(jax.tree.leaves, (names, offsets, _scales(params))), strict=True):
        square = jnp.sum(offset**2) + jnp.sum(scale**2)
        sums[name].append((square, 2 * jnp.sum(jnp.log(scale)), offset.size))
    for name, parts in sums.items():
        if not sum(size for *_, size in parts):
            raise InputError(
                f"elbo: groups: the group {name!r} holds no weights, so that it has no prior variance: leave it out, "
                "or name it at a part of the tree that has leaves."
            )
    add = lambda terms: jnp.sum(jnp.stack(terms))
    return {
        name: (add([square for square, _, _ in parts]), add([logs for _, logs, _ in parts]), sum(s for *_, s in parts))
        for name, parts in sums.items()
    }


def _posterior(params: Any) -> Posterior:
    if not isinstance(params, Posterior):
        raise InputTypeError(
            f"elbo: params must be a Posterior, found {type(params).__name__}: write hg.objectives.posterior(weights)."
        )
    return params


def _scales(params: Posterior) -> PyTree:
    """Standard deviations in the shapes of the weights."""
    each = spread("elbo", "raw_scale", params.raw_scale, params.mean, of="weights")

    def filled(raw: ArrayLike, mean: Array) -> Array:
        if jnp.shape(raw) not in ((), jnp.shape(mean)):
            raise InputError(
                f"elbo: raw_scale must be one number for a leaf of the weights, or one for each entry, found shape "
                f"{jnp.shape(raw)} for a leaf of shape {jnp.shape(mean)}."
            )
        return jnp.broadcast_to(jax.nn.softplus(jnp.asarray(raw)).astype(mean.dtype), mean.shape)

    return jax.tree.map(filled, each, params.mean)

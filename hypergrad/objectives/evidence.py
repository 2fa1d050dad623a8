r"""Laplace evidence: hyperparameters from the training data alone, with no validation set.

    log Z = log p(y | θ*) − ½ [log det(I + Λ^½ J P⁻¹ Jᵀ Λ^½) + θ*ᵀ P θ*],    θ* = argmin −log p(y | θ) + ½ θᵀ P θ

with J the Jacobian of the model's outputs, Λ the Hessian of −log p in the outputs and P the diagonal prior precision:
the evidence of the model linearized at θ* (exact for a linear model with Gaussian noise). Blocks K_bb of the kernel
K = Λ^½ J P⁻¹ Jᵀ Λ^½ have Σ_b log det(I + K_bb) ≥ log det(I + K) (Fischer), and so does n/m times that of m random rows
on average (Han, Shearer): **lower bounds** of the evidence, one block of which is an unbiased estimate of the bound.
Blocks are a choice: they hold examples at random or grouped by class, and all outputs together, each by itself, or one
drawn. No order holds between these families, but within one the bound is tighter the larger the block, on average over
all.

Source: Immer, van der Ouderaa, van der Wilk, Rätsch & Schölkopf 2023, "Stochastic marginal likelihood gradients using
neural tangent kernels", arXiv:2306.03968; Immer et al. 2022, arXiv:2202.10638 (augmentation by averaged outputs).
Differs: losses are per example; the rows of a block are a random window of a random order, so that its size need not
divide the number of examples; one scale, n/m, stands before the logarithm in the parametric twins as well, where they
stay bounds; the Kronecker factors need no layers (`_kernel`).
Cost of outer_loss with blocks of m examples, c outputs and d parameters: m c gradients of the model, and (m c)² d
products; `outputs="independent"` m² c d, `"one"` m gradients and m² d. Memory m c d numbers.
Where it fails: θ* must be a minimum at the given hyperparameters. Before training has converged the value is off by
terms of first order; with hundreds of hyperparameters the evidence can over-fit, as any objective can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad._checks import spread
from hypergrad._options import Choice, Number, options
from hypergrad._solver import InputError
from hypergrad._tree import PyTree
from hypergrad.objectives._kernel import FORMS, form_log_determinant, weighted_rows
from hypergrad.objectives._likelihoods import (
    LIKELIHOOD,
    ROWS,
    Likelihood,
    Positive,
    outputs_of,
    pair,
    setting,
)
from hypergrad.objectives._likelihoods import (
    likelihood as make_likelihood,
)


class Losses(NamedTuple):
    """An inner and an outer loss that belong together: `hg.Problem(*losses)`.

    Attributes:
        inner_loss: what the parameters minimise, `(params, hparams, batch[, key]) -> scalar`.
        outer_loss: what the hyperparameters minimise, in the same form.
    """

    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Any]


@options(
    likelihood=LIKELIHOOD,
    precision=Positive(),
    rows=ROWS,
    noise=Positive(),
    form=Choice(FORMS),
    outputs=Choice(("all", "independent", "one", "one_each")),
    size=Number(least=1, integer=True, static=True),
    blocks=Number(least=1, integer=True, static=True),
    samples=Number(least=1, integer=True, static=True),
)
def evidence(
    model: Callable[..., Any],
    *,
    likelihood: str,
    precision: Any,
    rows: int,
    noise: Any = None,
    form: str = "kernel",
    outputs: str = "all",
    size: int | None = None,
    blocks: int = 1,
    by_class: bool = False,
    augment: Callable[..., Any] | None = None,
    samples: int = 1,
) -> Losses:
    r"""Losses whose hyperparameters maximise the Laplace evidence of the training data.

        inner_loss = (1/n) [−log p(y | θ) + ½ θᵀ P θ]
        outer_loss = (1/n) [−log p(y | θ) + ½ θᵀ P θ + ½ log det(I + Λ^½ J P⁻¹ Jᵀ Λ^½)]

    Both are in nats per example, so that the outer loss is −log Z / n at the minimum of the inner one. Give a solver
    the training data twice, as `train` and as `valid`; `train` may be `hg.minibatches`, `valid` may not. With
    `hg.direct` the hyperparameters see the direct term alone, as in the papers; with `hg.implicit` θ* moves with them,
    and the gradient is that of log Z. The two agree for linear models with Gaussian noise. `hg.objectives.interleaved`
    is the schedule of the papers.

    Args:
        model: `(params, hparams, x) -> outputs`, `[n, c]` or `[n]`, a function of each example by itself (no batch
            statistics). It is linearized in `params`.
        likelihood: `"categorical"` (logits, class numbers), `"bernoulli"` (logits, 0 or 1) or `"gaussian"`.
        precision: P of the prior N(0, P⁻¹): positive numbers, or a function from the hyperparameters to them, such as
            `lambda hparams: jnp.exp(hparams["log_precision"])`; a scalar, or a pytree prefix of the parameters with a
            number for each layer or for each parameter.
        rows: n, the number of training examples.
        noise: standard deviation of the Gaussian, in the units of the targets; a positive number, or a function from
            the hyperparameters to it.
        form: `"kernel"`, or a parametric twin: `"full"` (the same value from the other side, for fewer parameters than
            rows), `"block"` (one block for each leaf of the parameters), `"diagonal"`, all of them bounds; and
            `"kronecker"`, which is an approximation and no bound.
        outputs: `"all"` outputs of an example in one kernel; each in an `"independent"` one, by the symmetric root of
            Λ; `"one"`, drawn for the block, times c; or `"one_each"`, drawn for each example.
        size: examples in a block; None for all of them in one, which is exact with all outputs in one kernel.
        blocks: how many disjoint blocks are averaged in a call. With `size * blocks == rows` no example is left out.
        by_class: fill blocks with examples of one class as far as possible. For a categorical likelihood.
        augment: `(x, hparams, key) -> x`, such as `lambda x, hparams, key: hg.augment.translate(x, hparams["shift"],
            key=key)`: the outputs are averages over `samples` draws, in both losses, so that ranges of augmentation are
            hyperparameters of the model.
        samples: draws of the augmentation for each example.

    Returns:
        `Losses(inner_loss, outer_loss)`, for `hg.Problem(*losses)`. Losses that draw blocks, outputs or augmentation
        take a key.

    Raises:
        InputError: for numbers that are not positive, a Gaussian without noise, blocks that need more examples than
            there are. When a loss is called: for concrete precisions that are not positive (traced ones give NaN), or
            are not a prefix of the parameters; targets that do not fit; another number of examples than `rows`.
        InputTypeError: for options of another type; when a loss is called, for a batch that is not `(x, y)`.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 1.5])
    >>> losses = hg.objectives.evidence(lambda w, h, x: x @ w, likelihood="gaussian", noise=0.5, rows=2,
    ...                                 precision=lambda h: jnp.exp(h))
    >>> solver = hg.direct(hg.Problem(*losses), inner=hg.inner.lbfgs())
    >>> out, state = solver.hypergrad(solver.init(jnp.zeros(1), 0.0), 0.0, (x, y), (x, y))
    >>> print(f"{-2 * out.value:.4f}")  # log N(y; 0, 0.25 I + x xᵀ)
    -2.3786
    """
    fit = make_likelihood("evidence", likelihood, noise)
    prior = setting("evidence", "precision", precision)
    count = rows if size is None else size
    if count * blocks > rows:
        raise InputError(
            f"evidence: blocks={blocks} of size={size} need {count * blocks} examples, but there are rows={rows}: "
            + ("leave blocks out: size=None takes all of them." if size is None else "write smaller or fewer ones.")
        )
    if by_class and (likelihood != "categorical" or size is None):
        raise InputError(
            "evidence: by_class=True groups the examples of a block by their class: it needs likelihood='categorical' "
            f"and size=, found {likelihood!r} and size={size}."
        )
    draws = samples if augment is not None else None

    def averaged(params: PyTree, hparams: PyTree, x: PyTree) -> Array:
        """Outputs of examples whose draws, if there are any, are a leading axis of `x`."""
        if draws is None:
            return outputs_of("evidence", model, params, hparams, x)
        each = jax.vmap(lambda drawn: outputs_of("evidence", model, params, hparams, drawn))(x)
        return jnp.mean(each, axis=0)

    def augmented(x: PyTree, hparams: PyTree, key: Array | None) -> PyTree:
        if augment is None:
            return x
        draw = augment
        return jax.vmap(lambda k: draw(x, hparams, k))(jax.random.split(_needed(key), samples))

    def penalty(params: PyTree, spread_prior: PyTree) -> Array:
        terms = jax.tree.map(lambda p, w: jnp.sum(p * w**2), spread_prior, params)
        return jnp.sum(jnp.stack(jax.tree.leaves(terms))) / (2 * rows)

    def inner(params: PyTree, hparams: PyTree, batch: Any, key: Array | None) -> Array:
        x, y = pair("evidence", batch, None)
        fitted = averaged(params, hparams, augmented(x, hparams, key))
        return jnp.mean(fit.nll(fitted, y, hparams)) + penalty(params, spread_precision(prior(hparams), params))

    def outer(params: PyTree, hparams: PyTree, batch: Any, key: Array | None) -> Array:
        x, y = pair("evidence", batch, rows)
        precisions = spread_precision(prior(hparams), params)
        variances = jax.tree.map(lambda p: 1 / p, precisions)

        def block(at: tuple[Any, Any, Any]) -> Array:
            x, y, key = at
            draw_key, output_key = (None, None) if key is None else jax.random.split(key)
            x = augmented(x, hparams, draw_key)
            fitted = averaged(params, hparams, x)
            cotangents, groups, scale = _cotangents(outputs, fit, fitted, hparams, output_key)
            one = lambda w, example: averaged(w, hparams, _alone(example, draws))[0]
            by_example = x if draws is None else jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), x)
            weighted = weighted_rows(one, params, by_example, cotangents, variances)
            complexity = jax.vmap(lambda a: form_log_determinant(form, a))(jax.tree.map(groups, weighted))
            return jnp.sum(fit.nll(fitted, y, hparams)) + 0.5 * scale * jnp.sum(complexity)

        if size is None:
            total = block((x, y, key))
        else:
            order_key, block_key = jax.random.split(_needed(key))
            index = _windows(order_key, y if by_class else None, rows, size, blocks)
            parts = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], (x, y))
            keys = jax.random.split(block_key, blocks)
            total = jnp.sum(jax.lax.map(block, (*parts, keys)))
        return total / (count * blocks) + penalty(params, precisions)

    inner_draws, outer_draws = draws is not None, draws is not None or size is not None or outputs.startswith("one")
    return Losses(_with_key(inner, inner_draws), _with_key(outer, outer_draws))


def spread_precision(prefix: PyTree, params: PyTree) -> PyTree:
    """Precisions as a pytree like the parameters, in their shapes and dtypes."""
    each = spread("evidence", "precision", prefix, params, of="params")

    def filled(p: Array, w: Any) -> Array:
        if jnp.shape(p) not in ((), jnp.shape(w)):
            raise InputError(
                f"evidence: precision must be one number for a leaf of params, or one for each entry, found shape "
                f"{jnp.shape(p)} for a leaf of shape {jnp.shape(w)}."
            )
        return jnp.broadcast_to(p.astype(jnp.result_type(w)), jnp.shape(w))

    return jax.tree.map(filled, each, params)


def _cotangents(
    outputs: str, fit: Likelihood, fitted: Array, hparams: PyTree, key: Array | None
) -> tuple[Array, Callable[[Array], Array], float]:
    """`([n, r, c], rows [n, r, ...] -> groups [g, m, ...], the factor before their log-determinants)`."""
    n, c = fitted.shape
    roots = jnp.swapaxes(fit.root(fitted, hparams, outputs != "all"), 1, 2)
    if outputs == "all":
        return roots, lambda rows: rows.reshape(1, n * c, *rows.shape[2:]), 1.0
    if outputs == "independent":
        return roots, lambda rows: jnp.swapaxes(rows, 0, 1), 1.0
    drawn = jax.random.randint(_needed(key), (1,) if outputs == "one" else (n,), 0, c)
    picked = jnp.take_along_axis(roots, jnp.broadcast_to(drawn, (n,))[:, None, None], axis=1)
    return picked, lambda rows: jnp.swapaxes(rows, 0, 1), float(c)


def _windows(key: Array, labels: Array | None, rows: int, size: int, blocks: int) -> Array:
    """`[blocks, size]`, rows of neighbouring windows of a random cyclic order, of one class where labels are given.

    Each row is in as many windows as any other, so that the average of their log-determinants, per row, is no less than
    that of all rows (Shearer's inequality).
    """
    order_key, start_key = jax.random.split(key)
    order = jax.random.permutation(order_key, rows)
    if labels is not None:
        order = order[jnp.argsort(labels[order], stable=True)]
    start = jax.random.randint(start_key, (), 0, rows)
    return order[(start + jnp.arange(size * blocks)) % rows].reshape(blocks, size)


def _alone(example: PyTree, draws: int | None) -> PyTree:
    """An example as a batch of one, behind the axis of its draws."""
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0 if draws is None else 1), example)


def _needed(key: Array | None) -> Array:
    if key is None:
        raise InputError("evidence: blocks, outputs and augmentation are drawn: pass key=jax.random.key(0).")
    return key


def _with_key(loss: Callable[..., Array], draws: bool) -> Callable[..., Array]:
    """In the form that `hg.Problem` counts arguments in: with a key where something is drawn."""

    def keyed(params: PyTree, hparams: PyTree, batch: Any, key: Array) -> Array:
        return loss(params, hparams, batch, key)

    def plain(params: PyTree, hparams: PyTree, batch: Any) -> Array:
        return loss(params, hparams, batch, None)

    return keyed if draws else plain

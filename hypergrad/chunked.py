r"""A loss computed on one piece of its batch after another, so that it needs only the memory of one piece.

    loss(w, λ, B) = (1/c) Σⱼ loss(w, λ, Bⱼ),    B = (B₁, …, B_c) in equal pieces

Each piece is recomputed where its derivative is taken (`jax.checkpoint` inside `jax.lax.map`).
Cost: a gradient takes one more evaluation of the loss. Memory: the intermediates of n/c rows instead of n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad._data import rows
from hypergrad._options import Number, options
from hypergrad._problem import Composed, key_use
from hypergrad._solver import InputError, InputTypeError
from hypergrad._tree import PyTree, is_key


@options(chunks=Number(least=1, integer=True, static=True, advice="write the number of pieces"))
def chunked(loss: Callable[..., Any], chunks: int) -> Callable[..., Any]:
    """Return the same loss, computed on `chunks` equal pieces of its batch and averaged: same value, less memory.

    The loss must be a plain mean over the rows of the batch. A loss that mixes rows (batch normalization), a sum, or a
    weighted mean has a different value on pieces than on the whole batch.

    Args:
        loss: `(params, hparams, batch) -> scalar` or `(scalar, metrics)`, or the same with a key. Every leaf of `batch`
            has the rows as its leading axis. Metrics are averaged as well. Piece j is given the key folded with j.
        chunks: number of pieces, which must divide the number of rows.

    Returns:
        A loss with the same arguments, for `hg.Problem`.

    Raises:
        InputTypeError: for a loss that is not a function of these arguments, one made by `hg.compose` (chunk the batch
            that both of its parts see instead), or a number of chunks that is not an integer.
        InputError: for fewer than one chunk. When the loss is called: for rows that the chunks do not divide, and for a
            loss that carries a model state.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> loss = lambda w, l2, x: jnp.mean((x @ w - 1.0)**2) + l2 * jnp.sum(w**2)
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> bool(jnp.allclose(hg.chunked(loss, 3)(jnp.ones(2), 0.1, x), loss(jnp.ones(2), 0.1, x)))
    True
    """
    if isinstance(loss, Composed):
        raise InputTypeError(
            "chunked: loss was made by hg.compose, whose model and loss see the whole batch: pass a plain loss, or "
            "call jax.lax.map over pieces inside the two functions."
        )
    key_use(loss, "chunked: loss", False)
    count = int(chunks)

    @functools.wraps(loss)  # keeps the signature, from which hg.Problem reads whether the loss takes a key
    def over_pieces(params: PyTree, hparams: PyTree, batch: PyTree, *key: Any) -> Any:
        if len(key) > 1 or not all(is_key(k) or _is_old_key(k) for k in key):
            raise InputError(
                "chunked: the loss was called with a model state, which cannot pass from piece to piece: use "
                "hg.Problem without model_state, or chunk inside the loss."
            )
        n = rows(batch, "chunked: the batch")
        if n % count:
            near = [c for c in range(1, n + 1) if n % c == 0]
            raise InputError(
                f"chunked: {count} chunks do not divide the {n} rows of the batch: use one of "
                f"{', '.join(map(str, sorted(near, key=lambda c: abs(c - count))[:4]))}, or drop rows."
            )

        def piece(at: tuple[PyTree, Any]) -> Any:
            part, j = at
            out = loss(params, hparams, part, *(jax.random.fold_in(k, j) for k in key))
            if isinstance(out, tuple) and not (len(out) == 2 and isinstance(out[1], dict)):
                raise InputError(
                    "chunked: the loss returned a second value that is not a dict of metrics: a model state cannot "
                    "pass from piece to piece; return a scalar, or (scalar, metrics)."
                )
            return out

        pieces = jax.tree.map(lambda x: jnp.reshape(x, (count, n // count, *jnp.shape(x)[1:])), batch)
        each = jax.lax.map(jax.checkpoint(piece), (pieces, jnp.arange(count)))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    return over_pieces


def _is_old_key(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.uint32 and x.shape == (2,)

r"""What to expect on unseen data: how much of a low validation loss after tuning is luck.

The hyperparameters λ̂ minimise the mean V of n validation losses F_i(λ) = f_i(w*(λ), λ). Without row i they would end
at λ̂ + δ_i, and row i would count as unseen. To second order,

    δ_i = (n H − κ_i c_i c_iᵀ)⁺ c_i,   optimism = (1/n) Σ_i [g_i·δ_i + ½ κ_i (c_i·δ_i)²],

where g_i = ∂_λ F_i, c_i = g_i − ∂_λ V, H = ∂²_λ V, and κ_i is the curvature of F_i along its own gradient, fitted to
its second differences. This is exact for validation losses that are squares of functions linear in λ. The trace formula
tr(H⁺J)/n, where J is the mean of c_i c_iᵀ, is reported as well.

Source: Takeuchi 1976 (the trace); Rad & Maleki 2020, arXiv:1801.10243 (approximate leave-one-out); Schneider et al.
2025, arXiv:2506.19540 (overtuning). Differs: it is applied to the outer problem, with hypergradients; the curvature of
a row is assumed to have rank one; leverages and flat directions are bounded, by constants that were chosen on seed 0 of
`experiments/overtuning`, unless the rows' curvature is all of H.
Cost: 2k + 1 hypergradients for k hyperparameters, at steps to both sides of each, and as many evaluations of the rows:
one batch of evaluations shares a training run. For a solver without an `evaluate` of its own, the evaluations are
hypergradients of the rows, just as many.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from hypergrad import _tree
from hypergrad._checks import caller_level
from hypergrad._data import Minibatches, Stacked, Stream, prepare, rows
from hypergrad._options import SOLVER, options
from hypergrad._solver import InputError, InputTypeError, Solver, Status, about_of, evaluation, usable
from hypergrad._tree import PyTree

MOST = 64  # largest number of hyperparameters
LARGE = 1 / 3  # share of the validation loss above which a correction is worth a warning
_EXACT = 0.05  # how far the rows' curvature may be from H for it to count as all of H
_SURE, _LEVERAGE = 0.98, 0.5  # largest leverage of a row: where the rows' curvature is all of H, and elsewhere
_STEEPER = 2.0  # ratio of J to H, relative to the typical one, beyond which a direction counts as flatter than it is


class Overtuning(NamedTuple):
    """An honest estimate of the test loss after tuning; made by `hg.diagnostics.overtuning`.

    Attributes:
        raw: the validation loss at the tuned hyperparameters.
        corrected: loss to expect on unseen data, `raw + optimism`; NaN where the status is not usable.
        optimism: amount by which the validation loss is too low, by approximate leave-one-out; NaN as above.
        trace: the same amount by the trace formula tr(H⁺J)/n, which is too small when there are many hyperparameters
            for the rows.
        effective: the number of effective hyperparameters, the sum of the leverages of the validation rows: at most
            the number of hyperparameters, and fewer where the validation loss hardly depends on some.
        status: int code, see `hg.Status`: the first hypergradient that was not usable; INACCURATE where the
            hyperparameters are not near a minimum of the validation loss.
        hyperparameters: number of hyperparameters.
        rows: number of validation rows.
    """

    raw: float
    corrected: float
    optimism: float
    trace: float
    effective: float
    status: int
    hyperparameters: int
    rows: int

    @property
    def warning(self) -> str:
        """A plain-language warning where the correction is large; otherwise empty."""
        if not self.optimism > LARGE * abs(self.raw):
            return ""
        return (
            f"overtuning: about {self.effective:.1f} of {self.hyperparameters} hyperparameters were fitted to "
            f"{self.rows} validation rows, so that the validation loss of {self.raw:.4g} is too low: expect about "
            f"{self.corrected:.4g} on unseen data. Use more validation rows, or fewer hyperparameters."
        )

    def __str__(self) -> str:
        """The losses, and the warning."""
        status = Status(int(self.status))
        if not status.usable:
            return f"Validation loss {self.raw:.4g}; no correction, since the status is {status}. {status.advice}"
        text = (
            f"Validation loss {self.raw:.4g}; expect about {self.corrected:.4g} on unseen data ({self.effective:.1f} "
            f"effective of {self.hyperparameters} hyperparameters, {self.rows} validation rows; optimism "
            f"{self.optimism:.2g}, by the trace formula {self.trace:.2g})."
        )
        return f"{text}\n{self.warning}" if self.warning else text


@options(solver=SOLVER)
def overtuning(
    solver: Solver,
    state: Any,
    hparams: PyTree,
    train: PyTree,
    valid: PyTree,
    *,
    key: Array | None = None,
) -> Overtuning:
    """Correct the validation loss at tuned hyperparameters for the luck of having been tuned on it.

    The result is an honest estimate of the loss on data like the validation data, and nothing else: no intervals for
    hyperparameters, and no better choice among models. Both were tried and did not hold.

    Args:
        solver: the solver that tuned, which trains to the same parameters at every call: `hg.implicit`, or
            `hg.unrolled` from the same start.
        state: the solver's state, as in `result.state`.
        hparams: the tuned hyperparameters, as in `result.hparams`: at most 64 numbers.
        train: training data, arrays or None.
        valid: validation data, a pytree of arrays `[n, ...]`; the outer loss must be a mean over their rows.
        key: for losses that draw; the same key is used in every evaluation.

    Returns:
        See `Overtuning`.

    Raises:
        InputError: for more hyperparameters, fewer than two validation rows, an outer loss that is not a mean over
            rows, or a solver that continues training from call to call.
        InputTypeError: for minibatches and streams, and inside `jit`.

    Warns:
        UserWarning: where the correction exceeds a third of the validation loss.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(lambda w, h, batch: (w - h)**2, lambda w, h, batch: jnp.mean((batch - w)**2))
    >>> rows = jnp.arange(1.0, 13.0)  # tuned to their mean
    >>> solver = hg.implicit(problem, inner=hg.inner.newton())
    >>> found = hg.diagnostics.overtuning(solver, solver.init(jnp.zeros(()), 6.5), 6.5, None, rows)
    >>> print(f"{found.raw:.3f} -> {found.corrected:.3f}")  # each row against the mean of the others: (12/11)² as much
    11.917 -> 14.182
    """
    count = _tree.size(hparams)
    _refuse(solver, hparams, train, valid, count)
    valid = jax.tree.map(jnp.asarray, prepare("overtuning: valid", valid))
    n = rows(valid, "overtuning: valid")
    if n < 2:
        raise InputError(f"overtuning: valid must have at least 2 rows, so that one can be left out, found {n}.")
    hparams = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(float)) if isinstance(x, (int, float)) else x, hparams
    )

    step = _steps(hparams)
    moves = jnp.asarray(np.concatenate([np.diag(step), -np.diag(step)]).reshape(2 * count, count), _tree.dtype(hparams))
    scale = jnp.asarray(step, moves.dtype)
    center, points = _measure(state, hparams, train, valid, moves, scale, key, solver=solver)

    (value, each, status), n_points = jax.tree.map(np.asarray, center), 2 * count
    raw = float(value)
    nothing = Overtuning(raw, np.nan, np.nan, np.nan, np.nan, int(status), count, n)
    if not Status(int(status)).usable:
        return nothing
    _check_mean(raw, each, hparams)
    if not n_points:
        return nothing._replace(corrected=raw, optimism=0.0, trace=0.0, effective=0.0)
    grad, moved, codes, errors = jax.tree.map(np.asarray, points)
    bad = codes[~np.asarray(usable(codes)) & (codes != int(Status.INACCURATE))]
    if bad.size:
        return nothing._replace(status=int(bad[0]))
    known = errors[np.isfinite(errors)]
    error = max(float(known.max(initial=0.0)), 2e3 * _tree.eps(hparams) * float(np.abs(grad).max()))
    found = _leave_one_out(grad.astype(np.float64), each.astype(np.float64), moved.astype(np.float64), error)
    if found is None:
        return nothing._replace(status=int(Status.INACCURATE))
    optimism, trace, effective = found
    result = nothing._replace(corrected=raw + optimism, optimism=optimism, trace=trace, effective=effective)
    if result.warning:
        warnings.warn(result.warning, UserWarning, stacklevel=caller_level())
    return result


@functools.partial(jax.jit, static_argnames=("solver",))
def _measure(
    state: Any,
    hparams: PyTree,
    train: PyTree,
    valid: PyTree,
    moves: Array,
    scale: Array,
    key: Array | None,
    *,
    solver: Solver,
) -> tuple[tuple[Array, Array, Array], Any]:
    """The validation loss, its rows and a status here; gradients, rows, status and errors at `hparams + moves`.

    Gradients, and the estimates of their errors, are in units of the steps `scale`.
    """
    at, unravel = ravel_pytree(hparams)
    single = lambda row: jax.tree.map(lambda x: x[None], row)
    evaluate = evaluation(solver)

    def rows_at(state: Any, here: PyTree) -> tuple[Array, Array]:
        """Training is the same for all rows, and done once."""
        each, info, _ = jax.vmap(lambda row: evaluate(state, here, train, single(row), key=key))(valid)
        return each, jnp.max(info.status)

    def point(move: Array) -> tuple[Array, Array, Array, Array]:
        here = unravel(at + move)
        if getattr(solver, "evaluate", None) is None:  # one batch of hypergradients holds everything needed
            out = jax.vmap(lambda row: solver.hypergrad(state, here, train, single(row), key=key)[0])(valid)
            grads = jax.vmap(lambda g: ravel_pytree(g)[0])(out.grad) * scale[None]
            error = jnp.mean(out.info.error_estimate * jnp.sqrt(jnp.sum(grads**2, axis=1)))
            return jnp.mean(grads, axis=0), out.value, jnp.max(out.info.status), error
        out, after = solver.hypergrad(state, here, train, valid, key=key)
        each, worst = rows_at(after, here)
        status = jnp.where(usable(worst), out.info.status, worst)
        grad = ravel_pytree(out.grad)[0]
        return grad * scale, each, status, out.info.error_estimate * jnp.sqrt(jnp.sum(grad**2)) * jnp.max(scale)

    # At a minimum the hypergradient is smaller than its own error, so only the loss is requested here.
    value, info, here = evaluate(state, hparams, train, valid, key=key)
    each, worst = rows_at(here, hparams)
    status = jnp.where(usable(info.status), worst, info.status)
    return (value, each, status), jax.lax.map(point, moves) if moves.shape[0] else None


def _leave_one_out(
    grad: np.ndarray, each: np.ndarray, moved: np.ndarray, error: float
) -> tuple[float, float, float] | None:
    """Optimism, its trace formula, and the effective number of hyperparameters, all in units of the steps.

    Args:
        grad: gradients of the validation loss one step up in each hyperparameter, and one step down, `[2k, k]`.
        each: losses of the rows at the tuned hyperparameters, `[n]`.
        moved: losses of the rows at the steps, `[2k, n]`.
        error: errors of the gradients; an eigenvalue of H that is smaller does not count as one.

    Returns:
        None where H has no positive eigenvalue, or a negative one of the largest size.
    """
    k, n = grad.shape[1], len(each)
    slope = (moved[:k] - moved[k:]).T / 2  # g_i, [n, k]
    bend = (moved[:k] - 2 * each + moved[k:]).T  # the second derivative of each row along each step
    hessian = (grad[:k] - grad[k:]) / 2
    eigenvalues, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    if not eigenvalues.max() > error or -eigenvalues.min() > max(eigenvalues.max() / 2, error):
        return None
    kept = eigenvalues > error
    centred = slope - slope.mean(axis=0)

    # κ_i, fitted to the row's second differences in units in which no hyperparameter outweighs the others.
    weight = 1 / np.maximum(np.diag(hessian), error)
    pattern = centred**2 * weight
    own = np.sum(pattern**2, axis=1)
    curvature = np.maximum(np.sum(bend * weight * pattern, axis=1), 0) / np.where(own > 0, own, 1)

    # Where the rows' own curvature is all of H, as for squares of linear functions, the formula is exact. Elsewhere the
    # optimum moves on curves, and the second-order values for flat directions and for single rows are bounded.
    white = vectors[:, kept] / np.sqrt(n * eigenvalues[kept])  # (n H)⁺ = white whiteᵀ
    identity = (centred @ white).T @ (curvature[:, None] * (centred @ white))
    exact = np.abs(identity - np.eye(len(identity))).max() < _EXACT
    if not exact:
        spread = np.mean((centred @ vectors) ** 2, axis=0)
        typical = spread[kept].sum() / eigenvalues[kept].sum()
        eigenvalues = np.maximum(eigenvalues, spread / (_STEEPER * typical + np.finfo(float).tiny))
        kept = eigenvalues > error
        white = vectors[:, kept] / np.sqrt(n * eigenvalues[kept])
    size = np.sum((centred @ white) ** 2, axis=1)  # c_i·(n H)⁺ c_i
    along = np.sum((slope @ white) * (centred @ white), axis=1)
    leverage = curvature * size
    leverage *= min(1.0, kept.sum() / max(leverage.sum(), 1e-300))  # a smoother's leverages sum to its rank at most
    leverage = np.minimum(leverage, _SURE if exact else _LEVERAGE)
    shrink = 1 / (1 - leverage)
    second = leverage * size * shrink**2 / 2  # ½ κ_i (c_i·δ_i)²
    return float(np.mean(along * shrink + second)), float(np.mean(size)), float(np.sum(leverage))


def _steps(hparams: PyTree) -> np.ndarray:
    """Lengths of the difference steps, relative to each hyperparameter or, where it is small, to its leaf."""
    relative = 1e-2 if _tree.eps(hparams) < 1e-12 else 3e-2

    def steps(leaf: Any) -> np.ndarray:
        size = np.abs(np.asarray(leaf, np.float64))
        typical = np.sqrt(np.mean(size**2)) if size.size else 0.0
        return (relative * (np.maximum(size, typical / 10) if typical > 0 else np.ones_like(size))).ravel()

    leaves = [steps(leaf) for leaf in jax.tree.leaves(hparams)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _refuse(solver: Solver, hparams: PyTree, train: PyTree, valid: PyTree, count: int) -> None:
    for what, tree in (("hparams", hparams), ("train", train), ("valid", valid)):
        if isinstance(tree, (Minibatches, Stacked, Stream)):
            raise InputTypeError(
                f"overtuning: {what} must be arrays, found {type(tree).__name__}: every evaluation has to see the same "
                "rows, so pass the arrays themselves."
            )
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise InputTypeError(f"overtuning: {what} is traced: call overtuning outside of jit.")
    if valid is None:
        raise InputError(
            "overtuning: valid must be arrays with one row an example, found None: pass the validation rows, of which "
            "each is left out in turn."
        )
    if count > MOST:
        raise InputError(
            f"overtuning: hparams must be at most {MOST} numbers, found {count}, which would cost {2 * count + 1} "
            "hypergradients: hold out test data instead, as in hg.tune(..., test=...)."
        )
    about = about_of(solver)
    if about.trains_on:
        raise InputError(
            f"overtuning: {about.name or 'the solver'} goes on training from call to call, so that no two calls agree "
            "on the validation loss at the same hyperparameters: use hg.implicit with a tolerance, or hg.unrolled with "
            "warm_start=False."
        )


def _check_mean(raw: float, each: np.ndarray, hparams: PyTree) -> None:
    found = float(np.mean(each))
    if abs(found - raw) > 1e4 * _tree.eps(hparams) * (abs(raw) + np.mean(np.abs(each))) and np.isfinite(found):
        raise InputError(
            f"overtuning: outer_loss must be a mean over the rows of valid, and it is {raw:.6g} where the mean over "
            f"single rows is {found:.6g}: write jnp.mean in place of jnp.sum, and use nothing that mixes rows."
        )

r"""Is my hypergradient right? Compared with finite differences of the problem solved again.

    ‖ĝ − g‖ / ‖g‖,    g·v = dF(λ + h v)/dh,    F(λ) = f(w*(λ), λ) solved from a fresh start

along random directions v, or along every entry of small hyperparameters. F is what the solver itself reports as its
outer loss once that stops changing, so that any solver can be checked, one's own included.
Differs from a plain difference quotient: F is computed in float64 wherever the losses allow it, whatever the precision
of the hypergradient; the differences carry an error of their own, and where it is too large nothing is confirmed; the
causes of a difference that can be seen from outside are named.
Cost: four solutions of the problem a direction where all is well, up to 24 where it is not. The random directions
measure the error of many entries by that of a few of their sums, in which each leaf counts in units of its own size.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_finite, check_hparams
from hypergrad._data import Minibatches, Stream, prepare
from hypergrad._jaxpr.labels import check_concrete_data, check_solver_labels
from hypergrad._options import SOLVER, Number, options
from hypergrad._solver import Hypergradient, InputError, Solver, Status
from hypergrad._tree import PyTree, keystr
from hypergrad.diagnostics._causes import Evidence, find_causes, is_unrolled
from hypergrad.diagnostics._differences import (
    Problem,
    Slope,
    Solution,
    flatten,
    in_float64,
    make_resolve,
    settled,
    slopes,
)
from hypergrad.diagnostics._report import Comparison, Leaf, Metasmoothness, Report

_CALLS = 30  # at the same hyperparameters, to see what a warm start makes of the hypergradient
_KEYS = 3
_SMALL = 8  # entries up to which a leaf is checked entry by entry
_SILENT = 8  # leaves without a hypergradient that are looked at
_STEP = 0.1  # relative, over which metasmoothness is measured
_FLOOR = 1e-5  # changes of F below this share of F, for a relative change of 1 of the hyperparameters, count as zero


class _Part(NamedTuple):
    """A leaf of the hyperparameters in the vector of all entries."""

    path: str
    shape: tuple[int, ...]
    where: slice


class _Row(NamedTuple):
    """A direction, and the slopes of the settled and the first outer loss along it."""

    name: str
    direction: np.ndarray
    settled: Slope
    first: Slope


class _Run(NamedTuple):
    """What the solver returns at the precision it is used in.

    Attributes:
        compiled: `solver.hypergrad`.
        out: of the first call.
        grad: its hypergradient as a vector `[n]`.
        settled_grad: that of the last of several calls at the same hyperparameters.
        trains_on: whether the solver differentiates training, and goes on with it from call to call.
        key_spread: relative change of the hypergradient with other keys.
        metasmoothness: for unrolled runs.
    """

    compiled: Callable[..., tuple[Hypergradient, Any]]
    out: Hypergradient
    grad: np.ndarray
    settled_grad: np.ndarray
    trains_on: bool
    key_spread: float
    metasmoothness: Metasmoothness | None


@options(solver=SOLVER, directions=Number(least=1, integer=True, static=True), tol=Number(above=0))
def check(
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    train: PyTree = None,
    valid: PyTree = None,
    *,
    key: Array | None = None,
    directions: int = 3,
    per_leaf: bool = False,
    model_state: PyTree = None,
    tol: float | None = None,
) -> Report:
    """Compare a solver's hypergradient with central differences of the problem solved again.

    Args:
        solver: any solver.
        params: the model's parameters at the start.
        hparams: where to check: best at a random point, since at 0 and 1 many mistakes cancel.
        train: training data, a pytree of arrays or `hg.minibatches(...)`.
        valid: validation data, in the same forms.
        key: for losses and data that draw; the same draw is used on both sides, and others to see what it matters.
        directions: number of random directions; hyperparameters of at most so many entries are checked along each.
        per_leaf: also check each leaf by itself, and every entry of leaves of at most eight.
        model_state: as for `solver.init`.
        tol: relative error allowed (dimensionless). Default: 1e-4 for hyperparameters in float64, else 1e-2.

    Returns:
        See `Report`; print it. A solver that fails gives a report that says so, never an exception.

    Raises:
        InputError: for a stream, for labels outside their classes, and for mistakes that the solver itself names.
        InputTypeError: for something that is no solver.

    >>> import hypergrad as hg, jax.numpy as jnp
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: jnp.sum((w - 2.0)**2) + l2 * jnp.sum(w**2),
    ...                      outer_loss=lambda w, l2, batch: jnp.sum((w - 1.0)**2))
    >>> hg.check(hg.implicit(problem), jnp.zeros(3), 0.3).ok
    True
    """
    for name, data in (("train", train), ("valid", valid)):
        if isinstance(data, Stream):
            raise InputError(
                f"check: {name} must be arrays, found hg.stream, which cannot be read twice: pass one batch."
            )
        check_concrete_data(name, data)
    problem = Problem(
        solver, params, check_hparams(hparams), prepare("train", train), prepare("valid", valid), key, model_state
    )
    check_finite("hparams", problem.hparams)
    at, _ = flatten(problem.hparams)
    parts = _parts(problem.hparams)
    scales = _scales(at, parts)
    run = _run(problem, at, scales)
    given = f"float{8 * _tree.dtype(problem.hparams).itemsize}"
    allowed = float(tol) if tol is not None else 1e-4 if given == "float64" else 1e-2
    context, resolve, precision = _reference(problem, at, run)
    with context():
        center = resolve(at)
        if center.calls == 2 and center.drift == 0:  # what one call settles needs no second
            resolve = functools.partial(resolve, calls=1)

        def compare(name: str, direction: np.ndarray) -> _Row:
            return _Row(name, direction, *slopes(resolve, at, direction, center, allowed))

        rng = _generator(key)
        rows = [compare(*d) for d in _directions(parts, scales, directions, directions, rng)]
        groups = [
            (part, [compare(*d) for d in _directions([part], scales, directions, _SMALL, rng)])
            for part in parts
            if per_leaf
        ]
        silent = {
            part.path: compare(part.path, _random([part], scales, rng)).settled
            for part in [p for p in parts if not np.any(run.grad[p.where])][:_SILENT]
        }

    info = run.out.info
    floor = max(_FLOOR * abs(center.settled), 1e-3 * _rms(scales) * float(info.extra.get("indirect_norm", 0.0)))
    error, doubt = _errors(rows, run.grad, floor)
    settled_error, _ = _errors(rows, run.settled_grad, floor)
    one_call_error, _ = _errors([row._replace(settled=row.first) for row in rows], run.grad, floor)
    ok = error <= allowed + doubt and doubt <= allowed
    code = int(info.status)
    status = Status(code) if code in set(Status) else code
    causes = find_causes(
        Evidence(
            ok=ok,
            tol=allowed,
            error=error,
            doubt=doubt,
            settled_error=settled_error,
            one_call_error=one_call_error,
            info=info,
            status=status,
            value=float(run.out.value),
            center=center,
            trains_on=run.trains_on,
            key_spread=run.key_spread,
            batches=any(isinstance(d, Minibatches) for d in (train, valid)),
            precision=precision,
            given=given,
            eps=_tree.eps(problem.hparams),
            silent=silent,
            slopes=[row.settled for row in [*rows, *(row for _, group in groups for row in group)]],
            products=[(_product(row, run.grad), row.settled.value) for row in rows],
            metasmoothness=run.metasmoothness,
        )
    )
    return Report(
        ok=ok,
        relative_error=error,
        reference_error=doubt,
        settled_error=settled_error,
        one_call_error=one_call_error,
        error_estimate=float(info.error_estimate),
        status=status,
        causes=causes,
        directions=tuple(_comparison(row, run.grad) for row in rows),
        leaves=tuple(
            Leaf(
                part.path,
                int(np.prod(part.shape)),
                _errors(group, run.grad, floor)[0],
                tuple(_comparison(row, run.grad) for row in group),
            )
            for part, group in groups
        ),
        metasmoothness=run.metasmoothness,
        key_spread=run.key_spread,
        value=float(run.out.value),
        tol=allowed,
        precision=precision,
        info=info,
    )


def _run(problem: Problem, at: np.ndarray, scales: np.ndarray) -> _Run:
    solver, (_, unflatten) = problem.solver, flatten(problem.hparams)
    compiled = jax.jit(solver.hypergrad)

    def start(vector: np.ndarray, key: Array | None) -> tuple[Any, Callable[[Any], tuple[Hypergradient, Any]]]:
        hparams = unflatten(vector)
        init_key, call_key = (None, None) if key is None else jax.random.split(key)
        state = solver.init(problem.params, hparams, key=init_key, model_state=problem.model_state)
        return state, lambda state: compiled(state, hparams, problem.train, problem.valid, key=call_key)

    def first_grad(vector: np.ndarray, key: Array | None) -> np.ndarray:
        state, call = start(vector, key)
        return flatten(call(state)[0].grad)[0]

    state, call = start(at, problem.key)
    check_solver_labels(solver, state, problem.hparams, problem.train, problem.valid, problem.key)
    out, state = call(state)
    last, values = out, [float(out.value)]
    eps = float(np.finfo(np.asarray(out.value).dtype).eps)
    while len(values) < _CALLS and np.isfinite(values[-1]) and not settled(values, eps):
        last, state = call(state)
        values.append(float(last.value))
    grad = flatten(out.grad)[0]
    spread, smooth = np.nan, None
    with np.errstate(all="ignore"):
        if problem.key is not None:
            others = [first_grad(at, jax.random.fold_in(problem.key, 1 + i)) for i in range(_KEYS)]
            size, change = _rms(scales * grad), _rms(np.asarray([_rms(scales * (other - grad)) for other in others]))
            spread = change / size if size > 0 else float(change > 0)
        if is_unrolled(out.info):
            relative = scales * grad / max(float(np.max(np.abs(scales * grad), initial=0)), 1e-300)
            smooth = _metasmoothness(scales * grad, scales * first_grad(at - _STEP * scales * relative, problem.key))
    trains_on = is_unrolled(out.info) and len(values) > 1 and abs(values[1] - values[0]) > 100 * eps * abs(values[0])
    return _Run(compiled, out, grad, flatten(last.grad)[0], trains_on, float(spread), smooth)


def _reference(problem: Problem, at: np.ndarray, run: _Run) -> tuple[Callable[[], Any], Callable[..., Solution], str]:
    """The problem to take differences of: in float64, unless the losses fail there or draw other random numbers."""
    # The derivative of training costs more than to compile the training once more.
    compiled = None if is_unrolled(run.out.info) else run.compiled
    with contextlib.suppress(Exception), _float64():
        resolve = make_resolve(in_float64(problem), compiled)
        first, given = resolve(at, calls=1, tight=False).first, float(run.out.value)
        same = abs(first - given) <= 1e-3 * abs(given) or not np.isfinite(first - given)
        if problem.key is None or same:
            return _float64, resolve, "float64"
    return contextlib.nullcontext, make_resolve(problem, compiled), f"float{8 * _tree.dtype(problem.hparams).itemsize}"


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """The user has seen every warning when the solver ran in the given precision."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _metasmoothness(here: np.ndarray, there: np.ndarray) -> Metasmoothness:
    with np.errstate(all="ignore"):
        cosine = here @ there / (np.linalg.norm(here) * np.linalg.norm(there))
        signs = np.abs(here) @ (np.sign(here) * np.sign(there)) / np.sum(np.abs(here))
    return Metasmoothness(float(cosine), float(signs), _STEP)


def _parts(hparams: PyTree) -> list[_Part]:
    parts, begin = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(hparams):
        parts.append(_Part(keystr(path), np.shape(leaf), slice(begin, begin + np.size(leaf))))
        begin += np.size(leaf)
    return [part for part in parts if part.where.start < part.where.stop]


def _scales(at: np.ndarray, parts: Sequence[_Part]) -> np.ndarray:
    """What a relative change of one is, for each entry: the root mean square of its leaf; 1 for a leaf of zeros."""
    scales = np.ones_like(at)
    for part in parts:
        scales[part.where] = _rms(at[part.where]) or 1.0
    return scales


def _directions(
    parts: Sequence[_Part], scales: np.ndarray, count: int, limit: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Along each entry of these leaves if there are at most `limit`, else along `count` random sums of them."""
    if sum(part.where.stop - part.where.start for part in parts) > limit:
        for i in range(count):
            yield f"random {i + 1}", _random(parts, scales, rng)
        return
    for part in parts:
        for i, index in enumerate(np.ndindex(part.shape)):
            direction = np.zeros_like(scales)
            direction[part.where.start + i] = scales[part.where.start + i]
            yield part.path + (str(list(index)) if index else "") or "hparams", direction


def _random(parts: Sequence[_Part], scales: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    direction = np.zeros_like(scales)
    for part in parts:
        signs = rng.integers(0, 2, part.where.stop - part.where.start) * 2 - 1
        direction[part.where] = signs * scales[part.where]
    return direction


def _generator(key: Array | None) -> np.random.Generator:
    if key is None:
        return np.random.default_rng(0)
    data = jax.random.key_data(key) if _tree.is_key(key) else key
    return np.random.default_rng([int(x) for x in np.asarray(data).ravel()])


def _errors(rows: Sequence[_Row], grad: np.ndarray, floor: float) -> tuple[float, float]:
    """Relative errors of the hypergradient and of the differences along these directions."""
    values = np.asarray([row.settled.value for row in rows])
    wrong = _rms(np.asarray([_product(row, grad) for row in rows]) - values)
    doubt = _rms(np.asarray([row.settled.error for row in rows]))
    size = max(_rms(values), floor)

    def relative(x: float) -> float:
        error = x / size if size > 0 else 0.0 if x == 0 else np.inf
        return float(error) if np.isfinite(error) else float("inf")

    return relative(wrong), relative(doubt)


def _comparison(row: _Row, grad: np.ndarray) -> Comparison:
    ours, theirs = _product(row, grad), row.settled.value
    gap = abs(ours - theirs)
    return Comparison(
        row.name, ours, theirs, row.settled.error, 0.0 if gap == 0 else gap / abs(theirs) if theirs else float("inf")
    )


def _product(row: _Row, grad: np.ndarray) -> float:
    with np.errstate(all="ignore"):  # NaN and infinity are reported, not warned of
        return float(row.direction @ grad)


def _rms(x: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(x**2))) if x.size else 0.0

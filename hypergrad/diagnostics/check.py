r"""Is my hypergradient right? It is compared with finite differences of the problem solved again.

    ‖ĝ − g‖ / ‖g‖,    g·v = dF(λ + h v)/dh,    F(λ) = f(w*(λ), λ) solved from a fresh start, harder than the solver does

along random directions v through all hyperparameters, and along one more within each leaf, in which its entries count
alike. F is the outer loss of the solver's own `evaluate` (of `hypergrad`, for a solver without one), with the tolerance
lowered to rounding level and after as many calls as it takes until F stops changing.
Differs from a plain difference quotient: F is computed in float64 wherever the losses allow it, regardless of the
precision of the hypergradient; the differences carry an error estimate of their own, and where it is too large nothing
is confirmed; faults that no difference can show are looked for separately (`_probes`); the causes that can be seen from
outside are named.
Cost: four solutions of the problem per direction where all is well, up to 24 where it is not. There are three
directions, and one per leaf, for at most twelve leaves. A few more are needed to locate an error, only where nothing
else explains it.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
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
from hypergrad._solver import Hypergradient, InputError, Solver, Status, about_of, usable
from hypergrad._tree import PyTree
from hypergrad.diagnostics import _probes
from hypergrad.diagnostics._causes import Evidence, find_causes, is_unrolled
from hypergrad.diagnostics._differences import (
    Setting,
    Slope,
    Solution,
    flatten,
    in_float64,
    make_solve,
    settled,
    slopes,
    tighten,
)
from hypergrad.diagnostics._directions import Part, directions_along, groups, level, parts_of, rms, scales_of
from hypergrad.diagnostics._report import Comparison, Leaf, Metasmoothness, Report
from hypergrad.diagnostics._where import locate, nonfinite_entries

_CALLS = 30  # calls at the same hyperparameters, which show how a warm start changes the hypergradient
_KEYS = 3
_SMALL = 8  # entries up to which `per_leaf` checks a leaf entry by entry
_LEAVES = 12  # most directions within leaves
_STEP = 0.1  # relative length of the step over which metasmoothness is measured
_NEAR = 0.02  # relative distance of the point at which a used state is tried
_FLOOR = 1e-5  # changes of F below this share of F, for a relative change of 1 of the hyperparameters, count as zero
_LEAST = 1e-5  # share of the hypergradient's size below which a leaf counts as zero
_NOISE = 10  # errors of a difference by which one leaf may be off
_FINE = 1e-4  # relative accuracy of differences in float64
_SHRINKS = 0.3  # an error from rounding or a loose tolerance falls below this share in an accurate run
_VALUE = 1e-3  # relative difference allowed between the outer losses of `hypergrad` and `evaluate`
_SAME_DRAW = 3e-5  # relative difference of the outer loss between precisions allowed for the same draws
_BOAST = 30  # largest ratio of an error to its estimate
_NONFINITE = (Status.NONFINITE_LOSS, Status.NONFINITE_GRAD)
_OF_NONFINITE = {"non-finite", "failed", "unreliable"}
_NO_EXPLANATION = {"scaled", "wrong", "stochastic", "precision", "insensitive"}


class _Row(NamedTuple):
    """A direction, and the slopes of the settled and the first outer loss along it."""

    name: str
    direction: np.ndarray
    settled: Slope
    first: Slope


class _Run(NamedTuple):
    """The results of the solver at the precision it is used in.

    Attributes:
        compiled: `solver.hypergrad`.
        out: result of the first call.
        used: the state after the first call, and `out`.
        grad: hypergradient of the first call as a vector `[n]`.
        misshapen: description of a fault in its structure or shapes, or the empty string.
        drift: change of the outer loss in the second call.
        status: status of the first call.
        settled_grad: hypergradient of the last of several calls at the same hyperparameters.
        trains_on: whether the solver differentiates training that continues from call to call.
        key_spread: relative change of the hypergradient with other keys.
        metasmoothness: see `Metasmoothness`, for unrolled runs.
    """

    compiled: Callable[..., tuple[Hypergradient, Any]]
    out: Hypergradient
    used: tuple[Any, Hypergradient]
    grad: np.ndarray
    misshapen: str
    drift: float
    status: Status | int
    settled_grad: np.ndarray
    trains_on: bool
    key_spread: float
    metasmoothness: Metasmoothness | None

    @property
    def usable(self) -> bool:
        return bool(usable(self.out.info.status))


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

    The report's `ok` requires three things: the error along random directions is within `tol`; so is that of every leaf
    on its own, as far as the differences can tell; and the solver is found to train, to end at a minimum, to read its
    data and to use the hyperparameters that it is given. The last is tested by solving again from other parameters,
    with other rows, and from the state of another call. A solver's `evaluate` is assumed to be right; without one, only
    the agreement of the solver with itself and the results of these tests can be checked.

    Args:
        solver: any solver.
        params: the model's parameters at the start.
        hparams: hyperparameters at which to check; a random point is best, since at 0 and 1 many mistakes cancel.
        train: training data, a pytree of arrays or `hg.minibatches(...)`.
        valid: validation data, in the same forms.
        key: for losses and data that draw; both sides use the same draw, and other draws show how much it matters.
        directions: number of random directions; hyperparameters with at most this many entries are checked along each
            entry.
        per_leaf: list each leaf in the report, with every entry of leaves of at most eight; `ok` then depends on these
            too.
        model_state: as for `solver.init`.
        tol: relative error allowed (dimensionless). Default: 1e-4 for hyperparameters in float64, else 1e-2.

    Returns:
        See `Report`; print it. A solver that fails gives a report that says so; it never raises an exception.

    Raises:
        InputError: for a stream, for labels outside their classes, and for mistakes that the solver itself names.
        InputTypeError: for something that is not a solver.

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
    problem = Setting(
        solver, params, check_hparams(hparams), prepare("train", train), prepare("valid", valid), key, model_state
    )
    check_finite("hparams", problem.hparams)
    at, unflatten = flatten(problem.hparams)
    parts = parts_of(problem.hparams)
    scales = scales_of(at, parts)
    run = _run(problem, at, scales)
    info, grad = run.out.info, run.grad
    kind = about_of(solver).differentiates
    given = f"float{8 * _tree.dtype(problem.hparams).itemsize}"
    allowed = float(tol) if tol is not None else 1e-4 if given == "float64" else 1e-2
    reference = _reference(problem, at, run)
    precision = reference.precision
    fine = min(allowed, _FINE) if precision == "float64" else allowed
    rng = _generator(key, at)
    with reference.context():
        center, state = reference.solve(at)
        again = None
        if center.calm and kind != "response":
            again = _probes.solve_again(
                reference.solve, reference.problem, reference.unflatten(at), at, center, state, rng
            )
        from_there: dict[str, Any] = {}
        if again is not None and again.outcome == "left" and kind != "path" and again.solution is not None:
            center, from_there = again.solution, {"params": again.start}
        # Quantities that do not change after one call need no second call.
        calls = 1 if center.calls == 2 and center.drift == 0 else None

        def resolve(vector: np.ndarray) -> Solution:
            return reference.solve(vector, calls, **from_there)[0]

        def compare(name: str, direction: np.ndarray) -> _Row:
            return _Row(name, direction, *slopes(resolve, at, direction, center, fine))

        def is_off(row: _Row, grad: np.ndarray = grad) -> bool:
            return _is_off(row, grad, scales, allowed)

        rows = [compare(*d) for d in directions_along(parts, scales, directions, directions, rng)]
        leaf_rows = [([part], row) for part, row in zip(parts, rows, strict=False)]
        if len(rows) != len(parts) or at.size > len(rows):
            leaf_rows = [
                (members, compare(_name(members), level(members, scales, grad, rng)))
                for members in groups(parts, scales, grad, _LEAVES)
            ]
        by_leaf = [
            (part, [compare(*d) for d in directions_along([part], scales, directions, _SMALL, rng)])
            for part in parts
            if per_leaf
        ]
        silent = {
            members[0].path: row.settled
            for members, row in leaf_rows
            if len(members) == 1 and not np.any(grad[members[0].where]) and np.isfinite(row.settled.value)
        }
        through = float(info.extra.get("indirect_norm", 0.0)) if kind in ("optimum", "response") else 0.0
        floor = max(_FLOOR * abs(center.settled), 1e-3 * rms(scales) * through)
        error, doubt = _errors(rows, grad, floor)
        settled_error, _ = _errors(rows, run.settled_grad, floor)
        one_call_error, _ = _errors([row._replace(settled=row.first) for row in rows], grad, floor)
        agrees = error <= allowed + doubt and doubt <= allowed
        faults = [run.misshapen] if run.misshapen else list(nonfinite_entries(parts, grad))
        checked = [row for _, row in leaf_rows] + [row for _, group in by_leaf for row in group]
        off = [row for row in checked if is_off(row)]
        estimate = float(info.error_estimate)
        boastful = tol is None and error > _FINE + 10 * doubt and error > _BOAST * estimate
        if agrees and (off or boastful):
            # Rounding and loose tolerances make a smaller leaf less exact. A bug is just as large in an accurate run.
            accurate = _accurate(reference, run.compiled, at, center.calls if calls is None else 1)
            off = [row for row in off if _gap(row, accurate) > _SHRINKS * _gap(row, grad)]
            left = _errors(rows, accurate, floor)[0]
            if boastful and left > max(_FINE, _SHRINKS * error) and left > _BOAST * estimate:
                faults.append(
                    f"contradicted: the error is {error:.1g}, the solver's own estimate {estimate:.1g}, and in an "
                    f"accurate run the error is still {left:.1g}: the hypergradient is biased."
                )
        # If a NaN keeps the parameters where they are, this says nothing that the status has not already said.
        broken = int(run.out.info.status) in (Status.NONFINITE_LOSS, Status.NONFINITE_GRAD)
        if again is not None and not broken:
            faults += _start_faults(again, kind, center.settled, state_value=float(run.out.value))
        own = getattr(solver, "evaluate", None) is not None
        if center.calm and kind in ("optimum", "path", "unknown"):
            faults += _value_faults(run, center, rows) if own and not from_there and run.usable else []
            if not own:
                faults += [
                    f"unused: the outer loss stays the same to the last digit for any {what}: the solver reads "
                    "other data than those it is given, or no data."
                    for what in _probes.unused_data(reference.solve, reference.problem, at, center)
                ]
        evidence = Evidence(
            about=about_of(solver),
            ok=agrees,
            tol=allowed,
            error=error,
            doubt=doubt,
            settled_error=settled_error,
            one_call_error=one_call_error,
            info=info,
            status=run.status,
            value=float(run.out.value),
            center=center,
            trains_on=run.trains_on,
            key_spread=run.key_spread,
            batches=any(isinstance(d, Minibatches) for d in (train, valid)),
            precision=precision,
            given=given,
            eps=_tree.eps(problem.hparams),
            silent=silent,
            slopes=[row.settled for row in [*rows, *checked]],
            products=[(_product(row, grad), row.settled.value) for row in rows],
            metasmoothness=run.metasmoothness,
        )
        causes = list(find_causes(evidence))
        finite = bool(np.isfinite(evidence.value) and np.isfinite(center.settled)) and run.status not in _NONFINITE
        if not finite:  # no other measurement means anything
            causes = [cause for cause in causes if cause.split(":")[0] in _OF_NONFINITE]
        unexplained = {cause.split(":")[0] for cause in causes} <= _NO_EXPLANATION
        if unexplained and not faults and (off or (not agrees and doubt <= allowed)):
            loud = [(members, row) for members, row in leaf_rows if members[0].path not in silent]
            faults += locate(loud, scales, grad, compare, is_off, rng)
        if off and agrees and not faults and not silent:
            faults += [f"off: hparams{row.name}, along which the hypergradient is not the slope." for row in off[:3]]
    if agrees and finite and not faults and kind != "response" and not run.trains_on and not off:
        near = unflatten(at + _NEAR * scales * (2.0 * rng.integers(0, 2, at.size) - 1))
        if _probes.is_stale(run.compiled, problem, (problem.hparams, near), run.used, run.drift, allowed):
            faults.append(
                "stale: after a call at other hyperparameters or with other data the solver gives another result than "
                "a fresh one does: something of the earlier call (hyperparameters, data, parameters, the adjoint, the "
                "hypergradient) is used where the new one belongs."
            )
    ok = agrees and finite and not faults and not off
    return Report(
        ok=ok,
        relative_error=error,
        reference_error=doubt,
        settled_error=settled_error,
        one_call_error=one_call_error,
        error_estimate=float(info.error_estimate),
        status=run.status,
        causes=(*faults, *causes),
        directions=tuple(_comparison(row, grad) for row in rows),
        leaves=tuple(
            Leaf(
                part.path,
                part.size,
                _errors(group, grad, floor)[0],
                tuple(_comparison(row, grad) for row in group),
            )
            for part, group in by_leaf
        ),
        metasmoothness=run.metasmoothness,
        key_spread=run.key_spread,
        value=float(run.out.value),
        tol=allowed,
        precision=precision,
        info=info,
    )


class _Reference(NamedTuple):
    """The problem of which differences are taken, and the way to solve it.

    Attributes:
        context: context manager within which to solve it.
        problem: in the precision of the differences.
        solve: `(vector, calls=None, tight=True, **changed) -> (Solution, state)`.
        precision: `"float64"` or `"float32"`.
    """

    context: Callable[[], Any]
    problem: Setting
    solve: Callable[..., tuple[Solution, Any]]
    precision: str

    def unflatten(self, vector: np.ndarray) -> PyTree:
        return flatten(self.problem.hparams)[1](vector)


def _run(problem: Setting, at: np.ndarray, scales: np.ndarray) -> _Run:
    solver, (_, unflatten) = problem.solver, flatten(problem.hparams)
    about = about_of(solver)
    compiled = jax.jit(solver.hypergrad)

    def start(vector: np.ndarray, key: Array | None) -> tuple[Any, Callable[[Any], tuple[Hypergradient, Any]]]:
        hparams = unflatten(vector)
        init_key, call_key = (None, None) if key is None else jax.random.split(key)
        state = solver.init(problem.params, hparams, key=init_key, model_state=problem.model_state)
        return state, lambda state: compiled(state, hparams, problem.train, problem.valid, key=call_key)

    def vector_of(out: Hypergradient) -> np.ndarray:
        return np.full_like(at, np.nan) if _misshapen(out.grad, problem.hparams) else flatten(out.grad)[0]

    def first_grad(vector: np.ndarray, key: Array | None) -> np.ndarray:
        state, call = start(vector, key)
        return vector_of(call(state)[0])

    state, call = start(at, problem.key)
    check_solver_labels(solver, state, problem.hparams, problem.train, problem.valid, problem.key)
    out, state = call(state)
    used = (state, out)
    last, values = out, [float(out.value)]
    eps = float(np.finfo(np.asarray(out.value).dtype).eps)
    while len(values) < _CALLS and np.isfinite(values[-1]) and not settled(values, eps):
        last, state = call(state)
        values.append(float(last.value))
    grad = vector_of(out)
    spread, smooth = np.nan, None
    with np.errstate(all="ignore"):
        if problem.key is not None:
            others = [first_grad(at, jax.random.fold_in(problem.key, 1 + i)) for i in range(_KEYS)]
            size, change = rms(scales * grad), rms(np.asarray([rms(scales * (other - grad)) for other in others]))
            spread = change / size if size > 0 else float(change > 0)
        if is_unrolled(about):
            relative = scales * grad / max(float(np.max(np.abs(scales * grad), initial=0)), 1e-300)
            smooth = _metasmoothness(scales * grad, scales * first_grad(at - _STEP * scales * relative, problem.key))
    drift = abs(values[1] - values[0]) if len(values) > 1 else np.nan
    trains_on = is_unrolled(about) and drift > 100 * eps * abs(values[0])
    code = int(out.info.status)
    return _Run(
        compiled,
        out,
        used,
        grad,
        _misshapen(out.grad, problem.hparams),
        drift,
        Status(code) if code in set(Status) else code,
        vector_of(last),
        trains_on,
        float(spread),
        smooth,
    )


def _misshapen(grad: PyTree, hparams: PyTree) -> str:
    """Describe the fault in the structure of a hypergradient."""
    if jax.tree.structure(grad) != jax.tree.structure(hparams):
        return (
            f"shape: the hypergradient has the structure {jax.tree.structure(grad)}, the hyperparameters "
            f"{jax.tree.structure(hparams)}."
        )
    for (path, leaf), x in zip(jax.tree_util.tree_leaves_with_path(hparams), jax.tree.leaves(grad), strict=True):
        if np.shape(leaf) != np.shape(x):
            return (
                f"shape: the hypergradient of hparams{_tree.keystr(path)} has shape {np.shape(x)}, the hyperparameter "
                f"{np.shape(leaf)}."
            )
    return ""


def _reference(problem: Setting, at: np.ndarray, run: _Run) -> _Reference:
    """The problem of which differences are taken: in float64, unless the losses fail or draw other numbers there."""
    # The derivative of training costs more than compiling the training once more.
    compiled = None if is_unrolled(about_of(problem.solver)) else run.compiled
    with contextlib.suppress(Exception), _float64():
        same = in_float64(problem)
        solve = make_solve(same, compiled)
        first, given = solve(at, calls=1, tight=False)[0].first, float(run.out.value)
        # NaN means that there is no key. Draws in another dtype are different numbers, but may come close by chance.
        drawn = run.key_spread > 0 and np.isfinite(first - given)
        if not drawn or abs(first - given) <= _SAME_DRAW * abs(given):
            return _Reference(_float64, same, solve, "float64")
    precision = f"float{8 * _tree.dtype(problem.hparams).itemsize}"
    return _Reference(contextlib.nullcontext, problem, make_solve(problem, compiled), precision)


def _accurate(
    reference: _Reference, compiled: Callable[..., tuple[Hypergradient, Any]], at: np.ndarray, calls: int
) -> np.ndarray:
    """Return the solver's hypergradient in the precision of the reference, with every tolerance near rounding level."""
    problem = reference.problem
    hparams = reference.unflatten(at)
    init_key, call_key = (None, None) if problem.key is None else jax.random.split(problem.key)
    state = problem.solver.init(problem.params, hparams, key=init_key, model_state=problem.model_state)
    state, grad = tighten(state, about_of(problem.solver), linear=True), np.full_like(at, np.nan)
    for _ in range(calls):
        out, state = compiled(state, hparams, problem.train, problem.valid, key=call_key)
        grad = flatten(out.grad)[0]
    return grad


def _start_faults(again: _probes.Again, kind: str, reached: float, state_value: float) -> Iterator[str]:
    """Return the faults of the first start that a second start reveals."""
    if again.outcome == "untrained":
        yield (
            "untrained: the parameters stay where they are put, so nothing is trained: the comparison is of the outer "
            "loss at the start. Look for a learning rate or a number of steps of zero, or parameters that are "
            "returned as they came."
        )
    elif again.outcome == "left" and kind != "path":
        yield (
            f"saddle: moved by a thousandth, the parameters go elsewhere, and the outer loss from {state_value:.6g} to "
            f"{reached:.6g}: the first start leads to a saddle or a maximum of the training loss. The differences "
            "are of the other solution. Start at random, not at zero."
        )


def _value_faults(run: _Run, center: Solution, rows: Sequence[_Row]) -> Iterator[str]:
    """Whether `hypergrad` reports an outer loss that differs from that of `evaluate`."""
    value = float(run.out.value)
    size = abs(center.settled) + rms(np.asarray([row.settled.value for row in rows]))
    gap = min(abs(value - center.first), abs(value - center.settled))
    if gap > _VALUE * size and run.drift <= gap:
        yield (
            f"value: `hypergrad` reports an outer loss of {value:.6g}, the solver's `evaluate` one of "
            f"{center.first:.6g}."
        )


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Suppress warnings, since the user saw them all when the solver ran in the given precision."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _metasmoothness(here: np.ndarray, there: np.ndarray) -> Metasmoothness:
    with np.errstate(all="ignore"):
        cosine = here @ there / (np.linalg.norm(here) * np.linalg.norm(there))
        signs = np.abs(here) @ (np.sign(here) * np.sign(there)) / np.sum(np.abs(here))
    return Metasmoothness(float(cosine), float(signs), _STEP)


def _generator(key: Array | None, at: np.ndarray) -> np.random.Generator:
    """Return directions that differ from problem to problem, and are the same in every run."""
    point = zlib.crc32(at.tobytes())
    if key is None:
        return np.random.default_rng(point)
    data = jax.random.key_data(key) if _tree.is_key(key) else key
    return np.random.default_rng([point, *(int(x) for x in np.asarray(data).ravel())])


def _errors(rows: Sequence[_Row], grad: np.ndarray, floor: float) -> tuple[float, float]:
    """Relative errors of the hypergradient and of the differences along these directions."""
    values = np.asarray([row.settled.value for row in rows])
    wrong = rms(np.asarray([_product(row, grad) for row in rows]) - values)
    doubt = rms(np.asarray([row.settled.error for row in rows]))
    size = max(rms(values), floor)

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


def _is_off(row: _Row, grad: np.ndarray, scales: np.ndarray, allowed: float) -> bool:
    """Whether a hypergradient contradicts one difference by more than the errors of both allow.

    An error is relative to the size of the terms of the product, not to that of their sum, in which terms may cancel.
    """
    ours, theirs = _product(row, grad), row.settled.value
    if not np.isfinite(theirs):
        return False
    if not np.isfinite(ours):
        return True
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(row.direction / scales)))
        size = max(
            abs(theirs),
            float(np.linalg.norm(row.direction * grad)),
            _LEAST * largest * float(np.linalg.norm(scales * np.nan_to_num(grad, posinf=0, neginf=0))),
        )
    return abs(ours - theirs) > allowed * size + _NOISE * row.settled.error


def _gap(row: _Row, grad: np.ndarray) -> float:
    return float(np.nan_to_num(abs(_product(row, grad) - row.settled.value), nan=np.inf))


def _name(members: Sequence[Part]) -> str:
    return members[0].path if len(members) == 1 else f"{len(members)} leaves"


def _product(row: _Row, grad: np.ndarray) -> float:
    with np.errstate(all="ignore"):  # NaN and infinity are reported instead
        return float(row.direction @ grad)

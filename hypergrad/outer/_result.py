"""What `hg.tune` returns, and the record that it keeps of a run."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from hypergrad._checks import install, nearest
from hypergrad._solver import HypergradError, InputError, InputTypeError, Solver, Status, evaluation, usable
from hypergrad._tree import PyTree, keystr, numbers, size

TRAJECTORY = 1000  # largest number of scalars for which every step's hyperparameters are kept
FEW = 10  # a summary warns below this many validation rows per hyperparameter
_COLUMNS = 10  # entries up to which each entry of a leaf has its own column in a DataFrame


class TuneStatus(enum.StrEnum):
    """The reason why `hg.tune` ended.

    Attributes:
        FINISHED: all steps were taken.
        STOPPED: a callback asked for it.
        CONVERGED: `patience` accepted steps went by without a new best, `max_rejections` trials in a row were rejected,
            or the hypergradient vanished: for `max_failures` steps in a row it was smaller than its own error, and this
            error was below a thousandth of the largest hypergradient of the run.
        FAILED: too many hypergradients in a row were unusable, or none was usable at all.
        INTERRUPTED: Ctrl-C or SIGTERM.
        RAISED: an exception came out of a callback or the data; its attribute `result` holds the result.
        OUT_OF_TIME: `max_seconds` went by.

    >>> import hypergrad as hg
    >>> hg.TuneStatus.FINISHED == "finished"
    True
    """

    FINISHED = "finished"
    STOPPED = "stopped by a callback"
    CONVERGED = "no improvement"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    RAISED = "stopped by an exception"
    OUT_OF_TIME = "out of time"


class Best(NamedTuple):
    """The step with the lowest outer loss among the accepted steps; with an optax optimizer these are the steps whose
    hypergradient was usable. With a controller that compares values of different accuracy, the last accepted step.

    With minibatches the outer loss is a random draw, and the best step has the luckiest one. For solvers that train
    while they tune (`hg.self_tuning`), report this step: the last outer loss is often far above it, since training goes
    on.

    Attributes:
        step: its number, counted from 0; -1 if no step was usable, in which case the other fields describe the start.
        value: outer loss; NaN if no step was usable.
        hparams: the hyperparameters of the step, constrained.
        params: the parameters of the step.
    """

    step: int
    value: float
    hparams: PyTree
    params: PyTree


class History(NamedTuple):
    """The record of a run: NumPy arrays `[steps]` with one entry for each step, including failed steps.

    In every array, entry t belongs to the hyperparameters *before* update t.

    Attributes:
        value: outer loss.
        grad_norm: norm of the hypergradient with respect to the (constrained) hyperparameters.
        status: int, see `hg.Status`; a step whose status is not usable left the hyperparameters unchanged.
        inner_residual: see `hg.Info`.
        linear_residual: see `hg.Info`.
        error_estimate: see `hg.Info`.
        inner_steps: int, see `hg.Info`; where a controller judges by the loss first, with the steps of that evaluation.
        linear_steps: int, see `hg.Info`; likewise.
        seconds: wall time from the start of `tune` to the end of the call that took the step; the first entry includes
            the compilation.
        accepted: whether the run moved to this step's hyperparameters, boolean; with an optax optimizer, whether the
            step was usable. Where a controller rejected a trial by its value alone, the quantities that were not
            computed are NaN.
        hparams: pytree like the hyperparameters with leaves `[steps, ...]`, constrained; None above 1000 scalars.
        summary: `{"min": ..., "mean": ..., "max": ...}`, each a pytree like the hyperparameters with leaves `[steps]`.
        metrics: metrics that `outer_loss` returned in addition to the loss, by name.
        extra: values that the solver reports in `info.extra`, by name.
    """

    value: np.ndarray
    grad_norm: np.ndarray
    status: np.ndarray
    inner_residual: np.ndarray
    linear_residual: np.ndarray
    error_estimate: np.ndarray
    inner_steps: np.ndarray
    linear_steps: np.ndarray
    seconds: np.ndarray
    accepted: np.ndarray
    hparams: PyTree
    summary: dict[str, PyTree]
    metrics: dict[str, np.ndarray]
    extra: dict[str, np.ndarray]

    @property
    def usable(self) -> np.ndarray:
        """Whether each step's hypergradient could be trusted, a boolean array `[steps]`."""
        return usable(self.status)

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row per step.

        The columns are the fields above, the status by name, metrics and extra by name, and the hyperparameters by
        path: one column for each entry of a leaf of at most ten, otherwise `.min`, `.mean` and `.max`.

        Raises:
            HypergradError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise HypergradError(f"to_pandas needs pandas: {install('pandas')}.") from error
        columns: dict[str, Any] = {name: getattr(self, name) for name in SCALARS} | {"seconds": self.seconds}
        columns |= {"accepted": self.accepted}
        columns["status"] = [status_name(code) for code in self.status]
        columns |= self.metrics | self.extra
        for path, _ in jax.tree_util.tree_leaves_with_path(self.summary["mean"]):
            columns |= self._hparam_columns(path)
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.value), name="step"))

    def _hparam_columns(self, path: Any) -> dict[str, np.ndarray]:
        name = f"hparams{keystr(path)}"
        if self.hparams is not None:
            leaf = _at(self.hparams, path)
            if leaf[0:1].size <= _COLUMNS:
                return {name + (str(list(i)) if i else ""): leaf[(slice(None), *i)] for i in np.ndindex(leaf.shape[1:])}
        return {f"{name}.{kind}": _at(self.summary[kind], path) for kind in ("min", "mean", "max")}

    def __repr__(self) -> str:
        names = [*self.metrics, *self.extra]
        return f"History({len(self.value)} steps" + (f"; {', '.join(names)}" if names else "") + ")"


# The fields of History that a step of tune computes, in the order of the vector that it sends to the host.
SCALARS = (
    "value",
    "grad_norm",
    "status",
    "inner_residual",
    "linear_residual",
    "error_estimate",
    "inner_steps",
    "linear_steps",
)


class Retrained(NamedTuple):
    """A fresh training run at tuned hyperparameters; what `Result.retrain` returns.

    Attributes:
        params: the parameters, from the solver's response.
        value: outer loss at these parameters.
        status: name of the status of the training.
        state: the solver's state after training.
    """

    params: PyTree
    value: float
    status: str
    state: Any


class Result(NamedTuple):
    """The result of `hg.tune`. The final and the best point are kept separately; print it for a summary.

    Attributes:
        hparams: the hyperparameters after the last update, constrained; with a controller, those of the last accepted
            step and never of an untested trial.
        params: the solver's response at the end; for a solver that trains, the parameters of the last step, which are
            one update behind `hparams`. For a report, retrain from scratch at the chosen hyperparameters.
        best: see `Best`.
        history: see `History`.
        status: see `TuneStatus`.
        state: the solver's state, for `solver.hypergrad(result.state, result.hparams, ...)`.
        outer_state: the outer optimizer's state, over unconstrained hyperparameters.
        test: outer loss on `tune(test=...)`, data that did not influence any choice, at the best step's
            hyperparameters; None without such data.
        validated: number of rows of the validation data; None where it is not known, as for a stream.
        run: what `hg.tune(..., resume=result)` continues from.
    """

    hparams: PyTree
    params: PyTree
    best: Best
    history: History
    status: TuneStatus
    state: Any
    outer_state: Any
    test: float | None = None
    validated: int | None = None
    run: Any = None

    def retrain(
        self,
        solver: Solver,
        params: PyTree,
        train: PyTree = None,
        valid: PyTree = None,
        *,
        key: Array | None = None,
        model_state: PyTree = None,
        calls: int = 1,
    ) -> Retrained:
        """Train from scratch at the best step's hyperparameters, which is the result to report.

        Args:
            solver: the solver that trains, usually the one that tuned.
            params: parameters from which training starts.
            train: training data, as for `solver.evaluate`.
            valid: data for the outer loss; None for losses that close over their data.
            key: PRNG key, if the losses or the solver need one.
            model_state: the model's state at the start.
            calls: how often the solver is called, each call continuing the last; above 1 for solvers that train a few
                steps per call.

        Returns:
            See `Retrained`.

        Raises:
            InputError: if no step of the run was usable.
        """
        if self.best.step < 0:
            raise InputError("retrain: no step of the run was usable, so there is no best step: see result.status.")
        hparams = self.best.hparams
        keys = [None] * (calls + 1) if key is None else list(jax.random.split(key, calls + 1))
        state = solver.init(params, hparams, key=keys[0], model_state=model_state)
        evaluate, value, info = jax.jit(evaluation(solver)), None, None
        for call in keys[1:]:
            value, info, state = evaluate(state, hparams, train, valid, key=call)
        if value is None or info is None:
            raise InputError(f"retrain: calls must be at least 1, found {calls}.")
        return Retrained(solver.response(state, hparams), float(value), status_name(info.status), state)

    def to_optuna(
        self,
        storage: Any = None,
        study_name: str | None = None,
        *,
        distributions: Mapping[str, Any] | None = None,
    ) -> Any:
        """Write the history as trials of a new Optuna study, for its plots and dashboards, or for a sampler to continue
        from.

        Each step is a trial: COMPLETE with its outer loss, or FAIL where the hypergradient was unusable or the loss not
        finite. The parameters of a trial are the hyperparameters before the update, one for each entry, named by their
        paths: `l2`, `layer.rate.3`; `hparams` for a single scalar. Its user attributes are the step, its status, and
        all other columns of the history that are finite. Above 1000 scalars no trajectory is kept; a trial then has no
        parameters, and `.min`, `.mean` and `.max` of each leaf are attributes.

        Args:
            storage: URL of a database, such as `"sqlite:///runs.db"`, or an `optuna.storages` object; None keeps the
                study in memory.
            study_name: name of the study, which must be new in the storage; None lets Optuna choose one.
            distributions: `optuna.distributions.FloatDistribution` by the name of a parameter, as later trials of the
                study will suggest it; by default the range from the smallest to the largest value of the run.

        Returns:
            The `optuna.Study`, which minimizes.

        Raises:
            InputError: for distributions with unknown names, or that exclude a value of the run; for text that is not a
                URL.
            InputTypeError: for a storage or distribution of another type.
            HypergradError: if Optuna is not installed.
            optuna.exceptions.DuplicatedStudyError: if the storage already has a study of that name.

        >>> import hypergrad as hg, jax.numpy as jnp, optax
        >>> problem = hg.Problem(inner_loss=lambda w, h, batch: jnp.sum((w - 2.0)**2) + h["l2"] * jnp.sum(w**2),
        ...                      outer_loss=lambda w, h, batch: jnp.sum((w - 1.0)**2))
        >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=10))
        >>> result = hg.tune(solver, jnp.zeros(3), {"l2": 0.1}, outer=optax.adam(0.1), steps=5, progress=False)
        >>> study = result.to_optuna()
        >>> len(study.trials), study.best_trial.number, sorted(study.best_params)
        (5, 4, ['l2'])
        """
        try:
            import optuna
        except ImportError as error:
            raise HypergradError(f"to_optuna needs Optuna: {install('optuna')}.") from error
        _check_storage(storage, optuna.storages.BaseStorage)
        history, steps = self.history, range(len(self.history.value))
        rows: list[dict[str, float]] = [{} for _ in steps]
        if history.hparams is not None:
            rows = [numbers(jax.tree.map(lambda leaf, t=t: leaf[t], history.hparams)) for t in steps]
        paths = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        ranges = _ranges(paths, dict(distributions or {}), optuna.distributions.FloatDistribution)
        states = optuna.trial.TrialState
        trials = []
        for t in steps:
            value = float(history.value[t]) if history.usable[t] and np.isfinite(history.value[t]) else None
            state = states.FAIL if value is None else states.COMPLETE
            trials.append(
                optuna.trial.create_trial(
                    state=state, value=value, params=rows[t], distributions=ranges, user_attrs=_attributes(history, t)
                )
            )
        study = optuna.create_study(storage=storage, study_name=study_name, direction="minimize")
        study.add_trials(trials)
        for name, value in {"status": str(self.status), "best_step": self.best.step, "test": self.test}.items():
            if value is not None:
                study.set_user_attr(name, value)
        return study

    def __repr__(self) -> str:
        history, best, steps = self.history, self.best, len(self.history.value)
        lines = [f"tune: {self.status} after {steps} step{'s' * (steps != 1)}"]
        if best.step >= 0:
            lines.append(f"  best   outer loss {best.value:.6g} at step {best.step} with {_brief(best.hparams)}")
        if steps:
            lines[0] += f" in {history.seconds[-1]:.3g} s"
            lines.append(f"  last   outer loss {history.value[-1]:.6g} at step {steps - 1}")
            codes, counts = np.unique(history.status, return_counts=True)
            skipped = int(np.sum(~history.usable))
            lines.append(
                "  status "
                + ", ".join(f"{status_name(c)} {n}" for c, n in zip(codes, counts, strict=True))
                + (f"; {skipped} update{'s' * (skipped != 1)} skipped" if skipped else "")
            )
        if self.test is not None:
            lines.append(f"  test   outer loss {self.test:.6g} with the hyperparameters of the best step")
        lines.append(f"  final  {_brief(self.hparams)}")
        count = size(self.hparams)
        if best.step >= 0 and self.validated is not None and self.validated < FEW * count:
            were = "hyperparameter was" if count == 1 else "hyperparameters were"
            lines.append(
                f"  warning: {count} {were} tuned on {self.validated} validation rows, and the best outer loss is too "
                "low for unseen data: hg.diagnostics.overtuning says by how much (up to 64 hyperparameters), "
                "tune(..., test=...) shows it, and notebooks/guides/overtuning.md what helps."
            )
        return "\n".join(lines)


def _check_storage(storage: Any, kind: type) -> None:
    if isinstance(storage, str) and "://" not in storage:
        raise InputError(
            f"to_optuna: storage must be the URL of a database, found {storage!r}: write 'sqlite:///{storage}', or an "
            "object of optuna.storages."
        )
    if storage is not None and not isinstance(storage, (str, kind)):
        raise InputTypeError(
            f"to_optuna: storage must be a URL, an object of optuna.storages, or None, found {storage!r}."
        )


def _ranges(paths: dict[str, list[float]], wanted: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return one distribution per parameter, shared by all trials of a study: the caller's, or the range of the run."""
    for name, distribution in wanted.items():
        if name not in paths:
            known = f"the parameters are {', '.join(paths)}" if paths else "the trials have no parameters"
            raise InputError(f"to_optuna: distributions has {name!r}{nearest(name, list(paths))}; {known}.")
        if not isinstance(distribution, kind) or distribution.step is not None:
            raise InputTypeError(
                f"to_optuna: distributions[{name!r}] must be an optuna.distributions.FloatDistribution without a step, "
                f"found {distribution!r}."
            )
        low, high = min(paths[name]), max(paths[name])
        if low < distribution.low or high > distribution.high:
            raise InputError(
                f"to_optuna: distributions[{name!r}] goes from {distribution.low:.6g} to {distribution.high:.6g}, but "
                f"the run went from {low:.6g} to {high:.6g}: widen it."
            )
    return {name: wanted.get(name) or kind(min(path), max(path)) for name, path in paths.items()}


def _attributes(history: History, t: int) -> dict[str, Any]:
    """Return step t without its value and parameters, in the form that storages keep, JSON without NaN and infinity."""
    columns = {name: getattr(history, name) for name in (*SCALARS[1:], "seconds", "accepted")}
    found = {name: column[t].item() for name, column in {**columns, **history.metrics, **history.extra}.items()}
    found |= {"step": t, "status": status_name(history.status[t])}
    if history.hparams is None:
        for kind, tree in history.summary.items():
            row = numbers(jax.tree.map(lambda leaf: leaf[t], tree))
            found |= {f"{name}.{kind}": number for name, number in row.items()}
    return {name: value for name, value in found.items() if not isinstance(value, float) or np.isfinite(value)}


def status_name(code: Any) -> str:
    """Return the name of a status code, or its number for a solver that has codes of its own."""
    try:
        return Status(int(code)).name
    except ValueError:
        return f"code {int(code)}"


class Layout(NamedTuple):
    """The layout of the report of a step.

    Attributes:
        kinds: name and kind (float, int, bool, uint) of each scalar.
        metrics: names of those that are metrics.
        extra: names of those that are extras.
    """

    kinds: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...]
    extra: tuple[str, ...]

    def names(self, *kinds: str) -> list[str]:
        """Return the names of the scalars of these kinds, in the order of their columns."""
        return [name for kind in kinds for name, found in self.kinds if found == kind]


class Rows(NamedTuple):
    """The reports of the steps, one row for each.

    Attributes:
        scalars: float64 `[steps, ...]`, with the wall time last.
        integers: int64 `[steps, ...]`, booleans after the integers.
        naturals: uint64 `[steps, ...]`.
        hparams: all entries in the order of the leaves; above `TRAJECTORY` entries, the minimum, mean and maximum of
            each leaf instead.
    """

    scalars: np.ndarray
    integers: np.ndarray
    naturals: np.ndarray
    hparams: np.ndarray


def column(rows: Rows, layout: Layout, name: str) -> np.ndarray:
    """Return one scalar over all steps, in the widest dtype of its kind."""
    kind = "float" if name == "seconds" else dict(layout.kinds)[name]
    if kind == "float":
        return rows.scalars[:, [*layout.names("float"), "seconds"].index(name)].copy()
    if kind == "uint":
        return rows.naturals[:, layout.names("uint").index(name)].copy()
    return rows.integers[:, layout.names("int", "bool").index(name)].astype(bool if kind == "bool" else np.int64)


def make_history(rows: Rows, layout: Layout, example: PyTree) -> History:
    """Return the history as a person sees it.

    Args:
        rows: what the steps reported.
        layout: layout of their scalars.
        example: pytree like the hyperparameters.
    """
    fields = {name: column(rows, layout, name) for name in (*SCALARS, "seconds", "accepted")}
    computed = column(rows, layout, "computed")

    def optional(name: str) -> np.ndarray:
        found = column(rows, layout, name)
        return found if computed.all() or found.dtype == np.float64 else np.where(computed, found, np.nan)

    steps = len(rows.scalars)
    leaves, treedef = jax.tree.flatten(example)
    dtypes = [np.dtype(jax.numpy.result_type(leaf)) for leaf in leaves]
    if size(example) <= TRAJECTORY:
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        path = [
            part.reshape(steps, *leaf.shape).astype(dtype)
            for part, leaf, dtype in zip(np.split(rows.hparams, ends, axis=1), leaves, dtypes, strict=True)
        ]
        trajectory = treedef.unflatten(path)
        spread = [_spread(part) for part in path]
    else:
        trajectory = None
        spread = [
            [column.astype(dtype) for column in part.T]
            for part, dtype in zip(rows.hparams.reshape(steps, len(leaves), 3).transpose(1, 0, 2), dtypes, strict=True)
        ]
    summary = {name: treedef.unflatten([part[i] for part in spread]) for i, name in enumerate(("min", "mean", "max"))}
    return History(
        **fields,
        hparams=trajectory,
        summary=summary,
        metrics={name: optional(name) for name in layout.metrics},
        extra={name: optional(name) for name in layout.extra},
    )


def _spread(part: np.ndarray) -> list[np.ndarray]:
    """Minimum, mean and maximum of each row; NaN for a row without entries."""
    if 0 in part.shape:
        return [np.full(len(part), np.nan, part.dtype)] * 3
    flat = part.reshape(len(part), -1)
    return [flat.min(axis=1), flat.mean(axis=1), flat.max(axis=1)]


def _at(tree: PyTree, path: Any) -> np.ndarray:
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


def _brief(hparams: PyTree) -> str:
    """Write hyperparameters in one line: their values where they fit, otherwise the mean and range of each leaf."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(hparams):
        values = np.asarray(leaf, np.float64).ravel()
        name = keystr(path) or "hparams"
        if values.size == 0:
            continue
        if values.size <= 4:
            text = ", ".join(f"{v:.4g}" for v in values)
            parts.append(f"{name} = {text if not np.ndim(leaf) else f'[{text}]'}")
        else:
            parts.append(f"{name}: {values.size} from {values.min():.4g} to {values.max():.4g}")
    shown = ", ".join(parts[:4])
    return shown + (f", and {len(parts) - 4} more" if len(parts) > 4 else "")

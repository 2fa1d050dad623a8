r"""Optuna samples the choices, hypergradients polish the continuous hyperparameters of each trial.

    value of a trial = min over steps t of F_c(u_t),   u_{t+1} = u_t − step(∂F_c/∂u),   u_0 as the trial suggests

where c are the choices of the trial (widths, depths, kernels, whole numbers), and F_c the outer loss of the problem
that they make. The sampler sees c, u_0 and the polished value, as in a memetic search (Moscato 1989) whose local search
changes the value that a point is given and not the point; the polished hyperparameters are user attributes of the
trial.

Differs from calling `hg.tune` in an objective in that
1. each step is reported to the study, and its pruner may end the trial;
2. an interrupt, after which `hg.tune` returns what it has, ends the study as well;
3. a study that maximizes is refused, since `hg.tune` minimizes.
Cost: that of `hg.tune` a trial, and one compilation: keep compiled code between trials and workers with
`jax.config.update("jax_compilation_cache_dir", folder)`, so that trials of the same shapes compile once.
Workers are processes of their own, started afresh and not forked (JAX runs threads), which share a storage of Optuna,
as `JournalStorage(JournalFileBackend(path))`, a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._solver import InputError, InputTypeError, Solver, usable
from hypergrad._tree import PyTree, numbers, size
from hypergrad.adapters._model import missing
from hypergrad.outer import Callback, Result, TuneStatus, tune
from hypergrad.outer.callbacks import check_callbacks

_MOST = 1000  # hyperparameters that a trial's attributes hold; of more they hold a summary


def objective(arguments: Callable[[Any], Mapping[str, Any]], **options: Any) -> Callable[[Any], float]:
    """An objective for `study.optimize`: each trial is a run of `hg.tune`, and its value the lowest outer loss.

    Args:
        arguments: `trial -> dict` of the arguments of `polish`, such as `solver`, `params` and `hparams`, that depend
            on what the trial suggests.
        **options: the arguments that are the same in all trials, such as `outer`, `steps`, `train` and `valid`. What
            `arguments` returns goes first.

    Returns:
        `trial -> float`. A trial in which no step was usable is NaN, which Optuna stores as failed.

    Raises:
        InputTypeError: for `arguments` that is no function, or, by the objective, returns no dict.
        InputError: for `checkpoint` among the options, since trials may not share a folder.
        HypergradError: if Optuna is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax, optuna
    >>> from hypergrad.adapters.optuna import objective, polished
    >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
    >>> def arguments(trial):
    ...     power = trial.suggest_categorical("power", [1, 2])
    ...     problem = hg.Problem(inner_loss=lambda w, h, batch: (w - 2.0)**2 + h["l2"] * w**2,
    ...                          outer_loss=lambda w, h, batch: (w**power - 1.0)**2 + power)
    ...     solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=10))
    ...     return {"solver": solver, "hparams": {"l2": trial.suggest_float("l2", 0.01, 10.0, log=True)}}
    >>> study = optuna.create_study(sampler=optuna.samplers.GridSampler({"power": [1, 2], "l2": [0.5]}, seed=0))
    >>> study.optimize(objective(arguments, params=jnp.zeros(()), outer=optax.adam(0.1), steps=40,
    ...                          domain=hg.domains.log(), progress=False))
    >>> study.best_params["power"], round(study.best_value, 2)
    (1, 1.0)
    >>> round(float(polished(study.best_trial, {"l2": 0.0})["l2"]), 1)  # the optimum, where w = 1
    1.0
    """
    _optuna()
    if not callable(arguments):
        raise InputTypeError(
            f"objective: arguments must be a function of the trial that returns a dict, found {arguments!r}: write "
            'lambda trial: {"solver": ..., "hparams": ...}.'
        )
    if options.get("checkpoint") is not None:
        raise InputError(
            "objective: checkpoint is the same folder for all trials: let arguments return one of its own, such as "
            'f"runs/{trial.number}".'
        )

    def run(trial: Any) -> float:
        own = arguments(trial)
        if not isinstance(own, Mapping):
            raise InputTypeError(
                f"objective: arguments must return a dict of the arguments of hg.tune, found {type(own).__name__}: "
                'write return {"solver": ..., "hparams": ...}.'
            )
        given = {**options, **own}
        absent = [name for name in ("solver", "params", "hparams", "outer", "steps") if name not in given]
        if absent:
            raise InputError(
                f"objective: {', '.join(absent)} missing: return it from arguments, or write objective(..., "
                f"{absent[0]}=...) where it is the same in all trials."
            )
        return polish(trial, **given).best.value

    return run


def polish(
    trial: Any,
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    train: PyTree = None,
    valid: PyTree = None,
    *,
    outer: Any,
    steps: int,
    prune: bool = True,
    callbacks: Callback | Iterable[Callback] = (),
    **options: Any,
) -> Result:
    """`hg.tune` for a trial, in an objective of your own: its steps are reported, and the pruner may end it.

    However the run ends, user attributes of the trial hold its `status`, `best_step`, the `hparams` of the best step by
    their paths (of more than 1000, `.min`, `.mean` and `.max` of each leaf), and the loss on `test` data as `test`.

    Args:
        trial: the `optuna.Trial`.
        solver: see `hg.tune`, as everything that is not named here.
        params: the parameters at the start.
        hparams: the hyperparameters at the start, suggested by the trial or fixed.
        train: training data.
        valid: validation data.
        outer: optax optimizer or `hg.outer.Controller`.
        steps: number of outer steps.
        prune: whether the pruner is asked; False reports alone. Step 0 is where the trial starts, which nothing has
            polished: a pruner with `n_warmup_steps` does not compare that.
        callbacks: functions beside.
        **options: any other argument of `hg.tune`.

    Returns:
        The result of `hg.tune`; an objective returns `result.best.value`.

    Raises:
        InputError: for a study that maximizes or has several objectives; what `hg.tune` raises.
        InputTypeError: for what is no trial.
        optuna.TrialPruned: when the pruner says so, with the result attached as `result`.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the result attached, so that the study ends.
        HypergradError: if Optuna is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax, optuna
    >>> from hypergrad.adapters.optuna import polish
    >>> problem = hg.Problem(inner_loss=lambda w, l2, batch: (w - 2.0)**2 + l2 * w**2,
    ...                      outer_loss=lambda w, l2, batch: (w - 1.0)**2)
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.1), steps=10))
    >>> trial = optuna.create_study().ask()
    >>> result = polish(trial, solver, jnp.zeros(()), trial.suggest_float("l2", 0.5, 0.5),
    ...                 outer=optax.adam(0.1), steps=3, progress=False)
    >>> sorted(trial.user_attrs["hparams"]), trial.user_attrs["best_step"]
    (['hparams'], 2)
    """
    functions = (report(trial, prune=prune), *check_callbacks(callbacks))
    try:
        result = tune(solver, params, hparams, train, valid, outer=outer, steps=steps, callbacks=functions, **options)
    except Exception as error:
        if isinstance(found := vars(error).get("result"), Result):
            _keep(trial, found)
        raise
    _keep(trial, result)
    if result.status is TuneStatus.INTERRUPTED:
        stop = KeyboardInterrupt("hg.tune was interrupted, and the study ends as well")
        vars(stop)["result"] = result
        raise stop
    return result


def report(trial: Any, *, prune: bool = True) -> Callback:
    """A callback of `hg.tune` that reports the outer loss of each step to a trial, and ends it when its pruner says so.

    Steps that are not usable, or that a controller rejected, are not reported.

    Args:
        trial: the `optuna.Trial`.
        prune: whether the pruner is asked.

    Returns:
        A callback, which raises `optuna.TrialPruned`.

    Raises:
        InputError: for a study that maximizes or has several objectives.
        InputTypeError: for what is no trial.
        HypergradError: if Optuna is not installed.

    >>> import optuna
    >>> from hypergrad.adapters.optuna import report
    >>> study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    >>> callback = report(study.ask())
    >>> callback(0, {"value": 0.5, "status": 0})
    >>> callback(1, {"value": 1.5, "status": 0})
    Traceback (most recent call last):
    optuna.exceptions.TrialPruned: the trial was pruned after step 1
    """
    optuna = _optuna()
    if not all(callable(getattr(trial, name, None)) for name in ("report", "should_prune")):
        raise InputTypeError(
            f"report: trial must be an optuna.Trial, found {trial!r}: pass what the objective is given."
        )
    directions = getattr(getattr(trial, "study", None), "directions", [optuna.study.StudyDirection.MINIMIZE])
    if len(directions) > 1:
        raise InputError(
            f"report: the study has {len(directions)} objectives, but an outer loss is one: create a study of one, or "
            "call hg.tune in an objective of your own."
        )
    if directions[0] == optuna.study.StudyDirection.MAXIMIZE:
        raise InputError(
            "report: the study maximizes, but hg.tune minimizes the outer loss: write "
            'optuna.create_study(direction="minimize").'
        )

    def tell(step: int, metrics: Mapping[str, Any]) -> None:
        value = float(metrics["value"])
        if not np.isfinite(value) or not usable(metrics["status"]) or not metrics.get("accepted", True):
            return
        trial.report(value, step)
        if prune and trial.should_prune():
            raise optuna.TrialPruned(f"the trial was pruned after step {step}")

    return tell


def polished(trial: Any, like: PyTree) -> PyTree:
    """The polished hyperparameters of a trial that `polish` or `objective` ran, in any process.

    Args:
        trial: a finished trial, such as `study.best_trial`.
        like: pytree with the structure, shapes and dtypes of the hyperparameters.

    Returns:
        The hyperparameters of the best step, a pytree like `like`.

    Raises:
        InputError: for a trial that has none, or others than `like` has.

    >>> import optuna
    >>> from hypergrad.adapters.optuna import polished
    >>> trial = optuna.trial.create_trial(value=0.0, user_attrs={"hparams": {"rate": 0.1, "l2.0": 1.0, "l2.1": 2.0}})
    >>> polished(trial, {"rate": 0.0, "l2": [0.0, 0.0]})["l2"][1].item()
    2.0
    """
    kept = getattr(trial, "user_attrs", {}).get("hparams")
    if not isinstance(kept, Mapping):
        raise InputError(
            f"polished: the trial has no polished hyperparameters, its user attributes are "
            f"{sorted(getattr(trial, 'user_attrs', {}))}: pass a trial that polish or objective ran."
        )
    names = list(numbers(like))
    if set(names) != set(kept):
        brief = lambda found: ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise InputError(
            f"polished: like has the hyperparameters {brief(names)}, but the trial has {brief(sorted(kept))}: pass a "
            f"tree like the one that was tuned. Above {_MOST} hyperparameters a trial keeps a summary alone."
        )
    leaves, treedef = jax.tree.flatten(like)
    values = iter([kept[name] for name in names])
    filled = [np.reshape([next(values) for _ in range(np.size(leaf))], np.shape(leaf)) for leaf in leaves]
    return treedef.unflatten([jnp.asarray(x, jnp.result_type(leaf)) for x, leaf in zip(filled, leaves, strict=True)])


def _keep(trial: Any, result: Result) -> None:
    found = {"status": str(result.status), "best_step": result.best.step, "test": result.test}
    if result.best.step >= 0:
        hparams = result.best.hparams
        found["hparams"] = numbers(hparams, most=None if size(hparams) <= _MOST else 1)
    for name, value in found.items():
        if value is not None:
            trial.set_user_attr(name, value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing("optuna", "optuna", error) from error
    return optuna

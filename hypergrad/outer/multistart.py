r"""Tuning from many starting hyperparameters at once.

    u^i ← u^i + optimizer(∂F/∂u^i),   i = 1 … k

The outer loss is not convex, and neighbouring starts may end in different optima. One compiled step advances all of
them by `vmap`: k runs of `hg.tune` for one compilation, side by side on the device.
Cost: k times that of the solver, less what a device gains by working on all of them at once; an inner solve takes as
many steps as the slowest start needs. Memory: k states; the data are shared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hypergrad import _tree
from hypergrad._checks import check_finite, check_hparams
from hypergrad._data import Stream
from hypergrad._jaxpr.labels import check_solver_labels
from hypergrad._options import SOLVER, Number, options
from hypergrad._solver import InputError, InputTypeError, Solver
from hypergrad._tree import PyTree
from hypergrad.domains._domain import to_unconstrained
from hypergrad.outer._feed import source
from hypergrad.outer._loop import conclude, several
from hypergrad.outer._result import Result, TuneStatus
from hypergrad.outer._run import Notes, Run, Tally, counted, note
from hypergrad.outer._signals import interruptible
from hypergrad.outer._step import Packet, make_advance, start
from hypergrad.outer.controllers import Controller


class Multistart(NamedTuple):
    """The results of tuning from many starts.

    Attributes:
        results: one `hg.Result` for each start, in the order of the starts.
        best: the result whose best step has the lowest outer loss; None if no start had a usable step.
    """

    results: tuple[Result, ...]
    best: Result | None


@options(
    solver=SOLVER,
    steps=Number(least=1, integer=True, static=True, advice="write how many outer steps to take"),
    steps_per_call=Number(least=1, integer=True, static=True),
)
def multistart(
    solver: Solver,
    params: PyTree,
    hparams: PyTree,
    train: PyTree = None,
    valid: PyTree = None,
    *,
    outer: optax.GradientTransformation | Controller | Any,
    steps: int,
    key: Array | None = None,
    domain: PyTree = None,
    model_state: PyTree = None,
    steps_per_call: int = 1,
) -> Multistart:
    """Tune from several starting hyperparameters at once, and keep all results.

    Start i is the run of `hg.tune` with `hparams[i]` and `key=jax.random.fold_in(key, i)`, to rounding; all runs take
    all steps. Ctrl-C ends them and returns the results so far. The lowest of many validation losses is low partly by
    luck: judge the best result on data that did not influence any choice.

    Args:
        solver: the method, `hg.implicit(problem)` or any other `hg.Solver`.
        params: the model's parameters, from which every start begins.
        hparams: pytree of arrays with a leading axis of k starts, each inside its domain.
        train: training data, which the starts share: a pytree of arrays, `hg.minibatches(...)`, or None.
        valid: validation data, in the same forms.
        outer: optax optimizer or `hg.outer.Controller`, with a separate state for each start.
        steps: number of outer steps.
        key: PRNG key, if the losses, the solver or the data need one.
        domain: pytree prefix of the hyperparameters of one start, with `hg.domains` as leaves.
        model_state: state of the model besides its parameters, for `hg.Problem(..., model_state=True)`.
        steps_per_call: steps that one call of the compiled program takes; Ctrl-C acts after each call.

    Returns:
        See `Multistart`. A start without any usable step has the status FAILED.

    Raises:
        InputError: for leaves without a leading axis or with axes of different lengths, for hyperparameters outside
            their domain, and wherever `hg.tune` raises it.
        InputTypeError: for a stream, which can be read only once, and wherever `hg.tune` raises it.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(inner_loss=lambda w, h, batch: jnp.sum((w - h)**2),
    ...                      outer_loss=lambda w, h, batch: jnp.cos(3 * w) + 0.1 * w**2)
    >>> found = hg.multistart(hg.implicit(problem), jnp.zeros(()), jnp.array([-3.0, 1.5, 4.0]), outer=optax.adam(0.1),
    ...                       steps=100)
    >>> [round(float(result.hparams), 1) for result in found.results], round(float(found.best.hparams), 1)
    ([-3.1, 1.0, 3.1], 1.0)
    """
    hparams = check_hparams(hparams)
    check_finite("hparams", hparams)
    count = _starts(hparams)
    for name, data in (("train", train), ("valid", valid)):
        if isinstance(data, Stream):
            raise InputTypeError(
                f"multistart: {name} is hg.stream, which is read once, but all starts need the same data: pass arrays, "
                "or hg.minibatches."
            )
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    free = jax.tree.map(lambda *x: jnp.stack(x), *[to_unconstrained(domain, pick(hparams, i)) for i in range(count)])
    data = source("train", train, key, steps_per_call)(1), source("valid", valid, key, steps_per_call)(1)
    keys = None if key is None else jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.arange(count))
    init_keys, step_keys = (None, None) if keys is None else (keys[:, 0], keys[:, 1])

    begin = lambda h, u, k: start(solver.response, outer, solver.init(params, h, key=k, model_state=model_state), h, u)
    loop = jax.jit(jax.vmap(begin))(hparams, free, init_keys)
    advance = make_advance(solver, outer, domain)
    unit = jax.jit(jax.vmap(lambda loop, k, *data: advance(loop, *data, k), (0, 0, None, None)))
    step = lambda loop, train, valid, keys: unit(loop, keys, train, valid)
    first = pick((loop.solver, hparams, step_keys), 0)
    check_solver_labels(solver, first[0], first[1], *data, first[2])
    call = several(step, {}, steps_per_call, show=False)

    notes, done, tallies = [Notes() for _ in range(count)], 0, [Tally()] * count
    status = None
    try:
        with interruptible() as interrupts:
            while done < steps:
                taken = min(steps_per_call, steps - done)
                after, _, packet = call(loop, taken, *data, step_keys)
                for i in range(count):
                    note(notes[i], done, taken, _of_one(packet, i, steps_per_call))
                later = [counted(tallies[i], notes[i], done, done + taken, 0.0) for i in range(count)]
                loop, tallies, done = after, later, done + taken  # in one piece, since Ctrl-C may come any time
                interrupts.check()
    except KeyboardInterrupt:
        if not done:
            raise
        status = TuneStatus.INTERRUPTED
    respond, results = jax.jit(solver.response), []
    for i in range(count):
        run = Run(pick(loop, i), done, tallies[i], done, (), 0, {})
        ended = status or (TuneStatus.FINISHED if tallies[i].accepted else TuneStatus.FAILED)
        results.append(conclude(run, notes[i], respond, domain, (pick(hparams, i), params), ended))
    values = [result.best.value for result in results]
    best = None if np.all(np.isnan(values)) else results[int(np.nanargmin(values))]
    return Multistart(tuple(results), best)


def _of_one(packet: Packet, i: int, most: int) -> Packet:
    """Return the report of one start."""
    at = (slice(None), i) if most > 1 else i
    return jax.tree.map(lambda x: x[at], packet)


def _starts(hparams: PyTree) -> int:
    """Return the length of the leading axis."""
    lengths = {
        _tree.keystr(path): leaf.shape[0] if leaf.ndim else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(hparams)
    }
    found = set(lengths.values())
    if None in found or len(found) != 1 or 0 in found:
        raise InputError(
            "multistart: every leaf of hparams must have a leading axis, one entry for each start, found lengths "
            f"{lengths}: write jnp.stack([first, second, ...])."
        )
    (length,) = found
    assert length is not None
    return length

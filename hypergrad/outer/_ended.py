"""A run that has ended, and how it goes on in memory: what `hg.tune(resume=result)` does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad._solver import InputError
from hypergrad._tree import keystr
from hypergrad.outer._config import fingerprint
from hypergrad.outer._result import Layout, Rows
from hypergrad.outer._run import Notes, Run, recounted, rewind
from hypergrad.outer._step import Loop


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run that has ended, as its result holds it.

    Attributes:
        run: where it stands.
        rows: what its steps reported.
        layout: the layout of the rows.
    """

    run: Run
    rows: Rows
    layout: Layout


def revive(
    ended: Ended | None, start: Run, notes: Notes, streams: Mapping[str, Any], steps: int, most: Mapping[str, Any]
) -> Run:
    """Return the run that a result holds, ready to go on, and fill in the notes.

    Counts that ended the run begin anew; the others go on, so that the run is that of a single call.

    Args:
        ended: `run` of the result.
        start: the run of this call before its first step.
        notes: the host's notes, which are filled in.
        streams: the streams, which are advanced to the position of the run.
        steps: number of steps that the call asks for.
        most: the limits of the call by name: `max_failures`, `max_rejections`, `patience` and `min_delta`.

    Raises:
        InputError: where there is nothing to go on with, or where this call is of another form than the run.
    """
    if not isinstance(ended, Ended):
        raise InputError("tune: resume holds no run: pass the result that hg.tune returned.")
    run = ended.run
    if steps <= run.count:
        raise InputError(
            f"tune: resume holds {run.count} steps, and steps={steps} counts them as well: write "
            f"steps={run.count + steps} for {steps} more."
        )
    _check_same_form(run.loop, start.loop)
    notes.arrange(ended.layout)
    notes.rows = ended.rows  # full, so that the next step moves them to tables of their own
    notes.started = time.perf_counter() - float(ended.rows.scalars[run.count - 1, -1])
    tally = recounted(notes, run.count, most["min_delta"])
    over = {
        "in_a_row": tally.in_a_row >= most["max_failures"],
        "rejected": tally.rejected >= most["max_rejections"],
        "waited": most["patience"] is not None and tally.waited >= most["patience"],
    }
    rewind(streams, {name: (c.position, c.digest or fingerprint(c.last)) for name, c in run.cursors.items()})
    return run._replace(tally=tally._replace(**{name: 0 for name, ended_it in over.items() if ended_it}))


# The parts of a loop, and the arguments of `tune` on which their form depends.
_PARTS = {"solver": "solver", "accepted": "outer", "trial": "hparams", "outer": "outer", "best": "params"}


def _check_same_form(found: Loop, expected: Loop) -> None:
    if (found.best.state is None) != (expected.best.state is None):
        raise InputError("tune: the run in resume and this call must both have test= or both be without it.")
    for part, argument in _PARTS.items():
        here, there = (jax.tree_util.tree_leaves_with_path(getattr(loop, part)) for loop in (found, expected))
        forms = [{keystr(path): (jnp.shape(x), jnp.result_type(x)) for path, x in side} for side in (here, there)]
        differ = [path for path in {**forms[0], **forms[1]} if forms[0].get(path) != forms[1].get(path)]
        if differ:
            at = differ[0]
            shown = [f"{form[at][1]}{list(form[at][0])}" if at in form else "none" for form in forms]
            raise InputError(
                f"tune: the run in resume has another {argument} than this call: its {part}{at} is {shown[0]}, "
                f"here {shown[1]}. Pass what that run began with; data, losses and step sizes may differ."
            )

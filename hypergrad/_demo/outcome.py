"""What a task returns to the terminal: a table, sentences, numbers, and a function that draws a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import hypergrad as hg


class Outcome(NamedTuple):
    """A finished task.

    Attributes:
        table: rows of cells, the header first.
        notes: sentences below the table.
        numbers: what `--json` prints; holds `plain`, `tuned`, `oracle` and `f1`, None where a task has no such number.
        draw: `draw(path)` saves the figure.
    """

    table: Sequence[Sequence[str]]
    notes: Sequence[str]
    numbers: dict[str, Any]
    draw: Callable[[str], None]


class Search(NamedTuple):
    """One way to choose the strengths.

    Attributes:
        label: name shown to people.
        losses: validation loss of each candidate, in the order in which they were tried, `[steps]`.
        log_l2: logarithm of the strengths chosen, `[30]`.
        test_loss: test loss at the optimum of the training loss for the strengths chosen.
        test_accuracy: test accuracy of the same model.
    """

    label: str
    losses: np.ndarray
    log_l2: np.ndarray
    test_loss: float
    test_accuracy: float


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  "
        + "   ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "  " + "─" * (len(lines[0]) - 2), *lines[1:]])


def verdict(result: hg.Result) -> str:
    """One sentence on how the run ended and whether its hypergradients can be trusted."""
    history = result.history
    taken = int(np.sum(history.usable))
    errors = history.error_estimate[history.usable]
    seconds = f"{history.seconds[-1]:.1f} s, {history.seconds[0]:.1f} s of them the first step with its compilation"
    if not taken:
        return f"No hypergradient was usable ({result.status}, {seconds}): {hg.Status(int(history.status[-1])).advice}"
    middle = float(np.median(errors))
    trust = (
        f"estimated relative error of a hypergradient {middle:.1e} (median)"
        if np.isfinite(middle)
        else "this method gives no estimate of its error"
    )
    return f"{taken} of {len(history.value)} hypergradients usable, {trust}; tuning {result.status} after {seconds}."

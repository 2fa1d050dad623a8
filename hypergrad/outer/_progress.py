"""What `hg.tune` shows while it runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from hypergrad.outer._result import status_name


class Callback(Protocol):
    """`fn(step, metrics)`, called after every step; a true return value stops the run.

    `step` counts from 0. `metrics` holds Python numbers under `value`, `grad_norm`, `status`, `inner_residual`,
    `linear_residual`, `error_estimate`, `inner_steps`, `linear_steps`, `seconds`, and under the names of the loss's
    metrics and of the solver's extras; and under `hparams` the (constrained) hyperparameters that they belong to, as
    arrays.
    """

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Any:
        """Look, keep, print, plot; return a true value to stop."""


@contextlib.contextmanager
def progress_bar(steps: int, done: int = 0, *, show: bool) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """A live line on the terminal or in the notebook: outer loss, hypergradient norm, status.

    Nothing is shown where tqdm is not installed, or where stderr is no terminal.

    Args:
        steps: of the run.
        done: steps that a resumed run has behind it.
        show: whether to show it.

    Yields:
        `update(metrics, skipped)`.
    """
    bar = _tqdm(steps, done) if show else None
    if bar is None:
        yield lambda metrics, skipped: None
        return

    def update(metrics: Mapping[str, Any], skipped: int) -> None:
        text = f"outer loss {metrics['value']:.5g}, hypergradient {metrics['grad_norm']:.3g}, "
        text += status_name(metrics["status"]) + (f", {skipped} skipped" if skipped else "")
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    try:
        yield update
    finally:
        bar.close()


def _tqdm(steps: int, done: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without ipywidgets it says so, and falls back to text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=done, desc="tune", disable=None, dynamic_ncols=True)

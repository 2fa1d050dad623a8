"""Pictures of a run: how the outer loss, the hyperparameters and the hypergradient developed.

Each function draws on `ax`, or on a new figure, and returns the Axes; none of them shows or saves a figure, or changes
a global setting. They take the result of `hg.tune`, or its `history`. The colours are those of Okabe & Ito (2008),
which people with any kind of colour vision can tell apart; failed steps are crosses, the best step is a star.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hypergrad import _checks, _tree
from hypergrad._options import Number, options
from hypergrad._solver import HypergradError, InputError
from hypergrad.diagnostics.attribution import Attribution
from hypergrad.diagnostics.landscape import Landscape
from hypergrad.scaling import CoordinateCheck

_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#8C6D00")
_DASHES = ("-", "--", "-.", ":")
_FAILED = "#D55E00"
_BEST = "#E69F00"
_LINES = 8  # entries up to which each entry of a leaf has a line of its own
_DECADES = 1.3  # width, in decades, of a range of positive numbers above which an axis is logarithmic


def losses(result: Any, *, names: Sequence[str] = ("value",), against: str = "step", ax: Any = None) -> Any:
    """Outer loss, or metrics, against step or wall time.

    Args:
        result: what `hg.tune` returns, or its history.
        names: curves to draw: `"value"` for the outer loss, and names of metrics and of the solver's extras.
        against: `"step"`, or `"seconds"` since the end of the first step, which includes the compilation.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: for a name that is not in the history.
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h)**2), lambda w, h, batch: jnp.sum((w - 1)**2))
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.4), steps=1))
    >>> result = hg.tune(solver, jnp.zeros(1), 0.3, outer=optax.sgd(0.1), steps=3, progress=False)
    >>> hg.diagnostics.plots.losses(result).get_xlabel()
    'outer step'
    """
    _checks.check_choice("losses", "against", against, ("step", "seconds"))
    history = _history(result)
    columns = [_column(history, name) for name in names]
    ax = _axes(ax)
    x = _steps(history) if against == "step" else history.seconds - history.seconds[:1]
    for i, (name, values) in enumerate(zip(names, columns, strict=True)):
        ax.plot(x, values, label="outer loss" if name == "value" else name, **_line(i))
    _mark_failed(ax, x, columns[0], history)
    best = getattr(result, "best", None)
    if best is not None and best.step >= 0 and names[0] == "value":
        _star(ax, float(x[best.step]), best.value, f"best: {best.value:.4g} at step {best.step}")
    if _is_wide(columns):
        ax.set_yscale("log")
    label = "outer step"
    if against == "seconds":
        label = f"seconds after the first step, which took {history.seconds[0]:.3g} s with compilation"
    return _finish(ax, label, "outer loss" if tuple(names) == ("value",) else "")


def hyperparameters(result: Any, *, names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Hyperparameters against step: one line per entry; for large leaves, the mean within the range.

    Args:
        result: what `hg.tune` returns, or its history.
        names: paths of the leaves to draw, such as `"['l2']"`, or keys, such as `"l2"`; None for all.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: for a name that is not a leaf of the hyperparameters.
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h)**2), lambda w, h, batch: jnp.sum((w - 1)**2))
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.4), steps=1))
    >>> result = hg.tune(solver, jnp.zeros(1), 0.3, outer=optax.sgd(0.1), steps=3, progress=False)
    >>> len(hg.diagnostics.plots.hyperparameters(result).get_lines())
    1
    """
    history = _history(result)
    leaves = _leaves(history)
    chosen = list(leaves) if names is None else [_leaf_name(name, leaves) for name in names]
    ax = _axes(ax)
    x, drawn, seen = _steps(history), 0, []
    for path in chosen:
        rows, (low, mean, high) = leaves[path]
        label = _short(path) or "hyperparameter"
        if rows is not None and rows.shape[1] <= _LINES:
            for j in range(rows.shape[1]):
                ax.plot(x, rows[:, j], label=label if rows.shape[1] == 1 else f"{label}[{j}]", **_line(drawn))
                drawn += 1
            seen.append(rows)
            continue
        style = _line(drawn)
        count = "" if rows is None else f" of {rows.shape[1]}"
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0, label=f"{label}: range{count}")
        ax.plot(x, mean, label=f"{label}: mean", **style)
        drawn += 1
        seen += [low, high]
    if _is_wide(seen):
        ax.set_yscale("log")
    return _finish(ax, "outer step", _short(chosen[0]) or "hyperparameter" if len(chosen) == 1 else "hyperparameters")


def hypergradient(result: Any, *, ax: Any = None) -> Any:
    """Norm of the hypergradient against step, with a band as wide as the solver's own estimate of its error.

    Where the estimate is infinite nothing is known, and there is no band.

    Args:
        result: what `hg.tune` returns, or its history.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h)**2), lambda w, h, batch: jnp.sum((w - 1)**2))
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.4), steps=1))
    >>> result = hg.tune(solver, jnp.zeros(1), 0.3, outer=optax.sgd(0.1), steps=3, progress=False)
    >>> hg.diagnostics.plots.hypergradient(result).get_ylabel()
    'norm of the hypergradient'
    """
    history, ax = _history(result), _axes(ax)
    x, norm = _steps(history), np.where(history.grad_norm > 0, history.grad_norm, np.nan)
    ax.plot(x, norm, label="norm", **_line(0))
    error = np.where(np.isfinite(history.error_estimate), history.error_estimate, np.nan)
    wide = _is_wide([norm])
    # An error of 100 % reaches down to zero, which cannot be drawn on a logarithmic axis.
    low = np.maximum(norm * (1 - error), 0.1 * np.min(norm, initial=np.inf, where=np.isfinite(norm)) if wide else 0)
    if np.isfinite(error).any():
        label = f"± estimated error (median {np.nanmedian(error):.1g})"
        ax.fill_between(x, low, norm * (1 + error), color=_COLOURS[0], alpha=0.2, lw=0, label=label)
    _mark_failed(ax, x, norm, history)
    if wide:
        ax.set_yscale("log")
    return _finish(ax, "outer step", "norm of the hypergradient")


def landscape(grid: Landscape, result: Any = None, *, ax: Any = None) -> Any:
    """The outer loss over one or two hyperparameters, with the path that a run took across it.

    Args:
        grid: what `hg.diagnostics.landscape` returns.
        result: what `hg.tune` returns, or its history; None for the landscape alone. The path shows the run's own outer
            losses, which with minibatches or a warm start differ from those of the grid.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: if the run has too many hyperparameters for its path to have been kept.
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, jax.numpy as jnp, optax
    >>> problem = hg.Problem(lambda w, h, batch: jnp.sum((w - h)**2), lambda w, h, batch: jnp.sum((w - 1)**2))
    >>> solver = hg.unrolled(problem, inner=hg.inner.gradient(optax.sgd(0.4), steps=1))
    >>> grid = hg.diagnostics.landscape(solver, jnp.zeros(1), 0.3, {"hparams": [0.5, 1.0, 1.5]})
    >>> hg.diagnostics.plots.landscape(grid).get_ylabel()
    'outer loss'
    """
    history = None if result is None else _history(result)
    path = None if history is None else _path(history, grid)
    ax = _axes(ax)
    best = getattr(result, "best", None)
    star = best.step if best is not None and best.step >= 0 else None
    names = [_short(name) for name in grid.names]
    if len(grid.axes) == 1:
        ax.plot(grid.axes[0], grid.values, label="solved at each point", **_line(0))
        if path is not None and history is not None:
            alone = sum(leaf[:1].size for leaf in jax.tree.leaves(history.hparams)) == 1
            ax.plot(
                path[:, 0],
                history.value,
                "o",
                ms=4,
                color=_COLOURS[1],
                mec="white",
                mew=0.4,
                label="path of the run" + ("" if alone else ", in which all move"),
            )
            _start(ax, path[0, 0], history.value[0])
        if path is not None and history is not None and star is not None:
            _star(ax, path[star, 0], history.value[star], "best")
        _scale(ax.set_xscale, grid.axes[0])
        if _is_wide([grid.values]):
            ax.set_yscale("log")
        return _finish(ax, names[0], "outer loss")
    _contours(ax, grid)
    if path is not None:
        ax.plot(path[:, 0], path[:, 1], "-", color="white", lw=3.2, solid_capstyle="round")
        ax.plot(path[:, 0], path[:, 1], "-o", color="black", lw=1.4, ms=2.5, label="path of the run")
        _start(ax, path[0, 0], path[0, 1])
        if star is not None:
            _star(ax, path[star, 0], path[star, 1], "best")
    _scale(ax.set_xscale, grid.axes[0])
    _scale(ax.set_yscale, grid.axes[1])
    _finish(ax, names[0], names[1])
    ax.grid(visible=False)
    return ax


def _contours(ax: Any, grid: Landscape) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(grid.values.T)
    low, high = float(values.min()), float(values.max())
    wide = low > 0 and high / low > 10**_DECADES
    if wide:
        levels, norm = np.geomspace(low, high, 24), LogNorm(low, high)
    else:
        high = high if high > low else low + 1e-12 + abs(low) * 1e-6
        levels, norm = np.linspace(low, high, 24), Normalize(low, high)
    mesh = ax.contourf(*grid.axes, values, levels=levels, norm=norm, cmap="viridis_r")
    ax.contour(*grid.axes, values, levels=levels[::3], norm=norm, colors="white", linewidths=0.5, alpha=0.6)
    ax.set_facecolor("0.85")  # where the loss is not finite
    bar = ax.figure.colorbar(mesh, ax=ax, label="outer loss", ticks=None if wide else MaxNLocator(6))
    if wide:
        bar.set_ticks(np.geomspace(low, high, 6), labels=[f"{x:.3g}" for x in np.geomspace(low, high, 6)])
        bar.minorticks_off()


def _path(history: Any, grid: Landscape) -> np.ndarray:
    """The position of the run at each step, `[steps, 1 or 2]`."""
    if history.hparams is None:
        raise InputError(
            "landscape: the path of a run with more than 1000 hyperparameters is not kept: leave result out."
        )
    leaves = [np.asarray(leaf).reshape(len(history.value), -1) for leaf in jax.tree.leaves(history.hparams)]
    return np.concatenate(leaves, axis=1)[:, list(grid.index)]


def _leaves(history: Any) -> dict[str, tuple[np.ndarray | None, tuple[np.ndarray, ...]]]:
    """By path: the entries `[steps, n]`, or None where they were not kept, and minimum, mean and maximum `[steps]`."""

    def by_path(tree: _tree.PyTree) -> dict[str, np.ndarray]:
        return {_tree.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    summary = [by_path(history.summary[kind]) for kind in ("min", "mean", "max")]
    rows = {} if history.hparams is None else by_path(history.hparams)
    return {
        path: (rows[path].reshape(len(rows[path]), -1) if path in rows else None, tuple(s[path] for s in summary))
        for path in summary[0]
    }


def _leaf_name(name: str, leaves: dict[str, Any]) -> str:
    for path in (name, f"[{name!r}]", f".{name}"):
        if path in leaves:
            return path
    raise InputError(
        f"hyperparameters: names holds {name!r}, which is not a leaf of the hyperparameters: "
        f"they are {', '.join(leaves)}."
    )


@options(count=Number(least=1, integer=True, static=True, advice="write how many of each kind"))
def attribution(
    found: Attribution,
    query: int,
    pictures: Any = None,
    query_picture: Any = None,
    *,
    labels: Sequence[str] | None = None,
    count: int = 5,
    ax: Any = None,
) -> Any:
    """The examples, or groups, that mattered most for one query: bars, with their pictures beside them.

    Args:
        found: what `hg.attribute` returns.
        query: the row of the query.
        pictures: pictures of the examples, `[examples, height, width]` or with a last axis of colours; None to draw
            only bars.
        query_picture: picture of the query, drawn in the corner; None to draw none.
        labels: labels of the examples or groups; None for their names.
        count: number of examples or groups of each kind.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: for a query without scores, or pictures whose number differs from that of the columns.
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, numpy as np
    >>> scores = np.array([[0.2, -0.1, 0.05, 0.0]])
    >>> found = hg.diagnostics.Attribution(scores, np.array([0]), np.array([1e-6]), None, (0, 1, 2, 3))
    >>> ax = hg.diagnostics.plots.attribution(found, 0, np.zeros((4, 8, 8)), count=2)
    >>> len(ax.patches)
    4
    """
    if not isinstance(found, Attribution):
        raise InputError(f"plots: expected what hg.attribute returns, found {type(found).__name__}.")
    columns = found.scores.shape[1]
    for what, given in (("pictures", pictures), ("labels", labels)):
        if given is not None and len(given) != columns:
            raise InputError(f"attribution: {what} must be one for each of the {columns} columns, found {len(given)}.")
    top = found.top(query, min(count, max(1, columns // 2)))
    ax = _axes(ax)
    shown = np.concatenate([top.helpful, top.harmful[::-1]])
    scores = np.concatenate([top.helpful_scores, top.harmful_scores[::-1]])
    rows = np.arange(len(shown))[::-1]
    ax.barh(rows, scores, height=0.7, color=[_COLOURS[0] if s > 0 else _FAILED for s in scores])
    ax.axvline(0, color="black", lw=0.8)
    names = found.names if labels is None else labels
    ax.set_yticks(rows, [str(names[i]) for i in shown])
    ax.set_title(f"query {query}: helpful above, harmful below", loc="left", fontsize="medium")
    if pictures is not None:
        ax.tick_params(axis="y", pad=34)
        for row, i in zip(rows, shown, strict=True):
            _picture(ax, pictures[i], (0, row), "y")
    if query_picture is not None:
        _picture(ax, query_picture, (0.9, 0.12 if scores[-1] >= 0 else 0.88), None, zoom=44)
    return _finish(ax, "predicted change of the query's loss when it is left out", "")


def coordinates(check: CoordinateCheck, *, ax: Any = None) -> Any:
    """How much training changed each activation, over widths: lines that should be flat, with their slopes.

    A solid line is the change after the last step, a faint one the change after the first.

    Args:
        check: what `hg.scaling.coordinate_check` returns.
        ax: matplotlib Axes, or None for a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: for any other argument.
        HypergradError: if matplotlib is not installed.

    >>> import hypergrad as hg, numpy as np
    >>> widths = np.array([64, 256])
    >>> check = hg.scaling.CoordinateCheck(widths, {"logits": np.ones(2)}, {"logits": np.sqrt(widths)[None]})
    >>> hg.diagnostics.plots.coordinates(check).get_lines()[-1].get_label()
    'logits: width^0.50'
    """
    if not isinstance(check, CoordinateCheck):
        raise InputError(f"plots: expected what hg.scaling.coordinate_check returns, found {type(check).__name__}.")
    ax = _axes(ax)
    for i, (name, slope) in enumerate(check.slopes.items()):
        style = _line(i)
        if len(check.change[name]) > 1:
            ax.plot(check.widths, check.change[name][0], **(style | {"lw": 0.8, "alpha": 0.45}))
        label = f"{name or 'output'}: width^{slope:.2f}"
        ax.plot(check.widths, check.change[name][-1], label=label, marker="o", ms=4, **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    steps = len(next(iter(check.change.values())))
    return _finish(ax, "width", f"change after {steps} step{'s' if steps > 1 else ''} (and 1)")


def _short(path: str) -> str:
    """`l2` for `['l2']`; longer paths stay as they are."""
    inside = path[2:-2]
    return inside if path == f"['{inside}']" and inside.isidentifier() else path


def _history(result: Any) -> Any:
    history = getattr(result, "history", result)
    if not hasattr(history, "grad_norm"):
        raise InputError(f"plots: expected the result of hg.tune, or its history, found {type(result).__name__}.")
    return history


def _column(history: Any, name: str) -> np.ndarray:
    columns = {"value": history.value, **history.metrics, **history.extra}
    if name not in columns:
        raise InputError(f"losses: names holds {name!r}, which is not in the history: it has {', '.join(columns)}.")
    return columns[name]


def _steps(history: Any) -> np.ndarray:
    return np.arange(len(history.value))


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise HypergradError(f"plots need matplotlib: {_checks.install('plot')}.") from error
    return plt.subplots(figsize=(6, 3.8), layout="constrained")[1]


def _picture(ax: Any, image: Any, at: tuple[float, float], follows: str | None, zoom: float = 26) -> None:
    """An image of `zoom` points: left of the axis at a height in data units, or at a point in fractions of the axes."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    image = np.asarray(image)
    box = OffsetImage(image, zoom=zoom / max(image.shape[:2]), cmap="gray_r", interpolation="nearest")
    frame = {"frameon": follows is None, "pad": 0.1}
    if follows:
        where = {"xycoords": ax.get_yaxis_transform(), "xybox": (-18, 0), "boxcoords": "offset points"}
        ax.add_artist(AnnotationBbox(box, at, **where, **frame))
    else:
        ax.add_artist(AnnotationBbox(box, at, xycoords="axes fraction", **frame))


def _line(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)], "lw": 1.8}


def _start(ax: Any, x: float, y: float) -> None:
    ax.plot(x, y, "o", ms=9, mfc="white", mec="black", ls="none", label="start", zorder=5)


def _star(ax: Any, x: float, y: float, label: str) -> None:
    ax.plot(x, y, "*", ms=15, color=_BEST, mec="black", mew=0.8, ls="none", label=label, zorder=6)


def _mark_failed(ax: Any, x: np.ndarray, y: np.ndarray, history: Any) -> None:
    """Crosses at the steps whose hypergradient was not usable; on the lower edge where they have no value."""
    failed = ~np.asarray(history.usable)
    if not failed.any():
        return
    shown = failed & np.isfinite(y)
    style = {"marker": "x", "ms": 7, "mew": 2, "color": _FAILED, "ls": "none", "zorder": 5, "clip_on": False}
    count = f"not usable: {int(failed.sum())} of {len(failed)}"
    ax.plot(x[shown], y[shown], label=count, **style)
    ax.plot(x[failed & ~shown], np.zeros(int((failed & ~shown).sum())), transform=ax.get_xaxis_transform(), **style)


def _is_wide(columns: Sequence[np.ndarray]) -> bool:
    """Whether positive numbers spread over so many decades that a linear axis would hide most of them."""
    values = np.concatenate([np.ravel(c) for c in columns]) if columns else np.zeros(0)
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and np.log10(values.max() / values.min()) > _DECADES)


def _scale(set_scale: Any, values: np.ndarray) -> None:
    if _is_wide([values]):
        set_scale("log")


def _finish(ax: Any, x_label: str, y_label: str) -> Any:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="0.9", lw=0.8)
    ax.set_axisbelow(True)
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) > 1:
        ax.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize="small", ncols=1 + (len(labels) > 6))
    return ax

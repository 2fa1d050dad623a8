"""How the pictures of the experiments look: white, few lines, colours that every kind of colour vision tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito (2008), as in `hg.diagnostics.plots`.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#222222",
)
DASHED = (0, (4, 3))


def figure(width: float = 12.5, height: float = 5.0) -> Any:
    """A figure that belongs to no window and changes no global setting; its axes find room for their labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def titled(axes: Any, title: str, **labels: Any) -> None:
    """Title on the left, no box, a light grid, letters to be read at half the size; `labels` go to `axes.set`."""
    axes.set_title(title, loc="left", color=INK, pad=9, fontsize=12.5, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(**labels)
    axes.xaxis.label.set_size(11.5)
    axes.yaxis.label.set_size(11.5)
    axes.tick_params(labelsize=11)


def legend(canvas: Any, *places: Any, columns: int = 4) -> None:
    """One legend for `places`, below everything, where it covers nothing; each label once."""
    shown: dict[str, Any] = {}
    for place in places:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    canvas.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=columns, frameon=False, fontsize=11
    )


def over_seeds(axes: Any, rows: Mapping[str, tuple[Sequence[Any], str]], title: str, **labels: Any) -> None:
    """A line for each row: a pale dot for each seed, their mean and its standard error, and the mean in digits.

    Args:
        axes: where.
        rows: `(values by seed, colour)` by name; a value may be None, of a seed that has none.
        title: of the axes.
        labels: go to `axes.set`; `digits` (three) is the number of digits behind the point.
    """
    digits = labels.pop("digits", 3)
    for i, (values, color) in enumerate(rows.values()):
        found = np.array([v for v in values if v is not None], float)
        axes.plot(found, np.full(len(found), i), "o", color=color, alpha=0.3, markersize=5, markeredgewidth=0)
        mean, error = mean_and_error(found)
        axes.errorbar(mean, i, xerr=error, fmt="o", color=color, markersize=7, elinewidth=2, capsize=4)
        axes.annotate(f"{mean:.{digits}f}", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=11)
    titled(axes, title, **labels)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="#E8E8E8", linewidth=0.8)


def curves(axes: Any, x: Any, by_seed: Any, color: str, label: str, **options: Any) -> None:
    """A thin line for each seed [seeds, n], and their mean with a label; `options` go to the mean's `plot`."""
    lines = np.asarray(by_seed, float)
    for line in lines:
        axes.plot(x, line, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(x, lines.mean(0), **({"color": color, "linewidth": 2.2, "label": label} | options))


def mean_and_error(by_seed: Any) -> tuple[Any, Any]:
    """Mean over the first axis, of seeds, and its standard error; an error of zero for one seed."""
    values = np.asarray(by_seed, float)
    error = np.std(values, axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1:])
    return np.mean(values, axis=0), error


def each(results: Mapping[str, Any], path: str) -> list[Any]:
    """The number at a path such as `"arms.plain"` of every seed, None where a seed has none."""

    def at(numbers: Any, names: list[str]) -> Any:
        if not names:
            return numbers
        for i in range(1, len(names) + 1):  # a name may hold a point itself
            if isinstance(numbers, Mapping) and ".".join(names[:i]) in numbers:
                return at(numbers[".".join(names[:i])], names[i:])
        return None

    return [at(numbers, path.split(".")) for numbers in results.values()]


def panels(results: Mapping[str, Any], *parts: tuple[str, str, dict[str, tuple[str, str]]], digits: int = 3) -> Any:
    """A figure of `over_seeds` side by side.

    Args:
        results: numbers by seed.
        parts: `(title, label of the axis, {name of the row: (path in the numbers, colour)})`, one for each axes.
        digits: behind the point.
    """
    most = max(len(rows) for _, _, rows in parts)
    canvas = figure((8.5, 12.5, 15.5)[len(parts) - 1], 1.6 + 0.36 * most)
    for axes, (title, xlabel, rows) in zip(canvas.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        values = {name: (each(results, path), color) for name, (path, color) in rows.items()}
        over_seeds(axes, values, title, xlabel=xlabel, digits=digits)
        left, right = axes.get_xlim()
        if left < 0 < right and any(min(v) < 0 for v, _ in values.values()):  # differences of either sign
            axes.axvline(0, color=INK, linewidth=1, linestyle=DASHED)
    return canvas


def bars(axes: Any, rows: Mapping[str, tuple[Any, str]], title: str, *, digits: int = 3, **labels: Any) -> None:
    """One bar below the other with its number behind it, by name: `(value, colour)`; `labels` go to `axes.set`."""
    values, colors = zip(*rows.values(), strict=True)
    axes.barh(list(rows), [float(value) for value in values], color=colors, height=0.6)
    axes.bar_label(axes.containers[0], fmt=f"%.{digits}f", padding=3, fontsize=11)
    axes.invert_yaxis()
    titled(axes, title, **labels)


def image(axes: Any, pixels: Any, title: str = "", color: str = INK, **options: Any) -> None:
    """A small picture without ticks; `options` go to `axes.imshow`."""
    axes.imshow(pixels, **({"cmap": "gray_r", "interpolation": "nearest"} | options))
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, pad=3, color=color)
    for spine in axes.spines.values():
        spine.set(color="#BBBBBB", linewidth=0.8)


def save(picture: Any, folder: Path, name: str = "figure.png", *, colours: int | None = None) -> None:
    """Write it as a small PNG; of so many colours at most, where it would be large otherwise."""
    picture.savefig(folder / name, dpi=110)
    if colours:
        from PIL import Image

        with Image.open(folder / name) as drawn:
            few = drawn.convert("RGB").quantize(colours)
        few.save(folder / name, optimize=True)

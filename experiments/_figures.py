"""How the pictures of the experiments look: white, few lines, colours that every kind of colour vision tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Title on the left, no box, a light grid; `labels` go to `axes.set`."""
    axes.set_title(title, loc="left", color=INK, pad=9, fontsize=11.5, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(**labels)


def bars(axes: Any, rows: Mapping[str, tuple[Any, str]], title: str, *, digits: int = 3, **labels: Any) -> None:
    """One bar below the other with its number behind it, by name: `(value, colour)`; `labels` go to `axes.set`."""
    values, colors = zip(*rows.values(), strict=True)
    axes.barh(list(rows), [float(value) for value in values], color=colors, height=0.6)
    axes.bar_label(axes.containers[0], fmt=f"%.{digits}f", padding=3, fontsize=9)
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

"""The figures of the demo. Each opens, draws, saves and closes its own figure."""

from __future__ import annotations

from typing import Any

import numpy as np

import hypergrad as hg
from hypergrad._demo.data import Digits, Tumours
from hypergrad._demo.outcome import Search

# Colours of Okabe & Ito (2008), as in `hg.diagnostics.plots`, which every kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222"
DASHED = (0, (4, 3))
ROWS, COLUMNS = 6, 8  # of the grid of images with the lowest weights


def draw_images(shown: dict[str, np.ndarray], rows: list[tuple[str, float]], path: str) -> None:
    """Ten images of each kind, above the accuracy of a fresh training on them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.3), facecolor="white")
    figure.text(0.012, 0.915, "Ten images in place of 1,300", color=INK, fontsize=14, fontweight="bold")
    left = {"left": 0.012, "right": 0.575, "top": 0.80, "bottom": 0.02, "wspace": 0.07, "hspace": 0.38}
    grid = figure.add_gridspec(len(shown), 10, **left)
    for i, (name, images) in enumerate(shown.items()):
        learned = name.startswith("learned")
        color = BLUE if learned else INK
        for j, pixels in enumerate(images):
            axes = figure.add_subplot(grid[i, j])
            size = float(np.abs(pixels).max())
            axes.imshow(pixels.reshape(8, 8), cmap="RdBu_r", vmin=-size, vmax=size, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=BLUE if learned else "#BBBBBB", linewidth=1.8 if learned else 0.8)
            if j == 0:
                weight = "bold" if learned else "normal"
                axes.set_title(name, loc="left", fontsize=10.5, pad=5, color=color, fontweight=weight)
    axes = figure.add_axes((0.80, 0.14, 0.185, 0.69))
    labels = [text[0] + text[1:].lower() if text.isupper() else text for text, _ in rows]
    colors = [BLUE if text.isupper() else GREEN if text.startswith("all") else "#AAAAAA" for text, _ in rows]
    bars = axes.barh(labels, [value for _, value in rows], color=colors, height=0.64)
    axes.bar_label(bars, fmt="%.3f", padding=4, fontsize=9.5)
    axes.invert_yaxis()
    axes.set(xlim=(0.5, 1.08), xticks=[0.5, 0.75, 1.0], xlabel="accuracy on 497 unseen digits")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    figure.text(0.605, 0.915, "A fresh training on these images alone", color=INK, **TITLE)
    figure.savefig(path, dpi=150)


def draw_cleaning(data: Digits, weights: np.ndarray, result: hg.Result, threshold: float, path: str) -> None:
    """Learned weights of right and wrong labels, the loss that taught them, and the images with the lowest weights."""
    figure, grid = _figure((1, 1.3))
    left = grid[0].subgridspec(2, 1, height_ratios=(1.3, 1), hspace=0.5)

    axes = figure.add_subplot(left[0])
    tops = []
    for values, color in ((weights[~data.wrong], BLUE), (weights[data.wrong], ORANGE)):
        count, _, _ = axes.hist(values, np.linspace(0, 1, 21), color=color, alpha=0.7, edgecolor="white", linewidth=0.8)
        tops.append(float(np.max(count)))
    axes.axvline(threshold, color=INK, linewidth=0.9, linestyle=DASHED)
    axes.set(xlabel="learned weight", ylabel="training examples", xlim=(-0.01, 1.01))
    axes.set_ylim(top=1.08 * max(tops))
    axes.text(
        0.075,
        0.93,
        f"{int(np.sum(data.wrong))} wrong labels",
        color=ORANGE,
        fontweight="bold",
        va="top",
        transform=axes.transAxes,
    )
    axes.text(
        0.99,
        tops[0] + 0.03 * max(tops),
        f"{int(np.sum(~data.wrong))} right labels",
        color=BLUE,
        fontweight="bold",
        ha="right",
        va="bottom",
    )
    _title(axes, "Wrong labels lose their weight …")
    _plain(axes)

    axes = figure.add_subplot(left[1])
    hg.diagnostics.plots.losses(result, ax=axes)
    axes.set(xlabel="outer step", ylabel="validation loss")
    _title(axes, "… because that lowers the validation loss")
    _plain(axes)

    worst = np.argsort(weights, kind="stable")[: ROWS * COLUMNS]
    caught = int(np.sum(data.wrong[worst]))
    edges = grid[1].get_position(figure)
    figure.text(
        edges.x0,
        0.936,
        f"The {len(worst)} lowest weights: {caught} of the “given” labels are wrong",
        color=INK,
        **TITLE,
    )
    images = figure.add_gridspec(
        ROWS, COLUMNS, wspace=0.1, hspace=0.34, left=edges.x0, right=edges.x1, top=0.885, bottom=0.05
    )
    for slot, i in zip(images, worst, strict=False):
        axes = figure.add_subplot(slot)
        axes.imshow(data.images[i], cmap="gray_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        given, true = int(data.train[1][i]), int(data.true[i])
        color = ORANGE if given != true else BLUE
        axes.set_title(f"“{given}” is {true}" if given != true else f"“{given}” right", fontsize=9, pad=3, color=color)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1.2)
    figure.savefig(path, dpi=150)


def draw_l2(data: Tumours, searches: list[Search], path: str) -> None:
    """Best validation loss against inner solves, and the strength of each feature."""
    figure, grid = _figure((1.15, 1))
    axes = figure.add_subplot(grid[0])
    for search, color in zip(searches, (BLUE, ORANGE, PINK, GREEN), strict=True):
        best = np.fmin.accumulate(search.losses)
        axes.step(
            np.arange(1, len(best) + 1),
            best,
            where="post",
            color=color,
            label=f"{search.label} ({search.test_loss:.3f})",
            linewidth=2.6 if color == BLUE else 1.6,
            linestyle=DASHED if color == GREEN else "-",
        )
    axes.set(xlabel="inner solves", ylabel="lowest validation loss so far")
    axes.legend(frameon=False, fontsize=9, title="search (test loss of its choice)", title_fontsize=9, alignment="left")
    _title(axes, "30 strengths for the price of one")
    _plain(axes)

    axes = figure.add_subplot(grid[1].subgridspec(1, 2, width_ratios=(0.42, 1), wspace=0)[1])
    tuned, single = searches[0], float(np.exp(searches[-1].log_l2[0]))
    order = np.argsort(-tuned.log_l2)
    strengths, rows = np.exp(tuned.log_l2[order]), np.arange(len(order))
    axes.axvline(single, color=GREEN, linewidth=1.2, linestyle=DASHED)
    axes.hlines(rows, single, strengths, color=BLUE, linewidth=1.4, alpha=0.45)
    axes.plot(strengths, rows, "o", color=BLUE, markersize=5)
    axes.set(xscale="log", xlabel="regularization strength", ylim=(-0.7, len(order) - 0.3))
    axes.set_yticks(rows, [data.names[i] for i in order], fontsize=8.5)
    axes.text(
        1.15 * single,
        rows[-1],
        "best single strength",
        color=GREEN,
        fontsize=9,
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    _title(axes, "What each feature was given")
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)


TITLE: dict[str, Any] = {"fontsize": 11.5, "fontweight": "bold"}


def _figure(widths: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with two columns that belongs to no window and changes no global setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 6.4), facecolor="white")
    return figure, figure.add_gridspec(
        1, 2, width_ratios=widths, left=0.06, right=0.985, top=0.915, bottom=0.09, wspace=0.14
    )


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, pad=9, **TITLE)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)

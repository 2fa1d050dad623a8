"""Plots draw what the history holds, on the axes they are given, and touch nothing else."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import hypergrad as hg
from hypergrad.diagnostics import Landscape, landscape, plots
from tests.diagnostics import _ridge as ridge

TRAIN, VALID = ridge.data(), ridge.data(seed=1)
H = ridge.hparams()
W = jnp.zeros(4)
STEPS = 12


@pytest.fixture(scope="module")
def result() -> Any:
    return hg.tune(ridge.solver(), W, H, TRAIN, VALID, outer=optax.sgd(0.1), steps=STEPS, progress=False)


@pytest.fixture(autouse=True)
def _untouched():
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def changed(result, **fields):
    return result._replace(history=result.history._replace(**fields))


def labels(ax):
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def drawn(fig):
    """Draw for real: what cannot be drawn raises or warns here."""
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())


def test_every_plot_draws_on_the_axes_given_and_opens_no_figure(result):
    plt.close("all")
    grid = Landscape(("shift",), (4,), (np.linspace(0, 1, 5),), np.linspace(0, 1, 5))
    over_grid = lambda result, ax: plots.landscape(grid, result, ax=ax)
    for draw in (plots.losses, plots.hyperparameters, plots.hypergradient, over_grid):
        fig = Figure()
        FigureCanvasAgg(fig)
        ax = fig.subplots()
        assert draw(result, ax=ax) is ax
        assert not plt.get_fignums()
        assert drawn(fig).std() > 0
    assert plots.losses(result).figure.number in plt.get_fignums()


def test_losses_are_those_of_the_history_and_the_star_is_the_best(result):
    ax = plots.losses(result)
    line, star = ax.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.stack([np.arange(STEPS), result.history.value], axis=1))
    assert star.get_xydata().tolist() == [[result.best.step, result.best.value]]
    assert labels(ax)[0] == "outer loss" and labels(ax)[1].startswith("best: ")
    assert ax.get_ylabel() == "outer loss"
    assert len(plots.losses(result.history).get_lines()) == 1  # a history alone knows of no best


def test_wall_time_starts_after_the_compilation_and_says_how_long_that_took(result):
    ax = plots.losses(changed(result, seconds=7.25 + 0.5 * np.arange(STEPS)), against="seconds")
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), 0.5 * np.arange(STEPS))
    assert "7.25 s" in ax.get_xlabel()


def test_failed_steps_are_crosses_also_where_they_have_no_value(result):
    status, value = np.zeros(STEPS, int), result.history.value.copy()
    status[[3, 8]], value[8] = [6, 3], np.nan
    for draw in (plots.losses, plots.hypergradient):
        ax = draw(changed(result, status=status, value=value, grad_norm=value))
        crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
        assert [line.get_xdata().tolist() for line in crosses] == [[3], [8]]
        assert "not usable: 2 of 12" in labels(ax)
        drawn(ax.figure)


def test_losses_over_decades_and_metrics(result):
    values = 10.0 ** -np.arange(STEPS)
    ax = plots.losses(changed(result, value=values, metrics={"accuracy": values / 2}), names=("value", "accuracy"))
    assert ax.get_yscale() == "log" and labels(ax)[:2] == ["outer loss", "accuracy"]
    np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), values / 2)
    assert plots.losses(changed(result, value=values - 0.5)).get_yscale() == "linear"
    assert plots.losses(changed(result, metrics={"accuracy": values}), names=["accuracy"]).get_ylabel() == ""


def test_each_hyperparameter_has_its_line(result):
    ax = plots.hyperparameters(result)
    assert labels(ax) == ["l2[0]", "l2[1]", "l2[2]", "l2[3]", "shift"]
    np.testing.assert_array_equal(ax.get_lines()[2].get_ydata(), result.history.hparams["l2"][:, 2])
    ax = plots.hyperparameters(result, names=["shift"])
    assert ax.get_ylabel() == "shift" and len(ax.get_lines()) == 1
    assert len(plots.hyperparameters(result, names=["['l2']"]).get_lines()) == 4
    styles = {(line.get_color(), line.get_linestyle()) for line in plots.hyperparameters(result).get_lines()}
    assert len(styles) == 5


@pytest.mark.parametrize("kept", [True, False])
def test_large_leaves_are_a_range_around_their_mean(result, kept):
    rows = np.linspace(-1, 1, 30)[None] * np.arange(STEPS)[:, None] + 0.5
    summary = {kind: {"many": getattr(np, kind)(rows, axis=1)} for kind in ("min", "mean", "max")}
    ax = plots.hyperparameters(changed(result, hparams={"many": rows} if kept else None, summary=summary))
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), 0.5)
    assert labels(ax) == ["many: range of 30" if kept else "many: range", "many: mean"]
    low, high = ax.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (rows.min(), rows.max())


def test_the_band_is_the_estimated_error_and_absent_where_it_is_unknown(result):
    error = np.full(STEPS, 0.5)
    error[4] = np.inf
    norm = np.linspace(1, 2, STEPS)
    ax = plots.hypergradient(changed(result, error_estimate=error, grad_norm=norm))
    paths = ax.collections[0].get_paths()
    assert len(paths) == 2  # cut where nothing is known
    np.testing.assert_allclose([p.get_extents().y0 for p in paths], [0.5, 0.5 * norm[5]])
    assert paths[1].get_extents().y1 == pytest.approx(3)
    assert labels(ax)[1] == "± estimated error (median 0.5)"
    ax = plots.hypergradient(changed(result, error_estimate=np.full(STEPS, np.inf)))
    assert not ax.collections


def test_the_path_over_a_landscape_is_that_of_the_run(result):
    one = landscape(ridge.solver(), W, H, {"shift": np.linspace(-1, 1, 4)}, TRAIN, VALID)
    ax = plots.landscape(one, result)
    line, path, start, best = ax.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), one.values)
    np.testing.assert_array_equal(path.get_xdata(), result.history.hparams["shift"])
    np.testing.assert_array_equal(path.get_ydata(), result.history.value)
    assert start.get_xdata()[0] == path.get_xdata()[0] and best.get_xdata()[0] == path.get_xdata()[result.best.step]
    assert "path of the run, in which all move" in labels(ax)
    two = Landscape(
        ("l2[1]", "shift"),
        (1, 4),
        (np.geomspace(0.01, 1, 4), np.linspace(-1, 1, 5)),
        10.0 ** np.arange(20).reshape(4, 5),
    )
    ax = plots.landscape(two, result)
    path = next(line for line in ax.get_lines() if line.get_label() == "path of the run")
    np.testing.assert_array_equal(path.get_xdata(), result.history.hparams["l2"][:, 1])
    np.testing.assert_array_equal(path.get_ydata(), result.history.hparams["shift"])
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"
    drawn(ax.figure)
    drawn(plots.landscape(two._replace(values=np.ones((4, 5)))).figure)  # a flat one


def test_mistakes_are_named(result):
    with pytest.raises(hg.InputError, match=r"losses: names holds 'acuracy', .* not in the history: it has value"):
        plots.losses(result, names=["acuracy"])
    with pytest.raises(hg.InputError, match=r"losses: against must be one of 'step', 'seconds', found 'second'"):
        plots.losses(result, against="second")
    with pytest.raises(hg.InputError, match=r"hyperparameters: names holds 'l1'.*they are \['l2'\], \['shift'\]"):
        plots.hyperparameters(result, names=["l1"])
    with pytest.raises(hg.InputError, match=r"plots: expected the result of hg.tune, or its history, found list"):
        plots.hypergradient([1, 2])
    grid = Landscape(("shift",), (4,), (np.linspace(0, 1, 5),), np.linspace(0, 1, 5))
    with pytest.raises(hg.InputError, match=r"landscape: the path .* leave result out"):
        plots.landscape(grid, changed(result, hparams=None))


def test_without_matplotlib_the_error_names_the_extra(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(hg.HypergradError, match=r"pip install -e '\.\[plot\]'"):
        plots.losses(result)


def test_attribution_shows_what_helped_and_what_harmed_with_their_pictures():
    scores = np.asarray([[0.2, -0.1, 0.05, -0.4, 0.0, 0.1]])
    found = hg.diagnostics.Attribution(scores, np.zeros(1, int), np.zeros(1), None, tuple(range(6)))
    ax = plots.attribution(found, 0, np.zeros((6, 8, 8)), np.zeros((8, 8)), count=2)
    assert [bar.get_width() for bar in ax.patches] == [0.2, 0.1, -0.1, -0.4]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "5", "1", "3"]
    assert len(ax.artists) == 5  # four examples and the query
    ax.figure.canvas.draw()
    assert len(plots.attribution(found, 0, labels=list("abcdef"), count=99).patches) == 6
    with pytest.raises(hg.InputError, match="pictures must be one for each of the 6 columns, found 5"):
        plots.attribution(found, 0, np.zeros((5, 8, 8)))
    with pytest.raises(hg.InputError, match=r"expected what hg\.attribute returns, found dict"):
        plots.attribution({}, 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(hg.InputError, match="query must be a row of the 1 queries"):
        plots.attribution(found, 1)

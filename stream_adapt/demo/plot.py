"""The picture: what adapting is worth over time, and from a user's first event on; with a drift, what refreshing is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stream_adapt.demo.drifted import Mark
from stream_adapt.demo.tally import ADAPTED, FROZEN, UNREFRESHED, Curves

_COLOURS = {ADAPTED: "#0072b2", FROZEN: "#8c8c8c", UNREFRESHED: "#d55e00"}
_MARKS = {"drift": ("#000000", "-"), "alarm": ("#cc79a7", "--"), "promotion": ("#009e73", "-.")}


def save(curves: Curves, path: Path, title: str) -> None:
    """Writes the curves as PNG; makes the folder where it is missing."""
    figure = _figure(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.1))
    _over_time(figure.add_subplot(grid[0, 0]), curves, curves.auc, "AUC")
    _over_time(figure.add_subplot(grid[0, 1]), curves, curves.log_loss, "log-loss")
    _cold_start(figure.add_subplot(grid[1, :]), curves)
    _write(figure, path)


def save_drift(curves: Curves, path: Path, title: str, marks: Sequence[Mark]) -> None:
    """Writes the curves over time, with a line wherever something happened."""
    figure = _figure(title)
    for place, (values, what) in enumerate(((curves.auc, "AUC"), (curves.log_loss, "log-loss")), 1):
        axes = figure.add_subplot(2, 1, place)
        _over_time(axes, curves, values, what)
        for mark in marks:
            colour, style = _MARKS[mark.what]
            axes.axvline(mark.events, color=colour, linestyle=style, linewidth=1)
            axes.annotate(
                f"{mark.what} {mark.events:,}",
                (mark.events, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize="x-small",
                color=colour,
            )
        axes.set_xlim(0, None)
    _write(figure, path)


def _figure(title: str) -> Figure:
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _over_time(axes: Axes, curves: Curves, values: Mapping[str, np.ndarray], what: str) -> None:
    for name, column in values.items():
        axes.plot(curves.events, column, color=_COLOURS[name], label=name, zorder=3 if name == ADAPTED else 2)
    below = values.get(UNREFRESHED, values[FROZEN])
    axes.fill_between(curves.events, values[ADAPTED], below, color=_COLOURS[ADAPTED], alpha=0.1)
    axes.set_title(f"{what} of the last {curves.window:,} events", fontsize="medium")
    axes.set_xlabel("events of the stream")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _tidy(axes)


def _cold_start(axes: Axes, curves: Curves) -> None:
    first = next(iter(curves.cold_start.values()))
    places = np.arange(len(first))
    for name, buckets in curves.cold_start.items():
        axes.plot(places, [bucket.value for bucket in buckets], "o-", color=_COLOURS[name], label=name)
    axes.set_xticks(places, [f"{bucket.name}\n{bucket.events:,} events" for bucket in first])
    axes.set_title("Cold start: log-loss by a user's n-th event of the stream", fontsize="medium")
    axes.set_ylabel("log-loss")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

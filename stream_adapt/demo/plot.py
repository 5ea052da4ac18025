"""The picture: what adapting is worth over time, and from a user's first event on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stream_adapt.demo.tally import Curves

_ADAPTED, _FROZEN = "#0072b2", "#8c8c8c"
_NAMES = (("adapted", _ADAPTED), ("frozen", _FROZEN))


def save(curves: Curves, path: Path, title: str) -> None:
    """Writes the curves as PNG; makes the folder where it is missing."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.1))
    _over_time(figure.add_subplot(grid[0, 0]), curves, curves.auc, "AUC")
    _over_time(figure.add_subplot(grid[0, 1]), curves, curves.log_loss, "log-loss")
    _cold_start(figure.add_subplot(grid[1, :]), curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _over_time(axes: Axes, curves: Curves, both: tuple[np.ndarray, np.ndarray], what: str) -> None:
    for values, (name, colour) in zip(both, _NAMES, strict=True):
        axes.plot(curves.events, values, color=colour, label=name)
    axes.fill_between(curves.events, *both, color=_ADAPTED, alpha=0.1)
    axes.set_title(f"{what} of the last {curves.window:,} events", fontsize="medium")
    axes.set_xlabel("events of the stream")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _tidy(axes)


def _cold_start(axes: Axes, curves: Curves) -> None:
    places = np.arange(len(curves.cold_start[0]))
    for buckets, (name, colour) in zip(curves.cold_start, _NAMES, strict=True):
        axes.plot(places, [bucket.value for bucket in buckets], "o-", color=colour, label=name)
    axes.set_xticks(places, [f"{bucket.name}\n{bucket.events:,} events" for bucket in curves.cold_start[0]])
    axes.set_title("Cold start: log-loss by a user's n-th event of the stream", fontsize="medium")
    axes.set_ylabel("log-loss")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

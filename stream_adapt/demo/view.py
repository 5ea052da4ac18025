"""The terminal: figures that move while events flow, and a table at the end. All of it goes to stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stream_adapt.demo.drifted import Story
from stream_adapt.demo.prepare import Followed
from stream_adapt.demo.tally import ADAPTED, FROZEN, UNREFRESHED, Figures, ReadScore, Tally

#: Seconds between two frames, and between two lines where there is no terminal.
_FRAME_S, _LINE_S = 0.15, 5.0
_WIDTH = 100
_BLOCKS = "▁▂▃▄▅▆▇█"
#: Points of a sparkline, over the whole stream.
_TREND = 48
_ITEM_WIDTH = 36
_BAR = 10

_STYLES = {ADAPTED: "cyan", FROZEN: "bright_black"}


@dataclass(frozen=True)
class Stage:
    """What does not change while events flow."""

    title: str
    where: str  # metrics, log, topics
    events: int
    followed: Followed


class View:
    """Shows a tally while it grows; as a context manager. Without a terminal it prints a line now and then."""

    def __init__(self, console: Console, stage: Stage, tally: Tally, story: Story | None = None) -> None:
        self._console = console
        self._stage = stage
        self._tally = tally
        self._story = story
        self._trends: tuple[list[float], list[float]] = ([], [])
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, produced: int, *, last: bool = False) -> None:
        """Draws a frame if the time has come, or if it is the last one."""
        now = time.monotonic()
        if not last and now - self._shown_at < (_FRAME_S if self._live else _LINE_S):
            return
        self._shown_at = now
        adapted, frozen = self._tally.recent()
        self._follow(adapted, frozen)
        if self._live:
            self._live.update(self._frame(produced, adapted, frozen), refresh=True)
        else:
            self._console.print(self._line(produced, adapted, frozen), highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """A line that stays, above the frame."""
        self._console.print(Text.assemble((f"{self._tally.outputs:>9,}  ", "bold yellow"), line), soft_wrap=True)

    def _follow(self, adapted: Figures, frozen: Figures) -> None:
        """Another point of the sparklines, when the next part of the stream is through."""
        if self._tally.outputs * _TREND >= len(self._trends[0]) * self._stage.events:
            self._trends[0].append(adapted.auc)
            self._trends[1].append(frozen.auc)

    def _line(self, produced: int, adapted: Figures, frozen: Figures) -> str:
        tally = self._tally
        return (
            f"{tally.outputs:>9,} of {self._stage.events:,} events  {tally.rate():>7,.0f}/s  lag "
            f"{produced - tally.outputs:,}  AUC {_number(adapted.auc)} adapted, {_number(frozen.auc)} frozen  "
            f"log-loss {_number(adapted.log_loss)}, {_number(frozen.log_loss)}"
        )

    def _frame(self, produced: int, adapted: Figures, frozen: Figures) -> RenderableType:
        parts = [self._progress(produced), self._figures(adapted, frozen), self._user()]
        if self._story is not None:
            parts.insert(
                1, Text.assemble(("refresh  ", "bold"), self._story.standing(), overflow="ellipsis", no_wrap=True)
            )
        return Panel(
            Group(*parts), title=self._stage.title, subtitle=self._stage.where, width=_WIDTH, border_style="blue"
        )

    def _progress(self, produced: int) -> RenderableType:
        tally = self._tally
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            ProgressBar(self._stage.events, tally.outputs, width=36),
            f"{tally.outputs:,} of {self._stage.events:,}",
            Text.assemble((f"{tally.rate():,.0f}", "bold"), " events/s"),
            Text.assemble("lag ", (f"{produced - tally.outputs:,}", "bold")),
            Text(f"dead letters {tally.dead_letters:,}", "red" if tally.dead_letters else "dim"),
        )
        return grid

    def _figures(self, adapted: Figures, frozen: Figures) -> RenderableType:
        table = Table(box=None, padding=(0, 2), title=f"last {self._tally.window:,} scores", title_justify="left")
        table.add_column("")
        for name in ("AUC", "log-loss"):
            table.add_column(name, justify="right")
        table.add_column("AUC over time")
        low, high = _range(self._trends)
        for name, figures, trend in ((ADAPTED, adapted, self._trends[0]), (FROZEN, frozen, self._trends[1])):
            style = _STYLES[name]
            line = Text(_sparkline(trend, low, high), style)
            table.add_row(Text(name, style), _number(figures.auc), _number(figures.log_loss), line)
        return table

    def _user(self) -> RenderableType:
        user = self._stage.followed
        table = Table(box=None, padding=(0, 1), title=f"user {user.user_id}, latest events", title_justify="left")
        table.add_column("n-th", justify="right")
        table.add_column("item", width=_ITEM_WIDTH)
        table.add_column("frozen")
        table.add_column("adapted")
        table.add_column("moved", justify="right")
        table.add_column("target")
        for column in table.columns:
            column.no_wrap = True
        for score in reversed(self._tally.shown):
            table.add_row(*self._event(score))
        for _ in range(self._tally.shown.maxlen or 0, len(self._tally.shown), -1):
            table.add_row("")
        return table

    def _event(self, score: ReadScore) -> tuple[RenderableType, ...]:
        moved = score.score - score.frozen_score
        helped = score.target is not None and (moved > 0) == (score.target == 1)
        style = "" if score.target is None else "green" if helped else "red"
        return (
            f"{score.adaptations:,}",
            Text(self._stage.followed.items.get(score.event_id, ""), overflow="ellipsis"),
            Text(f"{score.frozen_score:.2f}", _STYLES[FROZEN]),
            Text(f"{_bar(score.score)} {score.score:.2f}", _STYLES[ADAPTED]),
            Text(f"{moved:+.2f}", style),
            "–" if score.target is None else Text("yes", "bold") if score.target else Text("no"),
        )


def comparison(adapted: Figures, frozen: Figures) -> RenderableType:
    """The table at the end."""
    table = Table(title="whole stream, scored before the answer was known", title_justify="left")
    table.add_column("")
    for name, style in _STYLES.items():
        table.add_column(name, style=style, justify="right")
    table.add_column("difference", justify="right")
    rows = (
        ("AUC", "auc", 1),
        ("AUC within users", "grouped_auc", 1),
        ("log-loss", "log_loss", -1),
        ("calibration error", "calibration_error", -1),
    )
    for label, name, better in rows:
        ours, theirs = getattr(adapted, name), getattr(frozen, name)
        difference = Text(f"{ours - theirs:+.4f}", "green" if (ours - theirs) * better > 0 else "red")
        table.add_row(label, _number(ours), _number(theirs), difference)
    return table


def last_quarter(found: Mapping[str, Figures]) -> RenderableType:
    """What refreshing was worth: the last quarter of the stream, with it and without."""
    table = Table(title="last quarter of the stream", title_justify="left")
    for name in ("", "AUC", "AUC within users", "log-loss"):
        table.add_column(name, justify="right" if name else "left")
    named = {ADAPTED: "adapted, with refresh", UNREFRESHED: "adapted, without refresh", FROZEN: "frozen, with refresh"}
    for name, of in found.items():
        table.add_row(named[name], *map(_number, (of.auc, of.grouped_auc, of.log_loss)))
    return table


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _range(trends: tuple[list[float], list[float]]) -> tuple[float, float]:
    values = [value for trend in trends for value in trend if not math.isnan(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _sparkline(values: list[float], low: float, high: float) -> str:
    """One block per value; both lines of a pair are given the same range, so that they can be compared."""
    top, span = len(_BLOCKS) - 1, max(high - low, 1e-9)
    return "".join(" " if math.isnan(v) else _BLOCKS[round((v - low) / span * top)] for v in values)


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return "█" * full + "░" * (_BAR - full)

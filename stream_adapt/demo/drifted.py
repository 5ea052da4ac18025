"""`demo --drift`: a known change in the stream, and what becomes of it, as the topics of the refresh tell it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from confluent_kafka import Message

from stream_adapt.datasets.drifts import Drift, splice
from stream_adapt.demo.prepare import Data
from stream_adapt.demo.tally import ADAPTED, FROZEN, UNREFRESHED, Figures, Floats, Tally, figures
from stream_adapt.drift import Alarm
from stream_adapt.kafka.topics import TopicNames
from stream_adapt.refresh.record import STATE_KEY, RefreshState
from stream_adapt.refresh.states import RESTING, State

#: The change comes after this share of the stream: a reference has to be gathered before, and there has to be time for
#: a refresh after.
_PLACE = 0.2
#: Of the member. Where they differ from the defaults it is because the stream has no more than some minutes: a shorter
#: reference, and seconds of training.
SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "drift": {"reference_events": 8_192},
        "refresh": {"mode": "child", "settle_events": 8_192, "training_s": 20, "shadow_events": 2_000},
    }
)

_STATES = {
    State.COOLING: "waiting for events of the new world, to learn from",
    State.TRAINING: "a challenger is trained on the newest events, in a process of its own",
    State.SHADOW: "champion and challenger score the same events, which neither was trained on",
    State.PROMOTED: "the challenger is better, and announced",
    State.WATCHING: "the former champion scores the same events, too, in case it was better",
}


class Mark(NamedTuple):
    """Something happened after so many events of the stream."""

    events: int
    what: str


def drifted(data: Data) -> tuple[Data, int]:
    """The same with a drift in what is streamed, and the events of the stream before it.

    A source that has a drift there by itself keeps that one. Else items are taken for one another from there on, which
    the users' weights cannot absorb: these are about what items are like.
    """
    source = data.source
    if source.drift_at is None or source.drift_at < data.half:
        at = data.half + round(_PLACE * (data.count - data.half))
        source = splice(source, Drift("permute", at))
    assert source.drift_at is not None
    return replace(data, source=source), source.drift_at - data.half


def last_quarter(tally: Tally, alone: Floats) -> dict[str, Figures]:
    """Figures of the last quarter of the stream, by name; `alone` `[n]`: scores without a refresh."""
    columns = tally.columns()
    chosen = (columns.number * 4 >= 3 * tally.events) & (columns.target >= 0)
    scores = {ADAPTED: columns.adapted, UNREFRESHED: alone, FROZEN: columns.frozen}
    target, users = columns.target[chosen], columns.users[chosen]
    return {name: figures(column[chosen], target, users) for name, column in scores.items()}


class Story:
    """What the topics of alarms and of the refresh told so far.

    Args:
        topics: of the application.
        drift_at: events of the stream before the change.
        now_ms: the time.
    """

    def __init__(
        self, topics: TopicNames, drift_at: int, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self.drift_at = drift_at
        self.alarms: list[Mark] = []
        self.state: RefreshState | None = None
        self.topics = topics
        self._now_ms = now_ms
        self._news: list[str] = []
        self._known: set[str] = set()  # versions whose first score was told; also that the drift was

    def add(self, messages: Iterable[Message]) -> None:
        """Takes in what was read of both topics."""
        messages = list(messages)
        for message in messages:
            if message.topic() == self.topics.alarms:  # written together with the states that they lead to
                self._alarmed(Alarm.from_bytes(message.value() or b""))
        for message in messages:
            if message.topic() == self.topics.refresh and message.key() == STATE_KEY and message.value() is not None:
                self._moved(RefreshState.decode(message.value() or b"", f"{message.topic()}@{message.offset()}"))

    def news(self, tally: Tally) -> list[str]:
        """What is new since the last call, a line each."""
        if tally.outputs >= self.drift_at and "" not in self._known:
            self._known.add("")
            self._news.append(f"the world changes after {self.drift_at:,} events")
        for version, number in list(tally.served_from.items())[1:]:
            if version not in self._known:
                self._known.add(version)
                self._news.append(f"scores come from {version} after {number:,} events")
        news, self._news = self._news, []
        return news

    @property
    def alarm_at(self) -> int | None:
        """Events of the stream before the first alarm after the drift; None: there was none."""
        return min((alarm.events for alarm in self.alarms if alarm.events > self.drift_at), default=None)

    def promoted_at(self, tally: Tally) -> int | None:
        """Events before the first one after the drift that another model scored than the first; None: there is none."""
        return min((mark.events for mark in _swaps(tally) if mark.events > self.drift_at), default=None)

    def marks(self, tally: Tally) -> list[Mark]:
        """All of it in order, for the picture."""
        return sorted({Mark(self.drift_at, "drift"), *self.alarms, *_swaps(tally)})

    @property
    def under_way(self) -> bool:
        """Whether a refresh had begun and not ended."""
        return self.state is not None and self.state.state not in RESTING

    def standing(self) -> str:
        """Where the refresh is, in a line."""
        state = self.state
        if state is None:
            return "no word of the refresh yet"
        if state.state in RESTING:
            last = state.last
            return f"{last.outcome.replace('_', ' ')}: {last.reason}" if last else str(state.state)
        since_s = max(self._now_ms() - state.since_ms, 0) / 1000
        return f"{state.state} for {since_s:.0f} s: {_STATES[state.state]}"

    def ending(self) -> list[str]:
        """How the last refresh ended, if one did, and where another one is, a line each."""
        last = self.state.last if self.state else None
        ended = [f"{last.outcome.replace('_', ' ')}: {last.reason}"] if last else []
        return [*ended, self.standing()] if self.under_way or not ended else ended

    def _alarmed(self, alarm: Alarm) -> None:
        # Offsets of the input count its events: the topic is new, and nobody else writes to it.
        events = sum(alarm.since.values()) + alarm.events
        self.alarms.append(Mark(events, "alarm"))
        where = f" in {alarm.domain}" if alarm.domain else ""
        self._news.append(
            f"alarm after {events:,} events{where}: {alarm.signal} is {alarm.value:.4f}, and was {alarm.reference:.4f}"
        )

    def _moved(self, state: RefreshState) -> None:
        before, self.state = self.state, state
        if state.state is (before.state if before is not None else State.STABLE):
            return
        if state.state is State.PROMOTED:
            of = state.figures
            self._news.append(
                f"promoted: on {of['shadow_events']:,.0f} events the challenger's log-loss is "
                f"{of['shadow_log_loss_challenger']:.4f}, and the champion's {of['shadow_log_loss_champion']:.4f}"
            )
        elif state.state in RESTING:
            self._news.append(self.standing())
        else:
            self._news.append(f"{state.state}: {_STATES[state.state]}")


def _swaps(tally: Tally) -> list[Mark]:
    return [Mark(number, "promotion") for number in list(tally.served_from.values())[1:]]

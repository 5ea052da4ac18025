"""Every figure of the demo, from the records that its reader was handed, and from nothing else.

The window slides over scores in the order in which they were read: with a pace nearly the order of time, without one a
stretch of this partition and then of that. Figures and curves at the end are in the order of time.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.metrics import Bucket

#: Scores in the sliding window; a shorter stream is given a shorter one.
WINDOW = 5_000
_SHARE_OF_STREAM = 0.1
_SMALLEST_WINDOW = 200
#: Events of the followed user that are kept to be shown.
SHOWN = 8
#: The rate is that of the last seconds.
_RATE_OVER_S = 3.0
#: Points of a curve over time.
_POINTS = 120

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


class ReadScore(msgspec.Struct, frozen=True, gc=False):
    """What of score v1 is looked at."""

    event_id: str
    user_id: str
    score: float
    frozen_score: float
    target: int | None
    adaptations: int
    model_version: str
    event_timestamp: int
    source_offset: int


class _EventId(msgspec.Struct, frozen=True):
    event_id: str


class Figures(msgspec.Struct, frozen=True):
    """How good some scores were."""

    auc: float
    log_loss: float
    grouped_auc: float = float("nan")
    calibration_error: float = float("nan")


@dataclass(frozen=True)
class Curves:
    """Adapted and frozen, over time and by a user's n-th event."""

    events: Longs  # [m] where in the stream the window ends
    auc: tuple[Floats, Floats]  # [m] each: adapted, frozen
    log_loss: tuple[Floats, Floats]
    cold_start: tuple[list[Bucket], list[Bucket]]
    window: int


class Tally:
    """Counts and columns, added to record by record.

    Args:
        events: how many will come.
        scores_topic: records of it are scores; all others are dead letters.
        followed: the user whose last events are kept.
    """

    def __init__(self, events: int, scores_topic: str, followed: str) -> None:
        self.window = int(min(WINDOW, max(_SMALLEST_WINDOW, events * _SHARE_OF_STREAM)))
        self.scores = 0
        self.dead_letters = 0
        self.reasons: Counter[str] = Counter()
        self.model_version = ""  # of the last score
        self.shown: deque[ReadScore] = deque(maxlen=SHOWN)
        self.last_at = time.monotonic()  # when something came
        self._scores_topic = scores_topic
        self._followed = followed
        self._outputs_of: Counter[str] = Counter()
        self._adapted, self._frozen, self._target = array("d"), array("d"), array("b")
        self._timestamp, self._offset = array("q"), array("q")
        self._users: list[str] = []
        self._recent: deque[tuple[float, int]] = deque([(self.last_at, 0)])
        self._decode = msgspec.json.Decoder(ReadScore).decode

    @property
    def outputs(self) -> int:
        """Scores and dead letters."""
        return self.scores + self.dead_letters

    def add(self, messages: Iterable[Message]) -> None:
        """Takes in what was read."""
        before = self.outputs
        for message in messages:
            if message.topic() == self._scores_topic:
                self._add_score(self._decode(message.value() or b""))
            else:
                self._add_dead_letter(message)
        now = time.monotonic()
        if self.outputs > before:
            self.last_at = now
        self._recent.append((now, self.outputs))
        while now - self._recent[0][0] > _RATE_OVER_S:
            self._recent.popleft()

    def rate(self) -> float:
        """Outputs a second, lately."""
        (began, first), (ended, last) = self._recent[0], self._recent[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    def recent(self) -> tuple[Figures, Figures]:
        """Adapted and frozen, of the sliding window. Exact, and cheap: one sort of the window a look."""
        target = np.array(self._target[-self.window :], dtype=np.int8)
        known = target >= 0
        both = (np.array(column[-self.window :])[known] for column in (self._adapted, self._frozen))
        adapted, frozen = (_figures(column, target[known]) for column in both)
        return adapted, frozen

    def overall(self) -> tuple[Figures, Figures]:
        """Adapted and frozen, of all scores whose outcome is known."""
        adapted, frozen, target, users = self._in_time_order()
        return _figures(adapted, target, users), _figures(frozen, target, users)

    def curves(self) -> Curves:
        """What the picture shows."""
        adapted, frozen, target, users = self._in_time_order()
        window = min(self.window, len(target))
        ends = np.unique(np.linspace(window, len(target), _POINTS).astype(np.int64))
        both = [
            [_figures(column[e - window : e], target[e - window : e]) for e in ends] for column in (adapted, frozen)
        ]
        nth = metrics.nth_events(users.tolist())
        auc, log_loss = ([np.array([getattr(f, name) for f in one]) for one in both] for name in ("auc", "log_loss"))
        curve = [metrics.by_nth_event(metrics.losses(column, target), nth) for column in (adapted, frozen)]
        return Curves(ends, (auc[0], auc[1]), (log_loss[0], log_loss[1]), (curve[0], curve[1]), window)

    def faults(self, expected: Iterable[str]) -> list[str]:
        """In words, what keeps the outputs from being exactly one for every expected event id; empty: nothing."""
        wanted = Counter(expected)
        missing, extra = wanted - self._outputs_of, self._outputs_of - wanted
        return [
            f"{sum(ids.values())} {what}, such as {', '.join(sorted(ids)[:3])}"
            for what, ids in (("events without an output", missing), ("outputs too many", extra))
            if ids
        ]

    def _add_score(self, score: ReadScore) -> None:
        self.scores += 1
        self.model_version = score.model_version
        self._outputs_of[score.event_id] += 1
        self._adapted.append(score.score)
        self._frozen.append(score.frozen_score)
        self._target.append(-1 if score.target is None else score.target)
        self._timestamp.append(score.event_timestamp)
        self._offset.append(score.source_offset)
        self._users.append(score.user_id)
        if score.user_id == self._followed:
            self.shown.append(score)

    def _add_dead_letter(self, message: Message) -> None:
        self.dead_letters += 1
        reason = dict(message.headers() or []).get("stream-adapt.reason")
        self.reasons[reason.decode() if isinstance(reason, bytes) else "unknown"] += 1
        try:
            self._outputs_of[msgspec.json.decode(message.value() or b"", type=_EventId).event_id] += 1
        except msgspec.MsgspecError:
            self._outputs_of["a dead letter that is no event"] += 1

    def _in_time_order(self) -> tuple[Floats, Floats, npt.NDArray[np.int8], Longs]:
        """Scores adapted and frozen, outcomes, and users as numbers `[n]`; those with a known outcome."""
        target = np.array(self._target, dtype=np.int8)
        # A user's events share a partition, where offsets are the order; between partitions time decides.
        order = np.lexsort((np.array(self._offset), np.array(self._timestamp)))
        order = order[target[order] >= 0]
        codes: dict[str, int] = {}
        users = np.array([codes.setdefault(user, len(codes)) for user in self._users], dtype=np.int64)
        return np.array(self._adapted)[order], np.array(self._frozen)[order], target[order], users[order]


def _figures(scores: Floats, targets: npt.NDArray[np.int8], users: Longs | None = None) -> Figures:
    if users is None:
        return Figures(metrics.auc(scores, targets), metrics.log_loss(scores, targets))
    return Figures(
        metrics.auc(scores, targets),
        metrics.log_loss(scores, targets),
        metrics.grouped_auc(scores, targets, users),
        metrics.calibration_error(scores, targets),
    )

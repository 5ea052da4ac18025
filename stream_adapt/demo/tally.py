"""Every figure of the demo, from the records that its reader was handed, and from nothing else.

The window slides over scores in the order in which they were read: with a pace nearly the order of time, without one a
stretch of this partition and then of that. Figures and curves at the end are in the order of the
stream.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
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
    source_partition: int
    source_offset: int


class _EventId(msgspec.Struct, frozen=True):
    event_id: str


class Figures(msgspec.Struct, frozen=True):
    """How good some scores were."""

    auc: float
    log_loss: float
    grouped_auc: float = float("nan")
    calibration_error: float = float("nan")


#: Names of a curve, and of a column of scores.
ADAPTED, FROZEN, UNREFRESHED = "adapted", "frozen", "without refresh"


@dataclass(frozen=True)
class Curves:
    """How good scores were, by name, over the stream and by a user's n-th event."""

    events: Longs  # [m] where in the stream the window ends
    auc: Mapping[str, Floats]  # [m] each
    log_loss: Mapping[str, Floats]
    cold_start: Mapping[str, list[Bucket]]
    window: int


@dataclass(frozen=True)
class Columns:
    """All n scores in the order of the stream."""

    number: Longs  # [n] events of the stream before this one
    adapted: Floats  # [n]
    frozen: Floats  # [n]
    target: npt.NDArray[np.int8]  # [n] -1: not known
    users: Longs  # [n] as numbers
    partition: Longs  # [n]
    offset: Longs  # [n]
    version: Longs  # [n] of the model, as numbers, in the order in which the first scores of each were read

    def where(self, chosen: npt.NDArray[np.bool_] | Longs) -> Columns:
        """Some of them, or all in another order."""
        return Columns(**{name: column[chosen] for name, column in vars(self).items()})


class Tally:
    """Counts and columns, added to record by record.

    Args:
        event_ids: of the stream, in its order.
        scores_topic: records of it are scores; all others are dead letters.
        followed: the user whose last events are kept.
    """

    def __init__(self, event_ids: Sequence[str], scores_topic: str, followed: str) -> None:
        self.events = len(event_ids)
        self.window = int(min(WINDOW, max(_SMALLEST_WINDOW, self.events * _SHARE_OF_STREAM)))
        self.scores = 0
        self.dead_letters = 0
        self.reasons: Counter[str] = Counter()
        self.model_version = ""  # of the last score
        self.served_from: dict[str, int] = {}  # by version of the model, the number of its first event
        self.shown: deque[ReadScore] = deque(maxlen=SHOWN)
        self.last_at = time.monotonic()  # when something came
        self._scores_topic = scores_topic
        self._followed = followed
        self._expected = Counter(event_ids)
        self._numbers = dict(zip(event_ids, range(self.events), strict=True))
        self._outputs_of: Counter[str] = Counter()
        self._adapted, self._frozen, self._target = array("d"), array("d"), array("b")
        self._number, self._version, self._partition, self._offset = (array("q") for _ in range(4))
        self._codes: dict[str, int] = {}  # of versions
        self._users: list[str] = []
        self._recent: deque[tuple[float, int]] = deque([(self.last_at, 0)])
        self._decode = msgspec.json.Decoder(ReadScore).decode

    @property
    def first_version(self) -> str:
        """Of the model that the first score is of; empty before there is one."""
        return next(iter(self.served_from), "")

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
        adapted, frozen = (figures(column, target[known]) for column in both)
        return adapted, frozen

    def overall(self) -> tuple[Figures, Figures]:
        """Adapted and frozen, of all scores whose outcome is known."""
        columns = self.columns()
        known = columns.where(columns.target >= 0)
        adapted, frozen = (figures(column, known.target, known.users) for column in (known.adapted, known.frozen))
        return adapted, frozen

    def curves(self, beside: Mapping[str, Floats] | None = None) -> Curves:
        """What the picture shows.

        Args:
            beside: more scores of the same events by name, each `[n]` as in `columns`.
        """
        columns = self.columns()
        known = columns.target >= 0
        target = columns.target[known]
        scores = {ADAPTED: columns.adapted, FROZEN: columns.frozen, **(beside or {})}
        said = {name: column[known] for name, column in scores.items()}
        window = min(self.window, len(target))
        ends = np.unique(np.linspace(window, len(target), _POINTS).astype(np.int64))
        over_time = {
            name: [figures(column[e - window : e], target[e - window : e]) for e in ends]
            for name, column in said.items()
        }
        auc, log_loss = (
            {name: np.array([getattr(one, what) for one in windows]) for name, windows in over_time.items()}
            for what in ("auc", "log_loss")
        )
        nth = metrics.nth_events(columns.users[known].tolist())
        cold_start = {name: metrics.by_nth_event(metrics.losses(column, target), nth) for name, column in said.items()}
        places = np.append(columns.number[known] + 1, 0)[ends - 1]  # the 0 where there is nothing at all
        return Curves(places, auc, log_loss, cold_start, window)

    def faults(self) -> list[str]:
        """In words, what keeps the outputs from being exactly one for every event id of the stream; empty: nothing."""
        missing, extra = self._expected - self._outputs_of, self._outputs_of - self._expected
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
        number = self._numbers.get(score.event_id, self.events)
        before = self.served_from.setdefault(score.model_version, number)
        if number < before:
            self.served_from[score.model_version] = number
        self._number.append(number)
        self._version.append(self._codes.setdefault(score.model_version, len(self._codes)))
        self._partition.append(score.source_partition)
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

    def columns(self) -> Columns:
        """All scores in the order of the stream."""
        codes: dict[str, int] = {}
        users = np.array([codes.setdefault(user, len(codes)) for user in self._users], dtype=np.int64)
        order = np.lexsort((np.array(self._offset), np.array(self._number)))
        columns = Columns(
            number=np.array(self._number, dtype=np.int64),
            adapted=np.array(self._adapted),
            frozen=np.array(self._frozen),
            target=np.array(self._target, dtype=np.int8),
            users=users,
            partition=np.array(self._partition, dtype=np.int64),
            offset=np.array(self._offset, dtype=np.int64),
            version=np.array(self._version, dtype=np.int64),
        )
        return columns.where(order)


def figures(scores: Floats, targets: npt.NDArray[np.int8], users: Longs | None = None) -> Figures:
    """How good n scores were; those that need users only if there are users."""
    if users is None:
        return Figures(metrics.auc(scores, targets), metrics.log_loss(scores, targets))
    return Figures(
        metrics.auc(scores, targets),
        metrics.log_loss(scores, targets),
        metrics.grouped_auc(scores, targets, users),
        metrics.calibration_error(scores, targets),
    )

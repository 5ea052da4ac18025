"""What flows through the pipeline: raw records in, events, scores and dead letters out. Nothing imports less.

A micro-batch is columns, not objects: one list or array per field, all of the same length n, in the order in which
the records were consumed. Within one partition that is offset order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import IntFlag
from typing import Any, NewType, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

UserId = NewType("UserId", str)
ItemId = NewType("ItemId", str)

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]

#: Where a record lies in the input topic: partition, offset.
Source = tuple[int, int]

#: Headers of a record, in order.
Headers = Sequence[tuple[str, bytes | None]]

#: `event_type` of a record that asks for the user's row to be erased.
ERASE = "$erase"

#: One declared feature's value as producers send it.
FeatureValue = float | str | list[str] | list[float] | None

#: `level` of an event that carries no feedback: it is scored, and nothing is learned from it.
NO_LEVEL = -1

#: In place of a source's offset: what is written comes from no single input record.
NO_SOURCE = -1


class UserEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One thing a user did with an item: event v1, `schemas/event-v1.json`.

    This is the general form that producers, data sets and tests build. The consumer decodes the same JSON into a
    narrower struct that knows only the declared features (`decode.py`).
    """

    event_id: str
    user_id: UserId
    item_id: ItemId
    event_type: str
    timestamp: int  # ms since the epoch
    label: float | None = None
    features: dict[str, FeatureValue] = {}
    domain: str | None = None


class EraseRequest(msgspec.Struct, frozen=True, gc=False):
    """A record of the events topic that has a user's row erased: erase v1, `schemas/erase-v1.json`."""

    event_id: str
    user_id: UserId
    event_type: str  # ERASE
    timestamp: int  # ms since the epoch


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """A record of the scores topic that says that a user's row was erased: receipt v1, `schemas/receipt-v1.json`."""

    event_id: str
    user_id: UserId
    flags: tuple[str, ...]  # "erased"
    had_row: bool
    event_timestamp: int
    erased_at: int
    source_topic: str
    source_partition: int
    source_offset: int


class Flag(IntFlag):
    """What was special about an event; a score carries the names."""

    SCORE_ONLY = 1  # no label and no mapped event type: nothing was learned
    NAN_UNDONE = 2  # the update was not finite and was undone; the score is the last good row's
    LATE = 4  # older than the last event learned for this user, by more than `input.late_after_s`
    DUPLICATE = 8  # the event id is that of one of the last events learned for this user: nothing was learned


class Score(msgspec.Struct, frozen=True, gc=False):
    """One scored event: score v1, `schemas/score-v1.json`."""

    event_id: str
    user_id: UserId
    item_id: ItemId
    score: float
    frozen_score: float
    updated_score: float
    level: int | None
    target: int | None
    uncertainty: float
    model_version: str
    adaptations: int
    flags: tuple[str, ...]
    event_timestamp: int
    scored_at: int
    source_topic: str
    source_partition: int
    source_offset: int


@dataclass(frozen=True, slots=True)
class TopicNames:
    """The topics that the loop reads and writes, by role."""

    events: str
    scores: str
    dead_letters: str
    changelog: str
    learning: str
    alarms: str
    models: str = ""  # which model is served; read and written beside the loop
    refresh: str = ""  # where a refresh is; the same

    @classmethod
    def of(cls, app: str) -> TopicNames:
        """The names that an app's topics have unless it is told otherwise."""
        return cls(*(f"{app}.{role.name.replace('_', '-')}" for role in fields(cls)))


class Message(Protocol):
    """What a record's headers are read from."""

    def headers(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Records as Kafka gave them: columns of equal length n."""

    keys: list[bytes | None]
    values: list[bytes | None]
    partitions: Ints
    offsets: Longs
    messages: Sequence[Message] = ()  # the same as the client gave them, or none: their headers

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def empty(cls) -> RawBatch:
        """No records."""
        return cls([], [], np.zeros(0, np.int32), np.zeros(0, np.int64))

    def followed_by(self, more: RawBatch) -> RawBatch:
        """These records, then those."""
        if not len(self) or not len(more):
            return self if len(self) else more
        return RawBatch(
            [*self.keys, *more.keys],
            [*self.values, *more.values],
            np.concatenate([self.partitions, more.partitions]),
            np.concatenate([self.offsets, more.offsets]),
            [*self.messages, *more.messages],
        )

    def headers(self, i: int) -> Headers:
        """Headers of record i; looked at for the few records that are refused."""
        return (self.messages[i].headers() or ()) if self.messages else ()

    def chunks(self, size: int) -> Iterator[RawBatch]:
        """The same records in the same order, at most `size` at a time; one empty chunk if there are none."""
        for start in range(0, max(len(self), 1), size):
            at = slice(start, start + size)
            yield RawBatch(self.keys[at], self.values[at], self.partitions[at], self.offsets[at], self.messages[at])

    def take(self, indices: Longs) -> RawBatch:
        """The records at these indices, in their order."""
        at = indices.tolist()
        keys, values = [self.keys[i] for i in at], [self.values[i] for i in at]
        messages = [self.messages[i] for i in at] if self.messages else ()
        return RawBatch(keys, values, self.partitions[indices], self.offsets[indices], messages)

    @property
    def next_offsets(self) -> dict[int, int]:
        """By partition: the last offset of the batch + 1."""
        ends = np.flatnonzero(np.diff(self.partitions, append=-1))  # of runs of records of one partition
        return dict(zip(self.partitions[ends].tolist(), (self.offsets[ends] + 1).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was refused: its original bytes and why. The reason is one of `decode.REASONS`."""

    key: bytes | None
    value: bytes | None
    partition: int
    offset: int
    reason: str
    detail: str
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Erasure:
    """A user's row is to be erased from one partition, after the first `position` events of its batch."""

    event_id: str
    user_id: UserId
    timestamp_ms: int
    partition: int
    offset: int
    position: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded and valid events: columns of equal length n, in consumption order; and erasures between them."""

    event_ids: list[str]
    user_ids: list[UserId]
    item_ids: list[ItemId]
    features: Sequence[Any]  # structs made by `learner.encoder.features_struct`, or None
    timestamps_ms: Longs
    levels: npt.NDArray[np.int8]  # NO_LEVEL where there is nothing to learn
    partitions: Ints
    offsets: Longs
    erasures: Sequence[Erasure] = ()  # in consumption order
    domains: Sequence[str | None] = ()  # none: no event has one

    def __len__(self) -> int:
        return len(self.event_ids)

    def between(self, start: int, stop: int) -> Batch:
        """Some of the events, without erasures."""
        names = [column.name for column in fields(self) if column.name != "erasures"]
        return Batch(**{name: getattr(self, name)[start:stop] for name in names})


@dataclass(frozen=True, slots=True)
class Adapted:
    """What the learner said of a batch: columns of length n. Scores are probabilities that the target is 1."""

    score: Floats
    frozen_score: Floats
    updated_score: Floats
    uncertainty: Floats  # standard deviation of the logit before the update
    adaptations: Longs  # of this user so far, this event included if it taught
    flags: npt.NDArray[np.uint8]  # bits of Flag
    erased: Sequence[bool] = ()  # for each erasure, whether there was a row
    unseen: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))  # θ does not know the item


@dataclass(frozen=True, slots=True)
class Outputs:
    """Records to produce to one topic: columns of equal length."""

    topic: str
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[Headers] | None
    partitions: Sequence[int]  # of the input record that each comes from
    offsets: Sequence[int]  # NO_SOURCE where it comes from many
    destinations: Sequence[int] | None = None  # partitions to write to; by the key if not given

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Work:
    """What a batch, or a chunk of one, led to."""

    outputs: list[Outputs]
    batch: Batch
    adapted: Adapted
    dead_letters: list[DeadLetter]
    seconds: float  # that it took
    rows: Sequence[Outputs] = ()  # what a whole batch changed: the changelog's records

    @property
    def records(self) -> int:
        """Input records: scores, dead letters and receipts."""
        return len(self.batch) + len(self.dead_letters) + len(self.batch.erasures)

    @classmethod
    def joined(cls, parts: Sequence[Work]) -> Work:
        """What the chunks of a batch led to, as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            [block for part in parts for block in part.outputs],
            joined(Batch, [part.batch for part in parts]),
            joined(Adapted, [part.adapted for part in parts]),
            [letter for part in parts for letter in part.dead_letters],
            sum(part.seconds for part in parts),
        )


_Columns = TypeVar("_Columns", Batch, Adapted)

#: Columns that are not one value for each event, or are done with.
_NOT_BY_EVENT = ("features", "erasures", "erased")


def selected(columns: _Columns, chosen: npt.NDArray[np.bool_]) -> _Columns:
    """Those of n events for which `chosen` `[n]` holds; without features, and with erasures as they were."""
    kept: dict[str, Any] = {}
    for column in fields(columns):
        values = getattr(columns, column.name)
        if isinstance(values, np.ndarray):
            kept[column.name] = values[chosen]
        elif column.name in _NOT_BY_EVENT or not values:
            kept[column.name] = [] if column.name == "features" else values
        else:
            kept[column.name] = [value for value, wanted in zip(values, chosen.tolist(), strict=True) if wanted]
    return type(columns)(**kept)


def joined(kind: type[_Columns], parts: Sequence[_Columns]) -> _Columns:
    """Columns of several batches, one after the other; without features, and with erasures where they were."""
    columns: list[Any] = []
    for column in fields(kind):
        values = [getattr(part, column.name) for part in parts]
        if column.name == "features":  # done with
            values = [[]]
        if isinstance(values[0], np.ndarray):
            columns.append(np.concatenate(values))
            continue
        if column.name == "domains" and any(values):  # a part has none where none of its events has one
            lengths = [len(part) for part in parts]  # type: ignore[arg-type]
            values = [said or [None] * n for said, n in zip(values, lengths, strict=True)]
        columns.append([value for part in values for value in part])
    return kind(*columns)

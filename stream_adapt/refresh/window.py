"""The newest part of the input topic, as a log to train on: the topic is the replay buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from confluent_kafka import Message

from stream_adapt.decode import Decoder
from stream_adapt.errors import DataError
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.meta import sequences
from stream_adapt.meta.sequences import Log
from stream_adapt.models import DataWindow
from stream_adapt.record import NO_LEVEL, Batch, RawBatch

#: Records that are decoded together.
_CHUNK = 4_096

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Window:
    """What was read: m events with feedback, in an order in which service may have learned them."""

    log: Log
    newer: Bools  # [m] whether the event came after the world moved
    about: DataWindow

    @property
    def ends(self) -> dict[int, int]:
        """By partition, the offset behind the last record that was read."""
        return {partition: end for partition, (_, end) in self.about.offsets.items()}


def read_window(
    reader: TopicReader, decoder: Decoder, *, since_ms: int, most: int, newer: Mapping[int, int] | None = None
) -> Window:
    """Reads what was written since a time, up to the topic's ends as they are now.

    Events of a partition stay in its order; between partitions the records' times decide. What a user did before an
    erasure is left out: nobody is to learn from it.

    Args:
        reader: of the input topic.
        decoder: with the features and the feedback of the model that is trained.
        since_ms: time of the first records, in ms.
        most: records that are read at most, the newest ones of each partition.
        newer: by partition, the offset from which on the world was another one.

    Raises:
        KafkaRefused: the topic cannot be read.
        DataError: there is no event with feedback in the window.
    """
    partitions = reader.partitions()
    ranges = ranges_of(reader.since(partitions, since_ms), reader.ends(partitions), most)
    batches, times = _decoded(reader.records(ranges), decoder)
    return window_of(batches, times, ranges, reader.topic, newer)


def window_of(
    batches: list[Batch],
    times: npt.NDArray[np.int64],
    ranges: Mapping[int, tuple[int, int]],
    topic: str,
    newer: Mapping[int, int] | None = None,
) -> Window:
    """What valid events make a window.

    Args:
        batches: n events.
        times: of their records `[n]`, in ms.
        ranges: by partition, where they were read: first offset, and last offset + 1.
        topic: that they were read from.
        newer: see `read_window`.

    Raises:
        DataError: none of them has feedback.
    """
    kept = _not_erased(batches)
    taught = np.concatenate([b.levels != NO_LEVEL for b in batches] or [np.zeros(0, np.bool_)])  # [n]
    if not (taught & kept).any():
        raise DataError(f"{topic}: no event with feedback among the newest {len(taught)}; nothing to train on")
    partition = np.concatenate([b.partitions for b in batches])  # [n]
    offset = np.concatenate([b.offsets for b in batches])  # [n]
    order = _by_time(partition[taught], times[taught])
    order = order[kept[taught][order]]
    moved = np.fromiter((  # [m]
        offset_ >= (newer or {}).get(partition_, 0)
        for partition_, offset_ in zip(partition[taught][order].tolist(), offset[taught][order].tolist(), strict=True)
    ), np.bool_, len(order))  # fmt: skip
    log = _ordered(sequences.read_batches(batches), order)
    first, last = int(log.times_ms.min()), int(log.times_ms.max())
    return Window(log, moved, DataWindow(topic, len(log), first, last, dict(ranges)))


def ranges_of(starts: Mapping[int, int], ends: Mapping[int, tuple[int, int]], most: int) -> dict[int, tuple[int, int]]:
    """First offset and last offset + 1 by partition: of what lies in between, each gives the same newest share."""
    lengths = {p: max(ends[p][1] - max(start, ends[p][0]), 0) for p, start in starts.items()}
    share = min(1.0, most / max(sum(lengths.values()), 1))
    return {p: (ends[p][1] - int(length * share), ends[p][1]) for p, length in lengths.items()}


def raw_batch(messages: list[Message]) -> RawBatch:
    """Records as the consumer of the loop would hand them over."""
    return RawBatch(
        [m.key() for m in messages],
        [m.value() for m in messages],
        np.array([m.partition() for m in messages], dtype=np.int32),
        np.array([m.offset() for m in messages], dtype=np.int64),
        messages,
    )


def _decoded(messages: Iterable[Message], decoder: Decoder) -> tuple[list[Batch], npt.NDArray[np.int64]]:
    """Valid events, and the time of each one's record `[n]`."""
    batches, times = [], []
    for chunk in _chunks(messages):
        raw = raw_batch(chunk)
        decoder.prepare(raw)
        batch, _ = decoder(raw)
        written = {(m.partition(), m.offset()): m.timestamp()[1] for m in chunk}
        sources = zip(batch.partitions.tolist(), batch.offsets.tolist(), strict=True)
        batches.append(batch)
        times.append(np.array([written[source] for source in sources], dtype=np.int64))
    return batches, np.concatenate(times or [np.zeros(0, np.int64)])


def _chunks(messages: Iterable[Message]) -> Iterator[list[Message]]:
    remaining = iter(messages)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _not_erased(batches: list[Batch]) -> Bools:
    """Which events `[n]` are not followed by an erasure of their user in their partition."""
    erased: dict[tuple[int, str], int] = {}
    for erasure in (one for batch in batches for one in batch.erasures):
        erased[erasure.partition, erasure.user_id] = erasure.offset
    kept = [
        offset > erased.get((partition, user), -1)
        for b in batches
        for partition, user, offset in zip(b.partitions.tolist(), b.user_ids, b.offsets.tolist(), strict=True)
    ]
    return np.array(kept, dtype=np.bool_)


def _by_time(partitions: npt.NDArray[np.int32], times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """An order `[m]` by time in which no partition's own order changes, though its times may go back."""
    latest = times.copy()
    for partition in np.unique(partitions):
        mine = partitions == partition
        latest[mine] = np.maximum.accumulate(times[mine])
    return np.argsort(latest, kind="stable")


def _ordered(log: Log, order: npt.NDArray[np.int64]) -> Log:
    features = [log.features[i] for i in order.tolist()]
    return Log(log.users[order], log.items[order], log.times_ms[order], log.levels[order], features)

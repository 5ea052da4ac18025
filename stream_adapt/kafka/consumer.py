"""The input consumer: batches as columns, its own map of next offsets, and rebalances.

Offsets are never stored or committed by the library: `next_offsets` holds, for every owned partition, the first
record whose effect is not committed (reliability rules 1, 3 and 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.access import Gate
from stream_adapt.kafka.connections import STATISTICS_MS
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.permissions import denied
from stream_adapt.record import Ints, Longs, RawBatch

log = structlog.get_logger(__name__)

Properties = Mapping[str, str | int | float | bool]

#: A broker round trip during a rebalance is given up after this.
CALL_TIMEOUT_S = 10.0
#: Calls that answer a rebalance are tried again until then; below max.poll.interval.ms.
REBALANCE_DEADLINE_S = 60.0
_BETWEEN_TRIES_S = 0.2

#: Errors after which there is no point in going on: the operator must act.
_REFUSED = {
    KafkaError.UNKNOWN_TOPIC_OR_PART: "create the topic: `stream-adapt topics create -c FILE`",
    KafkaError._AUTO_OFFSET_RESET: (
        "the committed offset is not in the log any more (retention, or the topic was made anew): records may be lost; "
        "set the group's offsets by hand to where to go on"
    ),
}


#: No record waits for its transaction.
NOTHING_HELD: Mapping[int, int] = MappingProxyType({})


@dataclass
class RebalanceListener:
    """What the owner of the state is told: before partitions are read, and after they were taken away."""

    assigned: Callable[[Collection[int]], None] = lambda _partitions: None
    revoked: Callable[[Collection[int]], None] = lambda _partitions: None


@dataclass
class Positions:
    """Where each owned partition stands."""

    next_offsets: dict[int, int] = field(default_factory=dict)
    uncommitted_start: set[int] = field(default_factory=set)  # new to the group: the start is not committed yet


class InputConsumer:
    """Reads one topic for a consumer group, in batches.

    Committed offsets are asked for by a second client, which is no member. Kafka answers a connection's requests in
    order, and a JoinGroup is answered when all members have joined: behind it, on the group's own connection, the
    answer would wait for members that may be waiting for us, until the rebalance runs out of time.
    """

    def __init__(
        self,
        properties: Properties,
        topic: str,
        *,
        start: Literal["earliest", "latest"],
        listener: RebalanceListener,
    ) -> None:
        self.topic = topic
        self.positions = Positions()
        self.paused: set[int] = set()
        self._start = start
        self._ends: dict[int, int] = {}
        self._handed_out: dict[int, int] = {}  # by partition: behind the last record that `poll` returned
        self._listener = listener
        self._leaving = False
        self._repeated = clients.Repeated()
        self._gate = Gate(properties)
        self._group = str(properties.get("group.id", ""))
        self._lookup = clients.consumer(properties)
        statistics = {"stats_cb": clients.CONNECTIONS.told, "statistics.interval.ms": STATISTICS_MS}
        self._consumer = clients.consumer({**properties, **statistics}, self._gate)
        self._consumer.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def poll(self, max_records: int, timeout_s: float, held: Mapping[int, int] = NOTHING_HELD) -> RawBatch:
        """Up to `max_records` records of owned partitions, at most `timeout_s` after the call.

        Records of partitions that were taken away while the batch was gathered, and records that were handed out
        before a rewind, are left out: their next owner, or the next batch, has them.

        Args:
            max_records: at most so many.
            timeout_s: at most so long.
            held: by partition, the offset behind records that were polled and are not committed yet.

        Raises:
            KafkaRefused: the topic, the group or the position cannot be read; says what to do.
        """
        self._lookup.poll(0)  # reads nothing; its log lines come out
        try:
            messages = self._consumer.consume(max_records, timeout_s)
        except KafkaException as error:
            self._refuse(kafka_error(error))
            raise
        if messages:
            self._gate.passed()
        else:
            self._gate.refuse_at_last()
        records = [m for m in messages if m.error() is None]
        if len(records) < len(messages):
            for message in messages:
                self._report(message)
        raw = RawBatch(
            [m.key() for m in records],
            [m.value() for m in records],
            np.array([m.partition() for m in records], dtype=np.int32),
            np.array([m.offset() for m in records], dtype=np.int64),
            records,
        )
        expected = self.positions.next_offsets
        if held:
            expected = {p: held.get(p, offset) for p, offset in expected.items()}
        due = due_records(raw.partitions, raw.offsets, expected)
        raw = raw if due is None else raw.take(due)
        self._handed_out.update(raw.next_offsets)
        return raw

    def group_metadata(self) -> bytes:
        """The member's identity in the group, to be sent with the offsets."""
        return self._consumer.consumer_group_metadata()  # type: ignore[no-any-return]

    def advance(self, next_offsets: Mapping[int, int]) -> None:
        """These offsets are committed."""
        self.positions.next_offsets.update(next_offsets)
        self.positions.uncommitted_start -= set(next_offsets)

    def resume(self, partitions: Collection[int]) -> None:
        """Reads these, which were paused when they were assigned, from their next offsets on.

        Raises:
            KafkaRefused: the consumer cannot be moved within the deadline.
        """
        self.paused -= set(partitions)
        self._consumer.resume([TopicPartition(self.topic, p) for p in partitions])
        self._seek(partitions)

    def rewind(self) -> None:
        """Back to the committed offsets of every owned partition that is read, after an abort.

        Raises:
            KafkaRefused: the consumer cannot be moved within the deadline.
        """
        self._ends.clear()
        self._handed_out.clear()
        self._seek(self.positions.next_offsets.keys() - self.paused)

    def _seek(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            to = TopicPartition(self.topic, partition, self.positions.next_offsets[partition])
            self._until_answered(f"seek to {partition}@{to.offset}", partial(self._consumer.seek, to))

    def committed(self, partitions: Collection[int]) -> dict[int, int]:
        """Offsets that the group has committed; negative where there is none. Waits for pending transactions.

        Raises:
            KafkaRefused: no answer within the deadline.
        """
        asked = [TopicPartition(self.topic, p) for p in partitions]
        answer = self._until_answered("committed offsets", lambda: self._lookup.committed(asked, CALL_TIMEOUT_S))
        return {tp.partition: tp.offset for tp in answer}

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commits outside a transaction, and waits for it (delivery: at_least_once)."""
        offsets = [TopicPartition(self.topic, p, o) for p, o in next_offsets.items()]
        for tp in self._consumer.commit(offsets=offsets, asynchronous=False) or []:
            if tp.error is not None:
                raise KafkaException(tp.error)

    def lag(self) -> dict[int, int]:
        """Records between each owned partition's next offset and its end, as far as fetching has seen.

        The end of the log lies beyond the last record when that is followed by transaction markers or by records that
        were aborted or are not committed yet; there the consumer itself says that it has seen the end, and what was
        polled and is not committed yet is all there is.
        """
        lags = {}
        for partition, position in self.positions.next_offsets.items():
            if self._ends.get(partition, -1) >= position:
                lags[partition] = max(self._handed_out.get(partition, 0) - position, 0)
                continue
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), cached=True)
            if high >= 0:
                lags[partition] = max(high - position, 0)
        return lags

    def close(self) -> None:
        """Leaves the group."""
        self._leaving = True
        self._consumer.close()
        self._lookup.close()

    # Rebalances. No work is in flight here: a batch is committed or aborted before the next poll.

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._leaving:
            # Told to stop while joining: a client that closes gets no answer to any question about offsets any more.
            consumer.incremental_assign([])
            return
        numbers = [tp.partition for tp in partitions]
        if numbers:
            self._find_positions(numbers)
            self._listener.assigned(numbers)
        offsets = [TopicPartition(self.topic, p, self.positions.next_offsets[p]) for p in numbers]
        consumer.incremental_assign(offsets)
        # Nothing is read before the shard's rows are there and the owner resumes it.
        consumer.pause(offsets)
        self.paused.update(numbers)
        log.info("partitions assigned", topic=self.topic, partitions=numbers)

    def _find_positions(self, numbers: list[int]) -> None:
        for partition, offset in self.committed(numbers).items():
            tp = TopicPartition(self.topic, partition)
            low, high = self._until_answered(
                "watermarks", partial(self._consumer.get_watermark_offsets, tp, timeout=CALL_TIMEOUT_S)
            )
            if offset < 0:
                offset = low if self._start == "earliest" else high
                self.positions.uncommitted_start.add(partition)
            elif offset < low:
                raise KafkaRefused(
                    f"{self.topic}[{partition}]: the group has committed offset {offset}, but the log begins at {low}: "
                    f"{low - offset} offsets are gone before they were read (retention, or records were deleted). To "
                    "do: to go on without them, stop all members, move the group there with "
                    "`kafka-consumer-groups.sh --reset-offsets --to-earliest`, then tell the rows: "
                    "`stream-adapt state accept-offset -c FILE --use group`"
                )
            self.positions.next_offsets[partition] = offset

    def _until_answered(self, what: str, call: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + REBALANCE_DEADLINE_S
        while True:
            try:
                return call()
            except KafkaException as error:
                found = kafka_error(error)
                self._refuse(found)
                if time.monotonic() > deadline:
                    raise KafkaRefused(
                        f"{self.topic}: no {what} within {REBALANCE_DEADLINE_S:.0f} s: {found and describe(found)}; "
                        f"is the group's coordinator up?{self._gate.because}"
                    ) from error
                time.sleep(_BETWEEN_TRIES_S)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._forget(partitions)
        consumer.incremental_unassign(partitions)
        log.info("partitions revoked", topic=self.topic, partitions=[tp.partition for tp in partitions])

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._forget(partitions)
        consumer.incremental_unassign(partitions)
        log.warning("partitions lost", topic=self.topic, partitions=[tp.partition for tp in partitions])

    def _forget(self, partitions: list[TopicPartition]) -> None:
        numbers = [tp.partition for tp in partitions if tp.partition in self.positions.next_offsets]
        for partition in numbers:
            del self.positions.next_offsets[partition]
            self._ends.pop(partition, None)
            self._handed_out.pop(partition, None)
            self.positions.uncommitted_start.discard(partition)
            self.paused.discard(partition)
        if numbers:  # none, where a member that is told to stop while it joins is given partitions first
            self._listener.revoked(numbers)

    def _report(self, message: Message) -> None:
        error = message.error()
        if error is None:
            return
        if error.code() == KafkaError._PARTITION_EOF:
            self._ends[cast(int, message.partition())] = cast(int, message.offset())
            return
        self._refuse(error)
        repeated = self._repeated.due(f"{message.partition()} {error.name()}")
        if repeated is not None:
            told = {"topic": message.topic(), "partition": message.partition(), "error": describe(error)}
            log.warning("consumer error", **told, repeated=repeated)

    def _refuse(self, error: KafkaError | None) -> None:
        if error is None:
            return
        to_do = _REFUSED.get(error.code()) or denied(error, AclOperation.READ, topic=self.topic, group=self._group)
        if to_do is not None:
            raise KafkaRefused(f"{self.topic}: {describe(error)}. To do: {to_do}")


def due_records(partitions: Ints, offsets: Longs, next_offsets: Mapping[int, int]) -> Longs | None:
    """Indices of the records that are due, in order; None if all n are, as almost always.

    Due is a record of an owned partition that lies at or behind the partition's next offset, and behind every record
    of the partition before it in the batch.
    """
    order = np.argsort(partitions, kind="stable")
    sorted_partitions, sorted_offsets = partitions[order], offsets[order]
    starts = np.flatnonzero(np.diff(sorted_partitions, prepend=-1))
    expected = [next_offsets.get(p) for p in sorted_partitions[starts].tolist()]
    rises = np.diff(sorted_offsets, prepend=-1) > 0
    rises[starts] = [e is not None and o >= e for e, o in zip(expected, sorted_offsets[starts].tolist(), strict=True)]
    if rises.all():
        return None
    due, following = [], dict(next_offsets)
    for i, (partition, offset) in enumerate(zip(partitions.tolist(), offsets.tolist(), strict=True)):
        if offset >= following.get(partition, offset + 1):
            due.append(i)
            following[partition] = offset + 1
    return np.array(due, dtype=np.int64)


def generation(metadata: bytes) -> int:
    """Generation of the member inside the bytes of `consumer_group_metadata()`; −1 before it has joined.

    The bytes are `CGMDv2:`, the generation as little-endian int32, then the group id and the member's names.

    Raises:
        KafkaRefused: another version of the client library writes another form.
    """
    magic = b"CGMDv2:"
    if not metadata.startswith(magic):
        raise KafkaRefused(
            f"group metadata starts with {metadata[: len(magic)]!r}, expected {magic!r}: this release does not know "
            "the installed librdkafka; install confluent-kafka as constraints.txt pins it"
        )
    return int.from_bytes(metadata[len(magic) : len(magic) + 4], "little", signed=True)

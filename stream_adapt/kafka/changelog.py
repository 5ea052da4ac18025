"""The changelog topic, as Kafka sees it: is it as it should be, where does it end, and everything in it up to there.

What the records mean is not known here (`restore.py` beside the runner knows).

How a partition is read, so that no transaction is missed: its end is taken from a `read_uncommitted` listing, so that
records of transactions that are still under way lie before it; then a `read_committed` consumer reads until the end
that it reports itself (EOF) lies there, too. Offsets of transaction markers and of aborted records count. An EOF below
the target means that a transaction is open: it is waited for, for as long as `stall_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import methodcaller
from typing import Any, Literal, cast

import structlog
from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclOperation,
    AdminClient,
    ConfigResource,
    OffsetSpec,
    ResourceType,
)

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.permissions import denied

log = structlog.get_logger(__name__)

Properties = Mapping[str, str | int | float | bool]

_REQUEST_TIMEOUT_S = 10.0
_BETWEEN_TRIES_S = 0.2
#: Where the log begins and ends is asked during a rebalance: both answers far within max.poll.interval.ms.
_ENDS_DEADLINE_S = 30.0
#: Records that are handed out together where nobody waits: bulk work pays.
_MOST_RECORDS = 10_000

#: What a message says; mapped over thousands of them.
_ERROR, _PARTITION, _KEY, _VALUE, _OFFSET = map(methodcaller, ("error", "partition", "key", "value", "offset"))

#: Errors of a consumer after which waiting is of no use.
_REFUSED = {
    KafkaError.UNKNOWN_TOPIC_OR_PART: "create the topic: `stream-adapt topics create -c FILE`",
}


@dataclass(slots=True)
class Tail:
    """How far a partition has been read."""

    start: int  # first offset that the log has
    target: int  # everything below it must be read
    position: int  # everything below it is read
    moved_s: float  # when the position last changed, or reading began

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to read."""
        return self.position >= self.target


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one partition, in order: columns of equal length."""

    keys: list[bytes | None]
    values: list[bytes | None]
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.keys)


class ChangelogReader:
    """Reads partitions of a compacted topic from the beginning to where they ended when reading began."""

    def __init__(
        self, properties: Properties, topic: str, *, stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connects to nothing yet.

        Args:
            properties: of a consumer that reads committed records and tells of ends.
            topic: the changelog.
            stall_s: a partition that is not read on for so long is given up; longer than transactions may be open.
            clock: seconds that never go back.
        """
        self.topic = topic
        self.tails: dict[int, Tail] = {}
        self._properties = dict(properties)
        self._stall_s = stall_s
        self._clock = clock
        self._consumer: Consumer | None = None
        self._repeated = clients.Repeated()

    def begin(self, partitions: Collection[int]) -> None:
        """Reads these, too. Whoever wrote to them last must have been stopped before: ends are taken now.

        Raises:
            KafkaRefused: the ends are not told within the deadline.
        """
        starts, ends = self._ends(partitions)
        now = self._clock()
        for partition in partitions:
            self.tails[partition] = Tail(starts[partition], ends[partition], starts[partition], now)
        unread = [partition for partition in partitions if not self.tails[partition].is_read]
        if unread:
            if self._consumer is None:
                self._consumer = clients.consumer(self._properties)
            self._consumer.incremental_assign([self._at(partition, OFFSET_BEGINNING) for partition in unread])

    def end(self, partition: int) -> int:
        """Where a partition ends now, with all that is not committed yet.

        Raises:
            KafkaRefused: it is not told within the deadline.
        """
        return self._ends([partition])[1][partition]

    def read(self, timeout_s: float, most: int = _MOST_RECORDS) -> dict[int, Records]:
        """Records by partition, at most `timeout_s` after the call.

        Args:
            timeout_s: how long to wait for records.
            most: how many to hand out.

        Raises:
            KafkaRefused: the topic cannot be read, or a partition stalled; says how far it got.
        """
        if self._consumer is None:
            return {}
        messages = self._consumer.consume(most, timeout_s)
        if any(map(_ERROR, messages)):
            for message in messages:
                if (error := message.error()) is not None:
                    self._told(error, cast(int, message.partition()), cast(int, message.offset()))
            messages = [message for message in messages if message.error() is None]
        found: dict[int, Records] = {}
        for partition, group in groupby(messages, _PARTITION):  # they come partition by partition
            if partition not in self.tails:
                continue  # taken away
            records, run = found.setdefault(partition, Records([], [], [])), [*group]
            records.keys.extend(map(_KEY, run))
            records.values.extend(map(_VALUE, run))
            records.offsets.extend(map(_OFFSET, run))
        for partition, records in found.items():
            self._reached(partition, records.offsets[-1] + 1)
        self._refuse_stalls()
        return found

    def finish(self) -> list[int]:
        """Partitions that are read to their target; they are no longer read."""
        done = [partition for partition, tail in self.tails.items() if tail.is_read]
        self.cancel(done)
        return done

    def cancel(self, partitions: Collection[int]) -> None:
        """Reads these no further."""
        gone = [partition for partition in partitions if self.tails.pop(partition, None) is not None]
        if self._consumer is None:
            return
        if not self.tails:
            self.close()
            return
        assigned = {tp.partition for tp in self._consumer.assignment()}
        self._consumer.incremental_unassign([self._at(p) for p in gone if p in assigned])

    def close(self) -> None:
        """Lets go of the client."""
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None

    def _told(self, error: KafkaError, partition: int, offset: int) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            self._reached(partition, offset)
            return
        _refuse(self.topic, error)
        if (repeated := self._repeated.due(f"{partition} {error.name()}")) is not None:
            told = {"topic": self.topic, "partition": partition, "error": describe(error)}
            log.warning("changelog reader", **told, repeated=repeated)

    def _reached(self, partition: int, position: int) -> None:
        tail = self.tails.get(partition)
        if tail is not None and position > tail.position:
            tail.position, tail.moved_s = position, self._clock()

    def _refuse_stalls(self) -> None:
        now = self._clock()
        for partition, tail in self.tails.items():
            if not tail.is_read and now - tail.moved_s > self._stall_s:
                raise KafkaRefused(
                    f"{self.topic}[{partition}]: the restore stands at offset {tail.position} of {tail.target} since "
                    f"{self._stall_s:.0f} s: a transaction is open there, or its leader cannot be read. To do: look "
                    "for it with `kafka-transactions.sh find-hanging`, or raise state.restore_stall_s"
                )

    def _ends(self, partitions: Collection[int]) -> tuple[dict[int, int], dict[int, int]]:
        """First offsets, and ends with all that is not committed yet, by partition."""
        admin = clients.admin({k: v for k, v in self._properties.items() if not k.startswith(CONSUMERS_OWN)})
        asked = [self._at(partition) for partition in partitions]
        return (
            log_offsets(admin, asked, "earliest", _ENDS_DEADLINE_S),
            log_offsets(admin, asked, "latest", _ENDS_DEADLINE_S),
        )

    def _at(self, partition: int, offset: int = OFFSET_BEGINNING) -> TopicPartition:
        return TopicPartition(self.topic, partition, offset)


#: Properties that an AdminClient would warn of.
CONSUMERS_OWN = ("group.", "enable.", "isolation.", "auto.", "check.", "queued.", "fetch.", "session.", "max.poll.")


def log_offsets(
    admin: AdminClient, partitions: list[TopicPartition], which: Literal["earliest", "latest"], deadline_s: float
) -> dict[int, int]:
    """First or last offsets of a topic's partitions; what is not committed yet counts.

    Raises:
        KafkaRefused: no answer within the deadline.
    """
    deadline = time.monotonic() + deadline_s
    wanted = OffsetSpec.earliest() if which == "earliest" else OffsetSpec.latest()  # type: ignore[no-untyped-call]
    while True:
        futures = admin.list_offsets(
            dict.fromkeys(partitions, wanted),
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=_REQUEST_TIMEOUT_S,
        )
        try:
            found_offsets = {tp.partition: int(future.result().offset) for tp, future in futures.items()}
            # A broker that dies meanwhile may leave its partitions without an offset, and without an error.
            if min(found_offsets.values(), default=0) >= 0:
                return found_offsets
            untold = [partition for partition, offset in found_offsets.items() if offset < 0]
            log.warning("log offsets of some partitions were not told", topic=partitions[0].topic, partitions=untold)
            if time.monotonic() > deadline:
                raise KafkaRefused(
                    f"{partitions[0].topic}{untold}: no log offsets within {deadline_s:.0f} s. To do: look whether the "
                    "brokers that lead these partitions are up"
                )
            time.sleep(_BETWEEN_TRIES_S)
        except KafkaException as error:
            found = kafka_error(error)
            _refuse(partitions[0].topic, found, error)
            _refuse_missing(admin, partitions)
            if time.monotonic() > deadline:
                raise KafkaRefused(
                    f"{partitions[0].topic}: no log offsets within {deadline_s:.0f} s: {found and describe(found)}"
                ) from error
            time.sleep(_BETWEEN_TRIES_S)
        finally:
            clients.tell(admin)


def _refuse(topic: str, error: KafkaError | None, raised: BaseException | None = None) -> None:
    """Raises KafkaRefused for an error after which waiting is of no use."""
    to_do = error and (_REFUSED.get(error.code()) or denied(error, AclOperation.READ, topic=topic))
    if error is not None and to_do:
        raise KafkaRefused(f"{topic}: {describe(error)}. To do: {to_do}") from raised


def _refuse_missing(admin: AdminClient, partitions: list[TopicPartition]) -> None:
    """There is no use in waiting for partitions that are not there.

    Raises:
        KafkaRefused: the topic has fewer partitions.
    """
    topic, last = partitions[0].topic, max(tp.partition for tp in partitions)
    try:
        found = admin.list_topics(topic, timeout=_REQUEST_TIMEOUT_S).topics[topic].partitions
    except KafkaException:
        return  # the caller tries again
    if found and last not in found:
        raise KafkaRefused(
            f"{topic} has {len(found)} partitions, and the rows of partition {last} are asked for: if partitions were "
            "added to the input topic, users have moved to other shards and their rows have not. To do: start anew "
            "with an app.name and topics of its own"
        )


def check_changelog(admin: AdminClient, topic: str, row_bytes: int) -> None:
    """Makes sure that the topic keeps the last version of every row.

    Args:
        admin: client.
        topic: the changelog.
        row_bytes: of the largest row.

    Raises:
        KafkaRefused: rows would be deleted, or are too large; says what to do.
    """
    config = _topic_config(admin, topic)
    policy = config.get("cleanup.policy", "compact")
    if policy != "compact":
        raise KafkaRefused(
            f"{topic}: cleanup.policy={policy}, so rows would be deleted by age. To do: "
            f"`kafka-configs.sh --alter --topic {topic} --add-config cleanup.policy=compact`"
        )
    limit, needed = int(config.get("max.message.bytes", row_bytes + _RECORD_OVERHEAD)), row_bytes + _RECORD_OVERHEAD
    if limit < needed:
        raise KafkaRefused(
            f"{topic}: max.message.bytes={limit}, and a row may take {needed}. To do: "
            f"`kafka-configs.sh --alter --topic {topic} --add-config max.message.bytes={needed}`"
        )


#: What a record batch with one row needs beside the row: its key and Kafka's own fields.
_RECORD_OVERHEAD = 4_096


def _topic_config(admin: AdminClient, topic: str) -> dict[str, Any]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    try:
        found = admin.describe_configs([resource], request_timeout=_REQUEST_TIMEOUT_S)[resource].result()
    except KafkaException as error:
        reason = kafka_error(error)
        if reason is None or reason.code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise KafkaRefused(f"{topic}: its configuration is not told: {reason and describe(reason)}") from error
        log.warning("cannot see whether the changelog is compacted: grant DescribeConfigs on it", topic=topic)
        return {}
    finally:
        clients.tell(admin)
    return {name: entry.value for name, entry in found.items()}

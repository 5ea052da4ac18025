"""Reading a topic outside the loop: what is committed in it, from given offsets up to its end as it is now."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.access import Gate, reach
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.permissions import denied

_CALL_TIMEOUT_S = 15.0
#: Records of one fetch from the client.
_CHUNK = 5_000
_BETWEEN_TRIES_S = 0.1
#: After a topic was made, and when a broker comes or goes, there is for a moment nobody who may answer.
_MOVING = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError._TRANSPORT,
    }
)
#: Nothing at all for so long, and no end either: nobody answers.
_STALL_S = 60.0


class TopicReader:
    """A consumer of one topic that joins no group; `with` it. Its calls raise KafkaRefused."""

    def __init__(self, settings: Mapping[str, Any], topic: str, group_id: str | None = None) -> None:
        """Opens the topic.

        Args:
            settings: librdkafka properties of every client.
            topic: what is read.
            group_id: whose committed offsets `committed` and `group_metadata` are about.
        """
        self.topic = topic
        self._gate = Gate(settings)
        self._group = group_id
        self._consumer = clients.consumer(
            {
                **settings,
                "group.id": group_id or f"stream-adapt-reader-{uuid.uuid4()}",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "allow.auto.create.topics": False,
                "auto.offset.reset": "earliest",
            },
            self._gate,
        )

    def __enter__(self) -> TopicReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def partitions(self, topic: str | None = None) -> list[int]:
        """Partitions of the topic, or of another one."""
        name = topic or self.topic
        try:
            metadata = reach(
                lambda seconds: self._consumer.list_topics(name, timeout=seconds),
                self._consumer,
                self._gate,
                _CALL_TIMEOUT_S,
            )
        except KafkaException as error:
            raise self._refused("its metadata", error) from error
        found = metadata.topics[name]
        if found.error is not None:
            to_do = denied(found.error, AclOperation.DESCRIBE, topic=name) or "`stream-adapt topics create -c FILE`"
            raise KafkaRefused(f"{name}: {describe(found.error)}. To do: {to_do}")
        return sorted(found.partitions)

    def ends(self, partitions: Collection[int]) -> dict[int, tuple[int, int]]:
        """First offset, and last offset + 1, of partitions."""
        ends = {}
        for partition in partitions:
            tp = TopicPartition(self.topic, partition)
            low, high = self._asked("its ends", partial(self._consumer.get_watermark_offsets, tp))
            ends[partition] = (low, high)
        return ends

    def since(self, partitions: Collection[int], time_ms: int) -> dict[int, int]:
        """First offsets of records that were written at a time or later; the end where there are none."""
        asked = [TopicPartition(self.topic, partition, time_ms) for partition in partitions]
        found = self._asked("offsets by time", partial(self._consumer.offsets_for_times, asked))
        ends = self.ends(partitions)
        return {tp.partition: tp.offset if tp.offset >= 0 else ends[tp.partition][1] for tp in found}

    def committed(self, partitions: Collection[int]) -> dict[int, TopicPartition]:
        """What the group has committed, where it has; waits for transactions that are still pending."""
        asked = [TopicPartition(self.topic, partition) for partition in partitions]
        found = self._asked("committed offsets", partial(self._consumer.committed, asked))
        return {tp.partition: tp for tp in found if tp.offset >= 0}

    def group_metadata(self) -> object:
        """To commit offsets for the group within a transaction; the group has no members."""
        return self._consumer.consumer_group_metadata()

    def records(self, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Message]:
        """Committed records from a first offset up to, not including, a last one, by partition in order."""
        unfinished = {partition: stop for partition, (start, stop) in ranges.items() if start < stop}
        self._consumer.assign([TopicPartition(self.topic, p, ranges[p][0]) for p in unfinished])
        heard = time.monotonic()
        while unfinished:
            for message in self.poll():
                heard = time.monotonic()
                partition, offset, error = message.partition(), message.offset(), message.error()
                assert partition is not None
                assert offset is not None
                if partition not in unfinished:
                    continue
                if error is None and offset < unfinished[partition]:
                    yield message
                if offset >= unfinished[partition] - 1 or error is not None:
                    del unfinished[partition]
            if time.monotonic() - heard > _STALL_S:
                raise KafkaRefused(f"{self.topic}: nothing within {_STALL_S:.0f} s; are the brokers up?")

    def poll(self, timeout_s: float = 0.2) -> list[Message]:
        """Records, and ends of partitions, of what was assigned; an end is an error of its own kind."""
        messages = self._consumer.consume(_CHUNK, timeout_s)
        for message in messages:
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                to_do = denied(error, AclOperation.READ, topic=self.topic)
                raise KafkaRefused(f"{self.topic}: {describe(error)}{f'. To do: {to_do}' if to_do else ''}")
        return messages

    def assign(self, starts: Mapping[int, int]) -> None:
        """Reads from these offsets on, without an end."""
        self._consumer.assign([TopicPartition(self.topic, p, start) for p, start in starts.items()])

    def _asked(self, what: str, call: Callable[..., Any]) -> Any:
        """The answer, for each partition if it is about several; while leaders and coordinators move, again."""
        deadline = time.monotonic() + _CALL_TIMEOUT_S
        while True:
            left_s = max(deadline - time.monotonic(), _BETWEEN_TRIES_S)
            try:
                answer = call(timeout=left_s)
                for one in answer:
                    if isinstance(one, TopicPartition) and one.error is not None:
                        raise KafkaException(one.error)
            except KafkaException as error:
                found = kafka_error(error)
                if found is None or found.code() not in _MOVING or left_s <= _BETWEEN_TRIES_S:
                    raise self._refused(what, error) from error
                time.sleep(_BETWEEN_TRIES_S)
            else:
                return answer

    def _refused(self, what: str, error: KafkaException) -> KafkaRefused:
        found = kafka_error(error)
        to_do = denied(found, AclOperation.READ, topic=self.topic, group=self._group)
        more = f". To do: {to_do}" if to_do else f"; are the brokers up?{self._gate.because}"
        return KafkaRefused(f"{self.topic}: no {what}: {found and describe(found)}{more}")

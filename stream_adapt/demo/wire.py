"""What the demo itself does with Kafka: it produces events, and reads scores and dead letters like any stranger.

The reader is a plain confluent_kafka Consumer with read_committed, outside of every group: what it cannot see has not
been committed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, Producer, TopicPartition

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.errors import describe

#: Records produced between two looks at the scores, where there is no pace.
_CHUNK = 10_000
_METADATA_TIMEOUT_S = 15.0
#: Records read at once.
_READ_AT_ONCE = 20_000


class Encoded(NamedTuple):
    """An event as it is produced."""

    event_id: str
    key: bytes  # the user id
    value: bytes  # event v1


class Feed:
    """Produces events in their order, at so many a second (None: as fast as it can), in steps."""

    def __init__(
        self, settings: Mapping[str, Any], topic: str, events: Sequence[Encoded], per_second: float | None
    ) -> None:
        self._producer = Producer(
            {
                **settings,
                "enable.idempotence": True,
                "linger.ms": 5,
                "partitioner": "murmur2_random",  # the Java client's: a user's events lie where others would put them
                "on_delivery": self._delivered,
                "delivery.report.only.error": True,
            }
        )
        self._topic = topic
        self._events = events
        self._per_second = per_second
        self._refused: KafkaError | None = None
        self._started_at: float | None = None
        self.produced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._producer.purge()
        self._producer.close()

    @property
    def paced(self) -> bool:
        return self._per_second is not None

    @property
    def done(self) -> bool:
        return self.produced == len(self._events)

    def step(self) -> None:
        """Produces what is due by now.

        Raises:
            KafkaRefused: the broker did not take an event.
        """
        if self._started_at is None:
            self._started_at = time.monotonic()
        due = min(self._due(time.monotonic() - self._started_at), len(self._events))
        for event in self._events[self.produced : due]:
            self._produce(event)
        self.produced = max(due, self.produced)
        self._producer.poll(0)
        if self._refused is not None:
            raise KafkaRefused(f"{self._topic}: the broker did not take an event: {describe(self._refused)}")

    def _due(self, elapsed_s: float) -> int:
        return self.produced + _CHUNK if self._per_second is None else 1 + int(elapsed_s * self._per_second)

    def _produce(self, event: Encoded) -> None:
        while True:
            try:
                self._producer.produce(self._topic, event.value, event.key)
            except BufferError:  # the queue is full: wait until the broker took some
                self._producer.poll(0.1)
            else:
                return

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        self._refused = self._refused or error


class Reader:
    """Every committed record of some topics, from their beginnings."""

    def __init__(self, settings: Mapping[str, Any], topics: Sequence[str]) -> None:
        self._consumer = Consumer(
            {
                **settings,
                "group.id": f"stream-adapt-demo-{uuid.uuid4()}",  # required by the client; nothing is committed to it
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 50,
            }
        )
        self._next: dict[tuple[str, int], int] = {}
        self._at_end: set[tuple[str, int]] = set()
        for topic in topics:
            found = self._consumer.list_topics(topic, timeout=_METADATA_TIMEOUT_S).topics[topic]
            self._next |= {(topic, partition): OFFSET_BEGINNING for partition in found.partitions}
        self._assign()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def read(self, timeout_s: float) -> list[Message]:
        """What arrives within the time.

        Raises:
            KafkaRefused: the broker said no.
        """
        messages = []
        for message in self._consumer.consume(_READ_AT_ONCE, timeout_s):
            error, place = message.error(), (str(message.topic()), int(message.partition() or 0))
            if error is None:
                self._next[place] = int(message.offset() or 0) + 1
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._at_end.add(place)
            else:
                raise KafkaRefused(f"{place[0]}[{place[1]}]: cannot be read: {describe(error)}")
        return messages

    def read_to_end(self, timeout_s: float) -> list[Message]:
        """All that is left, once nobody writes any more. KafkaRefused if the ends are not reached in time."""
        deadline = time.monotonic() + timeout_s
        self._at_end.clear()
        self._assign()  # so that each end is reported anew
        messages = []
        while len(self._at_end) < len(self._next):
            if time.monotonic() > deadline:
                raise KafkaRefused(f"the ends of {sorted({t for t, _ in self._next})} were not reached in time")
            messages += self.read(0.1)
        return messages

    def _assign(self) -> None:
        self._consumer.assign([TopicPartition(topic, p, offset) for (topic, p), offset in self._next.items()])

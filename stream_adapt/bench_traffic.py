"""Events into a member and scores out of it, with a watch on both: what `bench refresh` measures by.

Latency is from an event's timestamp, taken where it is produced, to the moment at which a reader with read_committed
has its score; the clock is one. Throughput is measured on a backlog: a burst is in the topic before the watch starts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np
from confluent_kafka import OFFSET_BEGINNING, KafkaError, Message, TopicPartition

from stream_adapt.config import Config
from stream_adapt.datasets import synthetic
from stream_adapt.errors import KafkaRefused, StreamAdaptError
from stream_adapt.kafka import clients, properties
from stream_adapt.record import UserEvent

#: Between two looks at what has come out: how finely a latency is known.
_LOOK_S = 0.002
#: Records taken from the client at once.
_READ_AT_ONCE = 20_000
#: More than a run has: a stream that came twice would be known by heart.
_STREAM = synthetic.Synthetic(
    events=50_000_000, drift="none", users=6_000, items=1_700, active=100, burst=150, popularity=0.9
)
_FEATURES = ("category", "tags", "price")
#: Nothing comes out for so long while events wait: something is broken.
_STALLED_S = 120.0
_FLUSH_S = 60.0


class Unmeasured(StreamAdaptError):
    """What was to be measured did not come about: a member stood still, a training ended too soon."""


class Latencies(NamedTuple):
    """Of a stretch of steady load: milliseconds, end to end."""

    events: int
    p50_ms: float
    p99_ms: float


class Seen(NamedTuple):
    """One score, as it came out."""

    partition: int  # of its event
    at_s: float  # since the epoch
    took_ms: float


class Arrivals(NamedTuple):
    """Scores as they came out: when, and how many at once."""

    at_s: list[float]
    counts: list[int]


def latencies(milliseconds: Sequence[float]) -> Latencies:
    """Median and 99th percentile.

    Raises:
        Unmeasured: there is none.
    """
    if not milliseconds:
        raise Unmeasured("not a single score came out within a stretch of steady load")
    p50, p99 = np.percentile(milliseconds, (50, 99)).tolist()
    return Latencies(len(milliseconds), round(p50, 1), round(p99, 1))


def per_second(arrivals: Arrivals) -> float:
    """Scores a second of a backlog. The first ones start the watch, and are not counted: when they began is not known.

    Raises:
        Unmeasured: all came at once.
    """
    if len(arrivals.at_s) < 2 or arrivals.at_s[-1] <= arrivals.at_s[0]:
        raise Unmeasured("the burst was over at once. To do: a larger --burst")
    return sum(arrivals.counts[1:]) / (arrivals.at_s[-1] - arrivals.at_s[0])


def sample_events(count: int) -> list[UserEvent]:
    """Events as the traffic carries them: a record of about 250 bytes."""
    return list(islice(_stream(), count))


def _stream() -> Iterator[UserEvent]:
    for event in synthetic.events(_STREAM):
        yield msgspec.structs.replace(event, features={name: event.features[name] for name in _FEATURES})


class _Said(msgspec.Struct):
    """What is looked at of a score."""

    event_timestamp: int
    model_version: str
    source_partition: int


_decode = msgspec.json.Decoder(_Said).decode


class Traffic:
    """Produces events and reads their scores, in one thread."""

    def __init__(self, config: Config, rate: float) -> None:
        """Reads the scores topic from its beginning; `rate` is the steady load, events/s."""
        self.sent = self.received = 0
        #: By partition of the input, the version of the newest score that was looked at; when it first said so.
        self.version: dict[int, str] = {}
        self.since_s: dict[int, float] = {}
        #: Every score goes in here, if it is a list.
        self.watched: list[Seen] | None = None
        self._rate = rate
        self._topic = config.topic("events")
        settings = properties.common(config)
        self._refused: KafkaError | None = None
        self._producer = clients.producer(
            {
                **settings,
                "linger.ms": 1,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "queue.buffering.max.messages": 2_000_000,
                "on_delivery": self._delivered,
                "delivery.report.only.error": True,
            }
        )
        self._consumer = clients.consumer(
            {
                **settings,
                "group.id": f"bench-{uuid.uuid4()}",  # required by the client; nothing is committed to it
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "queued.max.messages.kbytes": 524_288,
                "fetch.queue.backoff.ms": 5,
            }
        )
        scores = config.topic("scores")
        partitions = self._consumer.list_topics(scores, timeout=15).topics[scores].partitions
        self._consumer.assign([TopicPartition(scores, p, OFFSET_BEGINNING) for p in partitions])
        self._events = self._encoded()

    def close(self) -> None:
        """Lets go of the clients."""
        self._producer.purge()
        self._producer.close()
        self._consumer.close()

    def steady(self, until: Callable[[], bool], timeout_s: float, what: str) -> list[float]:
        """Produces at the steady rate until something is so, then waits for all scores; milliseconds of each event.

        Raises:
            Unmeasured: it was not so in time.
        """
        began, before, took = time.monotonic(), self.sent, list[float]()
        while not until():
            due = before + int((time.monotonic() - began) * self._rate)
            for key, value in islice(self._events, max(due - self.sent, 0)):
                self._produce(key, value)
            self._producer.poll(0)
            took += self._look()
            if time.monotonic() - began > timeout_s:
                raise Unmeasured(f"{what}: not within {timeout_s:g} s")
        self.drain(took)
        return took

    def steady_for(self, seconds: float) -> Latencies:
        """The same for so long."""
        end = time.monotonic() + seconds
        return latencies(self.steady(lambda: time.monotonic() >= end, 2 * seconds + _STALLED_S, "steady load"))

    def burst(self, count: int) -> float:
        """Produces so many events as fast as they go; events/s once they are all in the topic."""
        return self.burst_of(list(islice(self._events, count)))

    def burst_of(self, events: Iterable[tuple[bytes, bytes]]) -> float:
        """The same with events of the caller's, as keys and values."""
        for key, value in events:
            self._produce(key, value)
        if left := self._producer.flush(_FLUSH_S):
            raise KafkaRefused(f"{self._topic}: {left} events of a burst were not taken within {_FLUSH_S:g} s")
        return per_second(self.drain([]))

    def drain(self, took: list[float]) -> Arrivals:
        """Waits until every event that was sent has its score; appends what they took.

        Raises:
            Unmeasured: nothing came for long.
        """
        arrivals, heard = Arrivals([], []), time.monotonic()
        while self.received < self.sent:
            before = self.received
            took += self._look()
            if self.received > before:
                heard = time.monotonic()
                arrivals.at_s.append(heard)
                arrivals.counts.append(self.received - before)
            elif time.monotonic() - heard > _STALLED_S:
                raise Unmeasured(f"{self.sent - self.received} events have no score after {_STALLED_S:g} s")
        return arrivals

    def _look(self) -> list[float]:
        """Takes in scores; milliseconds that each one's event took."""
        if self._refused is not None:
            raise KafkaRefused(f"{self._topic}: the broker did not take an event: {self._refused}")
        messages = self._consumer.consume(_READ_AT_ONCE, _LOOK_S)
        now_s = time.time()
        took = []
        for message in messages:
            if (error := message.error()) is not None:
                raise KafkaRefused(f"{message.topic()}: cannot be read: {error}")
            said = _decode(message.value() or b"")
            took.append(now_s * 1000 - said.event_timestamp)
            if self.watched is not None:
                self.watched.append(Seen(said.source_partition, now_s, took[-1]))
            if self.version.get(said.source_partition) != said.model_version:
                self.version[said.source_partition] = said.model_version
                self.since_s[said.source_partition] = now_s
        self.received += len(messages)
        return took

    def _encoded(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values; the timestamp is taken when the event is drawn."""
        for event in _stream():
            now = msgspec.structs.replace(event, timestamp=time.time_ns() // 1_000_000)
            yield now.user_id.encode(), msgspec.json.encode(now)

    def _produce(self, key: bytes, value: bytes) -> None:
        self._producer.produce(self._topic, value, key)
        self.sent += 1

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        self._refused = self._refused or error

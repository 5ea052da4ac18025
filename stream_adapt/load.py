"""Load: a data set's events flow into the input topic at a pace, as if they happened now.

For trying things out on a broker of one's own: it is a producer like any other, and knows nothing of members. The
events are real ones of the data set in its order; only the time is now, and each pass gives them ids of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import msgspec
import structlog
from confluent_kafka import KafkaError, Message, Producer

from stream_adapt.config import Config
from stream_adapt.datasets import Source, open_source
from stream_adapt.errors import DataError, KafkaRefused
from stream_adapt.formats import Formats
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.errors import describe
from stream_adapt.record import UserEvent
from stream_adapt.shutdown import Shutdown

log = structlog.get_logger(__name__)

#: Between two looks at what is due.
_TURN_S = 0.02
#: After the last event: the broker takes what is left.
_FLUSH_S = 30.0


@dataclass(frozen=True)
class Load:
    """What flows, and how fast."""

    source: str = "movielens-100k"
    mapping: Path | None = None
    per_second: float = 200.0
    seconds: float | None = None
    events: int | None = None
    skip: float = 0.0  # share of the data set that the first pass leaves out


class Loaded(msgspec.Struct):
    """What was written."""

    topic: str
    events: int
    seconds: float


def run_load(config: Config, load: Load, shutdown: Shutdown) -> Loaded:
    """Writes events until the seconds or the events are over, or a shutdown is asked for.

    Raises:
        ConfigError, DataError: the source cannot be opened, or is empty; or the format's extra is not installed.
        KafkaRefused: the broker does not take an event.
        RegistryRefused, RegistryUnreachable: the schema registry does not take, or does not have, the event's schema.
    """
    source = open_source(load.source, mapping=load.mapping)
    stream = islice(endless(source, load.skip), load.events)
    with _Feed(config) as feed:
        log.info("load begins", topic=feed.topic, source=source.name, per_second=load.per_second)
        started = time.monotonic()
        while not shutdown.asked and not feed.over:
            elapsed_s = time.monotonic() - started
            if load.seconds is not None and elapsed_s >= load.seconds:
                break
            feed.step(stream, 1 + int(elapsed_s * load.per_second))
            time.sleep(_TURN_S)
    return Loaded(feed.topic, feed.produced, round(time.monotonic() - started, 3))


def endless(
    source: Source, skip: float, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
) -> Iterator[UserEvent]:
    """The source's events over and over, as of now; the first pass begins after a share `skip` of them.

    Raises:
        DataError: there are none.
    """
    size = source.count if source.count is not None else sum(1 for _ in source.events())
    run = f"{now_ms():x}"
    for number in count():
        event = None
        for event in islice(source.events(), int(size * skip) if number == 0 else 0, None):
            event_id = f"{run}-{number}-{event.event_id}"
            yield msgspec.structs.replace(event, event_id=event_id, timestamp=now_ms())
        if event is None:
            raise DataError(f"{source.name}: no events to write after the first {skip:.0%} of {size}")


class _Feed:
    """The producer; on leaving, all that was produced is in the topic."""

    def __init__(self, config: Config) -> None:
        self.topic = config.topic_names.events
        self.produced = 0
        self.over = False
        self._refused: KafkaError | None = None
        codec = Formats.of(config).input
        self._encode: Callable[[UserEvent], bytes] = codec.event if codec else msgspec.json.Encoder().encode
        self._producer: Producer = clients.producer(
            {
                **properties.common(config),
                "enable.idempotence": True,
                "linger.ms": 5,
                "partitioner": "murmur2_random",  # the Java client's: a user's events lie where others would put them
                "on_delivery": self._delivered,
                "delivery.report.only.error": True,
            }
        )

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        left = self._producer.flush(_FLUSH_S)
        if kind is None:
            self._check()
            if left:
                raise KafkaRefused(f"{self.topic}: {left} events were not taken within {_FLUSH_S:.0f} s")

    def step(self, stream: Iterator[UserEvent], due: int) -> None:
        """Produces up to the `due`-th event.

        Raises:
            KafkaRefused: the broker did not take an event.
        """
        for event in islice(stream, due - self.produced):
            self._produce(event)
            self.produced += 1
        self.over = self.produced < due
        self._producer.poll(0)
        self._check()

    def _produce(self, event: UserEvent) -> None:
        while True:
            try:
                self._producer.produce(self.topic, self._encode(event), event.user_id.encode())
            except BufferError:  # the queue is full: wait until the broker took some
                self._producer.poll(0.1)
            else:
                return

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        self._refused = self._refused or error

    def _check(self) -> None:
        if self._refused is not None:
            raise KafkaRefused(f"{self.topic}: the broker did not take an event: {describe(self._refused)}")

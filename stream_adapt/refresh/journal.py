"""The controller's state in Kafka, and what people ask of it.

The state is the newest record with key "state" in `<app>.refresh`. It is written under the transactional.id
`<app>.refresh`: whoever opens the journal fences whoever had it, so that of two who think they lead one can write.
What a transition leads to, an announcement or an alarm, goes into the same transaction: it is said once, by the one
who may say it, or not at all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec
import structlog
from confluent_kafka import Message

from stream_adapt.announcements import Announcement
from stream_adapt.config import Config
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.producer import OutputProducer, ProducerError
from stream_adapt.kafka.reading import TopicReader
from stream_adapt.record import NO_SOURCE, Outputs
from stream_adapt.refresh.record import REQUEST_KEY, STATE_KEY, RefreshState, Request

log = structlog.get_logger(__name__)

_PARTITION = 0
_FLUSH_S = 30.0


class Deposed(Exception):
    """What was to be written was not: another one leads, or the producer is of no use. Open the journal again."""


class Tail:
    """Reads the refresh topic: everything there is, then what is added. For anybody; nothing is fenced."""

    def __init__(self, config: Config) -> None:
        """Reads up to the topic's end.

        Raises:
            KafkaRefused: there is no such topic, or no broker answers.
        """
        self.state: RefreshState | None = None
        self.request: Request | None = None
        self._reader = TopicReader(properties.common(config), config.topic("refresh"))
        ends = self._reader.ends(self._reader.partitions())
        for message in self._reader.records(ends):
            self._take(message)
        self._reader.assign({partition: end for partition, (_, end) in ends.items()})

    def poll(self, timeout_s: float = 0.0) -> None:
        """Takes in what was added."""
        for message in self._reader.poll(timeout_s):
            if message.error() is None:
                self._take(message)

    def close(self) -> None:
        """Lets go of the client."""
        self._reader.__exit__()

    def _take(self, message: Message) -> None:
        key, value = message.key(), message.value()
        where = f"{self._reader.topic}@{message.offset()}"
        if key == STATE_KEY:
            self.state = None if value is None else RefreshState.decode(value, where)
        elif key == REQUEST_KEY and value is not None:
            try:
                self.request = msgspec.json.decode(value, type=Request)
            except msgspec.MsgspecError as error:
                log.warning("not a request for a refresh; left out", where=where, error=str(error))


class Journal:
    """The leader's: reads the state once, and writes it."""

    def __init__(self, config: Config) -> None:
        """Fences whoever had it, then reads the newest state.

        Raises:
            Deposed: another one opened it at the same time.
            KafkaRefused: a topic is missing, or no broker answers.
        """
        self._config = config
        self._topic = config.topic("refresh")
        settings = properties.producer(config)
        self.tail = Tail(config)  # before the producer: it says at once when the topic is missing
        try:
            self._producer = OutputProducer(
                {**settings, "transaction.timeout.ms": config.kafka.transaction_timeout_ms},
                transactional_id=f"{config.app.name}.refresh",
                socket_timeout_s=float(settings["socket.timeout.ms"]) / 1000,
                deadline_s=2 * config.kafka.transaction_timeout_ms / 1000,
            )
        except ProducerError as error:
            self.tail.close()
            raise Deposed(str(error)) from error
        # Whoever had it may have written between the two.
        self.tail.close()
        self.tail = Tail(config)

    def write(
        self, state: RefreshState, announcement: Announcement | None = None, alarms: Sequence[bytes] = ()
    ) -> None:
        """Makes a state the newest, in one transaction with what it leads to.

        Raises:
            Deposed: nothing of it is visible, or another one leads and knows whether it is.
        """
        blocks = [self._block(self._topic, STATE_KEY, state.encode())]
        if announcement is not None:
            key, value = announcement.version.encode(), msgspec.json.encode(announcement)
            blocks.append(self._block(self._config.topic("models"), key, value))
        blocks += [self._block(self._config.topic("alarms"), None, alarm) for alarm in alarms]
        try:
            self._producer.begin()
            for block in blocks:
                self._producer.send(block)
            self._producer.commit()
        except ProducerError as error:
            raise Deposed(str(error)) from error

    def poll(self) -> Request | None:
        """The newest request there is; serves the producer's callbacks."""
        try:
            self._producer.poll()
        except ProducerError as error:
            raise Deposed(str(error)) from error
        self.tail.poll()
        return self.tail.request

    def close(self) -> None:
        """Lets go of the clients."""
        self._producer.close()
        self.tail.close()

    def _block(self, topic: str, key: bytes | None, value: bytes) -> Outputs:
        return Outputs(topic, [key], [value], None, [_PARTITION], [NO_SOURCE], [_PARTITION])


def ask(config: Config, detail: str = "") -> Request:
    """Asks whoever leads, now or next, for a refresh.

    Raises:
        KafkaRefused: the request was not written.
    """
    request = Request(uuid.uuid4().hex, time.time_ns() // 1_000_000, detail)
    refused: list[str] = []
    producer = clients.producer({**properties.common(config), "enable.idempotence": True})
    topic = config.topic("refresh")
    producer.produce(
        topic,
        msgspec.json.encode(request),
        REQUEST_KEY,
        _PARTITION,
        on_delivery=lambda error, _message: refused.append(error.str()) if error else None,
    )
    if producer.flush(_FLUSH_S) or refused:
        raise KafkaRefused(
            f"{topic}: a refresh could not be asked for: {refused[0] if refused else 'no answer'}. To do: "
            "`stream-adapt topics create -c FILE`, or check kafka.bootstrap_servers and the principal's rights"
        )
    return request

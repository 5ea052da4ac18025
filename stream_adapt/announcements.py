"""The models topic `<app>.models`: which model is served, and since when; the newest record is the champion's.

Compacted, one partition, keyed by version. Whoever decides writes it, with `announce`; members follow it with
`Announcements`, and so does whoever wants to know what is served.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import msgspec
import structlog
from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from stream_adapt.config import Config
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.changelog import CONSUMERS_OWN, log_offsets
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.producer import OutputProducer, ProducerError
from stream_adapt.models import RowMode
from stream_adapt.record import NO_SOURCE, Outputs

log = structlog.get_logger(__name__)

_PARTITION = 0
_READ_S = 0.2
#: The newest record is there, or the brokers are not.
_READ_DEADLINE_S = 30.0
_ADMIN_TIMEOUT_S = 15.0
#: Records handed out together.
_MOST_RECORDS = 1_000


class Announcement(msgspec.Struct, frozen=True):
    """A version takes the place of another one."""

    version: str
    sha256: str  # of its model.safetensors
    previous: str | None  # version that was served before
    rows: RowMode  # what becomes of the rows
    reason: str
    decided_ms: int
    figures: dict[str, float] = {}  # what it was decided by
    decided_by: str = ""  # a name, or the part of the program


def announce(config: Config, announcement: Announcement) -> None:
    """Makes a version the champion. On return every reader of committed records sees it.

    Nothing is checked here: `models.check_successor` does, and every member before it serves the version.

    Raises:
        KafkaRefused: it was not written; says what to do.
    """
    topic, transactional_id = config.topic("models"), f"{config.app.name}.models"
    settings = properties.producer(config)
    _require(clients.admin(properties.common(config)), topic)
    value = msgspec.json.encode(announcement)
    one = Outputs(topic, [announcement.version.encode()], [value], None, [_PARTITION], [NO_SOURCE], [_PARTITION])
    try:
        producer = OutputProducer(
            {**settings, "transaction.timeout.ms": config.kafka.transaction_timeout_ms},
            transactional_id=transactional_id,
            socket_timeout_s=float(settings["socket.timeout.ms"]) / 1000,
            deadline_s=2 * config.kafka.transaction_timeout_ms / 1000,
        )
        with closing(producer):
            producer.begin()
            producer.send(one)
            producer.commit()
    except ProducerError as error:
        raise KafkaRefused(
            f"{topic}: {announcement.version} may not be announced: {error}. To do: look with `stream-adapt models "
            f"list`; `stream-adapt topics create`; allow this principal Write on the topic and on transactional id "
            f"{transactional_id}"
        ) from error
    log.info("announced", topic=topic, model=announcement.version, rows=announcement.rows, reason=announcement.reason)


class Announcements:
    """Reads the models topic, joining no group. For one thread."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads from the beginning; nothing is waited for."""
        self.topic = config.topic("models")
        self._settings = properties.changelog_reader(config)
        self._clock = clock
        self._at: dict[str, int] = {}  # by version: offset of its newest record
        self._by_offset: dict[int, Announcement] = {}  # ascending
        self._position = 0
        self._repeated = clients.Repeated(clock)
        self._consumer = clients.consumer(self._settings)
        self._consumer.assign([TopicPartition(self.topic, _PARTITION, OFFSET_BEGINNING)])

    def newest(self) -> Announcement | None:
        """The champion's announcement, as far as the topic has come in; None if there is none. Waits for nothing."""
        self._read(0.0)
        return next(reversed(self._by_offset.values()), None)

    def history(self) -> list[Announcement]:
        """What has come in so far, oldest first; of what was said of a version the last."""
        return list(self._by_offset.values())

    def position(self, version: str | None) -> int:
        """Place of a version in the order of announcements; −1 if it was never announced, as far as is known."""
        return self._at.get(version or "", -1)

    def since(self, version: str) -> list[Announcement]:
        """What was announced after a version, oldest first; everything if it was never announced."""
        at = self.position(version)
        return [one for offset, one in self._by_offset.items() if offset > at]

    def read_to_end(self, deadline_s: float = _READ_DEADLINE_S) -> None:
        """Takes in everything that is announced now.

        Raises:
            KafkaRefused: there is no such topic, or its end was not reached within the deadline.
        """
        admin = clients.reached_admin({k: self._settings[k] for k in self._settings if not k.startswith(CONSUMERS_OWN)})
        _require(admin, self.topic)
        end = log_offsets(admin, [TopicPartition(self.topic, _PARTITION)], "latest", deadline_s)[_PARTITION]
        deadline = self._clock() + deadline_s
        while self._position < end:
            self._read(_READ_S)
            if self._clock() > deadline:
                raise KafkaRefused(
                    f"{self.topic}: read up to offset {self._position} of {end} within {deadline_s:.0f} s; is a "
                    "transaction open there, or its leader away?"
                )

    def close(self) -> None:
        """Lets go of the client."""
        self._consumer.close()

    def _read(self, timeout_s: float) -> None:
        try:
            messages = self._consumer.consume(_MOST_RECORDS, timeout_s)
        except KafkaException as error:
            found = kafka_error(error)
            raise KafkaRefused(f"{self.topic}: {found and describe(found)}") from error
        for message in messages:
            told, offset = message.error(), message.offset() or 0
            if told is None:
                self._take(offset, message.value())
                self._position = offset + 1
            elif told.code() == KafkaError._PARTITION_EOF:
                self._position = max(self._position, offset)
            elif (repeated := self._repeated.due(told.name())) is not None:
                log.warning("models topic", topic=self.topic, error=describe(told), repeated=repeated)

    def _take(self, offset: int, value: str | bytes | None) -> None:
        if value is None:
            return
        try:
            one = _decode(value)
        except msgspec.DecodeError as error:
            log.warning("not an announcement; left out", topic=self.topic, offset=offset, error=str(error))
            return
        self._by_offset.pop(self._at.get(one.version, -1), None)
        self._at[one.version] = offset
        self._by_offset[offset] = one


def _require(admin: AdminClient, topic: str) -> None:
    """Makes sure that there is such a topic: clients would look for it for long.

    Raises:
        KafkaRefused: it is missing or may not be described, or no broker answers.
    """
    try:
        admin.describe_topics(TopicCollection([topic]), request_timeout=_ADMIN_TIMEOUT_S)[topic].result()
    except KafkaException as error:
        found = kafka_error(error)
        raise KafkaRefused(
            f"{topic}: {found and describe(found)}. To do: `stream-adapt topics create -c FILE`, or check "
            "kafka.bootstrap_servers and the principal's rights"
        ) from error
    finally:
        clients.tell(admin)


_decode = msgspec.json.Decoder(Announcement).decode


def row_mode(announced: list[Announcement]) -> RowMode:
    """What becomes of rows that were made before all of these: items start anew if any of them says so."""
    return "restart_items" if any(one.rows == "restart_items" for one in announced) else "carry"

"""Every Kafka client of a member and of the commands, made in one place: their lines go to the log like ours.

librdkafka writes to stderr in a form of its own unless it is given a logger; then its lines wait in a queue until the
client is polled. An outage makes it repeat one line some twenty times a second: what is repeated is counted instead.
A client that is given a `Gate` (access.py) also remembers why brokers turn it away.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import Consumer, KafkaError, Producer
from confluent_kafka.admin import AdminClient

from stream_adapt.kafka.access import Gate, reach
from stream_adapt.kafka.connections import Connections, kind_of
from stream_adapt.kafka.errors import describe

log = structlog.get_logger(__name__)

Settings = Mapping[str, Any]

#: Between two lines that say the same.
REPEAT_S = 10.0


#: What all clients of this process say of their connections.
CONNECTIONS = Connections()


def consumer(settings: Settings, gate: Gate | None = None) -> Consumer:
    """A consumer; its lines come out when it polls."""
    return Consumer(_heard(settings, gate), logger=LIBRDKAFKA)


def producer(settings: Settings, gate: Gate | None = None) -> Producer:
    """A producer; its lines come out when it polls or flushes."""
    return Producer(_heard(settings, gate), logger=LIBRDKAFKA)


def admin(settings: Settings, gate: Gate | None = None) -> AdminClient:
    """An admin client. It answers by futures and never polls by itself: `tell` after a call."""
    return AdminClient(_heard(settings, gate), logger=LIBRDKAFKA)


def reached_admin(settings: Settings, timeout_s: float = 15.0) -> AdminClient:
    """An admin client that a broker has answered.

    Raises:
        KafkaRefused: none did, or they turn us away; says why.
    """
    gate = Gate(settings)
    made = admin(settings, gate)

    def ask(seconds: float) -> None:
        made.describe_cluster(request_timeout=seconds).result()

    try:
        reach(ask, made, gate, timeout_s)
    finally:
        tell(made)
    return made


def tell(client: AdminClient) -> None:
    """Lets an admin client write the lines that it has kept back."""
    client.poll(0)


class Repeated:
    """Which of the lines about one thing are shown: the first, then one in `REPEAT_S`, with a count of the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown_s: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def due(self, thing: str) -> int | None:
        """Lines held back since the last one that was shown; None: hold this one back, too."""
        now = self._clock()
        if thing in self._shown_s and now - self._shown_s[thing] < REPEAT_S:
            self._held_back[thing] = self._held_back.get(thing, 0) + 1
            return None
        self._shown_s[thing] = now
        return self._held_back.pop(thing, 0)


_OTHER_ERRORS = Repeated()


def _heard(settings: Settings, gate: Gate | None = None) -> dict[str, Any]:
    """Settings with which errors are counted, and told to whoever else wants to know."""
    also = gate.noted if gate is not None else settings.get("error_cb")

    def heard(error: KafkaError) -> None:
        _failed(error)
        if also is not None:
            also(error)

    return {**settings, "error_cb": heard}


def _failed(error: KafkaError) -> None:
    """Counts an error that a client calls back. Lost connections are in its own lines; others are told here."""
    CONNECTIONS.failed(error)
    if kind_of(error) == "other":
        repeated = _OTHER_ERRORS.due(error.name())
        if repeated is not None:
            log.warning("client error", error=describe(error), repeated=repeated)


#: `FAIL [client] [thrd:…]: broker: reason`; ERROR is the same of clients that call no errors back.
_CONNECTION = re.compile(r"(?:FAIL|ERROR) \[(?P<client>[^\]]*)\] \[thrd:[^\]]*\]: (?P<said>.*)", re.DOTALL)
_BROKER = re.compile(r"(?:[^ ]*: )?(?P<broker>[^ ]+:\d+(?:/[^ :]+)?): (?P<reason>.*)", re.DOTALL)


class ConnectionErrors(logging.Filter):
    """Turns librdkafka's lines about connections into warnings with broker and reason, few of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._repeated = Repeated(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line goes on as it is."""
        found = _CONNECTION.match(record.getMessage())
        if found is None:
            return True
        repeated = self._repeated.due(found["client"])
        if repeated is not None:
            at = _BROKER.match(found["said"])
            told = {"broker": at["broker"], "reason": at["reason"]} if at else {"reason": found["said"]}
            log.warning("broker connection", client=found["client"], **told, repeated=repeated)
        return False


#: Where librdkafka's lines go.
LIBRDKAFKA = logging.getLogger("librdkafka")
LIBRDKAFKA.addFilter(ConnectionErrors())

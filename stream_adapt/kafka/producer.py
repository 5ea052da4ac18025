"""The producer: one transaction at a time, every call within a deadline, every error mapped.

What can come out of a call is one of five exceptions; `commit.py` says what each leads to:

    ProducerError
    ├── Abort          the transaction cannot be committed; abort it and go on
    │   └── Undeliverable   the same, because the broker refuses these records for good
    ├── Lost           this producer is of no use any more, and whether its transaction committed is not known
    │   └── FencedOff       the same, because another producer took the transactional.id
    └── Forbidden      the principal may not do this, and trying again will not help
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import repeat
from typing import Any

import msgspec
import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

from stream_adapt.kafka import clients
from stream_adapt.kafka.access import Gate
from stream_adapt.kafka.connections import STATISTICS_MS
from stream_adapt.kafka.errors import UNDELIVERABLE_CODES, Consequence, consequence, describe, kafka_error
from stream_adapt.kafka.permissions import denied
from stream_adapt.record import Outputs, Source

log = structlog.get_logger(__name__)

#: One try of a call that may block; between tries signals are handled, and two within one try are one.
_TRY_S = 1.0
#: A call that takes so many deadlines does not come back by itself.
_OVERDUE = 2
#: Share of socket.timeout.ms after which a commit counts as having been sent more than once.
_SLOW_SHARE = 0.8
#: In place of a partition: the partitioner decides, by the key.
_BY_KEY = -1
_INIT = "init_transactions"
#: How long `produce` waits for room when the local queue is full, before it serves callbacks again.
_QUEUE_FULL_WAIT_S = 0.1


#: Watches a call of that name, which may take so many seconds.
Watch = Callable[[str, float], AbstractContextManager[None]]


def _unwatched(_call: str, _seconds: float) -> AbstractContextManager[None]:
    return nullcontext()


class ProducerError(Exception):
    """A call did not do what it should; see the module's docstring."""


class Abort(ProducerError):
    """The transaction must be aborted."""


class Undeliverable(Abort):
    """The broker refuses records of this transaction for good; `sources` names them where it is known."""

    def __init__(self, reason: str, sources: frozenset[Source]) -> None:
        super().__init__(reason)
        self.sources = sources


class Lost(ProducerError):
    """The producer is dead; the outcome of its transaction must be looked up."""


class FencedOff(Lost):
    """Another producer took the transactional.id."""


class Forbidden(ProducerError):
    """A permission is missing; says which, and how it is given."""


class CoordinatorWatch:
    """Whether a transactional request may have been sent twice since the last look (reliability rule 8).

    librdkafka has no KIP-890: an EndTxn that was delayed and sent again can hit the next transaction. A request that
    was left without an answer may still be under way: time-outs and disconnects of the transaction coordinator's
    connection in the client's statistics tell. Retries alone do not: Kafka answers CONCURRENT_TRANSACTIONS while it
    writes the markers of the transaction before, about once in a hundred on a calm broker, and what was answered is
    not under way.
    """

    class _Broker(msgspec.Struct):
        req_timeouts: int = 0
        disconnects: int = 0

    class _Statistics(msgspec.Struct):
        brokers: dict[str, Any] = {}

    def __init__(self) -> None:
        self._total = 0
        self._acknowledged: int | None = None
        self._statistics = msgspec.json.Decoder(self._Statistics)

    def read(self, statistics: str) -> None:
        """Takes in one report of the client."""
        brokers = self._statistics.decode(statistics).brokers
        found = [msgspec.convert(b, self._Broker) for name, b in brokers.items() if name.startswith("TxnCoordinator")]
        self._total = sum(b.req_timeouts + b.disconnects for b in found)
        if self._acknowledged is None:
            self._acknowledged = self._total

    def settle(self) -> None:
        """The producer is made: what was said of looking for a coordinator is no sign of a request sent twice."""
        if self._acknowledged is not None:
            self._acknowledged = self._total

    @property
    def moved(self) -> bool:
        """Whether a request was left without an answer since the producer was built."""
        return self._acknowledged is not None and self._total > self._acknowledged


class OutputProducer:
    """A producer of output records; transactional when it is given a `transactional_id`.

    Failed deliveries are collected by one callback that is called for errors only, so that successful records cost
    nothing. In `careful` mode every record has its own callback, and a failure names its source.
    """

    def __init__(
        self,
        properties: Mapping[str, str | int | float | bool],
        *,
        transactional_id: str | None,
        socket_timeout_s: float,
        deadline_s: float,
        client: Callable[[dict[str, Any]], Producer] = clients.producer,
        watch: Watch = _unwatched,
    ) -> None:
        self.careful = False
        self.suspect = False
        self._closed = False
        self._waits = False  # for an answer, between two tries of a call
        self._transactional_id = transactional_id
        self._slow_s = socket_timeout_s * _SLOW_SHARE
        self._deadline_s = deadline_s
        self._failures: list[tuple[KafkaError, Source | None, str | None]] = []
        self._watch = watch
        self._gate = Gate(properties)
        self._topics: set[str] = set()  # that were written to
        self._coordinator = CoordinatorWatch()
        settings = {
            # With all brokers out of reach librdkafka would begin anew from the bootstrap list and forget the brokers
            # that it knows; a group coordinator among them is then waited for in vain, without regard to the time-out
            # of send_offsets_to_transaction (its issues 5456 and 5511). This producer is replaced when it is lost, and
            # that begins from the bootstrap list, too.
            "metadata.recovery.strategy": "none",
            **properties,
            "enable.idempotence": True,
            "delivery.report.only.error": True,
            "on_delivery": self._failed,
            "error_cb": self._gate.noted,
            "stats_cb": self._told,
            "statistics.interval.ms": STATISTICS_MS,
        }
        if transactional_id is not None:
            settings["transactional.id"] = transactional_id
        self._producer = client(settings)
        if transactional_id is not None:
            self._call(_INIT, self._producer.init_transactions)
            self._coordinator.settle()

    @property
    def needs_replacement(self) -> bool:
        """Whether the next transaction should begin on a new producer (rule 8)."""
        return self._transactional_id is not None and (self.suspect or self._coordinator.moved)

    def begin(self) -> None:
        """Begins a transaction."""
        self._failures.clear()
        self._call("begin_transaction", self._producer.begin_transaction)

    def send(self, outputs: Outputs) -> None:
        """Hands records to the client; delivery is waited for by `flush` or `commit`."""
        self._topics.add(outputs.topic)
        if self.careful or outputs.headers is not None:
            return self._send_with_care(outputs)
        produce, topic = self._producer.produce, outputs.topic
        destinations = outputs.destinations or repeat(_BY_KEY, len(outputs))
        for i, (key, value, to) in enumerate(zip(outputs.keys, outputs.values, destinations, strict=True)):
            try:
                produce(topic, value, key, to)
            except (BufferError, KafkaException):
                self._produce(topic, value, key, (outputs.partitions[i], outputs.offsets[i]), partition=to)
        return None

    def _send_with_care(self, outputs: Outputs) -> None:
        """The same with headers, and with a callback for every record that names its source if it fails."""
        for i, (key, value) in enumerate(zip(outputs.keys, outputs.values, strict=True)):
            source = (outputs.partitions[i], outputs.offsets[i])
            extra: dict[str, Any] = {"on_delivery": partial(self._failed, source=source)}
            if outputs.headers is not None:
                extra["headers"] = outputs.headers[i]
            if outputs.destinations is not None:
                extra["partition"] = outputs.destinations[i]
            self._produce(outputs.topic, value, key, source, **extra)

    def _produce(self, topic: str, value: bytes | None, key: bytes | None, source: Source, **extra: Any) -> None:
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                self._producer.produce(topic, value, key, **extra)
                return
            except BufferError:  # the local queue is full: let deliveries make room
                if time.monotonic() > deadline:
                    raise Lost(
                        f"the local queue stayed full for {self._deadline_s:.0f} s: no broker takes records"
                    ) from None
                self._call("poll", partial(self._producer.poll, _QUEUE_FULL_WAIT_S), blocks=False)
            except KafkaException as error:
                self._not_taken(error, source)

    def send_offsets(self, next_offsets: list[TopicPartition], group_metadata: bytes) -> None:
        """Adds the consumed offsets to the transaction."""
        self._call(
            "send_offsets_to_transaction",
            partial(self._producer.send_offsets_to_transaction, next_offsets, group_metadata),
        )

    def commit(self) -> None:
        """Waits for every delivery, then commits; on return the transaction is visible."""
        started = time.monotonic()
        try:
            self._call("commit_transaction", self._producer.commit_transaction)
        finally:
            self.suspect = self.suspect or time.monotonic() - started > self._slow_s

    def abort(self) -> None:
        """Aborts; nothing of the transaction is ever visible to read_committed."""
        started = time.monotonic()
        try:
            self._call("abort_transaction", self._producer.abort_transaction)
        finally:
            self.suspect = self.suspect or time.monotonic() - started > self._slow_s

    def flush(self) -> None:
        """Waits for every delivery outside a transaction.

        Raises:
            Undeliverable, Abort: some records were not written.
        """
        deadline = time.monotonic() + self._deadline_s
        while self._call("flush", partial(self._producer.flush, 1.0), blocks=False) and time.monotonic() < deadline:
            pass
        if len(self._producer):
            raise Lost(f"{len(self._producer)} records were not delivered within {self._deadline_s:.0f} s")
        self._raise_failures()

    def poll(self) -> None:
        """Serves callbacks: statistics and failed deliveries."""
        self._call("poll", partial(self._producer.poll, 0), blocks=False)

    def close(self) -> None:
        """Lets go of the client. A transaction left open is ended by the next producer of the same id."""
        self._closed = True
        try:
            self._producer.purge()
            self._producer.flush(0)
        except (KafkaException, SystemError) as raised:
            if kafka_error(raised) is None:
                raise
            # A producer that failed for good says so to the end; there is nothing left to lose.

    def _call(self, name: str, call: Callable[..., Any], *, blocks: bool = True) -> Any:
        deadline = time.monotonic() + self._deadline_s
        again = False
        while True:
            try:
                self._waits = again
                if again:
                    # What goes wrong meanwhile is called back, and shows on /readyz.
                    self._producer.poll(0)
                again = True
                with self._watch(name, _OVERDUE * self._deadline_s):
                    return call(_TRY_S) if blocks and name != "begin_transaction" else call()
            except (KafkaException, SystemError) as raised:
                error = kafka_error(raised)
                if error is None:
                    raise
                self._decide(name, error, deadline, raised)

    def _decide(self, name: str, error: KafkaError, deadline: float, raised: BaseException) -> None:
        """Returns to have the call tried again; raises otherwise."""
        what = consequence(error)
        message = f"{name}: {describe(error)}{self._gate.because}"
        if what is Consequence.ABORT or name == _INIT:
            self._raise_if_denied(error, None, raised)
        if what is Consequence.FENCED:
            raise FencedOff(message) from raised
        if what is Consequence.ABORT:
            self._raise_failures()
            raise Abort(message) from raised
        if what is Consequence.RETRY and time.monotonic() < deadline:
            return
        raise Lost(message) from raised

    def _told(self, statistics: str) -> None:
        self._coordinator.read(statistics)
        # Else it may be without any connection, because it needs none.
        if self._waits:
            clients.CONNECTIONS.told(statistics)

    def _failed(self, error: KafkaError | None, message: Message, source: Source | None = None) -> None:
        if error is None or self._closed:
            return
        if not self._failures:  # the others of a transaction follow from the first
            log.warning("delivery failed", topic=message.topic(), source=source, error=describe(error))
        self._failures.append((error, source, message.topic()))

    def _not_taken(self, error: KafkaException, source: Source) -> None:
        found = kafka_error(error)
        if found is not None and found.code() in UNDELIVERABLE_CODES:
            raise Undeliverable(describe(found), frozenset({source})) from error
        if found is not None:
            self._decide("produce", found, 0.0, error)
        raise error

    def _raise_failures(self) -> None:
        for error, _, topic in self._failures:
            self._raise_if_denied(error, topic)
        refused = [(error, source) for error, source, _ in self._failures if error.code() in UNDELIVERABLE_CODES]
        if refused:
            sources = frozenset(source for _, source in refused if source is not None)
            raise Undeliverable(describe(refused[0][0]), sources)
        if self._failures:
            raise Abort(describe(self._failures[0][0]))

    def _raise_if_denied(self, error: KafkaError, topic: str | None, raised: BaseException | None = None) -> None:
        read = error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED
        operation = AclOperation.READ if read else AclOperation.WRITE
        to_do = denied(error, operation, topic=topic or self._topics, transactional_id=self._transactional_id)
        if to_do is not None:
            raise Forbidden(f"{describe(error)}. To do: {to_do}") from raised

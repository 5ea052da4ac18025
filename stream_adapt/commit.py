"""Commit: the one place where work becomes visible, and the one that decides what an error means.

Exactly once, in the docstring of `ExactlyOnce.commit` and again at each step of its body. The rules are those of
KIP-98 and KIP-447, with one producer per process and the group's generation as the fence.

What a commit can end in:

    Committed      all of it is visible: outputs and offsets
    RolledBack     none of it is, and none of it will be: put the rows back, rewind, go on
    Fenced         (raised) another instance uses our transactional.id
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Protocol

import structlog
from confluent_kafka import KafkaException, TopicPartition

from stream_adapt.errors import Fenced, KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.consumer import Positions, generation
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.producer import (
    Abort,
    FencedOff,
    Forbidden,
    Lost,
    OutputProducer,
    ProducerError,
    Undeliverable,
)
from stream_adapt.record import NO_SOURCE, Outputs, Source

log = structlog.get_logger(__name__)


class Outcome(Enum):
    """How a commit ended."""

    COMMITTED = "committed"
    ABORTED = "aborted"  # we aborted, or never committed
    RECOVERED = "recovered"  # the producer was lost; the broker says that it had committed


class Group(Protocol):
    """What a commit needs of the consumer."""

    topic: str
    positions: Positions  # before the batch that is committed

    def group_metadata(self) -> bytes: ...
    def committed(self, partitions: Collection[int]) -> dict[int, int]: ...
    def commit(self, next_offsets: Mapping[int, int]) -> None: ...


class Delivery(Protocol):
    """Makes one batch's outputs and offsets visible."""

    @property
    def undeliverable(self) -> dict[Source, int]: ...
    def commit(self, outputs: Iterable[Outputs], next_offsets: Mapping[int, int]) -> Outcome: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


class _Refusals:
    """Records that the broker refuses for good, by source, and how often it has refused what they led to."""

    def __init__(self) -> None:
        self.undeliverable: dict[Source, int] = {}

    def note(self, error: Undeliverable, producer: OutputProducer) -> None:
        """Counts a refusal; where its source is not known yet, the next try finds it.

        Raises:
            KafkaRefused: it is a row, or a learning summary, that does not fit: no dead letter can take its place.
        """
        producer.careful = True
        rows = sorted(partition for partition, offset in error.sources if offset == NO_SOURCE)
        if rows:
            raise KafkaRefused(
                f"the changelog does not take a row of partition {rows[0]}, or the learning topic a summary: {error}. "
                "To do: raise max.message.bytes of these topics, and message.max.bytes under kafka.producer"
            )
        for source in error.sources:
            self.undeliverable[source] = self.undeliverable.get(source, 0) + 1
        log.warning("outputs refused for good", sources=sorted(error.sources), error=str(error))

    def forget(self, next_offsets: Mapping[int, int], producer: OutputProducer) -> None:
        """What lies before the committed offsets needs no care any more."""
        if self.undeliverable:
            self.undeliverable = {s: n for s, n in self.undeliverable.items() if s[1] >= next_offsets.get(s[0], 0)}
        producer.careful = bool(self.undeliverable)


class ExactlyOnce:
    """Outputs and offsets in one Kafka transaction."""

    def __init__(
        self,
        make_producer: Callable[[], OutputProducer],
        group: Group,
        *,
        transactional_id: str,
        fence_window_s: float,
        transaction_timeout_s: float = math.inf,
    ) -> None:
        self._make_producer = make_producer
        self._group = group
        self._id = transactional_id
        self._fence_window_s = fence_window_s
        self._transaction_timeout_s = transaction_timeout_s
        self._fenced_at: float | None = None
        self._began_at = math.inf
        self._refusals = _Refusals()
        self._producer = self._build()

    @property
    def undeliverable(self) -> dict[Source, int]:
        """Sources whose output the broker refused for good, and how many times."""
        return self._refusals.undeliverable

    def commit(self, outputs: Iterable[Outputs], next_offsets: Mapping[int, int]) -> Outcome:
        """Makes a batch visible, or finds out that it is not.

        1. Replace the producer if an old EndTxn may still be under way; begin.
        2. Send the outputs. They are made while they are sent: the client's own thread sends the first of them while
           the next ones are computed.
        3. Send the offsets, fenced by the generation that the consumer has now.
        4. Commit; on return everything is visible.
        5. Abort if the transaction must be aborted: nothing of it is.
        6. If the producer is lost, build a new one — that ends the old transaction — and look: the group's committed
           offsets say whether it had been committed.

        Raises:
            Fenced: another instance took our transactional.id twice in a row.
            KafkaRefused: no producer can be had, or a permission is missing.
        """
        try:
            # 1. A producer that no delayed request can reach.
            self._replace_if_suspect()
            self._began_at = time.monotonic()
            self._producer.begin()
            # 2. and 3. Everything that the batch led to, and where it ends.
            for block in outputs:
                self._producer.send(block)
            self._send_offsets(next_offsets)
            # 4. The point of no return.
            self._producer.commit()
        except Abort as error:
            # 5. The broker agrees that nothing happened.
            return self._abort(error, next_offsets)
        except Lost as error:
            # 6. Only the broker knows.
            return self._recover(error, next_offsets)
        except Forbidden as error:
            with suppress(ProducerError):
                self._producer.abort()
            raise KafkaRefused(str(error)) from error
        self._refusals.forget(next_offsets, self._producer)
        return Outcome.COMMITTED

    def idle(self) -> None:
        """Serves the producer's callbacks between batches."""
        try:
            self._producer.poll()
        except ProducerError as error:
            log.warning("producer failed while idle", error=str(error))
            self._producer.suspect = True

    def close(self) -> None:
        """Lets go of the producer."""
        self._producer.close()

    def _send_offsets(self, next_offsets: Mapping[int, int]) -> None:
        metadata = self._group.group_metadata()
        if generation(metadata) < 0:
            raise Abort("the consumer is in no generation of its group: it has not joined, or was removed")
        positions = [TopicPartition(self._group.topic, p, o) for p, o in next_offsets.items()]
        self._producer.send_offsets(positions, metadata)

    def _abort(self, error: Abort, next_offsets: Mapping[int, int]) -> Outcome:
        log.warning("transaction aborted", reason=str(error))
        refused = error if isinstance(error, Undeliverable) else None
        outcome = Outcome.ABORTED
        try:
            self._producer.abort()
        except ProducerError as failed:
            # A commit that was answered with an error may have been done all the same: then there is nothing to abort.
            lost = failed if isinstance(failed, Lost) else Lost(str(failed))
            outcome = self._recover(lost, next_offsets)
        if refused is not None:
            # After a refused record the next transaction of the same producer fails for its sequence numbers.
            self._replace()
            self._refusals.note(refused, self._producer)
        return outcome

    def _recover(self, error: Lost, next_offsets: Mapping[int, int]) -> Outcome:
        log.warning("producer lost", transactional_id=self._id, reason=str(error))
        if isinstance(error, FencedOff):
            self._note_fencing(error)
        self._replace()
        committed = self._group.committed(next_offsets)
        # All or nothing: where one partition has not got there, it was not this transaction that moved the others, but
        # the member that has them now.
        reached = all(committed.get(p, -1) >= o for p, o in next_offsets.items())
        return Outcome.RECOVERED if self._moves(next_offsets) and reached else Outcome.ABORTED

    def _moves(self, next_offsets: Mapping[int, int]) -> bool:
        """Whether offsets can tell: a swap of the model alone moves none. It is done again, and is then as it was."""
        positions = self._group.positions
        return any(
            p in positions.uncommitted_start or positions.next_offsets.get(p) != offset
            for p, offset in next_offsets.items()
        )

    def _note_fencing(self, error: FencedOff) -> None:
        now = time.monotonic()
        if now - self._began_at > self._transaction_timeout_s:
            return  # the broker gave the transaction up, and the epoch with it: that looks alike
        clients.CONNECTIONS.count("fenced")
        if self._fenced_at is not None and now - self._fenced_at < self._fence_window_s:
            raise Fenced(
                f"transactional.id {self._id!r} was taken twice within {self._fence_window_s:.0f} s ({error}): another "
                "live instance uses it. Give every instance its own app.instance"
            ) from error
        self._fenced_at = now

    def _replace_if_suspect(self) -> None:
        if self._producer.needs_replacement:
            log.warning(
                "new producer: a request to the coordinator may have been sent twice", transactional_id=self._id
            )
            self._replace()

    def _replace(self) -> None:
        careful = self._producer.careful
        self._producer.close()
        self._producer = self._build()
        self._producer.careful = careful

    def _build(self) -> OutputProducer:
        try:
            return self._make_producer()
        except FencedOff as error:
            self._note_fencing(error)
            return self._build()
        except Forbidden as error:
            raise KafkaRefused(str(error)) from error
        except ProducerError as error:
            raise KafkaRefused(
                f"no producer with transactional.id {self._id!r}: {error}. To do: check that the brokers are up, that "
                "the principal may Write and Describe this transactional id, and transaction.timeout.ms"
            ) from error


class AtLeastOnce:
    """Outputs first, then offsets: after a crash some outputs come twice, none is missing."""

    def __init__(self, make_producer: Callable[[], OutputProducer], group: Group) -> None:
        self._make_producer = make_producer
        self._group = group
        self._refusals = _Refusals()
        self._producer = make_producer()

    @property
    def undeliverable(self) -> dict[Source, int]:
        """Sources whose output the broker refused for good, and how many times."""
        return self._refusals.undeliverable

    def commit(self, outputs: Iterable[Outputs], next_offsets: Mapping[int, int]) -> Outcome:
        """Waits for every delivery, then commits the offsets."""
        try:
            for block in outputs:
                self._producer.send(block)
            self._producer.flush()
            self._group.commit(next_offsets)
        except Forbidden as error:
            raise KafkaRefused(str(error)) from error
        except (ProducerError, KafkaException) as error:
            return self._failed(error)
        self._refusals.forget(next_offsets, self._producer)
        return Outcome.COMMITTED

    def idle(self) -> None:
        """Serves the producer's callbacks between batches; a producer that failed for good is replaced."""
        try:
            self._producer.poll()
        except ProducerError as error:
            self._failed(error)

    def close(self) -> None:
        """Lets go of the producer; nothing is under way between commits."""
        self._producer.close()

    def _failed(self, error: ProducerError | KafkaException) -> Outcome:
        found = kafka_error(error)
        log.warning("not committed; the batch is done again", reason=describe(found) if found else str(error))
        self._producer.close()
        self._producer = self._make_producer()
        if isinstance(error, Undeliverable):
            self._refusals.note(error, self._producer)
        return Outcome.ABORTED

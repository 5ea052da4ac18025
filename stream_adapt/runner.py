"""The loop: poll → decode → adapt → emit → commit, until told to stop.

One batch is one transaction. A batch is as large as the backlog allows (`max_batch`) and closes after the latency
bound when there is little to do, because a transaction costs the same whatever its size. Rows are the state only
after the commit returned; an abort puts them back and rewinds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

import structlog

from stream_adapt.breaker import Breaker
from stream_adapt.commit import Delivery, Outcome
from stream_adapt.kafka.consumer import InputConsumer
from stream_adapt.pipeline import Pipeline
from stream_adapt.quarantine import Quarantine
from stream_adapt.record import Outputs, RawBatch, Work
from stream_adapt.state.row import ControlRow

log = structlog.get_logger(__name__)

#: Records that go down the pipeline together: few enough for the processor's cache, enough to spread what a call costs.
CHUNK = 1_024
#: Aborts in a row after which the pause between tries no longer grows.
_LONGEST_PAUSE_S = 5.0
_FIRST_PAUSE_S = 0.05


class Observer(Protocol):
    """What is told of the loop: metrics and health."""

    def tick(self, consumer: InputConsumer, shards: dict[int, ControlRow]) -> None: ...
    def stage(self, name: str, seconds: float) -> None: ...
    def polled(self, records: int) -> None: ...
    def committed(self, work: Work, outcome: Outcome) -> None: ...
    def aborted(self) -> None: ...
    def rebalanced(self, kind: str, partitions: Collection[int]) -> None: ...


class Observers:
    """Several observers, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def tick(self, consumer: InputConsumer, shards: dict[int, ControlRow]) -> None:
        """A turn of the loop is over."""
        for observer in self._observers:
            observer.tick(consumer, shards)

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a batch took so long."""
        for observer in self._observers:
            observer.stage(name, seconds)

    def polled(self, records: int) -> None:
        """So many records go into the pipeline."""
        for observer in self._observers:
            observer.polled(records)

    def committed(self, work: Work, outcome: Outcome) -> None:
        """All that a batch led to is visible."""
        for observer in self._observers:
            observer.committed(work, outcome)

    def aborted(self) -> None:
        """A batch was put back."""
        for observer in self._observers:
            observer.aborted()

    def rebalanced(self, kind: str, partitions: Collection[int]) -> None:
        """Partitions were `assigned` or `revoked`."""
        for observer in self._observers:
            observer.rebalanced(kind, partitions)


@dataclass(frozen=True)
class Pace:
    """How batches are cut, and when the loop ends by itself."""

    max_batch: int = 16_384
    latency_s: float = 0.05
    stop_after_events: int | None = None


@dataclass
class Shutdown:
    """Told by signals: the first asks for a stop after the batch, the second for one at once."""

    asked: bool = False
    signals: list[int] = field(default_factory=list)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
        if self.asked:
            raise StopAtOnce
        self.asked = True

    @contextmanager
    def installed(self) -> Iterator[Shutdown]:
        """SIGINT and SIGTERM lead here while the block runs."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopAtOnce(BaseException):
    """The second signal: what is under way is left to be aborted."""


class Runner:
    """Owns the loop, not its parts: consumer, pipeline and delivery are handed in."""

    def __init__(
        self,
        consumer: InputConsumer,
        pipeline: Pipeline,
        delivery: Delivery,
        observer: Observer,
        pace: Pace,
        *,
        topic_id: str = "",
        breaker: Breaker | None = None,
        quarantine: Quarantine | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shards: dict[int, ControlRow] = {}
        self.events = 0
        self._consumer = consumer
        self._pipeline = pipeline
        self._delivery = delivery
        self._observer = observer
        self._pace = pace
        self._topic_id = topic_id
        self._breaker = breaker
        self._quarantine = quarantine or Quarantine()
        self._clock = clock
        self._pause_s = _FIRST_PAUSE_S

    def run(self, shutdown: Shutdown) -> None:
        """Until a shutdown is asked for, or `stop_after_events` events are committed.

        Raises:
            KafkaRefused, Fenced: nothing uncommitted is visible; says what to do.
            DeadLetterBreaker: the batch at which it stopped is committed.
        """
        while not shutdown.asked and not self._enough():
            self.turn()
        log.info("stopping", reason="signal" if shutdown.asked else "enough events", events=self.events)

    def turn(self) -> None:
        """One batch: poll, process, commit or put back."""
        started = time.perf_counter()
        limit = self._quarantine.limit(self._pace.max_batch, self._consumer.positions.next_offsets)
        raw = self._consumer.poll(limit, self._pace.latency_s)
        self._observer.stage("poll", time.perf_counter() - started)
        self._observer.polled(len(raw))
        if len(raw) or self._consumer.positions.uncommitted_start:
            self._process(raw)
        else:
            self._delivery.idle()
        self._observer.tick(self._consumer, self.shards)

    def assigned(self, partitions: Collection[int]) -> None:
        """New shards start with no rows, at the committed offsets."""
        for partition in partitions:
            self._note_position(partition, self._consumer.positions.next_offsets[partition])
        self._observer.rebalanced("assigned", partitions)

    def revoked(self, partitions: Collection[int]) -> None:
        """The rows of these shards belong to another member now."""
        self._pipeline.adapter.drop(partitions)
        for partition in partitions:
            self.shards.pop(partition, None)
        self._observer.rebalanced("revoked", partitions)

    def _process(self, raw: RawBatch) -> None:
        positions = self._consumer.positions
        starts = {p: positions.next_offsets[p] for p in positions.uncommitted_start}
        next_offsets = {**starts, **raw.next_offsets}
        done: list[Work] = []
        started = time.perf_counter()
        try:
            outcome = self._delivery.commit(self._outputs(raw, next_offsets, done), next_offsets)
        except BaseException:
            self._pipeline.adapter.abort()
            raise
        computing_s = sum(work.seconds for work in done)
        self._observer.stage("commit", time.perf_counter() - started - computing_s)
        if outcome is Outcome.ABORTED:
            self._put_back()
        else:
            self._keep(raw, done, next_offsets, outcome)

    def _outputs(self, raw: RawBatch, next_offsets: dict[int, int], done: list[Work]) -> Iterator[Outputs]:
        """What the batch leads to, computed chunk by chunk as it is asked for."""
        for chunk in self._quarantine.chunks(raw, next_offsets, CHUNK):
            work = self._pipeline(chunk, self._delivery.undeliverable)
            done.append(work)
            yield from work.outputs

    def _keep(self, raw: RawBatch, done: list[Work], next_offsets: dict[int, int], outcome: Outcome) -> None:
        self._pipeline.adapter.commit()
        self._consumer.advance(next_offsets)
        for partition, offset in next_offsets.items():
            self._note_position(partition, offset)
        work = Work.joined(done)
        self.events += work.records
        self._pause_s = _FIRST_PAUSE_S
        self._observer.committed(work, outcome)
        if self._breaker is not None:
            self._breaker.committed(raw, work.dead_letters)

    def _put_back(self) -> None:
        self._pipeline.adapter.abort()
        self._consumer.rewind()
        self._observer.aborted()
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _note_position(self, partition: int, next_offset: int) -> None:
        self.shards[partition] = ControlRow(
            partition=partition,
            next_offset=next_offset,
            model_version=self._pipeline.adapter.model.version,
            topic_id=self._topic_id,
            updated_ms=int(self._clock() * 1000),
        )

    def _enough(self) -> bool:
        limit = self._pace.stop_after_events
        return limit is not None and self.events >= limit

"""The loop: poll → decode → adapt → emit → commit, until told to stop.

One batch is one transaction. A batch is as large as the backlog allows (`max_batch`) and closes after the latency
bound when there is little to do, because a transaction costs the same whatever its size. Rows are the state only
after the commit returned; an abort puts them back and rewinds.

The way of a shard, the rows of one partition:

    | from      | what happens                       | what is done                                        | to        |
    |-----------|------------------------------------|-----------------------------------------------------|-----------|
    | –         | assigned (in a poll)               | ask for its committed offset; pause it              | restoring |
    | restoring | a turn                             | a slice of its rows                                 | restoring |
    | restoring | all rows are there and belong here | resume it at the committed offset                   | live      |
    | restoring | all rows are there and do not      | `StateMismatch`                                     | exit 5    |
    | live      | a turn                             | its records, in the batch: scores, rows and offsets | live      |
    | any       | revoked or lost (in a poll)        | drop its rows, cancel its restore                   | –         |

Rebalances happen in polls alone, and nothing is in flight there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from stream_adapt.breaker import Breaker
from stream_adapt.commit import Delivery, Outcome
from stream_adapt.errors import RegistryUnreachable
from stream_adapt.kafka.consumer import InputConsumer
from stream_adapt.pipeline import Pipeline
from stream_adapt.quarantine import Quarantine
from stream_adapt.record import Outputs, RawBatch, Work
from stream_adapt.restore import Slice, fingerprints
from stream_adapt.shutdown import Shutdown
from stream_adapt.state.row import ControlRow

log = structlog.get_logger(__name__)

#: Records that go down the pipeline together: few enough for the processor's cache, enough to spread what a call costs.
CHUNK = 1_024
#: A slice of restoring while other shards wait for their turn, and while none does.
_SLICE_S = 0.025
_LONG_SLICE_S = 0.2
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
    def restoring(self, done: Slice) -> None: ...


class Restoring(Protocol):
    """What brings back the rows of newly assigned shards."""

    @property
    def unfinished(self) -> Collection[int]: ...
    def begin(self, committed: Mapping[int, int | None]) -> None: ...
    def cancel(self, partitions: Collection[int]) -> None: ...
    def step(self, budget_s: float) -> list[int]: ...


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

    def restoring(self, done: Slice) -> None:
        """Rows of shards that are not live yet were read, or need not be any more."""
        for observer in self._observers:
            observer.restoring(done)


@dataclass(frozen=True)
class Pace:
    """How batches are cut, and when the loop ends by itself."""

    max_batch: int = 16_384
    latency_s: float = 0.05
    stop_after_events: int | None = None


class Runner:
    """Owns the loop, not its parts: consumer, pipeline and delivery are handed in."""

    def __init__(
        self,
        consumer: InputConsumer,
        pipeline: Pipeline,
        delivery: Delivery,
        restorer: Restoring,
        observer: Observer,
        pace: Pace,
        *,
        topic_id: str = "",
        breaker: Breaker | None = None,
        quarantine: Quarantine | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.shards: dict[int, ControlRow] = {}
        self.events = 0
        self._consumer = consumer
        self._pipeline = pipeline
        self._delivery = delivery
        self._restorer = restorer
        self._observer = observer
        self._pace = pace
        self._topic_id = topic_id
        self._breaker = breaker
        self._quarantine = quarantine or Quarantine()
        self._clock = clock
        self._sleep = sleep
        self._pause_s = _FIRST_PAUSE_S
        self._computing_s = 0.0  # of the batch's commit, spent on making what is committed

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
        raw = self._consumer.poll(limit, self._patience_s())
        self._observer.stage("poll", time.perf_counter() - started)
        self._observer.polled(len(raw))
        starts = self._uncommitted_starts()
        if len(raw) or starts:
            self._process(raw, starts)
        else:
            self._delivery.idle()
        if self._restorer.unfinished:
            self._restore()
        self._observer.tick(self._consumer, self.shards)

    def assigned(self, partitions: Collection[int]) -> None:
        """New shards are restored before their records are read."""
        positions = self._consumer.positions
        self._observer.rebalanced("assigned", partitions)
        self._restorer.begin(
            {p: None if p in positions.uncommitted_start else positions.next_offsets[p] for p in partitions}
        )

    def revoked(self, partitions: Collection[int]) -> None:
        """The rows of these shards belong to another member now."""
        self._restorer.cancel(partitions)
        self._pipeline.adapter.drop(partitions)
        for partition in partitions:
            self.shards.pop(partition, None)
        self._observer.rebalanced("revoked", partitions)

    def _restore(self) -> None:
        """A slice; shards whose rows are all there go live."""
        done = self._restorer.step(_SLICE_S if self.shards else _LONG_SLICE_S)
        if done:
            self._consumer.resume(done)
        for partition in done:
            offset = self._consumer.positions.next_offsets[partition]
            self._pipeline.adapter.resume(partition, offset)
            self.shards[partition] = self._control_row(partition, offset)

    def _patience_s(self) -> float:
        """How long a poll may wait for a batch to fill: not at all while only restoring is to be done."""
        if not self._restorer.unfinished:
            return self._pace.latency_s
        return min(self._pace.latency_s, _SLICE_S) if self.shards else 0.0

    def _uncommitted_starts(self) -> dict[int, int]:
        """Where live shards that are new to the group begin: committed with the first batch, empty as it may be."""
        positions = self._consumer.positions
        return {p: positions.next_offsets[p] for p in positions.uncommitted_start if p in self.shards}

    def _process(self, raw: RawBatch, starts: Mapping[int, int]) -> None:
        try:
            self._pipeline.prepare(raw)
        except RegistryUnreachable as error:
            log.warning("waiting for the schema registry", error=str(error))
            self._read_again()
            return
        next_offsets = {**starts, **raw.next_offsets}
        controls = [self._control_row(partition, offset) for partition, offset in next_offsets.items()]
        done: list[Work] = []
        started, self._computing_s = time.perf_counter(), 0.0
        try:
            outcome = self._delivery.commit(self._outputs(raw, done, controls), next_offsets)
        except BaseException:
            self._pipeline.adapter.abort()
            raise
        self._observer.stage("commit", time.perf_counter() - started - self._computing_s)
        if outcome is Outcome.ABORTED:
            self._put_back()
        else:
            self._keep(raw, done, controls, outcome)

    def _outputs(self, raw: RawBatch, done: list[Work], controls: list[ControlRow]) -> Iterator[Outputs]:
        """What the batch leads to, computed chunk by chunk as it is asked for; then the rows that it changed."""
        ends = {row.partition: row.next_offset for row in controls}
        for chunk in self._quarantine.chunks(raw, ends, CHUNK):
            work = self._pipeline(chunk, self._delivery.undeliverable)
            done.append(work)
            self._computing_s += work.seconds
            yield from work.outputs
        started = time.perf_counter()
        changed = self._pipeline.changes(controls)
        self._computing_s += time.perf_counter() - started
        yield from changed

    def _keep(self, raw: RawBatch, done: list[Work], controls: list[ControlRow], outcome: Outcome) -> None:
        self._pipeline.adapter.commit()
        self._consumer.advance({row.partition: row.next_offset for row in controls})
        self.shards |= {row.partition: row for row in controls}
        work = Work.joined(done)
        self.events += work.records
        self._pause_s = _FIRST_PAUSE_S
        self._observer.committed(work, outcome)
        if self._breaker is not None:
            self._breaker.committed(raw, work.dead_letters)

    def _put_back(self) -> None:
        self._pipeline.adapter.abort()
        self._observer.aborted()
        self._read_again()

    def _read_again(self) -> None:
        """The same records come with the next poll, after a pause that grows."""
        self._consumer.rewind()
        self._sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _control_row(self, partition: int, next_offset: int) -> ControlRow:
        adapter = self._pipeline.adapter
        return ControlRow(
            partition=partition,
            next_offset=next_offset,
            model_version=adapter.model.version,
            topic_id=self._topic_id,
            updated_ms=int(self._clock() * 1000),
            layouts=fingerprints([adapter.users, adapter.items]),
        )

    def _enough(self) -> bool:
        limit = self._pace.stop_after_events
        return limit is not None and self.events >= limit

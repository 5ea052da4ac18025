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
    | restoring | so, of a model announced after the | nothing: that model is looked for                   | waiting   |
    |           | one that is served here            |                                                     |           |
    | restoring | all rows are there and do not      | `StateMismatch`                                     | exit 5    |
    | waiting   | that model, or a later one, is     | resume it at the committed offset                   | live      |
    |           | served                             |                                                     |           |
    | live      | a turn                             | its records, in the batch: scores, rows and offsets | live      |
    | any       | revoked or lost (in a poll)        | drop its rows, cancel its restore                   | –         |

Rebalances happen in polls alone, and nothing is in flight there. Where there is more than a batch holds, the next one
is polled before this one is handled (`ahead.py`); if partitions are taken away in a poll, what is held is let go and
read again.

Another model is served from the start of a turn on. A shard's control row names the model that its rows are of; where
that is another one than the one served, the shard's next transaction — an empty one, if need be — does to its rows what
the announcement says, and writes a control row that names the new model and the offset. So a shard goes over once,
whoever dies meanwhile, and its scores never go back to an older model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import structlog

from stream_adapt.adapt import Slow
from stream_adapt.ahead import Ahead, Decoded
from stream_adapt.breaker import Breaker
from stream_adapt.commit import Delivery, Outcome
from stream_adapt.errors import RegistryUnreachable
from stream_adapt.follow import Settled, Standing
from stream_adapt.kafka.consumer import InputConsumer
from stream_adapt.models import RowMode
from stream_adapt.pipeline import Pipeline
from stream_adapt.quarantine import Quarantine
from stream_adapt.record import Outputs, RawBatch, Work
from stream_adapt.restore import Slice, fingerprints
from stream_adapt.shutdown import Shutdown
from stream_adapt.state.row import ControlRow

log = structlog.get_logger(__name__)

#: Records that go down the pipeline together: few enough for the processor's cache, enough to spread what a call costs.
CHUNK = 1_024
#: A slice of restoring while other shards wait for their turn, and while none does. The first is about as long as a
#: turn waits for events (`latency_s`), and takes the place of that wait: the others' events hardly take longer.
_SLICE_S = 0.05
LONG_SLICE_S = 0.2
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
    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None: ...


class Models(Protocol):
    """What says which model is to be served."""

    standing: Standing

    def due(self) -> Slow | None: ...
    def ahead(self, version: str) -> bool: ...
    def row_mode(self, version: str) -> RowMode: ...


class Restoring(Protocol):
    """What brings back the rows of newly assigned shards."""

    @property
    def unfinished(self) -> Collection[int]: ...
    def begin(self, committed: Mapping[int, int | None]) -> None: ...
    def cancel(self, partitions: Collection[int]) -> None: ...
    def step(self, budget_s: float) -> Mapping[int, ControlRow | None]: ...


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

    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None:
        """Another model is served, announced or refused; partitions wait for the model that their rows are of."""
        for observer in self._observers:
            observer.following(standing, waiting)


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
        models: Models | None = None,
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
        self._models: Models = models or Settled(pipeline.adapter.model.version)
        self._going_over: dict[int, RowMode] = {}  # live shards whose control row names another model
        self._waiting: dict[int, ControlRow] = {}  # shards whose rows are of a model that is not served here yet
        self._told: tuple[Standing, dict[int, str]] | None = None
        self._clock = clock
        self._sleep = sleep
        self._pause_s = _FIRST_PAUSE_S
        self._ahead = Ahead(pipeline.decoder, CHUNK)
        self._taken_away = False  # partitions, since the batch was begun to be gathered
        self._changed: list[Outputs] = []  # by the batch: the changelog's records
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
        self._follow()
        limit = self._quarantine.limit(self._pace.max_batch, self._consumer.positions.next_offsets)
        raw, decoded = self._gather(limit)
        self._observer.polled(len(raw))
        starts = self._starts()
        if len(raw) or starts:
            self._process(raw, starts, decoded)
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
        self._taken_away = True
        for partition in partitions:
            for held in (self.shards, self._going_over, self._waiting):
                held.pop(partition, None)
        self._observer.rebalanced("revoked", partitions)

    def _follow(self) -> None:
        """Serves another model if one is due: nothing is in flight here."""
        slow = self._models.due()
        if slow is not None:
            before = self._served
            self._pipeline.serve(slow)
            log.info("another model is served", model=self._served, before=before, partitions=sorted(self.shards))
            for partition in self.shards:
                self._mark(partition)
        for partition in [p for p, row in self._waiting.items() if not self._models.ahead(row.model_version)]:
            self._go_live(partition, self._waiting.pop(partition))
        told = self._models.standing, {p: row.model_version for p, row in self._waiting.items()}
        if told != self._told:
            self._told = told
            self._observer.following(*told)

    def _restore(self) -> None:
        """A slice; shards whose rows are all there go live, unless they are of a model that is not served here yet."""
        for partition, row in self._restorer.step(_SLICE_S if self.shards else LONG_SLICE_S).items():
            if row is not None and self._models.ahead(row.model_version):
                self._waiting[partition] = row
                log.warning("rows of a later model wait for it", partition=partition, model=row.model_version)
            else:
                self._go_live(partition, row)

    def _go_live(self, partition: int, row: ControlRow | None) -> None:
        """Reads the records of a shard whose rows are all there; `row` says which model they are of."""
        self._consumer.resume([partition])
        offset = self._consumer.positions.next_offsets[partition]
        self._pipeline.adapter.resume(partition, offset)
        if row is None or not row.model_version:
            self.shards[partition] = self._control_row(partition, offset)
        else:
            self.shards[partition] = msgspec.structs.replace(row, next_offset=offset, topic_id=self._topic_id)
        self._mark(partition)

    def _mark(self, partition: int) -> None:
        """Notes whether a live shard has yet to go over to the model that is served."""
        version = self.shards[partition].model_version
        self._going_over.pop(partition, None)
        if version != self._served:
            self._going_over[partition] = self._models.row_mode(version)

    @property
    def _served(self) -> str:
        return self._pipeline.adapter.model.version

    def _patience_s(self) -> float:
        """How long a poll may wait for a batch to fill: not at all while there are rows to restore."""
        return 0.0 if self._restorer.unfinished else self._pace.latency_s

    def _starts(self) -> dict[int, int]:
        """Where live shards begin that are new to the group, or to the model: committed with the first batch, empty as
        it may be."""
        positions = self._consumer.positions
        return {
            p: positions.next_offsets[p] for p in (*positions.uncommitted_start, *self._going_over) if p in self.shards
        }

    def _gather(self, limit: int) -> tuple[RawBatch, list[Decoded]]:
        """The next batch, and how far it is decoded. If there is more than fits, the batch after it is held."""
        started = time.perf_counter()
        raw, decoded = self._ahead.take()
        taken = time.perf_counter()
        holding, self._taken_away = len(raw) > 0, False
        if holding:
            self._observer.stage("decode", taken - started)
        more = self._consumer.poll(limit - len(raw), 0.0 if holding else self._patience_s(), raw.next_offsets)
        raw = raw.followed_by(more)
        if len(raw) == limit == self._pace.max_batch and not self._restorer.unfinished:
            holding = True
            self._ahead.hold(self._consumer.poll(limit, 0.0, raw.next_offsets))
        self._observer.stage("poll", time.perf_counter() - taken)
        if holding and self._taken_away:
            # Some of it may belong to another member now: all of it is read again.
            self._ahead.drop()
            self._consumer.rewind()
            return RawBatch.empty(), []
        return raw, decoded

    def _process(self, raw: RawBatch, starts: Mapping[int, int], decoded: list[Decoded]) -> None:
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
            outcome = self._delivery.commit(self._outputs(raw, decoded, done, controls), next_offsets)
        except BaseException:
            self._pipeline.adapter.abort()
            raise
        self._observer.stage("commit", time.perf_counter() - started - self._computing_s)
        if outcome is Outcome.ABORTED:
            self._put_back()
        else:
            self._keep(raw, done, controls, outcome)

    def _outputs(
        self, raw: RawBatch, decoded: list[Decoded], done: list[Work], controls: list[ControlRow]
    ) -> Iterator[Outputs]:
        """What the batch leads to, computed chunk by chunk as it is asked for; then changed rows and summaries.

        Once all is sent, what is held is decoded: the commit that follows is waited for anyway.
        """
        undeliverable = self._delivery.undeliverable
        ends = {row.partition: row.next_offset for row in controls} | self._ahead.next_offsets
        started = time.perf_counter()
        self._pipeline.adapter.restart_items([p for p, mode in self._going_over.items() if mode == "restart_items"])
        self._computing_s += time.perf_counter() - started
        rest = iter(decoded)
        for chunk in self._quarantine.chunks(raw, ends, CHUNK):
            known = next(rest, None)
            # A chunk that was not full when it was decoded is full now.
            work = self._pipeline(chunk, undeliverable, known if known and known.records == len(chunk) else None)
            done.append(work)
            self._computing_s += work.seconds
            yield from work.outputs
        started = time.perf_counter()
        self._changed = self._pipeline.changes(controls)
        last = [*self._changed, *self._pipeline.learned(done)]
        self._computing_s += time.perf_counter() - started
        yield from last
        if not undeliverable:
            self._ahead.begin()

    def _keep(self, raw: RawBatch, done: list[Work], controls: list[ControlRow], outcome: Outcome) -> None:
        self._pipeline.adapter.commit()
        self._consumer.advance({row.partition: row.next_offset for row in controls})
        self.shards |= {row.partition: row for row in controls}
        if self._going_over:
            since = {p: self.shards[p].model_since for p in self._going_over}
            log.info("shards went over to the model", model=self._served, rows=self._going_over, since=since)
            self._going_over = {}
        work = replace(Work.joined(done), rows=self._changed)
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
        self._ahead.drop()
        self._consumer.rewind()
        self._sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _control_row(self, partition: int, next_offset: int) -> ControlRow:
        adapter, before = self._pipeline.adapter, self.shards.get(partition)
        goes_on = before is not None and before.model_version == self._served
        return ControlRow(
            partition=partition,
            next_offset=next_offset,
            model_version=self._served,
            topic_id=self._topic_id,
            updated_ms=int(self._clock() * 1000),
            layouts=fingerprints([adapter.users, adapter.items]),
            model_since=before.model_since if before and goes_on else self._consumer.positions.next_offsets[partition],
        )

    def _enough(self) -> bool:
        limit = self._pace.stop_after_events
        return limit is not None and self.events >= limit

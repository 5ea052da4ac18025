"""Kafka in memory, as far as exactly-once can tell, with crashes as data.

What is doubled is the client library and the broker behind it, not our logic: `ScriptedBroker.client` stands where
`confluent_kafka.Producer` does, `ScriptedConsumer` where `InputConsumer` does and `ScriptedReader` where
`ChangelogReader` does. Transactions, epochs, generations and pending offsets are kept as KIP-98 and KIP-447 say, and
the states of a failed producer as librdkafka has them.

    broker = ScriptedBroker({0: records}, [Crash(Point.COMMIT, 2, Effect.ANSWER_LOST)])

is a broker that commits the second transaction and whose answer gets lost. `committed(topic)` is what a reader under
read_committed sees. Where Kafka's own behaviour is in question, ask Kafka: `stream_adapt.testing.proxy`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from stream_adapt.kafka.changelog import Records, Tail
from stream_adapt.kafka.consumer import NOTHING_HELD, Positions, RebalanceListener
from stream_adapt.record import RawBatch

Record = tuple[bytes | None, bytes | None]  # key, value


class Point(Enum):
    """Where in a transaction something happens."""

    INIT = "init_transactions"
    BEGIN = "begin_transaction"
    PRODUCE = "produce"
    SEND_OFFSETS = "send_offsets_to_transaction"
    COMMIT = "commit_transaction"
    ABORT = "abort_transaction"


class Effect(Enum):
    """What happens there."""

    KILL_BEFORE = "the process dies before the broker does it"
    KILL_AFTER = "the process dies after the broker did it"
    ANSWER_LOST = "the broker does it, and the client is told of a time-out that may be tried again"
    FATAL_AFTER = "the broker does it, and the client is told a fatal error"
    ABORTABLE_AFTER = "the broker does it, and the client is told to abort"
    DELAYED = "it is done, and a second copy of it arrives in the next transaction"
    RETRIABLE = "not done; may be tried again (produce: the local queue is full)"
    ABORTABLE = "not done; the transaction must be aborted"
    FATAL = "not done; the producer is dead"
    UNFLAGGED = "not done, with an error that says nothing of what to do"
    FENCED = "another instance took the transactional.id"
    REBALANCE = "the group has a new generation"
    STOPPED = "the process stands still while `ScriptedBroker.meanwhile` runs"
    OVERTAKEN = "the offsets are visible, and before the records are, `ScriptedBroker.meanwhile` runs"


_KILLS = (Effect.KILL_BEFORE, Effect.KILL_AFTER)
_CALLS = (Effect.RETRIABLE, Effect.FATAL, Effect.UNFLAGGED)
_TRANSACTION = (*_CALLS, Effect.ABORTABLE, Effect.FENCED, Effect.REBALANCE, Effect.STOPPED)

#: What can happen where.
POSSIBLE: Mapping[Point, tuple[Effect, ...]] = {
    Point.INIT: (*_KILLS, *_CALLS),
    Point.BEGIN: (*_KILLS, Effect.FATAL, Effect.STOPPED),
    Point.PRODUCE: (*_KILLS, *_TRANSACTION),
    Point.SEND_OFFSETS: (*_KILLS, *_TRANSACTION, Effect.ANSWER_LOST, Effect.FATAL_AFTER),
    Point.COMMIT: (
        *_KILLS,
        *_TRANSACTION,
        Effect.ANSWER_LOST,
        Effect.FATAL_AFTER,
        Effect.ABORTABLE_AFTER,
        Effect.DELAYED,
        Effect.OVERTAKEN,
    ),
    Point.ABORT: (*_KILLS, *_CALLS, Effect.ANSWER_LOST, Effect.FATAL_AFTER),
}


@dataclass(frozen=True, slots=True)
class Crash:
    """The `call`-th time, from 1, that anybody gets to `point`, `effect` happens."""

    point: Point
    call: int
    effect: Effect


class Killed(BaseException):
    """kill −9: nothing of the process runs any more. The test starts another."""


@dataclass(slots=True)
class Written:
    """One record of an output topic; visible under read_committed once its transaction is committed.

    It is `open` until the transaction has ended and its marker is written: nobody reads beyond it until then.
    """

    topic: str
    partition: int  # −1: as the key says
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]] | None = None
    committed: bool = False
    open: bool = True

    def mark(self, *, committed: bool) -> None:
        """The marker of its transaction is written."""
        self.committed, self.open = committed, False


@dataclass(slots=True)
class _Transaction:
    epoch: int
    records: list[Written] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)


class ScriptedBroker:
    """Input log, output log, transactions and the group's offsets; what happens to its clients is a script.

    Args:
        inputs: records by partition of the input topic.
        crashes: what goes wrong; several at the same place happen one after the other.
        max_message_bytes: values that are longer are refused for good.
    """

    def __init__(
        self, inputs: Mapping[int, Sequence[Record]], crashes: Iterable[Crash] = (), *, max_message_bytes: int = 1 << 20
    ) -> None:
        self.inputs = inputs
        self.log: list[Written] = []
        self.offsets: dict[int, int] = {}
        self.generation = 0
        self.member: object = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.max_message_bytes = max_message_bytes
        self.happened: list[Crash] = []
        self._script = list(crashes)
        self._calls: Counter[Point] = Counter()
        self._epochs: Counter[str] = Counter()
        self._open: dict[str, _Transaction] = {}
        self._ended: dict[str, bool] = {}  # how the last transaction ended: committed?
        self._late: list[tuple[str, int]] = []  # EndTxn under way for a second time: id, epoch
        self._slow_markers = False
        self._unmarked: dict[str, list[Written]] = {}  # committed, and the markers are under way

    def client(self, settings: Mapping[str, Any], **_: Any) -> ScriptedClient:
        """Stands where `confluent_kafka.Producer` does."""
        return ScriptedClient(self, settings)

    def committed(self, topic: str) -> list[Written]:
        """The records of a topic as a reader under read_committed sees them, in order."""
        self._write_all_markers()
        return [record for record in self.log if record.topic == topic and record.committed]

    @property
    def finished(self) -> bool:
        """Whether the group has committed the end of every partition."""
        return all(self.offsets.get(p, 0) == len(records) for p, records in self.inputs.items())

    def calm_down(self) -> None:
        """Nothing happens any more, whatever the script still has."""
        self._script.clear()

    # What consumers ask.

    def join(self, member: object) -> None:
        """A new generation of the group, in which all partitions belong to this member."""
        self.member = member
        self.generation += 1

    def stable_offsets(self, partitions: Collection[int]) -> dict[int, int]:
        """Committed offsets, −1001 where there are none. Pending ones are waited for: their transaction times out."""
        for name, transaction in list(self._open.items()):
            if transaction.offsets.keys() & set(partitions):
                self._expire(name)
        return {p: self.offsets.get(p, -1001) for p in partitions}

    def partition(self, topic: str, partition: int) -> list[Written]:
        """The log of one partition of an output topic, with all that is not committed; offsets are its indices."""
        return [record for record in self.log if (record.topic, record.partition) == (topic, partition)]

    def pass_time(self, record: Written) -> None:
        """Until the transaction of an open record has an outcome: its markers are written, or it times out."""
        self._write_all_markers()
        if record.open:
            self._expire(next(name for name, open_ in self._open.items() if any(record is r for r in open_.records)))

    # What producers ask. Each raises KafkaException as the client library would.

    def init(self, name: str) -> int:
        """A new epoch; what the former one left open is aborted."""
        self._write_markers(name)  # a transaction that is being ended is waited for
        self._drop(name)
        self._epochs[name] += 1
        return self._epochs[name]

    def write(self, name: str, epoch: int, record: Written) -> None:
        """Adds a record to the open transaction."""
        transaction = self._transaction(name, epoch)
        transaction.records.append(record)
        self.log.append(record)
        if (name, epoch) in self._late:
            self._late.remove((name, epoch))
            self.end(name, epoch, commit=True)

    def add_offsets(self, name: str, epoch: int, offsets: Mapping[int, int], generation: int) -> None:
        """Adds the group's offsets, if the member is of the group's generation."""
        if generation != self.generation:
            raise _error(KafkaError.ILLEGAL_GENERATION, abort=True)
        self._transaction(name, epoch).offsets.update(offsets)

    def end(self, name: str, epoch: int, *, commit: bool) -> None:
        """EndTxn. One that arrives again is answered as if it were the first; no other way of ending it is left."""
        self._check_epoch(name, epoch)
        transaction = self._open.get(name)
        if transaction is None and self._ended.get(name, commit) is not commit:
            raise _error(KafkaError.INVALID_TXN_STATE, fatal=True)
        self._ended[name] = commit
        if transaction is None or not commit:
            self._drop(name)
            return
        del self._open[name]
        self.offsets.update(transaction.offsets)
        self._unmarked[name] = transaction.records
        if not self._slow_markers:
            self._write_markers(name)

    @contextmanager
    def slow_markers(self) -> Iterator[None]:
        """What is committed meanwhile can be read under read_committed only once somebody waits for it."""
        self._slow_markers = True
        try:
            yield
        finally:
            self._slow_markers = False

    def begin(self, name: str, epoch: int) -> None:
        """The client library begins a transaction by itself; the broker hears of it with the first record."""
        self._write_markers(name)  # those of the transaction before it are waited for
        self._open[name] = _Transaction(epoch)

    def repeat_end(self, name: str, epoch: int) -> None:
        """A copy of an EndTxn is still under way."""
        self._late.append((name, epoch))

    def take(self, point: Point) -> Effect | None:
        """What the script has for this call."""
        self._calls[point] += 1
        due = next((c for c in self._script if (c.point, c.call) == (point, self._calls[point])), None)
        if due is None:
            return None
        self.happened.append(due)
        return due.effect

    def _transaction(self, name: str, epoch: int) -> _Transaction:
        self._check_epoch(name, epoch)
        if name not in self._open:
            raise _error(KafkaError.INVALID_TXN_STATE, fatal=True)
        return self._open[name]

    def _check_epoch(self, name: str, epoch: int) -> None:
        if epoch != self._epochs[name]:
            raise _error(KafkaError._FENCED, fatal=True)

    def _expire(self, name: str) -> None:
        """The transaction timeout: aborted, and its producer's epoch is over."""
        self._drop(name)
        self._epochs[name] += 1

    def _drop(self, name: str) -> None:
        """Aborts what is open, if anything is."""
        transaction = self._open.pop(name, None)
        for record in transaction.records if transaction else ():
            record.mark(committed=False)

    def _write_markers(self, name: str) -> None:
        for record in self._unmarked.pop(name, ()):
            record.mark(committed=True)

    def _write_all_markers(self) -> None:
        for name in list(self._unmarked):
            self._write_markers(name)


class ScriptedClient:
    """One transactional producer, with the interface of `confluent_kafka.Producer`."""

    def __init__(self, broker: ScriptedBroker, settings: Mapping[str, Any]) -> None:
        self._broker = broker
        self._name: str = settings["transactional.id"]
        self._on_delivery: Callable[..., None] = settings["on_delivery"]
        self._statistics: Callable[[str], None] = settings["stats_cb"]
        self._epoch = 0
        self._failed: KafkaException | None = None  # until the abort; for good if fatal
        self._refused: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return 0

    def init_transactions(self, _timeout_s: float) -> None:
        """As the library's."""

        def init() -> None:
            self._epoch = self._broker.init(self._name)

        self._call(Point.INIT, init)
        self._tell_statistics(0)

    def begin_transaction(self) -> None:
        """As the library's."""
        self._call(Point.BEGIN, lambda: self._broker.begin(self._name, self._epoch))

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int = -1,
        *,
        headers: list[tuple[str, bytes]] | None = None,
        on_delivery: Callable[..., None] | None = None,
    ) -> None:
        """As the library's; deliveries fail at the next call that waits for them."""
        record = Written(topic, partition, key, value, headers)

        def write() -> None:
            if len(value or b"") > self._broker.max_message_bytes:
                failed = KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)
                self._refused.append(lambda: (on_delivery or self._on_delivery)(failed, _Told(topic)))
            else:
                self._broker.write(self._name, self._epoch, record)

        self._call(Point.PRODUCE, write)

    def poll(self, _timeout_s: float = 0) -> int:
        """As the library's."""
        return 0

    def flush(self, _timeout_s: float = 0) -> int:
        """As the library's."""
        return 0

    def purge(self) -> None:
        """As the library's."""

    def send_offsets_to_transaction(self, offsets: list[TopicPartition], metadata: bytes, _timeout_s: float) -> None:
        """As the library's."""
        generation = int.from_bytes(metadata[7:11], "little", signed=True)
        positions = {tp.partition: tp.offset for tp in offsets}
        self._deliver()
        self._call(Point.SEND_OFFSETS, lambda: self._broker.add_offsets(self._name, self._epoch, positions, generation))

    def commit_transaction(self, _timeout_s: float) -> None:
        """As the library's."""
        self._deliver()
        self._call(Point.COMMIT, lambda: self._broker.end(self._name, self._epoch, commit=True))

    def abort_transaction(self, _timeout_s: float) -> None:
        """As the library's: heals what is abortable, not what is fatal."""
        if self._failed is not None and not self._failed.args[0].fatal():
            self._failed = None
        self._call(Point.ABORT, lambda: self._broker.end(self._name, self._epoch, commit=False))

    def _deliver(self) -> None:
        refused, self._refused = self._refused, []
        for tell in refused:
            tell()
        if refused:
            self._fail(_error(KafkaError.MSG_SIZE_TOO_LARGE, abort=True))

    def _fail(self, error: KafkaException) -> None:
        self._failed = error
        raise error

    def _call(self, point: Point, act: Callable[[], None]) -> None:
        if self._failed is not None:
            raise self._failed
        effect = self._broker.take(point)
        match effect:
            case Effect.KILL_BEFORE:
                raise Killed
            case Effect.RETRIABLE if point is Point.PRODUCE:
                raise BufferError
            case Effect.RETRIABLE:
                raise _error(KafkaError._TIMED_OUT, retriable=True)
            case Effect.ABORTABLE:
                self._fail(_error(KafkaError.TRANSACTION_ABORTABLE, abort=True))
            case Effect.FATAL:
                self._fail(_error(KafkaError.INVALID_TXN_STATE, fatal=True))
            case Effect.UNFLAGGED:
                self._fail(_error(KafkaError.TOPIC_AUTHORIZATION_FAILED))
            case Effect.FENCED:
                self._broker.init(self._name)
            case Effect.REBALANCE:
                self._broker.join(self._broker.member)
            case Effect.STOPPED:
                self._broker.meanwhile()
        try:
            if effect is Effect.OVERTAKEN:
                with self._broker.slow_markers():
                    act()
                self._broker.meanwhile()
            else:
                act()
        except KafkaException as error:
            self._fail(error)
        self._aftermath(effect)

    def _aftermath(self, effect: Effect | None) -> None:
        match effect:
            case Effect.KILL_AFTER:
                raise Killed
            case Effect.ANSWER_LOST:
                raise _error(KafkaError._TIMED_OUT, retriable=True)
            case Effect.FATAL_AFTER:
                self._fail(_error(KafkaError.INVALID_TXN_STATE, fatal=True))
            case Effect.ABORTABLE_AFTER:
                self._fail(_error(KafkaError.REQUEST_TIMED_OUT, abort=True))
            case Effect.DELAYED:
                self._broker.repeat_end(self._name, self._epoch)
                self._tell_statistics(1)

    def _tell_statistics(self, req_timeouts: int) -> None:
        brokers = {"TxnCoordinator": {"req_timeouts": req_timeouts}}
        self._statistics(msgspec.json.encode({"brokers": brokers}).decode())


class ScriptedConsumer:
    """The one member of the group that reads, with the interface of `InputConsumer`.

    Args:
        broker: whose records it reads.
        topic: what the input is called.
        cuts: records per poll, in turn, over and over; 0 is an empty poll.
        listener: told of what it is assigned and what is taken away.
    """

    def __init__(self, broker: ScriptedBroker, topic: str, cuts: Sequence[int], listener: RebalanceListener) -> None:
        self.topic = topic
        self.positions = Positions()
        self.paused: set[int] = set()
        self._broker = broker
        self._cuts = cuts
        self._polls = 0
        self._listener = listener
        self._generation = -1
        self._fetched: dict[int, int] = {}  # what poll gives next: ahead of what is committed
        broker.join(self)

    def poll(self, max_records: int, _timeout_s: float, _held: Mapping[int, int] = NOTHING_HELD) -> RawBatch:
        """The next records, in turn from each partition; joins the group first if it has moved on."""
        if self._generation != self._broker.generation:
            self._rejoin()
        cut = min(self._cuts[self._polls % len(self._cuts)], max_records)
        self._polls += 1
        rows = self._next(cut)
        for partition, offset, _ in rows:
            self._fetched[partition] = offset + 1
        return RawBatch(
            [key for _, _, (key, _) in rows],
            [value for _, _, (_, value) in rows],
            np.array([partition for partition, _, _ in rows], dtype=np.int32),
            np.array([offset for _, offset, _ in rows], dtype=np.int64),
        )

    def advance(self, next_offsets: Mapping[int, int]) -> None:
        """As the real one's."""
        self.positions.next_offsets.update(next_offsets)
        self.positions.uncommitted_start -= set(next_offsets)

    def resume(self, partitions: Collection[int]) -> None:
        """As the real one's."""
        self.paused -= set(partitions)
        self._fetched |= {p: self.positions.next_offsets[p] for p in partitions}

    def rewind(self) -> None:
        """As the real one's."""
        self._fetched = {p: offset for p, offset in self.positions.next_offsets.items() if p not in self.paused}

    def group_metadata(self) -> bytes:
        """As the real one's: of the generation in which it was last polled."""
        return b"CGMDv2:" + self._generation.to_bytes(4, "little", signed=True) + b"group\0"

    def committed(self, partitions: Collection[int]) -> dict[int, int]:
        """As the real one's."""
        return self._broker.stable_offsets(partitions)

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        """As the real one's."""
        self._broker.offsets.update(next_offsets)

    def lag(self) -> dict[int, int]:
        """As the real one's."""
        return {p: len(self._broker.inputs[p]) - offset for p, offset in self.positions.next_offsets.items()}

    def close(self) -> None:
        """As the real one's."""

    def _next(self, cut: int) -> list[tuple[int, int, Record]]:
        """At most `cut` records, about as many from each partition."""
        share = -(-cut // max(len(self._fetched), 1))
        found = []
        for partition, start in self._fetched.items():
            records = self._broker.inputs[partition][start : start + share]
            found += [(partition, start + i, record) for i, record in enumerate(records)]
        return found[:cut]

    def _rejoin(self) -> None:
        """Takes part in the group's generation: as the owner of all partitions, or of none any more."""
        self._generation = self._broker.generation
        if self._broker.member is self and not self.positions.next_offsets:
            self._assigned()
        elif self._broker.member is not self and self.positions.next_offsets:
            self._revoked()

    def _assigned(self) -> None:
        for partition, offset in self._broker.stable_offsets(self._broker.inputs).items():
            if offset < 0:
                self.positions.uncommitted_start.add(partition)
            self.positions.next_offsets[partition] = max(offset, 0)
        self.paused |= self.positions.next_offsets.keys()
        self._listener.assigned(list(self.positions.next_offsets))

    def _revoked(self) -> None:
        gone = list(self.positions.next_offsets)
        self.positions.next_offsets.clear()
        self.positions.uncommitted_start.clear()
        self.paused.clear()
        self.rewind()
        self._listener.revoked(gone)


class ScriptedReader:
    """Reads the changelog in the log, with the interface of `ChangelogReader`.

    Args:
        broker: whose log it reads.
        topic: what the changelog is called.
        cuts: offsets per read, in turn, over and over.
    """

    def __init__(self, broker: ScriptedBroker, topic: str, cuts: Sequence[int] = (100,)) -> None:
        self.topic = topic
        self.tails: dict[int, Tail] = {}
        self._broker = broker
        self._cuts = cuts
        self._reads = 0

    def begin(self, partitions: Collection[int]) -> None:
        """As the real one's: everything is read that was written up to now, committed or not."""
        for partition in partitions:
            self.tails[partition] = Tail(0, self.end(partition), 0, 0.0)

    def end(self, partition: int) -> int:
        """Where a partition ends, with all that is not committed yet."""
        return len(self._broker.partition(self.topic, partition))

    def read(self, _timeout_s: float, most: int) -> dict[int, Records]:
        """As the real one's; what is open is waited for."""
        cut = min(self._cuts[self._reads % len(self._cuts)], most)
        self._reads += 1
        found = {partition: self._read(partition, tail, cut) for partition, tail in self.tails.items()}
        return {partition: records for partition, records in found.items() if len(records)}

    def finish(self) -> list[int]:
        """As the real one's."""
        done = [partition for partition, tail in self.tails.items() if tail.is_read]
        self.cancel(done)
        return done

    def cancel(self, partitions: Collection[int]) -> None:
        """As the real one's."""
        for partition in partitions:
            self.tails.pop(partition, None)

    def close(self) -> None:
        """As the real one's."""

    def _read(self, partition: int, tail: Tail, cut: int) -> Records:
        found = Records([], [], [])
        written = self._broker.partition(self.topic, partition)
        for record in written[tail.position : tail.position + cut]:
            if record.open:
                self._broker.pass_time(record)
                break
            if record.committed:
                found.keys.append(record.key)
                found.values.append(record.value)
                found.offsets.append(tail.position)
            tail.position += 1
        return found


@dataclass(frozen=True, slots=True)
class _Told:
    """What a failed delivery says of its record."""

    _topic: str

    def topic(self) -> str:
        return self._topic


def _error(code: int, *, fatal: bool = False, retriable: bool = False, abort: bool = False) -> KafkaException:
    return KafkaException(KafkaError(code, "scripted", fatal, retriable, abort))

"""Restore: a shard's rows come back from the changelog, and are checked against what the group has committed.

It is done in slices between the turns of the loop, so that the other shards go on and the group sees this member poll:

    assigned ──begin──▶ restoring ──step, step, … every row is there, and the check passes──▶ live
                            └──cancel: taken away──▶ (nothing)

A record that is damaged is left out, counted and told of: the row's last undamaged version stands, or the user starts
anew. A shard whose rows and offsets do not belong together, or whose rows have another form than the model's, is a
`StateMismatch`: going on would learn events twice, or not at all, and nobody would notice. Rows of another model of the
same form are none: a swap happened while the shard moved, or while nobody ran. What becomes of them: `runner.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from stream_adapt.errors import StateMismatch
from stream_adapt.kafka.changelog import Records, Tail
from stream_adapt.logs import pseudonym
from stream_adapt.record import TopicNames
from stream_adapt.state.row import CONTROL_KEY, PREFIX, ControlRow, Kind, NewerFormat, OtherLayout, RowError
from stream_adapt.state.table import Table

log = structlog.get_logger(__name__)

#: Longest wait for records in one read: a slice ends soon after its budget, and a small shard is there at once.
_READ_S = 0.02
#: Records that a slow machine takes in, in a second: no more are read at once than fit into the budget.
_RECORDS_PER_S = 50_000
_BETWEEN_REPORTS_S = 5.0


@dataclass(frozen=True, slots=True)
class Expected:
    """What the rows of every shard must belong to."""

    topics: TopicNames
    group: str
    topic_id: str  # of the input topic; empty: not known
    exactly_once: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """What was done since the last one."""

    remaining: Mapping[int, int]  # offsets to go, by partition that is not live yet
    records: int
    seconds: float
    refused: Mapping[str, int]  # damaged records by reason: one of `row.DAMAGES`


class Reader(Protocol):
    """What is asked of the changelog."""

    topic: str
    tails: dict[int, Tail]

    def begin(self, partitions: Collection[int]) -> None: ...
    def end(self, partition: int) -> int: ...
    def read(self, timeout_s: float, most: int) -> dict[int, Records]: ...
    def finish(self) -> list[int]: ...
    def cancel(self, partitions: Collection[int]) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Shard:
    """A shard on its way from assigned to live."""

    partition: int
    committed: int | None  # the group's offset; None: nothing is committed
    started_s: float
    target: int = 0  # offset of the changelog up to which it is read
    control: ControlRow | None = None
    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: str = ""
    #: By key: rows whose newest version this release or this model cannot read. A later version may still replace it.
    foreign: dict[bytes, tuple[int, RowError]] = field(default_factory=dict)


class Restorer:
    """Brings back the rows of newly assigned shards."""

    def __init__(
        self,
        reader: Reader,
        tables: Mapping[Kind, Table],
        expected: Expected,
        observe: Callable[[Slice], None] = lambda _slice: None,
        clock: Callable[[], float] = time.monotonic,
        committed: Callable[[Collection[int]], Mapping[int, int]] = lambda _partitions: {},
    ) -> None:
        self._reader = reader
        self._tables = tables
        self._expected = expected
        self._observe = observe
        self._clock = clock
        self._committed = committed
        self._shards: dict[int, Shard] = {}
        self._reported_s = 0.0

    @property
    def unfinished(self) -> Collection[int]:
        """Shards that are not live yet."""
        return self._shards.keys()

    def begin(self, committed: Mapping[int, int | None]) -> None:
        """Restores these shards. The offsets committed for them must have been asked for before: whoever wrote to
        them last has then stopped, and its last transaction has an outcome, or lies before the end that is taken now.

        Args:
            committed: the group's offset by partition; None where there is none.

        Raises:
            KafkaRefused: the changelog does not say where it ends.
        """
        now = self._reported_s = self._clock()
        for partition, offset in committed.items():
            self._shards[partition] = Shard(partition, offset, now)
        self._reader.begin(committed)
        for partition in committed:
            self._shards[partition].target = self._reader.tails[partition].target
        self._observe(Slice(self._remaining(), 0, 0.0, {}))
        log.info("restoring", changelog=self._reader.topic, remaining=self._remaining())

    def cancel(self, partitions: Collection[int]) -> None:
        """These were taken away."""
        self._reader.cancel(partitions)
        for partition in partitions:
            self._shards.pop(partition, None)
        self._observe(Slice(self._remaining(), 0, 0.0, {}))

    def step(self, budget_s: float) -> dict[int, ControlRow | None]:
        """Goes on for about `budget_s`; returns the shards whose rows are all there and belong there.

        With each its control row; None where nothing was ever committed. A shard with which another member has gone on
        meanwhile is left as it is: this one stood still, and hears at its next poll that the shard was taken away.

        Raises:
            StateMismatch: they do not belong there; says what to do.
            KafkaRefused: the changelog cannot be read.
        """
        done = {}
        for partition in self.read(budget_s):
            shard = self._shards.pop(partition)
            if self._finish(shard):
                done[partition] = shard.control
        return done

    def read(self, budget_s: float) -> list[int]:
        """The first half of a step: takes rows in; returns the shards whose rows are all there, before any check."""
        started, records, refused = self._clock(), 0, Counter[str]()
        done: list[int] = []
        most = max(int(budget_s * _RECORDS_PER_S), 1)
        while self._reader.tails and not done and (left_s := started + budget_s - self._clock()) > 0:
            for partition, found in self._reader.read(min(left_s, _READ_S), most).items():
                records += len(found)
                refused += self._load(self._shards[partition], found)
            done = self._reader.finish()
        self._observe(Slice(self._remaining(), records, self._clock() - started, refused))
        self._report()
        return done

    def close(self) -> None:
        """Lets go of the reader."""
        self._reader.close()

    def _load(self, shard: Shard, records: Records) -> Counter[str]:
        loaded = load(self._tables, shard.partition, records, shard.foreign)
        shard.control = loaded.control or shard.control
        shard.records += len(records)
        for offset, problem in loaded.damaged:
            shard.refused[problem.reason] += 1
            shard.first_refused = shard.first_refused or f"offset {offset}: {problem}"
        return Counter(problem.reason for _, problem in loaded.damaged)

    def _finish(self, shard: Shard) -> bool:
        """Whether the shard can go live."""
        if shard.refused:
            log.warning(
                "damaged changelog records were left out; the rows' last good versions stand",
                changelog=f"{self._reader.topic}[{shard.partition}]",
                records=shard.refused.total(),
                reasons=dict(shard.refused),
                first=shard.first_refused,
            )
        try:
            check(shard, self._rows_of(shard.partition), self._expected)
        except StateMismatch as mismatch:
            if self._overtaken(shard):
                log.warning(
                    "another member has gone on with this shard", partition=shard.partition, committed=shard.committed
                )
            elif (end := self._reader.end(shard.partition)) > shard.target:
                # The end that was told before was not the end: the broker that led the partition died meanwhile.
                told = {"partition": shard.partition, "read_to": shard.target, "end": end}
                log.warning("the changelog goes on behind what was read: once more", **told, mismatch=str(mismatch))
                self.begin({shard.partition: shard.committed})
            else:
                raise
            return False
        seconds = self._clock() - shard.started_s
        log.info(
            "restored",
            partition=shard.partition,
            records=shard.records,
            rows=self._rows_of(shard.partition),
            seconds=round(seconds, 3),
            records_per_s=round(shard.records / max(seconds, 1e-6)),
            next_offset=shard.control and shard.control.next_offset,
            model=shard.control and shard.control.model_version,
        )
        return True

    def _overtaken(self, shard: Shard) -> bool:
        """Whether the group's offset has moved since it was asked for."""
        offset = self._committed([shard.partition]).get(shard.partition)
        return offset is not None and max(offset, -1) != (-1 if shard.committed is None else shard.committed)

    def _rows_of(self, partition: int) -> int:
        return sum(sum(1 for _ in table.items(partition)) for table in self._tables.values())

    def _remaining(self) -> dict[int, int]:
        return {p: max(t.target - t.position, 0) for p, t in self._reader.tails.items()}

    def _report(self) -> None:
        now = self._clock()
        if self._shards and now - self._reported_s >= _BETWEEN_REPORTS_S:
            self._reported_s = now
            log.info("restoring", changelog=self._reader.topic, remaining=self._remaining())


@dataclass(slots=True)
class Loaded:
    """What some records led to, beside rows."""

    control: ControlRow | None = None
    damaged: list[tuple[int, RowError]] = field(default_factory=list)  # offset, and what is wrong


def load(
    tables: Mapping[Kind, Table], partition: int, records: Records, foreign: dict[bytes, tuple[int, RowError]]
) -> Loaded:
    """Takes the newest version of every row in `records` into its table; tombstones take rows out.

    Args:
        tables: where rows go, by kind.
        partition: the shard.
        records: of the changelog, in order.
        foreign: by key, offset and reason of what this release or this model cannot read; kept up to date.
    """
    loaded = Loaded()
    newest = dict(zip(records.keys, records.values, strict=True))
    replaced = newest.keys() & foreign.keys()
    doubtful: set[bytes | None] = set()
    for kind, table in tables.items():
        prefix = PREFIX[kind]
        keys = [key for key in newest if key is not None and key.startswith(prefix)]
        values = [newest.pop(key) for key in keys]
        doubtful |= _load_kind(table, partition, keys, values)
    doubtful |= newest.keys()
    for key in replaced - doubtful:
        del foreign[key]  # type: ignore[arg-type]
    if doubtful:
        _load_one_by_one(tables, partition, records, doubtful, foreign, loaded)
    return loaded


def _load_kind(table: Table, partition: int, keys: list[bytes], values: list[bytes | None]) -> set[bytes | None]:
    """Loads rows of one kind, each key once; returns the keys of those that must be looked at one by one."""
    if None in values:
        for key in [key for key, value in zip(keys, values, strict=True) if value is None]:
            _remove(table, partition, key)
        keys = [key for key, value in zip(keys, values, strict=True) if value is not None]
    present = [value for value in values if value is not None]
    try:
        ids = [key[2:].decode() for key in keys]
    except UnicodeDecodeError:
        return set(keys)
    rows, intact = table.layout.from_values(present)
    if intact.all():
        table.load(partition, ids, rows)
        return set()
    at = intact.nonzero()[0]
    table.load(partition, [ids[i] for i in at.tolist()], rows[at])
    return {keys[i] for i in (~intact).nonzero()[0].tolist()}


def _load_one_by_one(
    tables: Mapping[Kind, Table],
    partition: int,
    records: Records,
    keys: Collection[bytes | None],
    foreign: dict[bytes, tuple[int, RowError]],
    loaded: Loaded,
) -> None:
    """For each of the keys the newest version that is undamaged, the newest first."""
    settled: set[bytes | None] = set()
    columns = zip(reversed(records.keys), reversed(records.values), reversed(records.offsets), strict=True)
    for key, value, offset in columns:
        if key not in keys or key in settled:
            continue
        try:
            _load_one(tables, partition, key, value, loaded)
            foreign.pop(key, None)  # type: ignore[arg-type]
        except (NewerFormat, OtherLayout) as problem:
            assert key is not None
            foreign[key] = (offset, problem)
        except RowError as problem:
            loaded.damaged.append((offset, problem))
            continue
        settled.add(key)


def _load_one(
    tables: Mapping[Kind, Table], partition: int, key: bytes | None, value: bytes | None, loaded: Loaded
) -> None:
    if key == CONTROL_KEY:
        loaded.control = None if value is None else ControlRow.from_bytes(value)
        return
    for kind, table in tables.items():
        if key is not None and key.startswith(PREFIX[kind]):
            if value is None:
                _remove(table, partition, key)
            else:
                table.load(partition, [_id(key)], table.layout.from_bytes(value))
            return
    raise RowError(f"key #{pseudonym(key or b'')} is none of ours", "key")


def _id(key: bytes) -> str:
    try:
        return key[2:].decode()
    except UnicodeDecodeError as error:
        raise RowError(f"key #{pseudonym(key)} is not UTF-8", "key") from error


def _remove(table: Table, partition: int, key: bytes) -> None:
    row_id = key[2:].decode(errors="replace")
    if table.find(partition, row_id) is not None:
        table.remove(partition, row_id)


def check(shard: Shard, rows: int, expected: Expected) -> None:
    """Whether the rows of a shard belong to the group's offset and to the input topic, and have the model's form.

    Raises:
        StateMismatch: with both values and the remedies.
    """
    _check_form(shard, expected)
    where = f"{expected.topics.changelog}[{shard.partition}]"
    control, committed = shard.control, shard.committed
    reset = f"`stream-adapt state reset -c FILE --partition {shard.partition}` (the shard starts anew)"
    source = f"{expected.topics.events}[{shard.partition}]"
    if control is not None and expected.topic_id and control.topic_id not in ("", expected.topic_id):
        raise StateMismatch(
            f"{where}: the rows were learned from {source} with topic id {control.topic_id}; the topic has id "
            f"{expected.topic_id} now: it was deleted and made anew. To do: {reset}, or commit an offset for group "
            f"{expected.group!r} and keep them: `stream-adapt state accept-offset -c FILE --use group`"
        )
    if committed is None:
        if control is None and not rows:
            return
        stands = "there is no control row" if control is None else f"they are as of offset {control.next_offset}"
        raise StateMismatch(
            f"{where}: there are {rows} rows, {stands}, but group {expected.group!r} has committed nothing for "
            f"{source}: its offsets were deleted or have expired. To do: `stream-adapt state accept-offset -c FILE "
            f"--use rows` (goes on where the rows stand), or {reset}"
        )
    if control is None:
        raise StateMismatch(
            f"{where}: group {expected.group!r} has committed offset {committed} of {source}, but there is no control "
            f"row ({rows} rows): the changelog was deleted, or never written. To do: {reset}, or restore the topic "
            f"from a backup; `stream-adapt state accept-offset -c FILE --use group` keeps the rows that there are"
        )
    ahead = control.next_offset - committed
    if ahead < 0 or (ahead > 0 and expected.exactly_once):
        consequence = f"{abs(ahead)} offsets would be learned " + ("twice" if ahead > 0 else "not at all")
        raise StateMismatch(
            f"{where}: the rows are as of offset {control.next_offset}, and group {expected.group!r} has committed "
            f"offset {committed} of {source}: {consequence}. To do: `stream-adapt state accept-offset -c FILE --use "
            f"rows` (the group goes on where the rows stand), or `--use group` (the rows are taken as they are), or "
            f"{reset}"
        )


def _check_form(shard: Shard, expected: Expected) -> None:
    where = f"{expected.topics.changelog}[{shard.partition}]"
    for key, (offset, problem) in shard.foreign.items():
        if isinstance(problem, NewerFormat):
            raise StateMismatch(f"{where}@{offset}: {problem}. To do: run the release that wrote it, or a later one")
        kind = "user" if key.startswith(PREFIX[Kind.USER]) else "item"
        raise StateMismatch(
            f"{where}@{offset}: a row ({kind}) is of another model: {problem}. Rows in all: "
            f"{len(shard.foreign)}. To do: serve the model that the rows are of (control row: "
            f"{shard.control.model_version if shard.control else 'none'}), or start anew: `stream-adapt state reset -c "
            f"FILE --partition {shard.partition}`"
        )


def fingerprints(tables: Sequence[Table]) -> dict[str, int]:
    """Fingerprint of each table's layout, by kind, as in a control row."""
    return {table.layout.kind.name.lower(): table.layout.fingerprint for table in tables}

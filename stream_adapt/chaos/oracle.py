"""What must be in the topics when all is over, and what is.

The reader is a plain consumer with read_committed, outside of every group, and knows nothing of ours. Three questions:

1. `compare_outputs`: does every committed input record have exactly one output, the right one, and is there no other?
2. `compare_rows`: is every row in the changelog, byte for byte, that of a calm run over the same records?
3. `compare_scores`: does every score say what the calm run says?

The calm run is the pipeline alone, in this process, fed partition by partition: by the fifth promise of the design
neither batch cuts nor crashes nor rebalances leave a trace in rows or scores. Where other models were announced
meanwhile, each partition went over at an offset of its own, which its scores tell; the calm run goes over there, too.
`compare_versions` asks whether that happened in the order of the announcements.
"""

from __future__ import annotations

import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from stream_adapt.chaos.load import ID_HEADER, REASON_HEADER
from stream_adapt.errors import KafkaRefused
from stream_adapt.models import Model
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import RawBatch, Source
from stream_adapt.state.row import Kind, Layout, RowError
from stream_adapt.state.table import Table

#: Offenders that are named in the report, of each sort.
NAMED = 10
_CALL_TIMEOUT_S = 15.0
#: Records of a partition that go down the calm run's pipeline together: any number gives the same rows.
_CALM_CHUNK = 777
#: Outputs are rounded to seven decimals.
_SAME_SCORE = 1.5e-7

#: A row: input partition, key as in the changelog ("u:ID", "i:ID", "c:").
RowKey = tuple[int, str]
_PREFIX = {Kind.USER: "u:", Kind.ITEM: "i:"}
_KIND = {prefix: kind for kind, prefix in _PREFIX.items()}
CONTROL_KEY = "c:"


class Input(NamedTuple):
    """A committed input record."""

    place: Source
    record_id: str
    reason: str | None  # for which it must be refused; None: it must be scored
    key: bytes | None
    value: bytes | None


class Output(NamedTuple):
    """A committed output record, reduced to what is compared."""

    place: Source  # of the input record that it says it comes from
    where: str  # topic[partition]@offset
    event_id: str | None  # of a score
    reason: str | None  # of a dead letter
    key: bytes | None
    value: bytes | None


class OutputComparison(msgspec.Struct):
    """Inputs against outputs. `lost` has none, `doubled` more than one, `unexpected` come from no committed input,
    `invalid` are not what they should be; `first` names the first of each sort."""

    inputs: int = 0
    outputs: int = 0
    scores: int = 0
    dead_letters: int = 0
    lost: int = 0
    doubled: int = 0
    unexpected: int = 0
    invalid: int = 0
    first: list[str] = []

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.unexpected or self.invalid)


class RowComparison(msgspec.Struct):
    """Rows against those of the calm run; a row that only one side has is different, too."""

    compared: int = 0
    different: int = 0
    max_error: float = 0.0  # largest difference of a number
    first: list[str] = []


class _Score(msgspec.Struct, frozen=True):
    """Score v1 as a stranger would declare it from `schemas/score-v1.json`."""

    event_id: str
    user_id: str
    item_id: str
    score: float
    frozen_score: float
    updated_score: float
    level: int | None
    target: int | None
    uncertainty: float
    model_version: str
    adaptations: int
    flags: list[str]
    event_timestamp: int
    scored_at: int
    source_topic: str
    source_partition: int
    source_offset: int


class Control(msgspec.Struct, frozen=True):
    """What is compared of a control row; its bytes are a header, MessagePack and a checksum."""

    next_offset: int
    model_version: str = ""
    model_since: int = 0


_HEADER_BYTES, _CHECKSUM_BYTES = 8, 4
_decode_score = msgspec.json.Decoder(_Score).decode
_decode_control = msgspec.msgpack.Decoder(Control).decode


def read_topic(bootstrap_servers: str, topic: str, timeout_s: float = 120.0) -> list[Message]:
    """Every committed record of a topic, in order within each partition.

    The end is where the log ends for read_uncommitted: a transaction that is still open or being committed is waited
    for, instead of being taken for the end.

    Raises:
        KafkaRefused: the ends were not reached in time, or the broker reports an error.
    """
    ends = log_ends(bootstrap_servers, topic)
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": f"chaos-oracle-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "fetch.wait.max.ms": 50,
        }
    )
    deadline = time.monotonic() + timeout_s
    with closing(consumer):
        consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
        messages, unfinished = [], {p for p, end in ends.items() if end > 0}
        while unfinished:
            if time.monotonic() > deadline:
                raise KafkaRefused(f"{topic}: the ends of {sorted(unfinished)} were not reached in {timeout_s:g} s")
            for message in consumer.consume(10_000, 0.2):
                told, partition = message.error(), int(message.partition() or 0)
                if told is None:
                    messages.append(message)
                elif told.code() != KafkaError._PARTITION_EOF:
                    raise KafkaRefused(f"{topic}[{partition}]: {told}")
                elif int(message.offset() or 0) >= ends[partition]:
                    unfinished.discard(partition)
    return messages


def log_ends(bootstrap_servers: str, topic: str) -> dict[int, int]:
    """By partition: the offset behind everything that was ever written, committed or not."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    try:
        partitions = admin.list_topics(topic, timeout=_CALL_TIMEOUT_S).topics[topic].partitions
        asked = {TopicPartition(topic, p): OffsetSpec.latest() for p in partitions}  # type: ignore[no-untyped-call]
        futures = admin.list_offsets(
            asked, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=_CALL_TIMEOUT_S
        )
        ends = {tp.partition: int(future.result().offset) for tp, future in futures.items()}
    except KafkaException as error:
        raise KafkaRefused(f"{topic}: its ends cannot be had: {error}") from error
    if min(ends.values(), default=0) < 0:  # told without an error by a broker that is going down
        raise KafkaRefused(f"{topic}: its ends were not told: {ends}")
    return ends


def read_inputs(messages: Iterable[Message]) -> list[Input]:
    """Input records with what the load says of them in their headers."""
    found = []
    for message in messages:
        headers = dict(message.headers() or [])
        reason = headers.get(REASON_HEADER)
        found.append(
            Input(
                (int(message.partition() or 0), int(message.offset() or 0)),
                _text(headers[ID_HEADER]),
                None if reason is None else _text(reason),
                _bytes(message.key()),
                _bytes(message.value()),
            )
        )
    return found


def read_outputs(scores: Iterable[Message], dead_letters: Iterable[Message]) -> tuple[list[Output], list[str]]:
    """Outputs, and what is wrong with those that cannot be read as what they should be."""
    outputs, broken = [], []
    for message in scores:
        where = _where(message)
        try:
            outputs.append(_score(where, message))
        except (msgspec.DecodeError, ValueError) as error:
            broken.append(f"{where}: not a score: {error}")
    for message in dead_letters:
        where = _where(message)
        try:
            outputs.append(_dead_letter(where, message))
        except (KeyError, ValueError) as error:
            broken.append(f"{where}: not a dead letter: {error!r}")
    return outputs, broken


def compare_outputs(
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    broken: Sequence[str] = (),
    sent_again: Collection[str] = (),
) -> OutputComparison:
    """Every input exactly one output, the right one; nothing else.

    Args:
        inputs: all that were committed.
        outputs: all that can be read.
        broken: what is wrong with the others.
        sent_again: ids that may be in the input more than once.
    """
    by_place = {one.place: one for one in inputs}
    seen = Counter(output.place for output in outputs)
    lost = [one for one in inputs if not seen[one.place]]
    doubled = [one for one in inputs if seen[one.place] > 1]
    unexpected = [output for output in outputs if output.place not in by_place]
    repeated = [f"{told}: the load, or the broker, doubled it" for told in _repeated(inputs, sent_again)]
    invalid = [*broken, *_wrong(by_place, outputs), *repeated]
    return OutputComparison(
        inputs=len(inputs),
        outputs=len(outputs) + len(broken),
        scores=sum(output.reason is None for output in outputs),
        dead_letters=sum(output.reason is not None for output in outputs),
        lost=len(lost),
        doubled=len(doubled),
        unexpected=len(unexpected),
        invalid=len(invalid),
        first=[
            *(f"lost: {one.record_id}, input {_at(one.place)}" for one in lost[:NAMED]),
            *(f"doubled: {one.record_id}, input {_at(one.place)}: {_twice(one, outputs)}" for one in doubled[:NAMED]),
            *(f"unexpected: {o.where} from input {_at(o.place)}, not committed there" for o in unexpected[:NAMED]),
            *(f"invalid: {what}" for what in invalid[:NAMED]),
        ],
    )


def _wrong(inputs: Mapping[Source, Input], outputs: Iterable[Output]) -> Iterator[str]:
    """Outputs that are not what their input calls for."""
    for output in outputs:
        one = inputs.get(output.place)
        if one is None:
            continue
        if one.reason != output.reason:
            expected, actual = one.reason or "a score", output.reason or "a score"
            yield f"{output.where}: {one.record_id} has {actual}, expected {expected}"
        elif output.reason is None and output.event_id != one.record_id:
            yield f"{output.where}: a score of {output.event_id}, input {_at(one.place)} is {one.record_id}"
        elif output.key != one.key or (output.reason is not None and output.value != one.value):
            yield f"{output.where}: {one.record_id} has another key or other bytes than its input {_at(one.place)}"


def _repeated(inputs: Iterable[Input], sent_again: Collection[str]) -> Iterator[str]:
    for record_id, places in repeated_ids(inputs).items():
        if record_id not in sent_again:
            yield f"the input has {record_id} {len(places)} times"


def repeated_ids(inputs: Iterable[Input]) -> dict[str, list[Source]]:
    """Ids that are in the input more than once, and where."""
    places: dict[str, list[Source]] = {}
    for one in inputs:
        places.setdefault(one.record_id, []).append(one.place)
    return {record_id: found for record_id, found in places.items() if len(found) > 1}


def compare_load(inputs: Iterable[Input], acked: set[str], unknown: set[str]) -> list[str]:
    """What the input topic lacks, or has too much of, by what the producers were told: a fault of broker or load."""
    found = {one.record_id for one in inputs}
    lost, strange = sorted(acked - found), sorted(found - acked - unknown)
    return [
        *(f"input {one} was acknowledged and is not in the topic" for one in lost[:NAMED]),
        *(f"input {one} is in the topic and was never acknowledged" for one in strange[:NAMED]),
    ]


class Stretch(NamedTuple):
    """Scores of a partition, one after the other, that say the same version."""

    version: str
    first: int  # source offsets
    last: int


def stretches(scores: Iterable[Message]) -> dict[int, list[Stretch]]:
    """By partition of the input, which versions scored it, in the order of its records."""
    said = sorted(
        (score.source_partition, score.source_offset, score.model_version)
        for score in (_decode_score(_bytes(message.value()) or b"") for message in scores)
    )
    found: dict[int, list[Stretch]] = {}
    for partition, offset, version in said:
        known = found.setdefault(partition, [])
        if known and known[-1].version == version:
            known[-1] = known[-1]._replace(last=offset)
        else:
            known.append(Stretch(version, offset, offset))
    return found


def compare_versions(found: Mapping[int, Sequence[Stretch]], announced: Sequence[str]) -> list[str]:
    """Partitions whose scores went back to a version, or to one that nobody announced.

    Args:
        found: what scores say.
        announced: the version that everybody began with, then all that were announced, in order; some twice.
    """
    wrong = []
    for partition, parts in sorted(found.items()):
        at = -1
        for part in parts:
            later = [n for n in range(at + 1, len(announced)) if announced[n] == part.version]
            if not later:
                before = announced[at] if at >= 0 else "nothing"
                wrong.append(f"partition {partition}: {part.version} from offset {part.first} on, after {before}")
                break
            at = later[0]
    return wrong


class CalmRun(NamedTuple):
    """What the pipeline makes of the inputs when nothing happens."""

    rows: dict[RowKey, bytes]
    scores: dict[Source, bytes]
    layouts: dict[Kind, Layout]


def calm_run(
    pipeline: Pipeline,
    inputs: Iterable[Input],
    versions: Mapping[int, Sequence[Stretch]] = MappingProxyType({}),
    models: Mapping[str, Model] = MappingProxyType({}),
) -> CalmRun:
    """Runs a new pipeline over each partition's records in their order.

    Args:
        pipeline: with the model that everybody began with.
        inputs: all committed records.
        versions: by partition, which versions scored it: the pipeline serves each from its first score on.
        models: all of these versions.
    """
    by_partition: dict[int, list[Input]] = {}
    ready = {version: pipeline.adapter.ready(model) for version, model in models.items()}
    first = pipeline.adapter.model
    ready.setdefault(first.version, pipeline.adapter.ready(first))
    for one in inputs:
        by_partition.setdefault(one.place[0], []).append(one)
    scores: dict[Source, bytes] = {}
    for partition, records in sorted(by_partition.items()):
        records.sort(key=lambda one: one.place)
        pipeline.serve(ready[first.version])
        for version, part in _by_version(records, versions.get(partition, ())):
            if version is not None:
                pipeline.serve(ready[version])
            for chunk in _raw(partition, part).chunks(_CALM_CHUNK):
                block = pipeline(chunk).outputs[0]
                places = zip(block.partitions, block.offsets, strict=True)
                scores.update({place: value or b"" for place, value in zip(places, block.values, strict=True)})
                pipeline.adapter.commit()
    tables = {Kind.USER: pipeline.adapter.users, Kind.ITEM: pipeline.adapter.items}
    rows = dict(row for kind, table in tables.items() for row in _rows(kind, table, sorted(by_partition)))
    return CalmRun(rows, scores, {kind: table.layout for kind, table in tables.items()})


def _by_version(records: list[Input], parts: Sequence[Stretch]) -> Iterator[tuple[str | None, list[Input]]]:
    """A partition's records, cut where its scores say another version; what comes before any score has none."""
    starts = [part.first for part in parts]
    edges = [0, *(bisect_left(records, start, key=lambda one: one.place[1]) for start in starts), len(records)]
    for version, (start, stop) in zip([None, *(part.version for part in parts)], pairwise(edges), strict=True):
        if start < stop:
            yield version, records[start:stop]


def _raw(partition: int, records: list[Input]) -> RawBatch:
    return RawBatch(
        [one.key for one in records],
        [one.value for one in records],
        np.full(len(records), partition, dtype=np.int32),
        np.array([one.place[1] for one in records], dtype=np.int64),
    )


def _rows(kind: Kind, table: Table, partitions: Iterable[int]) -> Iterator[tuple[RowKey, bytes]]:
    for partition in partitions:
        for row_id, slot in table.items(partition):
            yield (partition, _PREFIX[kind] + row_id), table.layout.to_bytes(table.rows[slot])


def compare_scores(calm: Mapping[Source, bytes], found: Iterable[Message]) -> tuple[int, list[str]]:
    """How many scores say something else than those of the calm run, and the first of them."""
    different = []
    for message in found:
        score = _decode_score(_bytes(message.value()) or b"")
        place = (score.source_partition, score.source_offset)
        if place in calm and (what := _said_otherwise(_decode_score(calm[place]), score)):
            different.append(f"{_where(message)}: {score.event_id}: {what}")
    return len(different), different[:NAMED]


def _said_otherwise(calm: _Score, found: _Score) -> str:
    """The first field that differs; when it was scored may."""
    for name in calm.__struct_fields__:
        expected, actual = getattr(calm, name), getattr(found, name)
        if name == "scored_at" or expected == actual:
            continue
        if isinstance(expected, float) and abs(expected - actual) <= _SAME_SCORE:
            continue
        return f"{name}={actual!r}, in the calm run {expected!r}"
    return ""


def latest_rows(changelog: Iterable[Message]) -> dict[RowKey, bytes]:
    """The last record of every key, by partition; keys whose last record is a tombstone are gone."""
    rows: dict[RowKey, bytes] = {}
    for message in changelog:
        key = (int(message.partition() or 0), (_bytes(message.key()) or b"").decode())
        value = _bytes(message.value())
        if value is None:
            rows.pop(key, None)
        else:
            rows[key] = value
    return rows


def compare_rows(
    expected: Mapping[RowKey, bytes], found: Mapping[RowKey, bytes], layouts: Mapping[Kind, Layout]
) -> RowComparison:
    """Users' and items' rows, byte for byte; control rows are `compare_controls`'s."""
    result = RowComparison()
    wanted = [key for key in expected if key[1] != CONTROL_KEY]
    surplus = [key for key in found if key not in expected and key[1] != CONTROL_KEY]
    for key in [*wanted, *surplus]:
        result.compared += 1
        layout = layouts.get(_KIND.get(key[1][:2], Kind.USER))
        what, largest = _row_difference(expected.get(key), found.get(key), layout)
        result.max_error = max(result.max_error, largest)
        if what:
            result.different += 1
            if len(result.first) < NAMED:
                result.first.append(f"row {key[1]} of partition {key[0]}: {what}")
    return result


def _row_difference(expected: bytes | None, found: bytes | None, layout: Layout | None) -> tuple[str, float]:
    """In words, empty if there is none, and the largest difference of a number."""
    if expected == found:
        return "", 0.0
    if expected is None or found is None:
        return ("not in the calm run" if expected is None else "not in the changelog"), 0.0
    if layout is None or len(expected) != len(found):
        return f"{len(found)} bytes, in the calm run {len(expected)}", 0.0
    try:
        calm, row = layout.from_bytes(expected)[0], layout.from_bytes(found)[0]
    except RowError as error:
        return str(error), 0.0
    for field in layout.fields:
        if calm[field.name].tobytes() != row[field.name].tobytes():
            largest = _largest(calm[field.name], row[field.name])
            return f"{field.name}={row[field.name]}, in the calm run {calm[field.name]}", largest
    return "header or padding differ", 0.0


def _largest(one: Any, other: Any) -> float:
    return float(np.max(np.abs(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64))))


def control_rows(changelog: Iterable[Message]) -> dict[int, list[Control]]:
    """Control rows by partition, in the order in which they were committed."""
    found: dict[int, list[Control]] = {}
    for message in changelog:
        content = _bytes(message.value())
        if content is not None and _bytes(message.key()) == CONTROL_KEY.encode():
            row = _decode_control(content[_HEADER_BYTES:-_CHECKSUM_BYTES])
            found.setdefault(int(message.partition() or 0), []).append(row)
    return found


def compare_controls(
    found: Mapping[int, Sequence[Control]],
    committed: Mapping[int, int],
    versions: Mapping[int, Sequence[Stretch]] = MappingProxyType({}),
) -> list[str]:
    """Control rows of the changelog that do not stand where the group stands, or not at the model that scores say.

    Args:
        found: the changelog's control rows by partition, the last one last.
        committed: the group's offsets, by partition.
        versions: by partition, which versions scored it.
    """
    wrong = []
    for partition, offset in sorted(committed.items()):
        rows = found.get(partition, ())
        told = rows[-1].next_offset if rows else None
        if told != offset:
            wrong.append(f"control row of partition {partition}: next offset {told}, the group committed {offset}")
        if rows and versions.get(partition):
            wrong += _wrong_model(partition, rows, versions[partition])
    return wrong


def _wrong_model(partition: int, rows: Sequence[Control], parts: Sequence[Stretch]) -> Iterator[str]:
    """A shard goes over before the first score of a version, and after the last one of the version before; or where it
    had gone over to another version that scored nothing, as a row that stood there says."""
    control = rows[-1]
    of_newest = control.model_version == parts[-1].version
    before = parts[:-1] if of_newest else parts
    earliest, latest = before[-1].last + 1 if before else 0, parts[-1].first if of_newest else control.next_offset
    returned = control.model_since > latest and any(
        row.model_version != control.model_version and row.next_offset == control.model_since for row in rows
    )
    if not (returned or earliest <= control.model_since <= latest):
        yield (
            f"control row of partition {partition}: {control.model_version} since {control.model_since}; by its scores "
            f"since one of {earliest} to {latest}"
        )


def _score(where: str, message: Message) -> Output:
    score = _decode_score(_bytes(message.value()) or b"")
    for name in ("score", "frozen_score", "updated_score"):
        if not 0.0 <= getattr(score, name) <= 1.0:
            raise ValueError(f"{name}={getattr(score, name)} is no probability")
    if score.uncertainty < 0 or (score.level is None) != (score.target is None):
        raise ValueError(f"uncertainty={score.uncertainty}, level={score.level}, target={score.target}")
    place = (score.source_partition, score.source_offset)
    return Output(place, where, score.event_id, None, _bytes(message.key()), None)


def _dead_letter(where: str, message: Message) -> Output:
    headers = {str(name): _text(value) for name, value in list(message.headers() or [])}
    place = (int(headers["stream-adapt.source.partition"]), int(headers["stream-adapt.source.offset"]))
    reason = headers["stream-adapt.reason"]
    return Output(place, where, None, reason, _bytes(message.key()), _bytes(message.value()))


def _twice(one: Input, outputs: Iterable[Output]) -> str:
    return " and ".join(output.where for output in outputs if output.place == one.place)


def _where(message: Message) -> str:
    return f"{message.topic()}[{message.partition()}]@{message.offset()}"


def _at(place: Source) -> str:
    return f"[{place[0]}]@{place[1]}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value

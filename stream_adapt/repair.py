"""`stream-adapt state …`: what an operator does when rows and offsets do not belong together (exit code 5).

reset           the rows of some shards are forgotten; the group's offsets stay
accept-offset   rows and offsets are declared to belong together: the rows' mark moves, or the group's offset

Both refuse while the group has members, show what would change, and change it on request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import structlog
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from stream_adapt import service
from stream_adapt.config import Config
from stream_adapt.errors import ConfigError, KafkaRefused, StateMismatch
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.changelog import log_offsets
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.producer import OutputProducer, ProducerError
from stream_adapt.record import NO_SOURCE, Outputs
from stream_adapt.state.row import CONTROL_KEY, ControlRow, RowError

log = structlog.get_logger(__name__)

_REQUEST_TIMEOUT_S = 15.0
_READ_S = 0.2


class Change(msgspec.Struct):
    """What a command changes in one shard. An offset is None where there is none."""

    partition: int
    rows_dropped: int
    rows_at: tuple[int | None, int | None]  # the control row's offset, before and after
    group_at: tuple[int | None, int | None]  # the group's committed offset, before and after

    def __str__(self) -> str:
        parts = [f"partition {self.partition}:"]
        for name, (before, after) in (("rows at", self.rows_at), ("group at", self.group_at)):
            told = ["none" if offset is None else str(offset) for offset in (before, after)]
            parts.append(f"{name} {told[0]}" if before == after else f"{name} {told[0]} → {told[1]}")
        dropped = f" ({self.rows_dropped} rows dropped)" if self.rows_dropped else ""
        return f"{parts[0]} {', '.join(parts[1:])}{dropped}"


@dataclass(frozen=True)
class Plan:
    """What would change, and a function that does it."""

    changes: list[Change]
    apply: Callable[[], None]


@dataclass(slots=True)
class Stored:
    """What the changelog holds of a shard."""

    keys: set[bytes] = field(default_factory=set)  # of rows that are not dropped
    control: ControlRow | None = None


@dataclass(frozen=True)
class Shards:
    """Rows and offsets of an application, as they stand while no member runs."""

    config: Config
    admin: AdminClient
    topic_id: str
    committed: Mapping[int, int | None]
    stored: Mapping[int, Stored]


def plan_reset(config: Config, partitions: Collection[int] = ()) -> Plan:
    """Forgets the rows of some shards, or of all: users and items start anew from the group's offsets on.

    Raises:
        ConfigError: a partition is not there.
        KafkaRefused: the group has members, or a topic cannot be read or written.
    """
    shards = _look(config, partitions)
    changes = [
        Change(p, len(s.keys), (_offset(s.control), shards.committed[p]), (shards.committed[p], shards.committed[p]))
        for p, s in shards.stored.items()
    ]

    def apply() -> None:
        with _producer(config) as producer:
            for partition, stored in shards.stored.items():
                control = _control(shards, partition, shards.committed[partition])
                _write(producer, config, partition, {**dict.fromkeys(sorted(stored.keys)), CONTROL_KEY: control})

    return Plan(changes, apply)


def plan_accept_offset(config: Config, use: Literal["group", "rows"]) -> Plan:
    """Declares that rows and offsets belong together.

    Args:
        config: of the application.
        use: group: rows are kept, and are as of the group's offset from now on; rows: the group goes on where the rows
            stand.

    Raises:
        StateMismatch: a shard has no such offset, or the log does not hold it; says what to do.
        KafkaRefused: the group has members, or a topic cannot be read or written.
    """
    shards = _look(config)
    return _accept_group(shards) if use == "group" else _accept_rows(shards)


def _accept_group(shards: Shards) -> Plan:
    config, changes = shards.config, []
    for partition, stored in shards.stored.items():
        offset = shards.committed[partition]
        if offset is None and (stored.control or stored.keys):
            raise StateMismatch(
                f"{config.topic('events')}[{partition}]: group {config.group_id!r} has committed nothing that could be "
                f"accepted. To do: `--use rows`, or `stream-adapt state reset -c FILE --partition {partition}`"
            )
        changes.append(Change(partition, 0, (_offset(stored.control), offset), (offset, offset)))

    def apply() -> None:
        with _producer(config) as producer:
            for partition, offset in shards.committed.items():
                if offset is not None:
                    _write(producer, config, partition, {CONTROL_KEY: _control(shards, partition, offset)})

    return Plan(changes, apply)


def _accept_rows(shards: Shards) -> Plan:
    config, changes = shards.config, []
    topic = config.topic("events")
    asked = [TopicPartition(topic, partition) for partition in shards.stored]
    starts = log_offsets(shards.admin, asked, "earliest", _REQUEST_TIMEOUT_S)
    ends = log_offsets(shards.admin, asked, "latest", _REQUEST_TIMEOUT_S)
    for partition, stored in shards.stored.items():
        committed, control = shards.committed[partition], stored.control
        if control is None and (committed is not None or stored.keys):
            raise StateMismatch(
                f"{config.topic('changelog')}[{partition}]: no control row says where the rows stand. To do: `--use "
                f"group`, or `stream-adapt state reset -c FILE --partition {partition}`"
            )
        if control is not None and (control.topic_id != shards.topic_id or control.next_offset > ends[partition]):
            raise StateMismatch(
                f"{topic}[{partition}]: the rows are as of offset {control.next_offset} of a topic with id "
                f"{control.topic_id}, which was deleted; this one has id {shards.topic_id} and ends at "
                f"{ends[partition]}. To do: `stream-adapt state reset -c FILE --partition {partition}`"
            )
        if control is not None and control.next_offset < starts[partition]:
            raise StateMismatch(
                f"{topic}[{partition}]: the rows are as of offset {control.next_offset}, but the log begins at "
                f"{starts[partition]}: what lies between is gone. To do: `--use group`, or `stream-adapt state reset "
                f"-c FILE --partition {partition}`"
            )
        rows_at = _offset(control)
        changes.append(Change(partition, 0, (rows_at, rows_at), (committed, rows_at)))

    def apply() -> None:
        moved = [TopicPartition(topic, c.partition, c.group_at[1]) for c in changes if c.group_at[1] is not None]
        if moved:
            _set_offsets(shards.admin, config.group_id, moved)

    return Plan(changes, apply)


def _look(config: Config, partitions: Collection[int] = ()) -> Shards:
    admin = clients.admin(properties.common(config))
    described = service.describe_topics(admin, config)
    events = described[config.topic("events")]
    there = range(min(len(events.partitions), len(described[config.topic("changelog")].partitions)))
    unknown = sorted(set(partitions) - set(there))
    if unknown:
        raise ConfigError(f"--partition {unknown[0]}: {config.topic('events')} has partitions 0 to {len(there) - 1}")
    _refuse_members(admin, config.group_id)
    chosen = sorted(partitions) or list(there)
    return Shards(config, admin, str(events.topic_id), _committed(admin, config, chosen), _read(config, chosen))


def _refuse_members(admin: AdminClient, group: str) -> None:
    try:
        members = admin.describe_consumer_groups([group], request_timeout=_REQUEST_TIMEOUT_S)[group].result().members
    except KafkaException as error:
        found = kafka_error(error)
        if found is not None and found.code() == KafkaError.GROUP_ID_NOT_FOUND:
            return
        raise KafkaRefused(f"group {group!r} cannot be described: {found and describe(found)}") from error
    if members:
        hosts = sorted({f"{member.client_id} ({member.host})" for member in members})
        raise KafkaRefused(f"group {group!r} has {len(members)} members: {', '.join(hosts)}. To do: stop them first")


def _committed(admin: AdminClient, config: Config, partitions: list[int]) -> dict[int, int | None]:
    asked = [TopicPartition(config.topic("events"), partition) for partition in partitions]
    request = [ConsumerGroupTopicPartitions(config.group_id, asked)]
    futures = admin.list_consumer_group_offsets(request, require_stable=True, request_timeout=_REQUEST_TIMEOUT_S)
    try:
        found = futures[config.group_id].result().topic_partitions
    except KafkaException as error:
        reason = kafka_error(error)
        if reason is not None and reason.code() == KafkaError.GROUP_ID_NOT_FOUND:
            return dict.fromkeys(partitions)
        raise KafkaRefused(f"offsets of group {config.group_id!r}: {reason and describe(reason)}") from error
    return {tp.partition: tp.offset if tp.offset >= 0 else None for tp in found}


def _set_offsets(admin: AdminClient, group: str, offsets: list[TopicPartition]) -> None:
    futures = admin.alter_consumer_group_offsets(
        [ConsumerGroupTopicPartitions(group, offsets)], request_timeout=_REQUEST_TIMEOUT_S
    )
    try:
        answered = futures[group].result().topic_partitions
    except KafkaException as error:
        found = kafka_error(error)
        raise KafkaRefused(f"offsets of group {group!r} were not set: {found and describe(found)}") from error
    for tp in answered:
        if tp.error is not None:
            raise KafkaRefused(f"{tp.topic}[{tp.partition}]: the offset was not set: {describe(tp.error)}")


def _read(config: Config, partitions: list[int]) -> dict[int, Stored]:
    """What the changelog holds, read to its end."""
    stored = {partition: Stored() for partition in partitions}
    reader = service.build_changelog_reader(config)
    try:
        reader.begin(partitions)
        left = len(partitions)
        while left := left - len(reader.finish()):
            for partition, records in reader.read(_READ_S).items():
                for key, value in zip(records.keys, records.values, strict=True):
                    _note(stored[partition], key, value)
    finally:
        reader.close()
    return stored


def _note(stored: Stored, key: bytes | None, value: bytes | None) -> None:
    if key == CONTROL_KEY:
        try:
            stored.control = ControlRow.from_bytes(value) if value is not None else None
        except RowError as error:
            log.warning("control row is left out", error=str(error))
    elif key is not None and value is not None:
        stored.keys.add(key)
    elif key is not None:
        stored.keys.discard(key)


def _control(shards: Shards, partition: int, offset: int | None) -> bytes | None:
    if offset is None:
        return None
    before = shards.stored[partition].control or ControlRow(partition, offset, "", "")
    after = msgspec.structs.replace(
        before, next_offset=offset, topic_id=shards.topic_id, updated_ms=time.time_ns() // 1_000_000
    )
    return after.to_bytes()


def _offset(control: ControlRow | None) -> int | None:
    return control.next_offset if control is not None else None


@contextmanager
def _producer(config: Config) -> Iterator[OutputProducer]:
    """Transactional, under an id that no member can have."""
    settings = properties.producer(config)
    producer = None
    try:
        producer = OutputProducer(
            {**settings, "transaction.timeout.ms": config.kafka.transaction_timeout_ms},
            transactional_id=f"{config.app.name}.$state",
            socket_timeout_s=float(settings["socket.timeout.ms"]) / 1000,
            deadline_s=2 * config.kafka.transaction_timeout_ms / 1000,
        )
        yield producer
    except ProducerError as error:
        raise KafkaRefused(
            f"{config.topic('changelog')}: not written: {error}. Shards that were not written are unchanged. To do: "
            f"allow this principal Write on the topic and on transactional id {config.app.name}.$state; then again"
        ) from error
    finally:
        if producer is not None:
            producer.close()


def _write(producer: OutputProducer, config: Config, partition: int, records: Mapping[bytes, bytes | None]) -> None:
    """One transaction a shard."""
    keys, values = list(records), list(records.values())
    to = [partition] * len(keys)
    producer.begin()
    producer.send(Outputs(config.topic("changelog"), keys, values, None, to, [NO_SOURCE] * len(keys), to))
    producer.commit()

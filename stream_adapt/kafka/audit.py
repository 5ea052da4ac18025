"""`stream-adapt topics check`: is everything on Kafka's side as the product needs it? Changes nothing.

Each finding is a subject, what was looked at, a level, what was found, and what to do where it is not as it should be:

    ok        as it should be
    warning   works, but something is not promised, or could not be looked at
    error     a member would refuse to start, or would lose what it promises
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType  # type: ignore[attr-defined]

from stream_adapt.config import Config
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.features import finalized_features
from stream_adapt.kafka.permissions import Permission, group_operations, of_member, to_do
from stream_adapt.kafka.topics import Described, TopicSpec, describe_by_name

Level = Literal["ok", "warning", "error"]

_TIMEOUT_S = 15.0
_DAY_MS = 24 * 3600 * 1000
#: Events younger than this are there for a refresh, and for a group that starts anew.
_LEAST_RETENTION_MS = 7 * _DAY_MS


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    subject: str  # a topic, the group, or the broker
    check: str
    level: Level
    found: str
    to_do: str = ""

    def __str__(self) -> str:
        more = f". To do: {self.to_do}" if self.to_do else ""
        return f"{self.level:<8} {self.subject}: {self.check}: {self.found}{more}"


@dataclass(frozen=True, slots=True)
class _Topic:
    """A topic as it should be, and as it is."""

    spec: TopicSpec
    found: Any  # its description
    config: Mapping[str, str] | None  # None: not told

    def alter(self, name: str, value: str) -> str:
        return f"`kafka-configs.sh --alter --topic {self.spec.name} --add-config {name}={value}`"


def audit(config: Config, specs: Sequence[TopicSpec]) -> list[Finding]:
    """Everything that can be looked at from outside.

    Args:
        config: of the application.
        specs: its topics as they should be, the input first.

    Raises:
        KafkaRefused: no broker answers, or they turn us away.
    """
    settings = properties.common(config)
    admin = clients.reached_admin(settings)
    described = describe_by_name(admin, [spec.name for spec in specs])
    findings = [*_broker(config, settings)]
    topics = []
    for spec in specs:
        if spec.name in described.topics:
            topic = _Topic(spec, described.topics[spec.name], _config_of(admin, spec.name))
            topics.append(topic)
            findings += _topic(topic, is_input=spec is specs[0])
        else:
            findings.append(_absent(spec, described.errors[spec.name]))
    findings += _same_partitions(config, topics)
    return [*findings, *_permissions(admin, config, described)]


def _absent(spec: TopicSpec, error: KafkaError) -> Finding:
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return Finding(spec.name, "exists", "warning", "hidden from this principal", "see its permissions below")
    return Finding(spec.name, "exists", "error", describe(error), "`stream-adapt topics create -c FILE`")


def _broker(config: Config, settings: Mapping[str, Any]) -> Iterator[Finding]:
    address = config.kafka.bootstrap_servers.split(",")[0].strip()
    try:
        levels = finalized_features(address, settings)
    except (OSError, ValueError) as error:
        yield Finding(address, "features", "warning", f"not told: {error}", "look with `kafka-features.sh describe`")
        return
    told = ", ".join(f"{name}={level}" for name, level in sorted(levels.items())) or "none"
    if not levels:
        older = "a broker of before KRaft: tests run with Apache Kafka 4.3"
        yield Finding(address, "features", "warning", f"{told} finalized: {older}", "run the tests against it first")
    elif config.kafka.group_protocol == "consumer" and levels.get("group.version", 0) < 1:
        yield Finding(
            address,
            "features",
            "error",
            f"{told}: kafka.group_protocol=consumer needs group.version=1",
            "`kafka-features.sh upgrade --feature group.version=1`, or kafka.group_protocol: classic",
        )
    else:
        yield Finding(address, "features", "ok", told)


def _topic(topic: _Topic, is_input: bool) -> Iterator[Finding]:
    name, partitions = topic.spec.name, len(topic.found.partitions)
    replicas = min(len(partition.replicas) for partition in topic.found.partitions)
    yield Finding(name, "exists", "ok", f"{partitions} partitions, replication {replicas}")
    if topic.config is None:
        yield Finding(name, "configuration", "warning", "not told", "grant this principal DescribeConfigs on it")
        return
    yield _in_sync(topic, replicas, int(topic.config["min.insync.replicas"]))
    compacted = topic.spec.config["cleanup.policy"] == "compact"
    yield from _compacted(topic) if compacted else _deleted(topic, is_input)


def _in_sync(topic: _Topic, replicas: int, least: int) -> Finding:
    name, told = topic.spec.name, f"min.insync.replicas={least} of {replicas} replicas"
    if least > replicas:
        return Finding(
            name, "durability", "error", f"{told}: nothing can be written", topic.alter("min.insync.replicas", "1")
        )
    if replicas == 1:
        more = "three replicas, for anything but trying: topics.replication: 3"
        return Finding(name, "durability", "warning", f"{told}: one lost disk loses it", more)
    if least == 1:
        return Finding(
            name,
            "durability",
            "warning",
            f"{told}: what one broker alone has taken counts as written",
            topic.alter("min.insync.replicas", "2"),
        )
    if least == replicas:
        more = topic.alter("min.insync.replicas", str(replicas - 1))
        return Finding(name, "durability", "warning", f"{told}: it stands still when one broker does", more)
    return Finding(name, "durability", "ok", told)


def _deleted(topic: _Topic, is_input: bool) -> Iterator[Finding]:
    name, config = topic.spec.name, topic.config or {}
    policy = config["cleanup.policy"]
    if policy != "delete":
        lost = "events of a user take each other's place" if is_input else "records of a key take each other's place"
        yield Finding(
            name, "cleanup", "error", f"cleanup.policy={policy}: {lost}", topic.alter("cleanup.policy", "delete")
        )
        return
    kept, size = int(config["retention.ms"]), int(config["retention.bytes"])
    told = f"cleanup.policy=delete, retention.ms={kept}, retention.bytes={size}"
    if is_input and (0 <= kept < _LEAST_RETENTION_MS or size >= 0):
        yield Finding(
            name,
            "cleanup",
            "warning",
            f"{told}: a member that is down for longer than events are kept has lost some, and stops",
            topic.alter("retention.ms", f"{_LEAST_RETENTION_MS},retention.bytes=-1"),
        )
    else:
        yield Finding(name, "cleanup", "ok", told)


#: By property of a compacted topic: whether a value does, and what is lost if not.
_COMPACTION: Mapping[str, tuple[Callable[[str, str], bool], Level, str]] = {
    "cleanup.policy": (str.__eq__, "error", "rows would be deleted by age"),
    "max.compaction.lag.ms": (lambda is_, most: int(is_) <= int(most), "warning", "what was erased stays for longer"),
    "segment.bytes": (lambda is_, most: int(is_) <= int(most), "warning", "a restore reads more old versions of rows"),
    "min.cleanable.dirty.ratio": (
        lambda is_, most: float(is_) <= float(most),
        "warning",
        "a restore reads more old versions of rows",
    ),
}


def _compacted(topic: _Topic) -> Iterator[Finding]:
    config = topic.config or {}
    for name, wanted in topic.spec.config.items():
        if name not in _COMPACTION:
            continue
        does, level, lost = _COMPACTION[name]
        if does(config[name], wanted):
            yield Finding(topic.spec.name, "compaction", "ok", f"{name}={config[name]}")
        else:
            yield Finding(
                topic.spec.name, "compaction", level, f"{name}={config[name]}: {lost}", topic.alter(name, wanted)
            )


def _same_partitions(config: Config, topics: Sequence[_Topic]) -> Iterator[Finding]:
    """A shard's rows lie in the changelog's partition of the input partition's number."""
    count = {topic.spec.name: len(topic.found.partitions) for topic in topics}
    events, changelog = config.topic("events"), config.topic("changelog")
    if events in count and changelog in count and count[events] != count[changelog]:
        yield Finding(
            changelog,
            "partitions",
            "error",
            f"{count[changelog]}, and {events} has {count[events]}: a shard's rows lie in the partition of its number",
            f"if partitions were added to {events}, users have moved to other shards and their rows have not: start "
            "anew with an app.name and topics of its own; if the changelog was made by hand, make it with as many",
        )


def _permissions(admin: AdminClient, config: Config, described: Described) -> Iterator[Finding]:
    allowed = dict(described.allowed)
    of_group = group_operations(admin, config.group_id)
    if of_group is not None:
        allowed[ResourceType.GROUP, config.group_id] = of_group
    exactly_once = config.delivery == "exactly_once"
    needed = of_member(config.topic_names, config.group_id, config.transactional_id if exactly_once else None)
    for one in needed:
        yield _permission(one, allowed.get((one.resource, one.name)))


def _permission(one: Permission, given: Any) -> Finding:
    if given is None:
        return Finding(one.name, "permission", "warning", f"{one}: not told", "a member finds out when it starts")
    if one.is_among(given):
        return Finding(one.name, "permission", "ok", str(one))
    level: Level = "error" if one.required else "warning"
    return Finding(one.name, "permission", level, f"{one} is missing: {one.why}", to_do([one]))


def _config_of(admin: AdminClient, topic: str) -> dict[str, str] | None:
    """None if it is not told."""
    resource = ConfigResource(ResourceType.TOPIC, topic)
    try:
        found = admin.describe_configs([resource], request_timeout=_TIMEOUT_S)[resource].result()
    except KafkaException as error:
        if kafka_error(error) is None:
            raise
        return None
    finally:
        clients.tell(admin)
    return {name: entry.value for name, entry in found.items()}

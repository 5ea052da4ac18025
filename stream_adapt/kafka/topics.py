"""The product's topics: what they are called, how they are cut, and how they come to be.

Topics are created on request, never by accident: a topic that the broker makes by itself has its default number of
partitions, and the number of partitions decides which shard a user's row lives in. So an existing topic with another
number of partitions is reported, and left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ResourceType  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic

from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.kafka import clients
from stream_adapt.kafka.errors import describe, kafka_error
from stream_adapt.kafka.permissions import Allowed
from stream_adapt.record import TopicNames as TopicNames

if TYPE_CHECKING:
    from confluent_kafka.admin._metadata import TopicMetadata

#: Let the broker's `default.replication.factor` decide.
BROKER_DEFAULT = -1

#: The changelog keeps the last version of every row. Segments are small and cleaned early, so that a restore reads few
#: old versions; and what was erased is gone a day later, because the active segment is closed by then, too.
CHANGELOG_CONFIG = {
    "cleanup.policy": "compact",
    "segment.bytes": str(64 * 1024 * 1024),
    "min.cleanable.dirty.ratio": "0.1",
    "max.compaction.lag.ms": str(24 * 3600 * 1000),
}

#: The models topic keeps what was last said of every version.
MODELS_CONFIG = {"cleanup.policy": "compact"}
#: The refresh topic keeps the state of the controller, and what was last asked of it.
REFRESH_CONFIG = {"cleanup.policy": "compact"}
_DESCRIBE_TIMEOUT_S = 15.0
_LONGEST_NAME = 249
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it should be. ConfigError for a name or a number that Kafka would refuse."""

    name: str
    partitions: int = 1
    replication: int = BROKER_DEFAULT
    config: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _LONGEST_NAME or self.name in (".", "..") or set(self.name) - _NAME_CHARACTERS:
            raise ConfigError(
                f"{self.name!r} is not a topic name: 1 to {_LONGEST_NAME} letters, digits, dots, dashes, underscores."
            )
        if self.partitions < 1:
            raise ConfigError(f"Topic {self.name}: {self.partitions} partitions; at least 1 is needed.")
        if self.replication < 1 and self.replication != BROKER_DEFAULT:
            raise ConfigError(
                f"Topic {self.name}: replication factor {self.replication}; give 1 or more, or {BROKER_DEFAULT} for "
                "the broker's default."
            )


class TopicStatus(StrEnum):
    """What was found, or done, about a topic."""

    CREATED = "created"
    EXISTS = "already there"
    PARTITIONS_DIFFER = "exists with a different number of partitions"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class TopicOutcome:
    """One topic's outcome; `partitions` is the number it has now, 0 if it is missing."""

    spec: TopicSpec
    status: TopicStatus
    partitions: int

    @property
    def ok(self) -> bool:
        """Whether the topic is now as it should be."""
        return self.status in (TopicStatus.CREATED, TopicStatus.EXISTS)

    def __str__(self) -> str:
        match self.status:
            case TopicStatus.PARTITIONS_DIFFER:
                return (
                    f"{self.spec.name}: exists with {self.partitions} partitions, not {self.spec.partitions}; left as "
                    f"it is. Ask for {self.partitions}, or choose another name, or delete the topic and its data first."
                )
            case TopicStatus.MISSING:
                return f"{self.spec.name}: missing. Create it: stream-adapt topics create"
            case _:
                return f"{self.spec.name}: {self.status} ({self.partitions} partitions)"


def product_topics(
    app: str, partitions: int, replication: int = BROKER_DEFAULT, names: TopicNames | None = None
) -> tuple[TopicSpec, ...]:
    """What an app with `partitions` input partitions needs; `names` where they are not called after the app."""
    names = names or TopicNames.of(app)
    # With three copies one broker may be down and acks=all still means two of them.
    durable = {"min.insync.replicas": "2"} if replication >= 3 else {}
    config = {"cleanup.policy": "delete", **durable}
    return (
        TopicSpec(names.events, partitions, replication, config),
        TopicSpec(names.scores, partitions, replication, config),
        # One partition: they are few, and read by people.
        TopicSpec(names.dead_letters, 1, replication, config),
        # As many as the input: a shard's rows lie in the partition of its number.
        TopicSpec(names.changelog, partitions, replication, {**CHANGELOG_CONFIG, **durable}),
        # One partition each: the whole stream is watched by one reader.
        TopicSpec(names.learning, 1, replication, config),
        TopicSpec(names.alarms, 1, replication, config),
        # One partition: the newest of all is what counts.
        TopicSpec(names.models, 1, replication, {**MODELS_CONFIG, **durable}),
        TopicSpec(names.refresh, 1, replication, {**REFRESH_CONFIG, **durable}),
    )


def create_topics(
    admin_config: Mapping[str, Any], specs: Sequence[TopicSpec], timeout_s: float = 30.0
) -> list[TopicOutcome]:
    """Create the topics that are not there yet; one outcome per spec, in their order. Doing it twice is harmless.

    Returns when every partition of the topics has a leader, so that clients can use them at once.

    Args:
        admin_config: librdkafka properties of an AdminClient, at least `bootstrap.servers`.
        specs: the topics wanted.
        timeout_s: limit for all of it, seconds.

    Raises:
        KafkaRefused: the broker cannot be reached, or refused a topic (say, more replicas than brokers).
    """
    if not specs:
        return []
    deadline = time.monotonic() + timeout_s
    admin = clients.reached_admin(admin_config, timeout_s)
    created = _create_missing(admin, specs, timeout_s)
    found = _await_leaders(admin, specs, deadline)
    return [_outcome(spec, found.get(spec.name), created=spec.name in created) for spec in specs]


def check_topics(
    admin_config: Mapping[str, Any], specs: Sequence[TopicSpec], timeout_s: float = 30.0
) -> list[TopicOutcome]:
    """What `create_topics` would find, changing nothing. KafkaRefused if the broker cannot be reached."""
    found = _describe(clients.reached_admin(admin_config, timeout_s), timeout_s)
    return [_outcome(spec, found.get(spec.name), created=False) for spec in specs]


@dataclass(frozen=True, slots=True)
class Described:
    """What brokers say of some topics, by name, and why they say nothing of the others."""

    topics: Mapping[str, Any]
    errors: Mapping[str, KafkaError]

    @property
    def allowed(self) -> Allowed:
        """What we may do with each topic, as far as it is told; nothing, where a topic is hidden from us."""
        told = {n: t.authorized_operations for n, t in self.topics.items() if t.authorized_operations is not None}
        hidden = {n: () for n, e in self.errors.items() if e.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED}
        return {(ResourceType.TOPIC, name): operations for name, operations in {**told, **hidden}.items()}


def describe_by_name(admin: AdminClient, names: Sequence[str]) -> Described:
    """Descriptions of topics, with what we may do with them.

    Raises:
        KafkaRefused: no broker answers.
    """
    asked = admin.describe_topics(
        TopicCollection(list(names)), include_authorized_operations=True, request_timeout=_DESCRIBE_TIMEOUT_S
    )
    topics, errors = {}, {}
    for name, future in asked.items():
        try:
            topics[name] = future.result()
        except KafkaException as error:
            found = kafka_error(error)
            if found is None or found.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT):
                raise KafkaRefused(f"{name}: cannot be described: {found and describe(found)}") from error
            errors[name] = found
        finally:
            clients.tell(admin)
    return Described(topics, errors)


def _create_missing(admin: AdminClient, specs: Sequence[TopicSpec], timeout_s: float) -> set[str]:
    """The names of the topics that were created now."""
    topics = [
        NewTopic(s.name, num_partitions=s.partitions, replication_factor=s.replication, config=dict(s.config))
        for s in specs
    ]
    created = set()
    futures = admin.create_topics(topics, operation_timeout=timeout_s, request_timeout=timeout_s)
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise KafkaRefused(f"Topic {name} could not be created: {reason.str()} ({reason.name()}).") from error
        else:
            created.add(name)
    return created


def _await_leaders(admin: AdminClient, specs: Sequence[TopicSpec], deadline: float) -> dict[str, TopicMetadata]:
    """Metadata once all topics are known with their leaders: the broker learns of them after the controller did."""
    while True:
        found = _describe(admin, max(deadline - time.monotonic(), 1.0))
        waiting = [spec.name for spec in specs if spec.name not in found or not _has_leaders(found[spec.name])]
        if not waiting:
            return found
        if time.monotonic() > deadline:
            raise KafkaRefused(f"No leader for every partition of {', '.join(waiting)}: are all brokers up?")
        time.sleep(0.02)


def _has_leaders(topic: TopicMetadata) -> bool:
    return bool(topic.partitions) and all(p.leader >= 0 and p.error is None for p in topic.partitions.values())


def _describe(admin: AdminClient, timeout_s: float) -> dict[str, TopicMetadata]:
    try:
        return dict(admin.list_topics(timeout=timeout_s).topics)
    except KafkaException as error:
        reason: KafkaError = error.args[0]
        raise KafkaRefused(
            f"The broker gave no answer within {timeout_s:g} s: {reason.str()} ({reason.name()}). "
            "Is the address (bootstrap.servers) right, and the broker up?"
        ) from error
    finally:
        clients.tell(admin)


def _outcome(spec: TopicSpec, found: TopicMetadata | None, created: bool) -> TopicOutcome:
    partitions = len(found.partitions) if found else 0
    if not partitions:
        status = TopicStatus.MISSING
    elif partitions != spec.partitions:
        status = TopicStatus.PARTITIONS_DIFFER
    else:
        status = TopicStatus.CREATED if created else TopicStatus.EXISTS
    return TopicOutcome(spec, status, partitions)

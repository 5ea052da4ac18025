"""What a principal must be allowed to do: one table, documented, checked at the start, and granted in tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AclOperation, AdminClient, ResourceType  # type: ignore[attr-defined]

from stream_adapt.kafka.errors import kafka_error
from stream_adapt.record import TopicNames

_TIMEOUT_S = 15.0
#: Kafka's own names of what is asked for.
RESOURCES = {
    ResourceType.TOPIC: "topic",
    ResourceType.GROUP: "group",
    ResourceType.TRANSACTIONAL_ID: "transactional id",
}

_DENIALS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: (ResourceType.TOPIC, "topic"),
    KafkaError.GROUP_AUTHORIZATION_FAILED: (ResourceType.GROUP, "group"),
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: (ResourceType.TRANSACTIONAL_ID, "transactional_id"),
}

#: What else a permission allows.
_IMPLIED = {
    AclOperation.DESCRIBE: {AclOperation.READ, AclOperation.WRITE, AclOperation.DELETE, AclOperation.ALTER},
    AclOperation.DESCRIBE_CONFIGS: {AclOperation.ALTER_CONFIGS},
}


@dataclass(frozen=True, slots=True)
class Permission:
    """One operation on one resource."""

    operation: AclOperation
    resource: ResourceType
    name: str
    why: str = ""
    required: bool = True  # else something is only not checked

    def __str__(self) -> str:
        return f"{operation_name(self.operation)} on {RESOURCES[self.resource]} {self.name}"

    def is_among(self, allowed: Collection[AclOperation]) -> bool:
        """Whether operations that are allowed on the resource contain or imply this one."""
        enough = {self.operation, AclOperation.ALL, *_IMPLIED.get(self.operation, ())}
        return not enough.isdisjoint(allowed)


def of_commands(app: str, topics: TopicNames, group: str) -> dict[str, tuple[Permission, ...]]:
    """What the other commands need on top of what a member does; those that are not named need nothing."""
    topic, transactions, write = ResourceType.TOPIC, ResourceType.TRANSACTIONAL_ID, AclOperation.WRITE
    every = [getattr(topics, field.name) for field in fields(topics)]
    # What only the refresh reads and writes is hidden from others without it.
    seen = [Permission(AclOperation.DESCRIBE, topic, name) for name in (topics.alarms, topics.refresh)]
    repairing = (Permission(write, transactions, f"{app}.$state"),)
    return {
        "topics create": (*seen, *(Permission(AclOperation.CREATE, topic, name) for name in every)),
        "topics check": (*seen, *(Permission(AclOperation.DESCRIBE_CONFIGS, topic, name) for name in every)),
        "state reset": repairing,
        "state accept-offset": repairing,
        "state erase": (
            Permission(write, topic, topics.events),
            Permission(AclOperation.READ, topic, topics.scores),
        ),
        "dead-letters list": (Permission(AclOperation.READ, topic, topics.dead_letters),),
        "dead-letters replay": (
            Permission(AclOperation.READ, topic, topics.dead_letters),
            Permission(write, topic, topics.events),
            Permission(AclOperation.READ, ResourceType.GROUP, f"{group}.dead-letters-replay"),
            Permission(write, transactions, f"{app}.dead-letters-replay"),
        ),
    }


def to_do(permissions: Collection[Permission]) -> str:
    """What is missing, and the commands by which an administrator gives it, one for each resource."""
    operations: dict[tuple[str, str], list[str]] = {}
    for one in permissions:
        option = RESOURCES[one.resource].replace(" ", "-")
        operations.setdefault((option, one.name), []).append(f"--operation {operation_name(one.operation)}")
    commands = ", ".join(
        f"`kafka-acls.sh --add --allow-principal User:NAME {' '.join(allowed)} --{option} {name}`"
        for (option, name), allowed in operations.items()
    )
    return f"grant this principal {', '.join(map(str, permissions))}: {commands}"


def denied(error: KafkaError | None, operation: AclOperation, **names: str | Collection[str] | None) -> str | None:
    """What to do about an error that says that a permission is missing; None for other errors.

    Args:
        error: of Kafka.
        operation: that was tried.
        names: of the `topic`, `group` and `transactional_id` that it was tried on, as far as they are known; several,
            where it may have been any of them.
    """
    found = _DENIALS.get(error.code()) if error is not None else None
    if found is None:
        return None
    resource, word = found
    name = names.get(word) or "NAME"
    lacking = [Permission(operation, resource, one) for one in ([name] if isinstance(name, str) else sorted(name))]
    return to_do(lacking)


def operation_name(operation: AclOperation) -> str:
    """As Kafka's tools write it: `DescribeConfigs`."""
    return "".join(word.capitalize() for word in operation.name.split("_"))


def of_member(
    topics: TopicNames, group: str, transactional_id: str | None, *, follows: bool = True
) -> tuple[Permission, ...]:
    """What `stream-adapt run` needs. Read and Write imply Describe.

    Args:
        topics: the application's.
        group: the consumer group.
        transactional_id: the member's, or None where nothing is transactional.
        follows: whether the announced model is served.
    """
    topic, read, write = ResourceType.TOPIC, AclOperation.READ, AclOperation.WRITE
    needed = [
        Permission(read, topic, topics.events, "events are read"),
        Permission(write, topic, topics.scores, "scores and receipts are written"),
        Permission(write, topic, topics.dead_letters, "so are dead letters"),
        Permission(read, topic, topics.changelog, "rows come back from it"),
        Permission(write, topic, topics.changelog, "rows that changed go there"),
        Permission(
            AclOperation.DESCRIBE_CONFIGS,
            topic,
            topics.changelog,
            "its compaction is checked before anything is read; without it, it is not",
            required=False,
        ),
        Permission(write, topic, topics.learning, "and how well events were predicted"),
        Permission(read, ResourceType.GROUP, group, "members share the partitions, and commit"),
    ]
    if follows:
        needed.append(Permission(read, topic, topics.models, "the model that is announced is served; model.follow"))
    if transactional_id is not None:
        why = "one transaction for all of it; one id for each app.instance"
        needed.append(Permission(write, ResourceType.TRANSACTIONAL_ID, transactional_id, why))
    return tuple(needed)


#: What a resource allows us, as far as it is told: by kind and name.
Allowed = Mapping[tuple[ResourceType, str], Collection[AclOperation]]


def missing(needed: Iterable[Permission], allowed: Allowed) -> list[Permission]:
    """Permissions that are not given; what is not told counts as given."""
    asked = [(one, allowed.get((one.resource, one.name))) for one in needed]
    return [one for one, given in asked if given is not None and not one.is_among(given)]


def group_operations(admin: AdminClient, group: str) -> Collection[AclOperation] | None:
    """What is allowed on a consumer group; None if that is not told: nobody has joined it, its coordinator moves."""
    asked = admin.describe_consumer_groups([group], include_authorized_operations=True, request_timeout=_TIMEOUT_S)
    try:
        told = asked[group].result().authorized_operations
    except KafkaException as error:
        found = kafka_error(error)
        return () if found is not None and found.code() == KafkaError.GROUP_AUTHORIZATION_FAILED else None
    return told  # type: ignore[no-any-return]

"""librdkafka properties of our clients, made of the configuration; what the loop relies on is set here alone."""

from __future__ import annotations

from stream_adapt.config import Config, Scalar, resolve_secrets

#: Time between a record reaching the producer and being sent: batches fill, and a commit does not wait for it.
_LINGER_MS = 5
#: Room in the producer's queue; a whole batch and its dead letters fit, so that `send` rarely waits.
_QUEUE_MESSAGES = 1_000_000
_QUEUE_KBYTES = 1_048_576
#: Records fetched ahead, so that the next batch is there when the last one is committed.
_PREFETCH_KBYTES = 65_536
#: The same for a restore: it is memory that a member starts with, and a restore waits for decoding, not for fetching.
_RESTORE_PREFETCH_KBYTES = 16_384
#: A request without an answer may be sent again after this; librdkafka wants it below transaction.timeout.ms.
SOCKET_TIMEOUT_MS = 10_000


#: A poll comes at least so often: producers and rebalances may each take a minute. It is also how long a rebalance
#: waits for a member that is gone without the broker having noticed, as after some restarts of a coordinator.
_POLL_INTERVAL_MS = 120_000
#: What a consumer's settings say of its group starts with one of these; the client checks them against each other.
_MEMBERSHIP = ("group.", "max.poll.", "session.", "heartbeat.", "partition.assignment.")


#: Making two models ready, compiling included, comes between two polls of a refresh controller.
_CONTROLLER_INTERVAL_MS = 300_000


def common(config: Config) -> dict[str, Scalar]:
    """Every client's: where the brokers are, who we are, and what the operator passes through."""
    return {
        "bootstrap.servers": config.kafka.bootstrap_servers,
        "client.id": f"{config.app.name}.{config.app.instance}",
        "socket.timeout.ms": min(SOCKET_TIMEOUT_MS, config.kafka.transaction_timeout_ms),
        **resolve_secrets(config.kafka.properties),
    }


def consumer(config: Config) -> dict[str, Scalar]:
    """The input consumer's (reliability rule 1). KIP-848 groups refuse the classic protocol's settings."""
    classic: dict[str, Scalar] = {
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": config.kafka.session_timeout_ms,
    }
    return {
        "queued.max.messages.kbytes": _PREFETCH_KBYTES,
        "fetch.queue.backoff.ms": 10,
        "max.poll.interval.ms": max(_POLL_INTERVAL_MS, config.kafka.session_timeout_ms),
        **common(config),
        **resolve_secrets(config.kafka.consumer),
        "group.id": config.group_id,
        "group.protocol": config.kafka.group_protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",
        "check.crcs": True,
        "enable.partition.eof": True,  # markers of transactions make the end higher than the last record: `lag`
        **(classic if config.kafka.group_protocol == "classic" else {}),
    }


def producer(config: Config) -> dict[str, Scalar]:
    """The output producer's."""
    transactional = config.delivery == "exactly_once"
    return {
        "linger.ms": _LINGER_MS,
        "queue.buffering.max.messages": _QUEUE_MESSAGES,
        "queue.buffering.max.kbytes": _QUEUE_KBYTES,
        "partitioner": "murmur2_random",  # the Java client's, so that a key lies where it looks for it
        **common(config),
        **resolve_secrets(config.kafka.producer),
        **({"transaction.timeout.ms": config.kafka.transaction_timeout_ms} if transactional else {}),
    }


def changelog_reader(config: Config) -> dict[str, Scalar]:
    """The restore's. It joins no group; the id is there because the client wants one, and the principal may use it."""
    return {
        "queued.max.messages.kbytes": _RESTORE_PREFETCH_KBYTES,
        "fetch.queue.backoff.ms": 10,
        **common(config),
        **{k: v for k, v in resolve_secrets(config.kafka.consumer).items() if not k.startswith(_MEMBERSHIP)},
        "group.id": config.group_id,
        "group.protocol": "classic",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "check.crcs": True,
        "enable.partition.eof": True,  # the only sign that everything up to the end was read
    }


def learning_reader(config: Config) -> dict[str, Scalar]:
    """The refresh controllers': one of their group has the learning topic's partition, and keeps it when others come.

    Offsets are not committed: where to go on is part of the controller's state.
    """
    return {
        **changelog_reader(config),
        "group.id": f"{config.app.name}.refresh",
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": config.kafka.session_timeout_ms,
        "max.poll.interval.ms": max(_CONTROLLER_INTERVAL_MS, config.kafka.session_timeout_ms),
    }

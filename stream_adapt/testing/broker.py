"""A real Apache Kafka for tests, as pytest fixtures: `pytest_plugins = ["stream_adapt.testing.broker"]`.

Which one, in this order:

- `STREAM_ADAPT_TEST_BOOTSTRAP=host:port`: a broker that runs already; nothing of it is changed but our own topics;
- `STREAM_ADAPT_TEST_BROKER=docker`: Apache Kafka's own container image, by testcontainers;
- otherwise the embedded one, which needs neither (`stream_adapt.kafka.embedded`).

A test that cannot have its broker is skipped, with the reason, except under `CI=true`: there it fails.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from stream_adapt.errors import ConfigError, KafkaRefused, StreamAdaptError
from stream_adapt.kafka.embedded import KAFKA_VERSION, SINGLE_NODE, free_ports, wait_until_answering
from stream_adapt.kafka.topics import TopicSpec, create_topics
from stream_adapt.testing.proxy import FaultProxy, embedded_behind_proxy

BOOTSTRAP_VARIABLE = "STREAM_ADAPT_TEST_BOOTSTRAP"
BROKER_VARIABLE = "STREAM_ADAPT_TEST_BROKER"

#: Settings of a broker for tests: what happens after a timeout need not be waited for as long as is usual.
IMPATIENT = {
    "group.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
}
_CONTAINER_PORT = 9092
_CONTAINER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker that answers; `kind` says where it came from. The embedded one has a listener behind a fault proxy."""

    bootstrap_servers: str
    kind: Literal["given", "docker", "embedded"]
    proxy: FaultProxy | None = None


class TopicFactory(Protocol):
    """Makes topics whose names no other test has."""

    def __call__(self, partitions: int = 1, prefix: str = "test", config: Mapping[str, str] | None = None) -> str:
        """The name of a new topic, `prefix` and something random."""
        ...


@pytest.fixture(scope="session")
def kafka_broker() -> Iterator[RunningBroker]:
    """A real Apache Kafka for all tests of the session (see this module); nothing of it is left behind."""
    with contextlib.ExitStack() as stack:
        try:
            broker = stack.enter_context(running_broker())
        except StreamAdaptError as error:
            _skip_or_fail(str(error))
        yield broker


@pytest.fixture
def topic_factory(kafka_broker: RunningBroker) -> Iterator[TopicFactory]:
    """A function that makes topics for one test; they are deleted after it."""
    admin_config: dict[str, Any] = {"bootstrap.servers": kafka_broker.bootstrap_servers}
    made: list[str] = []

    def make(partitions: int = 1, prefix: str = "test", config: Mapping[str, str] | None = None) -> str:
        spec = TopicSpec(f"{prefix}-{uuid.uuid4().hex[:12]}", partitions, config=config or {})
        made.append(spec.name)
        create_topics(admin_config, [spec])
        return spec.name

    yield make
    if made:
        # Held in a variable: a client that is collected takes its open requests along.
        admin = AdminClient(admin_config)
        for deleted in admin.delete_topics(made, operation_timeout=30).values():
            deleted.result()


@pytest.fixture
def fault_proxy(kafka_broker: RunningBroker) -> Iterator[FaultProxy]:
    """The way to the broker on which things can go wrong; without faults before and after the test.

    Clients whose `bootstrap.servers` is the proxy's `address` go through it, others do not. A broker that is not ours
    does not advertise the proxy's address: with one, the test is skipped.
    """
    proxy = kafka_broker.proxy
    if proxy is None:
        pytest.skip(f"only the embedded broker advertises a proxy's address, and this one is {kafka_broker.kind}")
    proxy.clear()
    yield proxy
    proxy.clear()


@contextlib.contextmanager
def running_broker() -> Iterator[RunningBroker]:
    """The broker that the environment asks for, for as long as the `with` lasts.

    Raises:
        ConfigError: the environment asks for something that is not installed or not known.
        KafkaRefused: the broker does not answer, or cannot be started.
    """
    wanted = os.environ.get(BROKER_VARIABLE, "embedded")
    if address := os.environ.get(BOOTSTRAP_VARIABLE):
        _require_answer(address, 15.0, f"{BOOTSTRAP_VARIABLE}={address}")
        yield RunningBroker(address, "given")
    elif wanted == "docker":
        with _container() as address:
            yield RunningBroker(address, "docker")
    elif wanted == "embedded":
        with embedded_behind_proxy(properties=IMPATIENT) as behind:
            yield RunningBroker(behind.kafka.bootstrap_servers, "embedded", behind.proxy)
    else:
        raise ConfigError(f"{BROKER_VARIABLE}={wanted} is not known: give embedded or docker, or {BOOTSTRAP_VARIABLE}.")


def read_all(
    bootstrap_servers: str,
    topic: str,
    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
    timeout_s: float = 30.0,
) -> list[Message]:
    """Every message of a topic, as a plain consumer outside all groups sees it; in order within each partition.

    The end is where the broker says it is: counting up to the high watermark would wait for ever, because
    transaction markers and aborted records have offsets, too, and are never handed out.

    Raises:
        TimeoutError: the ends were not reached within `timeout_s` seconds.
        KafkaException: the broker reported an error, say, an unknown topic.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": f"read-all-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
            # An unknown topic would otherwise be asked for again until the time is over.
            "allow.auto.create.topics": False,
        }
    )
    with contextlib.closing(consumer):
        found = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in found.partitions])
        return _read_to_ends(consumer, set(found.partitions), time.monotonic() + timeout_s)


def _read_to_ends(consumer: Consumer, unfinished: set[int], deadline: float) -> list[Message]:
    messages = []
    while unfinished:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the end of partitions {sorted(unfinished)} was not reached in time")
        for message in consumer.consume(10_000, timeout=0.1):
            error = message.error()
            if error is None:
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                unfinished.discard(message.partition())
            else:
                raise KafkaException(error)
    return messages


def _skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI=true, and no broker to test with: {reason}", pytrace=False)
    pytest.skip(f"no broker to test with: {reason}")


def _require_answer(address: str, timeout_s: float, name: str) -> None:
    try:
        wait_until_answering(address, timeout_s)
    except TimeoutError as error:
        raise KafkaRefused(f"{name}: {error}. Is it up?") from error


@contextlib.contextmanager
def _container() -> Iterator[str]:
    """Apache Kafka's own image; testcontainers' KafkaContainer knows only that of Confluent."""
    try:
        from docker.errors import DockerException
        from testcontainers.core.container import DockerContainer
    except ImportError as error:
        raise ConfigError(f"{BROKER_VARIABLE}=docker: {error}. pip install 'stream-adapt[testing]'") from error
    # The advertised address is a setting, so the port on this side must be known before the start.
    (port,) = free_ports(1)
    with contextlib.ExitStack() as stack:
        try:
            container = DockerContainer(f"apache/kafka:{KAFKA_VERSION}").with_bind_ports(_CONTAINER_PORT, port)
            host = container.get_docker_client().host()
            for key, value in _container_settings(f"{host}:{port}").items():
                container.with_env(f"KAFKA_{key.upper().replace('.', '_')}", value)
            stack.enter_context(container)
        except (DockerException, OSError) as error:
            raise KafkaRefused(f"{BROKER_VARIABLE}=docker: no container could be started: {error}") from error
        _require_answer(f"{host}:{port}", _CONTAINER_TIMEOUT_S, "the container of Apache Kafka")
        yield f"{host}:{port}"


def _container_settings(advertised: str) -> dict[str, str]:
    return {
        **SINGLE_NODE,
        **IMPATIENT,
        "listeners": f"PLAINTEXT://:{_CONTAINER_PORT},CONTROLLER://:9093",
        "advertised.listeners": f"PLAINTEXT://{advertised}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.quorum.voters": "1@localhost:9093",
    }

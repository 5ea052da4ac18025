"""Creating the product's topics: doing it twice is harmless, and a wrong number of partitions is said, not mended."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient

from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.kafka.embedded import free_ports
from stream_adapt.kafka.topics import TopicNames, TopicSpec, TopicStatus, check_topics, create_topics, product_topics
from stream_adapt.testing.broker import RunningBroker


@pytest.fixture
def app(kafka_broker: RunningBroker) -> Iterator[str]:
    """An app's name that no other test has; its topics are deleted at the end."""
    name = f"app-{uuid.uuid4().hex[:8]}"
    yield name
    admin = AdminClient({"bootstrap.servers": kafka_broker.bootstrap_servers})
    ours = [topic for topic in admin.list_topics(timeout=10).topics if topic.startswith(name)]
    for deleted in admin.delete_topics(ours, operation_timeout=30).values() if ours else ():
        deleted.result()


@pytest.mark.broker
def test_topics_are_created_once_and_found_the_second_time(kafka_broker: RunningBroker, app: str) -> None:
    config = {"bootstrap.servers": kafka_broker.bootstrap_servers}
    specs = product_topics(app, partitions=4)
    assert {TopicStatus.MISSING} == {outcome.status for outcome in check_topics(config, specs)}
    created, found = create_topics(config, specs), create_topics(config, specs)
    assert [outcome.status for outcome in created] == [TopicStatus.CREATED] * len(specs)
    assert [outcome.status for outcome in found] == [TopicStatus.EXISTS] * len(specs)
    assert [spec.partitions for spec in specs] == [outcome.partitions for outcome in found]
    assert found == check_topics(config, specs)
    assert all(outcome.ok for outcome in created + found)


@pytest.mark.broker
def test_a_topic_with_another_number_of_partitions_is_reported_and_left(kafka_broker: RunningBroker, app: str) -> None:
    config = {"bootstrap.servers": kafka_broker.bootstrap_servers}
    create_topics(config, [TopicSpec(f"{app}.events", 2)])
    events, *others = create_topics(config, product_topics(app, partitions=4))
    assert (events.status, events.partitions, events.ok) == (TopicStatus.PARTITIONS_DIFFER, 2, False)
    assert f"{app}.events: exists with 2 partitions, not 4" in str(events)
    assert [outcome.status for outcome in others] == [TopicStatus.CREATED] * len(others)


@pytest.mark.broker
def test_a_topic_that_the_broker_refuses_is_named_with_the_reason(kafka_broker: RunningBroker, app: str) -> None:
    spec = TopicSpec(f"{app}.events", config={"cleanup.policy": "never"})
    with pytest.raises(KafkaRefused, match=rf"{app}\.events.*INVALID_CONFIG"):
        create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, [spec])


def test_a_broker_that_is_not_there_is_refused_within_the_deadline() -> None:
    (port,) = free_ports(1)
    config = {"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0}
    with pytest.raises(KafkaRefused):
        create_topics(config, [TopicSpec("any")], timeout_s=1)
    with pytest.raises(KafkaRefused, match=r"kafka\.bootstrap_servers"):
        check_topics(config, [TopicSpec("any")], timeout_s=1)


def test_the_products_topics_are_named_after_the_app_or_as_told() -> None:
    specs = product_topics("shop", partitions=8)
    wanted = [("shop.events", 8), ("shop.scores", 8), ("shop.dead-letters", 1), ("shop.changelog", 8)]
    wanted += [(f"shop.{what}", 1) for what in ("learning", "alarms", "models", "refresh")]
    assert wanted == [(spec.name, spec.partitions) for spec in specs]
    names = ["clicks", "out", "bad", "rows", "sums", "bells", "served", "outer"]
    assert names == [spec.name for spec in product_topics("shop", 8, names=TopicNames(*names))]


def test_three_replicas_mean_that_two_must_have_a_record() -> None:
    assert {"2"} == {spec.config["min.insync.replicas"] for spec in product_topics("shop", 4, replication=3)}
    assert all("min.insync.replicas" not in spec.config for spec in product_topics("shop", 4, replication=1))


@pytest.mark.parametrize(
    "arguments", [("",), (".",), ("a b",), ("ä",), ("x" * 250,), ("fine", 0), ("fine", 1, 0), ("fine", 1, -2)]
)
def test_names_and_numbers_that_kafka_would_refuse_are_refused_first(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ConfigError):
        TopicSpec(*arguments)

"""Replay without a broker, and the loop on one: the same users in the same partitions, and the same scores."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from broker_app import STARS, App
from confluent_kafka import Producer
from rich.progress import Progress

from stream_adapt.datasets import Source, synthetic
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.halves import cut
from stream_adapt.evaluate.replay import ReplayOptions, replay
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.broker import RunningBroker, TopicFactory, read_all

EVENTS, PARTITIONS = 4000, 4

pytestmark = pytest.mark.broker


@pytest.fixture
def source() -> Source:
    return synthetic.source(synthetic.Synthetic(events=EVENTS, users=100, items=150))


def produce(broker: RunningBroker, topic: str, events: list[tuple[str, bytes]]) -> None:
    """Keys and values in their order: without idempotence what is sent before a topic is known may change places."""
    settings = {"bootstrap.servers": broker.bootstrap_servers, "partitioner": "murmur2_random"}
    producer = Producer({**settings, "enable.idempotence": True})
    for key, value in events:
        producer.produce(topic, value, key.encode())
    assert producer.flush(30) == 0


def test_users_are_where_the_producer_puts_them(
    kafka_broker: RunningBroker, topic_factory: TopicFactory, source: Source
) -> None:
    halves = cut(source, LearnerSpec(source.features, source.feedback), PARTITIONS, warm=True)
    expected = {
        event_id: (partition, offset)
        for half in (halves.first, halves.second)
        for batch in half.batches
        for event_id, partition, offset in zip(
            batch.event_ids, batch.partitions.tolist(), batch.offsets.tolist(), strict=True
        )
    }
    topic = topic_factory(partitions=PARTITIONS)
    produce(kafka_broker, topic, [(event.user_id, event.event_id.encode()) for event in source.events()])
    messages = read_all(kafka_broker.bootstrap_servers, topic)
    assert expected == {(m.value() or b"").decode(): (m.partition(), m.offset()) for m in messages}


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_loop_says_what_replay_says(
    make_app: Callable[..., App], source: Source, covariance: str, kafka_broker: RunningBroker
) -> None:
    app = make_app(PARTITIONS, LearnerSpec(feedback=STARS, covariance=covariance))  # type: ignore[arg-type]
    run = replay(
        source, ReplayOptions(model=app.folder / "models", partitions=PARTITIONS, warm=False), Progress(disable=True)
    )
    second = run.halves.second.events
    records = [(event.user_id, msgspec.json.encode(event)) for event in second]
    produce(kafka_broker, f"{app.name}.events", records)
    assert app.start("--stop-after", str(len(second))).wait(60) == 0, app.log()
    found = {score["event_id"]: score for score in app.scores()}
    scores = [found[event.event_id]["score"] for event in second]
    assert run.adapted[0].probabilities == pytest.approx(scores, abs=1e-7)
    assert run.result().auc == pytest.approx(metrics.auc(scores, run.outcomes.targets), abs=1e-5)
    assert run.frozen[0].probabilities == pytest.approx([found[e.event_id]["frozen_score"] for e in second], abs=1e-7)

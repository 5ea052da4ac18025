"""Faults between client and broker: one member runs on and on, and has to come through all of them.

`tests/faults.py` lists all faults with where each is tested.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest
from broker_app import ITEMS, STARS, App
from confluent_kafka import KafkaError
from faulty_stream import SESSION_S, SOCKET_S, TRANSACTION_S, Stream

from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.kafka.topics import create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.record import Outputs
from stream_adapt.testing.broker import RunningBroker, TopicFactory, read_all
from stream_adapt.testing.model import random_model
from stream_adapt.testing.proxy import (
    Api,
    Close,
    Cut,
    Delay,
    Drop,
    Fail,
    Fault,
    FaultProxy,
    HalfOpen,
    Hold,
    Match,
    Refuse,
    Trickle,
)

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def _endless(kafka_broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    if kafka_broker.proxy is None:
        pytest.skip(f"only the embedded broker advertises a proxy's address, and this one is {kafka_broker.kind}")
    app = App(f"app-{uuid.uuid4().hex[:8]}", kafka_broker, tmp_path_factory.mktemp("endless"), 2)
    random_model(app.folder / "models", LearnerSpec(feedback=STARS), ITEMS)
    create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, product_topics(app.name, 2, 1))
    stream = Stream(app, kafka_broker.proxy)
    stream.start()
    stream.send()
    stream.arrived()
    yield stream
    app.end()


@pytest.fixture
def endless(_endless: Stream, fault_proxy: FaultProxy) -> Stream:
    """An application whose one member has come through all faults so far, and has scored all that was sent."""
    assert _endless.app.members[0].poll() is None, _endless.app.log()[-3000:]
    return _endless


# Between client and broker.

#: Name → fault, and how long it lasts after it first did something.
CONNECTIONS: dict[str, tuple[Fault, float]] = {
    "EndTxn lost": (Drop(Match(Api.END_TXN, count=1)), 0),
    "EndTxn answer lost": (Drop(Match(Api.END_TXN, count=1), "response"), 0),
    "EndTxn answered by closing": (Close(Match(Api.END_TXN, count=1), "response"), 0),
    "EndTxn delayed into the next transaction": (Delay(Match(Api.END_TXN, count=1), SOCKET_S + 0.5), SOCKET_S + 1),
    "EndTxn held past the transaction timeout": (Hold(Match(Api.END_TXN)), TRANSACTION_S + 2),
    "commit done but answered with a time-out": (
        Fail(Match(Api.END_TXN, count=1), KafkaError.REQUEST_TIMED_OUT, "response"),
        0,
    ),
    "commit answered as fenced": (Fail(Match(Api.END_TXN, count=1), KafkaError.INVALID_PRODUCER_EPOCH), 0),
    "transaction aborted by the broker": (Fail(Match(Api.PRODUCE, count=1), KafkaError.TRANSACTION_ABORTABLE), 0),
    "offsets lost": (Drop(Match(Api.TXN_OFFSET_COMMIT, count=1)), 0),
    "offsets' answer lost": (Drop(Match(Api.TXN_OFFSET_COMMIT, count=1), "response"), 0),
    "offsets of an old generation": (Fail(Match(Api.TXN_OFFSET_COMMIT, count=1), KafkaError.ILLEGAL_GENERATION), 0),
    "coordinator moves": (Fail(Match(Api.TXN_OFFSET_COMMIT, count=3), KafkaError.NOT_COORDINATOR), 0),
    "coordinator disconnects": (Close(Match(Api.END_TXN, count=2), reset=True), 0),
    "records' answer lost": (Drop(Match(Api.PRODUCE, count=1), "response"), 0),
    "records late past the transaction timeout": (Hold(Match(Api.PRODUCE)), TRANSACTION_S + 2),
    "fetch answers late": (Delay(Match(Api.FETCH, count=3), 1.0, "response"), 0),
    "heartbeats lost past the session timeout": (Drop(Match(Api.HEARTBEAT)), SESSION_S + 1),
    "offsets late past the session timeout": (Hold(Match(Api.TXN_OFFSET_COMMIT)), SESSION_S + 2),
    "connections cut": (Cut(), 0),
    "connections reset": (Cut(reset=True), 0),
    "connections half-open": (HalfOpen(), 1),
    "broker out of reach": (HalfOpen(new_too=True), SOCKET_S + 2),
    "one byte a second": (Trickle(bytes_per_s=1), 4),
    "connections refused": (Refuse(), 0),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_fault_on_the_way_to_the_broker_is_survived(endless: Stream, name: str) -> None:
    fault, lasts_s = CONNECTIONS[name]
    injected = endless.proxy.inject(fault)
    if isinstance(fault, Refuse):
        endless.proxy.inject(Cut())
    endless.send()
    injected.wait()
    time.sleep(lasts_s)
    injected.lift()
    endless.arrived()


def test_a_late_end_of_a_transaction_does_not_meet_the_next_one(
    fault_proxy: FaultProxy, topic_factory: TopicFactory, kafka_broker: RunningBroker
) -> None:
    """Rule 8: the late copy of an EndTxn would commit what the next transaction has sent so far."""
    topic, name = topic_factory(), f"late-{uuid.uuid4()}"
    settings = {"bootstrap.servers": fault_proxy.address, "socket.timeout.ms": 2_000, "transaction.timeout.ms": 60_000}

    def build() -> OutputProducer:
        return OutputProducer(settings, transactional_id=name, socket_timeout_s=2, deadline_s=30)

    def visible() -> list[object]:
        return [message.value() for message in read_all(kafka_broker.bootstrap_servers, topic)]

    producer = build()
    late = fault_proxy.inject(Hold(Match(Api.END_TXN, count=1)))
    producer.begin()
    producer.send(Outputs(topic, [None], [b"first"], None, [0], [0]))
    producer.commit()  # by the second copy
    if producer.needs_replacement:
        producer = build()
    producer.begin()
    producer.send(Outputs(topic, [None], [b"second"], None, [0], [1]))
    producer.flush()
    late.lift()
    time.sleep(1)
    assert [b"first"] == visible()
    producer.commit()
    assert [b"first", b"second"] == visible()

"""The producer on a real broker: what its statistics say when a connection to the coordinator is cut."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stream_adapt.kafka.embedded import EmbeddedKafka
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.kafka.topics import TopicSpec, create_topics
from stream_adapt.record import Outputs
from stream_adapt.testing.broker import read_all

pytestmark = pytest.mark.broker


def _commit(producer: OutputProducer, value: bytes) -> None:
    producer.begin()
    producer.send(Outputs("out", [None], [value], None, [0], [0]))
    producer.commit()


def test_after_a_cut_connection_the_next_transaction_wants_a_new_producer(tmp_path: Path) -> None:
    """A request that was sent before the cut may have been sent again after it (reliability rule 8)."""
    with EmbeddedKafka(data_dir=tmp_path / "kafka") as kafka:
        create_topics({"bootstrap.servers": kafka.bootstrap_servers}, [TopicSpec("out")])
        producer = OutputProducer(
            {
                "bootstrap.servers": kafka.bootstrap_servers,
                "socket.timeout.ms": 5_000,
                "transaction.timeout.ms": 10_000,
            },
            transactional_id="one",
            socket_timeout_s=5,
            deadline_s=30,
        )
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:  # several reports of the statistics, and nothing happens
            _commit(producer, b"before")
            producer.poll()
            time.sleep(0.2)
        assert not producer.needs_replacement
        kafka.restart()
        deadline = time.monotonic() + 30
        while not producer.needs_replacement:
            assert time.monotonic() < deadline
            producer.poll()
            time.sleep(0.1)
        producer.close()
        committed = read_all(kafka.bootstrap_servers, "out")
    assert {b"before"} == {message.value() for message in committed}

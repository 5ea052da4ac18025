"""Connections: errors by kind, and when no broker counts as reached."""

from __future__ import annotations

import json
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from structlog.testing import capture_logs

from stream_adapt.kafka import clients
from stream_adapt.kafka.connections import KINDS, Connections
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.testing.clocks import SettableClock


def statistics(**states: str) -> str:
    return json.dumps({"name": "c#1", "brokers": {name: {"state": state, "rtt": {}} for name, state in states.items()}})


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError._ALL_BROKERS_DOWN, "connection"),
        (KafkaError._RESOLVE, "connection"),
        (KafkaError.SASL_AUTHENTICATION_FAILED, "authentication"),
        (KafkaError._SSL, "tls"),
        (KafkaError._TIMED_OUT, "timeout"),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, "other"),
    ],
)
def test_errors_are_counted_by_kind(code: int, kind: str) -> None:
    connections = Connections()
    connections.failed(KafkaError(code))

    assert connections.errors == {**dict.fromkeys(KINDS, 0), kind: 1}


def test_unreachable_is_the_time_since_the_last_connection_was_lost_and_ends_with_a_new_one() -> None:
    clock = SettableClock()
    connections = Connections(clock)
    connections.told(statistics(a="UP", b="DOWN"))
    clock.jump(5)
    assert connections.unreachable_s == 0.0

    connections.told(statistics(a="TRY_CONNECT", b="DOWN"))
    clock.jump(3)
    connections.failed(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    clock.jump(4)
    assert connections.unreachable_s == 7.0

    connections.told(statistics(a="DOWN", b="UP"))
    assert connections.unreachable_s == 0.0


def test_one_lost_connection_is_an_error_and_not_an_outage() -> None:
    connections = Connections(SettableClock())
    connections.failed(KafkaError(KafkaError._TRANSPORT))

    assert connections.unreachable_s == 0.0


def test_a_client_that_knows_no_broker_yet_says_nothing() -> None:
    clock = SettableClock()
    connections = Connections(clock)
    connections.told(json.dumps({"name": "c#1"}))
    clock.jump(9)

    assert connections.unreachable_s == 0.0


class Refusing:
    """A client whose calls must be tried again, each once, and which says why when it is polled."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._refused: set[str] = set()

    def init_transactions(self, _timeout_s: float) -> None:
        self._refuse("init")

    def begin_transaction(self) -> None:
        pass

    def commit_transaction(self, _timeout_s: float) -> None:
        self._refuse("commit")

    def poll(self, _timeout_s: float) -> int:
        self._connections.failed(KafkaError(KafkaError._ALL_BROKERS_DOWN))
        return 1

    def _refuse(self, call: str) -> None:
        if call not in self._refused:
            self._refused.add(call)
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no coordinator", retriable=True))


def test_a_call_that_waits_for_a_broker_says_so_meanwhile() -> None:
    connections = Connections()
    producer = OutputProducer(
        {}, transactional_id="t", socket_timeout_s=1.0, deadline_s=5.0, client=lambda _: Refusing(connections)
    )
    assert 1 == connections.errors["connection"]

    producer.begin()
    producer.commit()

    assert 2 == connections.errors["connection"]


def test_a_producer_without_connections_is_an_outage_only_while_a_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SettableClock()
    connections = Connections(clock)
    monkeypatch.setattr(clients, "CONNECTIONS", connections)
    settings: dict[str, Any] = {}

    class Cut(Refusing):
        def poll(self, _timeout_s: float) -> int:
            settings["stats_cb"](statistics(a="TRY_CONNECT"))
            return 1

    def client(given: dict[str, Any]) -> Refusing:
        settings.update(given)
        made = Cut(connections)
        made._refused.add("init")  # makes no trouble
        return made

    producer = OutputProducer({}, transactional_id="t", socket_timeout_s=1.0, deadline_s=5.0, client=client)
    producer.poll()
    clock.jump(9)
    assert 0 == connections.unreachable_s

    producer.begin()
    producer.commit()
    clock.jump(9)
    assert 9 == connections.unreachable_s


def test_errors_that_no_line_of_the_client_tells_are_logged_few_of_them() -> None:
    settings = clients._heard({"client.id": "c"})
    with capture_logs() as lines:
        for code in (KafkaError._FATAL, KafkaError._FATAL, KafkaError._TRANSPORT):
            settings["error_cb"](KafkaError(code))

    assert ["client error"] == [line["event"] for line in lines]
    assert "_FATAL" in lines[0]["error"]

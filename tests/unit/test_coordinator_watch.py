"""The producer's watch over its coordinator: what makes the next transaction begin on a new producer (rule 8)."""

from __future__ import annotations

import json

import pytest

from stream_adapt.kafka.producer import CoordinatorWatch


def report(name: str = "TxnCoordinator", **counters: int) -> str:
    """What the client tells once a second."""
    return json.dumps({"ts": 1, "brokers": {name: {"name": name, "req_timeouts": 0, "disconnects": 0, **counters}}})


@pytest.mark.parametrize("counter", ["req_timeouts", "disconnects"])
def test_a_request_of_the_coordinator_left_without_an_answer_moves_it(counter: str) -> None:
    watch = CoordinatorWatch()
    watch.read(report())
    assert not watch.moved
    watch.read(report(**{counter: 1}))
    assert watch.moved
    watch.read(report(**{counter: 1}))
    assert watch.moved, "until there is a new producer, with a watch of its own"


def test_retries_alone_do_not_move_it() -> None:
    watch = CoordinatorWatch()
    watch.read(report(txretries=0))
    watch.read(report(txretries=7, tx=100, rxerrs=3))
    assert not watch.moved


def test_what_other_brokers_connections_suffer_does_not_move_it() -> None:
    watch = CoordinatorWatch()
    watch.read(report())
    watch.read(report("127.0.0.1:9092/1", req_timeouts=5, disconnects=5))
    assert not watch.moved


def test_what_was_counted_before_the_first_look_does_not_move_it() -> None:
    watch = CoordinatorWatch()
    assert not watch.moved
    watch.read(report(disconnects=2))
    assert not watch.moved
    watch.read(report(disconnects=3))
    assert watch.moved


def test_a_report_without_brokers_moves_nothing() -> None:
    watch = CoordinatorWatch()
    watch.read("{}")
    watch.read(json.dumps({"brokers": {"TxnCoordinator": {}}}))
    assert not watch.moved


def test_what_happened_before_the_producer_was_made_does_not_move_it() -> None:
    watch = CoordinatorWatch()
    watch.read(report())
    watch.read(report(disconnects=3))
    watch.settle()
    assert not watch.moved
    watch.read(report(disconnects=4))
    assert watch.moved

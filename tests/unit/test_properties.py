"""What the clients are told, whatever the operator says: rules 1 and 2 of exactly-once."""

from __future__ import annotations

import pytest
from confluent_kafka import Consumer

from stream_adapt.config import Config
from stream_adapt.kafka import properties


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_offsets_are_the_loops_own_and_nothing_is_skipped(protocol: str) -> None:
    config = Config.model_validate({"kafka": {"group_protocol": protocol}})
    settings = properties.consumer(config)
    expected = {
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",
        "check.crcs": True,
        "group.protocol": protocol,
    }
    assert expected.items() <= settings.items()
    # KIP-848 groups refuse to start with what classic ones need.
    classic = {"session.timeout.ms", "partition.assignment.strategy"}
    assert (classic if protocol == "classic" else set()) == classic & settings.keys()


def test_the_transactional_id_is_the_instances_and_stays_the_same() -> None:
    config = Config.model_validate({"app": {"name": "shop", "instance": "7"}})
    assert config.transactional_id == "shop.7"
    assert properties.producer(config)["transaction.timeout.ms"] == config.kafka.transaction_timeout_ms


def test_a_restore_is_in_no_group_and_is_told_nothing_of_one() -> None:
    """The client refuses a poll interval that is shorter than the session timeout, which is only the member's."""
    mine = {"max.poll.interval.ms": 10_000, "heartbeat.interval.ms": 500, "fetch.min.bytes": 7}
    config = Config.model_validate({"kafka": {"session_timeout_ms": 10_000, "transaction_timeout_ms": 5_000,
                                              "consumer": mine}})  # fmt: skip
    settings = properties.changelog_reader(config)
    assert (7, set()) == (
        settings["fetch.min.bytes"],
        {"max.poll.interval.ms", "heartbeat.interval.ms"} & set(settings),
    )
    assert mine.items() <= properties.consumer(config).items()
    Consumer(dict(settings)).close()

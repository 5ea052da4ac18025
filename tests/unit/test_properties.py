"""What the clients are told, whatever the operator says: rules 1 and 2 of exactly-once."""

from __future__ import annotations

import pytest

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

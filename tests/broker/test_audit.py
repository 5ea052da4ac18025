"""`topics check` finds each thing that is not as it should be, says what to do, and changes nothing."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from confluent_kafka.admin import AdminClient

from stream_adapt.cli import cli
from stream_adapt.config import load
from stream_adapt.kafka.embedded import free_ports
from stream_adapt.kafka.features import finalized_features
from stream_adapt.kafka.topics import TopicSpec, create_topics
from stream_adapt.service import topic_specs
from stream_adapt.testing.broker import RunningBroker

pytestmark = pytest.mark.broker

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(kafka_broker: RunningBroker, tmp_path: Path) -> Check:
    """Creates topics, some of them changed, and checks them: exit code and what was said."""

    def run(config: dict[str, dict[str, str]] | None = None, **partitions: int) -> tuple[int, dict[str, Any]]:
        name = f"app-{uuid.uuid4().hex[:8]}"
        path = tmp_path / f"{name}.yaml"
        servers = {"bootstrap_servers": kafka_broker.bootstrap_servers}
        path.write_text(yaml.safe_dump({"app": {"name": name}, "kafka": servers, "topics": {"partitions": 2}}))
        specs = []
        for spec in topic_specs(load(path, {}).config):
            what = spec.name.removeprefix(f"{name}.").replace("-", "_")
            changed = {**spec.config, **(config or {}).get(what, {})}
            if partitions.get(what) != 0:
                specs.append(TopicSpec(spec.name, partitions.get(what, spec.partitions), config=changed))
        create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, specs)
        done = CliRunner().invoke(cli, ["topics", "check", "-c", str(path), "--json"])
        AdminClient({"bootstrap.servers": kafka_broker.bootstrap_servers}).delete_topics([s.name for s in specs])
        return done.exit_code, json.loads(done.stdout.replace(name, "APP"))

    return run


def found(said: dict[str, Any], level: str) -> list[tuple[str, str]]:
    return [(one["subject"], one["check"]) for one in said["findings"] if one["level"] == level]


def test_topics_that_were_created_by_us_are_in_order(check: Check) -> None:
    code, said = check()
    assert (0, True, []) == (code, said["ok"], found(said, "error"))
    # One broker keeps one copy; nobody has joined the group, and of transactional ids brokers tell nothing.
    warned = {check for _, check in found(said, "warning")}
    assert {"durability", "permission"} == warned
    assert ("APP.changelog", "compaction") in found(said, "ok")


@pytest.mark.parametrize(
    ("config", "partitions", "level", "subject", "words"),
    [
        ({}, {"scores": 0}, "error", "APP.scores", "topics create"),
        ({}, {"changelog": 3}, "error", "APP.changelog", "3, and APP.events has 2"),
        ({"changelog": {"cleanup.policy": "delete"}}, {}, "error", "APP.changelog", "cleanup.policy=compact"),
        ({"changelog": {"cleanup.policy": "compact,delete"}}, {}, "error", "APP.changelog", "deleted by age"),
        ({"changelog": {"max.compaction.lag.ms": "999999999"}}, {}, "warning", "APP.changelog", "was erased stays"),
        ({"changelog": {"segment.bytes": "1073741824"}}, {}, "warning", "APP.changelog", "segment.bytes=67108864"),
        ({"events": {"cleanup.policy": "compact"}}, {}, "error", "APP.events", "cleanup.policy=delete"),
        ({"events": {"retention.ms": "3600000"}}, {}, "warning", "APP.events", "retention.ms=604800000"),
        ({"events": {"retention.bytes": "1000000"}}, {}, "warning", "APP.events", "retention.bytes=1000000"),
        ({"scores": {"min.insync.replicas": "2"}}, {}, "error", "APP.scores", "nothing can be written"),
    ],
    ids=str,
)
def test_what_is_not_as_it_should_be_is_said(
    check: Check, config: dict[str, Any], partitions: dict[str, int], level: str, subject: str, words: str
) -> None:
    code, said = check(config, **partitions)
    assert 3 * (level == "error") == code
    told = [one for one in said["findings"] if (one["subject"], one["level"]) == (subject, level)]
    assert any(words in one["found"] + one["to_do"] for one in told), said


def test_a_broker_tells_its_features_and_who_is_none_is_not_waited_for(kafka_broker: RunningBroker) -> None:
    levels = finalized_features(kafka_broker.bootstrap_servers, {})
    assert {"metadata.version", "transaction.version", "group.version"} <= set(levels)
    with pytest.raises(OSError, match="refused"):
        finalized_features(f"127.0.0.1:{free_ports(1)[0]}", {})

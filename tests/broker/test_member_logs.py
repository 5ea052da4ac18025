"""What members write to stderr: one object a line, whatever happens to the broker, and nobody's name."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_records import BAD_VALUES
from broker_app import ITEMS, STARS, App, event
from click.testing import CliRunner
from confluent_kafka import Producer

from stream_adapt.cli import cli
from stream_adapt.kafka import clients
from stream_adapt.kafka.embedded import EmbeddedKafka
from stream_adapt.kafka.topics import create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.broker import RunningBroker
from stream_adapt.testing.model import random_model

pytestmark = pytest.mark.broker

USER, SECRET = "canary-user-52d0", "canary-secret-1b6e"
OUTAGE_S = 12.0
#: `stream-adapt run` with a bug whose exception quotes a user id.
BUGGY = """
from stream_adapt import service
from stream_adapt.adapt import Adapter
from stream_adapt.cli import main
class Buggy(Adapter):
    def adapt(self, batch):
        return super().adapt(batch) if not batch.user_ids else {}[batch.user_ids[0]]
service.Adapter = Buggy
main()
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[App, EmbeddedKafka]]:
    """An application on a broker of its own, which may be killed."""
    with EmbeddedKafka() as kafka:
        app = App(f"app-{uuid.uuid4().hex[:8]}", RunningBroker(kafka.bootstrap_servers, "embedded"), tmp_path, 2)
        random_model(tmp_path / "models", LearnerSpec(feedback=STARS), ITEMS)
        create_topics({"bootstrap.servers": kafka.bootstrap_servers}, product_topics(app.name, 2, 1))
        yield app, kafka
        app.end()


def configuration(app: App, **log: Any) -> Path:
    """Of a member that says all it can, and has a secret that its broker does not ask for."""
    (app.folder / "password").write_text(SECRET)
    properties = {"debug": "conf,security,cgrp,eos", "sasl.password": {"file": str(app.folder / "password")}}
    kafka = {"bootstrap_servers": app.broker.bootstrap_servers, "session_timeout_ms": 6_000,
             "transaction_timeout_ms": 5_000, "properties": properties}  # fmt: skip
    return app.config(kafka=kafka, log={"level": "debug", **log}, input={"latency_ms": 20, "breaker_share": 1})


def spoil_changelog(app: App) -> None:
    """Records that a restore leaves out and warns of; their keys name a user."""
    producer = Producer({"bootstrap.servers": app.broker.bootstrap_servers})
    for key in (f"x:{USER}".encode(), f"u:{USER}".encode() + b"\xff"):
        producer.produce(f"{app.name}.changelog", b"not a row, and long enough for one", key, partition=0)
    assert 0 == producer.flush(30)


def bad_records() -> list[tuple[bytes | None, bytes | None]]:
    """Everything that is refused, under the canary's key and with its id."""
    values = [value and value.replace(b'"u"', json.dumps(USER).encode()) for _, value, _ in BAD_VALUES]
    return [(f"other-{USER}".encode(), value) for value in values if value is None or len(value) < 100_000]


def test_every_line_of_a_member_is_json_through_an_outage_and_names_nobody(own: tuple[App, EmbeddedKafka]) -> None:
    app, kafka = own
    path = configuration(app, format="json")
    spoil_changelog(app)
    count = app.produce([event(k, USER if k % 2 else None) for k in range(50)]) + app.produce_raw(bad_records())
    member = app.start(config=path)
    app.wait_for_outputs(count)
    began = time.monotonic()
    kafka.kill()
    time.sleep(OUTAGE_S)
    kafka.start()
    away_s = time.monotonic() - began
    if member.poll() is None:
        app.produce([event(k, USER) for k in range(50, 60)])
        app.wait_for_outputs(count + 10)
        assert 0 == app.stop(member)
    else:
        assert 3 == member.returncode
    lines = [json.loads(line) for line in app.log().splitlines() if line]
    assert all(isinstance(line, dict) and {"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert "canary" not in app.log()
    damaged = [line for line in lines if line["event"].startswith("damaged changelog records")]
    assert 2 == damaged[0]["records"]
    lost = [line for line in lines if line["event"] == "broker connection"]
    assert {"warning"} == {line["level"] for line in lost}
    assert kafka.bootstrap_servers in lost[0]["broker"]
    assert sum(line["repeated"] for line in lost) > len(lost), "most of them are counted"
    most = 2 + away_s // clients.REPEAT_S
    assert max(Counter(line["client"] for line in lost).values()) <= most, lost


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_bug_is_told_without_the_user_it_happened_to(app: App, form: str) -> None:
    app.produce([event(k, USER) for k in range(5)])
    member = app.start(config=configuration(app, format=form), command=(sys.executable, "-c", BUGGY, "run"))
    assert 1 == member.wait(60)
    log = app.log()
    assert "KeyError: #" in log
    assert "canary" not in log
    if form == "json":
        lines = [json.loads(line) for line in log.splitlines()]
        assert ["bug", "critical"] == [lines[-1]["event"], lines[-1]["level"]]


def test_what_a_member_has_learned_of_a_user_can_be_seen_and_exported_while_it_runs(app: App) -> None:
    app.produce([event(k, "ann" if k % 2 else None) for k in range(100)])
    member = app.start()
    scores = app.wait_for_outputs(100)
    path = str(app.config())
    said = CliRunner().invoke(cli, ["state", "show", "ann", "-c", path, "--json"])
    assert 0 == said.exit_code, said.output
    [row] = json.loads(said.stdout)["rows"]
    last = max((s for s in scores if s["user_id"] == "ann"), key=lambda s: s["source_offset"])
    assert (50, last["source_partition"]) == (row["count"], row["partition"])
    assert [last["item_id"]] == [e["item_id"] for e in row["events"][:1]]
    assert row["as_of_offset"] > last["source_offset"]
    pytest.importorskip("pyarrow", reason="the extra `export` is not installed")
    out = app.folder / "users.parquet"
    said = CliRunner().invoke(cli, ["state", "export", "-c", path, "--out", str(out), "--json"])
    assert 0 == said.exit_code, said.output
    assert len({s["user_id"] for s in scores}) == json.loads(said.stdout)["rows"]
    assert 0 == app.stop(member)

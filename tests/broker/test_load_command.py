"""`stream-adapt load` is a producer: what it says it wrote is in the topic, a user's events in one partition."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from broker_app import App
from click.testing import CliRunner
from registry_server import registry_server

from stream_adapt.cli import cli
from stream_adapt.codecs import InputCodec
from stream_adapt.codecs.avro import AvroInput
from stream_adapt.codecs.protobuf import ProtobufInput
from stream_adapt.codecs.registry import Registry
from stream_adapt.testing.broker import read_all

pytestmark = pytest.mark.broker


def test_so_many_events_are_written_at_the_pace_and_keyed_by_user(make_app: Callable[..., App]) -> None:
    app = make_app(partitions=2)
    options = ["--events", "300", "--per-second", "1000", "--json"]
    told = json.loads(CliRunner().invoke(cli, ["load", "synthetic", "-c", str(app.config()), *options]).stdout)

    messages = read_all(app.broker.bootstrap_servers, f"{app.name}.events")
    events = [json.loads(m.value()) for m in messages]
    places = {(e["user_id"], m.partition()) for e, m in zip(events, messages, strict=True)}

    assert {"topic": f"{app.name}.events", "events": 300} == {key: told[key] for key in ("topic", "events")}
    assert 0.25 < told["seconds"] < 30
    assert 300 == len({e["event_id"] for e in events})
    assert [m.key().decode() for m in messages] == [e["user_id"] for e in events]
    assert len(places) == len({user for user, _ in places})


@pytest.mark.parametrize(
    ("form", "codec"), [("avro", AvroInput), ("protobuf", ProtobufInput)], ids=["avro", "protobuf"]
)
def test_events_are_written_in_the_format_that_members_read(
    make_app: Callable[..., App], form: str, codec: Callable[[Registry, str], InputCodec]
) -> None:
    app = make_app(partitions=2)
    with registry_server() as server:
        config = app.config(input={"format": form}, registry={"url": server.url})
        options = ["--events", "50", "--per-second", "1000", "--json"]
        told = json.loads(CliRunner().invoke(cli, ["load", "synthetic", "-c", str(config), *options]).stdout)
        values = [m.value() or b"" for m in read_all(app.broker.bootstrap_servers, f"{app.name}.events")]
        reader = codec(Registry(server.url, {}, register=False), f"{app.name}.events")
        reader.prepare(values)
        events = [json.loads(reader.to_json(value)) for value in values]

    assert 50 == told["events"] == len({e["event_id"] for e in events})
    assert {"event_id", "user_id", "item_id", "event_type", "timestamp", "label"} <= set(events[0])

"""A member that reads and writes Avro or Protobuf: every event once, also when the registry goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from broker_app import App, event
from click.testing import CliRunner
from registry_server import RegistryServer, registry_server

from stream_adapt.cli import cli
from stream_adapt.codecs import InputCodec
from stream_adapt.codecs.avro import AvroInput
from stream_adapt.codecs.protobuf import ProtobufInput
from stream_adapt.codecs.registry import Registry
from stream_adapt.record import UserEvent
from stream_adapt.testing.broker import read_all

pytestmark = pytest.mark.broker


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with registry_server() as one:
        yield one


@pytest.mark.parametrize(("form", "make"), [("avro", AvroInput), ("protobuf", ProtobufInput)], ids=["avro", "protobuf"])
def test_in_and_out_with_an_erasure_and_a_registry_that_goes_away(
    app: App, server: RegistryServer, form: str, make: Callable[[Registry, str], InputCodec]
) -> None:
    config = app.config(
        input={"format": form}, output={"format": form}, registry={"url": server.url}, log={"format": "json"}
    )
    member = app.start(config=config)
    producers = Registry(server.url, {}, register=True)
    codec = make(producers, f"{app.name}.events")

    def produce(numbers: range) -> None:
        events = [UserEvent(**event(number)) for number in numbers]
        app.produce_raw((one.user_id.encode(), codec.event(one)) for one in events)

    def outputs(wanted: int) -> list[bytes]:
        deadline = time.monotonic() + 60
        while True:
            found = [m.value() or b"" for m in read_all(app.broker.bootstrap_servers, app.scores_topic)]
            letters = app.dead_letters()
            if len(found) + len(letters) >= wanted:
                return found
            assert time.monotonic() < deadline, app.log()[-3000:]
            time.sleep(0.1)

    produce(range(100))
    assert 100 == len(outputs(100))
    # A schema that the member has not seen yet, while the registry does not answer.
    request = CliRunner().invoke(cli, ["state", "erase", "user-1", "-c", str(config), "--json"])
    assert (0, 4) == (request.exit_code, len(json.loads(request.stdout)["partitions"])), request.output
    outputs(104)
    app.produce_raw([(b"user-2", b"\0\0\0\x7f\xff" + b"not known")])
    outputs(104)
    server.status = 503
    app.produce_raw([(b"user-3", b"\0\0\0\x7f\xfe" + b"not known, and nobody can tell")])
    produce(range(100, 150))
    deadline = time.monotonic() + 60
    while "waiting for the schema registry" not in app.log():
        assert time.monotonic() < deadline, app.log()[-3000:]
        time.sleep(0.1)
    server.status = 200
    values = outputs(156)
    assert 0 == app.stop(member)

    reader = make(producers, app.scores_topic)
    reader.prepare(values)
    records = [json.loads(reader.to_json(value)) for value in values]
    assert {f"e{number}" for number in range(150)} == {r["event_id"] for r in records if "score" in r}
    assert [True] == [r["had_row"] for r in records if r.get("had_row")]
    assert 154 == len(records)
    reasons = [dict(letter.headers() or [])["stream-adapt.reason"] for letter in app.dead_letters()]
    assert [b"unknown_schema"] * 2 == reasons

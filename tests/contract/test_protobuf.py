"""Protobuf: what is particular to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bad_records import GOOD, NOW_MS
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import DESCRIPTOR as STRUCT
from google.protobuf.timestamp_pb2 import DESCRIPTOR as TIMESTAMP
from google.protobuf.wrappers_pb2 import DESCRIPTOR as WRAPPERS
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_server import registry_server
from test_codecs import decoder, raw

from stream_adapt.codecs import NotDecoded
from stream_adapt.codecs.protobuf import SCHEMAS, ProtobufInput, ProtobufOutput, file_descriptor
from stream_adapt.codecs.registry import Registry
from stream_adapt.decode import REASONS
from stream_adapt.learner.encoder import Bag, Numeric, Vector
from stream_adapt.record import UserEvent

ROOT = Path(__file__).parents[2] / "schemas"
_TYPES = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12}
_IDS = {"item_id": "string", "user_id": "string", "event_id": "string", "event_type": "string"}
_VALUES = {name: value for name, value in GOOD.items() if name in _IDS}


@pytest.fixture
def registry() -> Registry:
    return Registry(f"mock://{uuid.uuid4()}", {}, register=True)


def file(name: str = "shop.proto", *imports: str) -> FileDescriptorProto:
    return FileDescriptorProto(name=name, package="shop", syntax="proto3", dependency=imports)


def add(file: Any, message: str, fields: dict[str, str], repeated: tuple[str, ...] = ()) -> Any:
    """A message; numbers from 11 on, which are not those of ours."""
    found = file.message_type.add(name=message)
    for number, (name, kind) in enumerate(fields.items(), 11):
        field = found.field.add(name=name, number=number, label=3 if name in repeated else 1)
        field.type = _TYPES.get(kind, 11)
        if kind not in _TYPES:
            field.type_name = f".{kind}"
    return found


def written(registry: Registry, source: FileDescriptorProto, message: str, *others: Any, **values: Any) -> bytes:
    """A value as any producer would write it, with a schema of its own."""
    from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    from stream_adapt.codecs import framed

    pool = DescriptorPool()
    for known in (STRUCT, TIMESTAMP, WRAPPERS):
        pool.AddSerializedFile(known.serialized_pb)
    for one in (*others, source):
        pool.Add(one)
    kind = GetMessageClass(pool.FindMessageTypeByName(f"shop.{message}"))
    serialize = ProtobufSerializer(kind, registry.client, framed.settings(registry))
    value = serialize(kind(**values), SerializationContext(f"t-{uuid.uuid4()}", MessageField.VALUE))
    assert value is not None
    return value


def read(registry: Registry, value: bytes, features: Any = None) -> tuple[Any, list[tuple[str, str]]]:
    codec = ProtobufInput(registry, "events")
    codec.prepare([value])
    batch, dead = decoder(codec, *([features] if features else []))(raw([value], ["u"]))
    return batch, [(letter.reason, letter.detail) for letter in dead]


_FIELD = re.compile(r"^ +(optional |repeated )?(map<string, Feature>|\w+) (\w+) = (\d+);$")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_in_the_folder_are_what_is_written(name: str) -> None:
    found: dict[str, dict[str, str]] = {}
    inside = ""
    for line in (ROOT / f"{name}.proto").read_text(encoding="utf-8").splitlines():
        if line.startswith("message "):
            message = found[line.split()[1]] = {}
        elif line.startswith("  oneof kind {"):
            inside = "oneof "
        elif line == "  }":
            inside = ""
        elif match := _FIELD.match(line):
            label, kind, field, number = match.groups()
            message[field] = f"{inside}{label or ''}{kind}"
            assert len(message) == int(number)
    assert {m: list(kinds.items()) for m, kinds in SCHEMAS[name].items()} == {
        m: list(kinds.items()) for m, kinds in found.items()
    }


@pytest.mark.skipif(shutil.which("protoc") is None, reason="no protoc on the path to compile schemas/*.proto with")
@pytest.mark.parametrize("name", SCHEMAS)
def test_protoc_makes_the_same_of_the_schemas_in_the_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = ["protoc", f"--proto_path={ROOT}", f"--descriptor_set_out={out}", f"{name}.proto"]
    subprocess.run(command, check=True, timeout=60)
    (found,) = FileDescriptorSet.FromString(out.read_bytes()).file
    assert file_descriptor(name) == found


def test_values_begin_with_the_id_and_the_message_index_of_confluents_wire_format(registry: Registry) -> None:
    value = ProtobufInput(registry, "events").event(UserEvent(**GOOD))
    assert b"\0\0\0\0\x01\0" == value[:6]
    assert ["events-stream_adapt.Event"] == registry.client.get_subjects()


def test_another_schema_with_other_numbers_times_and_features_is_read_by_its_names(registry: Registry) -> None:
    source = file("click.proto", TIMESTAMP.name, STRUCT.name, WRAPPERS.name)
    kinds = {
        "timestamp": "google.protobuf.Timestamp",
        "label": "google.protobuf.DoubleValue",
        "features": "google.protobuf.Struct",
        "shop": "string",
    }
    add(source, "Click", {**_IDS, **kinds})
    sent = {"year": 1999.0, "genres": ["a", "b"], "embedding": [0.5, 1.0, 1.5], "other": {"deep": [None, True]}}
    moment = {"seconds": NOW_MS // 1000, "nanos": NOW_MS % 1000 * 1_000_000}
    value = written(
        registry, source, "Click", **_VALUES, timestamp=moment, label={"value": 2.0}, features=sent, shop="n"
    )
    declared = {"genres": Bag(), "year": Numeric(), "embedding": Vector(length=3)}
    batch, dead = read(registry, value, declared)
    assert ([], [NOW_MS], [1]) == (dead, batch.timestamps_ms.tolist(), batch.levels.tolist())
    (features,) = batch.features
    assert (("a", "b"), 1999.0, (0.5, 1.0, 1.5)) == (features.genres, features.year, features.embedding)


def test_features_may_be_a_message_of_their_own(registry: Registry) -> None:
    source = file()
    add(source, "Features", {"year": "double", "genres": "string"}, repeated=("genres",))
    add(source, "Click", {**_IDS, "timestamp": "int64", "features": "shop.Features"})
    value = written(registry, source, "Click", **_VALUES, timestamp=NOW_MS, features={"year": 7.0, "genres": ["x"]})
    batch, dead = read(registry, value, {"genres": Bag(), "year": Numeric()})
    assert ([], 7.0, ("x",)) == (dead, batch.features[0].year, batch.features[0].genres)


def test_any_message_of_a_schema_may_be_the_event(registry: Registry) -> None:
    source = file()
    add(source, "First", {"nothing": "string"})
    outer = add(source, "Outer", {"nothing": "string"})
    add(source, "Unused", {**_IDS, "timestamp": "int64"})
    outer.nested_type.add().CopyFrom(source.message_type.pop())
    value = written(registry, source, "Outer.Unused", **_VALUES, timestamp=NOW_MS)
    assert b"\x04\x02\0" == value[5:8]  # two indexes: 1, 0
    batch, dead = read(registry, value)
    assert ([], 1) == (dead, len(batch))


def test_an_event_may_lie_in_an_envelope_of_one_oneof(registry: Registry) -> None:
    source = file()
    envelope = add(source, "Envelope", {"click": "shop.Click", "other": "string"})
    envelope.oneof_decl.add(name="what")
    for field in envelope.field:
        field.oneof_index = 0
    add(source, "Click", {**_IDS, "timestamp": "int64"})
    batch, dead = read(registry, written(registry, source, "Envelope", click={**_VALUES, "timestamp": NOW_MS}))
    assert ([], 1) == (dead, len(batch))
    _, dead = read(registry, written(registry, source, "Envelope", other="no record"))
    assert [("incompatible_schema", "the schema is no record but str")] == dead


def test_an_enum_is_its_name_and_a_default_is_there_where_nothing_was_sent(registry: Registry) -> None:
    source = file()
    kinds = source.enum_type.add(name="Kind")
    kinds.value.add(name="view", number=0)
    kinds.value.add(name="click", number=1)
    click = add(source, "Click", {**_IDS, "timestamp": "int64"})
    field = next(field for field in click.field if field.name == "event_type")
    field.type, field.type_name = 14, ".shop.Kind"
    values = {name: value for name, value in _VALUES.items() if name != "event_type"}
    value = written(registry, source, "Click", **values)
    codec = ProtobufInput(registry, "events")
    codec.prepare([value])
    assert b'"event_type":"view","timestamp":0' in codec.to_json(value)


def test_what_a_schema_imports_is_fetched_with_it_and_not_asked_for_while_decoding() -> None:
    shared = file("shared.proto")
    add(shared, "Features", {"year": "double"})
    source = file("click.proto", "shared.proto")
    add(source, "Click", {**_IDS, "timestamp": "int64", "features": "shop.Features"})
    with registry_server() as server:
        producer = Registry(server.url, {}, register=True)
        value = written(producer, source, "Click", shared, **_VALUES, timestamp=NOW_MS, features={"year": 7.0})
        codec = ProtobufInput(Registry(server.url, {}, register=True), "events")
        codec.prepare([value])
        server.status = 503
        batch, dead = decoder(codec, {"year": Numeric()})(raw([value], ["u"]))
    assert ([], 7.0) == (dead, batch.features[0].year)


def _bytes(registry: Registry) -> bytes:
    source = file()
    add(source, "Click", {**_IDS, "timestamp": "int64", "blob": "bytes"})
    return written(registry, source, "Click", **_VALUES, timestamp=NOW_MS, blob=b"\xff")


def _lacking(registry: Registry) -> bytes:
    source = file()
    add(source, "Half", {"event_id": "string"})
    return written(registry, source, "Half", event_id="e")


def _index(number: bytes) -> Any:
    return lambda registry: (good := ProtobufInput(registry, "events").event(UserEvent(**GOOD)))[:5] + number + good[6:]


def _source(registry: Registry) -> bytes:
    from confluent_kafka.schema_registry import Schema

    schema = Schema('syntax = "proto3"; message M { string event_id = 1; }', "PROTOBUF")
    return b"\0" + registry.client.register_schema("source", schema).to_bytes(4, "big") + b"\0\n\x01e"


def _no_descriptor(registry: Registry) -> bytes:
    from confluent_kafka.schema_registry import Schema

    return b"\0" + registry.client.register_schema("x", Schema("AAAA", "PROTOBUF")).to_bytes(4, "big") + b"\0\n\x01e"


BAD = [
    (_bytes, "wrong_type", "bytes have no place"),
    (_lacking, "missing_field", "user_id"),
    (_index(b"\x02\x12"), "incompatible_schema", r"message indexes \[9\] are not in it"),
    (_index(b"\x02\x01"), "incompatible_schema", r"message indexes \[-1\] are not in it"),
    (_index(b"\x80"), "not_framed", "message indexes"),
    (_source, "incompatible_schema", "the registry has no `format=serialized`"),
    (_no_descriptor, "incompatible_schema", "schema id 1"),
]


@pytest.mark.parametrize(("make", "reason", "detail"), BAD, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD)])
def test_what_is_wrong_with_a_schema_or_its_value_is_said(
    registry: Registry, make: Any, reason: str, detail: str
) -> None:
    _, dead = read(registry, make(registry))
    assert [reason] == [found for found, _ in dead]
    assert re.search(detail, dead[0][1]), dead


@cache
def _codec() -> ProtobufInput:
    return ProtobufInput(Registry("mock://any-bytes", {}, register=True), "events")


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_whatever_the_bytes_are_they_are_read_or_refused(payload: bytes) -> None:
    codec = _codec()
    value = codec.event(UserEvent(**GOOD))[:5] + payload
    codec.prepare([value])
    try:
        assert isinstance(json.loads(codec.to_json(value)), dict)
    except NotDecoded as refusal:
        assert refusal.reason in REASONS


def test_nesting_has_a_limit(registry: Registry) -> None:
    source = file("deep.proto", STRUCT.name)
    add(source, "Click", {**_IDS, "timestamp": "int64", "features": "google.protobuf.Struct"})
    deep: Any = 1.0
    for _ in range(20):
        deep = {"a": deep}
    value = written(registry, source, "Click", **_VALUES, timestamp=NOW_MS, features=deep)
    _, dead = read(registry, value)
    assert ["too_deep"] == [reason for reason, _ in dead]


def test_scores_can_be_read_by_confluents_own_deserializer(registry: Registry) -> None:
    from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer

    from stream_adapt.codecs.framed import _SCORE
    from stream_adapt.codecs.protobuf import message_type

    codec = ProtobufOutput(registry, "scores")
    codec.prove()
    read = ProtobufDeserializer(message_type("score-v1"), schema_registry_client=registry.client)
    found: Any = read(codec.score(_SCORE))
    assert (0.5, False, "v") == (found.score, found.HasField("level"), found.model_version)

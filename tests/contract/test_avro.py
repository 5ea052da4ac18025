"""Avro: what is particular to it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from bad_records import GOOD, NOW_MS
from registry_server import registry_server
from test_codecs import decoder, raw

from stream_adapt.codecs.avro import SCHEMAS, AvroInput, plain
from stream_adapt.codecs.registry import Registry

ROOT = Path(__file__).parents[2] / "schemas"


@pytest.fixture
def registry() -> Registry:
    return Registry(f"mock://{uuid.uuid4()}", {}, register=True)


def written(registry: Registry, record: Any, schema: Any) -> bytes:
    """A value as any producer would write it, with a schema of its own."""
    from confluent_kafka.schema_registry.avro import AvroSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    serialize = AvroSerializer(registry.client, json.dumps(schema))
    return serialize(record, SerializationContext(f"t-{uuid.uuid4()}", MessageField.VALUE))


def test_the_schemas_in_the_folder_are_what_is_written() -> None:
    for name, schema in SCHEMAS.items():
        assert json.loads((ROOT / f"{name}.avsc").read_text(encoding="utf-8")) == schema


def test_a_record_of_the_producers_own_schema_is_an_event_if_it_has_what_an_event_needs(registry: Registry) -> None:
    moment = {"type": "long", "logicalType": "timestamp-millis"}
    names = {"event_id": "string", "user_id": "string", "item_id": "string", "event_type": "string"}
    kinds = {**names, "timestamp": moment, "label": "int", "shop": "string"}
    schema = {"type": "record", "name": "Click", "fields": [{"name": n, "type": k} for n, k in kinds.items()]}
    value = written(registry, {**GOOD, "shop": "north"}, schema)
    codec = AvroInput(registry, "events")
    codec.prepare([value])
    batch, dead = decoder(codec)(raw([value], ["u"]))
    assert ([], [NOW_MS], [1]) == (dead, batch.timestamps_ms.tolist(), batch.levels.tolist())


_HALF = {"type": "record", "name": "Half", "fields": [{"name": "event_id", "type": "string"}]}
BAD: list[tuple[Callable[[Registry], bytes], str]] = [
    (lambda registry: written(registry, "e1", "string"), "incompatible_schema"),
    (lambda registry: written(registry, {"event_id": "e"}, _HALF), "missing_field"),
]


@pytest.mark.parametrize(("make", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_record_that_is_no_event_is_refused(
    registry: Registry, make: Callable[[Registry], bytes], reason: str
) -> None:
    value = make(registry)
    codec = AvroInput(registry, "events")
    codec.prepare([value])
    assert [reason] == [letter.reason for letter in decoder(codec)(raw([value], ["u"]))[1]]


def test_what_a_schema_refers_to_is_fetched_before_the_record_is_decoded() -> None:
    from confluent_kafka.schema_registry import Schema, SchemaReference
    from fastavro import parse_schema, schemaless_writer

    shop = {"type": "record", "name": "Shop", "fields": [{"name": "town", "type": "string"}]}
    kinds: dict[str, Any] = dict.fromkeys(("event_id", "user_id", "item_id", "event_type"), "string")
    fields = [{"name": n, "type": k} for n, k in {**kinds, "timestamp": "long", "shop": "Shop"}.items()]
    visit = {"type": "record", "name": "Visit", "fields": fields}
    with registry_server() as server:
        registry = Registry(server.url, {}, register=True)
        registry.client.register_schema("shops", Schema(json.dumps(shop), "AVRO"))
        schema = Schema(json.dumps(visit), "AVRO", [SchemaReference("Shop", "shops", 1)])
        schema_id = registry.client.register_schema("visits", schema)
        body = BytesIO()
        named: dict[str, Any] = {}
        parse_schema(shop, named)
        record = {k: v for k, v in GOOD.items() if k in {*kinds, "timestamp"}}
        schemaless_writer(body, parse_schema(visit, named), {**record, "shop": {"town": "Bern"}})
        value = b"\0" + schema_id.to_bytes(4, "big") + body.getvalue()
        codec = AvroInput(Registry(server.url, {}, register=True), "events")
        codec.prepare([value])
        server.status = 503
        batch, dead = decoder(codec)(raw([value], ["u"]))
    assert ([], 1) == (dead, len(batch))


def test_nesting_has_a_limit() -> None:
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    with pytest.raises(Exception, match="too_deep"):
        plain(deep)

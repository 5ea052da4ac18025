"""Avro: records of event v1, erase v1, score v1 and receipt v1 as `schemas/*.avsc` say.

A value is read by the schema that it was written with, whatever its name: what event v1 needs of it must be there,
under the same names and with the same types; other fields are skipped. A `timestamp-millis` is a timestamp, too. Only
the schemas below are written, under subjects `<topic>-<record>`, so that scores and receipts may share a topic.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from math import isfinite
from typing import Any

import msgspec

from stream_adapt.codecs import NotDecoded
from stream_adapt.codecs.framed import DEEPEST, FramedInput, FramedOutput, Writer, settings
from stream_adapt.codecs.registry import Registry

_NAMESPACE = "stream_adapt"
_TYPE = "AVRO"
_FEATURE = ["null", "double", "string", {"type": "array", "items": ["string", "double"]}]


def _schema(name: str, doc: str, **fields: Any) -> dict[str, Any]:
    """A record; a field whose type allows null is null where it is not given."""
    listed = [
        {"name": field, "type": kind, **({"default": None} if isinstance(kind, list) and kind[0] == "null" else {})}
        for field, kind in fields.items()
    ]
    return {"type": "record", "name": name, "namespace": _NAMESPACE, "doc": doc, "fields": listed}


_IDS = {"event_id": "string", "user_id": "string"}
_SOURCE = {"source_topic": "string", "source_partition": "int", "source_offset": "long"}
_FLAGS = {"type": "array", "items": "string"}

#: By name: `schemas/<name>.avsc`. Meanings are those of the JSON Schemas of the same names.
SCHEMAS: dict[str, dict[str, Any]] = {
    "event-v1": _schema(
        "Event",
        "One thing a user did with an item: event v1.",
        **_IDS,
        item_id="string",
        event_type="string",
        timestamp="long",
        label=["null", "double"],
        features=["null", {"type": "map", "values": _FEATURE}],
        domain=["null", "string"],
    ),
    "erase-v1": _schema("Erase", "Has a user's row erased: erase v1.", **_IDS, event_type="string", timestamp="long"),
    "score-v1": _schema(
        "Score",
        "What the model said of one event: score v1.",
        **_IDS,
        item_id="string",
        score="double",
        frozen_score="double",
        updated_score="double",
        level=["null", "int"],
        target=["null", "int"],
        uncertainty="double",
        model_version="string",
        adaptations="long",
        flags=_FLAGS,
        event_timestamp="long",
        scored_at="long",
        **_SOURCE,
    ),
    "receipt-v1": _schema(
        "Receipt",
        "A user's row was erased: receipt v1.",
        **_IDS,
        flags=_FLAGS,
        had_row="boolean",
        event_timestamp="long",
        erased_at="long",
        **_SOURCE,
    ),
}


class _Writer(Writer):
    """Writes one kind of record to one topic."""

    def __init__(self, registry: Registry, topic: str, name: str) -> None:
        from confluent_kafka.schema_registry.avro import AvroSerializer

        super().__init__(registry, topic, f"{_NAMESPACE}.{SCHEMAS[name]['name']}")
        self._serialize = AvroSerializer(registry.client, json.dumps(SCHEMAS[name]), conf=settings(registry))

    def __call__(self, record: msgspec.Struct) -> bytes:
        return self._serialize(msgspec.structs.asdict(record), self.context)  # type: ignore[no-any-return]


class _Reader:
    """Reads any record by the schema that it was written with."""

    def __init__(self, registry: Registry) -> None:
        from confluent_kafka.schema_registry.avro import AvroDeserializer

        self._registry = registry
        self._deserialize = AvroDeserializer(registry.client)

    def prepare(self, values: Iterable[bytes | None]) -> None:
        """Learns the schemas of these."""
        self._registry.learn(values)

    def __call__(self, value: bytes) -> dict[str, Any]:
        """The record's fields as JSON has them; raises NotDecoded."""
        self._registry.check(value, _TYPE)
        try:
            found = self._deserialize(value)
        except Exception as error:
            raise NotDecoded("not_decodable", f"{type(error).__name__}: {error}"[:500]) from error
        if not isinstance(found, dict):
            raise NotDecoded("incompatible_schema", f"the schema is no record but {type(found).__name__}")
        return {name: plain(one) for name, one in found.items()}


class AvroInput(FramedInput):
    """Events and erase requests in Avro."""

    def __init__(self, registry: Registry, topic: str) -> None:
        super().__init__(topic, _Reader(registry), partial(_Writer, registry))


class AvroOutput(FramedOutput):
    """Scores and receipts in Avro."""

    def __init__(self, registry: Registry, topic: str) -> None:
        super().__init__(topic, _Reader(registry), partial(_Writer, registry))


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: a time in ms; NotDecoded for what JSON cannot say."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise NotDecoded("not_finite", f"{value} is no number that can be used")
        return value
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return int(aware.timestamp() * 1000)
    if depth >= DEEPEST:
        raise NotDecoded("too_deep", f"nested more than {DEEPEST} levels")
    if isinstance(value, dict):
        return {name: plain(one, depth + 1) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, depth + 1) for one in value]
    raise NotDecoded("wrong_type", f"{type(value).__name__} has no place in event v1")

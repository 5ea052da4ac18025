"""Protobuf: records of event v1, erase v1, score v1 and receipt v1 as `schemas/*.proto` say.

A value is read by the schema that it was written with, whatever its name and numbers: what event v1 needs of it must be
there, under the same names and with the same types; other fields are skipped. What it imports is fetched with it.

| in the schema                                                | read as                                              |
|--------------------------------------------------------------|------------------------------------------------------|
| a field without presence (no `optional` in proto3)           | its default where nothing was sent                   |
| `google.protobuf.Timestamp`                                  | milliseconds                                         |
| `google.protobuf.Struct`, `Value`, `ListValue`, wrappers     | what they hold                                       |
| a message that is one `oneof` and nothing else               | the chosen value; null if there is none              |
| a message whose only field is `repeated … values`            | that list                                            |
| an enum                                                      | the value's name                                     |
| any other message                                            | an object; as `features`: features by their names    |

Nothing is generated: descriptors are made from the tables below. Needs the extra `protobuf`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from io import BytesIO
from math import isfinite
from typing import Any

import msgspec

from stream_adapt.codecs import NotDecoded
from stream_adapt.codecs.framed import DEEPEST, FramedInput, FramedOutput, Writer, settings
from stream_adapt.codecs.registry import HEADER_BYTES, Known, Registry, id_of
from stream_adapt.errors import ConfigError

_PACKAGE = "stream_adapt"
_TYPE = "PROTOBUF"
#: The form of a schema that the registry is asked for: a descriptor in base64, and not its source.
_FORM = "serialized"
#: Message indexes that say: the schema's first message.
_FIRST = 0

_IDS = {"event_id": "string", "user_id": "string"}
_SOURCE = {"source_topic": "string", "source_partition": "int32", "source_offset": "int64"}

#: By file, by message, by field: its type; numbers count from 1 on. A field is added at the end, and never removed.
#: The first message of a file is the record. Meanings are those of the JSON Schemas of the same names.
SCHEMAS: dict[str, dict[str, dict[str, str]]] = {
    "event-v1": {
        "Event": {
            **_IDS,
            "item_id": "string",
            "event_type": "string",
            "timestamp": "int64",
            "label": "optional double",
            "features": "map<string, Feature>",
            "domain": "optional string",
        },
        "Feature": {
            "number": "oneof double",
            "text": "oneof string",
            "numbers": "oneof Numbers",
            "texts": "oneof Texts",
        },
        "Numbers": {"values": "repeated double"},
        "Texts": {"values": "repeated string"},
    },
    "erase-v1": {"Erase": {**_IDS, "event_type": "string", "timestamp": "int64"}},
    "score-v1": {
        "Score": {
            **_IDS,
            "item_id": "string",
            "score": "double",
            "frozen_score": "double",
            "updated_score": "double",
            "level": "optional int32",
            "target": "optional int32",
            "uncertainty": "double",
            "model_version": "string",
            "adaptations": "int64",
            "flags": "repeated string",
            "event_timestamp": "int64",
            "scored_at": "int64",
            **_SOURCE,
        },
    },
    "receipt-v1": {
        "Receipt": {
            **_IDS,
            "flags": "repeated string",
            "had_row": "bool",
            "event_timestamp": "int64",
            "erased_at": "int64",
            **_SOURCE,
        },
    },
}


def file_descriptor(name: str) -> Any:
    """`schemas/<name>.proto` as a FileDescriptorProto, as protoc makes it."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    file = FileDescriptorProto(name=f"{name}.proto", package=_PACKAGE, syntax="proto3")
    for message, kinds in SCHEMAS[name].items():
        found = file.message_type.add(name=message)
        if any(kind.startswith("oneof ") for kind in kinds.values()):
            found.oneof_decl.add(name="kind")
        for number, (field, kind) in enumerate(kinds.items(), 1):
            _add_field(found, field, number, kind)
    return file


def _add_field(message: Any, name: str, number: int, kind: str) -> None:
    """One field; `kind` as in the tables above."""
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

    label, _, of = kind.rpartition(" ")
    entry = f"{name.capitalize()}Entry"
    if label == "map<string,":
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _add_field(nested, "key", 1, "string")
        _add_field(nested, "value", 2, of.removesuffix(">"))
        label, of = "repeated", f"{message.name}.{entry}"
    field = message.field.add(name=name, number=number, json_name=_camel(name), label=Field.LABEL_OPTIONAL)
    if label == "repeated":
        field.label = Field.LABEL_REPEATED
    if label == "oneof":
        field.oneof_index = 0
    if label == "optional":  # a oneof of its own, as proto3 has it
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")
    if of[0].isupper():
        field.type, field.type_name = Field.TYPE_MESSAGE, f".{_PACKAGE}.{of}"
    else:
        field.type = getattr(Field, f"TYPE_{of.upper()}")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


@cache
def message_type(name: str) -> Any:
    """The class of a file's record.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from google.protobuf.descriptor_pool import DescriptorPool
        from google.protobuf.message_factory import GetMessageClass
    except ImportError as error:
        raise ConfigError(f"format protobuf needs the extra `protobuf` ({error})") from error
    pool = DescriptorPool()
    pool.Add(file_descriptor(name))
    return GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{next(iter(SCHEMAS[name]))}"))


class _Writer(Writer):
    """Writes one kind of record to one topic."""

    def __init__(self, registry: Registry, topic: str, name: str) -> None:
        from confluent_kafka.schema_registry.protobuf import ProtobufSerializer

        self._message = message_type(name)
        super().__init__(registry, topic, self._message.DESCRIPTOR.full_name)
        self._serialize = ProtobufSerializer(self._message, registry.client, settings(registry))

    def __call__(self, record: msgspec.Struct) -> bytes:
        message = self._message(**_fields(record))
        return self._serialize(message, self.context)  # type: ignore[no-any-return]


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    """What a message is made from; None leaves a field unset."""
    fields = msgspec.structs.asdict(record)
    if fields.get("features"):
        fields["features"] = {name: _feature(value) for name, value in fields["features"].items()}
    return fields


def _feature(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list):
        return {"texts" if value and isinstance(value[0], str) else "numbers": {"values": value}}
    return {"number": value}


class _Reader:
    """Reads any record by the schema that it was written with."""

    def __init__(self, registry: Registry) -> None:
        from confluent_kafka.schema_registry.serde import SchemaId

        self._schema_id = partial(SchemaId, _TYPE)
        self._registry = registry
        #: By schema id and message indexes: parses a message, and makes an object of it.
        self._read: dict[tuple[int, bytes], tuple[Callable[[bytes], Any], _Plain]] = {}

    def prepare(self, values: Iterable[bytes | None]) -> None:
        """Learns the schemas of these."""
        self._registry.learn(values, _FORM)

    def __call__(self, value: bytes) -> dict[str, Any]:
        """The record's fields as JSON has them; raises NotDecoded."""
        schema = self._registry.check(value, _TYPE)
        start = HEADER_BYTES + 1 if value[HEADER_BYTES] == _FIRST else self._after_indexes(value)
        which = id_of(value), value[HEADER_BYTES:start]
        if which not in self._read:
            self._read[which] = self._reader(schema, value)
        parse, plain = self._read[which]
        try:
            found = plain(parse(value[start:]), 0)
        except NotDecoded:
            raise
        except Exception as error:
            raise NotDecoded("not_decodable", f"{type(error).__name__}: {error}"[:500]) from error
        if not isinstance(found, dict):
            raise NotDecoded("incompatible_schema", f"the schema is no record but {type(found).__name__}")
        return found

    def _after_indexes(self, value: bytes) -> int:
        rest = BytesIO(value)
        try:
            self._schema_id().from_bytes(rest)
        except Exception as error:
            raise NotDecoded("not_framed", f"message indexes: {error}"[:500]) from error
        return rest.tell()

    def _reader(self, schema: Known, value: bytes) -> tuple[Callable[[bytes], Any], _Plain]:
        from google.protobuf.message_factory import GetMessageClass

        schema_id = self._schema_id()
        schema_id.from_bytes(BytesIO(value))
        try:
            descriptor = _descriptor(schema, schema_id.message_indexes)
        except Exception as error:
            detail = f"schema id {schema_id.id}: {type(error).__name__}: {error}"
            raise NotDecoded("incompatible_schema", detail[:500]) from error
        return GetMessageClass(descriptor).FromString, _Plans().of(descriptor)


def _descriptor(schema: Known, indexes: Sequence[int] | None) -> Any:
    """The message at these indexes of a schema: of the file's messages, then of those inside; raises what is wrong."""
    from confluent_kafka.schema_registry.common.protobuf import _init_pool, _str_to_proto
    from google.protobuf.descriptor_pool import DescriptorPool

    pool = DescriptorPool()
    _init_pool(pool)  # Google's and Confluent's own files
    for name, text in (*schema.imports, ("value.proto", schema.text)):
        try:
            base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the registry has no `format={_FORM}` of {name}") from error
        pool.Add(_str_to_proto(name, text))
    file = pool.FindFileByName("value.proto")
    messages = list(file.message_types_by_name.values())
    found = None
    for index in indexes or ():
        if not 0 <= index < len(messages):
            raise ValueError(f"message indexes {indexes} are not in it")
        found = messages[index]
        messages = list(found.nested_types)
    return found


#: Makes of a value, at a depth, what JSON has for it.
_Plain = Callable[[Any, int], Any]
_WELL_KNOWN = ("google/protobuf/struct.proto", "google/protobuf/wrappers.proto")


class _Plans:
    """How messages of a schema become JSON, by their type."""

    def __init__(self) -> None:
        self._made: dict[str, _Plain] = {}

    def of(self, descriptor: Any) -> _Plain:
        """A message's."""
        name = descriptor.full_name
        if name not in self._made:
            self._made[name] = lambda message, depth: self._made[name](message, depth)  # it may hold its own kind
            self._made[name] = self._message(descriptor)
        return self._made[name]

    def _message(self, descriptor: Any) -> _Plain:
        from confluent_kafka.schema_registry.common.protobuf import _is_repeated

        fields, oneofs = list(descriptor.fields), list(descriptor.oneofs)
        if descriptor.full_name == "google.protobuf.Timestamp":
            return lambda message, _depth: message.seconds * 1000 + message.nanos // 1_000_000
        if len(oneofs) == 1 and len(oneofs[0].fields) == len(fields) > 1:
            return self._chosen(oneofs[0])
        if len(fields) == 1:
            only = fields[0]
            if descriptor.file.name in _WELL_KNOWN or (only.name == "values" and _is_repeated(only)):
                read, name = self._field(only), only.name
                return lambda message, depth: read(getattr(message, name), depth + 1)
        return self._record(descriptor)

    def _record(self, descriptor: Any) -> _Plain:
        fields = [(f.name, self._field(f), f.has_presence, f.message_type is not None) for f in descriptor.fields]

        def read(message: Any, depth: int) -> dict[str, Any]:
            if depth >= DEEPEST:
                raise NotDecoded("too_deep", f"nested more than {DEEPEST} levels")
            found = {}
            for name, plain, may_lack, empty_is_absent in fields:
                if may_lack and not message.HasField(name):
                    continue
                value = getattr(message, name)
                if may_lack or value or not empty_is_absent:
                    found[name] = plain(value, depth + 1)
            return found

        return read

    def _chosen(self, oneof: Any) -> _Plain:
        fields, name = {field.name: self._field(field) for field in oneof.fields}, oneof.name

        def read(message: Any, depth: int) -> Any:
            if depth >= 3 * DEEPEST:  # Value, ListValue and their list are one level of JSON
                raise NotDecoded("too_deep", f"nested more than {DEEPEST} levels")
            chosen = message.WhichOneof(name)
            return None if chosen is None else fields[chosen](getattr(message, chosen), depth + 1)

        return read

    def _field(self, field: Any) -> _Plain:
        from confluent_kafka.schema_registry.common.protobuf import _is_repeated, is_map_field

        if is_map_field(field):
            of = self._one(field.message_type.fields_by_name["value"])
            return lambda found, depth: {str(key): of(value, depth + 1) for key, value in found.items()}
        one = self._one(field)
        if not _is_repeated(field):
            return one
        return lambda values, depth: [one(value, depth + 1) for value in values]

    def _one(self, field: Any) -> _Plain:
        """A field's value, or one of its values."""
        if field.message_type is not None:
            return self.of(field.message_type)
        if field.enum_type is not None:
            names = {value.number: value.name for value in field.enum_type.values}
            null = field.enum_type.full_name == "google.protobuf.NullValue"
            return lambda number, _depth: None if null else names.get(number, number)
        if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
            return _finite
        if field.type == field.TYPE_BYTES:
            return _no_bytes
        return lambda value, _depth: value


def _finite(value: float, _depth: int) -> float:
    if not isfinite(value):
        raise NotDecoded("not_finite", f"{value} is no number that can be used")
    return value


def _no_bytes(_value: bytes, _depth: int) -> Any:
    raise NotDecoded("wrong_type", "bytes have no place in event v1")


class ProtobufInput(FramedInput):
    """Events and erase requests in Protobuf."""

    def __init__(self, registry: Registry, topic: str) -> None:
        message_type("event-v1")
        super().__init__(topic, _Reader(registry), partial(_Writer, registry))


class ProtobufOutput(FramedOutput):
    """Scores and receipts in Protobuf."""

    def __init__(self, registry: Registry, topic: str) -> None:
        message_type("score-v1")
        super().__init__(topic, _Reader(registry), partial(_Writer, registry))

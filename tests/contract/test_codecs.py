"""What every codec promises: the golden examples survive it, and a batch is the same whatever the format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bad_records import FEATURES, GOOD, MAX_BYTES, NOW_MS, THREE_STARS

from stream_adapt.codecs import InputCodec, JsonOutput, OutputCodec
from stream_adapt.codecs.avro import SCHEMAS, AvroInput, AvroOutput, plain
from stream_adapt.codecs.registry import Registry
from stream_adapt.decode import REASONS, Decoder, Limits
from stream_adapt.emit import Emitter
from stream_adapt.errors import ConfigError, RegistryRefused, RegistryUnreachable
from stream_adapt.learner.encoder import Bag, Categorical, Numeric, Vector
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.record import EraseRequest, RawBatch, Receipt, Score, TopicNames, UserEvent

ROOT = Path(__file__).parents[2] / "schemas"
GOLDEN = {name: sorted((ROOT / "examples").glob(f"{name}.*.json")) for name in SCHEMAS}
FIVE_STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5)))
DECLARED = {"genres": Bag(), "year": Numeric(), "occupation": Categorical(of="user"), "embedding": Vector(length=3)}


@pytest.fixture
def registry() -> Registry:
    """In memory, with nothing in it; as confluent-kafka's own client has it."""
    return Registry(f"mock://{uuid.uuid4()}", {}, register=True)


def raw(values: list[bytes | None], keys: list[str]) -> RawBatch:
    n = len(values)
    return RawBatch([key.encode() for key in keys], values, np.full(n, 1, np.int32), np.arange(10, 10 + n))


def written(registry: Registry, name: str, record: Any, schema: dict[str, Any] | None = None) -> bytes:
    """A value as any producer would write it, with a schema of ours or its own."""
    from confluent_kafka.schema_registry.avro import AvroSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    serialize = AvroSerializer(registry.client, json.dumps(schema or SCHEMAS[name]))
    return serialize(record, SerializationContext(f"t-{uuid.uuid4()}", MessageField.VALUE))


def decoder(codec: InputCodec | None, features: Any = FEATURES, feedback: Feedback = THREE_STARS) -> Decoder:
    return Decoder(features, feedback, Limits(max_bytes=MAX_BYTES), now_ms=lambda: NOW_MS * 10, codec=codec)


def test_the_schemas_in_the_folder_are_what_is_written() -> None:
    for name, schema in SCHEMAS.items():
        assert json.loads((ROOT / f"{name}.avsc").read_text(encoding="utf-8")) == schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_avro_has_the_fields_of_the_json_schema(name: str) -> None:
    described = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
    assert [field["name"] for field in SCHEMAS[name]["fields"]] == list(described["properties"])


def test_a_batch_of_the_golden_events_is_the_same_in_avro_and_in_json(registry: Registry) -> None:
    codec = AvroInput(registry, "events")
    paths = GOLDEN["event-v1"] + GOLDEN["erase-v1"]
    examples = [json.loads(path.read_bytes()) for path in paths]
    events = [UserEvent(**one) for one in examples if "item_id" in one]
    requests = [EraseRequest(**one) for one in examples if "item_id" not in one]
    values: list[bytes | None] = [*map(codec.event, events), *map(codec.erase, requests)]
    keys = [one["user_id"] for one in examples]
    in_avro = decoder(codec, DECLARED, FIVE_STARS)
    in_avro.prepare(raw(values, keys))
    batch, dead = in_avro(raw(values, keys))
    expected, _ = decoder(None, DECLARED, FIVE_STARS)(raw([path.read_bytes() for path in paths], keys))
    assert [] == dead
    for column in ("event_ids", "user_ids", "item_ids", "erasures"):
        assert getattr(expected, column) == getattr(batch, column)
    for column in ("timestamps_ms", "levels", "offsets"):
        np.testing.assert_array_equal(getattr(expected, column), getattr(batch, column))
    assert [repr(one) for one in expected.features] == [repr(one) for one in batch.features]
    assert {"NoneType", "Features"} == {type(one).__name__ for one in batch.features}


@pytest.mark.parametrize("make", [lambda _: JsonOutput(), lambda r: AvroOutput(r, "scores")], ids=["json", "avro"])
def test_the_golden_scores_and_receipts_survive_a_round_trip(
    registry: Registry, make: Callable[[Registry], OutputCodec]
) -> None:
    codec, reader = make(registry), AvroInput(registry, "scores")
    codec.prove()
    for path in GOLDEN["score-v1"]:
        value = codec.score(msgspec.json.decode(path.read_bytes(), type=Score))
        if isinstance(codec, AvroOutput):
            reader.prepare([value])
            value = reader.to_json(value)
        assert json.loads(path.read_bytes()) == json.loads(value)
    for path in GOLDEN["receipt-v1"]:
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        assert receipt == codec.read_receipt(codec.receipt(receipt))


def test_a_record_of_the_producers_own_schema_is_an_event_if_it_has_what_an_event_needs(registry: Registry) -> None:
    moment = {"type": "long", "logicalType": "timestamp-millis"}
    names = {"event_id": "string", "user_id": "string", "item_id": "string", "event_type": "string"}
    kinds = {**names, "timestamp": moment, "label": "int", "shop": "string"}
    schema = {"type": "record", "name": "Click", "fields": [{"name": n, "type": k} for n, k in kinds.items()]}
    value = written(registry, "", {**GOOD, "shop": "north"}, schema)
    codec = AvroInput(registry, "events")
    codec.prepare([value])
    batch, dead = decoder(codec)(raw([value], ["u"]))
    assert ([], [NOW_MS], [1]) == (dead, batch.timestamps_ms.tolist(), batch.levels.tolist())


def _of(record: dict[str, Any]) -> Callable[[Registry], bytes]:
    return lambda registry: written(registry, "event-v1", {**GOOD, **record})


def _lacking(registry: Registry) -> bytes:
    schema = {"type": "record", "name": "Half", "fields": [{"name": "event_id", "type": "string"}]}
    return written(registry, "", {"event_id": "e"}, schema)


def _of_another_kind(registry: Registry) -> bytes:
    from confluent_kafka.schema_registry import Schema

    schema_id = registry.client.register_schema("other", Schema('{"type": "object"}', "JSON"))
    return b"\0" + schema_id.to_bytes(4, "big") + b"{}"


BAD: list[tuple[Callable[[Registry], bytes], str]] = [
    (lambda _: json.dumps(GOOD).encode(), "not_framed"),
    (lambda _: b"\0\0\0", "not_framed"),
    (lambda _: b"\0\0\x0f\x42\x3fpayload", "unknown_schema"),
    (_of_another_kind, "incompatible_schema"),
    (lambda registry: written(registry, "", "e1", "string"), "incompatible_schema"),  # type: ignore[arg-type]
    (lambda registry: _of({})(registry)[:-12], "not_decodable"),
    (_lacking, "missing_field"),
    (_of({"event_id": ""}), "empty_id"),
    (_of({"timestamp": -1}), "bad_timestamp"),
    (_of({"label": float("nan")}), "not_finite"),
    (_of({"features": {"year": float("inf")}}), "not_finite"),
    (_of({"features": {"year": 1e308}}), "out_of_range"),
    (_of({"features": {"embedding": [1.0]}}), "vector_length"),
    (_of({"features": {"genres": [1.0]}}), "wrong_type"),
    (_of({"label": 9.0}), "label_out_of_range"),
    (_of({"user_id": "another"}), "key_mismatch"),
]


@pytest.mark.parametrize(("make", "reason"), BAD, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(BAD)])
def test_each_bad_value_is_refused_with_its_reason_and_unchanged(
    registry: Registry, make: Callable[[Registry], bytes], reason: str
) -> None:
    good, bad = _of({})(registry), make(registry)
    codec = AvroInput(registry, "events")
    codec.prepare([good, bad, None])
    batch, dead = decoder(codec)(raw([good, bad, None, good], ["u"] * 4))
    assert ([10, 13], [reason, "null_value"]) == (batch.offsets.tolist(), [letter.reason for letter in dead])
    assert (bad, True) == (dead[0].value, reason in REASONS)


def test_a_registry_that_does_not_answer_is_no_reason_to_refuse_a_record() -> None:
    registry = Registry("http://127.0.0.1:9", {}, register=True)
    codec = AvroInput(registry, "events")
    with pytest.raises(RegistryUnreachable, match=r"127\.0\.0\.1:9"):
        decoder(codec).prepare(raw([b"\0\0\0\0\x01payload"], ["u"]))


def test_an_unknown_id_is_asked_for_again_after_a_minute() -> None:
    now = [0.0]
    registry = Registry(f"mock://{uuid.uuid4()}", {}, register=True, clock=lambda: now[0])
    asked: list[int] = []
    lookup = registry.client.get_schema
    registry.client.get_schema = lambda wanted: (asked.append(wanted), lookup(wanted))[1]  # type: ignore[method-assign,assignment]
    for now[0] in (0.0, 59.0, 61.0):
        registry.learn([b"\0\0\0\0\x07x"])
    assert [7, 7] == asked


def test_schemas_that_may_not_be_registered_must_be_there(registry: Registry) -> None:
    strict = Registry(registry.url, {}, register=False)
    strict.client = registry.client
    with pytest.raises(RegistryRefused, match=r"scores-stream_adapt\.Score.*register_schemas"):
        AvroOutput(strict, "scores").prove()
    AvroOutput(registry, "scores").prove()
    AvroOutput(strict, "scores").prove()


def test_wrong_settings_of_the_registry_are_named() -> None:
    with pytest.raises(ConfigError, match=r"registry\.properties.*nonsense"):
        Registry("http://127.0.0.1:9", {"nonsense": 1}, register=True)


def test_nesting_has_a_limit() -> None:
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    with pytest.raises(Exception, match="too_deep"):
        plain(deep)


def test_an_emitter_writes_what_its_codec_says(registry: Registry) -> None:
    topics = TopicNames.of("app")
    emitter = Emitter(topics, "v1", 1, codec=AvroOutput(registry, topics.scores))
    emitter.prove()
    assert {f"app.scores-stream_adapt.{kind}" for kind in ("Score", "Receipt")} == set(registry.client.get_subjects())

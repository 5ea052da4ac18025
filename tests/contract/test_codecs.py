"""What every codec promises: the golden examples survive it, and a batch is the same whatever the format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bad_records import FEATURES, GOOD, MAX_BYTES, NOW_MS, THREE_STARS

from stream_adapt.codecs import InputCodec, JsonOutput, OutputCodec, avro, protobuf
from stream_adapt.codecs.avro import AvroInput, AvroOutput
from stream_adapt.codecs.framed import FramedInput, FramedOutput
from stream_adapt.codecs.protobuf import ProtobufInput, ProtobufOutput
from stream_adapt.codecs.registry import Registry
from stream_adapt.decode import REASONS, Decoder, Limits
from stream_adapt.emit import Emitter
from stream_adapt.errors import ConfigError, RegistryRefused, RegistryUnreachable
from stream_adapt.learner.encoder import Bag, Categorical, Numeric, Vector
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.record import EraseRequest, RawBatch, Receipt, Score, TopicNames, UserEvent

ROOT = Path(__file__).parents[2] / "schemas"
GOLDEN = {name: sorted((ROOT / "examples").glob(f"{name}.*.json")) for name in avro.SCHEMAS}
FIVE_STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1, 5), (2, 3, 4, 5)))
DECLARED = {"genres": Bag(), "year": Numeric(), "occupation": Categorical(of="user"), "embedding": Vector(length=3)}


@dataclass(frozen=True)
class Format:
    """One that needs a registry."""

    input: Callable[[Registry, str], FramedInput]
    output: Callable[[Registry, str], FramedOutput]
    fields: Callable[[str], list[str]]  # of a record


FORMATS = {
    "avro": Format(AvroInput, AvroOutput, lambda name: [field["name"] for field in avro.SCHEMAS[name]["fields"]]),
    "protobuf": Format(ProtobufInput, ProtobufOutput, lambda name: list(next(iter(protobuf.SCHEMAS[name].values())))),
}


@pytest.fixture
def registry() -> Registry:
    """In memory, with nothing in it; as confluent-kafka's own client has it."""
    return Registry(f"mock://{uuid.uuid4()}", {}, register=True)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def raw(values: list[bytes | None], keys: list[str]) -> RawBatch:
    n = len(values)
    return RawBatch([key.encode() for key in keys], values, np.full(n, 1, np.int32), np.arange(10, 10 + n))


def decoder(codec: InputCodec | None, features: Any = FEATURES, feedback: Feedback = THREE_STARS) -> Decoder:
    return Decoder(features, feedback, Limits(max_bytes=MAX_BYTES), now_ms=lambda: NOW_MS * 10, codec=codec)


@pytest.mark.parametrize("name", avro.SCHEMAS)
def test_a_schema_has_the_fields_of_the_json_schema(form: Format, name: str) -> None:
    described = json.loads((ROOT / f"{name}.json").read_text(encoding="utf-8"))
    assert list(described["properties"]) == form.fields(name)


def test_a_batch_of_the_golden_events_is_the_same_in_json(registry: Registry, form: Format) -> None:
    codec = form.input(registry, "events")
    paths = GOLDEN["event-v1"] + GOLDEN["erase-v1"]
    examples = [json.loads(path.read_bytes()) for path in paths]
    events = [UserEvent(**one) for one in examples if "item_id" in one]
    requests = [EraseRequest(**one) for one in examples if "item_id" not in one]
    values: list[bytes | None] = [*map(codec.event, events), *map(codec.erase, requests)]
    keys = [one["user_id"] for one in examples]
    framed = decoder(codec, DECLARED, FIVE_STARS)
    framed.prepare(raw(values, keys))
    batch, dead = framed(raw(values, keys))
    expected, _ = decoder(None, DECLARED, FIVE_STARS)(raw([path.read_bytes() for path in paths], keys))
    assert [] == dead
    for column in ("event_ids", "user_ids", "item_ids", "erasures", "domains"):
        assert getattr(expected, column) == getattr(batch, column)
    for column in ("timestamps_ms", "levels", "offsets"):
        np.testing.assert_array_equal(getattr(expected, column), getattr(batch, column))
    assert [repr(one) for one in expected.features] == [repr(one) for one in batch.features]
    assert {"NoneType", "Features"} == {type(one).__name__ for one in batch.features}


@pytest.mark.parametrize("name", ["json", *FORMATS])
def test_the_golden_scores_and_receipts_survive_a_round_trip(registry: Registry, name: str) -> None:
    codec: OutputCodec = JsonOutput() if name == "json" else FORMATS[name].output(registry, "scores")
    codec.prove()
    for path in GOLDEN["score-v1"]:
        value = codec.score(msgspec.json.decode(path.read_bytes(), type=Score))
        if name != "json":
            reader = FORMATS[name].input(registry, "scores")
            reader.prepare([value])
            value = reader.to_json(value)
        found = json.loads(value)
        assert json.loads(path.read_bytes()) == {"level": None, "target": None, **found}
    for path in GOLDEN["receipt-v1"]:
        receipt = msgspec.json.decode(path.read_bytes(), type=Receipt)
        assert receipt == codec.read_receipt(codec.receipt(receipt))


def _of(**changes: Any) -> Callable[[FramedInput], bytes]:
    return lambda codec: codec.event(UserEvent(**{**GOOD, **changes}))


BAD: list[tuple[Callable[[FramedInput], bytes], str]] = [
    (lambda _: json.dumps(GOOD).encode(), "not_framed"),
    (lambda _: b"\0\0\0", "not_framed"),
    (lambda _: b"\0\0\x0f\x42\x3fpayload", "unknown_schema"),
    (lambda codec: _of()(codec)[:-12], "not_decodable"),
    (_of(event_id=""), "empty_id"),
    (_of(timestamp=-1), "bad_timestamp"),
    (_of(label=float("nan")), "not_finite"),
    (_of(features={"year": float("inf")}), "not_finite"),
    (_of(features={"year": 1e308}), "out_of_range"),
    (_of(features={"embedding": [1.0]}), "vector_length"),
    (_of(features={"genres": [1.0]}), "wrong_type"),
    (_of(label=9.0), "label_out_of_range"),
    (_of(user_id="another"), "key_mismatch"),
]


@pytest.mark.parametrize(("make", "reason"), BAD, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(BAD)])
def test_each_bad_value_is_refused_with_its_reason_and_unchanged(
    registry: Registry, form: Format, make: Callable[[FramedInput], bytes], reason: str
) -> None:
    codec = form.input(registry, "events")
    good, bad = _of()(codec), make(codec)
    codec.prepare([good, bad, None])
    batch, dead = decoder(codec)(raw([good, bad, None, good], ["u"] * 4))
    assert ([10, 13], [reason, "null_value"]) == (batch.offsets.tolist(), [letter.reason for letter in dead])
    assert (bad, True) == (dead[0].value, reason in REASONS)


def test_a_schema_of_another_kind_is_incompatible(registry: Registry, form: Format) -> None:
    from confluent_kafka.schema_registry import Schema

    schema_id = registry.client.register_schema("other", Schema('{"type": "object"}', "JSON"))
    value = b"\0" + schema_id.to_bytes(4, "big") + b"{}"
    codec = form.input(registry, "events")
    codec.prepare([value])
    _, dead = decoder(codec)(raw([value], ["u"]))
    assert ["incompatible_schema"] == [letter.reason for letter in dead]
    assert f"schema id {schema_id} is JSON" in dead[0].detail


def test_what_is_written_in_one_format_is_refused_in_the_other(registry: Registry) -> None:
    for one, other in ((AvroInput, ProtobufInput), (ProtobufInput, AvroInput)):
        value = _of()(one(registry, f"events-{one.__name__}"))
        codec = other(registry, "events")
        codec.prepare([value])
        _, dead = decoder(codec)(raw([value], ["u"]))
        assert ["incompatible_schema"] == [letter.reason for letter in dead]


def test_a_schema_that_refers_to_what_is_not_there_is_incompatible(registry: Registry, form: Format) -> None:
    from confluent_kafka.schema_registry import Schema, SchemaReference

    kind = {AvroInput: "AVRO", ProtobufInput: "PROTOBUF"}[form.input]  # type: ignore[index]
    schema = Schema('"string"', kind, [SchemaReference("other", "gone", 3)])
    value = b"\0" + registry.client.register_schema("one", schema).to_bytes(4, "big") + b"\0payload"
    codec = form.input(registry, "events")
    codec.prepare([value])
    _, dead = decoder(codec)(raw([value], ["u"]))
    assert ["incompatible_schema"] == [letter.reason for letter in dead]
    assert "version 3 of gone is not there" in dead[0].detail


def test_a_registry_that_does_not_answer_is_no_reason_to_refuse_a_record(form: Format) -> None:
    registry = Registry("http://127.0.0.1:9", {}, register=True)
    codec = form.input(registry, "events")
    with pytest.raises(RegistryUnreachable, match=r"127\.0\.0\.1:9"):
        decoder(codec).prepare(raw([b"\0\0\0\0\x01payload"], ["u"]))


def test_an_unknown_id_is_asked_for_again_after_a_minute() -> None:
    now = [0.0]
    registry = Registry(f"mock://{uuid.uuid4()}", {}, register=True, clock=lambda: now[0])
    asked: list[int] = []
    lookup = registry.client.get_schema
    registry.client.get_schema = lambda wanted, **_: (asked.append(wanted), lookup(wanted))[1]  # type: ignore[method-assign,assignment]
    for now[0] in (0.0, 59.0, 61.0):
        registry.learn([b"\0\0\0\0\x07x"])
    assert [7, 7] == asked


def test_schemas_that_may_not_be_registered_must_be_there(registry: Registry, form: Format) -> None:
    strict = Registry(registry.url, {}, register=False)
    strict.client = registry.client
    with pytest.raises(RegistryRefused, match=r"scores-stream_adapt\.Score.*register_schemas"):
        form.output(strict, "scores").prove()
    form.output(registry, "scores").prove()
    form.output(strict, "scores").prove()


def test_wrong_settings_of_the_registry_are_named() -> None:
    with pytest.raises(ConfigError, match=r"registry\.properties.*nonsense"):
        Registry("http://127.0.0.1:9", {"nonsense": 1}, register=True)


def test_an_emitter_writes_what_its_codec_says(registry: Registry, form: Format) -> None:
    topics = TopicNames.of("app")
    emitter = Emitter(topics, "v1", 1, codec=form.output(registry, topics.scores))
    emitter.prove()
    assert {f"app.scores-stream_adapt.{kind}" for kind in ("Score", "Receipt")} == set(registry.client.get_subjects())

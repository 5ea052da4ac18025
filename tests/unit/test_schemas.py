"""The JSON Schemas, the golden examples and the structs of record.py say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from stream_adapt.decode import ID_LIMIT, REASONS, Decoder, event_struct
from stream_adapt.drift import Alarm
from stream_adapt.emit import Emitter
from stream_adapt.learner.encoder import BAG_LIMIT, NUMBER_LIMIT, Bag, Categorical, Numeric, Vector, features_struct
from stream_adapt.learner.feedback import Feedback
from stream_adapt.learning import LearningRecord, Summary, decode
from stream_adapt.record import (
    Adapted,
    Batch,
    DeadLetter,
    EraseRequest,
    Erasure,
    Flag,
    ItemId,
    RawBatch,
    Receipt,
    Score,
    TopicNames,
    UserEvent,
    UserId,
)

SCHEMAS = Path(__file__).parents[2] / "schemas"
EXAMPLES = sorted((SCHEMAS / "examples").iterdir())
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "event-v1": UserEvent,
    "erase-v1": EraseRequest,
    "score-v1": Score,
    "receipt-v1": Receipt,
    "learning-v1": LearningRecord,
    "alarm-v1": Alarm,
}


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(schema(name))


def example(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def examples_of(name: str) -> list[Path]:
    return [path for path in EXAMPLES if path.name.startswith(f"{name}.")]


@pytest.mark.parametrize("name", [*STRUCTS, "dead-letter-v1"])
def test_schemas_are_valid_named_after_their_file_and_describe_every_field(name: str) -> None:
    found = schema(name)
    Draft202012Validator.check_schema(found)
    assert f"{name}.json" == found["$id"]
    assert all(about.get("description") for about in found["properties"].values())
    assert len(examples_of(name)) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_golden_examples_are_valid(path: Path) -> None:
    validator(path.name.split(".")[0]).validate(example(path))


@pytest.mark.parametrize("name", STRUCTS)
def test_schemas_have_the_fields_of_the_structs(name: str) -> None:
    found, fields = schema(name), msgspec.structs.fields(STRUCTS[name])
    assert [field.name for field in fields] == list(found["properties"])
    assert [field.name for field in fields if field.required] == found["required"]


@pytest.mark.parametrize("name", STRUCTS)
def test_golden_examples_survive_a_round_trip_through_the_structs(name: str) -> None:
    for path in examples_of(name):
        golden = example(path)
        if "flags" in golden:
            golden["flags"] = tuple(golden["flags"])
        encoded = msgspec.json.encode(STRUCTS[name](**golden))
        assert example(path) == json.loads(encoded)


def test_the_struct_reads_the_golden_scores() -> None:
    for path in examples_of("score-v1"):
        score = msgspec.json.decode(path.read_bytes(), type=Score)
        assert example(path) == json.loads(msgspec.json.encode(score))


def test_the_reader_takes_the_golden_learning_records_and_their_summaries_are_described() -> None:
    described = schema("learning-v1")["$defs"]["summary"]
    fields = [field.name for field in msgspec.structs.fields(Summary)]
    assert fields == list(described["properties"]) == described["required"]
    assert all(about.get("description") for about in described["properties"].values())
    for path in examples_of("learning-v1"):
        assert example(path) == json.loads(msgspec.json.encode(decode(path.read_bytes())))


def test_the_consumer_accepts_the_golden_events() -> None:
    features = {"genres": Bag(), "year": Numeric(), "occupation": Categorical(of="user"), "embedding": Vector(length=3)}
    feedback = msgspec.convert(
        {"levels": ["1", "2", "3", "4", "5"], "target": "4", "label": {"range": [1, 5], "cuts": [2, 3, 4, 5]}}, Feedback
    )
    for path in examples_of("event-v1"):
        event: Any = msgspec.json.decode(path.read_bytes(), type=event_struct(features_struct(features), feedback))
        assert example(path)["event_id"] == event.event_id


@pytest.mark.parametrize(
    "change",
    [
        {"event_id": ""},
        {"user_id": "u" * (ID_LIMIT + 1)},
        {"item_id": 7},
        {"timestamp": -1},
        {"timestamp": 1.5},
        {"label": "4"},
        {"features": {"year": 2 * NUMBER_LIMIT}},
        {"features": {"genres": ["a"] * (BAG_LIMIT + 1)}},
        {"features": {"mixed": ["a", 1]}},
        {"features": {"nested": {"a": 1}}},
    ],
    ids=str,
)
def test_events_that_the_consumer_would_refuse_are_not_valid(change: dict[str, Any]) -> None:
    golden = example(SCHEMAS / "examples" / "event-v1.minimal.json")
    assert not validator("event-v1").is_valid({**golden, **change})


def test_fields_that_are_not_known_are_valid() -> None:
    for path in EXAMPLES:
        validator(path.name.split(".")[0]).validate({**example(path), "added-later": "yes"})


def test_scores_need_every_field() -> None:
    golden = example(SCHEMAS / "examples" / "score-v1.learned.json")
    for field in golden:
        assert not validator("score-v1").is_valid({k: v for k, v in golden.items() if k != field})


def test_encoded_structs_are_valid() -> None:
    event = UserEvent("e", UserId("u"), ItemId("i"), "click", 0, 0.5, {"a": ["b"], "c": [0.5], "d": None}, "books")
    score = Score(
        "e", UserId("u"), ItemId("i"), 0.5, 0.0, 1.0, None, None, 0.1, "v", 0, ("late",), 0, 1, "t", 0, 2**63 - 1
    )
    for name, value in (("event-v1", event), ("score-v1", score)):
        validator(name).validate(json.loads(msgspec.json.encode(value)))


def test_the_schema_knows_every_flag() -> None:
    flags = schema("score-v1")["properties"]["flags"]
    assert [flag.name.lower() for flag in Flag if flag.name] == flags["items"]["examples"]
    assert all(flag in flags["description"] for flag in flags["items"]["examples"])


def test_the_schema_knows_every_reason_of_a_dead_letter() -> None:
    reason = schema("dead-letter-v1")["properties"]["stream-adapt.reason"]
    assert list(REASONS) == reason["enum"]
    assert all(f"{name}: {meaning}" in reason["description"] for name, meaning in REASONS.items())


def test_the_consumer_takes_the_golden_requests_for_erasures() -> None:
    paths = examples_of("erase-v1")
    keys: list[bytes | None] = [example(path)["user_id"].encode() for path in paths]
    raw = RawBatch(keys, [p.read_bytes() for p in paths], np.zeros(len(paths), np.int32), np.arange(len(paths)))
    batch, dead = Decoder({}, Feedback())(raw)
    assert (dead, len(batch)) == ([], 0)
    assert [example(path)["user_id"] for path in paths] == [erasure.user_id for erasure in batch.erasures]


def test_emitted_receipts_are_valid_and_say_what_they_are() -> None:
    emitter = Emitter(TopicNames.of("app"), "v1", 1)
    nothing = np.zeros(0)
    erasures = [Erasure("e", UserId("u"), 5, 2, 7, 0), Erasure("e", UserId("u"), 5, 3, 1, 0)]
    batch = Batch([], [], [], [], nothing.astype(int), nothing, nothing, nothing, erasures)
    emitted = emitter.receipts(batch, Adapted(nothing, nothing, nothing, nothing, nothing, nothing, [True, False]))
    values = [json.loads(value or b"") for value in emitted.values]
    for value in values:
        validator("receipt-v1").validate(value)
    assert [(2, 7, True), (3, 1, False)] == [(v["source_partition"], v["source_offset"], v["had_row"]) for v in values]
    assert emitted.headers == [[("stream-adapt.schema", b"receipt/v1")]] * 2
    assert emitted.keys == [b"u", b"u"]


def test_a_dead_letter_keeps_the_records_own_headers_and_the_count_of_replays() -> None:
    emitter = Emitter(TopicNames.of("app"), "v1", 1)
    own = [("trace", b"1"), ("stream-adapt.reason", b"old"), ("stream-adapt.replays", b"2"), ("trace", None)]
    emitted = emitter.dead_letters([DeadLetter(b"u", b"{", 2, 7, "not_json", "", own)])
    assert emitted.headers is not None
    assert [("trace", b"1"), ("stream-adapt.replays", b"2"), ("trace", None)] == list(emitted.headers[0])[:3]
    assert [b"not_json"] == [value for name, value in emitted.headers[0] if name == "stream-adapt.reason"]


@pytest.mark.parametrize("truncated", [False, True])
def test_headers_of_an_emitted_dead_letter_are_valid(truncated: bool) -> None:
    emitter = Emitter(TopicNames.of("app"), "v1", 1)
    letter = DeadLetter(b"u", b"{", 2, 7, "not_json", "too long " * 100)
    emitted = emitter.dead_letters([letter], {(2, 7)} if truncated else ())
    assert emitted.headers is not None
    headers = {name: (value or b"").decode() for name, value in emitted.headers[0]}
    validator("dead-letter-v1").validate(headers)
    assert truncated is ("stream-adapt.truncated" in headers)

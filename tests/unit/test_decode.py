"""Every bad input is refused with its reason, and the good ones around it are decoded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.decode import REASONS, Decoder, Limits
from stream_adapt.learner.encoder import Bag, Categorical, Numeric, Vector
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.record import NO_LEVEL, RawBatch

NOW_MS = 1_800_000_000_000
FEATURES = {"genres": Bag(), "year": Numeric(), "embedding": Vector(length=2), "country": Categorical()}
STARS = Feedback(("1", "2", "3"), "2", LabelCuts((1, 3), (2, 3)), {"click": "2"})

GOOD: dict[str, Any] = {
    "event_id": "e1",
    "user_id": "u",
    "item_id": "i",
    "event_type": "rating",
    "timestamp": NOW_MS,
    "label": 2,
}


def _event(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def _without(name: str) -> bytes:
    return json.dumps({k: v for k, v in GOOD.items() if k != name}).encode()


def _features(**features: Any) -> bytes:
    return _event(features=features)


#: value → reason
BAD_VALUES: list[tuple[str, bytes | None, str]] = [
    ("tombstone", None, "null_value"),
    ("empty", b"", "not_json"),
    ("text", b"nope", "not_json"),
    ("array", b"[1]", "wrong_type"),
    ("two objects", _event() + _event(), "not_json"),
    ("truncated", _event()[:-5], "not_json"),
    ("not UTF-8", b"\xff\xfe{}", "not_utf8"),
    ("string not UTF-8", _event().replace(b'"i"', b'"\xc3"'), "not_utf8"),
    ("no user", _without("user_id"), "missing_field"),
    ("no item", _without("item_id"), "missing_field"),
    ("no time", _without("timestamp"), "missing_field"),
    ("no event id", _without("event_id"), "missing_field"),
    ("empty user", _event(user_id=""), "empty_id"),
    ("long item", _event(item_id="i" * 1025), "too_large"),
    ("user is a number", _event(user_id=5), "wrong_type"),
    ("time is a string", _event(timestamp="now"), "wrong_type"),
    ("time is a fraction", _event(timestamp=1.5), "wrong_type"),
    ("negative time", _event(timestamp=-1), "bad_timestamp"),
    ("far future", _event(timestamp=NOW_MS + 86_400_001), "future_timestamp"),
    ("beyond 64 bits", _event(timestamp=10**30), "future_timestamp"),
    ("label too high", _event(label=3.5), "label_out_of_range"),
    ("label too low", _event(label=0), "label_out_of_range"),
    ("label 1e308", _event(label=1e308), "label_out_of_range"),
    ("label a string", _event(label="2"), "wrong_type"),
    ("label NaN", _event(label=float("nan")), "not_finite"),
    ("label Infinity", _event(label=float("-inf")), "not_finite"),
    ("label 1e400", _event(label=0).replace(b'"label": 0', b'"label": 1e400'), "not_finite"),
    ("feature NaN", _features(year=float("nan")), "not_finite"),
    ("feature 1e308", _features(year=1e308), "out_of_range"),
    ("vector 1e308", _features(embedding=[1, -1e308]), "out_of_range"),
    ("short vector", _features(embedding=[1]), "vector_length"),
    ("long vector", _features(embedding=[1, 2, 3]), "vector_length"),
    ("bag of numbers", _features(genres=[1]), "wrong_type"),
    ("too many in a bag", _features(genres=["g"] * 1001), "too_large"),
    ("features an array", _event(features=[1]), "wrong_type"),
    ("deep", _event(x=0).replace(b'"x": 0', b'"x": ' + b"[" * 50_000 + b"]" * 50_000), "too_deep"),
    ("too large", _event(x="y" * 200_000), "too_large"),
]


def _decoder(**limits: Any) -> Decoder:
    return Decoder(FEATURES, STARS, Limits(**{"max_bytes": 150_000, **limits}), now_ms=lambda: NOW_MS)


def _raw(*values: bytes | None, key: bytes | None = b"u") -> RawBatch:
    n = len(values)
    return RawBatch([key] * n, list(values), np.full(n, 3, np.int32), np.arange(100, 100 + n))


@pytest.mark.parametrize(("value", "reason"), [case[1:] for case in BAD_VALUES], ids=[case[0] for case in BAD_VALUES])
def test_each_bad_value_is_refused_with_its_reason_and_unchanged(value: bytes | None, reason: str) -> None:
    batch, dead = _decoder()(_raw(_event(), value, _event()))

    assert batch.offsets.tolist() == [100, 102]
    assert [(d.reason, d.value, d.key, d.partition, d.offset) for d in dead] == [(reason, value, b"u", 3, 101)]
    assert dead[0].detail


def test_all_bad_values_mixed_into_good_ones() -> None:
    values = [v for _, bad, _ in BAD_VALUES for v in (_event(), bad)]
    batch, dead = _decoder()(_raw(*values))

    assert len(batch) == len(BAD_VALUES)
    assert [d.reason for d in dead] == [reason for _, _, reason in BAD_VALUES]


@pytest.mark.parametrize(("key", "reason"), [(None, "null_key"), (b"other", "key_mismatch"), (b"\xff", "key_mismatch")])
def test_the_key_must_be_the_user(key: bytes | None, reason: str) -> None:
    _, dead = _decoder()(_raw(_event(), key=key))
    assert [d.reason for d in dead] == [reason]


def test_the_check_of_the_key_can_be_turned_off() -> None:
    batch, dead = _decoder(check_key=False)(_raw(_event(), key=None))
    assert (len(batch), dead) == (1, [])


def test_every_reason_that_decoding_gives_is_documented() -> None:
    assert {reason for _, _, reason in BAD_VALUES} <= set(REASONS)


def test_declared_features_are_decoded_and_others_skipped() -> None:
    batch, dead = _decoder()(_raw(_features(genres=["a", "b"], year=1, embedding=[1, 2], country="x", other={"a": 1})))
    features = batch.features[0]
    assert dead == []
    assert (features.genres, features.year, features.embedding, features.country) == (("a", "b"), 1.0, (1.0, 2.0), "x")


@pytest.mark.parametrize(
    ("label", "event_type", "level"),
    [
        (1, "rating", 0),
        (1.9, "rating", 0),
        (2, "rating", 1),
        (3, "rating", 2),
        (None, "click", 1),
        (1, "click", 0),
        (None, "view", NO_LEVEL),
    ],
)
def test_an_explicit_label_wins_over_the_event_type(label: float | None, event_type: str, level: int) -> None:
    batch, _ = _decoder()(_raw(_event(label=label, event_type=event_type)))
    assert batch.levels.tolist() == [level]


def test_a_source_that_cannot_be_delivered_is_a_dead_letter() -> None:
    batch, dead = _decoder()(_raw(_event(), _event()), {(3, 101): 1})
    assert batch.offsets.tolist() == [100]
    assert [(d.offset, d.reason) for d in dead] == [(101, "not_delivered")]


@given(st.lists(st.one_of(st.binary(max_size=60), st.just(_event()), st.none()), max_size=20))
def test_whatever_comes_every_record_has_exactly_one_output(values: list[bytes | None]) -> None:
    batch, dead = _decoder()(_raw(*values))
    assert sorted(batch.offsets.tolist() + [d.offset for d in dead]) == list(range(100, 100 + len(values)))
    assert {d.reason for d in dead} <= set(REASONS)

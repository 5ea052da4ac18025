"""Every bad input is refused with its reason, and the good ones around it are decoded."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from bad_records import BAD_VALUES, FEATURES, MAX_BYTES, NOW_MS, THREE_STARS, good_event
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.decode import REASONS, Decoder, Limits
from stream_adapt.learner.encoder import INTERN_TRIAL, Interned
from stream_adapt.record import NO_LEVEL, RawBatch


def _decoder(**limits: Any) -> Decoder:
    return Decoder(FEATURES, THREE_STARS, Limits(**{"max_bytes": MAX_BYTES, **limits}), now_ms=lambda: NOW_MS)


def _raw(*values: bytes | None, key: bytes | None = b"u") -> RawBatch:
    n = len(values)
    return RawBatch([key] * n, list(values), np.full(n, 3, np.int32), np.arange(100, 100 + n))


@pytest.mark.parametrize(("value", "reason"), [case[1:] for case in BAD_VALUES], ids=[case[0] for case in BAD_VALUES])
def test_each_bad_value_is_refused_with_its_reason_and_unchanged(value: bytes | None, reason: str) -> None:
    batch, dead = _decoder()(_raw(good_event(), value, good_event()))

    assert batch.offsets.tolist() == [100, 102]
    assert [(d.reason, d.value, d.key, d.partition, d.offset) for d in dead] == [(reason, value, b"u", 3, 101)]
    assert dead[0].detail


def test_all_bad_values_mixed_into_good_ones() -> None:
    values = [v for _, bad, _ in BAD_VALUES for v in (good_event(), bad)]
    batch, dead = _decoder()(_raw(*values))

    assert len(batch) == len(BAD_VALUES)
    assert [d.reason for d in dead] == [reason for _, _, reason in BAD_VALUES]


@pytest.mark.parametrize(("key", "reason"), [(None, "null_key"), (b"other", "key_mismatch"), (b"\xff", "key_mismatch")])
def test_the_key_must_be_the_user(key: bytes | None, reason: str) -> None:
    _, dead = _decoder()(_raw(good_event(), key=key))
    assert [d.reason for d in dead] == [reason]


def test_the_check_of_the_key_can_be_turned_off() -> None:
    batch, dead = _decoder(check_key=False)(_raw(good_event(), key=None))
    assert (len(batch), dead) == (1, [])


def test_every_reason_that_decoding_gives_is_documented() -> None:
    assert {reason for _, _, reason in BAD_VALUES} <= set(REASONS)


def test_declared_features_are_decoded_and_others_skipped() -> None:
    sent = {"genres": ["a", "b"], "year": 1, "embedding": [1, 2], "country": "x", "other": {"a": 1}}
    batch, dead = _decoder()(_raw(good_event(features=sent)))
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
    batch, _ = _decoder()(_raw(good_event(label=label, event_type=event_type)))
    assert batch.levels.tolist() == [level]


def test_a_source_that_cannot_be_delivered_is_a_dead_letter() -> None:
    batch, dead = _decoder()(_raw(good_event(), good_event()), {(3, 101): 1})
    assert batch.offsets.tolist() == [100]
    assert [(d.offset, d.reason) for d in dead] == [(101, "not_delivered")]


@given(st.lists(st.one_of(st.binary(max_size=60), st.just(good_event()), st.none()), max_size=20))
def test_whatever_comes_every_record_has_exactly_one_output(values: list[bytes | None]) -> None:
    batch, dead = _decoder()(_raw(*values))
    assert sorted(batch.offsets.tolist() + [d.offset for d in dead]) == list(range(100, 100 + len(values)))
    assert {d.reason for d in dead} <= set(REASONS)


def test_features_are_decoded_alike_whether_or_not_they_are_looked_up_by_their_bytes() -> None:
    """Few of these are the same, so the decoder soon stops looking them up; nobody can tell from what it gives."""
    decoder = _decoder()
    distinct = [good_event(features={"year": n / 7, "genres": [f"g{n % 3}"]}) for n in range(INTERN_TRIAL + 10)]
    trial, _ = decoder(_raw(*distinct))
    later, dead = decoder(_raw(*distinct[:50], good_event(features={"year": "x"}), good_event()))
    assert isinstance(trial.features, Interned)
    assert not isinstance(later.features, Interned)
    assert msgspec.structs.astuple(trial.features[:50][7]) == msgspec.structs.astuple(later.features[7])
    assert [features.year for features in later.features[:50]] == [n / 7 for n in range(50)]
    assert later.features[50] is None
    assert [letter.reason for letter in dead] == ["wrong_type"]

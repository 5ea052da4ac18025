"""Decode → adapt → emit: erasures in record order, late events as dead letters, one output for every record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from learner_streams import random_model, rows_of

from stream_adapt.adapt import Adapter
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.learner.rules.events import LEARN_ALL, Screen
from stream_adapt.pipeline import Pipeline
from stream_adapt.record import Flag, RawBatch, TopicNames, Work

EPOCH_MS = 1_700_000_000_000


def event(user: str, number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": user,
        "item_id": "i1",
        "event_type": "rating",
        "timestamp": EPOCH_MS + 1000 * number,
        "label": 4,
        **changes,
    }


def erase(user: str, **changes: Any) -> dict[str, Any]:
    return {"event_id": "x", "user_id": user, "event_type": "$erase", "timestamp": EPOCH_MS, **changes}


def raw(*records: dict[str, Any], first_offset: int = 0) -> RawBatch:
    n = len(records)
    keys: list[bytes | None] = [record["user_id"].encode() for record in records]
    offsets = np.arange(first_offset, first_offset + n)
    return RawBatch(keys, [msgspec.json.encode(record) for record in records], np.zeros(n, np.int32), offsets)


def pipeline(screen: Screen = LEARN_ALL, **options: Any) -> Pipeline:
    model = random_model()
    topics = TopicNames.of("app")
    emitter = Emitter(topics, "v1", model.spec.feedback.target_level, now_ms=lambda: 0)
    decoder = Decoder({}, model.spec.feedback)
    return Pipeline(decoder, Adapter(model, screen=screen), emitter, **options)


def adaptations(work: Work) -> list[int]:
    return work.adapted.adaptations.tolist()


def users(of: Pipeline) -> set[str]:
    return {row_id for _, row_id in rows_of(of.adapter.users)}


def test_events_before_an_erasure_are_erased_and_those_after_it_start_anew() -> None:
    made = pipeline()
    work = made(raw(event("ann", 1), event("bob", 2), event("ann", 3), erase("ann"), event("ann", 4), event("bob", 5)))
    assert [1, 1, 2, 1, 2] == adaptations(work)
    assert [True] == list(work.adapted.erased)
    assert work.records == 6
    assert work.adapted.score[3] == pytest.approx(work.adapted.frozen_score[3], abs=0.2)
    scores, receipts = work.outputs
    assert (len(scores), len(receipts)) == (5, 1)
    assert msgspec.json.decode(receipts.values[0] or b"")["source_offset"] == 3


def test_erasures_do_not_depend_on_where_batches_are_cut() -> None:
    records = [event("ann", 1), erase("ann"), erase("ann"), event("ann", 2), event("bob", 3), erase("bob"), erase("cy")]
    whole, pieces = pipeline(), pipeline()
    at_once = whole(raw(*records))
    one_by_one = [pieces(raw(record, first_offset=k)) for k, record in enumerate(records)]
    assert adaptations(at_once) == [a for work in one_by_one for a in adaptations(work)]
    assert [True, False, True, False] == list(at_once.adapted.erased)
    assert [True, False, True, False] == [e for work in one_by_one for e in work.adapted.erased]
    assert rows_of(whole.adapter.users) == rows_of(pieces.adapter.users)
    assert users(whole) == {"ann"}


def test_an_abort_brings_erased_rows_back_and_a_commit_does_not() -> None:
    made = pipeline()
    made(raw(event("ann", 1), event("bob", 2)))
    made.adapter.commit()
    before = rows_of(made.adapter.users)
    storm = [event("ann", 3), erase("ann"), event("cy", 4), event("ann", 5), erase("ann"), event("ann", 6), erase("cy")]
    for _ in range(2):
        made(raw(*storm))
        made.adapter.abort()
        assert before == rows_of(made.adapter.users)
        assert made.adapter.overlay.is_empty
    assert [2, 1, 1, 1] == adaptations(made(raw(*storm)))
    made.adapter.commit()
    assert users(made) == {"ann", "bob"}
    assert [2] == adaptations(made(raw(event("ann", 7))))


def test_the_bytes_of_an_erased_row_are_wiped() -> None:
    made = pipeline()
    made(raw(event("ann", 1)))
    slot = made.adapter.users.find(0, "ann")
    made(raw(erase("ann")))
    made.adapter.commit()
    assert not any(made.adapter.users.rows[slot].tobytes())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (erase(""), "empty_id"),
        (erase("ann", timestamp=-1), "bad_timestamp"),
        ({**erase("ann"), "user_id": None}, "wrong_type"),
    ],
    ids=["empty user", "negative time", "no user"],
)
def test_an_erasure_that_is_not_valid_is_a_dead_letter(record: dict[str, Any], reason: str) -> None:
    one = RawBatch([b""], [msgspec.json.encode(record)], np.zeros(1, np.int32), np.zeros(1, np.int64))
    work = pipeline()(one)
    assert [reason] == [letter.reason for letter in work.dead_letters]
    assert not work.batch.erasures


def test_an_erasure_needs_its_users_key_and_no_item() -> None:
    given = raw(erase("ann", item_id="i1", label="nonsense"), erase("ann"))
    work = pipeline()(replace(given, keys=[b"ann", b"bob"]))
    assert ([0], ["key_mismatch"]) == ([e.offset for e in work.batch.erasures], [d.reason for d in work.dead_letters])


class Headed:
    """A message with headers."""

    def headers(self) -> list[tuple[str, bytes]]:
        return [("trace", b"7")]


def test_late_events_are_dead_letters_where_told_and_teach_nothing() -> None:
    made = pipeline(Screen(1000, int(Flag.LATE)), late_is_dead=True)
    records = raw(event("ann", 5), event("ann", 4), event("ann", 3), event("bob", 1), erase("bob"), event("ann", 6))
    work = made(replace(records, messages=[Headed()] * 6))
    assert [("late", 2, [("trace", b"7")])] == [(d.reason, d.offset, d.headers) for d in work.dead_letters]
    assert work.dead_letters[0].value == records.values[2]
    assert work.batch.offsets.tolist() == [0, 1, 3, 5]
    assert [1, 2, 1, 3] == adaptations(work)
    assert work.records == 6
    assert [len(outputs) for outputs in work.outputs] == [4, 1, 1]


def test_a_quarantined_record_is_a_dead_letter_that_nobody_looked_into() -> None:
    made = pipeline()
    made.decoder.quarantined = {(0, 1)}
    work = made(raw(event("ann", 1), event("ann", 2), event("ann", 3)))
    assert [("crash", 1)] == [(d.reason, d.offset) for d in work.dead_letters]
    assert [1, 2] == adaptations(work)


def test_events_from_before_a_moment_are_learned_from_and_have_no_score() -> None:
    silent, plain = pipeline(emit_from_ms=EPOCH_MS + 3_000), pipeline()
    first = [event("ann", 1), event("ann", 2), erase("bob"), {**event("eve", 9), "label": "x"}, event("ann", 4)]
    then = [event("ann", 2), event("ann", 3), event("ann", 5)]
    for number, records in enumerate((first, then)):
        told = silent(raw(*records, first_offset=10 * number))
        all_of_it = plain(raw(*records, first_offset=10 * number))
        scores, expected = told.outputs[0], all_of_it.outputs[0]
        kept = [i for i, value in enumerate(expected.values) if b'"event_id":"e1"' not in value and b"e2" not in value]
        assert [expected.values[i] for i in kept] == list(scores.values)
        assert [expected.offsets[i] for i in kept] == list(scores.offsets)
        assert [len(outputs) for outputs in all_of_it.outputs[1:]] == [len(outputs) for outputs in told.outputs[1:]]
        assert len(expected.values) - len(kept) == told.withheld
        assert (all_of_it.records, 0) == (told.records, all_of_it.withheld)
        assert silent.learned([told])[0].values == plain.learned([all_of_it])[0].values
    silent.adapter.commit()
    plain.adapter.commit()
    assert rows_of(plain.adapter.users) == rows_of(silent.adapter.users)


def test_what_is_withheld_adds_up_over_the_chunks_of_a_batch() -> None:
    made = pipeline(emit_from_ms=EPOCH_MS + 3_000)
    parts = [made(raw(event("ann", n), first_offset=n)) for n in (1, 2, 3)]
    assert 2 == Work.joined(parts).withheld


def test_a_late_event_from_before_the_moment_is_still_a_dead_letter_where_told() -> None:
    made = pipeline(Screen(1000, int(Flag.LATE)), late_is_dead=True, emit_from_ms=EPOCH_MS + 5_000)
    work = made(raw(event("ann", 6), event("ann", 1), event("ann", 7)))
    assert ([("late", 1)], 0) == ([(d.reason, d.offset) for d in work.dead_letters], work.withheld)
    assert [2, 1] == [len(outputs) for outputs in work.outputs]

"""A source in halves: Kafka's partitions, the loop's offsets, and feedback reduced to a yes or no."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from stream_adapt.datasets import Source, synthetic
from stream_adapt.datasets.source import STARS
from stream_adapt.errors import DataError
from stream_adapt.evaluate import halves
from stream_adapt.evaluate.halves import cut, murmur2, partition_of, two_levels
from stream_adapt.learner.feedback import Feedback
from stream_adapt.models import LearnerSpec

EVENTS = 600


@pytest.fixture
def source() -> Source:
    return synthetic.source(synthetic.Synthetic(events=EVENTS, users=40, items=30))


def spec_of(source: Source) -> LearnerSpec:
    return LearnerSpec(source.features, source.feedback)


@pytest.mark.parametrize(
    ("key", "hashed"),
    [  # `UtilsTest.testMurmur2` of Apache Kafka
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_are_hashed_as_kafka_hashes_them(key: bytes, hashed: int) -> None:
    assert hashed % 2**32 == murmur2(key)


def test_a_negative_hash_has_a_partition_like_any_other() -> None:
    assert ((-973932308) & 0x7FFFFFFF) % 7 == partition_of(b"21", 7)


def test_every_partition_numbers_its_events_without_gaps(source: Source) -> None:
    cold = cut(source, spec_of(source), 4, warm=False)
    for half in (cold.first, cold.second):
        counted: Counter[int] = Counter()
        for batch in half.batches:
            for user, partition, offset in zip(batch.user_ids, batch.partitions, batch.offsets, strict=True):
                assert partition_of(user.encode(), 4) == partition
                assert counted[partition] == offset
                counted[partition] += 1
        assert set(counted) == {0, 1, 2, 3}


def test_offsets_go_on_after_a_warm_first_half(source: Source) -> None:
    warm = cut(source, spec_of(source), 1, warm=True)
    assert list(range(EVENTS // 2)) == warm.first.batches[0].offsets.tolist()
    assert list(range(EVENTS // 2, EVENTS)) == warm.second.batches[0].offsets.tolist()


def test_batches_hold_the_events_in_their_order(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "BATCH", 70)
    second = cut(source, spec_of(source), 4, warm=False).second
    expected = [event.event_id for event in source.events()][EVENTS // 2 :]
    assert expected == [event.event_id for event in second.events]
    assert expected == [event_id for batch in second.batches for event_id in batch.event_ids]


def test_what_the_decoder_refuses_is_left_out_and_takes_an_offset(source: Source) -> None:
    events = list(source.events())
    events[EVENTS // 2 + 3] = msgspec.structs.replace(events[EVENTS // 2 + 3], label=7.0)
    second = cut(replace(source, events=lambda: iter(events)), spec_of(source), 1, warm=False).second
    assert ["label_out_of_range"] == [letter.reason for letter in second.dead_letters]
    assert [0, 1, 2, 4] == second.batches[0].offsets[:4].tolist()
    assert [e.event_id for e in events[EVENTS // 2 : EVENTS // 2 + 3]] == [e.event_id for e in second.events[:3]]
    assert EVENTS // 2 - 1 == len(second) == len(second.targets)


def test_events_without_feedback_are_consumed_and_have_no_outcome(source: Source) -> None:
    events = [msgspec.structs.replace(e, label=None) if i % 5 == 0 else e for i, e in enumerate(source.events())]
    both = cut(replace(source, events=lambda: iter(events)), spec_of(source), 1, warm=False)
    assert EVENTS // 2 == len(both.second)
    assert EVENTS * 2 // 5 == len(both.outcomes) == len(both.second.targets)


def test_a_users_events_are_counted_from_the_first_half_on(source: Source) -> None:
    both = cut(source, spec_of(source), 1, warm=False)
    users = [event.user_id for event in source.events()]
    expected = [users[: i + 1].count(user) for i, user in enumerate(users)][EVENTS // 2 :]
    assert expected == both.outcomes.nth.tolist()
    assert len(set(users[EVENTS // 2 :])) == len(np.unique(both.outcomes.users))


def test_two_levels_say_no_more_than_whether_the_target_was_reached() -> None:
    reduced = two_levels(STARS)
    labels = [1.0, 2.0, 3.0, 4.0, 5.0]
    nothing = [""] * 5
    assert (STARS.level_of(labels, nothing) >= STARS.target_level).tolist() == reduced.level_of(
        labels, nothing
    ).tolist()
    actions = Feedback(("seen", "clicked", "bought"), "clicked", None, {"view": "seen", "buy": "bought"})
    assert {"view": "no", "buy": "yes"} == two_levels(actions).event_types
    assert ("no", "yes") == two_levels(actions).levels


def test_too_few_events_are_refused(source: Source) -> None:
    few = replace(source, events=lambda: iter(list(source.events())[:50]))
    with pytest.raises(DataError, match="50 events; replay needs 100 or more"):
        cut(few, spec_of(source), 1, warm=False)

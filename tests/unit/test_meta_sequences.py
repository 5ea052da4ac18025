"""Training columns: what is skipped, what is known, how sequences are cut, what items have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from stream_adapt.learner.encoder import Bag, Categorical, Numeric
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.meta import sequences
from stream_adapt.models import LearnerSpec
from stream_adapt.record import Batch, ItemId, UserEvent, UserId

STARS = Feedback(("1", "2", "3", "4", "5"), "4", LabelCuts((1.0, 5.0), (2.0, 3.0, 4.0, 5.0)), {"skip": "1"})
SPEC = LearnerSpec(
    features={"genres": Bag(), "age": Numeric(of="event"), "country": Categorical(of="user")}, feedback=STARS
)


def event(k: int, user: str = "u", item: str = "i", label: float | None = 5.0, **more: object) -> UserEvent:
    features = {"genres": ["drama", "war"], "age": float(k % 3), "country": "fi", "colour": "not declared"}
    known = {"event_type": "rating", "timestamp": k * 3_600_000, "features": features} | more
    return UserEvent(event_id=str(k), user_id=UserId(user), item_id=ItemId(item), label=label, **known)  # type: ignore[arg-type]


def test_events_without_feedback_are_left_out() -> None:
    log = sequences.read_log([event(0), event(1, label=None), event(2, label=None, event_type="skip")], SPEC)
    assert log.levels.tolist() == [4, 0]
    assert log.times_ms.tolist() == [0, 7_200_000]


def test_batches_read_as_the_events_they_were_decoded_from() -> None:
    events = [event(0, "a", "x"), event(1, "b", "y", label=None), event(2, "a", "y", label=2.0)]
    whole = sequences.read_log([e for e in events if e.label is not None], SPEC)
    batch = Batch(
        event_ids=[e.event_id for e in events],
        user_ids=[e.user_id for e in events],
        item_ids=[e.item_id for e in events],
        features=[whole.features[0], None, whole.features[1]],
        timestamps_ms=np.array([e.timestamp for e in events]),
        levels=SPEC.feedback.level_of([e.label for e in events], [e.event_type for e in events]),
        partitions=np.zeros(3, np.int32),
        offsets=np.arange(3),
    )
    log = sequences.read_batches([batch])
    for name in ("users", "items", "times_ms", "levels"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(log, name))
    assert whole.features == log.features


def test_no_batches_are_an_empty_log() -> None:
    assert len(sequences.read_batches([])) == 0


def test_items_are_known_by_hash_and_the_most_frequent_are_kept() -> None:
    log = sequences.read_log([event(k, item=item) for k, item in enumerate(["rare", "é", "often", "often", "é"])], SPEC)
    vocabulary = sequences.fit(log, SPEC, max_items=2)
    kept = sorted(xxh3_64_intdigest(item.encode()) for item in ("often", "é"))
    assert kept == vocabulary.item_hash.tolist()
    assert vocabulary.item_events.tolist() == [2.0, 2.0]
    asked = np.array([kept[1], 0, kept[0], 2**64 - 1], dtype=np.uint64)
    assert vocabulary.index(asked).tolist() == [1, 2, 0, 2]


def test_a_value_that_was_not_in_the_training_slice_adds_nothing() -> None:
    log = sequences.read_log([event(0), event(1, features={"country": "se", "genres": ["sci-fi"]}), event(2)], SPEC)
    columns = sequences.encode(log, sequences.fit(log.head(1), SPEC, max_items=10))
    everything = torch.tensor([0, 1, 2])
    table = torch.ones(sequences.fit(log.head(1), SPEC, 10).rows("item"), 3)
    assert columns.of_item.sums(everything, table)[1].tolist() == [0.0] * 3
    assert columns.of_user.sums(everything, torch.ones(1, 3))[1].tolist() == [0.0] * 3
    assert columns.of_user.sums(everything, torch.ones(1, 3))[2].tolist() == [1.0] * 3


def test_sums_are_weighted_rows() -> None:
    log = sequences.read_log([event(k) for k in range(3)], SPEC)
    vocabulary = sequences.fit(log, SPEC, 10)
    columns = sequences.encode(log, vocabulary)
    table = torch.randn(vocabulary.rows("event"), 4)
    expected = (table[0] + table[1]) / 2**0.5
    torch.testing.assert_close(columns.of_item.sums(torch.tensor([1, 1]), table), expected.expand(2, 4))
    ages = columns.of_event.sums(torch.arange(3), table)
    torch.testing.assert_close(ages, torch.tensor([[-(1.5**0.5)], [0.0], [1.5**0.5]]) * table[2])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 9))
def test_windows_hold_every_event_once_in_order(users: list[int], longest: int) -> None:
    column = torch.tensor(users)
    windows = sequences.windows(column, longest)
    assert list(range(len(users))) == sorted(int(k) for w in windows for k in w)
    for window in windows:
        assert 1 <= len(window) <= longest
        assert len(set(column[window].tolist())) == 1
        assert window.tolist() == sorted(window.tolist())


def test_last_windows_hold_each_users_last_events() -> None:
    windows = sequences.last_windows(torch.tensor([0, 1, 0, 0, 2]), 2)
    assert [w.tolist() for w in windows] == [[2, 3], [1], [4]]


def test_padding_repeats_a_real_event_and_is_masked() -> None:
    numbers, real = sequences.padded([torch.tensor([3, 4, 9]), torch.tensor([7])])
    assert numbers.tolist() == [[3, 4, 9], [7, 7, 7]]
    assert real.tolist() == [[True] * 3, [True, False, False]]


@pytest.fixture
def two_circles() -> sequences.Columns:
    """Twenty users who touch only even items, or only odd ones; each leaves one of six out."""
    events = [event(k * 9 + i, f"u{k}", str(k % 2 + 2 * i)) for k in range(20) for i in range(6) if i != k % 5]
    log = sequences.read_log(events, SPEC)
    return sequences.encode(log, sequences.fit(log, SPEC, 100))


def test_items_that_the_same_users_touch_have_like_features(two_circles: sequences.Columns) -> None:
    features = sequences.cooccurrence(two_circles, 12, dimensions=2, limit=100, seed=0)
    assert features.shape == (13, 2)
    assert features[12].tolist() == [0.0, 0.0]
    circles = sequences.item_hashes([str(i) for i in range(12)])
    order = np.argsort(np.argsort(circles))
    unit = torch.nn.functional.normalize(features[order], dim=1)
    alike = unit @ unit.T
    assert alike[0::2, 0::2].min() > 0.9
    assert alike[0::2, 1::2].abs().max() < 0.1


def test_cooccurrence_is_limited_to_the_most_frequent_items(two_circles: sequences.Columns) -> None:
    features = sequences.cooccurrence(two_circles, 12, dimensions=4, limit=5, seed=0)
    assert int((features.abs().sum(1) > 0).sum()) <= 5


def test_cooccurrence_of_nothing_is_zeros(two_circles: sequences.Columns) -> None:
    assert sequences.cooccurrence(two_circles, 12, dimensions=0, limit=100, seed=0).shape == (13, 0)
    assert sequences.cooccurrence(two_circles, 12, dimensions=3, limit=1, seed=0).abs().sum() == 0.0

"""Known drifts: they change what they say from where they say, and nothing before."""

from __future__ import annotations

from collections import Counter

import pytest

from stream_adapt.datasets.drifts import KINDS, Drift, DriftKind, splice
from stream_adapt.datasets.source import STARS, Source
from stream_adapt.errors import ConfigError
from stream_adapt.learner.encoder import Feature, Numeric
from stream_adapt.learner.feedback import Feedback
from stream_adapt.record import FeatureValue, ItemId, UserEvent, UserId

AT, COUNT, OVER = 100, 500, 100


def event(number: int) -> UserEvent:
    item = number * 7 % 30
    features: dict[str, FeatureValue] = {"year": 1990.0 + item, "hour": 1.0 * (number % 24)}
    return UserEvent(f"e{number}", UserId("u"), ItemId(f"i{item}"), "rating", number, 1.0 + number % 5, features)


EVENTS = [event(number) for number in range(COUNT)]


def source(feedback: Feedback = STARS) -> Source:
    features: dict[str, Feature] = {"year": Numeric(of="item"), "hour": Numeric(of="event")}
    return Source("log", features, feedback, lambda: iter(EVENTS), COUNT)


def drifted(kind: DriftKind, **changes: float) -> list[UserEvent]:
    return list(splice(source(), Drift(kind, AT, over=OVER, **changes)).events())  # type: ignore[arg-type]


def turned(events: list[UserEvent], start: int = 0, stop: int = COUNT) -> Counter[str]:
    """Events whose label was turned round, by item."""
    pairs = zip(EVENTS[start:stop], events[start:stop], strict=True)
    return Counter(before.item_id for before, after in pairs if before.label != after.label)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_before_and_the_log_says_where_it_does(kind: DriftKind) -> None:
    spliced = splice(source(), Drift(kind, AT))
    events = list(spliced.events())
    assert AT == spliced.drift_at
    assert EVENTS[:AT] == events[:AT]
    assert EVENTS[AT:] != events[AT:]
    assert events == list(spliced.events())
    assert spliced.count in (None, len(events))


def test_flip_turns_every_label_of_half_the_items_round() -> None:
    events = drifted("flip")
    items = set(turned(events))
    assert 8 <= len(items) <= 22
    for before, after in zip(EVENTS[AT:], events[AT:], strict=True):
        assert after.label == (6 - (before.label or 0) if before.item_id in items else before.label)
    assert items != set(turned(drifted("flip", seed=1)))
    assert 30 > len(items) > len(set(turned(drifted("flip", share=0.1))))


def test_permute_takes_items_for_one_another_with_all_that_is_known_of_them() -> None:
    after = drifted("permute")[AT:]
    pairs = {(old.item_id, new.item_id) for old, new in zip(EVENTS[AT:], after, strict=True)}
    assert 30 == len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    for before, taken in zip(EVENTS[AT:], after, strict=True):
        assert {"year": 1990.0 + int(taken.item_id[1:]), "hour": before.features["hour"]} == taken.features
    assert [e.label for e in EVENTS[AT:]] == [e.label for e in after]
    stayed = [old for old, new in zip(EVENTS[AT:], drifted("permute", share=0.3)[AT:], strict=True) if old == new]
    assert 15 <= len({e.item_id for e in stayed}) < 30


def test_gradual_turns_more_and_more_and_at_its_end_what_flip_does() -> None:
    gradual, flipped = drifted("gradual"), drifted("flip")
    parts = [
        sum(turned(gradual, a, a + 50).values()) / sum(turned(flipped, a, a + 50).values()) for a in (100, 150, 200)
    ]
    assert 0.0 < parts[0] < parts[1] < parts[2] == 1.0


def test_recurring_comes_and_goes() -> None:
    recurring, flipped = drifted("recurring"), drifted("flip")
    for start, on in ((100, True), (200, False), (300, True), (400, False)):
        wanted = flipped if on else EVENTS
        assert wanted[start : start + OVER] == recurring[start : start + OVER]


def test_base_rate_leaves_out_a_third_of_what_is_below_the_target_and_changes_nothing() -> None:
    kept = drifted("base_rate")
    assert all(one in EVENTS for one in kept)
    below = [e for e in EVENTS[AT:] if (e.label or 0) < 4]
    left_out = len(EVENTS) - len(kept)
    assert 1 / 3 == pytest.approx(left_out / len(below), abs=0.08)
    assert [e for e in EVENTS if (e.label or 0) >= 4] == [e for e in kept if (e.label or 0) >= 4]


def test_labels_that_are_none_cannot_be_turned() -> None:
    clicks = Feedback(event_types={"view": "no", "click": "yes"}, label=None)
    with pytest.raises(ConfigError, match="permute"):
        splice(source(clicks), Drift("flip", AT))
    assert splice(source(clicks), Drift("permute", AT)).drift_at == AT


def test_a_drift_that_cannot_be_is_refused() -> None:
    for wrong in ({"kind": "slow"}, {"share": 0.0}, {"over": 0}, {"at": -1}):
        with pytest.raises(ConfigError):
            Drift(**{"kind": "flip", "at": AT, **wrong})  # type: ignore[arg-type]

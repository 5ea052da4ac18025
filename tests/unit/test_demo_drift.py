"""The drift in the demo: where it is put, what topics tell of it, and what is compared at the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from stream_adapt.datasets.source import STARS, Source
from stream_adapt.demo import drifted, plot, unrefreshed
from stream_adapt.demo.drifted import Mark, Story
from stream_adapt.demo.flow import DemoOptions
from stream_adapt.demo.prepare import Data, Followed
from stream_adapt.demo.tally import UNREFRESHED, ReadScore, Tally
from stream_adapt.demo.view import Stage, View
from stream_adapt.drift import Alarm
from stream_adapt.models import LearnerSpec
from stream_adapt.record import ItemId, TopicNames, UserEvent, UserId
from stream_adapt.refresh.record import Decision, RefreshState
from stream_adapt.refresh.states import State

TOPICS = TopicNames.of("app")
COUNT, DRIFT_AT = 400, 40
IDS = [f"e{number}" for number in range(COUNT // 2)]


class Message:
    """As the reader hands them on."""

    def __init__(self, topic: str, value: Any, key: bytes | None = None) -> None:
        self._topic, self._value, self._key = topic, value, key

    def topic(self) -> str:
        return self._topic

    def key(self) -> bytes | None:
        return self._key

    def offset(self) -> int:
        return 0

    def value(self) -> bytes:
        return msgspec.json.encode(self._value)


def score(number: int, version: str = "v1", said: float = 0.5) -> Message:
    """Two partitions; labels alternate in pairs."""
    target = number // 2 % 2
    return Message(
        TOPICS.scores, ReadScore(f"e{number}", "u", said, 0.5, target, number, version, number % 2, number // 2)
    )


def alarm(since: dict[int, int], events: int) -> Message:
    return Message(TOPICS.alarms, Alarm("excess_loss", None, "PageHinkley", 0.2, 0.1, since, 0, events, "v1", 0))


def state(state: State, **fields: Any) -> Message:
    return Message(TOPICS.refresh, RefreshState(state=state, **fields), b"state")


def data(drift_at: int | None = None) -> Data:
    def event(number: int) -> UserEvent:
        item = ItemId(f"i{number % 20}")
        return UserEvent(f"e{number}", UserId("u"), item, "rating", number, 1.0 + number % 5, {})

    source = Source("log", {}, STARS, lambda: map(event, range(COUNT)), COUNT, drift_at)
    return Data(source, COUNT, LearnerSpec({}, STARS))


@pytest.fixture
def story() -> Story:
    return Story(TOPICS, DRIFT_AT, now_ms=lambda: 10_000)


@pytest.fixture
def tally() -> Tally:
    return Tally(IDS, TOPICS.scores, followed="u")


def test_items_are_taken_for_one_another_from_a_fifth_of_the_stream_on() -> None:
    before = data()
    after, at = drifted.drifted(before)
    assert DRIFT_AT == at
    assert list(before.first()) == list(after.first())
    pairs = list(zip(before.second(), after.second(), strict=True))
    assert all(one == other for one, other in pairs[:at])
    assert {True} == {one.event_id == other.event_id for one, other in pairs}
    assert any(one.item_id != other.item_id for one, other in pairs[at : at + 20])


def test_a_drift_that_the_stream_has_by_itself_is_the_one() -> None:
    assert drifted.drifted(data(drift_at=300))[1] == 100
    assert drifted.drifted(data(drift_at=100))[1] == DRIFT_AT


def test_an_alarm_is_where_its_record_says_that_it_was_seen(story: Story) -> None:
    story.add([alarm({0: 30, 1: 28}, events=14)])
    assert story.alarm_at == 72


def test_an_alarm_before_the_drift_is_marked_and_is_not_the_drifts_alarm(story: Story, tally: Tally) -> None:
    story.add([alarm({0: 10, 1: 10}, events=5)])
    assert story.alarm_at is None
    assert story.marks(tally) == [Mark(25, "alarm"), Mark(DRIFT_AT, "drift")]


def test_a_promotion_is_at_the_first_event_that_another_model_scored(story: Story, tally: Tally) -> None:
    tally.add([score(n) for n in range(120)])
    assert story.promoted_at(tally) is None
    tally.add([score(n, "v2") for n in (122, 120, 121)])
    assert story.promoted_at(tally) == 120
    assert Mark(120, "promotion") in story.marks(tally)


def test_each_step_is_news_once(story: Story, tally: Tally) -> None:
    tally.add([score(n) for n in range(60)])
    story.add([state(State.STABLE, champion="v1"), alarm({0: 26, 1: 26}, events=8)])
    assert [
        "alarm after 60 events: excess_loss is 0.2000, and was 0.1000",
        "the world changes after 40 events",
    ] == story.news(tally)
    story.add([state(State.TRAINING, since_ms=4_000), state(State.TRAINING, since_ms=4_000, attempts=1)])
    assert [f"training: {drifted._STATES[State.TRAINING]}"] == story.news(tally)
    assert story.standing().startswith("training for 6 s")
    figures = {"shadow_events": 2_000.0, "shadow_log_loss_challenger": 0.5, "shadow_log_loss_champion": 0.6}
    tally.add([score(100, "v2")])
    story.add([state(State.PROMOTED, figures=figures)])
    assert [
        "promoted: on 2,000 events the challenger's log-loss is 0.5000, and the champion's 0.6000",
        "scores come from v2 after 100 events",
    ] == story.news(tally)
    assert [] == story.news(tally)


def test_a_refusal_says_why(story: Story, tally: Tally) -> None:
    story.add([state(State.SHADOW), state(State.REJECTED, last=Decision("rejected", 0, "no better"))])
    assert ["rejected: no better"] == story.news(tally)[-1:] == story.ending()


def test_at_the_end_a_refresh_that_is_under_way_is_told_beside_the_one_that_ended(story: Story) -> None:
    assert ["no word of the refresh yet"] == story.ending()
    story.add([state(State.COOLING, since_ms=8_000, last=Decision("rolled_back", 0, "it was worse"))])
    ended, standing = story.ending()
    assert ("rolled back: it was worse", "cooling for 2 s") == (ended, standing.split(":")[0])


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_where_the_refresh_is_and_keeps_the_news(story: Story, tally: Tally, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    tally.add([score(n) for n in range(60)])
    story.add([state(State.TRAINING, since_ms=4_000)])
    with View(console, Stage("title", "where", len(IDS), Followed("u", {})), tally, story) as view:
        for line in story.news(tally):
            view.say(line)
        view.show(60, last=True)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the world changes after 40 events" in shown
    assert terminal == ("training for 6 s" in shown)


def test_the_last_quarter_is_that_of_the_stream(tally: Tally) -> None:
    tally.add([score(n, said=0.9 if n // 2 % 2 else 0.1) for n in range(len(IDS))])
    alone = np.where(np.arange(len(IDS)) < 150, 0.3, tally.columns().target == 0)
    found = drifted.last_quarter(tally, alone)
    assert (1.0, 0.0) == (found["adapted"].auc, found[UNREFRESHED].auc)


def test_scores_agree_up_to_each_partitions_swap_and_are_not_compared_after(tally: Tally) -> None:
    tally.add([score(n, "v1" if n < 100 else "v2") for n in range(200)])
    columns = tally.columns()
    alone = unrefreshed.beside(columns, {(n % 2, n // 2): 0.5 if n < 100 else 0.9 for n in range(200)})
    assert (100, 0.0) == unrefreshed.agreement(columns, alone)
    alone[7] += 0.25
    assert (100, 0.25) == unrefreshed.agreement(columns, alone)
    missing = unrefreshed.beside(columns, {})
    assert np.isnan(unrefreshed.agreement(columns, missing)[1])


def test_the_picture_has_every_curve_and_mark(tally: Tally, story: Story, tmp_path: Path) -> None:
    tally.add([score(n, "v1" if n < 120 else "v2", said=n % 7 / 7) for n in range(200)])
    story.add([alarm({0: 30, 1: 28}, events=14)])
    curves = tally.curves({UNREFRESHED: tally.columns().frozen})
    assert ["adapted", "frozen", UNREFRESHED] == list(curves.auc)
    assert len(IDS) == curves.events[-1]
    plot.save_drift(curves, tmp_path / "plot.png", "title", story.marks(tally))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_drift_keeps_its_pace_whatever_else_is_asked_for() -> None:
    assert DemoOptions(as_json=True).pace_s is None
    assert DemoOptions().pace_s == 30
    assert DemoOptions(drift=True, as_json=True).pace_s == 240
    assert DemoOptions(drift=True, seconds=60).pace_s == 60

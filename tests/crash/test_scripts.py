"""Crashes as data: whatever happens wherever, every input has one visible output, and the rows are a calm run's."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process import MOST, TOPICS, Crash, Effect, Point, learning, survived

from stream_adapt.testing.scripted import POSSIBLE

#: Everything that can happen, at the points where it can.
EVERYTHING = [(point, effect) for point, effects in POSSIBLE.items() for effect in effects]


def test_nothing_happens() -> None:
    deployment = survived([])
    assert (deployment.starts, deployment.broker.happened) == (1, [])


def test_the_learning_topic_says_what_the_scores_say() -> None:
    broker = survived(
        [Crash(Point.COMMIT, 2, Effect.ANSWER_LOST), Crash(Point.SEND_OFFSETS, 4, Effect.KILL_AFTER)]
    ).broker
    scores = [json.loads(written.value or b"") for written in broker.committed(TOPICS.scores)]
    scores = [score for score in scores if "score" in score]
    told = learning(broker).values()
    assert len(scores) == sum(summary.events for summary in told)
    assert sum(score["score"] for score in scores) == pytest.approx(sum(one.score for one in told), abs=1e-5)
    assert sum(score["target"] for score in scores) == sum(one.target for one in told)
    happened = [score["score"] if score["target"] else 1 - score["score"] for score in scores]
    assert -sum(map(math.log, happened)) == pytest.approx(sum(one.loss for one in told), abs=1e-4)
    frozen = [score["frozen_score"] if score["target"] else 1 - score["frozen_score"] for score in scores]
    assert -sum(map(math.log, frozen)) == pytest.approx(sum(one.loss_frozen for one in told), abs=1e-4)


@pytest.mark.parametrize("most", [MOST, 5], ids=["", "reading_ahead"])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize(("point", "effect"), EVERYTHING, ids=lambda value: value.name)
def test_one_crash_is_survived(point: Point, effect: Effect, call: int, most: int) -> None:
    enough = {Point.INIT: 1, Point.ABORT: 1}.get(point, call)  # a calm run has no more of these
    before = [Crash(Point.PRODUCE, 2, Effect.ABORTABLE)] if point is Point.ABORT else []
    deployment = survived([*before, Crash(point, enough, effect)], most=most)
    assert effect is deployment.broker.happened[-1].effect


crashes = st.sampled_from(EVERYTHING).flatmap(
    lambda which: st.builds(Crash, st.just(which[0]), st.integers(1, 60), st.just(which[1]))
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(crashes, max_size=8),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 20),
    st.sampled_from([MOST, 3, 5]),
)
def test_any_script_is_survived_however_batches_are_cut(
    script: list[Crash], cuts: list[int], turns: int, most: int
) -> None:
    survived(script, cuts=cuts, meanwhile_turns=turns, most=most)


def test_a_member_that_stood_still_in_a_restore_is_no_mismatch() -> None:
    """Another member took the shards over and committed meanwhile: its rows lie behind where this restore ends."""
    script = [Crash(Point.PRODUCE, 24, Effect.KILL_BEFORE), Crash(Point.PRODUCE, 34, Effect.STOPPED)]
    survived(script, cuts=[8], meanwhile_turns=2)

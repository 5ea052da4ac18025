"""What a leader does, step by step, and what the next one finds when it dies; Kafka and training are scripted."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from learner_streams import random_model

from stream_adapt.announcements import Announcement
from stream_adapt.config import Config
from stream_adapt.drift import Alarm
from stream_adapt.learning import Summary
from stream_adapt.models import Model, Registry, write_model
from stream_adapt.refresh import leader as module
from stream_adapt.refresh.decide import Comparison
from stream_adapt.refresh.leader import Leader
from stream_adapt.refresh.record import RefreshState, Request
from stream_adapt.refresh.states import RESTING, State
from stream_adapt.refresh.training import Job, Outcome

ALARM = Alarm("excess_loss", None, "PageHinkley", 0.2, 0.0, {0: 40}, 1, 300, "v", 2)
BETTER, SAME, WORSE = (
    Comparison(5_000, 100, 0.5, 0.5 - gain, 0.7, 0.7, gain, 0.002, gain / 0.002) for gain in (0.02, 0.0, -0.02)
)
SETTINGS = {"cooldown_s": 100.0, "settle_events": 50, "shadow_events": 100, "watch_events": 400, "per_day": 2}


@dataclass
class Kafka:
    """What outlives a leader: the newest state, announcements, alarms, and what people ask for."""

    state: bytes | None = None
    announced: list[Announcement] = field(default_factory=list)
    alarms: list[bytes] = field(default_factory=list)
    request: Request | None = None
    dies_at: State | None = None  # when this state has been written


class Dead(Exception):
    """The leader died."""


class FakeJournal:
    kafka: Kafka

    def __init__(self, _config: Config) -> None:
        self.tail = self
        self.state = RefreshState.decode(self.kafka.state, "here") if self.kafka.state else None

    def write(self, state: RefreshState, announcement: Announcement | None = None, alarms: Any = ()) -> None:
        moved = self.kafka.state is None or RefreshState.decode(self.kafka.state, "here").state != state.state
        self.kafka.state = state.encode()
        self.kafka.announced += [announcement] if announcement else []
        self.kafka.alarms += alarms
        if moved and state.state is self.kafka.dies_at:
            self.kafka.dies_at = None
            raise Dead

    def poll(self) -> Request | None:
        return self.kafka.request

    def close(self) -> None:
        pass


class FakeAnnouncements:
    kafka: Kafka

    def __init__(self, _config: Config) -> None:
        pass

    def newest(self) -> Announcement | None:
        return self.kafka.announced[-1] if self.kafka.announced else None

    def read_to_end(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakePair:
    """Compares 50 events a step, with the outcome that the script has next."""

    outcomes: list[Comparison]
    newest: Comparison | None = None  # of the newest events alone; None: as of all

    def __init__(self, _config: Config, champion: Model, other: Model, _rows: str, judged_from: Any) -> None:
        self.models = self
        self.champion, self.other, self.judged_from = champion.version, other.version, judged_from
        self.events = 0
        self.closed = False

    def step(self) -> None:
        self.events += 50

    def forget(self) -> None:
        self.events = 0

    def compared(self, newest: int | None = None) -> Comparison:
        if newest is not None:
            return self.newest or self.last
        self.last = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        return self.last

    def close(self) -> None:
        self.closed = True


class FakeTraining:
    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.closed = outcome, False

    def poll(self) -> Outcome | None:
        return self.outcome

    def progress(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


class Stage:
    """A registry with a champion and a challenger, and leaders one after the other."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        model = random_model()
        self.registry = Registry(folder / "models")
        self.champion = self.write(model)
        self.challenger = self.write(random_model(), parent=self.champion, nudge=0.01)
        sections = {"model": {"path": folder / "models"}, "state": {"dir": folder / "state"}}
        self.config = Config.model_validate({**sections, "refresh": {**SETTINGS, **settings}})
        self.kafka, self.now_s, self.jobs = Kafka(), 1_000_000.0, list[Job]()
        self.outcome = Outcome(self.challenger, figures={"slice_auc_all": 0.7}, trained_until={0: 60})
        self.trainings: list[FakeTraining] = []
        self.end = 10  # offset behind what summaries tell of
        for kind, fake in (("Journal", FakeJournal), ("Announcements", FakeAnnouncements), ("LivePair", FakePair)):
            monkeypatch.setattr(module, kind, fake)
        FakeJournal.kafka = FakeAnnouncements.kafka = self.kafka
        FakePair.outcomes = [BETTER, SAME]
        self.leader = self.lead()

    def write(self, model: Model, parent: str | None = None, nudge: float = 0.0) -> str:
        vectors = (model.weights.item_vector + np.float32(nudge)).astype(np.float32)
        weights = msgspec.structs.replace(model.weights, item_vector=vectors)
        return write_model(self.registry.path, weights, model.spec, (), parent=parent, rows="carry").name

    def lead(self) -> Leader:
        """The next leader."""
        return Leader(self.config, self.registry, self._train, lambda: self.now_s)

    def _train(self, _config: Config, job: Job) -> FakeTraining:
        self.jobs.append(job)
        self.trainings.append(FakeTraining(self.outcome))
        return self.trainings[-1]

    @property
    def state(self) -> RefreshState:
        """As it is in Kafka."""
        assert self.kafka.state is not None
        return RefreshState.decode(self.kafka.state, "here")

    def turns(self, count: int = 1, labelled: int = 10, alarms: tuple[Alarm, ...] = ()) -> RefreshState:
        """Turns of the leader; members serve what is announced."""
        for _ in range(count):
            version = self.kafka.announced[-1].version if self.kafka.announced else self.champion
            summary = Summary(0, 0, 0, self.end - 1, "", version, labelled, labelled, 5.0, 6.0, 5.0, 5.0, 5.0, 0, 0, 9)
            self.leader._monitor.add = lambda _summaries, found=alarms: list(found)  # type: ignore[method-assign]
            try:
                self.leader.turn([summary] if labelled else [], 7)
            except Dead:
                self.leader.close()
                self.leader = self.lead()
            alarms = ()
        return self.state


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_an_alarm_leads_to_a_promotion_that_is_announced_once_and_watched(stage: Stage) -> None:
    assert State.COOLING is stage.turns(alarms=(ALARM,)).state
    assert [ALARM] == [Alarm.from_bytes(alarm) for alarm in stage.kafka.alarms]
    state = stage.turns(40)
    assert (State.STABLE, stage.challenger) == (state.state, state.champion)
    assert [(stage.challenger, stage.champion)] == [(a.version, a.previous) for a in stage.kafka.announced]
    assert {0: 40} == stage.jobs[0].newer
    assert state.last is not None
    assert ("promoted", stage.champion) == (state.last.outcome, state.last.champion)
    assert 0.02 == state.last.figures["shadow_gain"]
    decided = stage.registry.manifest(stage.challenger).decision
    assert decided is not None
    assert ("promoted", 0.7) == (decided.outcome, decided.figures["slice_auc_all"])


def test_training_waits_for_events_of_the_new_world(stage: Stage) -> None:
    stage.turns(alarms=(ALARM,))
    assert State.COOLING is stage.turns(4).state
    assert State.TRAINING is stage.turns().state


@pytest.mark.parametrize("died_at", [s for s in State if s not in RESTING])
def test_a_leader_that_dies_when_a_state_is_written_is_followed_by_one_that_goes_on(
    stage: Stage, died_at: State
) -> None:
    stage.kafka.dies_at = died_at
    stage.turns(alarms=(ALARM,))
    state = stage.turns(60)
    assert stage.kafka.dies_at is None
    assert (State.STABLE, stage.challenger) == (state.state, state.champion)
    assert 1 == len(stage.kafka.announced), "announced with the state, once"


@pytest.mark.parametrize(
    ("outcomes", "outcome", "announced"),
    [([SAME], "rejected", 0), ([WORSE], "rejected", 0), ([BETTER, WORSE], "rolled_back", 2)],
)
def test_only_a_better_challenger_goes_live_and_one_that_gets_worse_goes_back(
    stage: Stage, outcomes: list[Comparison], outcome: str, announced: int
) -> None:
    FakePair.outcomes = outcomes
    stage.turns(alarms=(ALARM,))
    state = stage.turns(60)
    assert state.last is not None
    assert (outcome, stage.champion) == (state.last.outcome, state.champion)
    assert stage.challenger == state.last.challenger
    assert announced == len(stage.kafka.announced)
    assert (stage.champion if announced else None) == (stage.kafka.announced[-1].version if announced else None)


@pytest.mark.parametrize(
    ("outcome", "reason", "failed"),
    [
        (Outcome(reason="killed"), "killed", True),
        (Outcome(), "does not say why", True),
        (Outcome("no-such-version"), "no-such-version", True),
        (Outcome("../../etc"), "is no version", True),
        (Outcome(reason="0.5 is no less than 0.4", no_better=True), "no less than", False),
    ],
)
def test_a_training_without_a_sound_challenger_is_rejected_with_the_reason(
    stage: Stage, outcome: Outcome, reason: str, failed: bool
) -> None:
    stage.outcome = outcome
    stage.turns(alarms=(ALARM,))
    state = stage.turns(30)
    assert (State.REJECTED, stage.champion) == (state.state, state.champion)
    assert state.last is not None
    assert reason in state.last.reason
    assert failed is state.last.failed
    assert all(training.closed for training in stage.trainings)


def test_a_damaged_challenger_and_one_of_another_parent_are_rejected(stage: Stage) -> None:
    (stage.registry.folder(stage.challenger) / "model.safetensors").write_bytes(b"nonsense")
    stage.turns(alarms=(ALARM,))
    damaged = stage.turns(30)
    assert damaged.last is not None
    assert "SHA-256" in damaged.last.reason
    stage.outcome = Outcome(stage.write(random_model(), parent="somebody-else", nudge=0.3))
    stage.kafka.request = Request("r", 0)
    stranger = stage.turns(30)
    assert stranger.last is not None
    assert "its parent is somebody-else" in stranger.last.reason


def test_after_a_refresh_alarms_wait_for_the_cooldown_and_for_the_budget_of_the_day(stage: Stage) -> None:
    stage.outcome = Outcome(reason="nothing")
    for trainings in (1, 2):
        stage.turns(alarms=(ALARM,))
        stage.turns(20)
        assert trainings == len(stage.jobs)
        stage.turns(alarms=(ALARM,))
        assert State.COOLING is stage.turns(20).state, "the last one has just ended"
        stage.now_s += 101
        if trainings == 1:
            stage.turns(20)
            assert 2 == len(stage.jobs)
            stage.now_s += 101
            break
    stage.turns(alarms=(ALARM,))
    assert State.COOLING is stage.turns(20).state, "two a day"
    stage.now_s += 86_400
    stage.turns(20)
    assert 3 == len(stage.jobs)


def test_who_asks_need_not_wait_and_is_remembered_while_a_refresh_is_under_way(stage: Stage) -> None:
    stage.outcome = Outcome(reason="nothing")
    stage.kafka.request = Request("first", 0)
    assert State.TRAINING is stage.turns(labelled=0).state
    stage.kafka.request = Request("second", 0)
    state = stage.turns(10, labelled=0)
    assert 2 == len(stage.jobs)
    assert "second" == state.request
    assert 2 == len(stage.turns(10, labelled=0).started_ms) == len(stage.jobs)


@pytest.mark.parametrize(("kind", "trainings"), [("alarm", 1), ("asked", 2)])
def test_a_promotion_answers_alarms_that_came_meanwhile_and_not_who_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, trainings: int
) -> None:
    stage = Stage(tmp_path, monkeypatch, cooldown_s=0)
    stage.turns(alarms=(ALARM,))
    while stage.state.state is not State.SHADOW:
        stage.turns()
    if kind == "asked":
        stage.kafka.request = Request("meanwhile", 0)
        stage.turns()
    else:
        stage.turns(alarms=(ALARM,))
    state = stage.turns(60)
    assert state.last is not None
    assert trainings == len(stage.jobs)


def test_the_schedule_counts_from_the_last_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, monkeypatch, every_s=500, cooldown_s=0)
    stage.outcome = Outcome(reason="nothing")
    stage.now_s += 499
    assert State.STABLE is stage.turns(3).state
    stage.now_s += 2
    stage.turns(5)
    assert 1 == len(stage.jobs)
    stage.now_s += 400
    stage.turns(5)
    assert 1 == len(stage.jobs)
    stage.now_s += 101
    stage.turns(5)
    assert 2 == len(stage.jobs)


def test_as_the_new_world_grows_it_is_learned_again(stage: Stage) -> None:
    stage.outcome = Outcome(reason="nothing")
    stage.end = 140
    stage.turns(alarms=(ALARM,))
    stage.turns(10)
    assert [{0: 40}] == [job.newer for job in stage.jobs]
    stage.now_s += 101
    stage.end = 239
    stage.turns(10)
    assert 1 == len(stage.jobs), "not yet twice as many"
    stage.leader.close()
    stage.leader = stage.lead()
    stage.end = 240
    state = stage.turns(10)
    assert [{0: 40}, {0: 40}] == [job.newer for job in stage.jobs]
    assert state.last is not None
    assert state.last.trigger is not None
    assert ("grown", {0: 240}) == (state.last.trigger.kind, state.learned)


def test_once_the_new_world_fills_the_window_it_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, monkeypatch, window_events=1_000, cooldown_s=0, per_day=100)
    stage.outcome = Outcome(reason="nothing")
    stage.end = 140
    stage.turns(alarms=(ALARM,))
    stage.turns(10)
    stage.end = 1_040
    stage.turns(10)
    stage.end = 9_000
    stage.turns(10)
    stage.kafka.request = Request("r", 0)
    stage.turns(10)
    assert [{0: 40}, {}, {}] == [job.newer for job in stage.jobs]


def test_a_step_of_which_leaders_die_again_and_again_is_given_up(stage: Stage) -> None:
    stage.turns(alarms=(ALARM,))
    while stage.state.state is not State.TRAINING:
        stage.turns()
    for _ in range(5):
        stage.leader.close()
        stage.leader = stage.lead()
        assert State.TRAINING is stage.state.state
    stage.leader.close()
    stage.leader = stage.lead()
    assert State.REJECTED is stage.state.state
    assert "begun 6 times" in stage.state.last.reason  # type: ignore[union-attr]


def announced_by_hand(stage: Stage, version: str, previous: str) -> None:
    stage.kafka.announced.append(Announcement(version, "", previous, "carry", "by hand", 0))


def test_a_version_that_somebody_else_announces_is_watched_and_a_bad_one_goes_back(stage: Stage) -> None:
    FakePair.outcomes = [WORSE]
    announced_by_hand(stage, stage.challenger, stage.champion)
    assert State.WATCHING is stage.turns().state
    state = stage.turns(20)
    assert (State.ROLLED_BACK, stage.champion) == (state.state, state.champion)
    assert [stage.challenger, stage.champion] == [a.version for a in stage.kafka.announced]


def test_a_watch_that_was_better_and_is_worse_now_goes_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.turns(alarms=(ALARM,))
    while stage.state.state is not State.WATCHING:
        stage.turns()
    monkeypatch.setattr(FakePair, "newest", WORSE)
    FakePair.outcomes = [BETTER]
    while stage.state.state is State.WATCHING:
        assert not stage.state.figures.get("watch_newest_events")
        stage.turns()
    state = stage.state
    assert (State.ROLLED_BACK, stage.champion) == (state.state, state.champion)
    assert state.last is not None
    assert f"of the newest {WORSE.events} events" in state.last.reason
    assert WORSE.gain == state.last.figures["watch_newest_gain"]


def test_whoever_goes_back_to_an_ancestor_is_not_judged(stage: Stage) -> None:
    stage.turns(alarms=(ALARM,))
    assert stage.challenger == stage.turns(40).champion
    announced_by_hand(stage, stage.champion, stage.challenger)
    state = stage.turns(5)
    assert (State.STABLE, stage.champion) == (state.state, state.champion)


def test_a_promotion_that_no_member_serves_is_taken_back(stage: Stage) -> None:
    stage.turns(alarms=(ALARM,))
    while stage.state.state is not State.PROMOTED:
        stage.turns()
    former = Summary(0, 0, 0, 9, "", stage.champion, 2_000, 2_000, 5.0, 6.0, 5.0, 5.0, 5.0, 0, 0, 9)
    stage.leader.turn([former], 8)
    assert State.PROMOTED is stage.state.state
    stage.now_s += 301
    stage.leader.turn([], None)
    assert (State.ROLLED_BACK, stage.champion) == (stage.state.state, stage.state.champion)
    assert stage.champion == stage.kafka.announced[-1].version


def test_where_it_stands_is_in_a_file(stage: Stage) -> None:
    stage.turns(alarms=(ALARM,))
    stage.now_s += 10
    stage.turns()
    status = msgspec.json.decode((stage.config.state_dir / "refresh.json").read_bytes())
    assert (True, "cooling", stage.champion) == (status["leader"], status["state"], status["champion"])
    assert "alarm" == status["trigger"]["kind"]


def test_where_members_begin_with_another_model_and_nothing_was_announced_the_refresh_begins_with_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.turns(alarms=(ALARM,))
    stage.leader.close()
    newer = stage.write(random_model(), nudge=0.5)
    monkeypatch.setattr(module, "read_model", lambda _path: stage.registry.read(newer))
    stage.leader = stage.lead()
    assert (State.STABLE, newer) == (stage.state.state, stage.state.champion)


def windows(stage: Stage, start: int, stop: int, excess: float = 0.0) -> None:
    """Windows of 10 events that cost so much more than their scores expect, each with a turn of the leader."""
    for n in range(start, stop):
        loss = 5.5 + 10 * excess + (-1) ** n * 0.3
        told = Summary(0, n, 10 * n, 10 * n + 9, "", stage.champion, 10, 10, loss, 6.0, 5.5, 6.0, 6.0, 0, 0, n)
        stage.leader.turn([told], n + 1)
        stage.now_s += 1


def test_who_leads_next_knows_what_was_normal_and_does_not_take_the_new_world_for_it(stage: Stage) -> None:
    drift = {"group_events": 10, "reference_events": 200, "cooldown_events": 300, "signals": ["excess_loss"]}
    stage.config = Config.model_validate({**stage.config.model_dump(), "drift": drift})
    FakePair.outcomes = [SAME]
    stage.leader.close()
    stage.leader = stage.lead()
    windows(stage, 0, 40)
    windows(stage, 40, 65, excess=0.3)
    (first,) = map(Alarm.from_bytes, stage.kafka.alarms)
    assert {0: 400} == first.since
    stage.leader.close()
    stage.leader = stage.lead()
    windows(stage, stage.state.learning_offset, 120, excess=0.3)
    alarms = list(map(Alarm.from_bytes, stage.kafka.alarms))
    assert [first.since, first.since, first.since] == [alarm.since for alarm in alarms[:3]]
    assert [first.reference] * len(alarms) == [alarm.reference for alarm in alarms]
    assert {300} == {later.events - one.events for one, later in pairwise(alarms)}, "as often as is told"
    assert stage.champion == stage.state.champion


def test_what_is_known_of_drift_is_kept_while_nothing_happens(stage: Stage) -> None:
    drift = {"group_events": 10, "reference_events": 200, "signals": ["excess_loss"]}
    stage.config = Config.model_validate({**stage.config.model_dump(), "drift": drift})
    stage.leader.close()
    stage.leader = stage.lead()
    windows(stage, 0, 40)
    assert (0, ()) == (stage.state.learning_offset, stage.state.watched.standings)
    stage.now_s += 3_600
    windows(stage, 40, 50)
    assert (41, [20]) == (stage.state.learning_offset, [one.reference.count for one in stage.state.watched.standings])
    stage.leader.close()
    stage.leader = stage.lead()
    windows(stage, 50, 60, excess=0.3)
    assert State.STABLE is not stage.state.state


def test_what_was_normal_for_a_champion_says_nothing_of_the_next(stage: Stage) -> None:
    drift = {"group_events": 10, "reference_events": 200, "signals": ["excess_loss"]}
    stage.config = Config.model_validate({**stage.config.model_dump(), "drift": drift})
    stage.leader.close()
    stage.leader = stage.lead()
    windows(stage, 0, 60, excess=0.0)
    windows(stage, 60, 70, excess=0.3)
    references = [one.reference.count for one in stage.state.watched.standings]
    assert [20] == references
    while stage.state.champion != stage.challenger:
        stage.turns()
    assert () == stage.state.watched.standings
    assert [None] == [one.reference for one in stage.leader.status().drift]

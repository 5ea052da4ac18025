"""A refresh on a real broker: a drift, its alarm, a training, a shadow, a promotion; and a death at every step."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import chain, cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import psutil
import pytest
from broker_app import App
from refresh_stream import DRIFT_AT, PRETRAINED, SPEC, stream, write_champion

from stream_adapt import config as configuration
from stream_adapt.announcements import Announcement, announce
from stream_adapt.chaos.broker import Brokers
from stream_adapt.chaos.members import Troubles
from stream_adapt.chaos.oracle import compare_versions, stretches
from stream_adapt.chaos.schedule import Timeouts
from stream_adapt.config import Config
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.topics import create_topics
from stream_adapt.models import Registry, write_model
from stream_adapt.record import UserEvent
from stream_adapt.refresh.controller import Controller
from stream_adapt.refresh.journal import Tail, ask
from stream_adapt.refresh.record import RefreshState
from stream_adapt.refresh.states import RESTING, State
from stream_adapt.refresh.training import Job
from stream_adapt.refresh.worker import Worker
from stream_adapt.service import topic_specs
from stream_adapt.testing.broker import RunningBroker, read_all

pytestmark = [pytest.mark.broker, pytest.mark.timeout(1_200)]

#: Quick: the stream is small, and that an alarm is right is not the question here.
DETECTOR = {"min_instances": 1, "delta": 0.2, "threshold": 5.0, "mode": "up"}
DRIFT = {"group_events": 64, "reference_events": 2_048, "cooldown_events": 1_000, "parameters": DETECTOR}
REFRESH = {
    "mode": "child",
    "cooldown_s": 0,
    "settle_events": 1_500,
    "window_events": 4_000,
    "training_s": 10,
    "shadow_events": 500,
    "watch_events": 1_000,
    "error": 0.1,
}
#: Refreshes are those that are asked for.
NO_ALARM = {"reference_events": 10**9}
TIMEOUT_S = 540.0
REFRESH_NOW = (sys.executable, "-m", "stream_adapt", "refresh")


class Stage:
    """An application whose model is of the world before, a member, and a stream that goes on as it is asked to."""

    def __init__(
        self,
        app: App,
        refresh: Mapping[str, Any] = MappingProxyType({}),
        drift: Mapping[str, Any] = MappingProxyType({}),
        replicas: int = 1,
    ) -> None:
        self.app = app
        self.supervised = False
        self.champion = write_champion(app.folder / "refreshed").version
        self.path = app.config(
            model={"path": str(app.folder / "refreshed")},
            topics={"replication": replicas},
            drift={**DRIFT, **drift},
            refresh={**REFRESH, **refresh},
        )
        self.config: Config = configuration.load(self.path).config
        create_topics({"bootstrap.servers": app.broker.bootstrap_servers}, topic_specs(self.config))
        #: Then on and on in the new world, however long it takes.
        self._events: Iterator[UserEvent] = chain(stream()[PRETRAINED:], cycle(stream()[DRIFT_AT:]))
        self._tail = Tail(self.config)

    def feed(self, count: int) -> None:
        """Produces the next events."""
        encode = msgspec.json.encode
        self.app.produce_raw((e.user_id.encode(), encode(e)) for e in islice(self._events, count))

    def state(self) -> RefreshState | None:
        """What the controller last wrote."""
        self._tail.poll(0.05)
        return self._tail.state

    def started_again(self) -> None:
        """Does what a supervisor does where a member says that it must be: it ends with 3."""
        for member in [one for one in self.app.members if one.poll() is not None]:
            assert KafkaRefused.exit_code == member.returncode, self.app.log()[-6000:]
            self.app.members.remove(member)
            self.app.start(config=self.path)

    def until(self, reached: Callable[[RefreshState], bool], each: int = 150, pause_s: float = 0.4) -> RefreshState:
        """Feeds the stream until the refresh is somewhere."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            if self.supervised:
                self.started_again()
            state = self.state()
            if state is not None and reached(state):
                return state
            assert time.monotonic() < deadline, f"{state}; log:\n{self.app.log()[-6000:]}"
            self.feed(each)
            time.sleep(pause_s)

    def close(self) -> None:
        self._tail.close()


@pytest.fixture
def stage(make_app: Callable[..., App]) -> Iterator[Stage]:
    with closing(Stage(make_app(2, SPEC))) as made:
        yield made


def test_a_drift_is_seen_a_challenger_trained_compared_promoted_and_watched(
    stage: Stage, kafka_broker: RunningBroker
) -> None:
    member = stage.app.start(config=stage.path)
    stage.feed(DRIFT_AT - PRETRAINED)
    stage.app.wait_for_outputs(DRIFT_AT - PRETRAINED, TIMEOUT_S)
    end = stage.until(lambda s: s.last is not None and s.state in RESTING)
    assert end.last is not None
    assert (State.STABLE, "promoted") == (end.state, end.last.outcome), end.last
    assert stage.champion == end.last.champion
    assert end.last.trigger is not None
    assert "alarm" == end.last.trigger.kind
    assert end.last.figures["shadow_gain"] > stage.config.refresh.margin
    newest = read_all(kafka_broker.bootstrap_servers, stage.config.topic("scores"))[-200:]
    assert end.champion in {json.loads(m.value())["model_version"] for m in newest}
    assert read_all(kafka_broker.bootstrap_servers, stage.config.topic("alarms"))
    assert 0 == stage.app.stop(member)


@pytest.mark.slow
def test_a_controller_that_is_killed_in_every_state_is_followed_by_one_that_goes_on(stage: Stage) -> None:
    member = stage.app.start(config=stage.path)
    stage.feed(DRIFT_AT - PRETRAINED)
    stage.app.wait_for_outputs(DRIFT_AT - PRETRAINED, TIMEOUT_S)
    left = {State.COOLING, State.TRAINING, State.SHADOW, State.WATCHING}

    def killed_or_ended(state: RefreshState) -> bool:
        if state.state in left:
            left.remove(state.state)
            for child in psutil.Process(member.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        return state.last is not None and state.state in RESTING

    end = stage.until(killed_or_ended)
    assert end.last is not None
    assert (State.STABLE, "promoted") == (end.state, end.last.outcome), end.last
    assert not left
    assert 0 == stage.app.stop(member)


#: Every state in which something is under way.
BUSY = (State.COOLING, State.TRAINING, State.SHADOW, State.PROMOTED, State.WATCHING)


def _harmed_in_every_state(stage: Stage, harm: Callable[[State], object]) -> RefreshState:
    """Does harm once in each state of a refresh that an alarm began; how that one ended. Then another one works."""
    left = set(BUSY)

    def harmed_or_ended(state: RefreshState) -> bool:
        if state.state in left:
            left.remove(state.state)
            harm(state.state)
        return state.last is not None and state.state in RESTING

    # `promoted` lasts only until a member has scored something with the new version.
    end = stage.until(harmed_or_ended, each=20, pause_s=0.05)
    assert not left, end
    again = _asked_for(stage, end)
    if again.last is not None and again.last.trigger is not None and again.last.trigger.kind == "grown":
        # One that the growth of the new world had begun was under way, and was the answer.
        again = _asked_for(stage, again)
    assert again.last is not None
    assert again.last.trigger is not None
    assert "asked" == again.last.trigger.kind
    return end


def _asked_for(stage: Stage, before: RefreshState) -> RefreshState:
    """Asks for a refresh; how what answers it ended."""
    request = ask(stage.config, "and another one").id
    return stage.until(lambda s: s.request == request and s.state in RESTING and s.last != before.last)


def _started(stage: Stage) -> Any:
    """A member that has scored the world before the drift."""
    member = stage.app.start(config=stage.path)
    stage.feed(DRIFT_AT - PRETRAINED)
    stage.app.wait_for_outputs(DRIFT_AT - PRETRAINED, TIMEOUT_S)
    return member


def _every_event_once(stage: Stage) -> None:
    """All that was fed has one score, and no partition went back to a version that it had left."""
    address = stage.app.broker.bootstrap_servers
    fed = sum(1 for _ in read_all(address, stage.config.topic("events")))
    stage.app.wait_for_outputs(fed, TIMEOUT_S)
    scores = read_all(address, stage.config.topic("scores"))
    places = [(s["source_partition"], s["source_offset"]) for s in map(json.loads, (m.value() for m in scores))]
    assert fed == len(places) == len(set(places))
    models = [m.key().decode() for m in read_all(address, stage.config.topic("models"))]
    assert [] == compare_versions(stretches(scores), [stage.champion, *models])


@pytest.mark.slow
def test_a_member_that_is_killed_in_every_state_leaves_a_refresh_that_goes_on(stage: Stage) -> None:
    """Its controller and its training die with it."""
    _started(stage)

    def kill(_state: State) -> None:
        (member,) = stage.app.members
        assert -signal.SIGKILL == stage.app.stop(member, signal.SIGKILL)
        stage.app.start(config=stage.path)

    end = _harmed_in_every_state(stage, kill)
    assert end.last is not None
    assert "promoted" == end.last.outcome, end.last
    _every_event_once(stage)


@pytest.mark.slow
def test_a_broker_that_goes_away_in_every_state_leaves_a_refresh_that_goes_on(tmp_path: Path) -> None:
    """One of two, with replicas on the other: by SIGTERM and by SIGKILL, in turn (why two: `chaos/broker.py`)."""
    with Brokers(Timeouts(), Troubles(), tmp_path / "kafka") as brokers, ExitStack() as stack:
        app = App("refreshed", RunningBroker(brokers.address, "embedded"), tmp_path / "app", 2)
        app.folder.mkdir()
        stack.callback(app.end)
        stage = stack.enter_context(closing(Stage(app, replicas=len(brokers.nodes))))
        stage.supervised = True  # a call that a broker's death leaves without an answer ends the member
        _started(stage)

        def harm(state: State) -> None:
            assert brokers.restart(kill=BUSY.index(state) % 2 == 1)
            brokers.settle()  # without events the refresh waits meanwhile

        end = _harmed_in_every_state(stage, harm)
        assert end.last is not None
        assert "promoted" == end.last.outcome, end.last
        assert len(BUSY) == brokers.restarts
        _every_event_once(stage)
        assert "Traceback" not in app.log()


class Hands:
    """A controller in this process, and what it started."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.workers: list[Worker] = []
        self.controller = Controller(stage.config, train=self._train)

    def _train(self, config: Config, job: Job) -> Worker:
        self.workers.append(Worker(config, job))
        return self.workers[-1]

    def until(self, reached: Callable[[RefreshState], bool]) -> RefreshState:
        """Leads, while the stream goes on, until the refresh is somewhere."""
        deadline, due = time.monotonic() + TIMEOUT_S, 0.0
        while self.controller.state is None or not reached(self.controller.state):
            self.controller.turn()
            assert time.monotonic() < deadline, f"{self.controller.state}; log:\n{self.stage.app.log()[-3000:]}"
            if time.monotonic() > due:
                due = time.monotonic() + 0.4
                self.stage.feed(150)
        return self.controller.state

    def refused(self, killed_at: str) -> str:
        """Asks for a refresh, and kills its training at a stage; returns why it was refused."""
        started = len(self.workers)
        ask(self.stage.config, killed_at)
        self.until(lambda _: len(self.workers) > started and _stage(self.workers[-1]) == killed_at)
        psutil.Process(self.workers[-1].pid).kill()
        state = self.until(lambda s: s.state in RESTING)
        assert state.last is not None
        assert (State.REJECTED, "rejected") == (state.state, state.last.outcome)
        assert self.stage.champion == state.champion
        return state.last.reason


def _stage(worker: Worker) -> str:
    progress = worker.progress()
    return progress.stage if progress else "starting"


@pytest.mark.slow
def test_trainings_that_die_are_refused_the_next_one_works_and_a_bad_model_planted_by_hand_goes_back(
    make_app: Callable[..., App],
) -> None:
    with closing(Stage(make_app(2, SPEC), {"mode": "external"}, NO_ALARM)) as stage:
        stage.app.start(config=stage.path)
        stage.feed(DRIFT_AT - PRETRAINED + 2_000)
        stage.app.wait_for_outputs(DRIFT_AT - PRETRAINED + 2_000, TIMEOUT_S)
        hands = Hands(stage)
        with closing(hands.controller):
            for killed_at in ("starting", "reading", "training"):
                assert "SIGKILL" in hands.refused(killed_at)
            asking = stage.app.start("--json", config=stage.path, command=REFRESH_NOW)
            good = hands.until(lambda s: s.state in RESTING and s.champion != stage.champion).champion
            assert 0 == asking.wait(TIMEOUT_S)
            assert f'"champion":"{good}","decision":{{"outcome":"promoted"' in stage.app.log()
            bad = _plant_a_bad_model(stage, good)
            back = hands.until(lambda s: s.state is State.ROLLED_BACK)
            assert (good, "rolled_back", bad) == (back.champion, back.last and back.last.outcome, back.last.challenger)  # type: ignore[union-attr]


def _plant_a_bad_model(stage: Stage, champion: str) -> str:
    """Announces, by hand, a version that says the opposite of what the champion says."""
    registry = Registry(stage.config.model.path)
    model = registry.read(champion)
    weights = msgspec.structs.replace(model.weights, item_vector=-model.weights.item_vector, bias=-model.weights.bias)
    folder = write_model(registry.path, weights, model.spec, model.manifest.fitted, parent=champion)
    sha256 = registry.manifest(folder.name).sha256
    announce(stage.config, Announcement(folder.name, sha256, champion, "carry", "by mistake", time.time_ns() // 10**6))
    return folder.name

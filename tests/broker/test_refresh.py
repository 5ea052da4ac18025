"""A refresh on a real broker: a drift, its alarm, a training, a shadow, a promotion; and a death at every step."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, cycle, islice

import msgspec
import psutil
import pytest
from broker_app import App
from refresh_stream import DRIFT_AT, PRETRAINED, SPEC, stream, write_champion

from stream_adapt import config as configuration
from stream_adapt.config import Config
from stream_adapt.record import UserEvent
from stream_adapt.kafka.topics import create_topics
from stream_adapt.refresh.journal import Tail
from stream_adapt.refresh.record import RefreshState
from stream_adapt.refresh.states import RESTING, State
from stream_adapt.service import topic_specs
from stream_adapt.testing.broker import RunningBroker, read_all

pytestmark = pytest.mark.broker

DRIFT = {"group_events": 64, "reference_events": 2_048, "cooldown_events": 1_000}
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
TIMEOUT_S = 300.0


class Stage:
    """An application whose model is of the world before, a member, and a stream that goes on as it is asked to."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.champion = write_champion(app.folder / "refreshed").version
        self.path = app.config(model={"path": str(app.folder / "refreshed")}, drift=DRIFT, refresh=REFRESH)
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

    def until(self, reached: Callable[[RefreshState], bool], each: int = 150, pause_s: float = 0.4) -> RefreshState:
        """Feeds the stream until the refresh is somewhere."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
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

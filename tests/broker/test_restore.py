"""State survives: rows come back after a restart, a kill and a rebalance, and only where they belong."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from broker_app import App, event
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from stream_adapt.testing.broker import read_all

pytestmark = pytest.mark.broker

PROTOCOLS = pytest.mark.parametrize("protocol", ["classic", "consumer"])


def _scores(app: App) -> dict[str, tuple[Any, ...]]:
    """By event id: what a score says that depends on rows. Fails if an event has two."""
    scores = app.scores()
    assert Counter(s["event_id"] for s in scores).most_common(1)[0][1] == 1
    return {s["event_id"]: (s["score"], s["updated_score"], s["uncertainty"], s["adaptations"]) for s in scores}


def _rows(app: App) -> dict[tuple[int, bytes], bytes | None]:
    """The changelog as a consumer that knows nothing of us reads it: last value by partition and key."""
    messages = read_all(app.broker.bootstrap_servers, f"{app.name}.changelog")
    newest = {(m.partition(), m.key()): m.value() for m in messages}
    return {key: value for key, value in newest.items() if key[1] != b"c:"}


def _uninterrupted(make_app: Callable[..., App], events: list[dict[str, Any]]) -> App:
    calm = make_app()
    calm.produce(events)
    assert calm.start("--stop-after", str(len(events))).wait(60) == 0, calm.log()
    return calm


@PROTOCOLS
def test_a_restart_goes_on_with_the_same_rows(make_app: Callable[..., App], protocol: str) -> None:
    events = [event(n) for n in range(1_200)]
    calm, app = _uninterrupted(make_app, events), make_app()
    for part in (events[:500], events[500:]):
        app.produce(part)
        member = app.start("--stop-after", str(len(part)), kafka={"group_protocol": protocol})
        assert member.wait(60) == 0, app.log()
    assert _scores(calm) == _scores(app)
    assert _rows(calm) == _rows(app)

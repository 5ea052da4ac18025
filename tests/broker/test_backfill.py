"""A backfill: events from before a moment are learned from and have no score, whoever dies meanwhile."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from broker_app import App, event

from stream_adapt.state.row import CONTROL_KEY
from stream_adapt.testing.broker import read_all

pytestmark = pytest.mark.broker

_EVENTS, _CUT, _CHUNK = 4_000, 2_500, 100
_BAD = _CUT - 7


def rows(app: App) -> dict[tuple[int | None, bytes | None], bytes | None]:
    """The last version of each row, by partition and key."""
    messages = read_all(app.broker.bootstrap_servers, f"{app.name}.changelog")
    return {(m.partition(), m.key()): m.value() for m in messages if m.key() != CONTROL_KEY}


def learned(app: App) -> int:
    return sum(summary.events for record in app.learning() for summary in record.summaries)


def wait_until_learned(app: App, events: int) -> None:
    deadline = time.monotonic() + 180
    while learned(app) < events:
        assert time.monotonic() < deadline, app.log()[-3000:]
        time.sleep(0.05)


def produce(app: App) -> None:
    """Every event in partition 0, and one that is none."""
    values = [
        (f"user-{n % 37}".encode(), json.dumps(event(n, item_id=f"item-{n % 50}")).encode()) for n in range(_EVENTS)
    ]
    values[_BAD] = (b"user-1", b"nope")
    app.produce_raw(values, partition=0)


def test_a_backfill_learns_without_scores_up_to_its_moment_also_when_it_is_killed(make_app: Callable[..., App]) -> None:
    silent, plain = make_app(partitions=2), make_app(partitions=2)
    models = {"path": str(plain.folder / "models")}
    produce(silent)
    produce(plain)
    moment = datetime.fromtimestamp(event(_CUT)["timestamp"] / 1000, UTC).isoformat()
    sections: dict[str, Any] = {"output": {"emit_from": moment}, "input": {"max_batch": _CHUNK}}
    config = silent.config("a", model=models, **sections)
    for more in (900, 1_500):  # killed before the moment, and about there
        member = silent.start(config=config)
        wait_until_learned(silent, min(learned(silent) + more, _EVENTS - _CHUNK))
        silent.stop(member, signal.SIGKILL)
    silent.start(config=config)
    whole = plain.start(config=plain.config("b", model=models))
    wait_until_learned(silent, _EVENTS - 1)
    plain.wait_for_outputs(_EVENTS)
    assert 0 == plain.stop(whole)
    assert 0 == silent.stop(silent.members[-1])

    wanted = {f"e{number}" for number in range(_CUT, _EVENTS)}
    of_all = {score["event_id"]: score["score"] for score in plain.scores()}
    scores = silent.scores()
    assert wanted == {score["event_id"] for score in scores}
    assert len(wanted) == len(scores)
    assert {event_id: of_all[event_id] for event_id in wanted} == {s["event_id"]: s["score"] for s in scores}
    assert [b"nope"] == [letter.value() for letter in silent.dead_letters()]
    assert _EVENTS - 1 == learned(silent)
    assert rows(plain) == rows(silent)

"""Records that are refused, kill or erase, on a real Apache Kafka."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from broker_app import App, event

pytestmark = pytest.mark.broker

POISONED = (sys.executable, str(Path(__file__).with_name("poisoned_member.py")), "run")


def headers(message: object) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers() or []}  # type: ignore[attr-defined]


def test_too_many_dead_letters_stop_the_consumer_and_each_start_goes_on(app: App) -> None:
    good, bad = [event(n, "ann") for n in range(100)], [(b"ann", b"nope %d" % n) for n in range(400)]
    app.produce_raw([(b"ann", json.dumps(one).encode()) for one in good] + bad, partition=1)
    limits = {"breaker_share": 0.5, "breaker_window": 200, "max_batch": 50}
    first = app.start(config=app.config("a", input=limits))
    assert first.wait(60) == 6, app.log()
    log = app.log()
    for part in ("101 of 101 records were refused", "input.breaker_share=0.5", "not_json", f"{app.name}.events[1]@"):
        assert part in log
    after_first = len(app.dead_letters())
    assert 200 < after_first <= 250  # the first window was half good; what tripped it is committed, and no more
    second = app.start(config=app.config("a", input=limits))
    assert second.wait(60) == 6, app.log()
    third = app.start("--stop-after", str(400 - len(app.dead_letters())), config=app.config("a"))
    assert third.wait(60) == 0, app.log()
    values = Counter(message.value() for message in app.dead_letters())
    assert values == Counter(value for _, value in bad)
    assert len(app.scores()) == 100


def test_a_record_that_kills_the_process_is_quarantined_and_the_stream_goes_on(app: App) -> None:
    """Here it kills with SIGSEGV before anything can be caught; the supervisor is this test."""
    app.produce(event(n) for n in range(3_000))
    poison = json.dumps(event(3_000, "ann", event_type="POISON")).encode()
    app.produce_raw([(b"ann", poison)])
    app.produce(event(n) for n in range(3_001, 4_000))
    config = app.config("a", input={"max_batch": 1_000})
    ends = []
    while len(ends) < 10 and (not ends or ends[-1] != 0):
        done = len(app.scores()) + len(app.dead_letters())
        member = app.start("--stop-after", str(4_000 - done), config=config, command=POISONED)
        ends.append(member.wait(60))
    assert ends == [-signal.SIGSEGV] * 3 + [0], app.log()
    assert Counter(f"e{n}" for n in range(4_000) if n != 3_000) == Counter(s["event_id"] for s in app.scores())
    (letter,) = app.dead_letters()
    assert (letter.value(), headers(letter)["stream-adapt.reason"]) == (poison, "crash")
    app.produce(event(n) for n in range(4_000, 4_100))
    assert app.start("--stop-after", "100", config=config).wait(60) == 0, app.log()
    assert "back to normal" in app.log()


def test_duplicates_and_late_events_are_treated_as_told(app: App) -> None:
    events = [event(1, "ann"), event(5, "ann"), event(1, "ann"), event(4, "ann"), event(2, "ann"), event(6, "ann")]
    app.produce(events)
    policy = {"deduplicate": True, "late": "dead_letter", "late_after_s": 2}
    member = app.start("--stop-after", "6", input=policy)
    assert member.wait(60) == 0, app.log()
    found = [(s["event_id"], s["flags"], s["adaptations"]) for s in app.scores()]
    assert found == [("e1", [], 1), ("e5", [], 2), ("e4", [], 3), ("e6", [], 4)]
    assert [("late", b"ann")] * 2 == [(headers(m)["stream-adapt.reason"], m.key()) for m in app.dead_letters()]

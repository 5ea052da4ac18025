"""Records that are refused, kill or erase, on a real Apache Kafka."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broker_app import App, event
from confluent_kafka import Message, Producer
from jsonschema import Draft202012Validator

from stream_adapt.testing.broker import read_all

SCHEMAS = Path(__file__).parents[2] / "schemas"

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


def cli(app: App, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of ours on this application, with `--json`."""
    command = [sys.executable, "-m", "stream_adapt", *words, "-c", str(app.config("cli")), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def answer(app: App, *words: str) -> dict[str, Any]:
    """What the command prints."""
    done = cli(app, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def inputs(app: App) -> list[Message]:
    return read_all(app.broker.bootstrap_servers, f"{app.name}.events")


def test_dead_letters_are_listed_and_replayed_each_once(app: App) -> None:
    """Five records come before their time, one is no event; then the clock's tolerance is mended, and they go again."""
    early = [event(n, "ann", timestamp=4_000_000_000_000) for n in range(5)]
    producer = Producer({"bootstrap.servers": app.broker.bootstrap_servers})
    for n, one in enumerate([*map(json.dumps, early), "no\x1b[31mpe"]):
        producer.produce(f"{app.name}.events", one, "ann", partition=2, headers=[("trace", str(n))])
    producer.flush(30)
    assert app.start("--stop-after", "6").wait(60) == 0, app.log()

    listing = answer(app, "dead-letters", "list")
    assert (listing["matched"], listing["reasons"]) == (6, {"future_timestamp": 5, "not_json": 1})
    last = listing["letters"][-1]
    assert (last["excerpt"], last["source_partition"], last["source_offset"]) == ("no\\x1b[31mpe", 2, 5)
    assert answer(app, "dead-letters", "list", "--reason", "not_json", "--limit", "1")["matched"] == 1
    assert answer(app, "dead-letters", "list", "--since", "2099-01-01")["matched"] == 0

    only = ("dead-letters", "replay", "--reason", "future_timestamp")
    assert answer(app, *only, "--dry-run")["selected"] == 5
    assert len(inputs(app)) == 6
    second = f"{listing['letters'][1]['partition']}:{listing['letters'][1]['offset']}"
    assert answer(app, "dead-letters", "replay", "--offset", second, "--yes")["replayed"] == 1
    done = answer(app, *only, "--yes")
    assert (done["replayed"], done["done_before"]) == (4, 1)
    again = answer(app, *only, "--yes")
    assert (again["selected"], again["replayed"]) == (0, 0)

    replayed = inputs(app)[6:]
    assert [json.dumps(early[n]) for n in (1, 0, 2, 3, 4)] == [m.value().decode() for m in replayed]
    assert {(m.partition(), m.key()) for m in replayed} == {(2, b"ann")}
    assert [("trace", b"1"), ("stream-adapt.replays", b"1")] == replayed[0].headers()

    member = app.start("--stop-after", "5", input={"max_future_s": 10**10})
    assert member.wait(60) == 0, app.log()
    assert {s["event_id"] for s in app.scores()} == {f"e{n}" for n in range(5)}

    assert answer(app, "dead-letters", "replay", "--yes")["replayed"] == 1  # the one that was left out so far
    assert app.start("--stop-after", "1").wait(60) == 0, app.log()
    (*_, letter) = app.dead_letters()
    assert headers(letter)["stream-adapt.replays"] == "1"
    assert answer(app, "dead-letters", "replay", "--yes")["replayed"] == 1
    assert [b"2"] == [value for name, value in inputs(app)[-1].headers() if name == "stream-adapt.replays"]
    assert answer(app, *only, "--yes", "--from-beginning")["replayed"] == 5


def test_a_dead_letter_whose_payload_was_cut_is_refused_by_name(make_app: Callable[..., App]) -> None:
    app = make_app(**{"max.message.bytes": "2000"})
    app.produce_raw([(b"u", b"x" * 3_000)], partition=0)
    assert app.start("--stop-after", "1").wait(60) == 0, app.log()
    told = answer(app, "dead-letters", "replay", "--yes")
    assert told["replayed"] == 0
    assert f"{app.name}.events[0]@0" in told["refused"][0]
    assert "cut" in told["refused"][0]


def test_a_user_is_erased_from_every_partition_and_starts_anew(app: App) -> None:
    for partition in (0, 2):
        app.produce_raw([(b"ann", json.dumps(event(n, "ann")).encode()) for n in range(3)], partition)
    app.produce_raw([(b"bob", json.dumps(event(n, "bob")).encode()) for n in range(3)], 0)
    member = app.start()
    app.wait_for_outputs(9)
    erased = answer(app, "state", "erase", "ann", "--wait")
    assert ([0, 1, 2, 3], [0, 1, 2, 3], [0, 2]) == (erased["partitions"], erased["receipts"], erased["had_row"])
    app.produce_raw([(name, json.dumps(event(7, name.decode())).encode()) for name in (b"ann", b"bob")], 0)
    app.wait_for_outputs(9 + 4 + 2)
    assert app.stop(member) == 0, app.log()
    records = app.scores()
    receipts = [one for one in records if one["flags"] == ["erased"]]
    assert len(receipts) == 4
    Draft202012Validator(json.loads((SCHEMAS / "receipt-v1.json").read_text())).validate(receipts[0])
    last = {one["user_id"]: one for one in records if one["event_id"] == "e7"}
    assert (last["ann"]["adaptations"], last["bob"]["adaptations"]) == (1, 4)
    assert last["ann"]["score"] != pytest.approx(last["bob"]["score"], abs=1e-6)


def test_an_erasure_that_nobody_does_says_so(app: App) -> None:
    done = cli(app, "state", "erase", "ann", "--wait", "--timeout", "1")
    assert done.returncode == 3
    assert "no receipt" in done.stderr

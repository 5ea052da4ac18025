"""The loop on a real Apache Kafka: every record in has exactly one output, whatever happens to its members."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest
from broker_app import App, event

pytestmark = pytest.mark.broker


def _ids(scores: list[dict[str, Any]]) -> Counter[str]:
    return Counter(score["event_id"] for score in scores)


def _once(numbers: range) -> Counter[str]:
    return Counter(f"e{n}" for n in numbers)


def test_one_committed_event_changes_its_users_row(app: App) -> None:
    app.produce([event(0, "ann"), event(1, "ann", item_id=event(0)["item_id"])])
    member = app.start("--stop-after", "2")
    assert member.wait(60) == 0, app.log()
    first, second = app.scores()
    assert first["score"] == pytest.approx(first["frozen_score"], abs=1e-6)
    assert first["updated_score"] != first["score"]
    assert second["adaptations"] == 2
    assert second["frozen_score"] == first["frozen_score"]
    assert abs(second["score"] - first["updated_score"]) < abs(second["score"] - first["score"])


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_every_event_has_one_score(app: App, delivery: str, protocol: str) -> None:
    app.produce(event(n) for n in range(3_000))
    member = app.start("--stop-after", "3000", delivery=delivery, kafka={"group_protocol": protocol})
    assert member.wait(60) == 0, app.log()
    assert _ids(app.scores()) == _once(range(3_000))


def test_bad_records_are_dead_letters_and_the_good_ones_around_them_are_scored(app: App) -> None:
    bad = [(b"u", b"nope"), (b"u", None), (None, json.dumps(event(1)).encode()), (b"x", json.dumps(event(2)).encode())]
    records: list[tuple[bytes | None, bytes | None]] = []
    for n, one in enumerate(bad):
        good = event(100 + n, "ann")
        records += [(b"ann", json.dumps(good).encode()), one]
    app.produce_raw(records, partition=2)
    member = app.start("--stop-after", str(len(records)))
    assert member.wait(60) == 0, app.log()

    assert _ids(app.scores()) == _once(range(100, 104))
    letters = [({k: v.decode() for k, v in m.headers() or []}, m.key(), m.value()) for m in app.dead_letters()]
    letters.sort(key=lambda letter: int(letter[0]["stream-adapt.source.offset"]))
    assert [h["stream-adapt.reason"] for h, _, _ in letters] == ["not_json", "null_value", "null_key", "key_mismatch"]
    assert [(key, value) for _, key, value in letters] == bad
    assert [h["stream-adapt.source.offset"] for h, _, _ in letters] == ["1", "3", "5", "7"]
    assert {h["stream-adapt.source.partition"] for h, _, _ in letters} == {"2"}
    assert {h["stream-adapt.source.topic"] for h, _, _ in letters} == {f"{app.name}.events"}


def test_sigterm_finishes_the_batch_leaves_the_group_and_a_restart_goes_on(app: App) -> None:
    app.produce(event(n) for n in range(500))
    first = app.start()
    app.wait_for_outputs(500)
    assert app.stop(first) == 0, app.log()

    app.produce(event(n) for n in range(500, 900))
    started = time.monotonic()
    second = app.start("--stop-after", "400")
    assert second.wait(60) == 0, app.log()
    assert time.monotonic() - started < 30  # the group did not wait for a session timeout
    assert _ids(app.scores()) == _once(range(900))


def test_kill_in_the_middle_loses_nothing_and_doubles_nothing(app: App) -> None:
    total = 60_000
    feeding = threading.Thread(target=lambda: app.produce(event(n) for n in range(total)))
    feeding.start()
    for kill in range(4):
        member = app.start(input={"max_batch": 700})
        app.wait_for_outputs(2_000 * (kill + 1))
        assert app.stop(member, signal.SIGKILL) == -signal.SIGKILL
    feeding.join()
    app.start()
    assert _ids(app.wait_for_outputs(total)) == _once(range(total))


def test_members_join_and_leave_in_the_middle(app: App) -> None:
    total = 40_000
    feeding = threading.Thread(target=lambda: app.produce(event(n) for n in range(total)))
    feeding.start()
    first = app.start(config=app.config("a", input={"max_batch": 500}))
    app.wait_for_outputs(1_000)
    second = app.start(config=app.config("b", input={"max_batch": 500}))
    time.sleep(4)
    assert app.stop(first) == 0, app.log()
    feeding.join()
    assert _ids(app.wait_for_outputs(total)) == _once(range(total))
    assert app.stop(second) == 0, app.log()

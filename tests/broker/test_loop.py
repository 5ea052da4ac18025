"""The loop on a real Apache Kafka: every record in has exactly one output, whatever happens to its members."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bad_records import BAD_VALUES, FEATURES, MAX_BYTES, THREE_STARS, good_event
from broker_app import ITEMS, STARS, App, event
from confluent_kafka import Producer

from stream_adapt.kafka.embedded import EmbeddedKafka
from stream_adapt.kafka.topics import create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.broker import RunningBroker
from stream_adapt.testing.model import random_model

SCHEMAS = Path(__file__).parents[2] / "schemas"

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
    scores = app.scores()
    assert _ids(scores) == _once(range(3_000))
    told = [summary for record in app.learning() for summary in record.summaries]
    assert sum(summary.events for summary in told) == 3_000
    assert sum(summary.target for summary in told) == sum(score["target"] for score in scores)
    assert sum(summary.score for summary in told) == pytest.approx(sum(score["score"] for score in scores), abs=1e-3)


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


def test_every_bad_record_there_is_between_good_ones(make_app: Callable[..., App]) -> None:
    """Each is dead-lettered once, with its reason and unchanged; the good ones around it are scored."""
    app = make_app(spec=LearnerSpec(features=FEATURES, feedback=THREE_STARS))
    records: list[tuple[bytes | None, bytes | None]] = []
    for n, (_, value, _) in enumerate(BAD_VALUES):
        records += [(b"u", good_event(event_id=f"e{n}")), (b"u", value)]
    app.produce_raw(records, partition=1)
    member = app.start("--stop-after", str(len(records)), input={"max_bytes": MAX_BYTES})
    assert member.wait(60) == 0, app.log()
    assert _ids(app.scores()) == _once(range(len(BAD_VALUES)))
    letters = {int(dict(m.headers() or [])["stream-adapt.source.offset"]): m for m in app.dead_letters()}
    assert [2 * n + 1 for n in range(len(BAD_VALUES))] == sorted(letters)
    for n, (name, value, reason) in enumerate(BAD_VALUES):
        letter = letters[2 * n + 1]
        assert (dict(letter.headers() or [])["stream-adapt.reason"].decode(), letter.value()) == (reason, value), name


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


def test_aborted_upstream_transactions_are_not_scored_and_open_ones_are_waited_for(app: App) -> None:
    upstream = Producer({"bootstrap.servers": app.broker.bootstrap_servers, "transactional.id": f"{app.name}.upstream"})
    upstream.init_transactions(30)
    member = app.start()
    numbers = iter(range(1000))
    for committed in (True, False, True):
        upstream.begin_transaction()
        for n in (next(numbers) for _ in range(10)):
            one = event(n, "ann")
            upstream.produce(f"{app.name}.events", json.dumps(one), "ann")
        upstream.flush(10)
        (upstream.commit_transaction if committed else upstream.abort_transaction)(30)
    assert _ids(app.wait_for_outputs(20)) == _once(range(10)) + _once(range(20, 30))
    assert app.stop(member) == 0, app.log()


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_an_output_that_the_broker_refuses_for_good_becomes_a_dead_letter(
    make_app: Callable[..., App], delivery: str
) -> None:
    """The score carries ids of 900 characters and does not fit; the other events fit, and none is lost."""
    app = make_app(**{"max.message.bytes": "2000"})
    big = event(1, "u" * 900, item_id="i" * 900)
    app.produce([event(0, "ann"), big, event(2, "ann")])
    member = app.start("--stop-after", "3", delivery=delivery)
    assert member.wait(90) == 0, app.log()
    ids = _ids(app.scores())
    assert set(ids) == {"e0", "e2"}
    assert set(ids.values()) == {1} or delivery == "at_least_once"  # the batch was done again
    letter = app.dead_letters()[-1]
    headers = {name: value.decode() for name, value in letter.headers() or []}
    assert headers["stream-adapt.reason"] == "not_delivered"
    assert headers["stream-adapt.truncated"] == "true"
    assert letter.value() is None


def test_two_instances_with_one_transactional_id_one_survives(app: App) -> None:
    """The second takes the id from the first, which takes it back once at most; then one of them steps back."""
    first = app.start(config=app.config("same"))
    app.produce(event(n) for n in range(100))
    app.wait_for_outputs(100)
    second = app.start(config=app.config("same"))
    stopped = None
    for start in range(100, 60_000, 100):
        app.produce(event(n) for n in range(start, start + 100))
        stopped = next((m for m in (first, second) if m.poll() is not None), None)
        if stopped is not None:
            break
        time.sleep(0.1)
    assert stopped is not None, app.log()[-3000:]
    assert stopped.wait() == 4, app.log()
    assert "app.instance" in app.log()
    assert _ids(app.wait_for_outputs(start + 100)) == _once(range(start + 100))


def test_metrics_health_and_readiness_are_served(app: App) -> None:
    app.produce([*(event(n) for n in range(200))])
    app.produce_raw([(b"u", b"nope")] * 5)
    member = app.start()
    app.wait_for_outputs(205)
    port = re.search(r"port=\S*?(\d{4,5})", re.sub(r"\x1b\[[0-9;]*m", "", app.log()))
    assert port is not None, app.log()
    address = f"http://127.0.0.1:{port.group(1)}"
    deadline = time.monotonic() + 20
    while (ready := json.loads(_get(f"{address}/readyz")))["state"] != "idle":
        assert time.monotonic() < deadline, ready
    text = _get(f"{address}/metrics")
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert _get(f"{address}/healthz").strip() == "alive"
    assert sum(p["next_offset"] for p in ready["partitions"]) == 205
    assert values["stream_adapt_events_total"] == 205
    assert values["stream_adapt_scores_total"] == 200
    assert values['stream_adapt_dead_letters_total{reason="not_json"}'] == 5
    assert values['stream_adapt_log_loss_count{which="adapted"}'] == 200
    assert app.stop(member) == 0


def test_kcat_reads_valid_scores(app: App) -> None:
    """A consumer that nobody here wrote, and the published schema."""
    kcat = shutil.which("kcat")
    if kcat is None:
        pytest.skip("kcat is not installed: apt-get install kcat")
    app.produce(event(n) for n in range(300))
    assert app.start("--stop-after", "300").wait(60) == 0, app.log()
    command = [kcat, "-C", "-b", app.broker.bootstrap_servers, "-t", app.scores_topic, "-o", "beginning", "-e", "-q",
               "-X", "isolation.level=read_committed"]  # fmt: skip
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    schema = json.loads((SCHEMAS / "score-v1.json").read_text())
    scores = [json.loads(line) for line in lines]
    for score in scores:
        jsonschema.validate(score, schema)
    assert _ids(scores) == _once(range(300))


def test_an_unknown_topic_is_refused_with_what_to_do(app: App) -> None:
    member = app.start(topics={"events": "no-such-topic"})
    assert member.wait(60) == 3
    assert "topics create" in app.log()


def test_a_restarted_broker_is_survived(tmp_path: Path) -> None:
    """A broker of its own, with its data on disk: stopped in the middle of the stream, and started again."""
    with EmbeddedKafka(data_dir=tmp_path / "kafka") as kafka:
        broker = RunningBroker(kafka.bootstrap_servers, "embedded")
        app = App(f"app-{uuid.uuid4().hex[:8]}", broker, tmp_path, 2)
        random_model(app.folder / "models", LearnerSpec(feedback=STARS), ITEMS)
        create_topics({"bootstrap.servers": broker.bootstrap_servers}, product_topics(app.name, 2, 1))
        try:
            member = app.start()
            app.produce(event(n) for n in range(1_000))
            app.wait_for_outputs(1_000)
            kafka.restart()
            app.produce(event(n) for n in range(1_000, 2_000))
            assert _ids(app.wait_for_outputs(2_000)) == _once(range(2_000))
            kafka.kill()
            kafka.start()
            app.produce(event(n) for n in range(2_000, 3_000))
            assert _ids(app.wait_for_outputs(3_000)) == _once(range(3_000))
            assert app.stop(member) == 0, app.log()
        finally:
            app.end()


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:  # 503 has a body, too
        return error.read().decode()


def test_a_member_told_to_stop_while_it_starts_leaves_in_order(app: App) -> None:
    member = app.start()
    until_it_listens = time.monotonic() + 30
    status = Path(f"/proc/{member.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text()).group(1), 16) & 1 << (signal.SIGTERM - 1):  # type: ignore[union-attr]
        assert time.monotonic() < until_it_listens
    assert app.stop(member) == 0

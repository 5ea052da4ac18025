"""Faults of members, topics and groups on a real broker: whatever happens, every event has one output.

`tests/faults.py` lists all faults with where each is tested; those of connections: `test_connection_faults.py`.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from broker_app import ITEMS, RUN, STARS, App, event
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions
from faulty_stream import COUNT, SESSION_S, SLOW, TRANSACTION_S, WAIT_S, Stream, ids, once, taught_once

from stream_adapt.kafka.topics import create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.broker import IMPATIENT, RunningBroker
from stream_adapt.testing.model import random_model
from stream_adapt.testing.proxy import (
    Api,
    Delay,
    Drop,
    FaultProxy,
    Hold,
    Match,
    embedded_behind_proxy,
)

pytestmark = pytest.mark.broker


@pytest.fixture
def stream(make_app: Callable[..., App], fault_proxy: FaultProxy) -> Stream:
    """An application with two partitions and no member yet."""
    return Stream(make_app(partitions=2), fault_proxy)


# To members.


@pytest.mark.parametrize("at", ["request", "response"], ids=["before", "after"])
@pytest.mark.parametrize("api", [Api.PRODUCE, Api.TXN_OFFSET_COMMIT, Api.END_TXN], ids=lambda api: api.name)
def test_kill_9(stream: Stream, api: Api, at: str) -> None:
    """Before: the broker never hears of it. After: it has done it, and the member does not live to know."""
    stream.send()
    lost = stream.inject(Drop if at == "request" else Hold, api, at=at)
    first = stream.start()
    lost.wait(timeout_s=WAIT_S)
    assert stream.app.stop(first, signal.SIGKILL) == -signal.SIGKILL
    lost.lift()
    stream.start()
    stream.arrived()


def test_an_output_under_way_when_its_member_was_killed_comes_too_late(stream: Stream) -> None:
    """EndTxn is held, another instance takes over, and then it is let go."""
    stream.send()
    held = stream.inject(Hold, Api.END_TXN, "a")
    first = stream.start("a")
    held.wait(timeout_s=WAIT_S)
    assert stream.app.stop(first, signal.SIGKILL) == -signal.SIGKILL
    stream.start("b")
    stream.arrived()
    held.lift()
    stream.send()
    stream.arrived()


@pytest.mark.parametrize(
    ("api", "stopped_s"),
    [
        pytest.param(Api.PRODUCE, TRANSACTION_S + 0.5, id="PRODUCE-transaction", marks=pytest.mark.slow),
        pytest.param(Api.PRODUCE, SESSION_S + 2, id="PRODUCE-session"),
        pytest.param(Api.END_TXN, TRANSACTION_S + 0.5, id="END_TXN-transaction"),
        pytest.param(Api.END_TXN, SESSION_S + 2, id="END_TXN-session", marks=pytest.mark.slow),
    ],
)
def test_a_member_that_stood_still_past_a_timeout_goes_on(stream: Stream, api: Api, stopped_s: float) -> None:
    """SIGSTOP in the middle of a transaction, and another member that takes over when the session is over."""
    members = [stream.start("a"), stream.start("b")]
    stream.running(2)
    held = stream.inject(Hold, api, "a")
    stream.send()
    held.wait(timeout_s=WAIT_S)
    members[0].send_signal(signal.SIGSTOP)
    held.lift()
    stream.send()
    time.sleep(stopped_s)
    members[0].send_signal(signal.SIGCONT)
    stream.send()
    stream.arrived()
    assert [0, 0] == [stream.app.stop(member) for member in members], stream.app.log()[-3000:]


@pytest.mark.parametrize("joins", [pytest.param("before", marks=pytest.mark.slow), "in the middle"])
def test_a_member_that_is_removed_during_a_long_batch_commits_nothing_of_it(stream: Stream, joins: str) -> None:
    """It does not poll within `max.poll.interval.ms`, and does not give its partitions up when the other one comes."""
    interval = {"max.poll.interval.ms": int(1000 * SESSION_S), "heartbeat.interval.ms": 500}
    slow = stream.start("a", SLOW, consumer=interval)
    stream.running(1)
    if joins == "before":
        stream.start("b", consumer=interval)
        stream.running(2)
    for partition in (0, 1):  # whichever it has
        stream.app.produce_raw([(b"u", b"SLOW")], partition)
    stream.send()
    if joins == "in the middle":
        stream.start("b", consumer=interval)
    assert ids(stream.app.wait_for_outputs(stream.sent + 2, WAIT_S)) == once(stream.sent)
    stream.logged("transaction aborted", "a")
    stream.send()
    scores = stream.app.wait_for_outputs(stream.sent + 2, WAIT_S)
    assert (once(stream.sent), 2) == (ids(scores), len(stream.app.dead_letters()))
    assert taught_once(scores)
    assert stream.app.stop(slow) == 0, stream.app.log()[-3000:]


def test_an_erased_user_stays_erased_whoever_dies_and_restores(stream: Stream) -> None:
    """The member is killed while the answer to the erasure's commit is under way."""
    erase = {"event_id": "erase", "user_id": "user-1", "event_type": "$erase", "timestamp": 1_700_000_000_000}
    stream.send()
    first = stream.start("a")
    stream.arrived()
    held = stream.inject(Hold, Api.END_TXN, "a", at="response")
    stream.app.produce_raw([(b"user-1", json.dumps(erase).encode())])
    held.wait(timeout_s=WAIT_S)
    assert stream.app.stop(first, signal.SIGKILL) == -signal.SIGKILL
    held.lift()
    stream.start("b")
    before = stream.sent
    stream.send()
    scores = stream.app.wait_for_outputs(stream.sent + 1, WAIT_S)
    receipts = [score for score in scores if score["event_id"] == "erase"]
    assert [True] == [receipt["had_row"] for receipt in receipts]
    scores.remove(receipts[0])
    assert once(stream.sent) == ids(scores)
    user = [(int(s["event_id"][1:]), s["adaptations"]) for s in scores if s["user_id"] == "user-1"]
    old, new = [n for e, n in sorted(user) if e < before], [n for e, n in sorted(user) if e >= before]
    assert (old, new) == ([*range(1, len(old) + 1)], [*range(1, len(new) + 1)])


def test_members_join_and_leave_in_a_loop(stream: Stream) -> None:
    first = stream.start("a")
    stream.running(1)
    for others in (1, 2):
        late = stream.inject(Delay, Api.TXN_OFFSET_COMMIT, "a", seconds=0.5)
        second = stream.start("b")
        stream.send()
        late.wait(timeout_s=WAIT_S)
        stream.running(1 + others)
        late = stream.inject(Delay, Api.TXN_OFFSET_COMMIT, "b", seconds=0.5)
        stream.send()
        late.wait(timeout_s=WAIT_S)
        assert stream.app.stop(second) == 0, stream.app.log()[-3000:]
        stream.arrived()
    assert stream.app.stop(first) == 0, stream.app.log()[-3000:]


def test_sigterm_during_a_commit_finishes_it(stream: Stream) -> None:
    stream.send(100)
    held = stream.inject(Hold, Api.END_TXN)
    member = stream.start()
    held.wait(timeout_s=WAIT_S)
    member.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        member.wait(0.5)
    held.lift()
    assert member.wait(20) == 0, stream.app.log()[-3000:]
    stream.start()
    stream.arrived()


def test_a_second_sigterm_during_a_commit_stops_at_once(stream: Stream) -> None:
    stream.send(100)
    held = stream.proxy.inject(Hold(Match(Api.END_TXN)))
    member = stream.start()
    held.wait(timeout_s=WAIT_S)
    member.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        member.wait(2)
    member.send_signal(signal.SIGTERM)
    assert member.wait(20) == 128 + signal.SIGTERM, stream.app.log()[-3000:]
    held.lift()
    stream.start()
    stream.arrived()


def test_sigterm_during_a_restore_ends_it(stream: Stream) -> None:
    """Its changelog is held open, so that it cannot come to an end by itself."""
    stream.send()
    member = stream.start()
    stream.arrived()
    assert stream.app.stop(member) == 0
    bootstrap = stream.app.broker.bootstrap_servers
    other = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"{stream.app.name}.other"})
    other.init_transactions(30)
    other.begin_transaction()
    for partition in (0, 1):
        other.produce(f"{stream.app.name}.changelog", b"", b"u:x", partition)
    other.flush(10)
    restoring = stream.start("b")
    stream.running(1 + 1)
    assert stream.app.stop(restoring) == 0, stream.app.log()[-3000:]
    other.abort_transaction(30)
    stream.start()
    stream.send()
    stream.arrived()


@pytest.mark.parametrize("api", [Api.JOIN_GROUP, Api.OFFSET_FETCH], ids=lambda api: api.name)
def test_sigterm_during_a_rebalance_leaves_the_group(stream: Stream, api: Api) -> None:
    """While it joins, and while it asks where its partitions stand."""
    stream.start("a")
    stream.running(1)
    held = stream.inject(Hold, api, "b")
    joining = stream.start("b")
    stream.send()
    held.wait(timeout_s=WAIT_S)
    joining.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    held.lift()
    assert joining.wait(30) == 0, stream.app.log()[-3000:]
    stream.app.members.remove(joining)
    stream.send()
    stream.arrived()


def test_a_full_disk_stops_the_member_and_loses_nothing(stream: Stream) -> None:
    """A limit on the size of files stands for a full disk: to the system it is the same call that fails."""
    stream.send()
    limited = stream.start("a", ("/bin/bash", "-c", 'ulimit -f 1024 && exec "$@"', "-", *RUN))
    stream.arrived()
    many = range(stream.sent, stream.sent + 5_000)
    stream.app.produce(event(n, f"user-{n}") for n in many)
    assert limited.wait(WAIT_S) == 3, stream.app.log()[-3000:]
    assert "state.dir=" in stream.app.log()
    stream.sent += len(many)
    stream.app.members.remove(limited)
    stream.start("b")
    stream.arrived()


def test_a_full_local_queue_is_waited_for(stream: Stream) -> None:
    stream.send()
    late = stream.proxy.inject(Delay(Match(Api.PRODUCE, count=2), 0.5))
    stream.start(producer={"queue.buffering.max.messages": 50})
    stream.arrived()
    assert late.hits == 2


def test_an_open_upstream_transaction_is_waited_for(stream: Stream) -> None:
    bootstrap = stream.app.broker.bootstrap_servers
    upstream = Producer({"bootstrap.servers": bootstrap, "transactional.id": f"{stream.app.name}.upstream"})
    upstream.init_transactions(30)
    stream.start()
    stream.send(10)
    stream.arrived()
    upstream.begin_transaction()
    for n in range(stream.sent, stream.sent + 20):
        upstream.produce(f"{stream.app.name}.events", json.dumps(event(n, "ann")), "ann")
    upstream.flush(10)
    time.sleep(1)
    assert ids(stream.app.scores()) == once(stream.sent)
    upstream.commit_transaction(30)
    stream.sent += 20
    stream.arrived()


def test_a_hot_user_is_one_user_among_others(stream: Stream) -> None:
    stream.start()
    users = ("hot" if n % 10 else f"user-{n}" for n in range(3 * COUNT))
    stream.app.produce(event(n, user) for n, user in enumerate(users))
    stream.sent = 3 * COUNT
    stream.arrived()
    adapted = Counter(score["user_id"] for score in stream.app.scores())
    assert (adapted["hot"], adapted["user-10"]) == (2.7 * COUNT, 1)


# To the broker.


@pytest.mark.slow
def test_a_broker_that_is_down_for_a_minute_is_survived(tmp_path: Path) -> None:
    """Longer than every time-out. Whoever ends in the meantime says why, and is started again, as a supervisor does."""
    with embedded_behind_proxy(tmp_path / "kafka", properties=IMPATIENT) as behind:
        broker = RunningBroker(behind.kafka.bootstrap_servers, "embedded", behind.proxy)
        app = App(f"app-{uuid.uuid4().hex[:8]}", broker, tmp_path, 2)
        random_model(app.folder / "models", LearnerSpec(feedback=STARS), ITEMS)
        create_topics({"bootstrap.servers": broker.bootstrap_servers}, product_topics(app.name, 2, 1))
        stream = Stream(app, behind.proxy)
        try:
            member = stream.start()
            stream.send()
            stream.arrived()
            in_commit = stream.inject(Hold, Api.END_TXN)
            stream.send()
            in_commit.wait(timeout_s=WAIT_S)
            behind.kafka.kill()
            in_commit.lift()
            time.sleep(60)
            behind.kafka.start()
            if member.poll() is not None:
                assert member.returncode == 3, app.log()[-3000:]
                stream.start()
            stream.send()
            stream.arrived()
        finally:
            app.end()


# To topics and groups.


def test_a_committed_offset_that_retention_has_passed_is_refused(stream: Stream) -> None:
    stream.send()
    member = stream.start()
    stream.arrived()
    assert stream.app.stop(member) == 0
    stream.send()
    admin = AdminClient({"bootstrap.servers": stream.app.broker.bootstrap_servers})
    ends = [TopicPartition(f"{stream.app.name}.events", p, -1) for p in range(2)]
    for deleted in admin.delete_records(ends).values():
        deleted.result()
    again = stream.start()
    assert again.wait(WAIT_S) == 3
    assert "offsets are gone before they were read" in stream.app.log()
    assert "state accept-offset -c FILE --use group" in stream.app.log()


def test_partitions_that_were_added_are_refused(stream: Stream) -> None:
    """Users have moved to other partitions, and their rows have not: by who runs on, and by who starts anew."""
    running = stream.start(consumer={"topic.metadata.refresh.interval.ms": 1000})
    stream.send()
    stream.arrived()
    admin = AdminClient({"bootstrap.servers": stream.app.broker.bootstrap_servers})
    for added in admin.create_partitions([NewPartitions(f"{stream.app.name}.events", 4)]).values():
        added.result()
    assert running.wait(WAIT_S) == 3, stream.app.log()[-3000:]
    assert "users have moved to other shards and their rows have not" in stream.app.log()
    again = stream.start("b")
    assert again.wait(WAIT_S) == 3
    assert 2 == stream.app.log().count("users have moved to other shards and their rows have not")


def test_a_dead_letter_topic_that_disappears_stops_the_stream_and_drops_nothing(stream: Stream) -> None:
    stream.start()
    stream.send(50)
    stream.arrived()
    admin = AdminClient({"bootstrap.servers": stream.app.broker.bootstrap_servers})
    for deleted in admin.delete_topics([f"{stream.app.name}.dead-letters"], operation_timeout=30).values():
        deleted.result()
    stream.app.produce_raw([(b"u", b"nope")], partition=0)
    stream.app.produce_raw([(b"u", json.dumps(event(50, "u")).encode())], partition=0)
    deadline = time.monotonic() + WAIT_S
    while "dead-letters" not in stream.app.log().split("transaction aborted", 1)[-1]:
        assert time.monotonic() < deadline, stream.app.log()[-3000:]
        time.sleep(0.2)
    assert ids(stream.app.scores()) == once(50)
    specs = [spec for spec in product_topics(stream.app.name, 2, 1) if spec.name.endswith(".dead-letters")]
    create_topics({"bootstrap.servers": stream.app.broker.bootstrap_servers}, specs)
    assert ids(stream.app.wait_for_outputs(52, WAIT_S)) == once(51)
    assert len(stream.app.dead_letters()) == 1


# To the metrics.


def test_a_hundred_scrapes_at_once_are_answered_and_disturb_nothing(stream: Stream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = stream.config()
    path.write_text(path.read_text().replace("port: 0", f"port: {port}"))
    stream.app.start(config=path)
    stream.send()
    stream.arrived()
    feeding = threading.Thread(target=stream.send, args=(5_000,))
    feeding.start()

    def scrape(_: int) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return bytes(answer.read())

    with ThreadPoolExecutor(100) as scrapers:
        pages = list(scrapers.map(scrape, range(100)))
    assert all(b"stream_adapt_events_total" in page for page in pages)
    feeding.join()
    stream.arrived()


def test_a_metrics_port_that_is_taken_is_refused_before_anything_is_read(stream: Stream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = stream.config()
        path.write_text(path.read_text().replace("port: 0", f"port: {taken.getsockname()[1]}"))
        assert stream.app.start(config=path).wait(WAIT_S) == 2
    assert "metrics.port" in stream.app.log()

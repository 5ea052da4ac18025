"""Faults on a real broker: whatever happens to members, connections and topics, every event has one output.

`tests/faults.py` lists all faults with where each is tested. Those between client and broker are injected while one
member runs on and on; it has to come through all of them.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broker_app import ITEMS, RUN, STARS, App, event
from confluent_kafka import KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions

from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.kafka.topics import create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.record import Outputs
from stream_adapt.testing.broker import IMPATIENT, RunningBroker, TopicFactory, read_all
from stream_adapt.testing.model import random_model
from stream_adapt.testing.proxy import (
    Api,
    Close,
    Cut,
    Delay,
    Drop,
    Fail,
    Fault,
    FaultProxy,
    HalfOpen,
    Hold,
    Injected,
    Match,
    Refuse,
    Trickle,
    embedded_behind_proxy,
)

pytestmark = pytest.mark.broker

SESSION_S, TRANSACTION_S, SOCKET_S = 4.0, 3.0, 2.0
SLOW = (sys.executable, str(Path(__file__).with_name("slow_member.py")), "run")
#: For whatever should happen soon; a machine that does much else at the same time takes long.
WAIT_S = 120.0
#: Events before and while something goes wrong.
COUNT = 600


def ids(scores: list[dict[str, Any]]) -> Counter[str]:
    return Counter(score["event_id"] for score in scores)


def once(count: int) -> Counter[str]:
    return Counter(f"e{n}" for n in range(count))


def taught_once(scores: list[dict[str, Any]]) -> bool:
    """Whether every user's row has learned from each of the user's events, and from each once."""
    by_user: dict[str, list[int]] = {}
    for score in scores:
        by_user.setdefault(score["user_id"], []).append(score["adaptations"])
    return all(sorted(found) == list(range(1, len(found) + 1)) for found in by_user.values())


def _has_partitions(log: str) -> bool:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    return re.search(r"partitions assigned +partitions=\[\d", plain) is not None


@dataclass
class Stream:
    """An application whose members reach the broker through the proxy, and what has been sent to it."""

    app: App
    proxy: FaultProxy
    sent: int = 0

    def config(self, instance: str = "0", **kafka: Any) -> Any:
        """A member's configuration: every time-out short."""
        settings = {
            "bootstrap_servers": self.proxy.address,
            "session_timeout_ms": int(1000 * SESSION_S),
            "transaction_timeout_ms": int(1000 * TRANSACTION_S),
            "properties": {
                "socket.timeout.ms": int(1000 * SOCKET_S),
                "reconnect.backoff.max.ms": 500,
            },
            "consumer": {"heartbeat.interval.ms": 500},
            **kafka,
        }
        return self.app.config(instance, kafka=settings, input={"max_batch": 200, "latency_ms": 20})

    def start(self, instance: str = "0", command: Sequence[str] = RUN, **kafka: Any) -> subprocess.Popen[bytes]:
        return self.app.start(config=self.config(instance, **kafka), command=command)

    def running(self, members: int) -> None:
        """Waits until so many members have partitions."""
        deadline = time.monotonic() + WAIT_S
        while sum(_has_partitions(path.read_text()) for path in self.app.folder.glob("*.log")) < members:
            assert time.monotonic() < deadline, self.app.log()[-3000:]
            time.sleep(0.1)

    def send(self, count: int = COUNT) -> None:
        self.app.produce(event(n) for n in range(self.sent, self.sent + count))
        self.sent += count

    def inject(self, fault: type[Fault] | Any, api: Api, instance: str = "*", **options: Any) -> Injected:
        """A fault for the next request of one kind that a member of this application sends."""
        return self.proxy.inject(fault(Match(api, f"{self.app.name}.{instance}", count=1), **options))

    def arrived(self, timeout_s: float = WAIT_S) -> None:
        """Every event that was sent has exactly one score, and has taught its user's row exactly once."""
        scores = self.app.wait_for_outputs(self.sent, timeout_s)
        assert ids(scores) == once(self.sent)
        assert taught_once(scores)

    def logged(self, words: str, instance: str) -> None:
        """Waits until a member has logged this."""
        deadline = time.monotonic() + WAIT_S
        while not any(words in path.read_text() for path in self.app.folder.glob(f"{instance}-*.log")):
            assert time.monotonic() < deadline, self.app.log()[-3000:]
            time.sleep(0.1)


@pytest.fixture
def stream(make_app: Callable[..., App], fault_proxy: FaultProxy) -> Stream:
    """An application with two partitions and no member yet."""
    return Stream(make_app(partitions=2), fault_proxy)


@pytest.fixture(scope="module")
def _endless(kafka_broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    if kafka_broker.proxy is None:
        pytest.skip(f"only the embedded broker advertises a proxy's address, and this one is {kafka_broker.kind}")
    app = App(f"app-{uuid.uuid4().hex[:8]}", kafka_broker, tmp_path_factory.mktemp("endless"), 2)
    random_model(app.folder / "models", LearnerSpec(feedback=STARS), ITEMS)
    create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, product_topics(app.name, 2, 1))
    stream = Stream(app, kafka_broker.proxy)
    stream.start()
    stream.send()
    stream.arrived()
    yield stream
    app.end()


@pytest.fixture
def endless(_endless: Stream, fault_proxy: FaultProxy) -> Stream:
    """An application whose one member has come through all faults so far, and has scored all that was sent."""
    assert _endless.app.members[0].poll() is None, _endless.app.log()[-3000:]
    return _endless


# Between client and broker.

#: Name → fault, and how long it lasts after it first did something.
CONNECTIONS: dict[str, tuple[Fault, float]] = {
    "EndTxn lost": (Drop(Match(Api.END_TXN, count=1)), 0),
    "EndTxn answer lost": (Drop(Match(Api.END_TXN, count=1), "response"), 0),
    "EndTxn answered by closing": (Close(Match(Api.END_TXN, count=1), "response"), 0),
    "EndTxn delayed into the next transaction": (Delay(Match(Api.END_TXN, count=1), SOCKET_S + 0.5), SOCKET_S + 1),
    "EndTxn held past the transaction timeout": (Hold(Match(Api.END_TXN)), TRANSACTION_S + 2),
    "commit done but answered with a time-out": (
        Fail(Match(Api.END_TXN, count=1), KafkaError.REQUEST_TIMED_OUT, "response"),
        0,
    ),
    "commit answered as fenced": (Fail(Match(Api.END_TXN, count=1), KafkaError.INVALID_PRODUCER_EPOCH), 0),
    "transaction aborted by the broker": (Fail(Match(Api.PRODUCE, count=1), KafkaError.TRANSACTION_ABORTABLE), 0),
    "offsets lost": (Drop(Match(Api.TXN_OFFSET_COMMIT, count=1)), 0),
    "offsets' answer lost": (Drop(Match(Api.TXN_OFFSET_COMMIT, count=1), "response"), 0),
    "offsets of an old generation": (Fail(Match(Api.TXN_OFFSET_COMMIT, count=1), KafkaError.ILLEGAL_GENERATION), 0),
    "coordinator moves": (Fail(Match(Api.TXN_OFFSET_COMMIT, count=3), KafkaError.NOT_COORDINATOR), 0),
    "coordinator disconnects": (Close(Match(Api.END_TXN, count=2), reset=True), 0),
    "records' answer lost": (Drop(Match(Api.PRODUCE, count=1), "response"), 0),
    "records late past the transaction timeout": (Hold(Match(Api.PRODUCE)), TRANSACTION_S + 2),
    "fetch answers late": (Delay(Match(Api.FETCH, count=3), 1.0, "response"), 0),
    "heartbeats lost past the session timeout": (Drop(Match(Api.HEARTBEAT)), SESSION_S + 1),
    "offsets late past the session timeout": (Hold(Match(Api.TXN_OFFSET_COMMIT)), SESSION_S + 2),
    "connections cut": (Cut(), 0),
    "connections reset": (Cut(reset=True), 0),
    "connections half-open": (HalfOpen(), 1),
    "broker out of reach": (HalfOpen(new_too=True), SOCKET_S + 2),
    "one byte a second": (Trickle(bytes_per_s=1), 4),
    "connections refused": (Refuse(), 0),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_a_fault_on_the_way_to_the_broker_is_survived(endless: Stream, name: str) -> None:
    fault, lasts_s = CONNECTIONS[name]
    injected = endless.proxy.inject(fault)
    if isinstance(fault, Refuse):
        endless.proxy.inject(Cut())
    endless.send()
    injected.wait()
    time.sleep(lasts_s)
    injected.lift()
    endless.arrived()


def test_a_late_end_of_a_transaction_does_not_meet_the_next_one(
    fault_proxy: FaultProxy, topic_factory: TopicFactory, kafka_broker: RunningBroker
) -> None:
    """Rule 8: the late copy of an EndTxn would commit what the next transaction has sent so far."""
    topic, name = topic_factory(), f"late-{uuid.uuid4()}"
    settings = {"bootstrap.servers": fault_proxy.address, "socket.timeout.ms": 2_000, "transaction.timeout.ms": 60_000}

    def build() -> OutputProducer:
        return OutputProducer(settings, transactional_id=name, socket_timeout_s=2, deadline_s=30)

    def visible() -> list[object]:
        return [message.value() for message in read_all(kafka_broker.bootstrap_servers, topic)]

    producer = build()
    late = fault_proxy.inject(Hold(Match(Api.END_TXN, count=1)))
    producer.begin()
    producer.send(Outputs(topic, [None], [b"first"], None, [0], [0]))
    producer.commit()  # by the second copy
    if producer.needs_replacement:
        producer = build()
    producer.begin()
    producer.send(Outputs(topic, [None], [b"second"], None, [0], [1]))
    producer.flush()
    late.lift()
    time.sleep(1)
    assert [b"first"] == visible()
    producer.commit()
    assert [b"first", b"second"] == visible()


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

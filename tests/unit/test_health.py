"""Health: what each state means, how states follow from what the loop does, and what the port answers."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from stream_adapt import health as health_module
from stream_adapt.commit import Outcome
from stream_adapt.errors import ConfigError
from stream_adapt.follow import Standing
from stream_adapt.health import Health, HealthServer, Seen, Shard, State, judge
from stream_adapt.runner import Observer
from stream_adapt.state.row import ControlRow

STALLED_AFTER_S = 30.0
NOW = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class FakeConsumer:
    """A member of a group: its lag, and its generation (−1: it has not joined)."""

    def __init__(self) -> None:
        self.lags: dict[int, int] = {}
        self.generation = -1

    def lag(self) -> dict[int, int]:
        return self.lags

    def group_metadata(self) -> bytes:
        return b"CGMDv2:" + self.generation.to_bytes(4, "little", signed=True) + b"group\0member\0"


class Loop:
    """Does to a `Health` what the loop would do, a turn a second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.health = Health(stalled_after_s=STALLED_AFTER_S, model_version="v1", clock=self.clock)
        self.consumer = FakeConsumer()
        self.offsets: dict[int, int] = {}

    def turn(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        shards = {p: ControlRow(p, offset, "v1", "topic-id") for p, offset in self.offsets.items()}
        self.health.tick(self.consumer, shards)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def commit(self, partition: int, records: int) -> None:
        self.offsets[partition] += records
        self.health.committed(None, Outcome.COMMITTED)  # type: ignore[arg-type] # it looks at the fact alone

    def join(self, *partitions: int) -> None:
        self.consumer.generation = 1
        if partitions:
            self.offsets.update(dict.fromkeys(partitions, 0))
            self.health.rebalanced("assigned", partitions)

    def lose(self, *partitions: int) -> None:
        for partition in partitions:
            del self.offsets[partition]
        self.health.rebalanced("revoked", partitions)

    def state(self) -> State:
        return State(self.health.report()["state"])


@pytest.fixture
def loop() -> Loop:
    return Loop()


# What each state means

SHARD = Shard(next_offset=7, lag=0, model_version="v1", waiting_since_s=NOW)
OLD = NOW - STALLED_AFTER_S
JOINED = Seen(ticked_s=NOW, joined=True)
OWNER = replace(JOINED, shards={0: SHARD, 3: SHARD})
LACKING = Standing("v1", "v2", "missing", "models/v2/manifest.json: not there")
REFUSED = Standing("v1", "v2", "damaged", "its SHA-256 is another")

VERDICTS = [
    (Seen(ticked_s=NOW), State.STARTING, False, "not joined"),
    (JOINED, State.STANDBY, True, "other members own all partitions"),
    (
        replace(JOINED, restoring={2: 900, 1: 7}),
        State.RESTORING,
        False,
        "partition 1: 7 records to go, partition 2: 900",
    ),
    (replace(OWNER, restoring={2: 0}), State.RESTORING, False, "partition 2: 0 records to go"),
    (replace(OWNER, shards={0: SHARD, 3: replace(SHARD, lag=None)}), State.ASSIGNED, True, "not all their ends"),
    (OWNER, State.IDLE, True, "every record is done"),
    (replace(OWNER, shards={0: SHARD, 3: replace(SHARD, waiting_since_s=OLD)}), State.IDLE, True, "every record"),
    (replace(OWNER, shards={0: SHARD, 3: replace(SHARD, lag=9)}), State.PROGRESSING, True, "9 records behind"),
    (
        replace(OWNER, shards={0: replace(SHARD, lag=2), 3: replace(SHARD, lag=9, waiting_since_s=OLD)}),
        State.NOT_PROGRESSING,
        False,
        "partition 3: 9 records behind, and nothing committed for 30 s",
    ),
    (
        replace(OWNER, shards={3: replace(SHARD, lag=None, waiting_since_s=OLD)}),
        State.NOT_PROGRESSING,
        False,
        "partition 3: its end has not been seen for 30 s",
    ),
    (
        replace(OWNER, standing=LACKING),
        State.OUTDATED,
        False,
        "serves v1; v2 is announced: models/v2/manifest.json: not there",
    ),
    (replace(JOINED, standing=LACKING), State.OUTDATED, False, "serves v1; v2 is announced"),
    (replace(OWNER, standing=REFUSED), State.IDLE, True, "every record"),
    (
        replace(OWNER, standing=REFUSED, waiting={7: "v2"}),
        State.OUTDATED,
        False,
        "serves v1; rows wait for a later model: partition 7 of v2: its SHA-256 is another",
    ),
    (replace(OWNER, aborts_in_a_row=2), State.IDLE, True, "every record"),
    (replace(OWNER, aborts_in_a_row=3), State.ABORTING, False, "3 transactions in a row were aborted"),
    (replace(OWNER, unreachable_s=4.9), State.IDLE, True, "every record"),
    (replace(OWNER, unreachable_s=5.0, aborts_in_a_row=3), State.UNREACHABLE, False, "no broker has been connected"),
    (replace(OWNER, ticked_s=OLD), State.STALLED, False, "not turned for 30 s"),
    (replace(OWNER, ticked_s=OLD, unreachable_s=31.0), State.STALLED, False, "no broker has been connected for 31 s"),
    (replace(JOINED, ticked_s=OLD), State.STALLED, False, "not turned for 30 s"),
]


@pytest.mark.parametrize(("seen", "state", "ready", "reason"), VERDICTS, ids=lambda v: getattr(v, "value", None))
def test_what_is_seen_means(seen: Seen, state: State, ready: bool, reason: str) -> None:
    verdict = judge(seen, NOW, STALLED_AFTER_S)

    assert (state, ready) == (verdict.state, verdict.ready)
    assert reason in verdict.reason


def test_every_state_has_its_line_in_the_table() -> None:
    assert set(State) == {state for _, state, _, _ in VERDICTS}


def test_a_report_says_which_model_is_served_and_which_one_is_not(loop: Loop) -> None:
    loop.health.following(REFUSED, {})
    told = loop.health.report()
    assert ("v1", "v2", "its SHA-256 is another") == tuple(
        told[key] for key in ("model_version", "announced_version", "model_problem")
    )
    loop.health.following(Standing("v2"), {})
    assert ("v2", None) == (loop.health.report()["announced_version"], loop.health.report()["model_problem"])


# How states follow from what the loop does


def test_it_is_an_observer_of_the_loop(loop: Loop) -> None:
    observer: Observer = loop.health

    assert observer is loop.health


def test_from_the_start_to_idle_to_a_stall_and_back(loop: Loop) -> None:
    assert loop.state() is State.STARTING
    loop.turn()
    assert loop.state() is State.STARTING

    loop.join(0, 1)
    loop.turn()
    assert loop.state() is State.ASSIGNED

    loop.consumer.lags = {0: 0, 1: 0}
    loop.turns(100)
    assert loop.state() is State.IDLE

    loop.consumer.lags = {0: 0, 1: 40}
    loop.turns(29)
    assert loop.state() is State.PROGRESSING
    loop.turns(2)
    assert loop.state() is State.NOT_PROGRESSING

    loop.commit(1, 10)
    loop.turn()
    assert loop.state() is State.PROGRESSING


def test_a_steady_lag_is_progress_while_offsets_advance(loop: Loop) -> None:
    loop.join(0)
    loop.consumer.lags = {0: 500}
    for _ in range(100):
        loop.commit(0, 1)
        loop.turn()

    assert loop.state() is State.PROGRESSING


def test_progress_of_one_partition_does_not_hide_that_another_stands_still(loop: Loop) -> None:
    loop.join(0, 1)
    loop.consumer.lags = {0: 500, 1: 500}
    for _ in range(32):
        loop.commit(0, 1)
        loop.turn()

    report = loop.health.report()

    assert report["state"] == "not_progressing"
    assert "partition 1" in report["reason"]
    assert "partition 0" not in report["reason"]


def test_a_member_without_partitions_is_a_standby_once_it_has_joined(loop: Loop) -> None:
    loop.turns(2)
    assert loop.state() is State.STARTING

    loop.join()
    loop.turn()
    assert loop.state() is State.STANDBY


def test_partitions_that_were_revoked_are_gone_at_once(loop: Loop) -> None:
    loop.join(0, 1)
    loop.turn()
    loop.lose(1)
    assert [shard["partition"] for shard in loop.health.report()["partitions"]] == [0]

    loop.lose(0)
    loop.turn()
    assert loop.state() is State.STANDBY


def test_a_partition_that_comes_back_starts_with_new_patience(loop: Loop) -> None:
    loop.join(0)
    loop.consumer.lags = {0: 5}
    loop.turns(32)
    assert loop.state() is State.NOT_PROGRESSING

    loop.lose(0)
    loop.join(0)
    loop.turn()

    assert loop.state() is State.PROGRESSING


def test_repeated_aborts_show_until_the_next_commit(loop: Loop) -> None:
    loop.join(0)
    loop.consumer.lags = {0: 1}
    for _ in range(3):
        loop.health.aborted()
    loop.turn()
    assert loop.state() is State.ABORTING

    loop.commit(0, 1)
    loop.consumer.lags = {0: 0}
    loop.turn()
    assert loop.state() is State.IDLE


def test_alive_is_the_loops_turn_and_not_lag(loop: Loop) -> None:
    loop.join(0)
    loop.consumer.lags = {0: 1000}
    loop.turns(100)
    assert loop.health.alive()

    loop.clock.now += STALLED_AFTER_S
    assert not loop.health.alive()
    assert loop.state() is State.STALLED

    loop.turn()
    assert loop.health.alive()


# What the port answers


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("asked", "A metric.", registry=registry).inc(3)
    return registry


@pytest.fixture
def server(loop: Loop, registry: CollectorRegistry) -> Iterator[HealthServer]:
    with HealthServer(registry, loop.health, host="127.0.0.1", port=0) as server:
        yield server


def get(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Status, content type, body."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers["Content-Type"], refused.read().decode()


def test_metrics_are_the_registrys(server: HealthServer) -> None:
    status, content_type, body = get(server, "/metrics")

    samples = {s.name: s.value for family in text_string_to_metric_families(body) for s in family.samples}

    assert (status, samples["asked_total"]) == (200, 3.0)
    assert content_type.startswith("text/plain; version=")


def test_healthz_is_200_while_the_loop_turns(server: HealthServer, loop: Loop) -> None:
    assert get(server, "/healthz")[::2] == (200, "alive\n")

    loop.clock.now += STALLED_AFTER_S

    assert get(server, "/healthz")[::2] == (503, "stalled\n")


def test_readyz_says_state_reason_and_positions(server: HealthServer, loop: Loop) -> None:
    status, content_type, body = get(server, "/readyz")
    assert (status, content_type, json.loads(body)["state"]) == (503, "application/json", "starting")

    loop.join(0, 1)
    loop.offsets[1] = 41
    loop.consumer.lags = {1: 2}
    loop.turn()
    status, _, body = get(server, "/readyz")

    assert status == 200
    assert json.loads(body) == {
        "state": "progressing",
        "ready": True,
        "reason": "2 records behind, and advancing",
        "model_version": "v1",
        "announced_version": "v1",
        "model_problem": None,
        "last_turn_s": 0.0,
        "unreachable_s": 0.0,
        "aborts_in_a_row": 0,
        "partitions": [
            {"partition": 0, "next_offset": 0, "lag": None, "model_version": "v1"},
            {"partition": 1, "next_offset": 41, "lag": 2, "model_version": "v1"},
        ],
        "restoring": [],
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metricsx", 404), ("POST", "/readyz", 405), ("DELETE", "/metrics", 405)],
)
def test_anything_else_is_refused(server: HealthServer, method: str, path: str, status: int) -> None:
    assert status == get(server, path, method)[0]


def test_a_port_that_is_taken_is_a_configuration_error_that_says_what_to_do(
    server: HealthServer, loop: Loop, registry: CollectorRegistry
) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.port={server.port}: .*in use.*set metrics\.port") as refused:
        HealthServer(registry, loop.health, host="127.0.0.1", port=server.port)

    assert refused.value.exit_code == 2


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_ours_is_one_too(loop: Loop, registry: CollectorRegistry, host: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"metrics.host={host!r}")):
        HealthServer(registry, loop.health, host=host, port=0)


def test_a_hundred_scrapes_at_once_are_all_answered(server: HealthServer) -> None:
    together = threading.Barrier(100)

    def scrape(_: int) -> int:
        together.wait(timeout=30)
        return get(server, "/metrics")[0]

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(scrape, range(100))) == [200] * 100


def test_requests_that_hang_hold_up_neither_the_loop_nor_more_threads_than_allowed(
    server: HealthServer, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = threading.Semaphore(0), health_module._MOST_THREADS
    go_on, counted, now, peak = threading.Event(), threading.Lock(), 0, 0

    def hanging() -> bool:
        nonlocal now, peak
        with counted:
            now += 1
            peak = max(peak, now)
        running.release()
        go_on.wait(timeout=30)
        with counted:
            now -= 1
        return True

    monkeypatch.setattr(loop.health, "alive", hanging)
    with ThreadPoolExecutor(2 * most) as pool:
        answers = [pool.submit(get, server, "/healthz") for _ in range(2 * most)]
        for _ in range(most):
            assert running.acquire(timeout=30)
        loop.join(0)
        loop.turns(5)
        assert loop.state() is State.ASSIGNED
        go_on.set()

        assert [200] * (2 * most) == [answer.result()[0] for answer in answers]
    assert peak == most


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(server: HealthServer) -> None:
    for said in (b"", b"GET /met", b"no http at all\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(said)

    assert get(server, "/metrics")[0] == 200


def test_after_stop_the_port_is_free_and_no_thread_is_left(loop: Loop, registry: CollectorRegistry) -> None:
    server = HealthServer(registry, loop.health, host="127.0.0.1", port=0)
    server.start()
    get(server, "/healthz")
    server.stop()
    server.stop()

    assert "health" not in {thread.name for thread in threading.enumerate()}
    again = HealthServer(registry, loop.health, host="127.0.0.1", port=server.port)
    again.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_an_address_with_a_colon_is_ipv6(loop: Loop, registry: CollectorRegistry) -> None:
    try:
        server = HealthServer(registry, loop.health, host="::1", port=0)
    except ConfigError as refused:
        pytest.skip(f"this machine has no IPv6 loopback: {refused}")
    with server, urllib.request.urlopen(f"http://[::1]:{server.port}/healthz", timeout=30) as answer:
        assert answer.status == 200


def test_reports_are_consistent_while_the_loop_goes_on(loop: Loop) -> None:
    done = threading.Event()

    def read(report: Callable[[], dict[str, object]]) -> set[bool]:
        seen: set[bool] = set()
        while not done.is_set() or not seen:
            found = report()
            seen.add(found["ready"] == (found["state"] in {"standby", "assigned", "progressing", "idle"}))
        return seen

    with ThreadPoolExecutor(1) as pool:
        consistent = pool.submit(read, loop.health.report)
        for _ in range(200):
            loop.join(0, 1)
            loop.turn()
            loop.lose(0, 1)
            loop.turn()
        done.set()
        assert consistent.result() == {True}

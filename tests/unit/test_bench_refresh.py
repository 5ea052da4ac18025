"""What `bench refresh` makes of its measurements."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stream_adapt.bench_refresh import Phase, PollWatch, Rounds, ready
from stream_adapt.bench_traffic import Arrivals, Latencies, Unmeasured, latencies, per_second, sample_events


def phase(p99_ms: float | None = None, per_s: float | None = None) -> Phase:
    return Phase(Latencies(10, 1.0, p99_ms) if p99_ms is not None else None, per_s)


def test_a_backlogs_rate_leaves_out_what_was_done_before_the_watch_started() -> None:
    assert 300.0 == per_second(Arrivals([10.0, 11.0, 12.0], [5_000, 200, 400]))


@pytest.mark.parametrize("arrivals", [Arrivals([], []), Arrivals([1.0], [9]), Arrivals([1.0, 1.0], [9, 9])])
def test_a_backlog_that_was_over_at_once_has_no_rate(arrivals: Arrivals) -> None:
    with pytest.raises(Unmeasured, match="--burst"):
        per_second(arrivals)


def test_latencies_are_percentiles() -> None:
    assert Latencies(101, 50.0, 99.0) == latencies([float(n) for n in range(101)])
    with pytest.raises(Unmeasured):
        latencies([])


def test_each_phase_is_compared_with_the_calm_one_of_its_round() -> None:
    rounds = Rounds()
    rounds.phases["calm"] = [phase(100, 1_000), phase(200, 2_000), phase(50, 500)]
    rounds.phases["training"] = [phase(110, 800), phase(), phase(100, 450)]
    assert [1.1, 2.0] == rounds.ratios("training", lambda p: p.steady and p.steady.p99_ms)
    assert [0.8, 0.9] == rounds.ratios("training", lambda p: p.per_s)
    assert {"calm": 1_000.0, "training": 625.0} == rounds.medians(lambda p: p.per_s)


def test_a_phase_that_no_round_has_is_told_with_what_was_noted() -> None:
    rounds = Rounds(notes=["round 1: nothing was promoted"])
    rounds.phases["calm"], rounds.phases["after_swap"] = [phase(100, 1_000)], [phase()]
    with pytest.raises(Unmeasured, match="after_swap: round 1: nothing was promoted"):
        rounds.ratios("after_swap", lambda p: p.per_s)


def test_events_of_the_traffic_carry_what_the_model_reads() -> None:
    for event in sample_events(20):
        assert {"category", "tags", "price"} == event.features.keys()


class _Ready(BaseHTTPRequestHandler):
    """A member that has not turned for a second and a half."""

    def do_GET(self) -> None:
        body = json.dumps({"last_turn_s": 1.5, "path": self.path}).encode()
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def member() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Ready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_longest_time_without_a_poll_is_what_members_say_and_what_may_follow_a_look(member: int) -> None:
    told = ready(member)
    assert told is not None
    assert "/readyz" == told["path"]
    watch = PollWatch()
    watch.add(member)
    seen = threading.Event()
    while not watch.longest_s:
        seen.wait(0.05)
    watch.close()
    assert 1.7 == pytest.approx(watch.longest_s)
    assert ready(1) is None

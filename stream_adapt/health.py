"""Health: is the loop alive, is it ready, and why not; with the metrics, on one small HTTP port.

    /healthz   200 while the loop turns: a reason to restart it, if not. Lag is none.
    /readyz    200 while this member does its part: JSON with state, reason and every partition's position.
    /metrics   everything in `metrics.FAMILIES`

The loop's thread replaces one immutable value, `Seen`; whoever asks judges the newest one. Nothing is locked, and no
request can hold up the loop.

    starting ─▶ standby | restoring ─▶ assigned ─▶ progressing ⇄ idle        ready, but for starting and restoring
                  any ─▶ stalled | unreachable | aborting | not_progressing | outdated     not ready
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec
import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from stream_adapt.commit import Outcome
from stream_adapt.errors import ConfigError
from stream_adapt.follow import Standing
from stream_adapt.kafka.consumer import generation
from stream_adapt.metrics import SAMPLE_PERIOD_S
from stream_adapt.record import Work
from stream_adapt.restore import Slice
from stream_adapt.state.row import ControlRow

log = structlog.get_logger(__name__)

#: So many aborts in a row are no accident any more.
REPEATED_ABORTS = 3
#: Without any broker for so long is no hiccup any more: a connection that breaks is back within a second.
UNREACHABLE_AFTER_S = 5.0
#: Requests answered at the same time; others wait in the kernel's queue.
_MOST_THREADS = 8
_WAITING = 128
#: A client that sends or reads nothing for so long is dropped.
_REQUEST_TIMEOUT_S = 5.0


class State(Enum):
    """What a member is doing, as /readyz says it."""

    STARTING = "starting"  # not in the group yet
    STANDBY = "standby"  # in the group, and the others own all partitions
    RESTORING = "restoring"  # rows of some partitions are still being read
    OUTDATED = "outdated"  # lacks the model that is announced, or that rows are of
    ASSIGNED = "assigned"  # owns partitions; their ends have not been seen yet
    PROGRESSING = "progressing"  # behind, and advancing
    IDLE = "idle"  # nothing to do
    ABORTING = "aborting"  # every transaction is aborted
    NOT_PROGRESSING = "not_progressing"  # behind, and not advancing
    UNREACHABLE = "unreachable"  # no broker is connected
    STALLED = "stalled"  # the loop does not turn


_READY = {State.STANDBY, State.ASSIGNED, State.PROGRESSING, State.IDLE}


@dataclass(frozen=True, slots=True)
class Shard:
    """An owned partition, as last seen."""

    next_offset: int
    lag: int | None  # None: its end has not been seen yet
    model_version: str
    waiting_since_s: float  # since then its next offset has been the same, and it is not known to be at its end


@dataclass(frozen=True, slots=True)
class Seen:
    """All that is known of the loop. Times are seconds of the clock of `Health`."""

    ticked_s: float
    joined: bool = False
    aborts_in_a_row: int = 0
    shards: Mapping[int, Shard] = field(default_factory=dict)
    restoring: Mapping[int, int] = field(default_factory=dict)  # offsets of the changelog to go
    standing: Standing = field(default_factory=lambda: Standing(""))
    waiting: Mapping[int, str] = field(default_factory=dict)  # by partition: model that its rows are of
    unreachable_s: float = 0.0  # since when no broker is connected


@dataclass(frozen=True, slots=True)
class Verdict:
    """A state and, in a sentence, why."""

    state: State
    reason: str

    @property
    def ready(self) -> bool:
        """Whether this member does its part."""
        return self.state in _READY


def judge(seen: Seen, now_s: float, stalled_after_s: float) -> Verdict:
    """What `seen` means at `now_s`: the first that applies, worst first."""
    silent_s = now_s - seen.ticked_s
    away = f"no broker has been connected for {seen.unreachable_s:.0f} s: the log says why"
    is_away = seen.unreachable_s >= UNREACHABLE_AFTER_S
    if silent_s >= stalled_after_s:
        because = f"; {away}" if is_away else ""
        return Verdict(State.STALLED, f"the loop has not turned for {silent_s:.0f} s{because}")
    if is_away:
        return Verdict(State.UNREACHABLE, away)
    if not seen.shards and seen.restoring:
        return _judge_restore(seen)
    outdated = _judge_model(seen)
    if not seen.shards:
        return outdated or _judge_membership(seen)
    if seen.aborts_in_a_row >= REPEATED_ABORTS:
        return Verdict(State.ABORTING, f"{seen.aborts_in_a_row} transactions in a row were aborted; the log says why")
    stuck = {p: s for p, s in seen.shards.items() if s.lag != 0 and now_s - s.waiting_since_s >= stalled_after_s}
    if stuck:
        return Verdict(State.NOT_PROGRESSING, "; ".join(_why_stuck(p, s, now_s) for p, s in sorted(stuck.items())))
    if seen.restoring:
        return _judge_restore(seen)
    if outdated is not None:
        return outdated
    lags = [shard.lag for shard in seen.shards.values()]
    if any(lags):
        return Verdict(State.PROGRESSING, f"{sum(lag or 0 for lag in lags)} records behind, and advancing")
    if None in lags:
        return Verdict(State.ASSIGNED, "partitions are assigned; not all their ends have been seen yet")
    return Verdict(State.IDLE, "every record is done")


def _judge_model(seen: Seen) -> Verdict | None:
    """A model that is refused is no reason: no member serves it. One that only this member lacks is."""
    standing = seen.standing
    if seen.waiting:
        rows = ", ".join(f"partition {p} of {version}" for p, version in sorted(seen.waiting.items()))
        return Verdict(State.OUTDATED, f"serves {standing.served}; rows wait for a later model: {rows}{_why(standing)}")
    if standing.refused_for == "missing":
        return Verdict(State.OUTDATED, f"serves {standing.served}; {standing.announced} is announced{_why(standing)}")
    return None


def _why(standing: Standing) -> str:
    return f": {standing.problem}" if standing.problem else ""


def _judge_membership(seen: Seen) -> Verdict:
    if seen.joined:
        return Verdict(State.STANDBY, "in the group; its other members own all partitions")
    return Verdict(State.STARTING, "has not joined the consumer group yet: are the brokers reachable?")


def _judge_restore(seen: Seen) -> Verdict:
    to_go = ", ".join(f"partition {p}: {count} records to go" for p, count in sorted(seen.restoring.items()))
    return Verdict(State.RESTORING, f"rows are being read from the changelog; {to_go}")


def _why_stuck(partition: int, shard: Shard, now_s: float) -> str:
    since = f"for {now_s - shard.waiting_since_s:.0f} s"
    if shard.lag is None:
        return f"partition {partition}: its end has not been seen {since}: nothing can be fetched from its leader"
    return f"partition {partition}: {shard.lag} records behind, and nothing committed {since}"


class Consumer(Protocol):
    """What health looks at in the consumer."""

    def lag(self) -> dict[int, int]: ...
    def group_metadata(self) -> bytes: ...


class Health:
    """Watches the loop for whoever asks whether it is well: an observer of the loop.

    `alive` and `report` may be called from any thread; the rest is for the loop's.
    """

    def __init__(
        self,
        *,
        stalled_after_s: float,
        model_version: str,
        unreachable_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts as alive and not ready.

        Args:
            stalled_after_s: no turn, or no progress, for so long is a fault.
            model_version: version of the model that is served.
            unreachable_s: asked for how long no broker has been connected.
            clock: seconds that never go back.
        """
        self._unreachable_s = unreachable_s
        self._stalled_after_s = stalled_after_s
        self._clock = clock
        self._sampled_at: float | None = None
        self._seen = Seen(ticked_s=clock(), standing=Standing(model_version))

    # What the loop tells

    def tick(self, consumer: Consumer, shards: Mapping[int, ControlRow]) -> None:
        """A turn of the loop is over."""
        now = self._clock()
        seen = replace(self._seen, ticked_s=now)
        if self._sampled_at is None or now - self._sampled_at >= SAMPLE_PERIOD_S:
            self._sampled_at = now
            joined = bool(shards) or generation(consumer.group_metadata()) >= 0
            seen = replace(
                seen,
                joined=joined,
                shards=self._look(consumer.lag(), shards, now),
            )
        self._seen = seen

    def stage(self, name: str, seconds: float) -> None:
        """Nothing to see here."""

    def polled(self, records: int) -> None:
        """Nothing to see here."""

    def committed(self, work: Work, outcome: Outcome) -> None:  # noqa: ARG002 - the observer's signature
        """A batch is visible."""
        if self._seen.aborts_in_a_row:
            self._seen = replace(self._seen, aborts_in_a_row=0)

    def aborted(self) -> None:
        """A batch was put back."""
        self._seen = replace(self._seen, aborts_in_a_row=self._seen.aborts_in_a_row + 1)

    def rebalanced(self, kind: str, partitions: Collection[int]) -> None:
        """Partitions were `assigned` or `revoked`; the next tick looks at once."""
        self._sampled_at = None
        if kind == "revoked":
            kept = {p: shard for p, shard in self._seen.shards.items() if p not in partitions}
            self._seen = replace(self._seen, shards=kept)

    def restoring(self, done: Slice) -> None:
        """Rows were read, or need not be any more."""
        self._seen = replace(self._seen, restoring=dict(done.remaining))

    def following(self, standing: Standing, waiting: Mapping[int, str]) -> None:
        """Another model is served, announced or refused; partitions wait for one."""
        self._seen = replace(self._seen, standing=standing, waiting=dict(waiting))

    # What is asked

    def alive(self) -> bool:
        """Whether the loop turned lately."""
        return self._clock() - self._seen.ticked_s < self._stalled_after_s

    def report(self) -> dict[str, Any]:
        """What /readyz answers, for JSON. Times are in seconds."""
        seen, now = replace(self._seen, unreachable_s=self._unreachable_s()), self._clock()
        verdict = judge(seen, now, self._stalled_after_s)
        return {
            "state": verdict.state.value,
            "ready": verdict.ready,
            "reason": verdict.reason,
            "model_version": seen.standing.served,
            "announced_version": seen.standing.announced or seen.standing.served,
            "model_problem": seen.standing.problem or None,
            "last_turn_s": round(now - seen.ticked_s, 3),
            "unreachable_s": round(seen.unreachable_s, 3),
            "aborts_in_a_row": seen.aborts_in_a_row,
            "partitions": [
                {"partition": p, "next_offset": s.next_offset, "lag": s.lag, "model_version": s.model_version}
                for p, s in sorted(seen.shards.items())
            ],
            "restoring": [{"partition": p, "remaining": count} for p, count in sorted(seen.restoring.items())],
        }

    def _look(self, lags: Mapping[int, int], shards: Mapping[int, ControlRow], now: float) -> dict[int, Shard]:
        found = {}
        for partition, row in shards.items():
            lag, before = lags.get(partition), self._seen.shards.get(partition)
            waits = before is not None and before.next_offset == row.next_offset and before.lag != 0
            since = before.waiting_since_s if before is not None and waits else now
            found[partition] = Shard(row.next_offset, lag, row.model_version, since)
        return found


StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class Pages:
    """The paths of the port, as a WSGI application."""

    def __init__(self, registry: CollectorRegistry, health: Health) -> None:
        self._metrics = make_wsgi_app(registry)
        self._health = health

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answers one request."""
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)  # type: ignore[no-any-return]
        if environ.get("REQUEST_METHOD") != "GET":
            return _answer(start_response, "405 Method Not Allowed", "text/plain", b"GET only\n", ("Allow", "GET"))
        if path == "/healthz":
            alive = self._health.alive()
            return _answer(start_response, _status(alive), "text/plain", b"alive\n" if alive else b"stalled\n")
        if path == "/readyz":
            report = self._health.report()
            return _answer(start_response, _status(report["ready"]), "application/json", msgspec.json.encode(report))
        return _answer(start_response, "404 Not Found", "text/plain", b"/metrics, /healthz, /readyz\n")


def _status(good: bool) -> str:
    return "200 OK" if good else "503 Service Unavailable"


def _answer(
    start: StartResponse, status: str, content_type: str, body: bytes, *headers: tuple[str, str]
) -> list[bytes]:
    start(status, [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers])
    return [body]


class HealthServer:
    """Serves `Pages` from threads of its own, from `start` until `stop`."""

    def __init__(self, registry: CollectorRegistry, health: Health, *, host: str, port: int) -> None:
        """Binds the port; nothing is answered before `start`.

        Args:
            registry: what /metrics shows.
            health: whom /healthz and /readyz ask.
            host: address to listen on; with a colon it is IPv6.
            port: 0 is any free port; `port` says which.

        Raises:
            ConfigError: the port is taken, or the address is not ours.
        """
        server = _IPv6Server if ":" in host else _Server
        try:
            self._server = server((host, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"metrics.host={host!r}, metrics.port={port}: cannot listen there: {error.strerror or error}. To do: "
                "set metrics.port to a free one (0 finds one), or metrics.host to an address of this machine; every "
                "member on a host needs a port of its own"
            ) from error
        self._server.set_app(Pages(registry, health))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._serve, name="health", daemon=True)

    def start(self) -> None:
        """Answers from now on."""
        self._thread.start()
        host = self._server.server_address[0]
        log.info("metrics and health are served", host=host, port=self.port, paths=["/metrics", "/healthz", "/readyz"])

    def stop(self) -> None:
        """Answers no more, and gives the port back. May be called twice, and without `start`."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> HealthServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.1)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, but never more than so many."""

    daemon_threads = True
    request_queue_size = _WAITING

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(_MOST_THREADS)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the DNS for our name, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(timeout=_REQUEST_TIMEOUT_S):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        log.debug("request failed", client=client_address, exc_info=True)


class _IPv6Server(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug("request", line=format % args)

"""`bench takeover`: how soon a member has the rows of one that died, and what its own partitions feel of it.

Two members share the partitions; every user has a row, and three versions of it in the changelog. A round:

    calm      steady load; how long the events of the survivor's own partitions take
    takeover  the other member is killed. The group notices after its session timeout and gives its partitions to the
              survivor, who restores them. Timed from there until they are live; its own partitions are watched
    back      the other member is started anew

What a takeover may take follows from the same run: records ÷ what a restore alone reads, and 2 s.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from stream_adapt import bench, service
from stream_adapt import config as configuration
from stream_adapt.bench_refresh import cores, ready
from stream_adapt.bench_traffic import Seen, Traffic, Unmeasured, latencies
from stream_adapt.config import Config
from stream_adapt.datasets.source import STARS
from stream_adapt.demo.member import Member
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import HOST, KAFKA_VERSION, EmbeddedKafka, free_ports
from stream_adapt.kafka.topics import create_topics
from stream_adapt.models import LearnerSpec

#: Versions of each row in the changelog: it is compacted later than that.
_VERSIONS = 3
#: What a takeover may take beside reading: the first fetch, and the turns in between.
_ALLOWED_S = 2.0
#: Between two looks at what the survivor says of itself.
_LOOK_S = 0.02
#: What leads from one step to the next may take so long.
_STEP_S = 300.0
#: After a session a dead member's partitions are given away: the least that Kafka takes by default.
_TIMEOUTS_MS = {"session_timeout_ms": 6_000, "transaction_timeout_ms": 5_000}


@dataclass(frozen=True)
class TakeoverBench:
    """Parameters of `bench takeover`."""

    users: int = 200_000
    rounds: int = 3
    rate: float = 1_000.0  # steady load, events/s
    seconds: float = 10.0  # of steady load before a kill
    partitions: int = 4


class TakeoverCost(msgspec.Struct):
    """What `bench takeover --json` prints; medians of the rounds."""

    takeover_s: float  # from the assignment until the last partition is live
    allowed_s: float  # records ÷ restored_per_s + 2
    p99_ratio: float  # of the survivor's own partitions, meanwhile ÷ calm
    calm_p99_ms: float
    takeover_p99_ms: float
    records: int  # of the changelog that the survivor had to read
    restored_per_s: float  # records/s of a restore with nothing else to do, in the same run
    users: int
    rounds: int
    rate: float
    cores: int
    broker: str
    takeovers_s: list[float]  # round by round
    allowed_each_s: list[float]
    p99_ratios: list[float]


@dataclass
class Takeover:
    """One of them, as the survivor told it. Times are seconds since the epoch."""

    own: set[int]  # partitions that it had before
    assigned_s: float = 0.0
    live_s: float = 0.0
    records: dict[int, int] = field(default_factory=dict)  # to be read at first, by partition

    def covers(self, seen: Seen) -> bool:
        """Whether a score of its own partitions came out while it restored others."""
        return seen.partition in self.own and self.assigned_s <= seen.at_s <= self.live_s


@dataclass(frozen=True)
class Round:
    """What a round told."""

    seconds: float
    records: int
    calm_p99_ms: float
    meanwhile_p99_ms: float


def run_takeover_bench(options: TakeoverBench, say: Callable[[str], None] = lambda _: None) -> TakeoverCost:
    """Measures; call it in the main thread.

    Raises:
        Unmeasured: a phase did not come about; says which.
        MemberError, KafkaRefused: as each says.
    """
    with ExitStack() as stack:
        return _Bench(options, stack, say).run()


class _Bench:
    """One run; what must be stopped afterwards is put on the stack."""

    def __init__(self, options: TakeoverBench, stack: ExitStack, say: Callable[[str], None]) -> None:
        self._options, self._stack, self._say = options, stack, say
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-adapt-bench-")))
        self._ports = free_ports(2)
        # Beside the traffic, so that a slow answer does not hold up events and scores.
        self._looks = stack.enter_context(ThreadPoolExecutor(1))
        self._look: Future[dict[str, Any] | None] | None = None
        self._looked_s = 0.0

    def run(self) -> TakeoverCost:
        options = self._options
        self._bootstrap = self._stack.enter_context(EmbeddedKafka()).bootstrap_servers
        config = self._settle()
        rounds = []
        with self._member(0) as self._survivor, closing(Traffic(config, options.rate)) as self._traffic:
            self._survivor.wait_until_ready()
            with self._member(1):
                self._until(self._shared, "two members share the partitions")
                self._say(f"{_VERSIONS} versions of {options.users:,} users' rows")
                for version in range(_VERSIONS):
                    self._traffic.burst_of(self._events(version))
            for number in range(options.rounds):
                rounds.append(self._round(number + 1))
        return self._result(rounds, bench.in_a_process(bench.restore_round, config))

    def _settle(self) -> Config:
        """Registry, files of both members, topics."""
        sample = list(bench.events(5_000))
        bench.random_registry(self._folder / "models", LearnerSpec(bench.FEATURES, STARS), sample)
        for number, port in enumerate(self._ports):
            sections = {
                "app": {"name": "bench-takeover", "instance": f"m{number}"},
                "kafka": {"bootstrap_servers": self._bootstrap, **_TIMEOUTS_MS},
                "topics": {"partitions": self._options.partitions},
                "model": {"path": str(self._folder / "models")},
                "metrics": {"host": HOST, "port": port},
                "state": {"dir": str(self._folder / f"state-{number}")},
            }
            self._path(number).write_text(yaml.safe_dump(sections), encoding="utf-8")
        config: Config = configuration.load(self._path(0), configuration.environment_without_settings()).config
        create_topics(properties.common(config), service.topic_specs(config))
        return config

    def _path(self, number: int) -> Path:
        return self._folder / f"m{number}.yaml"

    def _member(self, number: int) -> Member:
        path = self._path(number)
        return Member(
            path, path.with_suffix(".log"), configuration.environment_without_settings(), (HOST, self._ports[number])
        )

    def _events(self, version: int) -> Iterator[tuple[bytes, bytes]]:
        """One event of each user, as of now; keys and values."""
        for number, event in enumerate(bench.events(self._options.users, "unique")):
            now = msgspec.structs.replace(event, event_id=f"v{version}-{number}", timestamp=time.time_ns() // 1_000_000)
            yield now.user_id.encode(), msgspec.json.encode(now)

    def _round(self, number: int) -> Round:
        with self._member(1) as other:
            self._until(self._shared, "two members share the partitions")
            own = self._live()
            calm: list[Seen] = []
            self._traffic.watched = calm
            self._traffic.steady_for(self._options.seconds)
            meanwhile: list[Seen] = []
            self._traffic.watched = meanwhile
            found = Takeover(own)
            other.kill()
            self._until(lambda: self._taken_over(found), "the survivor has all partitions")
            self._traffic.watched = None
        seen = [one.took_ms for one in meanwhile if found.covers(one)]
        told = Round(
            found.live_s - found.assigned_s,
            sum(found.records.values()),
            latencies([one.took_ms for one in calm if one.partition in own]).p99_ms,
            latencies(seen).p99_ms,
        )
        self._say(
            f"round {number}: {told.records:,} records in {told.seconds:.2f} s; own partitions' p99 "
            f"{told.calm_p99_ms:.0f} ms before, {told.meanwhile_p99_ms:.0f} ms meanwhile"
        )
        return told

    def _taken_over(self, found: Takeover) -> bool:
        """Looks at the survivor; whether it has all partitions, and all rows of them."""
        if self._look is None and time.monotonic() - self._looked_s >= _LOOK_S:
            self._looked_s = time.monotonic()
            self._look = self._looks.submit(ready, self._ports[0])
        if self._look is None or not self._look.done():
            return False
        told, self._look = self._look.result(), None
        if told is None:
            return False
        now_s, live = time.time(), {one["partition"] for one in told["partitions"]}
        restoring = {one["partition"]: one["remaining"] for one in told["restoring"]}
        if not found.assigned_s and (live | restoring.keys()) - found.own:
            found.assigned_s = now_s
        for partition, remaining in restoring.items():
            found.records[partition] = max(remaining, found.records.get(partition, 0))
        if len(live) == self._options.partitions:
            found.live_s = now_s
        return found.live_s > 0

    def _shared(self) -> bool:
        """Whether both have partitions, and all of them are live."""
        told = [ready(port) for port in self._ports]
        owned = [{p["partition"] for p in one["partitions"]} if one and one["ready"] else set() for one in told]
        return all(owned) and sum(map(len, owned)) == self._options.partitions

    def _live(self) -> set[int]:
        told = ready(self._ports[0])
        return {one["partition"] for one in told["partitions"]} if told else set()

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        """Steady load until something is so.

        Raises:
            Unmeasured: it was not.
        """
        try:
            self._traffic.steady(reached, _STEP_S, what)
        except Unmeasured as problem:
            self._survivor.check()
            raise Unmeasured(f"{problem}{self._survivor.log_tail()}") from problem

    def _result(self, rounds: list[Round], alone: bench.RestoreRound) -> TakeoverCost:
        options = self._options
        allowed = [round(one.records / alone.records_per_s + _ALLOWED_S, 2) for one in rounds]
        ratios = [round(one.meanwhile_p99_ms / one.calm_p99_ms, 3) for one in rounds]
        takeovers = [round(one.seconds, 2) for one in rounds]
        return TakeoverCost(
            takeover_s=statistics.median(takeovers),
            allowed_s=statistics.median(allowed),
            p99_ratio=statistics.median(ratios),
            calm_p99_ms=statistics.median(one.calm_p99_ms for one in rounds),
            takeover_p99_ms=statistics.median(one.meanwhile_p99_ms for one in rounds),
            records=round(statistics.median(one.records for one in rounds)),
            restored_per_s=round(alone.records_per_s),
            users=options.users,
            rounds=options.rounds,
            rate=options.rate,
            cores=cores(),
            broker=f"Apache Kafka {KAFKA_VERSION} (embedded)",
            takeovers_s=takeovers,
            allowed_each_s=allowed,
            p99_ratios=ratios,
        )

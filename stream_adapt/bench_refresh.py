"""`bench refresh`, what a refresh costs the loop beside which it trains, and how soon a group serves what it promotes.

A member runs as a process, with a refresh controller as its child, on a real broker and under a steady load. A round:

    calm        steady load, then a burst
    training    a refresh is asked for; as soon as it trains, the same again
    swap        the challenger is promoted; as soon as the member serves it, a burst. It is being watched meanwhile
    back        the first model, which knows nothing, is announced by hand: so the next challenger is better, too

Every phase is compared with the calm one of its own round, and the figure is the median of the rounds. At the end two
more members join, and each model is announced in turn.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from stream_adapt import config as configuration
from stream_adapt import promotion, service
from stream_adapt.bench_traffic import Latencies, Traffic, Unmeasured, sample_events
from stream_adapt.config import Config
from stream_adapt.datasets.source import STARS
from stream_adapt.demo.member import Member
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import HOST, KAFKA_VERSION, EmbeddedKafka, free_ports
from stream_adapt.kafka.topics import create_topics
from stream_adapt.learner.encoder import Bag, Categorical, Feature, Numeric
from stream_adapt.models import LearnerSpec, read_model, write_model
from stream_adapt.refresh.journal import Tail, ask
from stream_adapt.refresh.record import RefreshState
from stream_adapt.refresh.states import RESTING, State
from stream_adapt.testing.model import random_model

_FEATURES: dict[str, Feature] = {"category": Categorical(), "tags": Bag(), "price": Numeric(hats=5)}
_MEMBERS = 3
#: Between two looks at how long a member has not polled.
_SAMPLE_S = 0.2
#: What leads from one step to the next may take so long beyond what is asked for.
_STEP_S = 180.0
#: Between two looks at the refresh while events flow.
_LOOK_S = 0.1
_CALM, _TRAINING, _SWAPPED = "calm", "training", "after_swap"


@dataclass(frozen=True)
class RefreshBench:
    """Parameters of `bench refresh`."""

    rounds: int = 5
    rate: float = 1_000.0  # steady load, events/s
    seconds: float = 10.0  # of steady load in a phase
    burst: int = 200_000  # events
    window: int = 300_000  # events that a refresh is trained on
    training_s: float = 90.0
    swaps: int = 6
    partitions: int = 6
    nice: int | None = None  # as configured by default
    threads: int = 1


class RefreshCost(msgspec.Struct):
    """What `bench refresh --json` prints. Ratios are medians of the rounds' ratios, each to the round's calm phase."""

    p99_ratio: float  # latency while a refresh trains ÷ calm
    throughput_ratio: float  # while a refresh trains ÷ calm
    throughput_after_swap_ratio: float  # after the swap, while the new model is watched ÷ calm
    max_poll_gap_s: float  # longest time that the loop went without a poll, at most
    max_poll_interval_s: float  # that the group allows
    swap_s: float  # from an announcement until all members serve the version: the slowest
    p50_ms: dict[str, float]  # end to end, by phase
    p99_ms: dict[str, float]
    events_per_s: dict[str, float]  # of a backlog, by phase
    training_s: float  # median of the trainings
    rounds: int
    rate: float
    burst: int
    members: int  # of the group whose swaps are timed
    events: int  # in all; each had one score
    threads: int
    nice: int
    cores: int
    broker: str
    p99_ratios: list[float]  # round by round
    throughput_ratios: list[float]
    throughput_after_swap_ratios: list[float]
    swaps_s: list[float]
    notes: list[str]  # what was left out of the figures


@dataclass
class Phase:
    """What was measured in one phase of a round."""

    steady: Latencies | None = None
    per_s: float | None = None


@dataclass
class Rounds:
    """What was measured so far."""

    phases: dict[str, list[Phase]] = field(default_factory=lambda: {_CALM: [], _TRAINING: [], _SWAPPED: []})
    trainings_s: list[float] = field(default_factory=list)
    swaps_s: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ratios(self, phase: str, of: Callable[[Phase], float | None]) -> list[float]:
        """Of a phase to the calm one, for the rounds that have both.

        Raises:
            Unmeasured: no round has.
        """
        pairs = [(of(calm), of(other)) for calm, other in zip(self.phases[_CALM], self.phases[phase], strict=True)]
        found = [round(other / calm, 3) for calm, other in pairs if calm and other]
        if not found:
            raise Unmeasured(f"no round has a figure for {phase}: {'; '.join(self.notes)}")
        return found

    def medians(self, of: Callable[[Phase], float | None]) -> dict[str, float]:
        """By phase, over the rounds that have it."""
        known = {name: [value for one in found if (value := of(one))] for name, found in self.phases.items()}
        return {name: round(statistics.median(values), 1) for name, values in known.items() if values}


def _p50(phase: Phase) -> float | None:
    return phase.steady and phase.steady.p50_ms


def _p99(phase: Phase) -> float | None:
    return phase.steady and phase.steady.p99_ms


def _per_s(phase: Phase) -> float | None:
    return phase.per_s


def run_refresh_bench(options: RefreshBench, say: Callable[[str], None] = lambda _: None) -> RefreshCost:
    """Measures; call it in the main thread.

    Raises:
        Unmeasured: a phase did not come about; says which.
        MemberError, KafkaRefused: as each says.
    """
    with ExitStack() as stack:
        return _Bench(options, stack, say).run()


class PollWatch:
    """How long members went without a poll, by /readyz, looked at in a thread of its own."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ports: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-polls", daemon=True)
        self._thread.start()

    def add(self, port: int) -> None:
        """One more member."""
        self._ports = [*self._ports, port]

    def close(self) -> None:
        """Ends it."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            for port in self._ports:
                told = ready(port)
                if told is not None:
                    # It may have gone on for as long as until the next look.
                    self.longest_s = max(self.longest_s, told["last_turn_s"] + _SAMPLE_S)


def ready(port: int) -> dict[str, Any] | None:
    """What a member's /readyz says; None if it does not answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        told: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return told


class _Bench:
    """One run; what must be stopped afterwards is put on the stack."""

    def __init__(self, options: RefreshBench, stack: ExitStack, say: Callable[[str], None]) -> None:
        self._options, self._stack, self._say = options, stack, say
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-adapt-bench-")))
        self._rounds = Rounds()
        self._ports: list[int] = []
        self._looked_s = 0.0

    def run(self) -> RefreshCost:
        options = self._options
        self._settle()
        self._say(f"{options.window:,} events to train on")
        self._traffic.burst(options.window)
        for number in range(options.rounds):
            self._round(number + 1)
        self._swaps()
        return self._result()

    # What it stands on

    def _settle(self) -> None:
        self._bootstrap = self._stack.enter_context(EmbeddedKafka()).bootstrap_servers
        spec = LearnerSpec(features=_FEATURES, feedback=STARS)
        sample = sample_events(5_000)
        columns = {name: [_typed(event.features.get(name)) for event in sample] for name in _FEATURES}
        registry = self._folder / "models"
        first = read_model(random_model(registry, spec, sorted({e.item_id for e in sample}), columns))
        weights = msgspec.structs.replace(first.weights, bias=first.weights.bias + np.float32(0.01))
        self._first = first.version
        self._spare = write_model(registry, weights, spec, first.manifest.fitted, parent=self._first).name
        path = self._configure(0, "child")
        self._config: Config = configuration.load(path, configuration.environment_without_settings()).config
        create_topics(properties.common(self._config), service.topic_specs(self._config))
        self._watch = self._stack.enter_context(closing(PollWatch()))
        self._start(path)
        self._traffic = self._stack.enter_context(closing(Traffic(self._config, self._options.rate)))
        self._tail = self._stack.enter_context(closing(Tail(self._config)))

    def _configure(self, number: int, mode: str) -> Path:
        (port,) = free_ports(1)
        self._ports.append(port)
        options = self._options
        refresh = {
            "mode": mode,
            "cooldown_s": 0,
            "per_day": 1_000,
            "window_events": max(options.window, 1_000),
            "training_s": options.training_s,
            "threads": options.threads,
            "shadow_events": 2_000,
            # So that the whole burst after a swap is watched.
            "watch_events": max(options.burst, 2_000),
        }
        sections = {
            "app": {"name": "bench-refresh", "instance": f"m{number}"},
            "kafka": {"bootstrap_servers": self._bootstrap},
            "topics": {"partitions": options.partitions},
            "model": {"path": str(self._folder / "models")},
            "metrics": {"host": HOST, "port": port},
            "state": {"dir": str(self._folder / f"state-{number}")},
            "refresh": refresh if options.nice is None else {**refresh, "nice": options.nice},
        }
        path = self._folder / f"m{number}.yaml"
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        return path

    def _start(self, path: Path) -> None:
        metrics = (HOST, self._ports[-1])
        self._member = self._stack.enter_context(
            Member(path, path.with_suffix(".log"), configuration.environment_without_settings(), metrics)
        )
        self._member.wait_until_ready()
        self._watch.add(self._ports[-1])

    # A round

    def _round(self, number: int) -> None:
        calm, training, swapped = Phase(), Phase(), Phase()
        for name, phase in ((_CALM, calm), (_TRAINING, training), (_SWAPPED, swapped)):
            self._rounds.phases[name].append(phase)
        self._measure(calm)
        request = ask(self._config, f"round {number}").id
        self._until(lambda s: s.request == request and s.state is State.TRAINING, "a refresh trains")
        began = time.monotonic()
        self._measure(training)
        state = self._state()
        if state is None or state.state is not State.TRAINING:
            training.steady = training.per_s = None
            self._note(f"round {number}: the training was over before it was measured; a larger --window?")
        limit_s = 2 * self._options.training_s + _STEP_S
        self._until(lambda s: s.state is not State.TRAINING, "the training ends", limit_s)
        self._rounds.trainings_s.append(time.monotonic() - began)
        ended = self._until(lambda s: s.state in RESTING or s.state is State.WATCHING, "it is decided", limit_s)
        if ended.state is not State.WATCHING:
            reason = ended.last.reason if ended.last else "it does not say why"
            self._note(f"round {number}: the refresh promoted nothing, so a copy was, by hand: {reason}")
            self._announce(self._spare)
            ended = self._until(lambda s: s.state is State.WATCHING, "the copy is watched", limit_s)
        self._served(ended.champion)
        swapped.per_s = self._traffic.burst(self._options.burst)
        self._until(lambda s: s.state in RESTING, "the watching ends", limit_s)
        self._announce(self._first)
        self._until(lambda s: s.champion == self._first, "the controller knows")
        self._say(f"round {number}: {_told(calm)}; training: {_told(training)}; after the swap: {_told(swapped)}")

    def _note(self, what: str) -> None:
        self._rounds.notes.append(what)
        self._say(what)

    def _measure(self, phase: Phase) -> None:
        phase.steady = self._traffic.steady_for(self._options.seconds)
        phase.per_s = self._traffic.burst(self._options.burst)

    def _until(self, reached: Callable[[RefreshState], bool], what: str, timeout_s: float = _STEP_S) -> RefreshState:
        """Steady load until the refresh is somewhere.

        Raises:
            Unmeasured: it did not get there; says where it is.
        """
        found: list[RefreshState] = []

        def there() -> bool:
            if time.monotonic() - self._looked_s < _LOOK_S:
                return False
            self._looked_s = time.monotonic()
            state = self._state()
            if state is not None and reached(state):
                found.append(state)
            return bool(found)

        try:
            self._traffic.steady(there, timeout_s, what)
        except Unmeasured as problem:
            self._member.check()
            raise Unmeasured(f"{problem}; the refresh: {self._state()}{self._member.log_tail()}") from problem
        return found[0]

    def _state(self) -> RefreshState | None:
        self._tail.poll()
        return self._tail.state

    # Another model

    def _announce(self, version: str) -> float:
        """Announces a version by hand; seconds from the decision until scores of every partition say it."""
        done: list[promotion.Promoted] = []
        thread = threading.Thread(target=lambda: done.append(promotion.promote(self._config, version, "bench refresh")))
        thread.start()
        self._traffic.steady(lambda: not thread.is_alive(), _STEP_S, "it is announced")
        if not done:
            raise KafkaRefused(f"{version} was not announced; the error stands above")
        return self._served(version) - done[0].announcement.decided_ms / 1000

    def _served(self, version: str) -> float:
        """Waits, under the steady load, until the newest scores of all partitions say a version; when the last began
        to."""
        traffic, everywhere = self._traffic, dict.fromkeys(range(self._options.partitions), version)
        traffic.steady(lambda: traffic.version == everywhere, _STEP_S, f"all members serve {version}")
        return max(traffic.since_s.values())

    def _swaps(self) -> None:
        """A group of three, and models announced in turn."""
        self._say(f"{_MEMBERS} members")
        for number in range(1, _MEMBERS):
            self._start(self._configure(number, "off"))
        self._traffic.steady(self._shared, _STEP_S, f"{_MEMBERS} members share the partitions")
        for number in range(self._options.swaps):
            self._rounds.swaps_s.append(round(self._announce((self._spare, self._first)[number % 2]), 3))
        self._say(f"swaps: {', '.join(f'{s:.2f}' for s in self._rounds.swaps_s)} s")

    def _shared(self) -> bool:
        """Whether every member has partitions, and every partition a member."""
        told = [ready(port) for port in self._ports]
        owned = [{p["partition"] for p in one["partitions"]} if one and one["ready"] else set() for one in told]
        return all(owned) and len(set().union(*owned)) == self._options.partitions == sum(map(len, owned))

    def _result(self) -> RefreshCost:
        rounds, options = self._rounds, self._options
        ratios = {
            "p99_ratios": rounds.ratios(_TRAINING, _p99),
            "throughput_ratios": rounds.ratios(_TRAINING, _per_s),
            "throughput_after_swap_ratios": rounds.ratios(_SWAPPED, _per_s),
        }
        interval_ms = float(properties.consumer(self._config)["max.poll.interval.ms"])
        return RefreshCost(
            p99_ratio=_median(ratios["p99_ratios"]),
            throughput_ratio=_median(ratios["throughput_ratios"]),
            throughput_after_swap_ratio=_median(ratios["throughput_after_swap_ratios"]),
            max_poll_gap_s=round(self._watch.longest_s, 3),
            max_poll_interval_s=interval_ms / 1000,
            swap_s=max(rounds.swaps_s, default=0.0),
            p50_ms=rounds.medians(_p50),
            p99_ms=rounds.medians(_p99),
            events_per_s=rounds.medians(_per_s),
            training_s=round(statistics.median(rounds.trainings_s), 1),
            rounds=options.rounds,
            rate=options.rate,
            burst=options.burst,
            members=_MEMBERS,
            events=self._traffic.received,
            threads=options.threads,
            nice=self._config.refresh.nice,
            cores=cores(),
            broker=f"Apache Kafka {KAFKA_VERSION} (embedded)",
            swaps_s=rounds.swaps_s,
            notes=rounds.notes,
            **ratios,
        )


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _told(phase: Phase) -> str:
    steady = f"p99 {phase.steady.p99_ms:.0f} ms, " if phase.steady else ""
    return f"{steady}{phase.per_s:,.0f}/s" if phase.per_s else "not measured"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def _typed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

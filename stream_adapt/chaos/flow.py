"""A run in order: broker, topics, model, members; the load; the schedule; calm; the oracle.

Everything that is started is stopped in the opposite order, also after Ctrl-C: load, members, broker, folder.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import yaml
from confluent_kafka import Message
from rich.console import Console
from rich.live import Live
from rich.text import Text

from stream_adapt import config, service
from stream_adapt.announcements import Announcement
from stream_adapt.chaos import load, oracle, refreshing
from stream_adapt.chaos.broker import Brokers
from stream_adapt.chaos.load import Load
from stream_adapt.chaos.members import Team
from stream_adapt.chaos.network import Network, kinds
from stream_adapt.chaos.refreshing import CONTROLLERS, Operator, Reaper, controller_name
from stream_adapt.chaos.report import ChaosResult
from stream_adapt.chaos.schedule import Action, Timeouts, draw, member_name
from stream_adapt.chaos.watch import Watch, percentile, takeovers_s
from stream_adapt.errors import ConfigError, KafkaRefused, StreamAdaptError
from stream_adapt.kafka.topics import create_topics
from stream_adapt.models import Model, Registry, read_model, write_model

APP = "chaos"
Protocol = Literal["classic", "consumer"]

_TURN_S = 0.05
_POLL_INTERVAL_MS = 45_000
#: Members are up and every partition has a commit: compiled kernels may have to be made.
_START_TIMEOUT_S = 180.0
#: After the last action: every partition gets commits again.
_RECOVER_TIMEOUT_S = 180.0
#: After the last input: everything is committed.
_DRAIN_TIMEOUT_S = 180.0
#: Tries of a member before it gives up on a broker (exit 3), and some seconds for noticing.
_AWAY_WINDOW_S = 45.0
#: Two fencings within three transaction timeouts end a member (exit 4); and as long for finding out about the last.
_FENCED_TIMEOUTS = 6


class ChaosError(StreamAdaptError):
    """The run could not be carried out: members do not get to work, or do not recover."""


@dataclass(frozen=True)
class ChaosOptions:
    """What to do, and how hard."""

    minutes: float = 8.0
    seed: int = 0
    members: int = 3
    per_second: float = 300.0  # events
    partitions: int = 6
    brokers: int = 2  # and as many replicas of everything
    protocol: Protocol = "classic"
    refreshes: bool = True  # controllers work, and are killed and stopped, too
    keep: Path | None = None  # folder for logs, configuration, model and Kafka's data; a temporary one if not given


def run_chaos(options: ChaosOptions, console: Console) -> ChaosResult:
    """Does it; call it in the main thread. Prints to the console alone.

    Raises:
        ChaosError, ConfigError, KafkaRefused: it could not be carried out; the message says where the logs are.
        KeyboardInterrupt: SIGINT or SIGTERM; everything is stopped by then.
    """
    folder = _folder(options)
    kept = options.keep is not None
    try:
        with _interruptible(), ExitStack() as stack:
            result = _Run(options, folder, stack, console).run()
        kept = kept or not result.ok
        result.logs = str(folder) if kept else None
        return result
    except StreamAdaptError as error:
        kept = True
        error.args = (f"{error}\nlogs: {folder}",)
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(options: ChaosOptions) -> Path:
    if options.keep is None:
        return Path(tempfile.mkdtemp(prefix="stream-adapt-chaos-"))
    options.keep.mkdir(parents=True, exist_ok=True)
    if any(options.keep.iterdir()):
        raise ConfigError(f"--keep {options.keep}: holds other files; give a folder that is new or empty")
    return options.keep


class _Run:
    """One run; what must be stopped afterwards is on the stack."""

    def __init__(self, options: ChaosOptions, folder: Path, stack: ExitStack, console: Console) -> None:
        self._options = options
        self._folder = folder
        self._stack = stack
        self._console = console
        self._began = time.monotonic()
        self._timeouts = Timeouts()
        self._hits: list[float] = []
        self._skipped = 0
        self._done: Counter[str] = Counter()
        windows = (_AWAY_WINDOW_S, _FENCED_TIMEOUTS * self._timeouts.transaction_s)
        self._team = Team(folder, config.environment_without_settings(), windows)
        self._controllers = [controller_name(n) for n in range(CONTROLLERS if options.refreshes else 0)]
        self._reaper = Reaper(self._team)

    def run(self) -> ChaosResult:
        options, faults = self._options, kinds(self._timeouts)
        seconds = options.minutes * 60
        schedule = draw(options.seed, seconds, options.members, self._timeouts, faults, self._controllers)
        self._settle()
        with Live(console=self._console, refresh_per_second=4, transient=True) as self._live:
            self._start()
            self._perform(schedule)
            self._recover()
            drain_s = self._drain()
        result = self._judge()
        result.schedule, result.drain_s = schedule, round(drain_s, 1)
        result.seconds = round(time.monotonic() - self._began, 1)
        return result

    def _settle(self) -> None:
        """Broker, model, configuration, topics."""
        with self._console.status("starting Apache Kafka"):
            self._brokers = self._stack.enter_context(
                Brokers(self._timeouts, self._team.troubles, self._folder / "kafka", self._options.brokers)
            )
        self._model = self._make_model()
        self._settings = config.load(self._configure(member_name(0)), config.environment_without_settings()).config
        self._network = Network(
            [node.proxy for node in self._brokers.nodes], lambda name: f"{APP}.{name}", self._team.troubles
        )
        admin = {"bootstrap.servers": self._brokers.address}
        for outcome in create_topics(admin, service.topic_specs(self._settings)):
            if not outcome.ok:
                raise KafkaRefused(str(outcome))

    def _make_model(self) -> Path:
        from stream_adapt.models import LearnerSpec
        from stream_adapt.testing.model import random_model, random_weights

        features, feedback = load.declared(self._options.seed)
        items, columns = load.examples(self._options.seed)
        spec = LearnerSpec(features, feedback)
        path = random_model(self._folder / "models", spec, items, columns, self._options.seed)
        first = read_model(path)
        fitted, f = first.manifest.fitted, first.weights.implicit_item
        weights = random_weights(spec, items, fitted, self._options.seed + 1)
        # Rows hold sums of f: a model with another one could not take its place.
        weights = msgspec.structs.replace(weights, implicit_item=f)
        self._second = write_model(path.parent, weights, spec, fitted, parent=first.version).name
        return path

    def _configure(self, instance: str) -> Path:
        """Writes a member's configuration."""
        path = self._folder / f"{instance}.yaml"
        sections = {
            "app": {"name": APP, "instance": instance},
            "kafka": {
                "bootstrap_servers": self._brokers.member_address,
                "group_protocol": self._options.protocol,
                "session_timeout_ms": int(self._timeouts.session_s * 1000),
                "transaction_timeout_ms": int(self._timeouts.transaction_s * 1000),
                # A restarted coordinator may wait that long for members that died meanwhile.
                "consumer": {"max.poll.interval.ms": _POLL_INTERVAL_MS},
            },
            "topics": {"partitions": self._options.partitions, "replication": self._options.brokers},
            "model": {"path": str(self._model)},
            "metrics": {"port": 0},
            "state": {"dir": str(self._folder / f"state-{instance}")},
            "refresh": refreshing.SETTINGS if self._options.refreshes else {},
        }
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
        return path

    def _start(self) -> None:
        """Members and load, until every partition has a commit."""
        self._stack.callback(self._team.end)
        for number in range(self._options.members):
            self._team.start(member_name(number), self._configure(member_name(number)))
        for name in self._controllers:
            self._team.start(name, self._configure(name), refreshing.COMMAND)
        kafka = self._settings.kafka.model_copy(update={"bootstrap_servers": self._brokers.address})
        app = self._settings.app.model_copy(update={"instance": "operator"})
        past_proxy = self._settings.model_copy(update={"kafka": kafka, "app": app})
        self._operator = Operator(past_proxy, self._model.name, self._second)
        self._stack.callback(self._operator.close)
        events = self._settings.topic_names.events
        self._watch = Watch(self._brokers.address, self._settings.group_id, events, self._options.partitions)
        self._stack.callback(self._watch.close)
        self._watch.start()
        self._load = Load(self._brokers.address, events, self._options.seed, self._options.per_second)
        self._load.start()
        self._wait_for_commits({}, _START_TIMEOUT_S, "members are not at work")

    def _perform(self, schedule: list[Action]) -> None:
        """Every action at its time, whoever is there."""
        began = time.monotonic()
        for action in schedule:
            while (left_s := began + action.at_s - time.monotonic()) > 0:
                self._turn("", min(left_s, _TURN_S))
            if self._act(action):
                self._done[action.kind] += 1
            else:
                self._skipped += 1
        while time.monotonic() - began < self._options.minutes * 60:
            self._turn()

    def _act(self, action: Action) -> bool:
        team, name = self._team, action.member
        match action.kind:
            case "kill":
                return self._hit(team.kill(name))
            case "stop":
                notable = action.for_s > self._timeouts.transaction_s
                return self._hit(team.stop(name, action.for_s, notable=notable))
            case "join":
                if name in team.members:  # told to leave, it has not yet
                    return False
                team.start(name, self._configure(name))
                return True
            case "leave":
                return team.leave(name)
            case "broker_stop" | "broker_kill":
                return self._brokers.restart(kill=action.kind == "broker_kill")
            case "refresh" | "promote":
                self._operator.do(action.kind)
                return True
            case "controller_kill":
                self._reaper.kill_controller(name)
                return True
            case "controller_stop":
                return team.stop(name, action.for_s, notable=True)
            case "trainer_kill":
                self._reaper.kill_training(action.for_s)
                return True
            case "fault":
                self._network.inject(action.fault, name, action.for_s)
                return True

    def _hit(self, done: bool) -> bool:
        if done:
            self._hits.append(time.monotonic())
        return done

    def _recover(self) -> None:
        """Nobody is stopped, the broker is up, and every partition has commits again, while events still flow."""
        self._brokers.settle()
        self._team.settle()
        self._network.settle()
        self._wait_for_commits(self._watch.committed, _RECOVER_TIMEOUT_S, "partitions without a commit again")

    def _wait_for_commits(self, before: dict[int, int], timeout_s: float, problem: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._turn(" · waiting for every partition")
            now = self._watch.committed
            still = [p for p in range(self._options.partitions) if now.get(p, -1) <= before.get(p, 0)]
            if not still:
                return
            if time.monotonic() > deadline:
                raise ChaosError(f"{problem} within {timeout_s:g} s: partitions {still}; before {before}, now {now}")

    def _drain(self) -> float:
        """No more events; everything is committed; members leave. Seconds from the last event on."""
        began = time.monotonic()
        self._operator.close()
        self._load.stop()
        self._inputs = oracle.read_inputs(oracle.read_topic(self._brokers.address, self._settings.topic_names.events))
        wanted: dict[int, int] = {}
        for partition, offset in (one.place for one in self._inputs):
            wanted[partition] = max(wanted.get(partition, 0), offset + 1)
        while any(self._watch.committed.get(p, -1) < end for p, end in wanted.items()):
            self._turn(" · draining")
            # What is missing then is lost, and the oracle says so.
            if time.monotonic() - began > _DRAIN_TIMEOUT_S:
                break
        self._team.wait_gone()
        self._committed = self._watch.latest()
        return time.monotonic() - began

    def _turn(self, doing: str = "", seconds: float = _TURN_S) -> None:
        self._team.tend()
        self._network.tend()
        self._reaper.tend()
        self._live.update(self._line(doing), refresh=False)
        time.sleep(seconds)

    def _line(self, doing: str) -> Text:
        elapsed_s, done = time.monotonic() - self._began, self._done
        said = [
            f"{elapsed_s // 60:.0f}:{elapsed_s % 60:02.0f}",
            f"{done['kill']} kills",
            f"{done['stop']} stops",
            f"{self._brokers.restarts} broker restarts",
            f"{len(self._load.acked) if hasattr(self, '_load') else 0:,} in",
            f"{sum(self._watch.committed.values()) if hasattr(self, '_watch') else 0:,} committed",
            f"members {' '.join(sorted(self._team.members))}",
        ]
        return Text(" · ".join(said) + doing)

    def _judge(self) -> ChaosResult:
        with self._console.status("reading the topics back"):
            topics, address = self._settings.topic_names, self._brokers.address
            scores = oracle.read_topic(address, topics.scores)
            outputs, broken = oracle.read_outputs(scores, oracle.read_topic(address, topics.dead_letters))
        again = self._sent_again()
        said = oracle.compare_outputs(self._inputs, outputs, broken, again)
        takeovers = takeovers_s(self._hits, self._watch.samples)
        result = ChaosResult(
            minutes=self._options.minutes,
            seed=self._options.seed,
            members=self._options.members,
            protocol=self._options.protocol,
            broker=self._brokers.version,
            inputs=said.inputs,
            outputs=said.outputs,
            scores=said.scores,
            dead_letters=said.dead_letters,
            lost=said.lost,
            doubled=said.doubled,
            unexpected=said.unexpected,
            invalid=said.invalid,
            upstream_aborted=self._load.aborted_transactions,
            kills=self._done["kill"],
            stops=self._done["stop"],
            joins=self._done["join"],
            leaves=self._done["leave"],
            broker_restarts=self._brokers.restarts,
            proxy_faults=self._done["fault"],
            refreshes=self._operator.done.count("refresh"),
            promotions_by_hand=self._operator.done.count("promote"),
            trainer_kills=self._reaper.trainings,
            controller_kills=self._reaper.controllers,
            controller_stops=self._done["controller_stop"],
            skipped=self._skipped,
            takeovers=len(takeovers),
            takeover_s_p50=round(percentile(takeovers, 0.5), 2),
            takeover_s_p99=round(percentile(takeovers, 0.99), 2),
            exit_codes={str(code): n for code, n in Counter(e.code for e in self._team.exits).items()},
        )
        result.faults = [
            *said.first,
            *oracle.compare_load(self._inputs, self._load.acked, self._load.unknown),
            *self._team.faults(),
            *([f"what was done by hand ended with {self._operator.error!r}"] if self._operator.error else []),
        ]
        self._compare_rows(result, scores)
        left_out = self._brokers.markers_left_out()
        result.markers_left_out = len(left_out)
        result.notes = [f"the broker left transaction markers out, so doubles there are its own: {e}" for e in left_out]
        result.notes += [
            f"the load's producer sent {one} again, and the broker took it twice: two inputs" for one in again
        ]
        result.notes += [f"not done by hand: {what}" for what in self._operator.refused]
        return result

    def _sent_again(self) -> list[str]:
        """Ids that are in the input twice by the load's client and a broker, and by nobody else."""
        events = self._settings.topic_names.events
        repeated = oracle.repeated_ids(self._inputs).items()
        return [record_id for record_id, places in repeated if self._brokers.sent_again(events, places)]

    def _compare_rows(self, result: ChaosResult, scores: list[Message]) -> None:
        """Rows and scores against those of a calm run."""
        with self._console.status("a calm run over the same records"):
            settings = self._settings
            pipeline = service.build_pipeline(settings, service.served_model(settings), settings.topic_names)
            versions = oracle.stretches(scores)
            announced = self._announced()
            result.faults += oracle.compare_versions(versions, [self._model.name, *(one.version for one in announced)])
            result.promotions = sum(one.decided_by == "refresh" for one in announced)
            result.swaps_scored = sum(len(parts) - 1 for parts in versions.values())
            calm = oracle.calm_run(pipeline, self._inputs, versions, self._models(versions))
            changelog = oracle.read_topic(self._brokers.address, settings.topic_names.changelog)
        rows = oracle.compare_rows(calm.rows, oracle.latest_rows(changelog), calm.layouts)
        result.rows_compared, result.rows_different = rows.compared, rows.different
        result.max_row_error = rows.max_error
        result.scores_compared = len(calm.scores)
        result.scores_different, different = oracle.compare_scores(calm.scores, scores)
        controls = oracle.control_rows(changelog)
        result.faults += [*rows.first, *different, *oracle.compare_controls(controls, self._committed, versions)]

    def _announced(self) -> list[Announcement]:
        """In order; the topic is compacted, but nothing of it yet."""
        messages = oracle.read_topic(self._brokers.address, self._settings.topic_names.models)
        return [msgspec.json.decode(message.value() or b"", type=Announcement) for message in messages]

    def _models(self, versions: Mapping[int, Sequence[oracle.Stretch]]) -> dict[str, Model]:
        """Every version that scored something, as members serve it."""
        registry = Registry(self._model)
        named = {part.version for parts in versions.values() for part in parts}
        return {version: service.as_configured(self._settings, registry.read(version)) for version in named}


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM inside raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

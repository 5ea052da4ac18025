"""The whole demo in order: data, model, broker, topics, a member, events in, scores out, the summary.

Everything that is started is stopped in the opposite order, also after Ctrl-C: the member, then the broker, then the
folder for temporary files.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console

from stream_adapt.demo import drifted, place, prepare
from stream_adapt.demo.drifted import Story
from stream_adapt.demo.member import READY_TIMEOUT_S, Member
from stream_adapt.demo.place import Place
from stream_adapt.demo.prepare import Data, Followed
from stream_adapt.demo.tally import ADAPTED, UNREFRESHED, Floats, Tally
from stream_adapt.demo.view import Stage, View, comparison, last_quarter
from stream_adapt.demo.wire import Feed, Reader
from stream_adapt.errors import ConfigError, StreamAdaptError
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import EmbeddedKafka

#: Nothing read for so long while events wait: the demo gives up.
_STALLED_S = 60.0
#: How long one turn waits for scores.
_READ_S = 0.05
_END_TIMEOUT_S = 30.0
#: The pace, if none is given: all events in so many seconds. With a drift there has to be time for a training.
_SECONDS, _SECONDS_WITH_DRIFT = 30.0, 240.0
#: Scores in the topic have seven digits.
_EQUAL = 1e-6


class DemoError(StreamAdaptError):
    """Events without an output, outputs too many, or no output for too long: a promise of the product was not kept."""


@dataclass(frozen=True)
class DemoOptions:
    """What to show, and how."""

    source: str = "movielens-100k"
    mapping: Path | None = None  # of a log of one's own
    drift: bool = False  # the world changes on the way, and the model is refreshed
    fast: bool = False  # without a pace
    as_json: bool = False  # fast; the caller prints the result as JSON
    bootstrap_servers: str | None = None  # None: the embedded Kafka
    partitions: int = 4
    output: Path = Path("reports")  # folder for the plot
    retrain: bool = False  # even if the model is in the cache
    seconds: float | None = None  # the pace: all events in this time
    metrics_port: int | None = None  # None: a free one
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # more of the member's, by section

    @property
    def pace_s(self) -> float | None:
        """Seconds for all events; None: no pace. A drift needs one: else all is over before a model is trained."""
        if self.drift:
            return self.seconds or _SECONDS_WITH_DRIFT
        return None if self.fast or self.as_json else self.seconds or _SECONDS


class DemoResult(msgspec.Struct, frozen=True):
    """What was seen, all of it in the topics.

    `events_per_s` is outputs through the wall-clock seconds from the first event produced to the last output read by
    the independent reader: the demo's own producing and reading included, and with a pace no more than the pace.
    `stream-adapt bench e2e` measures the loop by itself. `seconds` is all of the demo, pretraining and broker included.
    """

    source: str
    events: int
    scores: int
    dead_letters: int
    events_per_s: float
    auc_adapted: float
    auc_frozen: float
    logloss_adapted: float
    logloss_frozen: float
    gauc_adapted: float
    gauc_frozen: float
    broker: str
    delivery: str
    partitions: int
    model_version: str
    plot: str
    seconds: float


class DriftResult(DemoResult, frozen=True):
    """The same with a drift on the way.

    `…_at` are counts of streamed events: those before the first changed one; those before the alarm, as its record
    says; those before the first one that a refreshed model scored. None: it did not happen. `auc_last_quarter` is of
    the scores in the topic, `auc_last_quarter_without_refresh` of what the first model alone says of the same records.
    """

    drift_at: int
    alarm_at: int | None
    promoted_at: int | None
    auc_last_quarter: float
    auc_last_quarter_without_refresh: float


def run_demo(options: DemoOptions) -> DemoResult:
    """Runs the demo; call it in the main thread. Prints to stderr alone.

    Raises:
        DemoError: an event has no output, or more than one.
        MemberError: `stream-adapt run` ended by itself; with the tail of its log.
        ConfigError, DataError, ModelError, KafkaRefused: as each says.
        KeyboardInterrupt: SIGINT or SIGTERM; everything is stopped by then.
    """
    _check(options)
    with _signals_as_before(), ExitStack() as stack, _interruptible():
        return _Demo(options, stack).run()


def _check(options: DemoOptions) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib, which draws the demo's plot, is missing: pip install 'stream-adapt[demo]'")
    if options.seconds is not None and options.seconds <= 0:
        raise ConfigError(f"seconds={options.seconds:g} must be above 0")
    if options.partitions < 1:
        raise ConfigError(f"partitions={options.partitions} must be above 0")
    if options.drift and options.fast:
        raise ConfigError(
            "drift and fast: a stream that is over in seconds leaves no time to train a model; see --seconds"
        )


class _Demo:
    """One run; what must be stopped afterwards is put on the stack."""

    def __init__(self, options: DemoOptions, stack: ExitStack) -> None:
        self._options = options
        self._stack = stack
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._broker = ""
        self._model = Path()
        self._began = time.monotonic()

    def run(self) -> DemoResult:
        data = self._open_data()
        self._model = self._get_model(data)
        drift_at = None
        if self._options.drift:
            data, drift_at = drifted.drifted(data)
        followed, events = prepare.choose_user(data), prepare.encode(data.second())
        place = self._settle(self._model)
        tally = Tally([event.event_id for event in events], place.topics.scores, followed.user_id)
        settings = properties.common(place.settings)
        reader = self._stack.enter_context(Reader(settings, [place.topics.scores, place.topics.dead_letters]))
        beside = self._stack.enter_context(Reader(settings, [place.topics.alarms, place.topics.refresh]))
        story = Story(place.topics, drift_at) if drift_at is not None else None
        member = self._start_member(place)
        if story is not None:
            self._await_controller(story, beside, member)
        pace_s = self._options.pace_s
        feed = self._stack.enter_context(
            Feed(settings, place.topics.events, events, None if pace_s is None else len(events) / pace_s)
        )
        with View(self._console, self._stage(place, followed, len(events)), tally, story) as view:
            elapsed_s = _flow(feed, reader, member, tally, view, partial(_news, story, beside, tally))
        member.stop()
        tally.add(reader.read_to_end(_END_TIMEOUT_S))
        if story is not None:
            story.add(beside.read_to_end(_END_TIMEOUT_S))
        return self._conclude(data, place, tally, elapsed_s, story)

    def _open_data(self) -> Data:
        with self._console.status("data"):
            data = prepare.open_data(self._options.source, self._options.mapping)
        self._say("data", f"{data.source.name}: {data.count:,} events; pretraining on the first half, then streaming")
        return data

    def _get_model(self, data: Data) -> Path:
        began = time.monotonic()
        path, cached = prepare.pretrained(data, self._console, retrain=self._options.retrain)
        if cached:
            self._say("model", f"{path.name}, pretrained earlier on the same events (--retrain makes a new one)")
        else:
            self._say("model", f"{path.name}, pretrained in {time.monotonic() - began:.0f} s, kept in {path.parent}")
        return path

    def _settle(self, model: Path) -> Place:
        """Broker, configuration, topics."""
        options = self._options
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-adapt-demo-")))
        address = options.bootstrap_servers or self._start_broker()
        own_broker = options.bootstrap_servers is not None
        self._broker = self._broker or f"Kafka at {address}"
        self._say("broker", f"{self._broker}, {address}" if not own_broker else self._broker)
        if options.drift:  # what is trained on the way does not belong into the cache
            model = shutil.copytree(model, folder / "models" / model.name)
        settled = place.prepare_place(
            folder,
            model,
            address,
            options.partitions,
            options.metrics_port,
            own_broker=own_broker,
            settings=options.settings or (drifted.SETTINGS if options.drift else {}),
        )
        place.create(settled)
        names = settled.topics
        self._say("topics", f"{names.events} ({options.partitions} partitions), {names.scores}, {names.dead_letters}")
        return settled

    def _start_broker(self) -> str:
        kafka = EmbeddedKafka()
        self._stack.callback(kafka.stop)
        with self._console.status("starting Apache Kafka"):
            kafka.start()
        self._broker = f"Apache Kafka {kafka.version} (embedded)"
        return kafka.bootstrap_servers

    def _start_member(self, place: Place) -> Member:
        member = Member(place.config_path, place.log, place.environment, place.metrics)
        with self._console.status("starting stream-adapt run"):
            self._stack.enter_context(member).wait_until_ready()
        self._say("member", f"stream-adapt run, {place.settings.delivery}; its log: {place.log}")
        self._say("metrics", place.metrics_url)
        return member

    def _await_controller(self, story: Story, reader: Reader, member: Member) -> None:
        """Until somebody leads the refresh: what is due then is not to be late because a process starts.

        Raises:
            DemoError: nobody does for a long time. MemberError: the member ended.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        with self._console.status("starting the refresh controller"):
            while story.state is None:
                story.add(reader.read(_READ_S))
                member.check()
                if time.monotonic() > deadline:
                    raise DemoError(f"nobody leads the refresh after {READY_TIMEOUT_S:g} s.{member.log_tail()}")
        self._say("refresh", f"leads; alarms and states: {story.topics.alarms}, {story.topics.refresh}")

    def _stage(self, place: Place, followed: Followed, events: int) -> Stage:
        title = f"stream-adapt · {self._options.source} · {self._broker} · {place.settings.delivery}"
        return Stage(title, place.metrics_url, events, followed)

    def _conclude(self, data: Data, place: Place, tally: Tally, elapsed_s: float, story: Story | None) -> DemoResult:
        faults = tally.faults()
        if faults:
            raise DemoError(f"{tally.events} events and {tally.outputs} outputs: {'; '.join(faults)}")
        path = self._options.output / f"demo-{'drift-' if story else ''}{prepare.file_name(data.source.name)}.png"
        alone = self._without_refresh(place, tally) if story else None
        self._draw(tally, path, f"{data.source.name}: {tally.scores:,} events through {self._broker}", alone, story)
        adapted, frozen = tally.overall()
        result = DemoResult(
            source=data.source.name,
            events=tally.events,
            scores=tally.scores,
            dead_letters=tally.dead_letters,
            events_per_s=round(tally.events / elapsed_s, 1),
            auc_adapted=adapted.auc,
            auc_frozen=frozen.auc,
            logloss_adapted=adapted.log_loss,
            logloss_frozen=frozen.log_loss,
            gauc_adapted=adapted.grouped_auc,
            gauc_frozen=frozen.grouped_auc,
            broker=self._broker,
            delivery=place.settings.delivery,
            partitions=place.settings.topics.partitions,
            model_version=tally.model_version,
            plot=str(path),
            seconds=round(time.monotonic() - self._began, 1),
        )
        self._console.print(comparison(adapted, frozen))
        if story is not None and alone is not None:
            result = self._with_drift(result, tally, story, alone)
        self._tell(result, place, tally)
        return result

    def _without_refresh(self, place: Place, tally: Tally) -> Floats:
        """Scores `[n]` of the same events by the first model alone.

        Raises:
            DemoError: before the model was refreshed they are not those in the topic.
        """
        from stream_adapt.demo import unrefreshed  # what serves takes seconds to import

        settings, columns = place.settings, tally.columns()
        with self._console.status("the same events without a refresh"):
            with Reader(properties.common(settings), [place.topics.events]) as reader:
                messages = reader.read_to_end(_END_TIMEOUT_S)
            alone = unrefreshed.beside(columns, unrefreshed.score_alone(settings, settings.model.path, messages))
        count, difference = unrefreshed.agreement(columns, alone)
        if not difference <= _EQUAL:
            raise DemoError(
                f"the first {count:,} events, scored again by {tally.first_version} from the same records, differ from "
                f"the scores in the topic by up to {difference:.2g}"
            )
        self._say(
            "checked",
            f"{count:,} events before a refreshed model, scored again from their records: the same scores as in the "
            f"topic, to {max(difference, 1e-7):.0e}",
        )
        return alone

    def _with_drift(self, result: DemoResult, tally: Tally, story: Story, alone: Floats) -> DriftResult:
        quarters = drifted.last_quarter(tally, alone)
        self._console.print(last_quarter(quarters))
        promoted_at = story.promoted_at(tally)
        told = [f"alarm after {story.alarm_at:,}"] if story.alarm_at is not None else ["no alarm"]
        told += [f"refreshed model from {promoted_at:,} on"] if promoted_at is not None else ["no refreshed model"]
        self._say("drift", f"after {story.drift_at:,} of {result.events:,} events; {', '.join(told)}")
        for line in story.ending():
            self._say("refresh", line)
        if promoted_at is None and story.under_way:
            self._say(
                "", f"the stream was over too soon; --seconds {2 * (self._options.pace_s or 0):g} gives it longer"
            )
        return DriftResult(
            **msgspec.structs.asdict(result),
            drift_at=story.drift_at,
            alarm_at=story.alarm_at,
            promoted_at=promoted_at,
            auc_last_quarter=quarters[ADAPTED].auc,
            auc_last_quarter_without_refresh=quarters[UNREFRESHED].auc,
        )

    def _draw(self, tally: Tally, path: Path, title: str, alone: Floats | None, story: Story | None) -> None:
        from stream_adapt.demo import plot

        with self._console.status("drawing"):
            if story is None or alone is None:
                plot.save(tally.curves(), path, title)
            else:
                plot.save_drift(tally.curves({UNREFRESHED: alone}), path, title, story.marks(tally))

    def _tell(self, result: DemoResult, place: Place, tally: Tally) -> None:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.reasons.most_common())
        self._say(
            "checked",
            f"{result.events:,} events in = {result.scores:,} scores + {result.dead_letters:,} dead letters"
            f"{f' ({reasons})' if reasons else ''}: one output for each event id, read back with read_committed",
        )
        self._say("speed", f"{result.events_per_s:,.0f} events/s from the first event produced to the last score read")
        self._say("metrics", f"were at {place.metrics_url} while it ran; `stream-adapt run` serves the same")
        if self._options.bootstrap_servers:
            self._say("topics", f"{place.settings.app.name}.* stay on your broker until you delete them")
        self._say("plot", result.plot)
        self._console.print("\n[bold]Next[/bold]")
        for command, what in _next_commands(self._model, drifted=self._options.drift):
            self._console.print(f"  [cyan]{command}[/cyan]\n      {what}")

    def _say(self, what: str, text: str) -> None:
        self._console.print(f"[bold]{what:<8}[/bold] ", end="")
        self._console.print(text, markup=False)


def _flow(feed: Feed, reader: Reader, member: Member, tally: Tally, view: View, told: Callable[[], list[str]]) -> float:
    """Events in, outputs out, until each event has one; the seconds from the first event to the last output.

    `told` says what else is new, a line each.

    Raises:
        DemoError: nothing came for too long.
        MemberError, KafkaRefused: as each says.
    """
    began = time.monotonic()
    while not (feed.done and tally.outputs >= feed.produced):
        feed.step()
        tally.add(reader.read(_READ_S if feed.done or feed.paced else 0.0))
        member.check()
        if feed.produced > tally.outputs and time.monotonic() - max(tally.last_at, began) > _STALLED_S:
            raise DemoError(
                f"{feed.produced:,} events are in, {tally.outputs:,} outputs are out, and none came for "
                f"{_STALLED_S:g} s.{member.log_tail()}"
            )
        for line in told():
            view.say(line)
        view.show(feed.produced)
    view.show(feed.produced, last=True)
    return tally.last_at - began


def _news(story: Story | None, reader: Reader, tally: Tally) -> list[str]:
    """What became of the drift since the last call, if there is one."""
    if story is None:
        return []
    story.add(reader.read(0.0))
    return story.news(tally)


def _next_commands(model: Path, *, drifted: bool) -> list[tuple[str, str]]:
    drift = ("stream-adapt demo --drift", "the world changes on the way, and the model is refreshed; some minutes")
    return [
        *(() if drifted else (drift,)),
        ("stream-adapt demo movielens-1m", "ten times the events; pretraining takes some minutes"),
        ("stream-adapt demo LOG.csv --mapping MAPPING.yaml", "your own log"),
        ("stream-adapt broker --port 9092", "an Apache Kafka of your own, to be left running; then, beside it:"),
        (
            f"export STREAM_ADAPT_MODEL_PATH={model}\n  stream-adapt topics create\n  stream-adapt run",
            "this model, waiting for your events on stream-adapt.events (schemas/event-v1.json)",
        ),
    ]


@contextmanager
def _signals_as_before() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM inside raises KeyboardInterrupt; what is stopped afterwards is not interrupted."""

    def ignore() -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        ignore()
        raise KeyboardInterrupt

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        ignore()

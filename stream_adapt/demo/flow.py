"""The whole demo in order: data, model, broker, topics, a member, events in, scores out, the summary.

Everything that is started is stopped in the opposite order, also after Ctrl-C: the member, then the broker, then the
folder for temporary files.
"""

from __future__ import annotations

import importlib.util
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from stream_adapt.demo import place, prepare
from stream_adapt.demo.member import Member
from stream_adapt.demo.place import Place
from stream_adapt.demo.prepare import Data, Followed
from stream_adapt.demo.tally import Tally
from stream_adapt.demo.view import Stage, View, comparison
from stream_adapt.demo.wire import Encoded, Feed, Reader
from stream_adapt.errors import ConfigError, StreamAdaptError
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import EmbeddedKafka

#: Nothing read for so long while events wait: the demo gives up.
_STALLED_S = 60.0
#: How long one turn waits for scores.
_READ_S = 0.05
_END_TIMEOUT_S = 30.0


class DemoError(StreamAdaptError):
    """Events without an output, outputs too many, or no output for too long: a promise of the product was not kept."""


@dataclass(frozen=True)
class DemoOptions:
    """What to show, and how."""

    source: str = "movielens-100k"
    mapping: Path | None = None  # of a log of one's own
    fast: bool = False  # without a pace
    as_json: bool = False  # fast; the caller prints the result as JSON
    bootstrap_servers: str | None = None  # None: the embedded Kafka
    partitions: int = 4
    output: Path = Path("reports")  # folder for the plot
    retrain: bool = False  # even if the model is in the cache
    seconds: float = 30.0  # the pace: all events in this time
    metrics_port: int | None = None  # None: a free one


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
    if options.seconds <= 0 or options.partitions < 1:
        raise ConfigError(f"seconds={options.seconds:g} and partitions={options.partitions} must be above 0")


class _Demo:
    """One run; what must be stopped afterwards is put on the stack."""

    def __init__(self, options: DemoOptions, stack: ExitStack) -> None:
        self._options = options
        self._stack = stack
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._broker = ""
        self._began = time.monotonic()

    def run(self) -> DemoResult:
        data = self._open_data()
        model = self._get_model(data)
        followed, events = prepare.choose_user(data), prepare.encode(data.second())
        place = self._settle(model)
        tally = Tally(len(events), place.topics.scores, followed.user_id)
        settings = properties.common(place.settings)
        reader = self._stack.enter_context(Reader(settings, [place.topics.scores, place.topics.dead_letters]))
        member = self._start_member(place)
        pace = None if self._options.fast or self._options.as_json else len(events) / self._options.seconds
        feed = self._stack.enter_context(Feed(settings, place.topics.events, events, pace))
        with View(self._console, self._stage(place, followed, len(events)), tally) as view:
            elapsed_s = _flow(feed, reader, member, tally, view)
        member.stop()
        tally.add(reader.read_to_end(_END_TIMEOUT_S))
        return self._conclude(data, events, place, tally, elapsed_s)

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
        settled = place.prepare_place(
            folder, model, address, options.partitions, options.metrics_port, own_broker=own_broker
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

    def _stage(self, place: Place, followed: Followed, events: int) -> Stage:
        title = f"stream-adapt · {self._options.source} · {self._broker} · {place.settings.delivery}"
        return Stage(title, place.metrics_url, events, followed)

    def _conclude(self, data: Data, events: list[Encoded], place: Place, tally: Tally, elapsed_s: float) -> DemoResult:
        faults = tally.faults(event.event_id for event in events)
        if faults:
            raise DemoError(f"{len(events)} events and {tally.outputs} outputs: {'; '.join(faults)}")
        plot = self._options.output / f"demo-{prepare.file_name(data.source.name)}.png"
        self._draw(tally, plot, f"{data.source.name}: {tally.scores:,} events through {self._broker}")
        adapted, frozen = tally.overall()
        result = DemoResult(
            source=data.source.name,
            events=len(events),
            scores=tally.scores,
            dead_letters=tally.dead_letters,
            events_per_s=round(len(events) / elapsed_s, 1),
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
            plot=str(plot),
            seconds=round(time.monotonic() - self._began, 1),
        )
        self._console.print(comparison(adapted, frozen))
        self._tell(result, place, tally)
        return result

    def _draw(self, tally: Tally, path: Path, title: str) -> None:
        from stream_adapt.demo import plot

        with self._console.status("drawing"):
            plot.save(tally.curves(), path, title)

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
        for command, what in _next_commands(place.settings.model.path):
            self._console.print(f"  [cyan]{command}[/cyan]\n      {what}")

    def _say(self, what: str, text: str) -> None:
        self._console.print(f"[bold]{what:<8}[/bold] ", end="")
        self._console.print(text, markup=False)


def _flow(feed: Feed, reader: Reader, member: Member, tally: Tally, view: View) -> float:
    """Events in, outputs out, until each event has one; the seconds from the first event to the last output.

    Raises:
        DemoError: nothing came for too long.
        MemberError, KafkaRefused: as each says.
    """
    began = time.monotonic()
    while not (feed.done and tally.outputs >= feed.produced):
        feed.step()
        tally.add(reader.read(_READ_S if feed.done or feed.paced else 0.0))
        member.check()
        if feed.produced > tally.outputs and time.monotonic() - tally.last_at > _STALLED_S:
            raise DemoError(
                f"{feed.produced:,} events are in, {tally.outputs:,} outputs are out, and none came for "
                f"{_STALLED_S:g} s.{member.log_tail()}"
            )
        view.show(feed.produced)
    view.show(feed.produced, last=True)
    return tally.last_at - began


def _next_commands(model: Path) -> list[tuple[str, str]]:
    return [
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

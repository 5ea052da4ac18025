"""What things cost on this machine.

`bench e2e`, what the loop costs: measured against a loop that does nothing but carry the same records, in the same run.

The pass-through is what the Kafka client alone can do from Python with these records: consume, decode the JSON,
encode a score record of the same fields and size, produce, commit offsets in the same transaction. Same client,
properties, broker, topics, batch size and process; nothing is looked up, scored or learned. The ratio of the two,
taken round by round, is the share of that which is left when the work is done.

A round reads all N events from the input topic with a new consumer group. Time runs from the first poll that returns
records to the return of the last commit; imports, compilation and joining the group are outside.

`bench restore`, what bringing rows back costs: against the same consumer that only reads the same records, in the same
run. Each of N users has three versions in the changelog, far apart, as compaction leaves them at worst.

`bench step`, what the rule alone costs an event.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from confluent_kafka import Producer, TopicPartition

from stream_adapt import service
from stream_adapt.adapt import Adapter
from stream_adapt.commit import Outcome
from stream_adapt.config import Config, load
from stream_adapt.datasets.source import STARS
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.datasets.synthetic import events as synthetic_events
from stream_adapt.decode import Decoder, event_struct
from stream_adapt.follow import Standing
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.consumer import InputConsumer, RebalanceListener
from stream_adapt.kafka.embedded import KAFKA_VERSION, EmbeddedKafka
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.kafka.topics import create_topics
from stream_adapt.learner import rules
from stream_adapt.learner.encoder import Bag, Categorical, Feature, Numeric, features_struct
from stream_adapt.models import LearnerSpec, RuleName, read_model
from stream_adapt.record import Batch, Outputs, RawBatch, Score, UserEvent, UserId, Work
from stream_adapt.restore import Slice
from stream_adapt.runner import LONG_SLICE_S, Observers, Pace
from stream_adapt.shutdown import Shutdown
from stream_adapt.state.row import ControlRow
from stream_adapt.testing.model import random_model

#: What the events of the benchmark carry: a record of about 250 bytes.
FEATURES: dict[str, Feature] = {"category": Categorical(), "tags": Bag(), "price": Numeric(hats=5)}
STAGES = ("poll", "decode", "adapt", "emit", "changelog", "commit")


@dataclass(frozen=True)
class EndToEnd:
    """Parameters of `bench e2e`."""

    events: int = 400_000
    rounds: int = 5
    partitions: int = 4
    batch: int = 16_384
    delivery: Literal["exactly_once", "at_least_once"] = "exactly_once"
    covariance: Literal["diagonal", "full"] = "diagonal"
    users: Literal["unique", "movielens-like"] = "movielens-like"
    bootstrap_servers: str | None = None


class Result(msgspec.Struct):
    """What `bench e2e --json` prints; rates are medians over the rounds, ratios medians of the rounds' ratios."""

    ratio: float  # the loop, changelog and all, ÷ pass-through
    events_per_s: float
    pass_through_per_s: float
    stages_us: dict[str, float]  # microseconds an event
    rows_per_event: float  # rows written to the changelog ÷ events; items' rows count, too
    user_rows_per_event: float
    bytes_out_per_event: float  # scores
    batch: int
    delivery: str
    broker: str
    ratios: list[float]  # round by round


@dataclass
class Stopwatch:
    """Watches the loop like metrics do, and keeps only what the benchmark reports."""

    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    started: float = 0.0
    ended: float = 0.0
    events: int = 0
    bytes_out: int = 0
    _batches: list[Batch] = field(default_factory=list)
    _polling: float = 0.0

    def tick(self, _consumer: InputConsumer, _shards: dict[int, ControlRow]) -> None:
        pass

    def stage(self, name: str, seconds: float) -> None:
        if name == "poll":
            self._polling = seconds
        elif self.started:
            self.stages[name] += seconds

    def polled(self, records: int) -> None:
        if records and not self.started:
            self.started = time.perf_counter() - self._polling
        if self.started:
            self.stages["poll"] += self._polling

    def committed(self, work: Work, _outcome: Outcome) -> None:
        self.ended = time.perf_counter()
        self.events += len(work.batch)
        self._batches.append(work.batch)
        self.bytes_out += sum(len(value or b"") for block in work.outputs for value in block.values)

    def aborted(self) -> None:
        pass

    def rebalanced(self, _kind: str, _partitions: Collection[int]) -> None:
        pass

    def restoring(self, _done: Slice) -> None:
        pass

    def following(self, _standing: Standing, _waiting: Mapping[int, str]) -> None:
        pass

    def rows(self) -> tuple[int, int]:
        """Users' and items' rows that were changed, once for each transaction. Counted afterwards: it takes time."""
        users = items = 0
        for batch in self._batches:
            partitions = batch.partitions.tolist()
            users += len(set(zip(partitions, batch.user_ids, strict=True)))
            items += len(set(zip(partitions, batch.item_ids, strict=True)))
        return users, items

    @property
    def per_s(self) -> float:
        """Events a second."""
        return self.events / (self.ended - self.started)


def end_to_end(parameters: EndToEnd, progress: Callable[[str], None] = lambda _: None) -> Result:
    """Rounds of pass-through and loop in turn, on one broker; see the module's docstring."""
    service.calm_collector()  # as in `run`, for both loops
    with _broker(parameters) as (bootstrap, broker), tempfile.TemporaryDirectory() as folder:
        config = _configuration(parameters, bootstrap, Path(folder))
        progress(f"producing {parameters.events:,} events")
        _fill(config, parameters)
        _one_loop(config, min(parameters.events, 2 * parameters.batch))  # compiles, and warms the broker up
        loops, carried = [], []
        for number in range(parameters.rounds):
            carried.append(_pass_through(config, parameters.events))
            loops.append(_one_loop(config, parameters.events))
            progress(f"round {number + 1}: loop {loops[-1].per_s:,.0f}/s, pass-through {carried[-1]:,.0f}/s")
    return _result(parameters, broker, loops, carried)


def _result(parameters: EndToEnd, broker: str, loops: list[Stopwatch], carried: list[float]) -> Result:
    ratios = [loop.per_s / alone for loop, alone in zip(loops, carried, strict=True)]
    per_event = {stage: statistics.median(1e6 * loop.stages[stage] / loop.events for loop in loops) for stage in STAGES}
    users, items = loops[-1].rows()
    return Result(
        ratio=round(statistics.median(ratios), 3),
        events_per_s=round(statistics.median(loop.per_s for loop in loops)),
        pass_through_per_s=round(statistics.median(carried)),
        stages_us={stage: round(us, 3) for stage, us in per_event.items()},
        rows_per_event=round((users + items) / loops[-1].events, 3),
        user_rows_per_event=round(users / loops[-1].events, 3),
        bytes_out_per_event=round(loops[-1].bytes_out / loops[-1].events, 1),
        batch=parameters.batch,
        delivery=parameters.delivery,
        broker=broker,
        ratios=[round(ratio, 3) for ratio in ratios],
    )


@contextmanager
def _broker(parameters: EndToEnd | Restore) -> Iterator[tuple[str, str]]:
    if parameters.bootstrap_servers:
        yield parameters.bootstrap_servers, parameters.bootstrap_servers
        return
    with EmbeddedKafka() as kafka:
        yield kafka.bootstrap_servers, f"Apache Kafka {KAFKA_VERSION} (embedded)"


def _configuration(parameters: EndToEnd, bootstrap: str, folder: Path) -> Config:
    random_registry(folder, LearnerSpec(FEATURES, STARS, covariance=parameters.covariance), list(events(5_000)))
    config = load(
        None,
        {},
        app__name=f"bench-{uuid.uuid4().hex[:8]}",
        kafka__bootstrap_servers=bootstrap,
        topics__partitions=parameters.partitions,
        model__path=str(folder),
        state__dir=str(folder / "state"),
        input__max_batch=parameters.batch,
        delivery=parameters.delivery,
    ).config
    create_topics(properties.common(config), service.topic_specs(config))
    return config


def random_registry(folder: Path, spec: LearnerSpec, sample: Sequence[UserEvent]) -> None:
    """Writes a model that has met the items and features of a sample, and learned nothing of them."""
    columns = {name: [_typed(event.features.get(name)) for event in sample] for name in FEATURES}
    random_model(folder, spec, sorted({event.item_id for event in sample}), columns)


def _typed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def events(count: int, users: str = "movielens-like") -> Iterator[UserEvent]:
    """Events that touch 0.25 rows each, as MovieLens-100K does in batches of 16,384 over 4 partitions.

    With `unique`, no user comes twice: every event starts, changes and writes a row of its own.
    """
    stream = Synthetic(events=count, drift="none", users=6_000, items=1_700, active=100, burst=150, popularity=0.9)
    for number, event in enumerate(synthetic_events(stream)):
        user = UserId(f"user-{number}") if users == "unique" else event.user_id
        features = {name: event.features[name] for name in FEATURES}
        yield msgspec.structs.replace(event, user_id=user, features=features)


def _fill(config: Config, parameters: EndToEnd) -> None:
    producer = clients.producer({**properties.common(config), "linger.ms": 20, "partitioner": "murmur2_random"})
    for number, event in enumerate(events(parameters.events, parameters.users)):
        producer.produce(config.topic("events"), msgspec.json.encode(event), event.user_id)
        if number % 10_000 == 0:
            _make_room(producer)
    producer.flush()


def _make_room(producer: Producer) -> None:
    """Waits until the client's queue, which takes 100,000 records, is half empty."""
    producer.poll(0)
    while len(producer) > 50_000:
        producer.poll(0.1)


def _one_loop(config: Config, events: int) -> Stopwatch:
    """The real member, in this process, with a group of its own."""
    watch = Stopwatch()
    own = _with_own_group(config)
    create_topics(properties.common(own), service.topic_specs(own))
    pace = Pace(config.input.max_batch, config.input.latency_ms / 1000, events)
    service.serve(own, Shutdown(), lambda _pipeline: watch, pace)
    return watch


def _with_own_group(config: Config) -> Config:
    """A new group begins at the first event; its rows need a changelog of their own."""
    group = uuid.uuid4().hex
    kafka = config.kafka.model_copy(update={"group_id": group})
    topics = config.topics.model_copy(update={"changelog": f"{config.app.name}.{group}.changelog"})
    return config.model_copy(update={"kafka": kafka, "topics": topics})


def _pass_through(config: Config, events: int) -> float:
    """Events a second of a loop that only carries."""
    own = _with_own_group(config)
    consumer = InputConsumer(
        properties.consumer(own), own.topic("events"), start="earliest", listener=RebalanceListener()
    )
    settings = properties.producer(own)
    exactly_once = own.delivery == "exactly_once"
    producer = OutputProducer(
        settings,
        transactional_id=own.transactional_id if exactly_once else None,
        socket_timeout_s=float(settings["socket.timeout.ms"]) / 1000,
        deadline_s=30,
    )
    try:
        return _carry(own, consumer, producer, events, exactly_once)
    finally:
        producer.close()
        consumer.close()


def _carry(config: Config, consumer: InputConsumer, producer: OutputProducer, events: int, exactly_once: bool) -> float:
    decode: Callable[[Any], Any] = msgspec.json.Decoder(event_struct(features_struct(FEATURES), STARS)).decode
    encode = msgspec.json.Encoder().encode
    done, started, version = 0, 0.0, "00000000T000000-00000000"
    while done < events:
        polling = time.perf_counter()
        raw = consumer.poll(config.input.max_batch, config.input.latency_ms / 1000)
        if consumer.paused:
            consumer.resume([*consumer.paused])  # there are no rows to wait for
        if not len(raw):
            continue
        started = started or polling
        partitions, offsets = raw.partitions.tolist(), raw.offsets.tolist()
        decoded = [decode(value) for value in raw.values]
        values = [
            encode(
                Score(
                    e.event_id, e.user_id, e.item_id, 0.5123456, 0.5123456, 0.5123456, 3, 1, 0.5123456, version, 10, (),
                    e.timestamp, e.timestamp, config.topic("events"), p, o,
                )
            )
            for e, p, o in zip(decoded, partitions, offsets, strict=True)
        ]  # fmt: skip
        positions = raw.next_offsets
        if exactly_once:
            producer.begin()
        producer.send(Outputs(config.topic("scores"), raw.keys, values, None, partitions, offsets))
        if exactly_once:
            ends = [TopicPartition(consumer.topic, p, o) for p, o in positions.items()]
            producer.send_offsets(ends, consumer.group_metadata())
            producer.commit()
        else:
            producer.flush()
            consumer.commit(positions)
        consumer.advance(positions)
        done += len(raw)
    return done / (time.perf_counter() - started)


class StepCost(msgspec.Struct):
    """What scoring and adapting cost under one variant of a rule."""

    us_per_event: float  # median over the rounds, one core, encoded events in rows that exist
    least_us_per_event: float  # of the quickest round: what it is while nobody else has the core or its caches
    row_bytes: int  # of a user
    item_row_bytes: int


def step_cost(rounds: int = 25) -> dict[str, StepCost]:
    """Microseconds an event of the compiled rule alone: no decoding, no look-up of rows, no Kafka.

    Every round takes each variant in turn: who else is busy on the machine slows them alike.
    """
    warm = {
        f"{name}-{variant}": _warm(LearnerSpec(FEATURES, STARS, name, **settings))
        for name in get_args(RuleName)
        for variant, settings in rules.find(name).variants.items()
    }
    us: dict[str, list[float]] = {name: [] for name in warm}
    for _ in range(rounds):
        for name, (adapter, batch) in warm.items():
            us[name].append(1e6 * _timed_rule(adapter, batch) / len(batch))
    return {
        name: StepCost(
            round(statistics.median(us[name]), 3),
            round(min(us[name]), 3),
            adapter.users.layout.row_bytes,
            adapter.items.layout.row_bytes,
        )
        for name, (adapter, _) in warm.items()
    }


def _warm(spec: LearnerSpec) -> tuple[Adapter, Batch]:
    """An adapter that has compiled its rule and started the rows of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        sample = list(events(16_384))
        random_registry(Path(folder), spec, sample)
        adapter = Adapter(read_model(Path(folder)))
    batch, _ = Decoder(spec.features, spec.feedback)(_raw(sample))
    adapter.adapt(batch)
    adapter.commit()
    return adapter, batch


def _timed_rule(adapter: Adapter, batch: Batch) -> float:
    """Seconds of the rule alone; the rows are as before afterwards."""
    events = adapter.prepare(batch)
    started = time.perf_counter()
    adapter.learn(events)
    taken = time.perf_counter() - started
    adapter.abort()
    return taken


def _raw(events: list[UserEvent]) -> RawBatch:
    keys: list[bytes | None] = [event.user_id.encode() for event in events]
    values: list[bytes | None] = [msgspec.json.encode(event) for event in events]
    return RawBatch(keys, values, np.zeros(len(events), np.int32), np.arange(len(events)))


@dataclass(frozen=True)
class Restore:
    """Parameters of `bench restore`."""

    users: int = 200_000
    rounds: int = 3
    partitions: int = 4
    bootstrap_servers: str | None = None


class RestoreResult(msgspec.Struct):
    """What `bench restore --json` prints; medians over the rounds."""

    ratio: float  # restoring ÷ merely consuming, records/s
    records_per_s: float  # restored
    rows_per_s: float  # rows there at the end ÷ seconds
    consumed_per_s: float  # merely consumed
    row_bytes: int
    records_read: int
    rows_kept: int
    bytes_per_user: float  # resident bytes ÷ users
    resident_bytes: int  # that the process gained by restoring: rows, index, ids
    broker: str
    ratios: list[float]


#: Versions of each row in the changelog.
_VERSIONS = 3


def restore(parameters: Restore, progress: Callable[[str], None] = lambda _: None) -> RestoreResult:
    """Rounds of consuming and restoring in turn, each in a process of its own; see the module's docstring."""
    with _broker(parameters) as (bootstrap, broker), tempfile.TemporaryDirectory() as folder:
        base = EndToEnd(partitions=parameters.partitions, bootstrap_servers=bootstrap)
        config = _configuration(base, bootstrap, Path(folder))
        progress(f"writing {_VERSIONS} versions of {parameters.users:,} users' rows")
        row_bytes = _fill_changelog(config, parameters)
        rounds = []
        for number in range(parameters.rounds):
            rounds.append(in_a_process(restore_round, config))
            consumed, restored = rounds[-1].consumed_per_s, rounds[-1].records_per_s
            progress(f"round {number + 1}: restored {restored:,.0f}/s, consumed {consumed:,.0f}/s")
    ratios = [one.records_per_s / one.consumed_per_s for one in rounds]
    resident = round(statistics.median(one.resident_bytes for one in rounds))
    return RestoreResult(
        ratio=round(statistics.median(ratios), 3),
        records_per_s=round(statistics.median(one.records_per_s for one in rounds)),
        rows_per_s=round(statistics.median(one.records_per_s * one.rows / one.records for one in rounds)),
        consumed_per_s=round(statistics.median(one.consumed_per_s for one in rounds)),
        row_bytes=row_bytes,
        records_read=rounds[0].records,
        rows_kept=rounds[0].rows,
        bytes_per_user=round(resident / parameters.users, 1),
        resident_bytes=resident,
        broker=broker,
        ratios=[round(ratio, 3) for ratio in ratios],
    )


@dataclass(frozen=True)
class RestoreRound:
    """What one process measured."""

    records: int
    rows: int
    consumed_per_s: float
    records_per_s: float
    resident_bytes: int


def in_a_process(work: Callable[[Config], RestoreRound], config: Config) -> RestoreRound:
    """What `work` returns in a fresh process: its resident memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, config).result()


def _fill_changelog(config: Config, parameters: Restore) -> int:
    """Three versions of every user's row, and nothing committed; returns the bytes of a row."""
    adapter = Adapter(read_model(config.model.path))
    layout = adapter.users.layout
    random = np.random.default_rng(0)
    producer = clients.producer({**properties.common(config), "linger.ms": 20})
    topic = config.topic("changelog")
    chunk = 10_000
    for version in range(_VERSIONS):
        for start in range(0, parameters.users, chunk):
            numbers = range(start, min(start + chunk, parameters.users))
            slab = np.frombuffer(random.bytes(len(numbers) * layout.row_bytes), layout.dtype)
            for user, value in zip(numbers, layout.to_values(slab, np.arange(len(numbers))), strict=True):
                producer.produce(topic, value, b"u:user-%d" % user, user % parameters.partitions)
            _make_room(producer)
        assert producer.flush(60) == 0, f"version {version} was not written"
    return layout.row_bytes


def restore_round(config: Config) -> RestoreRound:
    """Consumes the changelog, then restores it."""
    partitions = list(range(config.topics.partitions))
    consumed_per_s, records = _consume_changelog(config, partitions)
    pipeline = service.build_pipeline(config, service.served_model(config), config.topic_names)
    pipeline.adapter.warm_up()
    service.calm_collector()
    before = _resident_bytes()
    restorer = service.build_restorer(config, pipeline, "", Observers())
    started = time.perf_counter()
    # Without control rows the check after a restore would refuse; what is timed ends before it.
    restorer.begin(dict.fromkeys(partitions, None))
    unread = len(partitions)
    while unread:
        unread -= len(restorer.read(LONG_SLICE_S))
    seconds = time.perf_counter() - started
    restorer.close()
    gc.collect()
    return RestoreRound(
        records, len(pipeline.adapter.users), consumed_per_s, records / seconds, _resident_bytes() - before
    )


def _consume_changelog(config: Config, partitions: list[int]) -> tuple[float, int]:
    """Records/s of the restore's consumer that looks at nothing, and how many there are."""
    reader = service.build_changelog_reader(config)
    records, started = 0, time.perf_counter()
    reader.begin(partitions)
    while reader.tails:
        records += sum(len(found) for found in reader.read(0.02).values())
        reader.finish()
    reader.close()
    return records / (time.perf_counter() - started), records


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

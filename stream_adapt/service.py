"""One member of the consumer group, put together from its configuration and run until it is told to stop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from confluent_kafka import KafkaError
from confluent_kafka.admin import AdminClient, ResourceType  # type: ignore[attr-defined]
from prometheus_client import CollectorRegistry, ProcessCollector

from stream_adapt.adapt import Adapter
from stream_adapt.announcements import Announcement, Announcements
from stream_adapt.breaker import Breaker
from stream_adapt.commit import AtLeastOnce, Delivery, ExactlyOnce
from stream_adapt.config import Config
from stream_adapt.decode import Decoder, Limits
from stream_adapt.emit import Emitter
from stream_adapt.errors import ConfigError, KafkaRefused, ModelError, StateFull
from stream_adapt.follow import Announced, Follower
from stream_adapt.formats import Formats
from stream_adapt.health import Health, HealthServer
from stream_adapt.kafka import clients, properties
from stream_adapt.kafka.changelog import ChangelogReader, check_changelog
from stream_adapt.kafka.consumer import InputConsumer, RebalanceListener
from stream_adapt.kafka.errors import describe
from stream_adapt.kafka.permissions import group_operations, missing, of_member, to_do
from stream_adapt.kafka.producer import OutputProducer
from stream_adapt.kafka.topics import Described, TopicSpec, describe_by_name, product_topics
from stream_adapt.learner.feedback import Feedback
from stream_adapt.learner.rules.events import Screen
from stream_adapt.metrics import Metrics
from stream_adapt.models import Model, Registry, read_model
from stream_adapt.pipeline import Pipeline
from stream_adapt.quarantine import Quarantine
from stream_adapt.record import Flag, TopicNames
from stream_adapt.restore import Expected, Restorer
from stream_adapt.runner import Observer, Observers, Pace, Runner
from stream_adapt.shutdown import Shutdown
from stream_adapt.state.row import Kind
from stream_adapt.watchdog import Watchdog

log = structlog.get_logger(__name__)

#: A producer call that may be tried again is given up after this many transaction timeouts.
_DEADLINE_TIMEOUTS = 2
#: Two fencings within this many transaction timeouts: another live instance (reliability rule 6).
_FENCE_TIMEOUTS = 3


class Finished(msgspec.Struct):
    """How a member ended."""

    events: int  # committed by it
    seconds: float
    model_version: str  # served at the end
    metrics_port: int | None


def run(config: Config, shutdown: Shutdown, stop_after: int | None = None) -> Finished:
    """Runs a member with its metrics and health port, until it is told to stop.

    Args:
        config: what to run.
        shutdown: asked after every batch.
        stop_after: events after whose commit it ends by itself.

    Raises:
        ConfigError, KafkaRefused, Fenced, DeadLetterBreaker: each says what to do.
    """
    calm_collector()
    started = time.monotonic()
    finished = Finished(events=0, seconds=0.0, model_version="", metrics_port=None)
    built: list[Pipeline] = []
    with ExitStack() as stack:
        if config.refresh.mode == "child":
            from stream_adapt.refresh.supervise import supervised

            stack.enter_context(supervised(config))

        def observe(pipeline: Pipeline) -> Observer:
            built.append(pipeline)
            if not config.metrics.enabled:
                return Observers()
            watchers, finished.metrics_port = _watch(config, pipeline.adapter, stack)
            return watchers

        pace = replace(pace_of(config), stop_after_events=stop_after)
        finished.events = serve(config, shutdown, observe, pace)
        finished.model_version = built[0].adapter.model.version
    finished.seconds = round(time.monotonic() - started, 3)
    return finished


def calm_collector() -> None:
    """Has Python's cycle collector look less often. It finds nothing here: batches are lists of acyclic objects.

    What lives since the start is never looked at again, and the young are looked at after 100,000 allocations instead
    of 700: a sixth more events/s (benchmarks/e2e.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _watch(config: Config, adapter: Adapter, stack: ExitStack) -> tuple[Observers, int]:
    """Metrics and health of a member, and the port where they are served until the stack closes."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    model = adapter.model
    metrics = Metrics(
        registry,
        model_version=model.version,
        target_level=model.spec.feedback.target_level,
        tables={Kind.USER: adapter.users, Kind.ITEM: adapter.items},
        connections=clients.CONNECTIONS,
        refresh=partial(_refresh_samples, config.state_dir) if config.refresh.mode == "child" else dict,
    )
    health = Health(
        stalled_after_s=config.metrics.stalled_after_s,
        model_version=model.version,
        unreachable_s=lambda: clients.CONNECTIONS.unreachable_s,
    )
    server = stack.enter_context(HealthServer(registry, health, host=config.metrics.host, port=config.metrics.port))
    return Observers(metrics, health), server.port


def _refresh_samples(folder: Path) -> Mapping[str, Mapping[tuple[str, ...], float]]:
    from stream_adapt.refresh import status

    return status.samples(status.read(folder), time.time())


def serve(config: Config, shutdown: Shutdown, observe: Callable[[Pipeline], Observer], pace: Pace | None = None) -> int:
    """Runs a member; returns how many events it committed.

    Args:
        config: what to run.
        shutdown: asked after every batch.
        observe: makes the observer of the loop, once there is a pipeline to observe.
        pace: batch size and latency bound; the configuration's if not given.

    Raises:
        ConfigError, KafkaRefused, Fenced, DeadLetterBreaker: each says what to do.
    """
    topic_id = check_topics(config)
    with _announcements(config) as announced:
        return _serve(config, shutdown, observe, pace or pace_of(config), announced, topic_id)


@contextmanager
def _announcements(config: Config) -> Iterator[Announcements | None]:
    """The models topic with all that is announced now; None if it is not followed."""
    if not config.model.follow:
        yield None
        return
    with closing(Announcements(config)) as announced:
        announced.read_to_end()
        yield announced


def _serve(
    config: Config,
    shutdown: Shutdown,
    observe: Callable[[Pipeline], Observer],
    pace: Pace,
    announced: Announcements | None,
    topic_id: str,
) -> int:
    topics = config.topic_names
    pipeline = build_pipeline(config, first_model(config, announced.history() if announced else []), topics)
    pipeline.adapter.warm_up()
    pipeline.emitter.prove()
    check_changelog(clients.reached_admin(properties.common(config)), topics.changelog, _longest_row(pipeline))
    observer = observe(pipeline)
    pipeline.timer = observer.stage
    runner: Runner
    listener = RebalanceListener(lambda p: runner.assigned(p), lambda p: runner.revoked(p))
    quarantine = Quarantine(config.state_dir, f"{topics.events}/{topic_id}", config.input.crashes_before_quarantine)
    pipeline.decoder.quarantined = quarantine.condemned
    consumer = InputConsumer(properties.consumer(config), topics.events, start=config.input.start, listener=listener)
    restorer = build_restorer(config, pipeline, topic_id, observer, consumer)
    try:
        delivery = build_delivery(config, consumer)
    except BaseException:
        consumer.close()  # a client that is in a group does not end by itself
        raise
    follower = build_follower(config, announced, pipeline.adapter) if announced else None
    runner = Runner(
        consumer,
        pipeline,
        delivery,
        restorer,
        observer,
        pace,
        topic_id=topic_id,
        breaker=Breaker(topics, config.input.breaker_share, config.input.breaker_window),
        quarantine=quarantine,
        models=follower,
    )
    log.info(
        "running",
        model=pipeline.adapter.model.version,
        delivery=config.delivery,
        events=topics.events,
        group=config.group_id,
    )
    try:
        with quarantine:
            runner.run(shutdown)
    finally:
        if follower is not None:
            follower.close()
        delivery.close()
        consumer.close()
        restorer.close()
    return runner.events


def first_model(config: Config, announced: list[Announcement]) -> Model:
    """What a member begins with: what was announced last. If that cannot be had here, what was served before it, and
    at last what the configuration names; the follower looks on.

    Raises:
        ConfigError: no model can be had.
    """
    registry = Registry(config.model.path)
    for version in dict.fromkeys(v for one in reversed(announced) for v in (one.version, one.previous) if v):
        try:
            model = registry.read(version)
            if any(one.version == version and one.sha256 != model.manifest.sha256 for one in announced):
                raise ModelError(f"{registry.folder(version)}: not the file that was announced, by its SHA-256")
            return as_configured(config, model)
        except ConfigError as error:
            log.warning("an announced model is not served", model=version, error=str(error))
    return served_model(config)


def served_model(config: Config) -> Model:
    """The model that the configuration names, with the configuration's covariance and feedback mapping.

    Raises:
        ConfigError: the mapping's levels or target are not those the model was trained for.
    """
    return as_configured(config, read_model(config.model.path))


def champion(config: Config) -> Model:
    """The model that members serve: what was announced last or, where nothing was, what the configuration names.

    Raises:
        ConfigError: the model cannot be had here.
        KafkaRefused: the models topic cannot be read.
    """
    with _announcements(config) as announced:
        newest = announced.newest() if announced else None
    return as_configured(config, Registry(config.model.path).read(newest.version)) if newest else served_model(config)


def as_configured(config: Config, model: Model) -> Model:
    """A model with the configuration's covariance and feedback mapping.

    Raises:
        ConfigError: the mapping's levels or target are not those the model was trained for.
    """
    spec = model.spec
    if config.model.covariance is not None:
        spec = msgspec.structs.replace(spec, covariance=config.model.covariance)
    if config.input.feedback is not None:
        spec = msgspec.structs.replace(spec, feedback=_agreed_feedback(config.input.feedback, spec.feedback))
    return Model(msgspec.structs.replace(model.manifest, spec=spec), model.weights)


def _agreed_feedback(raw: object, trained: Feedback) -> Feedback:
    try:
        feedback = msgspec.convert(raw, Feedback)
    except msgspec.ValidationError as error:
        raise ConfigError(f"input.feedback={raw!r}: {error}") from error
    if (feedback.levels, feedback.target) != (trained.levels, trained.target):
        raise ConfigError(
            f"input.feedback: levels={list(feedback.levels)}, target={feedback.target!r}; the model was trained for "
            f"levels={list(trained.levels)}, target={trained.target!r}. Use its levels, or pretrain again"
        )
    return feedback


def build_pipeline(config: Config, model: Model, topics: TopicNames) -> Pipeline:
    """Decoder, adapter and emitter for one model."""
    formats = Formats.of(config)
    return Pipeline(
        build_decoder(config, model, formats),
        Adapter(model, config.model.device, screen_of(config), folder=rows_folder(config), ttl_s=config.state.ttl_s),
        Emitter(
            topics,
            model.version,
            model.spec.feedback.target_level,
            codec=formats.output,
            row_format=config.state.row_format,
        ),
        late_is_dead=config.input.late == "dead_letter",
        emit_from_ms=config.output.emit_from,
    )


def build_decoder(config: Config, model: Model, formats: Formats | None = None) -> Decoder:
    """What reads the input's records, in the format and within the limits that the configuration says."""
    limits = Limits(config.input.max_bytes, config.input.max_future_s, config.input.check_key)
    codec = (formats or Formats.of(config)).input
    return Decoder(model.spec.features, model.spec.feedback, limits, codec=codec)


def rows_folder(config: Config) -> Path | None:
    """Folder for the rows' file, made if it is not there; None if they lie in memory.

    Raises:
        StateFull: it cannot be made.
    """
    if config.state.rows == "memory":
        return None
    folder = config.state_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateFull(
            f"state.dir={folder}: cannot be made: {error.strerror}. To do: set state.dir to a folder that this process "
            "may write, on a local disk, or state.rows to memory"
        ) from error
    return folder


def screen_of(config: Config) -> Screen:
    """Which events teach nothing: late ones and duplicates, as the configuration says."""
    barred = Flag(0)
    if config.input.deduplicate:
        barred |= Flag.DUPLICATE
    if config.input.late != "learn":
        barred |= Flag.LATE
    return Screen(int(config.input.late_after_s * 1000), int(barred))


def pace_of(config: Config) -> Pace:
    """Batch size and latency bound."""
    return Pace(max_batch=config.input.max_batch, latency_s=config.input.latency_ms / 1000)


def build_delivery(config: Config, consumer: InputConsumer) -> Delivery:
    """The commit that `delivery` names, with producers that are built when needed."""
    timeout_s = config.kafka.transaction_timeout_ms / 1000
    exactly_once = config.delivery == "exactly_once"
    settings = properties.producer(config)

    watchdog = Watchdog()
    watchdog.start()

    def make_producer() -> OutputProducer:
        return OutputProducer(
            settings,
            transactional_id=config.transactional_id if exactly_once else None,
            socket_timeout_s=float(settings["socket.timeout.ms"]) / 1000,
            deadline_s=_DEADLINE_TIMEOUTS * timeout_s,
            watch=watchdog.watch,
        )

    if not exactly_once:
        return AtLeastOnce(make_producer, consumer)
    return ExactlyOnce(
        make_producer,
        consumer,
        transactional_id=config.transactional_id,
        fence_window_s=_FENCE_TIMEOUTS * timeout_s,
        transaction_timeout_s=timeout_s,
    )


def build_follower(config: Config, announced: Announced, adapter: Adapter) -> Follower:
    """What looks for the model that is announced."""
    return Follower(
        announced, Registry(config.model.path), adapter.model, partial(as_configured, config), adapter.ready
    )


def build_restorer(
    config: Config, pipeline: Pipeline, topic_id: str, observer: Observer, consumer: InputConsumer | None = None
) -> Restorer:
    """What brings rows back from the changelog; with the group's consumer it knows when it was overtaken."""
    adapter = pipeline.adapter
    tables = {Kind.USER: adapter.users, Kind.ITEM: adapter.items}
    expected = Expected(
        topics=config.topic_names,
        group=config.group_id,
        topic_id=topic_id,
        exactly_once=config.delivery == "exactly_once",
    )
    reader = build_changelog_reader(config)
    if consumer is None:
        return Restorer(reader, tables, expected, observer.restoring)
    return Restorer(reader, tables, expected, observer.restoring, committed=consumer.committed)


def build_changelog_reader(config: Config) -> ChangelogReader:
    """What reads the changelog."""
    return ChangelogReader(
        properties.changelog_reader(config), config.topic("changelog"), stall_s=config.state.restore_stall_s
    )


def _longest_row(pipeline: Pipeline) -> int:
    adapter = pipeline.adapter
    return max(table.layout.row_bytes for table in (adapter.users, adapter.items))


def topic_specs(config: Config) -> tuple[TopicSpec, ...]:
    """The topics that the configuration asks for."""
    sizes = config.topics
    return product_topics(config.app.name, sizes.partitions, sizes.replication, config.topic_names)


def check_topics(config: Config) -> str:
    """Makes sure that every topic is there, and may be used, before anything is read; returns the input topic's id.

    Raises:
        KafkaRefused: a topic is missing, a permission is, or no broker answers.
    """
    topics = config.topic_names
    admin = clients.reached_admin(properties.common(config))
    described = _described(admin, config)
    events, changelog = described.topics[topics.events], described.topics[topics.changelog]
    if len(events.partitions) != len(changelog.partitions):
        raise KafkaRefused(
            f"{topics.events} has {len(events.partitions)} partitions and {topics.changelog} has "
            f"{len(changelog.partitions)}; a shard's rows lie in the partition of its number. To do: if partitions "
            f"were added to {topics.events}, users have moved to other shards and their rows have not: start anew with "
            "an app.name and topics of its own; if the changelog was made by hand, make it with as many partitions"
        )
    _require_permissions(admin, config, described)
    return str(events.topic_id)


def _require_permissions(admin: AdminClient, config: Config, described: Described) -> None:
    """Before anything is read: a member that may not write would find out in the middle of its first transaction.

    Raises:
        KafkaRefused: names every permission that is missing, as far as brokers tell: of transactional ids they do not.
    """
    allowed = dict(described.allowed)
    of_group = group_operations(admin, config.group_id)
    if of_group is not None:
        allowed[ResourceType.GROUP, config.group_id] = of_group
    needed = of_member(config.topic_names, config.group_id, None, follows=config.model.follow)
    lacking = [one for one in missing(needed, allowed) if one.required]
    if lacking:
        raise KafkaRefused(f"{config.kafka.bootstrap_servers}: permissions are missing. To do: {to_do(lacking)}")


def describe_topics(admin: AdminClient, config: Config) -> dict[str, Any]:
    """Description of every topic of the loop, by name.

    Raises:
        KafkaRefused: a topic is missing or may not be described, or no broker answers.
    """
    return dict(_described(admin, config).topics)


def _described(admin: AdminClient, config: Config) -> Described:
    names = config.topic_names
    written = [names.events, names.scores, names.dead_letters, names.changelog, names.learning]
    described = describe_by_name(admin, written + [names.models] * config.model.follow)
    if any(error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED for error in described.errors.values()):
        _require_permissions(admin, config, described)
    for name, error in described.errors.items():
        raise KafkaRefused(
            f"{name}: {describe(error)} at {config.kafka.bootstrap_servers}. To do: `stream-adapt topics create -c "
            "FILE`, or check kafka.bootstrap_servers and the principal's permissions"
        )
    return described

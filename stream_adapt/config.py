"""Configuration: one YAML file, environment over file over defaults, unknown keys refused.

Every value knows where it came from, and `check-config` shows it. Secrets are only taken from the environment or
from files (`{file: PATH}`, `{env: NAME}`), and are never printed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stream_adapt.errors import ConfigError
from stream_adapt.record import TopicNames

ENVIRONMENT_PREFIX = "STREAM_ADAPT_"

Positive = Annotated[float, Field(gt=0)]
Scalar = str | int | float | bool
TopicRole = Literal["events", "scores", "dead_letters", "changelog", "learning", "alarms", "models", "refresh"]

#: Properties of librdkafka that the transaction loop owns; passing them through would break its promises.
OWNED_PROPERTIES = {
    "enable.auto.commit": "offsets are committed with the scores",
    "enable.auto.offset.store": "offsets are committed with the scores",
    "auto.offset.reset": "use input.start; a lost offset must stop the consumer, not move it",
    "isolation.level": "always read_committed",
    "group.id": "use kafka.group_id",
    "bootstrap.servers": "use kafka.bootstrap_servers",
    "transactional.id": "made of app.name and app.instance",
    "transaction.timeout.ms": "use kafka.transaction_timeout_ms",
    "enable.idempotence": "always on",
    "delivery.report.only.error": "owned by the producer",
    "statistics.interval.ms": "owned by the producer",
    "partition.assignment.strategy": "use kafka.group_protocol",
    "group.protocol": "use kafka.group_protocol",
    "session.timeout.ms": "use kafka.session_timeout_ms",
    "metadata.broker.list": "use kafka.bootstrap_servers",
    "check.crcs": "always on",
    "enable.partition.eof": "owned by the consumer",
}
#: Parts of a property's name that mark its value as a secret.
_SECRET_PARTS = ("password", "passphrase", "secret", "key.pem", "oauthbearer.config", "hash_key", "user.info")
#: Keys below `kafka:` that hold librdkafka properties.
_PASSED_THROUGH = ("properties", "consumer", "producer")
#: Parameters of detectors that are fed means of groups, in deviations of a reference (benchmarks/drift.md).
_FOR_GROUPS: dict[str, dict[str, Any]] = {
    "PageHinkley": {"min_instances": 1, "delta": 0.75, "threshold": 12.0, "mode": "up"},
    "ADWIN": {"clock": 1},  # a look at each group: River's 32 are for single events
}


def _references(properties: dict[str, Any]) -> dict[str, Any]:
    for name, item in properties.items():
        if isinstance(item, Mapping):
            if set(item) not in ({"env"}, {"file"}) or not isinstance(next(iter(item.values())), str):
                raise ValueError(f"{name}: a number, a string, {{env: NAME}} or {{file: PATH}}")
        elif _is_secret(name):
            raise ValueError(f"{name} is a secret: give it as {{env: NAME}} or {{file: PATH}}")
    return properties


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AppSection(_Section):
    """Who this is."""

    name: str = Field("stream-adapt", pattern=r"^[a-zA-Z0-9._-]{1,100}$", description="Prefix of topics and ids.")
    instance: str = Field(
        default_factory=lambda: socket.gethostname() or "0",
        pattern=r"^[a-zA-Z0-9._-]{1,100}$",
        description="Name of this member, stable over restarts and different from every other's.",
    )


class KafkaSection(_Section):
    """How the brokers are reached."""

    bootstrap_servers: str = Field("127.0.0.1:9092", min_length=1, description="host:port, comma-separated.")
    group_id: str | None = Field(None, description="Consumer group; app.name if not set.")
    group_protocol: Literal["classic", "consumer"] = Field(
        "classic", description="classic: cooperative-sticky; consumer: KIP-848."
    )
    session_timeout_ms: int = Field(45_000, ge=1_000, description="Classic groups only.")
    transaction_timeout_ms: int = Field(15_000, ge=1_000, le=900_000, description="Below the session timeout.")
    properties: dict[str, Any] = Field(
        default_factory=dict,
        description="librdkafka properties for every client, unchanged. Secrets as {env: NAME} or {file: PATH}.",
    )
    consumer: dict[str, Any] = Field(default_factory=dict, description="The same for the consumer only.")
    producer: dict[str, Any] = Field(default_factory=dict, description="The same for the producer only.")

    @field_validator("properties", "consumer", "producer")
    @classmethod
    def _not_owned(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in OWNED_PROPERTIES:
                raise ValueError(f"{name} is not yours to set here: {OWNED_PROPERTIES[name]}")
        return value

    @field_validator("properties", "consumer", "producer")
    @classmethod
    def _secrets_are_references(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _references(value)


class TopicsSection(_Section):
    """Names of topics; each is <app.name>.<what> if not set."""

    events: str | None = Field(None, description="Input.")
    scores: str | None = Field(None, description="Scores, one for each event since output.emit_from.")
    dead_letters: str | None = Field(None, description="Records that were refused, with the reason.")
    changelog: str | None = Field(None, description="Rows; compacted, with the input's number of partitions.")
    learning: str | None = Field(None, description="How well each transaction's events were predicted: sums.")
    alarms: str | None = Field(None, description="Drift that was detected.")
    models: str | None = Field(None, description="Which model is served; compacted, one partition.")
    refresh: str | None = Field(None, description="Where a refresh of the model is; compacted, one partition.")
    partitions: int = Field(4, ge=1, le=10_000, description="Partitions that `topics create` gives the topics.")
    replication: int = Field(1, ge=1, le=10, description="Replicas that `topics create` gives them.")


#: Whoever writes fewer milliseconds, 1973, means seconds.
_LEAST_MS = 100_000_000_000


class InputSection(_Section):
    """What is read, and what is still accepted."""

    start: Literal["earliest", "latest"] = Field("earliest", description="Where a group with no offsets begins.")
    max_bytes: int = Field(1_000_000, ge=100, description="Longest value; longer ones are dead letters.")
    max_future_s: float = Field(86_400, ge=0, description="How far ahead of the clock a timestamp may be.")
    check_key: bool = Field(True, description="Whether the key must be the user id.")
    max_batch: int = Field(16_384, ge=1, le=1_000_000, description="Most records in one transaction.")
    deduplicate: bool = Field(
        False, description="Whether an event whose id is that of one of its user's last events is only scored."
    )
    late: Literal["learn", "score_only", "dead_letter"] = Field(
        "learn", description="What is done with an event that is older than the last one learned for its user."
    )
    late_after_s: float = Field(0, ge=0, le=1e9, description="How much older it may be without being late.")
    breaker_share: float = Field(
        0.5, gt=0, le=1, description="Stop (exit 6) when more than this share of a window is refused; 1: never."
    )
    breaker_window: int = Field(1_000, ge=10, le=10_000_000, description="Records of a window.")
    crashes_before_quarantine: int = Field(
        2, ge=1, le=100, description="A record at which the process died so often, handled alone, is a dead letter."
    )
    latency_ms: Positive = Field(50, le=10_000, description="Longest wait for a batch to fill.")
    format: Literal["json", "avro", "protobuf"] = Field(
        "json", description="Of the events. avro, protobuf: by registry.url; slower than JSON."
    )
    feedback: dict[str, Any] | None = Field(
        None,
        description="Levels, target and mapping; the model's own if not set, and in agreement with them.",
    )


class OutputSection(_Section):
    """What is written."""

    format: Literal["json", "avro", "protobuf"] = Field(
        "json", description="Of scores and receipts. avro, protobuf: by registry.url; slower than JSON."
    )
    emit_from: int | None = Field(
        None,
        ge=0,
        description="A moment, as 2026-07-01T00:00:00Z or in ms: events from before it, by their own timestamps, are "
        "scored and learned from, and no score is written. Not set: all scores are.",
    )

    @field_validator("emit_from", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        """Milliseconds since the epoch."""
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError as error:
                raise ValueError("a moment such as 2026-07-01T00:00:00Z, or milliseconds since the epoch") from error
        if isinstance(value, datetime) and value.tzinfo is not None:
            return round(value.timestamp() * 1000)
        if isinstance(value, date):  # a datetime is one, too
            raise ValueError("which zone? 2026-07-01T00:00:00Z is in UTC, 2026-07-01T00:00:00+02:00 is not")
        if isinstance(value, int) and 0 < value < _LEAST_MS:
            raise ValueError("milliseconds are meant; this many are in 1970 or soon after")
        return value


class RegistrySection(_Section):
    """The schema registry, for formats other than JSON."""

    url: str | None = Field(None, description="Several, comma-separated, are tried in order.")
    properties: dict[str, Any] = Field(
        default_factory=dict,
        description="Of confluent-kafka's client: ssl.ca.location and others. Secrets as {env: NAME} or {file: PATH}.",
    )
    register_schemas: bool = Field(
        True, description="Whether the schemas of what is written may be registered; else they must be there."
    )

    @field_validator("properties")
    @classmethod
    def _secrets_are_references(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _references(value)

    @field_validator("url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and "@" in value:
            raise ValueError("without a password: give it as basic.auth.user.info in registry.properties")
        return value


class ModelSection(_Section):
    """Which model is served."""

    path: Path = Field(
        Path("models"),
        description="A model's folder, or a registry: then its newest version that has no parent. What is served until "
        "another one is announced, and where that is looked for.",
    )
    follow: bool = Field(
        True, description="Serve what the models topic announces last; false: only what model.path names."
    )
    covariance: Literal["diagonal", "full"] | None = Field(None, description="As pretrained if not set.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto serves on the CPU.")


class StateSection(_Section):
    """Rows of users and items, how they come back, and what a member keeps on its disk."""

    dir: Path | None = Field(
        None,
        description="Folder of this member alone, writable, on a local disk; var/<app.name>.<app.instance> if not set.",
    )
    rows: Literal["disk", "memory"] = Field(
        "disk",
        description="disk: in a mapped file in state.dir, so that rows out of use leave the memory; nothing is left "
        "there after the end. memory: all of them stay.",
    )
    ttl_s: Positive | None = Field(
        None,
        description="Users idle for longer, in event time, are forgotten; looked for every 64 windows of a partition. "
        "Longer than input.max_future_s. Not set: never.",
    )
    restore_stall_s: Positive = Field(
        120,
        description="A restore that does not advance for so long is given up. Above the transaction timeout: an open "
        "transaction in the changelog is waited for.",
    )
    row_format: int = Field(
        2,
        ge=1,
        le=2,
        description="How rows are written to the changelog. 1, which takes about twice the bytes: while a release that "
        "reads no other is in the group, or may have to come back.",
    )


class RefreshSettings(_Section):
    """Models that are trained on the newest events, and go live if they are better."""

    mode: Literal["off", "child", "external"] = Field(
        "off",
        description="child: `run` starts the controller, of which one in the group works. external: it runs apart, as "
        "`stream-adapt refresh --follow`. off: nobody does it unless asked.",
    )
    every_s: Positive | None = Field(None, description="Begin one so long after the last, alarm or not. Not set: no.")
    cooldown_s: float = Field(3_600, ge=0, description="Rest after a refresh, whatever alarms say.")
    per_day: int = Field(8, ge=1, le=1_000, description="Most trainings within 24 hours.")
    settle_events: int = Field(
        4_096, ge=0, description="Labelled events after an alarm before training: of the new world, to learn from."
    )
    again: float = Field(
        2.0,
        ge=1,
        description="After drift, train again whenever the new world has so many times the events that the last "
        "training had of it, until they fill the window. 1: no.",
    )
    window_s: Positive = Field(604_800, description="How far back training reads the input, by the records' times.")
    window_events: int = Field(500_000, ge=1_000, le=100_000_000, description="The newest of these, at most.")
    training_s: Positive = Field(600, description="Time for a training; one that takes twice that is killed.")
    threads: int = Field(1, ge=1, le=256, description="Threads of a training.")
    nice: int = Field(10, ge=0, le=19, description="Niceness of a training.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Of a training; auto: CUDA where there is one.")
    seed: int = Field(0, ge=0, description="Of a training.")
    shadow_events: int = Field(
        4_000, ge=100, description="Labelled events of the first comparison; then of twice and four times as many."
    )
    shadow_s: Positive = Field(86_400, description="Longest wait for them.")
    shadow_users: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of users, whole ones, that comparisons are about: their rows lie in memory twice.",
    )
    margin: float = Field(0.0005, ge=0, le=1, description="Log-loss per event that a challenger must gain at least.")
    error: float = Field(
        0.01, gt=0, lt=0.5, description="Chance of a promotion that is only luck, and of such a rollback."
    )
    serve_s: Positive = Field(300, description="Members that go on without a promoted version for so long: roll back.")
    watch_events: int = Field(
        16_000, ge=100, description="Labelled events after a promotion in which the former champion scores, too."
    )
    watch_s: Positive = Field(86_400, description="Longest time of watching.")


class DriftSettings(_Section):
    """How drift is detected in the learning summaries."""

    detector: str = Field("PageHinkley", description="A detector of River: `PageHinkley`, `ADWIN`, `binary.DDM`, …")
    parameters: dict[str, Any] | None = Field(
        None,
        description="Of the detector, by River's names. Not set: River's; for PageHinkley and ADWIN what suits groups.",
    )
    signals: list[str] = Field(
        ["excess_loss", "unseen"],
        description="loss, excess_loss (less what the scores expect), loss_over_frozen, calibration, unseen.",
    )
    group_events: int = Field(256, ge=1, le=1_000_000, description="Labelled events whose mean is told to a detector.")
    reference_events: int = Field(
        16_384, ge=2, description="Labelled events since the start that say what is normal; nothing is detected there."
    )
    cooldown_events: int = Field(
        20_000, ge=0, description="Labelled events after an alarm without another; what is seen meanwhile comes then."
    )
    domains: int = Field(16, ge=0, le=1_000, description="Domains that are watched by themselves; the first to come.")

    @property
    def detector_parameters(self) -> dict[str, Any]:
        """The parameters that the detector gets."""
        return _FOR_GROUPS.get(self.detector, {}) if self.parameters is None else self.parameters

    @model_validator(mode="after")
    def _reference_has_groups(self) -> DriftSettings:
        if self.reference_events < 8 * self.group_events:
            raise ValueError(
                f"drift.reference_events={self.reference_events} must be at least 8 times drift.group_events="
                f"{self.group_events}: fewer groups do not say how much they vary"
            )
        return self


class MetricsSection(_Section):
    """The HTTP port with /metrics, /healthz and /readyz."""

    enabled: bool = Field(True, description="Whether to serve them.")
    host: str = Field("127.0.0.1", description="Loopback unless told otherwise.")
    port: int = Field(9464, ge=0, le=65_535, description="0: any free port, see the log.")
    stalled_after_s: Positive = Field(
        120,
        description="No turn of the loop for so long: not alive; behind and nothing committed for so long: not ready. "
        "Longer than what a turn may wait for: producers and rebalances up to a minute each.",
    )


class LogSection(_Section):
    """The log on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line shown.")
    format: Literal["console", "json"] = Field("console", description="json: one object a line.")
    hash_key: dict[Literal["env", "file"], str] | None = Field(
        None,
        description="{env: NAME} or {file: PATH}: key of the hashes that stand for user ids. Not set: another one in "
        "every process, so that hashes of different members and runs cannot be compared.",
    )

    @field_validator("hash_key")
    @classmethod
    def _one_reference(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) != 1:
            raise ValueError("{env: NAME} or {file: PATH}")
        return value


class Config(_Section):
    """The whole configuration."""

    app: AppSection = Field(default_factory=AppSection)
    kafka: KafkaSection = Field(default_factory=KafkaSection)
    topics: TopicsSection = Field(default_factory=TopicsSection)
    input: InputSection = Field(default_factory=InputSection)
    output: OutputSection = Field(default_factory=OutputSection)
    registry: RegistrySection = Field(default_factory=RegistrySection)
    model: ModelSection = Field(default_factory=ModelSection)
    state: StateSection = Field(default_factory=StateSection)
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="at_least_once: no transaction; after a crash some scores come twice."
    )
    drift: DriftSettings = Field(default_factory=DriftSettings)
    refresh: RefreshSettings = Field(default_factory=RefreshSettings)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _timeouts(self) -> Config:
        kafka = self.kafka
        if kafka.group_protocol == "classic" and kafka.transaction_timeout_ms >= kafka.session_timeout_ms:
            raise ValueError(
                f"kafka.transaction_timeout_ms={kafka.transaction_timeout_ms} must be below "
                f"kafka.session_timeout_ms={kafka.session_timeout_ms}: a member that was removed must not commit"
            )
        if self.state.restore_stall_s * 1000 <= kafka.transaction_timeout_ms:
            raise ValueError(
                f"state.restore_stall_s={self.state.restore_stall_s:g} must be above kafka.transaction_timeout_ms="
                f"{kafka.transaction_timeout_ms}: the transaction of a member that died is waited for"
            )
        if self.input.latency_ms * 2 >= kafka.transaction_timeout_ms:
            raise ValueError("input.latency_ms must be far below kafka.transaction_timeout_ms")
        return self

    @model_validator(mode="after")
    def _formats_have_a_registry(self) -> Config:
        for section, format_ in (("input", self.input.format), ("output", self.output.format)):
            if format_ != "json" and self.registry.url is None:
                raise ValueError(f"{section}.format={format_} needs registry.url")
        return self

    @model_validator(mode="after")
    def _idle_is_longer_than_clocks_are_wrong(self) -> Config:
        ttl_s, ahead_s = self.state.ttl_s, self.input.max_future_s
        if ttl_s is not None and ttl_s <= ahead_s:
            raise ValueError(
                f"state.ttl_s={ttl_s} must be above input.max_future_s={ahead_s}: one event with a wrong clock would "
                "make everybody idle"
            )
        return self

    def topic(self, what: TopicRole) -> str:
        """Name of a topic."""
        return getattr(self.topics, what) or f"{self.app.name}.{what.replace('_', '-')}"

    @property
    def topic_names(self) -> TopicNames:
        """Names of all topics."""
        return TopicNames(
            self.topic("events"),
            self.topic("scores"),
            self.topic("dead_letters"),
            self.topic("changelog"),
            self.topic("learning"),
            self.topic("alarms"),
            self.topic("models"),
            self.topic("refresh"),
        )

    @property
    def state_dir(self) -> Path:
        """Folder of what this member keeps on its disk."""
        return self.state.dir or Path("var") / f"{self.app.name}.{self.app.instance}"

    @property
    def group_id(self) -> str:
        """Consumer group."""
        return self.kafka.group_id or self.app.name

    @property
    def transactional_id(self) -> str:
        """Stable per instance: a restart ends its own dangling transaction."""
        return f"{self.app.name}.{self.app.instance}"


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where each of its values came from, by dotted key."""

    config: Config
    sources: Mapping[str, str]


def load(path: Path | None, environment: Mapping[str, str] = os.environ, **overrides: Any) -> Loaded:
    """Reads the file, then the environment, then overrides given on the command line.

    Args:
        path: YAML file, or None for defaults alone.
        environment: `STREAM_ADAPT_<SECTION>_<KEY>` for each key, upper case; values are YAML.
        overrides: by key with `__` for the dot, as in `model__path=…`; None is no override.

    Raises:
        ConfigError: names every key that is wrong, its value, where it came from, and what is expected.
    """
    sources: dict[str, str] = {}
    tree: dict[str, Any] = {}
    for key, value in _flatten(_read_yaml(path) if path else {}):
        _put(tree, sources, key, value, str(path))
    for key, name in _environment_keys().items():
        if name in environment:
            _put(tree, sources, key, _from_environment(key, name, environment[name]), f"environment {name}")
    _refuse_unknown_environment(environment)
    for dotted, value in overrides.items():
        if value is not None:
            _put(tree, sources, dotted.replace("__", "."), value, "command line")
    try:
        return Loaded(Config.model_validate(tree), sources)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from error


def effective(loaded: Loaded) -> Iterator[tuple[str, Any, str]]:
    """Every key with its value and source; secrets hidden, and names that follow from `app.name` filled in."""
    config, names = loaded.config, loaded.config.topic_names
    derived = {
        "kafka.group_id": config.group_id,
        "state.dir": str(config.state_dir),
        "topics.events": names.events,
        "topics.scores": names.scores,
        "topics.dead_letters": names.dead_letters,
        "topics.changelog": names.changelog,
        "topics.learning": names.learning,
        "topics.alarms": names.alarms,
        "topics.models": names.models,
        "topics.refresh": names.refresh,
    }
    for key, value in _flatten(config.model_dump(mode="json")):
        if value is None and key in derived:
            yield key, derived[key], "default, from app.name"
        else:
            yield key, _hidden(key, value), _source_of(key, loaded.sources, "default")


def resolve_secrets(properties: Mapping[str, Any]) -> dict[str, Scalar]:
    """librdkafka properties with `{env: NAME}` and `{file: PATH}` replaced by what they refer to.

    Raises:
        ConfigError: the variable or file is not there; says which, never its content.
    """
    return {name: resolve_secret(f"kafka: {name}", value) for name, value in properties.items()}


def resolve_secret(name: str, value: Any) -> Any:
    """The same for one value, whose name is for the message. Secrets are remembered: `without_secrets`."""
    found = _resolve(name, value)
    if isinstance(value, Mapping) and _is_secret(name) and len(str(found)) >= _LEAST_SECRET:
        _secrets.add(str(found))
    return found


def without_secrets(text: str) -> str:
    """A text in which no secret stands that was resolved in this process, plainly or as JSON writes it."""
    for secret in sorted(_secrets, key=len, reverse=True):
        for written in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]):
            text = text.replace(written, "(hidden)")
    return text


#: Values of the secrets that were resolved.
_secrets: set[str] = set()
#: Shorter ones would blank out half of a log, and are no secret for long.
_LEAST_SECRET = 4


def _resolve(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "env" in value:
        if value["env"] not in os.environ:
            raise ConfigError(f"{name} refers to the environment variable {value['env']}, which is not set")
        return os.environ[value["env"]]
    try:
        return Path(value["file"]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{name} refers to {value['file']}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} refers to {value['file']}, which is not UTF-8 text") from error


def _is_secret(name: str) -> bool:
    return any(part in name.lower() for part in _SECRET_PARTS) and not name.endswith(".location")


def _hidden(key: str, value: Any) -> Any:
    return "(hidden)" if _is_secret(key) and not isinstance(value, Mapping) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML{_yaml_problem(error)}") from None
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path}: expected sections such as `app:` and `kafka:`, found {type(tree).__name__}")
    return tree or {}


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Where and what is wrong; not the text around it, which may be a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ""
    mark = error.problem_mark
    quoted = re.compile("'[^']{2,}'")
    return f", line {mark.line + 1}, column {mark.column + 1}: {quoted.sub('…', error.problem or '')}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of sections; the free-form parts (properties, feedback) stay whole."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and "." not in key and name in Config.model_fields:
            yield from _flatten(value, key + ".")
        elif key in [f"kafka.{p}" for p in _PASSED_THROUGH] and isinstance(value, Mapping) and value:
            for inner, item in value.items():
                yield f"{key}.{inner}", item
        else:
            yield key, value


def _put(tree: dict[str, Any], sources: dict[str, str], key: str, value: Any, source: str) -> None:
    parts = key.split(".", 2) if key.startswith("kafka.") else key.split(".", 1)
    inner = tree
    for part in parts[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part} ({sources.get(part, source)}): expected a section with keys of its own")
    inner[parts[-1]] = value
    for inside in [name for name in sources if name.startswith(f"{key}.")]:
        del sources[inside]
    sources[key] = source


def _environment_keys() -> dict[str, str]:
    keys = {}
    for section, field in Config.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name in annotation.model_fields:
                keys[f"{section}.{name}"] = f"{ENVIRONMENT_PREFIX}{section}_{name}".upper()
        else:
            keys[section] = f"{ENVIRONMENT_PREFIX}{section}".upper()
    return keys


def _from_environment(key: str, name: str, text: str) -> Any:
    """A variable's value: YAML, but for keys that are strings, where `7` and `on` are what they look like."""
    section, _, field = key.partition(".")
    model = Config.model_fields[section].annotation
    fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
    if field and fields[field].annotation in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"environment {name}: not YAML{_yaml_problem(error)}") from None


#: Variables with our prefix that are not configuration keys.
_OTHER_VARIABLES = ("STREAM_ADAPT_CACHE_DIR", "STREAM_ADAPT_TEST_")


def environment_without_settings() -> dict[str, str]:
    """The process's environment, but for configuration keys: a measurement is what its options say."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name == f"{ENVIRONMENT_PREFIX}CACHE_DIR"
    }


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    known = set(_environment_keys().values())
    for name in environment:
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and not name.startswith(_OTHER_VARIABLES):
            raise ConfigError(f"environment {name} is no configuration key; `stream-adapt check-config` lists them")


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        value = "" if problem["type"] == "missing" or not key else _shown(key, problem["input"])
        where = _source_of(key, sources, "the configuration")
        lines.append(f"{key}{value} ({where}): {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    """A wrong value, for a message; not one that is, or may hold, a secret."""
    may_hold_secret = not isinstance(value, Scalar) or key in ("kafka", *(f"kafka.{p}" for p in _PASSED_THROUGH))
    return "" if may_hold_secret or _is_secret(key) else f"={value!r}"


def _source_of(key: str, sources: Mapping[str, str], otherwise: str) -> str:
    """Where a key, the section that holds it, or what it holds, was set."""
    outer = ".".join(key.split(".")[:2])
    inner = [source for name, source in sources.items() if key and name.startswith(f"{key}.")]
    return sources.get(key) or sources.get(outer) or ", ".join(dict.fromkeys(inner)) or otherwise

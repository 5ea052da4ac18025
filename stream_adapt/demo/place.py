"""Where the stream flows: a broker, topics on it, and the configuration of the member that works there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stream_adapt import config
from stream_adapt.config import Config
from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import properties
from stream_adapt.kafka.embedded import HOST, free_ports
from stream_adapt.kafka.topics import TopicNames, create_topics, product_topics

APP = "stream-adapt-demo"
_PREFIX = config.ENVIRONMENT_PREFIX


@dataclass(frozen=True)
class Place:
    """Settings of one demo, as written to a file and read back, and what belongs to them."""

    settings: Config
    config_path: Path
    log: Path
    environment: dict[str, str]

    @property
    def topics(self) -> TopicNames:
        return self.settings.topic_names

    @property
    def metrics(self) -> tuple[str, int]:
        """Host and port."""
        return self.settings.metrics.host, self.settings.metrics.port

    @property
    def metrics_url(self) -> str:
        host, port = self.metrics
        return f"http://{host}:{port}/metrics"


def prepare_place(
    folder: Path,
    model: Path,
    bootstrap_servers: str,
    partitions: int,
    metrics_port: int | None,
    *,
    own_broker: bool,
    settings: Mapping[str, Mapping[str, Any]],
) -> Place:
    """Writes the member's configuration into a folder, `settings` of more sections included.

    A broker that others use, too, is given topics with a name of their own.

    Raises:
        ConfigError: a setting, from the environment or ours, is not acceptable.
    """
    (port,) = free_ports(1, metrics_port)
    path = folder / "stream-adapt.yaml"
    sections = {
        "app": {"name": f"{APP}-{uuid.uuid4().hex[:8]}" if own_broker else APP, "instance": "demo"},
        "kafka": {"bootstrap_servers": bootstrap_servers},
        "topics": {"partitions": partitions},
        "model": {"path": str(model)},
        "metrics": {"host": HOST, "port": port},
        "state": {"dir": str(folder / "state")},
        **{section: dict(values) for section, values in settings.items()},
    }
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    environment = _environment(own_broker)
    return Place(config.load(path, environment).config, path, folder / "member.log", environment)


def create(place: Place) -> None:
    """Creates the topics; KafkaRefused if they are not as they should be afterwards."""
    specs = product_topics(place.settings.app.name, place.settings.topics.partitions)
    outcomes = create_topics(properties.common(place.settings), specs)
    for outcome in outcomes:
        if not outcome.ok:
            raise KafkaRefused(str(outcome))


def _environment(own_broker: bool) -> dict[str, str]:
    """Ours, but for settings of the product: of these only how to reach a broker of one's own, say, its TLS, counts."""
    kept = f"{_PREFIX}KAFKA_"
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_PREFIX)
        or name == f"{_PREFIX}CACHE_DIR"
        or (own_broker and name.startswith(kept) and name != f"{kept}BOOTSTRAP_SERVERS")
    }

"""Fixtures of the broker tier: applications with topics, a model, and members that are real processes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker_app import ITEMS, STARS, App

from stream_adapt.kafka.topics import TopicSpec, create_topics, product_topics
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.broker import RunningBroker
from stream_adapt.testing.model import random_model


@pytest.fixture
def make_app(kafka_broker: RunningBroker, tmp_path: Path) -> Iterator[Callable[..., App]]:
    """A function that makes an application with topics and a model of its own."""
    apps: list[App] = []

    def make(partitions: int = 4, spec: LearnerSpec | None = None, **topic_config: str) -> App:
        app = App(f"app-{uuid.uuid4().hex[:8]}", kafka_broker, tmp_path / str(len(apps)), partitions)
        app.folder.mkdir()
        random_model(app.folder / "models", spec or LearnerSpec(feedback=STARS), ITEMS)
        names = [f"{app.name}.{what}" for what in ("scores", "dead-letters")]
        outputs = [TopicSpec(name, partitions, config=topic_config) for name in names]
        others = [spec for spec in product_topics(app.name, partitions) if spec.name not in names]
        create_topics({"bootstrap.servers": kafka_broker.bootstrap_servers}, [*outputs, *others])
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.end()


@pytest.fixture
def app(make_app: Callable[..., App]) -> App:
    """An application with four partitions."""
    return make_app()

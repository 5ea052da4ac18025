"""A million real events through the loop: each exactly once, also after a kill in the middle, in flat memory."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import psutil
import pytest
from broker_app import App
from confluent_kafka import Consumer

from stream_adapt.datasets import open_source
from stream_adapt.models import LearnerSpec

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(1500)]

SOURCE = open_source("movielens-1m")
COUNT = 1_000_209
#: What a member may grow from a third of the stream to its end: rows of new users, and noise of the allocator.
GROWTH_BYTES = 64_000_000


def _produce(app: App) -> None:
    to_json = msgspec.json.Encoder().encode
    app.produce_raw((event.user_id.encode(), to_json(event)) for event in SOURCE.events())


def _score_ids(app: App) -> Iterator[str]:
    """Ids of committed scores as they come: until nothing came for a minute, or for 10 s after the last expected."""
    settings = {
        "bootstrap.servers": app.broker.bootstrap_servers,
        "group.id": f"{app.name}.reader",
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
    }
    consumer = Consumer(settings)
    consumer.subscribe([app.scores_topic])
    count, last = 0, time.monotonic()
    while time.monotonic() - last < (60 if count < COUNT else 10):
        for message in consumer.consume(20_000, 1.0):
            assert message.error() is None, message.error()
            count, last = count + 1, time.monotonic()
            yield json.loads(message.value())["event_id"]
    consumer.close()


def _resident_bytes(member: subprocess.Popen[bytes]) -> int:
    return psutil.Process(member.pid).memory_info().rss


@pytest.mark.parametrize("kill", [False, True], ids=["calm", "killed"])
def test_a_million_events_exactly_once(make_app: Callable[..., App], kill: bool) -> None:
    app = make_app(4, LearnerSpec(features=SOURCE.features, feedback=SOURCE.feedback))
    threading.Thread(target=_produce, args=(app,), daemon=True).start()
    member = app.start()
    ids: set[str] = set()
    resident: dict[int, int] = {}
    for event_id in _score_ids(app):
        assert event_id not in ids, f"{event_id} came twice"
        ids.add(event_id)
        if len(ids) % 100_000 == 0:
            resident[len(ids)] = _resident_bytes(member)
        if kill and len(ids) == COUNT // 2:
            assert app.stop(member, signal.SIGKILL) == -signal.SIGKILL
            member = app.start()
    assert len(ids) == COUNT, app.log()[-3000:]
    assert app.stop(member) == 0, app.log()[-3000:]
    if not kill:
        told = {n: f"{size >> 20} MiB" for n, size in resident.items()}
        assert resident[1_000_000] - resident[300_000] < GROWTH_BYTES, told

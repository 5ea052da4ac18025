"""The models topic: what is announced is there for whoever reads, the newest last, whatever else lies in the topic."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import pytest
from broker_app import App
from confluent_kafka import Producer

from stream_adapt.announcements import Announcement, Announcements, announce, row_mode
from stream_adapt.config import Config, load
from stream_adapt.errors import KafkaRefused
from stream_adapt.models import RowMode

pytestmark = pytest.mark.broker


def said(version: str, rows: RowMode = "carry", previous: str | None = None) -> Announcement:
    return Announcement(version, "0" * 64, previous, rows, "a test", 1, {"gain": 0.5}, "tests")


@pytest.fixture
def config(app: App) -> Config:
    return load(app.config()).config


def test_what_is_announced_is_visible_at_once_and_the_newest_counts(config: Config) -> None:
    with closing(Announcements(config)) as follower, closing(Announcements(config)) as late:
        follower.read_to_end()
        assert follower.newest() is None
        announce(config, said("v1"))
        announce(config, said("v2", "restart_items", "v1"))
        deadline = time.monotonic() + 10
        while follower.newest() != said("v2", "restart_items", "v1"):
            assert time.monotonic() < deadline
        announce(config, said("v1", previous="v2"))
        late.read_to_end()
        assert late.newest() == said("v1", previous="v2")
        assert [one.version for one in late.history()] == ["v2", "v1"]
        assert (late.position("v2") < late.position("v1"), late.position("v0"), late.position(None)) == (True, -1, -1)
        assert ["v1"] == [one.version for one in late.since("v2")]
        assert ("carry", "restart_items") == (row_mode(late.since("v2")), row_mode(late.since("v0")))


def test_what_is_none_is_left_out_and_an_open_announcement_does_not_count(config: Config) -> None:
    strange = Producer({"bootstrap.servers": config.kafka.bootstrap_servers})
    for value in (b"rubbish", b'{"version": 3}', None):
        strange.produce(config.topic("models"), value, b"x", 0)
    assert strange.flush(30) == 0
    announce(config, said("v1"))
    dangling = Producer({"bootstrap.servers": config.kafka.bootstrap_servers, "transactional.id": config.app.name})
    dangling.init_transactions(30)
    dangling.begin_transaction()
    dangling.produce(config.topic("models"), b"{}", b"v9", 0)
    dangling.flush(10)
    with closing(Announcements(config)) as follower:
        with pytest.raises(KafkaRefused, match=r"models: read up to offset \d+ of \d+ within 1 s"):
            follower.read_to_end(1.0)
        assert follower.newest() == said("v1")
        dangling.abort_transaction(30)
        follower.read_to_end()
        assert [said("v1")] == follower.history()


def test_without_the_topic_reader_and_writer_say_what_to_do(make_app: Callable[..., App]) -> None:
    config = load(make_app(1).config(topics={"models": "nowhere"})).config
    with closing(Announcements(config)) as follower, pytest.raises(KafkaRefused, match="topics create"):
        follower.read_to_end()
    with pytest.raises(KafkaRefused, match="nowhere: UNKNOWN_TOPIC_OR_PART"):
        announce(config, said("v1"))

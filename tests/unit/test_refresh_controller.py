"""Who leads: the owner of the learning topic's one partition, until it is taken away or something of Kafka fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from stream_adapt.config import Config
from stream_adapt.errors import KafkaRefused
from stream_adapt.refresh import controller as module
from stream_adapt.refresh.controller import Controller
from stream_adapt.refresh.journal import Deposed
from stream_adapt.refresh.record import RefreshState
from stream_adapt.refresh.status import Status


class Consumer:
    """A member of the group; the script assigns and revokes."""

    def __init__(self) -> None:
        self.position: int | None = None
        self.paused = False

    def subscribe(self, _topics: list[str], on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self.assign = lambda: on_assign(self, [TopicPartition("app.learning", 0)])
        self.revoke = lambda: on_revoke(self, [TopicPartition("app.learning", 0)])
        assert on_lost == on_revoke

    def consume(self, _count: int, _timeout_s: float) -> list[Any]:
        return []

    def get_watermark_offsets(self, _at: TopicPartition, timeout: float) -> tuple[int, int]:
        return 5, 50

    def seek(self, at: TopicPartition) -> None:
        self.position = at.offset

    def pause(self, _partitions: Any) -> None:
        self.paused = True

    def resume(self, _partitions: Any) -> None:
        self.paused = False

    def incremental_assign(self, _partitions: Any) -> None: ...
    def incremental_unassign(self, _partitions: Any) -> None: ...
    def close(self) -> None: ...


class FakeLeader:
    made: list[FakeLeader]
    problems: list[Exception]

    def __init__(self, *_: Any) -> None:
        self.state, self.busy, self.turns, self.closed = RefreshState(learning_offset=3), False, 0, False
        self.made.append(self)

    def turn(self, _summaries: Any, _end: Any) -> None:
        self.turns += 1
        if self.problems:
            raise self.problems.pop()

    def status(self) -> Status:
        return Status(
            leader=True,
            state="stable",
            since_ms=0,
            champion="v",
            challenger=None,
            trigger=None,
            last=None,
            progress={},
            written_ms=0,
        )

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Consumer:
    made = Consumer()
    monkeypatch.setattr(module.clients, "consumer", lambda _settings: made)
    monkeypatch.setattr(module, "Leader", FakeLeader)
    FakeLeader.made, FakeLeader.problems = [], []
    return made


def controller_in(folder: Path) -> Controller:
    config = Config.model_validate({"state": {"dir": folder}})
    return Controller(config, sleep=lambda _seconds: None)


def test_without_the_partition_nobody_leads_and_with_it_reading_goes_on_where_the_state_says(
    consumer: Consumer, tmp_path: Path
) -> None:
    controller = controller_in(tmp_path)
    controller.turn()
    assert not controller.leads
    consumer.assign()
    assert consumer.paused
    controller.turn()
    assert controller.leads
    assert (5, False) == (consumer.position, consumer.paused), "what came before offset 5 is gone"


def test_a_leader_whose_partition_is_taken_away_ends_what_it_does(consumer: Consumer, tmp_path: Path) -> None:
    controller = controller_in(tmp_path)
    consumer.assign()
    controller.turn()
    consumer.revoke()
    controller.turn()
    assert not controller.leads
    assert [True] == [leader.closed for leader in FakeLeader.made]
    assert b'"leader":false' in (tmp_path / "refresh.json").read_bytes()


@pytest.mark.parametrize("problem", [Deposed("fenced"), KafkaRefused("no broker")])
def test_a_leader_that_fails_begins_anew_as_long_as_it_has_the_partition(
    consumer: Consumer, tmp_path: Path, problem: Exception
) -> None:
    controller = controller_in(tmp_path)
    consumer.assign()
    controller.turn()
    FakeLeader.problems = [problem]
    controller.turn()
    assert not controller.leads
    assert consumer.paused
    controller.turn()
    controller.turn()
    assert [True, False] == [leader.closed for leader in FakeLeader.made]
    assert 1 == FakeLeader.made[-1].turns

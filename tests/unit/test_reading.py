"""Questions about a topic: asked again while nobody may answer, refused where that will not change, not passed over."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka import clients, reading
from stream_adapt.kafka.reading import TopicReader


class Consumer:
    """Answers what it is told, one after the other; an error is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.timeouts: list[float] = []

    def _next(self, timeout: float) -> Any:
        self.timeouts.append(timeout)
        answer = self.answers.pop(0)
        if isinstance(answer, KafkaError):
            raise KafkaException(answer)
        return answer

    def get_watermark_offsets(self, _tp: TopicPartition, timeout: float) -> Any:
        return self._next(timeout)

    def offsets_for_times(self, _asked: list[TopicPartition], timeout: float) -> Any:
        return self._next(timeout)

    def committed(self, _asked: list[TopicPartition], timeout: float) -> Any:
        return self._next(timeout)


def reader(monkeypatch: pytest.MonkeyPatch, consumer: Consumer) -> TopicReader:
    monkeypatch.setattr(clients, "consumer", lambda *_: consumer)
    monkeypatch.setattr(reading, "_BETWEEN_TRIES_S", 0.001)
    return TopicReader({}, "t")


def found(partition: int, offset: int, error: KafkaError | None = None) -> TopicPartition:
    made = TopicPartition("t", partition, offset)
    if error is not None:
        monkey = type("Answer", (TopicPartition,), {"error": error})
        made = monkey("t", partition, offset)
    return made


MOVING = KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION)
DENIED = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)


def test_ends_are_asked_for_again_while_a_partition_has_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Consumer(MOVING, MOVING, (3, 9), (0, 4))
    assert {0: (3, 9), 1: (0, 4)} == reader(monkeypatch, consumer).ends([0, 1])
    assert consumer.timeouts[0] > consumer.timeouts[2]


def test_what_will_not_change_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Consumer(DENIED, (3, 9))
    with pytest.raises(KafkaRefused, match="no its ends"):
        reader(monkeypatch, consumer).ends([0])
    assert 1 == len(consumer.timeouts)


def test_a_leader_that_does_not_come_is_waited_for_as_long_as_a_call_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CALL_TIMEOUT_S", 0.05)
    with pytest.raises(KafkaRefused, match="NOT_LEADER"):
        reader(monkeypatch, Consumer(*[MOVING] * 1_000)).ends([0])


def test_a_partition_without_an_answer_is_not_taken_for_one_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [found(0, 5), found(1, -1, MOVING)], [found(0, 5), found(1, 7)], (0, 9), (0, 9)
    assert {0: 5, 1: 7} == reader(monkeypatch, Consumer(*answers)).since([0, 1], 1_000)


def test_a_partition_without_an_answer_is_not_taken_for_one_without_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [found(0, 5), found(1, -1001, MOVING)], [found(0, 5), found(1, 7)]
    assert [0, 1] == sorted(reader(monkeypatch, Consumer(*answers)).committed([0, 1]))

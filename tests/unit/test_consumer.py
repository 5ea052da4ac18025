"""Which records of a batch are due: those of owned partitions, each once, in order."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.kafka.consumer import InputConsumer, RebalanceListener, due_records
from stream_adapt.record import RawBatch


def _due(records: list[tuple[int, int]], owned: dict[int, int]) -> list[int] | None:
    partitions, offsets = (
        np.array(column, dtype=np.int64) for column in (zip(*records, strict=True) if records else ((), ()))
    )
    due = due_records(partitions.astype(np.int32), offsets, owned)
    return None if due is None else due.tolist()


def test_a_calm_batch_is_due_whole() -> None:
    assert _due([(0, 5), (1, 0), (0, 6), (1, 9)], {0: 5, 1: 0}) is None
    assert _due([], {0: 5}) is None


def test_records_of_partitions_that_were_taken_away_are_left_out() -> None:
    assert [1] == _due([(0, 5), (1, 0), (2, 7)], {1: 0})


def test_records_handed_out_again_after_a_rewind_are_due_once() -> None:
    """The fetch before the rewind was at 7; then the consumer was sent back to 5."""
    assert [2, 3, 4, 5] == _due([(0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 5), (0, 6)], {0: 5})


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=30),
    st.dictionaries(st.integers(0, 2), st.integers(0, 8)),
)
def test_what_is_due_rises_in_every_owned_partition(records: list[tuple[int, int]], owned: dict[int, int]) -> None:
    due = _due(records, owned)
    chosen = records if due is None else [records[i] for i in due]
    following = dict(owned)
    for partition, offset in chosen:
        assert offset >= following[partition]
        following[partition] = offset + 1
    for i, (partition, offset) in enumerate(records):
        if due is not None and i not in due and partition in owned:
            assert offset < following[partition]


def test_a_batch_knows_where_the_next_one_begins() -> None:
    raw = RawBatch([None] * 3, [None] * 3, np.array([2, 0, 2], np.int32), np.array([4, 9, 7], np.int64))
    assert {2: 8, 0: 10} == raw.next_offsets
    assert [4, 7] == raw.take(np.array([0, 2])).offsets.tolist()


def _alone(listener: RebalanceListener) -> InputConsumer:
    properties = {
        "bootstrap.servers": "127.0.0.1:1",  # nobody answers there
        "group.id": "g",
        "partition.assignment.strategy": "cooperative-sticky",
        "log_level": 0,
    }
    return InputConsumer(properties, "t", start="earliest", listener=listener)


def test_partitions_that_come_while_leaving_are_not_taken() -> None:
    """A client that closes gets no answer to questions about offsets: asking would last a minute and end with 3."""

    class Client:
        taken: Any = None

        def incremental_assign(self, partitions: list[TopicPartition]) -> None:
            self.taken = partitions

    told: list[Any] = []
    consumer, client = _alone(RebalanceListener(assigned=told.append, revoked=told.append)), Client()
    consumer.close()
    consumer._assigned(cast(Consumer, client), [TopicPartition("t", 0)])
    assert ([], []) == (client.taken, told)


def _message(offset: int, error: KafkaError | None = None) -> mock.Mock:
    told = {"key": b"k", "value": b"v", "partition": 0, "offset": offset, "error": error}
    return mock.Mock(**{f"{name}.return_value": value for name, value in told.items()})


def test_what_was_polled_and_is_not_committed_yet_lags_though_the_end_was_seen() -> None:
    """The end is at 12: two markers of transactions lie behind the last record."""
    consumer = _alone(RebalanceListener())
    consumer.positions.next_offsets[0] = 0
    messages = [*map(_message, range(10)), _message(12, KafkaError(KafkaError._PARTITION_EOF))]
    consumer._consumer = mock.Mock(**{"consume.return_value": messages})
    lags = []
    consumer.poll(100, 0.0)
    for committed in (0, 4, 10):
        consumer.advance({0: committed})
        lags.append(consumer.lag()[0])
    consumer._lookup.close()
    assert [10, 6, 0] == lags

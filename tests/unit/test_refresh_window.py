"""The newest part of the input as a log: which records, in which order, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from stream_adapt.decode import Decoder
from stream_adapt.errors import DataError
from stream_adapt.learner.feedback import Feedback
from stream_adapt.meta.sequences import item_hashes
from stream_adapt.refresh.window import ranges_of, read_window

FEEDBACK = Feedback(levels=("no", "yes"), target="yes", event_types={"view": "no", "buy": "yes"})


class Record:
    """A message as the client hands it over."""

    def __init__(self, partition: int, offset: int, time_ms: int, **fields: Any) -> None:
        self._at = partition, offset, time_ms
        event = {"event_id": f"e{partition}-{offset}", "user_id": "u", "item_id": f"i{offset}", "event_type": "buy"}
        self._event = {**event, "timestamp": time_ms, **fields}
        if self._event["event_type"] == "$erase":
            del self._event["item_id"]

    def key(self) -> bytes:
        return str(self._event["user_id"]).encode()

    def value(self) -> bytes:
        return json.dumps(self._event).encode()

    def partition(self) -> int:
        return self._at[0]

    def offset(self) -> int:
        return self._at[1]

    def timestamp(self) -> tuple[int, int]:
        return 1, self._at[2]

    def headers(self) -> None:
        return None


class Topic:
    """The input topic."""

    topic = "events"

    def __init__(self, *records: Record) -> None:
        self._records = records
        self.asked: Mapping[int, tuple[int, int]] = {}

    def partitions(self) -> list[int]:
        return sorted({r.partition() for r in self._records})

    def since(self, partitions: list[int], time_ms: int) -> dict[int, int]:
        found = {p: [r.offset() for r in self._of(p) if r.timestamp()[1] >= time_ms] for p in partitions}
        return {p: min(offsets, default=self.ends([p])[p][1]) for p, offsets in found.items()}

    def ends(self, partitions: list[int]) -> dict[int, tuple[int, int]]:
        return {p: (0, 1 + max(r.offset() for r in self._of(p))) for p in partitions}

    def records(self, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        self.asked = ranges
        return (r for p, (start, stop) in ranges.items() for r in self._of(p) if start <= r.offset() < stop)

    def _of(self, partition: int) -> list[Record]:
        return [r for r in self._records if r.partition() == partition]


def read(topic: Topic, since_ms: int = 0, most: int = 100, newer: dict[int, int] | None = None) -> Any:
    return read_window(topic, Decoder({}, FEEDBACK), since_ms=since_ms, most=most, newer=newer)  # type: ignore[arg-type]


def test_records_of_partitions_are_merged_by_time_and_none_changes_its_own_order() -> None:
    window = read(Topic(*(Record(0, n, t) for n, t in enumerate([10, 50, 20])), Record(1, 3, 40), Record(1, 4, 60)))
    assert item_hashes(["i0", "i3", "i1", "i2", "i4"]).tolist() == window.log.items.tolist()
    assert {0: 3, 1: 5} == window.ends


def test_only_what_was_written_since_is_read() -> None:
    window = read(Topic(*(Record(0, n, 10 * n) for n in range(10))), since_ms=60)
    assert {0: (6, 10)} == window.about.offsets
    assert 4 == len(window.log) == window.about.events


def test_of_too_much_every_partition_gives_its_newest() -> None:
    ends = {0: (0, 100), 1: (0, 300)}
    assert {0: (75, 100), 1: (225, 300)} == ranges_of({0: 0, 1: 0}, ends, 100)
    assert {0: (0, 100), 1: (0, 300)} == ranges_of({0: 0, 1: 0}, ends, 400)
    assert {0: (40, 100)} == ranges_of({0: 3}, {0: (40, 100)}, 1_000), "retention has moved the beginning"


def test_what_a_user_did_before_an_erasure_teaches_nobody() -> None:
    erase = Record(0, 2, 30, event_type="$erase")
    window = read(Topic(Record(0, 0, 10), Record(0, 1, 20, user_id="v"), erase, Record(0, 3, 40)))
    assert item_hashes(["i1", "i3"]).tolist() == window.log.items.tolist()


def test_events_without_feedback_and_refused_ones_are_left_out_and_the_rest_keeps_its_place() -> None:
    records = [Record(0, n, 10 * n, event_type=kind) for n, kind in enumerate(["buy", "look", "view", "buy"])]
    bad = Record(1, 0, 15, user_id="")
    window = read(Topic(*records, bad), newer={0: 3})
    assert item_hashes(["i0", "i2", "i3"]).tolist() == window.log.items.tolist()
    assert [1, 0, 1] == window.log.levels.tolist()
    assert [False, False, True] == window.newer.tolist()


def test_a_window_without_feedback_is_refused() -> None:
    with pytest.raises(DataError, match="events: no event with feedback among the newest 1"):
        read(Topic(Record(0, 0, 10, event_type="look")))

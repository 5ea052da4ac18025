"""Record batches on disk: whose a record is, and whether it was sent again."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from stream_adapt.chaos.segments import RecordBatch, batches, sent_again


def batch(first: int, records: int, producer: tuple[int, int, int], content: bytes = b"records") -> bytes:
    """The bytes of a batch: base offset, length, and so on."""
    producer_id, epoch, sequence = producer
    rest = struct.pack(">ibIhiqqqhii", 3, 2, 77, 0, records - 1, 5, 6, producer_id, epoch, sequence, records) + content
    return struct.pack(">qi", first, len(rest)) + rest


def folder(path: Path, *segments: bytes) -> Path:
    path.mkdir()
    for number, segment in enumerate(segments):
        (path / f"{number:020}.log").write_bytes(segment)
    (path / f"{0:020}.index").write_bytes(b"is no segment")
    return path


def test_batches_are_read_in_order_and_what_is_cut_off_is_left_out(tmp_path: Path) -> None:
    whole = batch(0, 3, (7, 0, 0)) + batch(3, 1, (7, 0, 3))
    there = folder(tmp_path / "events-0", whole, batch(4, 2, (-1, -1, -1)), batch(6, 1, (8, 2, 0))[:40])
    assert [
        RecordBatch(0, 2, 7, 0, 0),
        RecordBatch(3, 3, 7, 0, 3),
        RecordBatch(4, 5, -1, -1, -1),
    ] == list(batches(there))
    room = folder(tmp_path / "events-1", batch(0, 1, (7, 0, 0)) + bytes(200))
    assert [RecordBatch(0, 0, 7, 0, 0)] == list(batches(room))


@pytest.mark.parametrize(
    ("later", "again"),
    [
        ((7, 1, 0), True),  # the same producer in a later epoch
        ((7, 0, 9), False),  # sent anew by whoever owns the producer
        ((8, 1, 0), False),  # another producer
        ((-1, -1, -1), False),
    ],
)
def test_a_record_was_sent_again_by_its_producer_if_its_epoch_is_a_later_one(
    tmp_path: Path, later: tuple[int, int, int], again: bool
) -> None:
    first = batch(0, 3, (7, 0, 0)) + batch(3, 2, later)
    replica = batch(0, 3, (7, 0, 0))
    folders = [folder(tmp_path / "1", first), folder(tmp_path / "2", replica), tmp_path / "none"]
    assert again is sent_again(folders, [1, 4])


def test_nothing_is_said_of_records_that_are_not_there(tmp_path: Path) -> None:
    there = folder(tmp_path / "1", batch(0, 3, (7, 0, 0)) + batch(3, 2, (7, 1, 0)))
    assert not sent_again([there], [1, 9])

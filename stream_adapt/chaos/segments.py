"""Record batches as a broker has them on disk: they say who produced a record, which no consumer is told.

Layout: Apache Kafka's documentation, "Record Batch", magic 2 (KIP-98).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

#: Base offset, length of what follows it, leader epoch, magic, checksum, attributes, last offset's delta, times of the
#: first and the last record, producer's id and epoch, base sequence, records.
_HEADER = struct.Struct(">qiibIhiqqqhii")
#: Base offset and length, which the length does not count.
_LENGTH_COUNTS_FROM = 12


class RecordBatch(NamedTuple):
    """What the header of a batch says."""

    first: int  # offset
    last: int
    producer_id: int  # −1: of one that is not idempotent
    producer_epoch: int
    sequence: int


def batches(folder: Path) -> Iterator[RecordBatch]:
    """Those of a partition's folder, in the order of their offsets; what is cut off at the end is left out."""
    for segment in sorted(folder.glob("*.log")):
        content, at = segment.read_bytes(), 0
        while at + _HEADER.size <= len(content):
            base, length, _, _, _, _, delta, _, _, producer_id, epoch, sequence, _ = _HEADER.unpack_from(content, at)
            if length <= 0:  # room that is not written yet
                break
            yield RecordBatch(base, base + delta, producer_id, epoch, sequence)
            at += _LENGTH_COUNTS_FROM + length


def sent_again(folders: Iterable[Path], offsets: Sequence[int]) -> bool:
    """Whether records are of one idempotent producer, each of a later epoch than the one before.

    Args:
        folders: of one partition, on the brokers that have it.
        offsets: of the records.
    """
    found = {offset: batch for folder in folders for batch in batches(folder) for offset in _within(batch, offsets)}
    producers = [found[offset] for offset in sorted(found)]
    return len(found) == len(offsets) and all(
        one.producer_id == later.producer_id >= 0 and one.producer_epoch < later.producer_epoch
        for one, later in pairwise(producers)
    )


def _within(batch: RecordBatch, offsets: Sequence[int]) -> list[int]:
    return [offset for offset in offsets if batch.first <= offset <= batch.last]

"""Expiry: rows that were idle for too long are dropped, at offsets that depend on the records alone.

Whenever a partition's records pass a multiple of `every` offsets, its rows are looked at: those whose last event is
more than the time to live older than the newest event of any of its rows are removed through the overlay. Time is
event time, and both sides of the comparison are in the rows; so where batches were cut, what crashed, and what the
clock says make no difference.
"""

from __future__ import annotations

import numpy as np

from stream_adapt.record import Ints, Longs
from stream_adapt.state.overlay import Overlay
from stream_adapt.state.table import Table

#: Rows dropped at one multiple, the oldest first: each is a tombstone in the transaction. The rest waits for the next.
MOST_ROWS = 65_536


class Expiry:
    """Time to live of one table's rows, `every` offsets of each partition."""

    def __init__(self, table: Table, overlay: Overlay, ttl_s: float, every: int) -> None:
        self._table = table
        self._overlay = overlay
        self._ttl_ms = round(ttl_s * 1000)
        self._every = every
        self._stretch: dict[int, int] = {}  # by partition: last offset // every
        self._committed: dict[int, int] = {}
        self._dropped = 0

    def resume(self, partition: int, next_offset: int) -> None:
        """The partition's rows are those after the record before `next_offset`."""
        self._stretch[partition] = self._committed[partition] = (next_offset - 1) // self._every

    def due(self, partitions: Ints, offsets: Longs) -> list[tuple[int, int]]:
        """Of n records those, in order, before which their partition is to be checked, and how many multiples passed.

        Multiples, not records: it makes no difference which of several records was the first to pass one.
        """
        stretches = offsets // self._every
        found: list[tuple[int, int]] = []
        for partition in np.unique(partitions).tolist():
            at = np.flatnonzero(partitions == partition)
            before = self._stretch.get(partition, (int(offsets[at[0]]) - 1) // self._every)
            multiples = np.diff(np.maximum(stretches[at], before), prepend=before)
            first = np.flatnonzero(multiples)
            found += zip(at[first].tolist(), multiples[first].tolist(), strict=True)
        return sorted(found)

    def check(self, partition: int, multiples: int) -> None:
        """Drops the partition's idle rows."""
        idle = self._table.idle(partition, self._ttl_ms, multiples * MOST_ROWS)
        for row_id in idle:
            self._overlay.remove(self._table, partition, row_id)
        self._dropped += len(idle)

    def passed(self, partitions: Ints, offsets: Longs) -> None:
        """These n records were handled."""
        self._stretch.update(zip(partitions.tolist(), (offsets // self._every).tolist(), strict=True))

    def commit(self) -> None:
        """What was dropped stays so."""
        self._committed.update(self._stretch)
        self._table.expired += self._dropped
        self._dropped = 0

    def abort(self) -> None:
        """Back to the last commit; the overlay puts the rows back."""
        self._stretch = dict(self._committed)
        self._dropped = 0

    def drop(self, partition: int) -> None:
        """The partition belongs to another member now."""
        self._stretch.pop(partition, None)
        self._committed.pop(partition, None)

"""A slab of rows of one kind, and the index from (source partition, id) to a slot in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.state.row import Layout

Slots = npt.NDArray[np.int64]

#: Fills new rows of a slab: slab, slots, ids.
Start = Callable[[npt.NDArray[Any], Slots, Sequence[str]], None]

_FIRST_CAPACITY = 1024


class Table:
    """Rows of all owned partitions. A row is found by its source partition and id, and lives at a slot of the slab.

    `start` fills m new rows, which are zero: it gets the slab, their slots `[m]` and their ids. `created` lists what
    was inserted since `forget_created()`, so that an abort can take it out again.
    """

    def __init__(self, layout: Layout, start: Start) -> None:
        self.layout = layout
        self.rows: npt.NDArray[Any] = np.zeros(_FIRST_CAPACITY, dtype=layout.dtype)
        self.created: list[tuple[int, str, int]] = []
        self._start = start
        self._index: dict[int, dict[str, int]] = {}
        self._free: list[int] = []
        self._end = 0

    def __len__(self) -> int:
        return self._end - len(self._free)

    @property
    def partitions(self) -> set[int]:
        """Partitions that have a row here."""
        return {partition for partition, index in self._index.items() if index}

    def find(self, partition: int, row_id: str) -> int | None:
        """Slot of a row, or None."""
        return self._index.get(partition, {}).get(row_id)

    def items(self, partition: int) -> Iterator[tuple[str, int]]:
        """Ids and slots of one partition."""
        return iter(self._index.get(partition, {}).items())

    def slots(self, partitions: Sequence[int], row_ids: Sequence[str]) -> Slots:
        """Slots `[n]` of rows that are found or, where there are none, started."""
        index = self._index
        for partition in set(partitions):
            index.setdefault(partition, {})
        found = [index[p].get(i) for p, i in zip(partitions, row_ids, strict=True)]
        if None in found:
            self._insert(
                dict.fromkeys((p, i) for p, i, slot in zip(partitions, row_ids, found, strict=True) if slot is None)
            )
            found = [index[p].get(i) for p, i in zip(partitions, row_ids, strict=True)]
        return np.array(found, dtype=np.int64)

    def _insert(self, keys: Collection[tuple[int, str]]) -> None:
        """Starts rows for m different keys that have none, in order."""
        slots = self._take_slots(len(keys))
        for (partition, row_id), slot in zip(keys, slots.tolist(), strict=True):
            self._index[partition][row_id] = slot
            self.created.append((partition, row_id, slot))
        self.rows[slots] = np.zeros((), dtype=self.rows.dtype)
        self._start(self.rows, slots, [row_id for _, row_id in keys])

    def _take_slots(self, count: int) -> Slots:
        """Free slots first, the last freed before others, then new ones at the end of the slab."""
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        first, self._end = self._end, self._end + count - len(reused)
        if self._end > len(self.rows):
            capacity = max(2 * len(self.rows), self._end)
            self.rows = np.concatenate([self.rows, np.zeros(capacity - len(self.rows), dtype=self.rows.dtype)])
        return np.concatenate([np.array(reused, dtype=np.int64), np.arange(first, self._end)])

    def remove(self, partition: int, row_id: str) -> None:
        """Drops a row; its slot is used again."""
        self._free.append(self._index[partition].pop(row_id))

    def drop(self, partition: int) -> int:
        """Drops every row of a partition; returns how many."""
        index = self._index.pop(partition, {})
        self._free.extend(index.values())
        return len(index)

    def forget_created(self) -> None:
        """What was created is committed."""
        self.created.clear()

"""A slab of rows of one kind, and the index from (source partition, id) to a slot in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.state.row import Layout

Slots = npt.NDArray[np.int64]

_FIRST_CAPACITY = 1024


class Table:
    """Rows of all owned partitions. A row is found by its source partition and id, and lives at a slot of the slab.

    `start` fills a new row: it gets the table, the slot and the id. `created` lists what was inserted since
    `forget_created()`, so that an abort can take it out again.
    """

    def __init__(self, layout: Layout, start: Callable[[Table, int, str], None]) -> None:
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
            found = [
                self._insert(p, i) if slot is None else slot
                for slot, p, i in zip(found, partitions, row_ids, strict=True)
            ]
        return np.array(found, dtype=np.int64)

    def _insert(self, partition: int, row_id: str) -> int:
        known = self._index[partition].get(row_id)
        if known is not None:  # inserted a moment ago: the id occurs twice in the batch
            return known
        slot = self._free.pop() if self._free else self._end
        if slot == self._end:
            self._end += 1
            if self._end > len(self.rows):
                self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self._index[partition][row_id] = slot
        self.created.append((partition, row_id, slot))
        self.rows[slot] = np.zeros((), dtype=self.rows.dtype)
        self._start(self, slot, row_id)
        return slot

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

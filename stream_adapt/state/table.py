"""A slab of rows of one kind, and the index from (source partition, id) to a slot in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from stream_adapt.state.row import Layout

Slots = npt.NDArray[np.int64]

#: Fills new rows of a slab: slab, slots, ids.
Start = Callable[[npt.NDArray[Any], Slots, Sequence[str]], None]

_FIRST_CAPACITY = 1024


class Table:
    """Rows of all owned partitions. A row is found by its source partition and id, and lives at a slot of the slab.

    `start` fills m new rows, which are zero: it gets the slab, their slots `[m]` and their ids. `created` lists what
    was inserted since `forget_touched()`, so that an abort can take it out again.
    """

    def __init__(self, layout: Layout, start: Start) -> None:
        self.layout = layout
        self.rows: npt.NDArray[Any] = np.zeros(_FIRST_CAPACITY, dtype=layout.dtype)
        self.created: list[tuple[int, str, int]] = []
        self.ids: list[str] = []  # by slot; stale where the slot is free
        self.partition_of: npt.NDArray[np.int32] = np.zeros(_FIRST_CAPACITY, dtype=np.int32)  # by slot
        self._start = start
        self._index: dict[int, dict[str, int]] = {}
        self._free: list[int] = []
        self._end = 0
        self._touched_in: Slots = np.zeros(_FIRST_CAPACITY, dtype=np.int64)  # by slot: its last round
        self._round = 1

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
        index, several = self._index, set(partitions)
        for partition in several:
            index.setdefault(partition, {})
        if len(several) == 1:  # most often: records are fetched partition by partition
            found = [*map(index[partitions[0]].get, row_ids)]
        else:
            found = [index[p].get(i) for p, i in zip(partitions, row_ids, strict=True)]
        if None in found:
            triples = zip(partitions, row_ids, found, strict=True)
            self._insert(dict.fromkeys((p, i) for p, i, slot in triples if slot is None))
            triples = zip(partitions, row_ids, found, strict=True)
            found = [index[p][i] if slot is None else slot for p, i, slot in triples]
        return np.array(found, dtype=np.int64)

    def _insert(self, keys: Collection[tuple[int, str]]) -> None:
        """Starts rows for m different keys that have none, in order."""
        slots = self._take_slots(len(keys))
        for (partition, row_id), slot in zip(keys, slots.tolist(), strict=True):
            self._index[partition][row_id] = slot
            self.ids[slot] = row_id
            self.partition_of[slot] = partition
            self.created.append((partition, row_id, slot))
        self.rows.view(np.uint8).reshape(len(self.rows), -1)[slots] = 0
        self._touched_in[slots] = self._round
        self._start(self.rows, slots, [row_id for _, row_id in keys])

    def _take_slots(self, count: int) -> Slots:
        """Free slots first, the last freed before others, then new ones at the end of the slab."""
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        first, self._end = self._end, self._end + count - len(reused)
        if self._end > len(self.rows):
            capacity = max(2 * len(self.rows), self._end)
            more = capacity - len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros(more, dtype=self.rows.dtype)])
            self._touched_in = np.concatenate([self._touched_in, np.zeros(more, dtype=np.int64)])
            self.partition_of = np.concatenate([self.partition_of, np.zeros(more, dtype=np.int32)])
        self.ids.extend([""] * (self._end - len(self.ids)))
        return np.concatenate([np.array(reused, dtype=np.int64), np.arange(first, self._end)])

    def load(self, partition: int, row_ids: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Takes in m restored rows, new or in place of those that are there; of equal ids the last one counts."""
        index = self._index.setdefault(partition, {})
        new = [row_id for row_id in dict.fromkeys(row_ids) if row_id not in index]
        slots = self._take_slots(len(new))
        self.partition_of[slots] = partition
        for row_id, slot in zip(new, slots.tolist(), strict=True):
            index[row_id] = slot
            self.ids[slot] = row_id
        self.rows[[index[row_id] for row_id in row_ids]] = rows

    def first_touched(self, slots: Slots) -> Slots:
        """Those of the slots `[n]` that were neither asked about nor created since `forget_touched`, each once."""
        return _first_touched(slots, self._touched_in, self._round)  # type: ignore[no-any-return]

    def remove(self, partition: int, row_id: str) -> None:
        """Drops a row; its slot is used again."""
        self._free.append(self._index[partition].pop(row_id))

    def drop(self, partition: int) -> int:
        """Drops every row of a partition; returns how many."""
        index = self._index.pop(partition, {})
        self._free.extend(index.values())
        return len(index)

    def forget_touched(self) -> None:
        """What was created and touched is committed, or undone."""
        self.created.clear()
        self._round += 1


@njit(cache=True)
def _first_touched(slots, touched_in, round_number):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Slots whose mark is not `round_number` yet; marks them. A sort would cost more than the rest of the overlay."""
    found = np.empty(slots.shape[0], np.int64)
    count = 0
    for i in range(slots.shape[0]):
        if touched_in[slots[i]] != round_number:
            touched_in[slots[i]] = round_number
            found[count] = slots[i]
            count += 1
    return found[:count]

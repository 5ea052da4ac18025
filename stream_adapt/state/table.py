"""A slab of rows of one kind, and the index from (source partition, id) to a slot in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from stream_adapt.state.row import Layout
from stream_adapt.state.slab import Slab

Slots = npt.NDArray[np.int64]

#: Fills new rows of a slab: slab, slots, ids.
Start = Callable[[npt.NDArray[Any], Slots, Sequence[str]], None]

#: What a partition takes at a time, so that whole pages are free when it leaves.
_EXTENT_BYTES = 256 << 10
_FIRST_EXTENTS = 4
_FREE = -1
#: Bytes of an id and of a slot number as Python's objects.
_ID, _INT = 64, 32


class Table:
    """Rows of all owned partitions. A row is found by its source partition and id, and lives at a slot of the slab.

    A partition's rows lie in extents of its own, which are given back when it is dropped. `start` fills m new rows,
    which are zero: it gets the slab, their slots `[m]` and their ids. `created` has the slots of what was inserted
    since `forget_touched()`, so that an abort can take it out again. Without a folder the slab lies in memory. Where
    the layout has `last_ms`, the time of a row's last event, `idle` finds rows by it.
    """

    def __init__(self, layout: Layout, start: Start, folder: Path | None = None) -> None:
        self.layout = layout
        self.created: list[int] = []
        self.expired = 0  # rows dropped because they were idle
        self._start = start
        self._extent = max(1, _EXTENT_BYTES // layout.row_bytes)  # rows
        capacity = _FIRST_EXTENTS * self._extent
        self._slab = Slab(layout.dtype, folder, capacity)
        self.ids: npt.NDArray[np.object_] = np.empty(capacity, dtype=object)  # by slot; not seen by Python's collector
        self.partition_of: npt.NDArray[np.int32] = np.full(capacity, _FREE, dtype=np.int32)  # by slot; -1: no row
        self._touched_in: Slots = np.zeros(capacity, dtype=np.int64)  # by slot: its last round
        self._round = 1
        self._times: Slots = np.zeros(0, dtype=np.int64)  # by slot: last_ms when `idle` or `load` saw it
        self._seen_in: dict[int, int] = {}  # by partition: round of the last `idle`
        self._index: dict[int, dict[str, int]] = {}
        self._free: dict[int, list[int]] = {}  # by partition: slots without a row in its extents
        self._extents: dict[int, list[int]] = {}  # by partition
        self._spare: list[int] = []  # extents that no partition has
        self._end = 0  # extents taken so far

    def __len__(self) -> int:
        return sum(map(len, self._index.values()))

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The slab. It is another array after rows were inserted."""
        return self._slab.rows

    @property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        """The slab as bytes `[capacity, row_bytes]`."""
        return self.rows.view(np.uint8).reshape(len(self.rows), -1)

    @property
    def slab_bytes(self) -> int:
        """What the slab takes, in memory or on the disk."""
        return self._slab.nbytes

    @property
    def index_bytes(self) -> int:
        """Memory beside the slab: ids, index, and what is kept by slot. Ids count as 64 bytes: 15 ASCII characters."""
        arrays = self.ids.nbytes + self.partition_of.nbytes + self._touched_in.nbytes + self._times.nbytes
        free = sum(map(len, self._free.values()))
        return arrays + sum(map(sys.getsizeof, self._index.values())) + (_ID + _INT) * len(self) + (_INT + 8) * free

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

    def slots(self, partitions: npt.ArrayLike, row_ids: Sequence[str]) -> Slots:
        """Slots `[n]` of rows that are found or, where there are none, started.

        Partitions `[n]` come in runs, because records are fetched partition by partition.

        Raises:
            StateFull: no room for all that are new; an abort takes out those that were started.
        """
        of = np.asarray(partitions)
        bounds = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)] if len(of) else []
        slots: list[int] = []
        for start, end in pairwise(bounds):
            slots += self._slots_of(int(of[start]), row_ids[start:end])
        return np.array(slots, dtype=np.int64)

    def _slots_of(self, partition: int, row_ids: Sequence[str]) -> list[int]:
        index = self._index.setdefault(partition, {})
        found = [*map(index.get, row_ids)]
        if None not in found:
            return cast("list[int]", found)
        new = dict.fromkeys([row_id for row_id, slot in zip(row_ids, found, strict=True) if slot is None])
        slots = self._insert(partition, [*new])
        return slots if len(slots) == len(row_ids) else [*map(index.__getitem__, row_ids)]

    def load(self, partition: int, ids: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Puts m rows `[m]` as they are, over those of equal ids; of equal ids among them the last counts.

        For what is restored: nothing is started, and no abort takes it back.

        Raises:
            StateFull: no room; nothing was put.
        """
        index = self._index.setdefault(partition, {})
        if len(set(ids)) < len(ids):
            last = dict(zip(ids, range(len(ids)), strict=True))
            ids, rows = list(last), rows[list(last.values())]
        if index.keys().isdisjoint(ids):
            slots = self._link(partition, ids)
        else:
            self._link(partition, [row_id for row_id in ids if row_id not in index])
            slots = np.fromiter(map(index.__getitem__, ids), np.int64, len(ids))
        self.put(slots, rows)
        if len(self._times):
            self._times[slots] = rows["last_ms"]

    def remove(self, partition: int, row_id: str) -> None:
        """Drops a row for good; its slot is used again. Inside a transaction: `Overlay.remove`.

        Raises:
            KeyError: there is none.
        """
        self.free(partition, self.unlink(partition, row_id))

    def drop(self, partition: int) -> int:
        """Drops every row of a partition and gives their memory back; returns how many there were."""
        for extent in self._extents.pop(partition, []):
            first, end = extent * self._extent, (extent + 1) * self._extent
            self.ids[first:end] = None
            self.partition_of[first:end] = _FREE
            self._slab.release(first, end)
            self._spare.append(extent)
        self._free.pop(partition, None)
        self._seen_in.pop(partition, None)
        return len(self._index.pop(partition, {}))

    def put(self, slots: Slots, rows: npt.NDArray[Any]) -> None:
        """Writes rows `[m]` to m different slots: as bytes, because field by field takes twice as long."""
        assert rows.dtype == self.layout.dtype
        as_bytes = np.dtype((np.void, self.layout.row_bytes))
        self.rows.view(as_bytes)[slots] = np.ascontiguousarray(rows).view(as_bytes)

    def idle(self, partition: int, ttl_ms: int, most: int) -> list[str]:
        """Ids of the partition's rows, at most so many, whose `last_ms` is over `ttl_ms` before the newest one's.

        The oldest come first in line, of equally old ones the least ids. Only rows that were touched since the last
        call are read: the others may lie on the disk, and stay there.
        """
        slots = self._occupied_by(partition)
        if not len(slots):
            return []
        self._note_times(partition, slots)
        times = self._times[slots]
        idle = times < times.max() - ttl_ms
        slots, times = slots[idle], times[idle]
        if len(slots) <= most:
            return self.ids[slots].tolist()  # type: ignore[no-any-return]
        last = np.partition(times, most)[most]
        sooner = self.ids[slots[times < last]].tolist()
        return [*sooner, *sorted(self.ids[slots[times == last]])[: most - len(sooner)]]

    def first_touched(self, slots: Slots) -> Slots:
        """Those of the slots `[n]` that were neither asked about nor created since `forget_touched`, each once."""
        return _first_touched(slots, self._touched_in, self._round)  # type: ignore[no-any-return]

    def forget_touched(self) -> None:
        """What was created and touched is committed, or undone."""
        self.created.clear()
        self._round += 1

    def unlink(self, partition: int, row_id: str) -> int:
        """Takes a row out of the index and returns its slot, which keeps its bytes until `free`."""
        slot = self._index[partition].pop(row_id)
        self.ids[slot], self.partition_of[slot] = None, _FREE
        return slot

    def relink(self, partition: int, row_id: str, slot: int) -> None:
        """Undoes `unlink`."""
        self._index[partition][row_id] = slot
        self.ids[slot], self.partition_of[slot] = row_id, partition

    def free(self, partition: int, slot: int) -> None:
        """Wipes a slot of the partition's extents, and lets it be used again."""
        self._bytes[slot] = 0
        self._free[partition].append(slot)

    def _occupied_by(self, partition: int) -> Slots:
        extents = np.array(self._extents.get(partition, []), dtype=np.int64)
        return occupied(self, (extents[:, None] * self._extent + np.arange(self._extent)).ravel())

    def _note_times(self, partition: int, slots: Slots) -> None:
        if not len(self._times):
            self._times = np.zeros(len(self.rows), dtype=np.int64)
        changed = slots[self._touched_in[slots] >= self._seen_in.get(partition, 0)]
        self._times[changed] = self.rows["last_ms"][changed]
        self._seen_in[partition] = self._round

    def _insert(self, partition: int, row_ids: list[str]) -> list[int]:
        """Starts m rows that are not there yet; returns their slots."""
        slots = self._link(partition, row_ids)
        taken: list[int] = slots.tolist()
        self.created += taken
        self._bytes[slots] = 0
        self._touched_in[slots] = self._round
        self._start(self.rows, slots, row_ids)
        return taken

    def _link(self, partition: int, row_ids: Sequence[str]) -> Slots:
        """Slots `[m]` for new rows, entered in the index; their bytes are anything."""
        taken = self._take_slots(partition, len(row_ids))
        slots = np.array(taken, dtype=np.int64)
        self._index[partition].update(zip(row_ids, taken, strict=True))
        self.ids[slots] = row_ids
        self.partition_of[slots] = partition
        return slots

    def _take_slots(self, partition: int, count: int) -> list[int]:
        """Free slots of the partition, the last freed before others, then those of new extents in order."""
        free = self._free.setdefault(partition, [])
        if len(free) < count:
            more = self._take_extents(partition, -(-(count - len(free)) // self._extent))
            free[:0] = (more[::-1, None] * self._extent + np.arange(self._extent)[::-1]).ravel().tolist()
        at = len(free) - count
        taken = free[at:]
        del free[at:]
        return taken[::-1]

    def _take_extents(self, partition: int, count: int) -> npt.NDArray[np.int64]:
        """Extents `[count]` that now are the partition's, with memory or disk reserved for them."""
        spare = self._spare[max(0, len(self._spare) - count) :]
        end = self._end + count - len(spare)
        if end * self._extent > len(self.rows):
            self._grow(max(2 * len(self.rows), end * self._extent))
        extents = [*reversed(spare), *range(self._end, end)]
        for extent in spare:
            self._slab.reserve(extent * self._extent, (extent + 1) * self._extent)
        self._slab.reserve(self._end * self._extent, end * self._extent)
        del self._spare[len(self._spare) - len(spare) :]
        self._end = end
        self._extents.setdefault(partition, []).extend(extents)
        return np.array(extents, dtype=np.int64)

    def _grow(self, capacity: int) -> None:
        self._slab.grow(capacity)
        more = capacity - len(self.ids)
        self.ids = np.concatenate([self.ids, np.empty(more, dtype=object)])
        self.partition_of = np.concatenate([self.partition_of, np.full(more, _FREE, dtype=np.int32)])
        self._touched_in = np.concatenate([self._touched_in, np.zeros(more, dtype=np.int64)])
        if len(self._times):
            self._times = np.concatenate([self._times, np.zeros(more, dtype=np.int64)])


def occupied(table: Table, slots: Iterable[int] | Slots) -> Slots:
    """Those of the slots that hold a row."""
    at = np.asarray(slots, dtype=np.int64)
    return at[table.partition_of[at] != _FREE]  # type: ignore[no-any-return]


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

"""The overlay: the old bytes of every row touched since the last commit. An abort puts them back.

Rows that were created since then have no old bytes; an abort takes them out again. Rows that were removed keep their
slot, and the bytes in it, until the commit; an abort enters them in the index again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.state.table import Slots, Table, occupied


class Overlay:
    """Old rows of some tables. `keep` before writing, then `forget` after the commit or `restore` after an abort."""

    def __init__(self, *tables: Table) -> None:
        self._tables = tables
        self._kept: list[tuple[Table, Slots, npt.NDArray[Any]]] = []
        self._unlinked: list[tuple[Table, int, str, int]] = []  # partition, id, slot

    @property
    def is_empty(self) -> bool:
        """Whether nothing was touched or removed since the last commit or abort."""
        return not self._kept and not self._unlinked

    @property
    def removed(self) -> list[tuple[Table, int, str]]:
        """Table, partition and id of committed rows that are there no more, in the order of their removal."""
        return [
            (table, partition, row_id)
            for table, partition, row_id, _ in self._undoable()
            if table.find(partition, row_id) is None  # else it was started anew
        ]

    def changed(self) -> Iterator[tuple[Table, Slots]]:
        """For each table the slots of all rows that were touched or created since the last commit, each once."""
        for table in self._tables:
            kept = [slots for of, slots, _ in self._kept if of is table]
            yield table, occupied(table, np.concatenate([*kept, np.array(table.created, dtype=np.int64)]))

    def keep(self, table: Table, slots: Slots) -> None:
        """Copies the rows at `slots` `[n]` as they are now, but for those that were copied since the last commit."""
        first = table.first_touched(slots)
        self._kept.append((table, first, np.take(table.rows, first)))  # a fifth of the time of an index

    def remove(self, table: Table, partition: int, row_id: str) -> None:
        """Drops a row; an abort puts it back.

        Raises:
            KeyError: there is none.
        """
        self._unlinked.append((table, partition, row_id, table.unlink(partition, row_id)))

    def restore(self) -> None:
        """Puts every row back, takes out the rows that were created, and enters again those that were removed."""
        for table, slots, rows in self._kept:
            table.put(slots, rows)
        undoable = self._undoable()
        for table in self._tables:
            for slot in occupied(table, table.created)[::-1].tolist():  # the next try gets the same slots
                table.remove(int(table.partition_of[slot]), table.ids[slot])
        for table, partition, row_id, slot in undoable:
            table.relink(partition, row_id, slot)
        kept = {(id(table), slot) for table, _, _, slot in undoable}
        for table, partition, _, slot in self._unlinked:
            if (id(table), slot) not in kept:
                table.free(partition, slot)
        self._end()

    def forget(self) -> None:
        """The rows as they are now are the committed state."""
        for table, partition, _, slot in self._unlinked:
            table.free(partition, slot)
        self._end()

    def _undoable(self) -> list[tuple[Table, int, str, int]]:
        """Rows that were there at the last commit and were removed since."""
        if not self._unlinked:
            return []
        created = {id(table): set(table.created) for table in self._tables}
        return [one for one in self._unlinked if one[3] not in created[id(one[0])]]

    def _end(self) -> None:
        self._kept.clear()
        self._unlinked.clear()
        for table in self._tables:
            table.forget_touched()

"""The overlay: the old bytes of every row touched since the last commit. An abort puts them back.

Rows that were created since then have no old bytes; an abort takes them out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.state.table import Slots, Table


class Overlay:
    """Old rows of some tables. `keep` before writing, then `forget` after the commit or `restore` after an abort."""

    def __init__(self, *tables: Table) -> None:
        self._tables = tables
        self._kept: list[tuple[Table, Slots, npt.NDArray[Any]]] = []
        self.removed: list[tuple[Table, int, str]] = []  # partition and id of rows dropped since the last commit

    @property
    def is_empty(self) -> bool:
        """Whether nothing was touched since the last commit or abort."""
        return not self._kept

    def keep(self, table: Table, slots: Slots) -> None:
        """Copies the rows at `slots` `[n]` as they are now, but for those that were copied since the last commit."""
        first = table.first_touched(slots)
        self._kept.append((table, first, np.take(table.rows, first)))  # a fifth of the time of an index

    def changed(self) -> Iterator[tuple[Table, Slots]]:
        """Slots that were touched or created since the last commit, each once."""
        for table in self._tables:
            kept = [slots for one, slots, _ in self._kept if one is table]
            created = np.array([slot for _, _, slot in table.created], dtype=np.int64)
            yield table, np.concatenate([*kept, created])

    def restore(self) -> None:
        """Puts every row back, and takes out the rows that were created."""
        for table, slots, rows in self._kept:
            table.rows[slots] = rows
        for table in self._tables:
            for partition, row_id, _ in reversed(table.created):
                table.remove(partition, row_id)
        self.forget()

    def forget(self) -> None:
        """The rows as they are now are the committed state."""
        self._kept.clear()
        self.removed.clear()
        for table in self._tables:
            table.forget_touched()

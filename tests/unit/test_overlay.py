"""The overlay against a dictionary of bytes: whatever was touched, created and removed, an abort takes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_adapt.state.overlay import Overlay
from stream_adapt.state.row import Field, Kind, Layout
from stream_adapt.state.table import Slots, Table

Key = tuple[int, int, str]  # table, partition, id

LAYOUT = Layout(Kind.USER, (Field("mark", "<i8", (), "of whoever wrote it"),))

partitions, names = st.integers(0, 2), st.sampled_from("abcdefgh")
keys = st.tuples(st.integers(0, 1), partitions, names)
steps = st.one_of(
    st.tuples(st.just("touch"), st.integers(0, 1), st.lists(st.tuples(partitions, names), min_size=1, max_size=6)),
    st.tuples(st.just("remove"), keys),
    st.tuples(st.just("commit")),
    st.tuples(st.just("abort")),
)


def start(slab: np.ndarray[Any, Any], slots: Slots, row_ids: Sequence[str]) -> None:
    slab["mark"][slots] = [-ord(row_id) for row_id in row_ids]


class Machine:
    """Two tables under one overlay, and what must be in them."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.tables = Table(layout, start), Table(layout, start)
        self.overlay = Overlay(*self.tables)
        self.committed: dict[Key, bytes] = {}
        self.now: dict[Key, bytes] = {}
        self.touched: set[Key] = set()
        self.clock = 0

    def touch(self, which: int, rows: list[tuple[int, str]]) -> None:
        """Adds to the rows' marks, so that what was there matters."""
        table = self.tables[which]
        slots = table.slots([p for p, _ in rows], [i for _, i in rows])
        self.overlay.keep(table, slots)
        self.clock += 1
        for (partition, row_id), slot in zip(rows, slots, strict=True):
            key = which, partition, row_id
            mark = int.from_bytes(
                self.now.get(key, (-ord(row_id)).to_bytes(8, "little", signed=True)), "little", signed=True
            )
            assert mark == table.rows["mark"][slot]
            table.rows["mark"][slot] += 1000 * self.clock
            self.now[key] = (mark + 1000 * self.clock).to_bytes(8, "little", signed=True)
            self.touched.add(key)

    def remove(self, key: Key) -> None:
        if key in self.now:
            self.overlay.remove(self.tables[key[0]], *key[1:])
            del self.now[key]
            self.touched.discard(key)

    def commit(self) -> None:
        self.overlay.forget()
        self.committed = dict(self.now)
        self.touched.clear()

    def abort(self) -> None:
        self.overlay.restore()
        self.now = dict(self.committed)
        self.touched.clear()

    def check(self) -> None:
        found = {
            (which, partition, row_id): table.rows[slot].tobytes()
            for which, table in enumerate(self.tables)
            for partition in table.partitions
            for row_id, slot in table.items(partition)
        }
        assert self.now == found
        changed = [
            (self.tables.index(table), int(table.partition_of[slot]), table.ids[slot])
            for table, slots in self.overlay.changed()
            for slot in slots
        ]
        assert sorted(self.touched) == sorted(changed)
        removed = [(self.tables.index(table), partition, row_id) for table, partition, row_id in self.overlay.removed]
        assert sorted(self.committed.keys() - self.now.keys()) == sorted(removed)


@settings(deadline=None)  # the first touch compiles
@given(st.lists(steps, max_size=40))
def test_rows_are_those_of_a_dictionary_with_commit_and_abort(script: Iterable[tuple[Any, ...]]) -> None:
    machine = Machine()
    for step, *arguments in script:
        getattr(machine, step)(*arguments)
        machine.check()
    machine.abort()
    machine.check()
    assert machine.overlay.is_empty


def test_slots_of_removed_rows_are_used_again_after_a_commit_and_an_abort() -> None:
    large = Layout(Kind.USER, (*LAYOUT.fields, Field("w", "<u1", (100_000,), "so that there are few slots")))
    machine = Machine(large)
    machine.touch(0, [(0, "a")])
    machine.commit()
    room = len(machine.tables[0].rows)
    for _ in range(room):
        machine.remove((0, 0, "a"))
        machine.touch(0, [(0, "a")])
        machine.abort()
        machine.touch(0, [(0, "b")])
        machine.remove((0, 0, "b"))
        machine.abort()
        machine.remove((0, 0, "a"))
        machine.touch(0, [(0, "a")])
        machine.commit()
    assert room == len(machine.tables[0].rows)

"""The table: rows found by partition and id, restored in bulk, dropped; and the slab that they lie in."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_adapt.errors import StateFull
from stream_adapt.state.overlay import Overlay
from stream_adapt.state.row import Field, Kind, Layout
from stream_adapt.state.table import Slots, Table

LAYOUT = Layout(Kind.USER, (Field("mark", "<i8", (), "of whoever wrote it"), Field("w", "<f4", (6,), "weights")))


def start(slab: np.ndarray[Any, Any], slots: Slots, _: Sequence[str]) -> None:
    slab["mark"][slots] = -1


@pytest.fixture(params=["memory", "folder"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    return Table(LAYOUT, start, tmp_path if request.param == "folder" else None)


def marked(*marks: int) -> np.ndarray[Any, Any]:
    rows = np.zeros(len(marks), LAYOUT.dtype)
    rows["mark"] = marks
    return rows


def marks(table: Table, partition: int) -> dict[str, int]:
    return {row_id: int(table.rows["mark"][slot]) for row_id, slot in table.items(partition)}


def test_rows_are_found_again_by_partition_and_id(table: Table) -> None:
    slots = table.slots([0, 1, 0, 1], ["a", "a", "b", "a"])
    assert slots[1] == slots[3]
    assert 3 == len(set(slots.tolist())) == len(table)
    np.testing.assert_array_equal(slots, table.slots([0, 1, 0, 1], ["a", "a", "b", "a"]))
    assert (slots[0], None) == (table.find(0, "a"), table.find(1, "b"))


def test_a_slot_tells_whose_it_is(table: Table) -> None:
    slots = table.slots([3, 5, 3], ["a", "a", "b"])
    assert ["a", "a", "b"] == [table.ids[slot] for slot in slots]
    assert [3, 5, 3] == table.partition_of[slots].tolist()
    assert 3 == (table.partition_of >= 0).sum()
    table.remove(5, "a")
    assert (None, -1) == (table.ids[slots[1]], table.partition_of[slots[1]])


def test_rows_stay_what_they_were_while_the_slab_grows(table: Table) -> None:
    names = [f"user-{k}" for k in range(100_000)]
    early = table.slots([0] * 10, names[:10])
    table.rows["mark"][early] = range(10)
    before = table.rows
    table.slots([0] * len(names), names)
    assert list(range(10)) == table.rows["mark"][early].tolist()
    assert len(before) < len(table.rows) == len(table.ids) == len(table.partition_of)
    table.rows["mark"][early] = range(10, 20)  # what was handed out before shows the same memory
    assert list(range(10, 20)) == before["mark"][early].tolist()


def test_loaded_rows_are_as_they_were_given_and_the_last_of_equal_ids_counts(table: Table) -> None:
    table.slots([0], ["b"])
    table.forget_touched()
    table.load(0, ["a", "b", "a"], marked(1, 2, 3))
    table.load(1, ["a"], marked(4))
    assert {"a": 3, "b": 2} == marks(table, 0)
    assert {"a": 4} == marks(table, 1)
    assert [] == table.created
    assert {0: ["a", "b"], 1: ["a"]} == {
        p: sorted(table.ids[table.partition_of == p].tolist()) for p in table.partitions
    }


def test_loading_nothing_is_no_work(table: Table) -> None:
    table.load(0, [], marked())
    assert (0, set()) == (len(table), table.partitions)


def test_the_slot_of_a_removed_row_is_used_again(table: Table) -> None:
    first = table.slots([0, 0], ["a", "b"])
    table.rows["mark"][first] = 7
    table.remove(0, "a")
    assert first[0] == table.slots([0], ["c"])[0]
    assert {"b": 7, "c": -1} == marks(table, 0)
    with pytest.raises(KeyError):
        table.remove(0, "a")


def test_a_dropped_partition_leaves_the_others_alone_and_its_room_to_them(table: Table) -> None:
    names = [f"user-{k}" for k in range(50_000)]
    table.load(0, names, marked(*range(len(names))))
    table.load(1, names, marked(*range(len(names))))
    room = len(table.rows)
    assert len(names) == table.drop(0)
    assert ({1}, len(names)) == (table.partitions, len(table))
    assert dict(zip(names, range(len(names)), strict=True)) == marks(table, 1)
    table.load(2, names, marked(*range(len(names))))
    assert dict(zip(names, range(len(names)), strict=True)) == marks(table, 2)
    assert room == len(table.rows)
    assert 0 == table.drop(0)


def test_a_dropped_partition_gives_its_memory_back(table: Table) -> None:
    names = [f"user-{k}" for k in range(50_000)]
    for partition in range(3):
        table.load(partition, names, marked(*range(len(names))))
    before, rows_bytes = table.slab_bytes, len(names) * LAYOUT.row_bytes
    table.drop(0)
    table.drop(2)
    assert before - table.slab_bytes > 1.9 * rows_bytes
    assert dict(zip(names, range(len(names)), strict=True)) == marks(table, 1)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    table = Table(LAYOUT, start, tmp_path)
    table.slots([0], ["a"])
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if shutil.which("mount") is None:
        pytest.skip("a file system cannot be mounted here: there is no mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system may not be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(table: Table) -> None:
    """Rows until there is no more room, committed before that."""
    overlay = Overlay(table)
    with pytest.raises(StateFull) as refused:
        for k in range(100):
            names = [f"user-{k}-{i}" for i in range(10_000)]
            slots = table.slots([k % 2] * len(names), names)
            overlay.keep(table, slots)
            table.rows["mark"][slots] = k
            overlay.forget()
    overlay.restore()
    assert k > 2
    assert 10_000 * k == len(table)
    for partition in (0, 1):
        assert all(int(name.split("-")[1]) == mark for name, mark in marks(table, partition).items())
    for words in ("state.dir=", "more bytes", "free there", "To do:", "state.ttl_s"):
        assert words in str(refused.value)
    assert 3 == refused.value.exit_code


def test_a_full_disk_is_an_error_that_says_what_to_do_and_takes_no_row_away(small_disk: Path) -> None:
    table = Table(LAYOUT, start, small_disk)
    fill(table)
    with pytest.raises(StateFull, match=str(small_disk)):
        table.load(9, [f"{i}" for i in range(500_000)], marked(*range(500_000)))
    table.drop(0)
    table.slots([2] * 10_000, [f"{i}" for i in range(10_000)])  # in what was given back


def test_a_limit_on_the_size_of_files_is_the_same(tmp_path: Path) -> None:
    assert signal.SIG_IGN == signal.getsignal(signal.SIGXFSZ)
    with files_up_to(8 << 20):
        fill(Table(LAYOUT, start, tmp_path))


def test_a_folder_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateFull, match="file/rows"):
        Table(LAYOUT, start, tmp_path / "file" / "rows")

"""The marker: what a process that died leaves, and how the next ones find the record that kills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stream_adapt.errors import ConfigError, Fenced
from stream_adapt.quarantine import CAREFUL_BATCH, FILE, Quarantine
from stream_adapt.record import RawBatch

TOPIC = "events/abc"


def batch(*offsets: int, partition: int = 0) -> RawBatch:
    n = len(offsets)
    return RawBatch([None] * n, [None] * n, np.full(n, partition, np.int32), np.array(offsets, np.int64))


def chunks_of(quarantine: Quarantine, raw: RawBatch, size: int) -> Iterator[RawBatch]:
    return quarantine.chunks(raw, raw.next_offsets, size)


def life(folder: Path, position: int, end: int, poison: int | None, crashes: int = 2) -> tuple[list[int], int]:
    """One life of a process on one partition: sizes of its chunks, and the position that it committed."""
    quarantine, sizes = Quarantine(folder, TOPIC, crashes), []
    quarantine.__enter__()
    while position < end:
        limit = quarantine.limit(100_000, {0: position})
        raw = batch(*range(position, min(position + limit, end)))
        for chunk in chunks_of(quarantine, raw, 1024):
            sizes.append(len(chunk))
            if poison in chunk.offsets.tolist() and (0, poison) not in quarantine.condemned:
                os.close(quarantine._file or -1)  # what the system does for the dead
                return sizes, position
        position += len(raw)
    quarantine.__exit__(None, None, None)
    return sizes, position


def test_a_record_that_kills_is_found_condemned_and_passed_and_then_all_is_as_before(tmp_path: Path) -> None:
    position, sizes = 0, []
    for _ in range(4):
        of_life, position = life(tmp_path, position, 2000, poison=700)
        sizes.append(of_life)
    assert position == 2000
    assert sizes[0] == [1024]  # died in the first chunk
    assert sizes[1] == [1] * 701  # alone, and named
    assert sizes[2] == [1] * (701 - 2 * CAREFUL_BATCH)  # behind what was committed meanwhile; named again
    assert sizes[3] == [1] * (2000 - 2 * CAREFUL_BATCH)  # up to the end of what was in flight
    assert life(tmp_path, 2000, 5000, poison=None)[0] == [1024, 1024, 952]


def test_how_often_a_record_may_kill_is_what_it_was_told(tmp_path: Path) -> None:
    position, lives = 0, 0
    while position < 10:
        _, position = life(tmp_path, position, 10, poison=5, crashes=4)
        lives += 1
    assert lives == 1 + 4 + 1


def test_a_clean_exit_leaves_nothing_and_so_does_an_error_raised_on_purpose(tmp_path: Path) -> None:
    for error in (None, Fenced("another"), KeyboardInterrupt()):
        quarantine = Quarantine(tmp_path, TOPIC)
        list(chunks_of(quarantine, batch(1, 2), 10))
        quarantine.__exit__(type(error) if error else None, error, None)
        assert not (tmp_path / FILE).read_bytes().strip()


def test_a_bug_leaves_the_marker(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Quarantine(tmp_path, TOPIC) as quarantine:
        list(chunks_of(quarantine, batch(1, 2), 10))
        raise ValueError
    assert Quarantine(tmp_path, TOPIC).limit(1000, {0: 1}) == CAREFUL_BATCH


def test_the_first_batch_is_handled_with_care_though_its_partitions_were_assigned_within_the_poll(
    tmp_path: Path,
) -> None:
    life(tmp_path, 0, 100, poison=50)
    quarantine = Quarantine(tmp_path, TOPIC)
    assert quarantine.limit(1000, {}) == CAREFUL_BATCH
    assert [len(c) for c in chunks_of(quarantine, batch(1, 2), 10)] == [1, 1]


def test_a_clean_exit_while_careful_forgets_no_death(tmp_path: Path) -> None:
    life(tmp_path, 0, 100, poison=50)
    life(tmp_path, 0, 100, poison=50)
    with Quarantine(tmp_path, TOPIC) as stopped:
        stopped.limit(1000, {0: 0})
    life(tmp_path, 0, 100, poison=50)
    assert Quarantine(tmp_path, TOPIC).condemned == {(0, 50)}


def test_what_was_committed_after_all_or_is_anothers_now_needs_no_care(tmp_path: Path) -> None:
    life(tmp_path, 0, 100, poison=50)
    quarantine = Quarantine(tmp_path, TOPIC)
    assert quarantine.limit(1000, {1: 0}) == 1000
    assert [len(c) for c in chunks_of(quarantine, batch(1, 2, partition=1), 10)] == [2]
    assert quarantine.limit(1000, {0: 99}) == CAREFUL_BATCH
    assert quarantine.limit(1000, {0: 100}) == 1000
    assert quarantine.limit(1000, {0: 0}) == 1000  # it has been passed


def test_offsets_of_another_topic_and_damaged_markers_mean_nothing(tmp_path: Path) -> None:
    life(tmp_path, 0, 100, poison=50)
    assert Quarantine(tmp_path, "events/made-anew").limit(1000, {0: 0}) == 1000
    (tmp_path / FILE).write_bytes(b"{")
    assert Quarantine(tmp_path, TOPIC).limit(1000, {0: 0}) == 1000


def test_a_shorter_marker_covers_a_longer_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Quarantine(tmp_path, TOPIC) as quarantine:
        list(chunks_of(quarantine, batch(10**15), 10))
        list(chunks_of(quarantine, batch(1), 10))
        raise ValueError
    assert Quarantine(tmp_path, TOPIC).limit(1000, {0: 1}) == CAREFUL_BATCH


def test_a_second_process_on_the_same_folder_goes_without(tmp_path: Path) -> None:
    with Quarantine(tmp_path, TOPIC) as first, Quarantine(tmp_path, TOPIC) as second:
        list(chunks_of(first, batch(1), 10))
        content = (tmp_path / FILE).read_bytes()
        list(chunks_of(second, batch(2), 10))
        assert content == (tmp_path / FILE).read_bytes()


def test_a_folder_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state\.dir"):
        Quarantine(tmp_path / "file" / "state", TOPIC)

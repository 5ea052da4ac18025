"""Time to live: idle users are forgotten, wherever batches were cut and whatever failed or restarted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_streams import part, random_model, random_stream, rows_of, state_of

from stream_adapt.adapt import Adapter
from stream_adapt.record import Batch
from stream_adapt.state import expiry
from stream_adapt.state.expiry import Expiry
from stream_adapt.state.overlay import Overlay
from stream_adapt.state.row import Field, Kind, Layout
from stream_adapt.state.table import Table

MODEL = random_model(window=1)  # so users are looked at every 64 offsets
EVENTS = random_stream(1500, users=300)
TTL_S = 2_000_000.0
REFUSED = {5, 6, 7, 63, 64, 65, 66, 400, 401}  # by index: dead letters in place of events


def restarted(adapter: Adapter, next_offsets: dict[int, int]) -> Adapter:
    """What another member has after it read the changelog."""
    other = Adapter(MODEL, ttl_s=TTL_S)
    for table, target in ((adapter.users, other.users), (adapter.items, other.items)):
        for partition in table.partitions:
            ids, slots = zip(*table.items(partition), strict=True)
            target.load(partition, ids, table.rows[list(slots)])
    for partition, offset in next_offsets.items():
        other.resume(partition, offset)
    return other


def feed(cuts: list[int], faults: list[str]) -> Adapter:
    """All events, with a commit at each cut, and after each commit a fault."""
    adapter = Adapter(MODEL, ttl_s=TTL_S)
    for k, (start, stop) in enumerate(pairwise(sorted({0, len(EVENTS), *cuts}))):
        fault = faults[k % len(faults)] if faults else ""
        raw = part(EVENTS, slice(start, stop))
        for _ in range(2 if fault == "abort" else 1):
            if fault == "abort":
                adapter.abort()
            consume(adapter, raw, [i for i in range(start, stop) if i not in REFUSED])
        adapter.commit()
        if fault == "restart":
            done = part(EVENTS, slice(0, stop))
            adapter = restarted(adapter, dict(zip(done.partitions.tolist(), (done.offsets + 1).tolist(), strict=True)))
    return adapter


def consume(adapter: Adapter, raw: Batch, valid: list[int]) -> None:
    adapter.adapt(part(EVENTS, valid))
    adapter.passed(raw.partitions, raw.offsets)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, len(EVENTS) - 1), max_size=30),
    st.lists(st.sampled_from(["", "abort", "restart"]), max_size=5),
    st.sampled_from([2, expiry.MOST_ROWS]),
)
def test_rows_do_not_depend_on_cuts_aborts_and_restarts(cuts: list[int], faults: list[str], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expiry, "MOST_ROWS", most)
        assert state_of(feed([], [])) == state_of(feed(cuts, faults))


def test_only_users_that_were_idle_too_long_are_forgotten() -> None:
    adapter, everyone = feed([700], []), Adapter(MODEL)
    everyone.adapt(part(EVENTS, [i for i in range(len(EVENTS)) if i not in REFUSED]))
    users, items = rows_of(adapter.users), rows_of(adapter.items)
    assert 0 < adapter.users.expired
    assert 0 < len(users) < len(rows_of(everyone.users))
    assert set(rows_of(everyone.items)) == set(items)
    forgotten = set(rows_of(everyone.users)) - set(users)
    for partition in range(3):
        last = {row_id: int(everyone.users.rows["last_ms"][slot]) for row_id, slot in everyone.users.items(partition)}
        newest = max(last.values())
        assert all(newest - last[row_id] > 1000 * TTL_S for p, row_id in forgotten if p == partition)


def test_what_was_forgotten_is_a_removal_until_the_commit_and_put_back_by_an_abort() -> None:
    adapter = Adapter(MODEL, ttl_s=TTL_S)
    half = len(EVENTS) // 2
    adapter.adapt(part(EVENTS, slice(0, half)))
    adapter.commit()
    before, expired = state_of(adapter), adapter.users.expired
    adapter.adapt(part(EVENTS, slice(half, len(EVENTS))))
    removed = {(partition, row_id) for table, partition, row_id in adapter.overlay.removed if table is adapter.users}
    assert removed
    assert set(before[0]) - set(rows_of(adapter.users)) == removed
    assert expired == adapter.users.expired
    adapter.abort()
    assert before == state_of(adapter)
    assert expired == adapter.users.expired


def test_the_oldest_are_forgotten_first_and_of_equally_old_ones_the_least_ids() -> None:
    table = Table(Layout(Kind.USER, (Field("last_ms", "<i8", (), "time"),)), lambda _rows, _slots, _ids: None)
    rows = np.zeros(6, table.layout.dtype)
    rows["last_ms"] = [30, 20, 10, 20, 20, 1000]
    table.load(0, list("fedcba"), rows)
    assert ["d"] == table.idle(0, 100, 1)
    assert ["d", "b", "c"] == table.idle(0, 100, 3)
    assert ["b", "c", "d", "e", "f"] == sorted(table.idle(0, 100, 9))
    assert [] == table.idle(0, 1000, 9)
    assert [] == table.idle(1, 0, 9)


def test_a_partition_is_checked_once_for_each_multiple_that_its_records_pass() -> None:
    table = Table(Layout(Kind.USER, (Field("last_ms", "<i8", (), "time"),)), lambda _rows, _slots, _ids: None)
    ttl = Expiry(table, Overlay(table), 1.0, every=100)
    partitions = np.array([0, 1, 0, 0, 1], np.int32)
    offsets = np.array([98, 350, 101, 199, 610])
    assert [(2, 1), (4, 3)] == ttl.due(partitions, offsets)
    ttl.passed(partitions, offsets)
    assert [] == ttl.due(partitions, offsets)
    ttl.abort()
    assert [(2, 1), (4, 3)] == ttl.due(partitions, offsets)
    ttl.resume(0, 100)
    assert [(0, 1)] == ttl.due(np.array([0], np.int32), np.array([150]))
    ttl.resume(0, 101)
    assert [] == ttl.due(np.array([0], np.int32), np.array([150]))

"""Columns of events: parts of them, and several put together."""

from __future__ import annotations

import numpy as np

from stream_adapt.record import Batch, ItemId, UserId, joined


def batch(count: int, domains: list[str | None]) -> Batch:
    """Events of one user."""
    numbers = np.arange(count)
    return Batch(
        event_ids=[f"e{n}" for n in range(count)],
        user_ids=[UserId("u")] * count,
        item_ids=[ItemId("i")] * count,
        features=[None] * count,
        timestamps_ms=numbers,
        levels=numbers.astype(np.int8),
        partitions=numbers.astype(np.int32),
        offsets=numbers,
        domains=domains,
    )


def test_a_part_without_domains_leaves_those_of_the_others_with_their_events() -> None:
    whole = joined(Batch, [batch(2, []), batch(1, ["films"]), batch(1, [])])
    assert [None, None, "films", None] == whole.domains
    assert len(whole) == 4


def test_no_domains_at_all_stay_none() -> None:
    assert [] == joined(Batch, [batch(2, []), batch(1, [])]).domains

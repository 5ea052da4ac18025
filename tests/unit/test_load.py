"""Load: a data set over and over, as of now."""

from __future__ import annotations

from itertools import count, islice

import pytest

from stream_adapt.datasets import synthetic
from stream_adapt.datasets.source import Source
from stream_adapt.datasets.synthetic import Synthetic
from stream_adapt.errors import DataError
from stream_adapt.load import endless


def small(events: int = 10) -> Source:
    return synthetic.source(Synthetic(events=events, drift="none"))


def test_the_first_pass_leaves_out_a_share_and_the_next_ones_nothing() -> None:
    source = small()
    expected = [e.item_id for e in source.events()]

    found = [e.item_id for e in islice(endless(source, 0.5), 15)]

    assert expected[5:] + expected == found


def test_every_event_has_an_id_of_its_own_and_happens_now() -> None:
    clock = count(1_700_000_000_000)
    found = list(islice(endless(small(), 0.0, lambda: next(clock)), 30))

    assert 30 == len({event.event_id for event in found})
    assert list(range(1_700_000_000_001, 1_700_000_000_031)) == [event.timestamp for event in found]


def test_a_source_without_events_is_an_error_and_not_a_loop() -> None:
    empty = Source("empty", {}, synthetic.STARS, lambda: iter(()), 0)

    with pytest.raises(DataError, match="empty: no events"):
        next(endless(empty, 0.0))

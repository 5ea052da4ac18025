"""The breaker trips on a share of a window, in record order, wherever batches were cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.breaker import Breaker
from stream_adapt.errors import DeadLetterBreaker
from stream_adapt.record import DeadLetter, RawBatch, TopicNames

TOPICS = TopicNames.of("app")


def trips_at(refused: list[bool], sizes: list[int], share: float = 0.5, window: int = 10) -> str | None:
    """What the breaker says of records of which some were refused, committed in batches of these sizes."""
    breaker, start = Breaker(TOPICS, share, window), 0
    for size in sizes:
        mine = range(start, min(start + size, len(refused)))
        n = len(mine)
        raw = RawBatch([None] * n, [None] * n, np.full(n, 3, np.int32), np.array(mine, np.int64))
        letters = [
            DeadLetter(None, None, 3, k, "late" if k % 2 else "not_json", f"no. {k}") for k in mine if refused[k]
        ]
        try:
            breaker.committed(raw, letters[::-1])  # their order is not the records'
        except DeadLetterBreaker as error:
            return str(error)
        start += size
    return None


def test_it_says_how_many_of_how_many_why_an_example_and_what_to_do() -> None:
    said = trips_at([False] * 12 + [True] * 20, [50])
    assert said is not None
    for part in ("6 of 8 records", "breaker_share=0.5", "breaker_window=10", "late 3", "app.events[3]@17: no. 17"):
        assert part in said
    for part in ("app.dead-letters", "dead-letters list", "dead-letters replay", "raise input.breaker_share"):
        assert part in said


def test_a_share_that_is_allowed_does_not_trip_it() -> None:
    assert trips_at([True, False] * 500, [7] * 143) is None
    assert trips_at([True] * 100, [100], share=1.0) is None


def test_half_a_window_here_and_half_there_is_no_reason() -> None:
    assert trips_at([False] * 5 + [True] * 10 + [False] * 5, [20]) is None


@given(st.lists(st.booleans(), max_size=80), st.lists(st.integers(1, 30), min_size=80, max_size=80))
def test_where_batches_are_cut_makes_no_difference(refused: list[bool], sizes: list[int]) -> None:
    assert trips_at(refused, [100]) == trips_at(refused, sizes)

"""The real MovieLens sets, through the loader and its cache, against the figures of their READMEs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import pytest

from stream_adapt.datasets import open_source


@dataclass(frozen=True)
class Known:
    """Counts from the READMEs (1M: films that have ratings), means from the ratings themselves."""

    name: str
    events: int
    users: int
    items: int
    mean: float
    first_s: int
    last_s: int


@dataclass
class Seen:
    """What one pass finds."""

    events: int = 0
    stars: float = 0.0
    ids: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    times_ms: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    "known",
    [
        Known("movielens-100k", 100_000, 943, 1_682, 3.52986, 874_724_710, 893_286_638),
        Known("movielens-1m", 1_000_209, 6_040, 3_706, 3.581564453, 956_703_932, 1_046_454_590),
    ],
    ids=lambda known: known.name,
)
def test_counts_means_and_order_are_the_known_ones(known: Known) -> None:
    source, seen = open_source(known.name), Seen()
    for event in source.events():
        seen.events += 1
        seen.stars += event.label or 0.0
        seen.ids.add(event.event_id)
        seen.users.add(event.user_id)
        seen.items.add(event.item_id)
        seen.times_ms.append(event.timestamp)
    assert (known.events, known.events, known.events) == (seen.events, len(seen.ids), source.count)
    assert (known.users, known.items) == (len(seen.users), len(seen.items))
    assert all(event.features.keys() <= source.features.keys() for event in islice(source.events(), 10_000))
    assert known.mean == pytest.approx(seen.stars / seen.events, abs=1e-9)
    assert (known.first_s * 1000, known.last_s * 1000) == (seen.times_ms[0], seen.times_ms[-1])
    assert seen.times_ms == sorted(seen.times_ms)

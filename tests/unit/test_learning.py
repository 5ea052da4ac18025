"""Learning summaries: what they count, that they add up however batches are cut, and what is read back."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.errors import DataError
from stream_adapt.learning import DOMAIN_LIMIT, Summary, decode, encode, summarize, total
from stream_adapt.record import NO_LEVEL, Adapted, Batch, ItemId, UserId

WINDOW = 8
START_MS = 1_700_000_000_000


def events(
    n: int,
    *,
    seed: int = 0,
    partitions: int = 1,
    domains: tuple[str | None, ...] = (),
    changes: dict[str, Any] | None = None,
) -> tuple[Batch, Adapted]:
    """n events spread over partitions at random, and what was said of them."""
    random = np.random.default_rng(seed)
    partition = random.integers(partitions, size=n).astype(np.int32)
    offsets = np.zeros(n, np.int64)
    for p in range(partitions):
        here = partition == p
        offsets[here] = 5 + np.arange(here.sum())
    batch = Batch(
        event_ids=[f"e{i}" for i in range(n)],
        user_ids=[UserId("u")] * n,
        item_ids=[ItemId("i")] * n,
        features=[None] * n,
        timestamps_ms=START_MS + random.integers(1000, size=n),
        levels=random.integers(-1, 4, size=n).astype(np.int8),
        partitions=partition,
        offsets=offsets,
        domains=[domains[k] for k in random.integers(len(domains), size=n)] if domains else (),
    )
    columns: dict[str, Any] = {
        "score": random.random(n),
        "frozen_score": random.random(n),
        "updated_score": np.zeros(n),
        "uncertainty": np.zeros(n),
        "adaptations": np.zeros(n, np.int64),
        "flags": np.zeros(n, np.uint8),
        "unseen": random.random(n) < 0.3,
    }
    return batch, Adapted(**{**columns, **(changes or {})})


def cut(batch: Batch, adapted: Adapted, at: list[int]) -> list[tuple[Batch, Adapted]]:
    """The same in pieces."""
    names = ("score", "frozen_score", "updated_score", "uncertainty", "adaptations", "flags", "unseen")
    edges = [0, *sorted(at), len(batch)]
    return [
        (batch.between(a, b), Adapted(**{name: getattr(adapted, name)[a:b] for name in names}))
        for a, b in pairwise(edges)
    ]


def of(*parts: tuple[Batch, Adapted]) -> list[Summary]:
    return summarize(parts, window=WINDOW, target_level=2, model_version="v1")


def by_key(summaries: list[Summary]) -> dict[tuple[int, int, str, str], Summary]:
    found = {summary.key: summary for summary in summaries}
    assert len(summaries) == len(found)
    return found


def written_out(batch: Batch, adapted: Adapted) -> dict[tuple[int, int, str, str], dict[str, float]]:
    """The same event by event."""
    found: dict[tuple[int, int, str, str], dict[str, float]] = {}
    for i in range(len(batch)):
        p, q, level = float(adapted.score[i]), float(adapted.frozen_score[i]), int(batch.levels[i])
        domain = (batch.domains[i] if batch.domains else None) or ""
        key = int(batch.partitions[i]), int(batch.offsets[i]) // WINDOW, domain, "v1"
        sums = found.setdefault(key, dict.fromkeys(("events", "labelled", "unseen", "loss", "loss_frozen"), 0.0))
        sums["events"] += 1
        sums["unseen"] += bool(adapted.unseen[i])
        if level == NO_LEVEL:
            continue
        y = float(level >= 2)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        loss, frozen = (-math.log(one if y else 1 - one) for one in (p, q))
        for name, value in (
            ("labelled", 1.0),
            ("loss", loss),
            ("loss_frozen", frozen),
            ("entropy", entropy),
            ("target", y),
            ("score", p),
        ):
            sums[name] = sums.get(name, 0.0) + value
    return found


@pytest.mark.parametrize("domains", [(), ("a", None), ("a", "b", "")])
@pytest.mark.parametrize("partitions", [1, 3])
def test_summaries_are_the_sums_over_their_events(partitions: int, domains: tuple[str | None, ...]) -> None:
    batch, adapted = events(200, partitions=partitions, domains=domains)
    found = by_key(of((batch, adapted)))
    wanted = written_out(batch, adapted)
    assert set(wanted) == set(found)
    for key, sums in wanted.items():
        for name, value in sums.items():
            assert value == pytest.approx(getattr(found[key], name), abs=1e-6), (key, name)
        window = found[key]
        assert window.first_offset // WINDOW == window.last_offset // WINDOW == window.window
        assert START_MS <= window.first_ms <= window.last_ms


def test_offsets_and_times_are_the_first_and_the_last() -> None:
    batch, adapted = events(20)
    for summary in of((batch, adapted)):
        inside = batch.offsets // WINDOW == summary.window
        assert batch.offsets[inside].min() == summary.first_offset
        assert batch.offsets[inside].max() == summary.last_offset
        assert batch.timestamps_ms[inside].min() == summary.first_ms
        assert batch.timestamps_ms[inside].max() == summary.last_ms


@given(st.lists(st.integers(0, 120), max_size=6), st.lists(st.integers(0, 120), max_size=3), st.integers(0, 3))
def test_what_parts_add_up_to_does_not_depend_on_where_batches_were_cut(
    transactions: list[int], chunks: list[int], seed: int
) -> None:
    batch, adapted = events(120, seed=seed, partitions=2, domains=("a", "b"))
    read: list[Summary] = []
    for one in cut(batch, adapted, transactions):
        for value in encode(of(*cut(*one, [at for at in chunks if at <= len(one[0])])), 0):
            read += decode(value).summaries
    assert by_key(of((batch, adapted))) == by_key(total(read))


def test_a_probability_of_0_or_1_and_one_that_is_none_do_not_spoil_the_sums() -> None:
    score = np.array([0.0, 1.0, np.nan, 0.5])
    batch, adapted = events(4, changes={"score": score, "frozen_score": np.array([1.0, 0.0, 0.5, np.inf])})
    batch.levels[:] = [3, 0, 3, 3]
    (summary,) = total(msgspec.structs.replace(one, window=0) for one in of((batch, adapted)))
    assert (4, 2) == (summary.events, summary.labelled)
    assert 2 * -math.log(1e-7) == pytest.approx(summary.loss, rel=1e-6)
    assert math.isfinite(summary.loss_frozen)


def test_nothing_is_said_of_no_events() -> None:
    assert [] == of() == of(events(0))
    assert [] == list(encode([], 0))


def test_long_names_of_domains_are_cut_and_many_domains_get_records_of_their_own() -> None:
    batch, adapted = events(600, domains=("x",))
    batch.domains[:] = [f"{i:03d}" + "é" * 100 for i in range(600)]  # type: ignore[index]
    values = list(encode(of((batch, adapted)), 5))
    records = [decode(value) for value in values]
    assert [512, 88] == [len(record.summaries) for record in records]
    assert max(map(len, values)) < 400_000
    assert {DOMAIN_LIMIT} == {len(summary.domain) for record in records for summary in record.summaries}


def test_a_record_of_another_format_or_of_none_is_refused_with_the_reason() -> None:
    (value,) = encode(of(events(3)), 5)
    assert 5 == decode(value).committed_ms
    with pytest.raises(DataError, match="format=2"):
        decode(value.replace(b'"format":1', b'"format":2'))
    with pytest.raises(DataError, match="not a learning record"):
        decode(b"{")

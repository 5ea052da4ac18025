"""Dead letters without a broker: what is remembered of a replay, what is shown, what is meant by a filter."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from confluent_kafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stream_adapt.dead_letters import (
    Filter,
    Letter,
    Listed,
    Listing,
    Memory,
    _Left,
    printable,
    since_ms,
    source_of,
    table,
)
from stream_adapt.errors import ConfigError

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def letter(offset: int, reason: str = "late", partition: int = 0) -> Letter:
    return Letter(partition, offset, 0, reason, "", "app.events", (0, 0), b"k", b"v", (), False, 0)


def stored(memory: Memory) -> Memory:
    """What Kafka gives back."""
    return Memory.of(TopicPartition("dead", 0, memory.base, memory.metadata()))


@given(st.integers(0, 10**12), st.sets(st.integers(0, 5_000), max_size=300))
def test_a_memory_comes_back_from_what_is_committed(base: int, behind: set[int]) -> None:
    memory = Memory(base, {base + offset for offset in behind})
    assert memory == stored(memory)


def test_nothing_committed_is_no_memory() -> None:
    assert Memory.of(None) == Memory()
    assert Memory.of(TopicPartition("dead", 0, 7)) == Memory(7)


def test_a_million_in_a_row_are_remembered_and_what_is_too_patchy_is_refused() -> None:
    assert len(Memory(0, set(range(1, 1_000_000))).metadata()) < 1_000
    patchy = {(k * k * 2_654_435_761 >> 7) % 200_000 for k in range(60_000)}
    with pytest.raises(ConfigError, match="too patchy"):
        Memory(0, patchy).metadata()


@given(
    st.lists(st.sampled_from(["late", "crash"]), max_size=40), st.lists(st.sampled_from(["late", "crash"]), max_size=4)
)
def test_runs_with_any_filters_replay_each_letter_once(reasons: list[str], runs: list[str]) -> None:
    memory, replayed = Memory(), []
    for wanted in [*runs, "late", "crash"]:
        left, batch = _Left(), []
        for offset in range(memory.base, 2 * len(reasons)):
            if offset % 2:  # offsets have gaps: markers of transactions
                continue
            one = letter(offset, reasons[offset // 2])
            new = one.reason == wanted and offset not in memory
            batch += [one] * new
            left.note(one, new or offset in memory)
        if batch:
            replayed += [one.offset for one in batch]
            memory = stored(left.memory(0, memory, batch))
    assert sorted(replayed) == list(range(0, 2 * len(reasons), 2))
    assert not memory.later


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, ""),
        (b"plain", "plain"),
        (b"\x1b[31mred\x07\n", "\\x1b[31mred\\x07\\n"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u202eabc\u0085", "\\u202eabc\\x85"),
        ("é ü", "é ü"),
        (b"x" * 200, "x" * 160 + "…"),
    ],
)
def test_what_is_shown_does_no_harm_on_a_terminal(content: bytes | str | None, shown: str) -> None:
    assert shown == printable(content)


@pytest.mark.parametrize(
    ("text", "seconds_ago"),
    [("45s", 45), ("2h", 7200), ("7d", 604_800), ("2026-01-31T11:00:00", 3600), ("2026-01-31T13:00:00+02:00", 3600)],
)
def test_since_is_an_age_or_a_time(text: str, seconds_ago: int) -> None:
    assert NOW.timestamp() * 1000 - seconds_ago * 1000 == since_ms(text, NOW)


def test_what_is_neither_is_refused() -> None:
    for text in ("yesterday", "2x", ""):
        with pytest.raises(ConfigError, match="--since"):
            since_ms(text, NOW)
    for text in ("a", "1:", "1:2:3", "-1"):
        with pytest.raises(ConfigError, match="--offset"):
            source_of(text)


def test_filters_let_through_what_they_name() -> None:
    assert (1, 17) == source_of("1:17")
    assert (0, 17) == source_of("17")
    letters = [letter(1), letter(2, "crash"), letter(2, partition=1)]
    assert letters == [one for one in letters if Filter()(one)]
    assert letters[1:2] == [one for one in letters if Filter(["crash"])(one)]
    assert letters[2:] == [one for one in letters if Filter(["late"], [source_of("1:2")])(one)]
    with pytest.raises(ConfigError, match="no such reason"):
        Filter(["lat"])


def test_the_table_shows_whole_coordinates_and_takes_no_markup_from_records() -> None:
    time = "2026-01-31T12:00:00.123+00:00"
    one = Listed(0, 7, time, "late", "[b]why", "app.events", 3, 4711, "[red]k", 5, "[x]", True, 2)
    console = Console(width=80, file=io.StringIO())
    console.print(table(Listing("app.dead-letters", 9, {"late": 9}, [one])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("0:7", "2026-01-31 12:00:00", "app.events[3]@47", "[red]k, 5 bytes", "[b]why", "payload cut"):
        assert part in text
    assert "replayed 2×" in text
    assert "1 of 9 in app.dead-letters: late 9" in text

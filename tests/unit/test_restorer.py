"""Rows to changelog records and back, without Kafka: in bulk, with damage, and only where they belong."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_adapt.errors import StateMismatch
from stream_adapt.kafka.changelog import Records, Tail
from stream_adapt.record import TopicNames
from stream_adapt.restore import Expected, Restorer, Slice
from stream_adapt.state.row import (
    CONTROL_KEY,
    ROW_FORMAT,
    ControlRow,
    Field,
    Kind,
    Layout,
    NewerFormat,
    OtherLayout,
    RowError,
    row_bytes_of,
)
from stream_adapt.state.table import Table

USER = Layout(Kind.USER, (Field("count", "<i8", (), "events"), Field("w", "<f4", (3,), "weights")))
ITEM = Layout(Kind.ITEM, (Field("c", "<f4", (2,), "bias"),))
LONG = Layout(Kind.USER, (Field("w", "<u8", (65,), "a word more than a word of the mask says"),))
ITEM_ZERO = ITEM.to_bytes(np.zeros((), ITEM.dtype))
#: Words of rows, many of them zero.
WORDS = st.one_of(st.just(0), st.integers(0, 2**64 - 1))
EXPECTED = Expected(TopicNames.of("shop"), "shop", "topic-1", exactly_once=True)


def user(count: int) -> bytes:
    row = np.zeros((), USER.dtype)
    row["count"], row["w"] = count, (1, 2, count)
    return USER.to_bytes(row)


def control(next_offset: int, **changes: Any) -> bytes:
    return ControlRow(
        **{"partition": 0, "model_version": "v1", "topic_id": "topic-1"} | changes, next_offset=next_offset
    ).to_bytes()


def damaged(value: bytes) -> bytes:
    return value[:-6] + bytes([value[-6] ^ 1]) + value[-5:]


def newer(value: bytes) -> bytes:
    content = (9).to_bytes(2, "little") + value[2:-4]
    return content + zlib.crc32(content).to_bytes(4, "little")


@dataclass
class Log:
    """A changelog with one partition, read a few records at a time."""

    records: list[tuple[bytes | None, bytes | None]]
    chunk: int = 1_000
    topic: str = "shop.changelog"
    tails: dict[int, Tail] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)  # ends that are told at first, and are none
    asked: list[int] = field(default_factory=list)  # how many records a read may hand out

    def begin(self, partitions: Collection[int]) -> None:
        self.tails = {0: Tail(0, self.told.pop(0) if self.told else len(self.records), 0, 0.0)}

    def end(self, partition: int) -> int:
        return len(self.records)

    def read(self, _timeout_s: float, most: int) -> dict[int, Records]:
        self.asked.append(most)
        at = self.tails[0].position
        found = self.records[at : min(at + self.chunk, self.tails[0].target)]
        self.tails[0].position += len(found)
        return {0: Records([k for k, _ in found], [v for _, v in found], [*range(at, at + len(found))])}

    def finish(self) -> list[int]:
        done = [p for p, tail in self.tails.items() if tail.is_read]
        self.cancel(done)
        return done

    def cancel(self, partitions: Collection[int]) -> None:
        self.tails = {p: tail for p, tail in self.tails.items() if p not in partitions}

    def close(self) -> None: ...


def restored(
    records: list[tuple[bytes | None, bytes | None]],
    committed: int | None = 7,
    chunk: int = 1_000,
    expected: Expected = EXPECTED,
) -> tuple[dict[str, int], Counter[str]]:
    """Users' counts after a restore, and what was refused."""
    tables = {layout.kind: Table(layout, lambda *_: None) for layout in (USER, ITEM)}
    slices: list[Slice] = []
    restorer = Restorer(Log(records, chunk), tables, expected, slices.append)
    restorer.begin({0: committed})
    while restorer.unfinished:
        restorer.step(1.0)
    users = tables[Kind.USER]
    counts = {row_id: int(users.rows[slot]["count"]) for row_id, slot in users.items(0)}
    return counts, sum((Counter(s.refused) for s in slices), Counter())


@settings(deadline=None)  # compiles
@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), max_size=20), st.data())
def test_values_made_in_bulk_are_those_made_one_by_one(rows: list[list[int]], data: st.DataObject) -> None:
    slab = np.array(rows, np.uint64).reshape(-1).view(USER.dtype)
    slots = np.array(data.draw(st.permutations(range(len(rows)))), dtype=np.int64)
    values = USER.to_values(slab, slots)
    assert [USER.to_bytes(slab[slot]) for slot in slots] == values
    found, intact = USER.from_values(values)
    assert intact.all()
    assert slab[slots].tobytes() == found.tobytes()


@settings(deadline=None)  # compiles
@given(st.lists(WORDS, min_size=65, max_size=65), st.lists(WORDS, min_size=65, max_size=65))
def test_rows_of_both_formats_are_read_side_by_side(one: list[int], other: list[int]) -> None:
    slab = np.array([one, other], np.uint64).reshape(-1).view(LONG.dtype)
    newer, older = LONG.to_values(slab, np.array([0])), LONG.to_values(slab, np.array([1]), ROW_FORMAT - 1)
    assert 8 * (1 + 2 + np.count_nonzero(one)) + 4 == len(newer[0])
    assert 8 * (1 + 65) + 4 == len(older[0])
    found, intact = LONG.from_values([*older, *newer])
    assert intact.all()
    assert slab[[1, 0]].tobytes() == found.tobytes()
    assert slab[1].tobytes() == LONG.from_bytes(older[0]).tobytes()


@settings(deadline=None)  # compiles
@given(st.lists(WORDS, min_size=1, max_size=200), st.sampled_from([ROW_FORMAT - 1, ROW_FORMAT]))
def test_a_value_tells_about_how_long_its_row_is(words: list[int], row_format: int) -> None:
    layout = Layout(Kind.USER, (Field("w", "<u8", (len(words),), ""),))
    row = np.array(words, np.uint64).view(layout.dtype)
    least, most = row_bytes_of(layout.to_values(row, np.array([0]), row_format)[0])
    assert least <= layout.row_bytes <= most


def test_a_value_whose_mask_fits_no_row_tells_so() -> None:
    content = struct.pack("<HBBIQ", ROW_FORMAT, Kind.USER, 0, 5, 7)
    assert (0, 0) == row_bytes_of(content + zlib.crc32(content).to_bytes(4, "little"))


def test_the_format_before_is_header_record_and_checksum() -> None:
    row = np.zeros(1, USER.dtype)
    row["count"] = 7
    content = struct.pack("<HBBI", 1, Kind.USER, 0, USER.fingerprint) + row.tobytes()
    assert [content + zlib.crc32(content).to_bytes(4, "little")] == USER.to_values(row, np.array([0]), 1)


def test_an_empty_row_is_a_header_a_mask_and_a_checksum() -> None:
    assert 8 + 16 + 4 == len(LONG.to_bytes(np.zeros((), LONG.dtype)))
    assert 8 + 8 + 4 == len(ITEM_ZERO)


@pytest.mark.parametrize(("word", "bit"), [(1, 63), (1, 0), (2, 0)])
@pytest.mark.parametrize("row", [np.zeros(65, np.uint64), np.ones(65, np.uint64)], ids=["empty", "full"])
def test_a_mask_that_says_other_words_than_there_are_is_damage(row: npt.NDArray[Any], word: int, bit: int) -> None:
    words = np.frombuffer(LONG.to_bytes(row.view(LONG.dtype))[:-4], np.uint64).copy()
    words[word] ^= np.uint64(1 << bit)
    content = words.tobytes()
    value = content + zlib.crc32(content).to_bytes(4, "little")
    assert not LONG.from_values([value])[1].any()
    with pytest.raises(RowError, match="words") as caught:
        LONG.from_bytes(value)
    assert caught.value.reason == "length"


def test_rows_are_whole_words() -> None:
    with pytest.raises(ValueError, match="a row of 12 bytes, not a multiple of 8"):
        Layout(Kind.USER, (Field("w", "<f4", (3,), "weights"),)).row_bytes  # noqa: B018


@settings(deadline=None)  # compiles
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(count: int, at: int, change: int) -> None:
    value = bytearray(user(count))
    value[at % len(value)] ^= change
    assert not USER.from_values([bytes(value)])[1].any()
    with pytest.raises(RowError):
        USER.from_bytes(bytes(value))


def test_a_value_ends_with_the_crc_32_of_the_rest() -> None:
    value = user(3)
    assert zlib.crc32(value[:-4]).to_bytes(4, "little") == value[-4:]


def test_layouts_with_other_names_types_or_shapes_have_other_fingerprints() -> None:
    others = [
        Layout(Kind.ITEM, USER.fields),
        Layout(Kind.USER, (Field("number", "<i8", (), ""), USER.fields[1])),
        Layout(Kind.USER, (Field("count", "<u8", (), ""), USER.fields[1])),
        Layout(Kind.USER, (USER.fields[0], Field("w", "<f4", (4,), ""))),
    ]
    assert len({layout.fingerprint for layout in (USER, *others)}) == 5
    for other in others[1:]:
        with pytest.raises(OtherLayout, match="the model that is served has"):
            other.from_bytes(user(1))


def test_a_newer_format_is_told_from_damage() -> None:
    with pytest.raises(NewerFormat, match=f"row format 9, this release reads up to {ROW_FORMAT}: upgrade"):
        USER.from_bytes(newer(user(1)))
    with pytest.raises(RowError, match="checksum"):
        USER.from_bytes(damaged(newer(user(1))))


def test_fields_that_a_later_release_adds_to_the_control_row_are_skipped() -> None:
    row = ControlRow(3, 70, "v1", "topic-1", 5, {"user": 9})
    assert row == ControlRow.from_bytes(row.to_bytes())


@pytest.mark.parametrize("chunk", [1, 2, 3, 1_000])
def test_the_newest_version_of_a_row_counts_wherever_reads_are_cut(chunk: int) -> None:
    records = [
        (b"u:ann", user(1)), (b"u:bob", user(5)), (b"u:ann", user(2)), (CONTROL_KEY, control(4)),
        (b"u:bob", None), (b"u:cid", user(6)), (b"u:cid", None), (b"u:cid", user(7)), (b"i:x", ITEM_ZERO),
        (CONTROL_KEY, control(7)),
    ]  # fmt: skip
    assert ({"ann": 2, "cid": 7}, Counter()) == restored(records, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 2, 1_000])
def test_damaged_versions_are_left_out_and_counted(chunk: int) -> None:
    records: list[tuple[bytes | None, bytes | None]] = [
        (b"u:ann", user(1)), (b"u:ann", damaged(user(2))), (b"u:bob", damaged(user(3))), (b"u:cid", user(4)),
        (b"u:cid", b"short"), (b"u:dan", ITEM_ZERO), (b"u:\xff", user(1)),
        (None, user(1)), (b"zzz", b""), (b"u:eve", user(8)), (b"u:eve", None), (b"u:eve", damaged(user(9))),
        (CONTROL_KEY, control(7)),
    ]  # fmt: skip
    counts, refused = restored(records, chunk=chunk)
    assert {"ann": 1, "cid": 4} == counts
    assert {"checksum": 3, "length": 1, "kind": 1, "key": 3} == dict(refused)


@pytest.mark.parametrize("chunk", [1, 1_000])
def test_rows_that_cannot_be_read_are_no_matter_once_they_are_replaced(chunk: int) -> None:
    other = Layout(Kind.USER, (Field("count", "<i8", (), ""),)).to_bytes(np.zeros((), [("count", "<i8")]))
    replaced = [(b"u:ann", other), (b"u:bob", newer(user(1))), (b"u:ann", user(1)), (b"u:bob", None)]
    assert {"ann": 1} == restored([*replaced, (CONTROL_KEY, control(7))], chunk=chunk)[0]
    with pytest.raises(StateMismatch, match="is of another model"):
        restored([*replaced, (b"u:cid", other), (CONTROL_KEY, control(7))], chunk=chunk)
    with pytest.raises(StateMismatch, match="run the release that wrote it"):
        restored([*replaced, (b"u:cid", newer(user(1))), (CONTROL_KEY, control(7))], chunk=chunk)


@pytest.mark.parametrize(
    ("records", "committed", "message"),
    [
        ([(CONTROL_KEY, control(7))], 9, "2 offsets would be learned not at all"),
        ([(CONTROL_KEY, control(7))], 4, "3 offsets would be learned twice"),
        ([(CONTROL_KEY, control(7))], None, "has committed nothing"),
        ([(b"u:ann", user(1))], None, "1 rows, there is no control row"),
        ([], 4, "there is no control row"),
        ([(CONTROL_KEY, control(7, topic_id="topic-0"))], 7, "deleted and made anew"),
        ([(CONTROL_KEY, control(7, topic_id="topic-0"))], None, "deleted and made anew"),
    ],
)
def test_rows_that_do_not_belong_to_the_offsets_are_refused_with_remedies(
    records: list[tuple[bytes | None, bytes | None]], committed: int | None, message: str
) -> None:
    with pytest.raises(StateMismatch, match=message) as raised:
        restored(records, committed)
    assert "state reset -c FILE --partition 0" in str(raised.value)
    assert raised.value.exit_code == 5


def test_a_fresh_shard_has_nothing_and_needs_nothing() -> None:
    assert ({}, Counter()) == restored([], None)


def test_rows_may_be_ahead_of_the_offsets_at_least_once_but_not_behind() -> None:
    expected = Expected(TopicNames.of("shop"), "shop", "topic-1", exactly_once=False)
    assert {"ann": 1} == restored([(b"u:ann", user(1)), (CONTROL_KEY, control(7))], 5, expected=expected)[0]
    with pytest.raises(StateMismatch, match="not at all"):
        restored([(CONTROL_KEY, control(7))], 8, expected=expected)


@pytest.mark.parametrize(("budget_s", "most"), [(0.05, 2_500), (0.2, 10_000)])
def test_a_short_slice_reads_no_more_at_once_than_it_has_time_for(budget_s: float, most: int) -> None:
    """Other shards wait meanwhile."""
    log = Log([(b"u:ann", user(1))])
    restorer = Restorer(log, {Kind.USER: Table(USER, lambda *_: None)}, EXPECTED)
    restorer.begin({0: None})
    restorer.read(budget_s)
    assert {most} == set(log.asked)


def test_a_cancelled_restore_is_forgotten() -> None:
    log = Log([(b"u:ann", user(1))])
    restorer = Restorer(log, {Kind.USER: Table(USER, lambda *_: None)}, EXPECTED)
    restorer.begin({0: None})
    restorer.cancel([0])
    assert (list(restorer.unfinished), log.tails, restorer.step(1.0)) == ([], {}, {})


@pytest.mark.parametrize("told", [0, 1, 2])
def test_an_end_that_was_not_the_end_is_no_mismatch(told: int) -> None:
    """A broker that comes up, or goes down, may tell less than there is."""
    records = [(b"u:ann", user(1)), (b"u:bob", user(1)), (b"u:ann", None), (CONTROL_KEY, control(7))]
    tables = {layout.kind: Table(layout, lambda *_: None) for layout in (USER, ITEM)}
    restorer = Restorer(Log(list(records), told=[told]), tables, EXPECTED)
    restorer.begin({0: 7})
    assert {} == restorer.step(1.0)
    assert {0: 7} == {p: row and row.next_offset for p, row in restorer.step(1.0).items()}
    assert {"bob"} == {name for name, _ in tables[Kind.USER].items(0)}

"""Emit: what a batch led to becomes output records: a score, receipt or dead letter for every input record.

Third stage of the path. Field names and meanings: `schemas/score-v1.json`, `receipt-v1.json`, `dead-letter-v1.json`.
Rows that changed become the changelog's records; their bytes: `state/row.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np

from stream_adapt import learning
from stream_adapt.codecs import JsonOutput, OutputCodec
from stream_adapt.learning import Summary
from stream_adapt.record import (
    NO_LEVEL,
    NO_SOURCE,
    Adapted,
    Batch,
    DeadLetter,
    Flag,
    Floats,
    Outputs,
    Receipt,
    Score,
    Source,
    TopicNames,
)
from stream_adapt.state.overlay import Overlay
from stream_adapt.state.row import CONTROL_KEY, PREFIX, ROW_FORMAT, ControlRow
from stream_adapt.state.table import Slots, Table

#: Headers of our own begin with this.
HEADER_PREFIX = "stream-adapt."
#: What a record is.
SCHEMA_HEADER = "stream-adapt.schema"
#: How often a record was replayed from the dead letters, in decimal.
REPLAYS_HEADER = "stream-adapt.replays"
_ERASED = ("erased",)
#: Longest detail in a dead letter's header, in characters.
_DETAIL_LIMIT = 500
#: Names of the flags for every combination of bits.
_FLAG_NAMES = [tuple(flag.name.lower() for flag in Flag if flag & bits and flag.name) for bits in range(2 * max(Flag))]


class Emitter:
    """Encodes what a batch led to."""

    def __init__(
        self,
        topics: TopicNames,
        model_version: str,
        target_level: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        codec: OutputCodec | None = None,
        row_format: int = ROW_FORMAT,
    ) -> None:
        """Nothing is encoded yet; without a codec outputs are JSON. Rows are written in this format."""
        self._row_format = row_format
        self._codec = codec or JsonOutput()
        self._topics = topics
        self.model_version = model_version  # that scores name
        levels = range(np.iinfo(np.int8).max)
        self._level = {NO_LEVEL: None, **{level: level for level in levels}}
        self._target = {NO_LEVEL: None, **{level: int(level >= target_level) for level in levels}}
        self._now_ms = now_ms

    def prove(self) -> None:
        """Makes sure that what will be written can be, before anything is read.

        Raises:
            RegistryRefused, RegistryUnreachable: the schema registry does not take, or does not have, its schemas.
        """
        self._codec.prove()

    def scores(self, batch: Batch, adapted: Adapted) -> Outputs:
        """One score for each of n events, keyed by user like the event itself."""
        partitions, offsets = batch.partitions.tolist(), batch.offsets.tolist()
        levels = batch.levels.tolist()
        rows = map(
            Score,
            batch.event_ids,
            batch.user_ids,
            batch.item_ids,
            _rounded(adapted.score),
            _rounded(adapted.frozen_score),
            _rounded(adapted.updated_score),
            map(self._level.__getitem__, levels),
            map(self._target.__getitem__, levels),
            _rounded(adapted.uncertainty),
            repeat(self.model_version),
            adapted.adaptations.tolist(),
            map(_FLAG_NAMES.__getitem__, adapted.flags.tolist()),
            batch.timestamps_ms.tolist(),
            repeat(self._now_ms()),
            repeat(self._topics.events),
            partitions,
            offsets,
        )
        keys = [user_id.encode() for user_id in batch.user_ids]
        return Outputs(self._topics.scores, keys, list(map(self._codec.score, rows)), None, partitions, offsets)

    def receipts(self, batch: Batch, adapted: Adapted) -> Outputs:
        """One receipt for each erasure, keyed by user; a header tells it from a score."""
        now_ms, topic = self._now_ms(), self._topics.events
        rows = [
            Receipt(e.event_id, e.user_id, _ERASED, had_row, e.timestamp_ms, now_ms, topic, e.partition, e.offset)
            for e, had_row in zip(batch.erasures, adapted.erased, strict=True)
        ]
        return Outputs(
            self._topics.scores,
            [e.user_id.encode() for e in batch.erasures],
            list(map(self._codec.receipt, rows)),
            [[(SCHEMA_HEADER, b"receipt/v1")] for _ in rows],
            [e.partition for e in batch.erasures],
            [e.offset for e in batch.erasures],
        )

    def dead_letters(self, letters: list[DeadLetter], truncated: Collection[Source] = ()) -> Outputs:
        """The original bytes and headers, unchanged; what is known of them is in headers of our own, which come last.

        Those whose source is in `truncated` go without key, payload and original headers, because they are themselves
        too large.
        """
        cut = [(letter.partition, letter.offset) in truncated for letter in letters]
        return Outputs(
            self._topics.dead_letters,
            [None if c else letter.key for c, letter in zip(cut, letters, strict=True)],
            [None if c else letter.value for c, letter in zip(cut, letters, strict=True)],
            [self._headers(letter, c) for c, letter in zip(cut, letters, strict=True)],
            [letter.partition for letter in letters],
            [letter.offset for letter in letters],
        )

    def rows(self, overlay: Overlay, shards: Iterable[ControlRow]) -> Iterator[Outputs]:
        """Tombstones of rows dropped since the last commit, rows that changed, and control rows.

        In this order: a row that was dropped and came again is there. Each goes to the changelog's partition of its
        shard's number, whatever its key.
        """
        topic = self._topics.changelog
        removed = [(PREFIX[table.layout.kind] + row_id.encode(), None, p) for table, p, row_id in overlay.removed]
        if removed:
            yield _by_partition(topic, *zip(*removed, strict=True))
        for table, slots in overlay.changed():
            if len(slots):
                yield self._changed(table, slots)
        controls = [(CONTROL_KEY, row.to_bytes(), row.partition) for row in shards]
        if controls:
            yield _by_partition(topic, *zip(*controls, strict=True))

    def learning(self, summaries: Sequence[Summary]) -> Outputs:
        """Learning records with these summaries, for the topic's one partition."""
        values = list(learning.encode(summaries, self._now_ms()))
        return _by_partition(self._topics.learning, [None] * len(values), values, [0] * len(values))

    def _changed(self, table: Table, slots: Slots) -> Outputs:
        prefix = PREFIX[table.layout.kind].decode()
        keys = [f"{prefix}{row_id}".encode() for row_id in table.ids[slots].tolist()]
        values = table.layout.to_values(table.rows, slots, self._row_format)
        return _by_partition(self._topics.changelog, keys, values, table.partition_of[slots].tolist())

    def _headers(self, letter: DeadLetter, truncated: bool) -> list[tuple[str, bytes | None]]:
        headers: list[tuple[str, bytes | None]] = [
            *(() if truncated else ((name, value) for name, value in letter.headers if _is_kept(name))),
            (SCHEMA_HEADER, b"dead-letter/v1"),
            ("stream-adapt.reason", letter.reason.encode()),
            ("stream-adapt.detail", letter.detail[:_DETAIL_LIMIT].encode(errors="replace")),
            ("stream-adapt.source.topic", self._topics.events.encode()),
            ("stream-adapt.source.partition", str(letter.partition).encode()),
            ("stream-adapt.source.offset", str(letter.offset).encode()),
        ]
        return [*headers, ("stream-adapt.truncated", b"true")] if truncated else headers


def _is_kept(name: str) -> bool:
    """Whether a refused record's header stays: of our own only the count of replays does."""
    return name == REPLAYS_HEADER or not name.startswith(HEADER_PREFIX)


def _by_partition(
    topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], partitions: Sequence[int]
) -> Outputs:
    return Outputs(topic, keys, values, None, partitions, [NO_SOURCE] * len(keys), partitions)


def _rounded(column: Floats) -> list[float]:
    """Seven decimals: finer than float32 rows can tell, and half the bytes of a double."""
    return np.round(column, 7).tolist()  # type: ignore[no-any-return]

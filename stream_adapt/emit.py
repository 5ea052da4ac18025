"""Emit: scores and dead letters become output records, one for every input record.

Third stage of the path. Field names and meanings: `schemas/score-v1.json`, `schemas/dead-letter-v1.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import msgspec
import numpy as np

from stream_adapt.record import NO_LEVEL, Adapted, Batch, DeadLetter, Flag, Output, Score

#: Longest detail in a dead letter's header, in characters.
_DETAIL_LIMIT = 500
#: Names of the flags for every combination of bits.
_FLAG_NAMES = [tuple(flag.name.lower() for flag in Flag if flag & bits and flag.name) for bits in range(2 * max(Flag))]


@dataclass(frozen=True)
class Destinations:
    """Topics read and written."""

    events: str
    scores: str
    dead_letters: str


class Emitter:
    """Encodes what a batch led to."""

    def __init__(
        self,
        topics: Destinations,
        model_version: str,
        target_level: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._topics = topics
        self._version = model_version
        self._target_level = target_level
        self._now_ms = now_ms
        self._encode = msgspec.json.Encoder().encode

    def scores(self, batch: Batch, adapted: Adapted) -> list[Output]:
        """One score for each of n events, keyed by user like the event itself."""
        encode, topic = self._encode, self._topics.scores
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
            [None if level == NO_LEVEL else level for level in levels],
            [None if level == NO_LEVEL else int(level >= self._target_level) for level in levels],
            _rounded(adapted.uncertainty),
            repeat(self._version),
            adapted.adaptations.tolist(),
            map(_FLAG_NAMES.__getitem__, adapted.flags.tolist()),
            batch.timestamps_ms.tolist(),
            repeat(self._now_ms()),
            repeat(self._topics.events),
            partitions,
            offsets,
        )
        return [
            Output(topic, row.user_id.encode(), encode(row), None, (row.source_partition, row.source_offset))
            for row in rows
        ]

    def dead_letter(self, letter: DeadLetter, *, truncated: bool = False) -> Output:
        """The original bytes, unchanged; what is known of them is in the headers.

        With `truncated` the payload is left out, for a dead letter that is itself too large.
        """
        headers = [
            ("stream-adapt.schema", b"dead-letter/v1"),
            ("stream-adapt.reason", letter.reason.encode()),
            ("stream-adapt.detail", letter.detail[:_DETAIL_LIMIT].encode(errors="replace")),
            ("stream-adapt.source.topic", self._topics.events.encode()),
            ("stream-adapt.source.partition", str(letter.partition).encode()),
            ("stream-adapt.source.offset", str(letter.offset).encode()),
        ]
        key, value = letter.key, letter.value
        if truncated:
            headers.append(("stream-adapt.truncated", b"true"))
            key, value = None, None
        return Output(self._topics.dead_letters, key, value, headers, (letter.partition, letter.offset))


def _rounded(column: np.ndarray) -> list[float]:  # type: ignore[type-arg]
    """Seven decimals: finer than float32 rows can tell, and half the bytes of a double."""
    return np.round(column, 7).tolist()  # type: ignore[no-any-return]

"""The breaker: stops the consumer when too much of its input is refused. That is a deploy gone wrong, not data.

Records are counted in the order in which they are committed, in windows that follow one another. As soon as more than
the allowed share of a window is refused, the consumer stops. What was refused until then is committed, each record
once; the next start goes on behind it and counts a new window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stream_adapt.errors import DeadLetterBreaker
from stream_adapt.logs import without_quotes
from stream_adapt.record import DeadLetter, RawBatch, TopicNames

#: Reasons that the message gives, the most frequent first.
_REASONS = 3


class Breaker:
    """Counts dead letters by window."""

    def __init__(self, topics: TopicNames, share: float = 1.0, window: int = 1_000) -> None:
        """Stops at more than `share` · `window` dead letters in a window; with a share of 1, never."""
        self._topics = topics
        self._share = share
        self._window = window
        self._records = 0  # committed before this batch
        self._current = 0  # number of the window that the counts belong to
        self._reasons: Counter[str] = Counter()

    def committed(self, raw: RawBatch, letters: Sequence[DeadLetter]) -> None:
        """Counts n records that were committed, and those of them that were refused.

        Raises:
            DeadLetterBreaker: a window has too many dead letters; says how many and why.
        """
        for i, letter in self._in_order(raw, letters):
            window, place = divmod(self._records + i, self._window)
            if window != self._current:
                self._current = window
                self._reasons.clear()
            self._reasons[letter.reason] += 1
            if self._reasons.total() > self._share * self._window:
                raise DeadLetterBreaker(self._message(place + 1, letter))
        self._records += len(raw)

    @staticmethod
    def _in_order(raw: RawBatch, letters: Sequence[DeadLetter]) -> list[tuple[int, DeadLetter]]:
        """Letters with the indices of their records, in the order of these."""
        if not letters:
            return []
        sources = zip(raw.partitions.tolist(), raw.offsets.tolist(), strict=True)
        index = {source: i for i, source in enumerate(sources)}
        return sorted(((index[one.partition, one.offset], one) for one in letters), key=lambda pair: pair[0])

    def _message(self, seen: int, letter: DeadLetter) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self._reasons.most_common(_REASONS))
        return (
            f"{self._reasons.total():,} of {seen:,} records were refused, more than input.breaker_share="
            f"{self._share:g} of input.breaker_window={self._window:,}: {reasons}; for example "
            f"{self._topics.events}[{letter.partition}]@{letter.offset}: {without_quotes(letter.detail)}. "
            f"They are committed to {self._topics.dead_letters}, each once. To do: see `stream-adapt dead-letters "
            "list`, mend the producers, start again (it goes on behind these records, and counts anew), then "
            "`stream-adapt dead-letters replay`; "
            "or raise input.breaker_share"
        )

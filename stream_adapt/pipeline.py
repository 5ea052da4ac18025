"""The path of a batch up to the commit: decode → adapt → emit. No input or output here but the rows' memory.

raw records ─▶ decode ─▶ adapt (score, then learn, event by event) ─▶ emit ─▶ Work
                 └──────────────── dead letters ────────────────────▶┘

With `late_is_dead` a late event is a dead letter instead of a score. Only its user's row knows that it is late, so it
is adapt that finds it, and it teaches nothing there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from stream_adapt.adapt import Adapter, Slow
from stream_adapt.ahead import Decoded
from stream_adapt.decode import Decoder, dead_letter
from stream_adapt.emit import Emitter
from stream_adapt.learning import Summary, summarize
from stream_adapt.record import Adapted, Batch, DeadLetter, Flag, Outputs, RawBatch, Source, Work, selected
from stream_adapt.state.row import ControlRow

#: Called with a stage's name and its seconds.
StageTimer = Callable[[str, float], None]


class Pipeline:
    """Decoder, adapter and emitter, in order, for one model at a time."""

    def __init__(self, decoder: Decoder, adapter: Adapter, emitter: Emitter, late_is_dead: bool = False) -> None:
        self.decoder = decoder
        self.adapter = adapter
        self.emitter = emitter
        self._late_is_dead = late_is_dead
        self.timer: StageTimer = lambda _stage, _seconds: None

    def prepare(self, raw: RawBatch) -> None:
        """Fetches what is needed to decode n records, before their transaction begins.

        Raises:
            RegistryUnreachable: not now; nothing is known of the records.
        """
        self.decoder.prepare(raw)

    def __call__(
        self,
        raw: RawBatch,
        undeliverable: Mapping[Source, int] = MappingProxyType({}),
        decoded: Decoded | None = None,
    ) -> Work:
        """Everything that n records lead to. The rows are changed; `adapter.commit` or `.abort` decides.

        Args:
            raw: records in consumption order.
            undeliverable: sources whose output the broker refused for good, and how many times so far: their
                records become dead letters, and dead letters that were refused go without payload.
            decoded: what the records were decoded to, if they were.
        """
        started = time.perf_counter()
        batch, dead = (decoded.batch, decoded.dead) if decoded else self.decoder(raw, undeliverable)
        read = time.perf_counter()
        adapted = self.adapter.adapt(batch)
        self.adapter.passed(raw.partitions, raw.offsets)
        if self._late_is_dead and np.any(adapted.flags & Flag.LATE):
            batch, adapted, late = _without_late(raw, batch, adapted)
            dead += late
        learned = time.perf_counter()
        outputs = [self.emitter.scores(batch, adapted)]
        if batch.erasures:
            outputs.append(self.emitter.receipts(batch, adapted))
        if dead:
            outputs.append(self.emitter.dead_letters(dead, _too_large_themselves(dead, undeliverable)))
        ended = time.perf_counter()
        self.timer("decode", read - started)
        self.timer("adapt", learned - read)
        self.timer("emit", ended - learned)
        return Work(outputs, batch, adapted, dead, ended - started)

    def serve(self, slow: Slow) -> None:
        """Serves another model from now on, of the same spec: what it reads and what feedback means stay."""
        self.adapter.serve(slow)
        self.emitter.model_version = slow.model.version

    def changes(self, controls: Iterable[ControlRow]) -> list[Outputs]:
        """Rows that changed since the last commit, and where their shards then stand: for the changelog."""
        started = time.perf_counter()
        outputs = list(self.emitter.rows(self.adapter.overlay, controls))
        self.timer("changelog", time.perf_counter() - started)
        return outputs

    def learned(self, done: Sequence[Work]) -> list[Outputs]:
        """Sums of how well the events of a transaction were predicted, for the learning topic."""
        started = time.perf_counter()
        summaries = self._summaries(done)
        outputs = [self.emitter.learning(summaries)] if summaries else []
        self.timer("changelog", time.perf_counter() - started)
        return outputs

    def _summaries(self, done: Sequence[Work]) -> list[Summary]:
        model = self.adapter.model
        return summarize(
            [(work.batch, work.adapted) for work in done],
            window=model.spec.window,
            target_level=model.spec.feedback.target_level,
            model_version=model.version,
        )


def _without_late(raw: RawBatch, batch: Batch, adapted: Adapted) -> tuple[Batch, Adapted, list[DeadLetter]]:
    """What is not late, and dead letters of what is."""
    late = (adapted.flags & Flag.LATE) > 0
    index = {source: i for i, source in enumerate(zip(raw.partitions.tolist(), raw.offsets.tolist(), strict=True))}
    letters = []
    for k in np.flatnonzero(late).tolist():
        detail = f"timestamp={batch.timestamps_ms[k]} is before the last event learned for this user"
        letters.append(dead_letter(raw, index[int(batch.partitions[k]), int(batch.offsets[k])], "late", detail))
    return selected(batch, ~late), selected(adapted, ~late), letters


def _too_large_themselves(dead: list[DeadLetter], undeliverable: Mapping[Source, int]) -> set[Source]:
    """Sources whose dead letter was refused, and not only the score that it replaces."""
    if not undeliverable:
        return set()
    return {
        (letter.partition, letter.offset)
        for letter in dead
        if undeliverable.get((letter.partition, letter.offset), 0) > (letter.reason == "not_delivered")
    }

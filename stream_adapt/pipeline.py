"""The path of a batch up to the commit: decode → adapt → emit. No input or output here but the rows' memory.

raw records ─▶ decode ─▶ adapt (score, then learn, event by event) ─▶ emit ─▶ Work
                 └──────────────── dead letters ────────────────────▶┘
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from stream_adapt.adapt import Adapter
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.record import DeadLetter, Outputs, RawBatch, Source, Work
from stream_adapt.state.row import ControlRow

#: Called with a stage's name and its seconds.
StageTimer = Callable[[str, float], None]


class Pipeline:
    """Decoder, adapter and emitter of one model, in order."""

    def __init__(self, decoder: Decoder, adapter: Adapter, emitter: Emitter) -> None:
        self.decoder = decoder
        self.adapter = adapter
        self.emitter = emitter
        self.timer: StageTimer = lambda _stage, _seconds: None

    def __call__(self, raw: RawBatch, undeliverable: Mapping[Source, int] = MappingProxyType({})) -> Work:
        """Everything that n records lead to. The rows are changed; `adapter.commit` or `.abort` decides.

        Args:
            raw: records in consumption order.
            undeliverable: sources whose output the broker refused for good, and how many times so far: their
                records become dead letters, and dead letters that were refused go without payload.
        """
        started = time.perf_counter()
        batch, dead = self.decoder(raw, undeliverable)
        decoded = time.perf_counter()
        adapted = self.adapter.adapt(batch)
        learned = time.perf_counter()
        outputs = [self.emitter.scores(batch, adapted)]
        if dead:
            outputs.append(self.emitter.dead_letters(dead, _too_large_themselves(dead, undeliverable)))
        ended = time.perf_counter()
        self.timer("decode", decoded - started)
        self.timer("adapt", learned - decoded)
        self.timer("emit", ended - learned)
        return Work(outputs, batch, adapted, dead, ended - started)

    def changes(self, controls: Iterable[ControlRow]) -> list[Outputs]:
        """The rows that changed since the last commit, and where their shards then stand: for the changelog."""
        started = time.perf_counter()
        outputs = list(self.emitter.rows(self.adapter.overlay, controls))
        self.timer("changelog", time.perf_counter() - started)
        return outputs


def _too_large_themselves(dead: list[DeadLetter], undeliverable: Mapping[Source, int]) -> set[Source]:
    """Sources whose dead letter was refused, and not only the score that it replaces."""
    if not undeliverable:
        return set()
    return {
        (letter.partition, letter.offset)
        for letter in dead
        if undeliverable.get((letter.partition, letter.offset), 0) > (letter.reason == "not_delivered")
    }

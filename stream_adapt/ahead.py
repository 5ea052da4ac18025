"""Ahead: the next batch is read before the present one is handled, and decoded while that one is committed.

A commit mostly waits for the broker. Decoding touches no row and no broker, so it is what can be done meanwhile, by a
thread that lives as long as it takes. Polls stay with the loop: what is held here was read in one, and whoever takes
partitions away does so in one, too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import structlog

from stream_adapt.record import Batch, DeadLetter, RawBatch

log = structlog.get_logger(__name__)


class Decoder(Protocol):
    """What makes events of records."""

    def prepare(self, raw: RawBatch) -> None: ...
    def __call__(self, raw: RawBatch) -> tuple[Batch, list[DeadLetter]]: ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """What n records, the next of a batch, were decoded to."""

    records: int
    batch: Batch
    dead: list[DeadLetter]


class Ahead:
    """Holds records that were polled and that no transaction has yet; at most one thread decodes them."""

    def __init__(self, decoder: Decoder, chunk: int) -> None:
        """Holds nothing.

        Args:
            decoder: called by the thread; by nobody else while it runs.
            chunk: records that are decoded together.
        """
        self._decoder = decoder
        self._chunk = chunk
        self._raw = RawBatch.empty()
        self._decoded: list[Decoded] = []
        self._thread: threading.Thread | None = None
        self._dropped = False

    @property
    def next_offsets(self) -> dict[int, int]:
        """By partition: the offset behind what is held."""
        return self._raw.next_offsets

    def hold(self, raw: RawBatch) -> None:
        """Holds these; nothing else is held."""
        assert not len(self._raw), "records that were held would be lost"
        self._raw = raw

    def begin(self) -> None:
        """Decodes what is held, in the background."""
        if len(self._raw):
            self._thread = threading.Thread(target=self._work, name="decode-ahead", daemon=True)
            self._thread.start()

    def take(self) -> tuple[RawBatch, list[Decoded]]:
        """What was held, and how far it is decoded: its first records, in chunks. Waits for the thread."""
        self._wait()
        raw, decoded = self._raw, self._decoded
        self._raw, self._decoded = RawBatch.empty(), []
        return raw, decoded

    def drop(self) -> None:
        """Holds nothing any more: the records are read again."""
        self._dropped = True
        self.take()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._dropped = False

    def _work(self) -> None:
        try:
            self._decoder.prepare(self._raw)
            for chunk in self._raw.chunks(self._chunk):
                if self._dropped:
                    return
                self._decoded.append(Decoded(len(chunk), *self._decoder(chunk)))
        except Exception as error:  # noqa: BLE001 - the loop decodes the rest itself, and fails itself if it must
            log.warning("not decoded ahead", error=repr(error))

"""`stream-adapt run` with a decoder whose process dies at records that hold the word POISON, as of a bug in C."""

from __future__ import annotations

import os
import signal
from collections.abc import Container

from stream_adapt import service
from stream_adapt.cli import main
from stream_adapt.decode import Decoder
from stream_adapt.record import Batch, DeadLetter, RawBatch, Source


class PoisonedDecoder(Decoder):
    """Dies of what it looks into."""

    def __call__(self, raw: RawBatch, undeliverable: Container[Source] = ()) -> tuple[Batch, list[DeadLetter]]:
        for partition, offset, value in zip(raw.partitions.tolist(), raw.offsets.tolist(), raw.values, strict=True):
            if b"POISON" in (value or b"") and (partition, offset) not in self.quarantined:  # type: ignore[operator]
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(raw, undeliverable)


if __name__ == "__main__":
    service.Decoder = PoisonedDecoder  # type: ignore[misc]
    main()

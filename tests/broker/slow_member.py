"""`stream-adapt run` with a decoder that takes long over a record that holds the word SLOW, the first time."""

from __future__ import annotations

import time
from collections.abc import Container

from stream_adapt import service
from stream_adapt.cli import main
from stream_adapt.decode import Decoder
from stream_adapt.record import Batch, DeadLetter, RawBatch, Source

SLOW_S = 6.0


class SlowDecoder(Decoder):
    """Nothing of the batch is sent before it is done, so that no transaction is open at the broker."""

    _slept = False

    def __call__(self, raw: RawBatch, undeliverable: Container[Source] = ()) -> tuple[Batch, list[DeadLetter]]:
        if not self._slept and any(b"SLOW" in (value or b"") for value in raw.values):
            self._slept = True
            time.sleep(SLOW_S)
        return super().__call__(raw, undeliverable)


if __name__ == "__main__":
    service.Decoder = SlowDecoder  # type: ignore[misc]
    main()

"""Formats of records: JSON, Avro and Protobuf, the last two with a Confluent-compatible schema registry.

The loop speaks JSON: event v1 is checked by one decoder, whatever the format. A codec of the input turns a value into
the JSON of the same event or erase request, so that limits, reasons of dead letters and what comes out are the same;
a codec of the output writes a score or a receipt. Dead letters are never rewritten: they are the bytes that came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from stream_adapt.record import EraseRequest, Receipt, Score, UserEvent


class NotDecoded(Exception):
    """A value that cannot be turned into JSON: the reason of its dead letter, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class InputCodec(Protocol):
    """Reads values of the events topic, and writes requests to it."""

    def prepare(self, values: Iterable[bytes | None]) -> None:
        """Fetches what is needed to read these.

        Raises:
            RegistryUnreachable: it cannot be had now; nothing is known of the values.
            RegistryRefused: the registry does not let us in.
        """

    def to_json(self, value: bytes) -> bytes:
        """The same event as JSON; raises NotDecoded."""

    def erase(self, request: EraseRequest) -> bytes:
        """A request as it is written to the events topic."""

    def event(self, event: UserEvent) -> bytes:
        """An event, as a producer would write it; for tools and tests."""


class OutputCodec(Protocol):
    """Writes and reads values of the scores topic."""

    def prove(self) -> None:
        """Makes sure that records can be written, before any is."""

    def score(self, score: Score) -> bytes:
        """A score as it is written."""

    def receipt(self, receipt: Receipt) -> bytes:
        """A receipt as it is written."""

    def read_receipt(self, value: bytes) -> Receipt:
        """A receipt as it was written."""


class JsonOutput:
    """Scores and receipts as JSON; also what erase requests are written with."""

    def __init__(self) -> None:
        encode = msgspec.json.Encoder().encode
        self.score = encode
        self.receipt = encode
        self.erase = encode
        self.read_receipt = msgspec.json.Decoder(Receipt).decode

    def prove(self) -> None:
        """They can."""

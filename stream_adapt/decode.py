"""Decode: raw records in, valid events, erasures and dead letters out. Every record becomes exactly one of the three.

The JSON goes straight into a struct that knows only the declared features and carries the limits as constraints, so
that checking costs nothing extra; what msgspec refuses is looked at a second time to name the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from stream_adapt.codecs import InputCodec, NotDecoded
from stream_adapt.learner.encoder import Feature, Interner, Vector, features_struct
from stream_adapt.learner.feedback import Feedback
from stream_adapt.record import ERASE, Batch, DeadLetter, Erasure, RawBatch, Source

#: Longest event, user or item id, in characters.
ID_LIMIT = 1024

#: Records that are checked together; if one is bad, they are looked at one by one.
_CHUNK = 256

#: Features that were not sent.
_NULL = msgspec.Raw(b"null")

#: Every reason of a dead letter and what it says of the record.
REASONS = {
    "null_value": "the record has no value",
    "null_key": "the record has no key; it must be the user id",
    "too_large": "the value, or an id in it, is longer than the limit",
    "not_utf8": "the value is not UTF-8",
    "not_json": "the value is not one JSON object",
    "too_deep": "the JSON is nested too deeply",
    "missing_field": "a required field is missing",
    "wrong_type": "a field has another type than event v1 says",
    "empty_id": "event_id, user_id or item_id is empty",
    "not_finite": "a number is infinite or not a number",
    "out_of_range": "a number is beyond its limits",
    "bad_timestamp": "the timestamp is negative",
    "future_timestamp": "the timestamp is further in the future than input.max_future_s allows",
    "label_out_of_range": "the label is outside the range that the feedback mapping declares",
    "vector_length": "a vector feature has another length than declared",
    "key_mismatch": "the key is not the user id (input.check_key)",
    "not_delivered": "the broker refused what this record led to for good",
    "late": "the event is older than its user's last one, by more than input.late_after_s (input.late: dead_letter)",
    "not_framed": "the value does not begin with a schema id (input.format: avro, protobuf)",
    "unknown_schema": "the schema registry does not know the value's schema id",
    "incompatible_schema": "the value's schema is of another kind, is no record, or lacks what it refers to",
    "not_decodable": "the bytes are not what the value's schema says",
    "crash": "the process died each time it handled this record (input.crashes_before_quarantine)",
}


@dataclass(frozen=True)
class Limits:
    """What is still accepted."""

    max_bytes: int = 1_000_000
    max_future_s: float = 86_400.0
    check_key: bool = True


class Decoder:
    """Decodes batches of event v1 for one set of declared features and one feedback mapping."""

    def __init__(
        self,
        features: dict[str, Feature],
        feedback: Feedback,
        limits: Limits = Limits(),
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        codec: InputCodec | None = None,
    ) -> None:
        """Nothing is decoded yet; without a codec values are JSON."""
        self._features = features
        self._codec = codec
        self._feedback = feedback
        self._limits = limits
        self._now_ms = now_ms
        #: Records that are not looked at, because the process died of them.
        self.quarantined: Container[Source] = ()
        self._vectors = frozenset(name for name, feature in features.items() if isinstance(feature, Vector))
        self._interner: Interner | None = Interner(features_struct(features))
        self._decode: Callable[[Any], Any] = msgspec.json.Decoder(event_struct(msgspec.Raw, feedback)).decode

    def __call__(self, raw: RawBatch, undeliverable: Container[Source] = ()) -> tuple[Batch, list[DeadLetter]]:
        """Events in the order of their records, erasures between them, and a dead letter for every other record.

        Args:
            raw: n records in consumption order.
            undeliverable: sources whose score the broker has refused for good; they become dead letters.
        """
        self._choose_decoder()
        latest_ms = self._now_ms() + int(self._limits.max_future_s * 1000)
        events: list[Any] = []
        features: list[Any] = []
        types: list[str] = []
        kept: list[int] = []
        erasures: list[Erasure] = []
        dead: list[DeadLetter] = []
        by_name = bool(undeliverable or self.quarantined)
        for start in range(0, len(raw), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(raw)))
            good = None if by_name else self._all_good(raw, chunk, latest_ms)
            if good is not None:
                events += good[0]
                features += good[1]
                types += good[2]
                kept += chunk
                continue
            for i in chunk:
                try:
                    event = self._one(raw, i, latest_ms, undeliverable)
                    if event.event_type == ERASE:
                        erasures.append(_erasure(raw, i, event, len(events)))
                        continue
                    features += self._features_of([event])
                except Exception as error:  # noqa: BLE001 - whatever a record raises, it must not stop the stream
                    dead.append(self._dead_letter(raw, i, error))
                else:
                    events.append(event)
                    types.append(event.event_type)
                    kept.append(i)
        return self._columns(raw, events, features, types, kept, erasures), dead

    def prepare(self, raw: RawBatch) -> None:
        """Fetches what is needed to decode these.

        Raises:
            RegistryUnreachable: not now.
        """
        if self._codec is not None:
            self._codec.prepare(raw.values)

    def _choose_decoder(self) -> None:
        """Features are looked up by their bytes as long as that pays, else decoded with their event."""
        if self._interner is None:
            return
        self._interner.make_room()
        if not self._interner.worth_it:
            self._interner = None
            struct = event_struct(features_struct(self._features), self._feedback)
            self._decode = msgspec.json.Decoder(struct).decode

    def _features_of(self, events: list[Any]) -> list[Any]:
        """Features of events that were just decoded: their places in the interner or, without it, themselves."""
        if self._interner is None:
            return [e.features for e in events]
        try:
            return self._interner.places([bytes(e.features) for e in events])
        except msgspec.ValidationError as error:
            path = str(error) if "`$" in str(error) else f"{error} - at `$`"
            raise msgspec.ValidationError(path.replace("`$", "`$.features", 1)) from error

    def _all_good(self, raw: RawBatch, chunk: range, latest_ms: int) -> tuple[list[Any], list[Any], list[str]] | None:
        """The chunk's events, their features and types, if every record of it is one, as almost always; by columns."""
        values = raw.values[chunk.start : chunk.stop]
        try:
            if max(map(len, values)) > self._limits.max_bytes:  # type: ignore[arg-type]  # None: TypeError
                return None
            if self._codec is not None:
                values = [*map(self._codec.to_json, values)]  # type: ignore[arg-type]
            events = [*map(self._decode, values)]
            features = self._features_of(events)
        except Exception:  # noqa: BLE001 - `_one` finds out which record it was, and why
            return None
        if max([e.timestamp for e in events]) > latest_ms:
            return None
        if self._limits.check_key and raw.keys[chunk.start : chunk.stop] != [e.user_id.encode() for e in events]:
            return None
        types = [e.event_type for e in events]
        return None if ERASE in types else (events, features, types)

    def _one(self, raw: RawBatch, i: int, latest_ms: int, undeliverable: Container[Source]) -> Any:
        """The event of record i; raises whatever is wrong with it."""
        key, value, limits = raw.keys[i], raw.values[i], self._limits
        source = int(raw.partitions[i]), int(raw.offsets[i])
        if source in self.quarantined:
            raise _Refused("crash", "the process died each time it handled this record")
        if source in undeliverable:
            raise _Refused("not_delivered", "the broker refused this record's score for good")
        if value is None:
            raise _Refused("null_value", "a tombstone is not an event")
        if len(value) > limits.max_bytes:
            raise _Refused("too_large", f"{len(value)} bytes, the limit is {limits.max_bytes}")
        event = self._event_or_erasure(value if self._codec is None else self._codec.to_json(value))
        if limits.check_key and key != event.user_id.encode():
            raise _Refused("null_key" if key is None else "key_mismatch", _mismatch(key, event.user_id))
        if event.timestamp > latest_ms:
            raise _Refused("future_timestamp", f"timestamp={event.timestamp}, accepted up to {latest_ms}")
        return event

    def _dead_letter(self, raw: RawBatch, i: int, error: Exception) -> DeadLetter:
        if isinstance(error, (_Refused, NotDecoded)):
            return dead_letter(raw, i, error.reason, error.detail)
        written = (raw.values[i] or b"") if self._codec is None else b""  # what was made of it is valid UTF-8
        return dead_letter(raw, i, _reason(written, error, self._vectors), f"{error}"[:500])

    def _event_or_erasure(self, value: bytes) -> Any:
        try:
            return self._decode(value)
        except msgspec.ValidationError:
            try:
                return _decode_erasure(value)
            except msgspec.ValidationError:
                pass
            raise

    def _columns(
        self,
        raw: RawBatch,
        events: list[Any],
        features: list[Any],
        types: list[str],
        kept: list[int],
        erasures: list[Erasure],
    ) -> Batch:
        whole = len(kept) == len(raw)
        return Batch(
            event_ids=[e.event_id for e in events],
            user_ids=[e.user_id for e in events],
            item_ids=[e.item_id for e in events],
            features=features if self._interner is None else self._interner.column(features),
            timestamps_ms=np.array([e.timestamp for e in events], dtype=np.int64),
            levels=self._feedback.level_of([e.label for e in events], types),
            partitions=raw.partitions if whole else raw.partitions[kept],
            offsets=raw.offsets if whole else raw.offsets[kept],
            erasures=erasures,
            domains=[e.domain for e in events],
        )


_RowId = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_LIMIT)]
_Timestamp = Annotated[int, msgspec.Meta(ge=0)]


class _EraseRequest(msgspec.Struct, frozen=True, gc=False):
    """`record.EraseRequest` with the limits of an event."""

    event_id: _RowId
    user_id: _RowId
    event_type: Literal["$erase"]
    timestamp: _Timestamp


_decode_erasure = msgspec.json.Decoder(_EraseRequest).decode


def _erasure(raw: RawBatch, i: int, request: Any, position: int) -> Erasure:
    partition, offset = int(raw.partitions[i]), int(raw.offsets[i])
    return Erasure(request.event_id, request.user_id, request.timestamp, partition, offset, position)


def event_struct(features: type, feedback: Feedback) -> type[msgspec.Struct]:
    """Event v1 with its limits as constraints; `features` is their struct, or msgspec.Raw for their JSON as it is."""
    label: Any = float
    if feedback.label is not None:
        low, high = feedback.label.range
        label = Annotated[float, msgspec.Meta(ge=low, le=high)]
    raw = ("features", msgspec.Raw, _NULL)  # Raw takes null as it is, and stands in no union
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("event_id", _RowId),
        ("user_id", _RowId),
        ("item_id", _RowId),
        ("event_type", str),
        ("timestamp", _Timestamp),
        ("label", label | None, None),
        raw if features is msgspec.Raw else ("features", features | None, None),
        ("domain", str | None, None),
    ]
    return msgspec.defstruct("Event", fields, frozen=True, gc=False)


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _mismatch(key: bytes | None, user_id: str) -> str:
    return f"key={(key or b'')[:80]!r}, user_id={user_id[:80]!r}"


def dead_letter(raw: RawBatch, i: int, reason: str, detail: str) -> DeadLetter:
    """Record i as it came, and why it was refused."""
    source = int(raw.partitions[i]), int(raw.offsets[i])
    return DeadLetter(raw.keys[i], raw.values[i], *source, reason, detail, raw.headers(i))


def _reason(value: bytes, error: Exception, vectors: frozenset[str]) -> str:
    if isinstance(error, RecursionError):
        return "too_deep"
    if isinstance(error, UnicodeDecodeError) or not _is_utf8(value):
        return "not_utf8"
    if isinstance(error, msgspec.ValidationError):
        return _invalid(str(error), vectors)
    return "not_finite" if _holds_infinity(value) else "not_json"


def _invalid(message: str, vectors: frozenset[str]) -> str:
    """The reason behind a message of msgspec, `Expected … - at `$.path``; pinned by tests/unit/test_decode.py."""
    path = message.rpartition("`$")[2]
    if "missing required field" in message:
        return "missing_field"
    if "out of range" in message:
        return "not_finite" if "Number" in message else "out_of_range"
    if "of length" in message:
        if path.removeprefix(".features.").rstrip("`") in vectors:
            return "vector_length"
        return "empty_id" if ">=" in message else "too_large"
    if ">=" in message or "<=" in message:
        return {".label": "label_out_of_range", ".timestamp": "bad_timestamp"}.get(path.rstrip("`"), "out_of_range")
    return "wrong_type"


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _holds_infinity(value: bytes) -> bool:
    """Whether the value is JSON but for NaN and Infinity, which JSON does not have and many encoders write."""
    found: list[str] = []
    try:
        json.loads(value, parse_constant=found.append)
    except (ValueError, RecursionError):
        return False
    return bool(found)

"""A data set cut in halves by time, as the loop would consume it: partitions by key, offsets, batches of columns.

Events go through the decoder that service uses, so what it would refuse is left out here, too, and takes an offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import msgspec
import numpy as np
import xxhash

from stream_adapt.datasets import Source
from stream_adapt.decode import Decoder
from stream_adapt.errors import DataError
from stream_adapt.evaluate import metrics
from stream_adapt.evaluate.figures import Outcomes
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.models import LearnerSpec
from stream_adapt.record import NO_LEVEL, Batch, DeadLetter, RawBatch, UserEvent

#: Most records of a batch, as in the configuration's default. Scores do not depend on it.
BATCH = 16_384
#: Fewer events than this cannot be cut into halves that say anything.
FEWEST_EVENTS = 100

#: Users whose partition is remembered.
_REMEMBERED = 1_000_000
#: Multiplier and shift of MurmurHash2, and the seed that Kafka's clients use.
_M, _R, _SEED = 0x5BD1E995, 24, 0x9747B28C
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Half:
    """n events that the decoder accepts, in the order of time, and the same as batches."""

    events: list[UserEvent]
    batches: list[Batch]
    dead_letters: list[DeadLetter]
    target_level: int
    digest: str  # xxh3-64 of the events as JSON, in hexadecimal

    def __len__(self) -> int:
        return len(self.events)

    @cached_property
    def taught(self) -> metrics.Longs:
        """Places of the m events that carry feedback: what figures are of."""
        levels = np.concatenate([np.zeros(0, np.int8), *(batch.levels for batch in self.batches)])
        return np.flatnonzero(levels != NO_LEVEL)

    @cached_property
    def targets(self) -> metrics.Longs:
        """Outcomes `[m]` of the events with feedback, 0 or 1."""
        levels = np.concatenate([np.zeros(0, np.int8), *(batch.levels for batch in self.batches)])
        return (levels[self.taught] >= self.target_level).astype(np.int64)


@dataclass(frozen=True)
class Halves:
    """The half that is learned from, and the half that figures are of."""

    first: Half
    second: Half

    @cached_property
    def outcomes(self) -> Outcomes:
        """What happened in the second half; a user's events are counted from the first half on."""
        users = [event.user_id for half in (self.first, self.second) for event in half.events]
        codes: dict[str, int] = {}
        numbers = np.array([codes.setdefault(user, len(codes)) for user in users], dtype=np.int64)
        at = len(self.first) + self.second.taught
        return Outcomes(self.second.targets, numbers[at], metrics.nth_events(users)[at])


def cut(source: Source, spec: LearnerSpec, partitions: int, *, warm: bool) -> Halves:
    """Reads a source and cuts it at half of its events.

    With `warm` the offsets of the second half go on where those of the first ended, as for a loop that consumed both;
    without, they begin at 0, as for a loop that is given the second half alone.

    Raises:
        DataError: there is too little in it.
    """
    events = list(source.events())
    if len(events) < FEWEST_EVENTS:
        raise DataError(f"{source.name}: {len(events)} events; replay needs {FEWEST_EVENTS} or more")
    half = len(events) // 2
    decoder, offsets = Decoder(spec.features, spec.feedback), [0] * partitions
    first = _half(events[:half], decoder, offsets, spec)
    second = _half(events[half:], decoder, offsets if warm else [0] * partitions, spec)
    return Halves(first, second)


def alone(events: list[UserEvent], spec: LearnerSpec) -> Half:
    """Events by themselves, as a loop with one partition that is given nothing before them."""
    return _half(events, Decoder(spec.features, spec.feedback), [0], spec)


def two_levels(feedback: Feedback) -> Feedback:
    """Feedback reduced to the target's yes or no."""
    target = feedback.target_level
    label = feedback.label and LabelCuts(feedback.label.range, (feedback.label.cuts[target - 1],))
    types = {
        event_type: "yes" if feedback.levels.index(level) >= target else "no"
        for event_type, level in feedback.event_types.items()
    }
    return Feedback(("no", "yes"), "yes", label, types)


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key: what Kafka's Java client and librdkafka's `murmur2_random` say."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(key: bytes) -> int:
    """MurmurHash2, 32 bits, by Austin Appleby, with the seed of `org.apache.kafka.common.utils.Utils.murmur2`."""
    value = (_SEED ^ len(key)) & _WORD
    whole = len(key) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * _M & _WORD
        word = (word ^ word >> _R) * _M & _WORD
        value = value * _M & _WORD ^ word
    if whole < len(key):
        value = (value ^ int.from_bytes(key[whole:], "little")) * _M & _WORD
    value = (value ^ value >> 13) * _M & _WORD
    return value ^ value >> 15


@lru_cache(maxsize=_REMEMBERED)
def _partition_of_user(user_id: str, partitions: int) -> int:
    return partition_of(user_id.encode(), partitions)


def _half(events: list[UserEvent], decoder: Decoder, offsets: list[int], spec: LearnerSpec) -> Half:
    batches, dead, kept, digest = [], [], [], xxhash.xxh3_64()
    for start in range(0, len(events), BATCH):
        chunk = events[start : start + BATCH]
        raw = _records(chunk, offsets)
        digest.update(b"".join(value or b"" for value in raw.values))
        batch, letters = decoder(raw)
        batches.append(batch)
        dead += letters
        kept += list(_accepted(chunk, raw, letters))
    return Half(kept, batches, dead, spec.feedback.target_level, digest.hexdigest())


def _records(events: Sequence[UserEvent], offsets: list[int]) -> RawBatch:
    """Events as the consumer would hand them over; takes their offsets."""
    partitions = [_partition_of_user(event.user_id, len(offsets)) for event in events]
    taken = []
    for partition in partitions:
        taken.append(offsets[partition])
        offsets[partition] += 1
    return RawBatch(
        [event.user_id.encode() for event in events],
        list(map(msgspec.json.Encoder().encode, events)),
        np.array(partitions, dtype=np.int32),
        np.array(taken, dtype=np.int64),
    )


def _accepted(events: Sequence[UserEvent], raw: RawBatch, letters: Sequence[DeadLetter]) -> Iterator[UserEvent]:
    refused = {(letter.partition, letter.offset) for letter in letters}
    sources = zip(raw.partitions.tolist(), raw.offsets.tolist(), strict=True)
    return (event for event, source in zip(events, sources, strict=True) if source not in refused)

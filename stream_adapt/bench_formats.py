"""`stream-adapt bench formats`: what it costs to read an event and to write a score, in each format; no Kafka."""

from __future__ import annotations

import dataclasses
import statistics
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np

from stream_adapt.bench import FEATURES, _raw, events
from stream_adapt.codecs import InputCodec, OutputCodec
from stream_adapt.codecs.avro import AvroInput, AvroOutput
from stream_adapt.codecs.framed import FramedInput, FramedOutput
from stream_adapt.codecs.protobuf import ProtobufInput, ProtobufOutput
from stream_adapt.codecs.registry import Registry
from stream_adapt.datasets.source import STARS
from stream_adapt.decode import Decoder
from stream_adapt.emit import Emitter
from stream_adapt.record import Adapted, Batch, RawBatch, TopicNames

_EVENTS = 16_384
_Codec = TypeVar("_Codec")
_Of = Callable[[Registry, str], _Codec]


class FormatCost(msgspec.Struct):
    """Of one format; processor time of this thread, medians over the rounds."""

    decode_us: float  # microseconds an event
    emit_us: float
    event_bytes: float
    score_bytes: float


def format_cost(rounds: int = 7) -> dict[str, FormatCost]:
    """By format: what `decode` and `emit` cost."""
    sample = list(events(_EVENTS))
    as_json = _raw(sample)
    costs = {"json": _cost(as_json, None, None, rounds)}
    codecs: dict[str, tuple[_Of[FramedInput], _Of[FramedOutput]]] = {
        "avro": (AvroInput, AvroOutput),
        "protobuf": (ProtobufInput, ProtobufOutput),
    }
    for name, (source, to) in codecs.items():
        registry = Registry(f"mock://{uuid.uuid4()}", {}, register=True)
        codec = source(registry, "events")
        raw = dataclasses.replace(as_json, values=[codec.event(event) for event in sample])
        codec.prepare(raw.values)
        costs[name] = _cost(raw, codec, to(registry, "scores"), rounds)
    return costs


def _cost(raw: RawBatch, source: InputCodec | None, to: OutputCodec | None, rounds: int) -> FormatCost:
    decoder = Decoder(FEATURES, STARS, codec=source)
    emitter = Emitter(TopicNames.of("bench"), "00000000T000000-00000000", STARS.target_level, codec=to)
    batch, dead = decoder(raw)
    assert not dead, dead[0]
    adapted = _adapted(batch)
    scores = emitter.scores(batch, adapted)
    return FormatCost(
        _us(lambda: decoder(raw), rounds),
        _us(lambda: emitter.scores(batch, adapted), rounds),
        round(sum(len(value or b"") for value in raw.values) / len(raw), 1),
        round(sum(len(value or b"") for value in scores.values) / len(scores), 1),
    )


def _adapted(batch: Batch) -> Adapted:
    some = np.linspace(0.01, 0.99, len(batch))
    flags = np.zeros(len(batch), np.uint8)
    return Adapted(some, some, some, some, np.arange(len(batch)), flags)


def _us(work: Callable[[], object], rounds: int) -> float:
    """Microseconds an event; other processes' load does not count, only what it does to caches."""
    taken = []
    for _ in range(rounds):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return round(1e6 * statistics.median(taken) / _EVENTS, 2)

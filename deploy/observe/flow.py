"""What flows into the input: events of a world that stays as it is, of one that has moved, and of worse ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Self

import msgspec
from confluent_kafka import Producer

from stream_adapt.datasets.drifts import Drift, splice
from stream_adapt.datasets.source import Source
from stream_adapt.datasets.synthetic import Synthetic, source
from stream_adapt.load import endless
from stream_adapt.record import UserEvent, UserId

#: Key and value.
Record = tuple[bytes, bytes]

#: The model is pretrained on the first events of the stream; these come after them, more than a check takes.
_EVENTS, _PRETRAINED = 400_000, 50_000
_TURN_S = 0.1
_FLUSH_S = 30.0


class Flow:
    """A producer that writes records at a pace, in a thread of its own, while the `with` lasts."""

    def __init__(self, bootstrap_servers: str, topic: str, records: Iterator[Record], per_second: float) -> None:
        self._topic, self._records, self._per_turn = topic, records, int(per_second * _TURN_S)
        self._producer = Producer(
            {"bootstrap.servers": bootstrap_servers, "partitioner": "murmur2_random", "linger.ms": 5}
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="flow", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._producer.flush(_FLUSH_S)

    def _produce(self) -> None:
        while not self._over.wait(_TURN_S):
            for key, value in islice(self._records, self._per_turn):
                self._producer.produce(self._topic, value, key)
            self._producer.poll(0)


def calm() -> Iterator[Record]:
    """Events of the world that the model is pretrained on."""
    return map(_encoded, _events(source(_STREAM)))


def drifted() -> Iterator[Record]:
    """From the first one on, every item is taken for another one."""
    return map(_encoded, _events(splice(source(_STREAM), Drift("permute", at=0))))


def drifting(after: int) -> Iterator[Record]:
    """First the one, and after so many events the other."""
    later = drifted()
    next(later)  # so that it is prepared when it is needed
    return chain(islice(calm(), after), later)


def fickle() -> Iterator[Record]:
    """Everybody likes one thing, then dislikes the next: what is learned from the first misleads at the second."""
    for number, event in enumerate(_events(source(_STREAM))):
        user, label = UserId(f"fickle-{number // 2}"), (5.0, 1.0)[number % 2]
        yield _encoded(msgspec.structs.replace(event, user_id=user, label=label))


def garbage() -> Iterator[Record]:
    """No events at all."""
    return ((b"user", b"this is not JSON") for _ in count())


_STREAM = Synthetic(events=_EVENTS, drift="none")


def _events(world: Source) -> Iterator[UserEvent]:
    return endless(world, _PRETRAINED / _EVENTS)


def _encoded(event: UserEvent) -> Record:
    return event.user_id.encode(), msgspec.json.encode(event)

"""Committed offsets, sampled from outside: how long the work stood still after a member was hit."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

_EVERY_S = 0.2
_TIMEOUT_S = 2.0
#: A commit that was under way when the member was hit may still arrive.
_UNDER_WAY_S = 0.3


class Sample(NamedTuple):
    """Committed offsets by partition, asked for at `began` and known at `ended`."""

    began: float
    ended: float
    offsets: dict[int, int]


def takeovers_s(hits: Sequence[float], samples: Sequence[Sample]) -> list[float]:
    """For each moment at which a member was hit: seconds until every partition had a commit again; infinite if one
    never had. Where nobody has to take over that is the time between two commits.
    """
    starts = [sample.began for sample in samples]
    return [_takeover_s(at, samples[bisect_left(starts, at + _UNDER_WAY_S) :]) for at in hits]


def _takeover_s(at: float, samples: Sequence[Sample]) -> float:
    if not samples:
        return math.inf
    before, still = samples[0].offsets, set(samples[0].offsets)
    for sample in samples[1:]:
        still = {partition for partition in still if sample.offsets.get(partition, -1) <= before[partition]}
        if not still:
            return sample.ended - at
    return math.inf


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all is not above; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0


class Watch:
    """Samples the offsets that a group has committed for a topic, in a thread of its own, until it is closed."""

    def __init__(self, bootstrap_servers: str, group: str, topic: str, partitions: int) -> None:
        self.samples: list[Sample] = []
        self._settings = {
            "bootstrap.servers": bootstrap_servers,
            "group.id": group,  # only asked about: whoever does not subscribe is no member
            "enable.auto.commit": False,
            # As they are now, without waiting for transactions that are under way.
            "isolation.level": "read_uncommitted",
            "log_level": 0,
        }
        self._asked = [TopicPartition(topic, partition) for partition in range(partitions)]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-watch", daemon=True)

    def start(self) -> None:
        """Begins to sample."""
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._done.set()
        self._thread.join()

    @property
    def committed(self) -> dict[int, int]:
        """By partition, as last seen; partitions without a commit are left out."""
        return self.samples[-1].offsets if self.samples else {}

    def latest(self) -> dict[int, int]:
        """The same, asked for after this call."""
        called = time.monotonic()
        while not self.samples or self.samples[-1].began < called:
            time.sleep(_EVERY_S / 4)
        return self.committed

    def _run(self) -> None:
        with closing(Consumer(self._settings)) as consumer:
            while not self._done.wait(_EVERY_S):
                # While the broker is away there is nothing to see; the next sample shows how long that was.
                with contextlib.suppress(KafkaException):
                    self._sample(consumer)

    def _sample(self, consumer: Consumer) -> None:
        began = time.monotonic()
        found = consumer.committed(self._asked, _TIMEOUT_S)
        if all(tp.error is None for tp in found):
            offsets = {tp.partition: tp.offset for tp in found if tp.offset >= 0}
            self.samples.append(Sample(began, time.monotonic(), offsets))

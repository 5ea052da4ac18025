"""What the clients say of their connections: errors by kind, and for how long no broker has been reached.

Clients call back from the thread that polls them, which is the loop's; whoever asks may ask from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec
from confluent_kafka import KafkaError

#: Kinds of errors that are counted, and the codes of each; what is none of these is `other`.
KINDS: Mapping[str, frozenset[int]] = {
    "connection": frozenset({KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE}),
    "timeout": frozenset({KafkaError._TIMED_OUT, KafkaError._MSG_TIMED_OUT, KafkaError.REQUEST_TIMED_OUT}),
    "authentication": frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}),
    "tls": frozenset({KafkaError._SSL}),
    "fenced": frozenset(),  # counted by the commit: only it can tell another instance from a transaction given up
    "other": frozenset(),
}
#: How often a client that is asked for it says how its connections are.
STATISTICS_MS = 1_000


def kind_of(error: KafkaError) -> str:
    """One of `KINDS`."""
    return next((kind for kind, codes in KINDS.items() if error.code() in codes), "other")


class _Broker(msgspec.Struct):
    state: str = ""


class _Statistics(msgspec.Struct):
    brokers: dict[str, _Broker] = {}


class Connections:
    """Errors that clients called back, and the state of the brokers as one client's statistics tell it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._errors = dict.fromkeys(KINDS, 0)
        self._down_since: float | None = None
        self._statistics = msgspec.json.Decoder(_Statistics)

    @property
    def errors(self) -> Mapping[str, int]:
        """Errors so far, by kind."""
        return self._errors

    @property
    def unreachable_s(self) -> float:
        """Seconds since the last broker went away; 0 while one is connected."""
        since = self._down_since
        return 0.0 if since is None else self._clock() - since

    def failed(self, error: KafkaError) -> None:
        """A client's `error_cb`."""
        self.count(kind_of(error))
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._down()

    def count(self, kind: str) -> None:
        """One more error of a kind."""
        self._errors[kind] += 1

    def told(self, statistics: str) -> None:
        """The input consumer's `stats_cb`: it always has a request under way, so its connections tell."""
        brokers = self._statistics.decode(statistics).brokers.values()
        if any(broker.state == "UP" for broker in brokers):
            self._down_since = None
        elif brokers:
            self._down()

    def _down(self) -> None:
        if self._down_since is None:
            self._down_since = self._clock()

"""Turned away: a broker does not take our password or certificate, or we do not take the broker's.

librdkafka goes on trying for ever and only tells its error callback; what waits for an answer then ends in a time-out
that does not say why. A `Gate` is such a callback. It remembers what was said, and refuses with a reason and what to
do:

| what librdkafka says                | what it means                                                                |
|-------------------------------------|------------------------------------------------------------------------------|
| `_AUTHENTICATION`                   | user, password or mechanism is wrong                                         |
| `_SSL`                              | the broker's certificate is not from an authority that we trust, or expired  |
| `_TRANSPORT`, with a TLS alert      | the broker does not take our certificate: expired, unknown, or none is given |
| `_TRANSPORT`, in the TLS handshake  | no TLS is spoken there                                                       |
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException

from stream_adapt.errors import KafkaRefused
from stream_adapt.kafka.errors import describe, kafka_error

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

#: One try of a first contact; what brokers said in the meantime is heard after it.
_TRY_S = 1.0
#: Tries before being turned away is believed: a broker that has just started may not know its users yet.
_TRIES = 2
#: A member that runs gives up after being turned away everywhere for so long: what it reads is in the log for days,
#: and its successor reads the password anew.
PATIENCE_S = 30.0
#: librdkafka tries again at least every 10 s: with so long a silence somebody has let us in.
_SILENCE_S = 25.0

_TLS = re.compile(r"SSL alert|SSL handshake failed|certificate verify failed|SSL connection closed")


class Client(Protocol):
    """A client that serves its callbacks when it is polled."""

    def poll(self, timeout: float, /) -> Any: ...


class Gate:
    """An error callback that remembers being turned away."""

    def __init__(self, settings: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was said yet.

        Args:
            settings: the client's; no secret of them is ever shown.
            clock: seconds that never go back.
        """
        self._settings = settings
        self._clock = clock
        self._said: KafkaError | None = None
        self._first_s = self._last_s = 0.0
        self._all_down = False

    def noted(self, error: KafkaError) -> None:
        """librdkafka reports an error of a connection."""
        now = self._clock()
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all_down = True
        elif _turns_away(error):
            if self._said is None or now - self._last_s > _SILENCE_S:
                self._first_s = now
            self._said, self._last_s = error, now

    def passed(self) -> None:
        """A broker has answered: whoever turned us away is not all of them."""
        self._said, self._all_down = None, False

    @property
    def because(self) -> str:
        """To be added to an error: why no broker answers, if that was said; else empty."""
        return f"; {self._reason(self._said)}" if self._said is not None else ""

    def refuse(self) -> None:
        """Raises KafkaRefused if a broker has turned us away; says why, and what to do."""
        if self._said is not None:
            raise KafkaRefused(self._reason(self._said))

    def refuse_at_last(self) -> None:
        """The same, but only if all brokers have turned us away for longer than `PATIENCE_S`."""
        if self._said is not None and self._all_down and self._last_s - self._first_s > PATIENCE_S:
            self.refuse()

    def _reason(self, error: KafkaError) -> str:
        at = self._settings.get("bootstrap.servers", "")
        return f"the brokers at {at} turn us away: {describe(error)}. To do: {self._to_do(error)}"

    def _to_do(self, error: KafkaError) -> str:
        text = error.str()
        if error.code() == KafkaError._AUTHENTICATION:
            user = self._settings.get("sasl.username")
            mechanism = self._settings.get("sasl.mechanism", self._settings.get("sasl.mechanisms"))
            return (
                f"check sasl.username={user!r}, whether its password is the newest, and sasl.mechanism={mechanism!r}; "
                "the user must be known to the broker"
            )
        if "verify failed" in text:
            return (
                f"check that ssl.ca.location={self._settings.get('ssl.ca.location')!r} is the authority that signed "
                "the brokers' certificates, that these have not expired, and that they name the host that we connect to"
            )
        if "alert" in text:
            return f"{self._certificate()}; the broker must trust the authority that signed it (ssl.truststore)"
        return "check security.protocol and the port: no TLS is spoken there, or another version of it"

    def _certificate(self) -> str:
        path = self._settings.get("ssl.certificate.location")
        if not path:
            return "give a client certificate, which the broker asks for (ssl.certificate.location, ssl.key.location)"
        end = certificate_end(Path(str(path)))
        if end is None:
            return f"check the client certificate ssl.certificate.location={path!r}, which cannot be read here"
        if end < datetime.now(UTC):
            return f"renew the client certificate ssl.certificate.location={path!r}: it expired at {end:%F %T} UTC"
        return f"check the client certificate ssl.certificate.location={path!r} (it is valid until {end:%F %T} UTC)"


def _turns_away(error: KafkaError) -> bool:
    if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
        return True
    return error.code() == KafkaError._TRANSPORT and _TLS.search(error.str()) is not None


def reach(ask: Callable[[float], _T], client: Client, gate: Gate, timeout_s: float = 15.0) -> _T:
    """A first answer of any broker; being turned away is told at once instead of after the time limit.

    Args:
        ask: asks a broker; given the seconds that it may take, it raises KafkaException where there is no answer.
        client: asked by it.
        gate: the client's error callback.
        timeout_s: of all tries.

    Raises:
        KafkaRefused: no answer, or turned away.
    """
    deadline = time.monotonic() + timeout_s
    tries = 0
    while True:
        tries += 1
        try:
            answer = ask(_TRY_S)
        except KafkaException as error:
            found = kafka_error(error)
            if found is not None and found.code() not in _NO_ANSWER:
                raise
            client.poll(0)
            if tries >= _TRIES:
                gate.refuse()
            if time.monotonic() > deadline:
                raise KafkaRefused(
                    f"no broker answered within {timeout_s:g} s: {found and describe(found)}. To do: check that "
                    "kafka.bootstrap_servers is right and the brokers are up, and that security.protocol is what "
                    "they speak at that port"
                ) from error
        else:
            client.poll(0)
            gate.passed()
            return answer


#: Nobody was there to ask.
_NO_ANSWER = frozenset(
    {KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT_QUEUE}
)


def certificate_end(path: Path) -> datetime | None:
    """When the first certificate of a PEM file expires; None if there is none that can be read.

    RFC 5280, section 4.1: Certificate is a sequence whose first element, TBSCertificate, holds an optional version
    [0], the serial number, the algorithm, the issuer, and then the validity: two times.
    """
    try:
        found = re.search(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", path.read_bytes(), re.DOTALL)
        if found is None:
            return None
        inside = _element(_element(base64.b64decode(found[1]))[1])[1]
        tag, content, rest = _element(inside)
        if tag == _VERSION:
            _, _, rest = _element(rest)
        for _ in ("algorithm", "issuer"):
            _, content, rest = _element(rest)
        _, validity, _ = _element(rest)
        _, _, after_start = _element(validity)
        tag, content, _ = _element(after_start)
        text = content.decode("ascii")
        # UTCTime has two digits of the year: 50 and above are of the last century.
        century = "" if tag == _GENERALIZED_TIME else "19" if text[0] >= "5" else "20"
        return datetime.strptime(f"{century}{text}", "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    except (OSError, ValueError, IndexError):
        return None


_VERSION = 0xA0
_GENERALIZED_TIME = 0x18


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag and content of the first DER element, and what follows it."""
    length, start = der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start], "big")
    return der[0], der[start : start + length], der[start + length :]

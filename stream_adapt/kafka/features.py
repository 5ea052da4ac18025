"""Which features a broker has finalized: an ApiVersions request of our own, because librdkafka keeps the answer.

Brokers answer this request before a client has logged in, so no password is needed; with TLS, certificates are.
Source: KIP-511 and KIP-584, and `ApiVersionsRequest.json` and `ApiVersionsResponse.json` of Apache Kafka, version 3.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Mapping
from typing import Any

_API_VERSIONS, _VERSION, _CORRELATION = 18, 3, 1
_TIMEOUT_S = 5.0
_LONGEST_ANSWER = 1_000_000
#: Tag of the finalized features in the answer.
_FINALIZED = 2


def finalized_features(address: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """Level of every finalized feature, by name: `transaction.version`, `group.version`, `metadata.version`, …

    Args:
        address: host:port of a broker.
        settings: librdkafka properties of a client, for TLS.

    Raises:
        OSError, ValueError: no answer, or none that can be read.
    """
    host, _, port = address.rpartition(":")
    protocol = str(settings.get("security.protocol", "plaintext")).lower()
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S))
        connection: socket.socket = plain
        if protocol.endswith("ssl"):
            connection = stack.enter_context(_tls(settings).wrap_socket(plain, server_hostname=host.strip("[]")))
        connection.sendall(_request())
        (length,) = struct.unpack(">i", _read(connection, 4))
        if not 0 < length < _LONGEST_ANSWER:
            raise ValueError(f"an answer of {length} bytes")
        return _finalized(_Reader(_read(connection, length)))


def _tls(settings: Mapping[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.get("ssl.ca.location") or None)
    if settings.get("ssl.endpoint.identification.algorithm") == "none":
        context.check_hostname = False
    certificate = settings.get("ssl.certificate.location")
    if certificate:
        password = settings.get("ssl.key.password")
        context.load_cert_chain(certificate, settings.get("ssl.key.location"), password and str(password))
    return context


def _request() -> bytes:
    client, name, version = b"stream-adapt", b"stream-adapt", b"1"
    header = struct.pack(">hhih", _API_VERSIONS, _VERSION, _CORRELATION, len(client)) + client + b"\0"
    body = bytes([len(name) + 1]) + name + bytes([len(version) + 1]) + version + b"\0"
    return struct.pack(">i", len(header) + len(body)) + header + body


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise ValueError("the connection was closed")
        found += part
    return found


class _Reader:
    """Fields of an answer, one after the other."""

    def __init__(self, frame: bytes) -> None:
        self._frame = frame
        self._at = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self._at + count > len(self._frame):
            raise ValueError("the answer ends too early")
        self._at += count
        return self._frame[self._at - count : self._at]

    def int16(self) -> int:
        return int(struct.unpack(">h", self.take(2))[0])

    def varint(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7

    def tags(self) -> dict[int, bytes]:
        return {self.varint(): self.take(self.varint()) for _ in range(self.varint())}


def _finalized(answer: _Reader) -> dict[str, int]:
    answer.take(4)  # the correlation id; the header of this answer has no tags, in any version
    code = answer.int16()
    if code:
        raise ValueError(f"error {code}")
    for _ in range(answer.varint() - 1):  # every kind of request with its versions
        answer.take(6)
        answer.tags()
    answer.take(4)  # throttle time
    found = answer.tags().get(_FINALIZED)
    if found is None:
        return {}
    listed, levels = _Reader(found), {}
    for _ in range(listed.varint() - 1):
        name = listed.take(listed.varint() - 1).decode()
        levels[name] = listed.int16()  # the highest; the lowest follows
        listed.take(2)
        listed.tags()
    return levels

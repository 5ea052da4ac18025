"""As much of Kafka's wire protocol as the fault proxy needs: headers, and the error codes inside some answers.

A request is `length:int32 api:int16 version:int16 correlation:int32 client:nullable-string …`, an answer
`length:int32 correlation:int32 …`; frames here are without the length. Versions called flexible end every structure
with tagged fields and write lengths as unsigned varints plus one.
Source: Apache Kafka's protocol guide, and the message definitions in `clients/src/main/resources/common/message`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum


class Api(IntEnum):
    """Kinds of requests that the loop sends."""

    PRODUCE = 0
    FETCH = 1
    LIST_OFFSETS = 2
    METADATA = 3
    OFFSET_COMMIT = 8
    OFFSET_FETCH = 9
    FIND_COORDINATOR = 10
    JOIN_GROUP = 11
    HEARTBEAT = 12
    LEAVE_GROUP = 13
    SYNC_GROUP = 14
    API_VERSIONS = 18
    INIT_PRODUCER_ID = 22
    ADD_PARTITIONS_TO_TXN = 24
    ADD_OFFSETS_TO_TXN = 25
    END_TXN = 26
    TXN_OFFSET_COMMIT = 28
    CONSUMER_GROUP_HEARTBEAT = 68


@dataclass(frozen=True, slots=True)
class Request:
    """What the header of a request says."""

    api: int
    version: int
    correlation_id: int
    client_id: str


@dataclass(frozen=True, slots=True)
class _Versions:
    flexible: int  # from here on
    known: int  # up to here


#: Answers whose error codes can be set. Beyond `known` the form is another.
_SETTABLE: Mapping[int, _Versions] = {
    Api.PRODUCE: _Versions(9, 12),
    Api.INIT_PRODUCER_ID: _Versions(2, 5),
    Api.ADD_PARTITIONS_TO_TXN: _Versions(3, 3),
    Api.ADD_OFFSETS_TO_TXN: _Versions(3, 4),
    Api.END_TXN: _Versions(3, 4),
    Api.TXN_OFFSET_COMMIT: _Versions(3, 5),
}

#: Requests whose errors can be set by the proxy.
SETTABLE = frozenset(_SETTABLE)

_HEADER = struct.Struct(">hhih")
_Topics = list[tuple[bytes, list[int]]]


def parse_request(frame: bytes) -> Request:
    """The header of a request.

    Raises:
        ValueError: the frame is too short to be a request of Kafka.
    """
    if len(frame) < _HEADER.size:
        raise ValueError(f"{len(frame)} bytes are no Kafka request: is this a plain-text listener of Kafka?")
    api, version, correlation_id, length = _HEADER.unpack_from(frame)
    name = frame[_HEADER.size : _HEADER.size + max(length, 0)]
    return Request(api, version, correlation_id, name.decode(errors="replace"))


def parse_correlation_id(frame: bytes) -> int:
    """Which request an answer belongs to."""
    return int.from_bytes(frame[:4], "big", signed=True)


def refusal(request: Request, frame: bytes, code: int) -> bytes:
    """The answer that a broker would give which refuses the whole request with an error.

    Args:
        request: header of the request.
        frame: the request itself.
        code: Kafka's error code, set for every partition that the request names.

    Raises:
        ValueError: not one of `SETTABLE`, or a version whose form is not known.
    """
    flexible = _is_flexible(request)
    out = _Writer(flexible).number(">i", request.correlation_id).tags()
    if request.api in (Api.ADD_OFFSETS_TO_TXN, Api.END_TXN):
        return out.number(">ih", 0, code).tags().bytes()
    if request.api == Api.INIT_PRODUCER_ID:
        return out.number(">ihqh", 0, code, -1, -1).tags().bytes()
    topics = _READ_TOPICS[request.api](_Reader(frame, flexible).after_header(), request.version)
    if request.api == Api.PRODUCE:
        return out.topics(topics, lambda: out.produced(code, request.version)).number(">i", 0).tags().bytes()
    return out.number(">i", 0).topics(topics, lambda: out.number(">h", code)).tags().bytes()


def with_error(request: Request, answer: bytes, code: int) -> bytes:
    """The same answer with another error code in all the places where it has one.

    Raises:
        ValueError: as `refusal`.
    """
    changed = bytearray(answer)
    for at in _error_positions(request, _Reader(answer, _is_flexible(request))):
        struct.pack_into(">h", changed, at, code)
    return bytes(changed)


def _is_flexible(request: Request) -> bool:
    versions = _SETTABLE.get(request.api)
    if versions is None or request.version > versions.known:
        known = "none" if versions is None else f"up to {versions.known}"
        raise ValueError(f"errors of api {request.api} version {request.version} cannot be set; known: {known}")
    return request.version >= versions.flexible


def _error_positions(request: Request, read: _Reader) -> Iterator[int]:
    read.skip(4).tags()
    if request.api != Api.PRODUCE:
        read.skip(4)  # throttle time
    if request.api in (Api.ADD_OFFSETS_TO_TXN, Api.END_TXN, Api.INIT_PRODUCER_ID):
        yield read.at
        return
    for _ in range(read.length()):
        read.string()
        for _ in range(read.length()):
            read.skip(4)  # partition
            yield read.at
            read.skip(2)
            if request.api == Api.PRODUCE:
                _skip_produced(read, request.version)
            read.tags()
        read.tags()


def _skip_produced(read: _Reader, version: int) -> None:
    read.skip(8 + 8 + (8 if version >= 5 else 0))  # base offset, append time, log start
    if version >= 8:
        for _ in range(read.length()):
            read.skip(4).string()
            read.tags()
        read.string()


def _read_produce_topics(read: _Reader, _version: int) -> _Topics:
    read.string()
    read.skip(2 + 4)  # acks, timeout
    return read.topics(lambda: read.skip(read.wide_length()))


def _read_added_topics(read: _Reader, _version: int) -> _Topics:
    read.string()
    read.skip(8 + 2)  # producer id and epoch
    return read.topics(lambda: None, plain=True)


def _read_offset_topics(read: _Reader, version: int) -> _Topics:
    read.string()
    read.string()
    read.skip(8 + 2)
    if version >= 3:
        read.skip(4)  # generation
        read.string()
        read.string()

    def offset() -> None:
        read.skip(8 + (4 if version >= 2 else 0))
        read.string()

    return read.topics(offset)


_READ_TOPICS: Mapping[int, Callable[[_Reader, int], _Topics]] = {
    Api.PRODUCE: _read_produce_topics,
    Api.ADD_PARTITIONS_TO_TXN: _read_added_topics,
    Api.TXN_OFFSET_COMMIT: _read_offset_topics,
}


class _Reader:
    """A position in a frame."""

    def __init__(self, frame: bytes, flexible: bool) -> None:
        self.at = 0
        self._frame = frame
        self._flexible = flexible

    def after_header(self) -> _Reader:
        (length,) = struct.unpack_from(">h", self._frame, 8)
        return self.skip(_HEADER.size + max(length, 0)).tags()

    def skip(self, count: int) -> _Reader:
        self.at += count
        return self

    def length(self, form: str = ">i") -> int:
        """Of an array, a string or bytes; 0 for null."""
        if self._flexible:
            return max(self._varint() - 1, 0)
        (found,) = struct.unpack_from(form, self._frame, self.at)
        self.at += struct.calcsize(form)
        return max(int(found), 0)

    def wide_length(self) -> int:
        return self.length(">i")

    def string(self) -> bytes:
        length = self.length(">h")
        self.at += length
        return self._frame[self.at - length : self.at]

    def tags(self) -> _Reader:
        if self._flexible:
            for _ in range(self._varint()):
                self._varint()
                self.at += self._varint()
        return self

    def topics(self, rest: Callable[[], object], plain: bool = False) -> _Topics:
        """Names with their partitions; `rest` skips what follows a partition. `plain`: partitions are mere numbers."""
        found: _Topics = []
        for _ in range(self.length()):
            name = self.string()
            partitions: list[int] = []
            for _ in range(self.length()):
                partitions.append(*struct.unpack_from(">i", self._frame, self.at))
                self.at += 4
                rest()
                if not plain:
                    self.tags()
            self.tags()
            found.append((name, partitions))
        return found

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._frame[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7


class _Writer:
    """A frame in the making."""

    def __init__(self, flexible: bool) -> None:
        self._out = bytearray()
        self._flexible = flexible

    def bytes(self) -> bytes:
        return bytes(self._out)

    def number(self, form: str, *values: int) -> _Writer:
        self._out += struct.pack(form, *values)
        return self

    def length(self, value: int, form: str = ">i") -> _Writer:
        return self._varint(value + 1) if self._flexible else self.number(form, value)

    def tags(self) -> _Writer:
        return self._varint(0) if self._flexible else self

    def topics(self, topics: _Topics, error: Callable[[], object]) -> _Writer:
        """The topics with their partitions; `error` writes what each partition's answer is."""
        self.length(len(topics))
        for name, partitions in topics:
            self.length(len(name), ">h")
            self._out += name
            self.length(len(partitions))
            for partition in partitions:
                self.number(">i", partition)
                error()
                self.tags()
            self.tags()
        return self

    def produced(self, code: int, version: int) -> _Writer:
        self.number(">hqq", code, -1, -1)
        if version >= 5:
            self.number(">q", -1)
        if version >= 8:
            self.length(0)
            self.length(-1, ">h")
        return self

    def _varint(self, value: int) -> _Writer:
        while value > 0x7F:
            self._out.append(value & 0x7F | 0x80)
            value >>= 7
        self._out.append(value)
        return self

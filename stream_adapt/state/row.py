"""The layout of a row, declared once: slab, bytes, overlay and documentation all derive from it.

A rule declares the fields of its rows (`learner/rules/`); here they become one aligned NumPy record, and,
in the changelog, a versioned and checksummed value (little-endian):

    format u16 · kind u8 · reserved u8 · fingerprint of the layout u32 · body · CRC-32 of all before it u32

Every format begins with its number and ends with that checksum, so that a newer one is told from a damaged one. What
the body is:

    format 1  the record
    format 2  a mask, and those of the record's words of eight bytes that are not zero (`packing.py`)

The control row of a shard says where the shard stands; its body is MessagePack, its fields are the same for every rule.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_adapt.state.packing import MASK_BITS, WORD_BYTES, mask_words, pack, unpack

#: Version of the row bytes. Format N reads N−1, and writes it where it is asked to; a newer one is refused.
ROW_FORMAT = 2
#: Version of the control row's bytes, which older releases are to read while they still work in the group.
CONTROL_FORMAT = 1

_HEADER = struct.Struct("<HBBI")
_CHECKSUM = struct.Struct("<I")
#: Bytes of a value beside the row's.
_EXTRA_BYTES = _HEADER.size + _CHECKSUM.size
#: Rows that become values together: they stay in the processor's cache.
_BLOCK = 256
#: What fills a value up to a whole word; and what stands for one that cannot be a row's: its checksum is wrong.
_TO_A_WORD = bytes(WORD_BYTES - _CHECKSUM.size)
_NO_VALUE = bytes(_EXTRA_BYTES)
#: The CRC-32 of anything that ends with its own CRC-32, little-endian: a value is checked in one call, uncut.
_RESIDUE = 0x2144DF1C


class Kind(IntEnum):
    """What a row belongs to; part of its key."""

    USER = 1
    ITEM = 2
    CONTROL = 3


#: What the keys of a kind of row start with, in the changelog.
PREFIX = {Kind.USER: b"u:", Kind.ITEM: b"i:", Kind.CONTROL: b"c:"}
#: A shard has one control row.
CONTROL_KEY = PREFIX[Kind.CONTROL]


class RowError(ValueError):
    """Bytes that are not a row of this layout; says what differs. `reason` is a short word for it: here, damage."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NewerFormat(RowError):
    """Undamaged, and written by a newer release."""

    def __init__(self, row_format: int, newest: int) -> None:
        super().__init__(f"row format {row_format}, this release reads up to {newest}: upgrade", "newer_format")


class OtherLayout(RowError):
    """Undamaged, and of a model whose rows have another form."""


#: Why a damaged record is left out when rows are restored.
DAMAGES = ("length", "checksum", "kind", "key")


@dataclass(frozen=True)
class Field:
    """One field of a row: NumPy type, shape (empty: one number), meaning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str


@dataclass(frozen=True)
class Layout:
    """Fields of one kind of row under one rule."""

    kind: Kind
    fields: tuple[Field, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The aligned record type of a slab. Gaps are fields, too, because NumPy's copies skip bytes without a name.

        Raises:
            ValueError: a row would not be whole words of eight bytes.
        """
        aligned = np.dtype([(f.name, f.dtype, f.shape) for f in self.fields], align=True)
        starts = [aligned.fields[f.name][1] for f in self.fields] if aligned.fields else []
        ends = [start + np.dtype((f.dtype, f.shape)).itemsize for f, start in zip(self.fields, starts, strict=True)]
        named: list[tuple[str, str, tuple[int, ...]]] = []
        for f, end, following in zip(self.fields, ends, [*starts[1:], aligned.itemsize], strict=True):
            named.append((f.name, f.dtype, f.shape))
            if end < following:
                named.append((f"gap_{end}", "u1", (following - end,)))
        if aligned.itemsize % WORD_BYTES:
            raise ValueError(f"a row of {aligned.itemsize} bytes, not a multiple of {WORD_BYTES}: add or widen a field")
        return np.dtype(named, align=True)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the slab."""
        return self.dtype.itemsize

    @cached_property
    def fingerprint(self) -> int:
        """32 bits that differ where kind, names, types or shapes of the fields do."""
        told = ";".join(f"{f.name}:{np.dtype(f.dtype).str}:{f.shape}" for f in self.fields)
        return zlib.crc32(f"{self.kind.name};{told}".encode())

    def to_values(
        self, slab: npt.NDArray[Any], slots: npt.NDArray[np.int64], row_format: int = ROW_FORMAT
    ) -> list[bytes]:
        """Rows at m slots of a slab → m values, in this format or the one before it."""
        words, mask = self.row_bytes // WORD_BYTES, self._mask_words(row_format)
        rows = slab.view(np.uint64).reshape(len(slab), words)
        block = np.empty((_BLOCK, 1 + mask + words + 1), np.uint64)  # the last for the checksum
        flat, line = block.reshape(-1).view(np.uint8).data, block.shape[1] * WORD_BYTES
        values: list[bytes] = []
        for first in range(0, len(slots), _BLOCK):
            part = slots[first : first + _BLOCK]
            counts = pack(rows.take(part, axis=0), self._header(row_format), mask, block)
            starts = range(0, line * len(part), line)
            ends = np.arange(len(part)) * line + counts * WORD_BYTES + _CHECKSUM.size
            joined = flat.tobytes()
            values += [joined[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]
        return values

    def from_values(self, values: Sequence[bytes]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Values → rows `[m]`, and which of them are intact and of this layout; `from_bytes` says what others are."""
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        possible = (lengths >= _EXTRA_BYTES) & (lengths % WORD_BYTES == _CHECKSUM.size)
        if not possible.all():
            values = [value if fits else _NO_VALUE for value, fits in zip(values, possible.tolist(), strict=True)]
            lengths[~possible] = len(_NO_VALUE)
        content = np.frombuffer(_TO_A_WORD.join([*values, b""]), np.uint64)
        counts = lengths // WORD_BYTES
        starts = np.cumsum(counts + 1) - (counts + 1)
        formats = (ROW_FORMAT - 1, ROW_FORMAT)
        headers = np.array([self._header(row_format) for row_format in formats])
        masks = np.array([self._mask_words(row_format) for row_format in formats])
        rows = np.zeros((len(values), self.row_bytes // WORD_BYTES), np.uint64)
        known = unpack(content, starts, counts, headers, masks, rows)
        return rows.reshape(-1).view(self.dtype), known

    def to_bytes(self, row: npt.NDArray[Any]) -> bytes:
        """Row (a 0-d or 1-element record) → its value."""
        return self.to_values(np.ascontiguousarray(row).reshape(1), np.zeros(1, np.int64))[0]

    def from_bytes(self, content: bytes) -> npt.NDArray[Any]:
        """A value → one row.

        Raises:
            NewerFormat: undamaged, by a newer release.
            OtherLayout: undamaged, of another model's form.
            RowError: damaged: truncated, a wrong checksum, or another kind.
        """
        rows, known = self.from_values([content])
        if not known[0]:
            fingerprint, _ = _opened(content, self.kind, ROW_FORMAT)
            if fingerprint == self.fingerprint:
                raise RowError(f"{len(content)} bytes have not the words of a row that they say: damaged", "length")
            raise OtherLayout(
                f"layout {fingerprint:08x}; the model that is served has {self.fingerprint:08x} of {self.row_bytes} "
                "bytes",
                "other_layout",
            )
        return rows

    def _header(self, row_format: int) -> np.uint64:
        return np.frombuffer(_HEADER.pack(row_format, self.kind, 0, self.fingerprint), np.uint64)[0]  # type: ignore[no-any-return]

    def _mask_words(self, row_format: int) -> int:
        return mask_words(self.row_bytes // WORD_BYTES) if row_format == ROW_FORMAT else 0

    def describe(self) -> str:
        """The layout as a Markdown table, offsets and bytes included."""
        dtype = self.dtype
        lines = ["| field | type | shape | offset | meaning |", "|---|---|---|---|---|"]
        for f in self.fields:
            offset = dtype.fields[f.name][1] if dtype.fields else 0
            shape = "×".join(map(str, f.shape)) or "1"
            lines.append(f"| `{f.name}` | {np.dtype(f.dtype).name} | {shape} | {offset} | {f.meaning} |")
        return "\n".join([*lines, f"\n{dtype.itemsize} bytes a row."])


class ControlRow(msgspec.Struct):
    """Where a shard stands, written with every transaction that touches it."""

    partition: int
    next_offset: int  # of the input partition: the first record whose effect is not in the rows
    model_version: str
    topic_id: str  # a topic deleted and made anew has another id
    updated_ms: int = 0
    layouts: dict[str, int] = {}  # fingerprint of each kind of row
    model_since: int = 0  # first record of the partition that was scored by this model

    def to_bytes(self) -> bytes:
        """Header and MessagePack."""
        content = _HEADER.pack(CONTROL_FORMAT, Kind.CONTROL, 0, 0) + msgspec.msgpack.encode(self)
        return content + _CHECKSUM.pack(zlib.crc32(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> ControlRow:
        """Header and MessagePack → control row; fields that a later release added are skipped.

        Raises:
            NewerFormat: undamaged, by a newer release.
            RowError: damaged.
        """
        _, body = _opened(content, Kind.CONTROL, CONTROL_FORMAT)
        try:
            return msgspec.msgpack.decode(body, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RowError(f"not a control row: {error}", "checksum") from error


def fingerprint_of(content: bytes) -> int | None:
    """Fingerprint of a value's layout, whichever it is; None if the value is damaged or of a newer format."""
    if len(content) < _EXTRA_BYTES or zlib.crc32(content) != _RESIDUE:
        return None
    row_format, _, _, fingerprint = _HEADER.unpack_from(content)
    return fingerprint if row_format <= ROW_FORMAT else None


def row_bytes_of(content: bytes) -> tuple[int, int]:
    """Least and most bytes that the row of an undamaged value can have, whatever its layout is; 0 if it can be none."""
    words = np.frombuffer(content[: -_CHECKSUM.size], np.uint64)
    if _HEADER.unpack_from(content)[0] < ROW_FORMAT:
        return (len(words) - 1) * WORD_BYTES, (len(words) - 1) * WORD_BYTES
    said = np.cumsum([word.bit_count() for word in words[1:].tolist()])  # by masks of one word, of two, …
    masks = 1 + (said == len(words) - 2 - np.arange(len(said))).nonzero()[0]
    if not len(masks):
        return 0, 0
    most = WORD_BYTES * MASK_BITS
    return int(masks[0] - 1) * most + WORD_BYTES, int(masks[-1]) * most


def _opened(content: bytes, kind: Kind, newest: int) -> tuple[int, bytes]:
    """Fingerprint and body of a value that is undamaged and of this kind."""
    if len(content) < _EXTRA_BYTES:
        raise RowError(f"{len(content)} bytes are fewer than an empty row's {_EXTRA_BYTES}: damaged", "length")
    if zlib.crc32(content) != _RESIDUE:
        raise RowError("checksum differs: damaged", "checksum")
    row_format, found, _, fingerprint = _HEADER.unpack_from(content)
    if row_format > newest:
        raise NewerFormat(row_format, newest)
    if found != kind:
        raise RowError(f"kind {found}, expected {kind.value} ({kind.name.lower()})", "kind")
    return fingerprint, content[_HEADER.size : -_CHECKSUM.size]

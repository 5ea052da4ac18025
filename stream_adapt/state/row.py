"""The layout of a row, declared once: slab, bytes, overlay and documentation all derive from it.

A rule declares the fields of its rows (`learner/rules/*/layout.py`); here they become one aligned NumPy record and a
versioned, checksummed byte string:

    format u16 · kind u8 · reserved u8 · CRC-32 of the body u32 · body (the record, little-endian)

The control row of a shard says where the shard stands; its fields are the same for every rule.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

#: Version of the row bytes. Format N reads N−1; a newer one is refused.
ROW_FORMAT = 1

_HEADER = struct.Struct("<HBBI")


class Kind(IntEnum):
    """What a row belongs to; part of its key."""

    USER = 1
    ITEM = 2
    CONTROL = 3


class RowError(ValueError):
    """Bytes that are not a row of this layout; says what differs."""


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
        """The aligned record type of a slab. Gaps are fields, too, because NumPy's copies skip bytes without a name."""
        aligned = np.dtype([(f.name, f.dtype, f.shape) for f in self.fields], align=True)
        starts = [aligned.fields[f.name][1] for f in self.fields] if aligned.fields else []
        ends = [start + np.dtype((f.dtype, f.shape)).itemsize for f, start in zip(self.fields, starts, strict=True)]
        named: list[tuple[str, str, tuple[int, ...]]] = []
        for f, end, following in zip(self.fields, ends, [*starts[1:], aligned.itemsize], strict=True):
            named.append((f.name, f.dtype, f.shape))
            if end < following:
                named.append((f"gap_{end}", "u1", (following - end,)))
        return np.dtype(named, align=True)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the slab."""
        return self.dtype.itemsize

    def to_bytes(self, row: npt.NDArray[Any]) -> bytes:
        """Row (a 0-d or 1-element record) → header and body."""
        body = np.ascontiguousarray(row).tobytes()
        return _HEADER.pack(ROW_FORMAT, self.kind, 0, zlib.crc32(body)) + body

    def from_bytes(self, content: bytes) -> npt.NDArray[Any]:
        """Header and body → one row.

        Raises:
            RowError: truncated, another kind, a newer format, or a wrong checksum.
        """
        if len(content) != _HEADER.size + self.row_bytes:
            raise RowError(f"{len(content)} bytes, this layout has {_HEADER.size + self.row_bytes}")
        row_format, kind, _, checksum = _HEADER.unpack_from(content)
        if row_format > ROW_FORMAT:
            raise RowError(f"row format {row_format}, this release reads up to {ROW_FORMAT}: upgrade")
        if kind != self.kind:
            raise RowError(f"kind {kind}, expected {self.kind.value} ({self.kind.name.lower()})")
        body = content[_HEADER.size :]
        if zlib.crc32(body) != checksum:
            raise RowError("checksum differs: damaged")
        return np.frombuffer(body, dtype=self.dtype).copy()

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
    row_format: int = ROW_FORMAT
    updated_ms: int = 0

"""Rows as the words of their values, and back: the compiled loops under `Layout.to_values` and `from_values`.

A word is eight bytes. Most rows are young: their ring is nearly empty, and an item's pending sums are zero between
windows. So a value leaves out the words of a row that are zero, and a mask says which are there:

    header · mask · those words of the row that are not zero · CRC-32 of all before it

Bit k mod 64 of the mask's word k // 64 stands for word k of the row. The format before this one has no mask, and all
words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

WORD_BYTES = 8
MASK_BITS = 64

Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


def mask_words(row_words: int) -> int:
    """Words of the mask of a row."""
    return -(-row_words // MASK_BITS)


def _crc_tables() -> npt.NDArray[np.uint32]:
    """`[8, 256]`: what a byte does to the CRC-32 that is k bytes further on (Intel's slicing-by-8, 2006)."""
    tables = np.zeros((8, 256), np.uint32)
    tables[0] = np.arange(256)
    for _ in range(8):
        tables[0] = np.where(tables[0] & 1, (tables[0] >> 1) ^ np.uint32(0xEDB88320), tables[0] >> 1)
    for k in range(1, 8):
        tables[k] = (tables[k - 1] >> 8) ^ tables[0][tables[k - 1] & 0xFF]
    return tables


_CRC = _crc_tables()
_ALL = np.uint64(0xFFFFFFFF)
_BYTE = np.uint64(0xFF)


@njit(cache=True)
def _crc32(words):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """CRC-32 of words, little-endian: `zlib.crc32` of their bytes, a word at a time instead of a call a row."""
    crc = _ALL
    for k in range(words.shape[0]):
        word = words[k] ^ crc
        crc = np.uint64(0)
        for byte in range(8):
            crc ^= np.uint64(_CRC[7 - byte, (word >> np.uint64(8 * byte)) & _BYTE])
    return crc ^ _ALL


@njit(cache=True)
def pack(rows: Words, header: np.uint64, mask: int, values: Words) -> Counts:  # pragma: no cover - compiled
    """Rows `[m, W]` → the values' words, each at the start of a line of `values` `[≥ m, 1 + mask + W + 1]`.

    Returns the words of each value `[m]` without the last, half of which is the checksum. With a mask of no words rows
    are written whole.
    """
    counts = np.empty(rows.shape[0], np.int64)
    for i in range(rows.shape[0]):
        values[i, 0] = header
        at = 1 + mask
        if mask == 0:
            for k in range(rows.shape[1]):
                values[i, at + k] = rows[i, k]
            at += rows.shape[1]
        for word in range(mask):
            bits = np.uint64(0)
            for k in range(64 * word, min(64 * word + 64, rows.shape[1])):
                values[i, at] = rows[i, k]
                there = rows[i, k] != 0
                bits |= np.uint64(there) << np.uint64(k - 64 * word)
                at += int(there)
            values[i, 1 + word] = bits
        values[i, at] = _crc32(values[i, :at])
        counts[i] = at
    return counts


@njit(cache=True)
def unpack(
    content: Words, starts: Counts, counts: Counts, headers: Words, masks: Counts, rows: Words
) -> npt.NDArray[np.bool_]:  # pragma: no cover - compiled
    """What `pack` made → rows.

    Args:
        content: the values' words, one value after the other `[n]`.
        starts: where each value begins `[m]`.
        counts: words of each value `[m]` without the last, half of which is the checksum.
        headers: of the formats that are read `[f]`.
        masks: words of each format's mask `[f]`; 0: rows are whole.
        rows: zeros `[m, W]`, to be filled.

    Returns which values are undamaged and have one of the headers and the words that their mask says `[m]`; the
    others' rows are anything.
    """
    known = np.zeros(rows.shape[0], np.bool_)
    for i in range(rows.shape[0]):
        value = content[starts[i] : starts[i] + counts[i]]
        mask = -1
        for f in range(headers.shape[0]):
            if value[0] == headers[f]:
                mask = masks[f]
        if mask < 0 or value.shape[0] < 1 + mask or content[starts[i] + counts[i]] != _crc32(value):
            continue
        at = 1 + mask
        if mask == 0:
            known[i] = value.shape[0] == at + rows.shape[1]
            if known[i]:
                for k in range(rows.shape[1]):
                    rows[i, k] = value[at + k]
            continue
        for word in range(mask):
            bits = value[1 + word]
            for k in range(64 * word, min(64 * word + 64, rows.shape[1])):
                if (bits >> np.uint64(k - 64 * word)) & np.uint64(1):
                    if at < value.shape[0]:
                        rows[i, k] = value[at]
                    at += 1
        known[i] = at == value.shape[0]
    return known

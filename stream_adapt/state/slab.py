"""The memory of a slab: a file that grows in place, mapped, so that the kernel keeps in memory what is in use.

In a folder the rows that nobody touches are written to the disk and leave the memory; without a folder the file lies
in memory. Either way it has no name: nothing is left behind, whatever ends the process.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_adapt.errors import StateFull

#: Disk is taken so far ahead, or an eighth of the slab: few calls, and little that lies idle.
_STEP_BYTES = 64 << 20


class Slab:
    """`rows` is an array of records as long as the room for them; `grow` replaces it, and copies nothing.

    Arrays that were handed out before show the same memory, and keep it mapped as long as they live. A row may be
    written only after it was reserved: a full disk is an error there, and a killed process (SIGBUS) at the write.
    """

    def __init__(self, dtype: np.dtype[Any], folder: Path | None, rows: int) -> None:
        self._dtype = dtype
        self._folder = folder
        self._file = _nameless_file(folder)
        weakref.finalize(self, os.close, self._file)
        self._reserved = 0  # bytes from the start that have their place on the disk
        self.rows: npt.NDArray[Any] = np.zeros(0, dtype)
        self.grow(rows)

    def grow(self, rows: int) -> None:
        """Makes room for so many rows; costs no memory and no disk until they are reserved or written."""
        size = max(-(-rows * self._dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE, self._reserved)
        try:
            os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, size)
        except OSError as error:
            raise self._full(size - self.rows.nbytes, error) from error
        if self._folder is not None and hasattr(mmap, "MADV_RANDOM"):
            self._memory.madvise(mmap.MADV_RANDOM)  # one page of a user that comes back, not 32 of others
        self.rows = np.frombuffer(self._memory, self._dtype, rows)

    def reserve(self, first: int, end: int) -> None:
        """Takes disk for the rows from `first` to `end`; does nothing where the slab lies in memory.

        Raises:
            StateFull: there is no room.
        """
        start, stop = first * self._dtype.itemsize, end * self._dtype.itemsize
        if self._folder is None or start == stop:
            return
        if start < self._reserved:  # given back by `release`, or a part of it
            self._allocate(start, min(stop, self._reserved))
        if stop > self._reserved:
            ahead = min(self._reserved + max(_STEP_BYTES, self._reserved // 8), self.rows.nbytes)
            try:
                self._allocate(self._reserved, max(stop, ahead))
            except StateFull:
                ahead = stop  # the last bytes are of use, too
                self._allocate(self._reserved, stop)
            self._reserved = max(stop, ahead)

    def release(self, first: int, end: int) -> None:
        """Gives back memory and disk of the rows from `first` to `end`, which hold anything afterwards."""
        start = -(-first * self._dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = end * self._dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop and hasattr(mmap, "MADV_REMOVE"):
            # A file system without holes keeps the room; other rows use it again.
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_REMOVE, start, stop - start)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that have a place, on the disk or in memory."""
        return os.fstat(self._file).st_blocks * 512

    def _allocate(self, start: int, stop: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, start, stop - start)
        except OSError as error:
            raise self._full(stop - start, error) from error

    def _full(self, needed: int, error: OSError) -> StateFull:
        where = "memory" if self._folder is None else f"state.dir={self._folder}"
        room = os.fstatvfs(self._file)
        return StateFull(
            f"{where}: no room for {needed:,} more bytes of rows ({error.strerror}); they take {self.nbytes:,}, and "
            f"{room.f_bavail * room.f_frsize:,} are free there. Nothing uncommitted is visible. To do: make room, lift "
            "the limit on the size of files, choose a folder on a larger disk, or set state.ttl_s"
        )


def _nameless_file(folder: Path | None) -> int:
    """A new file that is gone with its last descriptor."""
    if folder is None and sys.platform == "linux":
        return os.memfd_create("stream-adapt-rows")
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise StateFull(
            f"state.dir={folder}: no file can be made there: {error.strerror}. To do: choose a folder on a local "
            "disk that may be written to"
        ) from error

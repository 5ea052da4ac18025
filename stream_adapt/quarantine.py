"""Quarantine: a record that kills the process is found, and becomes a dead letter.

Such a record aborts its batch with the process, so Kafka remembers nothing of it; only a file outside of it can. Before
each batch the marker says where the batch ends. A clean exit empties it. A start that finds more goes up to these ends
with care: few records to a transaction, each handled alone, and named in the marker first. A record that was named at
the death of the process `crashes` times is not looked at again: `decode.py` makes it a dead letter, `reason=crash`.

    started, marker empty ──────────────▶ normal
    started, marker names batch ends ───▶ careful ──the ends are passed──▶ normal

A write is one `pwrite` of some hundred bytes that nobody waits for to reach the disk: what dies is the process, not
the machine. An exception that nobody raised on purpose is an unclean exit, too: the same record would raise it again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import msgspec
import structlog

from stream_adapt.errors import ConfigError, StreamAdaptError
from stream_adapt.record import RawBatch, Source

log = structlog.get_logger(__name__)

#: Name of the marker below `state.dir`.
FILE = "in-flight.json"
#: Records of a transaction while careful: little is done again when the process dies once more.
CAREFUL_BATCH = 256


class Marker(msgspec.Struct, omit_defaults=True):
    """What the file says."""

    topic: str  # name and id: offsets of another topic mean nothing
    ends: dict[int, int] = {}  # by partition, the end of what was in flight or is still to be passed with care
    at: tuple[int, int] | None = None  # the record that is handled alone right now
    deaths: list[tuple[int, int, int]] = []  # partition, offset, how often the process died at it


class Quarantine:
    """The marker, and what follows from it. `with` it: leaving by a bug or a death leaves the marker."""

    def __init__(self, folder: Path | None = None, topic: str = "", crashes: int = 2) -> None:
        """Reads what the last process left.

        Args:
            folder: where the marker lies; None: no marker, and no quarantine.
            topic: what the offsets belong to, name and id.
            crashes: times the process may die at a record.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        self._topic = topic
        self._pending: dict[int, int] = {}
        self._deaths: dict[Source, int] = {}
        self._written = 0
        self._file = self._open(folder) if folder is not None else None
        if self._file is not None:
            self._read(self._file)
        #: Records that are not handled any more.
        self.condemned = {source for source, deaths in self._deaths.items() if deaths >= crashes}
        if self._pending:
            log.warning(
                "the last process died in the middle of a batch: records are handled one by one up to its end",
                ends=self._pending,
                named_before=sorted(self._deaths),
                quarantined=sorted(self.condemned),
            )

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bug = isinstance(error, Exception) and not isinstance(error, StreamAdaptError)
        if self._file is None:
            return
        if not bug:
            self._write(self._pending)
        os.close(self._file)
        self._file = None

    def limit(self, max_batch: int, next_offsets: Mapping[int, int]) -> int:
        """Records of the next batch, given where the owned partitions stand; forgets what is passed."""
        self._forget_passed(next_offsets)
        to_come = not next_offsets or any(p in next_offsets for p in self._pending)  # they are assigned within a poll
        return min(max_batch, CAREFUL_BATCH) if self._pending and to_come else max_batch

    def chunks(self, raw: RawBatch, next_offsets: Mapping[int, int], size: int) -> Iterator[RawBatch]:
        """The batch, which ends at `next_offsets`, in chunks of `size`, or record by record; the marker says so."""
        ends = {**self._pending}
        for partition, end in next_offsets.items():
            ends[partition] = max(end, ends.get(partition, 0))
        if not any(p in self._pending for p in next_offsets):
            self._write(ends)
            yield from raw.chunks(size)
            return
        for one in raw.chunks(1):
            self._write(ends, (int(one.partitions[0]), int(one.offsets[0])) if len(one) else None)
            yield one
        self._write(ends)  # what follows, up to the commit, is not this record's fault

    def _forget_passed(self, next_offsets: Mapping[int, int]) -> None:
        if not self._pending:
            return
        self._pending = {p: end for p, end in self._pending.items() if next_offsets.get(p, 0) < end}
        self._deaths = {s: n for s, n in self._deaths.items() if next_offsets.get(s[0], 0) <= s[1]}
        self.condemned &= set(self._deaths)
        if not self._pending:
            log.info("what was in flight when the last process died is passed: back to normal")

    def _open(self, folder: Path) -> int | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"state.dir={folder}: {error.strerror}; name a folder that this member may write to"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            log.warning("another process holds this member's state.dir: no quarantine here", dir=str(folder))
            return None
        return file

    def _read(self, file: int) -> None:
        content = os.pread(file, os.fstat(file).st_size, 0)
        self._written = len(content)
        if not content.strip():
            return
        try:
            found = msgspec.json.decode(content, type=Marker)
        except msgspec.DecodeError as error:
            log.warning("the marker of the last process cannot be read, and is ignored", error=str(error))
            return
        if found.topic != self._topic:
            return
        self._pending = found.ends
        self._deaths = {(p, o): n for p, o, n in found.deaths}
        if found.at is not None:
            self._deaths[found.at] = self._deaths.get(found.at, 0) + 1
        self._write(self._pending)

    def _write(self, ends: Mapping[int, int], at: Source | None = None) -> None:
        """Says what is in flight. Blanks cover what a longer content left."""
        if self._file is None:
            return
        content = b""
        if ends or self._deaths:
            deaths = [(p, o, n) for (p, o), n in self._deaths.items()]
            content = msgspec.json.encode(Marker(self._topic, dict(ends), at, deaths))
        os.pwrite(self._file, content.ljust(self._written), 0)
        self._written = len(content)

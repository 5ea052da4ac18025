"""`bench scale`: how much memory so many users take, and what that costs in speed, in a process of its own.

Every user's row is started by an event of that user, through the same code as in service (`Adapter`), in a slab that
lies in a file. Then come events of users drawn at random, and then a hot user with nine of ten events. Timed are
`adapt`, `passed` and `commit`; making up the events is outside, and so are decoding and Kafka.

A limit on memory is set as a cgroup of that process below its own, where the kernel lets us; it counts the pages of
the slab's file, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from stream_adapt.adapt import Adapter
from stream_adapt.errors import StateFull
from stream_adapt.models import LearnerSpec, read_model
from stream_adapt.record import Batch, ItemId, Longs, UserId
from stream_adapt.runner import CHUNK
from stream_adapt.service import calm_collector
from stream_adapt.testing.model import random_model

#: As in the loop when it has a backlog: so many chunks are one transaction.
_CHUNKS_PER_COMMIT = 16
_ITEMS = 2_000
_START_MS = 1_700_000_000_000
_HOT_SHARE = 0.9


@dataclass(frozen=True)
class Scale:
    """Parameters of `bench scale`."""

    users: int = 1_000_000
    events: int = 500_000
    partitions: int = 4
    limit_bytes: int | None = None
    folder: str | None = None


class ScaleResult(msgspec.Struct):
    """What `bench scale --json` prints. Bytes of the process are those at the end."""

    rows: int  # of users
    row_bytes: int
    resident_bytes: int  # of the process, pages of the slab's file in memory included
    anonymous_bytes: int  # those of them that cannot leave the memory
    base_bytes: int  # resident before the first row: interpreter, libraries, compiled code
    slab_bytes: int  # of the users' rows in the file
    index_bytes: int  # ids, index and what else is kept by row; estimated
    limit_bytes: int | None
    charged_bytes: int | None  # what the limit counts; libraries that others loaded first are not in it
    new_users_per_s: float
    uniform_events_per_s: float
    events_per_s: float  # with a hot user


def run_scale(request: Scale, say: Callable[[str], None]) -> ScaleResult:
    """Measures in a child process.

    Raises:
        StateFull: the rows did not fit, or the process was killed at the limit.
    """
    with _limited(request.limit_bytes) as group:
        if request.limit_bytes and group is None:
            say("no cgroup can be made here: the limit is not enforced")
        command = [sys.executable, "-m", "stream_adapt.bench_scale", msgspec.json.encode(asdict(request)).decode()]
        if group is not None:
            command.append(str(group))
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise StateFull(
            f"bench scale with {request.users:,} users and limit_bytes={request.limit_bytes} ended with "
            f"{done.returncode} (-9: killed at the limit). To do: a higher limit, or fewer users"
        )
    return msgspec.json.decode(done.stdout, type=ScaleResult)


@contextmanager
def _limited(limit_bytes: int | None) -> Iterator[Path | None]:
    """A memory cgroup with this limit, or None where there is no limit or the kernel does not let us."""
    group = limit_bytes and _own_group()
    if not group:
        yield None
        return
    child = group / f"stream-adapt-bench-{os.getpid()}"
    try:
        child.mkdir()
        _limit_file(child).write_text(str(limit_bytes))
    except OSError:
        if child.is_dir():
            child.rmdir()
        yield None
        return
    try:
        yield child
    finally:
        child.rmdir()


def _limit_file(group: Path) -> Path:
    older = group / "memory.limit_in_bytes"
    return older if older.exists() else group / "memory.max"


def _own_group() -> Path | None:
    """The folder of this process's memory cgroup, version 1 or 2."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in lines:
        for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
            group = root / path.lstrip("/")
            if controllers in ("", "memory") and _limit_file(group).exists():
                return group
    return None


class _Member:
    """An adapter with rows in a folder, and a stream of events for it."""

    def __init__(self, request: Scale, folder: Path) -> None:
        spec = LearnerSpec()
        items = [f"item-{k}" for k in range(_ITEMS)]
        random_model(folder, spec, items)
        self.adapter = Adapter(read_model(folder), folder=folder)
        self.adapter.warm_up()
        self._items = [ItemId(item) for item in items]
        self._partitions = request.partitions
        self._random = np.random.default_rng(0)
        self._done = 0

    def feed(self, users: Iterator[Longs]) -> float:
        """Events of these users, chunk by chunk; returns events/s."""
        seconds, events = 0.0, 0
        for k, who in enumerate(users, 1):
            batch = self._batch(who)
            started = time.perf_counter()
            self.adapter.adapt(batch)
            self.adapter.passed(batch.partitions, batch.offsets)
            if k % _CHUNKS_PER_COMMIT == 0:
                self.adapter.commit()
            seconds += time.perf_counter() - started
            events += len(batch)
        self.adapter.commit()
        return round(events / seconds, 1)

    def _batch(self, who: Longs) -> Batch:
        """One event of each user, all from one partition, as records are fetched."""
        n = len(who)
        at = np.arange(self._done, self._done + n)
        self._done += n
        return Batch(
            event_ids=[""] * n,
            user_ids=[UserId(f"user-{k}") for k in who.tolist()],
            item_ids=[self._items[k] for k in self._random.integers(0, _ITEMS, n).tolist()],
            features=[None] * n,
            timestamps_ms=_START_MS + at,
            levels=self._random.integers(0, 2, n).astype(np.int8),
            partitions=(np.full(n, int(who[0]) % self._partitions)).astype(np.int32),
            offsets=at,
        )

    def every_user(self, users: int) -> Iterator[Longs]:
        """Each user once."""
        for partition in range(self._partitions):
            mine = np.arange(partition, users, self._partitions)
            for start in range(0, len(mine), CHUNK):
                yield mine[start : start + CHUNK]

    def drawn(self, users: int, events: int, hot_share: float) -> Iterator[Longs]:
        """Users of one partition after the other, drawn at random, a share of them the partition's first one."""
        for chunk in range(-(-events // CHUNK)):
            partition = chunk % self._partitions if hot_share == 0 else 0
            among = -(-(users - partition) // self._partitions)
            who = partition + self._partitions * self._random.integers(0, among, CHUNK)
            yield np.where(self._random.random(CHUNK) < hot_share, partition, who)


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _charged(group: Path) -> int:
    older = group / "memory.usage_in_bytes"
    return int((older if older.exists() else group / "memory.current").read_text())


def _measure(request: Scale) -> ScaleResult:
    with tempfile.TemporaryDirectory(dir=request.folder) as folder:
        member = _Member(request, Path(folder))
        calm_collector()
        base = _resident("VmRSS")
        new = member.feed(member.every_user(request.users))
        uniform = member.feed(member.drawn(request.users, request.events, 0.0))
        hot = member.feed(member.drawn(request.users, request.events, _HOT_SHARE))
        users = member.adapter.users
        return ScaleResult(
            rows=len(users),
            row_bytes=users.layout.row_bytes,
            resident_bytes=_resident("VmRSS"),
            anonymous_bytes=_resident("RssAnon"),
            base_bytes=base,
            slab_bytes=users.slab_bytes,
            index_bytes=users.index_bytes,
            limit_bytes=request.limit_bytes,
            charged_bytes=_charged(Path(sys.argv[2])) if len(sys.argv) > 2 else None,
            new_users_per_s=new,
            uniform_events_per_s=uniform,
            events_per_s=hot,
        )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        Path(sys.argv[2], "cgroup.procs").write_text(str(os.getpid()))
    sys.stdout.buffer.write(msgspec.json.encode(_measure(msgspec.json.decode(sys.argv[1], type=Scale))))

"""The process that trains: started, watched, ended. What it says is believed only as far as it can be checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from stream_adapt.config import Config
from stream_adapt.local import dying_with_parent
from stream_adapt.refresh.training import JOB, OUTCOME, PROGRESS, Job, Outcome, Progress, write

log = structlog.get_logger(__name__)

#: What a training may take beyond twice its time: starting, reading the window, writing the model.
_GRACE_S = 120.0
_END_S = 10.0
_COMMAND = (sys.executable, "-m", "stream_adapt.refresh.training")


class Worker:
    """One training."""

    def __init__(
        self,
        config: Config,
        job: Job,
        *,
        command: Sequence[str] = _COMMAND,
        limit_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the process; it ends with this one, even by `kill -9` on Linux.

        Args:
            config: what it is told of time and threads.
            job: what it does.
            command: that does jobs.
            limit_s: after which it is killed; twice `refresh.training_s` and what starting takes, if not given.
            clock: that the limit is measured by.
        """
        self._clock = clock
        self._limit_s = limit_s if limit_s is not None else 2 * config.refresh.training_s + _GRACE_S
        self._folder = tempfile.TemporaryDirectory(prefix="stream-adapt-refresh-")
        self._path = Path(self._folder.name)
        write(self._path / JOB, job)
        threads = str(config.refresh.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._started = clock()
        self._process = subprocess.Popen(
            dying_with_parent([*command, str(self._path)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        log.info("training started", pid=self._process.pid, champion=job.champion, limit_s=self._limit_s)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> Outcome | None:
        """What came of it, once it has ended; ends it when its time is up."""
        code = self._process.poll()
        if code is None:
            if self._clock() - self._started <= self._limit_s:
                return None
            self._kill()
            return Outcome(reason=f"the training was killed after {self._limit_s:.0f} s without an end")
        return self._outcome(code)

    def progress(self) -> Progress | None:
        """How far it is, as it says."""
        try:
            return msgspec.json.decode((self._path / PROGRESS).read_bytes(), type=Progress)
        except (OSError, msgspec.MsgspecError):
            return None

    def close(self) -> None:
        """Ends it, if it has not ended."""
        self._kill()
        self._folder.cleanup()

    def _outcome(self, code: int) -> Outcome:
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        try:
            content = (self._path / OUTCOME).read_bytes()
        except OSError:
            return Outcome(reason=f"the training ended {how} and left no outcome; its log says why")
        try:
            outcome = msgspec.json.decode(content, type=Outcome)
        except msgspec.MsgspecError as error:
            return Outcome(reason=f"the training ended {how}, and its outcome is none: {error}: {content[:80]!r}")
        return outcome if code == 0 else Outcome(reason=f"the training ended {how}")

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_END_S)

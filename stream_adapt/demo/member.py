"""`stream-adapt run` as its own process: started, awaited until ready, stopped, and never left behind."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_adapt.errors import StreamAdaptError
from stream_adapt.local import dying_with_parent

#: torch and numba are imported, kernels compiled, and the group joined.
READY_TIMEOUT_S = 120.0
#: A batch is finished and committed, and the group left.
STOP_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 5.0
#: Exit codes with a meaning of their own (`errors.py`) that the demo hands on.
_PASSED_ON = range(2, 7)


class MemberError(StreamAdaptError):
    """The process ended, or did not get ready: the message has the tail of its log; its exit code is handed on."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        if exit_code in _PASSED_ON:
            self.exit_code = exit_code


class Member:
    """A member of the consumer group, as a context manager.

    Args:
        config: its configuration file.
        log: file for what it prints.
        environment: its environment.
        metrics: host and port on which it serves /readyz.
    """

    def __init__(self, config: Path, log: Path, environment: Mapping[str, str], metrics: tuple[str, int]) -> None:
        self._config = config
        self._log = log
        self._environment = environment
        self._metrics = metrics
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "stream_adapt", "run", "-c", str(self._config)]
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C goes to the demo, which ends the member before the broker.
            self._process = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self._environment),
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it, if it runs still: in order, but without waiting as long as `stop` does."""
        if self._process is not None:
            self._end(_LEAVE_TIMEOUT_S)

    def wait_until_ready(self) -> None:
        """Returns when /readyz says 200: partitions assigned, and the loop turning.

        Raises:
            MemberError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._ready():
            self.check()
            if time.monotonic() > deadline:
                raise MemberError(f"`stream-adapt run` was not ready within {READY_TIMEOUT_S:g} s.{self.log_tail()}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raises MemberError if it runs no longer."""
        code = self._running.poll()
        if code is not None:
            raise MemberError(f"`stream-adapt run` ended by itself with exit code {code}.{self.log_tail()}", code)

    def stop(self) -> None:
        """SIGTERM, and wait: it finishes its batch, commits and leaves the group.

        Raises:
            MemberError: it did not end in time, or not well.
        """
        code = self._end(STOP_TIMEOUT_S)
        if code != 0:
            raise MemberError(f"`stream-adapt run`, told to stop, ended with exit code {code}.{self.log_tail()}", code)

    def kill(self) -> None:
        """SIGKILL: it is gone without a word."""
        self._running.kill()
        self._running.wait()

    def log_tail(self, lines: int = 25) -> str:
        """The end of its log, as the end of a message."""
        with self._log.open(encoding="utf-8", errors="replace") as log:
            kept = deque((line.rstrip() for line in log), maxlen=lines)
        return " The end of its log:\n" + "\n".join(f"  {line}" for line in kept) if kept else " It logged nothing."

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the member was not started")
        return self._process

    def _ready(self) -> bool:
        host, port = self._metrics
        connection = http.client.HTTPConnection(host, port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _end(self, timeout_s: float) -> int:
        process = self._running
        process.send_signal(signal.SIGTERM)  # harmless where it ended already
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

"""A watchdog over calls that must come back: one that does not ends the process.

librdkafka bounds its calls by time-outs, and yet a call has been seen that never returned, after time-outs and resets
of connections. Nothing can interrupt it from inside, and the loop would stand still for ever. Ending the process is
safe: what is not committed is aborted by the next producer of the same transactional.id, as after a kill, and whoever
supervises the member starts it again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from stream_adapt.errors import KafkaRefused

log = structlog.get_logger(__name__)

#: Between two looks. A longer pause is no time of the call: the whole process stood still, as under SIGSTOP.
TICK_S = 1.0


class Watchdog:
    """Watches one call at a time, of the thread that runs the loop."""

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self._end = end
        self._watched: tuple[str, float] | None = None  # what is called, and how long it may take
        self._spent_s = 0.0
        self._seen: tuple[str, float] | None = None

    def start(self) -> None:
        """Looks from now on, from a thread that does not keep the process alive."""
        threading.Thread(target=self._look_for_ever, name="watchdog", daemon=True).start()

    @contextmanager
    def watch(self, call: str, seconds: float) -> Iterator[None]:
        """The process ends with 3 if the block takes longer."""
        self._watched = (call, seconds)
        try:
            yield
        finally:
            self._watched = None

    def look(self, since_last_s: float) -> None:
        """One look, so long after the last one."""
        watched = self._watched
        # Another tuple is another call, also one of the same name.
        self._spent_s = self._spent_s + min(since_last_s, 2 * TICK_S) if watched is self._seen else 0.0
        self._seen = watched
        if watched is None or self._spent_s <= watched[1]:
            return
        log.critical(
            "a call into the Kafka client does not return; ending, so that a supervisor starts this member again",
            call=watched[0],
            seconds=round(self._spent_s),
        )
        self._end(KafkaRefused.exit_code)

    def _look_for_ever(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(TICK_S)
            now = time.monotonic()
            self.look(now - last)
            last = now

"""A clock that tests set, and make jump: for `Runner(clock=…)`, `Emitter(now_ms=…)` and whatever else takes one."""

from __future__ import annotations


class SettableClock:
    """Seconds since the epoch, that go on only when they are told to.

    The clock itself is called for seconds; `now_ms` gives whole milliseconds.
    """

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return round(self.now_s * 1000)

    def jump(self, seconds: float) -> None:
        """Forwards, or backwards as a clock does that is corrected."""
        self.now_s += seconds

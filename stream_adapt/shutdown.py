"""Being told to stop, by signals. Imports nothing heavy: a member listens from its first moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


class StopAtOnce(BaseException):
    """The second signal: what is under way is left to be aborted."""


@dataclass
class Shutdown:
    """Told by signals: the first asks for a stop after the batch, the second for one at once."""

    asked: bool = False
    signals: list[int] = field(default_factory=list)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
        if self.asked:
            raise StopAtOnce
        self.asked = True

    @contextmanager
    def installed(self) -> Iterator[Shutdown]:
        """SIGINT and SIGTERM lead here while the block runs."""
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""Refreshes under chaos: who asks for them, who goes back to the first model, and what becomes of those who work.

    controllers   `stream-adapt refresh --follow` as processes of the team: killed and stopped like members
    trainers      their children; one that is to be killed is killed so long after it appeared
    operator      asks for refreshes, and announces models by hand: the first one again, so that there is something to
                  gain, or a second one that was not trained either

The first model knows nothing, so a challenger that was trained on the stream is better and gets promoted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from stream_adapt import promotion
from stream_adapt.announcements import Announcements
from stream_adapt.chaos.members import Team
from stream_adapt.config import Config
from stream_adapt.errors import ConfigError, KafkaRefused
from stream_adapt.refresh.journal import ask

#: Of two, one leads and the other waits to.
CONTROLLERS = 2
#: Everything as short as it can be: whoever leads lives for half a minute.
SETTINGS: dict[str, Any] = {
    "mode": "external",
    "cooldown_s": 0,
    "per_day": 1_000,
    "window_events": 20_000,
    "training_s": 5,
    "shadow_events": 300,
    "shadow_s": 60,
    "serve_s": 60,
    "watch_events": 1_000,
    "watch_s": 60,
}
COMMAND = ("refresh", "--follow")
_TRAINING = b"stream_adapt.refresh.training"

#: A controller is killed at this age at the earliest: it was imported, has joined the group, and may lead.
_GROWN_S = 20.0

What = Literal["refresh", "promote"]


def controller_name(number: int) -> str:
    """Name of a controller's instance."""
    return f"c{number}"


class Operator:
    """Does by hand what is asked of it, one after the other, in a thread of its own: brokers may be away."""

    def __init__(self, config: Config, first: str, second: str) -> None:
        """Begins to wait for work.

        Args:
            config: with the address of the broker past the proxy.
            first: the version that everybody begins with: announced where another one is served.
            second: announced where the first one is.
        """
        self.done: list[What] = []
        self.refused: list[str] = []
        self.error: BaseException | None = None
        self._config, self._first, self._second = config, first, second
        self._asked: SimpleQueue[What | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="chaos-operator", daemon=True)
        self._thread.start()

    def do(self, what: What) -> None:
        """Asks it to."""
        self._asked.put(what)

    def close(self) -> None:
        """Returns when all that was asked is done, or could not be."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (what := self._asked.get()) is not None:
            try:
                self._do(what)
                self.done.append(what)
            except (KafkaRefused, ConfigError) as error:  # the broker was away, or somebody else announced another one
                self.refused.append(f"{what}: {error}")
            except Exception as error:  # noqa: BLE001 - a fault of the run, told at its end
                self.error = error

    def _do(self, what: What) -> None:
        if what == "refresh":
            ask(self._config, "chaos")
            return
        with closing(Announcements(self._config)) as announced:
            announced.read_to_end()
            newest = announced.newest()
        served = newest.version if newest else self._first
        promotion.promote(self._config, self._first if served != self._first else self._second, "chaos")


class Reaper:
    """Kills controllers and trainings, but not before they have come as far as to have something to lose."""

    def __init__(self, team: Team) -> None:
        self.trainings = self.controllers = 0  # killed
        self._team = team
        self._due: list[str] = []  # controllers whose kill waits until they are old enough
        self._delays: list[float] = []  # of kills that wait for a training, the next one first
        self._seen: dict[int, float] = {}  # by process: when it was first seen

    def kill_training(self, after_s: float) -> None:
        """The next training is killed so long after it is first seen."""
        self._delays.append(after_s)

    def kill_controller(self, name: str) -> None:
        """A controller is killed once it has lived long enough."""
        self._due.append(name)

    def tend(self) -> None:
        """Kills whoever has lived long enough."""
        for name in [n for n in self._due if self._team.age_s(n) >= _GROWN_S]:
            self._due.remove(name)
            self.controllers += self._team.kill(name)
        if self._delays:
            self._tend_trainings()

    def _tend_trainings(self) -> None:
        now, running = time.monotonic(), set(self._running())
        self._seen = {pid: self._seen.get(pid, now) for pid in running}
        for pid, since in self._seen.items():
            if self._delays and now - since >= self._delays[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.trainings += 1
                    self._delays.pop(0)

    def _running(self) -> Iterator[int]:
        for name, member in self._team.members.items():
            if name.startswith("c"):
                yield from trainings_of(member.process.pid)


def trainings_of(controller: int) -> list[int]:
    """Processes that train for a controller: Linux says; elsewhere none are found."""
    found = []
    for task in Path(f"/proc/{controller}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in map(int, task.read_text().split()):
                if _TRAINING in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
    return found
